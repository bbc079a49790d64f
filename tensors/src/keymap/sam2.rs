//! SAM 2 and 2.1: Meta's checkpoints (below their key `model`) and transformers, images and video.
//!
//! | meta-sam2 | transformers-sam2 |
//! |---|---|
//! | `image_encoder.trunk.*` | `vision_encoder.backbone.*` |
//! | … `patch_embed.proj.*`, `blocks.N.norm1.*`, `blocks.N.mlp.layers.{0,1}.*` | … `patch_embed.projection.*`, `blocks.N.layer_norm1.*`, `blocks.N.mlp.{proj_in,proj_out}.*` |
//! | `image_encoder.neck.convs.N.conv.*` | `vision_encoder.neck.convs.N.*` |
//! | `sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix` | `prompt_encoder.shared_embedding.positional_embedding`, and a copy as `shared_image_embedding.positional_embedding` |
//! | `sam_prompt_encoder.point_embeddings.{0..3}.weight` (`[1, dim]`) | `prompt_encoder.point_embed.weight` (`[4, dim]`), a row each |
//! | `sam_prompt_encoder.mask_downscaling.{0,1,3,4,6}.*` | `prompt_encoder.mask_embed.{conv1,layer_norm1,conv2,layer_norm2,conv3}.*` |
//! | `sam_mask_decoder.transformer.…{out_proj, normN, mlp.layers.{0,1}}` | `mask_decoder.transformer.…{o_proj, layer_normN, mlp.{proj_in,proj_out}}` |
//! | `sam_mask_decoder.output_upscaling.{0,1,3}.*` | `mask_decoder.{upscale_conv1,upscale_layer_norm,upscale_conv2}.*` |
//! | `….layers.{0,1,2}.*` of hypernetworks, IoU head, object score head, `obj_ptr_proj` | `….{proj_in, layers.0, proj_out}.*` |
//! | `no_mem_embed`, `no_mem_pos_enc`, `maskmem_tpos_enc`, `no_obj_ptr` | `no_memory_embedding`, `no_memory_positional_encoding`, `memory_temporal_positional_encoding`, `no_object_pointer` |
//! | `memory_encoder.{fuser, pix_feat_proj, out_proj, mask_downsampler}.*`, `memory_attention.*` | `memory_encoder.{memory_fuser, feature_projection, projection, mask_downsampler}.*`, `memory_attention.*` |
//!
//! Sources: the module trees of sam2 (`sam2/modeling/`) and transformers (`models/{sam2,sam2_video}/modeling_*.py`);
//! `convert_sam2_video_to_hf.py` for the pairs.

use super::family::{Family, Form, Stored};

const MODEL: &str = "SAM 2";

/// Rows of an MLP of three layers, which transformers names by where they are.
const THREE_LAYERS: [(&str, &str); 3] =
    [("layers.0", "proj_in"), ("layers.1", "layers.0"), ("layers.2", "proj_out")];

pub(super) fn meta() -> Family {
    let mut tensors = Vec::new();
    let mut rename = |name: &str, role: &str| tensors.push(Stored::plain(name, role).telling());
    encoder(&mut rename);
    prompts(&mut rename);
    decoder(&mut rename);
    memory(&mut rename);
    tensors.extend(point_embeddings());
    Family {
        id: "meta-sam2",
        model: MODEL,
        summary: "SAM 2 as Meta stores it: `image_encoder.trunk.blocks.0.attn.qkv.weight`",
        roots: &[],
        tensors,
        ignored: Vec::new(),
    }
}

pub(super) fn transformers() -> Family {
    let mut tensors: Vec<Stored> = meta()
        .tensors
        .into_iter()
        .filter(|stored| !is_point_row(stored))
        .flat_map(|stored| stored.roles)
        .map(|role| Stored { name: role.clone(), roles: vec![role], form: Form::Plain, telling: true })
        .collect();
    let rows = [0, 1, 2, 3].map(point_role);
    tensors.push(
        Stored::fused("prompt_encoder.point_embed.weight", &rows.each_ref().map(String::as_str)).telling(),
    );
    tensors.push(
        Stored::copy(
            "shared_image_embedding.positional_embedding",
            "prompt_encoder.shared_embedding.positional_embedding",
        )
        .telling(),
    );
    Family {
        id: "transformers-sam2",
        model: MODEL,
        summary: "SAM 2 as transformers stores it: `vision_encoder.backbone.blocks.0.attn.qkv.weight`",
        roots: &["vision_encoder."],
        tensors,
        ignored: Vec::new(),
    }
}

