//! A base plus the masked entries of a vector: the model of one task, where tasks share a vector and each has a mask.
//!
//! `x = base + scale·(vector·mask)` in `f32`, each operation rounded, in this order. Blocks of the three artifacts have the range that was
//! asked for, so the caller's working memory serves all of them.

use std::ops::Range;
use std::sync::Arc;

use crate::DType;
use crate::dtype::TensorInfo;
use crate::error::Result;
use crate::scratch::Scratch;
use crate::source::{TensorSource, check_range, read_computed_bytes};

/// A masked view over opened artifacts.
pub(crate) struct MaskedSource {
    infos: Vec<TensorInfo>,
    tensors: Vec<Tensor>,
    base: Arc<dyn TensorSource>,
    vector: Arc<dyn TensorSource>,
    mask: Arc<dyn TensorSource>,
}

/// Where a tensor lies in each artifact.
struct Tensor {
    base: usize,
    /// None: the tensor is the base's.
    vector: Option<usize>,
    /// None: all entries.
    mask: Option<usize>,
    scale: f32,
}

impl MaskedSource {
    /// Looks up and checks every tensor in base, vector and mask. The error says what does not fit, without the tensor's name.
    pub(crate) fn new(
        infos: Vec<TensorInfo>,
        scales: &[f32],
        [base, vector, mask]: [Arc<dyn TensorSource>; 3],
    ) -> Result<Self, (usize, String)> {
        let mut tensors = Vec::with_capacity(infos.len());
        for (index, (info, scale)) in infos.iter().zip(scales).enumerate() {
            let refused = |reason| (index, reason);
            let find = |what: &str, source: &dyn TensorSource| {
                let Some(found) = source.index_of(&info.name) else { return Ok(None) };
                let other = &source.tensors()[found];
                if other.shape != info.shape {
                    return Err(refused(format!(
                        "it has shape {:?}, and {:?} in the {what}",
                        info.shape, other.shape
                    )));
                }
                Ok(Some(found))
            };
            let Some(position) = find("base", &*base)? else {
                return Err(refused("the base lacks it".to_owned()));
            };
            let found = find("vector", &*vector)?;
            let masked = if found.is_some() { find("mask", &*mask)? } else { None };
            let expected = if found.is_some() { DType::F32 } else { base.tensors()[position].dtype };
            if info.dtype != expected {
                return Err(refused(format!("it is {}, expected {expected}", info.dtype)));
            }
            let operands = [(&base, Some(position)), (&vector, found), (&mask, masked)];
            if found.is_some()
                && let Some(dtype) = operands
                    .into_iter()
                    .filter_map(|(source, tensor)| Some(source.tensors()[tensor?].dtype))
                    .find(|dtype| !dtype.is_float())
            {
                return Err(refused(format!("it is made from {dtype} values")));
            }
            tensors.push(Tensor { base: position, vector: found, mask: masked, scale: *scale });
        }
        Ok(Self { infos, tensors, base, vector, mask })
    }
}

impl TensorSource for MaskedSource {
    fn tensors(&self) -> &[TensorInfo] {
        &self.infos
    }

    fn read_f32(
        &self,
        tensor: usize,
        range: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        check_range(&self.infos[tensor], &range, out.len())?;
        let Tensor { base, vector, mask, scale } = &self.tensors[tensor];
        let Some(vector) = *vector else { return self.base.read_f32(*base, range, out, scratch) };
        self.vector.read_f32(vector, range.clone(), out, scratch)?;
        if let Some(mask) = *mask {
            self.mask.with_f32(mask, range.clone(), scratch, &mut |mask| {
                out.iter_mut().zip(mask).for_each(|(x, m)| *x *= m);
            })?;
        }
        if *scale != 1.0 {
            for x in out.iter_mut() {
                *x *= scale;
            }
        }
        // The sum of two numbers does not depend on their order.
        self.base.add_scaled(*base, range, 1.0, out, scratch)
    }

    fn read_bytes(
        &self,
        tensor: usize,
        range: Range<u64>,
        out: &mut [u8],
        scratch: &mut Scratch,
    ) -> Result<()> {
        match self.tensors[tensor].vector {
            None => self.base.read_bytes(self.tensors[tensor].base, range, out, scratch),
            Some(_) => read_computed_bytes(self, tensor, range, out, scratch),
        }
    }

    fn stored_bytes(&self) -> u64 {
        0
    }

