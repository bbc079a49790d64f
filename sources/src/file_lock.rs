//! One download of a file at a time, also between processes: a lock file, held by the operating system and gone with its process.

use crate::error::{Error, Result};
use crate::settings::{Event, Settings};
use std::fs::{File, TryLockError};
use std::path::Path;
use std::time::Duration;

/// How often a waiting process looks again.
const INTERVAL: Duration = Duration::from_millis(50);

/// Held until dropped. The lock file stays: removing it could let two processes lock two files of one name.
pub(crate) struct FileLock(#[expect(dead_code, reason = "closing the file releases the lock")] File);

impl FileLock {
    /// Waits until nobody else holds the lock, or the user asks to stop.
    pub(crate) fn acquire(path: &Path, address: &str, settings: &Settings) -> Result<Self> {
        if let Some(folder) = path.parent() {
            fs_err::create_dir_all(folder)?;
        }
        let file = fs_err::OpenOptions::new().create(true).append(true).open(path)?.into_file();
        let mut is_told = false;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Self(file)),
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(error)) => return Err(error.into()),
            }
            if (settings.cancelled)() {
                return Err(Error::Cancelled);
            }
            if !is_told {
                (settings.on_event)(Event::Waiting { address: address.to_owned() });
                is_told = true;
            }
            (settings.wait)(INTERVAL);
        }
    }
}
