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

/// A time: `   22.7 ms`.
pub fn time(time: f64) -> String {
    let text = format_seconds(time);
    let text = if text.chars().count() > TIME { format!("{:.1} h", time / 3600.0) } else { text };
    format!("{text:>TIME$}")
}

/// A time that grows, which does not change its unit while one looks: `    0.79 s`.
pub fn elapsed(so_far: f64) -> String {
    if so_far < 119.995 { format!("{:>TIME$}", format!("{so_far:.2} s")) } else { time(so_far) }
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
        for span in [0.0, 0.0123, 0.9999, 1.0, 119.99, 3600.0, 99_999.0, f64::INFINITY] {
            assert_eq!(time(span).chars().count(), TIME, "{}", time(span));
        }
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
}
