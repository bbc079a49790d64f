//! Bit-packing of codes of 1–8 and of 16 bits.
//!
//! # Layout
//!
//! A tensor's codes are packed in groups of [`GROUP`] = 256 elements; every tensor starts on a byte. With
//! `b` bits a full group takes `32·b` bytes. Inside a group, element `32·r + l` (row `r` of 8, lane `l` of
//! 32) belongs to lane `l`; each lane is a little-endian bit string of its 8 codes, row 0 in the lowest
//! bits, `b` bytes long; byte `k` of lane `l` is stored at position `32·k + l` of the group. So a row of 32
//! codes is a row of 32 neighbouring bytes, every lane needs the same shifts, and both directions compile to
//! straight vector code at every width (a plain sequential bit string does not).
//!
//! The last `n mod 256` elements form one plain little-endian bit string: code `i` occupies bits `i·b` to
//! `i·b + b − 1`. The unused high bits of the last byte are zero. Hence `n` codes take exactly
//! `⌈n·b/8⌉` bytes ([`packed_len`]) and any multiple of 256 elements can be read on its own.

use std::ops::Range;

use serde::{Deserialize, Serialize};

/// Elements that are packed together.
pub const GROUP: usize = LANES * ROWS;

const LANES: usize = 32;
const ROWS: usize = 8;

/// Number of bits of a code: 1–8, or 16.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub struct Bits(u8);

/// A number of bits that codes do not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("codes have 1 to 8 bits, or 16, got {0}")]
pub struct BitsOutOfRange(pub u8);

impl Bits {
    pub fn new(bits: u8) -> Result<Self, BitsOutOfRange> {
        if (1..=8).contains(&bits) || bits == 16 { Ok(Self(bits)) } else { Err(BitsOutOfRange(bits)) }
    }

    pub fn get(self) -> u8 {
        self.0
    }

    /// Largest unsigned code, `2^b − 1`.
    pub fn max_code(self) -> u16 {
        u16::MAX >> (16 - self.0)
    }
}

/// What codes are held in while they are worked with: `u8` up to 8 bits, `u16` at 16.
pub trait Word: Copy + Default + Send + Sync + 'static {
    /// The lowest bits of a number.
    fn from_bits(bits: u32) -> Self;

    fn to_f32(self) -> f32;

    fn index(self) -> usize;

    /// The highest 8 bits.
    fn high_byte(self) -> u8;

    /// [`pack`] for this type.
    fn pack(codes: &[Self], bits: Bits, out: &mut [u8]);

    /// [`unpack`] for this type.
    fn unpack(packed: &[u8], bits: Bits, out: &mut [Self]);
}

impl Word for u8 {
    #[inline(always)]
    fn from_bits(bits: u32) -> Self {
        bits as Self
    }

    #[inline(always)]
    fn to_f32(self) -> f32 {
        self.into()
    }

    #[inline(always)]
    fn index(self) -> usize {
        self.into()
    }

    #[inline(always)]
    fn high_byte(self) -> u8 {
        self
    }

    #[inline(always)]
    fn pack(codes: &[Self], bits: Bits, out: &mut [u8]) {
        pack(codes, bits, out);
    }

    #[inline(always)]
    fn unpack(packed: &[u8], bits: Bits, out: &mut [Self]) {
        unpack(packed, bits, out);
    }
}

impl Word for u16 {
    #[inline(always)]
    fn from_bits(bits: u32) -> Self {
        bits as Self
    }

    #[inline(always)]
    fn to_f32(self) -> f32 {
        self.into()
    }

    #[inline(always)]
    fn index(self) -> usize {
        self.into()
    }

    #[inline(always)]
    fn high_byte(self) -> u8 {
        (self >> 8) as u8
    }

    #[inline(always)]
    fn pack(codes: &[Self], bits: Bits, out: &mut [u8]) {
        pack_wide(codes, bits, out);
    }

    #[inline(always)]
    fn unpack(packed: &[u8], bits: Bits, out: &mut [Self]) {
        unpack_wide(packed, bits, out);
    }
}

impl TryFrom<u8> for Bits {
    type Error = BitsOutOfRange;

    fn try_from(bits: u8) -> Result<Self, BitsOutOfRange> {
        Self::new(bits)
    }
}

impl From<Bits> for u8 {
    fn from(bits: Bits) -> u8 {
        bits.0
    }
}

/// Returns how many bytes `n` codes take: `⌈n·b/8⌉`.
#[inline(always)]
pub fn packed_len(n: usize, bits: Bits) -> usize {
    let width = bits.0 as usize;
    n / 8 * width + (n % 8 * width).div_ceil(8)
}

