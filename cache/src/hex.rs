//! Hexadecimal text for digests and byte strings.
//!
//! `blake3::Hash` serializes itself as an array of 32 numbers; records and artifacts are read by people, so they
//! use `#[serde(with = "hex_digest")]` instead.

/// Serializes a `blake3::Hash` as 64 lower-case hexadecimal digits, for `#[serde(with = "hex_digest")]`.
pub mod hex_digest {
    use serde::{Deserialize, Deserializer, Serializer};

    /// Writes the digest as text.
    pub fn serialize<S: Serializer>(digest: &blake3::Hash, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(digest.to_hex().as_str())
    }

    /// Reads 64 hexadecimal digits.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<blake3::Hash, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        super::parse_digest(&text).map_err(serde::de::Error::custom)
    }

    /// The same for `Vec<blake3::Hash>`.
    pub mod list {
        use serde::{Deserialize, Deserializer, Serializer};

        /// Writes each digest as text.
        pub fn serialize<S: Serializer>(digests: &[blake3::Hash], serializer: S) -> Result<S::Ok, S::Error> {
            serializer.collect_seq(digests.iter().map(|digest| digest.to_hex().to_string()))
        }

        /// Reads a list of 64-digit texts.
        pub fn deserialize<'de, D: Deserializer<'de>>(
            deserializer: D,
        ) -> Result<Vec<blake3::Hash>, D::Error> {
            let texts = Vec::<String>::deserialize(deserializer)?;
            texts
                .iter()
                .map(|text| super::super::parse_digest(text).map_err(serde::de::Error::custom))
                .collect()
        }
    }
}

/// Parses exactly 64 lower-case hexadecimal digits, so that one digest has one spelling.
pub(crate) fn parse_digest(text: &str) -> Result<blake3::Hash, String> {
    let bytes = decode(text).ok_or_else(|| format!("not a lower-case hexadecimal digest: `{text}`"))?;
    let bytes: [u8; 32] =
        bytes.try_into().map_err(|_| format!("a digest has 64 hexadecimal digits, got {}", text.len()))?;
    Ok(bytes.into())
}

/// Writes two lower-case digits per byte.
pub(crate) fn encode(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        text.push(DIGITS[usize::from(byte >> 4)] as char);
        text.push(DIGITS[usize::from(byte & 15)] as char);
    }
    text
}

/// Reads what [`encode`] writes and nothing else.
pub(crate) fn decode(text: &str) -> Option<Vec<u8>> {
    let (pairs, []) = text.as_bytes().as_chunks::<2>() else { return None };
    pairs.iter().map(|[high, low]| Some(digit(*high)? << 4 | digit(*low)?)).collect()
}

fn digit(character: u8) -> Option<u8> {
    match character {
        b'0'..=b'9' => Some(character - b'0'),
        b'a'..=b'f' => Some(character - b'a' + 10),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_round_trip() {
        let bytes: Vec<u8> = (0..=255).collect();
        assert_eq!(decode(&encode(&bytes)), Some(bytes));
        assert_eq!(decode(""), Some(Vec::new()));
    }

    #[test]
    fn rejects_other_spellings() {
        for text in ["a", "AB", "0x", "zz", "é1"] {
            assert_eq!(decode(text), None, "{text}");
        }
        let digest = blake3::hash(b"x").to_hex().to_string();
        assert_eq!(parse_digest(&digest), Ok(blake3::hash(b"x")));
        assert!(parse_digest(&digest.to_uppercase()).is_err());
        assert!(parse_digest(&digest[..62]).is_err());
        assert!(parse_digest(&format!("{digest}00")).is_err());
    }
}
