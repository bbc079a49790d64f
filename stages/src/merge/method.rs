//! What a merge method is: how it describes itself, what it is asked beforehand, and how it answers tensor by tensor.
//!
//! A method is parsed once per set of parameters (`rules` may give tensors others), prepared once per run, and then asked for the merged
//! task vector block by block or, where it says so, whole tensor by whole tensor. It never writes, never schedules, and never sees where its
//! inputs lie: that is the [driver](super::driver)'s.

use super::inputs::{MergeInputs, Operand};
use super::weights::TaskWeights;
use crate::diagnostics::Diagnostics;
use crate::kind::SourceSet;
use crate::params::{Params, Problem};
use crate::{Content, StageError};
use merganser_cache::{Blob, Staging, Value};
use merganser_tensors::{Result, Scratch};
use schemars::Schema;
use std::ops::Range;

/// A way to merge; one file each.
pub(crate) trait Method: Sync {
    /// What `method = "…"` says.
    fn id(&self) -> &'static str;

    fn summary(&self) -> &'static str;

    fn formula(&self) -> &'static str;

    fn source(&self) -> &'static str;

    fn schema(&self) -> Schema;

    fn parse(&self, params: &Params<'_>) -> std::result::Result<Box<dyn Merge>, Vec<Problem>>;
}

/// What comes out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// One checkpoint.
    One,
    /// One checkpoint per task: a collection.
    PerTask,
}

/// Whether a method wants a port connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    No,
    Optional,
    Required,
}

/// A method with its parameters.
pub(crate) trait Merge: Send + Sync {
    /// Raised whenever the method's numbers change.
    fn version(&self) -> u32;

    fn parameters(&self) -> std::result::Result<Value, StageError>;

    /// How much each task counts, of methods that take `weights`. Everything that these need of the framework follows from it.
    fn weights(&self) -> Option<&TaskWeights> {
        None
    }

    /// Checks what else can be known from the members' names.
    fn check(&self, _members: &[String]) -> std::result::Result<(), Problem> {
        Ok(())
    }

    fn outcome(&self) -> Outcome {
        Outcome::One
    }

    /// What the port `vectors` must hold.
    fn vectors(&self) -> Content {
        Content::TaskVectors
    }

    /// Whether it works with the port `masks`.
    fn masks(&self) -> Need {
        Need::No
    }

    /// Whether it works with the port `scores`.
    fn scores(&self) -> Need {
        self.weights().map_or(Need::No, TaskWeights::scores)
    }

    /// Whether the model of a task is made from that task's vector alone, of methods that make one model per task.
    fn reads_own_vector(&self) -> bool {
        false
    }

    /// Whether it works with the port `deltas`: the task vectors beside what is merged, for diagnostics.
    fn deltas(&self) -> Need {
        Need::No
    }

    /// Whether it works with the port `merged`.
    fn merged(&self) -> Need {
        Need::No
    }

    /// Whether it works with the port `statistics`: what each task's model sees of its data.
    fn statistics(&self) -> Need {
        Need::No
    }

    /// Whether it works with the port `origin`: the checkpoint that a graph was exported from.
    fn origin(&self) -> Need {
        Need::No
    }

    /// Whether it runs models: what an evaluation depends on enters the key.
    fn runs_graphs(&self) -> bool {
        false
    }

    /// Whether all tensors are merged together, so that none can have other parameters.
    fn is_joint(&self) -> bool {
        false
    }

    /// Whether its output holds, beside the base, all that must be kept to have the models again ([`Rule::parts`]).
    fn stores_parts(&self) -> bool {
        false
    }

    /// Whether it computes matrix products or decompositions, whose last bits depend on the instruction set: the numerics class enters the key.
    fn multiplies_matrices(&self) -> bool {
        false
    }

    /// Files that a parameter names, such as a table of accuracies.
    fn sources(&self) -> std::result::Result<Vec<SourceSet>, StageError> {
        self.weights().map_or(Ok(Vec::new()), TaskWeights::sources)
    }

    /// Looks at the inputs as far as it must before the first output: thresholds, norms, weights. `operands` are the tensors that these
    /// parameters are for.
    fn prepare<'a>(
        &'a self,
        inputs: &'a MergeInputs<'a>,
        operands: &[&Operand<'a>],
    ) -> std::result::Result<Box<dyn Rule + 'a>, StageError>;
}

/// The merged task vector, tensor by tensor.
pub(crate) trait Rule: Send + Sync {
    /// Whether the values are a difference to be added to the base (`θ = θ₀ + Δ`), or the merged parameters themselves.
    fn adds_to_base(&self) -> bool {
        true
    }

    /// Whether the tensor has to be computed as a whole, by [`Self::tensor`].
    fn needs_whole(&self, _operand: &Operand<'_>) -> bool {
        false
    }

    /// Writes elements `range`. Called from several threads, in any order.
    fn block(
        &self,
        operand: &Operand<'_>,
        range: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()>;

    /// How good the result is, of the tensors that this rule is for; kept beside the merged tensors.
    fn diagnostics(
        &self,
        _operands: &[&Operand<'_>],
    ) -> std::result::Result<Option<Diagnostics>, StageError> {
        Ok(None)
    }

    /// Further files that are kept beside the merged tensors.
    fn blobs(&self, _staging: &Staging) -> std::result::Result<Vec<Blob>, StageError> {
        Ok(Vec::new())
    }

    /// What Δ is made of, of methods whose models share a vector and differ in a mask: then these are stored, and a model is a view of them.
    fn parts(&self) -> Option<&dyn Parts> {
        None
    }

    /// Writes a whole tensor.
    fn tensor(&self, operand: &Operand<'_>, out: &mut [f32]) -> std::result::Result<(), StageError> {
        let mut scratch = Scratch::new();
        for range in merganser_tensors::stream::blocks(out.len()) {
            self.block(operand, range.clone(), &mut out[range], &mut scratch)?;
        }
        Ok(())
    }
}

/// `Δ = scale · (vector ⊙ mask)`: the model of one task. The vector is the same for all tasks, so it is stored once.
pub(crate) trait Parts: Send + Sync {
    /// Writes elements `range` of the vector and of the mask (0 or 1). Called from several threads, in any order.
    fn block(
        &self,
        operand: &Operand<'_>,
        range: Range<usize>,
        vector: &mut [f32],
        mask: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()>;

    fn scale(&self) -> f32;
}

/// The rule of parts.
pub(super) struct Localized<P>(pub(super) P);

impl<P: Parts> Rule for Localized<P> {
    fn block(
        &self,
        operand: &Operand<'_>,
        range: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        let mut mask = scratch.take(range.len());
        self.0.block(operand, range, out, &mut mask, scratch)?;
        let scale = self.0.scale();
        out.iter_mut().zip(&mask).for_each(|(x, m)| *x = *x * m * scale);
        scratch.give_back(mask);
        Ok(())
    }

    fn parts(&self) -> Option<&dyn Parts> {
        Some(&self.0)
    }
}