/// Returns the smallest element range around `range` that can be unpacked on its own in a tensor of `n`
/// elements, and the bytes that hold it.
pub fn enclosing_groups(range: &Range<usize>, n: usize, bits: Bits) -> (Range<usize>, Range<usize>) {
    debug_assert!(range.start <= range.end && range.end <= n);
    let start = range.start / GROUP * GROUP;
    let end = range.end.div_ceil(GROUP).saturating_mul(GROUP).min(n);
    (start..end, packed_len(start, bits)..packed_len(end, bits))
}

/// Packs `codes` into `out`, which holds exactly `packed_len(codes.len(), bits)` bytes. Bits of a code above
/// `bits`, at most 8, are ignored.
#[inline(always)]
pub fn pack(codes: &[u8], bits: Bits, out: &mut [u8]) {
    assert!(bits.0 <= 8, "codes of 16 bits are wide ones");
    assert_eq!(out.len(), packed_len(codes.len(), bits), "the packed size follows from the number of codes");
    let (groups, tail) = codes.as_chunks::<GROUP>();
    let (packed, packed_tail) = out.split_at_mut(groups.len() * LANES * bits.0 as usize);
    for (group, bytes) in groups.iter().zip(packed.chunks_exact_mut(LANES * bits.0 as usize)) {
        pack_group(group, bits, bytes);
    }
    pack_tail(tail, bits, packed_tail);
}

/// Unpacks `out.len()` codes from `packed`, which holds exactly `packed_len(out.len(), bits)` bytes.
#[inline(always)]
pub fn unpack(packed: &[u8], bits: Bits, out: &mut [u8]) {
    assert!(bits.0 <= 8, "codes of 16 bits are wide ones");
    assert_eq!(packed.len(), packed_len(out.len(), bits), "the packed size follows from the number of codes");
    let (groups, tail) = out.as_chunks_mut::<GROUP>();
    let (packed, packed_tail) = packed.split_at(groups.len() * LANES * bits.0 as usize);
    for (group, bytes) in groups.iter_mut().zip(packed.chunks_exact(LANES * bits.0 as usize)) {
        unpack_group(bytes, bits, group);
    }
    unpack_tail(packed_tail, bits, tail);
}

/// [`pack`] for codes of 16 bits: a row of 32 codes is a row of their low bytes and a row of their high bytes.
#[inline(always)]
fn pack_wide(codes: &[u16], bits: Bits, out: &mut [u8]) {
    assert_eq!(bits.0, 16, "narrower codes are bytes");
    assert_eq!(out.len(), packed_len(codes.len(), bits), "the packed size follows from the number of codes");
    let (rows, tail) = whole_rows(codes.len());
    let (full, packed_tail) = out.split_at_mut(2 * rows);
    for (row, bytes) in codes[..rows].chunks_exact(LANES).zip(full.chunks_exact_mut(2 * LANES)) {
        let (low, high) = bytes.split_at_mut(LANES);
        for ((low, high), code) in low.iter_mut().zip(high).zip(row) {
            [*low, *high] = code.to_le_bytes();
        }
    }
    for (code, bytes) in codes[tail].iter().zip(packed_tail.as_chunks_mut::<2>().0) {
        *bytes = code.to_le_bytes();
    }
}

/// The inverse of [`pack_wide`].
#[inline(always)]
fn unpack_wide(packed: &[u8], bits: Bits, out: &mut [u16]) {
    assert_eq!(bits.0, 16, "narrower codes are bytes");
    assert_eq!(packed.len(), packed_len(out.len(), bits), "the packed size follows from the number of codes");
    let (rows, tail) = whole_rows(out.len());
    let (full, packed_tail) = packed.split_at(2 * rows);
    for (row, bytes) in out[..rows].chunks_exact_mut(LANES).zip(full.chunks_exact(2 * LANES)) {
        let (low, high) = bytes.split_at(LANES);
        for ((code, low), high) in row.iter_mut().zip(low).zip(high) {
            *code = u16::from_le_bytes([*low, *high]);
        }
    }
    for (code, bytes) in out[tail].iter_mut().zip(packed_tail.as_chunks::<2>().0) {
        *code = u16::from_le_bytes(*bytes);
    }
}

/// The elements of `n` that lie in full groups, and the rest.
#[inline(always)]
fn whole_rows(n: usize) -> (usize, Range<usize>) {
    let full = n / GROUP * GROUP;
    (full, full..n)
}

