//! The engine: waves of blocks, computed in parallel, hashed and written in order.

use std::io::Write;
use std::ops::Range;

use blake3::{Hash, Hasher};
use rayon::prelude::*;

use crate::DType;
use crate::encoding::Encoding;
use crate::error::{Error, Result};
use crate::kernels::convert;
use crate::scratch::Scratch;
use crate::source::check_finite;
use crate::stream::{Worker, Workers};
use crate::writer::layout::{Job, OutputTensor, Payload, Plan, Written};

/// Bytes that are computed before they are written.
pub const WAVE_BYTES: usize = 8 << 20;

/// Elements that are computed before they are written: what is known of their tensors may be kept in memory meanwhile.
const WAVE_ELEMENTS: usize = 4 << 20;

/// One block to be filled: every element of it.
pub enum Block<'a> {
    /// For [`Payload::Values`] and [`Payload::Codes`].
    Values(&'a mut [f32]),
    /// For [`Payload::Bytes`]: the elements' bytes, little-endian. For [`Payload::Packed`]: the elements' codes, and, with an empty range
    /// of elements, the scales behind all codes of a tensor.
    Bytes(&'a mut [u8]),
}

/// How to write.
pub struct WriteOptions<'a> {
    /// Called with the number of bytes written since the last call.
    pub progress: &'a dyn Fn(u64),
    /// Asked between waves; true ends the write with [`Error::Cancelled`].
    pub cancelled: &'a dyn Fn() -> bool,
    /// Accept NaN and infinity in [`Payload::Values`]. Otherwise they are errors that name tensor and element. Codes
    /// cannot stand for them, and values that only overflow in a half type are errors in any case.
    pub allow_non_finite: bool,
    /// Compute the digest of every tensor.
    pub tensor_digests: bool,
    /// The one metadata entry of the header.
    pub metadata: Option<(&'a str, &'a str)>,
    /// Called with the positions of the tensors whose blocks are filled next, each time before some are: for values that can only be
    /// computed a whole tensor at a time.
    pub prepare: &'a (dyn Fn(&[usize]) -> Result<()> + Sync),
}

impl Default for WriteOptions<'_> {
    fn default() -> Self {
        Self {
            progress: &|_| {},
            cancelled: &|| false,
            allow_non_finite: false,
            tensor_digests: true,
            metadata: None,
            prepare: &|_| Ok(()),
        }
    }
}

/// Writes `tensors` to `out`. `fill` is called from several threads, once per block, with the position of the tensor in
/// `tensors` and the elements to provide.
pub fn write_tensors<W: Write + Send>(
    out: &mut W,
    tensors: &[OutputTensor],
    fill: impl Fn(usize, Range<usize>, Block<'_>, &mut Scratch) -> Result<()> + Sync,
    options: &WriteOptions<'_>,
) -> Result<Written> {
    let plan = Plan::new(tensors, options.metadata)?;
    let filler =
        Filler { plan: &plan, fill: &fill, workers: Workers::new(), options: FillOptions::of(options) };
    let mut sink = Sink::new(out, &plan, options.tensor_digests);
    sink.out.write_all(&plan.header)?;
    (options.progress)(plan.header.len() as u64);

    let mut jobs = plan.jobs();
    let mut current = Wave::default();
    let mut next = Wave::default();
    current.plan(&mut jobs);
    filler.fill(&mut current)?;
    while !current.jobs.is_empty() {
        if (options.cancelled)() {
            return Err(Error::Cancelled);
        }
        next.plan(&mut jobs);
        let (written, filled) = rayon::join(|| sink.write(&current), || filler.fill(&mut next));
        written?;
        (options.progress)(current.length as u64);
        filled?;
        std::mem::swap(&mut current, &mut next);
    }
    sink.out.flush()?;
    let digests = sink.finish();
    Ok(plan.written(digests))
}

/// [`write_tensors`] for tensors that are all computed in `f32` and stored as `dtype`.
pub fn write_f32_tensors<W: Write + Send>(
    out: &mut W,
    tensors: &[(String, Vec<usize>)],
    dtype: DType,
    fill: impl Fn(usize, Range<usize>, &mut [f32], &mut Scratch) -> Result<()> + Sync,
    options: &WriteOptions<'_>,
) -> Result<Written> {
    let tensors: Vec<OutputTensor> = tensors
        .iter()
        .map(|(name, shape)| OutputTensor {
            name: name.clone(),
            shape: shape.clone(),
            payload: Payload::Values(dtype),
        })
        .collect();
    let fill = |tensor, range, block: Block<'_>, scratch: &mut Scratch| match block {
        Block::Values(values) => fill(tensor, range, values, scratch),
        Block::Bytes(_) => unreachable!("only values were announced"),
    };
    write_tensors(out, &tensors, fill, options)
}

