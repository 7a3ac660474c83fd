//! Quantities as people write them: `2G`, `300M/s`, `1.5GiB`, `250ms`.
//!
//! As in QEMU, `K`, `M`, `G` and `T` are powers of 1024; so are `KiB` to `TiB`. `KB` to `TB` are powers of 1000.

use std::time::Duration;

/// A quantity that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not {expected}")]
pub struct QuantityError {
    /// What was given.
    pub text: String,
    /// What it should have been, with examples.
    pub expected: &'static str,
}

const SIZE: &str = "a size in bytes, such as 4096, 512M, 2G or 1.5GiB";
const RATE: &str = "a rate in bytes a second, such as 50M/s, 1.2G/s or 0";
const DURATION: &str = "a duration, such as 300ms, 2s or 1.5min";

fn scaled(text: &str, expected: &'static str, scale: impl Fn(&str) -> Option<f64>) -> Result<f64, QuantityError> {
    let error = || QuantityError { text: text.to_owned(), expected };
    let trimmed = text.trim();
    let split = trimmed.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(trimmed.len());
    let (number, suffix) = trimmed.split_at(split);
    let number: f64 = number.parse().map_err(|_| error())?;
    let value = number * scale(suffix.trim()).ok_or_else(error)?;
    if value.is_finite() && value <= u64::MAX as f64 { Ok(value) } else { Err(error()) }
}

fn size_scale(suffix: &str) -> Option<f64> {
    const SUFFIXES: [(&str, i32); 4] = [("k", 1), ("m", 2), ("g", 3), ("t", 4)];
    let suffix = suffix.to_ascii_lowercase();
    if suffix.is_empty() || suffix == "b" {
        return Some(1.0);
    }
    SUFFIXES.iter().find_map(|(letter, power)| match suffix.strip_prefix(letter)? {
        "" | "ib" => Some(1024f64.powi(*power)),
        "b" => Some(1000f64.powi(*power)),
        _ => None,
    })
}

/// Reads a size in bytes.
///
/// # Errors
/// When it is not one.
pub fn parse_size(text: &str) -> Result<u64, QuantityError> {
    // Whole numbers keep all their digits, which a detour over floating point would not.
    let trimmed = text.trim();
    let (number, suffix) = trimmed.split_at(trimmed.find(|c: char| !c.is_ascii_digit()).unwrap_or(trimmed.len()));
    if let (Ok(number), Some(scale)) = (number.parse::<u64>(), size_scale(suffix.trim())) {
        let bytes = number.checked_mul(scale as u64);
        return bytes.ok_or_else(|| QuantityError { text: text.to_owned(), expected: SIZE });
    }
    match scaled(text, SIZE, size_scale)? {
        // Nothing, which often stands for no limit, is not meant by very little.
        bytes if bytes > 0.0 && bytes < 1.0 => Err(QuantityError { text: text.to_owned(), expected: SIZE }),
        bytes => Ok(bytes as u64),
    }
}

/// Reads a rate in bytes a second; `/s` may be left out.
///
/// # Errors
/// When it is not one.
pub fn parse_rate(text: &str) -> Result<u64, QuantityError> {
    let size = text.trim().strip_suffix("/s").unwrap_or(text);
    parse_size(size).map_err(|_| QuantityError { text: text.to_owned(), expected: RATE })
}

/// Reads a duration. A bare number counts `bare` units.
///
/// # Errors
/// When it is not one.
pub fn parse_duration(text: &str, bare: Duration) -> Result<Duration, QuantityError> {
    let seconds = scaled(text, DURATION, |suffix| match suffix {
        "" => Some(bare.as_secs_f64()),
        "ns" => Some(1e-9),
        "us" | "µs" => Some(1e-6),
        "ms" => Some(1e-3),
        "s" => Some(1.0),
        "min" => Some(60.0),
        _ => None,
    })?;
    Duration::try_from_secs_f64(seconds).map_err(|_| QuantityError { text: text.to_owned(), expected: DURATION })
}

/// A size for people: `512 B`, `1.50 GiB`.
pub fn format_size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = "B";
    for next in UNITS {
        unit = next;
        if value < 1024.0 || next == "TiB" {
            break;
        }
        value /= 1024.0;
    }
    if unit == "B" { format!("{bytes} B") } else { format!("{value:.2} {unit}") }
}

/// A time span for people: `12.3 ms`, `4.56 s`, `2 min 5 s`.
pub fn format_seconds(seconds: f64) -> String {
    if !seconds.is_finite() {
        "forever".to_owned()
    } else if seconds < 0.9995 {
        format!("{:.1} ms", seconds * 1e3)
    } else if seconds < 119.995 {
        format!("{seconds:.2} s")
    } else {
        let whole = seconds.round() as u64;
        format!("{} min {} s", whole / 60, whole % 60)
    }
}

/// A size to be read again, without loss: `64M`, `1G`, `1000`.
pub fn exact_size(bytes: u64) -> String {
    let scales = [("T", 40), ("G", 30), ("M", 20), ("K", 10)];
    let exact = scales.into_iter().find(|(_, shift)| bytes > 0 && bytes.trailing_zeros() >= *shift);
    exact.map_or_else(|| bytes.to_string(), |(letter, shift)| format!("{}{letter}", bytes >> shift))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("18446744073709551615", u64::MAX),
            ("18446744073709551615B", u64::MAX),
            ("18014398509481983K", u64::MAX - 1023),
            ("2G", 2 << 30),
            ("2g", 2 << 30),
            ("1.5GiB", 3 << 29),
            ("64KB", 64_000),
            ("1 M", 1 << 20),
            ("3B", 3),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "G", "1X", "-1", "1e3", "99999999T", "1.2.3", "2Gi", "nan", "0.5", "0.0001K"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn rates_and_durations() {
        assert_eq!(parse_rate("300M/s"), Ok(300 << 20));
        assert_eq!(parse_rate("1MB/s"), Ok(1_000_000));
        assert!(parse_rate("300M/h").is_err());
        let ms = Duration::from_millis(1);
        assert_eq!(parse_duration("300", ms), Ok(300 * ms));
        assert_eq!(parse_duration("1.5s", ms), Ok(1500 * ms));
        assert!(parse_duration("5 parsecs", ms).is_err());
    }

    #[test]
    fn spans_for_people() {
        for (span, text) in
            [(0.0, "0.0 ms"), (0.9994, "999.4 ms"), (1.0, "1.00 s"), (119.99, "119.99 s"), (125.2, "2 min 5 s")]
        {
            assert_eq!(format_seconds(span), text);
        }
        assert_eq!(format_seconds(f64::INFINITY), "forever");
    }

    #[test]
    fn sizes_for_people() {
        assert_eq!(format_size(1023), "1023 B");
        assert_eq!(format_size(1536), "1.50 KiB");
        assert_eq!(format_size(5 << 40), "5.00 TiB");
        for (bytes, text) in
            [(0, "0"), (1000, "1000"), (3 << 20, "3M"), (1 << 50, "1024T"), (u64::MAX, "18446744073709551615")]
        {
            assert_eq!(exact_size(bytes), text);
            assert_eq!(parse_size(text), Ok(bytes));
        }
    }
}
