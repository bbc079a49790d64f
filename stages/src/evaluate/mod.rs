//! `evaluate`: a model on labelled images, through its real ONNX export.
//!
//! One unit of work per dataset (and member): adding a task evaluates that task only. The binding of checkpoint tensors to the graph is
//! computed once from the origin and reused for every model, whose own bytes match nothing in the graph.

mod analysis;
mod batch;
mod classify;
mod goal;
mod graph;
mod head;
mod images;
mod inference;
mod params;
mod parts;
mod scores;
mod segment;
mod text;
mod tokens;
mod zero_shot;

pub use analysis::{Analysis, Answers, ClassRow};
pub use goal::{Goal, Goals, Missed, missed};
pub(crate) use graph::{Graphs, files as graph_files};
pub(crate) use images::Opened;
pub(crate) use inference::Evaluation;
pub(crate) use params::{EvaluateParams, Place};
pub use scores::{Baseline, Images as ScoredImages, ScoreRow, Scores};

use crate::kind::{
    Arity, Connection, Content, MethodDoc, Port, Ports, SourceSet, Stage, StageKind, Take, Unit,
};
use crate::numerics::numerics_class;
use crate::params::{Params, Problem, did_you_mean, parse};
use crate::{Draft, Job, Services, StageError};
use merganser_cache::Value;
use schemars::schema_for;
use std::collections::BTreeMap;

pub(crate) struct Evaluate;

const PORTS: &[Port] = &[
    Port {
        name: "model",
        doc: "what is scored: one checkpoint (or exported graph) on every dataset, or a collection, member t on dataset t",
        accepts: &[Content::Checkpoint, Content::Graph],
        arity: Arity::PerMember,
        required: true,
    },
    Port {
        name: "origin",
        doc: "the checkpoint that `graph` was exported from: tells which tensor is which initializer; not for a model that is a graph",
        accepts: &[Content::Checkpoint],
        arity: Arity::All,
        required: false,
    },
    Port {
        name: "baseline",
        doc: "what accuracies are divided by: one checkpoint, or a collection, member t on dataset t (such as the fine-tuned models)",
        accepts: &[Content::Checkpoint, Content::Graph],
        arity: Arity::All,
        required: false,
    },
];

impl StageKind for Evaluate {
    fn id(&self) -> &'static str {
        "evaluate"
    }

    fn summary(&self) -> &'static str {
        "accuracy of image classifiers, and masks of models that segment, through ONNX Runtime"
    }

    fn ports(&self) -> Ports {
        Ports { named: PORTS, open: None }
    }

    fn methods(&self) -> Vec<MethodDoc> {
        vec![MethodDoc {
            id: "evaluate",
            summary: self.summary(),
            formula: "accuracy = #{argmax logits = label} / n; top5 likewise; normalized_accuracy = accuracy / accuracy of the baseline; logits = L2-normalized embeddings · Wᵀ + b with a head; of masks IoU = #(A ∩ B) / #(A ∪ B), and J, F, J&F as DAVIS defines them",
            source: "Radford et al., CLIP, arXiv:2103.00020; Perazzi et al., DAVIS, CVPR 2016; Ravi et al., SAM 2, arXiv:2408.00714; intervals: Wilson 1927, Efron 1979",
            schema: schema_for!(EvaluateParams),
        }]
    }

    fn parse(&self, params: Params<'_>) -> Result<Box<dyn Stage>, Vec<Problem>> {
        let parsed: EvaluateParams = parse(&params)?;
        let problems = parsed.problems(params.span);
        if problems.is_empty() { Ok(Box::new(EvaluateStage { params: parsed })) } else { Err(problems) }
    }
}

struct EvaluateStage {
    params: EvaluateParams,
}