/// Some consecutive blocks and their bytes.
#[derive(Default)]
struct Wave {
    jobs: Vec<Job>,
    /// Bytes in use.
    length: usize,
    /// Eight-byte words keep every block aligned: wider types come first in a file.
    buffer: Vec<u64>,
}

impl Wave {
    fn plan(&mut self, jobs: &mut impl Iterator<Item = Job>) {
        self.jobs.clear();
        self.length = 0;
        let mut elements = 0;
        while self.length < WAVE_BYTES && elements < WAVE_ELEMENTS {
            let Some(job) = jobs.next() else { break };
            elements += job.range.len();
            self.length += job.length;
            self.jobs.push(job);
        }
        let words = self.length.div_ceil(8);
        if self.buffer.len() < words {
            self.buffer.resize(words, 0);
        }
    }

    fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.buffer)[..self.length]
    }

    fn blocks(&mut self) -> Vec<(&Job, &mut [u8])> {
        let mut rest: &mut [u8] = &mut bytemuck::cast_slice_mut(&mut self.buffer)[..self.length];
        let mut blocks = Vec::with_capacity(self.jobs.len());
        for job in &self.jobs {
            let (block, after) = rest.split_at_mut(job.length);
            blocks.push((job, block));
            rest = after;
        }
        blocks
    }
}

/// Computes waves.
struct Filler<'a, F> {
    plan: &'a Plan<'a>,
    fill: &'a F,
    workers: Workers,
    options: FillOptions<'a>,
}

/// The part of [`WriteOptions`] that other threads need.
#[derive(Clone, Copy)]
struct FillOptions<'a> {
    allow_non_finite: bool,
    prepare: &'a (dyn Fn(&[usize]) -> Result<()> + Sync),
}

impl<'a> FillOptions<'a> {
    fn of(options: &WriteOptions<'a>) -> Self {
        Self { allow_non_finite: options.allow_non_finite, prepare: options.prepare }
    }
}

