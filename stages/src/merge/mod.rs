//! `merge`: base and task vectors into one checkpoint, or into one per task.
//!
//! A method is one file and one line in [`methods`]; [`method`] says what it is asked. Whatever it does, block by block or with whole tensors, the
//! [`driver`] streams the inputs and stores the result. Tensors that no task vector has (integer buffers, filtered names) are taken from the
//! base as they are.

mod activations;
mod aggregation;
mod driver;
mod inputs;
pub(crate) mod layers;
mod linear;
mod matrices;
mod method;
mod methods;
mod numbers;
mod parts;
mod pieces;
mod post;
mod ranges;
mod selection;
mod span;
mod statistics;
#[cfg(test)]
mod test_support;
mod variants;
mod weights;

use crate::diagnostics::{self, Diagnostics};
use crate::filter::NameFilter;
use crate::kind::{
    Arity, Connection, Content, MethodDoc, Port, Ports, SourceSet, Stage, StageKind, Take, Unit,
};
use crate::numerics::numerics_class;
use crate::params::{Params, Problem, one_map, to_value};
use crate::{Draft, Job, Services, StageError, evaluate};
use driver::Assigned;
use inputs::MergeInputs;
use merganser_cache::Value;
pub(crate) use method::Need;
use method::{Merge, Outcome};
use methods::METHODS;
pub use methods::{ADAPTATION, Adaptation, TunedTensor};
use post::Post;
use std::collections::BTreeMap;
use variants::Variants;

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
        name: "merged",
        doc: "θ_mt, of methods that localize a merge: another one than the sum of the task vectors",
        accepts: &[Content::Checkpoint],
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
    Port {
        name: "deltas",
        doc: "of `svd-hybrid`: the task vectors, only to measure the errors of what is made from their coefficients",
        accepts: &[Content::TaskVectors],
        arity: Arity::All,
        required: false,
    },
    Port {
        name: "origin",
        doc: "of `adamerging`: the checkpoint that `graph` was exported from: tells which tensor is which initializer",
        accepts: &[Content::Checkpoint],
        arity: Arity::All,
        required: false,
    },
    Port {
        name: "statistics",
        doc: "of `regmean` and `fisher`: what `calibrate` has found out about each fine-tuned model, member t about task t",
        accepts: &[Content::Statistics],
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
                schema: NameFilter::document(Post::document(Variants::document(method.schema()))),
            })
            .collect()
    }

    fn parse(&self, mut params: Params<'_>) -> Result<Box<dyn Stage>, Vec<Problem>> {
        let mut problems = Vec::new();
        let method = params
            .choose("method", METHODS, <dyn method::Method>::id, None)
            .map_err(|problem| problems.push(problem))
            .ok();
        let filter = NameFilter::take(&mut params).map_err(|found| problems.extend(found)).ok();
        let post = Post::take(&mut params).map_err(|found| problems.extend(found)).ok();
        let variants = method
            .and_then(|method| Variants::parse(method, params).map_err(|found| problems.extend(found)).ok());
        match (variants, filter, post) {
            (Some(variants), Some(filter), Some(post)) if problems.is_empty() => {
                Ok(Box::new(MergeStage { variants, filter, post }))
            }
            _ => Err(problems),
        }
    }
}

struct MergeStage {
    variants: Variants,
    filter: NameFilter,
    post: Post,
}

