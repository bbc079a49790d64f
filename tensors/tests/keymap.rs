//! Maps between families of names: round trips, values by hand, real checkpoints, and what is refused.

mod support;

use std::collections::{BTreeMap, BTreeSet};

use merganser_tensors::keymap::{FAMILIES, Family, Identified, Mapping, Target, identify, map, reconcile};
use merganser_tensors::manifest::{Content, TensorEntry};
use merganser_tensors::views::Part;
use merganser_tensors::{DType, Manifest, TensorInfo};
use support::{Data, Memory, Tensor, info, read, read_bytes, test_data};

fn infos(manifest: &Manifest) -> Vec<TensorInfo> {
    manifest.tensors().iter().map(TensorEntry::info).collect()
}

fn names(manifest: &Manifest) -> BTreeSet<String> {
    manifest.tensors().iter().map(|tensor| tensor.name.clone()).collect()
}

fn identified(manifest: &Manifest) -> Identified {
    identify(&infos(manifest)).unwrap().expect("the names fit a family")
}

fn mapped(manifest: &Manifest, to: &'static Family) -> Mapping {
    map(&infos(manifest), manifest.content(), &identified(manifest), &Target::of(to)).unwrap()
}

fn family(id: &str) -> &'static Family {
    Family::find(id).unwrap()
}

/// A complete model of two layers under the names of the first family of a model.
fn clip() -> Vec<Tensor> {
    let mut tensors: Vec<(String, Vec<usize>)> = vec![
        ("logit_scale".into(), vec![]),
        ("token_embedding.weight".into(), vec![9, 4]),
        ("positional_embedding".into(), vec![5, 4]),
        ("text_projection".into(), vec![4, 3]),
        ("visual.class_embedding".into(), vec![6]),
        ("visual.positional_embedding".into(), vec![5, 6]),
        ("visual.conv1.weight".into(), vec![6, 3, 2, 2]),
        ("visual.proj".into(), vec![6, 3]),
    ];
    let mut norm = |name: String, width: usize| {
        tensors.push((format!("{name}.weight"), vec![width]));
        tensors.push((format!("{name}.bias"), vec![width]));
    };
    norm("ln_final".into(), 4);
    norm("visual.ln_pre".into(), 6);
    norm("visual.ln_post".into(), 6);
    for (tower, width) in [("", 4), ("visual.", 6)] {
        for layer in 0..2 {
            norm(format!("{tower}transformer.resblocks.{layer}.ln_1"), width);
            norm(format!("{tower}transformer.resblocks.{layer}.ln_2"), width);
        }
    }
    for (tower, width) in [("", 4), ("visual.", 6)] {
        for layer in 0..2 {
            let block = format!("{tower}transformer.resblocks.{layer}");
            tensors.push((format!("{block}.attn.in_proj_weight"), vec![3 * width, width]));
            tensors.push((format!("{block}.attn.in_proj_bias"), vec![3 * width]));
            for (name, rows, columns) in [
                ("attn.out_proj", width, width),
                ("mlp.c_fc", 4 * width, width),
                ("mlp.c_proj", width, 4 * width),
            ] {
                tensors.push((format!("{block}.{name}.weight"), vec![rows, columns]));
                tensors.push((format!("{block}.{name}.bias"), vec![rows]));
            }
        }
    }
    tensors.iter().map(|(name, shape)| Tensor::numbered(name, shape)).collect()
}

fn vit(distilled: bool) -> Vec<Tensor> {
    let mut tensors: Vec<(String, Vec<usize>)> =
        vec![("cls_token".into(), vec![1, 1, 4]), ("pos_embed".into(), vec![1, 6, 4])];
    let mut heads = vec![("head", 7)];
    if distilled {
        tensors.push(("dist_token".into(), vec![1, 1, 4]));
        heads.push(("head_dist", 7));
    }
    tensors.push(("patch_embed.proj.weight".into(), vec![4, 3, 2, 2]));
    tensors.push(("patch_embed.proj.bias".into(), vec![4]));
    let mut layers: Vec<(String, Vec<usize>, usize)> = vec![("norm".into(), vec![4], 4)];
    layers.extend(heads.into_iter().map(|(name, classes)| (name.to_owned(), vec![classes, 4], classes)));
    for block in 0..2 {
        for (name, shape, bias) in [
            ("norm1", vec![4], 4),
            ("norm2", vec![4], 4),
            ("attn.qkv", vec![12, 4], 12),
            ("attn.proj", vec![4, 4], 4),
            ("mlp.fc1", vec![8, 4], 8),
            ("mlp.fc2", vec![4, 8], 4),
        ] {
            layers.push((format!("blocks.{block}.{name}"), shape, bias));
        }
    }
    for (name, shape, bias) in layers {
        tensors.push((format!("{name}.weight"), shape));
        tensors.push((format!("{name}.bias"), vec![bias]));
    }
    tensors.iter().map(|(name, shape)| Tensor::numbered(name, shape)).collect()
}

