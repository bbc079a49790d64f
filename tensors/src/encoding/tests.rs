//! Codes and values under every encoding, and what is refused.

use proptest::prelude::*;

use super::*;
use crate::kernels::reduce::chunk_min_max;

const WIDTHS: [u8; 9] = [1, 2, 3, 4, 5, 6, 7, 8, 16];

/// Every sort of code with a width that it has.
fn codes() -> impl Strategy<Value = (Code, Bits)> {
    let width = |code: Code| {
        let widths: Vec<u8> =
            WIDTHS.into_iter().filter(|bits| code.check(Bits::new(*bits).unwrap()).is_ok()).collect();
        (Just(code), prop::sample::select(widths).prop_map(|bits| Bits::new(bits).unwrap()))
    };
    prop::sample::select(vec![
        Code::Affine,
        Code::Absmax,
        Code::Symmetric,
        Code::Nf4,
        Code::Fp4,
        Code::Dynamic,
    ])
    .prop_flat_map(width)
}

fn grouped((code, bits): (Code, Bits), elements: usize, stages: usize, double: bool) -> Grouped {
    let scales = if double && code.has_book() { Scales::Double } else { Scales::Single };
    Grouped { bits, code, elements, scales, stages }
}

/// Chooses the scales of all stages as a quantizer does, looking at whole values.
fn choose(grouped: &Grouped, values: &[f32]) -> Tables {
    let form = Encoding::Grouped(*grouped).form(values.len()).unwrap();
    let mut tables = Tables::default();
    let mut rest = values.to_vec();
    for _ in 0..grouped.stages {
        let (mut scale, mut zero_point) = (vec![], vec![]);
        let mut ranges: Vec<MinMax> = rest.chunks(grouped.elements).map(chunk_min_max).collect();
        ranges.resize(form.n_groups(), MinMax::EMPTY);
        for range in ranges {
            let chosen = form.code.scale(range, form.bits).unwrap();
            scale.push(chosen.scale);
            zero_point.extend(form.code.has_zero_point().then_some(chosen.zero_point));
        }
        let table = grouped.table(scale, zero_point);
        let one = Form { stages: 1, ..form };
        let alone = Tables(vec![table.clone()]);
        let mut packed = vec![0; one.codes_len(rest.len())];
        one.encode(0, &rest, &alone, &mut packed);
        let mut decoded = vec![0.0; rest.len()];
        one.decode(0, &packed, &alone, &mut decoded);
        let mut rounded = rest.clone();
        one.round(0, &mut rounded, &alone);
        assert_eq!(rounded, decoded);
        rest.iter_mut().zip(&decoded).for_each(|(rest, decoded)| *rest -= decoded);
        tables.0.push(table);
    }
    tables
}

/// Codes and scales as they lie in a file.
fn stored(grouped: &Grouped, values: &[f32]) -> Vec<u8> {
    let encoding = Encoding::Grouped(*grouped);
    encoding.check(DType::F32, values.len()).unwrap();
    let form = encoding.form(values.len()).unwrap();
    let tables = choose(grouped, values);
    let mut bytes = vec![0; form.codes_len(values.len())];
    form.encode(0, values, &tables, &mut bytes);
    what_is_seen_is_what_is_written(&form, values, &tables, &bytes);
    grouped.write_tables(&tables, &mut bytes);
    assert_eq!(bytes.len() as u64, encoding.stored_len(DType::F32, values.len()));
    bytes
}

/// Coding that shows codes and values gives the same codes, and shows what decoding gives.
fn what_is_seen_is_what_is_written(form: &Form, values: &[f32], tables: &Tables, expected: &[u8]) {
    let n = values.len();
    let (mut bytes, mut codes, mut seen) =
        (vec![0xAA; expected.len()], vec![0xAA; n * form.stages], vec![9.0; n]);
    form.encode_seen(0, values, tables, &mut bytes, &mut codes, &mut seen);
    assert_eq!(bytes, expected);
    let mut decoded = vec![0.0; n];
    form.decode(0, expected, tables, &mut decoded);
    assert_eq!(seen, decoded);
    for stage in 0..form.stages {
        let shown = &codes[stage * n..][..n];
        if form.bits.get() == 16 {
            let mut wide = vec![0u16; n];
            form.unpack(stage, expected, &mut wide);
            assert!(shown.iter().zip(&wide).all(|(shown, code)| u16::from(*shown) == code >> 8));
        } else {
            let mut narrow = vec![0u8; n];
            form.unpack(stage, expected, &mut narrow);
            assert_eq!(shown, narrow);
        }
    }
}

