//! Loops for the instruction set of the processor that runs them.
//!
//! What a loop computes does not depend on it: nothing is fused or reordered that the loop does not write so.

#![expect(
    clippy::inline_always,
    reason = "a loop is compiled for an instruction set only if all of it is inlined there"
)]

use pulp::{Arch, Simd, WithSimd};

/// A loop that is compiled for several instruction sets.
pub(crate) trait Loop {
    type Output;

    /// Must be `#[inline(always)]`, and so must all that it calls.
    fn run(self) -> Self::Output;
}

struct Dispatched<L>(L);

impl<L: Loop> WithSimd for Dispatched<L> {
    type Output = L::Output;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> Self::Output {
        self.0.run()
    }
}

/// Runs a loop with the best instructions that this processor has.
pub(crate) fn vectorized<L: Loop>(work: L) -> L::Output {
    Arch::new().dispatch(Dispatched(work))
}
