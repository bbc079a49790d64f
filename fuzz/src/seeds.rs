//! Inputs from which mutations begin: the files of the tests of `merganser-tensors`, and some that are written here because no program
//! writes them so small.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use merganser_tensors::Manifest;
use merganser_tensors::formats::{self, Selection};
use merganser_tensors::manifest::Content;

use crate::Target;

/// Seeds by target.
pub fn seeds() -> io::Result<BTreeMap<&'static str, Vec<Vec<u8>>>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tensors/tests/data/torch");
    let mut files = Vec::new();
    let folders =
        ["", "refused", "sharded", "torch-1.13.1", "torch-1.13.1/adapter"].map(|name| folder.join(name));
    for folder in folders {
        for entry in std::fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_file() {
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                files.push((name, std::fs::read(&path)?));
            }
        }
    }
    files.sort();
    let mut seeds = BTreeMap::new();
    for target in Target::ALL {
        let mine = files.iter().filter(|(name, bytes)| is_seed(target, name, bytes));
        let mut inputs: Vec<Vec<u8>> = mine.map(|(_, bytes)| bytes.clone()).collect();
        inputs.extend(written(target, &folder)?);
        seeds.insert(target.name(), inputs);
    }
    Ok(seeds)
}

/// Whether a committed file is a seed of a target.
fn is_seed(target: Target, file_name: &str, start: &[u8]) -> bool {
    let zip = start.starts_with(b"PK");
    let extension = file_name.rsplit('.').next().unwrap_or_default();
    match target {
        Target::Pickle => matches!(extension, "pt" | "pkl") && !zip,
        Target::Torch => matches!(extension, "pt" | "bin") && zip,
        Target::Zip => zip && start.len() < 2000,
        Target::Safetensors => extension == "safetensors",
        Target::Numpy => matches!(extension, "npy" | "npz"),
        Target::Index => extension == "json",
        Target::Adapter | Target::Manifest => false,
    }
}

/// What is written for a target.
fn written(target: Target, folder: &Path) -> io::Result<Vec<Vec<u8>>> {
    Ok(match target {
        Target::Zip => vec![
            archive(&[("a", b"12"), ("b/c", b""), ("d", b"345")], false, b""),
            archive(&[("a", b"12"), ("b/c", b""), ("d", b"345")], true, b""),
            archive(&[("a", b"1")], false, b"a comment"),
            archive(&[("a", b"1")], true, b"a comment"),
            archive(&[], false, b""),
        ],
        Target::Safetensors => vec![
            safetensors(&[
                ("vision_model.embeddings.class_embedding", &[2]),
                ("vision_model.encoder.layers.0.self_attn.q_proj.weight", &[2, 2]),
                ("vision_model.encoder.layers.0.mlp.fc1.bias", &[3]),
                ("visual_projection.weight", &[1, 2]),
            ]),
            safetensors(&[
                ("model.visual.class_embedding", &[2]),
                ("model.visual.transformer.resblocks.0.attn.in_proj_weight", &[6, 2]),
                ("model.visual.proj", &[2, 1]),
            ]),
        ],
        Target::Adapter => adapters(),
        Target::Manifest => manifests(folder)?,
        _ => Vec::new(),
    })
}

/// An archive of stored members, in the classic form or with all that zip64 adds.
fn archive(members: &[(&str, &[u8])], wide: bool, comment: &[u8]) -> Vec<u8> {
    let (mut file, mut directory) = (Vec::new(), Vec::new());
    let narrow = |value: usize| if wide { [0xFF; 4] } else { (value as u32).to_le_bytes() };
    let word = |value: usize| (value as u64).to_le_bytes();
    for (name, bytes) in members {
        let header = file.len();
        let sizes = [narrow(bytes.len()), narrow(bytes.len())].concat();
        let length = (name.len() as u16).to_le_bytes();
        let both = [word(bytes.len()), word(bytes.len())].concat();
        let extra = if wide { [&[1, 0, 16, 0], &both[..]].concat() } else { Vec::new() };
        let extra_length = (extra.len() as u16).to_le_bytes();
        file.extend(
            [b"PK\x03\x04\x2d\0\0\0\0\0\0\0\0\0\0\0\0\0", &sizes[..], &length, &extra_length].concat(),
        );
        file.extend([name.as_bytes(), &extra, bytes].concat());
        let extra = if wide { [&[1, 0, 24, 0], &both[..], &word(header)].concat() } else { Vec::new() };
        let extra_length = (extra.len() as u16).to_le_bytes();
        let start = b"PK\x01\x02\x2d\0\x2d\0\0\0\0\0\0\0\0\0\0\0\0\0";
        directory.extend([&start[..], &sizes, &length, &extra_length, &[0; 10], &narrow(header)].concat());
        directory.extend([name.as_bytes(), &extra].concat());
    }
    let (start, length, n) = (file.len(), directory.len(), (members.len() as u16).to_le_bytes());
    file.extend(&directory);
    if wide {
        let record = file.len();
        let count = word(members.len());
        let begin = b"PK\x06\x06\x2c\0\0\0\0\0\0\0\x2d\0\x2d\0\0\0\0\0\0\0\0\0";
        file.extend([&begin[..], &count, &count, &word(length), &word(start)].concat());
        file.extend([b"PK\x06\x07\0\0\0\0", &word(record)[..], &[1, 0, 0, 0]].concat());
    }
    file.extend([b"PK\x05\x06\0\0\0\0", &n[..], &n, &narrow(length), &narrow(start)].concat());
    file.extend([&(comment.len() as u16).to_le_bytes(), comment].concat());
    file
}

