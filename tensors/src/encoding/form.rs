//! Coding and decoding under tables of scales.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::encoding::tables::{Table, Tables};
use crate::kernels::codebook::{self, FP4, NF4};
use crate::kernels::pack::{Bits, GROUP, Word, packed_len};
use crate::kernels::quantize::{
    CodeMap, QuantizeError, dequantize, dequantize_symmetric, quantize_absmax, quantize_affine,
    quantize_symmetric, signed_offset, symmetric_step,
};
use crate::kernels::reduce::MinMax;

/// How a code stands for a value under the scale `s` of its group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Code {
    /// `(q − z)/s`, with a zero point `z` per group.
    Affine,
    /// `(q − 2^(b−1))/s`.
    Absmax,
    /// `(q − 2^(b−1))·s`.
    Symmetric,
    /// `book[q]·s`, 16 quantiles of the normal distribution; 4 bits.
    Nf4,
    /// `book[q]·s`, 4-bit floats; 4 bits.
    Fp4,
    /// `book[q]·s`, 256 numbers of a dynamic exponent; 8 bits.
    Dynamic,
}

/// Scale and zero point of a group.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scale {
    pub scale: f32,
    /// Of affine codes; otherwise 0.
    pub zero_point: f32,
}

impl Code {
    /// Fails with the reason when codes of this sort do not have that width.
    pub(crate) fn check(self, bits: Bits) -> Result<(), String> {
        match (self, bits.get()) {
            (Self::Absmax | Self::Symmetric, 1) => Err(QuantizeError::SignedAtOneBit.to_string()),
            (Self::Nf4 | Self::Fp4, bits) if bits != 4 => {
                Err(format!("its code book has 4 bits, not {bits}"))
            }
            (Self::Dynamic, bits) if bits != 8 => Err(format!("its code book has 8 bits, not {bits}")),
            _ => Ok(()),
        }
    }

    /// Whether groups have a zero point.
    pub fn has_zero_point(self) -> bool {
        self == Self::Affine
    }

    /// Whether values are looked up in a book, so that a scale may be any finite number.
    pub fn has_book(self) -> bool {
        matches!(self, Self::Nf4 | Self::Fp4 | Self::Dynamic)
    }

    /// Chooses the scale for values within `range`; an empty range counts as zero.
    pub fn scale(self, range: MinMax, bits: Bits) -> Result<Scale, QuantizeError> {
        let of = |scale| Scale { scale, zero_point: 0.0 };
        match self {
            Self::Affine => {
                let (min, max) = if range.is_empty() { (0.0, 0.0) } else { (range.min, range.max) };
                let map = CodeMap::affine(min, max, bits)?;
                Ok(Scale { scale: map.scale, zero_point: map.zero_point })
            }
            Self::Absmax => CodeMap::absmax(range.max_abs(), bits).map(|map| of(map.scale)),
            Self::Symmetric => symmetric_step(range.max_abs(), bits).map(of),
            Self::Nf4 | Self::Fp4 | Self::Dynamic => {
                let largest = range.max_abs();
                if largest.is_finite() {
                    Ok(of(largest))
                } else {
                    Err(QuantizeError::NotFinite { min: range.min, max: range.max })
                }
            }
        }
    }
}

/// What is known about the codes of a tensor but for their scales.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Form {
    pub bits: Bits,
    pub code: Code,
    /// Elements that share a scale; 1 at least.
    pub elements: usize,
    /// Codes per element.
    pub stages: usize,
    /// Elements of the tensor.
    pub n: usize,
}

impl Form {
    /// Number of groups, each with a scale per stage; 1 at least.
    pub fn n_groups(&self) -> usize {
        self.n.div_ceil(self.elements).max(1)
    }

    /// The groups that some elements belong to.
    pub fn groups(&self, elements: &Range<usize>) -> Range<usize> {
        if elements.is_empty() {
            return 0..0;
        }
        elements.start / self.elements..(elements.end - 1) / self.elements + 1
    }

    /// Cuts an element range at group boundaries.
    pub fn split(&self, range: Range<usize>) -> impl Iterator<Item = (usize, Range<usize>)> + use<> {
        let (mut start, elements) = (range.start, self.elements);
        std::iter::from_fn(move || {
            if start >= range.end {
                return None;
            }
            let group = start / elements;
            let end = (group + 1).saturating_mul(elements).min(range.end);
            let part = start..end;
            start = end;
            Some((group, part))
        })
    }