fn point_role(row: usize) -> String {
    format!("prompt_encoder.point_embed.weight.{row}")
}

fn point_embeddings() -> [Stored; 4] {
    [0, 1, 2, 3].map(|row| {
        Stored::plain(&format!("sam_prompt_encoder.point_embeddings.{row}.weight"), &point_role(row))
            .telling()
    })
}

fn is_point_row(stored: &Stored) -> bool {
    point_embeddings().iter().any(|row| row.name == stored.name)
}

fn encoder(rename: &mut impl FnMut(&str, &str)) {
    let (ours, theirs) = ("image_encoder.trunk", "vision_encoder.backbone");
    for name in ["pos_embed", "pos_embed_window"] {
        rename(&format!("{ours}.{name}"), &format!("{theirs}.{name}"));
    }
    rename(&format!("{ours}.patch_embed.proj.{{p}}"), &format!("{theirs}.patch_embed.projection.{{p}}"));
    for (our_name, their_name) in [
        ("attn.qkv", "attn.qkv"),
        ("attn.proj", "attn.proj"),
        ("norm1", "layer_norm1"),
        ("norm2", "layer_norm2"),
        ("mlp.layers.0", "mlp.proj_in"),
        ("mlp.layers.1", "mlp.proj_out"),
        ("proj", "proj"),
    ] {
        rename(
            &format!("{ours}.blocks.{{n}}.{our_name}.{{p}}"),
            &format!("{theirs}.blocks.{{n}}.{their_name}.{{p}}"),
        );
    }
    rename("image_encoder.neck.convs.{n}.conv.{p}", "vision_encoder.neck.convs.{n}.{p}");
}

fn prompts(rename: &mut impl FnMut(&str, &str)) {
    let (ours, theirs) = ("sam_prompt_encoder", "prompt_encoder");
    rename(
        &format!("{ours}.pe_layer.positional_encoding_gaussian_matrix"),
        &format!("{theirs}.shared_embedding.positional_embedding"),
    );
    for name in ["no_mask_embed.weight", "not_a_point_embed.weight"] {
        rename(&format!("{ours}.{name}"), &format!("{theirs}.{name}"));
    }
    for (number, name) in [(0, "conv1"), (1, "layer_norm1"), (3, "conv2"), (4, "layer_norm2"), (6, "conv3")] {
        rename(
            &format!("{ours}.mask_downscaling.{number}.{{p}}"),
            &format!("{theirs}.mask_embed.{name}.{{p}}"),
        );
    }
}

fn decoder(rename: &mut impl FnMut(&str, &str)) {
    let (ours, theirs) = ("sam_mask_decoder", "mask_decoder");
    let mut pair = |our_name: &str, their_name: &str| {
        rename(&format!("{ours}.{our_name}.{{p}}"), &format!("{theirs}.{their_name}.{{p}}"));
    };
    for name in ["conv_s0", "conv_s1", "pred_obj_score_head"] {
        pair(name, name);
    }
    for (number, name) in [(0, "upscale_conv1"), (1, "upscale_layer_norm"), (3, "upscale_conv2")] {
        pair(&format!("output_upscaling.{number}"), name);
    }
    for head in ["output_hypernetworks_mlps.{n}", "iou_prediction_head", "pred_obj_score_head"] {
        for (our_name, their_name) in THREE_LAYERS {
            pair(&format!("{head}.{our_name}"), &format!("{head}.{their_name}"));
        }
    }
    for number in 1..=4 {
        let (ours, theirs) = (format!("norm{number}"), format!("layer_norm{number}"));
        pair(&format!("transformer.layers.{{n}}.{ours}"), &format!("transformer.layers.{{n}}.{theirs}"));
    }
    pair("transformer.norm_final_attn", "transformer.layer_norm_final_attn");
    for (our_name, their_name) in [("mlp.layers.0", "mlp.proj_in"), ("mlp.layers.1", "mlp.proj_out")] {
        pair(
            &format!("transformer.layers.{{n}}.{our_name}"),
            &format!("transformer.layers.{{n}}.{their_name}"),
        );
    }
    for attention in [
        "transformer.layers.{n}.self_attn",
        "transformer.layers.{n}.cross_attn_token_to_image",
        "transformer.layers.{n}.cross_attn_image_to_token",
        "transformer.final_attn_token_to_image",
    ] {
        for (our_name, their_name) in ATTENTION {
            pair(&format!("{attention}.{our_name}"), &format!("{attention}.{their_name}"));
        }
    }
    for token in ["iou_token.weight", "mask_tokens.weight", "obj_score_token.weight"] {
        rename(&format!("{ours}.{token}"), &format!("{theirs}.{token}"));
    }
}

