//! `quantize`: any tensors, stored in few bits.
//!
//! Of coefficients only the low-energy parts are packed, and they go on saying which basis they belong to.
//!
//! The output is as small on disk as it claims: codes are bit-packed, and tensors that no rule selects are kept in their own type. What the tensors
//! mean does not change: packed task vectors are task vectors, a packed checkpoint is a checkpoint, and consumers read them through.
//!
//! A scheme is one file and one line in [`SCHEMES`].

mod absmax;
mod asymmetric;
mod select;

use crate::factors::is_low;
use crate::filter::{NameFilter, NameGlob};
use crate::kind::{Arity, Connection, Content, MethodDoc, Port, Ports, Stage, StageKind, Unit};
use crate::params::{Params, Problem, did_you_mean, one_map, parse, to_value};
use crate::{Draft, Job, StageError, checkpoint};
use merganser_cache::Value;
use merganser_tensors::kernels::quantize::QuantizeError;
use merganser_tensors::kernels::reduce::MinMax;
use merganser_tensors::manifest::{self, TensorEntry};
use merganser_tensors::stream;
use merganser_tensors::writer::{Block, OutputTensor, Payload};
use merganser_tensors::{Bits, DType, Encoding, TensorSource};
use schemars::{JsonSchema, Schema, schema_for};
use select::Preset;
use serde::{Deserialize, Serialize};

/// A way to turn values into codes.
pub(crate) trait Scheme: Sync {
    /// What `scheme = "…"` says.
    fn id(&self) -> &'static str;

    /// Raised whenever the scheme's numbers change.
    fn version(&self) -> u32;

    fn summary(&self) -> &'static str;

    fn formula(&self) -> &'static str;

    fn source(&self) -> &'static str;

    /// The widths it is defined for.
    fn bits(&self) -> std::ops::RangeInclusive<u8>;

    /// Whether several stages of codes can follow each other.
    fn has_residual_stages(&self) -> bool {
        false
    }

    /// Chooses scale and zero point for values within `range`.
    fn encoding(&self, bits: Bits, range: MinMax) -> Result<Encoding, QuantizeError>;
}

/// All schemes, in the order in which they are listed.
const SCHEMES: &[&dyn Scheme] = &[&asymmetric::Asymmetric, &absmax::Absmax];

pub(crate) struct Quantize;

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct QuantizeParams {
    /// Bits per element, 1 to 8 (absmax: 2 to 8).
    bits: u8,
    /// Which tensors are quantized unless a rule says otherwise: `all` float tensors, or `tvq`, the selection of the TVQ authors
    /// (patch embedding, attention and MLP weights; no norms, biases, other embeddings or projections).
    #[serde(default)]
    select: Preset,
    /// Exceptions by tensor name, first match wins: `{ match = "*.attn.*", bits = 6 }` or `{ match = "*norm*", keep = true }`.
    #[serde(default)]
    rules: Vec<Rule>,
    /// Codes per element, 1 to 4, of scheme `asymmetric`: each further stage codes what the stages before it left over.
    #[serde(default = "one_stage", skip_serializing_if = "is_one_stage")]
    residual_stages: u8,
}

fn one_stage() -> u8 {
    1
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature that serde asks for")]
fn is_one_stage(stages: &u8) -> bool {
    *stages == 1
}

/// An exception for some tensors.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Rule {
    /// A glob over tensor names.
    #[serde(rename = "match")]
    name: NameGlob,
    /// Bits per element for these tensors.
    #[serde(default)]
    bits: Option<u8>,
    /// Keep these tensors as they are.
    #[serde(default)]
    keep: bool,
}

const PORTS: &[Port] = &[Port {
    name: "tensors",
    doc: "task vectors, checkpoints or coefficients (their low-energy parts); a collection is quantized member by member",
    accepts: &[Content::TaskVectors, Content::Checkpoint, Content::Coefficients],
    arity: Arity::PerMember,
    required: true,
}];

