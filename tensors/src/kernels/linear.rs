//! Element-wise linear combinations, `f32` throughout, product and sum rounded separately.

/// `out[i] = out[i] + c·x[i]`; `c = ±1` adds or subtracts exactly.
pub fn add_scaled(out: &mut [f32], coefficient: f32, values: &[f32]) {
    assert_eq!(out.len(), values.len(), "operands have the same length");
    let pairs = out.iter_mut().zip(values);
    if coefficient == 1.0 {
        pairs.for_each(|(sum, x)| *sum += x);
    } else if coefficient == -1.0 {
        pairs.for_each(|(sum, x)| *sum -= x);
    } else {
        pairs.for_each(|(sum, x)| *sum += coefficient * x);
    }
}

/// `out[i] = out[i] + c·(a[i] + d·b[i])`: the same as adding `d·b` to `a` and that to `out`, in one pass over memory.
pub fn add_scaled_sum(out: &mut [f32], c: f32, a: &[f32], d: f32, b: &[f32]) {
    assert_eq!(out.len(), a.len(), "operands have the same length");
    assert_eq!(out.len(), b.len(), "operands have the same length");
    for ((sum, a), b) in out.iter_mut().zip(a).zip(b) {
        *sum += c * (a + d * b);
    }
}

/// `out[i] = c·out[i]`.
pub fn scale(out: &mut [f32], coefficient: f32) {
    if coefficient != 1.0 {
        for x in out {
            *x *= coefficient;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn matches_the_formula(
            pairs in prop::collection::vec((-1e3f32..1e3, -1e3f32..1e3), 0..100),
            c in prop_oneof![Just(1.0f32), Just(-1.0), -2f32..2.0],
            d in prop_oneof![Just(1.0f32), Just(-1.0), -2f32..2.0],
        ) {
            let (x, y): (Vec<f32>, Vec<f32>) = pairs.into_iter().unzip();
            let mut out = x.clone();
            add_scaled(&mut out, c, &y);
            for i in 0..x.len() {
                prop_assert_eq!(out[i], x[i] + c * y[i]);
                let exact = f64::from(x[i]) + f64::from(c) * f64::from(y[i]);
                // two roundings, each half an ulp of a value below 3e3
                prop_assert!((f64::from(out[i]) - exact).abs() <= 2.5e-4);
            }
            let mut twice = y.clone();
            add_scaled(&mut twice, d, &x);
            let mut apart = x.clone();
            add_scaled(&mut apart, c, &twice);
            let mut at_once = x.clone();
            add_scaled_sum(&mut at_once, c, &y, d, &x);
            prop_assert!(at_once.iter().zip(&apart).all(|(a, b)| a.to_bits() == b.to_bits()));
            let mut scaled = x.clone();
            scale(&mut scaled, c);
            prop_assert!(scaled.iter().zip(&x).all(|(s, x)| *s == c * x));
        }
    }
}
