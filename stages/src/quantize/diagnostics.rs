//! What quantization did to every tensor: kept beside the artifact as `quantization.json`.
//!
//! Sums are of parts of a block that fit in a core's nearest cache, in their order ([`Differences`]).

use crate::StageError;
use merganser_cache::{Blob, Staging};
use merganser_tensors::encoding::{Form, Tables};
use merganser_tensors::kernels::counts::{BINS, Counter, bins};
use merganser_tensors::kernels::differences::Differences;
use merganser_tensors::kernels::pack::GROUP;
use merganser_tensors::kernels::reduce::MinMax;
use serde::{Deserialize, Serialize};
use std::io::Write;

/// The name of the blob.
pub const QUANTIZATION: &str = "quantization.json";

/// Bins of the histogram of codes, at most: of wider codes, the highest 8 bits.
const CODES: usize = 256;

/// Elements that are looked at together: their values, what they decode to and their codes take 36 KiB.
const PART: usize = 16 * GROUP;

/// The errors of all tensors of an artifact.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QuantizationDiagnostics {
    /// Over all quantized tensors; without histograms.
    pub total: TensorError,
    /// The quantized tensors, sorted by name.
    pub tensors: Vec<TensorError>,
}

/// How far a tensor is from what its codes decode to.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorError {
    pub name: String,
    pub n_elements: u64,
    /// Bits of codes per element, of all stages.
    pub bits: f64,
    /// Bytes that codes and scales take by calculation, to the bit.
    pub theoretical_bytes: f64,
    /// Bytes that they take in the file and in its description.
    pub stored_bytes: u64,
    /// Bytes of the values in f32.
    pub plain_bytes: u64,
    /// Σ|x̂ − x|.
    pub l1: f64,
    /// Σ|x̂ − x| / Σ|x|; 0 where both are zero.
    pub l1_relative: f64,
    /// √Σ(x̂ − x)².
    pub l2: f64,
    /// √Σ(x̂ − x)² / √Σx²; 0 where both are zero.
    pub l2_relative: f64,
    /// Largest |x̂ − x|.
    pub max: f64,
    /// Signal-to-noise ratio in dB, 10·log₁₀(Σx²/Σ(x̂ − x)²); none where one of them is zero.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snr: Option<f64>,
    /// Share of zeros among the values.
    pub zeros_before: f64,
    /// Share of zeros among what they decode to: rounding creates sparsity.
    pub zeros: f64,
    /// Counts of values in bins of equal width between the smallest and the largest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub values: Option<Histogram>,
    /// Per stage, how often each code occurs; of 16-bit codes, by their upper byte.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub codes: Vec<Vec<u64>>,
}

/// Counts in bins of equal width.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Histogram {
    pub min: f32,
    pub max: f32,
    pub counts: Vec<u64>,
}

/// What was counted of some elements.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Counted {
    differences: Differences,
    values: Vec<u64>,
    codes: Vec<Vec<u64>>,
}

/// Working memory of a thread.
#[derive(Default)]
pub(super) struct Buffers {
    decoded: Vec<f32>,
    codes: Vec<u8>,
    bins: Vec<u8>,
}

impl Counted {
    /// Writes the codes of a block that begins on a packing group, part by part, and counts while they are at hand. `coded` stands for `values`
    /// where these are not rounded to the nearest codes.
    pub(super) fn encode(
        form: &Form,
        tables: &Tables,
        range: MinMax,
        first: usize,
        [values, coded]: [&[f32]; 2],
        packed: &mut [u8],
        buffers: &mut Buffers,
    ) -> Self {
        let Buffers { decoded, codes, bins: places } = buffers;
        let mut differences = Differences::default();
        let mut histogram = Counter::new(BINS);
        let n_codes = CODES.min(1 << form.bits.get());
        let mut counters: Vec<Counter> = (0..form.stages).map(|_| Counter::new(n_codes)).collect();
        let parts = values.chunks(PART).zip(coded.chunks(PART)).zip(packed.chunks_mut(form.codes_len(PART)));
        for (index, ((values, coded), packed)) in parts.enumerate() {
            let n = values.len();
            decoded.resize(n, 0.0);
            codes.resize(n * form.stages, 0);
            places.resize(n, 0);
            form.encode_seen(first + index * PART, coded, tables, packed, codes, decoded);
            differences.merge(&Differences::of(values, decoded));
            bins(range, values, places);
            histogram.add(places);
            for (counter, codes) in counters.iter_mut().zip(codes.chunks(n)) {
                counter.add(codes);
            }
        }
        let codes = counters.iter().map(Counter::counts).collect();
        Self { differences, values: histogram.counts(), codes }
    }

    /// Adds the next block. Call it in the order of the blocks.
    pub(super) fn merge(&mut self, next: &Self) {
        self.differences.merge(&next.differences);
        add_counts(&mut self.values, &next.values);
        self.codes.resize(self.codes.len().max(next.codes.len()), Vec::new());
        for (own, counts) in self.codes.iter_mut().zip(&next.codes) {
            add_counts(own, counts);
        }
    }
}

fn add_counts(sums: &mut Vec<u64>, counts: &[u64]) {
    sums.resize(sums.len().max(counts.len()), 0);
    sums.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
}

impl TensorError {
    pub(super) fn new(
        name: &str,
        form: &Form,
        scale_bytes: u64,
        stored_bytes: u64,
        range: MinMax,
        counted: &Counted,
    ) -> Self {
        let n = form.n as u64;
        let bits = f64::from(form.bits.get()) * form.stages as f64;
        let values = (!range.is_empty()).then(|| Histogram {
            min: range.min,
            max: range.max,
            counts: counted.values.clone(),
        });
        let codes = counted.codes.clone();
        Self {
            name: name.to_owned(),
            theoretical_bytes: bits * n as f64 / 8.0 + scale_bytes as f64,
            bits,
            values,
            codes,
            ..Self::of_counts(n, stored_bytes, &counted.differences)
        }
    }

