//! `https://host/folder/file`: anything on the web, kept with the entity tag under which the server gave it.
//!
//! `http://` is for this machine only. A fragment `#sha256=…` says what the content must be.

use crate::address::{is_plain_name, name_of};
use crate::checkpoint::{Shape, select};
use crate::download::{Opened, Resume, content_range};
use crate::error::{Error, Result};
use crate::http::{Client, Reply, Request, is_this_machine, without_query};
use crate::place::{Kept, Remote, Version, folder_for};
use crate::sources::{Context, Located, Pins, Source};
use http::Method;
use http::header::{ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderName, IF_RANGE, RANGE};
use url::Url;

pub(crate) struct Web;

impl Source for Web {
    fn schemes(&self) -> &'static [&'static str] {
        &["https", "http"]
    }

    fn check(&self, address: &str) -> Result<()> {
        parse(address).map(drop)
    }

    fn get(&self, context: &Context<'_>, address: &str, pins: &Pins) -> Result<Located> {
        let Parsed { url, name, sha256 } = parse(address)?;
        let mut folder = url.join(".").unwrap_or_else(|_| url.clone());
        // Another query is another file under the same name.
        folder.set_query(url.query());
        let host = url.host_str().unwrap_or_default();
        let mut kept = Kept {
            folder: folder_for(&context.settings.downloads_dir, host, folder.as_str()),
            remote: WebFolder {
                client: context,
                url,
                name: name.clone(),
                address: without_fragment(address),
            },
            pins,
            mode: context.mode(context.settings.offline),
            settings: context.settings,
            expected: sha256.map(|digest| (name.clone(), digest)),
            files: Vec::new(),
        };
        let shape = if name.is_empty() { Shape::Folder } else { Shape::File };
        let path = select(&mut kept, &name, shape)?;
        let path = path.ok_or_else(|| Error::NotFound {
            address: address.to_owned(),
            what: if name.is_empty() { "checkpoint" } else { "file" },
            missing: name,
            url: without_query(&kept.remote.url),
        })?;
        Ok(Located { path, revision: None, files: kept.files })
    }
}

struct Parsed {
    url: Url,
    /// The last part of the path; empty for a folder.
    name: String,
    sha256: Option<String>,
}

fn parse(address: &str) -> Result<Parsed> {
    let fail = |reason: &str| Error::BadAddress { address: address.to_owned(), reason: reason.to_owned() };
    let mut url = Url::parse(address).map_err(|error| fail(&error.to_string()))?;
    // `https:///x` is read as `https://x` by the rules of browsers.
    if url.host_str().is_none_or(str::is_empty) || address.contains(":///") {
        return Err(fail("it names no host"));
    }
    if url.scheme() == "http" && !is_this_machine(&url) {
        return Err(fail("`http` is not encrypted, write `https`"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(fail("a pipeline file is no place for passwords"));
    }
    let sha256 = sha256_of(url.fragment()).map_err(fail)?;
    url.set_fragment(None);
    let name = name_of(url.path()).to_owned();
    if !name.is_empty() && !is_plain_name(&name) {
        return Err(fail("its last part cannot be the name of a file"));
    }
    Ok(Parsed { url, name, sha256 })
}

/// Reads a fragment that says what the content must be.
pub(crate) fn sha256_of(fragment: Option<&str>) -> Result<Option<String>, &'static str> {
    let Some(fragment) = fragment else { return Ok(None) };
    let digest = fragment.strip_prefix("sha256=").ok_or("after `#` only `sha256=…` has a meaning")?;
    if digest.len() != 64 || !digest.chars().all(|digit| digit.is_ascii_hexdigit()) {
        return Err("a SHA-256 has 64 hexadecimal digits");
    }
    Ok(Some(digest.to_ascii_lowercase()))
}

/// An address without what it says about the content.
pub(crate) fn without_fragment(address: &str) -> String {
    address.split('#').next().unwrap_or(address).to_owned()
}

struct WebFolder<'a> {
    client: &'a Context<'a>,
    url: Url,
    /// The file that `url` is about.
    name: String,
    address: String,
}