/// Packs one full group into `32·b` bytes.
#[inline(always)]
pub(crate) fn pack_group(codes: &[u8; GROUP], bits: Bits, out: &mut [u8]) {
    match bits.0 {
        1 => pack_rows::<1>(codes, out),
        2 => pack_rows::<2>(codes, out),
        3 => pack_rows::<3>(codes, out),
        4 => pack_rows::<4>(codes, out),
        5 => pack_rows::<5>(codes, out),
        6 => pack_rows::<6>(codes, out),
        7 => pack_rows::<7>(codes, out),
        _ => out.copy_from_slice(codes),
    }
}

/// Unpacks one full group from `32·b` bytes.
#[inline(always)]
pub(crate) fn unpack_group(packed: &[u8], bits: Bits, codes: &mut [u8; GROUP]) {
    match bits.0 {
        1 => unpack_rows::<1>(packed, codes),
        2 => unpack_rows::<2>(packed, codes),
        3 => unpack_rows::<3>(packed, codes),
        4 => unpack_rows::<4>(packed, codes),
        5 => unpack_rows::<5>(packed, codes),
        6 => unpack_rows::<6>(packed, codes),
        7 => unpack_rows::<7>(packed, codes),
        _ => codes.copy_from_slice(packed),
    }
}

/// Packs fewer than [`GROUP`] codes as one little-endian bit string.
pub(crate) fn pack_tail(codes: &[u8], bits: Bits, out: &mut [u8]) {
    out.fill(0);
    let width = bits.0 as usize;
    for (i, &code) in codes.iter().enumerate() {
        let bit = i * width;
        let shifted = (u16::from(code) & bits.max_code()) << (bit % 8);
        out[bit / 8] |= shifted as u8;
        if bit % 8 + width > 8 {
            out[bit / 8 + 1] |= (shifted >> 8) as u8;
        }
    }
}

/// Unpacks fewer than [`GROUP`] codes from one little-endian bit string.
pub(crate) fn unpack_tail(packed: &[u8], bits: Bits, codes: &mut [u8]) {
    let width = bits.0 as usize;
    for (i, code) in codes.iter_mut().enumerate() {
        let bit = i * width;
        let low = u16::from(packed[bit / 8]);
        let high = if bit % 8 + width > 8 { u16::from(packed[bit / 8 + 1]) } else { 0 };
        *code = ((low | high << 8) >> (bit % 8) & bits.max_code()) as u8;
    }
}

#[inline(always)]
fn pack_rows<const B: usize>(codes: &[u8; GROUP], out: &mut [u8]) {
    let (rows, _) = out.as_chunks_mut::<LANES>();
    for (byte_idx, row) in rows.iter_mut().enumerate().take(B) {
        // One call per byte position with a constant, so that every shift below is a constant.
        match byte_idx {
            0 => pack_byte::<B, 0>(codes, row),
            1 => pack_byte::<B, 1>(codes, row),
            2 => pack_byte::<B, 2>(codes, row),
            3 => pack_byte::<B, 3>(codes, row),
            4 => pack_byte::<B, 4>(codes, row),
            5 => pack_byte::<B, 5>(codes, row),
            _ => pack_byte::<B, 6>(codes, row),
        }
    }
}

/// Assembles byte `K` of every lane from the codes whose bits reach into it.
#[inline(always)]
fn pack_byte<const B: usize, const K: usize>(codes: &[u8; GROUP], out: &mut [u8; LANES]) {
    let mask = u8::MAX >> (8 - B);
    for (lane, byte) in out.iter_mut().enumerate() {
        let mut assembled = 0;
        for row in 0..ROWS {
            let (start, end) = (row * B, row * B + B);
            if end > 8 * K && start < 8 * K + 8 {
                let code = codes[row * LANES + lane] & mask;
                assembled |= if start >= 8 * K { code << (start - 8 * K) } else { code >> (8 * K - start) };
            }
        }
        *byte = assembled;
    }
}

#[inline(always)]
fn unpack_rows<const B: usize>(packed: &[u8], codes: &mut [u8; GROUP]) {
    let (rows, _) = codes.as_chunks_mut::<LANES>();
    let packed = &packed[..LANES * B];
    for (row_idx, row) in rows.iter_mut().enumerate() {
        match row_idx {
            0 => unpack_row::<B, 0>(packed, row),
            1 => unpack_row::<B, 1>(packed, row),
            2 => unpack_row::<B, 2>(packed, row),
            3 => unpack_row::<B, 3>(packed, row),
            4 => unpack_row::<B, 4>(packed, row),
            5 => unpack_row::<B, 5>(packed, row),
            6 => unpack_row::<B, 6>(packed, row),
            _ => unpack_row::<B, 7>(packed, row),
        }
    }
}

