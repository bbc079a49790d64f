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
mod choose;
mod clip;
mod diagnostics;
mod fp4;
mod int8_block;
mod nf4;
mod params;
mod rtvq;
mod scheme;
mod select;
mod store;
mod symmetric;
#[cfg(test)]
mod tests;
mod values;

pub use diagnostics::{Histogram, QUANTIZATION, QuantizationDiagnostics, TensorError};

use crate::factors::is_low;
use crate::filter::NameFilter;
use crate::kind::{Arity, Connection, Content, MethodDoc, Port, Ports, Stage, StageKind, Unit, per_member};
use crate::params::{Params, Problem, did_you_mean, one_map, parse, to_value};
use crate::{Draft, Job, StageError, checkpoint};
use merganser_cache::Value;
use merganser_tensors::manifest::{self, TensorEntry};
use params::QuantizeParams;
use schemars::{Schema, schema_for};
use scheme::{Scheme, Setting};

/// All schemes, in the order in which they are listed.
const SCHEMES: &[&dyn Scheme] = &[
    &asymmetric::Asymmetric,
    &absmax::Absmax,
    &symmetric::Symmetric,
    &int8_block::Int8Block,
    &nf4::Nf4,
    &fp4::Fp4,
    &rtvq::Rtvq,
];

pub(crate) struct Quantize;

const PORTS: &[Port] = &[
    Port {
        name: "tensors",
        doc: "task vectors, checkpoints or coefficients (their low-energy parts); a collection is quantized member by member",
        accepts: &[Content::TaskVectors, Content::Checkpoint, Content::Coefficients],
        arity: Arity::PerMember,
        required: true,
    },
    Port {
        name: "base",
        doc: "for scheme `rtvq` of checkpoints: what they were tuned from; the output is task vectors",
        accepts: &[Content::Checkpoint],
        arity: Arity::PerMember,
        required: false,
    },
];

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
            parsed.problems(scheme).into_iter().map(|problem| problem.at(bits_span.unwrap_or(params.span))),
        );
        if problems.is_empty() {
            Ok(Box::new(QuantizeStage { scheme, params: parsed, filter }))
        } else {
            Err(problems)
        }
    }
}

struct QuantizeStage {
    scheme: &'static dyn Scheme,
    params: QuantizeParams,
    filter: NameFilter,
}

fn nothing_selected() -> StageError {
    StageError::input_help(
        "no tensor is selected for quantization",
        "`select = \"all\"` takes every float tensor; rules match tensor names",
    )
}

impl QuantizeStage {
    /// Whether members of scheme `rtvq` make up for what coding their base lost.
    fn corrects_errors(&self) -> bool {
        self.params.error_correction.unwrap_or(true)
    }
}

impl Stage for QuantizeStage {
    fn version(&self) -> u32 {
        2
    }

    fn output(&self, inputs: &[Connection]) -> Result<Content, Problem> {
        if self.scheme.is_shared() {
            return rtvq::output(inputs);
        }
        if inputs.iter().any(|input| input.port == "base") {
            let message = format!("scheme `{}` takes no `base`", self.scheme.id());
            return Err(Problem::new("bad-value", message).help("scheme `rtvq` does"));
        }
        inputs
            .first()
            .map(|input| input.content)
            .ok_or_else(|| Problem::new("missing-port", "nothing is connected"))
    }

    fn units(&self, inputs: &[Connection], ports: &Ports) -> Result<Vec<Unit>, Problem> {
        if self.scheme.is_shared() {
            return rtvq::units(inputs, ports, self.corrects_errors());
        }
        per_member(inputs, ports)
    }

    fn parameters(&self, unit: &Unit) -> Result<Value, StageError> {
        let scheme = Value::map([("scheme", self.scheme.id())]);
        let version = Value::map([("scheme_version", self.scheme.version())]);
        let filter = to_value(&self.filter)?;
        let parts = match unit.part {
            None => vec![scheme, version, to_value(&self.params)?, filter],
            Some(part) => {
                let name = Value::map([("part", part)]);
                vec![scheme, version, to_value(&self.params.of_part(part))?, filter, name]
            }
        };
        Ok(one_map(parts))
    }

    fn run(&self, job: &Job<'_>) -> Result<Draft, StageError> {
        if self.scheme.is_shared() {
            return self.run_shared(job);
        }
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
        let settings: Vec<Option<Setting>> = tensors
            .iter()
            .map(|&tensor| {
                let info = &source.tensors()[tensor];
                let is_meant = info.dtype.is_float() && (!only_low || is_low(&info.name));
                if is_meant { self.params.setting(self.scheme, &info.name) } else { None }
            })
            .collect();
        if settings.iter().all(Option::is_none) {
            return Err(nothing_selected());
        }
        let draft = store::store(job, content, &*source, &tensors, &settings, self.params.diagnostics)?;
        if manifest.links().is_empty() {
            return Ok(draft);
        }
        let parameters = manifest.parameters().iter().map(TensorEntry::info).collect();
        checkpoint::about(draft, manifest.links().to_vec(), parameters)
    }
}
