//! The parameters, and what they mean for each tensor.

use super::allocation::Budget;
use super::clip::Clip;
use super::rounding::Rounding;
use super::scheme::{Granularity, Scheme, Setting};
use super::select::Preset;
use super::width::Width;
use crate::filter::NameGlob;
use crate::params::Problem;
use merganser_tensors::Bits;
use merganser_tensors::encoding::{MAX_STAGES, Scales};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct QuantizeParams {
    /// Bits per element: 1 to 8, or 16 (2 or more where codes are signed), or `"auto"`: chosen for every tensor within `budget`. Schemes with a
    /// single width need none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) bits: Option<Width>,
    /// What tensors of `bits = "auto"` may cost together: `{ bits_per_weight = 3.0 }` (on average, scales aside), `{ bytes = 400_000 }` (codes and
    /// scales) or `{ relative_error = 0.1 }` (then as few bytes as possible).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) budget: Option<Budget>,
    /// The widths that `bits = "auto"` chooses from; default: all up to 8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) widths: Option<Vec<u8>>,
    /// How values become codes: to the `nearest`, or with `statistics` of activations by error feedback (`gptq`), or by `descent` from the better of
    /// both.
    #[serde(default, skip_serializing_if = "Rounding::is_nearest")]
    pub(super) rounding: Rounding,
    /// Of roundings with statistics: added to the diagonal of second moments, as a share of its mean; default 0.01.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) damping: Option<f64>,
    /// Which tensors are quantized unless a rule says otherwise: `all` float tensors, or `tvq`, the selection of the TVQ authors
    /// (patch embedding, attention and MLP weights; no norms, biases, other embeddings or projections).
    #[serde(default)]
    pub(super) select: Preset,
    /// Exceptions by tensor name, first match wins: `{ match = "*.attn.*", bits = 6 }` or `{ match = "*norm*", keep = true }`.
    #[serde(default)]
    pub(super) rules: Vec<Rule>,
    /// Which elements share a scale: `"tensor"`, `"channel"` (the first axis) or `{ group = 64 }`; default: what the scheme says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) granularity: Option<Granularity>,
    /// Codes per element, 1 to 4: each further stage codes what the stages before it left over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) residual_stages: Option<usize>,
    /// Store the scales themselves in 8 bits, as bitsandbytes does it; for schemes with a book of codes (`int8-block`, `nf4`, `fp4`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) double_quantization: Option<bool>,
    /// Code a smaller range than that of the values: `{ percentile = 99.9 }`, or `"mse"`, the range of the least squared error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) clip: Option<Clip>,
    /// Bits per element of what the members share, of scheme `rtvq`; default 3.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) base_bits: Option<u8>,
    /// Whether the members of scheme `rtvq` make up for what coding their base lost; default true.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) error_correction: Option<bool>,
    /// Measure the error of every tensor, for `merganser show`.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub(super) diagnostics: bool,
}

/// What rules can set for some tensors beside their width.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Options {
    base_bits: Option<u8>,
    granularity: Option<Granularity>,
    residual_stages: Option<usize>,
    double_quantization: Option<bool>,
    clip: Option<Clip>,
}

/// An exception for some tensors.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Rule {
    /// A glob over tensor names.
    #[serde(rename = "match")]
    pub(super) name: NameGlob,
    /// Bits per element for these tensors.
    #[serde(default)]
    pub(super) bits: Option<u8>,
    /// Bits per element of what members share of these tensors, of scheme `rtvq`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) base_bits: Option<u8>,
    /// Keep these tensors as they are.
    #[serde(default)]
    pub(super) keep: bool,
    /// Which elements share a scale, for these tensors.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) granularity: Option<Granularity>,
    /// Codes per element of these tensors.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) residual_stages: Option<usize>,
    /// Whether the scales of these tensors are stored in 8 bits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) double_quantization: Option<bool>,
    /// The range of these tensors that is coded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) clip: Option<Clip>,
}

