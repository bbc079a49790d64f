//! The documentation against the product: what it shows is run, what it quotes is looked up, what it links to is there.
//!
//! Every fenced block of every document is covered by a rule, according to the language after its fence:
//!
//! | fence | rule |
//! |---|---|
//! | `console` | each line `$ command` is run, in order, in a folder with the pipelines of the repository; what follows it is what it prints, on either stream. `# exits with 2` after a command is its exit code |
//! | any language with a `title` that is a file of the repository | an excerpt: its lines stand in that file, one after the other |
//! | `toml`, `python` with another `title` | the file is written for the commands that follow, one of which must name it |
//! | `toml` | an addition to the quickstart: the two together pass `merganser check` |
//! | `mermaid` | every arrow is an edge of the quickstart |
//! | `text` | prose and trees; no commands |
//!
//! A line `…` stands for any number of lines. What differs from run to run is named in [`filters`]; scores may differ by the few answers
//! that another processor changes. A comment `<!-- first: command -->` runs something that the reader need not see. Blocks of other languages,
//! and documents that are not listed in [`DOCUMENTS`], fail. `cargo` is not run from here: a `cargo` command must be one of `.ci/run`.

use crate::util::{Outcome, runtime, skipped};
use regex::Regex;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::LazyLock;
use tempfile::TempDir;

macro_rules! documents {
    ($($name:ident: $path:literal,)*) => {
        const DOCUMENTS: &[&str] = &[$($path),*];

        $(#[test]
        fn $name() {
            check($path);
        })*
    };
}

documents! {
    readme: "README.md",
    architecture: "ARCHITECTURE.md",
    contributing: "CONTRIBUTING.md",
    cache: "docs/cache.md",
    calibration: "docs/calibration.md",
    commands: "docs/commands.md",
    distill: "docs/distill.md",
    evaluation: "docs/evaluation.md",
    export: "docs/export.md",
    formats: "docs/formats.md",
    masks: "docs/masks.md",
    merging: "docs/merging.md",
    pipeline_file: "docs/pipeline-file.md",
    quantization: "docs/quantization.md",
    sources: "docs/sources.md",
    stages: "docs/stages.md",
    svd_hybrid: "docs/svd-hybrid.md",
    quickstart: "pipelines/quickstart/README.md",
    fixtures_of_onnx: "onnx/tests/fixtures/README.md",
    benches: "benches/README.md",
    export_helpers: "tools/export/README.md",
    fuzzing: "fuzz/README.md",
    torch_files: "tensors/tests/data/torch/README.md",
}

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn document(path: &str) -> String {
    fs_err::read_to_string(repository().join(path)).unwrap()
}

#[test]
fn every_document_is_listed() {
    let mut found = BTreeSet::new();
    let mut open = vec![PathBuf::new()];
    while let Some(folder) = open.pop() {
        for entry in fs_err::read_dir(repository().join(&folder)).unwrap().map(Result::unwrap) {
            let name = entry.file_name().into_string().unwrap();
            let path = folder.join(&name);
            if entry.file_type().unwrap().is_dir() {
                if !name.starts_with('.') && name != "target" {
                    open.push(path);
                }
            } else if path.extension().is_some_and(|extension| extension == "md") {
                found.insert(path.to_str().unwrap().to_owned());
            }
        }
    }
    assert_eq!(found, DOCUMENTS.iter().map(|&path| path.to_owned()).collect());
}

#[test]
fn links_lead_somewhere() {
    static LINK: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"\]\(([^)\s]+)\)").unwrap());
    let mut dead = Vec::new();
    for from in DOCUMENTS {
        let text = document(from);
        for link in LINK.captures_iter(&without_blocks(&text)).map(|found| found[1].to_owned()) {
            if link.contains("://") {
                continue;
            }
            let (file, anchor) =
                link.split_once('#').map_or((link.as_str(), None), |(file, anchor)| (file, Some(anchor)));
            let folder = Path::new(from).parent().unwrap();
            let target = if file.is_empty() { PathBuf::from(from) } else { folder.join(file) };
            let exists = repository().join(&target).exists();
            let found = exists
                && anchor.is_none_or(|anchor| anchors(&document(target.to_str().unwrap())).contains(anchor));
            if !found {
                dead.push(format!("{from}: {link}"));
            }
        }
    }
    assert_eq!(dead, [""; 0], "links that lead nowhere");
}

