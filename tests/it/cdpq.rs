//! Progressive bit reduction: the same student whatever the threads and interruptions, and students against the same models that were only
//! rounded, at the same bytes.

use crate::calibration::{answers, paired};
use crate::suite::json;
use crate::util::{Lab, Run, quickstart, slow, test_data};
use merganser_stages::images::dataset::Decoding;
use merganser_stages::images::preprocess::{Preprocess, Preprocessor};
use merganser_stages::segmentation::measure::jaccard;
use merganser_stages::segmentation::rle::Rle;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// The quickstart's DeiT, with further keys of `cdpq`, on images that it was not tested on.
fn pipeline(keys: &str) -> String {
    let data = quickstart().display().to_string();
    format!(
        "[stage.base]\nkind = \"load\"\npath = \"{data}/deit/model.safetensors\"\n\
         [stage.student]\nkind = \"distill\"\nmethod = \"cdpq\"\nfrom = {{ model = \"base\", origin = \"base\" }}\n{keys}\n\
         graph = \"{data}/deit/deit.onnx\"\n\
         [stage.student.dataset.digits]\nformat = \"idx\"\nimages = \"{data}/data/calib/digits-images.idx.gz\"\nlabels = \"{data}/data/calib/digits-labels.idx.gz\"\n"
    )
}

/// Candidates everywhere, and reductions between checkpoints.
const KEYS: &str = "start_bits = 5\nmin_bits = 3\nfeatures = 6\nlayer_threshold = 10\nconfidence = \"variance\"\nvariance_threshold = 10\n\
    learning_rate = 0.001\nbatch_size = 16\nactivations = { bits = 8 }\nvalidation = { n = 40 }\n";

#[test]
fn students_do_not_depend_on_threads() {
    let lab = Lab::empty();
    lab.write("pipeline.toml", &pipeline(&format!("{KEYS}epochs = 2\nmax_steps = 12\nmicro_batch = 10")));
    let students = ["1", "2", "3"].map(|threads| {
        let run = lab.run(&["--threads", threads, "--force", "student"]);
        run.artifacts()["student[digits]"].to_owned()
    });
    assert!(students.iter().all(|student| *student == students[0]), "{students:?}");
}

#[test]
fn a_killed_reduction_goes_on_and_ends_with_the_same_bytes() {
    let keys = format!("{KEYS}epochs = 6");
    let lab = Lab::empty();
    lab.write("pipeline.toml", &pipeline(&keys));
    lab.run_and_kill("student", 2);
    let rest = lab.try_run("pipeline.toml", &[]);
    assert_eq!(rest.code, 0, "{rest}");
    rest.tells(&["going on after step"]);

    let undisturbed = Lab::empty();
    undisturbed.write("pipeline.toml", &pipeline(&keys));
    assert_eq!(undisturbed.run(&[]).artifacts(), rest.run().artifacts());
}

#[test]
fn every_decision_is_shown() {
    let lab = Lab::empty();
    lab.write("pipeline.toml", &pipeline(&format!("{KEYS}epochs = 1")));
    lab.run(&[]);
    let shown = lab.ok(["show", "pipeline.toml", "student"]).stdout;
    for text in
        ["packed", "candidates", "5 to 4", "patch_embed.proj", "of the loss", "bits per weight", "activation"]
    {
        assert!(shown.contains(text), "nothing about `{text}` in\n{shown}");
    }
    let json = lab.json(&["show", "pipeline.toml", "student"]);
    let reductions = &json[0]["output"]["reductions"];
    assert_eq!(reductions["layers"].as_array().unwrap().len(), 18);
    let attempts = reductions["epochs"][0]["reduction"]["attempts"].as_array().unwrap();
    assert!(!attempts.is_empty());
}

/// A stage with further keys that scores a model of the suite.
fn scores(stage: &str, model: &str, run: &str, dataset: &str) -> String {
    format!(
        "[stage.{stage}]\nkind = \"evaluate\"\nfrom = {{ model = \"{model}\", origin = \"base\" }}\n{run}{dataset}"
    )
}

