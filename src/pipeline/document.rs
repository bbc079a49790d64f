//! The parts of a pipeline before anything is substituted: files read and included, top-level tables told apart.
//!
//! `include` merges tables deeply: later files win over earlier ones, and the including file wins over what it includes. Every
//! value keeps the span of the file that it came from, so relative paths start from that file's folder.

use super::lower;
use super::problems::Problems;
use super::source::Files;
use super::text::is_name;
use super::vars;
use indexmap::IndexMap;
use merganser_stages::params::{Node, NodeValue, Problem, Span, Table, closest, did_you_mean};
use std::collections::{HashMap, HashSet};
use std::io::Read;
use std::path::{Path, PathBuf};

/// Far more than anyone writes by hand, far less than what would exhaust memory; spans hold 32 bits.
const MAX_FILE_BYTES: u64 = 16 << 20;
/// Includes within includes.
const MAX_INCLUDE_DEPTH: usize = 32;

/// A pipeline as written.
#[derive(Debug, Default)]
pub(super) struct Document {
    pub(super) name: Option<String>,
    pub(super) description: Option<String>,
    pub(super) variables: IndexMap<String, Definition>,
    pub(super) stages: Vec<StageTable>,
    pub(super) sweep: Vec<SweptVariable>,
    /// Stages that are mentioned but could not be read: they are not unknown.
    pub(super) unreadable_stages: HashSet<String>,
}

/// A variable's entry in `[vars]`.
#[derive(Clone, Debug)]
pub(super) struct Definition {
    pub(super) key_span: Span,
    pub(super) node: Node,
    /// The variables that the file's own value uses, whatever `--set` and sweeps put in its place.
    pub(super) mentions: Vec<String>,
}

/// A stage's table as written.
#[derive(Clone, Debug)]
pub(super) struct StageTable {
    pub(super) name: String,
    pub(super) name_span: Span,
    pub(super) table: Table,
}

/// An entry of `[sweep]`, or a `--set` with several values.
#[derive(Clone, Debug)]
pub(super) struct SweptVariable {
    pub(super) name: String,
    pub(super) name_span: Span,
    /// Where the values stand as a whole.
    pub(super) span: Span,
    pub(super) values: Vec<Node>,
}

/// Reads the main file and what it includes. Returns nothing when no conclusions can be drawn from what was read.
pub(super) fn read(path: &Path, files: &mut Files, problems: &mut Problems) -> Option<Document> {
    let mut reader = Reader { files, problems, open: Vec::new(), done: HashMap::new(), is_sound: true };
    let root = reader.file(path, &path.display().to_string(), None);
    let is_sound = reader.is_sound;
    root.filter(|_| is_sound).map(|root| interpret(root, problems))
}

/// Returns the folder of a file; relative paths stay as they are when there is no current folder.
pub(super) fn folder_of(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    path.parent().map(Path::to_owned).unwrap_or_default()
}

struct Reader<'a> {
    files: &'a mut Files,
    problems: &'a mut Problems,
    /// The files that are being read, outermost first: identity and name.
    open: Vec<(PathBuf, String)>,
    /// A file that several others include is read once.
    done: HashMap<PathBuf, Option<Table>>,
    is_sound: bool,
}

impl Reader<'_> {
    fn file(&mut self, path: &Path, name: &str, included_at: Option<Span>) -> Option<Table> {
        let identity = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        if let Some(start) = self.open.iter().position(|(open, _)| *open == identity) {
            let chain = self.open[start..].iter().chain(&self.open[start..=start]);
            let chain: Vec<String> = chain.map(|(_, name)| format!("`{name}`")).collect();
            let message = format!("files include each other in a circle: {}", chain.join(" includes "));
            return self.fail(Problem { code: "include-cycle", message, span: included_at, help: None });
        }
        if self.open.len() > MAX_INCLUDE_DEPTH {
            let message = format!("files include each other more than {MAX_INCLUDE_DEPTH} deep");
            return self.fail(Problem { code: "include-cycle", message, span: included_at, help: None });
        }
        if let Some(done) = self.done.get(&identity) {
            return done.clone();
        }
        let text = match read_text(path) {
            Ok(text) => text,
            Err(reason) => {
                let message = format!("cannot read `{name}`: {reason}");
                return self.fail(Problem {
                    code: "unreadable-file",
                    message,
                    span: included_at,
                    help: similar_file(path),
                });
            }
        };
        let folder = folder_of(path);
        let file = self.files.add(name, text.as_str(), folder.as_path());
        let lowered = lower::document(&text, file, self.problems);
        self.is_sound &= lowered.is_sound;
        let mut table = lowered.table;
        let includes = table.shift_remove("include").map(|entry| entry.node);
        self.open.push((identity.clone(), name.to_owned()));
        let mut merged = Table::new();
        for node in self.included(includes) {
            let Some(written) = node.as_str() else { continue };
            let shown = Path::new(name).with_file_name("").join(written).display().to_string();
            if let Some(included) = self.file(&folder.join(written), &shown, Some(node.span)) {
                merge(&mut merged, included);
            }
        }
        self.open.pop();
        merge(&mut merged, table);
        self.done.insert(identity, Some(merged.clone()));
        Some(merged)
    }

    /// Returns the entries of `include` that are strings; complains of everything else.
    fn included(&mut self, includes: Option<Node>) -> Vec<Node> {
        let Some(node) = includes else { return Vec::new() };
        let help = "write `include = [\"common.toml\"]`";
        let NodeValue::Array(items) = node.value else {
            let message = format!("`include` must be an array of paths, got {}", node.type_name());
            self.problems.error(Problem::new("wrong-type", message).at(node.span).help(help));
            return Vec::new();
        };
        for item in items.iter().filter(|item| item.as_str().is_none()) {
            let message = format!("`include` must be an array of paths, got {} in it", item.type_name());
            self.problems.error(Problem::new("wrong-type", message).at(item.span).help(help));
        }
        items
    }

    fn fail(&mut self, problem: Problem) -> Option<Table> {
        self.problems.error(problem);
        // Whatever a missing file would have defined would be reported as unknown.
        self.is_sound = false;
        None
    }
}

