//! Presets for which tensors are quantized. Each is a list of rules over names, first match wins, as a user could write it.

use crate::filter::NameGlob;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::sync::LazyLock;

/// A named selection of tensors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Preset {
    /// Every float tensor.
    #[default]
    All,
    /// What the TVQ authors quantize: patch embedding, attention and MLP weights.
    Tvq,
}

/// The authors' filter, on open_clip names: the name contains `weight`, but neither `ln_` nor `token_embedding.weight`. Their encoders
/// call the projection `visual.proj` and the positions `positional_embedding`, so these stay out too. The same selection in the names of
/// transformers and timm needs the further lines.
const TVQ_RULES: [(&str, bool); 8] = [
    ("*{ln_,norm,layrnorm}*", false),
    ("*{token,position,positional}_embedding*", false),
    ("*pos_embed*", false),
    ("*{visual,text}_projection*", false),
    ("*head*.weight", false),
    ("*classifier*.weight", false),
    ("*weight*", true),
    ("*", false),
];

impl Preset {
    /// Whether a float tensor is quantized.
    pub(super) fn selects(self, name: &str) -> bool {
        static RULES: LazyLock<Vec<(NameGlob, bool)>> = LazyLock::new(|| {
            let compiled = TVQ_RULES.iter().map(|(pattern, selects)| {
                (NameGlob::new(pattern).expect("the patterns of this file are valid"), *selects)
            });
            compiled.collect()
        });
        match self {
            Self::All => true,
            Self::Tvq => {
                RULES.iter().find(|(glob, _)| glob.matches(name)).is_some_and(|(_, selects)| *selects)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tvq_selects_what_the_authors_do_in_open_clip_names() {
        for name in [
            "model.visual.conv1.weight",
            "model.visual.transformer.resblocks.3.attn.in_proj_weight",
            "model.visual.transformer.resblocks.3.attn.out_proj.weight",
            "model.visual.transformer.resblocks.3.mlp.c_fc.weight",
            "model.visual.transformer.resblocks.3.mlp.c_proj.weight",
        ] {
            assert!(Preset::Tvq.selects(name), "{name}");
        }
        for name in [
            "model.visual.class_embedding",
            "model.visual.positional_embedding",
            "model.visual.proj",
            "model.visual.ln_pre.weight",
            "model.visual.transformer.resblocks.3.ln_1.weight",
            "model.visual.transformer.resblocks.3.attn.in_proj_bias",
            "model.visual.transformer.resblocks.3.mlp.c_fc.bias",
            "model.token_embedding.weight",
            "model.text_projection",
            "model.logit_scale",
        ] {
            assert!(!Preset::Tvq.selects(name), "{name}");
        }
    }

    #[test]
    fn tvq_selects_the_same_tensors_in_transformers_names() {
        for name in [
            "vision_model.embeddings.patch_embedding.weight",
            "vision_model.encoder.layers.0.self_attn.q_proj.weight",
            "vision_model.encoder.layers.0.self_attn.out_proj.weight",
            "vision_model.encoder.layers.0.mlp.fc1.weight",
        ] {
            assert!(Preset::Tvq.selects(name), "{name}");
        }
        for name in [
            "vision_model.embeddings.class_embedding",
            "vision_model.embeddings.position_embedding.weight",
            "vision_model.pre_layrnorm.weight",
            "vision_model.encoder.layers.0.layer_norm1.weight",
            "vision_model.encoder.layers.0.mlp.fc1.bias",
            "visual_projection.weight",
        ] {
            assert!(!Preset::Tvq.selects(name), "{name}");
        }
    }
}