impl WebFolder<'_> {
    fn url_of(&self, name: &str) -> Url {
        if name == self.name {
            return self.url.clone();
        }
        // A relative reference that is a plain name can always be joined; `./` keeps `a:b` from being a scheme.
        self.url.join(&format!("./{name}")).unwrap_or_else(|_| self.url.clone())
    }

    fn ask(&self, method: Method, name: &str, headers: Vec<(HeaderName, String)>) -> Result<Option<Reply>> {
        let client: &Client = self.client.client()?;
        let address = self.address(name);
        let url = self.url_of(name);
        let request = Request { address: &address, method, url, headers, token: None, leaves_host: true };
        let reply = client.send(&request)?;
        let url = without_query(&reply.url);
        match reply.status.as_u16() {
            404 | 410 => Ok(None),
            status @ (401 | 403) => {
                Err(Error::Refused { address, url, status, repository: None, gated: false, has_token: false })
            }
            _ => Ok(Some(reply)),
        }
    }
}

impl Remote for WebFolder<'_> {
    fn address(&self, name: &str) -> String {
        if name == self.name {
            return self.address.clone();
        }
        let mut url = self.url_of(name);
        url.set_query(None);
        url.into()
    }

    fn version(&mut self, name: &str) -> Result<Version> {
        let Some(reply) = self.ask(Method::HEAD, name, Vec::new())? else { return Ok(Version::Missing) };
        // Not every server knows HEAD.
        Ok(Version::of(reply.header(ETAG.as_str()).filter(|_| reply.status.is_success()).map(str::to_owned)))
    }

    fn open(&mut self, name: &str, resume: &Resume) -> Result<Option<Opened>> {
        let mut headers = Vec::new();
        if let (1.., Some(version)) = (resume.offset, &resume.validator) {
            headers.push((RANGE, format!("bytes={}-", resume.offset)));
            headers.push((IF_RANGE, version.clone()));
        }
        let Some(reply) = self.ask(Method::GET, name, headers)? else { return Ok(None) };
        match opened(reply, &self.address(name), resume.offset)? {
            Some(opened) => Ok(Some(opened)),
            None => self.open(name, &Resume { offset: 0, validator: None }),
        }
    }
}

/// Turns the answer to a GET, perhaps of a range, into something to read; `None` if the range could not be had and the file must be
/// asked for from the start.
pub(crate) fn opened(reply: Reply, address: &str, offset: u64) -> Result<Option<Opened>> {
    let url = without_query(&reply.url);
    let protocol = |reason: &str| Error::Protocol {
        address: address.to_owned(),
        url: url.clone(),
        reason: reason.to_owned(),
    };
    let length = reply.header(CONTENT_LENGTH.as_str()).and_then(|text| text.parse::<u64>().ok());
    // Weak tags do not promise the same bytes.
    let tag = reply.header(ETAG.as_str()).filter(|tag| tag.starts_with('"'));
    let ranges = reply.header(ACCEPT_RANGES.as_str()) != Some("none");
    let validator = tag.filter(|_| ranges).map(str::to_owned);
    let (start, total) = match reply.status.as_u16() {
        200 => (0, length),
        206 => {
            let range = reply.header(CONTENT_RANGE.as_str()).and_then(content_range);
            let (start, total) = range.ok_or_else(|| protocol("a part of a file without `Content-Range`"))?;
            if start != offset {
                return Err(protocol(&format!("it sends a part from {start}, asked for {offset}")));
            }
            (start, total)
        }
        416 if offset > 0 => return Ok(None),
        status => return Err(Error::Status { address: address.to_owned(), url, status }),
    };
    let body = Box::new(reply.body.into_reader());
    Ok(Some(Opened { offset: start, total, validator, body }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_cannot_be_meant_are_refused() {
        for (address, reason) in [
            ("http://example.com/x", "not encrypted"),
            ("https://me:secret@example.com/x", "passwords"),
            ("https:///x", "no host"),
            ("https://example.com/x#part", "sha256"),
            ("https://example.com/x#sha256=12", "64"),
            ("https://example.com/a:b", "name of a file"),
        ] {
            let error = parse(address).err().map(|error| error.to_string()).unwrap_or_default();
            assert!(error.contains(reason), "{address}: {error}");
        }
    }

    #[test]
    fn the_last_part_is_the_name() {
        for (address, name) in [
            ("https://h/a/b.pt?download=1", "b.pt"),
            ("https://h/", ""),
            ("https://h", ""),
            ("http://localhost:1/x", "x"),
        ] {
            assert_eq!(parse(address).unwrap().name, name, "{address}");
        }
        let digest = "AB".repeat(32);
        let parsed = parse(&format!("https://h/x#sha256={digest}")).unwrap();
        assert_eq!(parsed.sha256, Some("ab".repeat(32)));
        assert_eq!(parsed.url.as_str(), "https://h/x");
    }
}
