//! What makes a manifest valid, be it made here or read: see [`Manifest`].

use blake3::Hash;

use super::{FileRef, Layout, Manifest, ManifestProblem, TensorEntry};
use crate::DType;
use crate::arrangement::Arrangement;
use crate::dtype::{byte_size, n_elements};
use crate::encoding::Encoding;

impl Manifest {
    pub(super) fn check(&self) -> Result<(), ManifestProblem> {
        if let Some(pair) = self.tensors.windows(2).find(|pair| pair[0].name >= pair[1].name) {
            return Err(ManifestProblem::DuplicateTensor(pair[1].name.clone()));
        }
        if let Some(pair) = self.parameters.windows(2).find(|pair| pair[0].name >= pair[1].name) {
            return Err(ManifestProblem::DuplicateTensor(pair[1].name.clone()));
        }
        for tensor in self.tensors.iter().chain(&self.parameters) {
            if byte_size(tensor.dtype, &tensor.shape).is_none() {
                let (tensor, shape) = (tensor.name.clone(), tensor.shape.clone());
                return Err(ManifestProblem::ShapeOverflow { tensor, shape });
            }
        }
        if let Some((name, _)) = self.figures.iter().find(|(_, value)| !value.is_finite()) {
            return Err(ManifestProblem::Figure(name.clone()));
        }
        let mut described: Vec<Hash> = self.views.iter().map(Self::view_digest).collect();
        described.sort_by(|a, b| a.as_bytes().cmp(b.as_bytes()));
        if let Some(pair) = described.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(ManifestProblem::DuplicateView(pair[0]));
        }
        match &self.layout {
            Layout::Mapped { tensors, .. } => self.check_count(tensors.len())?,
            Layout::LowRank { tensors, .. } => {
                self.check_count(tensors.len())?;
                for (tensor, product) in self.tensors.iter().zip(tensors) {
                    let refused = |reason| ManifestProblem::View { tensor: tensor.name.clone(), reason };
                    if tensor.dtype != DType::F32 {
                        return Err(refused(format!("it is {}, products are F32", tensor.dtype)));
                    }
                    if !product.scale.is_finite() {
                        return Err(refused(format!("its scale is {}", product.scale)));
                    }
                }
            }
            Layout::Masked { scales, .. } => {
                self.check_count(scales.len())?;
                for (tensor, scale) in self.tensors.iter().zip(scales) {
                    if !scale.is_finite() {
                        let reason = format!("its scale is {scale}");
                        return Err(ManifestProblem::View { tensor: tensor.name.clone(), reason });
                    }
                }
            }
            Layout::Regions { files, regions } => {
                self.check_count(regions.len())?;
                for (tensor, region) in self.tensors.iter().zip(regions) {
                    let file = files.get(region.file).ok_or_else(|| ManifestProblem::NoSuchFile {
                        tensor: tensor.name.clone(),
                        file: region.file,
                        files: files.len(),
                    })?;
                    let expected = plain_length(tensor, region.arrangement.as_ref())?;
                    check_region(tensor, expected, region.offset, region.length, file)?;
                }
            }
            Layout::Packed { file, tensors } => {
                self.check_count(tensors.len())?;
                for (tensor, packed) in self.tensors.iter().zip(tensors) {
                    let expected = encoded_length(tensor, &packed.encoding)?;
                    check_region(tensor, expected, packed.offset, packed.length, file)?;
                }
            }
            Layout::Linear { terms } => {
                if terms.is_empty() {
                    return Err(ManifestProblem::NoTerms);
                }
                if terms[0].partial {
                    return Err(ManifestProblem::PartialFirst);
                }
                if let Some(term) = terms.iter().find(|term| !(term.coefficient as f32).is_finite()) {
                    return Err(ManifestProblem::Coefficient(term.coefficient.to_string()));
                }
                if let Some(tensor) = self.tensors.iter().find(|tensor| tensor.dtype != DType::F32) {
                    let (tensor, dtype) = (tensor.name.clone(), tensor.dtype);
                    return Err(ManifestProblem::LinearDType { tensor, dtype });
                }
            }
        }
        Ok(())
    }

    fn check_count(&self, described: usize) -> Result<(), ManifestProblem> {
        let tensors = self.tensors.len();
        if tensors == described { Ok(()) } else { Err(ManifestProblem::CountMismatch { tensors, described }) }
    }
}

/// Bytes that the elements of a tensor span in its own type.
fn plain_length(tensor: &TensorEntry, arrangement: Option<&Arrangement>) -> Result<u64, ManifestProblem> {
    let Some(arrangement) = arrangement else { return encoded_length(tensor, &Encoding::Plain) };
    let span = arrangement.span(tensor.dtype, &tensor.shape);
    span.map_err(|reason| ManifestProblem::Encoding { tensor: tensor.name.clone(), reason })
}

fn encoded_length(tensor: &TensorEntry, encoding: &Encoding) -> Result<u64, ManifestProblem> {
    let n = n_elements(&tensor.shape).unwrap_or(usize::MAX);
    let named = |reason| ManifestProblem::Encoding { tensor: tensor.name.clone(), reason };
    encoding.check(tensor.dtype, n).map_err(named)?;
    Ok(encoding.stored_len(tensor.dtype, n))
}

fn check_region(
    tensor: &TensorEntry,
    expected: u64,
    offset: u64,
    length: u64,
    file: &FileRef,
) -> Result<(), ManifestProblem> {
    let name = || tensor.name.clone();
    if length != expected {
        return Err(ManifestProblem::WrongLength { tensor: name(), expected, actual: length });
    }
    match offset.checked_add(length) {
        Some(end) if end <= file.size => Ok(()),
        end => Err(ManifestProblem::OutsideFile {
            tensor: name(),
            end: end.unwrap_or(u64::MAX),
            size: file.size,
        }),
    }
}
