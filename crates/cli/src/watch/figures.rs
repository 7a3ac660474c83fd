//! Figures of a width that does not change, so that nothing on the screen moves but the digits.

use dunlin::units::format_seconds;

/// How wide [`time`] is.
pub const TIME: usize = 10;

/// A size: `  16.0 MiB`, `     512 B`.
pub fn size(bytes: u64) -> String {
    let (number, unit) = scaled(bytes);
    format!("{:>10}", format!("{number} {unit}"))
}

/// A rate: `  16.0 MiB/s`.
pub fn rate(bytes: f64) -> String {
    let (number, unit) = scaled(bytes.clamp(0.0, 1.8e19) as u64);
    format!("{:>12}", format!("{number} {unit}/s"))
}

fn scaled(bytes: u64) -> (String, &'static str) {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return (bytes.to_string(), "B");
    }
    let mut value = bytes as f64;
    let mut unit = "B";
    for next in UNITS {
        unit = next;
        value /= 1024.0;
        // What would be printed as 1024.0 belongs to the next unit.
        if value < 1023.95 {
            break;
        }
    }
    (format!("{value:.1}"), unit)
}

/// From here on a time is shown as a clock does: what people write out would not fit.
const CLOCK_SECONDS: f64 = 119.995;
/// The longest that fits.
const LONGEST_SECONDS: f64 = 9999.0 * 3600.0;

/// A time: `   22.7 ms`, `     10:22`, `   3:00:00`.
pub fn time(time: f64) -> String {
    let text = match time {
        _ if !time.is_finite() || time < CLOCK_SECONDS => format_seconds(time),
        ..LONGEST_SECONDS => clock(time.round() as u64),
        _ => "> 9999 h".to_owned(),
    };
    format!("{text:>TIME$}")
}

fn clock(seconds: u64) -> String {
    let (minutes, seconds) = (seconds / 60, seconds % 60);
    match (minutes / 60, minutes % 60) {
        (0, minutes) => format!("{minutes}:{seconds:02}"),
        (hours, minutes) => format!("{hours}:{minutes:02}:{seconds:02}"),
    }
}

/// A time that grows, which changes its unit but once, into a clock's: `    0.79 s`.
pub fn elapsed(so_far: f64) -> String {
    if so_far < CLOCK_SECONDS { format!("{:>TIME$}", format!("{so_far:.2} s")) } else { time(so_far) }
}

/// A part of a whole: ` 62.0 %`.
pub fn percent(part: f64) -> String {
    // 100.0 % is what is complete, not what rounds to it.
    let tenths = (part * 1000.0).floor().clamp(0.0, 1000.0) / 10.0;
    format!("{tenths:>5.1} %")
}

/// A count in eight places: `  137788`, `1234.5 M`.
pub fn count(count: u64) -> String {
    if count < 100_000_000 { format!("{count:>8}") } else { format!("{:>6.1} M", count as f64 / 1e6) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widths_do_not_change() {
        for shift in 0..64 {
            for bytes in [1u64 << shift, (1 << shift) - 1, (1 << shift) + (1 << shift) / 2] {
                assert_eq!(size(bytes).chars().count(), 10, "{}", size(bytes));
                assert_eq!(rate(bytes as f64).chars().count(), 12, "{}", rate(bytes as f64));
            }
        }
        for span in [0.0, 0.0123, 0.9999, 1.0, 119.99, 622.0, 3600.0, 99_999.0, LONGEST_SECONDS - 1.0, 1e300] {
            assert_eq!(time(span).chars().count(), TIME, "{}", time(span));
            assert_eq!(elapsed(span).chars().count(), TIME, "{}", elapsed(span));
        }
        assert_eq!(time(f64::INFINITY).chars().count(), TIME);
        for part in [0.0, 0.5, 0.99999, 1.0, 7.0] {
            assert_eq!(percent(part).chars().count(), 7, "{}", percent(part));
        }
        assert_eq!(percent(0.99999), " 99.9 %");
        assert_eq!(size(1023), "    1023 B");
        assert_eq!(size((1 << 30) - 1), "   1.0 GiB");
        assert_eq!(rate(512.0), "     512 B/s");
        assert_eq!(count(137_788), "  137788");
        assert_eq!(count(1_234_500_000), "1234.5 M");
    }

    #[test]
    fn the_clock_goes_on() {
        for (seconds, text) in [
            (0.79, "0.79 s"),
            (59.0, "59.00 s"),
            (119.99, "119.99 s"),
            (119.996, "2:00"),
            (622.0, "10:22"),
            (3599.0, "59:59"),
            (3599.6, "1:00:00"),
            (3.0 * 3600.0, "3:00:00"),
            (100.0 * 3600.0 + 61.0, "100:01:01"),
            (LONGEST_SECONDS, "> 9999 h"),
        ] {
            assert_eq!(elapsed(seconds).trim_start(), text);
        }
        assert_eq!(time(622.0).trim_start(), "10:22");
        // From second to second, and never back to what was shown before.
        let mut shown = std::collections::BTreeSet::new();
        assert!((0..=4000).all(|second| shown.insert(elapsed(f64::from(second)))));
    }
}
