//! What ARCHITECTURE.md and CONTRIBUTING.md promise about the sources themselves.

use regex::Regex;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

const LIBRARIES: [&str; 6] = ["algebra", "cache", "tensors", "onnx", "sources", "stages"];

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs_err::read_dir(folder).unwrap().map(Result::unwrap) {
        let path = entry.path();
        if entry.file_type().unwrap().is_dir() {
            found.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found
}

fn dependencies(manifest: &str) -> BTreeSet<String> {
    let manifest: toml::Table = fs_err::read_to_string(repository().join(manifest)).unwrap().parse().unwrap();
    manifest["dependencies"].as_table().unwrap().keys().cloned().collect()
}

#[test]
fn crates_depend_in_one_direction() {
    let ours = |manifest: &str| -> Vec<String> {
        dependencies(manifest)
            .into_iter()
            .filter_map(|name| Some(name.strip_prefix("merganser-")?.to_owned()))
            .collect()
    };
    assert_eq!(ours("Cargo.toml"), ["cache", "onnx", "sources", "stages", "tensors"]);
    assert_eq!(ours("stages/Cargo.toml"), ["algebra", "cache", "onnx", "tensors"]);
    for leaf in ["algebra", "cache", "onnx", "sources", "tensors"] {
        assert_eq!(ours(&format!("{leaf}/Cargo.toml")), [""; 0], "{leaf}");
    }
    for library in LIBRARIES {
        for foreign in ["clap", "console", "ctrlc", "indicatif", "jiff", "miette", "toml"] {
            let found = dependencies(&format!("{library}/Cargo.toml"));
            assert!(!found.contains(foreign), "{library} is not about what {foreign} is for");
        }
    }
}

#[test]
fn libraries_do_not_touch_terminal_environment_or_clock() {
    let forbidden = Regex::new(
        r"\b(e?println!|e?print!|dbg!|env::var\w*|env::args\w*|process::exit|SystemTime::now|Instant::now)",
    )
    .unwrap();
    let mut found = Vec::new();
    for library in LIBRARIES {
        for path in rust_files(&repository().join(library).join("src")) {
            let name = path.file_stem().unwrap().to_str().unwrap();
            if ["tests", "testing", "test_support"].contains(&name) || name.ends_with("_tests") {
                continue;
            }
            let text = fs_err::read_to_string(&path).unwrap();
            let code = text.split("#[cfg(test)]\n").next().unwrap();
            let lines = code.lines().filter(|line| !line.trim_start().starts_with("//"));
            found.extend(
                lines
                    .filter(|line| forbidden.is_match(line))
                    .map(|line| format!("{}: {}", path.display(), line.trim())),
            );
        }
    }
    assert_eq!(found, [""; 0]);
}

/// Tests and files that the documents name are there.
#[test]
fn names_in_the_documents_exist() {
    let quoted = Regex::new("`([A-Za-z0-9_./-]+)`").unwrap();
    let a_test = Regex::new(r"^[a-z0-9]+(_[a-z0-9]+){3,}$").unwrap();
    let sources: String =
        ["src", "tests", "algebra", "cache", "tensors", "onnx", "sources", "stages", "benches"]
            .iter()
            .flat_map(|folder| rust_files(&repository().join(folder)))
            .map(|path| fs_err::read_to_string(path).unwrap())
            .collect();
    let mut missing = Vec::new();
    for document in ["ARCHITECTURE.md", "CONTRIBUTING.md"] {
        let text = fs_err::read_to_string(repository().join(document)).unwrap();
        for name in quoted.captures_iter(&text).map(|found| found[1].to_owned()) {
            let is_path = name.contains('/')
                && !name.starts_with('.')
                && (name.ends_with('/') || Path::new(&name).extension().is_some());
            if is_path && !repository().join(&name).exists()
                || a_test.is_match(&name) && !sources.contains(&format!("fn {name}("))
            {
                missing.push(format!("{document}: {name}"));
            }
        }
    }
    assert_eq!(missing, [""; 0]);
}
