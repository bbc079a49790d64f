//! What can go wrong in a decomposition.

/// Why there is no decomposition.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
pub enum Error {
    #[error("the matrix is not finite at row {row}, column {column}")]
    NotFinite { row: usize, column: usize },
    #[error("the {what} of a {rows} x {columns} matrix did not converge")]
    NoConvergence { what: &'static str, rows: usize, columns: usize },
    #[error("the {rows} x {rows} matrix is not positive definite")]
    NotPositiveDefinite { rows: usize },
    #[error(
        "this program was built without LAPACK; build it with `cargo build --release --features lapack` (needs libopenblas-dev)"
    )]
    NoLapack,
    #[error("LAPACK failed on a {rows} x {columns} matrix: {message}")]
    Lapack { rows: usize, columns: usize, message: String },
}

pub type Result<T, E = Error> = std::result::Result<T, E>;
