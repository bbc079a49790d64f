//! Files that were made to do harm: refused with a message that names the file and the reason, at a bounded cost.

use merganser_tensors::formats::{self, FilePart, Selection, masks, npy, pytorch, safetensors};
use proptest::prelude::*;

const TENSOR: &[u8] = b"ctorch._utils\n_rebuild_tensor_v2\n";

fn text(text: &str) -> Vec<u8> {
    [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
}

fn int(value: i64) -> Vec<u8> {
    [b"\x8a\x08", &value.to_le_bytes()[..]].concat()
}

fn tuple(items: &[i64]) -> Vec<u8> {
    [b"(", &items.iter().flat_map(|item| int(*item)).collect::<Vec<_>>()[..], b"t"].concat()
}

/// A tensor of F32 over storage `0`.
fn tensor(elements: i64, offset: i64, shape: &[i64], strides: &[i64]) -> Vec<u8> {
    let mut pickle = [TENSOR, b"(("].concat();
    pickle.extend([text("storage"), b"ctorch\nFloatStorage\n".to_vec(), text("0"), text("cpu")].concat());
    pickle.extend([int(elements), b"tQ".to_vec(), int(offset), tuple(shape), tuple(strides)].concat());
    pickle.extend(b"\x89NtR");
    pickle
}

/// `{"w": …}`
fn state_dict(tensor: &[u8]) -> Vec<u8> {
    [b"\x80\x02}", &text("w")[..], tensor, b"s."].concat()
}

/// A member of an archive, with what its headers say.
struct Member<'a> {
    name: &'a str,
    bytes: &'a [u8],
    method: u16,
    size: u32,
    /// Offset of the local header that the directory names, unless it is the right one.
    header: Option<u32>,
}

fn stored<'a>(name: &'a str, bytes: &'a [u8]) -> Member<'a> {
    Member { name, bytes, method: 0, size: bytes.len() as u32, header: None }
}

