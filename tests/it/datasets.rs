//! What a dataset is to an evaluation: the same images in any container, images that cannot be read, images that were trained on.

use crate::util::{Lab, copy, quickstart};
use std::fmt::Write;
use std::path::Path;

const CLASSES: [&str; 4] = ["000_degrees", "090_degrees", "180_degrees", "270_degrees"];

/// Images of every class that are used.
const EACH: usize = 20;

/// Images of the quickstart in `images/test` and `images/train`, which share nothing.
fn lab() -> Lab {
    let lab = Lab::empty();
    for class in CLASSES {
        let from = quickstart().join("data/rotated").join(class);
        let mut names: Vec<_> =
            fs_err::read_dir(&from).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        for (index, name) in names.iter().take(2 * EACH).enumerate() {
            let split = if index < EACH { "test" } else { "train" };
            let to = lab.path(format!("images/{split}/{class}"));
            fs_err::create_dir_all(&to).unwrap();
            copy(&from.join(name), &to.join(name));
        }
    }
    lab
}

/// A pipeline that scores the expert for rotations on datasets.
fn write(lab: &Lab, datasets: &[(&str, &str)]) {
    let folder = quickstart().display().to_string();
    let mut text = String::new();
    for (stage, file) in [("base", "base"), ("tuned", "ft_rotated")] {
        writeln!(text, "[stage.{stage}]\nkind = \"load\"\npath = \"{folder}/{file}.safetensors\"").unwrap();
    }
    writeln!(
        text,
        "[stage.scores]\nkind = \"evaluate\"\nfrom = {{ model = \"tuned\", origin = \"base\" }}\ngraph = \"{folder}/clip_vision.onnx\""
    )
    .unwrap();
    for (task, keys) in datasets {
        writeln!(text, "[stage.scores.dataset.{task}]\n{keys}\nhead = \"{folder}/head_rotated.safetensors\"")
            .unwrap();
    }
    lab.write("pipeline.toml", &text);
}

fn put(path: &Path, bytes: &[u8]) {
    fs_err::write(path, bytes).unwrap();
}

#[test]
fn the_same_images_score_the_same_in_every_container() {
    let lab = lab();
    let mut rows = String::from("path;label\n");
    for class in CLASSES {
        let mut names: Vec<_> = fs_err::read_dir(lab.path(format!("images/test/{class}"))).unwrap().collect();
        names.sort_by_key(|entry| entry.as_ref().unwrap().file_name());
        for name in names {
            writeln!(rows, "images/test/{class}/{};{class}", name.unwrap().file_name().display()).unwrap();
        }
    }
    lab.write("list.csv", &rows);
    let half = "subset = { n = 40, seed = 7, balanced = true }";
    write(
        &lab,
        &[
            ("folder", "format = \"folder\"\npath = \"images\"\nsplit = \"test\""),
            ("list", "format = \"list\"\npath = \"list.csv\""),
            ("half", &format!("format = \"folder\"\npath = \"images/test\"\n{half}")),
            ("same_half", &format!("format = \"list\"\npath = \"list.csv\"\n{half}")),
        ],
    );
    let correct = lab.run(&[]).correct();
    let of = |task: &str| correct[&("scores".to_owned(), String::new(), task.to_owned())];
    assert_eq!(of("folder"), of("list"));
    assert_eq!(of("half"), of("same_half"));
    assert_eq!((of("folder").1, of("half").1), (80, 40));
    assert!(of("folder").0 > 60, "{correct:?}");
}

#[test]
fn an_image_that_cannot_be_decoded_stops_the_run_or_is_left_out_and_counted() {
    let lab = lab();
    let broken = lab.path("images/test/090_degrees/zz.jpg");
    put(&broken, b"\xff\xd8\xff\xe0\x00\x10JFIF");
    let keys = "format = \"folder\"\npath = \"images/test\"";
    write(&lab, &[("rotated", keys)]);
    let stopped = lab.call(["run", "pipeline.toml"]);
    assert_eq!(stopped.code, 1, "{stopped}");
    stopped.tells(&["scores[rotated]", "cannot decode `", "090_degrees/zz.jpg`: it is truncated"]);

    write(&lab, &[("rotated", &format!("{keys}\non_error = \"skip\""))]);
    let done = lab.ok(["run", "pipeline.toml"]);
    done.tells(&[
        "`rotated`: 1 of 81 images cannot be decoded and are left out; the first is `",
        "zz.jpg`: it is truncated",
    ]);
    let shown = lab.ok(["show", "pipeline.toml", "scores[rotated]"]).stdout;
    assert!(
        shown.contains("80 images, manifest ") && shown.contains("; 1 that cannot be decoded left out"),
        "{shown}"
    );
    // Without it the answers are the same; the manifest is not.
    fs_err::remove_file(&broken).unwrap();
    write(&lab, &[("rotated", keys)]);
    lab.ok(["run", "pipeline.toml"]);
    let whole = lab.ok(["show", "pipeline.toml", "scores[rotated]"]).stdout;
    let accuracy = |text: &str| text.lines().find(|line| line.contains("accuracy")).unwrap().to_owned();
    assert_eq!(accuracy(&shown), accuracy(&whole));
    let manifest = |text: &str| text.lines().find(|line| line.contains("manifest")).unwrap()[..34].to_owned();
    assert_ne!(manifest(&shown), manifest(&whole));

    for class in CLASSES {
        fs_err::remove_dir_all(lab.path(format!("images/test/{class}"))).unwrap();
    }
    fs_err::create_dir_all(lab.path("images/test/090_degrees")).unwrap();
    put(&broken, b"\xff\xd8\xff\xe0\x00\x10JFIF");
    write(&lab, &[("rotated", &format!("{keys}\nclasses = [\"090_degrees\"]\non_error = \"skip\""))]);
    let empty = lab.call(["run", "pipeline.toml"]);
    assert_eq!(empty.code, 1, "{empty}");
    empty.tells(&["dataset `rotated` has no images"]);
}

#[test]
fn images_that_were_trained_on_are_told() {
    let lab = lab();
    let keys = "format = \"folder\"\npath = \"images\"\nsplit = \"test\"\ntrain = { split = \"train\" }";
    write(&lab, &[("rotated", keys)]);
    let clean = lab.ok(["run", "pipeline.toml"]);
    assert!(!clean.stderr.contains("training images"), "{clean}");
    let shown = lab.ok(["show", "pipeline.toml", "scores[rotated]"]).stdout;
    assert!(shown.contains("; 0 are training images too"), "{shown}");

    let name = fs_err::read_dir(lab.path("images/test/180_degrees")).unwrap().next().unwrap().unwrap();
    copy(&name.path(), &lab.path("images/train/000_degrees/copied.png"));
    let leaky = lab.ok(["run", "pipeline.toml"]);
    leaky.tells(&["`rotated`: 1 of 80 images that are scored are among the training images", "copied.png"]);
    let shown = lab.json(&["show", "pipeline.toml", "scores[rotated]"]);
    assert!(shown.to_string().contains("\"in_training\":1"), "{shown}");
}
