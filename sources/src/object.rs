//! `s3://bucket/key`, `gs://bucket/key`, `az://container/key`: object stores, through the `object_store` crate.
//!
//! Endpoints and credentials are those of the stores' own variables (`AWS_ENDPOINT_URL`, `GOOGLE_APPLICATION_CREDENTIALS`,
//! `AZURE_STORAGE_ACCOUNT_NAME`, …) as `object_store` reads them, passed in through the settings. Everything after that, resuming
//! included, is what [`download`](crate::download) does for all sources.

use crate::address::is_plain_path;
use crate::checkpoint::{Shape, select};
use crate::connector::Connector;
use crate::download::{Opened, Resume};
use crate::error::{Error, Result};
use crate::place::{Kept, Remote, Version, folder_for};
use crate::sources::{Context, Located, Pins, Source};
use crate::web::{sha256_of, without_fragment};
use bytes::{Buf, Bytes};
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::path::Path as Key;
use object_store::{GetOptions, GetRange, ObjectStore, RetryConfig};
use std::io::Read;
use std::rc::Rc;
use std::str::FromStr;
use tokio::runtime::Runtime;
use url::Url;

pub(crate) struct ObjectStores;

impl Source for ObjectStores {
    fn schemes(&self) -> &'static [&'static str] {
        &["s3", "s3a", "gs", "az", "abfs", "abfss"]
    }

    fn check(&self, address: &str) -> Result<()> {
        parse(address).map(drop)
    }

    fn get(&self, context: &Context<'_>, address: &str, pins: &Pins) -> Result<Located> {
        let Parsed { url, key, sha256 } = parse(address)?;
        let (folder, name) = key.rsplit_once('/').unwrap_or(("", &key));
        let place = format!("{}://{}/{folder}", url.scheme(), url.authority());
        let mut kept = Kept {
            folder: folder_for(&context.settings.downloads_dir, url.host_str().unwrap_or_default(), &place),
            remote: Bucket { context, url: &url, folder: folder.to_owned(), opened: None },
            pins,
            mode: context.mode(context.settings.offline),
            settings: context.settings,
            expected: sha256.map(|digest| (name.to_owned(), digest)),
            files: Vec::new(),
        };
        let shape = if name.is_empty() { Shape::Folder } else { Shape::File };
        let path = select(&mut kept, name, shape)?.ok_or_else(|| Error::NotFound {
            address: address.to_owned(),
            what: if name.is_empty() { "checkpoint" } else { "file" },
            missing: key.clone(),
            url: without_fragment(address),
        })?;
        Ok(Located { path, revision: None, files: kept.files })
    }
}

struct Parsed {
    url: Url,
    /// Without a slash at its beginning; a folder has one at its end, the whole bucket is empty.
    key: String,
    sha256: Option<String>,
}

fn parse(address: &str) -> Result<Parsed> {
    let fail = |reason: &str| Error::BadAddress { address: address.to_owned(), reason: reason.to_owned() };
    let url = Url::parse(address).map_err(|error| fail(&error.to_string()))?;
    if url.host_str().is_none_or(str::is_empty) {
        return Err(fail("it names no bucket"));
    }
    if url.query().is_some() {
        return Err(fail("`?` means nothing in it"));
    }
    let sha256 = sha256_of(url.fragment()).map_err(fail)?;
    let key = Key::from_url_path(url.path()).map_err(|error| fail(&error.to_string()))?;
    if !key.as_ref().is_empty() && !is_plain_path(key.as_ref()) {
        return Err(fail("its key cannot be the path of a file"));
    }
    let slash = if url.path().ends_with('/') && !key.as_ref().is_empty() { "/" } else { "" };
    Ok(Parsed { key: format!("{key}{slash}"), url, sha256 })
}

/// A folder of a bucket. The connection is made when it is first needed.
struct Bucket<'a> {
    context: &'a Context<'a>,
    url: &'a Url,
    folder: String,
    opened: Option<Connected>,
}

#[derive(Clone)]
struct Connected {
    store: Rc<dyn ObjectStore>,
    runtime: Rc<Runtime>,
}

