//! The exact Euclidean distance of every pixel to the nearest of some pixels, squared.
//!
//! In two passes, both exact in whole numbers: along the columns, then along the rows as the lower envelope of parabolas
//! (Meijster, Roerdink, Hesselink, A general algorithm for computing distance transforms in linear time, 2000).

/// Returns the squared distance of every pixel of a `height`×`width` grid to the nearest pixel of which `is_site` is true, `[row][column]`. Where
/// there is none, all are larger than any distance within the grid.
pub(super) fn squared_distances(
    height: usize,
    width: usize,
    is_site: impl Fn(usize, usize) -> bool,
) -> Vec<u64> {
    let far = (height + width) as i64;
    // Distance to the nearest site of the same column.
    let mut columns = vec![far; height * width];
    for column in 0..width {
        let mut distance = far;
        for row in 0..height {
            distance = if is_site(row, column) { 0 } else { far.min(distance + 1) };
            columns[row * width + column] = distance;
        }
        for row in (0..height).rev() {
            let own = &mut columns[row * width + column];
            distance = (*own).min(distance + 1);
            *own = distance;
        }
    }
    let mut squared = vec![0; height * width];
    let mut envelope: Vec<(i64, i64)> = Vec::with_capacity(width);
    for (columns, squared) in columns.chunks_exact(width.max(1)).zip(squared.chunks_exact_mut(width.max(1))) {
        let height_at = |column: i64| columns[column as usize] * columns[column as usize];
        let parabola = |at: i64, of: i64| (at - of) * (at - of) + height_at(of);
        // Parabolas of the envelope, each with the first column where it is the lowest.
        envelope.clear();
        for of in 0..width as i64 {
            while envelope.last().is_some_and(|&(last, from)| parabola(from, last) > parabola(from, of)) {
                envelope.pop();
            }
            let from = envelope.last().map_or(0, |&(last, _)| {
                // The last column where the earlier parabola is not above this one, plus one.
                let crossing = of * of - last * last + height_at(of) - height_at(last);
                1 + crossing.div_euclid(2 * (of - last))
            });
            if from < width as i64 {
                envelope.push((of, from));
            }
        }
        for (at, value) in squared.iter_mut().enumerate().rev() {
            let at = at as i64;
            while envelope.last().is_some_and(|&(_, from)| from > at) {
                envelope.pop();
            }
            let (of, _) = *envelope.last().expect("the first parabola begins at column 0");
            *value = parabola(at, of) as u64;
        }
    }
    squared
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn distances_equal_those_to_all_sites(height in 0_usize..12, width in 0_usize..12, seed: u64, sparse in 1_u64..30) {
            let is_site = |row: usize, column: usize| {
                let mut value = seed ^ ((row * 131 + column) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                value ^= value >> 29;
                (value.wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 40) & 0xff < 256 / sparse
            };
            let squared = squared_distances(height, width, is_site);
            let sites: Vec<(usize, usize)> = (0..height)
                .flat_map(|row| (0..width).map(move |column| (row, column)))
                .filter(|&(row, column)| is_site(row, column))
                .collect();
            for (at, &actual) in squared.iter().enumerate() {
                let nearest = sites.iter().map(|&(row, column)| {
                    let (dy, dx) = (row.abs_diff(at / width), column.abs_diff(at % width));
                    (dy * dy + dx * dx) as u64
                });
                match nearest.min() {
                    Some(expected) => prop_assert_eq!(actual, expected),
                    None => prop_assert!(actual > (height * height + width * width) as u64),
                }
            }
        }
    }
}
