//! Patterns of file names: braces as in a shell (`{000..012}`, `{a,b}`), and `*` and `?` in the last component.

use std::path::{Path, PathBuf};

use globset::GlobBuilder;

use super::error::DatasetError;

/// The most names that a pattern may stand for.
const MAX_NAMES: usize = 100_000;

/// Tells whether a path is a pattern.
pub fn is_pattern(path: &Path) -> bool {
    path.to_str().is_some_and(|text| text.contains(['{', '*', '?']))
}

/// The files that a path means: itself, or what the pattern stands for, in order.
pub(super) fn expand(path: &Path) -> Result<Vec<PathBuf>, DatasetError> {
    let Some(text) = path.to_str().filter(|_| is_pattern(path) && !path.exists()) else {
        return Ok(vec![path.to_owned()]);
    };
    let refuse = |reason: &str| DatasetError::Pattern { pattern: text.to_owned(), reason: reason.to_owned() };
    let mut found = Vec::new();
    for name in braces(text).map_err(&refuse)? {
        let name = PathBuf::from(name);
        let last = name.file_name().and_then(|last| last.to_str()).unwrap_or_default();
        if !last.contains(['*', '?']) {
            found.push(name);
            continue;
        }
        let glob = GlobBuilder::new(last).build().map_err(|error| refuse(&error.to_string()))?;
        let matcher = glob.compile_matcher();
        let folder = name.parent().unwrap_or(Path::new(""));
        found.extend(files(folder, |name| matcher.is_match(name))?);
    }
    if found.is_empty() { Err(refuse("no file matches it")) } else { Ok(found) }
}

/// The files of a folder whose names are accepted, shorter names first: `10.tar` comes after `9.tar`.
pub(super) fn files(folder: &Path, accepts: impl Fn(&str) -> bool) -> Result<Vec<PathBuf>, DatasetError> {
    let mut found = Vec::new();
    for entry in fs_err::read_dir(folder)? {
        let name = entry?.file_name();
        if name.to_str().is_some_and(&accepts) {
            found.push(folder.join(name));
        }
    }
    found.sort_by(|a, b| (a.as_os_str().len(), a).cmp(&(b.as_os_str().len(), b)));
    Ok(found)
}

/// Writes out the braces of a text.
fn braces(text: &str) -> Result<Vec<String>, &'static str> {
    let Some(start) = text.find('{') else { return Ok(vec![text.to_owned()]) };
    let length = text[start..].find('}').ok_or("a brace is not closed")?;
    let (before, inner, after) =
        (&text[..start], &text[start + 1..start + length], &text[start + length + 1..]);
    let choices: Vec<String> = match inner.split_once("..") {
        Some((first, last)) => {
            let number = |text: &str| text.parse::<u64>().map_err(|_| "a range is not of whole numbers");
            let (from, to) = (number(first)?, number(last)?);
            if to < from || to - from >= MAX_NAMES as u64 {
                return Err("a range is empty or too long");
            }
            // Leading zeros say how wide all of them are.
            let width = if first.starts_with('0') { first.len() } else { 0 };
            (from..=to).map(|number| format!("{number:0width$}")).collect()
        }
        None => inner.split(',').map(str::to_owned).collect(),
    };
    let rests = braces(after)?;
    if choices.len().saturating_mul(rests.len()) > MAX_NAMES {
        return Err("it stands for too many names");
    }
    Ok(choices
        .iter()
        .flat_map(|choice| rests.iter().map(move |rest| format!("{before}{choice}{rest}")))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn braces_are_written_out_in_order() {
        assert_eq!(braces("a-{08..11}.tar").unwrap(), ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]);
        assert_eq!(braces("{x,y}{1..2}").unwrap(), ["x1", "x2", "y1", "y2"]);
        assert_eq!(braces("plain").unwrap(), ["plain"]);
        assert_eq!(braces("{1..").unwrap_err(), "a brace is not closed");
        assert_eq!(braces("{a..b}").unwrap_err(), "a range is not of whole numbers");
        assert_eq!(braces("{2..1}").unwrap_err(), "a range is empty or too long");
        assert_eq!(braces("{0..99999}{0..99999}").unwrap_err(), "it stands for too many names");
    }
}
