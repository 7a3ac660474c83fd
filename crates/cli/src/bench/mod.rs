//! `dunlin bench`: what parts of the engine take, each beside its physical limit measured in the same run.

mod bitmap;

use anyhow::Result;
use serde_json::{Value, json};

use crate::Outcome;
use crate::args::Bench;
use crate::connection;
use crate::print::{Align, table};
use crate::terminal;

pub fn bench(what: &Bench) -> Result<Outcome> {
    let (measured, json) = match what {
        Bench::Bitmap(args) => (bitmap::measure(args), args.json),
    };
    terminal::out(&if json { connection::pretty(&measured.json()) } else { measured.text() })?;
    Ok(Outcome::Success)
}

/// A table of measurements.
#[derive(Debug, Default)]
struct Measured {
    rows: Vec<Row>,
}

/// One thing measured several times.
#[derive(Debug)]
struct Row {
    what: String,
    /// Milliseconds, in order.
    milliseconds: Vec<f64>,
}

impl Row {
    /// The least, the median and the most.
    fn spread(&self) -> [f64; 3] {
        let at = |index: usize| self.milliseconds.get(index).copied().unwrap_or(f64::NAN);
        [at(0), at(self.milliseconds.len() / 2), at(self.milliseconds.len().saturating_sub(1))]
    }
}

impl Measured {
    fn add(&mut self, what: impl Into<String>, mut milliseconds: Vec<f64>) {
        milliseconds.sort_by(f64::total_cmp);
        self.rows.push(Row { what: what.into(), milliseconds });
    }

    fn text(&self) -> String {
        let rows: Vec<Vec<String>> = self
            .rows
            .iter()
            .map(|row| {
                let [least, median, most] = row.spread();
                vec![row.what.clone(), format!("{median:.3}"), format!("{least:.3}"), format!("{most:.3}")]
            })
            .collect();
        table(Align::Left, &["", "median ms", "min", "max"], &rows)
    }

    fn json(&self) -> Value {
        let rows = self.rows.iter().map(|row| {
            let [least, median, most] = row.spread();
            json!({
                "what": row.what,
                "runs": row.milliseconds.len(),
                "median_milliseconds": median,
                "minimum_milliseconds": least,
                "maximum_milliseconds": most,
            })
        });
        rows.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        let mut measured = Measured::default();
        measured.add("a thing", vec![3.0, 1.0, 2.0]);
        assert!(measured.text().contains("a thing  2.000      1.000  3.000"), "{}", measured.text());
        let json = measured.json();
        assert_eq!((&json[0]["median_milliseconds"], &json[0]["runs"]), (&json!(2.0), &json!(3)));
    }
}
