//! `merge`: base and task vectors into one checkpoint.
//!
//! A method is one file and one line in [`METHODS`]. Methods that work element by element hand a rule to [`elementwise`], which streams
//! all task vectors block by block; memory does not grow with their number. Tensors that no task vector has (integer buffers, filtered
//! names) are taken from the base as they are.

mod average;
mod elementwise;
mod task_arithmetic;
mod weights;

use crate::filter::NameFilter;
use crate::kind::{Arity, Connection, Content, MethodDoc, Port, Ports, Stage, StageKind, Unit};
use crate::params::{Params, Problem, did_you_mean, one_map, to_value};
use crate::{Draft, Job, StageError, diff};
use merganser_cache::Value;
use merganser_tensors::TensorSource;
use schemars::Schema;
use std::sync::Arc;

/// A way to merge; one file each.
pub(crate) trait Method: Sync {
    /// What `method = "…"` says.
    fn id(&self) -> &'static str;

    fn summary(&self) -> &'static str;

    fn formula(&self) -> &'static str;

    fn source(&self) -> &'static str;

    fn schema(&self) -> Schema;

    fn parse(&self, params: &Params<'_>) -> Result<Box<dyn Merge>, Vec<Problem>>;
}

/// A method with its parameters.
pub(crate) trait Merge: Send + Sync {
    /// Raised whenever the method's numbers change.
    fn version(&self) -> u32;

    fn parameters(&self) -> Result<Value, StageError>;

    /// Checks what can be known from the members' names.
    fn check(&self, members: &[String]) -> Result<(), Problem>;

    fn run(&self, inputs: &MergeInputs<'_>) -> Result<Draft, StageError>;
}

/// All methods, in the order in which they are listed.
const METHODS: &[&dyn Method] = &[&average::Average, &task_arithmetic::TaskArithmetic];

/// What a method merges.
pub(crate) struct MergeInputs<'a> {
    pub job: &'a Job<'a>,
    pub base: Arc<dyn TensorSource>,
    /// Task vectors by task, in the order of the collection.
    pub vectors: Vec<(String, Arc<dyn TensorSource>)>,
    pub filter: &'a NameFilter,
}

pub(crate) struct MergeKind;

const PORTS: &[Port] = &[
    Port {
        name: "base",
        doc: "θ₀, the checkpoint that the task vectors are added to",
        accepts: &[Content::Checkpoint],
        arity: Arity::All,
        required: true,
    },
    Port {
        name: "vectors",
        doc: "the task vectors, packed or not: a collection, or a single one",
        accepts: &[Content::TaskVectors],
        arity: Arity::All,
        required: true,
    },
];

impl StageKind for MergeKind {
    fn id(&self) -> &'static str {
        "merge"
    }

    fn summary(&self) -> &'static str {
        "one checkpoint from a base and task vectors"
    }

    fn ports(&self) -> Ports {
        Ports { named: PORTS, open: None }
    }

    fn method_key(&self) -> Option<&'static str> {
        Some("method")
    }

    fn storage_port(&self) -> Option<&'static str> {
        Some("vectors")
    }

    fn methods(&self) -> Vec<MethodDoc> {
        METHODS
            .iter()
            .map(|method| MethodDoc {
                id: method.id(),
                summary: method.summary(),
                formula: method.formula(),
                source: method.source(),
                schema: NameFilter::document(method.schema()),
            })
            .collect()
    }

    fn parse(&self, mut params: Params<'_>) -> Result<Box<dyn Stage>, Vec<Problem>> {
        let mut problems = Vec::new();
        let known = METHODS.iter().map(|method| method.id());
        let method = match params.take_string("method") {
            None => {
                let help = did_you_mean("", known);
                problems.push(Problem {
                    help,
                    ..Problem::new("missing-key", "missing key `method`").at(params.span)
                });
                None
            }
            Some(Err(problem)) => {
                problems.push(problem);
                None
            }
            Some(Ok((id, span))) => {
                let found = METHODS.iter().find(|method| method.id() == id);
                if found.is_none() {
                    let help = did_you_mean(&id, known);
                    problems.push(Problem {
                        help,
                        ..Problem::new("unknown-method", format!("unknown method `{id}`")).at(span)
                    });
                }
                found
            }
        };
        let filter = NameFilter::take(&mut params).map_err(|found| problems.extend(found)).ok();
        let merge = method.and_then(|method| {
            method.parse(&params).map_err(|found| problems.extend(found)).ok().map(|merge| (method, merge))
        });
        match (merge, filter) {
            (Some((method, merge)), Some(filter)) if problems.is_empty() => {
                Ok(Box::new(MergeStage { id: method.id(), merge, filter }))
            }
            _ => Err(problems),
        }
    }
}

