//! HTTP as this crate needs it: redirects followed by our rules, failures tried again, answers handed on with their headers.
//!
//! ureq does one request at a time here; it follows no redirects itself, because where a token may go is decided per hop: to the origin
//! (scheme, host and port) that it is for, never further. From `https` nothing leads back to `http`.

use crate::error::{Error, Result};
use crate::settings::{Event, Settings};
use http::header::{AUTHORIZATION, HeaderMap, HeaderName, LOCATION, RETRY_AFTER};
use http::{Method, StatusCode};
use std::fmt::Display;
use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;
use url::Url;

/// More redirects in a row are a loop.
const MAX_REDIRECTS: usize = 10;

/// Attempts at a host that does not exist or does not listen: mostly the machine has no network.
const NOBODY: u32 = 3;

/// How long a connection may take to come about.
const CONNECT: Duration = Duration::from_secs(15);

/// What is asked for.
#[derive(Clone)]
pub(crate) struct Request<'a> {
    /// For messages.
    pub(crate) address: &'a str,
    pub(crate) method: Method,
    pub(crate) url: Url,
    pub(crate) headers: Vec<(HeaderName, String)>,
    /// For the origin of `url` only.
    pub(crate) token: Option<&'a str>,
    /// Whether a redirect to another host is followed; it is handed back otherwise.
    pub(crate) leaves_host: bool,
}

/// An answer of any status that is final: no redirect to be followed, nothing to be tried again.
pub(crate) struct Reply {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    /// Where it came from in the end.
    pub(crate) url: Url,
    pub(crate) body: ureq::Body,
}

impl Reply {
    /// A header's value, if it is text.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

/// Does requests. Made once; keeps connections.
#[derive(Clone)]
pub(crate) struct Client {
    agent: ureq::Agent,
    settings: Arc<Settings>,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").finish_non_exhaustive()
    }
}

impl Client {
    pub(crate) fn new(settings: &Arc<Settings>) -> Result<Self> {
        let config = ureq::Agent::config_builder()
            .max_redirects(0)
            .max_redirects_will_error(false)
            .http_status_as_error(false)
            .user_agent(settings.user_agent.as_str())
            // Sizes and ranges mean the file, not a compressed form of it.
            .accept_encoding("identity")
            .timeout_connect(Some(CONNECT))
            .timeout_per_read(Some(settings.patience.silence))
            .timeout_per_write(Some(settings.patience.silence))
            .proxy(proxy(settings)?)
            .tls_config(tls(settings)?)
            .build();
        Ok(Self { agent: config.new_agent(), settings: Arc::clone(settings) })
    }

    /// Sends a request until there is an answer that trying again would not change.
    pub(crate) fn send(&self, request: &Request<'_>) -> Result<Reply> {
        let address = request.address;
        let mut n_failed = 0;
        loop {
            if (self.settings.cancelled)() {
                return Err(Error::Cancelled);
            }
            let mut is_nobody_there = false;
            let (failure, asked_for, reason) = match self.follow(request)? {
                Ok(reply) if !is_passing(reply.status) => return Ok(reply),
                Ok(reply) => {
                    let (url, status) = (without_query(&reply.url), reply.status.as_u16());
                    let attempts = n_failed + 1;
                    let failure = match status {
                        429 => Error::RateLimited { address: address.to_owned(), url, attempts },
                        _ => Error::Status { address: address.to_owned(), url, status },
                    };
                    (failure, retry_after(&reply.headers), format!("status {status}"))
                }
                Err((url, reason)) => {
                    is_nobody_there = match &reason {
                        ureq::Error::HostNotFound => true,
                        ureq::Error::Io(error) => error.kind() == ErrorKind::ConnectionRefused,
                        _ => false,
                    };
                    let (url, attempts) = (without_query(&url), n_failed + 1);
                    let (address, reason) = (address.to_owned(), reason.to_string());
                    let told = reason.clone();
                    (Error::Connection { address, url, attempts, reason }, None, told)
                }
            };
            n_failed += 1;
            let is_hopeless = is_nobody_there && n_failed >= NOBODY;
            let wait = self.settings.patience.wait(n_failed, asked_for).filter(|_| !is_hopeless);
            let Some(wait) = wait else { return Err(failure) };
            (self.settings.on_event)(Event::Retrying { address: address.to_owned(), reason, wait });
            (self.settings.wait)(wait);
        }
    }

    /// One attempt with all redirects. The outer error is final; the inner one may pass.
    fn follow(&self, request: &Request<'_>) -> Result<Result<Reply, (Url, ureq::Error)>> {
        let mut url = request.url.clone();
        let mut token = request.token;
        for _ in 0..=MAX_REDIRECTS {
            let reply = match self.once(request, &url, token) {
                Ok(reply) => reply,
                Err(error) => return Ok(Err((url, error))),
            };
            let target = reply.header(LOCATION.as_str()).filter(|_| reply.status.is_redirection());
            let Some(target) = target.filter(|_| reply.status != StatusCode::NOT_MODIFIED) else {
                return Ok(Ok(reply));
            };
            let bad = |to: &str, reason| Error::BadRedirect {
                address: request.address.to_owned(),
                from: without_query(&url),
                to: to.to_owned(),
                reason,
            };
            let next = url.join(target).map_err(|_| bad(target, "no address"))?;
            if !matches!(next.scheme(), "http" | "https") || next.host().is_none() {
                return Err(bad(&without_query(&next), "not on the web"));
            }
            if url.scheme() == "https" && next.scheme() == "http" {
                return Err(bad(&without_query(&next), "not encrypted"));
            }
            let stays = next.origin() == url.origin();
            if !stays && !request.leaves_host {
                return Ok(Ok(reply));
            }
            token = token.filter(|_| stays);
            url = next;
        }
        let (address, url) = (request.address.to_owned(), without_query(&url));
        Err(Error::TooManyRedirects { address, url, limit: MAX_REDIRECTS })
    }

