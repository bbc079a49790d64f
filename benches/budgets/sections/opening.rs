//! Opening files of 10 GB, and reading tensors out of a PyTorch archive against reading the same bytes.

use super::Section;
use crate::report::{Budget, Median, budget, figure, interleaved};
use crate::tool::{Lab, cat, seconds, tool, watched};
use crate::{Bench, Result};
use std::io::{Seek, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

pub const SECTION: Section =
    Section { name: "opening", title: "opening large files; reading PyTorch archives", run };

/// Tensors of 25.6 MB, and how many of them make 10 GB.
const TENSOR_ELEMENTS: u64 = 6_400_000;
const N_LARGE: usize = 400;

/// As many as make about 350 MB: the size of a ViT-B/32.
const N_REAL: usize = 14;

const MAX_MILLISECONDS: f64 = 50.0;
const MAX_MEGABYTES: f64 = 50.0;
const MAX_RATIO: f64 = 1.1;

fn run(bench: &Bench) -> Result<()> {
    let lab = Lab::new(bench.root(), "opening")?;
    for (what, path) in [
        ("safetensors of 10 GB", write_safetensors(&lab.path("large.safetensors"), N_LARGE, None)?),
        ("PyTorch archive of 10 GB", write_torch(&lab.path("large.pt"), N_LARGE, None)?),
    ] {
        let [listed] = interleaved(bench.runs, [&mut || seconds(&mut inspect(&path, &["--no-norms"]))])?;
        figure(&format!("{what}: listed by `inspect --no-norms`"), listed.milliseconds());
        budget("    time", listed.value * 1e3, " ms", Budget::AtMost(MAX_MILLISECONDS));
        let spent = watched(&mut inspect(&path, &["--no-norms"]))?;
        budget("    private memory", spent.private_bytes as f64 / 1e6, " MB", Budget::AtMost(MAX_MEGABYTES));
    }
    let values: Vec<u8> =
        (0..TENSOR_ELEMENTS).flat_map(|i| ((i * 7919 % 10_007) as f32 * 1e-4).to_le_bytes()).collect();
    let plain = write_safetensors(&lab.path("real.safetensors"), N_REAL, Some(&values))?;
    let archive = write_torch(&lab.path("real.pt"), N_REAL, Some(&values))?;
    let [torch, safetensors, copied] = interleaved(
        bench.runs,
        [
            &mut || seconds(&mut inspect(&archive, &[])),
            &mut || seconds(&mut inspect(&plain, &[])),
            &mut || seconds(&mut cat([&archive])),
        ],
    )?;
    let rate =
        |median: &Median| format!("{} ({:.2} GB/s)", median.seconds(), bytes(N_REAL) / median.value / 1e9);
    figure("norms of all tensors of a PyTorch archive", rate(&torch));
    figure("    the same tensors in safetensors", rate(&safetensors));
    budget("    ratio", torch.value / safetensors.value, " ×", Budget::AtMost(MAX_RATIO));
    figure("    cat to /dev/null", rate(&copied));
    figure("    ratio to cat", format!("{:.2} ×", torch.value / copied.value));
    Ok(())
}

fn bytes(n_tensors: usize) -> f64 {
    (n_tensors as u64 * TENSOR_ELEMENTS * 4) as f64
}

fn inspect(path: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(tool());
    command.arg("inspect").arg(path).args(arguments).env_remove("MERGANSER_THREADS").stdout(Stdio::null());
    command
}

/// A file that is written from front to back; `None` leaves a hole.
struct Output {
    file: fs_err::File,
    length: u64,
}

impl Output {
    fn create(path: &Path) -> Result<Self> {
        Ok(Self { file: fs_err::File::create(path)?, length: 0 })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes)?;
        self.length += bytes.len() as u64;
        Ok(())
    }

    fn tensor(&mut self, values: Option<&[u8]>) -> Result<()> {
        if let Some(values) = values {
            return self.write(values);
        }
        self.length += TENSOR_ELEMENTS * 4;
        self.file.seek(std::io::SeekFrom::Start(self.length))?;
        Ok(())
    }

    fn finish(self, path: &Path) -> Result<PathBuf> {
        self.file.set_len(self.length)?;
        Ok(path.to_owned())
    }
}