#[test]
fn stages_are_as_the_tool_prints_them() {
    let place = Sandbox::new();
    let tool = |args: &str| {
        let outcome = place.shell(&format!("merganser stages {args} --json"));
        outcome.json()
    };
    let mut text = String::from(
        "# Stages and methods\n\nWhat `merganser stages` prints, for every kind and method; a test compares the two. Datasets are explained in\n\
         [Evaluation](evaluation.md#datasets), `only` and `skip` in [The pipeline file](pipeline-file.md#tensor-names-only-skip-rules).\n",
    );
    let mut show = |heading: &str, args: &str| {
        let command = format!("merganser stages {args}").trim_end().to_owned();
        let outcome = place.shell(&command);
        text += &format!("{heading}\n```console\n$ {command}\n{}```\n", outcome.stdout);
    };
    show("", "");
    let mut seen = BTreeSet::new();
    for method in tool("")["methods"].as_array().unwrap() {
        let kind = method["kind"].as_str().unwrap().to_owned();
        if !seen.insert(kind.clone()) {
            continue;
        }
        show(&format!("\n## {kind}\n"), &kind);
        let described = tool(&kind);
        if described["method_key"].is_string() {
            for method in described["methods"].as_array().unwrap() {
                let method = method["id"].as_str().unwrap();
                show(&format!("\n### {method}\n"), &format!("{kind} {method}"));
            }
        }
    }
    let path = repository().join("docs/stages.md");
    if std::env::var_os("MERGANSER_UPDATE_DOCS").is_some() {
        fs_err::write(&path, &text).unwrap();
    }
    let kept = fs_err::read_to_string(&path).unwrap_or_default();
    assert!(
        kept == text,
        "docs/stages.md is not what the tool prints: run this test with MERGANSER_UPDATE_DOCS=1 and read the difference"
    );
}

#[test]
fn every_command_and_option_is_described() {
    static OPTION: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"^ +(?:-\w, )?(--[a-z-]+)").unwrap());
    static VARIABLE: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"\[env: (\w+)=").unwrap());
    static NAME: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"^  ([a-z]+) ").unwrap());
    let text = document("docs/commands.md");
    let place = Sandbox::new();
    let help = |command: &str| place.shell(&format!("merganser {command} --help")).stdout;
    let top = help("");
    let commands =
        top.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    let commands: Vec<&str> =
        commands.filter_map(|line| Some(NAME.captures(line)?.get(1)?.as_str())).collect();
    assert!(commands.contains(&"run"), "{top}");
    let mut missing = Vec::new();
    for command in commands.into_iter().filter(|command| *command != "help") {
        if !text.contains(&format!("\n## {command}\n")) {
            missing.push(format!("## {command}"));
        }
        let help = help(command);
        missing.extend(
            help.lines()
                .filter_map(|line| Some(OPTION.captures(line)?[1].to_owned()))
                .filter(|option| !text.contains(option)),
        );
        missing.extend(
            VARIABLE
                .captures_iter(&help)
                .map(|found| found[1].to_owned())
                .filter(|name| !text.contains(name)),
        );
    }
    assert_eq!(missing, [""; 0], "not in docs/commands.md");
}

#[test]
fn every_code_is_described() {
    let source = document("src/pipeline/mod.rs");
    let text = document("docs/pipeline-file.md");
    let rows: Vec<&str> = source
        .lines()
        .filter_map(|line| line.strip_prefix("//! "))
        .filter(|line| line.starts_with("| `"))
        .collect();
    assert!(rows.len() > 30, "the table of codes has moved");
    let missing: Vec<&str> = rows.into_iter().filter(|row| !text.contains(row)).collect();
    assert_eq!(missing, [""; 0], "not in docs/pipeline-file.md");
}

