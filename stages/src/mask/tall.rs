//! `tall`: the entries that a merged model must keep for a task.
//!
//! All in `f32`, in the order of operations of the authors' code: Σ τ in the order of the collection, θ_mt = θ₀ + Σ τ, θ_t = θ₀ + τ_t, then the
//! comparison. An entry that fine-tuning did not change is in no mask (0 > 0 is false). The sum is what all tasks share, so every task
//! vector is read for the mask of one task; `merged` spares that.

use super::inputs::MaskInputs;
use super::lambda::{Lambda, refusal};
use super::localize::{LocalizedModel, Localizer};
use super::method::{Masking, Method, Need, Prepared, Voting};
use crate::evaluate::{EvaluateParams, Evaluation};
use crate::kind::SourceSet;
use crate::params::{Params, Problem, did_you_mean, one_map, parse, to_value};
use crate::{Notice, Services, StageError};
use merganser_cache::Value;
use merganser_tensors::Scratch;
use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

pub(super) struct Tall;

/// The λ that the authors try.
const CANDIDATES: [f64; 5] = [0.2, 0.3, 0.4, 0.5, 0.6];

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct TallParams {
    /// How far off the merged entry may be, against what fine-tuning changed: larger λ, smaller masks. A number, a table of numbers by task,
    /// or `search`: per task, the one of `candidates` with the best accuracy on `dataset`.
    #[serde(default)]
    lambda: Lambda,
    /// The values that `lambda = "search"` tries; of equally good ones the first is taken (default: 0.2 to 0.6 in steps of 0.1).
    #[serde(default)]
    candidates: Option<Vec<f64>>,
    /// Factor of Σ τ in θ_mt; not with port `merged`.
    #[serde(default = "one")]
    scale: f64,
}

fn one() -> f64 {
    1.0
}

impl Method for Tall {
    fn id(&self) -> &'static str {
        "tall"
    }

    fn summary(&self) -> &'static str {
        "TALL masks: the entries of the merged vector that matter for each task"
    }

    fn formula(&self) -> &'static str {
        "mask_t = |θ₀ − θ_t| > λ_t |θ_mt − θ_t|, where θ_mt = θ₀ + scale Σ_t τ_t, or what port `merged` holds"
    }

    fn source(&self) -> &'static str {
        "Wang et al., Localizing Task Information for Improved Model Merging and Compression, arXiv:2405.07813, eq. 4; nik-dim/tall_masks generate_task_masks"
    }

    fn schema(&self) -> Schema {
        EvaluateParams::document(schema_for!(TallParams), "with `lambda = \"search\"`: ")
    }

    fn parse(&self, params: &Params<'_>) -> Result<Box<dyn Masking>, Vec<Problem>> {
        let mut own = params.clone();
        let validation = own.split_off(EvaluateParams::KEYS);
        let span_of = |key: &str| own.table.get(key).map_or(params.span, |entry| entry.node.span);
        let parsed: TallParams = parse(&own)?;
        let mut problems: Vec<Problem> =
            parsed.lambda.problem().map(|problem| problem.at(span_of("lambda"))).into_iter().collect();
        let candidates = parsed.candidates.clone().unwrap_or_else(|| CANDIDATES.to_vec());
        problems.extend(
            candidates
                .iter()
                .find_map(|lambda| refusal("candidates", *lambda))
                .map(|problem| problem.at(span_of("candidates"))),
        );
        if candidates.is_empty() {
            let message = "`candidates` must hold at least one number";
            problems.push(Problem::new("bad-value", message).at(span_of("candidates")));
        }
        if !(parsed.scale as f32).is_finite() {
            let message = format!("`scale` must be a finite number, got {}", parsed.scale);
            problems.push(Problem::new("bad-value", message).at(span_of("scale")));
        }
        let mut search = None;
        if parsed.lambda == Lambda::Search {
            match EvaluateParams::parse(&validation) {
                Ok(validation) => search = Some(Search { validation, candidates }),
                Err(found) => problems.extend(found),
            }
        } else {
            let given = validation.table.iter().map(|(key, entry)| (key.as_str(), entry.key_span));
            let candidates = own.table.get("candidates").map(|entry| ("candidates", entry.key_span));
            problems.extend(given.chain(candidates).map(|(key, span)| {
                let message = format!("`{key}` is for a search");
                Problem::new("unknown-key", message)
                    .at(span)
                    .help("`lambda = \"search\"` searches λ for every task")
            }));
        }
        if problems.is_empty() { Ok(Box::new(TallMasks { params: parsed, search })) } else { Err(problems) }
    }
}

struct TallMasks {
    params: TallParams,
    search: Option<Search>,
}

/// How λ is found.
struct Search {
    validation: EvaluateParams,
    /// At least one.
    candidates: Vec<f64>,
}

impl Search {
    /// The dataset of a task: that of its name, or the only one for a single task vector.
    fn dataset<'a>(&'a self, task: &'a str) -> &'a str {
        let mut tasks = self.validation.tasks();
        match (task, tasks.next(), tasks.next()) {
            ("", Some(only), None) => only,
            _ => task,
        }
    }
}

impl Masking for TallMasks {
    fn version(&self) -> u32 {
        1
    }

    fn parameters(&self, task: Option<&str>) -> Result<Value, StageError> {
        let scale = Value::map([("scale", self.params.scale)]);
        let lambda = match (&self.search, task) {
            (Some(search), task) => Value::Map(BTreeMap::from([
                ("candidates".to_owned(), to_value(&search.candidates)?),
                (
                    "validation".to_owned(),
                    search.validation.for_task(search.dataset(task.unwrap_or_default()))?,
                ),
            ])),
            (None, task) => match self.params.lambda.of(task.unwrap_or_default()) {
                Some(lambda) => Value::map([("lambda", lambda)]),
                None => Value::Map(BTreeMap::from([("lambda".to_owned(), to_value(&self.params.lambda)?)])),
            },
        };
        Ok(one_map([scale, lambda]))
    }

