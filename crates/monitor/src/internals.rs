//! The way of a client's bytes up to the command, for the fuzz targets.

use crate::commands;
use crate::framing::Splitter;
use crate::protocol::{self, OutOfBand};

/// Takes what a client may send: finds the texts in it, reads each as a request, and checks its arguments. Gives how many
/// requests could be carried out.
pub fn read_requests(bytes: &[u8]) -> usize {
    let mut splitter = Splitter::new();
    let texts = bytes.iter().filter_map(|byte| splitter.push(*byte)?.ok());
    let requests = texts.filter_map(|text| protocol::parse_request(&text, OutOfBand::On).1.ok());
    requests.filter(|request| commands::check(&request.command, request.band, &request.arguments).is_ok()).count()
}
