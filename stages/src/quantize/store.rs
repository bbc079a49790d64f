//! Writes tensors under their encodings, each looked at when its turn comes: while its values are still in memory it is coded, so that its
//! files are read once.

use super::calibrated::Rounder;
use super::choose::Chosen;
use super::diagnostics::{self, Buffers, Counted, QuantizationDiagnostics, TensorError};
use super::scheme::Setting;
use super::values::Memory;
use crate::{Draft, Job, StageError, checkpoint};
use merganser_tensors::manifest::{Content, Layout};
use merganser_tensors::stream::BLOCK_ELEMENTS;
use merganser_tensors::writer::{Block, OutputTensor, Payload};
use merganser_tensors::{DType, Encoding, Manifest, Result, Scratch, TensorSource};
use rayon::prelude::*;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// Stores `tensors` of a source as one artifact; those without a setting as they are.
pub(super) fn store(
    job: &Job<'_>,
    content: Content,
    source: &dyn TensorSource,
    tensors: &[usize],
    settings: &[Option<Setting>],
    rounder: &Rounder,
    measure: bool,
) -> std::result::Result<Draft, StageError> {
    let outputs: Vec<OutputTensor> = tensors
        .iter()
        .zip(settings)
        .map(|(tensor, setting)| output(source, *tensor, setting.as_ref()))
        .collect();
    let packing = Packing {
        source,
        tensors,
        settings,
        rounder,
        open: Mutex::default(),
        encodings: Mutex::default(),
        blocks: Mutex::default(),
        idle: Mutex::default(),
        memory: Memory::default(),
        measure,
    };
    let encoding = |name: &str| lock(&packing.encodings).get(name).map(|packed| packed.encoding.clone());
    let draft = checkpoint::store_packed(
        job,
        content,
        &outputs,
        &|ahead| packing.prepare(ahead),
        |output, range, block, scratch| packing.fill(output, range, block, scratch),
        &encoding,
    )?;
    if !measure {
        return Ok(draft);
    }
    let measured = packing.diagnostics(&draft)?;
    let blob = diagnostics::write(job.staging, &measured)?;
    Ok(Draft { blobs: draft.blobs.into_iter().chain([blob]).collect(), ..draft })
}

fn output(source: &dyn TensorSource, tensor: usize, setting: Option<&Setting>) -> OutputTensor {
    let info = &source.tensors()[tensor];
    let payload = match setting {
        Some(setting) => {
            let encoding = setting.encoding(info);
            Payload::Packed {
                bits: setting.bits,
                n_codes: encoding.n_codes(),
                tables_len: encoding.tables_len(info.n_elements()),
            }
        }
        // As it is, but a NaN in it is refused like one in its neighbours.
        None if matches!(info.dtype, DType::F32 | DType::F16 | DType::BF16) => Payload::Values(info.dtype),
        None => Payload::Bytes(info.dtype),
    };
    OutputTensor { name: info.name.clone(), shape: info.shape.clone(), payload }
}

/// One call of [`store`].
struct Packing<'a> {
    source: &'a dyn TensorSource,
    tensors: &'a [usize],
    settings: &'a [Option<Setting>],
    rounder: &'a Rounder,
    /// Tensors that are being written, by output.
    open: Mutex<HashMap<usize, Arc<Chosen<'a>>>>,
    /// What is known of those that were, by name.
    encodings: Mutex<HashMap<String, Packed>>,
    /// What was counted of blocks, by output and position.
    blocks: Mutex<HashMap<usize, Vec<(usize, Counted)>>>,
    idle: Mutex<Vec<Buffers>>,
    memory: Memory,
    measure: bool,
}

