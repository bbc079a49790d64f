//! CLIP: open_clip (and OpenAI's own checkpoints, which have the same names) and transformers.
//!
//! | open-clip | transformers-clip |
//! |---|---|
//! | `visual.class_embedding`, `visual.positional_embedding`, `visual.conv1.weight` | `vision_model.embeddings.{class_embedding, position_embedding.weight, patch_embedding.weight}` |
//! | `visual.ln_pre.*`, `visual.ln_post.*` | `vision_model.pre_layrnorm.*` (sic), `vision_model.post_layernorm.*` |
//! | `visual.transformer.resblocks.N.attn.in_proj_weight`, `…in_proj_bias` | `vision_model.encoder.layers.N.self_attn.{q,k,v}_proj.{weight,bias}`, in this order along the first axis |
//! | `….attn.out_proj.*`, `….ln_1.*`, `….ln_2.*` | `….self_attn.out_proj.*`, `….layer_norm1.*`, `….layer_norm2.*` |
//! | `….mlp.c_fc.*`, `….mlp.c_proj.*` | `….mlp.fc1.*`, `….mlp.fc2.*` |
//! | `visual.proj` (`[width, dim]`) | `visual_projection.weight` (`[dim, width]`) |
//! | `transformer.resblocks.N.*`, `token_embedding.weight`, `positional_embedding`, `ln_final.*` | `text_model.encoder.layers.N.*`, `text_model.embeddings.{token_embedding, position_embedding}.weight`, `text_model.final_layer_norm.*` |
//! | `text_projection` (`[width, dim]`) | `text_projection.weight` (`[dim, width]`) |
//! | `logit_scale` | `logit_scale` |
//!
//! A map of names says nothing about activations: OpenAI's weights need QuickGELU wherever they go.
//!
//! Sources: the module trees of open_clip (`src/open_clip/{model,transformer}.py`), OpenAI's `clip/model.py` and transformers'
//! `models/clip/modeling_clip.py`; `convert_clip_original_pytorch_to_hf.py` for the pairs.

use super::family::{Family, Stored};
use super::pattern::Pattern;

const MODEL: &str = "CLIP";

pub(super) fn open_clip() -> Family {
    let mut tensors = vec![
        Stored::plain("visual.class_embedding", "vision_model.embeddings.class_embedding").telling(),
        Stored::plain("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight")
            .telling(),
        Stored::plain("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight").telling(),
        Stored::plain("visual.ln_pre.{p}", "vision_model.pre_layrnorm.{p}").telling(),
        Stored::plain("visual.ln_post.{p}", "vision_model.post_layernorm.{p}").telling(),
        Stored::transposed("visual.proj", "visual_projection.weight").telling(),
        Stored::plain("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
        Stored::plain("positional_embedding", "text_model.embeddings.position_embedding.weight"),
        Stored::plain("ln_final.{p}", "text_model.final_layer_norm.{p}"),
        Stored::transposed("text_projection", "text_projection.weight"),
        Stored::plain("logit_scale", "logit_scale"),
    ];
    for (ours, theirs) in [
        ("visual.transformer.resblocks", "vision_model.encoder.layers"),
        ("transformer.resblocks", "text_model.encoder.layers"),
    ] {
        for parameter in ["weight", "bias"] {
            let roles =
                ["q", "k", "v"].map(|part| format!("{theirs}.{{n}}.self_attn.{part}_proj.{parameter}"));
            let roles = roles.each_ref().map(String::as_str);
            tensors.push(Stored::fused(&format!("{ours}.{{n}}.attn.in_proj_{parameter}"), &roles).telling());
        }
        for (our_name, their_name) in [
            ("attn.out_proj", "self_attn.out_proj"),
            ("ln_1", "layer_norm1"),
            ("ln_2", "layer_norm2"),
            ("mlp.c_fc", "mlp.fc1"),
            ("mlp.c_proj", "mlp.fc2"),
        ] {
            let (ours, theirs) =
                (format!("{ours}.{{n}}.{our_name}.{{p}}"), format!("{theirs}.{{n}}.{their_name}.{{p}}"));
            tensors.push(Stored::plain(&ours, &theirs).telling());
        }
    }
    let ignored = ["attn_mask", "input_resolution", "context_length", "vocab_size"];
    Family {
        id: "open-clip",
        model: MODEL,
        summary: "CLIP as open_clip and OpenAI store it: `visual.transformer.resblocks.0.attn.in_proj_weight`",
        roots: &["visual."],
        tensors,
        ignored: ignored.map(Pattern::new).into(),
    }
}

pub(super) fn transformers() -> Family {
    let tensors = open_clip().tensors.into_iter().flat_map(|stored| stored.roles).map(|role| Stored {
        // The scale has this name in every CLIP.
        telling: role != Pattern::new("logit_scale"),
        name: role.clone(),
        roles: vec![role],
        form: super::family::Form::Plain,
    });
    let ignored = ["vision_model.embeddings.position_ids", "text_model.embeddings.position_ids"];
    Family {
        id: "transformers-clip",
        model: MODEL,
        summary: "CLIP as transformers stores it: `vision_model.encoder.layers.0.self_attn.q_proj.weight`",
        roots: &["vision_model.", "text_model."],
        tensors: tensors.collect(),
        ignored: ignored.map(Pattern::new).into(),
    }
}
