//! Working memory of one thread, which also lets views share what they read.
//!
//! A merge reads, per block, the base and eight differences from that base. Each of them asks for the same block of the
//! base; it is read (and widened, or decoded) once. For this, [`Scratch`] keeps blocks of the tensor and range that are being
//! read now, keyed by what they were read from ([`Leaf`]), and forgets them when another block begins.
//!
//! Keeping a block that nobody asks for again costs a copy, so the scratch learns: blocks of a file are kept
//! unless that file was read in an earlier block and no block of it was asked for twice. At most [`MAX_KEPT`] blocks are kept.

use std::collections::HashSet;
use std::ops::Range;

use blake3::Hash;

use crate::error::Result;

/// Bounds what the first block of a read over many files may hold.
const MAX_KEPT: usize = 16;

/// Buffers and kept blocks of one thread. Create one per thread and use it for many reads.
#[derive(Default)]
pub struct Scratch {
    tensor: String,
    range: Range<usize>,
    kept: Vec<Kept>,
    /// Leaves read in this block and not kept.
    seen: Vec<Leaf>,
    /// Files whose blocks are asked for once only.
    private: HashSet<Hash>,
    spare: Vec<Vec<f32>>,
    raw: Raw,
    /// What views that read other tensors or ranges work with, so that the blocks kept here stay.
    below: Option<Box<Self>>,
}

/// What a block was read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Leaf {
    /// Digest of the file.
    pub(crate) file: Hash,
    /// Digest of the file, the region and its interpretation: equal identities read equal values.
    pub(crate) identity: Hash,
}

struct Kept {
    leaf: Leaf,
    values: Vec<f32>,
    requests: usize,
}

/// Bytes as they lie in a file, aligned for every element type.
#[derive(Default)]
pub(crate) struct Raw(Vec<u64>);

impl Raw {
    pub(crate) fn bytes(&mut self, length: usize) -> &mut [u8] {
        let words = length.div_ceil(8);
        if self.0.len() < words {
            self.0.resize(words, 0);
        }
        &mut bytemuck::cast_slice_mut(&mut self.0[..words])[..length]
    }
}

impl Scratch {
    pub fn new() -> Self {
        Self::default()
    }

    /// Lends working memory of its own to a view that reads other tensors or ranges than it was asked for.
    pub(crate) fn below<T>(&mut self, work: impl FnOnce(&mut Self) -> T) -> T {
        let mut below = self.below.take().unwrap_or_default();
        let result = work(&mut below);
        self.below = Some(below);
        result
    }

    /// Says which block is being read. Everything kept for another one is forgotten.
    pub(crate) fn enter(&mut self, tensor: &str, range: &Range<usize>) {
        if self.tensor == tensor && self.range == *range {
            return;
        }
        for kept in self.kept.drain(..) {
            if kept.requests == 1 {
                self.private.insert(kept.leaf.file);
            }
            self.spare.push(kept.values);
        }
        self.seen.clear();
        self.tensor.clear();
        self.tensor.push_str(tensor);
        self.range = range.clone();
    }

    /// Writes the block of `leaf` to `out`; `load` reads it when it is not at hand.
    pub(crate) fn read(
        &mut self,
        leaf: &Leaf,
        out: &mut [f32],
        load: impl FnOnce(&mut [f32], &mut Raw) -> Result<()>,
    ) -> Result<()> {
        if let Some(kept) = self.kept.iter_mut().find(|kept| kept.leaf == *leaf) {
            kept.requests += 1;
            out.copy_from_slice(&kept.values);
            return Ok(());
        }
        load(out, &mut self.raw)?;
        if self.worth_keeping(leaf) {
            let mut values = self.take(out.len());
            values.copy_from_slice(out);
            self.keep(*leaf, values);
        }
        Ok(())
    }

    /// Hands the block of `leaf`, of `length` values, to `work`; `load` reads it when it is not at hand.
    pub(crate) fn with(
        &mut self,
        leaf: &Leaf,
        length: usize,
        load: impl FnOnce(&mut [f32], &mut Raw) -> Result<()>,
        work: impl FnOnce(&[f32]),
    ) -> Result<()> {
        if let Some(kept) = self.kept.iter_mut().find(|kept| kept.leaf == *leaf) {
            kept.requests += 1;
            work(&kept.values);
            return Ok(());
        }
        let mut values = self.take(length);
        load(&mut values, &mut self.raw)?;
        work(&values);
        if self.worth_keeping(leaf) {
            self.keep(*leaf, values);
        } else {
            self.give_back(values);
        }
        Ok(())
    }