impl StageKind for Quantize {
    fn id(&self) -> &'static str {
        "quantize"
    }

    fn summary(&self) -> &'static str {
        "stores tensors in few bits, really packed"
    }

    fn ports(&self) -> Ports {
        Ports { named: PORTS, open: None }
    }

    fn method_key(&self) -> Option<&'static str> {
        Some("scheme")
    }

    fn methods(&self) -> Vec<MethodDoc> {
        let schema: Schema = NameFilter::document(schema_for!(QuantizeParams));
        SCHEMES
            .iter()
            .map(|scheme| MethodDoc {
                id: scheme.id(),
                summary: scheme.summary(),
                formula: scheme.formula(),
                source: scheme.source(),
                schema: schema.clone(),
            })
            .collect()
    }

    fn parse(&self, mut params: Params<'_>) -> Result<Box<dyn Stage>, Vec<Problem>> {
        let mut problems = Vec::new();
        let scheme = match params.take_string("scheme") {
            None => Some(SCHEMES[0]),
            Some(Err(problem)) => {
                problems.push(problem);
                None
            }
            Some(Ok((id, span))) => {
                let found = SCHEMES.iter().find(|scheme| scheme.id() == id);
                if found.is_none() {
                    let help = did_you_mean(&id, SCHEMES.iter().map(|scheme| scheme.id()));
                    problems.push(Problem {
                        help,
                        ..Problem::new("unknown-method", format!("unknown scheme `{id}`")).at(span)
                    });
                }
                found.copied()
            }
        };
        let bits_span = params.table.get("bits").map(|entry| entry.node.span);
        let filter = NameFilter::take(&mut params).map_err(|found| problems.extend(found)).ok();
        let parsed = parse::<QuantizeParams>(&params).map_err(|found| problems.extend(found)).ok();
        let (Some(scheme), Some(filter), Some(parsed)) = (scheme, filter, parsed) else {
            return Err(problems);
        };
        problems.extend(
            check(scheme, &parsed).into_iter().map(|problem| problem.at(bits_span.unwrap_or(params.span))),
        );
        if problems.is_empty() {
            Ok(Box::new(QuantizeStage { scheme, params: parsed, filter }))
        } else {
            Err(problems)
        }
    }
}

fn check(scheme: &dyn Scheme, params: &QuantizeParams) -> Vec<Problem> {
    let widths = scheme.bits();
    let given = std::iter::once(params.bits).chain(params.rules.iter().filter_map(|rule| rule.bits));
    let mut problems: Vec<Problem> = given
        .filter(|bits| !widths.contains(bits))
        .map(|bits| {
            let (low, high) = (widths.start(), widths.end());
            Problem::new(
                "bad-value",
                format!("`bits` of scheme `{}` must be {low} to {high}, got {bits}", scheme.id()),
            )
        })
        .collect();
    if !(1..=4).contains(&params.residual_stages) {
        let message = format!("`residual_stages` must be 1 to 4, got {}", params.residual_stages);
        problems.push(Problem::new("bad-value", message));
    } else if params.residual_stages > 1 && !scheme.has_residual_stages() {
        let message = format!("scheme `{}` has no residual stages", scheme.id());
        problems.push(Problem::new("bad-value", message).help("scheme `asymmetric` has"));
    }
    for rule in params.rules.iter().filter(|rule| rule.keep == rule.bits.is_some()) {
        problems.push(Problem::new(
            "bad-value",
            format!("the rule for `{}` must say either `bits` or `keep = true`", rule.name.pattern()),
        ));
    }
    problems
}

struct QuantizeStage {
    scheme: &'static dyn Scheme,
    params: QuantizeParams,
    filter: NameFilter,
}

impl QuantizeStage {
    /// The width for a tensor, or `None` to keep it.
    fn bits_for(&self, name: &str) -> Option<u8> {
        match self.params.rules.iter().find(|rule| rule.name.matches(name)) {
            Some(rule) => rule.bits,
            None if self.params.select.selects(name) => Some(self.params.bits),
            None => None,
        }
    }
}

impl Stage for QuantizeStage {
    fn version(&self) -> u32 {
        1
    }

    fn output(&self, inputs: &[Connection]) -> Result<Content, Problem> {
        inputs
            .first()
            .map(|input| input.content)
            .ok_or_else(|| Problem::new("missing-port", "nothing is connected"))
    }

    fn parameters(&self, _: &Unit) -> Result<Value, StageError> {
        let scheme = Value::map([("scheme", self.scheme.id())]);
        let version = Value::map([("scheme_version", self.scheme.version())]);
        Ok(one_map([scheme, version, to_value(&self.params)?, to_value(&self.filter)?]))
    }

