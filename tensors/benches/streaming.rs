//! One streaming merge (base plus 0.3 of eight differences) against reading the same bytes, and its private memory.
//!
//! Run with `cargo bench -p merganser-tensors --bench streaming [-- MIB_PER_CHECKPOINT]`. The files are written to the temporary
//! folder first, so they are in the page cache in both measurements.
#![allow(clippy::print_stdout, reason = "the table is what this program is for")]

use std::collections::HashMap;
use std::io::{Read, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use blake3::Hash;
use merganser_tensors::manifest::{Content, FileRef, Term};
use merganser_tensors::writer::{WriteOptions, write_f32_tensors};
use merganser_tensors::{
    DType, FileReader, Manifest, ReadAt, Resolver, Result, TensorInfo, TensorSource, formats, open,
};

const TASKS: usize = 8;
const PASSES: usize = 5;
const TENSOR_ELEMENTS: usize = 3072 * 768;

fn main() {
    let mib = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(128);
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut store = Store::default();
    let n_tensors = ((mib << 20) / 4 / TENSOR_ELEMENTS).max(1);
    let checkpoints: Vec<Manifest> =
        (0..=TASKS).map(|i| store.checkpoint(&folder.path().join(format!("{i}")), i, n_tensors)).collect();
    let base = &checkpoints[0];
    let artifact = |manifest: &Manifest| blake3::hash(&manifest.to_json());
    for manifest in &checkpoints {
        store.manifests.insert(artifact(manifest), manifest.clone());
    }
    let infos: Vec<TensorInfo> =
        base.tensors().iter().map(merganser_tensors::manifest::TensorEntry::info).collect();
    let deltas: Vec<Arc<dyn TensorSource>> = checkpoints[1..]
        .iter()
        .map(|tuned| {
            let terms = [(1.0, tuned), (-1.0, base)]
                .map(|(coefficient, manifest)| Term::new(coefficient, artifact(manifest)));
            let view =
                Manifest::linear(Content::TaskVectors, infos.clone(), terms.to_vec()).expect("a valid view");
            open(&view, &store).expect("an artifact that opens")
        })
        .collect();
    let base = open(base, &store).expect("an artifact that opens");
    let bytes: u64 = store.paths.values().map(|path| fs_err::metadata(path).expect("a file").len()).sum();

    let read = best(|| {
        let mut buffer = vec![0; 1 << 17];
        for path in store.paths.values() {
            let mut file = fs_err::File::open(path).expect("a file");
            while file.read(&mut buffer).expect("a readable file") > 0 {}
        }
    });
    let outputs: Vec<_> = infos.iter().map(|info| (info.name.clone(), info.shape.clone())).collect();
    let merge = best(|| {
        let fill = |tensor: usize, range: std::ops::Range<usize>, out: &mut [f32], scratch: &mut _| {
            base.read_f32(tensor, range.clone(), out, scratch)?;
            deltas.iter().try_for_each(|delta| delta.add_scaled(tensor, range.clone(), 0.3, out, scratch))
        };
        let options = WriteOptions { tensor_digests: true, ..WriteOptions::default() };
        write_f32_tensors(&mut std::io::sink(), &outputs, DType::F32, fill, &options).expect("a merge");
    });
    println!(
        "{:.2} GB in {} checkpoints, {} threads",
        bytes as f64 / 1e9,
        TASKS + 1,
        rayon::current_num_threads()
    );
    println!("reading             {read:>7.3} s {:>6.2} GB/s", bytes as f64 / read / 1e9);
    println!(
        "merging, digests    {merge:>7.3} s {:>6.2} GB/s, {:.2} × reading",
        bytes as f64 / merge / 1e9,
        merge / read
    );
    if let Some(peak) = peak_memory() {
        println!("peak memory         {peak}");
    }
}

fn best(mut pass: impl FnMut()) -> f64 {
    let times = (0..PASSES).map(|_| {
        let start = Instant::now();
        pass();
        start.elapsed().as_secs_f64()
    });
    times.fold(f64::INFINITY, f64::min)
}

/// Resident high-water mark; files are read, not mapped, so it is private memory.
fn peak_memory() -> Option<String> {
    let status = fs_err::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    Some(line.trim_start_matches("VmHWM:").trim().to_owned())
}

#[derive(Default)]
struct Store {
    paths: HashMap<Hash, std::path::PathBuf>,
    manifests: HashMap<Hash, Manifest>,
}

impl Store {
    /// Writes a checkpoint of equal tensors; `seed` makes its values its own.
    fn checkpoint(&mut self, path: &Path, seed: usize, n_tensors: usize) -> Manifest {
        let outputs: Vec<_> =
            (0..n_tensors).map(|i| (format!("layer.{i:03}.weight"), vec![3072, 768])).collect();
        let fill = |_: usize, range: std::ops::Range<usize>, out: &mut [f32], _: &mut _| {
            for (x, i) in out.iter_mut().zip(range) {
                *x = ((i + seed) * 7919 % 10_007) as f32 * 1e-4;
            }
            Ok(())
        };
        let mut file = std::io::BufWriter::new(fs_err::File::create(path).expect("a new file"));
        write_f32_tensors(&mut file, &outputs, DType::F32, fill, &WriteOptions::default())
            .expect("a checkpoint");
        file.flush().expect("a written file");
        let parts = formats::describe(path).expect("a checkpoint");
        // The seed stands for the content: hashing is not what is measured here.
        let digest = blake3::hash(&seed.to_le_bytes());
        self.paths.insert(digest, path.to_owned());
        Manifest::of_checkpoint(Content::Checkpoint, &parts, &[digest], |_| true).expect("a valid manifest")
    }
}

impl Resolver for Store {
    fn file(&self, file: &FileRef) -> Result<Arc<dyn ReadAt>> {
        Ok(Arc::new(FileReader::open(&self.paths[&file.digest])?))
    }

    fn manifest(&self, artifact: &Hash) -> Result<Manifest> {
        Ok(self.manifests[artifact].clone())
    }
}