/// SAM 2's names with the smallest of shapes: one of everything that the tables know.
fn sam2() -> Vec<Tensor> {
    let mut tensors: Vec<(String, Vec<usize>)> = Vec::new();
    let mut layer = |name: &str, shape: &[usize]| {
        tensors.push((format!("{name}.weight"), shape.to_vec()));
        tensors.push((format!("{name}.bias"), vec![shape[0]]));
    };
    layer("image_encoder.trunk.patch_embed.proj", &[2, 3, 2, 2]);
    for block in 0..2 {
        for (name, shape) in [
            ("norm1", vec![2]),
            ("norm2", vec![2]),
            ("attn.qkv", vec![6, 2]),
            ("attn.proj", vec![2, 2]),
            ("mlp.layers.0", vec![4, 2]),
            ("mlp.layers.1", vec![2, 4]),
        ] {
            layer(&format!("image_encoder.trunk.blocks.{block}.{name}"), &shape);
        }
    }
    layer("image_encoder.trunk.blocks.1.proj", &[2, 2]);
    layer("image_encoder.neck.convs.0.conv", &[2, 2, 1, 1]);
    for number in [0, 1, 3, 4, 6] {
        layer(&format!("sam_prompt_encoder.mask_downscaling.{number}"), &[2, 2]);
    }
    let decoder = "sam_mask_decoder";
    for head in ["output_hypernetworks_mlps.3", "iou_prediction_head", "pred_obj_score_head"] {
        for number in 0..3 {
            layer(&format!("{decoder}.{head}.layers.{number}"), &[2, 2]);
        }
    }
    for number in [0, 1, 3] {
        layer(&format!("{decoder}.output_upscaling.{number}"), &[2, 2]);
    }
    for name in ["conv_s0", "conv_s1", "transformer.norm_final_attn"] {
        layer(&format!("{decoder}.{name}"), &[2]);
    }
    for number in 1..=4 {
        layer(&format!("{decoder}.transformer.layers.0.norm{number}"), &[2]);
    }
    for projection in ["q_proj", "k_proj", "v_proj", "out_proj"] {
        for attention in ["self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token"] {
            layer(&format!("{decoder}.transformer.layers.0.{attention}.{projection}"), &[2, 2]);
        }
        layer(&format!("{decoder}.transformer.final_attn_token_to_image.{projection}"), &[2, 2]);
        for attention in ["self_attn", "cross_attn_image"] {
            layer(&format!("memory_attention.layers.0.{attention}.{projection}"), &[2, 2]);
        }
    }
    for number in 0..2 {
        layer(&format!("{decoder}.transformer.layers.0.mlp.layers.{number}"), &[2, 2]);
    }
    for name in ["linear1", "linear2", "norm1", "norm2", "norm3"] {
        layer(&format!("memory_attention.layers.0.{name}"), &[2]);
    }
    for number in [0, 1, 3, 4, 6, 7, 9, 10, 12] {
        layer(&format!("memory_encoder.mask_downsampler.encoder.{number}"), &[2]);
    }
    for name in ["dwconv", "norm", "pwconv1", "pwconv2"] {
        layer(&format!("memory_encoder.fuser.layers.1.{name}"), &[2]);
    }
    for name in [
        "memory_attention.norm",
        "memory_encoder.pix_feat_proj",
        "memory_encoder.out_proj",
        "mask_downsample",
        "obj_ptr_tpos_proj",
    ] {
        layer(name, &[2]);
    }
    for number in 0..3 {
        layer(&format!("obj_ptr_proj.layers.{number}"), &[2, 2]);
    }
    for row in 0..4 {
        tensors.push((format!("sam_prompt_encoder.point_embeddings.{row}.weight"), vec![1, 3]));
    }
    for (name, shape) in [
        ("image_encoder.trunk.pos_embed", vec![1, 2, 3, 3]),
        ("image_encoder.trunk.pos_embed_window", vec![1, 2, 2, 2]),
        ("sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix", vec![2, 4]),
        ("sam_prompt_encoder.no_mask_embed.weight", vec![1, 3]),
        ("sam_prompt_encoder.not_a_point_embed.weight", vec![1, 3]),
        ("sam_mask_decoder.iou_token.weight", vec![1, 3]),
        ("sam_mask_decoder.mask_tokens.weight", vec![4, 3]),
        ("sam_mask_decoder.obj_score_token.weight", vec![1, 3]),
        ("no_mem_embed", vec![1, 1, 3]),
        ("no_mem_pos_enc", vec![1, 1, 3]),
        ("maskmem_tpos_enc", vec![7, 1, 1, 3]),
        ("no_obj_ptr", vec![1, 3]),
        ("no_obj_embed_spatial", vec![1, 3]),
        ("memory_encoder.fuser.layers.1.gamma", vec![3]),
    ] {
        tensors.push((name.to_owned(), shape));
    }
    tensors.iter().map(|(name, shape)| Tensor::numbered(name, shape)).collect()
}

