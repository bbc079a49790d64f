//! Which layers of a model get widths of their own, and which values of its graph are compared with the teacher's.

use super::params::{FeatureChoice, Features};
use crate::StageError;
use crate::filter::NameGlob;
use merganser_onnx::{How, Layout, Module, Slot, Source};
use std::collections::HashMap;
use std::ops::Range;

/// A layer with a width of its own: rows of a tensor of the checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct QuantizedLayer {
    /// The tensor's name without `.weight`; of a part of a fused projection with its letter.
    pub(super) name: String,
    pub(super) tensor: String,
    pub(super) rows: Range<usize>,
    pub(super) columns: usize,
}

/// What is compared: channels of some values of the graph, side by side.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Feature {
    pub(super) name: String,
    pub(super) pieces: Vec<Piece>,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Piece {
    pub(super) value: String,
    /// Where the channels lie; nothing: where values of that rank have them.
    pub(super) layout: Option<Layout>,
    /// Nothing takes all.
    pub(super) channels: Option<Range<usize>>,
}

/// A constant of the graph that is quantized: per channel of an axis, by the widths of layers.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct QuantizedConstant {
    pub(super) name: String,
    pub(super) axis: usize,
    /// Layers, each with how many channels of it follow.
    runs: Vec<(usize, usize)>,
}

/// Tensors that hold queries, keys and values one after the other.
const FUSED: &[&str] = &["qkv.", "in_proj_weight", "Wqkv."];

/// Finds the layers whose weights `admits` takes, in the order in which they are computed. `split` makes three of a fused projection.
pub(super) fn layers(
    modules: &[Module],
    shape: impl Fn(&str) -> Option<Vec<usize>>,
    admits: impl Fn(&str) -> bool,
    split: bool,
) -> Vec<QuantizedLayer> {
    let mut layers: Vec<QuantizedLayer> = Vec::new();
    for module in modules {
        let tensor = &module.weight.tensor;
        if layers.iter().any(|layer| layer.tensor == *tensor) || !admits(tensor) {
            continue;
        }
        let Some(shape) = shape(tensor).filter(|shape| shape.len() >= 2) else { continue };
        let (rows, columns) = (shape[0], shape[1..].iter().product());
        let name = tensor.strip_suffix(".weight").unwrap_or(tensor);
        let layer =
            |name: String, rows: Range<usize>| QuantizedLayer { name, tensor: tensor.clone(), rows, columns };
        if split && rows % 3 == 0 && FUSED.iter().any(|fused| tensor.contains(fused)) {
            let third = rows / 3;
            let parts = ["q", "k", "v"].into_iter().enumerate();
            layers.extend(parts.map(|(i, part)| layer(format!("{name}.{part}"), i * third..(i + 1) * third)));
        } else {
            layers.push(layer(name.to_owned(), 0..rows));
        }
    }
    layers
}

/// Finds what is compared. `values` gives the values of the graph that a name stands for.
pub(super) fn features(
    choice: &Features,
    layers: &[QuantizedLayer],
    modules: &[Module],
    values: impl Fn(&str) -> Result<Vec<String>, StageError>,
) -> Result<Vec<Feature>, StageError> {
    let of = |layers: &[&QuantizedLayer]| layers.iter().map(|layer| of_layer(layer, modules)).collect();
    let names = match choice {
        Features::First(n) => return Ok(of(&layers.iter().take(*n).collect::<Vec<_>>())),
        Features::Choice(FeatureChoice::All) => return Ok(of(&layers.iter().collect::<Vec<_>>())),
        Features::Named(names) => names,
    };
    let mut found: Vec<Feature> = Vec::new();
    for name in names {
        let glob = NameGlob::new(name).ok();
        let is_meant = |layer: &&QuantizedLayer| {
            glob.as_ref().is_some_and(|glob| glob.matches(&layer.name) || glob.matches(&layer.tensor))
        };
        let meant: Vec<&QuantizedLayer> = layers.iter().filter(is_meant).collect();
        let mut features: Vec<Feature> = of(&meant);
        if features.is_empty() {
            let pieces = values(name)?.into_iter().map(|value| Piece { value, layout: None, channels: None });
            let pieces: Vec<Piece> = pieces.take(1).collect();
            if pieces.is_empty() {
                let message = format!("`features`: there is no layer, node or value `{name}` in the graph");
                let known = layers.first().map(|layer| format!("layers have names as `{}`", layer.name));
                return Err(StageError::input_help(message, known.unwrap_or_default()));
            }
            features.push(Feature { name: name.clone(), pieces });
        }
        found.extend(
            features
                .into_iter()
                .filter(|new| found.iter().all(|old| old.name != new.name))
                .collect::<Vec<_>>(),
        );
    }
    Ok(found)
}

