//! Masks as COCO, SA-1B and SA-V store them: run lengths, column by column, beginning with the pixels outside.
//!
//! The lengths are a list of numbers, or compressed to text. In the text every length is written in groups of five bits, the lowest first, in
//! the characters from `0` on; the sixth bit says that more follow; from the fourth length on, it is the difference to the length before the
//! last one, in two's complement. (The format of `pycocotools`, `maskApi.c`.)
//!
//! A file's claim about the size of a mask allocates nothing: [`Rle::to_mask`] wants to be told the size of the image.

use super::mask::Mask;
use serde::{Deserialize, Serialize};

/// A mask of run lengths; they add up to its pixels.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "Written", into = "Written")]
pub struct Rle {
    height: usize,
    width: usize,
    /// outside, inside, outside, …
    runs: Vec<u32>,
}

/// As in the files.
#[derive(Deserialize, Serialize)]
struct Written {
    /// height, width
    size: (usize, usize),
    counts: Counts,
}

#[derive(Deserialize, Serialize)]
#[serde(untagged)]
enum Counts {
    Text(String),
    Runs(Vec<u32>),
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RleError {
    #[error("the runs cover {found} pixels, but {height}x{width} has {expected}")]
    Sum { height: usize, width: usize, expected: u64, found: u64 },
    #[error("{width}x{height} pixels are too many")]
    TooLarge { height: usize, width: usize },
    #[error("character {position} of the compressed counts is `{found}`, expected one of `0` to `o`")]
    Character { position: usize, found: char },
    #[error("the compressed counts end within a number")]
    Truncated,
    #[error("length {index} of the compressed counts is {value}")]
    Length { index: usize, value: i64 },
    #[error("it is {}x{} pixels, the image {}x{}", found.1, found.0, expected.1, expected.0)]
    Size { expected: (usize, usize), found: (usize, usize) },
}

/// More groups of five bits than any length below 2³² needs.
const MOST_GROUPS: u32 = 8;

impl Rle {
    /// Checks run lengths: outside, inside, outside, …
    pub fn from_runs(height: usize, width: usize, runs: Vec<u32>) -> Result<Self, RleError> {
        let expected = u32::try_from(height as u128 * width as u128)
            .map_err(|_| RleError::TooLarge { height, width })
            .map(u64::from)?;
        let found = runs.iter().map(|&run| u64::from(run)).sum();
        if found != expected {
            return Err(RleError::Sum { height, width, expected, found });
        }
        Ok(Self { height, width, runs })
    }

    /// Reads compressed run lengths.
    pub fn from_text(height: usize, width: usize, text: &str) -> Result<Self, RleError> {
        let mut runs: Vec<u32> = Vec::new();
        let (mut value, mut groups) = (0_i64, 0_u32);
        for (position, character) in text.char_indices() {
            if !('0'..='o').contains(&character) {
                return Err(RleError::Character { position, found: character });
            }
            let bits = i64::from(u32::from(character) - u32::from('0'));
            value |= (bits & 0x1f) << (5 * groups);
            groups += 1;
            if bits & 0x20 != 0 {
                if groups == MOST_GROUPS {
                    return Err(RleError::Length { index: runs.len(), value });
                }
                continue;
            }
            if bits & 0x10 != 0 {
                value |= -1 << (5 * groups);
            }
            if runs.len() > 2 {
                value += i64::from(runs[runs.len() - 2]);
            }
            let run = u32::try_from(value).map_err(|_| RleError::Length { index: runs.len(), value })?;
            runs.push(run);
            (value, groups) = (0, 0);
        }
        if groups > 0 { Err(RleError::Truncated) } else { Self::from_runs(height, width, runs) }
    }

    /// Writes the run lengths compressed.
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        for (index, &run) in self.runs.iter().enumerate() {
            let before = if index > 2 { i64::from(self.runs[index - 2]) } else { 0 };
            let mut value = i64::from(run) - before;
            loop {
                let bits = (value & 0x1f) as u8;
                value >>= 5;
                let more = if bits & 0x10 == 0 { value != 0 } else { value != -1 };
                text.push(char::from(b'0' + bits + if more { 0x20 } else { 0 }));
                if !more {
                    break;
                }
            }
        }
        text
    }

    /// Takes the run lengths of a mask.
    pub fn of(mask: &Mask) -> Self {
        let (height, width) = (mask.height(), mask.width());
        let (mut runs, mut inside, mut run) = (Vec::new(), false, 0);
        for column in 0..width {
            for row in 0..height {
                if mask.get(row, column) != inside {
                    runs.push(run);
                    (inside, run) = (!inside, 0);
                }
                run += 1;
            }
        }
        if run > 0 {
            runs.push(run);
        }
        Self { height, width, runs }
    }

    /// Returns the pixels; refuses a mask that is not of the size of its image.
    pub fn to_mask(&self, height: usize, width: usize) -> Result<Mask, RleError> {
        if (self.height, self.width) != (height, width) {
            return Err(RleError::Size { expected: (height, width), found: (self.height, self.width) });
        }
        let mut pixels = vec![false; height * width];
        let mut at = 0;
        for (index, &run) in self.runs.iter().enumerate() {
            let end = at + run as usize;
            if index % 2 == 1 {
                for position in at..end {
                    pixels[position % height * width + position / height] = true;
                }
            }
            at = end;
        }
        Ok(Mask::new(height, width, pixels))
    }