/// What the student is made from, what it is compared with, and how both are scored.
fn against_rounding(data: &Path) -> String {
    let suite = data.join("suite").display().to_string();
    let run = format!(
        "graph = \"{suite}/onnx/deit.onnx\"\npreprocess = \"{suite}/clip/base/preprocessor_config.json\"\n"
    );
    let classes = "classes = [\"T-shirt_top\", \"Trouser\", \"Pullover\", \"Dress\", \"Coat\", \"Sandal\", \"Shirt\", \"Sneaker\", \"Bag\", \"Ankle_boot\"]\n";
    let images = |part: &str| {
        format!(
            "dataset.fashion.format = \"folder\"\ndataset.fashion.path = \"{suite}/data/fashion/{part}\"\ndataset.fashion.{classes}"
        )
    };
    let mut text = format!(
        "[vars]\nseed = 1\n[stage.base]\nkind = \"load\"\npath = \"{suite}/deit/model.safetensors\"\n\
         [stage.rounded]\nkind = \"quantize\"\nfrom = \"base\"\nscheme = \"symmetric\"\nbits = 3\n\
         rules = [{{ match = \"*norm*\", keep = true }}, {{ match = \"*.bias\", keep = true }}, {{ match = \"*token*\", keep = true }}, {{ match = \"*pos_embed\", keep = true }}]\n\
         [stage.student]\nkind = \"distill\"\nmethod = \"cdpq\"\nfrom = {{ model = \"base\", origin = \"base\" }}\n\
         start_bits = 4\nmin_bits = 2\ntarget_bits = 3.0\nfeatures = \"all\"\nlosses = {{ statistics = 1.0, features = 1.0, logits = 1.0 }}\n\
         layer_threshold = 10.0\nimpact_threshold = 0.3\nepochs = 14\nbatch_size = 16\nlearning_rate = 5e-4\nweight_decay = 1e-6\n\
         validation = {{ n = 100 }}\nseed = \"${{seed}}\"\n{run}{}",
        images("train")
    );
    for (stage, model) in [("plain", "base"), ("rounded_scores", "rounded"), ("student_scores", "student")] {
        text += &scores(stage, model, &run, &images("test"));
    }
    text
}

/// A file of a unit's artifact: its digest and its size.
fn file(lab: &Lab, run: &Run, unit: &str, name: &str) -> (String, u64) {
    let artifact = json(&lab.object(run.artifacts()[unit]));
    let blobs = artifact["blobs"].as_array().unwrap();
    let blob = blobs.iter().find(|blob| blob["name"] == name).unwrap();
    (blob["digest"].as_str().unwrap().to_owned(), blob["size"].as_u64().unwrap())
}

/// The average width of the quantized weights of a student.
fn bits(lab: &Lab, run: &Run, unit: &str) -> f64 {
    let (digest, _) = file(lab, run, unit, "cdpq.json");
    json(&lab.object(&digest))["bits_per_weight"].as_f64().unwrap()
}

/// The suite's DeiT, trained on clothes: at three bits per weight on average, chosen and learned by what its layers give out on the 600 images
/// that it is not tested on.
#[test]
fn a_deit_of_three_bits_beats_the_one_that_was_only_rounded() {
    let test = "a_deit_of_three_bits_beats_the_one_that_was_only_rounded";
    let Some(data) = test_data(test) else { return };
    if !slow(test) {
        return;
    }
    let lab = Lab::empty();
    lab.write("pipeline.toml", &against_rounding(&data));
    let run: Run = lab.run(&["--set", "seed=1,2,3"]);
    let of = |unit: &str| answers(&lab, &run, &["fashion"], |task| format!("{unit}[{task}]"));
    let size = |unit: &str| file(&lab, &run, unit, "tensors.safetensors").1;
    let (plain, rounded) = (of("plain"), of("rounded_scores"));
    for seed in ["1", "2", "3"] {
        let unit = format!("student[seed={seed},fashion]");
        let student = answers(&lab, &run, &["fashion"], |task| format!("student_scores[seed={seed},{task}]"));
        let average = bits(&lab, &run, &unit);
        let (ours, theirs) = (size(&unit), size("rounded"));
        println!("seed {seed}: {average:.3} bits per weight, {ours} bytes, rounded {theirs} bytes");
        assert!(average <= 3.0 && ours <= theirs, "{average} bits, {ours} and {theirs} bytes");
        paired(&format!("seed {seed}: student, single precision"), &student, &plain);
        let found = paired(&format!("seed {seed}: student, rounded"), &student, &rounded);
        assert!(found.only.0 > found.only.1 && found.p < 0.01, "{found:?}");
    }
}

/// Numbers that look random, the same ones every time.
struct Dice(u64);