    fn of_counts(n: u64, stored_bytes: u64, counted: &Differences) -> Self {
        let share = |part: f64, whole: f64| {
            if part == 0.0 { 0.0 } else { part / if whole > 0.0 { whole } else { part } }
        };
        let (l2, norm) = (counted.squared_error.sqrt(), counted.square.sqrt());
        let snr = counted.squared_error > 0.0 && counted.square > 0.0;
        Self {
            n_elements: n,
            stored_bytes,
            plain_bytes: 4 * n,
            l1: counted.error,
            l1_relative: share(counted.error, counted.magnitude),
            l2,
            l2_relative: share(l2, norm),
            max: counted.largest,
            snr: snr.then(|| 10.0 * (counted.square / counted.squared_error).log10()),
            zeros_before: share(counted.zeros_before as f64, n as f64),
            zeros: share(counted.zeros as f64, n as f64),
            ..Self::default()
        }
    }
}

impl QuantizationDiagnostics {
    /// Of tensors with what was counted of them.
    pub(super) fn new(mut tensors: Vec<(TensorError, Counted)>) -> Self {
        tensors.sort_by(|(left, _), (right, _)| left.name.cmp(&right.name));
        let mut all = Differences::default();
        let (mut n, mut stored, mut theoretical, mut bits) = (0, 0, 0.0, 0.0);
        for (tensor, counted) in &tensors {
            all.merge(&counted.differences);
            n += tensor.n_elements;
            stored += tensor.stored_bytes;
            theoretical += tensor.theoretical_bytes;
            bits += tensor.bits * tensor.n_elements as f64;
        }
        let total = TensorError {
            theoretical_bytes: theoretical,
            bits: bits / (n as f64).max(1.0),
            ..TensorError::of_counts(n, stored, &all)
        };
        Self { total, tensors: tensors.into_iter().map(|(tensor, _)| tensor).collect() }
    }

    /// Reads the blob.
    pub fn from_json(json: &[u8]) -> Option<Self> {
        serde_json::from_slice(json).ok()
    }
}

/// Writes the blob.
pub(super) fn write(staging: &Staging, diagnostics: &QuantizationDiagnostics) -> Result<Blob, StageError> {
    let mut writer = staging.writer(QUANTIZATION)?;
    let json = serde_json::to_vec(diagnostics).map_err(|error| StageError::Internal(error.to_string()))?;
    writer.write_all(&json)?;
    Ok(writer.finish()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use merganser_tensors::encoding::{Code, Grouped, Scales, Table};
    use merganser_tensors::{Bits, Encoding};

    /// Against sums in f64 that share nothing with the kernel.
    #[test]
    fn errors_match_a_naive_reference() {
        for (n, scale) in
            [(0, 1.0), (1, 1.0), (255, 1e-3), (256, 1e-25), (257, 3.0), (1000, 1e30), (PART + 300, 0.1)]
        {
            let values: Vec<f32> =
                (0..n).map(|i| ((i * 7919 % 1009) as f32 - 500.0) / 500.0 * scale).collect();
            let (bits, elements, scales) = (Bits::new(3).unwrap(), n.max(1), Scales::Single);
            let grouped = Grouped { bits, code: Code::Symmetric, elements, scales, stages: 1 };
            let form = Encoding::Grouped(grouped).form(n).unwrap();
            let range = merganser_tensors::kernels::reduce::chunk_min_max(&values);
            let step = form.code.scale(range, bits).unwrap().scale;
            let tables = Tables(vec![Table { scale: vec![step], ..Table::default() }]);
            let mut packed = vec![0; form.codes_len(n)];
            let buffers = &mut Buffers::default();
            let counted = Counted::encode(&form, &tables, range, 0, [&values, &values], &mut packed, buffers);
            let mut alone = vec![0; packed.len()];
            form.encode(0, &values, &tables, &mut alone);
            assert_eq!(packed, alone);
            let decoded: Vec<f64> = values
                .iter()
                .map(|x| f64::from((x / step).round_ties_even().clamp(-3.0, 3.0) * step))
                .collect();
            let pairs = || values.iter().map(|x| f64::from(*x)).zip(decoded.iter().copied());
            let close = |actual: f64, expected: f64| {
                assert!((actual - expected).abs() <= 1e-5 * expected.abs(), "{actual} against {expected}");
            };
            let sums = counted.differences;
            close(sums.error, pairs().map(|(x, y)| (y - x).abs()).sum());
            close(sums.squared_error, pairs().map(|(x, y)| (y - x).powi(2)).sum());
            close(sums.magnitude, pairs().map(|(x, _)| x.abs()).sum());
            close(sums.square, pairs().map(|(x, _)| x * x).sum());
            close(sums.largest, pairs().map(|(x, y)| (y - x).abs()).fold(0.0, f64::max));
            assert_eq!(sums.zeros, pairs().filter(|(_, y)| *y == 0.0).count() as u64);
            assert_eq!(sums.zeros_before, pairs().filter(|(x, _)| *x == 0.0).count() as u64);
            assert_eq!(counted.values.iter().sum::<u64>(), n as u64);
            assert_eq!(counted.codes[0].iter().sum::<u64>(), n as u64);
            assert_eq!(counted.codes[0].len(), 8);
        }
    }
}
