//! What this crate is told about the machine and the user. Nothing is looked up here.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Where things are kept, who the user is, and how to wait.
#[derive(Clone)]
pub struct Settings {
    /// The folder of files from `https` and object stores.
    pub downloads_dir: PathBuf,
    /// Never go to the network.
    pub offline: bool,
    pub hub: HubSettings,
    /// Variables of object stores (`AWS_…`, `GOOGLE_…`, `AZURE_…`) with their values, as their own tools read them.
    pub object_stores: Vec<(String, String)>,
    pub proxy: ProxySettings,
    /// Certificates to trust in place of those that are built in: a file of PEM.
    pub root_certificates: Option<PathBuf>,
    /// What servers are told about the client: `merganser/0.1.0`.
    pub user_agent: String,
    pub patience: Patience,
    /// Waits; may come back early when the user asks to stop.
    pub wait: Arc<dyn Fn(Duration) + Send + Sync>,
    /// Whether the user asked to stop.
    pub cancelled: Arc<dyn Fn() -> bool + Send + Sync>,
    /// Told what happens.
    pub on_event: Arc<dyn Fn(Event) + Send + Sync>,
}

/// The hub: `hf://`.
#[derive(Clone)]
pub struct HubSettings {
    /// `https://huggingface.co`, or a mirror of it.
    pub endpoint: String,
    /// Sent to the endpoint only.
    pub token: Option<String>,
    /// The cache that Hugging Face's own tools use: `$HF_HOME/hub`.
    pub cache_dir: PathBuf,
    /// Never go to the hub, as `HF_HUB_OFFLINE` has it.
    pub offline: bool,
}

/// Proxies, as URLs.
#[derive(Clone, Debug, Default)]
pub struct ProxySettings {
    pub url: Option<String>,
    /// Hosts that are reached directly: `example.com`, `.example.com`, `*`.
    pub except: Vec<String>,
}

/// How often to try again, and how long to wait before that.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// Attempts in a row that get nothing, before giving up.
    pub attempts: u32,
    /// Before the second attempt; doubled each time.
    pub first_wait: Duration,
    /// The longest wait, also when the server asks for more.
    pub longest_wait: Duration,
    /// How long a server may say nothing.
    pub silence: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            attempts: 6,
            first_wait: Duration::from_secs(1),
            longest_wait: Duration::from_mins(1),
            silence: Duration::from_secs(30),
        }
    }
}

impl Patience {
    /// The wait before attempt `n_failed + 1`, or `None` when that was enough.
    pub(crate) fn wait(&self, n_failed: u32, asked_for: Option<Duration>) -> Option<Duration> {
        if n_failed >= self.attempts {
            return None;
        }
        let doubled = self.first_wait.saturating_mul(1 << (n_failed.saturating_sub(1)).min(16));
        Some(asked_for.unwrap_or(doubled).min(self.longest_wait))
    }
}

/// Something that happened on the way to a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A download begins, or goes on from `done` bytes of an earlier attempt.
    Started {
        address: String,
        done: u64,
        total: Option<u64>,
    },
    Progress {
        address: String,
        done: u64,
        total: Option<u64>,
    },
    /// The file is there, with its size.
    Finished {
        address: String,
        size: u64,
    },
    /// An attempt failed and another one follows.
    Retrying {
        address: String,
        reason: String,
        wait: Duration,
    },
    /// Another process is downloading the same file.
    Waiting {
        address: String,
    },
}

// Secrets do not belong into logs.
impl fmt::Debug for HubSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HubSettings")
            .field("endpoint", &self.endpoint)
            .field("token", &self.token.as_ref().map(|_| "…"))
            .field("cache_dir", &self.cache_dir)
            .field("offline", &self.offline)
            .finish()
    }
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settings")
            .field("downloads_dir", &self.downloads_dir)
            .field("offline", &self.offline)
            .field("hub", &self.hub)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_longer_each_time_and_gives_up() {
        let patience = Patience { attempts: 4, longest_wait: Duration::from_secs(3), ..Patience::default() };
        let waits: Vec<_> = (1..=4).map(|n_failed| patience.wait(n_failed, None)).collect();
        assert_eq!(waits, [Some(1), Some(2), Some(3), None].map(|wait| wait.map(Duration::from_secs)));
        assert_eq!(patience.wait(1, Some(Duration::from_secs(2))), Some(Duration::from_secs(2)));
        assert_eq!(patience.wait(1, Some(Duration::from_mins(15))), Some(Duration::from_secs(3)));
        assert!(Patience { attempts: 90, ..patience }.wait(80, None).is_some(), "no overflow");
    }

    #[test]
    fn a_token_is_not_shown() {
        let hub = HubSettings {
            endpoint: String::new(),
            token: Some("hf_secret".to_owned()),
            cache_dir: PathBuf::new(),
            offline: false,
        };
        assert!(!format!("{hub:?}").contains("secret"));
    }
}
