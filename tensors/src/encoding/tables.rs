//! Scales of groups, and how they lie behind the codes of a tensor.
//!
//! Of each stage, one after the other:
//!
//! * single: a scale per group, then (affine codes) a zero point per group; f32, little-endian;
//! * double: the mean `m` of the scales, the largest magnitude `a_j` of every 256 of them less `m` (both f32), and a dynamic code of 8 bits
//!   per scale: `s_i = book[q_i]·a_⌊i/256⌋ + m` ([`crate::kernels::codebook`]).
//!
//! So the scales of any range of groups can be read on their own.

use std::ops::Range;

use crate::encoding::form::Code;
use crate::encoding::{Grouped, MAX_STAGES, Scales};
use crate::error::Result;
use crate::kernels::codebook;

/// Scales that share a scale of their own.
const DOUBLE_GROUP: usize = 256;

/// The scales of every stage for some groups of a tensor.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tables(pub Vec<Table>);

/// The scales of one stage for neighbouring groups.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Table {
    /// The group that the first entry belongs to.
    pub first: usize,
    pub scale: Vec<f32>,
    /// As long as `scale` for affine codes, otherwise empty.
    pub zero_point: Vec<f32>,
    /// The scales by which codes are chosen, where these are not the ones that they are decoded with; otherwise empty.
    pub coded_by: Vec<f32>,
}

impl Table {
    /// The scale by which the codes of a group are chosen.
    #[inline]
    pub(crate) fn coding_scale(&self, group: usize) -> f32 {
        let scales = if self.coded_by.is_empty() { &self.scale } else { &self.coded_by };
        scales[group - self.first]
    }
}

impl Tables {
    /// Fails with the reason when the scales cannot be used with codes of a sort.
    pub(crate) fn check(&self, code: Code) -> Result<(), String> {
        for Table { scale, zero_point, .. } in &self.0 {
            for (what, values) in [("scales", scale), ("zero points", zero_point)] {
                if let Some(value) = values.iter().find(|value| !value.is_finite()) {
                    return Err(format!("its {what} must be finite, got {value}"));
                }
            }
            if !code.has_book()
                && let Some(scale) = scale.iter().find(|scale| **scale <= 0.0)
            {
                return Err(format!("its scales must be positive, got {scale}"));
            }
        }
        Ok(())
    }
}

impl Grouped {
    pub(super) fn check(&self, n: usize) -> Result<(), String> {
        if self.elements == 0 {
            return Err("a group has no elements".to_owned());
        }
        if !(1..=MAX_STAGES).contains(&self.stages) {
            return Err(format!("it has {} stages, 1 to {MAX_STAGES} are possible", self.stages));
        }
        // A small scale beside large ones may come back as zero or negative: a book of codes can take that, a division cannot.
        if self.scales == Scales::Double && !self.code.has_book() {
            return Err("only scales of codes from a book can be quantized themselves".to_owned());
        }
        // so that offsets below cannot overflow
        if self.stage_len(n).checked_mul(self.stages as u64).is_none_or(|total| total > u64::MAX / 2) {
            return Err("its scales have more bytes than can be addressed".to_owned());
        }
        Ok(())
    }

    fn n_groups(&self, n: usize) -> usize {
        n.div_ceil(self.elements.max(1)).max(1)
    }

    /// Bytes of the scales of one stage.
    fn stage_len(&self, n: usize) -> u64 {
        let groups = self.n_groups(n) as u64;
        match self.scales {
            Scales::Single => groups.saturating_mul(if self.code.has_zero_point() { 8 } else { 4 }),
            Scales::Double => (4 + 4 * groups.div_ceil(DOUBLE_GROUP as u64)).saturating_add(groups),
        }
    }

    pub(super) fn tables_len(&self, n: usize) -> u64 {
        self.stage_len(n).saturating_mul(self.stages as u64)
    }

    /// Makes the table of a stage from the scales of all groups as they were chosen: those that codes are decoded with are what will be
    /// read from the file.
    pub fn table(&self, scale: Vec<f32>, zero_point: Vec<f32>) -> Table {
        if self.scales == Scales::Single {
            return Table { first: 0, scale, zero_point, coded_by: Vec::new() };
        }
        let doubled = Doubled::of(&scale);
        Table { first: 0, scale: doubled.decode(0..scale.len(), 0), zero_point, coded_by: scale }
    }

    /// Writes the scales of all groups as they lie in the file.
    pub fn write_tables(&self, tables: &Tables, out: &mut Vec<u8>) {
        for table in &tables.0 {
            match self.scales {
                Scales::Single => {
                    out.extend(bytemuck::cast_slice::<f32, u8>(&table.scale));
                    out.extend(bytemuck::cast_slice::<f32, u8>(&table.zero_point));
                }
                Scales::Double => {
                    let chosen = if table.coded_by.is_empty() { &table.scale } else { &table.coded_by };
                    let doubled = Doubled::of(chosen);
                    out.extend(doubled.mean.to_le_bytes());
                    out.extend(bytemuck::cast_slice::<f32, u8>(&doubled.largest));
                    out.extend(&doubled.codes);
                }
            }
        }
    }