    /// Lends a buffer of arbitrary content.
    pub fn take(&mut self, length: usize) -> Vec<f32> {
        let mut buffer = self.spare.pop().unwrap_or_default();
        buffer.resize(length, 0.0);
        buffer
    }

    /// Takes a buffer back, to lend it again.
    pub fn give_back(&mut self, buffer: Vec<f32>) {
        self.spare.push(buffer);
    }

    fn keep(&mut self, leaf: Leaf, values: Vec<f32>) {
        self.kept.push(Kept { leaf, values, requests: 1 });
    }

    fn worth_keeping(&mut self, leaf: &Leaf) -> bool {
        if self.seen.contains(leaf) {
            // Asked for twice after all, for instance because this tensor is the first that is shared.
            self.private.remove(&leaf.file);
        }
        let keep = self.kept.len() < MAX_KEPT && !self.private.contains(&leaf.file);
        if !keep {
            self.seen.push(*leaf);
        }
        keep
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(file: &str) -> Leaf {
        Leaf { file: blake3::hash(file.as_bytes()), identity: blake3::hash(format!("{file} 0").as_bytes()) }
    }

    /// Reads `leaves` for block `block` and returns which of them were loaded.
    fn loads<'a>(scratch: &mut Scratch, block: usize, leaves: &[&'a str]) -> Vec<&'a str> {
        scratch.enter("t", &(block * 4..block * 4 + 4));
        let mut loaded = Vec::new();
        for (i, name) in leaves.iter().enumerate() {
            let value = name.len() as f32;
            let mut out = [1.0; 4];
            let load = |values: &mut [f32], _: &mut Raw| {
                loaded.push(*name);
                values.fill(value);
                Ok(())
            };
            if i % 2 == 0 {
                scratch.read(&leaf(name), &mut out, load).unwrap();
                assert_eq!(out, [value; 4]);
            } else {
                scratch.with(&leaf(name), 4, load, |values| out.copy_from_slice(values)).unwrap();
                assert_eq!(out, [value; 4]);
            }
        }
        loaded
    }

    #[test]
    fn a_shared_leaf_is_loaded_once_per_block_from_the_first_block_on() {
        let mut scratch = Scratch::new();
        for block in 0..5 {
            let loaded = loads(&mut scratch, block, &["base", "one", "base", "second", "base"]);
            assert_eq!(loaded, ["base", "one", "second"]);
        }
    }

    #[test]
    fn private_leaves_are_not_kept_after_the_first_block() {
        let mut scratch = Scratch::new();
        loads(&mut scratch, 0, &["base", "one", "base", "second"]);
        loads(&mut scratch, 1, &["base", "one", "base", "second"]);
        assert_eq!(scratch.kept.len(), 1);
        // a file that turns out to be shared is loaded twice once, then kept
        assert_eq!(loads(&mut scratch, 2, &["one", "one", "one"]), ["one", "one"]);
        assert_eq!(loads(&mut scratch, 3, &["one", "one", "one"]), ["one"]);
    }

    #[test]
    fn memory_is_bounded_over_many_files() {
        let mut scratch = Scratch::new();
        let names: Vec<String> = (0..100).map(|i| format!("file {i}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        loads(&mut scratch, 0, &names);
        assert_eq!(scratch.kept.len(), MAX_KEPT);
        for block in 1..4 {
            loads(&mut scratch, block, &names);
        }
        assert!(scratch.spare.len() + scratch.kept.len() <= 2 * MAX_KEPT + 1);
    }

    #[test]
    fn raw_bytes_are_aligned_and_of_the_asked_length() {
        let mut raw = Raw::default();
        for length in [0, 1, 7, 8, 9, 100] {
            assert_eq!(raw.bytes(length).len(), length);
            assert_eq!(raw.bytes(length).as_ptr() as usize % 8, 0);
        }
    }
}
