//! Order statistics of streams: the k-th smallest of any number of values, exactly, in bounded memory and without sorting.
//!
//! Values are compared through 32-bit keys ([`Order`]). One pass counts values by the upper half of their keys ([`HighCounts`]), which tells
//! the upper half of the k-th key and how many values come before that bucket; a second pass counts the lower halves within that one
//! bucket ([`LowCounts`]). Counts are integers and add up in any order, so the result depends neither on threads nor on blocks, and it is
//! the very value that a sort would give.
//!
//! Keys of NaN are ordered beyond infinity; whoever must not meet them checks with [`super::finite`].

/// Bits of the lower half of a key.
const LOW_BITS: u32 = 16;

const BUCKETS: usize = 1 << LOW_BITS;

/// How values are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// By magnitude; both zeros are equal.
    Magnitude,
    /// By value; −0 comes before +0.
    Value,
}

impl Order {
    /// The key of a value: keys compare as the values do.
    #[inline]
    pub fn key(self, value: f32) -> u32 {
        match self {
            Self::Magnitude => magnitude_key(value),
            Self::Value => value_key(value),
        }
    }

    /// The value of a key; of a magnitude, the positive one.
    pub fn value(self, key: u32) -> f32 {
        match self {
            Self::Magnitude => f32::from_bits(key),
            Self::Value if key >> 31 == 1 => f32::from_bits(key & 0x7FFF_FFFF),
            Self::Value => f32::from_bits(!key),
        }
    }
}

/// The key of [`Order::Magnitude`]: the bits without the sign.
#[inline]
pub fn magnitude_key(value: f32) -> u32 {
    value.to_bits() & 0x7FFF_FFFF
}

/// The key of [`Order::Value`]: negative values in reverse, then the others.
#[inline]
pub fn value_key(value: f32) -> u32 {
    let bits = value.to_bits();
    let negative = (bits.cast_signed() >> 31).cast_unsigned();
    bits ^ (negative | 0x8000_0000)
}

/// Counts of values by the upper half of their keys.
pub struct HighCounts(Vec<u64>);

/// The values whose keys have the same upper half.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bucket {
    pub high: u32,
    /// How many values are smaller than all of this bucket.
    pub before: u64,
}

impl Default for HighCounts {
    fn default() -> Self {
        Self(vec![0; BUCKETS])
    }
}

impl HighCounts {
    pub fn add(&mut self, order: Order, values: &[f32]) {
        let counts: &mut [u64; BUCKETS] = array(&mut self.0);
        match order {
            Order::Magnitude => count_high(counts, values, magnitude_key),
            Order::Value => count_high(counts, values, value_key),
        }
    }

    pub fn merge(&mut self, other: &Self) {
        add_counts(&mut self.0, &other.0);
    }

    /// The bucket of the value with `rank` smaller ones before it (0 is the smallest), if there are so many.
    pub fn find(&self, rank: u64) -> Option<Bucket> {
        let (high, before) = position(&self.0, rank)?;
        Some(Bucket { high, before })
    }
}

/// A value found by its rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistic {
    pub key: u32,
    /// How many values are smaller.
    pub below: u64,
    /// How many are equal, itself included.
    pub equal: u64,
}

/// Counts of the values of one bucket by the lower half of their keys.
pub struct LowCounts {
    bucket: Bucket,
    counts: Vec<u64>,
}

impl LowCounts {
    pub fn new(bucket: Bucket) -> Self {
        Self { bucket, counts: vec![0; BUCKETS] }
    }

    pub fn add(&mut self, order: Order, values: &[f32]) {
        let high = self.bucket.high;
        let counts: &mut [u64; BUCKETS] = array(&mut self.counts);
        match order {
            Order::Magnitude => count_low(counts, high, values, magnitude_key),
            Order::Value => count_low(counts, high, values, value_key),
        }
    }

    pub fn merge(&mut self, other: &Self) {
        assert_eq!(self.bucket, other.bucket, "counts are of the same bucket");
        add_counts(&mut self.counts, &other.counts);
    }

    /// The value with `rank` smaller ones before it, which must be of this bucket.
    pub fn find(&self, rank: u64) -> Option<Statistic> {
        let (low, before) = position(&self.counts, rank.checked_sub(self.bucket.before)?)?;
        Some(Statistic {
            key: (self.bucket.high << LOW_BITS) | low,
            below: self.bucket.before + before,
            equal: self.counts[low as usize],
        })
    }
}

/// The key with `rank` smaller ones before it, of keys that are at hand; reorders them.
pub fn nth_key(keys: &mut [u32], rank: usize) -> Option<Statistic> {
    if rank >= keys.len() {
        return None;
    }
    let key = *keys.select_nth_unstable(rank).1;
    let count = |is: &dyn Fn(&u32) -> bool| keys.iter().filter(|own| is(own)).count() as u64;
    Some(Statistic { key, below: count(&|own| *own < key), equal: count(&|own| *own == key) })
}

