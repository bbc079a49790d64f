//! What a way to make masks is: how it describes itself, what it reads, and how it votes.
//!
//! Every method answers the same question: how many of the masks that a unit asks for have an entry. A unit that makes the mask of one task
//! asks for one mask and the answer is 0 or 1; a unit that combines the masks of all tasks asks for all of them and keeps the entries with
//! enough votes. Methods never write and never learn how masks are stored.

use super::inputs::MaskInputs;
use crate::kind::SourceSet;
use crate::params::{Params, Problem};
use crate::{Services, StageError};
use merganser_cache::Value;
use merganser_tensors::Scratch;
use schemars::Schema;
use std::collections::BTreeMap;
use std::ops::Range;

/// A way to make masks; one file each.
pub(super) trait Method: Sync {
    /// What `method = "…"` says.
    fn id(&self) -> &'static str;

    fn summary(&self) -> &'static str;

    fn formula(&self) -> &'static str;

    fn source(&self) -> &'static str;

    fn schema(&self) -> Schema;

    /// Whether the method itself says how masks become one, so that there is nothing to `combine`.
    fn makes_one(&self) -> bool {
        false
    }

    fn parse(&self, params: &Params<'_>) -> Result<Box<dyn Masking>, Vec<Problem>>;
}

/// Whether a method wants a port connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Need {
    No,
    Optional,
    Required,
}

/// A method with its parameters.
pub(super) trait Masking: Send + Sync {
    /// Raised whenever the method's masks change.
    fn version(&self) -> u32;

    /// What the mask of a task depends on, or the masks of all tasks.
    fn parameters(&self, task: Option<&str>) -> Result<Value, StageError>;

    /// Whether it reads a port besides `deltas`.
    fn need(&self, _port: &str) -> Need {
        Need::No
    }

    /// Checks which ports are connected together; each by itself has been checked.
    fn check_ports(&self, _connected: &dyn Fn(&str) -> bool) -> Result<(), Problem> {
        Ok(())
    }

    /// Whether the mask of one task depends on the task vectors of the others.
    fn looks_at_all(&self) -> bool {
        false
    }

    /// Votes that an entry needs, if the method says so.
    fn votes_needed(&self) -> Option<u64> {
        None
    }

    /// Whether masks can only be made task by task.
    fn only_per_task(&self) -> bool {
        false
    }

    /// Checks what can be known from the tasks' names; none are known of a single task vector.
    fn check(&self, _tasks: Option<&[String]>) -> Result<(), Problem> {
        Ok(())
    }

    /// The files that the mask of a task needs, or those of all tasks.
    fn sources(&self, _task: Option<&str>) -> Result<Vec<SourceSet>, StageError> {
        Ok(Vec::new())
    }

    fn environment(&self, _services: &Services) -> Result<Value, StageError> {
        Ok(Value::Null)
    }

    /// Looks at the inputs as far as it must before the first vote: thresholds, files, searches.
    fn prepare<'a>(&'a self, inputs: &'a MaskInputs<'a>) -> Result<Prepared<'a>, StageError>;
}

/// What voting is done by, and what was found out on the way.
pub(super) struct Prepared<'a> {
    pub voting: Box<dyn Voting + 'a>,
    /// How many masks can vote for an entry.
    pub voters: usize,
    /// Numbers to be kept with the masks.
    pub figures: BTreeMap<String, f64>,
}

impl<'a> Prepared<'a> {
    /// One vote for each task that is asked for, and nothing to report.
    pub(super) fn new(inputs: &MaskInputs<'a>, voting: Box<dyn Voting + 'a>) -> Self {
        Self { voting, voters: inputs.asked.len(), figures: BTreeMap::new() }
    }
}

/// The masks that are asked for, block by block. Called from several threads, in any order.
pub(super) trait Voting: Send + Sync {
    /// Adds 1 to every entry of `votes`, the elements `range` of a tensor, for each mask that has it. `tensor` is a position in
    /// [`MaskInputs::tensors`].
    fn vote(
        &self,
        tensor: usize,
        range: Range<usize>,
        votes: &mut [f32],
        scratch: &mut Scratch,
    ) -> merganser_tensors::Result<()>;
}
