//! Tables of sixteen numbers, looked up for many values at once: in vector registers, where the machine can permute them.
//!
//! A compiler makes scalar loads of an index into a table, and as many comparisons as there are numbers of a search. Both functions
//! give the same on every machine.

/// Values that are looked up together: the usual group of a code book, so that little is done in vain.
pub(super) const PART: usize = 64;

/// Writes how many of fifteen ascending numbers ([`levels`]) each value is above: a search that halves what is left four times.
#[inline(always)]
pub(super) fn ranks(tables: &[[f32; 8]; 4], values: &[f32; PART], out: &mut [u32; PART]) {
    #[cfg(target_arch = "x86_64")]
    if let Some(simd) = pulp::x86::V3::try_new() {
        let (values, _) = values.as_chunks();
        let (out, _) = out.as_chunks_mut();
        for (out, values) in out.iter_mut().zip(values) {
            *out = avx2::ranks(simd, tables, values);
        }
        return;
    }
    portable::ranks(tables, values, out);
}

/// Writes `table[index mod 16]` for every index.
#[inline(always)]
pub(super) fn pick(table: &[f32; 16], indices: &[u32; PART], out: &mut [f32; PART]) {
    #[cfg(target_arch = "x86_64")]
    if let Some(simd) = pulp::x86::V3::try_new() {
        let (indices, _) = indices.as_chunks();
        let (out, _) = out.as_chunks_mut();
        for (out, indices) in out.iter_mut().zip(indices) {
            *out = avx2::pick(simd, table, indices);
        }
        return;
    }
    portable::pick(table, indices, out);
}

/// Puts `table[word]` in the place of every word, all of which are below 16.
#[inline(always)]
pub(super) fn exchange(table: &[u8; 16], words: &mut [u32; PART]) {
    #[cfg(target_arch = "x86_64")]
    if let Some(simd) = pulp::x86::V3::try_new() {
        for words in words.as_chunks_mut().0 {
            *words = avx2::exchange(simd, table, words);
        }
        return;
    }
    portable::exchange(table, words);
}

/// The numbers of a search, level by level: on level l those with which 2^l parts are halved.
pub(super) const fn levels(ascending: &[f32; 15]) -> [[f32; 8]; 4] {
    let mut levels = [[0.0; 8]; 4];
    let mut level = 0;
    while level < 4 {
        let step = 16 >> level;
        let mut part = 0;
        while part < 1 << level {
            levels[level][part] = ascending[part * step + step / 2 - 1];
            part += 1;
        }
        level += 1;
    }
    levels
}

mod portable {
    use super::PART;

    #[inline(always)]
    pub(super) fn ranks(tables: &[[f32; 8]; 4], values: &[f32; PART], out: &mut [u32; PART]) {
        // One comparison after the other, each over all values, vectorizes everywhere.
        out.fill(0);
        for (level, table) in tables.iter().enumerate() {
            for number in &table[..1 << level] {
                for (out, value) in out.iter_mut().zip(values) {
                    *out += u32::from(value > number);
                }
            }
        }
    }

    #[inline(always)]
    pub(super) fn exchange(table: &[u8; 16], words: &mut [u32; PART]) {
        for word in words {
            *word = table[(*word & 15) as usize].into();
        }
    }

