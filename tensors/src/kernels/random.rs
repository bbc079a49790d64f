//! Random numbers by counting: element `i` of a stream is a function of the stream's name and `i` alone.
//!
//! Philox4x32-10 (Salmon, Moraes, Dror and Shaw, Parallel random numbers: as easy as 1, 2, 3, SC 2011, §4.3): ten rounds of multiplication and
//! exclusive-or turn a 128-bit counter under a 64-bit key into 128 random bits. It has no state, so blocks may be computed in any
//! order on any number of threads; it passes BigCrush; and its rounds are plain 32-bit multiplications that vectorize.
//! A [`Stream`] takes its key and the upper half of its counters from a BLAKE3 digest of what it is for.

/// Multipliers of the two words that are multiplied.
const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];

/// What is added to the key after each round: the golden ratio and √3 − 1.
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

const ROUNDS: usize = 10;

/// Words of one counter.
const WORDS: usize = 4;

/// Philox4x32-10 of one counter.
#[inline]
pub fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..ROUNDS {
        let low = u64::from(MULTIPLIERS[0]) * u64::from(counter[0]);
        let high = u64::from(MULTIPLIERS[1]) * u64::from(counter[2]);
        counter = [
            (high >> 32) as u32 ^ counter[1] ^ key[0],
            high as u32,
            (low >> 32) as u32 ^ counter[3] ^ key[1],
            low as u32,
        ];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

/// Counters that are computed side by side.
const BATCH: usize = 16;

/// A sequence of random words that can be entered anywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    key: [u32; 2],
    /// The upper half of every counter.
    high: [u32; 2],
}

impl Stream {
    /// The stream of a seed and names. Streams of other seeds or names are independent.
    pub fn new(seed: u64, names: &[&str]) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"merganser random stream 1");
        hasher.update(&seed.to_le_bytes());
        for name in names {
            hasher.update(&(name.len() as u64).to_le_bytes());
            hasher.update(name.as_bytes());
        }
        let digest = hasher.finalize();
        let word = |i: usize| {
            let bytes = digest.as_bytes();
            u32::from_le_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]])
        };
        Self { key: [word(0), word(1)], high: [word(2), word(3)] }
    }

    /// Writes words `start..start + out.len()` of the stream.
    pub fn fill(&self, start: usize, out: &mut [u32]) {
        let skip = start % WORDS;
        let mut counter = (start / WORDS) as u64;
        let (head, rest) = out.split_at_mut(if skip == 0 { 0 } else { (WORDS - skip).min(out.len()) });
        if !head.is_empty() {
            head.copy_from_slice(&self.words(counter)[skip..][..head.len()]);
            counter += 1;
        }
        let (batches, rest) = rest.as_chunks_mut::<{ BATCH * WORDS }>();
        for batch in batches {
            self.batch(counter, batch);
            counter += BATCH as u64;
        }
        let (groups, tail) = rest.as_chunks_mut::<WORDS>();
        for group in groups {
            *group = self.words(counter);
            counter += 1;
        }
        if !tail.is_empty() {
            tail.copy_from_slice(&self.words(counter)[..tail.len()]);
        }
    }

    /// [`Self::words`] of as many counters, side by side so that they vectorize.
    fn batch(&self, first: u64, out: &mut [u32; BATCH * WORDS]) {
        let (mut a, mut b) = ([0u32; BATCH], [0u32; BATCH]);
        for (i, (a, b)) in a.iter_mut().zip(&mut b).enumerate() {
            let counter = first + i as u64;
            (*a, *b) = (counter as u32, (counter >> 32) as u32);
        }
        let (mut c, mut d) = ([self.high[0]; BATCH], [self.high[1]; BATCH]);
        let mut key = self.key;
        for _ in 0..ROUNDS {
            for i in 0..BATCH {
                let low = u64::from(MULTIPLIERS[0]) * u64::from(a[i]);
                let high = u64::from(MULTIPLIERS[1]) * u64::from(c[i]);
                a[i] = (high >> 32) as u32 ^ b[i] ^ key[0];
                b[i] = high as u32;
                c[i] = (low >> 32) as u32 ^ d[i] ^ key[1];
                d[i] = low as u32;
            }
            key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
        }
        for (i, out) in out.as_chunks_mut::<WORDS>().0.iter_mut().enumerate() {
            *out = [a[i], b[i], c[i], d[i]];
        }
    }

    #[inline]
    fn words(&self, counter: u64) -> [u32; 4] {
        philox([counter as u32, (counter >> 32) as u32, self.high[0], self.high[1]], self.key)
    }
}

