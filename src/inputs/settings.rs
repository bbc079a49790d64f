//! What downloads need to know about the machine and the user, read from the environment by the names that other tools use.

use crate::engine::cancelled;
use merganser_sources::{Event, HubSettings, Patience, ProxySettings, Settings};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// The longest sleep between two looks at whether the user asked to stop.
const SLICE: Duration = Duration::from_millis(50);

/// Choices of the command line; everything else is found in the environment.
#[derive(Clone, Debug)]
pub struct Environment {
    pub cache_dir: PathBuf,
    pub offline: bool,
}

impl Environment {
    /// Settings for getting files.
    pub fn into_settings(self, on_event: Arc<dyn Fn(Event) + Send + Sync>) -> Settings {
        Settings {
            downloads_dir: self.cache_dir.join("downloads-v1"),
            offline: self.offline,
            hub: hub(),
            object_stores: object_stores(),
            proxy: proxy(),
            root_certificates: text("SSL_CERT_FILE").map(PathBuf::from),
            user_agent: concat!("merganser/", env!("CARGO_PKG_VERSION")).to_owned(),
            patience: Patience::default(),
            wait: Arc::new(wait),
            cancelled: Arc::new(cancelled),
            on_event,
        }
    }
}

/// A variable that is set to something.
fn text(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.trim().is_empty())
}

fn is_true(name: &str) -> bool {
    text(name)
        .is_some_and(|value| ["1", "ON", "YES", "TRUE"].contains(&value.trim().to_ascii_uppercase().as_str()))
}

/// `~` at the beginning of a path is the user's folder.
fn expanded(path: &str) -> PathBuf {
    match (path.strip_prefix("~/"), std::env::home_dir()) {
        (Some(rest), Some(home)) => home.join(rest),
        _ => PathBuf::from(path),
    }
}

fn hub() -> HubSettings {
    let caches = text("XDG_CACHE_HOME").map(|path| expanded(&path));
    let caches = caches.or_else(|| Some(std::env::home_dir()?.join(".cache"))).unwrap_or_default();
    let home = text("HF_HOME").map_or_else(|| caches.join("huggingface"), |path| expanded(&path));
    let cache = text("HF_HUB_CACHE").or_else(|| text("HUGGINGFACE_HUB_CACHE"));
    HubSettings {
        endpoint: text("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned()),
        token: token(&home),
        cache_dir: cache.map_or_else(|| home.join("hub"), |path| expanded(&path)),
        offline: is_true("HF_HUB_OFFLINE") || is_true("TRANSFORMERS_OFFLINE"),
    }
}

/// The token: from the environment, else from where `hf auth login` keeps it.
fn token(hf_home: &Path) -> Option<String> {
    if let Some(token) = text("HF_TOKEN").or_else(|| text("HUGGING_FACE_HUB_TOKEN")) {
        return Some(token.trim().to_owned());
    }
    if is_true("HF_HUB_DISABLE_IMPLICIT_TOKEN") {
        return None;
    }
    let path = text("HF_TOKEN_PATH").map_or_else(|| hf_home.join("token"), |path| expanded(&path));
    let token = std::fs::read_to_string(path).ok()?;
    Some(token.trim().to_owned()).filter(|token| !token.is_empty())
}

fn object_stores() -> Vec<(String, String)> {
    let is_theirs = |name: &str| ["AWS_", "GOOGLE_", "AZURE_"].iter().any(|prefix| name.starts_with(prefix));
    let variables = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    let mut found: Vec<(String, String)> = variables.filter(|(name, _)| is_theirs(name)).collect();
    // Google's own libraries know the folder of the user; this one is told.
    if let Some(path) = text("SERVICE_ACCOUNT") {
        found.push(("GOOGLE_SERVICE_ACCOUNT".to_owned(), path));
    }
    found.sort_unstable();
    found
}

fn proxy() -> ProxySettings {
    let either = |upper: &str| text(upper).or_else(|| text(&upper.to_ascii_lowercase()));
    let except = either("NO_PROXY").unwrap_or_default();
    ProxySettings {
        url: either("HTTPS_PROXY").or_else(|| either("ALL_PROXY")),
        except: except.split(',').map(str::trim).filter(|host| !host.is_empty()).map(str::to_owned).collect(),
    }
}

/// Sleeps, unless the user asks to stop.
fn wait(duration: Duration) {
    let mut left = duration;
    while !left.is_zero() && !cancelled() {
        let slice = left.min(SLICE);
        std::thread::sleep(slice);
        left -= slice;
    }
}
