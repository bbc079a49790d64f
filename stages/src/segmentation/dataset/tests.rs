//! Data sets laid out as they are distributed, and what can be wrong with them.

use super::{Frame, MaskedImages, Spec, files, open};
use crate::segmentation::SegmentationError;
use serde_json::{Value, json};
use std::path::Path;
use tempfile::TempDir;

/// Writes a grey image of one value, as a PNG whatever its name: what an image is, its first bytes tell.
fn image(path: &Path, width: u32, height: u32) {
    fs_err::create_dir_all(path.parent().unwrap()).unwrap();
    let image = image::GrayImage::from_pixel(width, height, image::Luma([90]));
    image.save_with_format(path, image::ImageFormat::Png).unwrap();
}

/// Writes a PNG mask with a palette, of rows of digits; 9 stands for 255.
fn palette(path: &Path, rows: &[&str]) {
    fs_err::create_dir_all(path.parent().unwrap()).unwrap();
    let values: Vec<u8> =
        rows.concat().bytes().map(|digit| if digit == b'9' { 255 } else { digit - b'0' }).collect();
    let mut encoder =
        png::Encoder::new(std::fs::File::create(path).unwrap(), rows[0].len() as u32, rows.len() as u32);
    encoder.set_color(png::ColorType::Indexed);
    encoder.set_palette((0..768).map(|i| (i % 251) as u8).collect::<Vec<_>>());
    encoder.write_header().unwrap().write_image_data(&values).unwrap();
}

/// Writes a grey PNG mask, of rows of digits.
fn grey(path: &Path, rows: &[&str]) {
    fs_err::create_dir_all(path.parent().unwrap()).unwrap();
    let values: Vec<u8> = rows.concat().bytes().map(|digit| (digit - b'0') * 51).collect();
    image::save_buffer(path, &values, rows[0].len() as u32, rows.len() as u32, image::ExtendedColorType::L8)
        .unwrap();
}

fn write(path: &Path, text: &str) {
    fs_err::create_dir_all(path.parent().unwrap()).unwrap();
    fs_err::write(path, text).unwrap();
}

fn spec(folder: &TempDir, format: &str, split: Option<&str>) -> Spec {
    Spec {
        format: format.to_owned(),
        path: folder.path().to_owned(),
        split: split.map(str::to_owned),
        limit: None,
    }
}

fn all(images: &MaskedImages) -> Vec<(String, Vec<(String, u64)>)> {
    let name = |index: usize| {
        let files = &images.frames()[index];
        format!("{}/{}", files.sequence, files.frame)
    };
    let objects =
        |frame: Frame| frame.objects.into_iter().map(|object| (object.name, object.mask.area())).collect();
    (0..images.len()).map(|index| (name(index), objects(images.load(index).unwrap()))).collect()
}

fn owned(expected: &[(&str, &[(&str, u64)])]) -> Vec<(String, Vec<(String, u64)>)> {
    let objects =
        |objects: &[(&str, u64)]| objects.iter().map(|&(name, area)| (name.to_owned(), area)).collect();
    expected.iter().map(|&(name, list)| (name.to_owned(), objects(list))).collect()
}

fn message<T>(result: Result<T, SegmentationError>) -> String {
    match result {
        Ok(_) => panic!("nothing was refused"),
        Err(error) => error.to_string(),
    }
}

fn record(annotations: &Value) -> String {
    json!({ "image": { "height": 4, "width": 3 }, "annotations": annotations }).to_string()
}

