//! Dense decompositions and matrix products for merging weights.
//!
//! What merge methods need of linear algebra, and no more: products and Gram matrices ([`product`], [`gram`]), symmetric eigenvalues
//! ([`symmetric_eigen`], [`largest_eigenpairs`]), singular values ([`thin_svd`], [`truncated_svd`], [`randomized_svd`]), polar factors
//! ([`polar_factor`]), Cholesky factors ([`cholesky`], [`divide_by_positive_definite`]) and pseudo-inverses ([`pseudo_inverse`], [`divide_by_symmetric`]). Arguments are views of `ndarray` arrays of
//! f32 or f64; transposed views cost nothing extra, so there is one function for all variants of a product.
//!
//! INVARIANT: everything that decides accuracy is computed in f64, whatever the arguments are.
//!
//! INVARIANT: with the backend `faer` a result is a function of the arguments and of the processor's instruction set, not of the
//! number of threads: work is cut into panels of fixed size, each panel is computed by one thread, and what is summed is summed
//! in one order. LAPACK promises neither.
//!
//! Nothing here knows about tensors, names or files. Shapes that do not fit are mistakes of the caller and panic; values that are
//! not finite are refused.

#![expect(clippy::needless_pass_by_value, reason = "views are references themselves")]

mod backend;
mod cholesky;
mod dense;
mod eigen;
mod element;
mod error;
mod orthonormal;
mod polar;
mod products;
mod pseudo_inverse;
mod randomized;
mod svd;
mod tridiagonal;

pub use backend::Backend;
pub use cholesky::{cholesky, divide_by_positive_definite};
pub use eigen::{Eigen, largest_eigenpairs, symmetric_eigen};
pub use element::Element;
pub use error::{Error, Result};
pub use orthonormal::orthonormal_basis;
pub use polar::{Polar, polar_factor};
pub use products::{frobenius_squared, gram, product, product_f32};
pub use pseudo_inverse::{Divided, default_cut_off, divide_by_symmetric, pseudo_inverse};
pub use randomized::{Randomized, RandomizedOptions, randomized_svd};
pub use svd::{Svd, thin_svd, truncated_svd};

#[cfg(test)]
mod testing;