fn zip(members: &[Member<'_>]) -> Vec<u8> {
    let (mut archive, mut directory) = (Vec::new(), Vec::new());
    for member in members {
        let header = member.header.unwrap_or(archive.len() as u32);
        let length = member.bytes.len() as u32;
        let mut common = vec![20, 0, 0, 0];
        common.extend(member.method.to_le_bytes());
        common.extend([0; 8]);
        common.extend(length.to_le_bytes());
        common.extend(member.size.to_le_bytes());
        common.extend((member.name.len() as u16).to_le_bytes());
        common.extend([0, 0]);
        archive.extend([b"PK\x03\x04", &common[..], member.name.as_bytes(), member.bytes].concat());
        directory.extend([b"PK\x01\x02\x14\0", &common[..], &[0; 10]].concat());
        directory.extend(header.to_le_bytes());
        directory.extend(member.name.as_bytes());
    }
    let (start, length) = (archive.len() as u32, directory.len() as u32);
    archive.extend(directory);
    let n = (members.len() as u16).to_le_bytes();
    archive.extend(
        [b"PK\x05\x06\0\0\0\0", &n[..], &n, &length.to_le_bytes(), &start.to_le_bytes(), &[0, 0]].concat(),
    );
    archive
}

/// A PyTorch archive of one pickle and one storage.
fn torch(pickle: &[u8], storage: &[u8]) -> Vec<u8> {
    zip(&[stored("a/data.pkl", pickle), stored("a/data/0", storage)])
}

fn describe(bytes: &[u8]) -> Result<usize, String> {
    let result = pytorch::describe(&bytes.to_vec(), &Selection::default());
    result.map(|(tensors, _)| tensors.len()).map_err(|error| error.to_string())
}

#[track_caller]
fn check_refused(bytes: &[u8], expected: &str) {
    let message = describe(bytes).unwrap_err();
    assert!(message.contains(expected), "{message}");
}

#[test]
fn the_helpers_write_what_is_accepted() {
    let pickle = state_dict(&tensor(4, 0, &[2, 2], &[2, 1]));
    assert_eq!(describe(&torch(&pickle, &[0; 16])), Ok(1));
}

#[test]
fn shapes_and_strides_that_lie() {
    let with = |tensor: &[u8]| torch(&state_dict(tensor), &[0; 16]);
    check_refused(&with(&tensor(4, 0, &[2], &[-1])), "tensor `w` has the negative size, stride or offset -1");
    check_refused(&with(&tensor(4, -4, &[2], &[1])), "tensor `w` has the negative size, stride or offset -4");
    check_refused(&with(&tensor(4, 0, &[-2], &[1])), "tensor `w` has the negative size, stride or offset -2");
    check_refused(
        &with(&tensor(4, 0, &[1 << 60], &[1])),
        "tensor `w` has shape [1152921504606846976] and strides [1]",
    );
    check_refused(&with(&tensor(4, 0, &[1 << 60], &[0])), "the limit for such a tensor is 67108864");
    check_refused(
        &with(&tensor(4, 0, &[1 << 40, 1 << 40], &[0, 0])),
        "tensor `w` has a layout that cannot be read: its size overflows",
    );
    check_refused(&with(&tensor(4, 0, &[2, 2], &[1 << 62, 1])), "its strides overflow");
    check_refused(&with(&tensor(4, 0, &[2, 2], &[3, 1])), "more than its storage holds: 16 bytes");
    check_refused(&with(&tensor(4, 3, &[2], &[1])), "from element 3 on, more than its storage holds");
    check_refused(&with(&tensor(4, i64::MAX, &[2], &[1])), "more than its storage holds");
    check_refused(&with(&tensor(4, 0, &[2], &[1, 1])), "its numbers of sizes and strides differ");
    check_refused(&with(&tensor(5, 0, &[2], &[1])), "storage `0` of 16 bytes, expected 20");
    check_refused(&with(&tensor(1 << 60, 0, &[2], &[1])), "storage `0` of 16 bytes, expected");
    let ones = vec![1; 70];
    check_refused(
        &with(&tensor(4, 0, &[&ones[..], &[2, 2]].concat(), &[&ones[..], &[1, 2]].concat())),
        "72 strides for 72 dimensions",
    );
}

#[test]
fn archives_that_lie() {
    let pickle = state_dict(&tensor(4, 0, &[2, 2], &[2, 1]));
    let data = stored("a/data.pkl", &pickle);
    let check = |members: &[Member<'_>], expected: &str| check_refused(&zip(members), expected);
    check(&[data], "tensor `w` has its values in storage `0`, which is not in the file");
    let data = || stored("a/data.pkl", &pickle);
    check(
        &[data(), stored("a/../../etc/x", b"")],
        "member `a/../../etc/x` has a name that points out of the archive",
    );
    check(&[data(), stored("/etc/x", b"")], "member `/etc/x` has a name that points out of the archive");
    check(&[data(), stored("a\\..\\x", b"")], "has a name that points out of the archive");
    check(&[data(), stored("a/data.pkl", &pickle)], "member `a/data.pkl` is listed twice");
    check(&[data(), stored("b/data.pkl", &pickle)], "several of `data.pkl`: `a/data.pkl` and `b/data.pkl`");
    check(&[stored("b/x", b"")], "holds no `data.pkl`");
    check(&[stored("data.pkl", &pickle)], "holds no `data.pkl`");
    let bomb = Member { method: 8, size: u32::MAX - 1, ..stored("a/data/0", &[0; 16]) };
    check(
        &[data(), bomb],
        "member `a/data/0` is compressed (method 8); only stored members can be read in place",
    );
    let bomb = Member { method: 8, size: u32::MAX - 1, ..data() };
    check(&[bomb], "member `a/data.pkl` is compressed (method 8)");
    let long = Member { size: 1 << 30, ..stored("a/data/0", &[0; 16]) };
    check(&[data(), long], "a stored member has two sizes");
    let elsewhere = Member { header: Some(7), ..stored("a/data/0", &[0; 16]) };
    check(&[data(), elsewhere], "member `a/data/0` does not begin where the directory says");
    let beyond = Member { header: Some(u32::MAX - 9), ..stored("a/data/0", &[0; 16]) };
    check(&[data(), beyond], "member `a/data/0` does not begin where the directory says");

    // a member inside another
    let inner = zip(&[stored("a/data/0", &[0; 16])]);
    let inner_local = &inner[..30 + 8 + 16];
    let carrier = stored("a/carrier", inner_local);
    let offset =
        zip(&[data(), carrier]).windows(9).position(|bytes| bytes == b"a/carrier").unwrap() as u32 + 9;
    let overlapping = Member { header: Some(offset), ..stored("a/data/0", &[0; 16]) };
    check(
        &[data(), stored("a/carrier", inner_local), overlapping],
        "member `a/data/0` overlaps member `a/carrier`",
    );

    let good = torch(&pickle, &[0; 16]);
    for length in 0..good.len() {
        assert!(describe(&good[..length]).is_err(), "truncated to {length}");
    }
    let mut trailing = good.clone();
    trailing.push(0);
    check_refused(&trailing, "the archive has no directory at its end");
}

/// A module whose children are all the same module, level after level: 2 to the power of the levels when followed.
#[test]
fn references_that_multiply_or_return() {
    let empty = b"cm\nM\n)\x81}(X\x0b\0\0\0_parameters}X\x08\0\0\0_modules}ub";
    let mut pickle = [b"\x80\x02", &empty[..], b"q\x00"].concat();
    for level in 1..=60u8 {
        pickle.extend(b"cm\nM\n)\x81}(X\x0b\0\0\0_parameters}X\x08\0\0\0_modules}(");
        pickle.extend([text("a"), vec![b'h', level - 1], text("b"), vec![b'h', level - 1]].concat());
        pickle.extend([b"uubq", &[level][..]].concat());
    }
    pickle.push(b'.');
    check_refused(&pickle, "its content is larger than any checkpoint, or refers to itself");

    let mut pickle = b"\x80\x02cm\nM\n)\x81q\x00}(X\x0b\0\0\0_parameters}X\x08\0\0\0_modules}".to_vec();
    pickle.extend([text("again"), b"h\x00sub.".to_vec()].concat());
    check_refused(&pickle, "the limit is 4096");

    let mut pickle = [b"\x80\x02}q\x00", &text("state_dict")[..], b"h\x00s."].concat();
    check_refused(&pickle, "it holds no tensors");
    pickle = [b"\x80\x02}q\x00(", &text("model")[..], b"h\x00", &text("w"), &tensor(1, 0, &[], &[]), b"u."]
        .concat();
    check_refused(&pickle, "nested more than 8 deep");
}

#[test]
fn files_in_files_in_files() {
    // a storage that says it is a file that holds a storage that says …
    let mut bytes = b"\x80\x02K\x01.".to_vec();
    for _ in 0..6 {
        let length = (bytes.len() as u32).to_le_bytes();
        let load = [b"ctorch.storage\n_load_from_bytes\nB", &length[..], &bytes, b"\x85R"].concat();
        bytes = [b"\x80\x03", &load[..], b"."].concat();
    }
    let storage = &bytes[2..bytes.len() - 1];
    let nested = [TENSOR, b"(", storage, &int(0), &tuple(&[1]), &tuple(&[1]), b"\x89NtR"].concat();
    check_refused(&state_dict(&nested), "pickles are nested more than 3 deep");
}

#[test]
fn files_that_are_cut_off_anywhere_are_refused() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/torch");
    let mut checked = 0;
    for entry in fs_err::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            continue;
        }
        let bytes = fs_err::read(&path).unwrap();
        let describe: fn(&Vec<u8>) -> bool = match path.extension().and_then(|extension| extension.to_str()) {
            Some("pt" | "pkl") => |bytes| pytorch::describe(bytes, &Selection::default()).is_ok(),
            Some("npy" | "npz") => |bytes| npy::describe(bytes, &Selection::default()).is_ok(),
            Some("safetensors") => |bytes| safetensors::read_header(bytes).is_ok_and(|header| header.is_ok()),
            _ => continue,
        };
        assert!(
            describe(&bytes) || path.ends_with("nested_key.pt") || path.ends_with("masks_array.pt"),
            "{}",
            path.display()
        );
        // every length near the ends, where the structure is, and some between
        for length in
            (0..bytes.len()).filter(|length| *length < 300 || bytes.len() - length < 300 || length % 37 == 0)
        {
            assert!(!describe(&bytes[..length].to_vec()), "{} cut to {length}", path.display());
        }
        checked += 1;
    }
    assert!(checked > 40, "{checked} files");
}