#[inline]
fn count_high(counts: &mut [u64; BUCKETS], values: &[f32], key: impl Fn(f32) -> u32) {
    for value in values {
        counts[(key(*value) >> LOW_BITS) as usize] += 1;
    }
}

#[inline]
fn count_low(counts: &mut [u64; BUCKETS], high: u32, values: &[f32], key: impl Fn(f32) -> u32) {
    // Few values are in the bucket: most groups are dismissed by one vectorized comparison.
    for group in values.chunks(32) {
        let mut hits = 0u32;
        for value in group {
            hits += u32::from(key(*value) >> LOW_BITS == high);
        }
        if hits == 0 {
            continue;
        }
        for value in group {
            let key = key(*value);
            if key >> LOW_BITS == high {
                counts[(key as usize) & (BUCKETS - 1)] += 1;
            }
        }
    }
}

fn array(counts: &mut [u64]) -> &mut [u64; BUCKETS] {
    counts.try_into().expect("there are as many counts as buckets")
}

fn add_counts(sums: &mut [u64], counts: &[u64]) {
    for (sum, count) in sums.iter_mut().zip(counts) {
        *sum += count;
    }
}

/// The first position whose running count exceeds `rank`, and the count before it.
fn position(counts: &[u64], rank: u64) -> Option<(u32, u64)> {
    let mut before = 0;
    for (index, count) in counts.iter().enumerate() {
        if rank < before + count {
            return Some((index as u32, before));
        }
        before += count;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn by_counting(order: Order, values: &[f32], rank: usize, block: usize) -> Option<Statistic> {
        let mut high = HighCounts::default();
        for part in values.chunks(block) {
            let mut own = HighCounts::default();
            own.add(order, part);
            high.merge(&own);
        }
        let bucket = high.find(rank as u64)?;
        let mut low = LowCounts::new(bucket);
        for part in values.chunks(block) {
            let mut own = LowCounts::new(bucket);
            own.add(order, part);
            low.merge(&own);
        }
        low.find(rank as u64)
    }

    fn any_value() -> impl Strategy<Value = f32> {
        prop_oneof![
            -1f32..1.0,
            Just(0.0f32),
            Just(-0.0f32),
            Just(0.5f32),
            any::<f32>().prop_filter("finite", |x| x.is_finite()),
        ]
    }

    proptest! {
        #[test]
        fn finds_what_a_sort_finds(
            values in prop::collection::vec(any_value(), 0..200),
            rank in 0usize..220,
            block in 1usize..50,
        ) {
            let mut magnitudes: Vec<f32> = values.iter().map(|x| x.abs()).collect();
            magnitudes.sort_by(f32::total_cmp);
            let found = by_counting(Order::Magnitude, &values, rank, block);
            prop_assert_eq!(found.map(|found| Order::Magnitude.value(found.key)), magnitudes.get(rank).copied());
            if let Some(Statistic { key, below, equal }) = found {
                let value = Order::Magnitude.value(key);
                prop_assert_eq!(below, magnitudes.iter().filter(|x| **x < value).count() as u64);
                prop_assert_eq!(equal, magnitudes.iter().filter(|x| **x == value).count() as u64);
            }

            let mut sorted = values.clone();
            sorted.sort_by(f32::total_cmp);
            let found = by_counting(Order::Value, &values, rank, block);
            let bits = found.map(|found| Order::Value.value(found.key).to_bits());
            prop_assert_eq!(bits, sorted.get(rank).map(|x| x.to_bits()));

            let mut keys: Vec<u32> = values.iter().map(|x| value_key(*x)).collect();
            prop_assert_eq!(nth_key(&mut keys, rank), found);
        }

        #[test]
        fn keys_compare_as_values_do(a in any_value(), b in any_value()) {
            prop_assert_eq!(value_key(a).cmp(&value_key(b)), a.total_cmp(&b));
            prop_assert_eq!(magnitude_key(a).cmp(&magnitude_key(b)), a.abs().total_cmp(&b.abs()));
            prop_assert_eq!(Order::Value.value(value_key(a)).to_bits(), a.to_bits());
        }
    }

    #[test]
    fn constants_have_one_bucket() {
        let values = [0.25f32; 77];
        let quarter = Statistic { key: 0.25f32.to_bits(), below: 0, equal: 77 };
        for rank in [0, 38, 76] {
            assert_eq!(by_counting(Order::Magnitude, &values, rank, 10), Some(quarter));
        }
        assert_eq!(by_counting(Order::Magnitude, &values, 77, 10), None);
    }
}
