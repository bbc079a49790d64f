//! The scales of a tensor, chosen by looking at all of its values.

use super::clip;
use super::scheme::Setting;
use super::values::{KEPT_ELEMENTS, Memory, Values};
use merganser_tensors::encoding::{Form, Table, Tables};
use merganser_tensors::kernels::reduce::{MinMax, chunk_min_max};
use merganser_tensors::{Encoding, Error, Result, TensorInfo, TensorSource};
use std::ops::Range;

/// A tensor ready to be coded.
pub(super) struct Chosen<'a> {
    pub(super) values: Values<'a>,
    pub(super) encoding: Encoding,
    pub(super) form: Form,
    pub(super) tables: Tables,
    /// Extremes of all values; empty of nothing.
    pub(super) range: MinMax,
    /// What is coded in place of the values, where they were rounded by other means than the nearest codes.
    pub(super) rounded: Option<Vec<f32>>,
}

/// Extremes of the groups that a block meets.
type GroupRanges = Vec<(usize, MinMax)>;

impl<'a> Chosen<'a> {
    /// Reads a tensor and chooses its scales, stage by stage.
    pub(super) fn new(
        source: &'a dyn TensorSource,
        tensor: usize,
        setting: &Setting,
        memory: &Memory,
    ) -> Result<Self> {
        Self::keeping(source, tensor, setting, KEPT_ELEMENTS, memory)
    }

    /// [`Self::new`], keeping values in memory only of tensors of up to `kept` elements.
    pub(super) fn keeping(
        source: &'a dyn TensorSource,
        tensor: usize,
        setting: &Setting,
        kept: usize,
        memory: &Memory,
    ) -> Result<Self> {
        let info = &source.tensors()[tensor];
        let n = info.n_elements();
        let encoding = setting.encoding(info);
        let form = encoding.form(n).expect("quantized tensors have codes");
        let (values, looks) =
            Values::read(source, tensor, kept, memory, |range, values| group_ranges(&form, range, values))?;
        let mut ranges = merged(&form, looks);
        let range = ranges.iter().copied().fold(MinMax::EMPTY, MinMax::merge);
        let mut tables = Tables::default();
        for stage in 0..form.stages {
            if stage > 0 {
                let left = values.blocks(|range, values| {
                    let left = left_over(&form, &tables, range.start, values);
                    Ok(group_ranges(&form, range, &left))
                })?;
                ranges = merged(&form, left);
            }
            clip::shrink(setting.clip, &form, &values, &tables, &mut ranges)?;
            let table = table(info, &encoding, &form, &ranges)?;
            tables.0.push(table);
        }
        let encoding = encoding.with_tables(&tables);
        Ok(Self { values, encoding, form, tables, range, rounded: None })
    }
}

/// What is left of values after the stages that there are tables for.
pub(super) fn left_over(form: &Form, tables: &Tables, first: usize, values: &[f32]) -> Vec<f32> {
    if tables.0.is_empty() {
        return values.to_vec();
    }
    let mut left = values.to_vec();
    form.round(first, &mut left, tables);
    left.iter_mut().zip(values).for_each(|(left, value)| *left = value - *left);
    left
}

fn group_ranges(form: &Form, range: Range<usize>, values: &[f32]) -> GroupRanges {
    let start = range.start;
    let part = |(group, part): (usize, Range<usize>)| {
        (group, chunk_min_max(&values[part.start - start..part.end - start]))
    };
    form.split(range).map(part).collect()
}

fn merged(form: &Form, blocks: Vec<GroupRanges>) -> Vec<MinMax> {
    let mut ranges = vec![MinMax::EMPTY; form.n_groups()];
    for (group, range) in blocks.into_iter().flatten() {
        ranges[group] = ranges[group].merge(range);
    }
    ranges
}

/// The table of a stage whose groups have these ranges.
fn table(info: &TensorInfo, encoding: &Encoding, form: &Form, ranges: &[MinMax]) -> Result<Table> {
    let mut scale = Vec::with_capacity(ranges.len());
    let mut zero_point = Vec::new();
    for range in ranges {
        let chosen = form.code.scale(*range, form.bits);
        let chosen = chosen.map_err(|problem| Error::Quantize { tensor: info.name.clone(), problem })?;
        scale.push(chosen.scale);
        if form.code.has_zero_point() {
            zero_point.push(chosen.zero_point);
        }
    }
    Ok(match encoding {
        Encoding::Grouped(grouped) => grouped.table(scale, zero_point),
        _ => Table { scale, zero_point, ..Table::default() },
    })
}
