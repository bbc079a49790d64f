//! Depth: which layer a tensor belongs to, read from its name.

/// Words before a layer's number, in the families of models that this tool knows.
const CONTAINERS: [&str; 6] = ["layers", "layer", "resblocks", "blocks", "block", "h"];

/// Parts of names of tensors that come before the first layer.
const BEFORE: [&str; 7] =
    ["embed", "conv1", "ln_pre", "pre_layrnorm", "pre_layernorm", "cls_token", "dist_token"];

/// The number of the layer in a name such as `vision_model.encoder.layers.3.mlp.fc1.weight`, or none.
pub(crate) fn layer_of(name: &str) -> Option<usize> {
    let parts: Vec<&str> = name.split('.').collect();
    parts.windows(2).find(|pair| CONTAINERS.contains(&pair[0])).and_then(|pair| pair[1].parse().ok())
}

/// The number of layers among `names`: one more than the largest number.
pub(crate) fn count<'a>(names: impl Iterator<Item = &'a str>) -> usize {
    names.filter_map(layer_of).max().map_or(0, |last| last + 1)
}

/// Where a tensor lies between the first layer (0) and the last (1). What comes before the layers (embeddings) is at 0, what comes
/// after them (final norms, heads) at 1.
pub(crate) fn depth(name: &str, n_layers: usize) -> f64 {
    match layer_of(name) {
        Some(layer) if n_layers > 1 => layer as f64 / (n_layers - 1) as f64,
        Some(_) => 0.0,
        None if BEFORE.iter().any(|part| name.contains(part)) => 0.0,
        None => 1.0,
    }
}

/// The value at `depth` of points that are spread evenly over the depth.
pub(crate) fn interpolate(points: &[f64], depth: f64) -> f64 {
    let Some(last) = points.len().checked_sub(1) else { return f64::NAN };
    let place = depth.clamp(0.0, 1.0) * last as f64;
    let low = (place.floor() as usize).min(last);
    let high = (low + 1).min(last);
    let part = place - low as f64;
    points[low] + (points[high] - points[low]) * part
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_found_in_the_names_of_every_family() {
        for (name, layer) in [
            ("vision_model.encoder.layers.3.mlp.fc1.weight", Some(3)),
            ("model.visual.transformer.resblocks.11.attn.in_proj_weight", Some(11)),
            ("blocks.0.attn.qkv.weight", Some(0)),
            ("encoder.layer.7.output.dense.bias", Some(7)),
            ("visual_projection.weight", None),
            ("vision_model.embeddings.class_embedding", None),
        ] {
            assert_eq!(layer_of(name), layer, "{name}");
        }
        assert_eq!(count(["blocks.0.x", "blocks.5.x", "norm"].into_iter()), 6);
        assert_eq!(count(["norm"].into_iter()), 0);
    }

    #[test]
    fn depth_runs_from_the_embeddings_to_the_head() {
        assert_eq!(depth("vision_model.embeddings.patch_embedding.weight", 12), 0.0);
        assert_eq!(depth("blocks.0.x", 12), 0.0);
        assert_eq!(depth("blocks.11.x", 12), 1.0);
        assert_eq!(depth("blocks.0.x", 1), 0.0);
        assert_eq!(depth("vision_model.post_layernorm.weight", 12), 1.0);
    }

    #[test]
    fn interpolation_is_linear_between_evenly_spread_points() {
        assert_eq!(interpolate(&[0.3], 0.7), 0.3);
        assert_eq!(interpolate(&[0.0, 1.0], 0.25), 0.25);
        assert_eq!(interpolate(&[0.0, 1.0, 0.0], 0.5), 1.0);
        assert_eq!(interpolate(&[0.0, 1.0, 0.0], 0.75), 0.5);
        assert_eq!(interpolate(&[0.0, 1.0, 0.5], 1.0), 0.5);
    }
}
