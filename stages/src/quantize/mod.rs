//! `quantize`: any tensors, stored in few bits.
//!
//! Of coefficients only the low-energy parts are packed, and they go on saying which basis they belong to.
//!
//! The output is as small on disk as it claims: codes are bit-packed, and tensors that no rule selects are kept in their own type. What the tensors
//! mean does not change: packed task vectors are task vectors, a packed checkpoint is a checkpoint, and consumers read them through.
//!
//! A scheme is one file and one line in [`SCHEMES`].

mod absmax;
mod allocation;
mod asymmetric;
mod calibrated;
mod choose;
mod clip;
mod diagnostics;
mod fp4;
mod int8_block;
mod knapsack;
mod nf4;
mod params;
mod rounding;
mod rtvq;
mod scheme;
mod select;
mod store;
mod symmetric;
#[cfg(test)]
mod tests;
mod values;
mod width;

pub use diagnostics::{Histogram, QUANTIZATION, QuantizationDiagnostics, TensorError};

use crate::calibrate::Calibration;
use crate::factors::is_low;
use crate::filter::NameFilter;
use crate::kind::{
    Arity, Connection, Content, MethodDoc, Port, Ports, Stage, StageKind, Unit, narrow_to_members, per_member,
};
use crate::numerics::numerics_class;
use crate::params::{Params, Problem, one_map, parse, to_value};
use crate::{Draft, Job, JobInput, Services, StageError, checkpoint};
use allocation::Open;
use calibrated::Rounder;
use merganser_cache::Value;
use merganser_tensors::encoding::Scales;
use merganser_tensors::manifest::{self, TensorEntry};
use merganser_tensors::{Bits, TensorSource};
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
    Port {
        name: "statistics",
        doc: "of `calibrate`, for roundings and widths that look at activations: member t for member t of a collection of that name, else all together",
        accepts: &[Content::Statistics],
        arity: Arity::All,
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
        let scheme = params
            .choose("scheme", SCHEMES, <dyn Scheme>::id, Some(SCHEMES[0]))
            .map_err(|problem| problems.push(problem))
            .ok();
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

/// Stores a model with the tensors that `bits` gives a width packed by scheme `symmetric`, a step per output channel, for stages that choose
/// widths by themselves; with the errors of all tensors, for `merganser show`.
pub(crate) fn pack(
    job: &Job<'_>,
    source: &dyn TensorSource,
    bits: impl Fn(&str) -> Option<u8>,
) -> Result<Draft, StageError> {
    let scheme = &symmetric::Symmetric;
    let setting = |tensor: usize| {
        Some(Setting {
            code: scheme.code(),
            bits: Bits::new(bits(&source.tensors()[tensor].name)?)
                .expect("widths of layers are widths of codes"),
            granularity: scheme.granularity(),
            stages: 1,
            scales: Scales::Single,
            clip: clip::Clip::default(),
        })
    };
    let tensors: Vec<usize> = (0..source.tensors().len()).collect();
    let settings: Vec<Option<Setting>> = tensors.iter().map(|&tensor| setting(tensor)).collect();
    store::store(job, manifest::Content::Checkpoint, source, &tensors, &settings, &Rounder::default(), true)
}

struct QuantizeStage {
    scheme: &'static dyn Scheme,
    params: QuantizeParams,
    filter: NameFilter,
}

/// The share of the mean of their diagonal that second moments are damped by, as in GPTQ.
const DAMPING: f64 = 0.01;

fn nothing_selected() -> StageError {
    StageError::input_help(
        "no tensor is selected for quantization",
        "`select = \"all\"` takes every float tensor; rules match tensor names",
    )
}

impl QuantizeStage {
    /// How the values of a job are rounded.
    fn rounder(&self, job: &Job<'_>) -> Result<Rounder, StageError> {
        let statistics: Vec<&JobInput> = job.inputs_on("statistics").collect();
        let calibration = Calibration::open(job, &statistics)?;
        let damping = self.params.damping.unwrap_or(DAMPING);
        Ok(Rounder { calibration, rounding: self.params.rounding, damping })
    }

    /// Whether members of scheme `rtvq` make up for what coding their base lost.
    fn corrects_errors(&self) -> bool {
        self.params.error_correction.unwrap_or(true)
    }
}

impl Stage for QuantizeStage {
    fn version(&self) -> u32 {
        3
    }

    fn output(&self, inputs: &[Connection]) -> Result<Content, Problem> {
        if self.scheme.is_shared() {
            return rtvq::output(inputs);
        }
        let calibrated = inputs.iter().any(|input| input.port == "statistics");
        if !self.params.rounding.is_nearest() && !calibrated {
            let message = "this `rounding` needs statistics of activations on port `statistics`";
            return Err(Problem::new("missing-port", message).help("kind `calibrate` makes them"));
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
        let mut units = per_member(inputs, ports)?;
        narrow_to_members(&mut units, inputs, "statistics");
        Ok(units)
    }

    fn environment(&self, _: &Services) -> Result<Value, StageError> {
        if self.params.rounding.is_nearest() && self.params.choosable(self.scheme).is_empty() {
            return Ok(Value::Null);
        }
        // Products of matrices add in another order on wider units.
        Ok(Value::map([("numerics", numerics_class())]))
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
        let mut settings: Vec<Option<Setting>> = tensors
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
        let rounder = self.rounder(job)?;
        let widths = self.params.choosable(self.scheme);
        if let (Some(budget), false) = (self.params.budget, widths.is_empty()) {
            let open = tensors.iter().enumerate().filter(|(output, tensor)| {
                settings[*output].is_some() && self.params.leaves_open(&source.tensors()[**tensor].name)
            });
            let open: Vec<Open> = open.map(|(output, &tensor)| Open { output, tensor }).collect();
            allocation::allocate(job, &*source, &open, &mut settings, &widths, budget, &rounder)?;
        }
        let measure = self.params.diagnostics;
        let draft = store::store(job, content, &*source, &tensors, &settings, &rounder, measure)?;
        if manifest.links().is_empty() {
            return Ok(draft);
        }
        let parameters = manifest.parameters().iter().map(TensorEntry::info).collect();
        checkpoint::about(draft, manifest.links().to_vec(), parameters)
    }
}