/// Runs a document from top to bottom and reports everything that is wrong with it.
#[track_caller]
fn check(path: &str) {
    let place = Sandbox::new();
    let mut mistakes = Vec::new();
    let mut unused: BTreeSet<String> = BTreeSet::new();
    for step in steps(&document(path)) {
        match step {
            Step::First(command) => {
                let outcome = place.shell(&command);
                assert_eq!(outcome.code, 0, "{path}: {command}\n{outcome}");
            }
            Step::Block(block) => {
                unused.retain(|title| {
                    !block.lines.iter().any(|line| line.starts_with("$ ") && line.contains(title))
                });
                if let Some(title) = block.written_file() {
                    unused.insert(title.to_owned());
                }
                let found = check_block(&place, &block);
                mistakes.extend(found.into_iter().map(|mistake| format!("{path}:{}: {mistake}", block.line)));
            }
        }
    }
    mistakes.extend(unused.iter().map(|title| format!("{path}: no command uses `{title}`")));
    assert!(mistakes.is_empty(), "{}", mistakes.join("\n\n"));
}

fn check_block(place: &Sandbox, block: &Block) -> Vec<String> {
    if let Some(title) = block.title.as_deref().filter(|title| repository().join(title).exists()) {
        let source = document(title);
        let expected: Vec<&str> = block.lines.iter().map(|line| line.trim()).collect();
        let actual: Vec<&str> = source.lines().map(|line| line.trim().trim_start_matches("//! ")).collect();
        let framed: Vec<&str> = [&["…"], &expected[..], &["…"]].concat();
        return if matches(&framed, &actual) {
            Vec::new()
        } else {
            vec![format!("this is not in `{title}`")]
        };
    }
    if let Some(title) = block.written_file() {
        place.write(title, &(block.lines.join("\n") + "\n"));
        return Vec::new();
    }
    match block.language.as_str() {
        "console" => check_console(place, &block.lines),
        "toml" => {
            place.write(
                "addition.toml",
                &format!("include = [\"pipelines/quickstart.toml\"]\n{}\n", block.lines.join("\n")),
            );
            let outcome = place.shell("merganser check addition.toml");
            if outcome.code == 0 {
                Vec::new()
            } else {
                vec![format!("does not fit the quickstart:\n{outcome}")]
            }
        }
        "mermaid" => check_arrows(place, &block.lines),
        "text" => {
            static COMMAND: LazyLock<Regex> =
                LazyLock::new(|| Regex::new(r"^ *(\$|(merganser|cargo) [a-z])").unwrap());
            let is_command = |line: &&String| COMMAND.is_match(line);
            block
                .lines
                .iter()
                .filter(is_command)
                .map(|line| format!("a command in a block of text: {line}"))
                .collect()
        }
        other => vec![format!("no rule for blocks of `{other}` without the title of a file")],
    }
}

fn check_console(place: &Sandbox, lines: &[String]) -> Vec<String> {
    let mut mistakes = Vec::new();
    if lines.first().is_none_or(|line| !line.starts_with("$ ")) {
        mistakes.push("a console block begins with `$ command`".to_owned());
    }
    let starts: Vec<usize> = (0..lines.len()).filter(|&index| lines[index].starts_with("$ ")).collect();
    for (position, &start) in starts.iter().enumerate() {
        let end = starts.get(position + 1).copied().unwrap_or(lines.len());
        let command = &lines[start][2..];
        let expected: Vec<&str> = lines[start + 1..end].iter().map(String::as_str).collect();
        if command == ".ci/run"
            || command.starts_with("cargo ") && !command.starts_with("cargo run --release -- ")
        {
            let steps = document(".ci/run");
            let known = command == ".ci/run" || steps.lines().any(|line| line.contains(command));
            if !known || !expected.is_empty() {
                mistakes.push(format!(
                    "`{command}` is not a step of .ci/run, or shows an output that is not checked"
                ));
            }
            continue;
        }
        if command.starts_with("python3 ") && place.shell("python3 -c pass").code != 0 {
            skipped(command, "there is no python3");
            continue;
        }
        let outcome = place.shell(command);
        let code = command.split_once("# exits with ").map_or(0, |(_, code)| code.trim().parse().unwrap());
        if outcome.code != code {
            mistakes.push(format!("`{command}` should exit with {code}\n{outcome}"));
            continue;
        }
        let printed = place.shown(&outcome.stdout);
        if !matches(&expected, &printed.lines().collect::<Vec<_>>()) {
            mistakes.push(format!("`{command}` prints\n{printed}"));
        }
    }
    mistakes
}