impl EvaluateStage {
    /// The dataset that a unit is about: its member's name, less the model's in a cross evaluation.
    fn task<'a>(&self, unit: &'a Unit) -> Result<&'a str, StageError> {
        let name = unit.member.as_deref().unwrap_or_default();
        let model =
            unit.takes.iter().find(|take| take.port == "model").and_then(|take| take.member.as_deref());
        let task = match model
            .filter(|_| self.params.cross)
            .and_then(|member| name.strip_prefix(member)?.strip_prefix('/'))
        {
            Some(task) => task,
            None => name,
        };
        if self.params.dataset.contains_key(task) {
            Ok(task)
        } else {
            Err(StageError::Internal(format!("no dataset for `{name}`")))
        }
    }
}

impl EvaluateStage {
    /// A checkpoint needs a graph and the origin that tells how it fits; an exported graph is both at once.
    fn check_graph(&self, inputs: &[Connection]) -> Result<(), Problem> {
        let on = |port: &str| inputs.iter().find(|input| input.port == port);
        let is_graph = |input: &Connection| input.content == Content::Graph;
        let model_is_graph = on("model").is_some_and(is_graph);
        if let Some(baseline) = on("baseline").filter(|baseline| is_graph(baseline) != model_is_graph) {
            let content = baseline.content.label();
            let message =
                format!("the baseline is a {content}, the model is not: both are scored in the same way");
            return Err(Problem::new("wrong-content", message));
        }
        let has_graph = self.params.graph != Graphs::Own;
        match (model_is_graph, on("origin")) {
            (true, origin) if has_graph || origin.is_some() => {
                let what = if has_graph { "key `graph`" } else { "port `origin`" };
                Err(Problem::new(
                    "bad-value",
                    format!("the model is a graph and has its own weights: {what} is not for it"),
                )
                .help("`model` takes the checkpoint, or what `export` made of it"))
            }
            (false, _) if !has_graph => Err(Problem::new("missing-key", "missing key `graph`")
                .help("the ONNX export that the model's weights are put into")),
            (false, None) => Err(Problem::new("missing-port", "`evaluate` needs something on port `origin`")
                .help("the checkpoint that the graph was exported from")),
            _ => Ok(()),
        }
    }
}

impl Stage for EvaluateStage {
    fn version(&self) -> u32 {
        1
    }

    fn output(&self, inputs: &[Connection]) -> Result<Content, Problem> {
        if let Some(origin) = inputs.iter().find(|input| input.port == "origin" && input.members.is_some()) {
            return Err(Problem::new(
                "wrong-type",
                format!("port `{}` takes one checkpoint, not a collection", origin.port),
            ));
        }
        if !inputs.iter().any(|input| input.port == "baseline")
            && let Some(problem) = Goal::without_baseline(&self.params.goal)
        {
            return Err(problem);
        }
        self.check_graph(inputs)?;
        let segments = matches!(self.params.graph, Graphs::Segmenter { .. });
        if segments && inputs.iter().any(|input| input.port == "baseline") {
            let message = "port `baseline` goes with classifiers: scores of masks are not normalized";
            return Err(Problem::new("wrong-type", message));
        }
        Ok(Content::Scores)
    }

    fn units(&self, inputs: &[Connection], _: &Ports) -> Result<Vec<Unit>, Problem> {
        let tasks = self.params.dataset.keys();
        let members =
            inputs.iter().find(|input| input.port == "model").and_then(|input| input.members.as_ref());
        let Some(members) = members else {
            return tasks.map(|task| unit(inputs, task.clone(), None, task)).collect();
        };
        if self.params.cross {
            let pairs = members.iter().flat_map(|member| tasks.clone().map(move |task| (member, task)));
            return pairs
                .map(|(member, task)| unit(inputs, format!("{member}/{task}"), Some(member), task))
                .collect();
        }
        members
            .iter()
            .map(|member| {
                if self.params.dataset.contains_key(member) {
                    return unit(inputs, member.clone(), Some(member), member);
                }
                let mut problem =
                    Problem::new("missing-dataset", format!("there is no dataset for member `{member}`"));
                problem.help = did_you_mean(member, tasks.clone().map(String::as_str));
                Err(problem)
            })
            .collect()
    }

