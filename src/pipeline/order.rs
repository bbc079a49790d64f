//! Which stages come first: the graph of stages, before any instances exist.
//!
//! Unknown stages and circles are found here. A circle is reported once, by a shortest way through its first stage; its own
//! wires are then left out, so that everything else can still be ordered and looked at.

use super::document::StageTable;
use super::problems::Problems;
use super::stage::{Variant, Wire};
use merganser_stages::params::{Problem, did_you_mean};
use petgraph::algo::kosaraju_scc;
use petgraph::graph::{DiGraph, NodeIndex};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet, VecDeque};

/// A stage's variants as read.
pub(super) struct ReadStage<'a> {
    pub(super) table: &'a StageTable,
    pub(super) variants: Vec<Variant>,
    /// Whether it could not be read under any assignment, so that its instances are missing.
    pub(super) is_incomplete: bool,
}

/// Names of what has mistakes of its own that have been reported: nothing is concluded from them.
#[derive(Debug, Default)]
pub(super) struct Unreadable {
    pub(super) stages: HashSet<String>,
    pub(super) axes: HashSet<String>,
}

/// In which order stages are resolved.
pub(super) struct Order {
    /// Producers first.
    pub(super) stages: Vec<usize>,
    /// Per stage, the circle that it is part of.
    pub(super) component: Vec<Option<usize>>,
}

/// Orders the stages, stages of the file's order first; reports unknown stages and circles.
pub(super) fn order(
    stages: &[ReadStage<'_>],
    index: &HashMap<&str, usize>,
    unreadable: &Unreadable,
    problems: &mut Problems,
) -> Order {
    let mut graph = DiGraph::<usize, ()>::new();
    for stage in 0..stages.len() {
        graph.add_node(stage);
    }
    for (stage, read) in stages.iter().enumerate() {
        for wire in wires_of(read) {
            if let Some(&producer) = index.get(wire.reference.stage.as_str()) {
                graph.update_edge(NodeIndex::new(producer), NodeIndex::new(stage), ());
                continue;
            }
            if unreadable.stages.contains(&wire.reference.stage) {
                continue;
            }
            let message = format!("unknown stage `{}`", wire.reference.stage);
            let names =
                stages.iter().map(|other| other.table.name.as_str()).filter(|&name| name != read.table.name);
            let mut problem = Problem::new("unknown-stage", message).at(wire.span);
            problem.help = did_you_mean(&wire.reference.stage, names);
            problems.error(problem);
        }
    }
    let mut component = vec![None; stages.len()];
    // Not Tarjan's: petgraph's recurses, and a chain of stages can be as long as a file.
    for (id, members) in kosaraju_scc(&graph).into_iter().filter(|members| members.len() > 1).enumerate() {
        for member in &members {
            component[member.index()] = Some(id);
        }
        problems.error(circle(stages, index, &component, id));
    }
    let is_kept = |from: usize, to: usize| component[from].is_none() || component[from] != component[to];
    let mut waits_for = vec![0usize; stages.len()];
    for edge in graph.edge_indices() {
        let (from, to) = graph.edge_endpoints(edge).expect("the edge is of this graph");
        waits_for[to.index()] += usize::from(is_kept(from.index(), to.index()));
    }
    let mut ready: BinaryHeap<Reverse<usize>> =
        (0..stages.len()).filter(|&stage| waits_for[stage] == 0).map(Reverse).collect();
    let mut ordered = Vec::with_capacity(stages.len());
    while let Some(Reverse(stage)) = ready.pop() {
        ordered.push(stage);
        for consumer in
            graph.neighbors(NodeIndex::new(stage)).filter(|consumer| is_kept(stage, consumer.index()))
        {
            waits_for[consumer.index()] -= 1;
            if waits_for[consumer.index()] == 0 {
                ready.push(Reverse(consumer.index()));
            }
        }
    }
    Order { stages: ordered, component }
}

fn wires_of<'a>(stage: &'a ReadStage<'_>) -> impl Iterator<Item = &'a Wire> {
    stage.variants.iter().flat_map(|variant| &variant.bodies).flat_map(|body| &body.wires)
}

/// Stages that are named at either end of a long circle.
const SHOWN: usize = 6;

/// Describes a shortest circle through the first stage of a component.
fn circle(
    stages: &[ReadStage<'_>],
    index: &HashMap<&str, usize>,
    component: &[Option<usize>],
    id: usize,
) -> Problem {
    let producers = |stage: usize| {
        wires_of(&stages[stage])
            .filter_map(|wire| Some((*index.get(wire.reference.stage.as_str())?, wire.span)))
    };
    let start = component.iter().position(|&of| of == Some(id)).unwrap_or_default();
    let mut consumer_of: HashMap<usize, usize> = HashMap::new();
    let mut open = VecDeque::from([start]);
    'search: while let Some(stage) = open.pop_front() {
        for (producer, _) in producers(stage).filter(|(producer, _)| component[*producer] == Some(id)) {
            if producer == start {
                consumer_of.insert(start, stage);
                break 'search;
            }
            consumer_of.entry(producer).or_insert_with(|| {
                open.push_back(producer);
                stage
            });
        }
    }
    // Walked from the last to the first: `start` needs ... needs `start`.
    let mut path = vec![start];
    while let Some(&consumer) = path.last().and_then(|stage| consumer_of.get(stage)) {
        path.push(consumer);
        if consumer == start {
            break;
        }
    }
    path.reverse();
    let mut names: Vec<String> =
        path.iter().map(|&stage| format!("`{}`", stages[stage].table.name)).collect();
    if names.len() > 2 * SHOWN {
        let n_left_out = names.len() - 2 * SHOWN;
        names.splice(SHOWN..SHOWN + n_left_out, [format!("{n_left_out} more, the last of which")]);
    }
    let mut problem =
        Problem::new("cycle", format!("stages need each other in a circle: {}", names.join(" needs ")));
    problem.span = producers(start).find(|(producer, _)| path.get(1) == Some(producer)).map(|(_, span)| span);
    problem
}