#[test]
fn a_refusal_names_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.pt");
    fs_err::write(&path, zip(&[stored("a/../x", b"")])).unwrap();
    let message = formats::describe(&path).unwrap_err().to_string();
    let expected = format!(
        "checkpoint `{}` cannot be used: member `a/../x` has a name that points out of the archive",
        path.display()
    );
    assert_eq!(message, expected);
}

fn seeds() -> Vec<Vec<u8>> {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/torch");
    let names = [
        "views_2.pt",
        "views_legacy_4.pt",
        "views_5.pkl",
        "module.pt",
        "masks.npy",
        "arrays.npz",
        "masks_array.pt",
    ];
    names.map(|name| fs_err::read(folder.join(name)).unwrap()).into()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    /// What is accepted after damage lies inside the file.
    #[test]
    fn damaged_files_never_panic(
        seed in prop::sample::select(seeds()),
        mutations in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        cut in prop::option::weighted(0.2, any::<prop::sample::Index>()),
    ) {
        let mut bytes = seed;
        for (position, byte) in mutations {
            let position = position.index(bytes.len());
            bytes[position] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        let size = bytes.len() as u64;
        let results = [pytorch::describe(&bytes, &Selection::default()), npy::describe(&bytes, &Selection::default())];
        for (tensors, notes) in results.into_iter().flatten() {
            let part = FilePart { path: "memory".into(), size, tensors, notes, base: None };
            let digest = [blake3::hash(&bytes)];
            let content = merganser_tensors::manifest::Content::Checkpoint;
            let manifest = merganser_tensors::Manifest::of_checkpoint(content, &[part], &digest, |_| true);
            prop_assert!(manifest.is_ok(), "{}", manifest.unwrap_err());
        }
        let _ = masks::read_from(&bytes);
    }
}
