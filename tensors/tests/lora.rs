//! PEFT adapters read as task vectors: values by hand, every form of names, and what is refused.

mod support;

use std::path::Path;

use merganser_tensors::lora::{self, Adapter};
use merganser_tensors::manifest::Content;
use merganser_tensors::stream::map_blocks;
use merganser_tensors::writer::{Block, OutputTensor, Payload, WriteOptions, write_tensors};
use merganser_tensors::{DType, LocalFiles, Manifest, formats};
use serde_json::{Value, json};
use support::{Data, Memory, Tensor, read};

/// Writes an adapter's two files.
fn write(folder: &Path, config: &Value, tensors: &[Tensor]) {
    fs_err::write(folder.join("adapter_config.json"), config.to_string()).unwrap();
    let outputs: Vec<OutputTensor> = tensors
        .iter()
        .map(|tensor| {
            let payload = match &tensor.data {
                Data::Values(_) => Payload::Values(DType::F32),
                Data::Bytes(dtype, _) => Payload::Bytes(*dtype),
            };
            OutputTensor { name: tensor.name.clone(), shape: tensor.shape.clone(), payload }
        })
        .collect();
    let mut bytes = Vec::new();
    let fill = |tensor: usize, range: std::ops::Range<usize>, block: Block<'_>, _: &mut _| {
        let (elements, size) = tensors[tensor].elements();
        let wanted = &elements[range.start * size..range.end * size];
        match block {
            Block::Values(out) => bytemuck::cast_slice_mut(out).copy_from_slice(wanted),
            Block::Bytes(out) => out.copy_from_slice(wanted),
        }
        Ok(())
    };
    write_tensors(&mut bytes, &outputs, fill, &WriteOptions::default()).unwrap();
    fs_err::write(folder.join("adapter_model.safetensors"), bytes).unwrap();
}

fn config(extra: Value) -> Value {
    let mut config = json!({
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "fan_in_fan_out": false, "use_rslora": false,
        "use_dora": false, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": null, "target_modules": ["q_proj"],
        "init_lora_weights": true, "base_model_name_or_path": "anywhere", "some_future_key": [1, 2],
    });
    let Value::Object(extra) = extra else { panic!("an object") };
    config.as_object_mut().unwrap().extend(extra);
    config
}

fn describe(config: &Value, tensors: &[Tensor]) -> merganser_tensors::Result<Adapter> {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), config, tensors);
    lora::describe(&lora::locate(folder.path()).expect("it is an adapter"))
}

/// Opens all of an adapter, and returns its tensors' names, shapes and values.
fn values(config: &Value, tensors: &[Tensor]) -> Vec<(String, Vec<usize>, Vec<f32>)> {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), config, tensors);
    let adapter = lora::describe(&lora::locate(folder.path()).unwrap()).unwrap();
    let mut memory = Memory::default();
    let digests = memory.register(&adapter.parts);
    let manifest = adapter.manifest(&digests, |_| true).unwrap();
    assert_eq!(manifest.content(), Content::TaskVectors);
    assert_eq!(Manifest::from_json(&manifest.to_json()).unwrap(), manifest);
    assert_eq!(manifest.files().len(), 1);
    assert_eq!((manifest.operands().count(), manifest.stored_bytes()), (0, 0));
    let source = memory.open(&manifest);
    let tensors = source.tensors().iter();
    tensors.map(|info| (info.name.clone(), info.shape.clone(), read(&*source, &info.name))).collect()
}

fn refused(config: &Value, tensors: &[Tensor]) -> String {
    let message = describe(config, tensors).unwrap_err().to_string();
    assert!(
        message.starts_with("LoRA adapter `")
            && message.contains("adapter_model.safetensors` cannot be used: ")
    );
    message
}

fn linear(module: &str) -> [Tensor; 2] {
    [
        Tensor::values(&format!("{module}.lora_A.weight"), &[2, 3], vec![1., 2., 3., 4., 5., 6.]),
        Tensor::values(&format!("{module}.lora_B.weight"), &[2, 2], vec![1., 10., -1., 0.5]),
    ]
}