/// What a layer gives out, wherever the graph computes it.
fn of_layer(layer: &QuantizedLayer, modules: &[Module]) -> Feature {
    let mut before: HashMap<&str, usize> = HashMap::new();
    let mut pieces = Vec::new();
    let mut next = layer.rows.start;
    for module in modules {
        let start = before.entry(module.output.as_str()).or_default();
        let weight = &module.weight;
        let own = weight.first_row..weight.first_row + weight.n_rows;
        // A weight that is used twice is compared where it is used first.
        if weight.tensor == layer.tensor && own.contains(&next) && next < layer.rows.end {
            let end = own.end.min(layer.rows.end);
            let channels = *start + next - own.start..*start + end - own.start;
            let layout = Some(module.channels.clone());
            pieces.push(Piece { value: module.output.clone(), layout, channels: Some(channels) });
            next = end;
        }
        *start += weight.n_rows;
    }
    Feature { name: layer.name.clone(), pieces }
}

/// Says which channels of which constants of the graph belong to which layers.
pub(super) fn constants(
    slots: &[Slot],
    layers: &[QuantizedLayer],
    shape: impl Fn(&str) -> Option<Vec<usize>>,
) -> Result<Vec<QuantizedConstant>, StageError> {
    let mut constants = Vec::new();
    for slot in slots {
        if !slot.source.tensors().iter().any(|tensor| layers.iter().any(|layer| layer.tensor == *tensor)) {
            continue;
        }
        let refused = |reason: &str| {
            let tensors = slot.source.tensors().join("`, `");
            StageError::input_help(
                format!("the graph's constant `{}` holds `{tensors}`, {reason}", slot.name),
                "leave the layer out with `skip`, or export the graph with the layer on its own",
            )
        };
        let (axis, rows) = match &slot.source {
            Source::Tensor { how: How::Exp, .. } => {
                return Err(refused("and its exponential has no channels"));
            }
            Source::Tensor { name, how } => {
                let rows = shape(name).and_then(|shape| shape.first().copied()).unwrap_or_default();
                (usize::from(*how == How::Transposed), vec![(name.as_str(), 0..rows)])
            }
            Source::Rows { runs, transposed } => {
                let runs = runs.iter();
                let rows = runs.map(|run| (run.tensor.as_str(), run.first_row..run.first_row + run.n_rows));
                (usize::from(*transposed), rows.collect())
            }
        };
        let n: usize = rows.iter().map(|(_, rows)| rows.len()).sum();
        if slot.shape.get(axis) != Some(&n) {
            return Err(refused(&format!("whose {n} outputs are no axis of its shape {:?}", slot.shape)));
        }
        let mut runs = Vec::new();
        for (tensor, rows) in rows {
            let mut next = rows.start;
            while next < rows.end {
                let owner =
                    layers.iter().position(|layer| layer.tensor == tensor && layer.rows.contains(&next));
                let owner = owner.ok_or_else(|| refused(&format!("of which `{tensor}` is not quantized")))?;
                let end = rows.end.min(layers[owner].rows.end);
                runs.push((owner, end - next));
                next = end;
            }
        }
        constants.push(QuantizedConstant { name: slot.name.clone(), axis, runs });
    }
    Ok(constants)
}

impl QuantizedConstant {
    /// The number of channels.
    pub(super) fn n_channels(&self) -> usize {
        self.runs.iter().map(|(_, channels)| channels).sum()
    }

