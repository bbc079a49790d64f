//! `merge`: base and task vectors into one checkpoint, or into one per task.
//!
//! A method is one file and one line in [`METHODS`]; [`method`] says what it is asked. Whatever it does, block by block or with whole tensors, the
//! [`driver`] streams the inputs and stores the result. Tensors that no task vector has (integer buffers, filtered names) are taken from the
//! base as they are.

mod average;
mod breadcrumbs;
mod consensus;
mod dare;
mod della;
mod driver;
mod inputs;
mod karcher;
pub(crate) mod layers;
mod linear;
mod lines;
mod method;
mod model_stock;
mod pcb;
mod pieces;
mod ranges;
mod sce;
mod selection;
mod slerp;
mod span;
mod task_arithmetic;
mod ties;
mod variants;
mod weights;

use crate::filter::NameFilter;
use crate::kind::{
    Arity, Connection, Content, MethodDoc, Port, Ports, SourceSet, Stage, StageKind, Take, Unit,
};
use crate::numerics::numerics_class;
use crate::params::{Params, Problem, did_you_mean, one_map, to_value};
use crate::{Draft, Job, Services, StageError};
use driver::Assigned;
use inputs::MergeInputs;
use merganser_cache::Value;
use method::{Method, Need, Outcome};
use std::collections::BTreeMap;
use variants::Variants;

/// All methods, in the order in which they are listed.
const METHODS: &[&dyn Method] = &[
    &average::Average,
    &task_arithmetic::TaskArithmetic,
    &ties::Ties,
    &dare::Dare,
    &della::Della,
    &breadcrumbs::Breadcrumbs,
    &lines::Lines,
    &pcb::Pcb,
    &sce::Sce,
    &model_stock::ModelStock,
    &slerp::Slerp,
    &karcher::Karcher,
];

pub(crate) struct MergeKind;

const PORTS: &[Port] = &[
    Port {
        name: "base",
        doc: "θ₀, the checkpoint that the task vectors are added to",
        accepts: &[Content::Checkpoint],
        arity: Arity::All,
        required: true,
    },
    Port {
        name: "vectors",
        doc: "the task vectors, packed or not: a collection, or a single one; for `svd-hybrid`, their coefficients",
        accepts: &[Content::TaskVectors, Content::Coefficients],
        arity: Arity::All,
        required: true,
    },
    Port {
        name: "masks",
        doc: "which entries count, of methods that localize: one mask for all, or a collection, member t for task t",
        accepts: &[Content::Masks],
        arity: Arity::All,
        required: false,
    },
    Port {
        name: "scores",
        doc: "how good each task's model is, of weights by performance: an evaluation of the fine-tuned models",
        accepts: &[Content::Scores],
        arity: Arity::All,
        required: false,
    },
];

impl StageKind for MergeKind {
    fn id(&self) -> &'static str {
        "merge"
    }

    fn summary(&self) -> &'static str {
        "one checkpoint, or one per task, from a base and task vectors"
    }

    fn ports(&self) -> Ports {
        Ports { named: PORTS, open: None }
    }

    fn method_key(&self) -> Option<&'static str> {
        Some("method")
    }

    fn storage_port(&self) -> Option<&'static str> {
        Some("vectors")
    }

    fn methods(&self) -> Vec<MethodDoc> {
        METHODS
            .iter()
            .map(|method| MethodDoc {
                id: method.id(),
                summary: method.summary(),
                formula: method.formula(),
                source: method.source(),
                schema: NameFilter::document(Variants::document(method.schema())),
            })
            .collect()
    }

    fn parse(&self, mut params: Params<'_>) -> Result<Box<dyn Stage>, Vec<Problem>> {
        let mut problems = Vec::new();
        let known = METHODS.iter().map(|method| method.id());
        let method = match params.take_string("method") {
            None => {
                let help = did_you_mean("", known);
                problems.push(Problem {
                    help,
                    ..Problem::new("missing-key", "missing key `method`").at(params.span)
                });
                None
            }
            Some(Err(problem)) => {
                problems.push(problem);
                None
            }
            Some(Ok((id, span))) => {
                let found = METHODS.iter().find(|method| method.id() == id);
                if found.is_none() {
                    let help = did_you_mean(&id, known);
                    problems.push(Problem {
                        help,
                        ..Problem::new("unknown-method", format!("unknown method `{id}`")).at(span)
                    });
                }
                found
            }
        };
        let filter = NameFilter::take(&mut params).map_err(|found| problems.extend(found)).ok();
        let variants = method
            .and_then(|method| Variants::parse(*method, params).map_err(|found| problems.extend(found)).ok());
        match (variants, filter) {
            (Some(variants), Some(filter)) if problems.is_empty() => {
                Ok(Box::new(MergeStage { variants, filter }))
            }
            _ => Err(problems),
        }
    }
}

