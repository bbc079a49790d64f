//! Coding and decoding under tables of scales.

#![expect(clippy::inline_always, reason = "what is not inlined is not compiled for wide vector units")]

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
use crate::kernels::wide::{Kernel, wide};

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
    #[inline(always)]
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
        wide(Encode { form: self, first, values, tables, packed, seen: None });
    }

    /// [`Self::encode`], showing on the way what it writes: the codes of all elements, stage by stage (of 16 bits, their upper byte), and what they
    /// decode to.
    pub fn encode_seen(
        &self,
        first: usize,
        values: &[f32],
        tables: &Tables,
        packed: &mut [u8],
        codes: &mut [u8],
        decoded: &mut [f32],
    ) {
        assert_eq!(packed.len(), self.codes_len(values.len()), "the packed size follows from the values");
        assert_eq!(codes.len(), values.len() * self.stages, "one code per value and stage");
        assert_eq!(decoded.len(), values.len(), "one value per value");
        let seen = Some(Seen { codes, decoded });
        wide(Encode { form: self, first, values, tables, packed, seen });
    }

    /// Unpacks and decodes elements `first..first + out.len()`; the inverse of [`Self::encode`].
    pub fn decode(&self, first: usize, packed: &[u8], tables: &Tables, out: &mut [f32]) {
        assert_eq!(packed.len(), self.codes_len(out.len()), "the packed size follows from the values");
        wide(Decode { form: self, first, packed, tables, out });
    }

    /// Replaces elements `first..first + values.len()` by what they decode to.
    pub fn round(&self, first: usize, values: &mut [f32], tables: &Tables) {
        wide(Round { form: self, first, values, tables });
    }

    /// Packs codes that were chosen elsewhere, those of stage `stage` of all elements of a tensor or of a block of it.
    pub fn pack<W: Word>(&self, stage: usize, codes: &[W], packed: &mut [u8]) {
        assert_eq!(packed.len(), self.codes_len(codes.len()), "the packed size follows from the codes");
        wide(Pack { form: self, stage, codes, packed });
    }

    /// Unpacks the codes of stage `stage`, without looking at what they stand for.
    pub fn unpack<W: Word>(&self, stage: usize, packed: &[u8], codes: &mut [W]) {
        assert_eq!(packed.len(), self.codes_len(codes.len()), "the packed size follows from the codes");
        wide(Unpack { form: self, stage, packed, codes });
    }

    /// Where the codes of a stage lie, packing group by packing group.
    #[inline(always)]
    fn places(&self, n: usize, stage: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let (bits, stages) = (self.bits, self.stages);
        (0..n.div_ceil(GROUP)).map(move |group| {
            let length = packed_len(GROUP.min(n - group * GROUP), bits);
            let start = group * packed_len(GROUP, bits) * stages + stage * length;
            start..start + length
        })
    }

    /// Codes of elements from `start` on, which share a packing group.
    #[inline(always)]
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

    #[inline(always)]
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
    #[inline(always)]
    fn is_short(&self, group: usize) -> bool {
        self.n - group * self.elements < self.elements
    }
}

/// What is shown of codes while they are written.
struct Seen<'a> {
    codes: &'a mut [u8],
    decoded: &'a mut [f32],
}

impl Seen<'_> {
    /// Takes codes of one stage, of elements from `start` on, and what they decode to.
    #[inline(always)]
    fn take<W: Word>(&mut self, stage: usize, start: usize, codes: &[W], decoded: &[f32]) {
        let place = start..start + codes.len();
        let sums = &mut self.decoded[place.clone()];
        if stage == 0 {
            sums.copy_from_slice(decoded);
        } else {
            sums.iter_mut().zip(decoded).for_each(|(sum, decoded)| *sum += decoded);
        }
        let n = self.decoded.len();
        let shown = &mut self.codes[stage * n..][place];
        shown.iter_mut().zip(codes).for_each(|(shown, code)| *shown = code.high_byte());
    }
}

/// [`Form::encode`].
struct Encode<'a> {
    form: &'a Form,
    first: usize,
    values: &'a [f32],
    tables: &'a Tables,
    packed: &'a mut [u8],
    seen: Option<Seen<'a>>,
}

impl Kernel for Encode<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        if self.form.bits.get() == 16 {
            self.words::<u16>();
        } else {
            self.words::<u8>();
        }
    }
}

