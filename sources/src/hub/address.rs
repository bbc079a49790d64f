//! `hf://[datasets/|spaces/]org/repo[@revision][/path]`, taken apart and written in one way.

use crate::address::is_plain_path;
use crate::error::{Error, Result};

/// What is meant when no revision is given.
const DEFAULT_REVISION: &str = "main";

/// A repository of the hub, a revision, and a path in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HubAddress {
    pub(crate) kind: RepoKind,
    /// `org/repo`.
    pub(crate) repo: String,
    /// A branch, a tag, a ref or a commit.
    pub(crate) revision: String,
    /// Empty for the repository itself; ends with `/` if a folder is meant.
    pub(crate) path: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RepoKind {
    Model,
    Dataset,
    Space,
}

impl RepoKind {
    /// In front of the repository, in addresses and URLs.
    pub(crate) fn prefix(self) -> &'static str {
        match self {
            Self::Model => "",
            Self::Dataset => "datasets/",
            Self::Space => "spaces/",
        }
    }

    /// In front of the repository, in the names of cache folders.
    pub(crate) fn folder(self) -> &'static str {
        match self {
            Self::Model => "models",
            Self::Dataset => "datasets",
            Self::Space => "spaces",
        }
    }
}

impl HubAddress {
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let fail = |reason: &str| Error::BadAddress { address: text.to_owned(), reason: reason.to_owned() };
        let rest = text.strip_prefix("hf://").ok_or_else(|| fail("it does not begin with `hf://`"))?;
        if rest.contains(['?', '#']) {
            return Err(fail("`?` and `#` mean nothing in it"));
        }
        let (kind, rest) = [RepoKind::Dataset, RepoKind::Space]
            .into_iter()
            .find_map(|kind| Some((kind, rest.strip_prefix(kind.prefix())?)))
            .unwrap_or((RepoKind::Model, rest));
        let mut parts = rest.splitn(3, '/');
        let (Some(org), Some(repo)) = (parts.next(), parts.next()) else {
            return Err(fail("write `hf://org/repo` or `hf://org/repo/file`"));
        };
        let path = parts.next().unwrap_or_default();
        let (repo, revision) = repo.split_once('@').unwrap_or((repo, DEFAULT_REVISION));
        // Branches may have slashes, which are written `%2F` here, as in other tools.
        let revision = revision.replace("%2F", "/").replace("%2f", "/");
        if !is_repo_name(org) || !is_repo_name(repo) {
            return Err(fail(
                "an organization and a repository have names of letters, digits, `-`, `_` and `.`",
            ));
        }
        if !is_revision(&revision) {
            return Err(fail("the revision after `@` cannot be one"));
        }
        if !path.is_empty() && !is_plain_path(path.strip_suffix('/').unwrap_or(path)) {
            return Err(fail("its path cannot be one of a file in a repository"));
        }
        Ok(Self { kind, repo: format!("{org}/{repo}"), revision, path: path.to_owned() })
    }

    /// The repository at the revision: what a lock pins to a commit.
    pub(crate) fn asked(&self) -> String {
        let at = match self.revision.as_str() {
            DEFAULT_REVISION => String::new(),
            revision => format!("@{}", revision.replace('/', "%2F")),
        };
        format!("hf://{}{}{at}", self.kind.prefix(), self.repo)
    }

    /// The address of a file of the repository.
    pub(crate) fn of_file(&self, name: &str) -> String {
        match name {
            "" => self.asked(),
            name => format!("{}/{name}", self.asked()),
        }
    }
}

/// Whether a revision is a commit, which never changes.
pub(crate) fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.chars().all(|digit| matches!(digit, '0'..='9' | 'a'..='f'))
}

fn is_repo_name(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with(['.', '-'])
        && !name.ends_with(['.', '-'])
        // `--` separates organization and repository in the names of cache folders.
        && !name.contains("--")
        && !name.contains("..")
        && name.chars().all(|character| character.is_ascii_alphanumeric() || "-_.".contains(character))
}

/// What Git allows as far as it is safe as a path.
fn is_revision(revision: &str) -> bool {
    is_plain_path(revision)
        && !revision.contains("..")
        && !revision.chars().any(|character| " ~^%[@{".contains(character))
        && revision.split('/').all(|part| !part.starts_with('.'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_address_is_taken_apart_and_written_in_one_way() {
        for (text, repo, revision, path, asked) in [
            ("hf://org/repo", "org/repo", "main", "", "hf://org/repo"),
            ("hf://org/repo/a/b.pt", "org/repo", "main", "a/b.pt", "hf://org/repo"),
            ("hf://org/repo@main/x", "org/repo", "main", "x", "hf://org/repo"),
            ("hf://org/repo@v1.0/sub/", "org/repo", "v1.0", "sub/", "hf://org/repo@v1.0"),
            ("hf://org/repo@refs%2fpr%2F3", "org/repo", "refs/pr/3", "", "hf://org/repo@refs%2Fpr%2F3"),
            ("hf://datasets/org/repo/x.npz", "org/repo", "main", "x.npz", "hf://datasets/org/repo"),
        ] {
            let address = HubAddress::parse(text).unwrap();
            assert_eq!(
                (address.repo.as_str(), address.revision.as_str(), address.path.as_str()),
                (repo, revision, path),
                "{text}"
            );
            assert_eq!(address.asked(), asked);
        }
    }

    #[test]
    fn addresses_that_cannot_be_meant_are_refused() {
        for text in [
            "hf://repo",
            "hf://org/",
            "hf:///repo",
            "hf://org/repo/../x",
            "hf://org/repo//x",
            "hf://../repo/x",
            "hf://org/repo@/x",
            "hf://org/repo@../x",
            "hf://org/repo@a b/x",
            "hf://org/repo@..%2F..%2Fetc/x",
            "hf://org/re--po",
            "hf://org/repo/x?y",
            "hf://datasets/org",
        ] {
            assert!(HubAddress::parse(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_is_accepted_is_safe_and_reads_back(text in "hf://[a-z./@%2F-]{0,24}") {
            let Ok(address) = HubAddress::parse(&text) else { return Ok(()) };
            let written = address.of_file(&address.path);
            prop_assert_eq!(HubAddress::parse(&written).unwrap(), address.clone());
            for part in [&address.repo, &address.revision, &address.path] {
                prop_assert!(!part.split('/').any(|part| part == ".."));
            }
        }
    }
}
