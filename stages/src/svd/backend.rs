//! Who computes decompositions, as a parameter.

use crate::StageError;
use crate::params::Problem;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `backend = "…"`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Backend {
    /// Pure Rust.
    #[default]
    Faer,
    /// LAPACK; needs a build with the feature `lapack`.
    Lapack,
}

impl Backend {
    pub(super) fn algebra(self) -> merganser_algebra::Backend {
        match self {
            Self::Faer => merganser_algebra::Backend::Faer,
            Self::Lapack => merganser_algebra::Backend::Lapack,
        }
    }

    /// Refuses what this build does not have.
    pub(super) fn check(self) -> Result<(), Problem> {
        let missing = |error: merganser_algebra::Error| Problem::new("bad-value", error.to_string());
        self.algebra().require().map_err(missing)
    }
}

/// A decomposition that failed, with what it was of.
pub(super) fn failed(what: &str, error: &merganser_algebra::Error) -> StageError {
    StageError::input(format!("{what}: {error}"))
}