/// How many of the 2³² words count as "yes" at a probability: compare with [`happens`].
pub fn threshold(probability: f64) -> u64 {
    (probability.clamp(0.0, 1.0) * 4_294_967_296.0).round() as u64
}

/// Whether an event of probability `threshold / 2³²` happens for a word.
#[inline]
pub fn happens(word: u32, threshold: u64) -> bool {
    u64::from(word) < threshold
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The vectors that the authors publish with their library (`kat_vectors`, philox4x32, 10 rounds).
    #[test]
    fn agrees_with_the_authors_test_vectors() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            philox([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        assert_eq!(
            philox(pi, [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn a_stream_can_be_entered_anywhere() {
        let stream = Stream::new(7, &["mnist", "w"]);
        let mut whole = vec![0; 3 * BATCH * WORDS + 7];
        stream.fill(0, &mut whole);
        let one_by_one = (0..whole.len()).map(|i| stream.words((i / WORDS) as u64)[i % WORDS]);
        assert!(one_by_one.eq(whole.iter().copied()));
        for start in 0..whole.len() {
            for end in start..whole.len() {
                let mut part = vec![0; end - start];
                stream.fill(start, &mut part);
                assert_eq!(part, whole[start..end]);
            }
        }
    }

    #[test]
    fn streams_of_other_names_and_seeds_are_others() {
        let streams = [Stream::new(0, &["a", "b"]), Stream::new(1, &["a", "b"]), Stream::new(0, &["ab", ""])];
        let words = streams.map(|stream| {
            let mut words = [0; 8];
            stream.fill(0, &mut words);
            words
        });
        assert!(words[0] != words[1] && words[0] != words[2] && words[1] != words[2]);
    }

    #[test]
    fn events_happen_as_often_as_they_should() {
        const N: usize = 1 << 18;
        let mut words = vec![0; N];
        for probability in [0.0, 0.01, 0.3, 0.5, 0.9, 1.0] {
            Stream::new(3, &["rate"]).fill(0, &mut words);
            let limit = threshold(probability);
            let count = words.iter().filter(|word| happens(**word, limit)).count() as f64;
            let (mean, deviation) =
                (N as f64 * probability, (N as f64 * probability * (1.0 - probability)).sqrt());
            assert!((count - mean).abs() <= 5.0 * deviation, "{probability}: {count} of {N}");
        }
    }

    #[test]
    fn streams_are_not_correlated() {
        const N: usize = 1 << 18;
        let (mut a, mut b) = (vec![0; N], vec![0; N]);
        Stream::new(0, &["one", "w"]).fill(0, &mut a);
        Stream::new(0, &["two", "w"]).fill(0, &mut b);
        let half = threshold(0.5);
        // each word against the other stream's, and against its own neighbour
        for (x, y) in [(&a[..], &b[..]), (&a[1..], &a[..N - 1])] {
            let both = x.iter().zip(y).filter(|(x, y)| happens(**x, half) && happens(**y, half)).count();
            let (mean, deviation) = (x.len() as f64 / 4.0, (x.len() as f64 * 3.0 / 16.0).sqrt());
            assert!((both as f64 - mean).abs() <= 5.0 * deviation, "{both}");
        }
    }
}