    fn need(&self, port: &str) -> Need {
        match port {
            "base" => Need::Required,
            "merged" => Need::Optional,
            "origin" if self.search.is_some() => Need::Required,
            _ => Need::No,
        }
    }

    fn looks_at_all(&self) -> bool {
        true
    }

    fn only_per_task(&self) -> bool {
        self.search.is_some()
    }

    fn check(&self, tasks: Option<&[String]>) -> Result<(), Problem> {
        self.params.lambda.check(tasks)?;
        let Some(search) = &self.search else { return Ok(()) };
        let known: Vec<&str> = search.validation.tasks().collect();
        let Some(tasks) = tasks else {
            if known.len() == 1 {
                return Ok(());
            }
            let message = format!("there are {} datasets, and one task vector", known.len());
            return Err(Problem::new("missing-dataset", message));
        };
        match tasks.iter().find(|task| !known.contains(&task.as_str())) {
            Some(task) => Err(Problem {
                help: did_you_mean(task, known.iter().copied()),
                ..Problem::new("missing-dataset", format!("there is no dataset for task `{task}`"))
            }),
            None => Ok(()),
        }
    }

    fn sources(&self, task: Option<&str>) -> Result<Vec<SourceSet>, StageError> {
        match &self.search {
            Some(search) => search.validation.sources(search.dataset(task.unwrap_or_default())),
            None => Ok(Vec::new()),
        }
    }

    fn environment(&self, services: &Services) -> Result<Value, StageError> {
        if self.search.is_some() { crate::evaluate::environment(services) } else { Ok(Value::Null) }
    }

    fn prepare<'a>(&'a self, inputs: &'a MaskInputs<'a>) -> Result<Prepared<'a>, StageError> {
        let localizer = localizer(inputs, self.params.scale)?;
        let (lambdas, figures) = if let Some(search) = &self.search {
            let (best, figures) = search.best(inputs, &localizer)?;
            (vec![best], figures)
        } else {
            let of = |task: &usize| {
                let name = inputs.task(*task);
                let lambda = self.params.lambda.of(name);
                lambda.ok_or_else(|| StageError::Internal(format!("task `{name}` has no λ")))
            };
            (inputs.asked.iter().map(of).collect::<Result<_, _>>()?, BTreeMap::new())
        };
        let voting = TallVoting::new(inputs, localizer, &lambdas);
        Ok(Prepared { figures, ..Prepared::new(inputs, Box::new(voting)) })
    }
}

/// What the inputs are compared by.
pub(super) fn localizer(inputs: &MaskInputs<'_>, scale: f64) -> Result<Localizer, StageError> {
    let base = inputs.base.as_ref();
    let base = base.ok_or_else(|| StageError::Internal("port `base` is not connected".to_owned()))?;
    Ok(Localizer::new(inputs, base, scale as f32))
}

/// The masks of the tasks that are asked for.
pub(super) struct TallVoting<'a> {
    inputs: &'a MaskInputs<'a>,
    localizer: Localizer,
    lambdas: Vec<f32>,
}

impl<'a> TallVoting<'a> {
    pub(super) fn new(inputs: &'a MaskInputs<'a>, localizer: Localizer, lambdas: &[f64]) -> Self {
        Self { inputs, localizer, lambdas: lambdas.iter().map(|lambda| *lambda as f32).collect() }
    }
}

impl Voting for TallVoting<'_> {
    fn vote(
        &self,
        tensor: usize,
        range: Range<usize>,
        votes: &mut [f32],
        scratch: &mut Scratch,
    ) -> merganser_tensors::Result<()> {
        let name = &self.inputs.tensors[tensor].name;
        self.localizer.vote(name, &range, &self.inputs.asked, &self.lambdas, votes, scratch)
    }
}

impl Search {
    /// The λ whose model θ₀ + mask ⊙ τ_mt answers best, and what each of them scored.
    fn best(
        &self,
        inputs: &MaskInputs<'_>,
        localizer: &Localizer,
    ) -> Result<(f64, BTreeMap<String, f64>), StageError> {
        let &[task] = inputs.asked.as_slice() else {
            return Err(StageError::Internal("λ is searched for one task at a time".to_owned()));
        };
        let dataset = self.dataset(inputs.task(task));
        let evaluation = Evaluation::prepare(inputs.job, &self.validation, dataset)?;
        let masked = Arc::new(inputs.tensors.iter().map(|info| info.name.clone()).collect::<Vec<_>>());
        let mut best: Option<(f64, u64)> = None;
        let mut figures = BTreeMap::new();
        for &lambda in &self.candidates {
            let model = LocalizedModel {
                localizer: localizer.clone(),
                masked: Arc::clone(&masked),
                task,
                lambda: lambda as f32,
            };
            let counts = evaluation.score_tensors(Arc::new(model))?;
            if best.is_none_or(|(_, correct)| counts.top1 > correct) {
                best = Some((lambda, counts.top1));
            }
            figures.insert(format!("accuracy at {lambda}"), counts.top1 as f64 / counts.images as f64);
        }
        let (lambda, _) = best.ok_or_else(|| StageError::Internal("there was no candidate".to_owned()))?;
        let n = self.candidates.len();
        (inputs.job.notify)(Notice::Info(format!("dataset `{dataset}`: λ = {lambda} is the best of {n}")));
        figures.insert("lambda".to_owned(), lambda);
        Ok((lambda, figures))
    }
}