#[test]
fn mapping_there_and_back_is_the_identity_for_every_pair_of_families() {
    let mut pairs = 0;
    for (model, tensors) in [("CLIP", clip()), ("ViT", vit(true)), ("ViT", vit(false)), ("SAM 2", sam2())] {
        let mut memory = Memory::default();
        let original = memory.checkpoint(&tensors);
        let families = || FAMILIES.iter().filter(|family| family.model == model);
        assert_eq!(identified(&original).family.id, families().next().unwrap().id);
        for from in families() {
            let mapping = mapped(&original, from);
            let distilled = names(&original).contains("dist_token");
            if distilled && from.id.ends_with("-vit") && from.id.starts_with("transformers") {
                assert_eq!(mapping.unmapped, ["head_dist.bias", "head_dist.weight"], "{}", from.id);
                continue;
            }
            assert!(mapping.unmapped.is_empty(), "{}: {:?}", from.id, mapping.unmapped);
            let start = mapping.view_of(original.clone()).unwrap();
            for to in families() {
                if distilled && to.id.ends_with("-vit") && to.id.starts_with("transformers") {
                    continue;
                }
                let there = mapped(&start, to).view_of(start.clone()).unwrap();
                assert_eq!(identified(&there).family.id, to.id, "{} to {}", from.id, to.id);
                let back = mapped(&there, from);
                assert_eq!(back.unmapped, [""; 0]);
                let back = back.view_of(there).unwrap();
                assert_eq!(infos(&back), infos(&start), "{} to {} and back", from.id, to.id);
                let (start, back) = (memory.open(&start), memory.open(&back));
                for tensor in start.tensors() {
                    assert_eq!(
                        read_bytes(&*back, &tensor.name),
                        read_bytes(&*start, &tensor.name),
                        "{}",
                        tensor.name
                    );
                }
                pairs += 1;
            }
        }
    }
    assert_eq!(pairs, 4 + 9 + 25 + 4);
}

#[test]
fn a_round_trip_within_a_family_takes_tensors_whole() {
    let mut memory = Memory::default();
    let original = memory.checkpoint(&clip());
    let mapping = mapped(&original, family("open-clip"));
    for (info, parts) in &mapping.tensors {
        assert_eq!(parts, &[Part::Whole { tensor: info.name.clone() }]);
    }
}

