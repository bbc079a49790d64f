//! What executing a stage costs besides its work: stages that only describe, and stages that store next to nothing.

use super::Section;
use crate::inputs::Encoders;
use crate::report::{Budget, budget, figure, interleaved};
use crate::tool::Lab;
use crate::{Bench, Result};

pub const SECTION: Section =
    Section { name: "overhead", title: "what an executed stage costs besides its work", run };

const N_STAGES: usize = 100;
const LIMIT_MILLISECONDS: f64 = 10.0;

fn run(bench: &Bench) -> Result<()> {
    let encoders = bench.tiny_encoders()?;
    let chain = |i: usize, before: &str| {
        format!(
            "\n[stage.s{i}]\nkind = \"combine\"\nfrom = \"{before}\"\nscale = {{ vectors = {} }}\n",
            1.0 + i as f64 / 128.0
        )
    };
    measure(bench, &encoders, "a view (a chain of `combine`)", &chain)?;
    let packed = |i: usize, _: &str| {
        let (bits, rule) = (1 + i % 8, i / 8);
        format!(
            "\n[stage.s{i}]\nkind = \"quantize\"\nfrom = \"delta\"\nbits = {bits}\n\
             rules = [{{ match = \"*.{rule}.mlp.*\", bits = 3 }}]\n"
        )
    };
    measure(bench, &encoders, "a small stored artifact (`quantize`, 157 small tensors)", &packed)
}

fn measure(
    bench: &Bench,
    encoders: &Encoders,
    what: &str,
    stage: &dyn Fn(usize, &str) -> String,
) -> Result<()> {
    let lab = Lab::new(bench.root(), "overhead")?;
    let folder = encoders.folder.display();
    let mut text = format!(
        "[pipeline]\nname = \"overhead\"\n\n[stage.base]\nkind = \"load\"\npath = '{folder}/base.safetensors'\n\n\
         [stage.tuned]\nkind = \"load\"\npath = '{folder}/task0.safetensors'\n\n\
         [stage.delta]\nkind = \"diff\"\nfrom = {{ base = \"base\", tuned = \"tuned\" }}\n"
    );
    let mut before = "delta".to_owned();
    for i in 0..N_STAGES {
        text += &stage(i, &before);
        before = format!("s{i}");
    }
    let pipeline = lab.write("pipeline.toml", &text)?;
    lab.seconds(&pipeline, &["--stage", "delta"])?;
    lab.save_cache()?;
    let [cold, warm] = interleaved(
        bench.runs,
        [
            &mut || {
                lab.restore_cache()?;
                lab.seconds(&pipeline, &[])
            },
            &mut || lab.seconds(&pipeline, &[]),
        ],
    )?;
    let per_stage = (cold.value - warm.value) / N_STAGES as f64;
    budget(what, per_stage * 1e3, " ms a stage", Budget::AtMost(LIMIT_MILLISECONDS));
    figure("    all executed", cold.seconds());
    figure("    all cached", warm.seconds());
    Ok(())
}
