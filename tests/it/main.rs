//! The product as its users meet it: the built tool, real models and images, files and processes. One binary, so that it links once.
//!
//! Each file is about one promise. What a test needs beyond the repository is found through `MERGANSER_TEST_DATA`; without it such a test says
//! `skipped: …` on standard error and counts it.

#![allow(clippy::print_stdout, reason = "figures of passing tests are shown on request")]

mod accuracy;
mod adaptation;
mod architecture;
mod arithmetic;
mod bind;
mod cache;
mod calibration;
mod cdpq;
mod commands;
mod damage;
mod datasets;
mod determinism;
mod distill;
mod docs;
mod errors;
mod export;
mod gone;
mod heads;
mod inspect;
mod interrupt;
mod masks;
mod methods;
mod names;
mod pins;
mod plan;
mod quantization;
mod scores;
mod segment;
mod sources;
mod stored_answers;
mod suite;
mod tensors;
mod tuned;
mod util;

/// A file that `main.rs` does not name is not compiled: its tests would never run and never fail.
#[test]
fn no_file_of_this_folder_is_forgotten() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it");
    let main = fs_err::read_to_string(folder.join("main.rs")).unwrap();
    for entry in fs_err::read_dir(&folder).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let Some(module) = name.strip_suffix(".rs").filter(|module| *module != "main") else { continue };
        assert!(
            main.lines().any(|line| line == format!("mod {module};")),
            "main.rs does not say `mod {module};`"
        );
    }
}