#[test]
fn records_of_sa_1b_hold_masks_and_prompts() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["sa_1", "sa_2"] {
        image(&folder.path().join(format!("{name}.png")), 3, 4);
    }
    let annotations = json!([
        { "id": 7, "segmentation": { "size": [4, 3], "counts": [4, 2, 6] }, "bbox": [1, 0, 0, 1], "point_coords": [[1.5, 0.5]] },
        { "id": "b", "segmentation": { "size": [4, 3], "counts": "0<" }, "area": 12 },
    ]);
    write(&folder.path().join("sa_1.json"), &record(&annotations));
    write(&folder.path().join("sa_2.json"), &record(&json!([])));
    let images = open(&spec(&folder, "sa1b", None)).unwrap();
    assert_eq!(all(&images), owned(&[("sa_1/", &[("7", 2), ("b", 12)]), ("sa_2/", &[])]));
    let object = &images.load(0).unwrap().objects[0];
    assert_eq!((object.points.as_slice(), object.bounds), (&[[1.5, 0.5]][..], Some([1.0, 0.0, 1.0, 1.0])));
    let listed = files(&Spec { limit: Some(1), ..spec(&folder, "sa1b", None) }).unwrap();
    let labels: Vec<&str> = listed.iter().map(|file| file.label.as_str()).collect();
    assert_eq!(labels, ["image sa_1/", "mask sa_1/ "]);
}

#[test]
fn broken_records_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sa_1.json");
    let refused = |annotations: Value| {
        write(&path, &record(&annotations));
        message(open(&spec(&folder, "sa1b", None)).unwrap().load(0))
            .replace(&folder.path().display().to_string(), "…")
    };
    image(&folder.path().join("sa_1.jpg"), 3, 4);
    assert_eq!(
        refused(json!([{ "id": 1, "segmentation": { "size": [4, 3], "counts": [5] } }])),
        "`…/sa_1.json`: the mask of object `1`: the runs cover 5 pixels, but 4x3 has 12"
    );
    assert_eq!(
        refused(json!([{ "id": 1, "segmentation": [[0, 0, 1, 1, 1, 0]] }])),
        "`…/sa_1.json`: object `1` is a polygon, expected run lengths"
    );
    assert!(refused(json!([{ "id": 1 }])).starts_with("`…/sa_1.json`: missing field `segmentation`"));
    write(&folder.path().join("sa_2.json"), "{}");
    assert!(message(open(&spec(&folder, "sa1b", None))).contains("sa_2.jpg` is missing: `"));
    let empty = tempfile::tempdir().unwrap();
    assert!(message(open(&spec(&empty, "sa1b", None))).starts_with("there are no annotated images in `"));
}

#[test]
fn png_masks_have_an_object_per_value() {
    let folder = tempfile::tempdir().unwrap();
    let (images, masks) = (folder.path().join("val/images"), folder.path().join("val/masks"));
    image(&images.join("a.jpg"), 4, 2);
    palette(&masks.join("a.png"), &["0112", "0199"]);
    image(&images.join("b.png"), 4, 2);
    grey(&masks.join("b.png"), &["0555", "0050"]);
    let opened = open(&spec(&folder, "mask-png", Some("val"))).unwrap();
    assert_eq!(all(&opened), owned(&[("a/", &[("1", 3), ("2", 1)]), ("b/", &[("255", 4)])]));
    // In a palette 255 is void, in a black and white file it is the object.
    assert_eq!(opened.load(0).unwrap().void.map(|void| void.area()), Some(2));
    assert!(opened.load(1).unwrap().void.is_none());
    image(&images.join("b.png"), 5, 2);
    assert!(message(opened.load(1)).ends_with("b.png` is 4x2 pixels, its image 5x2"));
    image(&images.join("c.png"), 4, 2);
    assert!(message(open(&spec(&folder, "mask-png", Some("val")))).contains("c.png` is missing"));
}

