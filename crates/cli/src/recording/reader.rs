//! Reading a recording. It may have been made by anyone.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use anyhow::{Context, Result, bail};
use dunlin::Report;
use serde::Deserialize;

use super::{Header, SCHEMA, VERSION};
use crate::series::{Identity, Series};

/// A line may be this long: a report of 255 channels and a thousand rounds has half a megabyte.
const MAX_LINE_BYTES: u64 = 16 << 20;
/// A file may be this long.
const MAX_FILE_BYTES: u64 = 1 << 30;

/// A migration that was recorded.
#[derive(Debug)]
pub struct Recording {
    pub header: Header,
    /// The last of the migrations in the file.
    pub series: Series,
    /// Looks at that migration.
    pub samples: u64,
    /// How many migrations the file has.
    pub migrations: u64,
    /// Its last line is not whole: whoever wrote it was ended.
    pub cut_off: bool,
}

#[derive(Debug, Deserialize)]
struct Sample {
    report: Report,
}

/// Reads the recording at `path`.
pub fn read(path: &Path) -> Result<Recording> {
    let name = path.display();
    let file = File::open(path).with_context(|| format!("could not open {name}"))?;
    read_from(file).with_context(|| format!("could not make anything of {name}"))
}

fn read_from(file: impl Read) -> Result<Recording> {
    let mut lines = Lines { reader: BufReader::new(file), number: 0, read: 0 };
    let first = lines.next_line()?;
    let header = header(&first)?;
    let mut recording = Recording { header, series: Series::default(), samples: 0, migrations: 0, cut_off: false };
    let mut migration: Option<Identity> = None;
    loop {
        let line = lines.next_line()?;
        if line.is_empty() {
            break;
        }
        let report = match serde_json::from_slice::<Sample>(&line) {
            Ok(sample) => sample.report,
            Err(_) if !line.ends_with(b"\n") => {
                recording.cut_off = true;
                break;
            }
            Err(error) => bail!("line {} is damaged, or of another version of dunlin: {error}", lines.number),
        };
        if !migration.is_some_and(|migration| migration.goes_on_in(&report)) {
            recording.migrations += 1;
            recording.samples = 0;
        }
        migration = Some(Identity::of(&report));
        recording.samples += 1;
        recording.series.push(report);
    }
    if recording.samples == 0 {
        bail!("it is a recording that has no sample: the migration had not begun when it ended");
    }
    Ok(recording)
}

fn header(line: &[u8]) -> Result<Header> {
    if line.is_empty() {
        bail!("it is empty");
    }
    let not_ours = "it is not a recording: dunlin migrate --record makes them";
    // The version comes first: headers of later ones may look different.
    let value: serde_json::Value = serde_json::from_slice(line).ok().context(not_ours)?;
    if value.get("schema").and_then(|schema| schema.as_str()) != Some(SCHEMA) {
        bail!("{not_ours}");
    }
    match value.get("version").and_then(serde_json::Value::as_u64) {
        Some(version) if version == u64::from(VERSION) => {}
        Some(version) => bail!("it is a recording of version {version}; this dunlin reads version {VERSION}"),
        None => bail!("{not_ours}"),
    }
    serde_json::from_value(value).context("the first line is damaged")
}

struct Lines<R> {
    reader: BufReader<R>,
    number: u64,
    read: u64,
}

impl<R: Read> Lines<R> {
    /// The next line with its end; nothing at the file's end.
    fn next_line(&mut self) -> Result<Vec<u8>> {
        let mut line = Vec::new();
        self.number += 1;
        (&mut self.reader).take(MAX_LINE_BYTES).read_until(b'\n', &mut line).context("could not read it")?;
        let length = line.len() as u64;
        if length == MAX_LINE_BYTES {
            bail!("line {} is longer than {MAX_LINE_BYTES} bytes, which no line of a recording is", self.number);
        }
        self.read += length;
        if self.read > MAX_FILE_BYTES {
            bail!("it is longer than {}, which is all that is read", dunlin::units::format_size(MAX_FILE_BYTES));
        }
        Ok(line)
    }
}

#[cfg(test)]
mod tests {
    use dunlin::report::Round;
    use dunlin::{GuestPlace, Side, Status};
    use serde_json::json;

    use super::super::Recorder;
    use super::*;