#[test]
fn fused_weights_split_in_order_and_projections_are_transposed() {
    let mut tensors = clip();
    let set = |tensors: &mut Vec<Tensor>, name: &str, values: &[f32]| {
        let tensor = tensors.iter_mut().find(|tensor| tensor.name == name).unwrap();
        assert_eq!(values.len(), tensor.shape.iter().product::<usize>());
        tensor.data = Data::Values(values.to_vec());
    };
    set(
        &mut tensors,
        "transformer.resblocks.1.attn.in_proj_bias",
        &[0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11.],
    );
    set(&mut tensors, "text_projection", &[1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12.]);
    let mut memory = Memory::default();
    let original = memory.checkpoint(&tensors);
    let mapping = mapped(&original, family("transformers-clip"));
    let view = mapping.view_of(original).unwrap();
    let source = memory.open(&view);
    let layer = "text_model.encoder.layers.1.self_attn";
    assert_eq!(read(&*source, &format!("{layer}.q_proj.bias")), [0., 1., 2., 3.]);
    assert_eq!(read(&*source, &format!("{layer}.k_proj.bias")), [4., 5., 6., 7.]);
    assert_eq!(read(&*source, &format!("{layer}.v_proj.bias")), [8., 9., 10., 11.]);
    assert_eq!(read(&*source, "text_projection.weight"), [1., 4., 7., 10., 2., 5., 8., 11., 3., 6., 9., 12.]);
    let shape = |name: &str| source.tensors()[source.index_of(name).unwrap()].shape.clone();
    assert_eq!(shape("text_projection.weight"), [3, 4]);
    assert_eq!(shape(&format!("{layer}.q_proj.weight")), [4, 4]);
    assert_eq!(shape("vision_model.pre_layrnorm.weight"), [6]);
    assert_eq!(shape("logit_scale"), [0usize; 0]);
}

#[test]
fn point_embeddings_are_rows_and_the_shared_embedding_is_written_twice() {
    let mut memory = Memory::default();
    let original = memory.checkpoint(&sam2());
    let view = mapped(&original, family("transformers-sam2")).view_of(original.clone()).unwrap();
    let (theirs, ours) = (memory.open(&view), memory.open(&original));
    let rows =
        (0..4).flat_map(|row| read(&*ours, &format!("sam_prompt_encoder.point_embeddings.{row}.weight")));
    assert_eq!(read(&*theirs, "prompt_encoder.point_embed.weight"), rows.collect::<Vec<_>>());
    let matrix = read(&*ours, "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix");
    assert_eq!(read(&*theirs, "prompt_encoder.shared_embedding.positional_embedding"), matrix);
    assert_eq!(read(&*theirs, "shared_image_embedding.positional_embedding"), matrix);
    // A checkpoint that kept only the copy has the same to say.
    let only_copy: Vec<TensorInfo> = infos(&view)
        .into_iter()
        .filter(|info| info.name != "prompt_encoder.shared_embedding.positional_embedding")
        .collect();
    let from = identify(&only_copy).unwrap().unwrap();
    let back = map(&only_copy, Content::Checkpoint, &from, &Target::of(family("meta-sam2"))).unwrap();
    let name = "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix";
    let (_, parts) = back.tensors.iter().find(|(info, _)| info.name == name).unwrap();
    assert_eq!(parts, &[Part::Whole { tensor: "shared_image_embedding.positional_embedding".into() }]);
}

#[test]
fn what_stands_before_names_and_what_is_missing_is_found() {
    let prefixed = |prefix: &str, keep: &dyn Fn(&str) -> Option<String>| -> Vec<TensorInfo> {
        let kept = clip().into_iter().filter_map(|tensor| Some((keep(&tensor.name)?, tensor.shape)));
        kept.map(|(name, shape)| info(&format!("{prefix}{name}"), DType::F32, &shape)).collect()
    };
    let all = |name: &str| Some(name.to_owned());
    let found = identify(&prefixed("model.", &all)).unwrap().unwrap();
    assert_eq!(found.describe(), "`open-clip` under `model.`");
    assert_eq!(found.n_matched, found.n_floats);
    let bare = |name: &str| name.strip_prefix("visual.").map(str::to_owned);
    let found = identify(&prefixed("", &bare)).unwrap().unwrap();
    assert_eq!(found.describe(), "`open-clip` without `visual.`");
    let text = |name: &str| (!name.starts_with("visual.")).then(|| name.to_owned());
    assert_eq!(identify(&prefixed("", &text)).unwrap().unwrap().describe(), "`open-clip`");
    let vision = |name: &str| name.starts_with("visual.").then(|| name.to_owned());
    let found = identify(&prefixed("module.model.", &vision)).unwrap().unwrap();
    assert_eq!(found.describe(), "`open-clip` under `module.model.`");

    // The tower alone maps like the whole.
    let tensors = prefixed("", &bare);
    let from = identify(&tensors).unwrap().unwrap();
    let mapping =
        map(&tensors, Content::Checkpoint, &from, &Target::of(family("transformers-clip"))).unwrap();
    assert!(mapping.unmapped.is_empty());
    let mapped: Vec<&str> = mapping.tensors.iter().map(|(info, _)| info.name.as_str()).collect();
    assert!(mapped.contains(&"vision_model.encoder.layers.1.self_attn.k_proj.bias"));
    assert!(mapped.contains(&"visual_projection.weight"));
    assert_eq!(mapped.len(), tensors.len() + 2 * 2 * 2);
}

