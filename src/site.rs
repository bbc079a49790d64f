//! Facts about this machine that belong into no pipeline: what runs ONNX graphs.
//!
//! Two files may say them: the user's `config.toml`, and one for a machine or cluster (`--site`, `MERGANSER_SITE`), which goes before it. No
//! pipeline, lock file or key ever names them; what they choose and results depend on enters keys by name, as the execution provider does.

use crate::exit::{Failure, Result};
use merganser_onnx::Provider;
use serde::Deserialize;
use std::path::{Path, PathBuf};

/// What a file may say.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Site {
    #[serde(default)]
    pub onnxruntime: OnnxRuntime,
}

/// How ONNX Runtime computes here.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OnnxRuntime {
    /// `cpu` (default), `cuda`, `tensorrt`, `coreml` or `openvino`.
    #[serde(default, deserialize_with = "provider")]
    pub provider: Option<Provider>,
    /// Which of several devices.
    #[serde(default)]
    pub device: Option<u16>,
}

fn provider<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Provider>, D::Error> {
    let text = String::deserialize(deserializer)?;
    text.parse().map(Some).map_err(serde::de::Error::custom)
}

impl Site {
    /// Reads the site's file, which must be there if it was named, and the user's, which need not.
    pub fn read(named: Option<&Path>) -> Result<Self> {
        let site = named.map(Self::of_file).transpose()?.unwrap_or_default();
        let user = match user_file().filter(|path| path.is_file()) {
            Some(path) => Self::of_file(&path)?,
            None => Self::default(),
        };
        // A device is one of its provider's: the two go together.
        let onnxruntime =
            if site.onnxruntime.provider.is_some() { site.onnxruntime } else { user.onnxruntime };
        Ok(Self { onnxruntime })
    }

    fn of_file(path: &Path) -> Result<Self> {
        let text = fs_err::read_to_string(path).map_err(Failure::user)?;
        toml::from_str(&text)
            .map_err(|error| Failure::user(format!("`{}`: {}", path.display(), error.to_string().trim_end())))
    }
}

/// `merganser/config.toml` in the user's folder of settings.
fn user_file() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let folder = match set("XDG_CONFIG_HOME").filter(|folder| folder.is_absolute()) {
        Some(folder) => folder,
        None => std::env::home_dir().filter(|home| !home.as_os_str().is_empty())?.join(".config"),
    };
    Some(folder.join("merganser/config.toml"))
}