    #[inline(always)]
    pub(super) fn pick(table: &[f32; 16], indices: &[u32; PART], out: &mut [f32; PART]) {
        for (out, index) in out.iter_mut().zip(indices) {
            *out = table[(index & 15) as usize];
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use pulp::cast;
    use pulp::x86::V3;
    use std::arch::x86_64::{__m256, __m256i, _CMP_GT_OQ};

    #[inline(always)]
    pub(super) fn ranks(simd: V3, tables: &[[f32; 8]; 4], values: &[f32; 8]) -> [u32; 8] {
        let V3 { avx, avx2, .. } = simd;
        let values: __m256 = cast(*values);
        let mut part: __m256i = cast([0u32; 8]);
        for table in tables {
            let number = avx2._mm256_permutevar8x32_ps(cast(*table), part);
            // All bits where the value is above: −1, so that what is subtracted counts it.
            let above = cast(avx._mm256_cmp_ps::<_CMP_GT_OQ>(values, number));
            part = avx2._mm256_sub_epi32(avx2._mm256_add_epi32(part, part), above);
        }
        cast(part)
    }

    #[inline(always)]
    pub(super) fn exchange(simd: V3, table: &[u8; 16], words: &[u32; 8]) -> [u32; 8] {
        let V3 { avx2, .. } = simd;
        // Every byte is looked up in its half of the register; the upper three of a word are 0, and what stands for 0 there goes.
        let found = avx2._mm256_shuffle_epi8(cast([*table; 2]), cast(*words));
        cast(avx2._mm256_and_si256(found, cast([0xFFu32; 8])))
    }

    #[inline(always)]
    pub(super) fn pick(simd: V3, table: &[f32; 16], indices: &[u32; 8]) -> [f32; 8] {
        let V3 { avx, avx2, .. } = simd;
        let indices: __m256i = cast(*indices);
        // A permutation looks at the lowest three bits; the fourth chooses by the sign.
        let [low, high]: [__m256; 2] = cast(*table);
        let upper = cast(avx2._mm256_slli_epi32::<28>(indices));
        cast(avx._mm256_blendv_ps(
            avx2._mm256_permutevar8x32_ps(low, indices),
            avx2._mm256_permutevar8x32_ps(high, indices),
            upper,
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ASCENDING: [f32; 15] =
        [-9.0, -4.5, -2.0, -1.0, -0.5, -1e-40, 0.0, 1e-40, 0.25, 0.5, 1.0, 3.0, 8.0, 1e30, f32::INFINITY];

    fn values() -> [f32; PART] {
        let mut values = [0.0f32; PART];
        let special = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0, f32::MAX, f32::MIN, 2e-45, -2e-45];
        for (i, value) in values.iter_mut().enumerate() {
            *value = match i {
                0..8 => special[i],
                8..23 => ASCENDING[i - 8],
                23..38 => f32::from_bits(ASCENDING[i - 23].to_bits().wrapping_add(1)),
                _ => (i as f32 - 51.0) * 0.75,
            };
        }
        values
    }

    #[test]
    fn ranks_are_counted_comparisons_on_every_machine() {
        let values = values();
        let count =
            |numbers: &[f32], value: f32| numbers.iter().filter(|number| value > **number).count() as u32;
        let (mut wide, mut plain) = ([9; PART], [9; PART]);
        let tables = levels(&ASCENDING);
        ranks(&tables, &values, &mut wide);
        portable::ranks(&tables, &values, &mut plain);
        assert_eq!(wide, values.map(|value| count(&ASCENDING, value)));
        assert_eq!(plain, wide);
    }

    #[test]
    fn words_are_exchanged_on_every_machine() {
        let table: [u8; 16] = std::array::from_fn(|i| (200 + i * 3) as u8);
        let words: [u32; PART] = std::array::from_fn(|i| (i as u32 * 7) % 16);
        let (mut wide, mut plain) = (words, words);
        exchange(&table, &mut wide);
        portable::exchange(&table, &mut plain);
        assert_eq!(wide, words.map(|word| u32::from(table[word as usize])));
        assert_eq!(plain, wide);
    }

    #[test]
    fn entries_are_those_of_the_lowest_four_bits() {
        let table: [f32; 16] = std::array::from_fn(|i| i as f32 * 0.5 - 3.0);
        let indices: [u32; PART] = std::array::from_fn(|i| (i as u32 * 7) ^ ((i as u32) << 9));
        let (mut wide, mut plain) = ([9.0; PART], [9.0; PART]);
        pick(&table, &indices, &mut wide);
        portable::pick(&table, &indices, &mut plain);
        assert_eq!(wide, indices.map(|index| table[index as usize % 16]));
        assert_eq!(plain, wide);
    }
}