impl Encode<'_> {
    #[inline(always)]
    fn words<W: Word>(self) {
        let Self { form, first, values, tables, mut packed, mut seen } = self;
        let mut codes = [W::default(); GROUP];
        let mut rest = [0f32; GROUP];
        let mut decoded = [0f32; GROUP];
        for (index, group) in values.chunks(GROUP).enumerate() {
            let (start, n) = (first + index * GROUP, group.len());
            for (stage, table) in tables.0.iter().enumerate() {
                let values = if stage == 0 { group } else { &rest[..n] };
                form.quantize(table, start, values, &mut codes[..n]);
                let (bytes, after) = packed.split_at_mut(packed_len(n, form.bits));
                W::pack(&codes[..n], form.bits, bytes);
                packed = after;
                let is_last = stage + 1 == tables.0.len();
                if is_last && seen.is_none() {
                    continue;
                }
                form.dequantize(table, start, &codes[..n], &mut decoded[..n]);
                if let Some(seen) = &mut seen {
                    seen.take(stage, index * GROUP, &codes[..n], &decoded[..n]);
                }
                if !is_last {
                    if stage == 0 {
                        rest[..n].copy_from_slice(group);
                    }
                    rest[..n].iter_mut().zip(&decoded[..n]).for_each(|(rest, decoded)| *rest -= decoded);
                }
            }
        }
    }
}

/// [`Form::round`].
struct Round<'a> {
    form: &'a Form,
    first: usize,
    values: &'a mut [f32],
    tables: &'a Tables,
}

impl Kernel for Round<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        if self.form.bits.get() == 16 {
            self.words::<u16>();
        } else {
            self.words::<u8>();
        }
    }
}

impl Round<'_> {
    #[inline(always)]
    fn words<W: Word>(self) {
        let Self { form, first, values, tables } = self;
        let mut codes = [W::default(); GROUP];
        let mut rest = [0f32; GROUP];
        let mut decoded = [0f32; GROUP];
        for (index, group) in values.chunks_mut(GROUP).enumerate() {
            let (start, n) = (first + index * GROUP, group.len());
            rest[..n].copy_from_slice(group);
            for (stage, table) in tables.0.iter().enumerate() {
                form.quantize(table, start, &rest[..n], &mut codes[..n]);
                form.dequantize(table, start, &codes[..n], &mut decoded[..n]);
                rest[..n].iter_mut().zip(&decoded[..n]).for_each(|(rest, decoded)| *rest -= decoded);
                if stage == 0 {
                    group.copy_from_slice(&decoded[..n]);
                } else {
                    group.iter_mut().zip(&decoded[..n]).for_each(|(sum, decoded)| *sum += decoded);
                }
            }
        }
    }
}

/// [`Form::decode`].
struct Decode<'a> {
    form: &'a Form,
    first: usize,
    packed: &'a [u8],
    tables: &'a Tables,
    out: &'a mut [f32],
}

impl Kernel for Decode<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        if self.form.bits.get() == 16 {
            self.words::<u16>();
        } else {
            self.words::<u8>();
        }
    }
}

impl Decode<'_> {
    #[inline(always)]
    fn words<W: Word>(self) {
        let Self { form, first, mut packed, tables, out } = self;
        let mut codes = [W::default(); GROUP];
        let mut decoded = [0f32; GROUP];
        for (index, group) in out.chunks_mut(GROUP).enumerate() {
            let (start, n) = (first + index * GROUP, group.len());
            for (stage, table) in tables.0.iter().enumerate() {
                let (bytes, after) = packed.split_at(packed_len(n, form.bits));
                W::unpack(bytes, form.bits, &mut codes[..n]);
                packed = after;
                if stage == 0 {
                    form.dequantize(table, start, &codes[..n], group);
                } else {
                    form.dequantize(table, start, &codes[..n], &mut decoded[..n]);
                    group.iter_mut().zip(&decoded[..n]).for_each(|(sum, decoded)| *sum += decoded);
                }
            }
        }
    }
}

/// [`Form::pack`].
struct Pack<'a, W> {
    form: &'a Form,
    stage: usize,
    codes: &'a [W],
    packed: &'a mut [u8],
}

impl<W: Word> Kernel for Pack<'_, W> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { form, stage, codes, packed } = self;
        for (group, place) in codes.chunks(GROUP).zip(form.places(codes.len(), stage)) {
            W::pack(group, form.bits, &mut packed[place]);
        }
    }
}

/// [`Form::unpack`].
struct Unpack<'a, W> {
    form: &'a Form,
    stage: usize,
    packed: &'a [u8],
    codes: &'a mut [W],
}

impl<W: Word> Kernel for Unpack<'_, W> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { form, stage, packed, codes } = self;
        let places = form.places(codes.len(), stage);
        for (group, place) in codes.chunks_mut(GROUP).zip(places) {
            W::unpack(&packed[place], form.bits, group);
        }
    }
}
