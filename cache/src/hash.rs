//! Hashing of files: BLAKE3 over parallel positioned reads.
//!
//! BLAKE3 is a tree, so each thread reads and hashes a leaf of [`LEAF`] bytes that stays in its L2 cache, and the
//! chaining values are merged. The result is the plain BLAKE3 of the bytes, whatever the number of threads. Files
//! are walked in windows of [`WINDOW`] bytes, so that reads stay nearly sequential. No memory maps: a file that
//! shrinks under a map kills the process.
//!
//! All of it runs on a pool of its own. On the global pool, a thread that waits for a hash could wait for workers
//! that in turn wait for that thread, for instance when workers send blocks to a thread that writes them.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::OnceLock;

use blake3::Hasher;
use blake3::hazmat::{
    ChainingValue, HasherExt as _, Mode, left_subtree_len, merge_subtrees_non_root, merge_subtrees_root,
};

/// Returns the BLAKE3 of the first `size` bytes of a file, telling `progress` how many bytes each step took.
///
/// A file shorter than `size` is an [`io::ErrorKind::UnexpectedEof`].
pub(crate) fn hash_file(file: &File, size: u64, progress: &(dyn Fn(u64) + Sync)) -> io::Result<blake3::Hash> {
    if size <= LEAF {
        let hash = with_leaf(file, 0, size, blake3::hash)?;
        progress(size);
        return Ok(hash);
    }
    on_hash_pool(|| {
        let (left, right) = halves(file, 0, size, progress)?;
        Ok(merge_subtrees_root(&left, &right, Mode::Hash))
    })
}

/// Runs `work` on the crate's own threads, or where it is if there can be none.
pub(crate) fn on_hash_pool<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    static POOL: OnceLock<Option<rayon::ThreadPool>> = OnceLock::new();
    let pool = POOL.get_or_init(|| {
        rayon::ThreadPoolBuilder::new()
            .num_threads(rayon::current_num_threads())
            .thread_name(|idx| format!("hash-{idx}"))
            .build()
            .ok()
    });
    match pool {
        Some(pool) => pool.install(work),
        None => work(),
    }
}

/// Bytes read and hashed at once by one thread. INVARIANT: a power of two of at least 1024, BLAKE3's chunk.
const LEAF: u64 = 256 << 10;
/// Bytes hashed in parallel before going on. INVARIANT: a power of two.
const WINDOW: u64 = 32 << 20;

fn subtree(file: &File, offset: u64, len: u64, progress: &(dyn Fn(u64) + Sync)) -> io::Result<ChainingValue> {
    if len <= LEAF {
        let value = with_leaf(file, offset, len, |bytes| {
            Hasher::new().set_input_offset(offset).update(bytes).finalize_non_root()
        })?;
        progress(len);
        return Ok(value);
    }
    let (left, right) = halves(file, offset, len, progress)?;
    Ok(merge_subtrees_non_root(&left, &right, Mode::Hash))
}

fn halves(
    file: &File,
    offset: u64,
    len: u64,
    progress: &(dyn Fn(u64) + Sync),
) -> io::Result<(ChainingValue, ChainingValue)> {
    let n_left = left_subtree_len(len);
    let left = || subtree(file, offset, n_left, progress);
    let right = || subtree(file, offset + n_left, len - n_left, progress);
    if len > WINDOW {
        Ok((left()?, right()?))
    } else {
        let (left, right) = rayon::join(left, right);
        Ok((left?, right?))
    }
}

/// Reads a leaf into this thread's buffer and hands it to `hash`, which must not call into rayon.
fn with_leaf<T>(file: &File, offset: u64, len: u64, hash: impl FnOnce(&[u8]) -> T) -> io::Result<T> {
    thread_local! {
        static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    }
    BUFFER.with_borrow_mut(|buffer| {
        let len = len as usize;
        if buffer.len() < len {
            buffer.resize(len, 0);
        }
        let bytes = &mut buffer[..len];
        file.read_exact_at(bytes, offset)?;
        Ok(hash(bytes))
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    /// A cycle of 251 bytes, so that swapped or repeated blocks show.
    fn pattern(n_bytes: usize) -> Vec<u8> {
        (0..n_bytes).map(|idx| (idx % 251) as u8).collect()
    }

    #[test]
    fn agrees_with_blake3_around_every_boundary() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        let (leaf, window) = (LEAF as usize, WINDOW as usize);
        let mut sizes = vec![0, 1, 1023, 1024, 1025, 3 * leaf + 7];
        for edge in [leaf, 2 * leaf, 4 * leaf, window, window + leaf] {
            sizes.extend([edge - 1, edge, edge + 1]);
        }
        for size in sizes {
            let bytes = pattern(size);
            fs_err::write(&path, &bytes).unwrap();
            let seen = AtomicU64::new(0);
            let add = |n_bytes| {
                seen.fetch_add(n_bytes, Ordering::Relaxed);
            };
            let hash = hash_file(&File::open(&path).unwrap(), size as u64, &add).unwrap();
            assert_eq!(hash, blake3::hash(&bytes), "{size} bytes");
            assert_eq!(seen.into_inner(), size as u64);
        }
    }

    #[test]
    fn short_file_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        fs_err::write(&path, pattern(LEAF as usize)).unwrap();
        let file = File::open(&path).unwrap();
        for size in [LEAF + 1, 3 * LEAF] {
            let error = hash_file(&file, size, &|_| {}).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        }
    }
}