    fn parameters(&self, unit: &Unit) -> Result<Value, StageError> {
        self.params.for_task(self.task(unit)?)
    }

    fn sources(&self, unit: &Unit) -> Result<Vec<SourceSet>, StageError> {
        self.params.sources(self.task(unit)?)
    }

    fn environment(&self, services: &Services) -> Result<Value, StageError> {
        environment(services)
    }

    fn goals(&self) -> Option<&Goals> {
        Some(&self.params.goal)
    }

    fn run(&self, job: &Job<'_>) -> Result<Draft, StageError> {
        let task = self.task(&job.unit)?;
        match &self.params.graph {
            Graphs::Own | Graphs::Classifier { .. } => classify::run(job, &self.params, task),
            Graphs::Segmenter { .. } => segment::run(job, &self.params, task),
        }
    }
}

/// What the numbers of any evaluation depend on beside its inputs.
pub(crate) fn environment(services: &Services) -> Result<Value, StageError> {
    Ok(Value::Map(BTreeMap::from([
        ("onnxruntime".to_owned(), Value::Text(services.onnxruntime_version()?)),
        ("provider".to_owned(), Value::Text(services.provider().arithmetic().to_owned())),
        ("numerics".to_owned(), Value::Text(numerics_class().to_owned())),
    ])))
}

/// The units of a stage that runs a model on its datasets: one per dataset, or per member of the model, member t on dataset t. Of the other
/// ports in `own`, a collection gives member t too.
pub(crate) fn units_by_dataset(
    params: &EvaluateParams,
    inputs: &[Connection],
    own: &[&str],
) -> Result<Vec<Unit>, Problem> {
    let tasks = params.tasks();
    let members_of = |port: &str| inputs.iter().find(|input| input.port == port)?.members.as_ref();
    let unit = |task: &str, member: Option<&str>| {
        let takes = inputs.iter().map(|input| {
            let member = match (input.port.as_str(), &input.members) {
                ("model", _) => member,
                (port, Some(members)) if own.contains(&port) => {
                    if !members.iter().any(|member| member == task) {
                        let message = format!("port `{port}` has no member `{task}`");
                        return Err(Problem::new("member-mismatch", message)
                            .help(format!("it has {}", members.join(", "))));
                    }
                    Some(task)
                }
                _ => None,
            };
            Ok(Take { port: input.port.clone(), member: member.map(str::to_owned) })
        });
        let takes = takes.collect::<Result<_, Problem>>()?;
        Ok(Unit { member: Some(task.to_owned()), part: None, takes })
    };
    let Some(members) = members_of("model") else {
        return tasks.map(|task| unit(task, None)).collect();
    };
    if let Some(member) = members.iter().find(|member| !params.dataset.contains_key(*member)) {
        let message = format!("there is no dataset for member `{member}`");
        let help = did_you_mean(member, tasks.collect::<Vec<_>>());
        return Err(Problem { help, ..Problem::new("missing-dataset", message) });
    }
    members.iter().map(|member| unit(member, Some(member))).collect()
}

/// The unit that scores one model on one dataset, against the baseline's member of that name.
fn unit(inputs: &[Connection], name: String, model: Option<&str>, task: &str) -> Result<Unit, Problem> {
    let takes = inputs.iter().map(|input| {
        let member = match (input.port.as_str(), &input.members) {
            ("model", _) => model,
            ("baseline", Some(members)) if members.iter().any(|member| member == task) => Some(task),
            ("baseline", Some(members)) => {
                return Err(Problem::new(
                    "member-mismatch",
                    format!("port `baseline` has no member `{task}`"),
                )
                .help(format!("it has {}", members.join(", "))));
            }
            _ => None,
        };
        Ok(Take { port: input.port.clone(), member: member.map(str::to_owned) })
    });
    Ok(Unit { member: Some(name), part: None, takes: takes.collect::<Result<_, _>>()? })
}
