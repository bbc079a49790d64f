//! What a stage kind is: its ports, its parameters, how it splits into units of work, and how it runs.
//!
//! INVARIANT: a kind never reads the pipeline file, prints, or learns where the cache is. It is given parsed parameters, opened inputs and a
//! staging area, and answers with a draft of an artifact. What it computes is a function of its parameters, the contents of its inputs and
//! sources, and its declared environment: exactly what the key is made of.

use crate::params::{Params, Problem};
use crate::{Draft, Job, Services, StageError};
use merganser_cache::Value;
use std::path::PathBuf;

/// What an artifact holds, as far as ports care. Packed tensors are a way of storing any of them, not a content of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Content {
    Checkpoint,
    TaskVectors,
    Masks,
    Basis,
    Coefficients,
    Statistics,
    Scores,
    /// An ONNX graph with its weights.
    Graph,
    Files,
}

impl Content {
    /// Names it as messages do.
    pub fn label(self) -> &'static str {
        match self {
            Self::Checkpoint => "checkpoint",
            Self::TaskVectors => "task vectors",
            Self::Masks => "masks",
            Self::Basis => "basis",
            Self::Coefficients => "coefficients",
            Self::Statistics => "statistics",
            Self::Scores => "scores",
            Self::Graph => "graph",
            Self::Files => "files",
        }
    }
}

/// How many artifacts a port takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arity {
    /// Exactly one artifact. A collection on it makes the stage run once per member.
    PerMember,
    /// All members of a collection at once (or one artifact, as a collection of one).
    All,
}

/// A named input.
#[derive(Clone, Copy, Debug)]
pub struct Port {
    pub name: &'static str,
    pub doc: &'static str,
    pub accepts: &'static [Content],
    pub arity: Arity,
    pub required: bool,
}

/// The inputs of a kind.
#[derive(Clone, Copy, Debug)]
pub struct Ports {
    pub named: &'static [Port],
    /// Further ports under names of the user's choice are like this one (`combine`).
    pub open: Option<&'static Port>,
}

impl Ports {
    pub const NONE: Self = Self { named: &[], open: None };

    /// Finds the port that `name` means.
    pub fn find(&self, name: &str) -> Option<&'static Port> {
        self.named.iter().find(|port| port.name == name).or(self.open)
    }

    /// The port that `from = "stage"` connects to: the only one, or the only required one.
    pub fn sole(&self) -> Option<&'static Port> {
        if let [only] = self.named {
            return Some(only);
        }
        let mut required = self.named.iter().filter(|port| port.required);
        let first = required.next()?;
        required.next().is_none().then_some(first)
    }
}

/// What is connected to a port: known before anything is read.
#[derive(Clone, Debug, PartialEq)]
pub struct Connection {
    pub port: String,
    pub content: Content,
    /// Names of the members in order, or `None` for a single artifact.
    pub members: Option<Vec<String>>,
}

/// The part of a stage that has a key and an artifact of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unit {
    /// Names it within the stage's collection; `None` when the stage produces a single artifact.
    pub member: Option<String>,
    /// Names it among the parts of its stage: what later units of the same stage take, and nothing outside sees.
    pub part: Option<&'static str>,
    pub takes: Vec<Take>,
}

/// What a unit consumes of one port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Take {
    /// A port, or a part that an earlier unit of the same stage makes.
    pub port: String,
    /// Only this member of the collection; `None` takes what is connected as it is.
    pub member: Option<String>,
}

/// Files that a parameter names. Their contents enter the key, in this order, with their labels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceSet {
    /// The parameter, such as `path` or `dataset.mnist.images`.
    pub parameter: String,
    pub files: Vec<SourceFile>,
}

/// One file of a [`SourceSet`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceFile {
    /// What about the name matters to the result: a shard's name in its index, a class folder and file name. Empty if nothing does.
    pub label: String,
    pub path: PathBuf,
}

impl SourceSet {
    /// One file whose name does not matter.
    pub fn one(parameter: impl Into<String>, path: impl Into<PathBuf>) -> Self {
        Self {
            parameter: parameter.into(),
            files: vec![SourceFile { label: String::new(), path: path.into() }],
        }
    }

