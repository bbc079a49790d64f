//! `mask`: which entries of task vectors count.
//!
//! A method is one file and one line in [`METHODS`]. Masks are stored as one bit per entry and read as 0 and 1: an artifact of tensors with
//! the names and shapes of the task vectors, which views and kernels treat like any other. A tensor that a mask artifact lacks is not masked.

mod consensus;
mod coverage;
mod file;
mod inputs;
mod lambda;
mod localize;
mod magnitude;
mod method;
mod random;
mod select;
mod tall;

use crate::filter::NameFilter;
use crate::kind::{
    Arity, Connection, Content, MethodDoc, Port, Ports, SourceSet, Stage, StageKind, Take, Unit,
};
use crate::params::{Params, Problem, one_map, parse, to_value};
use crate::{Draft, Job, Services, StageError, checkpoint};
use inputs::MaskInputs;
use merganser_cache::Value;
use merganser_tensors::encoding::Whole;
use merganser_tensors::writer::{Block, OutputTensor, Payload};
use merganser_tensors::{Bits, Encoding, Manifest, manifest};
use method::{Masking, Method, Need};
use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Serialize};

pub use coverage::{Coverage, CoverageRow, coverage};

/// All methods, in the order in which they are listed.
const METHODS: &[&dyn Method] =
    &[&tall::Tall, &consensus::Consensus, &magnitude::Magnitude, &random::Random, &file::File];

pub(crate) struct Mask;

/// How the masks of several tasks become the output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum Combine {
    /// They do not: a collection with one mask per task.
    #[default]
    PerTask,
    /// Entries that some mask has.
    Union,
    /// Entries that every mask has.
    Intersection,
    /// Entries that at least the share `threshold` of the masks has.
    Majority,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct CombineParams {
    /// One mask per task (`per-task`), or one for all: entries that some task's mask has (`union`), that all have (`intersection`), or that at
    /// least the share `threshold` of them has (`majority`).
    #[serde(default)]
    combine: Combine,
    /// The share of masks of a majority, above 0 and up to 1 (default: 0.5).
    #[serde(default)]
    threshold: Option<f64>,
}

const PORTS: &[Port] = &[
    Port {
        name: "deltas",
        doc: "the task vectors, packed or not: a collection, or a single one",
        accepts: &[Content::TaskVectors],
        arity: Arity::All,
        required: true,
    },
    Port {
        name: "base",
        doc: "θ₀, of TALL masks",
        accepts: &[Content::Checkpoint],
        arity: Arity::All,
        required: false,
    },
    Port {
        name: "merged",
        doc: "θ_mt, of TALL masks that localize another merge than the sum of the task vectors",
        accepts: &[Content::Checkpoint],
        arity: Arity::All,
        required: false,
    },
    Port {
        name: "origin",
        doc: "the checkpoint that the graph was exported from, of a search on validation data",
        accepts: &[Content::Checkpoint],
        arity: Arity::All,
        required: false,
    },
    Port {
        name: "masks",
        doc: "masks of another stage, to be combined",
        accepts: &[Content::Masks],
        arity: Arity::All,
        required: false,
    },
];

impl StageKind for Mask {
    fn id(&self) -> &'static str {
        "mask"
    }

    fn summary(&self) -> &'static str {
        "which entries of task vectors count, one bit each"
    }

    fn ports(&self) -> Ports {
        Ports { named: PORTS, open: None }
    }

    fn method_key(&self) -> Option<&'static str> {
        Some("method")
    }

    fn methods(&self) -> Vec<MethodDoc> {
        METHODS
            .iter()
            .map(|method| MethodDoc {
                id: method.id(),
                summary: method.summary(),
                formula: method.formula(),
                source: method.source(),
                schema: NameFilter::document(document(*method)),
            })
            .collect()
    }

    fn parse(&self, mut params: Params<'_>) -> Result<Box<dyn Stage>, Vec<Problem>> {
        let mut problems = Vec::new();
        let method = params
            .choose("method", METHODS, <dyn Method>::id, None)
            .map_err(|problem| problems.push(problem))
            .ok();
        let filter = NameFilter::take(&mut params).map_err(|found| problems.extend(found)).ok();
        let Some(method) = method else { return Err(problems) };
        let combine = if method.makes_one() {
            Some(CombineParams::default())
        } else {
            CombineParams::take(&mut params).map_err(|found| problems.extend(found)).ok()
        };
        let masking = method.parse(&params).map_err(|found| problems.extend(found)).ok();
        match (masking, combine, filter) {
            (Some(masking), Some(combine), Some(filter)) if problems.is_empty() => {
                Ok(Box::new(MaskStage { method, masking, combine, filter }))
            }
            _ => Err(problems),
        }
    }
}

