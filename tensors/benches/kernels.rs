//! Throughput of the packing kernels against `memcpy`, in GB/s of `f32` data on one core.
//!
//! Run with `cargo bench -p merganser-tensors --bench kernels`. No harness and no dependency: best of several
//! passes over a buffer larger than the last-level cache.
#![allow(clippy::print_stdout, reason = "the table is what this program is for")]

use std::hint::black_box;
use std::time::Instant;

use merganser_tensors::kernels::pack::{self, Bits};
use merganser_tensors::kernels::quantize::{self, CodeMap};
use merganser_tensors::kernels::{finite, reduce};

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
        let map = CodeMap::affine(-0.05, 0.05, bits).expect("a plain range");
        let mut packed = vec![0u8; pack::packed_len(ELEMENTS, bits)];
        report(&format!("{b} bits: quantize and pack"), || {
            quantize::encode(&x, bits, &mut packed, |_, x, q| quantize::quantize_affine(x, map, bits, q));
        });
        report(&format!("{b} bits: unpack and dequantize"), || {
            quantize::decode(&packed, bits, &mut y, |_, q, x| quantize::dequantize(q, map, x));
        });
        report(&format!("{b} bits: unpack codes only"), || pack::unpack(&packed, bits, &mut codes));
        report(&format!("{b} bits: pack codes only"), || pack::pack(&codes, bits, &mut packed));
    }
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
