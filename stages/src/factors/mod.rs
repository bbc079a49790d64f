//! What basis and coefficient artifacts hold, for the stages that make and use them (`svd`, `compress`, `merge`).
//!
//! For a parameter `p` with T task vectors τ_t of D entries (those of a region: what a mask keeps, or what it does not), the basis
//! artifact holds, in f64:
//!
//! | tensor | shape | meaning |
//! |---|---|---|
//! | `p:signal.gram` | T × T | inner products of the task vectors |
//! | `p:signal.sigma` | R + 1 | ‖μ‖ (0 unless centred), then the singular values of M = \[τ_1 − μ … τ_T − μ\], descending |
//! | `p:signal.directions` | (R + 1) × T | each direction as a combination of task vectors: μ/‖μ‖, then u_i = Σ_t W_it τ_t |
//! | `p:signal.rank` | 2 | k, how many directions are high-energy; and D |
//! | `p:signal.basis` | D × (R + 1) | the directions themselves, times 2^⌊log₂(D)/2⌋; only if they are stored |
//!
//! with R = min(D, T), and likewise `p:noise.…`. A region without `sigma` contributes nothing. W_it = V_ti/σ_i; a direction with σ_i = 0
//! is all zeros and so are its coefficients. **Signs**: in each column of V, the entry of largest magnitude is positive (the first of
//! equals).
//!
//! Coefficients of task t are `p:signal.high` (the first k) and `p:signal.low` (the rest): c_i = u_iᵀ(τ_t − μ) = σ_i V_ti.
//!
//! The power of two keeps entries of the basis near 1 in magnitude, where fp16 has its full precision.

mod gather;
mod stored;

pub(crate) use gather::MaskIndex;
pub(crate) use stored::{Columns, Combination};

use crate::{Job, JobInput, StageError};
use blake3::Hash;
use merganser_tensors::manifest::{Layout, Link};
use merganser_tensors::{DType, Manifest, Scratch, TensorInfo, TensorSource};
use std::sync::Arc;

/// Roles of links.
pub(crate) const TASK: &str = "task";
pub(crate) const MASKS: &str = "masks";
pub(crate) const BASIS: &str = "basis";

/// What a mask keeps, or what it does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Region {
    Signal,
    Noise,
}

impl Region {
    pub(crate) const ALL: [Self; 2] = [Self::Signal, Self::Noise];

    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Signal => "signal",
            Self::Noise => "noise",
        }
    }

    /// The name of a tensor of a parameter's region.
    pub(crate) fn tensor(self, parameter: &str, part: &str) -> String {
        format!("{parameter}:{}.{part}", self.label())
    }
}

/// Whether a tensor of a coefficient artifact is a low-energy part.
pub(crate) fn is_low(tensor: &str) -> bool {
    Region::ALL.iter().any(|region| tensor.ends_with(&region.tensor("", "low")))
}

/// The factors of one region of one parameter.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Factors {
    /// k.
    pub rank: usize,
    /// D.
    pub n_entries: usize,
    /// ‖μ‖, then the R singular values.
    pub sigma: Vec<f64>,
    /// (R + 1) × T.
    pub directions: Vec<f64>,
}

impl Factors {
    /// R.
    pub(crate) fn n_directions(&self) -> usize {
        self.sigma.len() - 1
    }

    pub(crate) fn n_tasks(&self) -> usize {
        self.directions.len() / self.sigma.len()
    }

    /// Direction `index` as a combination of the task vectors; 0 is the mean.
    pub(crate) fn direction(&self, index: usize) -> &[f64] {
        let n = self.n_tasks();
        &self.directions[index * n..(index + 1) * n]
    }

    /// The R coefficients of a task, c_i = σ_i² W_it = σ_i V_ti.
    pub(crate) fn coefficients(&self, task: usize) -> Vec<f64> {
        (1..self.sigma.len()).map(|index| self.sigma[index].powi(2) * self.direction(index)[task]).collect()
    }

    /// Σ_{i ≤ k} σ_i² / Σ σ_i²; 1 if there is hardly any energy.
    pub(crate) fn energy_retained(&self) -> f64 {
        let energy = |values: &[f64]| values.iter().map(|sigma| sigma * sigma).sum::<f64>();
        let total = energy(&self.sigma[1..]);
        if total < NO_ENERGY { 1.0 } else { energy(&self.sigma[1..=self.rank]) / total }
    }