impl Bucket<'_> {
    fn key(&self, name: &str) -> String {
        if self.folder.is_empty() { name.to_owned() } else { format!("{}/{name}", self.folder) }
    }

    fn connected(&mut self) -> Result<Connected> {
        if let Some(opened) = &self.opened {
            return Ok(opened.clone());
        }
        let address = self.url.as_str();
        let connector = Connector { client: self.context.client()?.clone(), address: address.to_owned() };
        // Our client tries again by itself.
        let retry = RetryConfig { max_retries: 0, ..RetryConfig::default() };
        let variables = &self.context.settings.object_stores;
        let built: object_store::Result<Rc<dyn ObjectStore>> = match self.url.scheme() {
            "s3" | "s3a" => configured(
                AmazonS3Builder::new().with_url(address),
                variables,
                "AWS_",
                |builder, key: AmazonS3ConfigKey, value| builder.with_config(key, value),
            )
            .with_http_connector(connector)
            .with_retry(retry)
            .build()
            .map(|store| Rc::new(store) as Rc<dyn ObjectStore>),
            "gs" => configured(
                GoogleCloudStorageBuilder::new().with_url(address),
                variables,
                "GOOGLE_",
                |builder, key: GoogleConfigKey, value| builder.with_config(key, value),
            )
            .with_http_connector(connector)
            .with_retry(retry)
            .build()
            .map(|store| Rc::new(store) as Rc<dyn ObjectStore>),
            _ => configured(
                MicrosoftAzureBuilder::new().with_url(address),
                variables,
                "AZURE_",
                |builder, key: AzureConfigKey, value| builder.with_config(key, value),
            )
            .with_http_connector(connector)
            .with_retry(retry)
            .build()
            .map(|store| Rc::new(store) as Rc<dyn ObjectStore>),
        };
        let store = built.map_err(|error| self.failed("", &error))?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
        let connected = Connected { store, runtime: Rc::new(runtime) };
        Ok(self.opened.insert(connected).clone())
    }

    fn get(
        &mut self,
        name: &str,
        options: GetOptions,
    ) -> Result<Option<(object_store::GetResult, Connected)>> {
        let connected = self.connected()?;
        let key = Key::parse(self.key(name)).map_err(|error| self.failed(name, &error.into()))?;
        match connected.runtime.block_on(connected.store.get_opts(&key, options)) {
            Ok(result) => Ok(Some((result, connected))),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(self.failed(name, &error)),
        }
    }

    fn failed(&self, name: &str, error: &object_store::Error) -> Error {
        let address = self.address(name);
        if (self.context.settings.cancelled)() {
            return Error::Cancelled;
        }
        let refused = |status| Error::Refused {
            url: address.clone(),
            address: address.clone(),
            status,
            repository: None,
            gated: false,
            has_token: false,
        };
        match error {
            object_store::Error::Unauthenticated { .. } => refused(401),
            object_store::Error::PermissionDenied { .. } => refused(403),
            other => {
                // The sources are part of the text already, mostly.
                let mut reason = other.to_string();
                let mut source = std::error::Error::source(other);
                while let Some(cause) = source {
                    let text = cause.to_string();
                    if !reason.contains(&text) {
                        reason = format!("{reason}: {text}");
                    }
                    source = cause.source();
                }
                Error::Store { address, reason }
            }
        }
    }
}

/// Gives a builder the variables that are meant for it, as its own `from_env` would; those that it does not know are other tools'.
fn configured<B, K: FromStr>(
    builder: B,
    variables: &[(String, String)],
    prefix: &str,
    set: impl Fn(B, K, &str) -> B,
) -> B {
    variables.iter().filter(|(name, _)| name.starts_with(prefix)).fold(builder, |builder, (name, value)| {
        match name.to_ascii_lowercase().parse() {
            Ok(key) => set(builder, key, value),
            Err(_) => builder,
        }
    })
}

impl Remote for Bucket<'_> {
    fn address(&self, name: &str) -> String {
        format!("{}://{}/{}", self.url.scheme(), self.url.authority(), self.key(name))
    }

    fn version(&mut self, name: &str) -> Result<Version> {
        let options = GetOptions { head: true, ..GetOptions::default() };
        Ok(self.get(name, options)?.map_or(Version::Missing, |(result, _)| Version::of(result.meta.e_tag)))
    }

    fn open(&mut self, name: &str, resume: &Resume) -> Result<Option<Opened>> {
        let validator = resume.validator.clone().filter(|_| resume.offset > 0);
        let options = GetOptions {
            range: validator.as_ref().map(|_| GetRange::Offset(resume.offset)),
            if_match: validator.clone(),
            ..GetOptions::default()
        };
        let (result, connected) = match self.get(name, options) {
            Ok(Some(found)) => found,
            Ok(None) => return Ok(None),
            // Another version by now, or nothing left to send: from the start.
            Err(_) if validator.is_some() => return self.open(name, &Resume { offset: 0, validator: None }),
            Err(error) => return Err(error),
        };
        let opened = Opened {
            offset: result.range.start,
            total: Some(result.meta.size),
            validator: result.meta.e_tag.clone().filter(|tag| !tag.starts_with("W/")),
            body: Box::new(Streaming { stream: result.into_stream(), connected, rest: Bytes::new() }),
        };
        Ok(Some(opened))
    }
}

/// A stream of blocks, read as bytes.
struct Streaming<S> {
    stream: S,
    connected: Connected,
    rest: Bytes,
}

impl<S> Read for Streaming<S>
where
    S: futures_util::Stream<Item = object_store::Result<Bytes>> + Unpin,
{
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        use futures_util::StreamExt;
        while self.rest.is_empty() {
            match self.connected.runtime.block_on(self.stream.next()) {
                None => return Ok(0),
                Some(Ok(block)) => self.rest = block,
                Some(Err(error)) => return Err(std::io::Error::other(error)),
            }
        }
        let n_read = self.rest.len().min(buffer.len());
        self.rest.copy_to_slice(&mut buffer[..n_read]);
        Ok(n_read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_what_follows_the_bucket() {
        for (address, key) in [
            ("s3://bucket/a/b.pt", "a/b.pt"),
            ("s3://bucket/a/", "a/"),
            ("s3://bucket", ""),
            ("gs://bucket/x%20y.pt", "x y.pt"),
            ("abfss://container@account.dfs.core.windows.net/x", "x"),
        ] {
            assert_eq!(parse(address).unwrap().key, key, "{address}");
        }
        for address in ["s3:///x", "s3://bucket/x?y=1", "s3://bucket/x#y", "s3://bucket/a:b"] {
            assert!(parse(address).is_err(), "{address}");
        }
    }
}
