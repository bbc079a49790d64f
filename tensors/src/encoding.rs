//! How the bytes of a stored tensor stand for its values.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::DType;
use crate::kernels::pack::{Bits, GROUP, enclosing_groups, pack, packed_len, unpack};
use crate::kernels::quantize::{
    self, CodeMap, QuantizeError, absmax_offset, dequantize, quantize_absmax, quantize_affine,
};
use crate::kernels::reduce::MinMax;

/// Encoding of one tensor. Quantized tensors stand for `f32` values; see [`crate::kernels::quantize`] for the
/// formulas and [`crate::kernels::pack`] for the layout of the codes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Encoding {
    /// The tensor's own elements, little-endian, row-major.
    Plain,
    /// Unsigned codes: `x = (q − zero_point)/scale`.
    Affine { bits: Bits, granularity: Granularity, scale: Vec<f32>, zero_point: Vec<f32> },
    /// Signed codes stored as `q + 2^(bits−1)`: `x = q/scale`. At least 2 bits.
    Absmax { bits: Bits, granularity: Granularity, scale: Vec<f32> },
    /// Several codes per element, each stage coding what those before it left over: `x = Σ_s (q_s − zero_point_s)/scale_s`, added in
    /// `f32` in the order of the stages. The codes of a packing group lie together, stage by stage.
    Residual { bits: Bits, stages: Vec<AffineStage> },
}

/// One stage of residual codes: one scale and zero point for the whole tensor.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AffineStage {
    pub scale: f32,
    pub zero_point: f32,
}

/// Which elements share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Granularity {
    /// All elements of the tensor: one scale.
    Tensor,
    /// Every `elements` neighbours in row-major order, the last group possibly shorter: `⌈n/elements⌉` scales. Output channels
    /// (rows) are groups of one row.
    Group { elements: usize },
}

impl Granularity {
    /// Returns the number of scales for a tensor of `n` elements; one at least.
    pub fn n_groups(self, n: usize) -> usize {
        match self {
            Self::Tensor => 1,
            Self::Group { elements } => n.div_ceil(elements.max(1)).max(1),
        }
    }

    fn group_of(self, element: usize) -> usize {
        match self {
            Self::Tensor => 0,
            Self::Group { elements } => element / elements,
        }
    }

    /// Cuts an element range at group boundaries.
    fn split(self, range: Range<usize>) -> impl Iterator<Item = (usize, Range<usize>)> {
        let mut start = range.start;
        std::iter::from_fn(move || {
            if start >= range.end {
                return None;
            }
            let group = self.group_of(start);
            let end = match self {
                Self::Tensor => range.end,
                Self::Group { elements } => (group + 1).saturating_mul(elements).min(range.end),
            };
            let part = start..end;
            start = end;
            Some((group, part))
        })
    }
}

impl Encoding {
    /// Affine codes for values whose extremes per group are `ranges`; an empty range counts as zero.
    pub fn affine(bits: Bits, granularity: Granularity, ranges: &[MinMax]) -> Result<Self, QuantizeError> {
        let (mut scale, mut zero_point) = (Vec::new(), Vec::new());
        for range in ranges {
            let (min, max) = if range.is_empty() { (0.0, 0.0) } else { (range.min, range.max) };
            let map = CodeMap::affine(min, max, bits)?;
            scale.push(map.scale);
            zero_point.push(map.zero_point);
        }
        Ok(Self::Affine { bits, granularity, scale, zero_point })
    }

    /// Absmax codes for values whose extremes per group are `ranges`.
    pub fn absmax(bits: Bits, granularity: Granularity, ranges: &[MinMax]) -> Result<Self, QuantizeError> {
        let maps = ranges.iter().map(|range| CodeMap::absmax(range.max_abs(), bits));
        let scale = maps.map(|map| map.map(|map| map.scale)).collect::<Result<_, _>>()?;
        Ok(Self::Absmax { bits, granularity, scale })
    }