/// A tensor that was chosen, without its values.
struct Packed {
    output: usize,
    encoding: Encoding,
    form: merganser_tensors::encoding::Form,
    range: merganser_tensors::kernels::reduce::MinMax,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // Locks are never held while something can panic, so what they guard is whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Packing<'_> {
    /// Looks at the tensors whose blocks come next, and forgets those whose blocks are written.
    fn prepare(&self, outputs: &[usize]) -> Result<()> {
        let mut open = std::mem::take(&mut *lock(&self.open));
        for (_, done) in open.extract_if(|output, _| !outputs.contains(output)) {
            // Nobody else has it: its blocks are filled.
            if let Some(done) = Arc::into_inner(done) {
                done.values.give_back(&self.memory);
            }
        }
        let new: Vec<(usize, &Setting)> = outputs
            .iter()
            .filter(|output| !open.contains_key(output))
            .filter_map(|&output| Some((output, self.settings[output].as_ref()?)))
            .collect();
        let chosen: Vec<Result<(usize, Chosen<'_>)>> = new
            .into_par_iter()
            .map(|(output, setting)| {
                let tensor = self.tensors[output];
                let mut chosen = Chosen::new(self.source, tensor, setting, &self.memory)?;
                chosen.rounded = self.rounder.rounded(&self.source.tensors()[tensor].name, &chosen)?;
                Ok((output, chosen))
            })
            .collect();
        for chosen in chosen {
            let (output, chosen) = chosen?;
            let name = self.source.tensors()[self.tensors[output]].name.clone();
            let packed =
                Packed { output, encoding: chosen.encoding.clone(), form: chosen.form, range: chosen.range };
            lock(&self.encodings).insert(name, packed);
            open.insert(output, Arc::new(chosen));
        }
        *lock(&self.open) = open;
        Ok(())
    }

    fn fill(
        &self,
        output: usize,
        range: Range<usize>,
        block: Block<'_>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let tensor = self.tensors[output];
        if self.settings[output].is_none() {
            return match block {
                Block::Values(values) => self.source.read_f32(tensor, range, values, scratch),
                Block::Bytes(bytes) => checkpoint::copy_elements(self.source, tensor, range, bytes, scratch),
            };
        }
        let chosen = lock(&self.open)
            .get(&output)
            .cloned()
            .expect("blocks are filled after their tensors were chosen");
        let Block::Bytes(bytes) = block else { unreachable!("packed tensors are bytes") };
        if range.is_empty() {
            let Encoding::Grouped(grouped) = &chosen.encoding else { return Ok(()) };
            let mut tables = Vec::with_capacity(bytes.len());
            grouped.write_tables(&chosen.tables, &mut tables);
            bytes.copy_from_slice(&tables);
            return Ok(());
        }
        let (form, tables) = (&chosen.form, &chosen.tables);
        chosen.values.with(range.clone(), scratch, |values| {
            let coded = chosen.rounded.as_ref().map_or(values, |rounded| &rounded[range.clone()]);
            if self.measure {
                let mut buffers = lock(&self.idle).pop().unwrap_or_default();
                let (both, first) = ([values, coded], range.start);
                let counted = Counted::encode(form, tables, chosen.range, first, both, bytes, &mut buffers);
                lock(&self.idle).push(buffers);
                lock(&self.blocks).entry(output).or_default().push((range.start / BLOCK_ELEMENTS, counted));
            } else {
                form.encode(range.start, coded, tables, bytes);
            }
        })
    }

    /// Adds up what was counted, in the order of blocks.
    fn diagnostics(&self, draft: &Draft) -> std::result::Result<QuantizationDiagnostics, StageError> {
        let manifest = Manifest::from_json(draft.manifest.as_bytes())?;
        let Layout::Packed { tensors: stored, .. } = manifest.layout() else {
            return Ok(QuantizationDiagnostics::default());
        };
        let lengths: HashMap<&str, u64> = manifest
            .tensors()
            .iter()
            .zip(stored)
            .map(|(entry, packed)| (entry.name.as_str(), packed.length))
            .collect();
        let mut blocks = std::mem::take(&mut *lock(&self.blocks));
        let mut tensors = Vec::new();
        for (name, packed) in &*lock(&self.encodings) {
            let mut counted = blocks.remove(&packed.output).unwrap_or_default();
            counted.sort_by_key(|(index, _)| *index);
            let mut all = Counted::default();
            for (_, counted) in &counted {
                all.merge(counted);
            }
            let n = packed.form.n;
            let scale_bytes = packed.encoding.scale_bytes(n);
            let inline = scale_bytes - packed.encoding.tables_len(n);
            let stored = lengths.get(name.as_str()).copied().unwrap_or(0) + inline;
            let error = TensorError::new(name, &packed.form, scale_bytes, stored, packed.range, &all);
            tensors.push((error, all));
        }
        Ok(QuantizationDiagnostics::new(tensors))
    }
}