/// `a --> b` of a picture must be an edge of the quickstart at one width.
fn check_arrows(place: &Sandbox, lines: &[String]) -> Vec<String> {
    let graph = place.shell("merganser graph pipelines/quickstart.toml --set bits=4 --json").json();
    let stage = |name: &serde_json::Value| name.as_str().unwrap().split('[').next().unwrap().to_owned();
    let edges: BTreeSet<(String, String)> = graph["edges"]
        .as_array()
        .unwrap()
        .iter()
        .map(|edge| (stage(&edge["from"]), stage(&edge["to"])))
        .collect();
    let name = |side: &str| side.trim().split('[').next().unwrap().to_owned();
    let arrows =
        lines.iter().filter_map(|line| line.split_once(" --> ")).map(|(from, to)| (name(from), name(to)));
    arrows
        .filter(|arrow| !edges.contains(arrow))
        .map(|(from, to)| format!("the quickstart has no edge {from} --> {to}"))
        .collect()
}

/// Whether lines are as expected; `…` stands for any number of lines.
fn matches(expected: &[&str], actual: &[&str]) -> bool {
    match expected.split_first() {
        None => actual.is_empty(),
        Some((&"…", rest)) => (0..=actual.len()).any(|skipped| matches(rest, &actual[skipped..])),
        Some((first, rest)) => {
            actual.split_first().is_some_and(|(line, others)| same_line(first, line) && matches(rest, others))
        }
    }
}

fn same_line(expected: &str, actual: &str) -> bool {
    if expected == actual {
        return true;
    }
    let (expected, actual) = (filtered(expected), filtered(actual));
    let is_score = ["accuracy", "top5", "\"correct\"", "\"value\"", "\"low\"", "\"high\"", "×"]
        .iter()
        .any(|word| expected.contains(word));
    let (left, right): (Vec<&str>, Vec<&str>) =
        (expected.split_whitespace().collect(), actual.split_whitespace().collect());
    left.len() == right.len()
        && left.iter().zip(right).all(|(left, right)| *left == right || is_score && near(left, right))
}

/// Scores of 600 images may differ by two answers between processors: a third of a percent.
fn near(left: &str, right: &str) -> bool {
    let value = |text: &str| text.trim_end_matches(',').parse::<f64>().ok();
    let (Some(a), Some(b)) = (value(left), value(right)) else { return false };
    let tolerance = match left.split_once('.') {
        None => 2.0,
        Some((_, decimals)) if decimals.len() == 2 => 0.34,
        Some(_) => 0.0034,
    };
    (a - b).abs() <= tolerance
}

