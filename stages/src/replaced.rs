//! A model with values in memory in place of some of its own: what training, tuning and trials look at before anything is stored.

use merganser_tensors::source::read_computed_bytes;
use merganser_tensors::{DType, Result, Scratch, TensorInfo, TensorSource};
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;

pub(crate) struct Replaced {
    model: Arc<dyn TensorSource>,
    tensors: Vec<TensorInfo>,
    places: Vec<Place>,
}

/// Where the values of a tensor are.
enum Place {
    /// The position in the model.
    Model(usize),
    Memory(Vec<f32>),
}

impl Replaced {
    /// `values` are those of whole tensors, in row-major order; they count as F32. What the model does not have is left out.
    pub(crate) fn new(model: &Arc<dyn TensorSource>, mut values: BTreeMap<String, Vec<f32>>) -> Self {
        let tensors =
            model.tensors().iter().enumerate().map(|(position, info)| match values.remove(&info.name) {
                Some(values) => (TensorInfo { dtype: DType::F32, ..info.clone() }, Place::Memory(values)),
                None => (info.clone(), Place::Model(position)),
            });
        let (tensors, places) = tensors.unzip();
        Self { model: Arc::clone(model), tensors, places }
    }

    /// The same with tensors cut into others along their rows: by the name of each, the names and rows of its parts, from the first row on.
    pub(crate) fn split(self, parts: &HashMap<&str, Vec<(&str, usize)>>) -> Result<Self> {
        let Self { model, tensors, places } = self;
        let mut all = Vec::with_capacity(tensors.len());
        for (info, place) in tensors.into_iter().zip(places) {
            let Some(parts) = parts.get(info.name.as_str()) else {
                all.push((info, place));
                continue;
            };
            let values = match place {
                Place::Memory(values) => values,
                Place::Model(position) => {
                    let mut values = vec![0.0; info.n_elements()];
                    model.read_f32(position, 0..values.len(), &mut values, &mut Scratch::default())?;
                    values
                }
            };
            let per_row = values.len() / info.shape[0].max(1);
            let mut rest = values.as_slice();
            for &(name, n_rows) in parts {
                let (rows, after) = rest.split_at(per_row * n_rows);
                let shape = [n_rows].into_iter().chain(info.shape[1..].iter().copied()).collect();
                let part = TensorInfo { name: name.to_owned(), dtype: DType::F32, shape };
                all.push((part, Place::Memory(rows.to_vec())));
                rest = after;
            }
        }
        all.sort_by(|(a, _), (b, _)| a.name.cmp(&b.name));
        let (tensors, places) = all.into_iter().unzip();
        Ok(Self { model, tensors, places })
    }
}

impl TensorSource for Replaced {
    fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    fn read_f32(
        &self,
        tensor: usize,
        range: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        match &self.places[tensor] {
            Place::Memory(values) => out.copy_from_slice(&values[range]),
            Place::Model(position) => self.model.read_f32(*position, range, out, scratch)?,
        }
        Ok(())
    }

    fn read_bytes(
        &self,
        tensor: usize,
        range: Range<u64>,
        out: &mut [u8],
        scratch: &mut Scratch,
    ) -> Result<()> {
        match &self.places[tensor] {
            Place::Memory(_) => read_computed_bytes(self, tensor, range, out, scratch),
            Place::Model(position) => self.model.read_bytes(*position, range, out, scratch),
        }
    }

    fn stored_bytes(&self) -> u64 {
        0
    }

    fn check_unchanged(&self) -> Result<()> {
        self.model.check_unchanged()
    }
}