    /// What turns `‖μ‖, c_1 … c_R` (or other factors of the directions) into factors of the task vectors.
    pub(crate) fn of_tasks(&self, of_directions: &[f64]) -> Vec<f64> {
        let mut factors = vec![0.0; self.n_tasks()];
        for (index, factor) in of_directions.iter().enumerate() {
            for (sum, weight) in factors.iter_mut().zip(self.direction(index)) {
                *sum += factor * weight;
            }
        }
        factors
    }

    /// Entries of a stored basis are this much larger than those of the directions.
    pub(crate) fn storage_scale(&self) -> f64 {
        f64::exp2((self.n_entries.max(1).ilog2() / 2).into())
    }
}

/// Total energy below which a matrix counts as zero.
pub(crate) const NO_ENERGY: f64 = 1e-10;

/// A basis artifact, opened; only small factors are in memory.
pub(crate) struct Basis {
    pub digest: Hash,
    /// The task vectors that it was made from, in order.
    pub tasks: Vec<Link>,
    pub masks: Option<Hash>,
    /// Sorted by name.
    pub parameters: Vec<BasisParameter>,
    pub tensors: Arc<dyn TensorSource>,
    pub manifest: Manifest,
    /// Whether merges use the stored directions rather than the task vectors.
    pub is_stored: bool,
    /// Whether the stored directions are packed in few bits.
    pub is_packed: bool,
}

/// A parameter of a [`Basis`].
pub(crate) struct BasisParameter {
    pub info: TensorInfo,
    pub regions: Vec<BasisRegion>,
}

/// A region of a [`BasisParameter`].
pub(crate) struct BasisRegion {
    pub region: Region,
    /// T × T.
    pub gram: Vec<f64>,
    /// `None` if the region contributes nothing.
    pub factors: Option<Factors>,
    /// Position of the stored directions.
    pub stored: Option<usize>,
}

impl Basis {
    pub(crate) fn open(job: &Job<'_>, digest: &Hash) -> Result<Self, StageError> {
        let manifest = job.files.manifest(digest)?;
        let tensors = merganser_tensors::open(&manifest, &job.files)?;
        let tasks: Vec<Link> = manifest.linked(TASK).cloned().collect();
        let masks = manifest.linked(MASKS).next().map(|link| link.artifact);
        let mut basis = Self {
            digest: *digest,
            is_stored: !tasks.iter().any(|task| !task.provenance),
            is_packed: matches!(manifest.layout(), Layout::Packed { .. }),
            masks,
            tasks,
            parameters: Vec::new(),
            tensors,
            manifest,
        };
        for entry in basis.manifest.parameters().to_vec() {
            let regions = Region::ALL.into_iter().map(|region| basis.region(&entry.name, region));
            let regions = regions.filter_map(Result::transpose).collect::<Result<_, StageError>>()?;
            basis.parameters.push(BasisParameter { info: entry.info(), regions });
        }
        Ok(basis)
    }

    /// Opens the task vectors, if the directions are not stored.
    pub(crate) fn open_tasks(&self, job: &Job<'_>) -> Result<Vec<Arc<dyn TensorSource>>, StageError> {
        let open =
            |link: &Link| Ok(merganser_tensors::open(&job.files.manifest(&link.artifact)?, &job.files)?);
        if self.is_stored { Ok(Vec::new()) } else { self.tasks.iter().map(open).collect() }
    }

    pub(crate) fn open_masks(&self, job: &Job<'_>) -> Result<Option<Arc<dyn TensorSource>>, StageError> {
        let open = |digest: Hash| {
            merganser_tensors::open(&job.files.manifest(&digest)?, &job.files).map_err(StageError::from)
        };
        self.masks.map(open).transpose()
    }

