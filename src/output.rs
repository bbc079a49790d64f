//! Standard output, where results go, and standard error, where everything else goes.
//!
//! A reader that has seen enough (`| head`) is no error: the rest is dropped and the command ends as it would have. Any other failure to write
//! means that the user does not get the result, so it ends in an error.

use crate::exit::{ExitCode, Failure, Result};
use std::fmt::Arguments;
use std::io::{self, ErrorKind, Write};
use std::sync::{Mutex, PoisonError};

/// The first failure to write.
static FAILED: Mutex<Option<io::Error>> = Mutex::new(None);

/// Writes to standard output like `print!`, but never panics.
macro_rules! out {
    ($($arg:tt)*) => { $crate::output::write(format_args!($($arg)*)) };
}

/// Writes a line to standard output like `println!`, but never panics.
macro_rules! outln {
    ($($arg:tt)*) => { $crate::output::write(format_args!("{}\n", format_args!($($arg)*))) };
}

/// Writes a line to standard error like `eprintln!`, but never panics: nobody listening is no reason to stop.
macro_rules! errln {
    ($($arg:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), $($arg)*);
    }};
}

pub fn write(text: Arguments<'_>) {
    remember(io::stdout().write_fmt(text));
}

/// Writes what is buffered; fails if anything could not be written to a reader that was there.
pub fn finish(code: ExitCode) -> Result<ExitCode> {
    remember(io::stdout().flush());
    match FAILED.lock().unwrap_or_else(PoisonError::into_inner).take() {
        Some(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Failure::failed(format!("the results could not be written to standard output: {error}")))
        }
        _ => Ok(code),
    }
}

fn remember(result: io::Result<()>) {
    if let Err(error) = result {
        FAILED.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
    }
}
