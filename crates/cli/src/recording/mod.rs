//! Recordings of migrations: a line of JSON for each look at the report, so that a file that was cut off is readable.
//!
//! The first line says what the file is. Each other line has the time since the recording began and the report. A
//! report lists its rounds; here each is written once, in the line after it ended, so that a file's size does not go
//! with the square of the migration's length.

mod reader;
mod writer;

pub use reader::{Recording, read};
pub use writer::{Recorder, interval};

use serde::{Deserialize, Serialize};

/// What the first line calls the file.
const SCHEMA: &str = "dunlin-recording";
/// The version that is written, and the only one that is read.
const VERSION: u32 = 1;

/// The first line.
#[derive(Debug, Clone, Deserialize, Serialize)]
pub struct Header {
    schema: String,
    version: u32,
    /// The version of dunlin that wrote it.
    pub dunlin: String,
    /// When the recording began.
    pub began: String,
    /// Where the machine is spoken to.
    pub machine: String,
}