/// `B·A` of [`linear`].
const PRODUCT: [f32; 6] = [41., 52., 63., 1., 0.5, 0.];

fn scaled(factor: f32) -> Vec<f32> {
    PRODUCT.iter().map(|x| x * factor).collect()
}

#[test]
fn a_linear_layer_is_scale_times_b_times_a() {
    let tensors = linear("base_model.model.vision_model.encoder.layers.0.self_attn.q_proj");
    let name = "vision_model.encoder.layers.0.self_attn.q_proj.weight".to_owned();
    assert_eq!(values(&config(json!({})), &tensors), [(name.clone(), vec![2, 3], scaled(2.0))]);
    let stabilized = values(&config(json!({"use_rslora": true})), &tensors);
    let factor = 4.0 / 2f64.sqrt();
    let expected: Vec<f32> = PRODUCT.iter().map(|x| (factor * f64::from(*x)) as f32).collect();
    assert_eq!(stabilized, [(name.clone(), vec![2, 3], expected)]);
    let patterns = json!({"r": 64, "rank_pattern": {"k_proj": 3, "layers\\.\\d\\.self_attn\\.q_proj": 2}, "alpha_pattern": {"q_proj": 1}});
    assert_eq!(values(&config(patterns), &tensors), [(name.clone(), vec![2, 3], scaled(0.5))]);
    let transposed = values(&config(json!({"fan_in_fan_out": true})), &tensors);
    assert_eq!(transposed, [(name, vec![3, 2], [41., 1., 52., 0.5, 63., 0.].map(|x| 2.0 * x).to_vec())]);
}

#[test]
fn adapter_names_and_missing_prefixes_are_understood() {
    let [a, b] = linear("m");
    let renamed = |a_name: &str, b_name: &str| {
        [Tensor { name: a_name.into(), ..a.clone() }, Tensor { name: b_name.into(), ..b.clone() }]
    };
    for (a_name, b_name, expected) in [
        ("base_model.model.x.lora_A.default.weight", "base_model.model.x.lora_B.default.weight", "x.weight"),
        ("x.y.lora_A.weight", "x.y.lora_B.weight", "x.y.weight"),
        (
            "base_model.model.lora_head.lora_A.weight",
            "base_model.model.lora_head.lora_B.weight",
            "lora_head.weight",
        ),
    ] {
        let found = values(&config(json!({})), &renamed(a_name, b_name));
        assert_eq!(found, [(expected.to_owned(), vec![2, 3], scaled(2.0))]);
    }
    let message = refused(&config(json!({})), &renamed("x.lora_A.one.weight", "x.lora_B.two.weight"));
    assert!(message.contains("several adapters: `one` and `two`"), "{message}");
}

#[test]
fn embeddings_and_kernels_have_the_layout_of_their_weights() {
    let embedding = [
        Tensor::values("base_model.model.emb.lora_embedding_A", &[2, 3], vec![1., 2., 3., 4., 5., 6.]),
        Tensor::values("base_model.model.emb.lora_embedding_B", &[2, 2], vec![1., 10., -1., 0.5]),
    ];
    let expected = [41., 1., 52., 0.5, 63., 0.].map(|x| 2.0 * x).to_vec();
    assert_eq!(values(&config(json!({})), &embedding), [("emb.weight".to_owned(), vec![3, 2], expected)]);
    let kernel = [
        Tensor::values("c.lora_A.weight", &[2, 1, 1, 3], vec![1., 2., 3., 4., 5., 6.]),
        Tensor::values("c.lora_B.weight", &[2, 2, 1, 1], vec![1., 10., -1., 0.5]),
    ];
    assert_eq!(values(&config(json!({})), &kernel), [("c.weight".to_owned(), vec![2, 1, 1, 3], scaled(2.0))]);
}

#[test]
fn fused_attention_adapts_its_in_projection() {
    let tensors = [
        linear("base_model.model.visual.transformer.resblocks.0.attn"),
        linear("base_model.model.visual.transformer.resblocks.0.attn.base_layer.out_proj"),
    ]
    .concat();
    let found = values(&config(json!({})), &tensors);
    let names: Vec<&str> = found.iter().map(|(name, ..)| name.as_str()).collect();
    let block = "visual.transformer.resblocks.0.attn";
    assert_eq!(names, [format!("{block}.in_proj_weight"), format!("{block}.out_proj.weight")]);
}

