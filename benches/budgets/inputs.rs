//! What the budgets are measured on: a base and eight fine-tuned encoders of the size of ViT-B/32, in open_clip's names.
//!
//! The values are made up but not arbitrary: a task vector has a low-rank part, a part that all tasks share, and noise, so that whatever looks
//! at singular values or at the ranges of quantization finds something like a real one. Every value is a function of (task, tensor, element):
//! files are the same on every machine, whatever the number of threads.

use crate::Result;
use merganser_tensors::DType;
use merganser_tensors::writer::{WriteOptions, write_f32_tensors};
use std::io::BufWriter;
use std::path::{Path, PathBuf};

/// Fine-tuned encoders beside the base.
pub const N_TASKS: usize = 8;

/// Rank of the low-rank part of a task vector.
const RANK: usize = 16;

/// How large the encoders are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// 768 wide: 88.2 million parameters, 353 MB a file, 3.2 GB in all.
    Full,
    /// A quarter as wide: 22 MB a file. For trying the program out; ratios of small inputs say little.
    Small,
    /// As many tensors, hardly any bytes: what a stage costs besides its data.
    Tiny,
}

impl Scale {
    /// Width of the encoder and of the text side that comes with it.
    fn widths(self) -> (usize, usize) {
        match self {
            Self::Full => (768, 512),
            Self::Small => (192, 128),
            Self::Tiny => (12, 8),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Small => "small",
            Self::Tiny => "tiny",
        }
    }
}

/// A folder with `base.safetensors` and `task0.safetensors` to `task7.safetensors`.
#[derive(Clone, Debug)]
pub struct Encoders {
    pub folder: PathBuf,
    pub bytes_per_file: u64,
}

impl Encoders {
    /// Writes the files that are not there yet.
    pub fn prepare(root: &Path, scale: Scale) -> Result<Self> {
        let folder = root.join(format!("vit-b-32-{}", scale.name()));
        fs_err::create_dir_all(&folder)?;
        let tensors = tensors(scale);
        let encoders = Self { bytes_per_file: 0, folder };
        for (task, path) in encoders.paths().iter().enumerate() {
            if !path.exists() {
                let staged = path.with_extension("part");
                let mut out = BufWriter::new(fs_err::File::create(&staged)?);
                let fill = |tensor: usize, range: std::ops::Range<usize>, values: &mut [f32], _: &mut _| {
                    let (_, shape) = &tensors[tensor];
                    fill(task, tensor, shape, range, values);
                    Ok(())
                };
                write_f32_tensors(&mut out, &tensors, DType::F32, fill, &WriteOptions::default())?;
                fs_err::rename(&staged, path)?;
            }
        }
        let bytes_per_file = fs_err::metadata(&encoders.paths()[0])?.len();
        Ok(Self { bytes_per_file, ..encoders })
    }

    /// The base first.
    pub fn paths(&self) -> Vec<PathBuf> {
        let tasks = (0..N_TASKS).map(|task| self.folder.join(format!("task{task}.safetensors")));
        std::iter::once(self.folder.join("base.safetensors")).chain(tasks).collect()
    }

    pub fn total_bytes(&self) -> u64 {
        self.bytes_per_file * (N_TASKS as u64 + 1)
    }

    /// `load` of all files and `diff`; further stages are appended.
    pub fn pipeline(&self, further: &str) -> String {
        let folder = self.folder.display();
        let tasks: Vec<String> = (0..N_TASKS).map(|task| format!("\"task{task}\"")).collect();
        format!(
            "[pipeline]\nname = \"budgets\"\n\n[vars]\ntasks = [{}]\n\n\
             [stage.base]\nkind = \"load\"\npath = '{folder}/base.safetensors'\n\n\
             [stage.tuned]\nkind = \"load\"\neach = {{ task = \"${{tasks}}\" }}\npath = '{folder}/${{task}}.safetensors'\n\n\
             [stage.deltas]\nkind = \"diff\"\nfrom = {{ base = \"base\", tuned = \"tuned\" }}\n\n{further}",
            tasks.join(", ")
        )
    }
}

