//! The built-in guests, as a person chooses them.

use std::fmt;
use std::str::FromStr;

use dunlin::units::{parse_rate, parse_size};
use serde::{Deserialize, Serialize};

/// A bare-metal guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Payload {
    /// Each vCPU counts in a page of its own.
    Counter,
    /// Each vCPU writes one page after the other of its part of a region, again and again.
    Dirty {
        /// The region that all vCPUs share out, from 1 MiB on.
        working_set_bytes: u64,
        /// From one page written to the next.
        stride_bytes: u64,
        /// Bytes a second of all vCPUs together, 4096 a page; `None` as fast as they can.
        rate_bytes_per_second: Option<u64>,
    },
}

/// A payload that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("payload {text:?}: {problem}; write counter, or dirty:working-set=SIZE,stride=SIZE,rate=BYTES/s")]
pub struct PayloadError {
    /// What was given.
    pub text: String,
    /// What is wrong with it.
    pub problem: String,
}

/// The region where none is given.
const DEFAULT_WORKING_SET: u64 = 16 << 20;

impl FromStr for Payload {
    type Err = PayloadError;

    fn from_str(text: &str) -> Result<Self, PayloadError> {
        let error = |problem: String| PayloadError { text: text.to_owned(), problem };
        let (name, rest) = text.split_once(':').unwrap_or((text, ""));
        match name {
            "counter" if rest.is_empty() => return Ok(Self::Counter),
            "counter" => return Err(error("counter has no options".into())),
            "dirty" => {}
            _ => return Err(error(format!("there is no payload {name:?}"))),
        }
        let pages = |key: &str, value: &str| {
            let bytes = parse_size(value).map_err(|e| error(e.to_string()))?;
            let whole = bytes > 0 && bytes.is_multiple_of(4096);
            if whole { Ok(bytes) } else { Err(error(format!("{key}: {bytes} bytes are not whole pages of 4096"))) }
        };
        let (mut working_set_bytes, mut stride_bytes, mut rate) = (DEFAULT_WORKING_SET, 4096, None);
        for part in rest.split_terminator(',') {
            let (key, value) = part.split_once('=').ok_or_else(|| error(format!("{part:?} is not KEY=VALUE")))?;
            match key.trim() {
                "working-set" => working_set_bytes = pages(key, value)?,
                "stride" => stride_bytes = pages(key, value)?,
                "rate" if value == "max" => rate = None,
                "rate" => {
                    let bytes = parse_rate(value).map_err(|e| error(e.to_string()))?;
                    rate = Some(bytes).filter(|rate| *rate > 0);
                    if rate.is_none() {
                        return Err(error("a rate of 0: choose counter for a guest that dirties little".into()));
                    }
                }
                _ => return Err(error(format!("there is no key {key:?}"))),
            }
        }
        Ok(Self::Dirty { working_set_bytes, stride_bytes, rate_bytes_per_second: rate })
    }
}

impl fmt::Display for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::Dirty { working_set_bytes, stride_bytes, rate_bytes_per_second } = self else {
            return f.write_str("counter");
        };
        write!(f, "dirty:working-set={working_set_bytes},stride={stride_bytes}")?;
        match rate_bytes_per_second {
            Some(rate) => write!(f, ",rate={rate}/s"),
            None => f.write_str(",rate=max"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_can_be_typed() {
        for text in ["counter", "dirty", "dirty:rate=1M/s", "dirty:working-set=1M,stride=8K,rate=max"] {
            let payload: Payload = text.parse().unwrap();
            assert_eq!(payload.to_string().parse(), Ok(payload));
        }
        for (text, problem) in [
            ("linux", "no payload"),
            ("counter:rate=1M/s", "no options"),
            ("dirty:stride=100", "whole pages"),
            ("dirty:rate=0", "a rate of 0"),
            ("dirty:speed=1", "no key"),
        ] {
            let error = text.parse::<Payload>().unwrap_err().to_string();
            assert!(error.contains(problem), "{text}: {error}");
        }
    }
}
