//! What the names in a graph say about where a constant comes from.
//!
//! Names only ever choose between candidates of equal content; they never bind on their own.

/// Returns how well a graph's name fits a checkpoint tensor's: nothing, or the number of characters that agree.
///
/// Names agree when one ends with the other at a dot: exporters wrap models in modules (`model.visual.proj`), and
/// checkpoints are saved with and without such a prefix. The longest agreement is the best one.
pub(crate) fn agreement(graph_name: &str, checkpoint_name: &str) -> Option<usize> {
    let (long, short) = if graph_name.len() >= checkpoint_name.len() {
        (graph_name, checkpoint_name)
    } else {
        (checkpoint_name, graph_name)
    };
    let rest = long.strip_suffix(short)?;
    // An exact name beats any wrapped one.
    let score = if rest.is_empty() { usize::MAX } else { short.len() };
    (!short.is_empty() && (rest.is_empty() || rest.ends_with('.'))).then_some(score)
}

/// Returns the candidate whose name fits best, unless two fit equally well.
pub(crate) fn best_by_name<'a>(
    graph_name: &str,
    candidates: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    unique_best(candidates.into_iter().filter_map(|c| Some((agreement(graph_name, c)?, c))))
}

/// Returns the candidate that belongs to the module in which a node lies, unless several do.
///
/// The TorchScript exporter names nodes after modules: `/vision_model/encoder/layers.0/mlp/fc1/MatMul` consumes
/// a tensor of `vision_model.encoder.layers.0.mlp.fc1`.
pub(crate) fn best_by_module<'a>(nodes: &[String], candidates: &[&'a str]) -> Option<&'a str> {
    let modules: Vec<String> = nodes.iter().filter_map(|n| module_of_node(n)).collect();
    unique_best(candidates.iter().filter_map(|&c| {
        let (module, _) = c.rsplit_once('.')?;
        modules.iter().filter_map(|m| agreement(m, module)).max().map(|score| (score, c))
    }))
}

fn module_of_node(node: &str) -> Option<String> {
    let (path, _) = node.strip_prefix('/')?.rsplit_once('/')?;
    Some(path.replace('/', "."))
}

fn unique_best<'a>(scored: impl Iterator<Item = (usize, &'a str)>) -> Option<&'a str> {
    let mut best: Option<(usize, &str)> = None;
    let mut tied = false;
    for (score, candidate) in scored {
        match best {
            Some((s, c)) if s > score || c == candidate => {}
            Some((s, _)) if s == score => tied = true,
            _ => (best, tied) = (Some((score, candidate)), false),
        }
    }
    best.filter(|_| !tied).map(|(_, c)| c)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_agree_at_dots_only() {
        assert_eq!(agreement("a.b.weight", "a.b.weight"), Some(usize::MAX));
        assert_eq!(agreement("model.b.weight", "b.weight"), Some(8));
        assert_eq!(agreement("b.weight", "model.b.weight"), Some(8));
        assert_eq!(agreement("model.bb.weight", "b.weight"), None);
        assert_eq!(agreement("onnx::MatMul_12", "weight"), None);
        assert_eq!(agreement("", ""), None);
    }

    #[test]
    fn the_longest_agreement_wins_and_a_tie_does_not() {
        let names = ["proj.weight", "attn.proj.weight", "mlp.proj.weight"];
        assert_eq!(best_by_name("m.attn.proj.weight", names), Some("attn.proj.weight"));
        assert_eq!(best_by_name("weight", names), None);
        assert_eq!(best_by_name("other", names), None);
    }

    #[test]
    fn a_node_names_its_module() {
        let nodes = ["/m/layers.0/k_proj/MatMul".to_owned()];
        let candidates = ["layers.0.k_proj.weight", "layers.0.q_proj.weight", "layers.1.k_proj.weight"];
        assert_eq!(best_by_module(&nodes, &candidates), Some("layers.0.k_proj.weight"));
        assert_eq!(best_by_module(&["node_linear_3".to_owned()], &candidates), None);
    }
}