    fn report(seconds: f64, rounds: u32) -> Report {
        let mut report = Report::new(Side::Source, GuestPlace::RunningAtSource);
        report.status = Status::Active;
        report.total_seconds = seconds;
        report.rounds = (1..=rounds)
            .map(|number| Round {
                number,
                seconds: 0.1,
                ram_bytes: 1,
                transferred_bytes: 1,
                pages: Default::default(),
                dirty_bytes: 1,
                bandwidth_bytes_per_second: 1,
                dirty_bytes_per_second: 1,
                predicted_downtime_seconds: f64::INFINITY,
            })
            .collect();
        report
    }

    fn record(recorder: &mut Recorder, report: &Report) {
        recorder.record(&serde_json::to_value(report).unwrap(), report).unwrap();
    }

    #[test]
    fn what_is_written_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.jsonl");
        let mut recorder = Recorder::create(&path, "unix:/a").unwrap();
        for n in 0..10 {
            record(&mut recorder, &report(f64::from(n), n as u32));
        }
        let mut last = report(10.0, 12);
        last.status = Status::Completed;
        record(&mut recorder, &last);
        record(&mut recorder, &last);
        let recording = read(&path).unwrap();
        assert_eq!((recording.samples, recording.migrations, recording.cut_off), (11, 1, false));
        assert_eq!(recording.header.machine, "unix:/a");
        let numbers: Vec<u32> = recording.series.rounds().iter().map(|timed| timed.round.number).collect();
        assert_eq!(numbers, (1..=12).collect::<Vec<u32>>());
        assert_eq!(recording.series.latest().unwrap().status, Status::Completed);
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text.matches("\"number\":").count(), 12, "each round is written once");

        let again = Recorder::create(&path, "unix:/a").unwrap_err();
        assert!(format!("{again:#}").contains("exists already"), "{again:#}");
        // Another migration after it.
        record(&mut recorder, &report(0.5, 1));
        let recording = read(&path).unwrap();
        assert_eq!((recording.samples, recording.migrations), (1, 2));
        // Cut off at every byte of the last two lines: never an error once there is a sample.
        let bytes = std::fs::read(&path).unwrap();
        for end in bytes.len() - 1500..bytes.len() {
            let cut = read_from(&bytes[..end]).unwrap();
            assert_eq!(cut.cut_off, !(bytes[end - 1] == b'\n' || bytes[end] == b'\n'), "{end}");
        }
        recorder.discard();
        assert!(!path.exists());
    }

    #[test]
    fn what_is_no_recording() {
        let header = json!({"schema": "dunlin-recording", "version": 1, "dunlin": "0", "began": "", "machine": ""});
        let sample = json!({"seconds": 0, "report": report(1.0, 1)});
        let deep = "[".repeat(100_000);
        for (text, wanted) in [
            (String::new(), "it is empty"),
            ("\u{0}\u{1}\u{2}\n".to_owned(), "it is not a recording"),
            ("{\"schema\": \"other\", \"version\": 1}\n".to_owned(), "it is not a recording"),
            ("{\"schema\": \"dunlin-recording\", \"version\": 2}\n".to_owned(), "version 2"),
            ("{\"schema\": \"dunlin-recording\", \"version\": 1}\n".to_owned(), "the first line is damaged"),
            (format!("{header}\n"), "no sample"),
            (format!("{header}\n{{\"seconds\": 1, \"rep"), "no sample"),
            (format!("{header}\n{sample}\nnothing\n{sample}\n"), "line 3 is damaged"),
            (format!("{header}\n{sample}\n{deep}\n"), "line 3 is damaged"),
            (format!("{header}\n{{\"seconds\": 1, \"report\": {{\"side\": \"left\"}}}}\n"), "line 2 is damaged"),
        ] {
            let error = format!("{:#}", read_from(text.as_bytes()).unwrap_err());
            assert!(error.contains(wanted), "{text:.80}: {error}");
        }
        let endless = format!("{header}\n").into_bytes();
        let endless = endless.chain(std::io::repeat(b'x'));
        let error = format!("{:#}", read_from(endless).unwrap_err());
        assert!(error.contains("line 2 is longer"), "{error}");
        let lines = std::iter::repeat_n(format!("{sample}\n"), 50);
        let text = format!("{header}\n{}", lines.collect::<String>());
        assert_eq!(read_from(text.as_bytes()).unwrap().samples, 50);
    }
}
