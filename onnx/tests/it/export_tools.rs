//! The scripts of `tools/export`, on small models of random weights: what they write binds completely.
//!
//! They need PyTorch and the libraries that they export from, which are gigabytes. They are run by the Python that
//! `MERGANSER_EXPORT_PYTHON` names, or `python3`, if it has them; otherwise a line says that they were left out.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use merganser_onnx::{Binding, Graph};

use crate::support::Checkpoint;

const NEEDED: &str = "import torch, transformers, timm, open_clip, onnx, onnxruntime, safetensors";

/// Each script's arguments, and the graphs that it writes.
const EXPORTS: [(&str, &[&str], &[&str]); 5] = [
    ("clip_transformers.py", &[], &["vision.onnx", "text.onnx"]),
    ("clip_open.py", &[], &["vision.onnx", "text.onnx"]),
    ("deit_timm.py", &[], &["model.onnx"]),
    ("sam2_transformers.py", &[], &["vision_encoder.onnx", "prompt_encoder_mask_decoder.onnx"]),
    (
        "sam2_transformers.py",
        &["--layout", "segment-anything", "--masks", "4"],
        &["encoder.onnx", "decoder.onnx"],
    ),
];

#[test]
fn exports_of_the_scripts_bind_completely() {
    let python =
        std::env::var_os("MERGANSER_EXPORT_PYTHON").map_or_else(|| PathBuf::from("python3"), PathBuf::from);
    if !run(&python, &["-c", NEEDED]).0 {
        let line = format!(
            "tools/export is left out: `{}` lacks PyTorch or what it exports from\n",
            python.display()
        );
        std::io::stderr().write_all(line.as_bytes()).unwrap();
        return;
    }
    let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tools/export");
    let folder = tempfile::tempdir().unwrap();
    for (index, (script, arguments, graphs)) in EXPORTS.into_iter().enumerate() {
        let out = folder.path().join(index.to_string());
        let (script, out_text) = (scripts.join(script), out.to_str().unwrap().to_owned());
        let command = [&[script.to_str().unwrap(), &out_text, "--tiny"], arguments].concat();
        let (succeeded, output) = run(&python, &command);
        assert!(succeeded, "{command:?}\n{output}");
        assert!(out.join("preprocessor_config.json").is_file(), "{command:?}");
        let origin = Checkpoint::read(&out.join("model.safetensors"));
        for name in graphs {
            let graph = Graph::load(&out.join(name)).unwrap();
            let binding = Binding::find(&graph, &origin).unwrap();
            let what = format!("{command:?}: {name}");
            assert!(binding.check_origin().is_empty(), "{what}: {:?}", binding.check_origin());
            assert_eq!(binding.fixed_tensors(), [""; 0], "{what}");
            assert!(binding.coverage() > 0.999, "{what}: {}", binding.coverage());
        }
    }
}

/// Whether a process succeeded, and what it printed.
fn run(program: &Path, arguments: &[&str]) -> (bool, String) {
    let output = Command::new(program).args(arguments).env("HF_HUB_OFFLINE", "1").output();
    output.map_or((false, String::new()), |output| {
        let text =
            [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
        (output.status.success(), text)
    })
}
