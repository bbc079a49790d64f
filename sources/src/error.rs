//! Why a file could not be had, and what to do about it.

use std::path::PathBuf;

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong on the way to a file. Addresses are as the user wrote them; URLs are what was asked for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("`{address}` is no address: {reason}")]
    BadAddress { address: String, reason: String },
    #[error("`{address}` is not downloaded yet")]
    NotCached { address: String, offline: bool },
    /// 401 and 403. `gated` when the hub says that a licence has to be accepted.
    #[error("`{address}`: access refused by `{url}` (status {status})")]
    Refused {
        address: String,
        url: String,
        status: u16,
        repository: Option<String>,
        gated: bool,
        has_token: bool,
    },
    #[error("`{address}`: there is no such {what}: `{missing}` (`{url}`)")]
    NotFound { address: String, what: &'static str, missing: String, url: String },
    #[error("`{address}`: `{url}` wants fewer requests (status 429), also after {attempts} attempts")]
    RateLimited { address: String, url: String, attempts: u32 },
    #[error("`{address}`: `{url}` answered with status {status}")]
    Status { address: String, url: String, status: u16 },
    #[error("`{address}`: no answer from `{url}` after {attempts} attempts: {reason}")]
    Connection { address: String, url: String, attempts: u32, reason: String },
    #[error(
        "`{address}`: the download was interrupted {attempts} times in a row without a byte in between, at {done} bytes: {reason}"
    )]
    Interrupted { address: String, done: u64, attempts: u32, reason: String },
    #[error("`{address}`: more than {limit} redirects, the last to `{url}`")]
    TooManyRedirects { address: String, url: String, limit: usize },
    #[error("`{address}`: `{from}` redirects to `{to}`, which is {reason}")]
    BadRedirect { address: String, from: String, to: String, reason: &'static str },
    #[error("`{address}`: the file has {actual} bytes, the server announced {expected}")]
    WrongSize { address: String, expected: u64, actual: u64 },
    #[error(
        "`{address}`: the content is not what the server announced: {algorithm} is {actual}, expected {expected}"
    )]
    WrongDigest { address: String, algorithm: &'static str, expected: String, actual: String },
    /// The server does not speak the protocol.
    #[error("`{address}`: the answer of `{url}` makes no sense: {reason}")]
    Protocol { address: String, url: String, reason: String },
    #[error("`{address}` refers to `{missing}`, which is not there")]
    Incomplete { address: String, missing: String },
    #[error("`{address}`: {reason}")]
    Store { address: String, reason: String },
    /// The message names the path.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    #[error("certificates in `{}` cannot be read: {reason}", path.display())]
    Certificates { path: PathBuf, reason: String },
    #[error("proxy `{proxy}` cannot be used: {reason}")]
    Proxy { proxy: String, reason: String },
    #[error("interrupted")]
    Cancelled,
}

impl Error {
    /// What to do about it, if we know.
    pub fn help(&self) -> Option<String> {
        Some(match self {
            Self::NotCached { offline: true, .. } => {
                "nothing is downloaded offline: run once without `--offline` and `HF_HUB_OFFLINE`".to_owned()
            }
            Self::NotCached { .. } => "`merganser run` downloads it".to_owned(),
            Self::Refused { repository: Some(repository), gated: true, has_token, .. } => format!(
                "the authors ask for something first: accept it at `{repository}`{}",
                if *has_token { " with the account of your token" } else { ", then set `HF_TOKEN`" }
            ),
            Self::Refused { repository: Some(repository), has_token: false, .. } => format!(
                "a private repository needs `HF_TOKEN` (or `hf auth login`); if `{repository}` is misspelled the hub answers the same"
            ),
            Self::Refused { repository: Some(repository), .. } => format!(
                "the token has no access to `{repository}`, or the name is misspelled, or the token has expired"
            ),
            Self::Refused { .. } => "check the credentials and the spelling".to_owned(),
            Self::NotFound { what: "repository", .. } => {
                "check the spelling; a private repository needs `HF_TOKEN`".to_owned()
            }
            Self::NotFound { what: "revision", .. } => {
                "a revision is a branch, a tag or a commit of the repository".to_owned()
            }
            Self::NotFound { what: "checkpoint", .. } => "name the file: `hf://org/repo/weights.pt`".to_owned(),
            Self::NotFound { .. } => "check the spelling; names are case-sensitive".to_owned(),
            Self::RateLimited { .. } => "wait some minutes; with `HF_TOKEN` the hub allows more".to_owned(),
            Self::Connection { .. } | Self::Interrupted { .. } => {
                "what was received is kept: the same command goes on from there; `--offline` uses what is complete".to_owned()
            }
            Self::WrongDigest { .. } | Self::WrongSize { .. } => {
                "what was received has been removed; if it happens again, something between here and the server changes files"
                    .to_owned()
            }
            Self::Io(error) if error.kind() == std::io::ErrorKind::StorageFull => {
                "free some space, or set `HF_HUB_CACHE` or `--cache` to a larger disk".to_owned()
            }
            _ => return None,
        })
    }

    /// Whether the user could have known: a mistake in the address, or no such thing.
    pub fn is_users(&self) -> bool {
        matches!(
            self,
            Self::BadAddress { .. } | Self::NotCached { .. } | Self::Refused { .. } | Self::NotFound { .. }
        )
    }
}