struct MergeStage {
    variants: Variants,
    filter: NameFilter,
}

impl MergeStage {
    /// Refuses ports that the method does not read, and misses those that it needs.
    fn check_ports(&self, inputs: &[Connection]) -> Result<(), Problem> {
        let merge = self.variants.default();
        let id = self.variants.method.id();
        for (port, need) in [("masks", merge.masks()), ("scores", merge.scores())] {
            let connected = inputs.iter().any(|input| input.port == port);
            if connected && need == Need::No {
                let message = format!("method `{id}` does not read port `{port}`");
                return Err(
                    Problem::new("unknown-port", message).help(format!("remove `{port}` from `from`"))
                );
            }
            if !connected && need == Need::Required {
                let message = format!("method `{id}` needs port `{port}`");
                return Err(Problem::new("missing-port", message));
            }
        }
        let Some(vectors) = inputs.iter().find(|input| input.port == "vectors") else { return Ok(()) };
        if vectors.content != merge.vectors() {
            let (expected, actual) = (merge.vectors().label(), vectors.content.label());
            let message = format!("method `{id}` merges {expected}, but port `vectors` holds {actual}");
            return Err(Problem::new("wrong-type", message));
        }
        Ok(())
    }
}

impl Stage for MergeStage {
    fn version(&self) -> u32 {
        1
    }

    fn output(&self, inputs: &[Connection]) -> Result<Content, Problem> {
        if inputs.iter().any(|input| input.port == "base" && input.members.is_some()) {
            return Err(Problem::new("wrong-type", "port `base` takes one checkpoint, not a collection"));
        }
        self.check_ports(inputs)?;
        let vectors = inputs.iter().find(|input| input.port == "vectors");
        if let Some(members) = vectors.and_then(|vectors| vectors.members.as_ref()) {
            self.variants.all().try_for_each(|merge| merge.check(members))?;
            for masks in inputs.iter().filter(|input| input.port == "masks") {
                let lacking =
                    |names: &Vec<String>| members.iter().find(|name| !names.contains(name)).cloned();
                if let Some(name) = masks.members.as_ref().and_then(lacking) {
                    let message = format!("port `masks` has no member `{name}`");
                    return Err(Problem::new("member-mismatch", message));
                }
            }
        }
        Ok(Content::Checkpoint)
    }

    fn units(&self, inputs: &[Connection], _: &Ports) -> Result<Vec<Unit>, Problem> {
        let takes: Vec<Take> =
            inputs.iter().map(|input| Take { port: input.port.clone(), member: None }).collect();
        let vectors = inputs.iter().find(|input| input.port == "vectors");
        let members = vectors.and_then(|vectors| vectors.members.as_ref());
        Ok(match (self.variants.default().outcome(), members) {
            (Outcome::PerTask, Some(members)) => members
                .iter()
                .map(|member| Unit { member: Some(member.clone()), takes: takes.clone() })
                .collect(),
            _ => vec![Unit { member: None, takes }],
        })
    }

