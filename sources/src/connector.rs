//! object_store's requests done by our client, so that one set of timeouts, proxies and certificates serves everything, and no second
//! HTTP stack is built.
//!
//! Requests are made on the thread that polls: the runtime of [`object`](crate::object) has one thread and one task, so blocking it
//! blocks nobody.

use crate::http::{Client, is_passing, is_this_machine, retry_after};
use crate::settings::Event;
use bytes::Bytes;
use http_body::{Body, Frame};
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpResponseBody,
    HttpService,
};
use object_store::{ClientConfigKey, ClientOptions};
use std::future::Future;
use std::io::Read;
use std::pin::{Pin, pin};
use std::sync::Mutex;
use std::task::{Context, Poll};
use url::Url;

/// Bytes read at once.
const BLOCK: usize = 256 << 10;

/// Connects object_store to our client.
#[derive(Debug)]
pub(crate) struct Connector {
    pub(crate) client: Client,
    /// What events are about.
    pub(crate) address: String,
}

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let allow_http =
            options.get_config_value(&ClientConfigKey::AllowHttp).is_some_and(|value| value == "true");
        let (client, address) = (self.client.clone(), self.address.clone());
        Ok(HttpClient::new(Service { client, address, allow_http }))
    }
}

#[derive(Debug)]
struct Service {
    client: Client,
    address: String,
    allow_http: bool,
}

#[derive(Debug, thiserror::Error)]
#[error("`{0}` is not encrypted; `AWS_ALLOW_HTTP=true` (or `GOOGLE_…`, `AZURE_…`) allows that")]
struct NotEncrypted(String);

#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
struct Cancelled;

impl HttpService for Service {
    fn call<'life, 'future>(
        &'life self,
        request: HttpRequest,
    ) -> Pin<Box<dyn Future<Output = Result<HttpResponse, HttpError>> + Send + 'future>>
    where
        'life: 'future,
        Self: 'future,
    {
        Box::pin(async move { self.send(request).await })
    }
}

impl Service {
    async fn send(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let (parts, body) = request.into_parts();
        let mut sent = Vec::new();
        let mut body = pin!(body);
        while let Some(frame) = std::future::poll_fn(|context| body.as_mut().poll_frame(context)).await {
            sent.extend_from_slice(&frame?.into_data().unwrap_or_default());
        }
        self.check(&parts.uri.to_string())?;
        let settings = self.client.settings();
        let mut n_failed = 0;
        loop {
            if (settings.cancelled)() {
                return Err(HttpError::new(HttpErrorKind::Unknown, Cancelled));
            }
            let result = self.client.send_as_is(http::Request::from_parts(parts.clone(), sent.clone()));
            let (asked_for, reason) = match &result {
                Ok(reply) if !is_passing(reply.status()) => (None, None),
                Ok(reply) => {
                    (retry_after(reply.headers()), Some(format!("status {}", reply.status().as_u16())))
                }
                Err(error) => (None, Some(error.to_string())),
            };
            n_failed += 1;
            if let Some(reason) = reason
                && let Some(wait) =
                    settings.patience.wait(n_failed, asked_for).filter(|_| !is_metadata(&parts.uri))
            {
                let address = self.address.clone();
                (settings.on_event)(Event::Retrying { address, reason, wait });
                (settings.wait)(wait);
                continue;
            }
            let reply = result.map_err(|error| HttpError::new(HttpErrorKind::Connect, error))?;
            let (parts, body) = reply.into_parts();
            let body = HttpResponseBody::new(Reading(Mutex::new(Box::new(body.into_reader()))));
            return Ok(HttpResponse::from_parts(parts, body));
        }
    }

    fn check(&self, uri: &str) -> Result<(), HttpError> {
        let url = Url::parse(uri).map_err(|error| HttpError::new(HttpErrorKind::Unknown, error))?;
        let is_fine =
            url.scheme() == "https" || self.allow_http || is_this_machine(&url) || is_link_local(&url);
        if is_fine {
            return Ok(());
        }
        let host = url.host_str().unwrap_or_default().to_owned();
        Err(HttpError::new(HttpErrorKind::Unknown, NotEncrypted(host)))
    }
}

/// Where clouds tell their own machines who they are: not encrypted anywhere, and silent elsewhere.
fn is_link_local(url: &Url) -> bool {
    match url.host() {
        Some(url::Host::Ipv4(address)) => address.is_link_local(),
        Some(url::Host::Domain(name)) => name == "metadata.google.internal" || name == "metadata",
        _ => false,
    }
}

fn is_metadata(uri: &http::Uri) -> bool {
    Url::parse(&uri.to_string()).is_ok_and(|url| is_link_local(&url))
}

/// A body that is read when it is polled.
struct Reading(Mutex<Box<dyn Read + Send>>);

impl Body for Reading {
    type Data = Bytes;
    type Error = HttpError;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let mut block = vec![0; BLOCK];
        let mut reader = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        Poll::Ready(match reader.read(&mut block) {
            Ok(0) => None,
            Ok(n_read) => {
                block.truncate(n_read);
                Some(Ok(Frame::data(block.into())))
            }
            Err(error) => Some(Err(HttpError::new(HttpErrorKind::Interrupted, error))),
        })
    }
}
