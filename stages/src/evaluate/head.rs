//! Classification heads as files hold them: plain matrices, CLIP heads, the classifiers of transformers and timm.
//!
//! Tensors are read by name; pickled modules are read, never executed. A model's whole checkpoint will do: only the classifier's tensors
//! are read.

use crate::images::head::{Head, HeadError};
use crate::job::JobSource;
use crate::{Job, StageError, checkpoint};
use checkpoint::SmallTensor;
use merganser_tensors::TensorInfo;
use ndarray::{Array1, Array2};
use std::collections::HashMap;
use std::path::Path;

/// Where a file keeps its classifier.
struct Layout {
    /// What stands before `weight` and `bias`; of a distilled model two of them, for the class token and the distillation token.
    prefixes: &'static [&'static str],
    /// Whether features are normalized before it unless the user says otherwise.
    normalize: bool,
}

/// The layouts, in the order in which they are looked for: a distilled model's names include those of a plain one.
const LAYOUTS: [Layout; 8] = [
    // CLIP heads: `ClassificationHead` of the task-vector literature, and what `head` files usually are
    Layout { prefixes: &[""], normalize: true },
    Layout { prefixes: &["classification_head."], normalize: true },
    // transformers: DeiTForImageClassificationWithTeacher, ViTForImageClassification
    Layout { prefixes: &["cls_classifier.", "distillation_classifier."], normalize: false },
    Layout { prefixes: &["classifier."], normalize: false },
    // timm: distilled and plain
    Layout { prefixes: &["head.", "head_dist."], normalize: false },
    Layout { prefixes: &["head."], normalize: false },
    Layout { prefixes: &["head.fc."], normalize: false },
    Layout { prefixes: &["fc."], normalize: false },
];

/// Reads the head in a file. `normalize` is what the user says about it.
pub(super) fn read(
    job: &Job<'_>,
    source: &JobSource,
    normalize: Option<bool>,
) -> Result<Vec<Head>, StageError> {
    let is_head = |info: &TensorInfo| {
        LAYOUTS.iter().flat_map(|layout| layout.prefixes).any(|prefix| {
            info.name.strip_prefix(prefix).is_some_and(|rest| ["weight", "bias"].contains(&rest))
        })
    };
    let file = source.path.display();
    let mut tensors = checkpoint::read_small(job, source, &is_head)?;
    if tensors.is_empty() {
        tensors = bare_matrix(job, source)?;
    }
    let found = LAYOUTS
        .iter()
        .find(|layout| layout.prefixes.iter().all(|prefix| tensors.contains_key(&format!("{prefix}weight"))));
    let layout = found.ok_or_else(|| {
        StageError::input_help(
            format!("head `{file}` has no tensor `weight`, nor one of a known classifier"),
            "a head is `weight` [classes, features] and optionally `bias` [classes]; also `classifier.…` or `head.…` as transformers and timm name them",
        )
    })?;
    let normalize = normalize.unwrap_or(layout.normalize);
    let heads = layout.prefixes.iter().map(|prefix| linear(&mut tensors, prefix, &source.path, normalize));
    let heads: Vec<Head> = heads.collect::<Result<_, _>>()?;
    if let [first, second] = heads.as_slice()
        && (first.classes(), first.features()) != (second.classes(), second.features())
    {
        return Err(StageError::input(format!(
            "the two heads of `{file}` do not fit each other: {} classes of {} features, and {} of {}",
            first.classes(),
            first.features(),
            second.classes(),
            second.features()
        )));
    }
    Ok(heads)
}

/// The only matrix of a file that holds nothing else, whatever it is called: `torch.save` of a tensor has no name to give.
fn bare_matrix(job: &Job<'_>, source: &JobSource) -> Result<HashMap<String, SmallTensor>, StageError> {
    let only = checkpoint::sole_tensor(&source.path)?;
    match only {
        Some(info) if info.shape.len() == 2 => {
            let mut tensors = checkpoint::read_small(job, source, &|other| other.name == info.name)?;
            let matrix = tensors.remove(&info.name);
            Ok(matrix.map(|matrix| ("weight".to_owned(), matrix)).into_iter().collect())
        }
        _ => Ok(HashMap::new()),
    }
}

fn linear(
    tensors: &mut HashMap<String, SmallTensor>,
    prefix: &str,
    path: &Path,
    normalize: bool,
) -> Result<Head, StageError> {
    let file = path.display();
    let (weight_name, bias_name) = (format!("{prefix}weight"), format!("{prefix}bias"));
    let weight = tensors
        .remove(&weight_name)
        .ok_or_else(|| StageError::Internal(format!("`{weight_name}` was there before")))?;
    let &[classes, features] = weight.shape.as_slice() else {
        return Err(StageError::input(format!(
            "tensor `{weight_name}` of head `{file}` has shape {:?}, expected [classes, features]",
            weight.shape
        )));
    };
    let bias = match tensors.remove(&bias_name) {
        Some(bias) if bias.shape == [classes] => Array1::from_vec(bias.values),
        Some(bias) => {
            return Err(StageError::input(format!(
                "tensor `{bias_name}` of head `{file}` has shape {:?}, expected [{classes}]",
                bias.shape
            )));
        }
        None => Array1::zeros(classes),
    };
    let weight = Array2::from_shape_vec((classes, features), weight.values)
        .map_err(|error| StageError::Internal(error.to_string()))?;
    Head::new(weight, bias, normalize).map_err(|error| misfit(&file.to_string(), &error))
}

/// What is wrong with a head, and which one it is.
pub(super) fn misfit(head: &str, error: &HeadError) -> StageError {
    StageError::input(format!("`{head}`: {error}"))
}
