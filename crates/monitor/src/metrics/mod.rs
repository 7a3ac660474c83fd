//! A migration's figures for Prometheus: text made of a report, and a small HTTP server that gives it.
//!
//! Units are Prometheus's base units, which are ours too: bytes, seconds and ratios. `exposition` writes the format,
//! `families` says which figures there are, `http` reads requests, `server` has the sockets.

mod exposition;
mod families;
mod http;
mod server;

pub use families::exposition;
pub use server::{MetricsError, MetricsServer, ReportSource};