/// The parameters of a method with those that all methods have.
fn document(method: &dyn Method) -> Schema {
    let mut schema = method.schema();
    if method.makes_one() {
        return schema;
    }
    let mut shared = schema_for!(CombineParams);
    for section in ["properties", "$defs"] {
        let Some(serde_json::Value::Object(ours)) = shared.ensure_object().remove(section) else { continue };
        let theirs = schema.ensure_object().entry(section).or_insert_with(|| serde_json::json!({}));
        if let Some(theirs) = theirs.as_object_mut() {
            theirs.extend(ours);
        }
    }
    schema
}

impl CombineParams {
    fn take(params: &mut Params<'_>) -> Result<Self, Vec<Problem>> {
        let own = params.split_off(&["combine", "threshold"]);
        let parsed: Self = parse(&own)?;
        let span = own.table.get("threshold").map_or(own.span, |entry| entry.node.span);
        match parsed.threshold {
            Some(_) if parsed.combine != Combine::Majority => {
                let problem = Problem::new("unknown-key", "`threshold` goes with `combine = \"majority\"`");
                Err(vec![problem.at(span)])
            }
            Some(threshold) if !(threshold > 0.0 && threshold <= 1.0) => {
                let message = format!("`threshold` must be above 0 and up to 1, got {threshold}");
                Err(vec![Problem::new("bad-value", message).at(span)])
            }
            _ => Ok(parsed),
        }
    }

    /// How many of the masks must have an entry.
    fn votes_needed(&self, voters: usize) -> u64 {
        match self.combine {
            Combine::PerTask | Combine::Union => 1,
            Combine::Intersection => voters as u64,
            Combine::Majority => {
                // 0.55 · 20 is a little more than 11 in binary; nobody means 12 by it
                let share = self.threshold.unwrap_or(0.5) * voters as f64;
                (share - 1e-9).ceil().max(1.0) as u64
            }
        }
    }
}

struct MaskStage {
    method: &'static dyn Method,
    masking: Box<dyn Masking>,
    combine: CombineParams,
    filter: NameFilter,
}

impl MaskStage {
    /// Whether there is a mask per task.
    fn is_per_task(&self) -> bool {
        !self.method.makes_one() && self.combine.combine == Combine::PerTask
    }

    fn check_ports(&self, inputs: &[Connection]) -> Result<(), Problem> {
        let id = self.method.id();
        let connected = |port: &str| inputs.iter().any(|input| input.port == port);
        for port in ["base", "merged", "origin", "masks"] {
            match (connected(port), self.masking.need(port)) {
                (true, Need::No) => {
                    let message = format!("method `{id}` does not read port `{port}`");
                    let help = format!("remove `{port}` from `from`");
                    return Err(Problem::new("unknown-port", message).help(help));
                }
                (false, Need::Required) => {
                    return Err(Problem::new("missing-port", format!("method `{id}` needs port `{port}`")));
                }
                _ => {}
            }
        }
        self.masking.check_ports(&connected)
    }
}

impl Stage for MaskStage {
    fn version(&self) -> u32 {
        1
    }

    fn output(&self, inputs: &[Connection]) -> Result<Content, Problem> {
        let single = ["base", "merged", "origin"];
        let is_odd = |input: &&Connection| single.contains(&input.port.as_str()) && input.members.is_some();
        if let Some(input) = inputs.iter().find(is_odd) {
            let message = format!("port `{}` takes one checkpoint, not a collection", input.port);
            return Err(Problem::new("wrong-type", message));
        }
        self.check_ports(inputs)?;
        let deltas = inputs.iter().find(|input| input.port == "deltas");
        let tasks = deltas.and_then(|deltas| deltas.members.as_deref());
        self.masking.check(tasks)?;
        if tasks.is_some() && self.masking.only_per_task() && !self.is_per_task() {
            let message = "masks whose λ is searched for are made task by task";
            return Err(Problem::new("bad-value", message).help(
                "leave out `combine`; a stage `method = \"consensus\"` with these on its port `masks` makes one of them",
            ));
        }
        Ok(Content::Masks)
    }

