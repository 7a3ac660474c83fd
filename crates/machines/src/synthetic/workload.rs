//! What the vCPUs do, as a person writes it.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use dunlin::units::{parse_rate, parse_size};
use serde::{Deserialize, Serialize};

use super::{Backing, Fill};
use crate::schedule::pace;

/// Which page a step writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Pattern {
    /// Any, evenly.
    Uniform,
    /// One after the other.
    Sequential,
    /// Few pages often, many seldom.
    Zipf,
    /// Nine of ten writes into a tenth of the working set.
    HotCold,
}

/// What a step writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Content {
    /// A page of random bytes.
    Random,
    /// A page of words.
    Text,
    /// A page of zeros with some words in it.
    Sparse,
    /// 40 bytes (1 % of the page) over what is there.
    Counter,
}

/// What the vCPUs do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Workload {
    /// Nothing. The device ticks.
    Idle,
    /// Write pages.
    Writes {
        /// Which.
        pattern: Pattern,
        /// Bytes a second of all vCPUs together, 4096 a step; `None` as fast as they can.
        rate_bytes_per_second: Option<u64>,
        /// The pages written lie within so many bytes from the start of RAM; `None` all of it.
        working_set_bytes: Option<u64>,
        /// What.
        content: Content,
    },
    /// The same, the first vCPU at a rate of its own.
    Uneven {
        /// Which.
        pattern: Pattern,
        /// Bytes a second of the first vCPU, 4096 a step; `None` as fast as it can.
        rate_bytes_per_second: Option<u64>,
        /// Bytes a second of each of the others.
        others_bytes_per_second: u64,
        /// As above.
        working_set_bytes: Option<u64>,
        /// What.
        content: Content,
    },
}

/// What vCPUs that write have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Writes {
    pub(super) pattern: Pattern,
    pub(super) working_set_bytes: Option<u64>,
    pub(super) content: Content,
}

impl Workload {
    /// How much memory of the host RAM of `memory_bytes` on pages of `backing` takes in the end: for what `fill` put there, and
    /// for what the vCPUs write.
    pub fn filled_bytes(&self, memory_bytes: u64, fill: &Fill, backing: Backing) -> u64 {
        let written = self.writes().map_or(0, |writes| writes.working_set_bytes.unwrap_or(u64::MAX).min(memory_bytes));
        let whole = written.checked_next_multiple_of(backing.taken_at_once()).unwrap_or(written).min(memory_bytes);
        whole.saturating_add(fill.filled_bytes(memory_bytes.saturating_sub(whole), backing))
    }

    /// What is written, if something is.
    pub(super) fn writes(&self) -> Option<Writes> {
        match *self {
            Self::Idle => None,
            Self::Writes { pattern, working_set_bytes, content, .. }
            | Self::Uneven { pattern, working_set_bytes, content, .. } => {
                Some(Writes { pattern, working_set_bytes, content })
            }
        }
    }

    /// Time between two steps of that vCPU of so many; `None` if there need be none.
    pub(super) fn pace(&self, vcpu: usize, vcpus: u64) -> Option<Duration> {
        match *self {
            Self::Idle => None,
            Self::Writes { rate_bytes_per_second, .. } => rate_bytes_per_second.map(|rate| pace(rate, vcpus)),
            Self::Uneven { rate_bytes_per_second, .. } if vcpu == 0 => rate_bytes_per_second.map(|rate| pace(rate, 1)),
            Self::Uneven { others_bytes_per_second, .. } => Some(pace(others_bytes_per_second, 1)),
        }
    }
}

/// Rate where none is given.
const DEFAULT_RATE: u64 = 100 << 20;

const PATTERNS: [(&str, Pattern); 4] = [
    ("uniform", Pattern::Uniform),
    ("sequential", Pattern::Sequential),
    ("zipf", Pattern::Zipf),
    ("hotcold", Pattern::HotCold),
];
const CONTENTS: [(&str, Content); 4] =
    [("random", Content::Random), ("text", Content::Text), ("sparse", Content::Sparse), ("counter", Content::Counter)];

/// A workload that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "workload {text:?}: {problem}; write idle, or pattern=uniform|sequential|zipf|hotcold,rate=BYTES/s,others=BYTES/s,\
     working-set=SIZE,content=random|text|sparse|counter"
)]
pub struct WorkloadError {
    /// What was given.
    pub text: String,
    /// What is wrong with it.
    pub problem: String,
}

fn named<T: Copy>(names: &[(&str, T)], name: &str) -> Option<T> {
    names.iter().find(|(known, _)| *known == name).map(|(_, value)| *value)
}

fn name_of<'a, T: PartialEq>(names: &[(&'a str, T)], value: &T) -> &'a str {
    names.iter().find(|(_, known)| known == value).map_or("", |(name, _)| name)
}

impl FromStr for Workload {
    type Err = WorkloadError;

