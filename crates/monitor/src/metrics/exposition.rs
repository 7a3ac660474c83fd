//! Prometheus's text format, version 0.0.4: families of samples, with their help and type.

use std::fmt::Write;

/// What a scraper may do with a family's figures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Type {
    /// Only grows, until the next migration begins.
    Counter,
    /// Goes up and down.
    Gauge,
}

/// The text in the making.
#[derive(Debug, Default)]
pub(super) struct Text(String);

impl Text {
    /// Begins a family: its samples are written by what this gives. A family without samples is left out.
    pub(super) fn family<'a>(&'a mut self, name: &'a str, kind: Type, help: &'a str) -> Family<'a> {
        Family { text: self, name, kind, help, begun: false }
    }

    pub(super) fn finish(self) -> String {
        self.0
    }
}

/// One family.
#[derive(Debug)]
pub(super) struct Family<'a> {
    text: &'a mut Text,
    name: &'a str,
    kind: Type,
    help: &'a str,
    begun: bool,
}

impl Family<'_> {
    /// Adds a sample.
    pub(super) fn sample(&mut self, labels: &[(&str, &str)], value: f64) -> &mut Self {
        let Self { text: Text(text), name, .. } = self;
        if !self.begun {
            self.begun = true;
            let kind = match self.kind {
                Type::Counter => "counter",
                Type::Gauge => "gauge",
            };
            // Writing to a string does not fail.
            let _ = writeln!(text, "# HELP {name} {}\n# TYPE {name} {kind}", escaped(self.help, Quote::No));
        }
        text.push_str(name);
        for (n, (label, value)) in labels.iter().enumerate() {
            let before = if n == 0 { '{' } else { ',' };
            let _ = write!(text, "{before}{label}=\"{}\"", escaped(value, Quote::Yes));
        }
        if !labels.is_empty() {
            text.push('}');
        }
        let _ = writeln!(text, " {}", number(value));
        self
    }

    /// Adds a sample that is a count or bytes.
    pub(super) fn count(&mut self, labels: &[(&str, &str)], value: u64) -> &mut Self {
        // Prometheus has nothing but floating point: from 2^53 on it rounds, whatever is written here.
        self.sample(labels, value as f64)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Quote {
    Yes,
    No,
}

fn escaped(text: &str, quote: Quote) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '"' if quote == Quote::Yes => out.push_str("\\\""),
            // Some readers take it for the end of a line.
            '\r' => out.push(' '),
            other => out.push(other),
        }
    }
    out
}

fn number(value: f64) -> String {
    if value.is_nan() {
        "NaN".to_owned()
    } else if value.is_infinite() {
        if value > 0.0 { "+Inf" } else { "-Inf" }.to_owned()
    } else {
        value.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_format() {
        let mut text = Text::default();
        text.family("a_total", Type::Counter, "back\\slash\nline \"quote\"")
            .sample(&[], 0.5)
            .count(&[("x", "1"), ("y", "q\"uo\\te\nline\rend")], 1 << 40);
        text.family("b", Type::Gauge, "left out");
        text.family("c", Type::Gauge, "odd").sample(&[], f64::INFINITY).sample(&[], f64::NAN).sample(&[], 1e300);
        let text = text.finish();
        let wanted = "# HELP a_total back\\\\slash\\nline \"quote\"\n# TYPE a_total counter\na_total 0.5\n\
                      a_total{x=\"1\",y=\"q\\\"uo\\\\te\\nline end\"} 1099511627776\n# HELP c odd\n# TYPE c gauge\nc +Inf\nc NaN\nc 1";
        assert!(text.starts_with(wanted), "{text}");
    }
}