/// Extracts the code of row `R` from every lane.
#[inline(always)]
fn unpack_row<const B: usize, const R: usize>(packed: &[u8], out: &mut [u8; LANES]) {
    let mask = u8::MAX >> (8 - B);
    let (byte, shift) = (R * B / 8, R * B % 8);
    let low = &packed[byte * LANES..][..LANES];
    if shift + B > 8 {
        let high = &packed[(byte + 1) * LANES..][..LANES];
        for ((code, &low), &high) in out.iter_mut().zip(low).zip(high) {
            *code = (low >> shift | high << (8 - shift)) & mask;
        }
    } else {
        for (code, &low) in out.iter_mut().zip(low) {
            *code = (low >> shift) & mask;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const WIDTHS: [u8; 9] = [1, 2, 3, 4, 5, 6, 7, 8, 16];

    /// Sets bit by bit, straight from the layout's description.
    fn reference_pack(codes: &[u16], bits: usize) -> Vec<u8> {
        let mut out = vec![0u8; (codes.len() * bits).div_ceil(8)];
        let full = codes.len() / 256 * 256;
        for (i, &code) in codes.iter().enumerate() {
            for bit in 0..bits {
                let (byte, position) = if i < full {
                    let (row, lane) = (i % 256 / 32, i % 32);
                    let lane_bit = row * bits + bit;
                    (i / 256 * 32 * bits + lane_bit / 8 * 32 + lane, lane_bit % 8)
                } else {
                    let tail_bit = (i - full) * bits + bit;
                    (full / 8 * bits + tail_bit / 8, tail_bit % 8)
                };
                out[byte] |= ((code >> bit & 1) as u8) << position;
            }
        }
        out
    }

    fn check(codes: &[u16], bits: u8) {
        if bits == 16 {
            check_words::<u16>(codes, bits, |code| code);
        } else {
            check_words::<u8>(codes, bits, |code| code as u8);
        }
    }

    fn check_words<W: Word + PartialEq + std::fmt::Debug>(codes: &[u16], bits: u8, word: fn(u16) -> W) {
        let width = Bits::new(bits).unwrap();
        let codes: Vec<u16> = codes.iter().map(|c| c & width.max_code()).collect();
        let words: Vec<W> = codes.iter().map(|code| word(*code)).collect();
        let mut packed = vec![0xAA; packed_len(codes.len(), width)];
        W::pack(&words, width, &mut packed);
        assert_eq!(packed, reference_pack(&codes, bits as usize), "{} codes of {bits} bits", codes.len());
        let mut unpacked = vec![W::default(); codes.len()];
        W::unpack(&packed, width, &mut unpacked);
        assert_eq!(unpacked, words, "{} codes of {bits} bits", codes.len());
    }

    #[test]
    fn packs_every_width_at_boundary_sizes() {
        for bits in WIDTHS {
            for n in [0, 1, 7, 8, 9, 31, 32, 33, 255, 256, 257, 511, 512, 513, 1000] {
                let codes: Vec<u16> = (0..n).map(|i: usize| (i * 37_123 % 65_521) as u16).collect();
                check(&codes, bits);
            }
        }
    }

    #[test]
    fn refuses_widths_that_codes_do_not_have() {
        assert!(Bits::new(0).is_err());
        assert_eq!(Bits::new(9).unwrap_err().to_string(), "codes have 1 to 8 bits, or 16, got 9");
        assert!(serde_json::from_str::<Bits>("12").is_err());
    }

    proptest! {
        #[test]
        fn packing_round_trips(codes in prop::collection::vec(any::<u16>(), 0..1200), bits in prop::sample::select(&WIDTHS[..])) {
            check(&codes, bits);
        }

        #[test]
        fn enclosing_groups_unpack_on_their_own(n in 1usize..1500, a in 0usize..1500, b in 0usize..1500, bits in 1u8..=8) {
            let bits = Bits::new(bits).unwrap();
            let (a, b) = (a % (n + 1), b % (n + 1));
            let range = a.min(b)..a.max(b);
            let codes: Vec<u8> = (0..n).map(|i| (i * 37 % 251) as u8 & bits.max_code() as u8).collect();
            let mut packed = vec![0; packed_len(n, bits)];
            pack(&codes, bits, &mut packed);
            let (elements, bytes) = enclosing_groups(&range, n, bits);
            prop_assert!(elements.start <= range.start && range.end <= elements.end.max(range.end));
            let mut unpacked = vec![0; elements.len()];
            unpack(&packed[bytes], bits, &mut unpacked);
            prop_assert_eq!(&unpacked, &codes[elements]);
        }
    }
}