#[test]
fn a_few_tensors_with_their_towers_name_are_enough() {
    for (name, expected) in [
        ("visual.transformer.resblocks.3.attn.in_proj_weight", "`open-clip`"),
        ("m.visual.transformer.resblocks.3.attn.in_proj_weight", "`open-clip` under `m.`"),
        ("vision_model.encoder.layers.0.self_attn.q_proj.weight", "`transformers-clip`"),
        ("vit.encoder.layer.0.attention.attention.query.weight", "`transformers-vit`"),
        ("vit.vit.encoder.layer.0.attention.attention.query.weight", "`transformers-vit` under `vit.`"),
        ("encoder.layer.0.attention.attention.query.weight", "`transformers-vit` without `vit.`"),
        ("blocks.0.attn.qkv.weight", "`timm-vit`"),
        ("model.image_encoder.trunk.blocks.0.attn.qkv.weight", "`meta-sam2` under `model.`"),
        ("vision_encoder.backbone.blocks.0.attn.qkv.weight", "`transformers-sam2`"),
        ("backbone.blocks.0.mlp.proj_in.weight", "`transformers-sam2` without `vision_encoder.`"),
    ] {
        let found = identify(&[info(name, DType::F32, &[6, 2])]).unwrap().unwrap();
        assert_eq!(found.describe(), expected, "{name}");
    }
}

#[test]
fn names_that_fit_nothing_are_not_forced_into_a_family() {
    let nothing = [info("fc.weight", DType::F32, &[2, 2]), info("norm.weight", DType::F32, &[2])];
    assert!(identify(&nothing).unwrap().is_none());
    assert!(identify(&[]).unwrap().is_none());
    // A language model has attention under the same names as CLIP's text tower, and much else.
    let mut other = Vec::new();
    for part in ["self_attn.q_proj", "self_attn.k_proj"] {
        other.push(info(&format!("model.encoder.layers.0.{part}.weight"), DType::F32, &[2, 2]));
    }
    for part in ["fc1", "fc2", "final_layer_norm", "self_attn_layer_norm", "conv"] {
        other.push(info(&format!("model.encoder.layers.0.{part}.weight"), DType::F32, &[2]));
    }
    assert!(identify(&other).unwrap().is_none());
}

#[test]
fn two_models_in_one_file_and_a_tower_that_could_be_either_are_refused() {
    let mut two: Vec<TensorInfo> = Vec::new();
    for prefix in ["student.", "teacher."] {
        two.extend(
            clip().iter().map(|tensor| info(&format!("{prefix}{}", tensor.name), DType::F32, &tensor.shape)),
        );
    }
    let message = identify(&two).err().unwrap().to_string();
    assert!(message.contains("`open-clip` under `student.`, `open-clip` under `teacher.`"), "{message}");
    assert!(message.contains("`strip_prefix`"), "{message}");
    two.retain(|info| info.name.starts_with("student.") || info.name.contains("resblocks"));
    assert!(identify(&two).is_err(), "a smaller second model is not forgotten");
    // In-projections alone: a text tower, or a vision tower without `visual.`.
    let either = [info("transformer.resblocks.0.attn.in_proj_weight", DType::F32, &[12, 4])];
    let message = identify(&either).err().unwrap().to_string();
    assert!(message.contains("`open-clip` without `visual.`"), "{message}");
}