#[test]
fn sequences_of_davis_are_those_of_the_split() {
    let folder = tempfile::tempdir().unwrap();
    for (sequence, frame) in [("bear", "00000"), ("bear", "00001"), ("swan", "00000")] {
        image(&folder.path().join(format!("JPEGImages/480p/{sequence}/{frame}.jpg")), 3, 2);
        palette(&folder.path().join(format!("Annotations/480p/{sequence}/{frame}.png")), &["011", "002"]);
    }
    // The last frame of a sequence without an annotation.
    image(&folder.path().join("JPEGImages/480p/swan/00001.jpg"), 3, 2);
    write(&folder.path().join("ImageSets/2017/val.txt"), "swan\n");
    write(&folder.path().join("ImageSets/2016/val.txt"), "bear\n");
    let sequences = |split: Option<&str>| {
        let images = open(&spec(&folder, "davis", split)).unwrap();
        all(&images).into_iter().map(|(name, _)| name).collect::<Vec<_>>()
    };
    assert_eq!(sequences(None), ["bear/00000", "bear/00001", "swan/00000"]);
    assert_eq!(sequences(Some("val")), ["swan/00000"]);
    assert_eq!(sequences(Some("2016/val")), ["bear/00000", "bear/00001"]);
    assert!(
        message(open(&spec(&folder, "davis", Some("test"))))
            .ends_with("test.txt` is missing: split `test` needs it")
    );
    write(&folder.path().join("ImageSets/2017/val.txt"), "../../secret\n");
    assert!(
        message(open(&spec(&folder, "davis", Some("val"))))
            .ends_with("`../../secret` is not the name of a sequence")
    );
}

#[test]
fn sa_v_has_masks_per_object_or_records() {
    let folder = tempfile::tempdir().unwrap();
    for frame in 0..5 {
        image(&folder.path().join(format!("JPEGImages_24fps/v1/{frame:05}.jpg")), 3, 2);
    }
    for (object, frame, rows) in
        [("000", 0, ["011", "000"]), ("000", 4, ["000", "000"]), ("001", 4, ["111", "000"])]
    {
        grey(&folder.path().join(format!("Annotations_6fps/v1/{object}/{frame:05}.png")), &rows);
    }
    write(&folder.path().join("sav_val.txt"), "v1\n");
    let images = open(&spec(&folder, "sa-v", Some("sav_val"))).unwrap();
    // Object 000 is hidden in frame 4.
    assert_eq!(all(&images), owned(&[("v1/00000", &[("000", 2)]), ("v1/00004", &[("001", 3)])]));

    let folder = tempfile::tempdir().unwrap();
    for frame in 0..9 {
        image(&folder.path().join(format!("v2/{frame:05}.jpg")), 3, 2);
    }
    let rle = |counts: &[u32]| json!({ "size": [2, 3], "counts": counts });
    let masklets =
        json!({ "masklet_id": [3, 5], "masklet": [[rle(&[1, 5]), rle(&[6])], [rle(&[0, 6]), null]] });
    write(&folder.path().join("v2_manual.json"), &masklets.to_string());
    write(&folder.path().join("v2_auto.json"), "{}");
    write(&folder.path().join("notes.json"), "{}");
    let images = open(&spec(&folder, "sa-v", None)).unwrap();
    let expected = owned(&[("v2/00000", &[("3", 5)]), ("v2/00004", &[("3", 6)]), ("v2/00008", &[])]);
    assert_eq!(all(&images), expected);
    let listed = files(&spec(&folder, "sa-v", None)).unwrap();
    assert_eq!(listed.iter().filter(|file| file.label.starts_with("mask")).count(), 1, "one record");
}

#[test]
fn a_film_says_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    write(&folder.path().join("sav_000001_manual.json"), "{}");
    write(&folder.path().join("sav_000001.mp4"), "");
    let text = message(open(&spec(&folder, "sa-v", None))).replace(&folder.path().display().to_string(), "…");
    assert_eq!(
        text,
        "`…/sav_000001.mp4` is a video, which cannot be decoded here: extract its frames to `…/sav_000001/00000.jpg`, `00001.jpg`, … (24 a second)"
    );
}

#[test]
fn formats_have_names_of_their_own() {
    let text = message(open(&Spec { format: "sa2b".to_owned(), ..Spec::default() }));
    assert_eq!(text, "unknown format `sa2b`; known formats of masks: `sa1b`, `mask-png`, `davis`, `sa-v`");
}
