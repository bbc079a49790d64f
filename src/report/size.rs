//! Numbers for people.

/// Bytes in decimal units, as disks are sold: `352.6 MB`.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    if n < 1000 {
        return format!("{n} B");
    }
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 999.95 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// How much of a whole: `1.2 GB of 3.2 GB`.
pub fn progress(done: u64, total: u64) -> String {
    format!("{} of {}", bytes(done), bytes(total))
}

/// A compression ratio: `7.9×`.
pub fn ratio(value: f64) -> String {
    format!("{value:.1}×")
}

/// A measured quantity in five digits: `0.0041072`, `12.346`, `1.2346e9`.
pub fn number(value: f64) -> String {
    let magnitude = value.abs();
    if magnitude == 0.0 || !value.is_finite() {
        return format!("{value}");
    }
    if !(1e-4..1e6).contains(&magnitude) {
        return format!("{value:.4e}");
    }
    let decimals = (4 - magnitude.log10().floor() as i32).max(0) as usize;
    format!("{value:.decimals$}")
}

/// The first digits of a digest.
pub fn shorten(digest: &str) -> String {
    digest.chars().take(12).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_have_five_digits() {
        let shown = [0.0, 1.0, 12.345_67, 0.004_107_2, 123_456.7, 1.0e6, 3.0e-9, -2.5].map(number);
        let expected = ["0", "1.0000", "12.346", "0.0041072", "123457", "1.0000e6", "3.0000e-9", "-2.5000"];
        assert_eq!(shown, expected);
        assert_eq!(number(f64::INFINITY), "inf");
    }

    #[test]
    fn sizes_are_short_and_round_up_into_the_next_unit() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(1000), "1.0 kB");
        assert_eq!(bytes(999_949), "999.9 kB");
        assert_eq!(bytes(999_950), "1.0 MB");
        assert_eq!(bytes(352_600_000), "352.6 MB");
    }
}