const ATTENTION: [(&str, &str); 4] =
    [("q_proj", "q_proj"), ("k_proj", "k_proj"), ("v_proj", "v_proj"), ("out_proj", "o_proj")];

fn memory(rename: &mut impl FnMut(&str, &str)) {
    for (ours, theirs) in [
        ("no_mem_embed", "no_memory_embedding"),
        ("no_mem_pos_enc", "no_memory_positional_encoding"),
        ("maskmem_tpos_enc", "memory_temporal_positional_encoding"),
        ("no_obj_ptr", "no_object_pointer"),
        ("no_obj_embed_spatial", "occlusion_spatial_embedding_parameter"),
        ("obj_ptr_tpos_proj.{p}", "temporal_positional_encoding_projection_layer.{p}"),
        ("mask_downsample.{p}", "mask_downsample.{p}"),
        ("memory_encoder.pix_feat_proj.{p}", "memory_encoder.feature_projection.{p}"),
        ("memory_encoder.out_proj.{p}", "memory_encoder.projection.{p}"),
        ("memory_encoder.mask_downsampler.encoder.12.{p}", "memory_encoder.mask_downsampler.final_conv.{p}"),
        ("memory_encoder.fuser.layers.{n}.gamma", "memory_encoder.memory_fuser.layers.{n}.scale"),
        ("memory_attention.norm.{p}", "memory_attention.layer_norm.{p}"),
    ] {
        rename(ours, theirs);
    }
    for (ours, theirs) in [
        ("dwconv", "depthwise_conv"),
        ("norm", "layer_norm"),
        ("pwconv1", "pointwise_conv1"),
        ("pwconv2", "pointwise_conv2"),
    ] {
        rename(
            &format!("memory_encoder.fuser.layers.{{n}}.{ours}.{{p}}"),
            &format!("memory_encoder.memory_fuser.layers.{{n}}.{theirs}.{{p}}"),
        );
    }
    for layer in 0..4 {
        for (number, name) in [(3 * layer, "conv"), (3 * layer + 1, "layer_norm")] {
            rename(
                &format!("memory_encoder.mask_downsampler.encoder.{number}.{{p}}"),
                &format!("memory_encoder.mask_downsampler.layers.{layer}.{name}.{{p}}"),
            );
        }
    }
    for (ours, theirs) in THREE_LAYERS {
        rename(&format!("obj_ptr_proj.{ours}.{{p}}"), &format!("object_pointer_proj.{theirs}.{{p}}"));
    }
    let layer = "memory_attention.layers.{n}";
    for (ours, theirs) in [
        ("linear1", "linear1"),
        ("linear2", "linear2"),
        ("norm1", "layer_norm1"),
        ("norm2", "layer_norm2"),
        ("norm3", "layer_norm3"),
    ] {
        rename(&format!("{layer}.{ours}.{{p}}"), &format!("{layer}.{theirs}.{{p}}"));
    }
    for attention in ["self_attn", "cross_attn_image"] {
        for (ours, theirs) in ATTENTION {
            rename(
                &format!("{layer}.{attention}.{ours}.{{p}}"),
                &format!("{layer}.{attention}.{theirs}.{{p}}"),
            );
        }
    }
}