    fn once(&self, request: &Request<'_>, url: &Url, token: Option<&str>) -> Result<Reply, ureq::Error> {
        let mut built = http::Request::builder().method(request.method.clone()).uri(url.as_str());
        for (name, value) in &request.headers {
            built = built.header(name, value);
        }
        if let Some(token) = token {
            built = built.header(AUTHORIZATION, format!("Bearer {token}"));
        }
        let reply = self.agent.run(built.body(()).map_err(ureq::Error::Http)?)?;
        let (parts, body) = reply.into_parts();
        Ok(Reply { status: parts.status, headers: parts.headers, url: url.clone(), body })
    }

    /// Sends a request that another library has put together (and signed): as it is, once, following nothing.
    pub(crate) fn send_as_is(
        &self,
        request: http::Request<Vec<u8>>,
    ) -> Result<http::Response<ureq::Body>, ureq::Error> {
        let (parts, body) = request.into_parts();
        if body.is_empty() {
            self.agent.run(http::Request::from_parts(parts, ()))
        } else {
            self.agent.run(http::Request::from_parts(parts, body))
        }
    }

    pub(crate) fn settings(&self) -> &Settings {
        &self.settings
    }
}

/// Whether an answer may be another one next time.
pub(crate) fn is_passing(status: StatusCode) -> bool {
    matches!(status.as_u16(), 408 | 429 | 500 | 502 | 503 | 504)
}

/// How long the server wants to be left alone, if it says so in seconds (a date would need a clock).
pub(crate) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    headers.get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok().map(Duration::from_secs)
}

/// A URL for messages: signatures in queries are secrets.
pub(crate) fn without_query(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.set_fragment(None);
    // Fails only for URLs that cannot have a user.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.into()
}

/// Whether a host is this machine.
pub(crate) fn is_this_machine(url: &Url) -> bool {
    match url.host() {
        Some(url::Host::Domain(name)) => name == "localhost" || name.ends_with(".localhost"),
        Some(url::Host::Ipv4(address)) => address.is_loopback(),
        Some(url::Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    }
}

fn proxy(settings: &Settings) -> Result<Option<ureq::Proxy>> {
    let Some(text) = &settings.proxy.url else { return Ok(None) };
    let fail = |reason: &dyn Display| Error::Proxy { proxy: text.clone(), reason: reason.to_string() };
    let given = ureq::Proxy::new(text).map_err(|error| fail(&error))?;
    let mut builder = ureq::Proxy::builder(given.protocol()).host(given.host()).port(given.port());
    if let Some(name) = given.username() {
        builder = builder.username(name);
    }
    if let Some(password) = given.password() {
        builder = builder.password(password);
    }
    // A proxy does not know what this machine calls itself.
    for host in settings.proxy.except.iter().map(String::as_str).chain(["localhost", "127.0.0.1", "[::1]"]) {
        builder = builder.no_proxy(host);
    }
    builder.build().map(Some).map_err(|error| fail(&error))
}

fn tls(settings: &Settings) -> Result<ureq::tls::TlsConfig> {
    use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
    let Some(path) = &settings.root_certificates else { return Ok(TlsConfig::default()) };
    let fail = |reason: &dyn Display| Error::Certificates { path: path.clone(), reason: reason.to_string() };
    let text = fs_err::read(path).map_err(|error| fail(&error))?;
    let mut certificates = Vec::new();
    for item in parse_pem(&text) {
        if let PemItem::Certificate(certificate) = item.map_err(|error| fail(&error))? {
            certificates.push(certificate);
        }
    }
    if certificates.is_empty() {
        return Err(fail(&"it holds none"));
    }
    Ok(TlsConfig::builder().root_certs(RootCerts::new_with_certs(&certificates)).build())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signatures_and_passwords_are_left_out_of_messages() {
        let url = Url::parse("https://me:pass@cdn.example/x?X-Amz-Signature=abc#part").unwrap();
        assert_eq!(without_query(&url), "https://cdn.example/x");
    }

    #[test]
    fn this_machine_is_known_by_all_its_names() {
        for (text, expected) in [
            ("http://localhost:1/", true),
            ("http://127.0.0.1/", true),
            ("http://[::1]:8/", true),
            ("http://example.com/", false),
            ("http://127.0.0.1.example.com/", false),
        ] {
            assert_eq!(is_this_machine(&Url::parse(text).unwrap()), expected, "{text}");
        }
    }
}
