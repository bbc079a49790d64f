//! ViT and DeiT: timm and transformers.
//!
//! | timm-vit | transformers-vit, transformers-deit | transformers5-vit, transformers5-deit |
//! |---|---|---|
//! | `cls_token`, `dist_token`, `pos_embed` | `R.embeddings.{cls_token, distillation_token, position_embeddings}` | the same |
//! | `patch_embed.proj.*` | `R.embeddings.patch_embeddings.projection.*` | the same |
//! | `blocks.N.norm1.*`, `blocks.N.norm2.*` | `R.encoder.layer.N.layernorm_before.*`, `….layernorm_after.*` | `R.layers.N.layernorm_{before,after}.*` |
//! | `blocks.N.attn.qkv.*` | `….attention.attention.{query,key,value}.*`, in this order along the first axis | `….attention.{q,k,v}_proj.*` |
//! | `blocks.N.attn.proj.*` | `….attention.output.dense.*` | `….attention.o_proj.*` |
//! | `blocks.N.mlp.fc1.*`, `blocks.N.mlp.fc2.*` | `….intermediate.dense.*`, `….output.dense.*` | `….mlp.fc1.*`, `….mlp.fc2.*` |
//! | `norm.*` | `R.layernorm.*` | the same |
//! | `head.*` | ViT: `classifier.*`; DeiT: `cls_classifier.*` (or `classifier.*`, read as well) | the same |
//! | `head_dist.*` | DeiT: `distillation_classifier.*` | the same |
//!
//! `R` is `vit` or `deit`. Files on the Hugging Face hub have the names of the second column, whichever version wrote them;
//! modules (and ONNX exports) of transformers 5 have those of the third. A DeiT without a distillation token is stored as a ViT on the hub.
//!
//! Sources: the module trees of timm (`timm/models/{vision_transformer,deit}.py`) and transformers (`models/{vit,deit}/modeling_*.py`,
//! version 4 and 5); `convert_vit_timm_to_pytorch.py` and `convert_deit_timm_to_pytorch.py` for the pairs.

use super::family::{Family, Stored};
use super::pattern::Pattern;

const MODEL: &str = "ViT";

pub(super) fn timm() -> Family {
    let mut tensors = vec![
        Stored::plain("cls_token", "cls_token"),
        Stored::plain("dist_token", "dist_token"),
        Stored::plain("pos_embed", "pos_embed"),
        Stored::plain("patch_embed.proj.{p}", "patch_embed.{p}"),
        Stored::plain("norm.{p}", "norm.{p}"),
        Stored::plain("head.{p}", "head.{p}"),
        Stored::plain("head_dist.{p}", "head_dist.{p}"),
    ];
    tensors.push(
        Stored::fused("blocks.{n}.attn.qkv.{p}", &["block.{n}.q.{p}", "block.{n}.k.{p}", "block.{n}.v.{p}"])
            .telling(),
    );
    for (name, role) in
        [("attn.proj", "o"), ("norm1", "norm1"), ("norm2", "norm2"), ("mlp.fc1", "fc1"), ("mlp.fc2", "fc2")]
    {
        tensors.push(
            Stored::plain(&format!("blocks.{{n}}.{name}.{{p}}"), &format!("block.{{n}}.{role}.{{p}}"))
                .telling(),
        );
    }
    Family {
        id: "timm-vit",
        model: MODEL,
        summary: "ViT and DeiT as timm stores them: `blocks.0.attn.qkv.weight`",
        roots: &[],
        tensors,
        ignored: Vec::new(),
    }
}

pub(super) fn transformers_vit() -> Family {
    Family {
        id: "transformers-vit",
        model: MODEL,
        summary: "ViT as stored for transformers: `vit.encoder.layer.0.attention.attention.query.weight`",
        roots: &["vit."],
        tensors: [vit("vit"), version_4("vit")].into_iter().flatten().collect(),
        ignored: vec![Pattern::new("vit.pooler.dense.{p}")],
    }
}

