//! How a command ends: one documented exit code per situation. Scripts rely on them.

use std::fmt::Display;

/// The exit codes of the documentation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitCode {
    Done = 0,
    StageFailed = 1,
    UserError = 2,
    GoalNotMet = 3,
    NotReproducible = 4,
    DamagedStore = 5,
    Interrupted = 130,
}

/// A command that could not do what it was asked: a text for the user (already rendered) and the code.
#[derive(Debug)]
pub struct Failure {
    pub code: ExitCode,
    pub message: String,
}

impl Failure {
    /// A mistake of the user's: "error: …".
    pub fn user(message: impl Display) -> Self {
        Self { code: ExitCode::UserError, message: format!("error: {message}") }
    }

    /// The same with what to do about it.
    pub fn user_help(message: impl Display, help: Option<impl Display>) -> Self {
        match help {
            Some(help) => Self::user(format!("{message}\n  help: {help}")),
            None => Self::user(message),
        }
    }

    /// Something that should have worked did not.
    pub fn failed(message: impl Display) -> Self {
        Self { code: ExitCode::StageFailed, message: format!("error: {message}") }
    }
}

impl From<merganser_cache::Error> for Failure {
    fn from(error: merganser_cache::Error) -> Self {
        Self::failed(error)
    }
}

/// The result of a command.
pub type Result<T, E = Failure> = std::result::Result<T, E>;