    /// Reads the scales of some groups of a tensor of `n` elements; `read` fills a buffer from an offset within the tables.
    pub(crate) fn read_tables(
        &self,
        n: usize,
        groups: Range<usize>,
        mut read: impl FnMut(&mut [u8], u64) -> Result<()>,
    ) -> Result<Tables> {
        let n_groups = self.n_groups(n) as u64;
        let mut tables = Vec::with_capacity(self.stages);
        for stage in 0..self.stages as u64 {
            let start = stage * self.stage_len(n);
            let first = groups.start as u64;
            let mut table = Table { first: groups.start, ..Table::default() };
            match self.scales {
                Scales::Single => {
                    table.scale = floats(&mut read, groups.len(), start + 4 * first)?;
                    if self.code.has_zero_point() {
                        table.zero_point = floats(&mut read, groups.len(), start + 4 * (n_groups + first))?;
                    }
                }
                Scales::Double => {
                    let seconds = groups.start / DOUBLE_GROUP..groups.end.div_ceil(DOUBLE_GROUP);
                    let mean = floats(&mut read, 1, start)?[0];
                    let largest = floats(&mut read, seconds.len(), start + 4 + 4 * seconds.start as u64)?;
                    let behind = start + 4 + 4 * n_groups.div_ceil(DOUBLE_GROUP as u64);
                    let mut codes = vec![0; groups.len()];
                    read(&mut codes, behind + first)?;
                    let doubled = Doubled { mean, largest, codes };
                    table.scale = doubled.decode(groups.clone(), groups.start);
                }
            }
            tables.push(table);
        }
        Ok(Tables(tables))
    }
}

fn floats(
    read: &mut impl FnMut(&mut [u8], u64) -> Result<()>,
    count: usize,
    offset: u64,
) -> Result<Vec<f32>> {
    let mut values = vec![0f32; count];
    read(bytemuck::cast_slice_mut(&mut values), offset)?;
    Ok(values)
}

/// Scales that are quantized themselves.
struct Doubled {
    mean: f32,
    largest: Vec<f32>,
    codes: Vec<u8>,
}

impl Doubled {
    fn of(scales: &[f32]) -> Self {
        let mean = torch_sum(scales) / scales.len().max(1) as f32;
        let above: Vec<f32> = scales.iter().map(|scale| scale - mean).collect();
        let mut codes = vec![0; scales.len()];
        let mut largest = Vec::with_capacity(scales.len().div_ceil(DOUBLE_GROUP));
        for (above, codes) in above.chunks(DOUBLE_GROUP).zip(codes.chunks_mut(DOUBLE_GROUP)) {
            let magnitude = above.iter().fold(0f32, |largest, x| largest.max(x.abs()));
            codebook::quantize_dynamic(above, magnitude, codes);
            largest.push(magnitude);
        }
        Self { mean, largest, codes }
    }

    /// The scales of `groups`; `codes` begin with that of group `first`, `largest` with that of the 256 to which it belongs.
    fn decode(&self, groups: Range<usize>, first: usize) -> Vec<f32> {
        let book = codebook::dynamic();
        let second = first / DOUBLE_GROUP;
        let scale = |group: usize| {
            let code = self.codes[group - first];
            book[usize::from(code)] * self.largest[group / DOUBLE_GROUP - second] + self.mean
        };
        groups.map(scale).collect()
    }
}

/// The sum in the order in which PyTorch adds on a CPU (one thread, vectors of 8: `cascade_sum`), so that the mean is the same to the bit.
fn torch_sum(values: &[f32]) -> f32 {
    const LANES: usize = 8;
    const ROWS: usize = 4;
    const LEVELS: usize = 4;
    type Row = [[f32; LANES]; ROWS];
    let add = |to: &mut [f32; LANES], other: &[f32; LANES]| {
        to.iter_mut().zip(other).for_each(|(to, other)| *to += other);
    };
    let add_rows =
        |to: &mut Row, other: &Row| to.iter_mut().zip(other).for_each(|(to, other)| add(to, other));
    let (vectors, rest) = values.as_chunks::<LANES>();
    let (rows, rest_vectors) = vectors.as_chunks::<ROWS>();
    let levels_of_size = usize::BITS - rows.len().saturating_sub(1).leading_zeros();
    let power = (levels_of_size as usize / LEVELS).max(4);
    let step = 1usize << power;
    let mut sums = [[[0f32; LANES]; ROWS]; LEVELS];
    let mut done = 0;
    while done + step <= rows.len() {
        for row in &rows[done..done + step] {
            add_rows(&mut sums[0], row);
        }
        done += step;
        for level in 1..LEVELS {
            let below = std::mem::take(&mut sums[level - 1]);
            add_rows(&mut sums[level], &below);
            if done & ((step - 1) << (level * power)) != 0 {
                break;
            }
        }
    }
    for row in &rows[done..] {
        add_rows(&mut sums[0], row);
    }
    let [mut total, above @ ..] = sums;
    for row in &above {
        add_rows(&mut total, row);
    }
    let [mut first, others @ ..] = total;
    for vector in rest_vectors {
        add(&mut first, vector);
    }
    for other in &others {
        add(&mut first, other);
    }
    let rest: f32 = rest.iter().fold(0.0, |sum, x| sum + x);
    first.iter().fold(rest, |sum, x| sum + x)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_is_close_to_that_in_f64() {
        for n in [0, 1, 7, 8, 31, 32, 33, 511, 512, 513, 5000, 100_000] {
            let values: Vec<f32> = (0..n).map(|i| (i * 7919 % 1009) as f32 / 1009.0).collect();
            let exact: f64 = values.iter().map(|x| f64::from(*x)).sum();
            assert!((f64::from(torch_sum(&values)) - exact).abs() <= 1e-6 * exact, "{n}");
        }
    }
}