    fn units(&self, inputs: &[Connection], _: &Ports) -> Result<Vec<Unit>, Problem> {
        let takes = |member: Option<&String>| {
            let take = |input: &Connection| Take {
                port: input.port.clone(),
                member: member.filter(|_| input.port == "deltas" && !self.masking.looks_at_all()).cloned(),
            };
            inputs.iter().map(take).collect()
        };
        let deltas = inputs.iter().find(|input| input.port == "deltas");
        Ok(match deltas.and_then(|deltas| deltas.members.as_ref()) {
            Some(members) if self.is_per_task() => members
                .iter()
                .map(|member| Unit { member: Some(member.clone()), part: None, takes: takes(Some(member)) })
                .collect(),
            _ => vec![Unit { member: None, part: None, takes: takes(None) }],
        })
    }

    fn parameters(&self, unit: &Unit) -> Result<Value, StageError> {
        let method = Value::map([("method", self.method.id())]);
        let version = Value::map([("method_version", self.masking.version())]);
        let mut parts =
            vec![method, version, self.masking.parameters(unit.member.as_deref())?, to_value(&self.filter)?];
        match &unit.member {
            Some(task) if self.masking.looks_at_all() => parts.push(Value::map([("task", task.as_str())])),
            Some(_) => {}
            None => parts.push(to_value(&self.combine)?),
        }
        Ok(one_map(parts))
    }

    fn sources(&self, unit: &Unit) -> Result<Vec<SourceSet>, StageError> {
        self.masking.sources(unit.member.as_deref())
    }

    fn environment(&self, services: &Services) -> Result<Value, StageError> {
        self.masking.environment(services)
    }

    fn run(&self, job: &Job<'_>) -> Result<Draft, StageError> {
        let inputs = MaskInputs::open(job, &self.filter)?;
        let prepared = self.masking.prepare(&inputs).map_err(|error| inputs.name_the_culprit(error))?;
        let needed = match self.masking.votes_needed() {
            Some(needed) => needed,
            None => self.combine.votes_needed(prepared.voters),
        };
        if needed > prepared.voters as u64 {
            job.warn(format!("no entry is kept: it needs {needed} masks, and there are {}", prepared.voters));
        }
        // Votes are whole numbers, exact in f32 for more tasks than there will ever be.
        let needed = needed.min(1 << 24) as f32;
        let outputs: Vec<OutputTensor> = inputs
            .tensors
            .iter()
            .map(|info| OutputTensor {
                name: info.name.clone(),
                shape: info.shape.clone(),
                payload: Payload::Codes(one_bit()),
            })
            .collect();
        let draft = checkpoint::store(
            job,
            manifest::Content::Masks,
            &outputs,
            |tensor, range, block, scratch| {
                let Block::Values(votes) = block else { unreachable!("only codes were announced") };
                votes.fill(0.0);
                prepared.voting.vote(tensor, range, votes, scratch)?;
                for vote in votes {
                    *vote = f32::from(u8::from(*vote >= needed));
                }
                Ok(())
            },
            None,
        )
        .map_err(|error| inputs.name_the_culprit(error))?;
        if prepared.figures.is_empty() {
            return Ok(draft);
        }
        let described = Manifest::from_json(draft.manifest.as_bytes())?.with_figures(prepared.figures)?;
        Ok(Draft { manifest: checkpoint::manifest_text(&described), ..draft })
    }
}

/// One bit per entry, which reads as 0 or 1.
pub(crate) fn one_bit() -> Encoding {
    let bits = Bits::new(1).expect("one bit is within 1 to 8");
    Encoding::Affine { bits, granularity: Whole::Tensor, scale: [1.0], zero_point: [0.0] }
}

#[cfg(test)]
mod tests;