impl MergeStage {
    /// Refuses ports that the method does not read, and misses those that it needs.
    fn check_ports(&self, inputs: &[Connection]) -> Result<(), Problem> {
        let merge = self.variants.default();
        let id = self.variants.method.id();
        for (port, need) in [
            ("masks", merge.masks()),
            ("merged", merge.merged()),
            ("scores", merge.scores()),
            ("deltas", merge.deltas()),
            ("statistics", merge.statistics()),
            ("origin", merge.origin()),
        ] {
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
        if merge.is_joint() && self.variants.vary() {
            let message = format!(
                "method `{id}` merges all tensors together: it takes neither `rules` nor lists over the depth"
            );
            return Err(Problem::new("bad-value", message)
                .help("`only` and `skip` leave tensors as they are in the base"));
        }
        if !self.post.is_none()
            && (merge.outcome() == Outcome::PerTask || merge.vectors() != Content::TaskVectors)
        {
            let message =
                format!("`post` is for methods that merge task vectors into one checkpoint, not for `{id}`");
            return Err(Problem::new("bad-value", message));
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
        let is_odd = |input: &&Connection| {
            ["base", "merged", "origin"].contains(&input.port.as_str()) && input.members.is_some()
        };
        if let Some(input) = inputs.iter().find(is_odd) {
            let message = format!("port `{}` takes one checkpoint, not a collection", input.port);
            return Err(Problem::new("wrong-type", message));
        }
        self.check_ports(inputs)?;
        let vectors = inputs.iter().find(|input| input.port == "vectors");
        if let Some(members) = vectors.and_then(|vectors| vectors.members.as_ref()) {
            self.variants.all().try_for_each(|merge| {
                merge.weights().map_or(Ok(()), |weights| weights.check(members))?;
                merge.check(members)
            })?;
            for other in inputs.iter().filter(|input| ["masks", "statistics"].contains(&input.port.as_str()))
            {
                let lacking =
                    |names: &Vec<String>| members.iter().find(|name| !names.contains(name)).cloned();
                if let Some(name) = other.members.as_ref().and_then(lacking) {
                    let message = format!("port `{}` has no member `{name}`", other.port);
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
        // Another task's mask does not matter to a model, and where it is made from its own vector alone, nor does another task's vector.
        let is_own = self.variants.default().reads_own_vector();
        let narrowed = |member: &String| {
            let has_member =
                |input: &&Connection| input.members.as_ref().is_some_and(|members| members.contains(member));
            let own = |input: &Connection| {
                let port = input.port.as_str();
                let narrows = port == "masks" || is_own && ["vectors", "deltas"].contains(&port);
                let found = Some(input).filter(|_| narrows).filter(has_member);
                Take { port: input.port.clone(), member: found.map(|_| member.clone()) }
            };
            Unit { member: Some(member.clone()), part: None, takes: inputs.iter().map(own).collect() }
        };
        Ok(match (self.variants.default().outcome(), members) {
            (Outcome::PerTask, Some(members)) => members.iter().map(narrowed).collect(),
            _ => vec![Unit { member: None, part: None, takes }],
        })
    }

    fn parameters(&self, unit: &Unit) -> Result<Value, StageError> {
        let method = Value::map([("method", self.variants.method.id())]);
        let version = Value::map([("method_version", self.variants.default().version())]);
        let mut parts = vec![
            method,
            version,
            self.variants.parameters()?,
            to_value(&self.filter)?,
            self.post.parameters()?,
        ];
        if let (Outcome::PerTask, Some(member)) = (self.variants.default().outcome(), &unit.member) {
            parts.push(Value::map([("task", member.as_str())]));
        }
        Ok(one_map(parts))
    }

    fn holds_all_but_the_base(&self) -> bool {
        self.variants.default().stores_parts()
    }

    fn sources(&self, _: &Unit) -> Result<Vec<SourceSet>, StageError> {
        let mut sources: Vec<SourceSet> = Vec::new();
        for set in
            self.variants.all().map(Merge::sources).collect::<Result<Vec<_>, _>>()?.into_iter().flatten()
        {
            // The key and the job know a file by its parameter: one for all rules, or rules would read each other's.
            match sources.iter().find(|known| known.parameter == set.parameter) {
                None => sources.push(set),
                Some(known) if *known == set => {}
                Some(_) => {
                    let message = format!("the rules name different files for `{}`", set.parameter);
                    return Err(StageError::input_help(
                        message,
                        "give the numbers in a table, or one file for all",
                    ));
                }
            }
        }
        Ok(sources)
    }

    fn environment(&self, services: &Services) -> Result<Value, StageError> {
        if self.variants.default().runs_graphs() {
            return evaluate::environment(services);
        }
        if self.post.is_none() && !self.variants.all().any(Merge::multiplies_matrices) {
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
            let rule = merge.prepare(&inputs, &own).map_err(|error| inputs.name_the_culprit(error))?;
            rules.push(self.post.after(rule));
            for member in members {
                rule_of[*member] = position;
            }
        }
        let assigned: Vec<Assigned<'_>> = operands
            .iter()
            .zip(rule_of)
            .map(|(operand, rule)| Assigned { operand: operand.clone(), rule })
            .collect();
        let mut draft = driver::run(&inputs, &assigned, &rules)?;
        let mut diagnostics = Vec::new();
        for (position, rule) in rules.iter().enumerate() {
            let own: Vec<_> =
                assigned.iter().filter(|entry| entry.rule == position).map(|entry| &entry.operand).collect();
            diagnostics.extend(rule.diagnostics(&own)?);
            draft.blobs.extend(rule.blobs(job.staging)?);
        }
        if let Some(diagnostics) = Diagnostics::joined(diagnostics) {
            draft.blobs.push(diagnostics::write(job.staging, &diagnostics)?);
        }
        Ok(draft)
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