pub(super) fn transformers_deit() -> Family {
    Family {
        id: "transformers-deit",
        model: MODEL,
        summary: "DeiT as stored for transformers: `deit.encoder.layer.0.attention.attention.query.weight`",
        roots: &["deit."],
        tensors: [deit("deit"), version_4("deit")].into_iter().flatten().collect(),
        ignored: vec![Pattern::new("deit.pooler.dense.{p}")],
    }
}

pub(super) fn transformers5_vit() -> Family {
    Family {
        id: "transformers5-vit",
        model: MODEL,
        summary: "ViT as the modules of transformers 5 call it: `vit.layers.0.attention.q_proj.weight`",
        roots: &["vit."],
        tensors: [vit("vit"), version_5("vit")].into_iter().flatten().collect(),
        ignored: vec![Pattern::new("vit.pooler.dense.{p}")],
    }
}

pub(super) fn transformers5_deit() -> Family {
    Family {
        id: "transformers5-deit",
        model: MODEL,
        summary: "DeiT as the modules of transformers 5 call it: `deit.layers.0.attention.q_proj.weight`",
        roots: &["deit."],
        tensors: [deit("deit"), version_5("deit")].into_iter().flatten().collect(),
        ignored: vec![Pattern::new("deit.pooler.dense.{p}")],
    }
}

/// What is around the blocks in both versions.
fn around(root: &str) -> Vec<Stored> {
    vec![
        Stored::plain(&format!("{root}.embeddings.cls_token"), "cls_token"),
        Stored::plain(&format!("{root}.embeddings.distillation_token"), "dist_token"),
        Stored::plain(&format!("{root}.embeddings.position_embeddings"), "pos_embed"),
        Stored::plain(&format!("{root}.embeddings.patch_embeddings.projection.{{p}}"), "patch_embed.{p}"),
        Stored::plain(&format!("{root}.layernorm.{{p}}"), "norm.{p}"),
    ]
}

fn vit(root: &str) -> Vec<Stored> {
    let mut tensors = around(root);
    tensors.push(Stored::plain("classifier.{p}", "head.{p}"));
    tensors
}

fn deit(root: &str) -> Vec<Stored> {
    let mut tensors = around(root);
    tensors.push(Stored::plain("cls_classifier.{p}", "head.{p}"));
    tensors.push(Stored::alternative("classifier.{p}", "head.{p}"));
    tensors.push(Stored::plain("distillation_classifier.{p}", "head_dist.{p}"));
    tensors
}

fn version_4(root: &str) -> Vec<Stored> {
    blocks(
        &format!("{root}.encoder.layer"),
        &[
            ("attention.attention.query", "q"),
            ("attention.attention.key", "k"),
            ("attention.attention.value", "v"),
            ("attention.output.dense", "o"),
            ("intermediate.dense", "fc1"),
            ("output.dense", "fc2"),
            ("layernorm_before", "norm1"),
            ("layernorm_after", "norm2"),
        ],
    )
}

fn version_5(root: &str) -> Vec<Stored> {
    blocks(
        &format!("{root}.layers"),
        &[
            ("attention.q_proj", "q"),
            ("attention.k_proj", "k"),
            ("attention.v_proj", "v"),
            ("attention.o_proj", "o"),
            ("mlp.fc1", "fc1"),
            ("mlp.fc2", "fc2"),
            ("layernorm_before", "norm1"),
            ("layernorm_after", "norm2"),
        ],
    )
}

fn blocks(beginning: &str, names: &[(&str, &str)]) -> Vec<Stored> {
    let row = |(name, role): &(&str, &str)| {
        Stored::plain(&format!("{beginning}.{{n}}.{name}.{{p}}"), &format!("block.{{n}}.{role}.{{p}}"))
            .telling()
    };
    names.iter().map(row).collect()
}
