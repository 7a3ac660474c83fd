//! Scales: where a value lies, and which values an axis names. For the screen and the page.

use dunlin::units::{format_seconds, format_size};

/// An axis from `min` to `max`, with the values it names.
#[derive(Debug, Clone, PartialEq)]
pub struct Scale {
    min: f64,
    max: f64,
    is_log: bool,
    pub ticks: Vec<(f64, String)>,
}

impl Scale {
    /// From 0 to `max` seconds, the end being where the data end.
    pub fn time(max: f64) -> Self {
        let max = max.max(1e-4);
        let step = nice_step(max / 6.0);
        let ticks = multiples(step, max).map(|at| (at, time_label(at, step, max))).collect();
        Self { min: 0.0, max, is_log: false, ticks }
    }

    /// From 0 to a round number of bytes above `max`, in one unit; `per` is put behind the unit.
    pub fn bytes(max: f64, per: &str) -> Self {
        let max = max.clamp(1.0, 1e19);
        let (unit, name) = unit(max);
        let step = nice_step(max / unit / 4.0);
        let top = (max / unit / step).ceil().max(1.0) * step;
        let label = |at: f64| format!("{} {name}{per}", decimal(at, step));
        let ticks = multiples(step, top).map(|at| (at * unit, label(at))).collect();
        Self { min: 0.0, max: top * unit, is_log: false, ticks }
    }

    /// From 0 to 1, in percent.
    pub fn ratio() -> Self {
        let ticks = (0..=4u32).map(|n| (f64::from(n) / 4.0, format!("{} %", n * 25))).collect();
        Self { min: 0.0, max: 1.0, is_log: false, ticks }
    }

    /// Powers of ten around `min` to `max` seconds.
    pub fn log_seconds(min: f64, max: f64) -> Self {
        let low = min.clamp(1e-6, 1e8).log10().floor();
        let high = max.clamp(1e-5, 1e9).log10().ceil().max(low + 1.0);
        let every = ((high - low) / 6.0).ceil().max(1.0);
        let powers = multiples(every, high - low).map(|n| 10f64.powf(low + n));
        let ticks = powers.map(|at| (at, power_label(at))).collect();
        Self { min: low, max: high, is_log: true, ticks }
    }

    /// From 0 to a round number of seconds that is at least `max`: an axis that seldom changes while time goes on.
    pub fn growing_time(max: f64) -> Self {
        const STEPS: [f64; 12] = [1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 1800.0];
        let hours = || (max / 3600.0).ceil().max(1.0) * 3600.0;
        let top = STEPS.into_iter().find(|step| *step >= max).unwrap_or_else(hours);
        let ticks = (0..=2u32).map(|n| top / 2.0 * f64::from(n));
        Self {
            min: 0.0,
            max: top,
            is_log: false,
            ticks: ticks.map(|at| (at, time_label(at, top / 2.0, top))).collect(),
        }
    }

    /// Its ends; of a logarithmic one their logarithms.
    pub fn bounds(&self) -> [f64; 2] {
        [self.min, self.max]
    }

    /// Where a value lies: 0 at the start, 1 at the end.
    pub fn place(&self, value: f64) -> f64 {
        let value = if self.is_log { value.max(1e-12).log10() } else { value };
        ((value - self.min) / (self.max - self.min)).clamp(0.0, 1.0)
    }
}

/// 1, 2 or 5 times a power of ten, at least `rough`.
fn nice_step(rough: f64) -> f64 {
    let power = 10f64.powf(rough.max(1e-9).log10().floor());
    let times = [1.0, 2.0, 5.0, 10.0].into_iter().find(|times| times * power >= rough * 0.999_999);
    times.unwrap_or(10.0) * power
}

fn multiples(step: f64, max: f64) -> impl Iterator<Item = f64> {
    let count = (max / step + 1e-6).floor().clamp(0.0, 50.0) as u32;
    (0..=count).map(move |n| f64::from(n) * step)
}

/// A number with as many decimals as its step has.
fn decimal(value: f64, step: f64) -> String {
    let decimals = (-(step + step * 1e-9).log10().floor()).clamp(0.0, 6.0) as usize;
    format!("{value:.decimals$}")
}

fn time_label(at: f64, step: f64, max: f64) -> String {
    if max < 0.2 {
        format!("{} ms", decimal(at * 1e3, step * 1e3))
    } else if max < 300.0 {
        format!("{} s", decimal(at, step))
    } else if max < 18_000.0 {
        format!("{} min", decimal(at / 60.0, step / 60.0))
    } else {
        format!("{} h", decimal(at / 3600.0, step / 3600.0))
    }
}

fn power_label(at: f64) -> String {
    if at < 0.9e-3 {
        format!("{:.0} µs", at * 1e6)
    } else if at < 0.9 {
        format!("{:.0} ms", at * 1e3)
    } else {
        format!("{at:.0} s")
    }
}

fn unit(max: f64) -> (f64, &'static str) {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut scale = 1.0;
    for name in UNITS {
        if max < scale * 1024.0 {
            return (scale, name);
        }
        scale *= 1024.0;
    }
    (scale / 1024.0, "EiB")
}

/// Bytes a second, for people.
pub fn rate(bytes: f64) -> String {
    format!("{}/s", format_size(bytes.clamp(0.0, 1.8e19) as u64))
}

/// A downtime, for people.
pub fn span(time: f64) -> String {
    format_seconds(time.max(0.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(scale: &Scale) -> Vec<&str> {
        scale.ticks.iter().map(|(_, label)| label.as_str()).collect()
    }

    #[test]
    fn what_axes_name() {
        assert_eq!(labels(&Scale::time(0.94)), ["0.0 s", "0.2 s", "0.4 s", "0.6 s", "0.8 s"]);
        assert_eq!(labels(&Scale::time(0.05)), ["0 ms", "10 ms", "20 ms", "30 ms", "40 ms", "50 ms"]);
        assert_eq!(labels(&Scale::bytes(1.3e9, "/s")), ["0.0 GiB/s", "0.5 GiB/s", "1.0 GiB/s", "1.5 GiB/s"]);
        assert_eq!(labels(&Scale::bytes(0.0, "")), ["0.0 B", "0.5 B", "1.0 B"]);
        assert_eq!(labels(&Scale::log_seconds(0.0011, 0.3)), ["1 ms", "10 ms", "100 ms", "1 s"]);
        assert_eq!(labels(&Scale::ratio()), ["0 %", "25 %", "50 %", "75 %", "100 %"]);
    }

    #[test]
    fn whatever_a_file_says() {
        for max in [0.0, 1e-300, 1e300, f64::INFINITY, 5e19] {
            for scale in [Scale::time(max.min(1e12)), Scale::bytes(max, "/s"), Scale::log_seconds(max, max)] {
                assert!(!scale.ticks.is_empty() && scale.ticks.len() < 60, "{max}: {scale:?}");
                assert!((0.0..=1.0).contains(&scale.place(max)), "{max}: {scale:?}");
            }
        }
    }

    #[test]
    fn places() {
        let scale = Scale::log_seconds(0.001, 1.0);
        assert!((scale.place(0.001) - 0.0).abs() < 1e-9 && (scale.place(1.0) - 1.0).abs() < 1e-9);
        assert!((scale.place(0.0316) - 0.5).abs() < 1e-3);
        assert_eq!(scale.place(0.0), 0.0);
    }
}