/// Decodes a range from what lies in a file.
fn read(grouped: &Grouped, n: usize, bytes: &[u8], range: &Range<usize>) -> (Range<usize>, Vec<f32>) {
    let encoding = Encoding::Grouped(*grouped);
    let form = encoding.form(n).unwrap();
    let (elements, places) = encoding.enclosing(range, n).unwrap();
    let start = encoding.codes_len(DType::F32, n) as usize;
    let tables = grouped.read_tables(n, form.groups(&elements), |buffer, offset| {
        buffer.copy_from_slice(&bytes[start + offset as usize..][..buffer.len()]);
        Ok(())
    });
    let tables = tables.unwrap();
    tables.check(grouped.code).unwrap();
    let mut out = vec![f32::NAN; elements.len()];
    form.decode(elements.start, &bytes[places], &tables, &mut out);
    (elements, out)
}

fn round_trip(grouped: &Grouped, values: &[f32]) -> Vec<f32> {
    read(grouped, values.len(), &stored(grouped, values), &(0..values.len())).1
}

/// The largest distance of a value from what it is decoded to, by the scale of its group.
fn step(code: Code, scale: f32, bits: Bits) -> f64 {
    let scale = f64::from(scale);
    match code {
        Code::Affine | Code::Absmax => 1.0 / scale,
        Code::Symmetric => scale,
        // half the widest gap between neighbours, and what double quantization adds
        Code::Nf4 => scale * 0.16,
        Code::Fp4 => scale * 0.18,
        Code::Dynamic => scale * 0.008 * f64::from(bits.get()) / 8.0,
    }
}

proptest! {
    /// The documented bound, per group: one step plus rounding near the largest magnitude.
    #[test]
    fn decoded_values_are_within_a_step(
        values in prop::collection::vec(-2f32..3.0, 0..900),
        offset in prop_oneof![Just(0f32), -100f32..100.0],
        code in codes(),
        elements in prop_oneof![Just(1usize << 40), 1usize..300],
    ) {
        let values: Vec<f32> = values.iter().map(|x| x + offset).collect();
        let grouped = grouped(code, elements, 1, false);
        let tables = choose(&grouped, &values);
        for (i, (x, y)) in values.iter().zip(round_trip(&grouped, &values)).enumerate() {
            let group = i / elements;
            let members = &values[group * elements..values.len().min((group + 1).saturating_mul(elements))];
            let range = chunk_min_max(members);
            let bound = step(code.0, tables.0[0].scale[group], code.1)
                + 4.0 * f64::from(range.max_abs()) * f64::from(f32::EPSILON);
            let is_constant = range.min == range.max && code.0 == Code::Affine;
            let error = (f64::from(*x) - f64::from(y)).abs();
            prop_assert!(error <= if is_constant { 0.0 } else { bound }, "{x} {y}");
        }
    }

    /// Any range of any encoding, read on its own, and the codes taken out and put back.
    #[test]
    fn blocks_decode_like_the_whole(
        n in 1usize..2000,
        a in 0usize..2000,
        b in 0usize..2000,
        code in codes(),
        elements in 1usize..400,
        stages in 1usize..4,
        double in any::<bool>(),
    ) {
        let values: Vec<f32> = (0..n).map(|i| ((i * 7919 % 1009) as f32 - 500.0) / 77.0).collect();
        let grouped = grouped(code, elements, stages, double);
        let bytes = stored(&grouped, &values);
        let (_, whole) = read(&grouped, n, &bytes, &(0..n));
        let (a, b) = (a % (n + 1), b % (n + 1));
        let (elements, out) = read(&grouped, n, &bytes, &(a.min(b)..a.max(b)));
        prop_assert_eq!(&out, &whole[elements]);

        let form = Encoding::Grouped(grouped).form(n).unwrap();
        let packed = &bytes[..form.codes_len(n)];
        let mut again = vec![0; packed.len()];
        for stage in 0..stages {
            if code.1.get() == 16 {
                let mut codes = vec![0u16; n];
                form.unpack(stage, packed, &mut codes);
                form.pack(stage, &codes, &mut again);
            } else {
                let mut codes = vec![0u8; n];
                form.unpack(stage, packed, &mut codes);
                form.pack(stage, &codes, &mut again);
            }
        }
        prop_assert_eq!(packed, &again[..]);
    }

    /// One scale, part of the encoding: the same codes as one group.
    #[test]
    fn a_scale_in_the_encoding_is_a_group_of_everything(
        values in prop::collection::vec(-2f32..3.0, 0..700),
        bits in prop::sample::select(&WIDTHS[..]),
        stages in 1usize..4,
    ) {
        let bits = Bits::new(bits).unwrap();
        let in_file = grouped((Code::Affine, bits), values.len().max(1), stages, false);
        let tables = choose(&in_file, &values);
        let encoding = match stages {
            1 => Encoding::affine(bits, chunk_min_max(&values)).unwrap(),
            _ => Encoding::Residual { bits, stages: vec![AffineStage { scale: 1.0, zero_point: 0.0 }; stages] },
        };
        let encoding = encoding.with_tables(&tables);
        prop_assert_eq!(encoding.tables().unwrap(), tables.clone());
        encoding.check(DType::F32, values.len()).unwrap();
        let form = encoding.form(values.len()).unwrap();
        let mut packed = vec![0; encoding.stored_len(DType::F32, values.len()) as usize];
        form.encode(0, &values, &tables, &mut packed);
        prop_assert_eq!(&packed, &stored(&in_file, &values)[..packed.len()]);
    }
}

