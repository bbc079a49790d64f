//! Merges that look at images: Fisher information and tuned coefficients, against plain arithmetic on a network of 114 weights.
//!
//! The network is `features = tanh(x·w1 + b1)·w2` on images of 2 × 2 pixels, with a normalizing head per task. Gradients in the references are
//! central differences in f64; nothing of the tool's own differentiation is used.

use crate::tensors::{Stored, read, write_stored};
use crate::util::{Lab, Run};
use merganser_onnx::proto::{
    AttributeProto, AttributeType, DataType, Dimension, DimensionValue, GraphProto, ModelProto, NodeProto,
    OperatorSetIdProto, TensorProto, TensorShapeProto, TypeProto, ValueInfoProto, type_proto,
};
use prost::Message;
use safetensors::Dtype;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt::Write;

const HIDDEN: usize = 6;
const PIXELS: usize = 12;
const IMAGES: usize = 6;

/// Tasks with their numbers of classes.
const TASKS: [(&str, usize); 2] = [("a", 5), ("b", 4)];

const SHAPES: [(&str, &[usize]); 3] =
    [("b1", &[HIDDEN]), ("w1", &[PIXELS, HIDDEN]), ("w2", &[HIDDEN, HIDDEN])];

/// Numbers that look random between −1 and 1, in f32.
fn noise(n: usize, seed: u64) -> Vec<f32> {
    (0..n as u64)
        .map(|i| {
            let mut z = (seed << 32).wrapping_add(i + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            (z >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

/// Weights by name.
type Weights = BTreeMap<&'static str, Vec<f64>>;

fn stored(tensors: &[(&str, &[usize], &[f32])]) -> BTreeMap<String, Stored> {
    let one = |(name, shape, values): &(&str, &[usize], &[f32])| {
        let data = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        ((*name).to_owned(), Stored { dtype: Dtype::F32, shape: shape.to_vec(), data })
    };
    tensors.iter().map(one).collect()
}

/// A task: what it is tuned to, and what it is asked.
struct Task {
    name: &'static str,
    weights: Weights,
    head: Vec<f64>,
    bias: Vec<f64>,
    /// [3 channels × 2 × 2] each
    images: Vec<Vec<f64>>,
}

impl Task {
    fn features(weights: &Weights, image: &[f64]) -> Vec<f64> {
        let hidden: Vec<f64> = (0..HIDDEN)
            .map(|h| {
                let sum: f64 = (0..PIXELS).map(|p| image[p] * weights["w1"][p * HIDDEN + h]).sum();
                (sum + weights["b1"][h]).tanh()
            })
            .collect();
        (0..HIDDEN).map(|o| (0..HIDDEN).map(|h| hidden[h] * weights["w2"][h * HIDDEN + o]).sum()).collect()
    }

    /// log p(y|x) of all classes.
    fn log_probabilities(&self, weights: &Weights, image: &[f64]) -> Vec<f64> {
        let features = Self::features(weights, image);
        let norm = features.iter().map(|f| f * f).sum::<f64>().sqrt();
        let logits: Vec<f64> = self
            .bias
            .iter()
            .enumerate()
            .map(|(c, bias)| {
                features.iter().zip(&self.head[c * HIDDEN..]).map(|(f, w)| f / norm * w).sum::<f64>() + bias
            })
            .collect();
        let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = logits.iter().map(|z| (z - largest).exp()).sum();
        logits.iter().map(|z| z - largest - sum.ln()).collect()
    }

    fn entropy(&self, weights: &Weights) -> f64 {
        let of = |image: &Vec<f64>| -> f64 {
            self.log_probabilities(weights, image).iter().map(|log| -log.exp() * log).sum()
        };
        self.images.iter().map(of).sum::<f64>() / self.images.len() as f64
    }

    /// E_x E_y[(∂ log p(y|x) / ∂θ)²] of every weight, weight by weight; or of one image, for one label.
    fn fisher(&self, only: Option<(usize, usize)>) -> Weights {
        let mut found = Weights::new();
        for (name, values) in &self.weights {
            let mut diagonal = vec![0.0; values.len()];
            for (place, diagonal) in diagonal.iter_mut().enumerate() {
                let moved = |by: f64| {
                    let mut weights = self.weights.clone();
                    weights.get_mut(name).unwrap()[place] += by;
                    weights
                };
                let (up, down) = (moved(STEP), moved(-STEP));
                let images = only.map_or(0..self.images.len(), |(image, _)| image..image + 1);
                let n = images.len() as f64;
                for image in &self.images[images] {
                    let log = self.log_probabilities(&self.weights, image);
                    let (up, down) =
                        (self.log_probabilities(&up, image), self.log_probabilities(&down, image));
                    for (class, log) in log.iter().enumerate() {
                        let slope = (up[class] - down[class]) / (2.0 * STEP);
                        let counts = match only {
                            Some((_, drawn)) => f64::from(u8::from(drawn == class)),
                            None => log.exp() / n,
                        };
                        *diagonal += counts * slope * slope;
                    }
                }
            }
            found.insert(name, diagonal);
        }
        found
    }
}

/// Of central differences.
const STEP: f64 = 1e-5;

/// A lab with the network, a base, two tuned models, their images and heads, and a pipeline that reads them.
struct Tiny {
    lab: Lab,
    base: Weights,
    tasks: Vec<Task>,
    pipeline: String,
}

impl Tiny {
    fn new() -> Self {
        let lab = Lab::empty();
        let base: BTreeMap<&str, Vec<f32>> = SHAPES
            .iter()
            .enumerate()
            .map(|(i, (name, shape))| (*name, noise(shape.iter().product(), i as u64 + 1)))
            .collect();
        let save = |file: &str, weights: &BTreeMap<&str, Vec<f32>>| {
            let tensors: Vec<_> =
                SHAPES.iter().map(|(name, shape)| (*name, *shape, weights[name].as_slice())).collect();
            write_stored(&lab.path(file), &stored(&tensors));
        };
        save("base.safetensors", &base);
        fs_err::write(lab.path("model.onnx"), graph(&base)).unwrap();
        let widened = |weights: &BTreeMap<&'static str, Vec<f32>>| -> Weights {
            weights
                .iter()
                .map(|(name, values)| (*name, values.iter().map(|v| f64::from(*v)).collect()))
                .collect()
        };
        let mut pipeline = "[vars]\ntasks = [\"a\", \"b\"]\n\
             [stage.base]\nkind = \"load\"\npath = \"base.safetensors\"\n\
             [stage.tuned]\nkind = \"load\"\neach = { task = \"${tasks}\" }\npath = \"${task}.safetensors\"\n\
             [stage.deltas]\nkind = \"diff\"\nfrom = { base = \"base\", tuned = \"tuned\" }\n"
            .to_owned();
        let mut tasks = Vec::new();
        for (index, (name, classes)) in TASKS.into_iter().enumerate() {
            let seed = 10 * (index as u64 + 1);
            let tuned: BTreeMap<&str, Vec<f32>> = base
                .iter()
                .enumerate()
                .map(|(i, (name, values))| {
                    let own = noise(values.len(), seed + i as u64);
                    (*name, values.iter().zip(own).map(|(base, own)| base + own * 0.75).collect())
                })
                .collect();
            save(&format!("{name}.safetensors"), &tuned);
            let (head, bias) = (noise(classes * HIDDEN, seed + 5), noise(classes, seed + 6));
            let head: Vec<f32> = head.iter().map(|w| 4.0 * w).collect();
            let tensors: [(&str, &[usize], &[f32]); 2] =
                [("weight", &[classes, HIDDEN], &head), ("bias", &[classes], &bias)];
            write_stored(&lab.path(format!("head_{name}.safetensors")), &stored(&tensors));
            let pixels: Vec<u8> =
                noise(4 * IMAGES, seed + 7).iter().map(|v| ((v + 1.0) * 127.0) as u8).collect();
            let idx = |kind: u8, dims: &[u32], bytes: &[u8]| -> Vec<u8> {
                let dims = dims.iter().flat_map(|dim| dim.to_be_bytes());
                [0, 0, 8, kind].into_iter().chain(dims).chain(bytes.iter().copied()).collect()
            };
            let labels: Vec<u8> = (0..IMAGES).map(|i| (i % classes) as u8).collect();
            let n = IMAGES as u32;
            fs_err::write(lab.path(format!("{name}-images.idx")), idx(3, &[n, 2, 2], &pixels)).unwrap();
            fs_err::write(lab.path(format!("{name}-labels.idx")), idx(1, &[n], &labels)).unwrap();
            write!(
                pipeline,
                "[vars.data.{name}]\nformat = \"idx\"\nimages = \"{name}-images.idx\"\nlabels = \"{name}-labels.idx\"\nhead = \"head_{name}.safetensors\"\n"
            )
            .unwrap();
            let gray = |image: &[u8]| -> Vec<f64> {
                let pixels: Vec<f64> = image.iter().map(|p| f64::from(*p) / 255.0).collect();
                pixels.repeat(3)
            };
            tasks.push(Task {
                name,
                weights: widened(&tuned),
                head: head.iter().map(|w| f64::from(*w)).collect(),
                bias: bias.iter().map(|b| f64::from(*b)).collect(),
                images: pixels.chunks(4).map(gray).collect(),
            });
        }
        Self { base: widened(&base), lab, tasks, pipeline }
    }

    fn run(&self, stages: &str) -> Run {
        let looks = "graph = \"model.onnx\"\ndataset = \"${data}\"\npreprocess = { do_resize = false, do_center_crop = false, do_normalize = false }\n";
        self.lab.write("pipeline.toml", &(self.pipeline.clone() + &stages.replace("LOOKS\n", looks)));
        self.lab.run(&[])
    }

    /// The tensors of a checkpoint of the run.
    fn exported(&self, stage: &str) -> BTreeMap<String, Vec<f32>> {
        self.lab.ok(["export", "pipeline.toml", stage, "out", "--overwrite"]);
        let tensors = read(&self.lab.path(format!("out/{stage}.safetensors")));
        tensors.into_iter().map(|(name, (_, values))| (name, values)).collect()
    }

    /// θ₀ + Σ_t λ_t·τ_t, λ by task and tensor.
    fn merged(&self, coefficients: &[BTreeMap<&str, f64>]) -> Weights {
        let one = |(name, base): (&&'static str, &Vec<f64>)| {
            let mut values = base.clone();
            for (task, own) in self.tasks.iter().zip(coefficients) {
                let tuned = task.weights[name].iter().zip(base);
                values.iter_mut().zip(tuned).for_each(|(v, (tuned, base))| *v += own[name] * (tuned - base));
            }
            (*name, values)
        };
        self.base.iter().map(one).collect()
    }

    fn entropies(&self, coefficients: &[BTreeMap<&str, f64>]) -> Vec<f64> {
        let weights = self.merged(coefficients);
        self.tasks.iter().map(|task| task.entropy(&weights)).collect()
    }

    /// Adam as it is written, on central differences: the coefficients at the end, and the entropies before each step.
    fn adapted(
        &self,
        steps: i32,
        rate: f64,
        by_tensor: bool,
    ) -> (Vec<BTreeMap<&'static str, f64>>, Vec<Vec<f64>>) {
        // A group per tensor, or one.
        let groups: Vec<Vec<&'static str>> = if by_tensor {
            self.base.keys().map(|name| vec![*name]).collect()
        } else {
            vec![self.base.keys().copied().collect()]
        };
        let n = self.tasks.len();
        let spread = |raw: &[f64]| -> Vec<BTreeMap<&'static str, f64>> {
            let of = |task: usize| {
                let named = groups.iter().enumerate().flat_map(|(g, names)| {
                    names.iter().map(move |name| (*name, raw[g * n + task].clamp(0.0, 1.0)))
                });
                named.collect()
            };
            (0..n).map(of).collect()
        };
        let mut raw = vec![0.3f64; groups.len() * n];
        let (mut first, mut second) = (vec![0.0; raw.len()], vec![0.0; raw.len()]);
        let mut entropies = Vec::new();
        for step in 1..=steps {
            entropies.push(self.entropies(&spread(&raw)));
            let slopes: Vec<f64> = (0..raw.len())
                .map(|i| {
                    let at = |by: f64| {
                        // Past a limit there is no slope, on it there is: the difference must not look across.
                        let mut moved: Vec<f64> = raw.iter().map(|r| r.clamp(0.0, 1.0)).collect();
                        moved[i] += by;
                        let named = |task: usize| -> BTreeMap<&'static str, f64> {
                            let named = groups.iter().enumerate();
                            named
                                .flat_map(|(g, names)| {
                                    names.iter().map(|name| (*name, moved[g * n + task])).collect::<Vec<_>>()
                                })
                                .collect()
                        };
                        self.entropies(&(0..n).map(named).collect::<Vec<_>>()).iter().sum::<f64>()
                    };
                    if (0.0..=1.0).contains(&raw[i]) { (at(STEP) - at(-STEP)) / (2.0 * STEP) } else { 0.0 }
                })
                .collect();
            for (i, raw) in raw.iter_mut().enumerate() {
                first[i] = 0.9 * first[i] + 0.1 * slopes[i];
                second[i] = 0.999 * second[i] + 0.001 * slopes[i] * slopes[i];
                let (m, v) = (first[i] / (1.0 - 0.9f64.powi(step)), second[i] / (1.0 - 0.999f64.powi(step)));
                *raw -= rate * m / (v.sqrt() + 1e-8);
            }
        }
        (spread(&raw), entropies)
    }
}

fn graph(base: &BTreeMap<&str, Vec<f32>>) -> Vec<u8> {
    let node = |op: &str, inputs: &[&str], output: &str| NodeProto {
        op_type: Some(op.to_owned()),
        name: Some(output.to_owned()),
        input: inputs.iter().map(|&input| input.to_owned()).collect(),
        output: vec![output.to_owned()],
        ..NodeProto::default()
    };
    let constants = SHAPES.iter().map(|(name, shape)| TensorProto {
        name: Some((*name).to_owned()),
        dims: shape.iter().map(|dim| *dim as i64).collect(),
        data_type: Some(DataType::Float as i32),
        float_data: base[name].clone(),
        ..TensorProto::default()
    });
    let value = |name: &str, dims: &[i64]| {
        let batch = DimensionValue::DimParam("n".to_owned());
        let dims = std::iter::once(batch).chain(dims.iter().map(|dim| DimensionValue::DimValue(*dim)));
        let dims = dims.map(|value| Dimension { value: Some(value), ..Dimension::default() });
        let shape = Some(TensorShapeProto { dim: dims.collect() });
        let tensor = type_proto::Tensor { elem_type: Some(DataType::Float as i32), shape };
        let r#type = TypeProto { value: Some(type_proto::Value::TensorType(tensor)), denotation: None };
        ValueInfoProto { name: Some(name.to_owned()), r#type: Some(r#type), ..ValueInfoProto::default() }
    };
    let mut flatten = node("Flatten", &["pixels"], "flat");
    flatten.attribute.push(AttributeProto {
        name: Some("axis".to_owned()),
        i: Some(1),
        r#type: Some(AttributeType::Int as i32),
        ..AttributeProto::default()
    });
    let model = ModelProto {
        ir_version: Some(8),
        opset_import: vec![OperatorSetIdProto { domain: None, version: Some(17) }],
        graph: Some(GraphProto {
            name: Some("tiny".to_owned()),
            node: vec![
                flatten,
                node("MatMul", &["flat", "w1"], "product"),
                node("Add", &["product", "b1"], "sum"),
                node("Tanh", &["sum"], "hidden"),
                node("MatMul", &["hidden", "w2"], "features"),
            ],
            initializer: constants.collect(),
            input: vec![value("pixels", &[3, 2, 2])],
            output: vec![value("features", &[HIDDEN as i64])],
            ..GraphProto::default()
        }),
        ..ModelProto::default()
    };
    model.encode_to_vec()
}

const CALIBRATE: &str =
    "kind = \"calibrate\"\nfrom = { model = \"tuned\", origin = \"base\" }\nLOOKS\nsensitivity_images = 0\n";

/// The tensors of a calibration's artifact.
fn statistics(lab: &Lab, run: &Run, unit: &str) -> BTreeMap<String, Vec<f32>> {
    let artifact: Value =
        serde_json::from_slice(&fs_err::read(lab.object(run.artifacts()[unit])).unwrap()).unwrap();
    let blob =
        artifact["blobs"].as_array().unwrap().iter().find(|blob| blob["name"] == "tensors.safetensors");
    let path = lab.object(blob.unwrap()["digest"].as_str().unwrap());
    read(&path).into_iter().map(|(name, (_, values))| (name, values)).collect()
}

#[track_caller]
fn close(what: &str, found: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(0.0f64, |most, value| most.max(value.abs()));
    for (found, expected) in found.iter().zip(expected) {
        let off = (f64::from(*found) - expected).abs();
        assert!(off <= tolerance * largest, "{what}: {found} instead of {expected}");
    }
}

#[test]
fn fisher_information_is_that_of_finite_differences() {
    let tiny = Tiny::new();
    let run = tiny.run(&format!(
        "[stage.expected]\n{CALIBRATE}fisher_images = 100\n[stage.drawn]\n{CALIBRATE}fisher_images = 1\nfisher_labels = \"sampled\"\n"
    ));
    for task in &tiny.tasks {
        let found = statistics(&tiny.lab, &run, &format!("expected[{}]", task.name));
        for (name, expected) in task.fisher(None) {
            close(name, &found[&format!("fisher.{name}")], &expected, 1e-4);
        }
        // A single image and one label of its distribution.
        let found = statistics(&tiny.lab, &run, &format!("drawn[{}]", task.name));
        let found = &found["fisher.w2"];
        let candidates: Vec<Vec<f64>> =
            (0..task.bias.len()).map(|class| task.fisher(Some((0, class)))["w2"].clone()).collect();
        let is_near = |expected: &&Vec<f64>| {
            let largest = expected.iter().fold(0.0f64, |most, value| most.max(*value));
            found.iter().zip(*expected).all(|(f, e)| (f64::from(*f) - e).abs() < 1e-4 * largest)
        };
        assert_eq!(candidates.iter().filter(is_near).count(), 1, "one label was drawn for `{}`", task.name);
    }
}

#[test]
fn models_are_averaged_by_their_fisher_information() {
    let tiny = Tiny::new();
    let merge = "kind = \"merge\"\nmethod = \"fisher\"\nfrom = { base = \"base\", vectors = \"deltas\", statistics = \"seen\" }\n";
    tiny.run(&format!(
        "[stage.seen]\n{CALIBRATE}fisher_images = 6\n[stage.usual]\n{merge}[stage.plain]\n{merge}normalize = false\nfloor = 0.01\n\
         [stage.weighted]\n{merge}weights = {{ a = 2.0, b = 0.5 }}\n"
    ));
    let diagonals: Vec<Weights> = tiny.tasks.iter().map(|task| task.fisher(None)).collect();
    let norms = diagonals.iter().map(|own| own.values().flatten().map(|f| f * f).sum::<f64>().sqrt());
    let norms: Vec<f64> = norms.collect();
    for (stage, floor, factors) in [
        ("usual", 1e-6, [1.0 / norms[0], 1.0 / norms[1]]),
        ("plain", 0.01, [1.0, 1.0]),
        ("weighted", 1e-6, [2.0 / norms[0], 0.5 / norms[1]]),
    ] {
        let found = tiny.exported(stage);
        for (name, _) in SHAPES {
            let expected: Vec<f64> = (0..tiny.base[name].len())
                .map(|i| {
                    let counts =
                        diagonals.iter().zip(factors).map(|(own, factor)| factor * own[name][i].max(floor));
                    let counts: Vec<f64> = counts.collect();
                    let sum: f64 =
                        tiny.tasks.iter().zip(&counts).map(|(task, c)| c * task.weights[name][i]).sum();
                    sum / counts.iter().sum::<f64>()
                })
                .collect();
            close(&format!("{stage} {name}"), &found[name], &expected, 2e-4);
        }
    }
}

const ADAMERGING: &str = "kind = \"merge\"\nmethod = \"adamerging\"\nfrom = { base = \"base\", vectors = \"deltas\", origin = \"base\" }\nLOOKS\n";

#[test]
fn coefficients_are_those_of_adam_on_finite_differences() {
    let tiny = Tiny::new();
    for (granularity, by_tensor) in [("layer", true), ("task", false)] {
        let (steps, rate) = (30, 0.03);
        tiny.run(&format!(
            "[stage.adapted]\n{ADAMERGING}granularity = \"{granularity}\"\nsteps = {steps}\nlearning_rate = {rate}\n"
        ));
        let shown = tiny.lab.json(&["show", "pipeline.toml", "adapted"]);
        let adaptation = &shown[0]["output"]["adaptation"];
        let (expected, entropies) = tiny.adapted(steps, rate, by_tensor);
        for (step, (found, expected)) in
            adaptation["entropies"].as_array().unwrap().iter().zip(&entropies).enumerate()
        {
            for (found, expected) in found.as_array().unwrap().iter().zip(expected) {
                let found = found.as_f64().unwrap();
                assert!(
                    (found - expected).abs() < 2e-3 * expected,
                    "step {step}: {found} instead of {expected}"
                );
            }
        }
        let listed = adaptation["coefficients"].as_array().unwrap();
        assert_eq!(listed.len(), if by_tensor { 3 } else { 1 });
        let mut moved = 0.0f64;
        for entry in listed {
            let name = entry["tensor"].as_str().unwrap_or("w1");
            for (task, value) in entry["values"].as_array().unwrap().iter().enumerate() {
                let (found, expected) = (value.as_f64().unwrap(), expected[task][name]);
                assert!(
                    (found - expected).abs() < 5e-3,
                    "{granularity} {name} {task}: {found} instead of {expected}"
                );
                moved = moved.max((found - 0.3).abs());
            }
        }
        assert!(moved > 0.2, "{moved}");
        let found = tiny.exported("adapted");
        for (name, expected) in tiny.merged(&expected) {
            close(name, &found[name], &expected, 5e-3);
        }
        let first: f64 = entropies[0].iter().sum();
        let last: f64 = entropies[entropies.len() - 1].iter().sum();
        assert!(last < first, "{last} after {first}");
    }
}

#[test]
fn adamerging_plus_tunes_what_ties_leaves() {
    let tiny = Tiny::new();
    // Without steps the coefficients are the initial ones: the merge is that of TIES with the sum of what agrees.
    tiny.run(&format!(
        "[stage.adapted]\n{ADAMERGING}plus = true\ndensity = 0.4\nsteps = 0\n\
         [stage.ties]\nkind = \"merge\"\nfrom = {{ base = \"base\", vectors = \"deltas\" }}\nmethod = \"ties\"\ndensity = 0.4\nagg = \"sum\"\nscale = 0.3\n"
    ));
    let (adapted, ties) = (tiny.exported("adapted"), tiny.exported("ties"));
    for (name, values) in &ties {
        let expected: Vec<f64> = values.iter().map(|value| f64::from(*value)).collect();
        close(name, &adapted[name], &expected, 1e-6);
    }
    tiny.run(&format!("[stage.adapted]\n{ADAMERGING}plus = true\nsteps = 20\nlearning_rate = 0.02\n"));
    let shown = tiny.lab.json(&["show", "pipeline.toml", "adapted"]);
    let entropies = shown[0]["output"]["adaptation"]["entropies"].as_array().unwrap();
    let sum =
        |step: &Value| step.as_array().unwrap().iter().map(|value| value.as_f64().unwrap()).sum::<f64>();
    assert!(sum(&entropies[19]) < sum(&entropies[0]), "{entropies:?}");
}

#[test]
fn scores_tell_what_a_model_was_tuned_on() {
    let tiny = Tiny::new();
    let evaluate = "kind = \"evaluate\"\nLOOKS\n";
    let run = tiny.run(&format!(
        "[stage.adapted]\n{ADAMERGING}steps = 3\n[stage.packed]\nkind = \"quantize\"\nfrom = \"adapted\"\nbits = 8\n\
         [stage.plain]\nkind = \"merge\"\nfrom = {{ base = \"base\", vectors = \"deltas\" }}\nmethod = \"average\"\n\
         [stage.packed_scores]\n{evaluate}from = {{ model = \"packed\", origin = \"base\" }}\n\
         [stage.plain_scores]\n{evaluate}from = {{ model = \"plain\", origin = \"base\" }}\n"
    ));
    for score in &run.scores {
        let expected = if score["stage"] == "packed_scores" {
            serde_json::json!({ "labels": false, "scored": true })
        } else {
            Value::Null
        };
        assert_eq!(score["seen"], expected, "{score}");
    }
    let table = tiny.lab.ok(["run", "pipeline.toml"]).stdout;
    assert!(
        table.contains("packed was made with the scored images of a, b, without their labels"),
        "{table}"
    );
    assert!(!table.contains("plain was made"), "{table}");
    let shown = tiny.lab.ok(["show", "pipeline.toml", "adapted"]).stdout;
    assert!(shown.contains("made with images of `a` (6), `b` (6), without their labels"), "{shown}");
}

#[test]
fn mistakes_are_found_before_anything_runs() {
    let tiny = Tiny::new();
    let looks = "graph = \"model.onnx\"\npreprocess = { do_resize = false, do_center_crop = false }\n";
    let from = "from = { base = \"base\", vectors = \"deltas\", origin = \"base\" }\nkind = \"merge\"\nmethod = \"adamerging\"\n";
    let calibrate = format!(
        "[stage.seen]\n{}",
        CALIBRATE.replace("LOOKS\n", &format!("{looks}dataset = \"${{data}}\"\n"))
    );
    let fisher = "kind = \"merge\"\nmethod = \"fisher\"\n";
    for (stages, texts) in [
        (
            format!(
                "[stage.m]\n{from}{looks}dataset.a = {{ format = \"idx\", images = \"a-images.idx\", labels = \"a-labels.idx\" }}\n"
            ),
            "there is no dataset for task `b`",
        ),
        (
            format!("[stage.m]\n{from}{looks}dataset = \"${{data}}\"\ninitial = 1.5\n"),
            "`initial` must be from 0 to 1, got 1.5",
        ),
        (
            format!("[stage.m]\n{from}{looks}dataset = \"${{data}}\"\nbatch_size = 0\n"),
            "`batch_size` must be at least 1, got 0",
        ),
        (
            format!(
                "[stage.m]\n{from}{looks}dataset = \"${{data}}\"\nrules = [{{ match = \"w1\", initial = 0.5 }}]\n"
            ),
            "merges all tensors together",
        ),
        (format!("[stage.m]\n{from}dataset = \"${{data}}\"\n"), "missing key `graph`"),
        (
            format!("[stage.m]\n{}{looks}dataset = \"${{data}}\"\n", from.replace(", origin = \"base\"", "")),
            "method `adamerging` needs port `origin`",
        ),
        (
            format!("[stage.m]\n{fisher}from = {{ base = \"base\", vectors = \"deltas\" }}\n"),
            "method `fisher` needs port `statistics`",
        ),
        (
            format!(
                "{calibrate}[stage.m]\nkind = \"merge\"\nmethod = \"average\"\nfrom = {{ base = \"base\", vectors = \"deltas\", statistics = \"seen\" }}\n"
            ),
            "method `average` does not read port `statistics`",
        ),
    ] {
        tiny.lab.write("pipeline.toml", &(tiny.pipeline.clone() + &stages));
        let outcome = tiny.lab.call(["check", "pipeline.toml"]);
        assert_eq!(outcome.code, 2, "{texts}\n{outcome}");
        // Long messages are broken into lines.
        let told =
            outcome.stderr.split_whitespace().filter(|word| *word != "|").collect::<Vec<_>>().join(" ");
        assert!(told.contains(texts), "{texts}\n{outcome}");
    }
    // Statistics without Fisher information are only known when they are there.
    let merge = format!(
        "{calibrate}[stage.m]\n{fisher}from = {{ base = \"base\", vectors = \"deltas\", statistics = \"seen\" }}\n"
    );
    tiny.lab.write("pipeline.toml", &(tiny.pipeline.clone() + &merge));
    let outcome = tiny.lab.call(["run", "pipeline.toml"]);
    assert_eq!(outcome.code, 1, "{outcome}");
    outcome.tells(&["the statistics of task `a` have no Fisher information", "fisher_images"]);
}

/// Of a run that was killed, what had been tuned is not tuned again, and the end is the same.
#[test]
fn a_killed_tuning_goes_on_to_the_same_bytes() {
    let tiny = Tiny::new();
    let stages = format!("[stage.adapted]\n{ADAMERGING}steps = 400\n");
    let whole = tiny.run(&stages).artifacts()["adapted"].to_owned();
    let other = Tiny::new();
    other.run("");
    let looks = "graph = \"model.onnx\"\ndataset = \"${data}\"\npreprocess = { do_resize = false, do_center_crop = false, do_normalize = false }\n";
    other.lab.write("pipeline.toml", &(other.pipeline.clone() + &stages.replace("LOOKS\n", looks)));
    other.lab.run_and_kill("adapted", 3);
    let outcome = other.lab.call(["run", "pipeline.toml"]);
    outcome.tells(&["going on after step"]);
    assert_eq!(other.lab.run(&[]).artifacts()["adapted"], whole);
}