    /// These files as those of one of several datasets, for [`Job::scoped`].
    pub(crate) fn scoped(self, scope: &str) -> Self {
        Self { parameter: format!("{scope}/{}", self.parameter), ..self }
    }
}

/// How a kind describes one of its methods to people: `merganser stages`, the docs and the schema are made from it.
#[derive(Clone, Debug)]
pub struct MethodDoc {
    pub id: &'static str,
    pub summary: &'static str,
    /// The formula in plain text.
    pub formula: &'static str,
    /// Paper and code it follows.
    pub source: &'static str,
    /// JSON Schema of its parameters.
    pub schema: schemars::Schema,
}

/// A kind of stage; one entry of [`crate::kinds`].
pub trait StageKind: Sync {
    /// What `kind = "…"` says.
    fn id(&self) -> &'static str;

    fn summary(&self) -> &'static str;

    fn ports(&self) -> Ports;

    /// The key that chooses among [`methods`](Self::methods) (`method`, `scheme`), if there is one.
    fn method_key(&self) -> Option<&'static str> {
        None
    }

    /// The port whose artifacts must be kept to have the output again, for the accounting of bytes; the output itself if there is none.
    fn storage_port(&self) -> Option<&'static str> {
        None
    }

    /// Its methods, or a single entry for the kind itself.
    fn methods(&self) -> Vec<MethodDoc>;

    /// Parses the stage's table, reporting every mistake.
    fn parse(&self, params: Params<'_>) -> Result<Box<dyn Stage>, Vec<Problem>>;
}

/// A stage with its parameters: valid by construction.
pub trait Stage: Send + Sync {
    /// Raised whenever the numbers change: part of the key.
    fn version(&self) -> u32;

    /// What it produces; a mis-wired stage is a problem here, before anything runs.
    fn output(&self, inputs: &[Connection]) -> Result<Content, Problem>;

    /// Splits into units of work. The default runs once per member of what is connected to its per-member ports.
    fn units(&self, inputs: &[Connection], ports: &Ports) -> Result<Vec<Unit>, Problem> {
        per_member(inputs, ports)
    }

    /// The typed parameters of a unit, defaults filled in.
    fn parameters(&self, unit: &Unit) -> Result<Value, StageError>;

    /// The files that a unit reads. Fails when one is missing or cannot be what it should be.
    fn sources(&self, _unit: &Unit) -> Result<Vec<SourceSet>, StageError> {
        Ok(Vec::new())
    }

    /// What else the numbers depend on: ONNX Runtime's version, the numerics class.
    fn environment(&self, _services: &Services) -> Result<Value, StageError> {
        Ok(Value::Null)
    }

