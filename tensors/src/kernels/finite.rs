//! Finding NaN and infinity: one vectorized pass per block, a slow search only when there is something to find.

/// Returns the position of the first value that is NaN or infinite.
pub fn first_non_finite(values: &[f32]) -> Option<usize> {
    if all_finite(values) { None } else { values.iter().position(|x| !x.is_finite()) }
}

/// Returns whether no value is NaN or infinite.
pub fn all_finite(values: &[f32]) -> bool {
    // Signed compare of the bits without the sign: available on baseline x86-64, and branch-free.
    const LARGEST: i32 = 0x7F7F_FFFF;
    let (chunks, rest) = values.as_chunks::<64>();
    let mut bad = 0u32;
    for chunk in chunks {
        for x in chunk {
            bad |= u32::from((x.to_bits() & 0x7FFF_FFFF).cast_signed() > LARGEST);
        }
    }
    bad == 0 && rest.iter().all(|x| x.is_finite())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_first_non_finite_value_at_every_position() {
        for n in [0, 1, 15, 16, 17, 63, 64, 65, 200] {
            let clean: Vec<f32> = (0..n).map(|i| i as f32 - 50.0).collect();
            assert_eq!(first_non_finite(&clean), None);
            for position in 0..n {
                for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    let mut values = clean.clone();
                    values[position] = bad;
                    values[n - 1] = if position == n - 1 { bad } else { f32::NAN };
                    assert_eq!(first_non_finite(&values), Some(position));
                }
            }
        }
    }

    #[test]
    fn extreme_finite_values_are_finite() {
        assert!(all_finite(&[f32::MAX, f32::MIN, f32::MIN_POSITIVE, 1e-45, -0.0].repeat(30)));
    }
}