fn write_safetensors(path: &Path, n: usize, values: Option<&[u8]>) -> Result<PathBuf> {
    let size = TENSOR_ELEMENTS * 4;
    let entries: Vec<String> = (0..n as u64)
        .map(|i| {
            let (start, end) = (i * size, (i + 1) * size);
            format!(r#""layer.{i:03}":{{"dtype":"F32","shape":[{TENSOR_ELEMENTS}],"data_offsets":[{start},{end}]}}"#)
        })
        .collect();
    let header = format!("{{{}}}", entries.join(","));
    let mut file = Output::create(path)?;
    file.write(&(header.len() as u64).to_le_bytes())?;
    file.write(header.as_bytes())?;
    for _ in 0..n {
        file.tensor(values)?;
    }
    file.finish(path)
}

/// As `torch.save` writes a state dict: an archive of stored members with zip64 sizes.
fn write_torch(path: &Path, n: usize, values: Option<&[u8]>) -> Result<PathBuf> {
    let text = |text: &str| [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat();
    let number = [b"J", &(TENSOR_ELEMENTS as u32).to_le_bytes()[..]].concat();
    let mut pickle = b"\x80\x02}".to_vec();
    for i in 0..n {
        pickle.extend(text(&format!("layer.{i:03}")));
        pickle.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        pickle.extend([text("storage"), b"ctorch\nFloatStorage\n".to_vec(), text(&i.to_string())].concat());
        pickle.extend([&text("cpu"), &number[..], b"tQK\x00", &number, b"\x85K\x01\x85\x89NtRs"].concat());
    }
    pickle.push(b'.');
    let mut file = Output::create(path)?;
    let mut directory = member(&mut file, "m/data.pkl", pickle.len() as u64)?;
    file.write(&pickle)?;
    for i in 0..n {
        directory.extend(member(&mut file, &format!("m/data/{i}"), TENSOR_ELEMENTS * 4)?);
        file.tensor(values)?;
    }
    let (start, record) = (file.length, file.length + directory.len() as u64);
    let count = (n as u64 + 1).to_le_bytes();
    file.write(&directory)?;
    file.write(b"PK\x06\x06\x2c\0\0\0\0\0\0\0\x2d\0\x2d\0\0\0\0\0\0\0\0\0")?;
    file.write(&[&count[..], &count, &(record - start).to_le_bytes(), &start.to_le_bytes()].concat())?;
    file.write(&[b"PK\x06\x07\0\0\0\0", &record.to_le_bytes()[..], &[1, 0, 0, 0]].concat())?;
    file.write(&[b"PK\x05\x06\0\0\0\0", &[0xFF; 12][..], &[0, 0]].concat())?;
    file.finish(path)
}

/// Writes a member's header, and returns its entry in the directory.
fn member(file: &mut Output, name: &str, length: u64) -> Result<Vec<u8>> {
    let (header, size, name_length) = (file.length, length.to_le_bytes(), [name.len() as u8, 0]);
    file.write(
        &[b"PK\x03\x04\x2d\0\0\0\0\0\0\0\0\0\0\0\0\0", &[0xFF; 8][..], &name_length, &[20, 0]].concat(),
    )?;
    file.write(&[name.as_bytes(), &[1, 0, 16, 0], &size, &size].concat())?;
    let start = b"PK\x01\x02\x2d\0\x2d\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let fixed = [&start[..], &[0xFF; 8], &name_length, &[28, 0], &[0; 10], &[0xFF; 4]].concat();
    Ok([&fixed[..], name.as_bytes(), &[1, 0, 24, 0], &size, &size, &header.to_le_bytes()].concat())
}