    /// Returns the number of pixels inside.
    pub fn area(&self) -> u64 {
        self.runs.iter().skip(1).step_by(2).map(|&run| u64::from(run)).sum()
    }
}

impl TryFrom<Written> for Rle {
    type Error = RleError;

    fn try_from(written: Written) -> Result<Self, RleError> {
        let (height, width) = written.size;
        match written.counts {
            Counts::Runs(runs) => Self::from_runs(height, width, runs),
            Counts::Text(text) => Self::from_text(height, width, &text),
        }
    }
}

impl From<Rle> for Written {
    fn from(rle: Rle) -> Self {
        Self { size: (rle.height, rle.width), counts: Counts::Text(rle.to_text()) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    fn error(size: (usize, usize), text: &str) -> String {
        Rle::from_text(size.0, size.1, text).unwrap_err().to_string()
    }

    #[test]
    fn runs_go_down_the_columns_and_begin_outside() {
        let mask = Mask::from_fn(2, 3, |row, column| (row, column) == (1, 0) || column == 1);
        let rle = Rle::of(&mask);
        assert_eq!(rle.runs, [1, 3, 2]);
        assert_eq!((rle.to_mask(2, 3).unwrap(), rle.area()), (mask, 3));
        let full = Rle::of(&Mask::from_fn(2, 2, |_, _| true));
        assert_eq!(full.runs, [0, 4]);
        assert_eq!(Rle::of(&Mask::from_fn(0, 0, |_, _| true)).runs, [0; 0]);
    }

    #[test]
    fn texts_and_runs_are_those_of_pycocotools() {
        let golden: Value = serde_json::from_str(include_str!("testdata/rle.json")).unwrap();
        let cases = golden["cases"].as_array().unwrap();
        assert!(cases.len() >= 8);
        for case in cases {
            let from_text: Rle = serde_json::from_value(case["compressed"].clone()).unwrap();
            let from_runs: Rle = serde_json::from_value(case["uncompressed"].clone()).unwrap();
            assert_eq!(from_text, from_runs, "{case}");
            assert_eq!(from_runs.to_text(), case["compressed"]["counts"].as_str().unwrap(), "{case}");
            assert_eq!(from_text.area(), case["area"].as_u64().unwrap(), "{case}");
            let rows: Vec<&str> =
                case["rows"].as_array().unwrap().iter().map(|row| row.as_str().unwrap()).collect();
            let mask =
                Mask::from_fn(rows.len(), rows[0].len(), |row, column| rows[row].as_bytes()[column] == b'#');
            assert_eq!(from_text.to_mask(rows.len(), rows[0].len()).unwrap(), mask, "{case}");
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        assert_eq!(
            Rle::from_runs(2, 2, vec![1, 2]).unwrap_err().to_string(),
            "the runs cover 3 pixels, but 2x2 has 4"
        );
        assert_eq!(
            Rle::from_runs(1 << 40, 1 << 40, Vec::new()).unwrap_err().to_string(),
            "1099511627776x1099511627776 pixels are too many"
        );
        assert_eq!(
            error((2, 2), "4 "),
            "character 1 of the compressed counts is ` `, expected one of `0` to `o`"
        );
        assert_eq!(error((2, 2), "P"), "the compressed counts end within a number");
        assert_eq!(error((2, 2), "O"), "length 0 of the compressed counts is -1");
        assert!(error((2, 2), &"o".repeat(100)).starts_with("length 0 of the compressed counts is "));
        assert_eq!(
            Rle::of(&Mask::from_fn(2, 2, |_, _| true)).to_mask(2, 3).unwrap_err().to_string(),
            "it is 2x2 pixels, the image 3x2"
        );
        let polygon = serde_json::from_str::<Rle>(r#"{"size": [2, 2], "counts": [-1, 5]}"#);
        assert!(polygon.is_err());
    }

    #[test]
    fn a_claimed_size_takes_no_memory() {
        let huge = Rle::from_runs(60_000, 70_000, vec![4_200_000_000]).unwrap();
        assert!(huge.to_mask(4, 4).is_err());
    }

    proptest! {
        #[test]
        fn masks_survive_both_ways(height in 1_usize..9, width in 1_usize..9, bits: u64, more: u64) {
            let mask = Mask::from_fn(height, width, |row, column| {
                let at = row * width + column;
                (if at < 64 { bits >> at } else { more >> (at - 64) }) & 1 == 1
            });
            let rle = Rle::of(&mask);
            prop_assert_eq!(&rle.to_mask(height, width).unwrap(), &mask);
            prop_assert_eq!(&Rle::from_text(height, width, &rle.to_text()).unwrap(), &rle);
            prop_assert_eq!(rle.area(), mask.area());
        }

        #[test]
        fn arbitrary_texts_are_read_or_refused(text in "[0-o]{0,40}", height in 0_usize..400, width in 0_usize..400) {
            if let Ok(rle) = Rle::from_text(height, width, &text) {
                prop_assert_eq!(rle.to_mask(height, width).unwrap().area(), rle.area());
            }
        }
    }
}