    /// Adds a stage that codes what the stages of `self` leave of values whose remainder lies within `range`; of plain affine codes
    /// with one scale, the first stage. An empty range counts as zero.
    pub fn with_stage(self, range: MinMax) -> Result<Self, QuantizeError> {
        let (bits, mut stages) = match self {
            Self::Affine { bits, scale, zero_point, .. } => {
                let pairs = scale.into_iter().zip(zero_point);
                (bits, pairs.map(|(scale, zero_point)| AffineStage { scale, zero_point }).collect())
            }
            Self::Residual { bits, stages } => (bits, stages),
            other => return Ok(other),
        };
        let (min, max) = if range.is_empty() { (0.0, 0.0) } else { (range.min, range.max) };
        let CodeMap { scale, zero_point } = CodeMap::affine(min, max, bits)?;
        stages.push(AffineStage { scale, zero_point });
        Ok(Self::Residual { bits, stages })
    }

    /// Number of bits of a code; none when the elements are stored as they are.
    pub fn bits(&self) -> Option<Bits> {
        match self {
            Self::Plain => None,
            Self::Affine { bits, .. } | Self::Absmax { bits, .. } | Self::Residual { bits, .. } => {
                Some(*bits)
            }
        }
    }

    /// Number of codes per element; 0 when the elements are stored as they are.
    pub fn n_codes(&self) -> usize {
        match self {
            Self::Plain => 0,
            Self::Affine { .. } | Self::Absmax { .. } => 1,
            Self::Residual { stages, .. } => stages.len(),
        }
    }

    /// Returns how many bytes `n` elements of `dtype` take, without the scales.
    pub fn stored_len(&self, dtype: DType, n: usize) -> u64 {
        match self.bits() {
            None => n as u64 * dtype.size_bytes() as u64,
            Some(bits) => (packed_len(n, bits) * self.n_codes()) as u64,
        }
    }

    /// Replaces finite values by what is left of them after coding.
    pub fn subtract_decoded(&self, values: &mut [f32]) {
        let Some(bits) = self.bits() else { return values.fill(0.0) };
        let mut packed = vec![0; packed_len(values.len(), bits) * self.n_codes()];
        let mut decoded = vec![0.0; values.len()];
        self.encode(0, values, &mut packed);
        self.decode(0, &packed, &mut decoded);
        values.iter_mut().zip(&decoded).for_each(|(value, decoded)| *value -= decoded);
    }

    /// Fails with the reason when the parameters do not suit a tensor of `n` elements.
    pub(crate) fn check(&self, dtype: DType, n: usize) -> Result<(), String> {
        let (granularity, scale, zero_point) = match self {
            Self::Plain => return Ok(()),
            Self::Affine { granularity, scale, zero_point, .. } => (granularity, scale, Some(zero_point)),
            Self::Absmax { bits, granularity, scale } => {
                if bits.get() == 1 {
                    return Err(QuantizeError::AbsmaxAtOneBit.to_string());
                }
                (granularity, scale, None)
            }
            Self::Residual { stages, .. } => return check_stages(dtype, stages),
        };
        if dtype != DType::F32 {
            return Err(format!("codes stand for F32 values, not {dtype}"));
        }
        if matches!(granularity, Granularity::Group { elements: 0 }) {
            return Err("a group has no elements".to_owned());
        }
        let expected = granularity.n_groups(n);
        for (what, values) in [("scales", Some(scale)), ("zero points", zero_point)] {
            let Some(values) = values else { continue };
            if values.len() != expected {
                return Err(format!("it needs {expected} {what}, got {}", values.len()));
            }
            if let Some(value) = values.iter().find(|value| !value.is_finite()) {
                return Err(format!("its {what} must be finite, got {value}"));
            }
        }
        match scale.iter().find(|scale| **scale <= 0.0) {
            Some(scale) => Err(format!("its scales must be positive, got {scale}")),
            None => Ok(()),
        }
    }

    /// Returns the elements that must be decoded together to get `range` of a tensor of `n` elements, and the bytes
    /// that hold them.
    pub(crate) fn enclosing(&self, range: &Range<usize>, n: usize) -> Option<(Range<usize>, Range<usize>)> {
        self.bits().map(|bits| {
            let (elements, bytes) = enclosing_groups(range, n, bits);
            (elements, bytes.start * self.n_codes()..bytes.end * self.n_codes())
        })
    }

