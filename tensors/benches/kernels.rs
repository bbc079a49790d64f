//! Throughput of the packing kernels against `memcpy`, in GB/s of `f32` data on one core.
//!
//! Run with `cargo bench -p merganser-tensors --bench kernels`. No harness and no dependency: best of several
//! passes over a buffer larger than the last-level cache.
#![allow(clippy::print_stdout, reason = "the table is what this program is for")]

use std::hint::black_box;
use std::time::Instant;

use merganser_tensors::encoding::{Code, Scales, Table, Tables};
use merganser_tensors::kernels::pack::{self, Bits};
use merganser_tensors::kernels::{finite, reduce};
use merganser_tensors::{Encoding, Grouped};

const ELEMENTS: usize = 96 << 20;
const BLOCK: usize = 64 * 1024;
const PASSES: usize = 5;

fn main() {
    let x: Vec<f32> = (0..ELEMENTS).map(|i| ((i * 7919 % 100_003) as f32 - 50_000.0) * 1e-6).collect();
    let mut y = vec![0f32; ELEMENTS];
    let mut codes = vec![0u8; ELEMENTS];
    report("memcpy", || y.copy_from_slice(black_box(&x)));
    report("min and max", || {
        black_box(
            x.chunks(BLOCK).map(reduce::chunk_min_max).fold(reduce::MinMax::EMPTY, reduce::MinMax::merge),
        );
    });
    report("all finite", || {
        black_box(finite::all_finite(black_box(&x)));
    });
    report("sum of squares", || {
        black_box(x.chunks(BLOCK).map(reduce::chunk_sum_of_squares).sum::<f64>());
    });
    for b in 1..=8 {
        let bits = Bits::new(b).expect("1 to 8");
        let affine = Encoding::affine(bits, range(&x)).expect("a plain range");
        encoding(&x, &mut y, &affine, &format!("{b} bits"));
        let mut packed = vec![0u8; pack::packed_len(ELEMENTS, bits)];
        pack::pack(&codes, bits, &mut packed);
        report(&format!("{b} bits: unpack codes only"), || pack::unpack(&packed, bits, &mut codes));
        report(&format!("{b} bits: pack codes only"), || pack::pack(&codes, bits, &mut packed));
    }
    let schemes = [
        ("affine, groups of 64", Code::Affine, 4, 64),
        ("symmetric, rows of 768", Code::Symmetric, 8, 768),
        ("nf4, groups of 64", Code::Nf4, 4, 64),
        ("fp4, groups of 64", Code::Fp4, 4, 64),
        ("dynamic, groups of 4096", Code::Dynamic, 8, 4096),
        ("affine, 16 bits", Code::Affine, 16, ELEMENTS),
    ];
    for (name, code, bits, elements) in schemes {
        let bits = Bits::new(bits).expect("a width that codes have");
        let grouped = Grouped { bits, code, elements, scales: Scales::Single, stages: 1 };
        encoding(&x, &mut y, &Encoding::Grouped(grouped), name);
    }
}

fn range(x: &[f32]) -> reduce::MinMax {
    x.chunks(BLOCK).map(reduce::chunk_min_max).fold(reduce::MinMax::EMPTY, reduce::MinMax::merge)
}

/// Both directions of an encoding, with scales that are there already, block by block as they are read and written.
fn encoding(x: &[f32], y: &mut [f32], encoding: &Encoding, name: &str) {
    let form = encoding.form(x.len()).expect("not plain");
    let tables = encoding.tables().unwrap_or_else(|| {
        let scales: Vec<_> = x
            .chunks(form.elements)
            .map(|group| form.code.scale(reduce::chunk_min_max(group), form.bits).expect("a plain range"))
            .collect();
        let zero_point =
            if form.code.has_zero_point() { scales.iter().map(|s| s.zero_point).collect() } else { vec![] };
        let scale = scales.iter().map(|s| s.scale).collect();
        Tables(vec![Table { scale, zero_point, ..Table::default() }])
    });
    let mut packed = vec![0u8; form.codes_len(x.len())];
    let length = form.codes_len(BLOCK);
    report(&format!("{name}: quantize and pack"), || {
        for (index, (x, packed)) in x.chunks(BLOCK).zip(packed.chunks_mut(length)).enumerate() {
            form.encode(index * BLOCK, x, &tables, packed);
        }
    });
    report(&format!("{name}: unpack and dequantize"), || {
        for (index, (y, packed)) in y.chunks_mut(BLOCK).zip(packed.chunks(length)).enumerate() {
            form.decode(index * BLOCK, packed, &tables, y);
        }
    });
}

/// Prints the best pass as GB/s of `f32` (four bytes per element, whatever the pass reads and writes).
fn report(what: &str, mut pass: impl FnMut()) {
    let best = (0..PASSES)
        .map(|_| {
            let start = Instant::now();
            pass();
            start.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min);
    println!("{what:<36} {:>6.2} GB/s", (ELEMENTS * 4) as f64 / best / 1e9);
}
