//! `<pipeline>.lock`: what remote inputs stood for, and what came out, in lines that people can read and compare.
//!
//! ```toml
//! version = 1
//!
//! [revisions]
//! "hf://org/clip" = "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268"
//!
//! [files]
//! "hf://org/clip/model.safetensors" = { blake3 = "…", size = 605157884 }
//!
//! [outputs]
//! "merged[bits=3]" = "…"
//! ```
//!
//! One line per entry, sorted, so that a change is a line of a diff. Revisions are commits of branches; files are single files, by their
//! addresses; outputs are artifacts by unit.

use blake3::Hash;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// The version that is written and read.
const VERSION: i64 = 1;

const HEADER: &str = "# Written by `merganser run`: what remote inputs stood for, and what came out. Keep it with the pipeline.\n\
                      # `merganser run --update-lock` renews it, `merganser run --frozen` refuses anything else.\n";

/// The content of a lock file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LockFile {
    /// Commits by repository and branch: `hf://org/repo@branch`.
    pub revisions: BTreeMap<String, String>,
    /// By address.
    pub files: BTreeMap<String, LockedFile>,
    /// Artifacts by unit.
    pub outputs: BTreeMap<String, Hash>,
}

/// What a file was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LockedFile {
    pub blake3: Hash,
    pub size: u64,
}

/// Why a lock file cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("lock file `{}`: {reason}", path.display())]
pub struct LockError {
    path: PathBuf,
    reason: String,
}

/// The lock file of a pipeline: `clip.toml` has `clip.lock`.
pub fn path_for(pipeline: &Path) -> PathBuf {
    pipeline.with_extension("lock")
}

impl LockFile {
    /// Reads a lock file; one that is not there is empty.
    pub fn read(path: &Path) -> Result<Self, LockError> {
        let fail = |reason: String| LockError { path: path.to_owned(), reason };
        match std::fs::read_to_string(path) {
            Ok(text) => Self::parse(&text).map_err(fail),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(fail(error.to_string())),
        }
    }

    fn parse(text: &str) -> Result<Self, String> {
        let document: toml::Table =
            text.parse().map_err(|error: toml::de::Error| error.message().to_owned())?;
        match document.get("version").and_then(toml::Value::as_integer) {
            Some(VERSION) => {}
            Some(version) => return Err(format!("it has version {version}, this merganser knows {VERSION}")),
            None => return Err("it has no `version`".to_owned()),
        }
        let known = ["version", "revisions", "files", "outputs"];
        if let Some(key) = document.keys().find(|key| !known.contains(&key.as_str())) {
            return Err(format!("unknown key `{key}`"));
        }
        let mut lock = Self::default();
        for (key, value) in entries(&document, "revisions")? {
            let commit = value.as_str().filter(|commit| is_hex(commit, 40));
            lock.revisions.insert(key.clone(), commit.ok_or_else(|| bad(key, "a commit"))?.to_owned());
        }
        for (key, value) in entries(&document, "files")? {
            let field = |name: &str| value.as_table().and_then(|table| table.get(name));
            let blake3 = field("blake3").and_then(toml::Value::as_str).and_then(digest);
            let size =
                field("size").and_then(toml::Value::as_integer).and_then(|size| u64::try_from(size).ok());
            let (Some(blake3), Some(size)) = (blake3, size) else {
                return Err(bad(key, "`blake3` and `size`"));
            };
            lock.files.insert(key.clone(), LockedFile { blake3, size });
        }
        for (key, value) in entries(&document, "outputs")? {
            let artifact = value.as_str().and_then(digest).ok_or_else(|| bad(key, "a digest"))?;
            lock.outputs.insert(key.clone(), artifact);
        }
        Ok(lock)
    }

    /// Writes it, whole or not at all.
    pub fn write(&self, path: &Path) -> std::io::Result<()> {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let staged = folder.join(format!(".{name}.{}.tmp", std::process::id()));
        fs_err::write(&staged, self.text())?;
        fs_err::rename(&staged, path).inspect_err(|_| {
            // The error that is reported is the one that matters.
            let _ = std::fs::remove_file(&staged);
        })
    }

