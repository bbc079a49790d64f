//! An artifact store in memory, checkpoints made of values, and the folder of test data.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use blake3::Hash;
use merganser_tensors::formats;
use merganser_tensors::manifest::{Content, FileKind, FileRef};
use merganser_tensors::writer::{Block, OutputTensor, Payload, WriteOptions, write_tensors};
use merganser_tensors::{
    DType, FileReader, Manifest, ReadAt, Resolver, Result, Scratch, TensorInfo, TensorSource,
};

/// A tensor to put into a checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) data: Data,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Data {
    Values(Vec<f32>),
    Bytes(DType, Vec<u8>),
}

/// Files and manifests by digest.
#[derive(Default)]
pub(crate) struct Memory {
    files: HashMap<Hash, Arc<dyn ReadAt>>,
    manifests: HashMap<Hash, Manifest>,
    pub(crate) reads: Arc<AtomicUsize>,
}

struct Counted {
    bytes: Vec<u8>,
    reads: Arc<AtomicUsize>,
}

impl ReadAt for Counted {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        self.bytes.read_exact_at(buffer, offset)
    }

    fn name(&self) -> String {
        "memory".to_owned()
    }
}

impl Resolver for Memory {
    fn file(&self, file: &FileRef) -> Result<Arc<dyn ReadAt>> {
        self.files.get(&file.digest).cloned().ok_or_else(|| io::Error::from(io::ErrorKind::NotFound).into())
    }

    fn manifest(&self, artifact: &Hash) -> Result<Manifest> {
        self.manifests.get(artifact).cloned().ok_or_else(|| io::Error::from(io::ErrorKind::NotFound).into())
    }
}

impl Memory {
    pub(crate) fn add(&mut self, manifest: &Manifest) -> Hash {
        let digest = manifest.view_digest();
        self.manifests.insert(digest, manifest.clone());
        digest
    }

    pub(crate) fn checkpoint(&mut self, tensors: &[Tensor]) -> Manifest {
        let outputs: Vec<OutputTensor> = tensors.iter().map(Tensor::output).collect();
        let fill = |tensor: usize, range: Range<usize>, block: Block<'_>, _: &mut Scratch| {
            match (block, &tensors[tensor].data) {
                (Block::Values(out), Data::Values(values)) => out.copy_from_slice(&values[range]),
                (Block::Bytes(out), Data::Bytes(dtype, bytes)) => {
                    let size = dtype.size_bytes();
                    out.copy_from_slice(&bytes[range.start * size..range.end * size]);
                }
                _ => unreachable!("each tensor is asked for what it announced"),
            }
            Ok(())
        };
        let mut bytes = Vec::new();
        let written = write_tensors(&mut bytes, &outputs, fill, &WriteOptions::default()).unwrap();
        let file = FileRef { digest: blake3::hash(&bytes), size: written.size, kind: FileKind::Blob };
        self.files.insert(file.digest, Arc::new(Counted { bytes, reads: self.reads.clone() }));
        written.into_manifest(Content::Checkpoint, file).unwrap()
    }

    /// Opens a checkpoint from disk.
    pub(crate) fn load(&mut self, path: &Path) -> Manifest {
        let parts = formats::describe(path).unwrap();
        let digests = self.register(&parts);
        Manifest::of_checkpoint(Content::Checkpoint, &parts, &digests, |_| true).unwrap()
    }

    pub(crate) fn register(&mut self, parts: &[formats::FilePart]) -> Vec<Hash> {
        let digest = |part: &formats::FilePart| {
            let digest = blake3::hash(&fs_err::read(&part.path).unwrap());
            self.files.insert(digest, Arc::new(FileReader::open(&part.path).unwrap()));
            digest
        };
        parts.iter().map(digest).collect()
    }

    pub(crate) fn open(&self, manifest: &Manifest) -> Arc<dyn TensorSource> {
        merganser_tensors::open(manifest, self).unwrap()
    }

    pub(crate) fn refused(&self, manifest: &Manifest) -> String {
        merganser_tensors::open(manifest, self).err().expect("it is refused").to_string()
    }
}

impl Tensor {
    pub(crate) fn values(name: &str, shape: &[usize], values: Vec<f32>) -> Self {
        assert_eq!(values.len(), shape.iter().product::<usize>());
        Self { name: name.to_owned(), shape: shape.to_vec(), data: Data::Values(values) }
    }

    /// Values that differ everywhere, also between tensors of different names.
    pub(crate) fn numbered(name: &str, shape: &[usize]) -> Self {
        let seed = name.bytes().fold(7u32, |seed, byte| seed.wrapping_mul(31).wrapping_add(byte.into()));
        let n = shape.iter().product::<usize>() as u32;
        let value = |i: u32| ((i.wrapping_mul(2_654_435_761) ^ seed) >> 8) as f32 * 1e-6 - 8.0;
        Self::values(name, shape, (0..n).map(value).collect())
    }

    pub(crate) fn bytes(name: &str, dtype: DType, shape: &[usize]) -> Self {
        let n = shape.iter().product::<usize>() * dtype.size_bytes();
        let bytes = (0..n).map(|i| (i * 31 + i / 251) as u8).collect();
        Self { name: name.to_owned(), shape: shape.to_vec(), data: Data::Bytes(dtype, bytes) }
    }

    fn output(&self) -> OutputTensor {
        let payload = match &self.data {
            Data::Values(_) => Payload::Values(DType::F32),
            Data::Bytes(dtype, _) => Payload::Bytes(*dtype),
        };
        OutputTensor { name: self.name.clone(), shape: self.shape.clone(), payload }
    }

    /// Elements as bytes, and the size of one.
    pub(crate) fn elements(&self) -> (Vec<u8>, usize) {
        match &self.data {
            Data::Values(values) => (values.iter().flat_map(|value| value.to_le_bytes()).collect(), 4),
            Data::Bytes(dtype, bytes) => (bytes.clone(), dtype.size_bytes()),
        }
    }
}

pub(crate) fn info(name: &str, dtype: DType, shape: &[usize]) -> TensorInfo {
    TensorInfo { name: name.to_owned(), dtype, shape: shape.to_vec() }
}

/// A whole tensor.
pub(crate) fn read(source: &dyn TensorSource, name: &str) -> Vec<f32> {
    let tensor = source.index_of(name).unwrap_or_else(|| panic!("there is no `{name}`"));
    let mut values = vec![f32::NAN; source.tensors()[tensor].n_elements()];
    source.read_f32(tensor, 0..values.len(), &mut values, &mut Scratch::new()).unwrap();
    values
}

/// The bytes of a whole tensor.
pub(crate) fn read_bytes(source: &dyn TensorSource, name: &str) -> Vec<u8> {
    let tensor = source.index_of(name).unwrap_or_else(|| panic!("there is no `{name}`"));
    let mut bytes = vec![0; source.tensors()[tensor].size_bytes() as usize];
    source.read_bytes(tensor, 0..bytes.len() as u64, &mut bytes, &mut Scratch::new()).unwrap();
    bytes
}

/// The folder of test data, or `None` with a line that says so.
#[expect(clippy::print_stderr, reason = "a skipped test says so")]
pub(crate) fn test_data(test: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("MERGANSER_TEST_DATA");
    if folder.is_none() {
        eprintln!("skipped: {test} (MERGANSER_TEST_DATA is not set)");
    }
    folder.map(PathBuf::from)
}