/// The 157 tensors of open_clip's ViT-B-32 image encoder as fine-tuned encoders are distributed, with the small tensors of the text side.
fn tensors(scale: Scale) -> Vec<(String, Vec<usize>)> {
    let (width, text) = scale.widths();
    let visual = |name: &str, shape: &[usize]| (format!("model.visual.{name}"), shape.to_vec());
    let mut tensors = vec![
        ("model.positional_embedding".to_owned(), vec![77, text]),
        ("model.text_projection".to_owned(), vec![text, text]),
        ("model.logit_scale".to_owned(), vec![]),
        ("model.ln_final.weight".to_owned(), vec![text]),
        ("model.ln_final.bias".to_owned(), vec![text]),
        visual("class_embedding", &[width]),
        visual("positional_embedding", &[50, width]),
        visual("proj", &[width, text]),
        visual("conv1.weight", &[width, 3, 32, 32]),
    ];
    for norm in ["ln_pre", "ln_post"] {
        tensors.extend(["weight", "bias"].map(|kind| visual(&format!("{norm}.{kind}"), &[width])));
    }
    for block in 0..12 {
        let linear = [
            ("attn.in_proj_", 3 * width, width),
            ("attn.out_proj.", width, width),
            ("mlp.c_fc.", 4 * width, width),
            ("mlp.c_proj.", width, 4 * width),
        ];
        for (name, rows, columns) in linear {
            let name = format!("transformer.resblocks.{block}.{name}");
            tensors.push(visual(&format!("{name}weight"), &[rows, columns]));
            tensors.push(visual(&format!("{name}bias"), &[rows]));
        }
        for norm in ["ln_1", "ln_2"] {
            let name = format!("transformer.resblocks.{block}.{norm}");
            tensors.extend(["weight", "bias"].map(|kind| visual(&format!("{name}.{kind}"), &[width])));
        }
    }
    tensors
}

/// Values of elements `range`; task 0 is the base.
fn fill(task: usize, tensor: usize, shape: &[usize], range: std::ops::Range<usize>, out: &mut [f32]) {
    const SHARED: usize = 1000;
    for (x, element) in out.iter_mut().zip(range.clone()) {
        *x = 0.02 * normal(0, tensor, element);
    }
    if task == 0 {
        return;
    }
    let &[rows, columns] = shape else {
        for (x, element) in out.iter_mut().zip(range) {
            *x += 5e-4 * normal(task, tensor, element);
        }
        return;
    };
    for (x, element) in out.iter_mut().zip(range.clone()) {
        *x += 3e-4 * normal(task, tensor, element) + 2e-4 * normal(SHARED, tensor, element);
    }
    // The factors lie behind the elements: first `RANK` values per row, then the rows of the other factor.
    let (left, right) = (rows * columns, rows * columns + rows * RANK);
    let factor: Vec<f32> = (0..RANK * columns).map(|i| normal(task, tensor, right + i)).collect();
    let mut start = range.start;
    while start < range.end {
        let (row, column) = (start / columns, start % columns);
        let end = range.end.min(start + columns - column);
        let out = &mut out[start - range.start..end - range.start];
        let mut sigma = 1.0;
        for (k, factor) in factor.chunks_exact(columns).enumerate() {
            let scale = 4e-4 * sigma * normal(task, tensor, left + row * RANK + k);
            // Down to 10^-1.5 for the last of 16.
            sigma *= 0.794_328_2;
            for (x, y) in out.iter_mut().zip(&factor[column..]) {
                *x += scale * y;
            }
        }
        start = end;
    }
}

/// A value of mean 0 and variance 1, nearly normal: the sum of four uniform ones.
fn normal(task: usize, tensor: usize, element: usize) -> f32 {
    // splitmix64 (Steele, Lea, Flood 2014)
    let mut z = (((task as u64) << 48) ^ ((tensor as u64) << 36) ^ element as u64)
        .wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^= z >> 31;
    let sum: u64 = (0..4).map(|i| (z >> (16 * i)) & 0xFFFF).sum();
    // Four uniform values on 0 to 65535 have the mean 131070 and the standard deviation 65536/√3.
    (sum as f32 - 131_070.0) * (1.732_050_8 / 65_536.0)
}