#[test]
fn missing_parts_are_refused_by_name_and_are_zero_in_task_vectors() {
    let mut memory = Memory::default();
    let original = memory.checkpoint(&clip());
    let split = mapped(&original, family("transformers-clip")).view_of(original).unwrap();
    let lacking = "text_model.encoder.layers.0.self_attn.k_proj.weight";
    let tensors: Vec<TensorInfo> = infos(&split).into_iter().filter(|info| info.name != lacking).collect();
    let from = identify(&tensors).unwrap().unwrap();
    let target = Target::of(family("open-clip"));
    let message = map(&tensors, Content::Checkpoint, &from, &target).unwrap_err().to_string();
    let expected = "tensor `transformer.resblocks.0.attn.in_proj_weight` is put together from \
        `text_model.encoder.layers.0.self_attn.q_proj.weight`, `text_model.encoder.layers.0.self_attn.k_proj.weight`, \
        `text_model.encoder.layers.0.self_attn.v_proj.weight`, but \
        `text_model.encoder.layers.0.self_attn.k_proj.weight` is not there";
    assert_eq!(message, expected);
    let mapping = map(&tensors, Content::TaskVectors, &from, &target).unwrap();
    let fused = "transformer.resblocks.0.attn.in_proj_weight";
    let (info, parts) = mapping.tensors.iter().find(|(info, _)| info.name == fused).unwrap();
    assert_eq!(info.shape, [12, 4]);
    assert_eq!(parts[1], Part::Zeros { elements: 16 });
}

#[test]
fn shapes_that_cannot_be_cut_or_joined_are_refused_by_name() {
    let named = |name: &str, shape: &[usize]| {
        let mut tensors: Vec<TensorInfo> =
            clip().iter().map(|tensor| info(&tensor.name, DType::F32, &tensor.shape)).collect();
        tensors.iter_mut().find(|info| info.name == name).unwrap().shape = shape.to_vec();
        let from = identify(&tensors).unwrap().unwrap();
        map(&tensors, Content::Checkpoint, &from, &Target::of(family("transformers-clip")))
            .unwrap_err()
            .to_string()
    };
    assert_eq!(
        named("transformer.resblocks.0.attn.in_proj_bias", &[13]),
        "tensor `transformer.resblocks.0.attn.in_proj_bias` of shape [13] is not 3 equal parts along its first axis"
    );
    assert!(named("transformer.resblocks.0.attn.in_proj_bias", &[]).contains("something with a first axis"));
    assert!(named("visual.proj", &[6]).contains("tensor `visual.proj` of shape [6] is not a matrix"));

    let split = |name: &str, index: usize| {
        let shape = if index == 1 { vec![2, 5] } else { vec![2, 4] };
        info(&format!("text_model.encoder.layers.0.self_attn.{name}_proj.weight"), DType::F32, &shape)
    };
    let tensors: Vec<TensorInfo> =
        ["q", "k", "v"].into_iter().enumerate().map(|(i, name)| split(name, i)).collect();
    let from = identify(&tensors).unwrap().unwrap();
    let target = Target::of(family("open-clip"));
    let message = map(&tensors, Content::Checkpoint, &from, &target).unwrap_err().to_string();
    assert!(
        message.contains("do not fit each other") && message.contains("k_proj.weight` (F32 [2, 5])"),
        "{message}"
    );
    let message =
        map(&tensors, Content::Checkpoint, &from, &Target::of(family("timm-vit"))).unwrap_err().to_string();
    assert!(message.contains("possible: open-clip, transformers-clip"), "{message}");
}

#[test]
fn buffers_are_ignored_and_strangers_are_listed() {
    let mut tensors: Vec<TensorInfo> = clip()
        .iter()
        .map(|tensor| info(&format!("model.{}", tensor.name), DType::F16, &tensor.shape))
        .collect();
    tensors.push(info("model.context_length", DType::I64, &[]));
    tensors.push(info("model.adapter.weight", DType::F32, &[1]));
    tensors.push(info("epoch", DType::I64, &[]));
    let from = identify(&tensors).unwrap().unwrap();
    let mapping =
        map(&tensors, Content::Checkpoint, &from, &Target::of(family("transformers-clip"))).unwrap();
    assert_eq!(mapping.ignored, ["model.context_length"]);
    assert_eq!(mapping.unmapped, ["epoch", "model.adapter.weight"]);
    assert!(mapping.tensors.iter().all(|(info, _)| info.dtype == DType::F16));
}

fn reconciled(base: &Manifest, other: &Manifest) -> Option<(Mapping, String)> {
    reconcile(base, other).unwrap().map(|found| (found.mapping, found.notice))
}