    /// Quantizes and packs elements `first..first + values.len()`; `first` is a multiple of the packing group.
    ///
    /// # Panics
    /// On [`Encoding::Plain`], which has no codes.
    pub(crate) fn encode(&self, first: usize, values: &[f32], packed: &mut [u8]) {
        let bits = self.bits().expect("plain tensors are not encoded");
        if let Self::Residual { stages, .. } = self {
            return encode_stages(bits, stages, values, packed);
        }
        quantize::encode(values, bits, packed, |start, values, codes| {
            let start = first + start;
            for (group, part) in self.granularity().split(start..start + values.len()) {
                let map = self.map(group);
                let part = part.start - start..part.end - start;
                match self {
                    Self::Absmax { .. } => {
                        quantize_absmax(&values[part.clone()], map, bits, &mut codes[part]);
                    }
                    _ => quantize_affine(&values[part.clone()], map, bits, &mut codes[part]),
                }
            }
        });
    }

    /// Decodes elements `first..first + out.len()`; the inverse of [`Self::encode`].
    ///
    /// # Panics
    /// On [`Encoding::Plain`].
    pub(crate) fn decode(&self, first: usize, packed: &[u8], out: &mut [f32]) {
        let bits = self.bits().expect("plain tensors are not decoded");
        if let Self::Residual { stages, .. } = self {
            return decode_stages(bits, stages, packed, out);
        }
        quantize::decode(packed, bits, out, |start, codes, out| {
            let start = first + start;
            for (group, part) in self.granularity().split(start..start + codes.len()) {
                let part = part.start - start..part.end - start;
                dequantize(&codes[part.clone()], self.map(group), &mut out[part]);
            }
        });
    }

    fn granularity(&self) -> Granularity {
        match self {
            Self::Plain | Self::Residual { .. } => Granularity::Tensor,
            Self::Affine { granularity, .. } | Self::Absmax { granularity, .. } => *granularity,
        }
    }

    fn map(&self, group: usize) -> CodeMap {
        match self {
            Self::Plain | Self::Residual { .. } => CodeMap { scale: 1.0, zero_point: 0.0 },
            Self::Affine { scale, zero_point, .. } => {
                CodeMap { scale: scale[group], zero_point: zero_point[group] }
            }
            Self::Absmax { bits, scale, .. } => {
                CodeMap { scale: scale[group], zero_point: absmax_offset(*bits) }
            }
        }
    }
}

fn check_stages(dtype: DType, stages: &[AffineStage]) -> Result<(), String> {
    if dtype != DType::F32 {
        return Err(format!("codes stand for F32 values, not {dtype}"));
    }
    if stages.is_empty() {
        return Err("it has no stages".to_owned());
    }
    for AffineStage { scale, zero_point } in stages {
        if !(scale.is_finite() && *scale > 0.0) {
            return Err(format!("its scales must be positive and finite, got {scale}"));
        }
        if !zero_point.is_finite() {
            return Err(format!("its zero points must be finite, got {zero_point}"));
        }
    }
    Ok(())
}

/// Codes values stage by stage, one packing group after the other.
fn encode_stages(bits: Bits, stages: &[AffineStage], values: &[f32], packed: &mut [u8]) {
    let mut rest = [0f32; GROUP];
    let mut decoded = [0f32; GROUP];
    let mut codes = [0u8; GROUP];
    let mut packed = packed;
    for group in values.chunks(GROUP) {
        let n = group.len();
        rest[..n].copy_from_slice(group);
        for (index, stage) in stages.iter().enumerate() {
            let map = CodeMap { scale: stage.scale, zero_point: stage.zero_point };
            quantize_affine(&rest[..n], map, bits, &mut codes[..n]);
            let (bytes, after) = packed.split_at_mut(packed_len(n, bits));
            pack(&codes[..n], bits, bytes);
            packed = after;
            if index + 1 < stages.len() {
                dequantize(&codes[..n], map, &mut decoded[..n]);
                rest[..n].iter_mut().zip(&decoded[..n]).for_each(|(rest, decoded)| *rest -= decoded);
            }
        }
    }
}

