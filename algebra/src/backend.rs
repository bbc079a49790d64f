//! Who computes eigenvalues and singular values.
//!
//! Products are always computed here: they are the same numbers with either backend.

use crate::error::{Error, Result};
use ndarray::{Array1, Array2};

/// Who computes eigenvalues and singular values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Backend {
    /// Pure Rust, always there.
    #[default]
    Faer,
    /// OpenBLAS of the system; needs the cargo feature `lapack`. Its results may depend on its number of threads.
    Lapack,
}

impl Backend {
    /// Whether this build has it.
    pub fn is_available(self) -> bool {
        self == Self::Faer || cfg!(feature = "lapack")
    }

    /// Refuses what this build does not have.
    pub fn require(self) -> Result<()> {
        if self.is_available() { Ok(()) } else { Err(Error::NoLapack) }
    }
}

/// Eigenvalues in ascending order and eigenvectors as columns.
#[cfg(feature = "lapack")]
pub(crate) fn lapack_eigh(matrix: &Array2<f64>) -> Result<(Array1<f64>, Array2<f64>)> {
    use ndarray_linalg::{Eigh, UPLO};
    let (rows, columns) = matrix.dim();
    matrix.eigh(UPLO::Lower).map_err(|error| Error::Lapack { rows, columns, message: error.to_string() })
}

/// U, σ in descending order, Vᵀ.
#[cfg(feature = "lapack")]
pub(crate) fn lapack_svd(matrix: &Array2<f64>) -> Result<(Array2<f64>, Array1<f64>, Array2<f64>)> {
    use ndarray_linalg::{JobSvd, SVDDC};
    let (rows, columns) = matrix.dim();
    let lapack = |message: String| Error::Lapack { rows, columns, message };
    let (u, values, vt) = matrix.svddc(JobSvd::Some).map_err(|error| lapack(error.to_string()))?;
    let absent = || lapack("it returned no singular vectors".to_owned());
    Ok((u.ok_or_else(absent)?, values, vt.ok_or_else(absent)?))
}

#[cfg(not(feature = "lapack"))]
pub(crate) fn lapack_eigh(_: &Array2<f64>) -> Result<(Array1<f64>, Array2<f64>)> {
    Err(Error::NoLapack)
}

#[cfg(not(feature = "lapack"))]
pub(crate) fn lapack_svd(_: &Array2<f64>) -> Result<(Array2<f64>, Array1<f64>, Array2<f64>)> {
    Err(Error::NoLapack)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_built_in_says_how_to_build_it() {
        assert_eq!(Backend::Faer.require(), Ok(()));
        if cfg!(feature = "lapack") {
            assert_eq!(Backend::Lapack.require(), Ok(()));
        } else {
            let message = Backend::Lapack.require().unwrap_err().to_string();
            assert!(
                message.contains("--features lapack") && message.contains("libopenblas-dev"),
                "{message}"
            );
        }
    }
}