#[test]
fn a_checkpoint_gets_the_names_of_the_base() {
    let mut memory = Memory::default();
    let original = memory.checkpoint(&clip());
    let base = mapped(&original, family("transformers-clip")).view_of(original.clone()).unwrap();
    assert!(reconciled(&original, &original).is_none());
    let (mapping, notice) = reconciled(&base, &original).unwrap();
    assert_eq!(
        notice,
        "it has the names of `open-clip`, the base those of `transformers-clip`: mapped 78 tensors"
    );
    assert_eq!(mapping.tensors.iter().map(|(info, _)| info.clone()).collect::<Vec<_>>(), infos(&base));
    let (back, _) = reconciled(&original, &base).unwrap();
    assert_eq!(back.tensors.iter().map(|(info, _)| info.clone()).collect::<Vec<_>>(), infos(&original));

    // A pickled encoder under `model.`, against a base that is the bare tower.
    let under = |prefix: &str, keep: &str| {
        let kept = clip().into_iter().filter(|tensor| tensor.name.starts_with(keep));
        let kept: Vec<Tensor> = kept
            .map(|tensor| Tensor { name: format!("{prefix}{}", &tensor.name[keep.len()..]), ..tensor })
            .collect();
        Memory::default().checkpoint(&kept)
    };
    let (whole, tower) = (under("model.", ""), under("", "visual."));
    let (mapping, notice) = reconciled(&tower, &whole).unwrap();
    assert!(
        notice.starts_with(
            "it has the names of `open-clip` under `model.`, the base those of `open-clip` without `visual.`"
        ),
        "{notice}"
    );
    assert!(names(&tower).iter().all(|name| mapping.tensors.iter().any(|(info, _)| info.name == *name)));
    assert!(mapping.unmapped.contains(&"model.token_embedding.weight".to_owned()));
}

#[test]
fn heads_are_called_what_the_base_calls_them() {
    let mut memory = Memory::default();
    let original = memory.checkpoint(&vit(true));
    for head in ["cls_classifier", "classifier"] {
        let mapping = mapped(&original, family("transformers-deit"));
        let renamed = mapping.tensors.into_iter().map(|(info, parts)| {
            (TensorInfo { name: info.name.replace("cls_classifier", head), ..info }, parts)
        });
        let base = Manifest::mapped(Content::Checkpoint, original.view_digest(), renamed.collect()).unwrap();
        let (mapping, _) = reconciled(&base, &original).unwrap();
        let mapped: BTreeSet<String> = mapping.tensors.iter().map(|(info, _)| info.name.clone()).collect();
        assert_eq!(mapped, names(&base));
    }
    let both = ["cls_classifier.bias", "classifier.bias", "deit.layers.0.attention.q_proj.bias"];
    let both: Vec<TensorInfo> = both.iter().map(|name| info(name, DType::F32, &[4])).collect();
    let from = identify(&both).unwrap().unwrap();
    let message =
        map(&both, Content::Checkpoint, &from, &Target::of(family("timm-vit"))).unwrap_err().to_string();
    assert!(message.contains("`cls_classifier.bias` and `classifier.bias`"), "{message}");
}

#[test]
fn unknown_models_are_reconciled_by_what_stands_before_all_names() {
    let make = |names: &[(&str, &[usize])]| {
        let tensors: Vec<Tensor> = names.iter().map(|(name, shape)| Tensor::numbered(name, shape)).collect();
        Memory::default().checkpoint(&tensors)
    };
    let base = make(&[("a.w", &[2]), ("b.w", &[3])]);
    let wrapped = make(&[("module.a.w", &[2]), ("module.b.w", &[1, 3]), ("step", &[])]);
    let (mapping, notice) = reconciled(&base, &wrapped).unwrap();
    assert_eq!(notice, "its names begin with `module.`, which those of the base lack");
    assert_eq!(mapping.unmapped, ["step"]);
    // axes of length 1 follow the base
    assert_eq!(mapping.tensors[1].0, info("b.w", DType::F32, &[3]));
    let partly = make(&[("a.w", &[2]), ("b.w", &[3]), ("step", &[])]);
    assert!(reconciled(&wrapped, &partly).is_none(), "`step` has no prefix on either side");
    let (mapping, notice) = reconciled(&make(&[("module.a.w", &[2]), ("module.b.w", &[3])]), &base).unwrap();
    assert_eq!(notice, "its names lack `module.`, with which those of the base begin");
    assert_eq!(mapping.tensors.len(), 2);
    assert!(reconciled(&base, &make(&[("c.w", &[2])])).is_none());
    // Two candidates: nothing is guessed.
    let twice = make(&[("x.a.w", &[2]), ("x.b.w", &[3]), ("y.a.w", &[2]), ("y.b.w", &[3])]);
    assert!(reconciled(&base, &twice).is_none());
}

