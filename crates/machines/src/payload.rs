//! The built-in guests, as a person chooses them: jobs joined by `+`.

use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;
use std::time::Duration;

use dunlin::units::{parse_rate, parse_size};
use serde::{Deserialize, Serialize};

use crate::schedule::pace;
use crate::{Backing, Fill};

/// A bare-metal guest: what its vCPUs do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Payload {
    /// What every vCPU does with memory.
    pub memory: Option<MemoryJob>,
    /// Whether the first vCPU writes and reads the first disk and prints on the serial port.
    pub io: bool,
    /// Ticks a second of every vCPU's own timer, and of the interval timer, whose interrupts the first vCPU takes.
    pub timer: Option<NonZeroU32>,
}

/// What a guest does with memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum MemoryJob {
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
    /// The same, the first vCPU at a rate of its own.
    Uneven {
        /// As above.
        working_set_bytes: u64,
        /// As above.
        stride_bytes: u64,
        /// Bytes a second of the first vCPU; `None` as fast as it can.
        rate_bytes_per_second: Option<u64>,
        /// Bytes a second of each of the others.
        others_bytes_per_second: u64,
    },
}

impl MemoryJob {
    /// The region that the vCPUs share out and the stride, in bytes, if there is one.
    pub(crate) fn region(&self) -> Option<(u64, u64)> {
        match *self {
            Self::Counter => None,
            Self::Dirty { working_set_bytes, stride_bytes, .. }
            | Self::Uneven { working_set_bytes, stride_bytes, .. } => Some((working_set_bytes, stride_bytes)),
        }
    }

    /// Time between two pages of that vCPU of so many; `None` if there need be none.
    pub(crate) fn pace(&self, vcpu: usize, vcpus: u64) -> Option<Duration> {
        match *self {
            Self::Counter => None,
            Self::Dirty { rate_bytes_per_second, .. } => rate_bytes_per_second.map(|rate| pace(rate, vcpus)),
            Self::Uneven { rate_bytes_per_second, .. } if vcpu == 0 => rate_bytes_per_second.map(|rate| pace(rate, 1)),
            Self::Uneven { others_bytes_per_second, .. } => Some(pace(others_bytes_per_second, 1)),
        }
    }
}

impl Payload {
    /// How much memory of the host RAM of `memory_bytes` on pages of `backing` takes in the end: for the first MiB, for what
    /// `fill` put above it, and for what the vCPUs write.
    pub fn filled_bytes(&self, memory_bytes: u64, fill: &Fill, backing: Backing) -> u64 {
        const LOW: u64 = 1 << 20;
        let (unit, above) = (backing.taken_at_once(), memory_bytes.saturating_sub(LOW));
        let written = self.memory.as_ref().and_then(MemoryJob::region).map_or(0, |(bytes, stride)| {
            let stride = stride.max(4096);
            (bytes / stride).saturating_mul(stride.min(unit)).min(above)
        });
        LOW.saturating_add(written).saturating_add(fill.filled_bytes(above.saturating_sub(written), backing))
    }
}

/// A payload that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "payload {text:?}: {problem}; write counter, dirty:working-set=SIZE,stride=SIZE,rate=BYTES/s,others=BYTES/s, io, \
     timer:hz=N, or several joined by +"
)]
pub struct PayloadError {
    /// What was given.
    pub text: String,
    /// What is wrong with it.
    pub problem: String,
}

/// The region where none is given.
const DEFAULT_WORKING_SET: u64 = 16 << 20;
const DEFAULT_TICKS: u32 = 100;
/// The interval timer counts to no more than 65535, 1 193 182 a second.
const TICKS: std::ops::RangeInclusive<u32> = 20..=1000;

impl FromStr for Payload {
    type Err = PayloadError;

    fn from_str(text: &str) -> Result<Self, PayloadError> {
        let error = |problem: String| PayloadError { text: text.to_owned(), problem };
        let mut payload = Self { memory: None, io: false, timer: None };
        for job in text.split('+') {
            let (name, options) = job.split_once(':').unwrap_or((job, ""));
            let again = match name {
                "counter" if options.is_empty() => payload.memory.replace(MemoryJob::Counter).is_some(),
                "dirty" => payload.memory.replace(dirty(options).map_err(error)?).is_some(),
                "io" if options.is_empty() => std::mem::replace(&mut payload.io, true),
                "timer" => payload.timer.replace(timer(options).map_err(error)?).is_some(),
                "counter" | "io" => return Err(error(format!("{name} has no options"))),
                _ => return Err(error(format!("there is no payload {name:?}"))),
            };
            if again {
                return Err(error("one of counter and dirty, and each of io and timer once".to_owned()));
            }
        }
        Ok(payload)
    }
}

fn options(text: &str) -> impl Iterator<Item = Result<(&str, &str), String>> {
    text.split_terminator(',').map(|part| {
        let (key, value) = part.split_once('=').ok_or_else(|| format!("{part:?} is not KEY=VALUE"))?;
        Ok((key.trim(), value))
    })
}