/// What differs from run to run, by name.
fn filters() -> &'static [(&'static str, Regex)] {
    static FILTERS: LazyLock<Vec<(&str, Regex)>> = LazyLock::new(|| {
        let filters = [
            ("[date]", r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"),
            ("[run]", r"\b\d{8}-\d{6}-\d{3}-[0-9a-f]{4}\b"),
            ("[object]", r"\b[0-9a-f]{2}/[0-9a-f]{62}\b"),
            ("[digest]", r"\b[0-9a-f]{64}\b|\b[0-9a-f]{12}\b"),
            ("[time]", r"\b\d+\.\d\d s\b|\b\d+ ms\b"),
            ("[seconds]", r#""seconds": [0-9.e-]+"#),
            ("[pace]", r"× +\d+$"),
            ("[disk]", r"\b[0-9.]+ [kMG]B on disk"),
        ];
        filters.into_iter().map(|(name, pattern)| (name, Regex::new(pattern).unwrap())).collect()
    });
    &FILTERS
}

fn filtered(line: &str) -> String {
    filters()
        .iter()
        .fold(line.to_owned(), |line, (name, pattern)| pattern.replace_all(&line, *name).into_owned())
}

/// A folder like the one that the documentation speaks of: the repository's pipelines, an empty cache, the tool on the path.
struct Sandbox {
    folder: TempDir,
}

impl Sandbox {
    fn new() -> Self {
        let folder = tempfile::Builder::new().prefix("merganser-docs-").tempdir().unwrap();
        let place = Self { folder };
        fs_err::create_dir_all(place.root().join("bin")).unwrap();
        fs_err::os::unix::fs::symlink(env!("CARGO_BIN_EXE_merganser"), place.root().join("bin/merganser"))
            .unwrap();
        copy_folder(&repository().join("pipelines"), &place.work().join("pipelines"));
        place
    }

    fn root(&self) -> &Path {
        self.folder.path()
    }

    fn work(&self) -> PathBuf {
        self.root().join("work")
    }

    fn write(&self, name: &str, text: &str) {
        fs_err::write(self.work().join(name), text).unwrap();
    }

    /// Runs a command as a shell does, both streams as one.
    fn shell(&self, command: &str) -> Outcome {
        let command = command.replace("cargo run --release --", "merganser");
        let path = std::env::var("PATH").unwrap();
        let mut shell = Command::new("sh");
        shell
            .args(["-c", &format!("exec 2>&1\n{command}")])
            .current_dir(self.work())
            .env_clear()
            .env("PATH", format!("{}:{path}", self.root().join("bin").display()))
            .env("HOME", self.root())
            .env("TMPDIR", self.root())
            .env("ORT_DYLIB_PATH", runtime())
            .env("MERGANSER_OFFLINE", "true")
            .stdin(Stdio::null());
        Outcome::of(&mut shell)
    }

    /// What was printed, without the folders of this test.
    fn shown(&self, printed: &str) -> String {
        let cache = self.root().join(".cache/merganser");
        printed
            .replace(cache.to_str().unwrap(), "~/.cache/merganser")
            .replace(&format!("{}/", self.work().display()), "")
    }
}

fn copy_folder(from: &Path, to: &Path) {
    fs_err::create_dir_all(to).unwrap();
    for entry in fs_err::read_dir(from).unwrap().map(Result::unwrap) {
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_folder(&entry.path(), &target);
        } else {
            crate::util::copy(&entry.path(), &target);
        }
    }
}

/// A fenced block.
struct Block {
    /// Of its opening fence.
    line: usize,
    language: String,
    title: Option<String>,
    lines: Vec<String>,
}

impl Block {
    /// The name of a file that is written for the commands that follow.
    fn written_file(&self) -> Option<&str> {
        let is_written = matches!(self.language.as_str(), "toml" | "python");
        self.title.as_deref().filter(|title| is_written && !repository().join(title).exists())
    }
}

enum Step {
    First(String),
    Block(Block),
}

fn steps(text: &str) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut open: Option<Block> = None;
    let mut indent = 0;
    for (index, line) in text.lines().enumerate() {
        let fence = line.trim_start().strip_prefix("```");
        match (&mut open, fence) {
            (Some(_), Some(_)) => steps.extend(open.take().map(Step::Block)),
            (Some(block), None) => block.lines.push(line.get(indent..).unwrap_or("").to_owned()),
            (None, Some(info)) => {
                indent = line.len() - line.trim_start().len();
                let (language, rest) = info.split_once(' ').unwrap_or((info, ""));
                let title =
                    rest.strip_prefix("title=\"").and_then(|rest| rest.strip_suffix('"')).map(str::to_owned);
                open =
                    Some(Block { line: index + 1, language: language.to_owned(), title, lines: Vec::new() });
            }
            (None, None) => {
                let first = line.strip_prefix("<!-- first: ").and_then(|rest| rest.strip_suffix(" -->"));
                steps.extend(first.map(|command| Step::First(command.to_owned())));
            }
        }
    }
    assert!(open.is_none(), "a block is never closed");
    steps
}

fn without_blocks(text: &str) -> String {
    let mut inside = false;
    let outside = text.lines().filter(|line| {
        let fence = line.trim_start().starts_with("```");
        inside ^= fence;
        !inside && !fence
    });
    outside.collect::<Vec<_>>().join("\n")
}

/// What a heading is called in links: lower case, blanks as hyphens, no punctuation.
fn anchors(text: &str) -> BTreeSet<String> {
    let headings = without_blocks(text);
    let headings =
        headings.lines().filter(|line| line.starts_with('#')).map(|line| line.trim_start_matches('#').trim());
    let slug = |heading: &str| {
        let kept = heading.to_lowercase().replace(' ', "-");
        kept.chars().filter(|character| character.is_alphanumeric() || "-_".contains(*character)).collect()
    };
    headings.map(slug).collect()
}