    fn check_unchanged(&self) -> Result<()> {
        [&self.base, &self.vector, &self.mask].into_iter().try_for_each(|source| source.check_unchanged())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Manifest;
    use crate::manifest::Content;
    use crate::stream::{BLOCK_ELEMENTS, map_blocks};
    use crate::testing::{Store, values};
    use blake3::Hash;

    fn masked(parts: [Hash; 3], infos: &[(&str, DType, usize)], scale: f32) -> Result<Manifest> {
        let infos = infos.iter().map(|(name, dtype, n)| {
            (TensorInfo { name: (*name).to_owned(), dtype: *dtype, shape: vec![*n] }, scale)
        });
        Manifest::masked(Content::Checkpoint, parts[0], parts[1], parts[2], infos.collect())
    }

    #[test]
    fn values_are_those_of_the_formula_at_boundary_sizes_for_any_number_of_threads() {
        for n in [0, 1, 255, BLOCK_ELEMENTS - 1, BLOCK_ELEMENTS, 2 * BLOCK_ELEMENTS + 7] {
            let (base, vector) = (values(n, 1), values(n, 2));
            let mask: Vec<f32> = (0..n).map(|i| f32::from(u8::from(i % 3 == 0))).collect();
            let mut store = Store::default();
            let parts = [&base, &vector, &mask].map(|values| store.one("w", values));
            for scale in [1.0f32, 0.37] {
                let manifest = masked(parts, &[("w", DType::F32, n)], scale).unwrap();
                assert_eq!(Manifest::from_json(&manifest.to_json()).unwrap(), manifest);
                let source = store.open(&manifest).unwrap();
                let expected: Vec<f32> =
                    (0..n).map(|i| base[i] + if i % 3 == 0 { vector[i] * scale } else { 0.0 }).collect();
                for threads in [1, 2, 8] {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                    let same =
                        pool.install(|| map_blocks(&*source, 0, |range, read| Ok(read == &expected[range])));
                    assert!(same.unwrap().iter().all(|same| *same), "{n} elements, scale {scale}");
                }
            }
        }
    }

    #[test]
    fn tensors_that_the_vector_lacks_are_the_bases_and_those_that_the_mask_lacks_are_whole() {
        let mut store = Store::default();
        let ids = 7i64.to_le_bytes();
        let two = |a: f32, b: f32| [a.to_le_bytes(), b.to_le_bytes()].concat();
        let (whole, kept) = (two(1.0, 2.0), two(3.0, 4.0));
        let base = store.checkpoint(&[
            ("ids", DType::I64, &[1], &ids),
            ("kept", DType::F32, &[2], &kept),
            ("whole", DType::F32, &[2], &whole),
        ]);
        let base = store.add(base);
        let (vector, mask) = (store.one("whole", &[10.0, 20.0]), store.one("other", &[0.0]));
        let infos = [("ids", DType::I64, 1), ("kept", DType::F32, 2), ("whole", DType::F32, 2)];
        let source = store.open(&masked([base, vector, mask], &infos, 0.5).unwrap()).unwrap();
        let read = |tensor: usize| {
            let mut values = [0.0; 2];
            source.read_f32(tensor, 0..2, &mut values, &mut Scratch::new()).unwrap();
            values
        };
        assert_eq!((read(1), read(2)), ([3.0, 4.0], [6.0, 12.0]));
        let mut bytes = [0; 8];
        source.read_bytes(0, 0..8, &mut bytes, &mut Scratch::new()).unwrap();
        assert_eq!(bytes, ids);
    }

    #[test]
    fn parts_that_do_not_fit_are_refused() {
        let mut store = Store::default();
        let parts = [store.one("w", &[1.0, 2.0]), store.one("w", &[1.0]), store.one("w", &[1.0, 0.0])];
        let refused = |store: &Store, manifest: Result<Manifest>| {
            manifest.and_then(|manifest| store.open(&manifest).map(drop)).unwrap_err().to_string()
        };
        let message = refused(&store, masked(parts, &[("w", DType::F32, 2)], 1.0));
        assert!(message.contains("it has shape [2], and [1] in the vector"), "{message}");
        let message = refused(&store, masked([parts[0]; 3], &[("v", DType::F32, 2)], 1.0));
        assert!(message.contains("the base lacks it"), "{message}");
        let message = refused(&store, masked([parts[0]; 3], &[("w", DType::F16, 2)], 1.0));
        assert!(message.contains("it is F16, expected F32"), "{message}");
        let message = refused(&store, masked([parts[0]; 3], &[("w", DType::F32, 2)], f32::NAN));
        assert!(message.contains("its scale is NaN"), "{message}");
    }
}