fn dirty(text: &str) -> Result<MemoryJob, String> {
    let pages = |key: &str, value: &str| {
        let bytes = parse_size(value).map_err(|error| error.to_string())?;
        let whole = bytes > 0 && bytes.is_multiple_of(4096);
        if whole { Ok(bytes) } else { Err(format!("{key}: {bytes} bytes are not whole pages of 4096")) }
    };
    let (mut working_set_bytes, mut stride_bytes, mut rate_bytes_per_second) = (DEFAULT_WORKING_SET, 4096, None);
    let mut others = None;
    let parse = |value: &str| parse_rate(value).map_err(|error| error.to_string());
    for option in options(text) {
        match option? {
            ("working-set", value) => working_set_bytes = pages("working-set", value)?,
            ("stride", value) => stride_bytes = pages("stride", value)?,
            ("rate", "max") => rate_bytes_per_second = None,
            ("others", value) => others = Some(parse(value)?),
            ("rate", value) => match parse(value)? {
                0 => return Err("a rate of 0: choose counter for a guest that dirties little".to_owned()),
                rate => rate_bytes_per_second = Some(rate),
            },
            (key, _) => return Err(format!("there is no key {key:?}")),
        }
    }
    Ok(match others {
        None => MemoryJob::Dirty { working_set_bytes, stride_bytes, rate_bytes_per_second },
        Some(others_bytes_per_second) => {
            MemoryJob::Uneven { working_set_bytes, stride_bytes, rate_bytes_per_second, others_bytes_per_second }
        }
    })
}

fn timer(text: &str) -> Result<NonZeroU32, String> {
    let mut ticks = DEFAULT_TICKS;
    for option in options(text) {
        match option? {
            ("hz", value) => ticks = value.parse().map_err(|_| format!("hz: {value:?} is not a number"))?,
            (key, _) => return Err(format!("there is no key {key:?}")),
        }
    }
    let allowed = NonZeroU32::new(ticks).filter(|ticks| TICKS.contains(&ticks.get()));
    allowed.ok_or_else(|| format!("hz: {ticks} is not in {} to {}", TICKS.start(), TICKS.end()))
}

impl fmt::Display for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let jobs = [
            self.memory.as_ref().map(ToString::to_string),
            self.io.then(|| "io".to_owned()),
            self.timer.map(|ticks| format!("timer:hz={ticks}")),
        ];
        f.write_str(&jobs.into_iter().flatten().collect::<Vec<_>>().join("+"))
    }
}

impl fmt::Display for MemoryJob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (rate, others) = match self {
            Self::Counter => (&None, None),
            Self::Dirty { rate_bytes_per_second, .. } => (rate_bytes_per_second, None),
            Self::Uneven { rate_bytes_per_second, others_bytes_per_second, .. } => {
                (rate_bytes_per_second, Some(others_bytes_per_second))
            }
        };
        let Some((working_set, stride)) = self.region() else { return f.write_str("counter") };
        write!(f, "dirty:working-set={working_set},stride={stride}")?;
        match rate {
            Some(rate) => write!(f, ",rate={rate}/s")?,
            None => f.write_str(",rate=max")?,
        }
        others.map_or(Ok(()), |others| write!(f, ",others={others}/s"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is both filled and written counts once.
    #[test]
    fn what_takes_memory_in_the_end() {
        let (empty, full): (Fill, Fill) = ("zero:100".parse().unwrap(), "text:100".parse().unwrap());
        for (text, fill, mib) in [
            ("counter", &empty, 1),
            ("io+timer", &full, 64),
            ("dirty:working-set=16M", &empty, 17),
            ("dirty:working-set=16M,stride=16K", &empty, 5),
            ("dirty:working-set=16M", &full, 64),
            ("dirty:working-set=1G", &empty, 64),
        ] {
            assert_eq!(
                text.parse::<Payload>().unwrap().filled_bytes(64 << 20, fill, Backing::Base),
                mib << 20,
                "{text}, {fill}"
            );
        }
        let strided: Payload = "dirty:working-set=16M,stride=4M".parse().unwrap();
        assert_eq!(strided.filled_bytes(64 << 20, &empty, Backing::Base), (1 << 20) + 4 * 4096);
        assert_eq!(strided.filled_bytes(64 << 20, &empty, Backing::Transparent), 9 << 20);
    }

    #[test]
    fn what_is_printed_can_be_typed() {
        for text in [
            "counter",
            "dirty",
            "dirty:rate=1M/s",
            "dirty:working-set=1M,stride=8K,rate=max",
            "dirty:rate=max,others=1M/s",
            "io",
            "timer",
            "io+dirty+timer:hz=250",
        ] {
            let payload: Payload = text.parse().unwrap();
            assert_eq!(payload.to_string().parse(), Ok(payload));
        }
        for (text, problem) in [
            ("linux", "no payload"),
            ("", "no payload"),
            ("counter:rate=1M/s", "no options"),
            ("dirty:stride=100", "whole pages"),
            ("dirty:rate=0", "a rate of 0"),
            ("dirty:speed=1", "no key"),
            ("dirty+counter", "one of counter and dirty"),
            ("io+io", "each of io and timer once"),
            ("timer:hz=5", "not in 20 to 1000"),
        ] {
            let error = text.parse::<Payload>().unwrap_err().to_string();
            assert!(error.contains(problem), "{text}: {error}");
        }
    }
}
