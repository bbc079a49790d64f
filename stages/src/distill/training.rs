//! How a model is trained: the parameters that all methods share.

use crate::evaluate::{EvaluateParams, Place};
use crate::images::dataset::Subset;
use crate::params::{FilePath, Params, Problem, Span, parse};
use merganser_onnx::train::{AdamW, Algorithm, Decay, Schedule, Sgd};
use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct TrainingParams {
    /// Passes over the images.
    #[serde(default = "usual_epochs")]
    pub epochs: u32,
    /// The most steps, if the epochs have more.
    #[serde(default)]
    pub max_steps: Option<u64>,
    /// Images per step; the last step of an epoch takes those that are left.
    #[serde(default = "usual_batch")]
    pub batch_size: u32,
    /// Images that are in memory at once; gradients are added up to those of a step (default: a step's).
    #[serde(default)]
    pub micro_batch: Option<u32>,
    /// `adamw` or `sgd`.
    #[serde(default)]
    pub optimizer: OptimizerId,
    /// The highest learning rate.
    #[serde(default = "usual_rate")]
    pub learning_rate: f64,
    /// The share of all steps over which the rate rises from zero.
    #[serde(default = "usual_warm_up")]
    pub warm_up: f64,
    /// What the rate does after that: `cosine` falls to zero, `constant` stays.
    #[serde(default)]
    pub schedule: ScheduleId,
    /// Weight decay; of `adamw` decoupled.
    #[serde(default = "usual_decay")]
    pub weight_decay: f64,
    /// Momentum of `sgd`.
    #[serde(default = "usual_momentum")]
    pub momentum: f64,
    /// β₁ of `adamw`.
    #[serde(default = "usual_beta1")]
    pub beta1: f64,
    /// β₂ of `adamw`.
    #[serde(default = "usual_beta2")]
    pub beta2: f64,
    /// The largest norm of all gradients together; 0 leaves them as they are.
    #[serde(default = "usual_clip")]
    pub clip: f64,
    /// Decides the order of the images, and everything else that is random.
    #[serde(default)]
    pub seed: u64,
    /// Images that are not trained on, to know when to stop: `{ n = 100, seed = 0 }` of the dataset, or others with the keys of the dataset as
    /// far as they differ (`{ split = "val" }`).
    #[serde(default)]
    pub validation: Option<ValidationParams>,
    /// Stop after so many epochs without a better validation (default: never).
    #[serde(default)]
    pub patience: Option<u32>,
    /// What a better validation is: `loss` or `accuracy`.
    #[serde(default)]
    pub monitor: Monitor,
    /// Which weights come out: those of the `best` validation (without one, the last), or the `last`.
    #[serde(default)]
    pub keep: Keep,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum OptimizerId {
    #[default]
    AdamW,
    Sgd,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum ScheduleId {
    #[default]
    Cosine,
    Constant,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Monitor {
    #[default]
    Loss,
    Accuracy,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Keep {
    #[default]
    Best,
    Last,
}

/// Images for validation.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ValidationParams {
    /// So many of the dataset's images, which are then not trained on.
    #[serde(default)]
    n: Option<u64>,
    /// Which ones.
    #[serde(default)]
    seed: u64,
    /// Whether every class gets equally many.
    #[serde(default)]
    balanced: bool,
    /// As `format` of the dataset.
    #[serde(default)]
    format: Option<String>,
    /// As `images` of the dataset.
    #[serde(default)]
    images: Option<FilePath>,
    /// As `labels` of the dataset.
    #[serde(default)]
    labels: Option<FilePath>,
    /// As `path` of the dataset.
    #[serde(default)]
    path: Option<FilePath>,
    /// As `split` of the dataset.
    #[serde(default)]
    split: Option<String>,
}

fn usual_epochs() -> u32 {
    15
}

fn usual_batch() -> u32 {
    32
}

fn usual_rate() -> f64 {
    1e-4
}

fn usual_warm_up() -> f64 {
    0.1
}

fn usual_decay() -> f64 {
    0.01
}

fn usual_momentum() -> f64 {
    0.9
}

fn usual_beta1() -> f64 {
    0.9
}

fn usual_beta2() -> f64 {
    0.999
}

fn usual_clip() -> f64 {
    1.0
}

impl TrainingParams {
    pub(super) const KEYS: &[&str] = &[
        "epochs",
        "max_steps",
        "batch_size",
        "micro_batch",
        "optimizer",
        "learning_rate",
        "warm_up",
        "schedule",
        "weight_decay",
        "momentum",
        "beta1",
        "beta2",
        "clip",
        "seed",
        "validation",
        "patience",
        "monitor",
        "keep",
    ];

    /// Takes the keys out of a stage's table and checks them.
    pub(super) fn take(params: &mut Params<'_>) -> Result<Self, Vec<Problem>> {
        let own = params.split_off(Self::KEYS);
        let span_of = |key: &str| own.table.get(key).map_or(own.span, |entry| entry.node.span);
        let parsed: Self = parse(&own)?;
        let problems = parsed.problems(&span_of);
        if problems.is_empty() { Ok(parsed) } else { Err(problems) }
    }

    /// Adds the keys to the documentation of a method's own parameters.
    pub(super) fn document(mut parameters: Schema) -> Schema {
        let mut own = schema_for!(Self);
        for section in ["properties", "$defs"] {
            let Some(ours) = own.ensure_object().remove(section) else { continue };
            let theirs = parameters.ensure_object().entry(section).or_insert_with(|| serde_json::json!({}));
            if let (Some(theirs), serde_json::Value::Object(ours)) = (theirs.as_object_mut(), ours) {
                theirs.extend(ours);
            }
        }
        parameters
    }

    fn problems(&self, span_of: &dyn Fn(&str) -> Span) -> Vec<Problem> {
        let mut problems = Vec::new();
        let mut complain = |key: &str, message: String| {
            problems.push(Problem::new("bad-value", message).at(span_of(key)));
        };
        let at_least_one = [
            ("epochs", Some(u64::from(self.epochs))),
            ("max_steps", self.max_steps),
            ("batch_size", Some(self.batch_size.into())),
            ("micro_batch", self.micro_batch.map(u64::from)),
            ("patience", self.patience.map(u64::from)),
        ];
        for (key, _) in at_least_one.into_iter().filter(|(_, value)| *value == Some(0)) {
            complain(key, format!("`{key}` must be at least 1, got 0"));
        }
        let positive = self.learning_rate as f32 > 0.0 && (self.learning_rate as f32).is_finite();
        if !positive {
            let message = format!("`learning_rate` must be above zero, got {}", self.learning_rate);
            complain("learning_rate", message);
        }
        for (key, value) in [("weight_decay", self.weight_decay), ("clip", self.clip)] {
            if !(value >= 0.0 && (value as f32).is_finite()) {
                complain(key, format!("`{key}` must be zero or more, got {value}"));
            }
        }
        if !(0.0..=1.0).contains(&self.warm_up) {
            complain(
                "warm_up",
                format!("`warm_up` is a share of all steps, from 0 to 1, got {}", self.warm_up),
            );
        }
        for (key, value) in [("momentum", self.momentum), ("beta1", self.beta1), ("beta2", self.beta2)] {
            if !(0.0..1.0).contains(&value) {
                complain(key, format!("`{key}` must be at least 0 and below 1, got {value}"));
            }
        }
        if self.patience.is_some() && self.validation.is_none() {
            complain("patience", "`patience` needs images for `validation`".to_owned());
        }
        if let Some(validation) = &self.validation {
            problems.extend(validation.problem().map(|problem| problem.at(span_of("validation"))));
        }
        problems
    }

    /// Where images for validation lie, if they are not some of the dataset's own.
    pub(super) fn validation_place(&self) -> Option<Place> {
        self.validation.as_ref().and_then(ValidationParams::place)
    }

    /// Which of the dataset's own images are for validation.
    pub(super) fn validation_split(&self) -> Option<Subset> {
        let validation = self.validation.as_ref()?;
        let n = usize::try_from(validation.n?).unwrap_or(usize::MAX);
        Some(Subset { n, seed: validation.seed, balanced: validation.balanced })
    }

    /// Whether images for validation, where there are some, decide what comes out.
    pub(super) fn selects(&self) -> bool {
        self.patience.is_some() || self.keep == Keep::Best
    }

    pub(super) fn algorithm(&self) -> Algorithm {
        match self.optimizer {
            OptimizerId::AdamW => Algorithm::AdamW(AdamW {
                beta1: self.beta1,
                beta2: self.beta2,
                weight_decay: self.weight_decay,
                ..AdamW::default()
            }),
            OptimizerId::Sgd => Algorithm::Sgd(Sgd {
                momentum: self.momentum as f32,
                nesterov: false,
                weight_decay: self.weight_decay as f32,
            }),
        }
    }

    /// The learning rates of a run of so many steps.
    pub(super) fn rates(&self, total: u64) -> Schedule {
        Schedule {
            rate: self.learning_rate as f32,
            warm_up: (self.warm_up * total as f64).round() as u64,
            total,
            decay: match self.schedule {
                ScheduleId::Cosine => Decay::Cosine,
                ScheduleId::Constant => Decay::Constant,
            },
        }
    }
}

impl ValidationParams {
    fn place(&self) -> Option<Place> {
        let Self { format, images, labels, path, split, .. } = self.clone();
        let place = Place { format, images, labels, path, split };
        (place != Place::default()).then_some(place)
    }

    fn problem(&self) -> Option<Problem> {
        match (self.n, self.place()) {
            (Some(0), _) => Some(Problem::new("bad-value", "`validation.n` must be at least 1, got 0")),
            (Some(_), Some(_)) => Some(Problem::new(
                "bad-value",
                "`validation` is either `n` images of the dataset, or images elsewhere",
            )),
            (None, None) => Some(
                Problem::new("missing-key", "`validation` names no images")
                    .help("`{ n = 100 }` sets so many aside, `{ split = \"…\" }` or paths name others"),
            ),
            _ => None,
        }
    }
}

/// The keys that a stage which trains has in common with evaluations: `batch_size` is that of the steps.
pub(super) fn evaluation_keys() -> Vec<&'static str> {
    EvaluateParams::KEYS.iter().copied().filter(|key| *key != "batch_size").collect()
}
