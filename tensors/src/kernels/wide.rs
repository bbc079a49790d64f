//! Kernels compiled once more for the vector units of newer processors.
//!
//! The program is built for every x86-64: vectors of four numbers, no blending, no shifts by vectors. [`wide`] runs a kernel as compiled for AVX2 where
//! the machine has it. The results are the same to the bit: the compiler neither contracts products and sums nor adds in another
//! order, it only takes more elements at once.

use pulp::{Arch, NullaryFnOnce};

/// Work with its arguments. A trait, because closures and functions are called through code that need not be inlined.
pub trait Kernel {
    type Output;

    /// Implementations are marked `#[inline(always)]`, and so are the functions that they call: what is not inlined stays compiled for the narrow
    /// vectors.
    fn run(self) -> Self::Output;
}

/// Runs a kernel with the widest vectors that this machine has. Worth it from some hundred elements on.
#[inline]
pub fn wide<K: Kernel>(kernel: K) -> K::Output {
    struct Dispatched<K>(K);

    impl<K: Kernel> NullaryFnOnce for Dispatched<K> {
        type Output = K::Output;

        #[inline(always)]
        fn call(self) -> K::Output {
            self.0.run()
        }
    }

    Arch::new().dispatch(Dispatched(kernel))
}