#[test]
fn every_stage_shrinks_the_remainder() {
    let values: Vec<f32> = (0..999).map(|i| ((i * 7919 % 1009) as f32 - 500.0) / 77.0).collect();
    for code in [Code::Affine, Code::Absmax, Code::Symmetric, Code::Nf4, Code::Fp4] {
        let mut before = f64::INFINITY;
        for stages in 1..=3 {
            let grouped = grouped((code, Bits::new(4).unwrap()), 64, stages, false);
            let decoded = round_trip(&grouped, &values);
            let error: f64 = values.iter().zip(&decoded).map(|(x, y)| f64::from(x - y).powi(2)).sum();
            assert!(error < before / 4.0, "{code:?}, {stages} stages: {error} after {before}");
            before = error;
        }
    }
}

#[test]
fn zeros_and_nothing_are_exact_under_every_encoding() {
    for code in [Code::Affine, Code::Absmax, Code::Symmetric, Code::Nf4, Code::Fp4, Code::Dynamic] {
        let bits = if code == Code::Dynamic { 8 } else { 4 };
        for double in [false, true] {
            for stages in [1, 3] {
                let grouped = grouped((code, Bits::new(bits).unwrap()), 64, stages, double);
                for values in [vec![], vec![0.0; 7], vec![0.0; 300]] {
                    assert!(round_trip(&grouped, &values).iter().all(|x| *x == 0.0), "{code:?}");
                }
            }
        }
    }
}

#[test]
fn stages_of_constants_are_exact() {
    for values in [vec![0.25], vec![-3.0; 300], vec![1.0, -1.0]] {
        let grouped = grouped((Code::Affine, Bits::new(4).unwrap()), 1000, 3, false);
        assert_eq!(round_trip(&grouped, &values), values);
    }
}

#[test]
fn parameters_are_checked() {
    let bits = Bits::new(4).unwrap();
    let affine = |scale: f32, zero_point: f32| Encoding::Affine {
        bits,
        granularity: Whole::Tensor,
        scale: [scale],
        zero_point: [zero_point],
    };
    let check = |encoding: Encoding| encoding.check(DType::F32, 10).unwrap_err();
    assert_eq!(check(affine(1.0, f32::NAN)), "its zero points must be finite, got NaN");
    assert_eq!(check(affine(-1.0, 0.0)), "its scales must be positive, got -1");
    let residual = |stages: Vec<AffineStage>| Encoding::Residual { bits, stages };
    assert_eq!(check(residual(vec![])), "it has no stages");
    let stage = AffineStage { scale: 0.0, zero_point: 1.0 };
    assert_eq!(check(residual(vec![stage])), "its scales must be positive, got 0");
    assert_eq!(affine(1.0, 0.0).check(DType::F16, 10).unwrap_err(), "codes stand for F32 values, not F16");
    let of = |code, bits, elements, stages, scales| {
        Encoding::Grouped(Grouped { bits: Bits::new(bits).unwrap(), code, elements, scales, stages })
    };
    let single = Scales::Single;
    assert_eq!(check(of(Code::Affine, 4, 0, 1, single)), "a group has no elements");
    assert_eq!(check(of(Code::Nf4, 3, 64, 1, single)), "its code book has 4 bits, not 3");
    assert_eq!(check(of(Code::Dynamic, 4, 64, 1, single)), "its code book has 8 bits, not 4");
    assert_eq!(check(of(Code::Affine, 4, 64, 9, single)), "it has 9 stages, 1 to 4 are possible");
    let doubled = check(of(Code::Affine, 4, 64, 1, Scales::Double));
    assert_eq!(doubled, "only scales of codes from a book can be quantized themselves");
    assert!(check(of(Code::Symmetric, 1, 64, 1, single)).starts_with("signed codes need 2 bits"));
}