    /// Bytes of the codes of `n` elements, beginning on a packing group.
    pub fn codes_len(&self, n: usize) -> usize {
        packed_len(n, self.bits) * self.stages
    }

    /// Quantizes and packs elements `first..first + values.len()`, which are finite; `first` is a multiple of the packing group, and
    /// `tables` cover the groups of these elements.
    pub fn encode(&self, first: usize, values: &[f32], tables: &Tables, packed: &mut [u8]) {
        assert_eq!(packed.len(), self.codes_len(values.len()), "the packed size follows from the values");
        if self.bits.get() == 16 {
            self.encode_words::<u16>(first, values, tables, packed);
        } else {
            self.encode_words::<u8>(first, values, tables, packed);
        }
    }

    /// Unpacks and decodes elements `first..first + out.len()`; the inverse of [`Self::encode`].
    pub fn decode(&self, first: usize, packed: &[u8], tables: &Tables, out: &mut [f32]) {
        assert_eq!(packed.len(), self.codes_len(out.len()), "the packed size follows from the values");
        if self.bits.get() == 16 {
            self.decode_words::<u16>(first, packed, tables, out);
        } else {
            self.decode_words::<u8>(first, packed, tables, out);
        }
    }

    /// Replaces elements `first..first + values.len()` by what they decode to.
    pub fn round(&self, first: usize, values: &mut [f32], tables: &Tables) {
        if self.bits.get() == 16 {
            self.round_words::<u16>(first, values, tables);
        } else {
            self.round_words::<u8>(first, values, tables);
        }
    }

    /// Packs codes that were chosen elsewhere, those of stage `stage` of all elements of a tensor or of a block of it.
    pub fn pack<W: Word>(&self, stage: usize, codes: &[W], packed: &mut [u8]) {
        assert_eq!(packed.len(), self.codes_len(codes.len()), "the packed size follows from the codes");
        for (group, place) in codes.chunks(GROUP).zip(self.places(codes.len(), stage)) {
            W::pack(group, self.bits, &mut packed[place]);
        }
    }

    /// Unpacks the codes of stage `stage`, without looking at what they stand for.
    pub fn unpack<W: Word>(&self, stage: usize, packed: &[u8], codes: &mut [W]) {
        assert_eq!(packed.len(), self.codes_len(codes.len()), "the packed size follows from the codes");
        let places = self.places(codes.len(), stage);
        for (group, place) in codes.chunks_mut(GROUP).zip(places) {
            W::unpack(&packed[place], self.bits, group);
        }
    }

    /// Where the codes of a stage lie, packing group by packing group.
    fn places(&self, n: usize, stage: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let (bits, stages) = (self.bits, self.stages);
        (0..n.div_ceil(GROUP)).map(move |group| {
            let length = packed_len(GROUP.min(n - group * GROUP), bits);
            let start = group * packed_len(GROUP, bits) * stages + stage * length;
            start..start + length
        })
    }

    fn encode_words<W: Word>(&self, first: usize, values: &[f32], tables: &Tables, packed: &mut [u8]) {
        let mut codes = [W::default(); GROUP];
        let mut rest = [0f32; GROUP];
        let mut decoded = [0f32; GROUP];
        let mut packed = packed;
        for (index, group) in values.chunks(GROUP).enumerate() {
            let (start, n) = (first + index * GROUP, group.len());
            for (stage, table) in tables.0.iter().enumerate() {
                let values = if stage == 0 { group } else { &rest[..n] };
                self.quantize(table, start, values, &mut codes[..n]);
                let (bytes, after) = packed.split_at_mut(packed_len(n, self.bits));
                W::pack(&codes[..n], self.bits, bytes);
                packed = after;
                if stage + 1 < tables.0.len() {
                    self.dequantize(table, start, &codes[..n], &mut decoded[..n]);
                    if stage == 0 {
                        rest[..n].copy_from_slice(group);
                    }
                    rest[..n].iter_mut().zip(&decoded[..n]).for_each(|(rest, decoded)| *rest -= decoded);
                }
            }
        }
    }

