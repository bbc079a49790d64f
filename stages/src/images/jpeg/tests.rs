use proptest::prelude::*;
use serde_json::Value;

use super::*;
use crate::images::test_support::from_hex;

fn golden() -> Value {
    serde_json::from_str(include_str!("testdata/decoded.json")).unwrap()
}

fn case(name: &str) -> Vec<u8> {
    let golden = golden();
    let mut cases = golden["cases"].as_array().unwrap().iter();
    from_hex(&cases.find(|case| case["name"] == name).unwrap()["jpeg"])
}

fn message(bytes: &[u8]) -> String {
    decode(bytes).unwrap_err().to_string()
}

#[test]
fn equals_pillow_bit_by_bit() {
    let golden = golden();
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() > 40);
    let mut wrong = Vec::new();
    for case in cases {
        let name = case["name"].as_str().unwrap();
        let image = decode(&from_hex(&case["jpeg"])).unwrap_or_else(|error| panic!("{name}: {error}"));
        let size = |key: &str| case[key].as_u64().unwrap() as usize;
        assert_eq!((image.height(), image.width()), (size("height"), size("width")), "{name}");
        let grey = case["mode"] == "L";
        assert_eq!(image.channels(), if grey { 1 } else { 3 }, "{name}");
        let rgb =
            image.pixels().iter().flat_map(|&value| std::iter::repeat_n(value, if grey { 3 } else { 1 }));
        let mut crc = flate2::Crc::new();
        crc.update(&rgb.collect::<Vec<u8>>());
        if u64::from(crc.sum()) != case["crc32"].as_u64().unwrap() {
            wrong.push(name);
        }
    }
    assert_eq!(wrong, [""; 0]);
}

#[test]
fn orientation_is_read_and_not_applied() {
    let turned = case("orientation 6");
    assert_eq!(orientation(&turned), 6);
    assert_eq!(decode(&turned).unwrap().height(), 9);
    assert_eq!(orientation(&case("grey")), 1);
    assert_eq!(orientation(b"\xff\xd8\xff\xe1\x00\x10Exif\0\0II*\0\xff\xff\xff\xff"), 1);
}

#[test]
fn damage_is_named() {
    let whole = case("restarts");
    assert_eq!(message(&whole[..whole.len() - 2]), "it is truncated");
    assert_eq!(message(&whole[..whole.len() / 2]), "it is truncated");
    assert_eq!(message(b"GIF89a"), "it does not begin as a JPEG file does");
    assert_eq!(message(b"\xff\xd8\xff\xd9"), "it is damaged: it holds no image");
    let restart = whole.windows(2).position(|pair| pair == [0xFF, 0xD3]).unwrap();
    let without = [&whole[..restart], &whole[restart + 2..]].concat();
    assert_eq!(message(&without), "it is damaged: a restart marker is missing");
    let frame = whole.windows(2).position(|pair| pair == [0xFF, 0xC0]).unwrap();
    let with = |offset: usize, values: &[u8]| {
        let mut bytes = whole.clone();
        bytes[frame + offset..frame + offset + values.len()].copy_from_slice(values);
        message(&bytes)
    };
    assert_eq!(with(1, &[0xC9]), "arithmetic coding is not supported");
    assert_eq!(with(1, &[0xC3]), "lossless JPEG is not supported");
    assert_eq!(with(4, &[12]), "a precision of 12 bits is not supported");
    assert_eq!(with(5, &[0, 0]), "it is damaged: its frame has no height or no width");
    assert_eq!(with(5, &[0x10, 0, 0x10, 0]), format!("4096x4096 pixels cannot be in {} bytes", whole.len()));
    assert_eq!(with(5, &[0xFF, 0xFF, 0xFF, 0xFF]), "it has 65535x65535 pixels, the most is 67108864");
    let scan = whole.windows(2).position(|pair| pair == [0xFF, 0xDA]).unwrap();
    let ends = [&whole[..scan + 20], b"\xff\xd9"].concat();
    assert_eq!(message(&ends), "it is damaged: its data ends early");
}

#[test]
fn a_progression_that_lacks_scans_is_refused() {
    let whole = case("progressive 4:2:0");
    let scans: Vec<usize> =
        (0..whole.len() - 1).filter(|&at| whole[at] == 0xFF && whole[at + 1] == 0xDA).collect();
    assert!(scans.len() > 5);
    let last = scans[scans.len() - 1];
    let short = [&whole[..last], b"\xff\xd9"].concat();
    assert_eq!(message(&short), "an image that lacks some of its scans is not supported");
    let twice = [&whole[..scans[1]], &whole[scans[0]..]].concat();
    assert_eq!(message(&twice), "it is damaged: its scans bring the same bits twice");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn damaged_files_are_decoded_or_refused(
        which in any::<prop::sample::Index>(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        end in any::<Option<prop::sample::Index>>(),
    ) {
        let golden = golden();
        let cases = golden["cases"].as_array().unwrap();
        let mut bytes = from_hex(&cases[which.index(cases.len())]["jpeg"]);
        for (at, value) in damage {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Some(end) = end {
            bytes.truncate(end.index(bytes.len()));
        }
        if let Ok(image) = decode(&bytes) {
            prop_assert!(image.pixels().len() <= 3 * 64 * 8 * bytes.len());
        }
        orientation(&bytes);
    }

    #[test]
    fn arbitrary_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let bytes = [&[0xFF, 0xD8], &bytes[..]].concat();
        prop_assert!(decode(&bytes).is_err());
    }
}
