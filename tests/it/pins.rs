//! Pinned outputs: whoever changes the numbers or bytes of a stage is reminded to raise its version.
//!
//! A key contains a stage's version, not its code. If a stage computes something else under its old version, every cache in the world goes on
//! serving the old result. So these digests may only change together with a version. Scores are not pinned: their bits depend on the
//! machine's numerics class, which is in their key.

use crate::util::Lab;

/// Unit, and the BLAKE3 of its artifact on the quickstart's files.
const PINNED: &[(&str, &str)] = &[
    ("absmax", "896deafa621e8163453d3336961c5b61545223acc47ed092024d00fb9b36d432"),
    ("averaged", "2aa2ec94f7919795ac84b046cd47a5916471e953b7b8285d2ad91960e798b7ae"),
    ("base", "ef7990fcd9fceda5789ea41b74f6f9bcb34517cb3dd5107606fa756f57a3f242"),
    ("deltas[digits]", "75588693ef330c6959a794fa7309b2448c4ac91ec4c5f23b35966ff144f3e4f2"),
    ("deltas[negative]", "aabb8801f8ef7799b322e2adaf6a04b1aa465eaaf727c50bb9e85c626c501851"),
    ("files", "5e5457822ced5a1068cc6eebc791b1e61b2db50ece6f3355c2521d4b9a0b8faa"),
    ("merged", "a44f57d602500ff938c83344dc0596e3b0227aa02ee0e8ffde2b053adf7cf30b"),
    ("negated", "7f8b12ceeb41c174caeca080d6497b088a494de84c40946a32f5bcfebc2bcb20"),
    ("packed[digits]", "825156b534687f29d3e8426acf4a6824b7199f48a60afe6eb4f1d2cd19650c9a"),
    ("packed[negative]", "2ecc95345ae4aed56f2f0379dc498e2eeb4c30464bb80254046d9daaad4cb989"),
    ("tuned[digits]", "6aec06ec6c1f8ee9009e523d61fa643444fd3469441f63acbefdfd7d399ac0b2"),
    ("tuned[negative]", "eb0def7b55ba6603c523b24bebdd4dbe3d1c2d3f01adb79c271d8904e8b64507"),
];

#[test]
fn outputs_change_only_together_with_a_version() {
    let lab = Lab::small();
    lab.append(
        "pipeline.toml",
        "\n[stage.absmax]\nkind = \"quantize\"\nfrom = \"deltas[digits]\"\nscheme = \"absmax\"\nbits = 5\nselect = \"tvq\"\n\
         \n[stage.averaged]\nkind = \"merge\"\nfrom = { base = \"base\", vectors = \"deltas\" }\nmethod = \"average\"\n\
         \n[stage.negated]\nkind = \"combine\"\nfrom = { a = \"deltas[digits]\", b = \"deltas[negative]\" }\nscale = { a = -1.0, b = 0.5 }\n\
         \n[stage.files]\nkind = \"export\"\nfrom = \"averaged\"\nto = \"out\"\ndtype = \"bf16\"\nmax_shard_bytes = 300000\n",
    );
    let stages: Vec<&str> =
        ["merged", "absmax", "negated", "files"].iter().flat_map(|stage| ["--stage", stage]).collect();
    let run = lab.run(&stages);
    let artifacts: Vec<(&str, &str)> = run.artifacts().into_iter().collect();
    assert_eq!(
        artifacts, PINNED,
        "an output changed: raise the version of its stage, scheme or method, and pin the new digest"
    );
}