    fn run(&self, job: &Job<'_>) -> Result<Draft, StageError> {
        let input = job.input("tensors")?;
        let manifest = job.files.manifest(&input.artifact)?;
        let content = manifest.content();
        let only_low = content == manifest::Content::Coefficients;
        let source = job.tensors(input)?;
        let tensors: Vec<usize> = (0..source.tensors().len())
            .filter(|tensor| self.filter.admits(&source.tensors()[*tensor].name))
            .collect();
        if tensors.is_empty() {
            return Err(StageError::input("no tensor is admitted by `only` and `skip`"));
        }
        let widths: Vec<Option<u8>> = tensors
            .iter()
            .map(|&tensor| {
                let info = &source.tensors()[tensor];
                let is_meant = info.dtype.is_float() && (!only_low || is_low(&info.name));
                if is_meant { self.bits_for(&info.name) } else { None }
            })
            .collect();
        let quantized: Vec<usize> = tensors
            .iter()
            .zip(&widths)
            .filter(|(_, bits)| bits.is_some())
            .map(|(&tensor, _)| tensor)
            .collect();
        if quantized.is_empty() {
            return Err(StageError::input_help(
                "no tensor is selected for quantization",
                "`select = \"all\"` takes every float tensor; rules match tensor names",
            ));
        }
        let chosen: Vec<u8> = widths.iter().copied().flatten().collect();
        let mut encodings = self.encodings(&*source, &quantized, &chosen)?.into_iter();
        let mut outputs = Vec::with_capacity(tensors.len());
        for (&tensor, bits) in tensors.iter().zip(&widths) {
            let info = &source.tensors()[tensor];
            let payload = match (bits, info.dtype.is_float()) {
                (Some(_), _) => {
                    let encoding = encodings.next();
                    Payload::Codes(
                        encoding.ok_or_else(|| StageError::Internal("an encoding is missing".to_owned()))?,
                    )
                }
                // As it is, but a NaN in it is refused like one in its neighbours.
                (None, true) if matches!(info.dtype, DType::F32 | DType::F16 | DType::BF16) => {
                    Payload::Values(info.dtype)
                }
                (None, _) => Payload::Bytes(info.dtype),
            };
            outputs.push(OutputTensor { name: info.name.clone(), shape: info.shape.clone(), payload });
        }
        let draft = checkpoint::store(
            job,
            content,
            &outputs,
            |output, range, block, scratch| match block {
                Block::Values(values) => source.read_f32(tensors[output], range, values, scratch),
                Block::Bytes(bytes) => {
                    checkpoint::copy_elements(&*source, tensors[output], range, bytes, scratch)
                }
            },
            None,
        )?;
        if manifest.links().is_empty() {
            return Ok(draft);
        }
        let parameters = manifest.parameters().iter().map(TensorEntry::info).collect();
        checkpoint::about(draft, manifest.links().to_vec(), parameters)
    }
}

impl QuantizeStage {
    /// Chooses how some tensors are coded, each at its own width: a pass over the values for every stage.
    fn encodings(
        &self,
        source: &dyn TensorSource,
        tensors: &[usize],
        widths: &[u8],
    ) -> Result<Vec<Encoding>, StageError> {
        let refused = |tensor: usize, problem| {
            let tensor = source.tensors()[tensor].name.clone();
            StageError::from(merganser_tensors::Error::Quantize { tensor, problem })
        };
        let mut encodings = Vec::with_capacity(tensors.len());
        for ((&tensor, bits), range) in tensors.iter().zip(widths).zip(stream::ranges(source, tensors)?) {
            let bits = Bits::new(*bits).map_err(|error| StageError::Internal(error.to_string()))?;
            encodings.push(self.scheme.encoding(bits, range).map_err(|problem| refused(tensor, problem))?);
        }
        for _ in 1..self.params.residual_stages {
            let left = stream::ranges_left(source, tensors, &encodings)?;
            let staged = encodings.into_iter().zip(left).zip(tensors);
            encodings = staged
                .map(|((encoding, range), &tensor)| {
                    encoding.with_stage(range).map_err(|problem| refused(tensor, problem))
                })
                .collect::<Result<_, _>>()?;
        }
        Ok(encodings)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scheme_ids_are_unique() {
        let mut ids: Vec<&str> = SCHEMES.iter().map(|scheme| scheme.id()).collect();
        ids.dedup();
        assert_eq!(ids.len(), SCHEMES.len());
    }

    #[test]
    fn the_first_matching_rule_wins() {
        let rule = |name: &str, bits, keep| Rule { name: NameGlob::new(name).unwrap(), bits, keep };
        let stage = QuantizeStage {
            scheme: SCHEMES[0],
            params: QuantizeParams {
                bits: 4,
                select: Preset::All,
                rules: vec![rule("*.attn.q.*", Some(6), false), rule("*.attn.*", None, true)],
                residual_stages: 1,
            },
            filter: NameFilter::default(),
        };
        assert_eq!(stage.bits_for("b.attn.q.weight"), Some(6));
        assert_eq!(stage.bits_for("b.attn.k.weight"), None);
        assert_eq!(stage.bits_for("b.mlp.weight"), Some(4));
    }
}
