//! What is said to the hub: `HEAD` and `GET` of `/{repo}/resolve/{revision}/{file}`.
//!
//! `HEAD` tells commit (`X-Repo-Commit`), entity tag and size (`X-Linked-Etag`, `X-Linked-Size`; of small files plainly `ETag` and
//! `Content-Length`). It follows redirects within the hub, which renamed repositories give, and not the one to where large files are
//! stored. `GET` follows that one too, without the token, and asks the hub anew after every interruption: addresses there expire.

use super::address::HubAddress;
use super::is_commit;
use crate::download::{Opened, Resume};
use crate::error::{Error, Result};
use crate::http::{Reply, Request, without_query};
use crate::sources::Context;
use crate::web::opened;
use http::Method;
use http::header::{CONTENT_LENGTH, ETAG, HeaderName, RANGE};
use url::Url;

/// What the hub says about a file.
pub(super) struct Metadata {
    pub(super) commit: String,
    /// Without quotes; safe as the name of a file.
    pub(super) etag: String,
    pub(super) size: Option<u64>,
    /// Where it was asked for.
    pub(super) url: String,
}

/// A repository to talk about.
pub(super) struct Hub<'a> {
    pub(super) context: &'a Context<'a>,
    /// The address as the user wrote it.
    pub(super) text: &'a str,
    pub(super) address: &'a HubAddress,
}

/// The page of a repository, for people.
pub(super) fn page(endpoint: &str, address: &HubAddress) -> String {
    format!("{}/{}{}", endpoint.trim_end_matches('/'), address.kind.prefix(), address.repo)
}

impl Hub<'_> {
    /// Asks about a file; `None` if the repository has none of that name.
    pub(super) fn metadata(&self, revision: &str, name: &str) -> Result<Option<Metadata>> {
        let Some(reply) = self.ask(Method::HEAD, revision, name, self.text, Vec::new())? else {
            return Ok(None);
        };
        let url = without_query(&reply.url);
        let protocol = |reason: &str| Error::Protocol {
            address: self.text.to_owned(),
            url: url.clone(),
            reason: reason.to_owned(),
        };
        if !reply.status.is_success() && !reply.status.is_redirection() {
            return Err(Error::Status { address: self.text.to_owned(), url, status: reply.status.as_u16() });
        }
        let commit = reply
            .header("x-repo-commit")
            .filter(|commit| is_commit(commit))
            .ok_or_else(|| protocol("it names no commit, so it is no hub; check `HF_ENDPOINT`"))?;
        let etag = reply.header("x-linked-etag").or_else(|| reply.header(ETAG.as_str()));
        let etag = etag.map(|tag| tag.trim_start_matches("W/").trim_matches('"')).unwrap_or_default();
        let is_safe = |character: char| character.is_ascii_alphanumeric() || "-_.".contains(character);
        if etag.is_empty() || etag.starts_with('.') || etag.len() > 200 || !etag.chars().all(is_safe) {
            return Err(protocol("its entity tag cannot be used"));
        }
        let number = |name: &str| reply.header(name).and_then(|text| text.parse().ok());
        // The length of a redirect is that of a note for people.
        let length = || number(CONTENT_LENGTH.as_str()).filter(|_| !reply.status.is_redirection());
        let size = number("x-linked-size").or_else(length);
        Ok(Some(Metadata { commit: commit.to_owned(), etag: etag.to_owned(), size, url }))
    }

    /// Begins to read a file of a commit.
    pub(super) fn open(&self, commit: &str, name: &str, address: &str, resume: &Resume) -> Result<Opened> {
        let headers = match resume.offset {
            0 => Vec::new(),
            offset => vec![(RANGE, format!("bytes={offset}-"))],
        };
        let reply =
            self.ask(Method::GET, commit, name, address, headers)?.ok_or_else(|| Error::NotFound {
                address: address.to_owned(),
                what: "file",
                missing: name.to_owned(),
                url: self.url(commit, name).map_or_else(|_| String::new(), Into::into),
            })?;
        match opened(reply, address, resume.offset)? {
            Some(opened) => Ok(opened),
            None => self.open(commit, name, address, &Resume { offset: 0, validator: None }),
        }
    }

    fn url(&self, revision: &str, name: &str) -> Result<Url> {
        let endpoint = &self.context.settings.hub.endpoint;
        let fail = |reason: String| Error::Protocol {
            address: self.text.to_owned(),
            url: endpoint.clone(),
            reason: format!("the endpoint is no address of a server: {reason}; check `HF_ENDPOINT`"),
        };
        let mut url = Url::parse(endpoint).map_err(|error| fail(error.to_string()))?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(fail("it begins with neither `https` nor `http`".to_owned()));
        }
        let HubAddress { kind, repo, .. } = self.address;
        let prefix = kind.prefix().trim_end_matches('/');
        let mut segments = url.path_segments_mut().map_err(|()| fail("it has no path".to_owned()))?;
        segments
            .pop_if_empty()
            .extend(Some(prefix).filter(|prefix| !prefix.is_empty()))
            .extend(repo.split('/'));
        // One segment, whatever slashes a branch has.
        segments.push("resolve").push(revision).extend(name.split('/'));
        drop(segments);
        Ok(url)
    }

    /// Asks for a file; `None` if there is none of that name. Everything that concerns the repository is an error.
    fn ask(
        &self,
        method: Method,
        revision: &str,
        name: &str,
        address: &str,
        headers: Vec<(HeaderName, String)>,
    ) -> Result<Option<Reply>> {
        let hub = &self.context.settings.hub;
        let leaves_host = method == Method::GET;
        let url = self.url(revision, name)?;
        let request = Request { address, method, url, headers, token: hub.token.as_deref(), leaves_host };
        let reply = self.context.client()?.send(&request)?;
        let page = page(&hub.endpoint, self.address);
        let url = without_query(&reply.url);
        let not_found = |what: &'static str, missing: &str, url: String| Error::NotFound {
            address: self.text.to_owned(),
            what,
            missing: missing.to_owned(),
            url,
        };
        match (reply.status.as_u16(), reply.header("x-error-code")) {
            (_, Some("RevisionNotFound")) => Err(not_found("revision", revision, url)),
            (404, Some("RepoNotFound")) => Err(not_found("repository", &self.address.repo, url)),
            (_, Some("EntryNotFound")) | (404, _) => Ok(None),
            (status @ (401 | 403), code) => Err(Error::Refused {
                address: self.text.to_owned(),
                url,
                status,
                repository: Some(page),
                gated: code == Some("GatedRepo"),
                has_token: hub.token.is_some(),
            }),
            _ => Ok(Some(reply)),
        }
    }
}