/// A safetensors file of ones, in single precision.
fn safetensors(tensors: &[(&str, &[usize])]) -> Vec<u8> {
    let (mut entries, mut end) = (Vec::new(), 0);
    for (name, shape) in tensors {
        let start = end;
        end += 4 * shape.iter().product::<usize>();
        entries
            .push(format!(r#""{name}":{{"dtype":"F32","shape":{shape:?},"data_offsets":[{start},{end}]}}"#));
    }
    let header = format!("{{{}}}", entries.join(","));
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.bytes());
    file.extend(1f32.to_le_bytes().repeat(end / 4));
    file
}

fn adapters() -> Vec<Vec<u8>> {
    let plain = r#"{"peft_type":"LORA","r":2,"lora_alpha":4,"target_modules":["q_proj"],"bias":"none"}"#;
    let rich = r#"{"peft_type":"LORA","r":8,"lora_alpha":16,"use_rslora":true,"fan_in_fan_out":true,"rank_pattern":{"q_proj":2,"layers\\.\\d+":3},"alpha_pattern":{"a.b":1.5},"target_modules":".*proj","modules_to_save":["head"],"layer_replication":null,"init_lora_weights":true}"#;
    let linear = safetensors(&[
        ("base_model.model.a.q_proj.lora_A.weight", &[2, 3]),
        ("base_model.model.a.q_proj.lora_B.weight", &[4, 2]),
    ]);
    let others = safetensors(&[
        ("a.lora_A.default.weight", &[2, 3, 1, 1]),
        ("a.lora_B.default.weight", &[4, 2, 1, 1]),
        ("base_model.model.e.lora_embedding_A", &[2, 5]),
        ("base_model.model.e.lora_embedding_B", &[3, 2]),
        ("base_model.model.m.base_layer.out_proj.lora_A.weight", &[2, 3]),
        ("base_model.model.m.base_layer.out_proj.lora_B.weight", &[3, 2]),
        ("base_model.model.m.lora_A.weight", &[2, 3]),
        ("base_model.model.m.lora_B.weight", &[9, 2]),
        ("base_model.model.head.modules_to_save.weight", &[2]),
    ]);
    let pairs = [plain, rich].into_iter().flat_map(|config| [(config, &linear), (config, &others)]);
    pairs.map(|(config, weights)| [config.as_bytes(), b"\0", weights].concat()).collect()
}

/// Descriptions of regions, of regions with strides, and of views.
fn manifests(folder: &Path) -> io::Result<Vec<Vec<u8>>> {
    let digest = blake3::Hash::from_bytes([7; 32]);
    let mut found = Vec::new();
    for name in ["small.safetensors", "views_2.pt"] {
        let parts = formats::describe_selected(&folder.join(name), &Selection::default());
        let manifest =
            parts.and_then(|parts| Manifest::of_checkpoint(Content::Checkpoint, &parts, &[digest], |_| true));
        found.push(manifest.map_err(io::Error::other)?);
    }
    for adapter in adapters() {
        let zero = adapter.iter().position(|byte| *byte == 0).unwrap_or_default();
        let weights = adapter[zero + 1..].to_vec();
        let header = formats::safetensors::read_header(&weights).map_err(io::Error::other)?;
        let Ok(header) = header else { continue };
        let size = weights.len() as u64;
        let part =
            formats::FilePart { path: "memory".into(), size, tensors: header.tensors, notes: Vec::new(), base: None };
        let adapter =
            merganser_tensors::lora::Adapter::new(&adapter[..zero], vec![part], Path::new("memory"));
        if let Ok(manifest) =
            adapter.and_then(|adapter| adapter.manifest(&[digest], |name| name != "head.weight"))
        {
            found.push(manifest);
        }
    }
    let mut texts: Vec<Vec<u8>> = found.iter().map(Manifest::to_json).collect();
    let hex = digest.to_hex();
    texts.push(format!(r#"{{"version":1,"content":"task-vectors","tensors":[{{"name":"a","dtype":"F32","shape":[2]}}],"layout":{{"linear":{{"terms":[{{"coefficient":1.0,"artifact":"{hex}"}},{{"coefficient":-1.0,"artifact":"{hex}"}}]}}}}}}"#).into_bytes());
    Ok(texts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use merganser_tensors::formats::zip;
    use merganser_tensors::lora::Adapter;

    /// A seed that is refused at once reaches nothing.
    #[test]
    fn seeds_that_are_written_here_are_accepted() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tensors/tests/data/torch");
        let seeds = |target| written(target, &folder).unwrap();
        for seed in seeds(Target::Zip) {
            zip::members(&seed).unwrap();
        }
        for seed in seeds(Target::Safetensors) {
            formats::safetensors::read_header(&seed).unwrap().unwrap();
        }
        for seed in seeds(Target::Manifest) {
            Manifest::from_json(&seed).unwrap();
        }
        assert!(seeds(Target::Manifest).len() > 4);
        let accepted = seeds(Target::Adapter).into_iter().filter(|seed| {
            let zero = seed.iter().position(|byte| *byte == 0).unwrap();
            let weights = seed[zero + 1..].to_vec();
            let tensors = formats::safetensors::read_header(&weights).unwrap().unwrap().tensors;
            let part = formats::FilePart { path: "x".into(), size: 1 << 20, tensors, notes: Vec::new(), base: None };
            Adapter::new(&seed[..zero], vec![part], Path::new("x")).inspect_err(|e| eprintln!("{e}")).is_ok()
        });
        assert!(accepted.count() > 1);
        for target in Target::ALL {
            assert!(
                super::seeds().unwrap()[target.name()].iter().all(|seed| !seed.is_empty()),
                "{}",
                target.name()
            );
        }
    }
}