    fn region(&self, parameter: &str, region: Region) -> Result<Option<BasisRegion>, StageError> {
        let Some(gram) = self.numbers(&region.tensor(parameter, "gram"))? else { return Ok(None) };
        let sigma = self.numbers(&region.tensor(parameter, "sigma"))?;
        let directions = self.numbers(&region.tensor(parameter, "directions"))?;
        let rank = self.numbers(&region.tensor(parameter, "rank"))?;
        let factors = match (sigma, directions, rank.as_deref()) {
            (Some(sigma), Some(directions), Some(&[rank, n_entries])) => {
                let n_tasks = self.tasks.len();
                let fits = !sigma.is_empty()
                    && directions.len() == sigma.len() * n_tasks
                    && rank >= 0.0
                    && (rank as usize) < sigma.len();
                if !fits || gram.len() != n_tasks * n_tasks {
                    let message = format!("the factors of parameter `{parameter}` do not fit each other");
                    return Err(StageError::input(message));
                }
                Some(Factors { rank: rank as usize, n_entries: n_entries as usize, sigma, directions })
            }
            _ => None,
        };
        let stored = self.tensors.index_of(&region.tensor(parameter, "basis"));
        Ok(Some(BasisRegion { region, gram, factors, stored }))
    }

    /// The values of a small tensor in f64.
    fn numbers(&self, name: &str) -> Result<Option<Vec<f64>>, StageError> {
        let Some(index) = self.tensors.index_of(name) else { return Ok(None) };
        let info = &self.tensors.tensors()[index];
        if info.dtype != DType::F64 {
            return Err(StageError::input(format!(
                "tensor `{name}` of the basis is {}, not F64",
                info.dtype
            )));
        }
        let mut values = vec![0f64; info.n_elements()];
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut values);
        self.tensors.read_bytes(index, 0..bytes.len() as u64, bytes, &mut Scratch::new())?;
        Ok(Some(values))
    }
}

/// The coefficients of one task, in f64, by parameter and region.
pub(crate) struct Coefficients {
    pub basis: Hash,
    manifest: Manifest,
    tensors: Arc<dyn TensorSource>,
}

impl Coefficients {
    pub(crate) fn open(job: &Job<'_>, input: &JobInput) -> Result<Self, StageError> {
        let manifest = job.files.manifest(&input.artifact)?;
        let basis = manifest.linked(BASIS).next().map(|link| link.artifact);
        let basis = basis
            .ok_or_else(|| StageError::input("the coefficients do not say which basis they belong to"))?;
        let tensors = merganser_tensors::open(&manifest, &job.files)?;
        Ok(Self { basis, manifest, tensors })
    }

    /// High and low part of a region.
    pub(crate) fn region(
        &self,
        parameter: &str,
        region: Region,
        factors: &Factors,
    ) -> Result<(Vec<f64>, Vec<f64>), StageError> {
        let part = |part: &str, expected: usize| {
            let name = region.tensor(parameter, part);
            let found = self.tensors.index_of(&name);
            let index =
                found.ok_or_else(|| StageError::input(format!("the coefficients lack tensor `{name}`")))?;
            let n = self.tensors.tensors()[index].n_elements();
            if n != expected {
                return Err(StageError::input(format!(
                    "tensor `{name}` of the coefficients has {n} elements, its basis needs {expected}"
                )));
            }
            let mut values = vec![0f32; n];
            merganser_tensors::source::read_finite_f32(
                &*self.tensors,
                index,
                0..n,
                &mut values,
                &mut Scratch::new(),
            )?;
            Ok(values.into_iter().map(f64::from).collect::<Vec<f64>>())
        };
        Ok((part("high", factors.rank)?, part("low", factors.n_directions() - factors.rank)?))
    }

    /// Bytes that a parameter's coefficients take as stored, scales included.
    pub(crate) fn stored_bytes(&self, parameter: &str) -> u64 {
        stored_bytes(&self.manifest, parameter, &["high", "low"])
    }
}

/// Bytes that some tensors of a parameter take as stored, scales included.
pub(crate) fn stored_bytes(manifest: &Manifest, parameter: &str, parts: &[&str]) -> u64 {
    let mut total = 0;
    for region in Region::ALL {
        for part in parts {
            let name = region.tensor(parameter, part);
            let Ok(index) = manifest.tensors().binary_search_by(|tensor| tensor.name.cmp(&name)) else {
                continue;
            };
            total += match manifest.layout() {
                Layout::Regions { regions, .. } => regions[index].length,
                Layout::Packed { tensors, .. } => {
                    let encoding = &tensors[index].encoding;
                    let n = manifest.tensors()[index].info().n_elements();
                    tensors[index].length + encoding.scale_bytes(n) - encoding.tables_len(n)
                }
                _ => 0,
            };
        }
    }
    total
}