fn read_text(path: &Path) -> Result<String, String> {
    let file = std::fs::File::open(path).map_err(|error| error.to_string())?;
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(format!("it is larger than {} MiB", MAX_FILE_BYTES >> 20));
    }
    String::from_utf8(bytes)
        .map_err(|error| format!("it is not UTF-8 (byte {})", error.utf8_error().valid_up_to()))
}

/// Suggests a pipeline file beside the one that is missing.
fn similar_file(path: &Path) -> Option<String> {
    if path.exists() {
        return None;
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .ok()?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| Path::new(name).extension().is_some_and(|extension| extension == "toml"))
        .collect();
    names.sort_unstable();
    let best = closest(path.file_name()?.to_str()?, names.iter().map(String::as_str))?;
    Some(format!("did you mean `{}`?", path.with_file_name(best).display()))
}

/// Puts `over` on top of `base`, table by table.
fn merge(base: &mut Table, over: Table) {
    for (key, entry) in over {
        match base.get_mut(&key) {
            None => {
                base.insert(key, entry);
            }
            Some(old) => {
                old.key_span = entry.key_span;
                old.node.span = entry.node.span;
                match (&mut old.node.value, entry.node.value) {
                    (NodeValue::Table(old), NodeValue::Table(new)) => merge(old, new),
                    (old, new) => *old = new,
                }
            }
        }
    }
}

const TOP_LEVEL: [&str; 5] = ["pipeline", "vars", "stage", "sweep", "include"];

fn interpret(root: Table, problems: &mut Problems) -> Document {
    let mut document = Document::default();
    let mut has_stages = false;
    for (key, entry) in root {
        if !TOP_LEVEL.contains(&key.as_str()) {
            let mut problem = Problem::new("unknown-key", format!("unknown key `{key}`")).at(entry.key_span);
            problem.help = did_you_mean(&key, TOP_LEVEL);
            problems.error(problem);
            continue;
        }
        has_stages |= key == "stage";
        let Some(table) = as_table(&format!("`{key}`"), entry.node, problems) else { continue };
        match key.as_str() {
            "pipeline" => interpret_header(table, &mut document, problems),
            "vars" => interpret_variables(table, &mut document, problems),
            "stage" => interpret_stages(table, &mut document, problems),
            _ => interpret_sweep(table, &mut document, problems),
        }
    }
    if !has_stages {
        problems.error(
            Problem::new("no-stages", "the pipeline has no stages").help("a stage is a table `[stage.NAME]`"),
        );
    }
    document
}

fn as_table(what: &str, node: Node, problems: &mut Problems) -> Option<Table> {
    let type_name = node.type_name();
    if let NodeValue::Table(table) = node.value {
        return Some(table);
    }
    problems
        .error(Problem::new("wrong-type", format!("{what} must be a table, got {type_name}")).at(node.span));
    None
}

fn interpret_header(table: Table, document: &mut Document, problems: &mut Problems) {
    for (key, entry) in table {
        let place = match key.as_str() {
            "name" => &mut document.name,
            "description" => &mut document.description,
            _ => {
                let mut problem =
                    Problem::new("unknown-key", format!("unknown key `{key}`")).at(entry.key_span);
                problem.help = did_you_mean(&key, ["name", "description"]);
                problems.error(problem);
                continue;
            }
        };
        if let Some(text) = entry.node.as_str() {
            *place = Some(text.to_owned());
        } else {
            let message = format!("`{key}` must be a string, got {}", entry.node.type_name());
            problems.error(Problem::new("wrong-type", message).at(entry.node.span));
        }
    }
}

fn interpret_variables(table: Table, document: &mut Document, problems: &mut Problems) {
    for (name, entry) in table {
        if check_name("variable", &name, entry.key_span, problems) {
            let mentions = vars::mentions(&entry.node);
            document
                .variables
                .insert(name, Definition { key_span: entry.key_span, node: entry.node, mentions });
        }
    }
}

fn interpret_stages(table: Table, document: &mut Document, problems: &mut Problems) {
    for (name, entry) in table {
        let is_named = check_name("stage", &name, entry.key_span, problems);
        match as_table(&format!("stage `{name}`"), entry.node, problems).filter(|_| is_named) {
            Some(table) => document.stages.push(StageTable { name, name_span: entry.key_span, table }),
            None => {
                document.unreadable_stages.insert(name);
            }
        }
    }
}

fn interpret_sweep(table: Table, document: &mut Document, problems: &mut Problems) {
    for (name, entry) in table {
        let span = entry.node.span;
        let type_name = entry.node.type_name();
        let NodeValue::Array(values) = entry.node.value else {
            let message = format!("a sweep needs an array of values, got {type_name}");
            problems
                .error(Problem::new("bad-sweep", message).at(span).help(format!("write `{name} = [2, 3]`")));
            continue;
        };
        document.sweep.push(SweptVariable { name, name_span: entry.key_span, span, values });
    }
}

fn check_name(what: &str, name: &str, span: Span, problems: &mut Problems) -> bool {
    if is_name(name) {
        return true;
    }
    let message = format!("`{name}` cannot be the name of a {what}");
    problems.error(
        Problem::new("bad-name", message).at(span).help("names are made of letters, digits, `_` and `-`"),
    );
    false
}