/// The inverse of [`encode_stages`].
fn decode_stages(bits: Bits, stages: &[AffineStage], packed: &[u8], out: &mut [f32]) {
    let mut decoded = [0f32; GROUP];
    let mut codes = [0u8; GROUP];
    let mut packed = packed;
    for group in out.chunks_mut(GROUP) {
        let n = group.len();
        group.fill(0.0);
        for stage in stages {
            let (bytes, after) = packed.split_at(packed_len(n, bits));
            unpack(bytes, bits, &mut codes[..n]);
            packed = after;
            let map = CodeMap { scale: stage.scale, zero_point: stage.zero_point };
            dequantize(&codes[..n], map, &mut decoded[..n]);
            group.iter_mut().zip(&decoded[..n]).for_each(|(sum, decoded)| *sum += decoded);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::kernels::reduce::chunk_min_max;

    fn ranges(values: &[f32], granularity: Granularity) -> Vec<MinMax> {
        let size = match granularity {
            Granularity::Tensor => values.len().max(1),
            Granularity::Group { elements } => elements,
        };
        let mut ranges: Vec<MinMax> = values.chunks(size).map(chunk_min_max).collect();
        ranges.resize(granularity.n_groups(values.len()), MinMax::EMPTY);
        ranges
    }

    fn round_trip(encoding: &Encoding, values: &[f32]) -> Vec<f32> {
        encoding.check(DType::F32, values.len()).unwrap();
        let mut packed = vec![0; encoding.stored_len(DType::F32, values.len()) as usize];
        encoding.encode(0, values, &mut packed);
        let mut out = vec![f32::NAN; values.len()];
        encoding.decode(0, &packed, &mut out);
        out
    }

    proptest! {
        /// The documented bound, per group: one step plus rounding near the largest magnitude.
        #[test]
        fn decoded_values_are_within_a_step(
            values in prop::collection::vec(-2f32..3.0, 0..900),
            offset in prop_oneof![Just(0f32), -100f32..100.0],
            bits in 1u8..=8,
            granularity in prop_oneof![Just(Granularity::Tensor), (1usize..300).prop_map(|elements| Granularity::Group { elements })],
        ) {
            let bits = Bits::new(bits).unwrap();
            let values: Vec<f32> = values.iter().map(|x| x + offset).collect();
            let ranges = ranges(&values, granularity);
            let affine = Encoding::affine(bits, granularity, &ranges).unwrap();
            let absmax = Encoding::absmax(bits, granularity, &ranges).ok();
            prop_assert_eq!(absmax.is_none(), bits.get() == 1);
            for encoding in [Some(affine), absmax].into_iter().flatten() {
                let decoded = round_trip(&encoding, &values);
                for (i, (x, y)) in values.iter().zip(&decoded).enumerate() {
                    let group = granularity.group_of(i);
                    let step = 1.0 / f64::from(encoding.map(group).scale);
                    let bound = step + 4.0 * f64::from(ranges[group].max_abs()) * f64::from(f32::EPSILON);
                    let step_unless_constant = if ranges[group].min == ranges[group].max { 0.0 } else { bound };
                    let error = (f64::from(*x) - f64::from(*y)).abs();
                    match &encoding {
                        Encoding::Affine { .. } => prop_assert!(error <= step_unless_constant, "{} {}", x, y),
                        _ => prop_assert!(error <= bound, "{} {}", x, y),
                    }
                }
            }
        }

        #[test]
        fn blocks_decode_like_the_whole(n in 1usize..2000, a in 0usize..2000, b in 0usize..2000, bits in 2u8..=8, elements in 1usize..400) {
            let values: Vec<f32> = (0..n).map(|i| ((i * 7919 % 1009) as f32 - 500.0) / 77.0).collect();
            let granularity = Granularity::Group { elements };
            let encoding = Encoding::affine(Bits::new(bits).unwrap(), granularity, &ranges(&values, granularity)).unwrap();
            let mut packed = vec![0; encoding.stored_len(DType::F32, n) as usize];
            encoding.encode(0, &values, &mut packed);
            let whole = round_trip(&encoding, &values);
            let (a, b) = (a % (n + 1), b % (n + 1));
            let range = a.min(b)..a.max(b);
            let (elements, bytes) = encoding.enclosing(&range, n).unwrap();
            let mut out = vec![0.0; elements.len()];
            encoding.decode(elements.start, &packed[bytes], &mut out);
            prop_assert_eq!(&out, &whole[elements]);
        }
    }

    fn staged(values: &[f32], bits: u8, n_stages: usize) -> Encoding {
        let bits = Bits::new(bits).unwrap();
        let mut encoding = Encoding::affine(bits, Granularity::Tensor, &[chunk_min_max(values)]).unwrap();
        for _ in 1..n_stages {
            let mut rest = values.to_vec();
            encoding.subtract_decoded(&mut rest);
            encoding = encoding.with_stage(chunk_min_max(&rest)).unwrap();
        }
        encoding
    }

    proptest! {
        /// Each stage codes what the ones before leave: its remainder is within a step of that stage.
        #[test]
        fn every_stage_shrinks_the_remainder(
            values in prop::collection::vec(-2f32..3.0, 1..900),
            bits in 1u8..=8,
            n_stages in 2usize..4,
        ) {
            let encoding = staged(&values, bits, n_stages);
            let Encoding::Residual { stages, .. } = &encoding else { panic!("several stages") };
            prop_assert_eq!(stages.len(), n_stages);
            let step = 1.0 / f64::from(stages[n_stages - 1].scale);
            for (x, y) in values.iter().zip(round_trip(&encoding, &values)) {
                let error = (f64::from(*x) - f64::from(y)).abs();
                prop_assert!(error <= step + 12.0 * f64::from(f32::EPSILON), "{} {}", x, y);
            }
        }

        #[test]
        fn residual_blocks_decode_like_the_whole(n in 1usize..1500, a in 0usize..1500, b in 0usize..1500, bits in 1u8..=8) {
            let values: Vec<f32> = (0..n).map(|i| ((i * 7919 % 1009) as f32 - 500.0) / 77.0).collect();
            let encoding = staged(&values, bits, 2);
            let mut packed = vec![0; encoding.stored_len(DType::F32, n) as usize];
            encoding.encode(0, &values, &mut packed);
            let whole = round_trip(&encoding, &values);
            let (a, b) = (a % (n + 1), b % (n + 1));
            let range = a.min(b)..a.max(b);
            let (elements, bytes) = encoding.enclosing(&range, n).unwrap();
            let mut out = vec![0.0; elements.len()];
            encoding.decode(elements.start, &packed[bytes], &mut out);
            prop_assert_eq!(&out, &whole[elements]);
        }
    }

    #[test]
    fn stages_of_constants_and_of_nothing_are_exact() {
        for values in [vec![], vec![0.25], vec![-3.0; 300], vec![0.0; 7], vec![1.0, -1.0]] {
            let encoding = staged(&values, 4, 3);
            assert_eq!(round_trip(&encoding, &values), values);
        }
    }

    #[test]
    fn parameters_are_checked() {
        let bits = Bits::new(4).unwrap();
        let tensor = Granularity::Tensor;
        let affine = |scale: Vec<f32>, zero_point: Vec<f32>| Encoding::Affine {
            bits,
            granularity: tensor,
            scale,
            zero_point,
        };
        let check = |encoding: Encoding| encoding.check(DType::F32, 10).unwrap_err();
        assert_eq!(check(affine(vec![], vec![0.0])), "it needs 1 scales, got 0");
        assert_eq!(check(affine(vec![1.0], vec![f32::NAN])), "its zero points must be finite, got NaN");
        assert_eq!(check(affine(vec![-1.0], vec![0.0])), "its scales must be positive, got -1");
        let grouped =
            Encoding::Absmax { bits, granularity: Granularity::Group { elements: 4 }, scale: vec![1.0; 2] };
        assert_eq!(check(grouped), "it needs 3 scales, got 2");
        let residual = |stages: Vec<AffineStage>| Encoding::Residual { bits, stages };
        assert_eq!(check(residual(vec![])), "it has no stages");
        let stage = AffineStage { scale: 0.0, zero_point: 1.0 };
        assert_eq!(check(residual(vec![stage])), "its scales must be positive and finite, got 0");
        assert_eq!(
            affine(vec![1.0], vec![0.0]).check(DType::F16, 10).unwrap_err(),
            "codes stand for F32 values, not F16"
        );
    }
}