#[test]
fn fixtures_of_both_libraries_have_each_others_names_and_shapes() {
    let Some(data) = test_data("fixtures_of_both_libraries_have_each_others_names_and_shapes") else {
        return;
    };
    let mut memory = Memory::default();
    let mut load = |name: &str| memory.load(&data.join(format!("onnx-fixtures/{name}/base.safetensors")));
    let shapes = |infos: &[TensorInfo]| -> BTreeMap<String, Vec<usize>> {
        infos.iter().map(|info| (info.name.clone(), info.shape.clone())).collect()
    };
    let (open, hf) = (load("clip_open"), load("clip_hf"));
    for (from, to) in [(&open, &hf), (&hf, &open)] {
        let (mapping, _) = reconciled(to, from).unwrap();
        assert!(mapping.unmapped.is_empty());
        let mapped: Vec<TensorInfo> = mapping.tensors.into_iter().map(|(info, _)| info).collect();
        assert_eq!(shapes(&mapped), shapes(&infos(to)));
    }

    let (meta, hf) = (load("sam2_meta"), load("sam2_hf"));
    // The two have different MLP widths; and Meta's class has two tensors that transformers has in its video model only.
    let mlp = |name: &String| name.contains(".blocks.") && name.contains(".mlp.");
    let comparable = |infos: &[TensorInfo]| -> BTreeMap<String, Vec<usize>> {
        shapes(infos)
            .into_iter()
            .map(|(name, shape)| if mlp(&name) { (name, vec![]) } else { (name, shape) })
            .collect()
    };
    let (mapping, _) = reconciled(&hf, &meta).unwrap();
    let mut there = comparable(&mapping.tensors.into_iter().map(|(info, _)| info).collect::<Vec<_>>());
    assert!(there.remove("memory_temporal_positional_encoding").is_some());
    assert!(there.remove("no_memory_positional_encoding").is_some());
    assert_eq!(there, comparable(&infos(&hf)));
    let (mapping, _) = reconciled(&meta, &hf).unwrap();
    assert!(mapping.unmapped.is_empty());
    let back = comparable(&mapping.tensors.into_iter().map(|(info, _)| info).collect::<Vec<_>>());
    let mut expected = comparable(&infos(&meta));
    expected.retain(|name, _| name != "maskmem_tpos_enc" && name != "no_mem_pos_enc");
    assert_eq!(back, expected);

    let (timm, hf) = (load("deit_timm"), load("deit_hf"));
    assert_eq!(identified(&timm).describe(), "`timm-vit`");
    assert_eq!(identified(&hf).describe(), "`transformers5-deit`");
    let (mapping, _) = reconciled(&hf, &timm).unwrap();
    assert!(mapping.unmapped.is_empty());
    let known = names(&hf);
    let mapped: BTreeSet<String> = mapping.tensors.iter().map(|(info, _)| info.name.clone()).collect();
    assert!(mapped.is_subset(&known), "{:?}", mapped.difference(&known).collect::<Vec<_>>());
    let lacking: Vec<&String> = known.difference(&mapped).collect();
    assert_eq!(
        lacking,
        [
            "deit.embeddings.distillation_token",
            "distillation_classifier.bias",
            "distillation_classifier.weight"
        ]
    );
    let (mapping, _) = reconciled(&timm, &hf).unwrap();
    assert!(mapping.unmapped.is_empty());

    for (path, expected) in [
        ("suite/clip/ft_mnist.safetensors", "`transformers-clip`"),
        ("suite/deit/model.safetensors", "`timm-vit`"),
        ("suite/sam2/model.safetensors", "`transformers-sam2`"),
    ] {
        let found = identified(&memory.load(&data.join(path)));
        assert_eq!(found.describe(), expected, "{path}");
        assert_eq!(found.n_matched, found.n_floats, "{path}");
    }
}
