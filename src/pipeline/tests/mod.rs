//! Whole pipelines, through [`load`](super::load): what they resolve to, and how their mistakes are shown.

mod codes;
mod kinds;
mod mistakes_in_files;
mod mistakes_in_stages;
mod resolution;
mod robustness;

use super::load::Failure;
use super::{Files, Pipeline, RenderStyle, load};
use merganser_stages::params::Problem;
use merganser_stages::params::Remotes;
use std::fmt::Write;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;

const TO_STRING: &str = "writing to a string does not fail";

pub(super) const PLAIN: RenderStyle = RenderStyle { color: false, unicode: false, width: 100 };

/// Knows `far://`, and that `bad://` is a mistake.
#[derive(Debug)]
struct Elsewhere;

impl Remotes for Elsewhere {
    fn locate(&self, written: &str) -> Option<Result<PathBuf, String>> {
        let (scheme, rest) = written.split_once("://")?;
        Some(match scheme {
            "bad" => Err(format!("`{written}` is no address")),
            _ => Ok(PathBuf::from("/downloads").join(rest)),
        })
    }
}

/// Loads `files`, of which the first is the pipeline, from a folder of their own.
fn load_files(files: &[(&str, &str)], overrides: &[&str]) -> Result<Pipeline, Failure> {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    for (name, text) in files {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().expect("the path has a folder")).expect("a folder can be made");
        std::fs::write(path, text).expect("a file can be written");
    }
    let overrides: Vec<String> = overrides.iter().map(|&text| text.to_owned()).collect();
    load(&folder.path().join(files[0].0), &overrides, &kinds::KINDS, Some(Arc::new(Elsewhere)))
}

fn load_text(text: &str, overrides: &[&str]) -> Result<Pipeline, Failure> {
    load_files(&[("p.toml", text)], overrides)
}

/// Draws problems with the temporary folder left out of the names of files.
fn drawn(files: &Files, problems: &[Problem]) -> String {
    let folder = files.get(0).map(|file| format!("{}/", file.folder.display())).unwrap_or_default();
    files.render(problems, PLAIN).replace(&folder, "")
}

fn errors_of(text: &str, overrides: &[&str]) -> String {
    match load_text(text, overrides) {
        Ok(_) => String::from("no errors"),
        Err(failure) => drawn(&failure.files, &failure.problems),
    }
}

/// Compares what is wrong with a pipeline, one line per problem: place, code, message, help.
#[track_caller]
fn check(text: &str, overrides: &[&str], expected: &str) {
    let found = compact(text.trim_start_matches('\n'), overrides);
    assert_eq!(found, expected.trim_start_matches('\n'));
}

/// One line per problem: place, code, message, help.
fn compact(text: &str, overrides: &[&str]) -> String {
    let Err(failure) = load_text(text, overrides) else { return String::from("no errors\n") };
    let mut lines = String::new();
    for problem in &failure.problems {
        let report = failure.files.report(problem);
        if let (Some(file), Some(line), Some(column)) = (&report.file, report.line, report.column) {
            let file = if file == "--set" { "--set " } else { "" };
            write!(lines, "{file}{line}:{column} ").expect(TO_STRING);
        }
        write!(lines, "{}: {}", report.code, report.message).expect(TO_STRING);
        if let Some(help) = report.help {
            write!(lines, " ({help})").expect(TO_STRING);
        }
        lines.push('\n');
    }
    lines
}

fn show(path: &Path) -> String {
    path.display().to_string()
}
