//! Subsampled colour to full size: libjpeg's "fancy" upsampling.
//!
//! Where a component has half the width, height or both, an output lies a quarter of the way from its sample to the next one, so samples weigh
//! 3:1 along each halved axis; rounding alternates between neighbours so that it does not drift. Other factors repeat the samples. Only samples of
//! the image itself count; beyond its edges the outermost are repeated.

use super::scan::Plane;

/// Writes row `y` of the output, at least `width` values of it; `sums` is memory to work in.
pub(super) fn row(plane: &Plane, y: usize, width: usize, out: &mut Vec<u8>, sums: &mut Vec<u16>) {
    let line = |row: usize| &plane.samples[row * plane.stride..][..plane.width];
    out.clear();
    match plane.factor {
        (1, 1) => out.extend_from_slice(line(y)),
        // Of two columns or less libjpeg's loop would run over the edge, so it repeats them.
        (1, 2) if plane.width > 2 => across(line(y), out),
        (2, 1) => {
            let (near, far, even) = nearest(plane, y);
            let bias = if even { 1 } else { 2 };
            let pairs = line(near).iter().zip(line(far));
            out.extend(pairs.map(|(&a, &b)| ((3 * u16::from(a) + u16::from(b) + bias) >> 2) as u8));
        }
        (2, 2) if plane.width > 2 => {
            let (near, far, _) = nearest(plane, y);
            sums.clear();
            sums.extend(line(near).iter().zip(line(far)).map(|(&a, &b)| 3 * u16::from(a) + u16::from(b)));
            across_sums(sums, out);
        }
        (down, factor) => {
            out.extend(line(y / down).iter().flat_map(|&value| std::iter::repeat_n(value, factor)));
        }
    }
    debug_assert!(out.len() >= width);
}

/// The sample rows that output row `y` lies between, the nearer one first, and whether it is the upper of its two.
fn nearest(plane: &Plane, y: usize) -> (usize, usize, bool) {
    let (near, even) = (y / 2, y.is_multiple_of(2));
    let far = if even { near.saturating_sub(1) } else { (near + 1).min(plane.height - 1) };
    (near, far, even)
}

/// Doubles a row.
fn across(line: &[u8], out: &mut Vec<u8>) {
    let value = |at: usize| u16::from(line[at]);
    let last = line.len() - 1;
    out.reserve(2 * line.len());
    out.push(line[0]);
    out.push(((3 * value(0) + value(1) + 2) >> 2) as u8);
    for window in line.windows(3) {
        let [before, here, after] = [window[0], window[1], window[2]].map(u16::from);
        out.push(((3 * here + before + 1) >> 2) as u8);
        out.push(((3 * here + after + 2) >> 2) as u8);
    }
    out.push(((3 * value(last) + value(last - 1) + 1) >> 2) as u8);
    out.push(line[last]);
}

/// Doubles a row of sums of four quarters.
fn across_sums(sums: &[u16], out: &mut Vec<u8>) {
    let last = sums.len() - 1;
    out.reserve(2 * sums.len());
    out.push(((4 * sums[0] + 8) >> 4) as u8);
    out.push(((3 * sums[0] + sums[1] + 7) >> 4) as u8);
    for window in sums.windows(3) {
        let [before, here, after] = [window[0], window[1], window[2]];
        out.push(((3 * here + before + 8) >> 4) as u8);
        out.push(((3 * here + after + 7) >> 4) as u8);
    }
    out.push(((3 * sums[last] + sums[last - 1] + 8) >> 4) as u8);
    out.push(((4 * sums[last] + 7) >> 4) as u8);
}