fn yes() -> bool {
    true
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature that serde asks for")]
fn is_yes(value: &bool) -> bool {
    *value
}

impl Options {
    /// What `self` says, and where it says nothing, what `others` do.
    fn or(self, others: Self) -> Self {
        Self {
            base_bits: self.base_bits.or(others.base_bits),
            granularity: self.granularity.or(others.granularity),
            residual_stages: self.residual_stages.or(others.residual_stages),
            double_quantization: self.double_quantization.or(others.double_quantization),
            clip: self.clip.or(others.clip),
        }
    }

    fn problems(&self, scheme: &dyn Scheme, problems: &mut Vec<Problem>) {
        let bad = |message: String| Problem::new("bad-value", message);
        match self.base_bits {
            Some(_) if !scheme.is_shared() => {
                let message = format!("scheme `{}` has no `base_bits`", scheme.id());
                problems.push(bad(message).help("scheme `rtvq` has"));
            }
            Some(bits) if !scheme.widths().contains(&bits) => {
                problems.push(bad(format!("`base_bits` must be {}, got {bits}", in_words(scheme.widths()))));
            }
            _ => {}
        }
        if let Some(stages) = self.residual_stages.filter(|stages| !(1..=MAX_STAGES).contains(stages)) {
            problems.push(bad(format!("`residual_stages` must be 1 to {MAX_STAGES}, got {stages}")));
        }
        if self.granularity == Some(Granularity::Group(0)) {
            problems.push(bad("a group must have at least one element".to_owned()));
        }
        if self.double_quantization == Some(true) && !scheme.code().has_book() {
            let message = format!("scheme `{}` has scales that cannot be quantized themselves", scheme.id());
            problems.push(
                bad(message)
                    .help("leave `double_quantization` out, or take scheme `int8-block`, `nf4` or `fp4`"),
            );
        }
        if let Some(problem) = self.clip.and_then(Clip::problem) {
            problems.push(bad(problem));
        }
    }
}

impl Rule {
    /// For all tensors, and says nothing.
    fn any() -> Self {
        Self {
            name: NameGlob::new("*").expect("a glob"),
            bits: None,
            base_bits: None,
            keep: false,
            granularity: None,
            residual_stages: None,
            double_quantization: None,
            clip: None,
        }
    }

    fn options(&self) -> Options {
        Options {
            base_bits: self.base_bits,
            granularity: self.granularity,
            residual_stages: self.residual_stages,
            double_quantization: self.double_quantization,
            clip: self.clip,
        }
    }
}

impl QuantizeParams {
    fn options(&self) -> Options {
        Options {
            base_bits: self.base_bits,
            granularity: self.granularity,
            residual_stages: self.residual_stages,
            double_quantization: self.double_quantization,
            clip: self.clip,
        }
    }

    /// What a part of scheme `rtvq` depends on: not on how offsets are coded, and the mean only on which tensors it is of.
    pub(super) fn of_part(&self, part: &str) -> Self {
        if part == super::rtvq::MEAN {
            let rules = self.rules.iter().map(|rule| Rule {
                name: rule.name.clone(),
                keep: rule.keep,
                ..Rule::any()
            });
            return Self { select: self.select, rules: rules.collect(), ..Self::default() };
        }
        let rules = self.rules.iter().map(|rule| Rule { bits: None, ..rule.clone() }).collect();
        Self { bits: None, error_correction: None, rules, ..self.clone() }
    }

    /// What is wrong with the values.
    pub(super) fn problems(&self, scheme: &dyn Scheme) -> Vec<Problem> {
        let widths = scheme.widths();
        let mut problems = Vec::new();
        let given =
            self.bits.and_then(Width::bits).into_iter().chain(self.rules.iter().filter_map(|rule| rule.bits));
        for bits in given.filter(|bits| !widths.contains(bits)) {
            let message =
                format!("`bits` of scheme `{}` must be {}, got {bits}", scheme.id(), in_words(widths));
            problems.push(Problem::new("bad-value", message));
        }
        if self.bits.is_none() && widths.len() > 1 {
            problems.push(Problem::new("missing-key", format!("scheme `{}` needs `bits`", scheme.id())));
        }
        if self.error_correction.is_some() && !scheme.is_shared() {
            let message = format!("scheme `{}` has no `error_correction`", scheme.id());
            problems.push(Problem::new("bad-value", message).help("scheme `rtvq` has"));
        }
        self.options().problems(scheme, &mut problems);
        self.check_budget(scheme, &mut problems);
        self.check_rounding(scheme, &mut problems);
        for rule in &self.rules {
            let sets = rule.bits.is_some() || rule.options() != Options::default();
            if rule.keep == sets {
                let name = rule.name.pattern();
                let message =
                    format!("the rule for `{name}` must say either `keep = true` or how to quantize");
                problems.push(Problem::new("bad-value", message));
            }
            rule.options().problems(scheme, &mut problems);
        }
        problems
    }

    fn check_budget(&self, scheme: &dyn Scheme, problems: &mut Vec<Problem>) {
        let mut bad =
            |message: &str, help: &str| problems.push(Problem::new("bad-value", message).help(help));
        if self.bits != Some(Width::Auto) {
            for (key, given) in [("budget", self.budget.is_some()), ("widths", self.widths.is_some())] {
                if given {
                    bad(&format!("`{key}` is for widths that are chosen"), "`bits = \"auto\"` chooses them");
                }
            }
            return;
        }
        let known = scheme.widths();
        if scheme.is_shared() || known.len() == 1 {
            bad(&format!("scheme `{}` has no widths to choose from", scheme.id()), "scheme `symmetric` has");
        }
        match self.budget {
            None => bad(
                "`bits = \"auto\"` needs a `budget`",
                "`budget = { bits_per_weight = 3.0 }`, or `bytes`, or `relative_error`",
            ),
            Some(budget) => problems.extend(budget.problem()),
        }
        let widths = self.widths.as_deref().unwrap_or_default();
        if self.widths.is_some() && (widths.is_empty() || widths.iter().any(|bits| !known.contains(bits))) {
            let message = format!("`widths` must be some of {}, got {widths:?}", in_words(known));
            problems.push(Problem::new("bad-value", message));
        }
    }

    fn check_rounding(&self, scheme: &dyn Scheme, problems: &mut Vec<Problem>) {
        if self.rounding.is_nearest() {
            if self.damping.is_some() {
                let problem = Problem::new("bad-value", "`damping` is for roundings with statistics");
                problems.push(problem.help("`rounding = \"gptq\"` or `\"descent\"`"));
            }
            return;
        }
        let stages = self.rules.iter().filter_map(|rule| rule.residual_stages).chain(self.residual_stages);
        if scheme.is_shared() || stages.into_iter().any(|stages| stages > 1) {
            let message = "`rounding` chooses one code per element, and here values have several";
            problems.push(Problem::new("bad-value", message).help("leave `rounding` out"));
        }
        if let Some(damping) = self.damping.filter(|damping| !(damping.is_finite() && *damping > 0.0)) {
            let message = format!("`damping` must be a positive number, got {damping}");
            problems.push(Problem::new("bad-value", message));
        }
    }

    /// The widths that are chosen from, in ascending order; none where they are given.
    pub(super) fn choosable(&self, scheme: &dyn Scheme) -> Vec<Bits> {
        if self.bits != Some(Width::Auto) {
            return Vec::new();
        }
        let all = || scheme.widths().iter().copied().filter(|bits| *bits <= 8).collect();
        let mut widths: Vec<u8> = self.widths.clone().unwrap_or_else(all);
        widths.sort_unstable();
        widths.dedup();
        widths
            .into_iter()
            .map(|bits| Bits::new(bits).expect("widths of schemes are widths of codes"))
            .collect()
    }

    /// Whether no rule says how many bits a tensor gets.
    pub(super) fn leaves_open(&self, name: &str) -> bool {
        let rule = self.rules.iter().find(|rule| rule.name.matches(name));
        rule.is_none_or(|rule| rule.bits.is_none())
    }

    /// How what members share of a tensor is coded; tensors that are kept are not asked about.
    pub(super) fn base_setting(&self, scheme: &dyn Scheme, name: &str) -> Option<Setting> {
        let rule = self.rules.iter().find(|rule| rule.name.matches(name));
        let options = rule.map_or(self.options(), |rule| rule.options().or(self.options()));
        let bits = Bits::new(options.base_bits.unwrap_or(3)).expect("widths of schemes are widths of codes");
        Some(Setting { bits, ..self.setting(scheme, name)? })
    }

    /// How a tensor is coded, or `None` to keep it.
    pub(super) fn setting(&self, scheme: &dyn Scheme, name: &str) -> Option<Setting> {
        let rule = self.rules.iter().find(|rule| rule.name.matches(name));
        let (bits, options) = match rule {
            Some(rule) if rule.keep => return None,
            Some(rule) => (rule.bits, rule.options().or(self.options())),
            None if self.select.selects(name) => (None, self.options()),
            None => return None,
        };
        let bits = bits.or(self.bits.and_then(Width::bits)).unwrap_or(scheme.widths()[0]);
        Some(Setting {
            code: scheme.code(),
            bits: Bits::new(bits).expect("widths of schemes are widths of codes"),
            granularity: options.granularity.unwrap_or(scheme.granularity()),
            stages: options.residual_stages.unwrap_or(1),
            scales: if options.double_quantization == Some(true) { Scales::Double } else { Scales::Single },
            clip: options.clip.unwrap_or_default(),
        })
    }
}

/// `1 to 8 or 16`.
fn in_words(widths: &[u8]) -> String {
    let runs = widths.chunk_by(|a, b| a + 1 == *b).map(|run| match run {
        [one] => one.to_string(),
        run => format!("{} to {}", run[0], run[run.len() - 1]),
    });
    runs.collect::<Vec<_>>().join(" or ")
}

#[cfg(test)]
mod tests {
    use super::super::SCHEMES;
    use super::*;

    #[test]
    fn the_first_matching_rule_wins_and_the_rest_is_inherited() {
        let rule =
            |name: &str, bits, keep| Rule { name: NameGlob::new(name).unwrap(), bits, keep, ..Rule::any() };
        let params = QuantizeParams {
            bits: Some(Width::Bits(4)),
            rules: vec![
                rule("*.attn.q.*", Some(6), false),
                rule("*.attn.*", None, true),
                Rule { granularity: Some(Granularity::Group(8)), ..rule("*.head.*", None, false) },
            ],
            residual_stages: Some(2),
            ..QuantizeParams::default()
        };
        let of = |name: &str| {
            let setting = params.setting(SCHEMES[0], name)?;
            Some((setting.bits.get(), setting.granularity, setting.stages))
        };
        assert_eq!(of("b.attn.q.weight"), Some((6, Granularity::Tensor, 2)));
        assert_eq!(of("b.attn.k.weight"), None);
        assert_eq!(of("b.mlp.weight"), Some((4, Granularity::Tensor, 2)));
        assert_eq!(of("b.head.weight"), Some((4, Granularity::Group(8), 2)));
    }

    #[test]
    fn widths_are_put_in_words() {
        assert_eq!(in_words(&[2, 3, 4, 16]), "2 to 4 or 16");
        assert_eq!(in_words(&[4]), "4");
    }
}
