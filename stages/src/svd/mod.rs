//! `svd`: what task vectors have in common (task mode), or each of them in low rank (matrix mode).
//!
//! A mode is one file and one line in [`MODES`].

mod backend;
mod decompose;
mod matrix;
mod task;

use crate::filter::NameFilter;
use crate::kind::{Arity, Connection, Content, MethodDoc, Port, Ports, Stage, StageKind, Unit};
use crate::numerics::numerics_class;
use crate::params::{Params, Problem, one_map, to_value};
use crate::{Draft, Job, Services, StageError};
use merganser_cache::Value;
use schemars::Schema;
use std::collections::BTreeMap;

/// A way to decompose.
trait Mode: Sync {
    /// What `mode = "…"` says.
    fn id(&self) -> &'static str;

    fn summary(&self) -> &'static str;

    fn formula(&self) -> &'static str;

    fn source(&self) -> &'static str;

    fn schema(&self) -> Schema;

    fn parse(&self, params: &Params<'_>) -> Result<Box<dyn Decomposition>, Vec<Problem>>;
}

/// A mode with its parameters.
trait Decomposition: Send + Sync {
    /// Raised whenever its numbers change.
    fn version(&self) -> u32;

    fn output(&self, inputs: &[Connection]) -> Result<Content, Problem>;

    fn units(&self, inputs: &[Connection]) -> Result<Vec<Unit>, Problem>;

    fn parameters(&self) -> Result<Value, StageError>;

    fn run(&self, job: &Job<'_>, filter: &NameFilter) -> Result<Draft, StageError>;
}

/// The first is the default.
const MODES: &[&dyn Mode] = &[&task::TaskMode, &matrix::MatrixMode];

pub(crate) struct Svd;

const PORTS: &[Port] = &[
    Port {
        name: "deltas",
        doc: "task vectors: task mode looks at all of them at once, matrix mode at one after the other",
        accepts: &[Content::TaskVectors],
        arity: Arity::All,
        required: true,
    },
    Port {
        name: "masks",
        doc: "one mask for all tasks, of task mode: the entries that it keeps are the signal, the others noise",
        accepts: &[Content::Masks],
        arity: Arity::All,
        required: false,
    },
];

impl StageKind for Svd {
    fn id(&self) -> &'static str {
        "svd"
    }

    fn summary(&self) -> &'static str {
        "directions that task vectors share, or each of their matrices in low rank"
    }

    fn ports(&self) -> Ports {
        Ports { named: PORTS, open: None }
    }

    fn method_key(&self) -> Option<&'static str> {
        Some("mode")
    }

    fn methods(&self) -> Vec<MethodDoc> {
        let doc = |mode: &&dyn Mode| MethodDoc {
            id: mode.id(),
            summary: mode.summary(),
            formula: mode.formula(),
            source: mode.source(),
            schema: NameFilter::document(mode.schema()),
        };
        MODES.iter().map(doc).collect()
    }

    fn parse(&self, mut params: Params<'_>) -> Result<Box<dyn Stage>, Vec<Problem>> {
        let mut problems = Vec::new();
        let mode = params
            .choose("mode", MODES, <dyn Mode>::id, Some(MODES[0]))
            .map_err(|problem| problems.push(problem))
            .ok();
        let filter = NameFilter::take(&mut params).map_err(|found| problems.extend(found)).ok();
        let parsed = mode.and_then(|mode| {
            let parsed = mode.parse(&params).map_err(|found| problems.extend(found)).ok()?;
            Some((mode.id(), parsed))
        });
        match (parsed, filter) {
            (Some((mode, decomposition)), Some(filter)) if problems.is_empty() => {
                Ok(Box::new(SvdStage { mode, decomposition, filter }))
            }
            _ => Err(problems),
        }
    }
}

struct SvdStage {
    mode: &'static str,
    decomposition: Box<dyn Decomposition>,
    filter: NameFilter,
}

impl Stage for SvdStage {
    fn version(&self) -> u32 {
        1
    }

    fn output(&self, inputs: &[Connection]) -> Result<Content, Problem> {
        self.decomposition.output(inputs)
    }

    fn units(&self, inputs: &[Connection], _: &Ports) -> Result<Vec<Unit>, Problem> {
        self.decomposition.units(inputs)
    }

    fn parameters(&self, _: &Unit) -> Result<Value, StageError> {
        let mode = Value::map([("mode", self.mode)]);
        let version = Value::map([("mode_version", self.decomposition.version())]);
        Ok(one_map([mode, version, self.decomposition.parameters()?, to_value(&self.filter)?]))
    }

    fn environment(&self, _: &Services) -> Result<Value, StageError> {
        let class = Value::Text(numerics_class().to_owned());
        Ok(Value::Map(BTreeMap::from([("numerics".to_owned(), class)])))
    }

    fn run(&self, job: &Job<'_>) -> Result<Draft, StageError> {
        self.decomposition.run(job, &self.filter)
    }
}