impl Dice {
    /// One from 0 up to 1.
    fn unit(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^= z >> 31;
        (z >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn below(&mut self, n: usize) -> usize {
        (self.unit() * n as f64) as usize
    }

    fn between(&mut self, low: f64, high: f64) -> f64 {
        low + self.unit() * (high - low)
    }
}

/// A composite has so many rows and columns of squares, each of two by two pixels.
const SQUARES: usize = 64;

/// A piece of clothing has so many.
const CLOTHING: usize = 32;

/// The suite's clothes that nothing is tested on, in shades of grey.
fn clothes(data: &Path) -> Vec<Vec<u8>> {
    let listed = |folder: &Path| -> Vec<PathBuf> {
        fs_err::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect()
    };
    let classes = listed(&data.join("suite/data/fashion/train"));
    let mut files: Vec<PathBuf> = classes.iter().flat_map(|class| listed(class)).collect();
    files.sort();
    let resized = Preprocessor::new(Preprocess::clip(CLOTHING)).unwrap();
    let clothing = |file: &PathBuf| {
        let image = resized.pixels(&Decoding::default().file(file).unwrap()).unwrap();
        image.pixels().iter().step_by(3).copied().collect()
    };
    files.iter().map(clothing).collect()
}

/// A PNM file of one to three pieces of clothing, each in a colour of its own, before a background that goes from one colour to another: what the
/// suite's SAM 2 was trained on, and is tested on.
fn composite(clothes: &[Vec<u8>], dice: &mut Dice) -> Vec<u8> {
    let [first, second] = [(); 2].map(|()| [(); 3].map(|()| dice.below(110) as f64));
    let slopes = [(); 2].map(|()| dice.between(-1.0, 1.0));
    let place = |square: usize| square as f64 / SQUARES as f64 - 0.5;
    let background = |square: usize| -> [f64; 3] {
        let (row, column) = (square / SQUARES, square % SQUARES);
        let share = (0.5 + slopes[0] * place(column) + slopes[1] * place(row)).clamp(0.0, 1.0);
        std::array::from_fn(|channel| first[channel] * (1.0 - share) + second[channel] * share)
    };
    let mut colours: Vec<[f64; 3]> = (0..SQUARES * SQUARES).map(background).collect();
    for _ in 0..=dice.below(3) {
        let clothing = &clothes[dice.below(clothes.len())];
        let [top, left] = [(); 2].map(|()| dice.below(40));
        let tint = [(); 3].map(|()| dice.between(0.45, 1.0));
        for (square, &grey) in clothing.iter().enumerate().filter(|(_, grey)| **grey > 25) {
            // Four rows and columns at most lie outside at the top and on the left.
            let row = (top + square / CLOTHING).wrapping_sub(4);
            let column = (left + square % CLOTHING).wrapping_sub(4);
            if row < SQUARES && column < SQUARES {
                colours[row * SQUARES + column] = tint.map(|tint| f64::from(grey) * tint);
            }
        }
    }
    let mut file = format!("P6\n{0} {0}\n255\n", 2 * SQUARES).into_bytes();
    for row in 0..2 * SQUARES {
        for column in 0..2 * SQUARES {
            file.extend(colours[row / 2 * SQUARES + column / 2].map(|channel| channel as u8));
        }
    }
    file
}

/// What an encoder of two bits is made from, what it is compared with, and how all are scored. Composites to learn from are in `composites`.
fn segmenting(data: &Path) -> String {
    let suite = data.join("suite").display().to_string();
    let preprocess = "preprocess = { size = { height = 128, width = 128 }, resample = 2, image_mean = [0.485, 0.456, 0.406], image_std = [0.229, 0.224, 0.225] }\n";
    // What is left is what the encoder's graph multiplies by; two convolutions of it are the decoder's by name.
    let quantize = |stage: &str, bits: &str| {
        format!(
            "[stage.{stage}]\nkind = \"quantize\"\nfrom = \"base\"\nscheme = \"symmetric\"\n{bits}\nrules = [\n\
             {{ match = \"*.bias\", keep = true }}, {{ match = \"*norm*\", keep = true }}, {{ match = \"*pos_embed*\", keep = true }},\n\
             {{ match = \"*embedding\", keep = true }}, {{ match = \"prompt_encoder.*\", keep = true }}, {{ match = \"mask_decoder.[!c]*\", keep = true }},\n]\n"
        )
    };
    let mut text = format!(
        "[vars]\nseed = 1\n[stage.base]\nkind = \"load\"\npath = \"{suite}/sam2/model.safetensors\"\n{}{}\
         [stage.student]\nkind = \"distill\"\nmethod = \"cdpq\"\nfrom = {{ model = \"base\", origin = \"base\" }}\n\
         start_bits = 4\nmin_bits = 2\ntarget_bits = 2.0\nfeatures = \"all\"\nlosses = {{ statistics = 1.0, features = 1.0 }}\n\
         layer_threshold = 1e6\nimpact_threshold = 1e6\nepochs = 8\nsettle = 5\nbatch_size = 8\nlearning_rate = 1e-3\nweight_decay = 1e-6\n\
         validation = {{ n = 40 }}\nseed = \"${{seed}}\"\ngraph = \"{suite}/onnx/sam2_encoder.onnx\"\noutput = \"image_embed\"\n\
         {preprocess}dataset.objects = {{ format = \"folder\", path = \"composites\" }}\n",
        quantize("rounded", "bits = 2"),
        quantize("wider", "bits = \"auto\"\nbudget = { bits_per_weight = 2.25 }"),
    );
    let run = format!(
        "graph = {{ encoder = \"{suite}/onnx/sam2_encoder.onnx\", decoder = \"{suite}/onnx/sam2_decoder.onnx\" }}\n{preprocess}"
    );
    let images =
        format!("dataset.objects = {{ format = \"sa1b\", path = \"{suite}/data/sam2_composites\" }}\n");
    for (stage, model) in [
        ("plain", "base"),
        ("rounded_scores", "rounded"),
        ("wider_scores", "wider"),
        ("student_scores", "student"),
    ] {
        text += &scores(stage, model, &run, &images);
    }
    text
}

/// The masks that an evaluation has found, one a line.
fn masks(lab: &Lab, run: &Run, unit: &str) -> Vec<Value> {
    let (digest, _) = file(lab, run, unit, "masks.jsonl");
    let text = fs_err::read_to_string(lab.object(&digest)).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// A figure of every image: the mean over the masks for a point and for a box.
fn by_image(masks: &[Value], figure: impl Fn(usize) -> f64) -> Vec<f64> {
    let pairs = masks.as_chunks::<2>().0.iter().enumerate();
    let figures = pairs.map(|(index, [point, boxed])| {
        assert_eq!(point["image"], boxed["image"]);
        f64::midpoint(figure(2 * index), figure(2 * index + 1))
    });
    figures.collect()
}

/// How well masks fit those of the dataset.
fn correctness(masks: &[Value]) -> Vec<f64> {
    by_image(masks, |index| masks[index]["j"].as_f64().unwrap())
}

/// How well masks fit those of another model.
fn agreement(masks: &[Value], others: &[Value]) -> Vec<f64> {
    assert_eq!(masks.len(), others.len());
    by_image(masks, |index| {
        let [found, other] = [masks, others].map(|masks| {
            let rle: Rle = serde_json::from_value(masks[index]["mask"].clone()).unwrap();
            rle.to_mask(2 * SQUARES, 2 * SQUARES).unwrap()
        });
        jaccard(&found, &other)
    })
}

/// Sign test over images: those where one is better, against those where the other is.
#[track_caller]
fn assert_better(what: &str, ours: &[f64], theirs: &[f64]) {
    let mean = |figures: &[f64]| figures.iter().sum::<f64>() / figures.len() as f64;
    println!("{what}: {:.4} and {:.4}", mean(ours), mean(theirs));
    let better = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a > b).collect::<Vec<_>>();
    let found = paired(what, &better(ours, theirs), &better(theirs, ours));
    assert!(mean(ours) > mean(theirs) && found.only.0 > found.only.1 && found.p < 0.01, "{what}: {found:?}");
}

/// The suite's SAM 2, its encoder at two bits in every layer: learned by what the layers give out on composites that it is not tested on, against
/// the same two bits by rounding. Rounded a little less, this SAM 2 draws larger masks and scores above itself in single precision, so that the
/// score does not tell how much of the model is left; whether its masks are still found does, even against a rounding with more bits.
#[test]
fn a_sam2_of_few_bits_beats_the_one_that_was_only_rounded() {
    let test = "a_sam2_of_few_bits_beats_the_one_that_was_only_rounded";
    let Some(data) = test_data(test) else { return };
    if !slow(test) {
        return;
    }
    let lab = Lab::empty();
    let (clothes, mut dice) = (clothes(&data), Dice(7));
    fs_err::create_dir_all(lab.path("composites/all")).unwrap();
    for index in 0..400 {
        let path = lab.path(format!("composites/all/{index:03}.ppm"));
        fs_err::write(path, composite(&clothes, &mut dice)).unwrap();
    }
    lab.write("pipeline.toml", &segmenting(&data));
    let run: Run = lab.run(&["--set", "seed=1,2,3"]);
    let size = |unit: &str| file(&lab, &run, unit, "tensors.safetensors").1;
    let [plain, rounded, wider] = ["plain", "rounded_scores", "wider_scores"]
        .map(|stage| masks(&lab, &run, &format!("{stage}[objects]")));
    for seed in ["1", "2", "3"] {
        let unit = format!("student[seed={seed},objects]");
        let student = masks(&lab, &run, &format!("student_scores[seed={seed},objects]"));
        let average = bits(&lab, &run, &unit);
        let (ours, theirs, more) = (size(&unit), size("rounded"), size("wider"));
        println!(
            "seed {seed}: {average:.3} bits per weight, {ours} bytes, rounded {theirs} and {more} bytes"
        );
        assert!(
            average <= 3.0 && ours <= theirs && ours <= more,
            "{average} bits, {ours}, {theirs} and {more} bytes"
        );
        assert_better(
            &format!("seed {seed}: IoU of student and rounded"),
            &correctness(&student),
            &correctness(&rounded),
        );
        assert_better(
            &format!("seed {seed}: agreement of student and wider with single precision"),
            &agreement(&student, &plain),
            &agreement(&wider, &plain),
        );
    }
}
