//! Pinned outputs: whoever changes the numbers or bytes of a stage is reminded to raise its version.
//!
//! A key contains a stage's version, not its code. If a stage computes something else under its old version, every cache in the world goes on
//! serving the old result. So these digests may only change together with a version. Scores are not pinned: their bits depend on the
//! machine's numerics class, which is in their key.

use crate::util::Lab;

/// Unit, and the BLAKE3 of its artifact on the quickstart's files. What multiplies matrices is not pinned: its last bits depend on the
/// processor, and its key says so.
const PINNED: &[(&str, &str)] = &[
    ("absmax", "c19756b92ac78f591377fa463ec6297c01af4c0be3bda5b4066eae3318fe348a"),
    ("averaged", "2aa2ec94f7919795ac84b046cd47a5916471e953b7b8285d2ad91960e798b7ae"),
    ("base", "ef7990fcd9fceda5789ea41b74f6f9bcb34517cb3dd5107606fa756f57a3f242"),
    ("breadcrumbs", "cabac739d0cbbb5a4614b4acf32cbac60f634c966e343c07a5f1c668fb3f28b6"),
    ("dare", "0fc3b357d3f5581be0f5169203478721b23a4bde74155860823fffadc9b17c97"),
    ("della", "4c6868b0fbde975b21ca3de63da9f5b7413d42ccad3ad873fa609f02119df650"),
    ("deltas[digits]", "75588693ef330c6959a794fa7309b2448c4ac91ec4c5f23b35966ff144f3e4f2"),
    ("deltas[negative]", "aabb8801f8ef7799b322e2adaf6a04b1aa465eaaf727c50bb9e85c626c501851"),
    ("emr[digits]", "e6599152a79d60f528a9c1d67767394f650f70929a19589832f8ea281ea60cd0"),
    ("emr[negative]", "b73c42fe552517ccb42c510b07986b5951cf422a2e3e12b1afa01b8d6371ba5c"),
    ("files", "5e5457822ced5a1068cc6eebc791b1e61b2db50ece6f3355c2521d4b9a0b8faa"),
    ("lines", "32875f25c3e853b0cfc5b102110e2bfbef2eac7d249b820341d2a5e5977fd878"),
    ("masks[digits]", "6e59654edef375c88eb410e9e4785c78345ecc11cc532d95853b435b04add888"),
    ("masks[negative]", "944ed4ad286d95cbfd05e15999e840276615c914ade9ac1da023907e23967804"),
    ("merged", "a44f57d602500ff938c83344dc0596e3b0227aa02ee0e8ffde2b053adf7cf30b"),
    ("negated", "7f8b12ceeb41c174caeca080d6497b088a494de84c40946a32f5bcfebc2bcb20"),
    ("packed[digits]", "2d4fab8ada5e9c999fba29fff76a96a283cbb36d69bac083364c1924b4b47d2a"),
    ("packed[negative]", "4b1454ed472ec4881436c404c21fb54533020c6a0341a4aa6f54864a6be05662"),
    ("pcb", "f1d81e8b90b16d6528df440da3d6fb56030f8002f7cb7a4ab022f6e332bc3acd"),
    ("random", "a90420a5c5d0136bd6b1f08a41afce8fcfdf2f80b374ec8af2ded7842afa590b"),
    ("residual", "46741d071937411ce81a572ef590ef97f1972742b471996289f57db7c495d178"),
    ("sce", "350aaee878b4d233e00313a556400728cddf6d76e588ee12bf2e705b2f178d47"),
    ("ties", "9bf59cb362dc973776a807660948c4aa6614d50d7e5089a94b5ddb9ead77541d"),
    ("ties_tensor", "9db10a9e59013bb6d4e940e8392dacc629e0af931bbe55796953e948fe43413d"),
    ("tuned[digits]", "6aec06ec6c1f8ee9009e523d61fa643444fd3469441f63acbefdfd7d399ac0b2"),
    ("tuned[negative]", "eb0def7b55ba6603c523b24bebdd4dbe3d1c2d3f01adb79c271d8904e8b64507"),
];

/// Merges whose bytes are the same on every processor, and their parameters.
const ELEMENT_WISE: &[(&str, &str)] = &[
    ("ties", "method = \"ties\""),
    ("ties_tensor", "method = \"ties\"\nscope = \"tensor\"\nmean_by = \"weights\"\ntie = \"positive\""),
    ("dare", "method = \"dare\""),
    ("della", "method = \"della\""),
    ("breadcrumbs", "method = \"breadcrumbs\""),
    ("lines", "method = \"lines\""),
    ("pcb", "method = \"pcb\""),
    ("sce", "method = \"sce\""),
    ("emr", "method = \"emr\""),
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
    for (stage, parameters) in ELEMENT_WISE {
        let text = format!(
            "\n[stage.{stage}]\nfrom = {{ base = \"base\", vectors = \"deltas\" }}\nkind = \"merge\"\n{parameters}\n"
        );
        lab.append("pipeline.toml", &text);
    }
    lab.append(
        "pipeline.toml",
        "\n[stage.masks]\nkind = \"mask\"\nfrom = { deltas = \"deltas\", base = \"base\" }\nmethod = \"tall\"\nlambda = 0.4\n\
         \n[stage.random]\nkind = \"mask\"\nfrom = \"deltas\"\nmethod = \"random\"\nkeep = 0.5\ncombine = \"union\"\n\
         \n[stage.residual]\nkind = \"quantize\"\nfrom = \"deltas[digits]\"\nbits = 3\nresidual_stages = 2\n",
    );
    let own = ["merged", "absmax", "negated", "files", "masks", "random", "residual"];
    let own = own.into_iter().chain(ELEMENT_WISE.iter().map(|(stage, _)| *stage));
    let stages: Vec<&str> = own.flat_map(|stage| ["--stage", stage]).collect();
    let run = lab.run(&stages);
    let artifacts: Vec<(&str, &str)> = run.artifacts().into_iter().collect();
    assert_eq!(
        artifacts, PINNED,
        "an output changed: raise the version of its stage, scheme or method, and pin the new digest"
    );
}
