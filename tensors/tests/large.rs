//! A PyTorch archive of 12 GiB, listed by reading its ends: the directory, the headers of its members and the pickle.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use merganser_tensors::ReadAt;
use merganser_tensors::formats::{Selection, pytorch};

const GIB: u64 = 1 << 30;

/// Zeros, except for a few pieces.
#[derive(Default)]
struct Sparse {
    size: u64,
    pieces: Vec<(u64, Vec<u8>)>,
    read: AtomicU64,
}

impl Sparse {
    fn append(&mut self, bytes: &[u8]) {
        self.pieces.push((self.size, bytes.to_vec()));
        self.size += bytes.len() as u64;
    }
}

impl ReadAt for Sparse {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.read.fetch_add(buffer.len() as u64, Ordering::Relaxed);
        let end = offset + buffer.len() as u64;
        if end > self.size {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        buffer.fill(0);
        for (start, bytes) in &self.pieces {
            let (from, to) = (offset.max(*start), end.min(start + bytes.len() as u64));
            if from < to {
                let piece = &bytes[(from - start) as usize..(to - start) as usize];
                buffer[(from - offset) as usize..(to - offset) as usize].copy_from_slice(piece);
            }
        }
        Ok(())
    }

    fn name(&self) -> String {
        "sparse".to_owned()
    }
}

/// Writes a member of `length` zeros, or of `bytes`, and returns its entry in the directory.
fn member(archive: &mut Sparse, name: &str, bytes: &[u8], length: u64) -> Vec<u8> {
    let header = archive.size;
    let start =
        [b"PK\x03\x04\x2d\0\0\0\0\0\0\0\0\0\0\0\0\0", &[0xFF; 8][..], &[name.len() as u8, 0, 20, 0]].concat();
    let sizes = [&[1, 0, 16, 0][..], &length.to_le_bytes(), &length.to_le_bytes()].concat();
    archive.append(&[&start[..], name.as_bytes(), &sizes].concat());
    archive.append(bytes);
    archive.size += length - bytes.len() as u64;
    let extra =
        [&[1, 0, 24, 0][..], &length.to_le_bytes(), &length.to_le_bytes(), &header.to_le_bytes()].concat();
    let entry =
        [b"PK\x01\x02\x2d\0\x2d\0\0\0\0\0\0\0\0\0\0\0\0\0", &[0xFF; 8][..], &[name.len() as u8, 0, 28, 0]]
            .concat();
    [&entry[..], &[0; 10], &[0xFF; 4], name.as_bytes(), &extra].concat()
}

#[test]
fn an_archive_of_12_gib_is_listed_without_reading_its_storages() {
    let mut pickle = b"\x80\x02}".to_vec();
    for i in 0..3u8 {
        pickle.extend([b"X\x01\0\0\0", &[b'a' + i][..], b"ctorch._utils\n_rebuild_tensor_v2\n(("].concat());
        pickle.extend(b"X\x07\0\0\0storagectorch\nFloatStorage\n");
        pickle.extend([b"X\x01\0\0\0", &[b'0' + i][..], b"X\x03\0\0\0cpu\x8a\x04\0\0\0\x40tQK\x00"].concat());
        pickle.extend(b"\x8a\x04\0\0\0\x40\x85K\x01\x85\x89NtRs");
    }
    pickle.push(b'.');

    let mut archive = Sparse::default();
    let mut directory = member(&mut archive, "m/data.pkl", &pickle, pickle.len() as u64);
    for i in 0..3 {
        directory.extend(member(&mut archive, &format!("m/data/{i}"), b"", 4 * GIB));
    }
    let (start, length) = (archive.size, directory.len() as u64);
    archive.append(&directory);
    let record = archive.size;
    archive.append(
        &[
            b"PK\x06\x06\x2c\0\0\0\0\0\0\0\x2d\0\x2d\0\0\0\0\0\0\0\0\0\x04\0\0\0\0\0\0\0\x04\0\0\0\0\0\0\0",
            &length.to_le_bytes()[..],
            &start.to_le_bytes(),
        ]
        .concat(),
    );
    archive.append(&[b"PK\x06\x07\0\0\0\0", &record.to_le_bytes()[..], &[1, 0, 0, 0]].concat());
    archive.append(&[b"PK\x05\x06\0\0\0\0", &[0xFF; 12][..], &[0, 0]].concat());

    let (tensors, _) = pytorch::describe(&archive, &Selection::default()).unwrap();
    let offsets: Vec<u64> = tensors.iter().map(|tensor| tensor.offset / GIB).collect();
    assert_eq!(offsets, [0, 4, 8]);
    assert!(tensors.iter().all(|tensor| tensor.length == 4 * GIB && tensor.info.shape == [1 << 30]));
    let read = archive.read.load(Ordering::Relaxed);
    assert!(read < 70_000, "{read} bytes were read");
}
