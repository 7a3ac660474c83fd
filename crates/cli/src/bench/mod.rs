//! `dunlin bench`: what parts of the engine take, each beside its physical limit measured in the same run.

mod autoconverge;
mod bitmap;
mod compression;
mod convergence;
mod copy;
mod demos;
mod downtime;
mod kinds;
mod machine;
mod peer;
mod subject;
mod throughput;

use anyhow::{Context, Result};
use dunlin_machines::Backing;
use serde_json::{Map, Value, json};

use crate::Outcome;
use crate::args::Bench;
use crate::connection;
use crate::memory_check::{self, Use};
use crate::terminal;
use dunlin_monitor::text::{Align, table};

pub fn bench(what: &Bench) -> Result<Outcome> {
    let (measured, json) = match what {
        Bench::Autoconverge(args) => (autoconverge::measure(args)?, args.json),
        Bench::Bitmap(args) => (bitmap::measure(args)?, args.json),
        Bench::Compression(args) => (compression::measure(args)?, args.json),
        Bench::Convergence(args) => (convergence::measure(args)?, args.json),
        Bench::Downtime(args) => (downtime::measure(args)?, args.json),
        Bench::Kinds(args) => (kinds::measure(args)?, args.json),
        Bench::Throughput(args) => (throughput::measure(args)?, args.json),
        Bench::Peer(args) => return peer::peer(args),
        Bench::Receiver(args) => return subject::receiver(args),
    };
    terminal::out(&if json { connection::pretty(&measured.json()) } else { measured.text() })?;
    Ok(Outcome::Success)
}

/// Checks that what a measurement will fill is available.
fn check_memory(bytes: u64, backing: Backing, force: bool) -> Result<()> {
    let who = "this measurement";
    let wanted = Use { who, ram_bytes: bytes, filled_bytes: Some(bytes), backing, processes: 2 };
    memory_check::check(wanted, force).context("could not measure")
}

/// What is measured of each thing.
#[derive(Debug)]
struct Column {
    heading: &'static str,
    /// Its name in JSON.
    key: &'static str,
    /// From JSON's unit to the heading's.
    scale: f64,
    decimals: usize,
}

/// A table of measurements.
#[derive(Debug)]
struct Measured {
    columns: &'static [Column],
    rows: Vec<Row>,
}

/// One thing measured several times.
#[derive(Debug)]
struct Row {
    what: String,
    /// For each column the samples, in order; none where the column says nothing of this row.
    samples: Vec<Vec<f64>>,
}

/// The least, the median and the most of what is in order.
fn spread(samples: &[f64]) -> Option<[f64; 3]> {
    let (below, above) = (samples.get(samples.len().saturating_sub(1) / 2)?, samples.get(samples.len() / 2)?);
    Some([*samples.first()?, f64::midpoint(*below, *above), *samples.last()?])
}

impl Measured {
    fn new(columns: &'static [Column]) -> Self {
        Self { columns, rows: Vec::new() }
    }

    /// Adds a row: for each column its samples.
    fn add(&mut self, what: impl Into<String>, mut samples: Vec<Vec<f64>>) {
        samples.iter_mut().for_each(|samples| samples.sort_by(f64::total_cmp));
        self.rows.push(Row { what: what.into(), samples });
    }

    fn text(&self) -> String {
        let cell = |(column, samples): (&Column, &Vec<f64>)| {
            let Some([least, median, most]) = spread(samples) else { return "-".to_owned() };
            let shown = |value: f64| format!("{:.*}", column.decimals, value * column.scale);
            let [least, median, most] = [least, median, most].map(shown);
            if least == most { median } else { format!("{median} ({least}-{most})") }
        };
        let row = |row: &Row| {
            let cells = self.columns.iter().zip(&row.samples).map(cell);
            std::iter::once(row.what.clone()).chain(cells).collect()
        };
        let rows: Vec<Vec<String>> = self.rows.iter().map(row).collect();
        let header: Vec<&str> = std::iter::once("").chain(self.columns.iter().map(|column| column.heading)).collect();
        let runs = self.rows.iter().flat_map(|row| row.samples.first()).map(Vec::len).max().unwrap_or(0);
        format!("{}median (min-max) of {runs} runs\n", table(Align::Left, &header, &rows))
    }

    fn json(&self) -> Value {
        let row = |row: &Row| {
            let mut object = Map::new();
            object.insert("what".to_owned(), json!(row.what));
            for (column, samples) in self.columns.iter().zip(&row.samples) {
                let spread = spread(samples).map(|[least, median, most]| {
                    json!({"runs": samples.len(), "median": median, "minimum": least, "maximum": most})
                });
                object.insert(column.key.to_owned(), spread.into());
            }
            Value::from(object)
        };
        self.rows.iter().map(row).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        const COLUMNS: &[Column] = &[
            Column { heading: "ms", key: "seconds", scale: 1e3, decimals: 1 },
            Column { heading: "of it", key: "of_it", scale: 1.0, decimals: 2 },
        ];
        let mut measured = Measured::new(COLUMNS);
        measured.add("a thing", vec![vec![0.003, 0.001, 0.002], Vec::new()]);
        assert!(measured.text().contains("a thing  2.0 (1.0-3.0)  -"), "{}", measured.text());
        let json = measured.json();
        assert_eq!((&json[0]["seconds"]["median"], &json[0]["seconds"]["runs"]), (&json!(0.002), &json!(3)));
        assert!(json[0]["of_it"].is_null());
        assert_eq!(spread(&[1.0, 2.0, 4.0, 9.0]), Some([1.0, 3.0, 9.0]));
    }
}