    /// The highest code of every channel, for these widths of layers.
    pub(super) fn levels(&self, bits: &[u8]) -> Vec<f32> {
        let level = |layer: usize| f32::from((1u16 << (bits[layer] - 1)) - 1);
        self.runs.iter().flat_map(|&(layer, n)| std::iter::repeat_n(level(layer), n)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use merganser_onnx::{FloatType, LinearUse, RowRun, Side};

    fn module(tensor: &str, first_row: usize, n_rows: usize, output: &str) -> Module {
        Module {
            weight: LinearUse {
                tensor: tensor.to_owned(),
                columns: 4,
                first_row,
                n_rows,
                inputs: Side::Columns,
                node: String::new(),
                activation: "x".to_owned(),
                layout: Layout::Last,
                output: output.to_owned(),
            },
            output: output.to_owned(),
            channels: Layout::Last,
            owns_activation: true,
        }
    }

    /// A fused projection in one product, a layer whose rows are computed in two places, and one beside it.
    fn modules() -> Vec<Module> {
        vec![
            module("a.qkv.weight", 0, 6, "qkv"),
            module("a.proj.weight", 0, 2, "first"),
            module("b.fc.weight", 0, 5, "first"),
            module("a.proj.weight", 2, 2, "second"),
        ]
    }

    #[expect(clippy::unnecessary_wraps, reason = "what a model answers")]
    fn shape(tensor: &str) -> Option<Vec<usize>> {
        let rows = modules().iter().filter(|m| m.weight.tensor == tensor).map(|m| m.weight.n_rows).sum();
        Some(vec![rows, 4])
    }

    fn all(split: bool) -> Vec<QuantizedLayer> {
        layers(&modules(), shape, |_| true, split)
    }

    fn named(choice: &Features) -> Vec<Feature> {
        features(choice, &all(true), &modules(), |name| Ok(vec![format!("{name}:0")])).unwrap()
    }

    fn pieces(feature: &Feature) -> Vec<(&str, Range<usize>)> {
        let pieces = feature.pieces.iter();
        pieces.map(|piece| (piece.value.as_str(), piece.channels.clone().unwrap())).collect()
    }

    #[test]
    fn a_fused_projection_is_one_layer_or_three() {
        let told = |split: bool| -> Vec<(String, Range<usize>)> {
            all(split).into_iter().map(|layer| (layer.name, layer.rows)).collect()
        };
        let rest = [("a.proj".to_owned(), 0..4), ("b.fc".to_owned(), 0..5)];
        let whole = [("a.qkv".to_owned(), 0..6)];
        assert_eq!(told(false), [&whole[..], &rest].concat());
        let parts = [("a.qkv.q", 0..2), ("a.qkv.k", 2..4), ("a.qkv.v", 4..6)];
        let parts = parts.map(|(name, rows)| (name.to_owned(), rows));
        assert_eq!(told(true), [&parts[..], &rest].concat());
        let without = layers(&modules(), shape, |tensor| !tensor.starts_with("a."), true);
        assert_eq!(without.len(), 1);
    }

    #[test]
    fn features_are_the_channels_of_layers() {
        let found = named(&Features::Choice(FeatureChoice::All));
        let names: Vec<&str> = found.iter().map(|feature| feature.name.as_str()).collect();
        assert_eq!(names, ["a.qkv.q", "a.qkv.k", "a.qkv.v", "a.proj", "b.fc"]);
        assert_eq!(pieces(&found[1]), [("qkv", 2..4)]);
        // Computed in two places, beside another layer in the first.
        assert_eq!(pieces(&found[3]), [("first", 0..2), ("second", 0..2)]);
        assert_eq!(pieces(&found[4]), [("first", 2..7)]);
        assert_eq!(named(&Features::First(2)), found[..2]);
    }

    #[test]
    fn features_are_chosen_by_name() {
        let names = |names: &[&str]| -> Vec<String> {
            let choice = Features::Named(names.iter().map(|&name| name.to_owned()).collect());
            named(&choice).into_iter().map(|feature| feature.name).collect()
        };
        assert_eq!(names(&["b.*", "a.qkv*", "b.fc"]), ["b.fc", "a.qkv.q", "a.qkv.k", "a.qkv.v"]);
        let found = named(&Features::Named(vec!["/norm/Add".to_owned()]));
        let piece = Piece { value: "/norm/Add:0".to_owned(), layout: None, channels: None };
        assert_eq!(found[0].pieces, [piece]);
        let choice = Features::Named(vec!["nothing".to_owned()]);
        let error = features(&choice, &all(false), &modules(), |_| Ok(Vec::new())).unwrap_err();
        assert_eq!(error.to_string(), "`features`: there is no layer, node or value `nothing` in the graph");
    }

    fn slot(name: &str, shape: &[usize], source: Source) -> Slot {
        Slot { name: name.to_owned(), shape: shape.to_vec(), element: FloatType::F32, source }
    }

    fn whole(tensor: &str, how: How) -> Source {
        Source::Tensor { name: tensor.to_owned(), how }
    }

    fn rows(runs: &[(&str, usize, usize)], transposed: bool) -> Source {
        let run = |&(tensor, first_row, n_rows): &(&str, usize, usize)| RowRun {
            tensor: tensor.to_owned(),
            first_row,
            n_rows,
        };
        Source::Rows { runs: runs.iter().map(run).collect(), transposed }
    }

    #[test]
    fn every_channel_has_the_levels_of_its_layer() {
        let slots = [
            slot("matmul", &[4, 6], whole("a.qkv.weight", How::Transposed)),
            slot("other", &[7], whole("a.norm.weight", How::SameBytes)),
            slot("part", &[5, 4], rows(&[("a.qkv.weight", 3, 3), ("a.proj.weight", 0, 2)], false)),
        ];
        let found = constants(&slots, &all(true), shape).unwrap();
        let bits = [2, 3, 4, 8, 5];
        assert_eq!((found[0].name.as_str(), found[0].axis, found[0].n_channels()), ("matmul", 1, 6));
        assert_eq!(found[0].levels(&bits), [1.0, 1.0, 3.0, 3.0, 7.0, 7.0]);
        assert_eq!((found[1].name.as_str(), found[1].axis), ("part", 0));
        assert_eq!(found[1].levels(&bits), [3.0, 7.0, 7.0, 127.0, 127.0]);
    }

    #[test]
    fn constants_that_cannot_be_quantized_by_channels_are_named() {
        let of = |slot: Slot, layers: &[QuantizedLayer]| {
            constants(&[slot], layers, shape).unwrap_err().to_string()
        };
        let odd = slot("odd", &[3, 8], whole("a.qkv.weight", How::Reshaped));
        let error = of(odd, &all(false));
        assert_eq!(
            error,
            "the graph's constant `odd` holds `a.qkv.weight`, whose 6 outputs are no axis of its shape [3, 8]"
        );
        let mixed = slot("mixed", &[11, 4], rows(&[("a.qkv.weight", 0, 6), ("b.fc.weight", 0, 5)], false));
        let error = of(mixed, &layers(&modules(), shape, |tensor| tensor.starts_with("a."), false));
        assert!(error.ends_with("of which `b.fc.weight` is not quantized"), "{error}");
    }
}