    fn parameters(&self, unit: &Unit) -> Result<Value, StageError> {
        let method = Value::map([("method", self.variants.method.id())]);
        let version = Value::map([("method_version", self.variants.default().version())]);
        let mut parts = vec![method, version, self.variants.parameters()?, to_value(&self.filter)?];
        if let (Outcome::PerTask, Some(member)) = (self.variants.default().outcome(), &unit.member) {
            parts.push(Value::map([("task", member.as_str())]));
        }
        Ok(one_map(parts))
    }

    fn sources(&self, _: &Unit) -> Result<Vec<SourceSet>, StageError> {
        let mut sources = Vec::new();
        for merge in self.variants.all() {
            sources.extend(merge.sources()?);
        }
        Ok(sources)
    }

    fn environment(&self, _: &Services) -> Result<Value, StageError> {
        if !self.variants.all().any(method::Merge::multiplies_matrices) {
            return Ok(Value::Null);
        }
        let class = Value::Text(numerics_class().to_owned());
        Ok(Value::Map(BTreeMap::from([("numerics".to_owned(), class)])))
    }

    fn run(&self, job: &Job<'_>) -> Result<Draft, StageError> {
        let inputs = MergeInputs::open(job, self.variants.default())?;
        let operands = inputs.operands(&self.filter, self.variants.default().vectors());
        let names: Vec<&str> = operands.iter().map(inputs::Operand::name).collect();
        let n_layers = layers::count(inputs.base.tensors().iter().map(|info| info.name.as_str()));
        let groups = self.variants.assign(&names, n_layers)?;
        let mut rules = Vec::with_capacity(groups.len());
        let mut rule_of = vec![0; operands.len()];
        for (position, (merge, members)) in groups.iter().enumerate() {
            let own: Vec<_> = members.iter().map(|member| &operands[*member]).collect();
            rules.push(merge.prepare(&inputs, &own).map_err(|error| inputs.name_the_culprit(error))?);
            for member in members {
                rule_of[*member] = position;
            }
        }
        let assigned: Vec<Assigned<'_>> = operands
            .iter()
            .zip(rule_of)
            .map(|(operand, rule)| Assigned { operand: operand.clone(), rule })
            .collect();
        driver::run(&inputs, &assigned, &rules)
    }
}

#[cfg(test)]
mod golden_tests;
#[cfg(test)]
mod reference_tests;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Input, Suite, Tolerance, Workbench};
    use serde_json::json;

    #[test]
    fn method_ids_are_unique() {
        let mut ids: Vec<&str> = METHODS.iter().map(|method| method.id()).collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), METHODS.len());
    }

    #[test]
    fn element_wise_sums_equal_the_authors_values() {
        let Some(suite) = Suite::open("element_wise_sums_equal_the_authors_values") else { return };
        let tolerance = Tolerance { relative_l2: 1e-6, norm: 1e-6 };
        suite.check(&json!({ "method": "average" }), "basic", "weight_average", tolerance);
        for scale in [0.1, 0.2, 0.3] {
            let parameters = json!({ "method": "task-arithmetic", "scale": scale });
            suite.check(&parameters, "basic", &format!("task_arithmetic_{scale}"), tolerance);
        }
    }

    #[test]
    fn a_rule_changes_only_the_tensors_it_matches() {
        let bench = Workbench::new();
        let base = bench.checkpoint("base", &[("a.w", &[2], &[0.0, 0.0]), ("b.w", &[2], &[0.0, 0.0])]);
        let tuned = bench.checkpoint("tuned", &[("a.w", &[2], &[1.0, 2.0]), ("b.w", &[2], &[1.0, 2.0])]);
        let delta = bench.diff(base, tuned);
        let rules = json!([{ "match": "b.*", "scale": 2.0 }]);
        let merged = bench.one(
            "merge",
            &json!({ "method": "task-arithmetic", "scale": 0.5, "rules": rules }),
            &[Input::One("base", base), Input::One("vectors", delta)],
        );
        assert_eq!(bench.values(merged, "a.w"), [0.5, 1.0]);
        assert_eq!(bench.values(merged, "b.w"), [2.0, 4.0]);
    }
}
