//! `combine`: arithmetic on task vectors, as views that copy nothing.
//!
//! Each port holds a task vector or a collection of them; the result is Σ scale·τ over the ports, member by member: scaling, adding,
//! negating (forgetting a task) and analogies (c + b − a) are choices of ports and scales. With `reduce = true` the members of the
//! collections are added up too.

use crate::filter::NameFilter;
use crate::kind::{
    Arity, Connection, Content, MethodDoc, Port, Ports, Stage, StageKind, Take, Unit, per_member,
};
use crate::params::{Params, Problem, one_map, parse, to_value};
use crate::{Draft, Job, JobInput, StageError, checkpoint};
use indexmap::IndexMap;
use merganser_cache::Value;
use merganser_tensors::manifest::{self, Term};
use merganser_tensors::{DType, Manifest, TensorInfo};
use schemars::{JsonSchema, schema_for};
use serde::{Deserialize, Serialize};

pub(crate) struct Combine;

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct CombineParams {
    /// Factor per port (default 1): `{ a = 1.0, b = -1.0 }`.
    #[serde(default)]
    scale: IndexMap<String, f64>,
    /// Whether the members of the collections are added up into one task vector.
    #[serde(default)]
    reduce: bool,
    /// Factor per member when reducing (default 1); members that are not named keep theirs.
    #[serde(default)]
    weights: IndexMap<String, f64>,
}

const VECTORS: Port = Port {
    name: "vectors",
    doc: "task vectors, under any port name",
    accepts: &[Content::TaskVectors],
    arity: Arity::PerMember,
    required: false,
};

const PORTS: &[Port] = &[VECTORS];

impl StageKind for Combine {
    fn id(&self) -> &'static str {
        "combine"
    }

    fn summary(&self) -> &'static str {
        "task-vector arithmetic: scale, add, subtract, negate, analogy"
    }

    fn ports(&self) -> Ports {
        Ports { named: PORTS, open: Some(&VECTORS) }
    }

    fn methods(&self) -> Vec<MethodDoc> {
        vec![MethodDoc {
            id: "combine",
            summary: self.summary(),
            formula: "τ = Σ_port scale_port · τ_port, in f32, in the order of the ports",
            source: "Ilharco et al., Editing Models with Task Arithmetic, arXiv:2212.04089, §3–5",
            schema: NameFilter::document(schema_for!(CombineParams)),
        }]
    }

    fn parse(&self, mut params: Params<'_>) -> Result<Box<dyn Stage>, Vec<Problem>> {
        let filter = NameFilter::take(&mut params);
        match (filter, parse(&params)) {
            (Ok(filter), Ok(params)) => Ok(Box::new(CombineStage { params, filter })),
            (filter, parsed) => Err(filter.err().into_iter().chain(parsed.err()).flatten().collect()),
        }
    }
}

struct CombineStage {
    params: CombineParams,
    filter: NameFilter,
}

impl CombineStage {
    fn coefficient(&self, input: &JobInput) -> f64 {
        let scale = self.params.scale.get(&input.port).copied().unwrap_or(1.0);
        let member = input.member.as_ref().filter(|_| self.params.reduce);
        scale * member.and_then(|name| self.params.weights.get(name)).copied().unwrap_or(1.0)
    }
}

impl Stage for CombineStage {
    fn version(&self) -> u32 {
        1
    }

    fn output(&self, inputs: &[Connection]) -> Result<Content, Problem> {
        if inputs.is_empty() {
            return Err(Problem::new("missing-port", "`combine` needs at least one task vector in `from`"));
        }
        let ports: Vec<&str> = inputs.iter().map(|input| input.port.as_str()).collect();
        if let Some(unknown) = self.params.scale.keys().find(|name| !ports.contains(&name.as_str())) {
            return Err(Problem::new(
                "unknown-port",
                format!("`scale` names port `{unknown}`, which is not in `from`"),
            )
            .help(format!("`from` connects {}", ports.join(", "))));
        }
        let members: Vec<&str> =
            inputs.iter().filter_map(|input| input.members.as_ref()).flatten().map(String::as_str).collect();
        if !self.params.reduce && !self.params.weights.is_empty() {
            return Err(Problem::new("bad-value", "`weights` are per member and need `reduce = true`"));
        }
        if let Some(unknown) = self.params.weights.keys().find(|name| !members.contains(&name.as_str())) {
            return Err(Problem::new(
                "unknown-member",
                format!("`weights` names `{unknown}`, which no port has"),
            )
            .help(format!("members are {}", members.join(", "))));
        }
        let all = self.params.scale.values().chain(self.params.weights.values());
        if let Some(bad) = all.into_iter().find(|value| !value.is_finite()) {
            return Err(Problem::new("bad-value", format!("a factor must be finite, got {bad}")));
        }
        Ok(Content::TaskVectors)
    }

    fn units(&self, inputs: &[Connection], ports: &Ports) -> Result<Vec<Unit>, Problem> {
        if self.params.reduce {
            let takes = inputs.iter().map(|input| Take { port: input.port.clone(), member: None }).collect();
            return Ok(vec![Unit { member: None, part: None, takes }]);
        }
        per_member(inputs, ports)
    }

    fn parameters(&self, _: &Unit) -> Result<Value, StageError> {
        Ok(one_map([to_value(&self.params)?, to_value(&self.filter)?]))
    }

    fn run(&self, job: &Job<'_>) -> Result<Draft, StageError> {
        let mut terms = Vec::with_capacity(job.inputs.len());
        let mut tensors: Option<Vec<TensorInfo>> = None;
        for input in &job.inputs {
            terms.push(Term::new(self.coefficient(input), input.artifact));
            let manifest = job.files.manifest(&input.artifact)?;
            let admitted = manifest.tensors().iter().filter(|tensor| self.filter.admits(&tensor.name));
            let found = admitted.map(|tensor| TensorInfo { dtype: DType::F32, ..tensor.info() }).collect();
            let first = tensors.get_or_insert_with(|| Vec::clone(&found));
            if *first != found {
                return Err(StageError::input(format!(
                    "the task vectors on port `{}` do not have the tensors and shapes of those on `{}`",
                    input.port, job.inputs[0].port
                )));
            }
        }
        let tensors =
            tensors.ok_or_else(|| StageError::Internal("no task vector is connected".to_owned()))?;
        Ok(checkpoint::view(&Manifest::linear(manifest::Content::TaskVectors, tensors, terms)?))
    }
}