    fn round_words<W: Word>(&self, first: usize, values: &mut [f32], tables: &Tables) {
        let mut codes = [W::default(); GROUP];
        let mut rest = [0f32; GROUP];
        let mut decoded = [0f32; GROUP];
        for (index, group) in values.chunks_mut(GROUP).enumerate() {
            let (start, n) = (first + index * GROUP, group.len());
            rest[..n].copy_from_slice(group);
            for (stage, table) in tables.0.iter().enumerate() {
                self.quantize(table, start, &rest[..n], &mut codes[..n]);
                self.dequantize(table, start, &codes[..n], &mut decoded[..n]);
                rest[..n].iter_mut().zip(&decoded[..n]).for_each(|(rest, decoded)| *rest -= decoded);
                if stage == 0 {
                    group.copy_from_slice(&decoded[..n]);
                } else {
                    group.iter_mut().zip(&decoded[..n]).for_each(|(sum, decoded)| *sum += decoded);
                }
            }
        }
    }

    fn decode_words<W: Word>(&self, first: usize, packed: &[u8], tables: &Tables, out: &mut [f32]) {
        let mut codes = [W::default(); GROUP];
        let mut decoded = [0f32; GROUP];
        let mut packed = packed;
        for (index, group) in out.chunks_mut(GROUP).enumerate() {
            let (start, n) = (first + index * GROUP, group.len());
            for (stage, table) in tables.0.iter().enumerate() {
                let (bytes, after) = packed.split_at(packed_len(n, self.bits));
                W::unpack(bytes, self.bits, &mut codes[..n]);
                packed = after;
                if stage == 0 {
                    self.dequantize(table, start, &codes[..n], group);
                } else {
                    self.dequantize(table, start, &codes[..n], &mut decoded[..n]);
                    group.iter_mut().zip(&decoded[..n]).for_each(|(sum, decoded)| *sum += decoded);
                }
            }
        }
    }

    /// Codes of elements from `start` on, which share a packing group.
    fn quantize<W: Word>(&self, table: &Table, start: usize, values: &[f32], codes: &mut [W]) {
        for (group, part) in self.split(start..start + values.len()) {
            let part = part.start - start..part.end - start;
            let (values, codes) = (&values[part.clone()], &mut codes[part]);
            let scale = table.coding_scale(group);
            match self.code {
                Code::Affine => {
                    let map = CodeMap { scale, zero_point: table.zero_point[group - table.first] };
                    quantize_affine(values, map, self.bits, codes);
                }
                Code::Absmax => {
                    let map = CodeMap { scale, zero_point: signed_offset(self.bits) };
                    quantize_absmax(values, map, self.bits, codes);
                }
                Code::Symmetric => quantize_symmetric(values, scale, self.bits, codes),
                Code::Nf4 => codebook::quantize_nf4(values, scale, self.is_short(group), codes),
                Code::Fp4 => codebook::quantize_fp4(values, scale, self.is_short(group), codes),
                Code::Dynamic => codebook::quantize_dynamic(values, scale, codes),
            }
        }
    }

    fn dequantize<W: Word>(&self, table: &Table, start: usize, codes: &[W], out: &mut [f32]) {
        for (group, part) in self.split(start..start + out.len()) {
            let part = part.start - start..part.end - start;
            let (codes, out) = (&codes[part.clone()], &mut out[part]);
            let scale = table.scale[group - table.first];
            match self.code {
                Code::Affine => {
                    let map = CodeMap { scale, zero_point: table.zero_point[group - table.first] };
                    dequantize(codes, map, out);
                }
                Code::Absmax => {
                    dequantize(codes, CodeMap { scale, zero_point: signed_offset(self.bits) }, out);
                }
                Code::Symmetric => dequantize_symmetric(codes, scale, self.bits, out),
                Code::Nf4 => codebook::dequantize_16(codes, &NF4, scale, out),
                Code::Fp4 => codebook::dequantize_16(codes, &FP4, scale, out),
                Code::Dynamic => codebook::dequantize_dynamic(codes, scale, out),
            }
        }
    }

    /// Whether a group is a last one of fewer elements.
    fn is_short(&self, group: usize) -> bool {
        self.n - group * self.elements < self.elements
    }
}