    fn text(&self) -> String {
        let mut text = format!("{HEADER}version = {VERSION}\n");
        let mut section = |name: &str, lines: Vec<String>| {
            if !lines.is_empty() {
                let _ = write!(text, "\n[{name}]\n{}\n", lines.join("\n"));
            }
        };
        // Strings of JSON are strings of TOML, but for one character.
        let key =
            |key: &String| serde_json::Value::from(key.as_str()).to_string().replace('\u{7f}', "\\u007F");
        section(
            "revisions",
            self.revisions.iter().map(|(k, commit)| format!("{} = \"{commit}\"", key(k))).collect(),
        );
        let file = |(k, file): (&String, &LockedFile)| {
            format!("{} = {{ blake3 = \"{}\", size = {} }}", key(k), file.blake3.to_hex(), file.size)
        };
        section("files", self.files.iter().map(file).collect());
        section(
            "outputs",
            self.outputs.iter().map(|(k, output)| format!("{} = \"{}\"", key(k), output.to_hex())).collect(),
        );
        text
    }

    /// The bytes of all that is known to belong to an address.
    pub fn size_of(&self, address: &str) -> Option<u64> {
        let below = format!("{}/", address.trim_end_matches('/'));
        let is_its = |file: &str| file == address || file.starts_with(&below);
        let sizes: Vec<u64> =
            self.files.iter().filter(|(file, _)| is_its(file)).map(|(_, file)| file.size).collect();
        (!sizes.is_empty()).then(|| sizes.iter().sum())
    }

    /// Keeps only what is still used.
    pub fn retain(&mut self, revisions: &BTreeSet<String>, files: &BTreeSet<String>) {
        self.revisions.retain(|asked, _| revisions.contains(asked));
        self.files.retain(|address, _| files.contains(address));
    }
}

fn entries<'a>(
    document: &'a toml::Table,
    section: &str,
) -> Result<Vec<(&'a String, &'a toml::Value)>, String> {
    match document.get(section) {
        None => Ok(Vec::new()),
        Some(toml::Value::Table(table)) => Ok(table.iter().collect()),
        Some(_) => Err(format!("`{section}` must be a table")),
    }
}

fn bad(key: &str, expected: &str) -> String {
    format!("`{key}` needs {expected}")
}

fn is_hex(text: &str, length: usize) -> bool {
    text.len() == length && text.chars().all(|digit| matches!(digit, '0'..='9' | 'a'..='f'))
}

fn digest(text: &str) -> Option<Hash> {
    Hash::from_hex(text).ok().filter(|_| is_hex(text, 64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lock() -> LockFile {
        let file = LockedFile { blake3: blake3::hash(b"x"), size: 7 };
        LockFile {
            revisions: BTreeMap::from([
                ("hf://org/b".to_owned(), "a".repeat(40)),
                ("hf://org/a@v1".to_owned(), "b".repeat(40)),
            ]),
            files: BTreeMap::from([
                ("hf://org/b/x.pt".to_owned(), file),
                ("https://h/\"q\"".to_owned(), file),
            ]),
            outputs: BTreeMap::from([("merged[bits=3,\"a b\"]".to_owned(), blake3::hash(b"y"))]),
        }
    }

    #[test]
    fn reads_back_what_it_writes_one_sorted_line_per_entry() {
        let text = lock().text();
        assert_eq!(LockFile::parse(&text).unwrap(), lock());
        let lines: Vec<&str> = text.lines().filter(|line| line.starts_with("\"hf")).collect();
        assert!(
            lines[0].starts_with("\"hf://org/a@v1\" = \"bbb")
                && lines[1].starts_with("\"hf://org/b\" = \"aaa")
        );
        assert!(lines[2].starts_with("\"hf://org/b/x.pt\" = { blake3 = \""), "{text}");
    }

    #[test]
    fn says_what_is_wrong() {
        for (text, expected) in [
            ("", "no `version`"),
            ("version = 2", "version 2"),
            ("version = 1\n[input]\n", "unknown key `input`"),
            ("version = 1\n[revisions]\n\"hf://a/b\" = \"main\"\n", "`hf://a/b` needs a commit"),
            ("version = 1\n[files]\nx = { size = 1 }\n", "`x` needs `blake3` and `size`"),
            ("version = 1\noutputs = 3\n", "`outputs` must be a table"),
            ("version = ", ""),
        ] {
            let error = LockFile::parse(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn knows_the_size_of_what_belongs_to_an_address() {
        assert_eq!(lock().size_of("hf://org/b"), Some(7));
        assert_eq!(lock().size_of("hf://org/b/x.pt"), Some(7));
        assert_eq!(lock().size_of("hf://org/b/x"), None);
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "(version = 1\n)?\\PC{0,60}") {
            let _ = LockFile::parse(&text);
        }

        #[test]
        fn any_name_survives(name in "\\PC{1,30}") {
            let lock = LockFile { outputs: BTreeMap::from([(name, blake3::hash(b"y"))]), ..LockFile::default() };
            prop_assert_eq!(LockFile::parse(&lock.text()).unwrap(), lock);
        }
    }
}
