//! Packing and unpacking on one core, in GB of f32 per second of processor time, against `memcpy`.

use super::Section;
use crate::report::{Budget, budget, figure};
use crate::{Bench, Result};
use merganser_tensors::encoding::{Code, Scales, Table, Tables};
use merganser_tensors::kernels::reduce::chunk_min_max;
use merganser_tensors::{Bits, Encoding, Grouped};
use std::hint::black_box;
use std::time::Instant;

pub const SECTION: Section = Section { name: "packing", title: "packing and unpacking on one core", run };

/// GB of f32 per second, where `memcpy` does [`MEMCPY`].
const LIMIT: f64 = 5.0;
const MEMCPY: f64 = 8.0;

/// Larger than any last-level cache.
const ELEMENTS: usize = 48 << 20;
/// Passes of one measurement: the system counts processor time in steps that are not small beside a single one.
const PASSES: usize = 8;
/// As tensors are read and written.
const BLOCK: usize = 64 * 1024;

fn run(bench: &Bench) -> Result<()> {
    let x: Vec<f32> = (0..ELEMENTS).map(|i| ((i * 7919 % 100_003) as f32 - 50_000.0) * 1e-6).collect();
    let mut y = vec![0f32; ELEMENTS];
    let copying = rate(bench.runs, || y.copy_from_slice(black_box(&x)));
    figure("memcpy", format!("{copying:.2} GB/s"));
    let limit = LIMIT * copying / MEMCPY;
    figure("    5 GB/s of a machine whose memcpy does 8 are here", format!("{limit:.2} GB/s"));
    let cases = [
        ("asymmetric, 2 bits", Code::Affine, 2, ELEMENTS),
        ("asymmetric, 3 bits", Code::Affine, 3, ELEMENTS),
        ("asymmetric, 4 bits", Code::Affine, 4, ELEMENTS),
        ("asymmetric, 8 bits", Code::Affine, 8, ELEMENTS),
        ("asymmetric, 16 bits", Code::Affine, 16, ELEMENTS),
        ("asymmetric, 4 bits, groups of 64", Code::Affine, 4, 64),
        ("symmetric, 4 bits, rows of 768", Code::Symmetric, 4, 768),
        ("nf4, groups of 64", Code::Nf4, 4, 64),
        ("fp4, groups of 64", Code::Fp4, 4, 64),
        ("int8-block, groups of 4096", Code::Dynamic, 8, 4096),
    ];
    for (name, code, bits, elements) in cases {
        let grouped = Grouped { bits: Bits::new(bits)?, code, elements, scales: Scales::Single, stages: 1 };
        let form = Encoding::Grouped(grouped).form(ELEMENTS).ok_or("there are codes")?;
        let mut table = Table::default();
        for group in x.chunks(elements) {
            let scale = code.scale(chunk_min_max(group), form.bits)?;
            table.scale.push(scale.scale);
            table.zero_point.push(scale.zero_point);
        }
        let tables = Tables(vec![table]);
        let mut packed = vec![0u8; form.codes_len(ELEMENTS)];
        let length = form.codes_len(BLOCK);
        let packing = rate(bench.runs, || {
            for (index, (x, packed)) in x.chunks(BLOCK).zip(packed.chunks_mut(length)).enumerate() {
                form.encode(index * BLOCK, x, &tables, packed);
            }
        });
        let unpacking = rate(bench.runs, || {
            for (index, (y, packed)) in y.chunks_mut(BLOCK).zip(packed.chunks(length)).enumerate() {
                form.decode(index * BLOCK, packed, &tables, y);
            }
        });
        budget(&format!("{name}: quantize and pack"), packing, " GB/s", Budget::AtLeast(limit));
        budget(&format!("{name}: unpack and dequantize"), unpacking, " GB/s", Budget::AtLeast(limit));
    }
    Ok(())
}

/// GB/s of the fastest of some measurements.
fn rate(runs: usize, mut pass: impl FnMut()) -> f64 {
    let seconds = (0..runs.max(3)).map(|_| {
        let (started, cpu) = (Instant::now(), processor_seconds());
        for _ in 0..PASSES {
            pass();
        }
        let elapsed = started.elapsed().as_secs_f64();
        cpu.zip(processor_seconds()).map_or(elapsed, |(before, after)| after - before)
    });
    (PASSES * ELEMENTS * 4) as f64 / seconds.fold(f64::INFINITY, f64::min) / 1e9
}

/// Processor time of this thread, which other work on the machine does not lengthen; `None` where the system does not tell.
fn processor_seconds() -> Option<f64> {
    let told = fs_err::read_to_string("/proc/thread-self/schedstat").ok()?;
    Some(told.split_whitespace().next()?.parse::<f64>().ok()? / 1e9)
}