impl<F: Fn(usize, Range<usize>, Block<'_>, &mut Scratch) -> Result<()> + Sync> Filler<'_, F> {
    /// Fills all blocks of a wave; of several errors, the first in the order of the file is returned.
    fn fill(&self, wave: &mut Wave) -> Result<()> {
        if wave.jobs.is_empty() {
            return Ok(());
        }
        let mut tensors: Vec<usize> =
            wave.jobs.iter().map(|job| self.plan.tensors[job.planned].position).collect();
        tensors.dedup();
        (self.options.prepare)(&tensors)?;
        let results: Vec<Result<()>> = wave
            .blocks()
            .into_par_iter()
            .map(|(job, bytes)| self.workers.with(|worker| self.fill_block(job, bytes, worker)))
            .collect();
        results.into_iter().collect()
    }

    fn fill_block(&self, job: &Job, bytes: &mut [u8], worker: &mut Worker) -> Result<()> {
        let planned = &self.plan.tensors[job.planned];
        let name = &planned.tensor.name;
        let (range, start) = (job.range.clone(), job.range.start);
        let Worker { scratch, values } = worker;
        match &planned.tensor.payload {
            Payload::Bytes(_) | Payload::Packed { .. } => {
                (self.fill)(planned.position, range, Block::Bytes(bytes), scratch)
            }
            Payload::Values(DType::F32) | Payload::Codes(Encoding::Plain) => {
                let values: &mut [f32] = bytemuck::cast_slice_mut(bytes);
                (self.fill)(planned.position, range, Block::Values(values), scratch)?;
                self.check(name, start, values)
            }
            Payload::Values(dtype) => {
                values.resize(range.len(), 0.0);
                (self.fill)(planned.position, range, Block::Values(values), scratch)?;
                self.check(name, start, values)?;
                narrow(*dtype, values, bytes);
                check_fits(name, *dtype, start, values, bytes)
            }
            Payload::Codes(encoding) => {
                values.resize(range.len(), 0.0);
                (self.fill)(planned.position, range, Block::Values(values), scratch)?;
                check_finite(name, start, values)?;
                let n = planned.n_elements();
                let (form, tables) = (encoding.form(n), encoding.tables());
                let (form, tables) =
                    form.zip(tables).expect("plain tensors and scales of groups were sorted out");
                form.encode(start, values, &tables, bytes);
                Ok(())
            }
        }
    }

    fn check(&self, name: &str, start: usize, values: &[f32]) -> Result<()> {
        if self.options.allow_non_finite { Ok(()) } else { check_finite(name, start, values) }
    }
}

fn narrow(dtype: DType, values: &[f32], bytes: &mut [u8]) {
    if dtype == DType::F16 {
        convert::narrow_f16(values, bytemuck::cast_slice_mut(bytes));
    } else {
        convert::narrow_bf16(values, bytemuck::cast_slice_mut(bytes));
    }
}

/// Fails when a finite value became infinite by narrowing.
fn check_fits(name: &str, dtype: DType, start: usize, values: &[f32], bytes: &[u8]) -> Result<()> {
    let limit = if dtype == DType::F16 { 65_520.0 } else { f32::from_bits(0x7F7F_8000) };
    let overflows = |x: f32| x.is_finite() && x.abs() >= limit;
    // The common case costs one pass over the halves' exponents.
    let exponent: u16 = if dtype == DType::F16 { 0x7C00 } else { 0x7F80 };
    let stored: &[u16] = bytemuck::cast_slice(bytes);
    let suspicious = stored.iter().fold(0u32, |n, bits| n | u32::from(bits & exponent == exponent));
    if suspicious == 0 {
        return Ok(());
    }
    match values.iter().position(|&x| overflows(x)) {
        None => Ok(()),
        Some(i) => {
            let (tensor, element, value) = (name.to_owned(), start + i, values[i]);
            Err(Error::DoesNotFit { tensor, dtype, element, value })
        }
    }
}

/// Writes waves in order and hashes what belongs to each tensor.
struct Sink<'a, W> {
    out: &'a mut W,
    digests: Vec<Option<Hash>>,
    /// The tensor being written, and what of it was written.
    current: usize,
    hasher: Hasher,
    enabled: bool,
}

impl<'a, W: Write> Sink<'a, W> {
    fn new(out: &'a mut W, plan: &Plan<'_>, enabled: bool) -> Self {
        let digests = vec![None; plan.tensors.len()];
        Self { out, digests, current: 0, hasher: Hasher::new(), enabled }
    }

    fn write(&mut self, wave: &Wave) -> Result<()> {
        let bytes = wave.bytes();
        if self.enabled {
            let mut start = 0;
            for same_tensor in wave.jobs.chunk_by(|left, right| left.planned == right.planned) {
                self.advance_to(same_tensor[0].planned);
                let length: usize = same_tensor.iter().map(|job| job.length).sum();
                self.hash(&bytes[start..start + length]);
                start += length;
            }
        }
        self.out.write_all(bytes)?;
        Ok(())
    }

    fn hash(&mut self, bytes: &[u8]) {
        // Splitting small inputs over threads costs more than it gains.
        if bytes.len() >= 1 << 20 {
            self.hasher.update_rayon(bytes);
        } else {
            self.hasher.update(bytes);
        }
    }

    /// Finishes the digests of all tensors before `planned`. Tensors without elements have no block.
    fn advance_to(&mut self, planned: usize) {
        while self.current < planned {
            self.digests[self.current] = Some(self.hasher.finalize());
            self.hasher.reset();
            self.current += 1;
        }
    }

    fn finish(mut self) -> Vec<Option<Hash>> {
        if self.enabled {
            self.advance_to(self.digests.len());
        }
        self.digests
    }
}

#[cfg(test)]
mod tests;