#[test]
fn half_precision_factors_are_widened_and_products_do_not_depend_on_threads() {
    let (m, r, n) = (190, 8, 701);
    let half = |name: &str, shape: &[usize], seed: usize| {
        let values: Vec<half::bf16> = (0..shape.iter().product::<usize>())
            .map(|i| half::bf16::from_f32(((i * 7919 + seed) % 1009) as f32 * 1e-3 - 0.5))
            .collect();
        let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        let tensor =
            Tensor { name: name.to_owned(), shape: shape.to_vec(), data: Data::Bytes(DType::BF16, bytes) };
        (tensor, values.iter().map(|x| x.to_f64()).collect::<Vec<f64>>())
    };
    let (a_tensor, a) = half("x.lora_A.weight", &[r, n], 1);
    let (b_tensor, b) = half("x.lora_B.weight", &[m, r], 2);
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &config(json!({"r": 8, "lora_alpha": 3})), &[a_tensor, b_tensor]);
    let adapter =
        lora::describe(&lora::locate(&folder.path().join("adapter_model.safetensors")).unwrap()).unwrap();
    let mut memory = Memory::default();
    let digests = memory.register(&adapter.parts);
    let source = memory.open(&adapter.manifest(&digests, |_| true).unwrap());
    let expected: Vec<f32> = (0..m * n)
        .map(|i| (0..r).map(|p| b[i / n * r + p] * a[p * n + i % n]).fold(0.0, |sum, x| sum + x))
        .map(|sum: f64| (3.0 / 8.0 * sum) as f32)
        .collect();
    for threads in [1, 2, 8] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let same = pool.install(|| map_blocks(&*source, 0, |range, values| Ok(values == &expected[range])));
        assert!(same.unwrap().iter().all(|same| *same));
    }
}

#[test]
fn whole_tensors_are_listed_and_refused_only_if_they_are_kept() {
    let mut tensors = linear("base_model.model.q").to_vec();
    for name in [
        "base_model.model.classifier.weight",
        "base_model.model.head.modules_to_save.default.bias",
        "base_model.model.head.original_module.bias",
        "base_model.model.q.base_layer.bias",
    ] {
        tensors.push(Tensor::numbered(name, &[2]));
    }
    let folder = tempfile::tempdir().unwrap();
    write(
        folder.path(),
        &config(json!({"bias": "all", "modules_to_save": ["classifier", "head"]})),
        &tensors,
    );
    let adapter = lora::describe(&lora::locate(folder.path()).unwrap()).unwrap();
    assert_eq!(adapter.replaced, ["classifier.weight", "head.bias", "q.bias"]);
    let mut memory = Memory::default();
    let digests = memory.register(&adapter.parts);
    let message = adapter.manifest(&digests, |_| true).unwrap_err().to_string();
    assert!(
        message.contains("it replaces `classifier.weight`, `head.bias`, `q.bias` as a whole"),
        "{message}"
    );
    let manifest = adapter.manifest(&digests, |name| name == "q.weight").unwrap();
    assert_eq!(read(&*memory.open(&manifest), "q.weight"), scaled(2.0));
    assert_eq!(adapter.manifest(&digests, |_| false).unwrap().tensors().len(), 0);
}