struct MergeStage {
    id: &'static str,
    merge: Box<dyn Merge>,
    filter: NameFilter,
}

impl Stage for MergeStage {
    fn version(&self) -> u32 {
        1
    }

    fn output(&self, inputs: &[Connection]) -> Result<Content, Problem> {
        if inputs.iter().any(|input| input.port == "base" && input.members.is_some()) {
            return Err(Problem::new("wrong-type", "port `base` takes one checkpoint, not a collection"));
        }
        let vectors = inputs.iter().find(|input| input.port == "vectors");
        if let Some(members) = vectors.and_then(|vectors| vectors.members.as_ref()) {
            self.merge.check(members)?;
        }
        Ok(Content::Checkpoint)
    }

    fn parameters(&self, _: &Unit) -> Result<Value, StageError> {
        let method = Value::map([("method", self.id)]);
        let version = Value::map([("method_version", self.merge.version())]);
        Ok(one_map([method, version, self.merge.parameters()?, to_value(&self.filter)?]))
    }

    fn run(&self, job: &Job<'_>) -> Result<Draft, StageError> {
        let base = job.tensors(job.input("base")?)?;
        let vectors = job
            .inputs_on("vectors")
            .map(|input| Ok((input.member.clone().unwrap_or_default(), job.tensors(input)?)))
            .collect::<Result<Vec<_>, StageError>>()?;
        let inputs = MergeInputs { job, base, vectors, filter: &self.filter };
        inputs.check_shapes()?;
        self.merge.run(&inputs)
    }
}

impl MergeInputs<'_> {
    /// Every task vector must fit the base, and all must have the same tensors: a tensor that one task lacks would silently count as zero.
    fn check_shapes(&self) -> Result<(), StageError> {
        let Some((first_task, first)) = self.vectors.first() else {
            return Err(StageError::input("there is no task vector to merge"));
        };
        for (task, vector) in &self.vectors {
            for info in vector.tensors() {
                let Some(index) = self.base.index_of(&info.name) else {
                    return Err(StageError::input(format!(
                        "the base has no tensor `{}`, which task vector `{task}` has",
                        info.name
                    )));
                };
                let expected = &self.base.tensors()[index].shape;
                if *expected != info.shape {
                    return Err(StageError::input(format!(
                        "tensor `{}` has shape {:?} in task vector `{task}` and {expected:?} in the base",
                        info.name, info.shape
                    )));
                }
            }
            let lacks: Vec<&str> = first
                .tensors()
                .iter()
                .map(|info| info.name.as_str())
                .filter(|name| vector.index_of(name).is_none())
                .collect();
            if !lacks.is_empty() {
                return Err(StageError::input(format!(
                    "task vector `{task}` lacks {}, which task vector `{first_task}` has",
                    diff::listed(&lacks)
                )));
            }
            let extra: Vec<&str> = vector
                .tensors()
                .iter()
                .map(|info| info.name.as_str())
                .filter(|name| first.index_of(name).is_none())
                .collect();
            if !extra.is_empty() {
                return Err(StageError::input(format!(
                    "task vector `{first_task}` lacks {}, which task vector `{task}` has",
                    diff::listed(&extra)
                )));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn method_ids_are_unique() {
        let mut ids: Vec<&str> = METHODS.iter().map(|method| method.id()).collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), METHODS.len());
    }
}
