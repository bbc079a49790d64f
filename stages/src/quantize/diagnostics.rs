//! What quantization did to every tensor: kept beside the artifact as `quantization.json`.
//!
//! Sums are of blocks in their order, within a block of its packing groups: f32 within a group, f64 above.

use crate::StageError;
use merganser_cache::{Blob, Staging};
use merganser_tensors::encoding::Form;
use merganser_tensors::kernels::pack::GROUP;
use merganser_tensors::kernels::reduce::MinMax;
use serde::{Deserialize, Serialize};
use std::io::Write;

/// The name of the blob.
pub const QUANTIZATION: &str = "quantization.json";

/// Bins of the histogram of values.
const BINS: usize = 64;

/// Bins of the histogram of codes, at most: of wider codes, the highest 8 bits.
const CODES: usize = 256;

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
    error: f64,
    squared_error: f64,
    largest: f64,
    magnitude: f64,
    square: f64,
    zeros_before: u64,
    zeros: u64,
    values: Vec<u64>,
    codes: Vec<Vec<u64>>,
}

/// Working memory of a thread.
#[derive(Default)]
pub(super) struct Buffers {
    decoded: Vec<f32>,
    codes: Vec<u8>,
    wide: Vec<u16>,
}

impl Counted {
    /// Of a block that begins on a packing group: its values, and the codes that stand for them.
    pub(super) fn of_block(
        form: &Form,
        tables: &merganser_tensors::encoding::Tables,
        range: MinMax,
        first: usize,
        values: &[f32],
        packed: &[u8],
        buffers: &mut Buffers,
    ) -> Self {
        let Buffers { decoded, codes, wide } = buffers;
        decoded.resize(values.len(), 0.0);
        form.decode(first, packed, tables, decoded);
        let mut counted = Self { values: histogram(range, values, codes), ..Self::default() };
        for (x, y) in values.chunks(GROUP).zip(decoded.chunks(GROUP)) {
            counted.add_group(x, y);
        }
        for stage in 0..form.stages {
            if form.bits.get() == 16 {
                wide.resize(values.len(), 0);
                form.unpack(stage, packed, wide);
                codes.clear();
                codes.extend(wide.iter().map(|code| (code >> 8) as u8));
            } else {
                codes.resize(values.len(), 0);
                form.unpack(stage, packed, codes);
            }
            let n = CODES.min(1 << form.bits.get());
            counted.codes.push(count(codes, n));
        }
        counted
    }

    fn add_group(&mut self, values: &[f32], decoded: &[f32]) {
        const LANES: usize = 16;
        let mut error = [0f32; LANES];
        let mut squared_error = [0f32; LANES];
        let mut largest = [0f32; LANES];
        let mut magnitude = [0f32; LANES];
        let mut square = [0f32; LANES];
        let mut zeros_before = [0u32; LANES];
        let mut zeros = [0u32; LANES];
        let mut add = |x: &[f32], y: &[f32]| {
            for i in 0..x.len().min(LANES) {
                let off = (y[i] - x[i]).abs();
                error[i] += off;
                squared_error[i] += off * off;
                largest[i] = if off > largest[i] { off } else { largest[i] };
                magnitude[i] += x[i].abs();
                square[i] += x[i] * x[i];
                zeros_before[i] += u32::from(x[i] == 0.0);
                zeros[i] += u32::from(y[i] == 0.0);
            }
        };
        let (rows, rest) = values.as_chunks::<LANES>();
        let (decoded_rows, decoded_rest) = decoded.as_chunks::<LANES>();
        for (x, y) in rows.iter().zip(decoded_rows) {
            add(x, y);
        }
        add(rest, decoded_rest);
        let sum = |lanes: &[f32; LANES]| lanes.iter().map(|x| f64::from(*x)).sum::<f64>();
        self.error += sum(&error);
        self.magnitude += sum(&magnitude);
        // squares of small values are lost in f32: the rare group that has any is added up in f64
        if squared_error.iter().chain(&square).any(|x| *x < f32::MIN_POSITIVE || !x.is_finite()) {
            for (x, y) in values.iter().zip(decoded) {
                self.squared_error += (f64::from(*y) - f64::from(*x)).powi(2);
                self.square += f64::from(*x).powi(2);
            }
        } else {
            self.squared_error += sum(&squared_error);
            self.square += sum(&square);
        }
        self.largest = largest.iter().fold(self.largest, |largest, x| largest.max(f64::from(*x)));
        self.zeros_before += zeros_before.iter().sum::<u32>() as u64;
        self.zeros += zeros.iter().sum::<u32>() as u64;
    }