#[test]
fn what_is_not_a_pair_of_fitting_factors_is_refused_by_name() {
    let [a, b] = linear("m");
    let plain = config(json!({}));
    let message = refused(&plain, std::slice::from_ref(&a));
    assert!(message.contains("tensor `m.lora_A.weight` has no counterpart `m.lora_B.weight`"), "{message}");
    let message = refused(&plain, std::slice::from_ref(&b));
    assert!(message.contains("tensor `m.lora_B.weight` has no counterpart `m.lora_A.weight`"), "{message}");
    let message = refused(&config(json!({"r": 4})), &[a.clone(), b.clone()]);
    assert!(message.contains("the configuration says rank 4 for `m`"), "{message}");
    let wrong = Tensor::numbered("m.lora_B.weight", &[2, 3]);
    assert!(refused(&plain, &[a.clone(), wrong]).contains("their ranks are 3 and 2"));
    let wrong = Tensor::numbered("m.lora_B.weight", &[2, 2, 1, 1]);
    assert!(refused(&plain, &[a.clone(), wrong]).contains("different numbers of axes"));
    let wide = [
        Tensor::numbered("m.lora_A.weight", &[2, 1, 3, 3]),
        Tensor::numbered("m.lora_B.weight", &[2, 2, 3, 3]),
    ];
    assert!(refused(&plain, &wide).contains("one position"));
    let wrong = Tensor::bytes("m.lora_B.weight", DType::I32, &[2, 2]);
    assert!(refused(&plain, &[a.clone(), wrong]).contains("`m.lora_B.weight` is I32"));
    let dora = Tensor::numbered("m.lora_magnitude_vector", &[2]);
    assert!(
        refused(&plain, &[a.clone(), b.clone(), dora])
            .contains("tensor `m.lora_magnitude_vector` belongs to DoRA")
    );
    let bias = Tensor::numbered("m.lora_B.bias", &[2]);
    assert!(refused(&plain, &[a.clone(), b.clone(), bias]).contains("tensor `m.lora_B.bias` is not part of"));
    let tokens = Tensor::numbered("m.token_adapter.trainable_tokens_delta", &[2]);
    assert!(refused(&plain, &[a.clone(), b.clone(), tokens]).contains("trainable_tokens_delta"));
    let zero = [Tensor::numbered("m.lora_A.weight", &[0, 3]), Tensor::numbered("m.lora_B.weight", &[2, 0])];
    assert!(refused(&config(json!({"r": 0})), &zero).contains("gives factor inf"));
}

/// Adapters that torch wrote, with the product that it computes from them.
#[test]
fn adapters_in_bin_files_give_the_product_that_torch_computes() {
    for version in ["1.13.1", "2.15.0"] {
        let folder =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/torch").join(format!("torch-{version}"));
        let adapter = lora::describe(&lora::locate(&folder.join("adapter")).unwrap()).unwrap();
        assert_eq!((adapter.settings.rank, adapter.settings.alpha), (2, 4.0));
        assert_eq!(adapter.settings.targets, ["q_proj"]);
        let mut files = LocalFiles::default();
        let digests = files.add(&adapter.parts);
        let source = merganser_tensors::open(&adapter.manifest(&digests, |_| true).unwrap(), &files).unwrap();
        let parts = formats::describe(&folder.join("adapter.safetensors")).unwrap();
        let digests = files.add(&parts);
        let expected = Manifest::of_checkpoint(Content::Checkpoint, &parts, &digests, |_| true).unwrap();
        let expected = merganser_tensors::open(&expected, &files).unwrap();
        assert_eq!(source.tensors(), expected.tensors());
        let name = &source.tensors()[0].name;
        assert_eq!(read(&*source, name), read(&*expected, name));
    }
}

#[test]
fn only_adapters_are_located() {
    let folder = tempfile::tempdir().unwrap();
    assert!(lora::locate(folder.path()).is_none());
    fs_err::write(folder.path().join("adapter_config.json"), "{}").unwrap();
    assert!(lora::locate(folder.path()).is_none());
    fs_err::write(folder.path().join("adapter_model.bin"), "").unwrap();
    assert_eq!(lora::locate(folder.path()).unwrap().weights, folder.path().join("adapter_model.bin"));
    fs_err::write(folder.path().join("model.safetensors"), "").unwrap();
    assert!(lora::locate(&folder.path().join("model.safetensors")).is_none());
    assert!(lora::locate(&folder.path().join("adapter_model.bin")).is_some());
    let huge = fs_err::File::create(folder.path().join("adapter_config.json")).unwrap();
    huge.set_len(2 << 20).unwrap();
    let message = lora::describe(&lora::locate(folder.path()).unwrap()).unwrap_err().to_string();
    assert!(message.contains("its configuration has 2097152 bytes, the limit is 1048576"), "{message}");
}
