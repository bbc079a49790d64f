//! `backend`: who computes eigenvalues and singular values; a parameter of everything that decomposes matrices.

use merganser_algebra::Backend;
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, de::Error};

/// Who computes eigenvalues and singular values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Decomposition {
    /// Pure Rust, always there.
    #[default]
    Faer,
    /// OpenBLAS; only in a program built with `--features lapack`.
    Lapack,
}

impl Decomposition {
    pub(crate) fn backend(self) -> Backend {
        match self {
            Self::Faer => Backend::Faer,
            Self::Lapack => Backend::Lapack,
        }
    }
}

impl<'de> Deserialize<'de> for Decomposition {
    /// Refuses what this program was not built with, where it is written.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        let found = match name.as_str() {
            "faer" => Self::Faer,
            "lapack" => Self::Lapack,
            _ => return Err(D::Error::unknown_variant(&name, &["faer", "lapack"])),
        };
        found.backend().require().map_err(D::Error::custom)?;
        Ok(found)
    }
}
