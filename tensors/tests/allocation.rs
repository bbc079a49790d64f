//! Memory that files from strangers can make the readers take: what the file itself backs, and a few megabytes.
//!
//! One test in a program of its own, since it counts what every thread allocates.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use merganser_tensors::formats::{Selection, masks, npy, pytorch, safetensors};

/// Bytes that may be taken beyond a multiple of the file.
const SLACK: usize = 4 << 20;

struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

#[expect(unsafe_code, reason = "an allocator is unsafe to implement")]
// SAFETY: everything is passed on to the system's allocator; counting does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        // SAFETY: the obligations are those of this function.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the obligations are those of this function.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Reads `bytes` as every format and returns the most memory that this took.
fn peak(bytes: &Vec<u8>) -> usize {
    let before = NOW.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let _ = pytorch::describe(bytes, &Selection::default());
    let _ = npy::describe(bytes, &Selection::default());
    let _ = masks::read_from(bytes);
    let _ = safetensors::read_header(bytes);
    PEAK.load(Ordering::Relaxed) - before
}

#[test]
fn claims_do_not_decide_how_much_memory_is_taken() {
    let huge = u64::MAX >> 1;
    let claims: Vec<(&str, Vec<u8>)> = vec![
        ("byte string", [b"\x80\x04\x8e", &huge.to_le_bytes()[..], b"."].concat()),
        ("text", [b"\x80\x04\x8d", &(huge >> 8).to_le_bytes()[..], b"."].concat()),
        ("frame", [b"\x80\x04\x95", &huge.to_le_bytes()[..], b"N."].concat()),
        ("number", [b"\x80\x02\x8b", &0x7fff_ffffu32.to_le_bytes()[..], b"."].concat()),
        ("memo", [b"\x80\x02Nr", &u32::MAX.to_le_bytes()[..], b"."].concat()),
        ("header", [&huge.to_le_bytes()[..], b"{}"].concat()),
        ("array", npy_file("(1152921504606846976,)")),
        ("array of objects", npy_file("(4611686018427387904, 4611686018427387904)")),
        ("directory", [b"PK\x03\x04", &zip_end(0xFFFF_FFF0, 8)[..]].concat()),
    ];
    for (what, bytes) in claims {
        let peak = peak(&bytes);
        assert!(peak <= SLACK, "{what}: {peak} bytes for a file of {}", bytes.len());
    }

    // instructions of one byte that make the largest values, and files of nothing but marks, memo entries and records
    let n = 300_000;
    let floods: Vec<(&str, Vec<u8>)> = vec![
        ("lists", b"]".repeat(n)),
        ("numbers", b"K\x01".repeat(n)),
        ("nothing", b"N".repeat(n)),
        ("marks", b"(".repeat(n)),
        ("memo", b"N\x94".repeat(n)),
        ("records", b"N))R0".repeat(n)),
        ("states", b"N))RNb0".repeat(n)),
        ("items", [b"}".to_vec(), b"NNs".repeat(n)].concat()),
        ("tuples", b"N\x85".repeat(n)),
    ];
    for (what, mut bytes) in floods {
        bytes.splice(0..0, *b"\x80\x02");
        bytes.push(b'.');
        let (peak, size) = (peak(&bytes), bytes.len());
        // a value takes 32 bytes, a record is a value and may have been reallocated
        assert!(peak <= SLACK + 80 * size, "{what}: {peak} bytes for a file of {size}");
        assert!(peak <= 100 << 20, "{what}: {peak} bytes for a file of {size}");
    }
    for instruction in [&b"]"[..], b"N\x94", b"N\x85", b"("] {
        let peak = peak(&instruction.repeat(2 << 20));
        assert!(peak <= 100 << 20, "{instruction:?} repeated: {peak} bytes");
    }

    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/torch");
    for entry in fs_err::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            let bytes = fs_err::read(&path).unwrap();
            let peak = peak(&bytes);
            assert!(peak <= SLACK + bytes.len(), "{}: {peak} bytes", path.display());
        }
    }
}

fn npy_file(shape: &str) -> Vec<u8> {
    let header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n");
    [b"\x93NUMPY\x01\0", &(header.len() as u16).to_le_bytes()[..], header.as_bytes()].concat()
}

fn zip_end(length: u32, offset: u32) -> Vec<u8> {
    [b"PK\x05\x06\0\0\0\0\x01\0\x01\0", &length.to_le_bytes()[..], &offset.to_le_bytes(), &[0, 0]].concat()
}