    /// Computes the unit's artifact.
    fn run(&self, job: &Job<'_>) -> Result<Draft, StageError>;

    /// Whether its artifacts, beside what is on port `base`, are all that must be kept to have the output again, for the accounting of
    /// bytes; if not, [`StageKind::storage_port`] says what is.
    fn holds_all_but_the_base(&self) -> bool {
        false
    }

    /// What its scores have to reach; they enter no key.
    fn goals(&self) -> Option<&crate::Goals> {
        None
    }

    /// Where the user wants a copy of the output, outside the cache.
    fn destination(&self) -> Option<&crate::params::FilePath> {
        None
    }

    /// Whether a file of the output is the same for all members of a collection: it is copied beside their folders, once.
    fn is_shared_file(&self, _name: &str) -> bool {
        false
    }
}

/// One unit per member of the collections on per-member ports; members match by name, in the order of the first collection.
pub fn per_member(inputs: &[Connection], ports: &Ports) -> Result<Vec<Unit>, Problem> {
    let is_per_member =
        |input: &Connection| ports.find(&input.port).is_some_and(|port| port.arity == Arity::PerMember);
    let mut collections = inputs.iter().filter(|input| is_per_member(input) && input.members.is_some());
    let take = |input: &Connection, member: Option<&str>| Take {
        port: input.port.clone(),
        member: member.filter(|_| is_per_member(input) && input.members.is_some()).map(str::to_owned),
    };
    let Some(first) = collections.next() else {
        return Ok(vec![Unit {
            member: None,
            part: None,
            takes: inputs.iter().map(|input| take(input, None)).collect(),
        }]);
    };
    let names = first.members.as_deref().unwrap_or_default();
    for other in collections {
        let theirs = other.members.as_deref().unwrap_or_default();
        let odd = names.iter().find(|name| !theirs.contains(name)).map(|name| (name, &other.port));
        let odd =
            odd.or_else(|| theirs.iter().find(|name| !names.contains(name)).map(|name| (name, &first.port)));
        if let Some((name, port)) = odd {
            return Err(Problem::new("member-mismatch", format!("port `{port}` has no member `{name}`"))
                .help(format!(
                    "`{}` has {}; `{}` has {}",
                    first.port,
                    names.join(", "),
                    other.port,
                    theirs.join(", ")
                )));
        }
    }
    Ok(names
        .iter()
        .map(|name| Unit {
            member: Some(name.clone()),
            part: None,
            takes: inputs.iter().map(|input| take(input, Some(name))).collect(),
        })
        .collect())
}

/// Lets a unit about a member take only that member of a port that otherwise takes all, where there is one of that name.
pub(crate) fn narrow_to_members(units: &mut [Unit], inputs: &[Connection], port: &str) {
    let input = inputs.iter().find(|input| input.port == port);
    let known = input.and_then(|input| input.members.as_deref()).unwrap_or_default();
    for unit in units {
        let own = unit.member.as_ref().filter(|member| known.contains(member));
        if let Some(take) = unit.takes.iter_mut().find(|take| take.port == port) {
            take.member = own.cloned();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PORTS: Ports = Ports {
        named: &[
            Port {
                name: "base",
                doc: "",
                accepts: &[Content::Checkpoint],
                arity: Arity::PerMember,
                required: true,
            },
            Port {
                name: "tuned",
                doc: "",
                accepts: &[Content::Checkpoint],
                arity: Arity::PerMember,
                required: true,
            },
            Port {
                name: "all",
                doc: "",
                accepts: &[Content::Checkpoint],
                arity: Arity::All,
                required: false,
            },
        ],
        open: None,
    };

    fn connection(port: &str, members: Option<&[&str]>) -> Connection {
        let members = members.map(|names| names.iter().map(|&name| name.to_owned()).collect());
        Connection { port: port.to_owned(), content: Content::Checkpoint, members }
    }

    fn units(inputs: &[Connection]) -> Result<Vec<Unit>, Problem> {
        per_member(inputs, &PORTS)
    }

    #[test]
    fn runs_once_without_a_collection() {
        let units = units(&[connection("base", None), connection("all", Some(&["a", "b"]))]).unwrap();
        assert_eq!(units.len(), 1);
        assert_eq!(units[0].member, None);
        assert!(units[0].takes.iter().all(|take| take.member.is_none()), "an `All` port is taken whole");
    }

    #[test]
    fn matches_members_by_name_not_by_position() {
        let units =
            units(&[connection("base", Some(&["a", "b"])), connection("tuned", Some(&["b", "a"]))]).unwrap();
        assert_eq!(
            units[0].takes.iter().map(|take| take.member.as_deref()).collect::<Vec<_>>(),
            [Some("a"), Some("a")]
        );
    }

    #[test]
    fn shares_a_single_artifact_among_members() {
        let units = units(&[connection("base", None), connection("tuned", Some(&["a", "b"]))]).unwrap();
        assert_eq!(units.len(), 2);
        assert_eq!(units[1].takes[0].member, None);
        assert_eq!(units[1].takes[1].member.as_deref(), Some("b"));
    }

    #[test]
    fn names_the_member_that_one_side_lacks() {
        let problem =
            units(&[connection("base", Some(&["a"])), connection("tuned", Some(&["a", "b"]))]).unwrap_err();
        assert_eq!(problem.message, "port `base` has no member `b`");
    }
}