    /// Adds the next block. Call it in the order of the blocks.
    pub(super) fn merge(&mut self, next: &Self) {
        self.error += next.error;
        self.squared_error += next.squared_error;
        self.largest = self.largest.max(next.largest);
        self.magnitude += next.magnitude;
        self.square += next.square;
        self.zeros_before += next.zeros_before;
        self.zeros += next.zeros;
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

/// Counts bytes below `n`.
fn count(bytes: &[u8], n: usize) -> Vec<u64> {
    // Four tables, so that equal neighbours do not wait for each other.
    let mut counts = [[0u32; 256]; 4];
    let (quads, rest) = bytes.as_chunks::<4>();
    for quad in quads {
        for (counts, byte) in counts.iter_mut().zip(quad) {
            counts[usize::from(*byte)] += 1;
        }
    }
    for byte in rest {
        counts[0][usize::from(*byte)] += 1;
    }
    (0..n).map(|byte| counts.iter().map(|counts| u64::from(counts[byte])).sum()).collect()
}

/// Counts values in bins of equal width; `bins` is working memory.
fn histogram(range: MinMax, values: &[f32], bins: &mut Vec<u8>) -> Vec<u64> {
    let width = range.max - range.min;
    let per_unit = if width > 0.0 && width.is_finite() { BINS as f32 / width } else { 0.0 };
    let per_unit = if per_unit.is_finite() { per_unit } else { 0.0 };
    bins.resize(values.len(), 0);
    for (bin, x) in bins.iter_mut().zip(values) {
        *bin = (((x - range.min) * per_unit) as i32).clamp(0, BINS as i32 - 1) as u8;
    }
    count(bins, BINS)
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
            ..Self::of_counts(n, stored_bytes, counted)
        }
    }

    fn of_counts(n: u64, stored_bytes: u64, counted: &Counted) -> Self {
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
        let mut all = Counted::default();
        let (mut n, mut stored, mut theoretical, mut bits) = (0, 0, 0.0, 0.0);
        for (tensor, counted) in &tensors {
            all.merge(&Counted { values: Vec::new(), codes: Vec::new(), ..counted.clone() });
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
    use merganser_tensors::encoding::{Code, Grouped, Scales, Table, Tables};
    use merganser_tensors::{Bits, Encoding};

    /// Against sums in f64 that share nothing with the kernel.
    #[test]
    fn errors_match_a_naive_reference() {
        for (n, scale) in [(0, 1.0), (1, 1.0), (255, 1e-3), (256, 1e-25), (257, 3.0), (1000, 1e30)] {
            let values: Vec<f32> =
                (0..n).map(|i| ((i * 7919 % 1009) as f32 - 500.0) / 500.0 * scale).collect();
            let (bits, elements, scales) = (Bits::new(3).unwrap(), n.max(1), Scales::Single);
            let grouped = Grouped { bits, code: Code::Symmetric, elements, scales, stages: 1 };
            let form = Encoding::Grouped(grouped).form(n).unwrap();
            let range = merganser_tensors::kernels::reduce::chunk_min_max(&values);
            let step = form.code.scale(range, bits).unwrap().scale;
            let tables = Tables(vec![Table { scale: vec![step], ..Table::default() }]);
            let mut packed = vec![0; form.codes_len(n)];
            form.encode(0, &values, &tables, &mut packed);
            let counted =
                Counted::of_block(&form, &tables, range, 0, &values, &packed, &mut Buffers::default());
            let decoded: Vec<f64> = values
                .iter()
                .map(|x| f64::from((x / step).round_ties_even().clamp(-3.0, 3.0) * step))
                .collect();
            let pairs = || values.iter().map(|x| f64::from(*x)).zip(decoded.iter().copied());
            let close = |actual: f64, expected: f64| {
                assert!((actual - expected).abs() <= 1e-5 * expected.abs(), "{actual} against {expected}");
            };
            close(counted.error, pairs().map(|(x, y)| (y - x).abs()).sum());
            close(counted.squared_error, pairs().map(|(x, y)| (y - x).powi(2)).sum());
            close(counted.magnitude, pairs().map(|(x, _)| x.abs()).sum());
            close(counted.square, pairs().map(|(x, _)| x * x).sum());
            close(counted.largest, pairs().map(|(x, y)| (y - x).abs()).fold(0.0, f64::max));
            assert_eq!(counted.zeros, pairs().filter(|(_, y)| *y == 0.0).count() as u64);
            assert_eq!(counted.zeros_before, pairs().filter(|(x, _)| *x == 0.0).count() as u64);
            assert_eq!(counted.values.iter().sum::<u64>(), n as u64);
            assert_eq!(counted.codes[0].iter().sum::<u64>(), n as u64);
            assert_eq!(counted.codes[0].len(), 8);
        }
    }
}