    fn from_str(text: &str) -> Result<Self, WorkloadError> {
        let error = |problem: String| WorkloadError { text: text.to_owned(), problem };
        if text == "idle" {
            return Ok(Self::Idle);
        }
        let (mut pattern, mut content) = (Pattern::Uniform, Content::Random);
        let (mut rate, mut others, mut working_set) = (Some(DEFAULT_RATE), None, None);
        for part in text.split(',') {
            let (key, value) = part.split_once('=').ok_or_else(|| error(format!("{part:?} is not KEY=VALUE")))?;
            let unknown = || error(format!("there is no {key} called {value:?}"));
            match key.trim() {
                "pattern" => pattern = named(&PATTERNS, value).ok_or_else(unknown)?,
                "content" => content = named(&CONTENTS, value).ok_or_else(unknown)?,
                "rate" if value == "max" => rate = None,
                "rate" => rate = Some(parse_rate(value).map_err(|e| error(e.to_string()))?),
                "others" => others = Some(parse_rate(value).map_err(|e| error(e.to_string()))?),
                "working-set" => {
                    let bytes = parse_size(value).map_err(|e| error(e.to_string()))?;
                    if bytes < 4096 {
                        return Err(error("the working set is smaller than a page of 4096 bytes".into()));
                    }
                    working_set = Some(bytes);
                }
                _ => return Err(error(format!("there is no key {key:?}"))),
            }
        }
        if rate == Some(0) && others.is_none_or(|others| others == 0) {
            return Ok(Self::Idle);
        }
        Ok(match others {
            None => Self::Writes { pattern, rate_bytes_per_second: rate, working_set_bytes: working_set, content },
            Some(others) => Self::Uneven {
                pattern,
                rate_bytes_per_second: rate,
                others_bytes_per_second: others,
                working_set_bytes: working_set,
                content,
            },
        })
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (rate, others) = match self {
            Self::Idle => (&None, None),
            Self::Writes { rate_bytes_per_second, .. } => (rate_bytes_per_second, None),
            Self::Uneven { rate_bytes_per_second, others_bytes_per_second, .. } => {
                (rate_bytes_per_second, Some(others_bytes_per_second))
            }
        };
        let Some(Writes { pattern, working_set_bytes, content }) = self.writes() else { return f.write_str("idle") };
        write!(f, "pattern={}", name_of(&PATTERNS, &pattern))?;
        match rate {
            Some(rate) => write!(f, ",rate={rate}/s")?,
            None => f.write_str(",rate=max")?,
        }
        if let Some(others) = others {
            write!(f, ",others={others}/s")?;
        }
        if let Some(bytes) = working_set_bytes {
            write!(f, ",working-set={bytes}")?;
        }
        write!(f, ",content={}", name_of(&CONTENTS, &content))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_can_be_typed() {
        for (pattern, _) in PATTERNS {
            for (content, _) in CONTENTS {
                for rest in [
                    "",
                    ",rate=max",
                    ",rate=max,others=1M/s",
                    ",rate=1.5G/s",
                    ",working-set=64M",
                    ",working-set=1G,rate=300M/s",
                ] {
                    let workload: Workload = format!("content={content},pattern={pattern}{rest}").parse().unwrap();
                    assert_eq!(workload.to_string().parse(), Ok(workload));
                }
            }
        }
        assert_eq!("idle".parse(), Ok(Workload::Idle));
        assert_eq!("rate=0".parse(), Ok(Workload::Idle));
    }

    /// What is both filled and written counts once.
    #[test]
    fn what_takes_memory_in_the_end() {
        let (empty, half): (Fill, Fill) = ("zero:100".parse().unwrap(), "zero:50,text:50".parse().unwrap());
        for (text, fill, mib) in [
            ("idle", &empty, 0),
            ("idle", &half, 32),
            ("working-set=16M", &empty, 16),
            ("working-set=16M", &half, 40),
            ("pattern=zipf", &empty, 64),
            ("working-set=1G,rate=1M/s,others=2M/s", &half, 64),
        ] {
            assert_eq!(
                text.parse::<Workload>().unwrap().filled_bytes(64 << 20, fill, Backing::Base),
                mib << 20,
                "{text}, {fill}"
            );
        }
        let little: Workload = "working-set=12K".parse().unwrap();
        assert_eq!(little.filled_bytes(64 << 20, &empty, Backing::Base), 12 << 10);
        assert_eq!(little.filled_bytes(64 << 20, &empty, Backing::Transparent), 2 << 20);
        assert_eq!(little.filled_bytes(1 << 20, &empty, Backing::Transparent), 1 << 20);
    }

    #[test]
    fn refusals_say_what_is_wrong() {
        for (text, problem) in [
            ("", "not KEY=VALUE"),
            ("busy", "not KEY=VALUE"),
            ("pattern=random", "no pattern called"),
            ("content=uniform", "no content called"),
            ("rate=fast", "not a rate"),
            ("working-set=1", "smaller than a page"),
            ("speed=1", "no key"),
        ] {
            let error = text.parse::<Workload>().unwrap_err().to_string();
            assert!(error.contains(problem), "{text}: {error}");
        }
    }
}
