//! Takes what one input adds out of a graph.
//!
//! Prompt encoders concatenate what follows from points with what follows from boxes. A prompt of points alone cannot be said to a graph that was
//! exported with both: an empty list of boxes is concatenated as undefined memory, because ONNX Runtime takes the size along the axis from an empty
//! tensor too, and any box would count. So the concatenation itself is changed; what computed the boxes stays, unused.

use std::collections::HashSet;

use prost::Message;

use crate::error::GraphError;
use crate::prepared::Prepared;
use crate::proto::{GraphProto, ModelProto};

impl Prepared {
    /// Returns the graph without what depends on input `dropped` where it is concatenated with what depends on input `kept`; `None` unless there is
    /// exactly one such place. All inputs remain and have to be given.
    pub fn detached(&self, dropped: &str, kept: &str) -> Result<Option<Self>, GraphError> {
        let mut model = ModelProto::decode(self.bytes())
            .map_err(|error| GraphError::NotOnnx { path: self.name().into(), reason: error.to_string() })?;
        let found = model.graph.as_mut().is_some_and(|graph| detach(graph, dropped, kept));
        Ok(found.then(|| self.with_bytes(model.encode_to_vec())))
    }
}

fn detach(graph: &mut GraphProto, dropped: &str, kept: &str) -> bool {
    let (of_dropped, of_kept) = (dependents(graph, dropped), dependents(graph, kept));
    let only_dropped = |value: &String| of_dropped.contains(value) && !of_kept.contains(value);
    let only_kept = |value: &String| of_kept.contains(value) && !of_dropped.contains(value);
    let mut joins = graph.node.iter_mut().filter(|node| {
        node.op_type() == "Concat" && node.input.iter().any(only_dropped) && node.input.iter().any(only_kept)
    });
    let (Some(join), None) = (joins.next(), joins.next()) else { return false };
    join.input.retain(|value| !only_dropped(value));
    true
}

/// The values that depend on an input other than by its shape. Nodes come in topological order, as ONNX demands.
fn dependents(graph: &GraphProto, input: &str) -> HashSet<String> {
    let mut dependents = HashSet::from([input.to_owned()]);
    for node in &graph.node {
        let takes_shape = matches!(node.op_type(), "Shape" | "Size");
        if !takes_shape && node.input.iter().any(|value| dependents.contains(value)) {
            dependents.extend(node.output.iter().cloned());
        }
    }
    dependents
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::NodeProto;

    fn node(op: &str, inputs: &[&str], output: &str) -> NodeProto {
        NodeProto {
            op_type: Some(op.to_owned()),
            input: inputs.iter().map(|&name| name.to_owned()).collect(),
            output: vec![output.to_owned()],
            ..NodeProto::default()
        }
    }

    fn prompts() -> GraphProto {
        let node = vec![
            node("Add", &["points", "half"], "p"),
            node("Mul", &["boxes", "scale"], "b"),
            // Shapes of both are put together too: that is no place where they are joined.
            node("Shape", &["points"], "ps"),
            node("Shape", &["boxes"], "bs"),
            node("Concat", &["ps", "bs"], "shapes"),
            node("Concat", &["tokens", "p", "b"], "sparse"),
            node("MatMul", &["sparse", "w"], "out"),
            node("Concat", &["out", "b"], "later"),
        ];
        GraphProto { node, ..GraphProto::default() }
    }

    #[test]
    fn the_dropped_part_is_taken_out_where_both_are_joined() {
        let mut graph = prompts();
        assert!(detach(&mut graph, "boxes", "points"));
        assert_eq!(graph.node[5].input, ["tokens", "p"]);
        assert_eq!(graph.node[4].input, ["ps", "bs"]);
        assert_eq!(graph.node[7].input, ["out", "b"]);
    }

    #[test]
    fn nothing_is_guessed_without_one_such_place() {
        let mut twice = prompts();
        twice.node.insert(6, node("Concat", &["b", "p"], "again"));
        assert!(!detach(&mut twice, "boxes", "points"));
        let mut never = prompts();
        never.node.remove(5);
        assert!(!detach(&mut never, "boxes", "points"));
    }
}
