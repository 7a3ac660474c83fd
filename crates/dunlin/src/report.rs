//! What the user is told of a migration: one struct for both sides, from the first moment to after the end.
//!
//! Units are in the names: bytes, pages and seconds. A name means the same before, during and after, and nothing
//! disappears when a migration fails or is cancelled.

use std::fmt;
use std::time::Instant;

use serde::{Deserialize, Deserializer, Serialize};

use crate::error::{GuestPlace, MigrationError, Phase, Side, one_line};
use crate::page::PageKind;
use crate::wire::Throttled;

mod summary;

/// Rounds that a report lists at most: a migration that does not converge goes on for as long as it is let.
pub const MAX_ROUNDS: usize = 1000;

/// What is waited for while the guest stands still: that a person has the migration go on,
pub(crate) const CONTINUED: &str = "a person to have the migration go on (migrate-continue)";
/// that everything is there,
pub(crate) const REST_ARRIVES: &str = "the last RAM and the device state to arrive";
/// that the destination has loaded it,
pub(crate) const LOADED: &str = "the destination to load the device state";
/// that the source gives the guest away,
pub(crate) const RELEASED: &str = "the source to release the guest";
/// that the destination starts it,
pub(crate) const STARTED: &str = "the destination to start the guest";
/// that a person says where it is.
pub(crate) const DECIDED: &str = "a person to decide where the guest is";

/// Where a migration stands, in QEMU's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// None was started.
    #[default]
    None,
    /// Connecting and agreeing; on the destination, listening.
    Setup,
    /// RAM travels while the guest runs.
    Active,
    /// The guest is paused, and the migration waits to be continued, as `pause-before-switchover` asks.
    PreSwitchover,
    /// The guest is paused; the last pages, the device state and the handover.
    Device,
    /// The guest is at the destination.
    Completed,
    /// It went wrong; `error` says how and where the guest is.
    Failed,
    /// Being cancelled.
    Cancelling,
    /// Cancelled.
    Cancelled,
}

impl Status {
    /// Whether the migration is over, one way or the other.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled)
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Setup => "setup",
            Self::Active => "active",
            Self::PreSwitchover => "pre-switchover",
            Self::Device => "device",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelling => "cancelling",
            Self::Cancelled => "cancelled",
        })
    }
}

/// The report of a migration, as either side has it.
#[derive(Debug, Clone, Deserialize, Serialize)]
pub struct Report {
    /// What is happening, in a sentence.
    #[serde(default)]
    pub summary: String,
    /// Whose report this is.
    pub side: Side,
    /// Where the migration stands.
    pub status: Status,
    /// Where the guest is, as far as this side knows.
    pub guest: GuestPlace,
    /// Session id, in hexadecimal, once there is one.
    pub session: Option<String>,
    /// From the start of the migration to its end, or to now.
    pub total_seconds: f64,
    /// Of these, until the first page.
    pub setup_seconds: f64,
    /// vCPUs stopped at the source to vCPUs running at the destination; on a failed switchover, to running at the
    /// source again. Zero while neither has happened. The destination's is its own reckoning, short of a message's way, until
    /// the source's figure comes.
    pub downtime_seconds: f64,
    /// The ceiling asked for.
    pub downtime_limit_seconds: f64,
    /// What the downtime would be if the guest were stopped now; at the end, what was predicted when it was.
    pub predicted_downtime_seconds: Option<f64>,
    /// How long the guest has stood still, as long as it does so for this migration and that is known here. The destination's
    /// is short of a message's way.
    #[serde(default)]
    pub stopped_seconds: Option<f64>,
    /// What is waited for while it does: of a person, of this side or of the other.
    #[serde(default)]
    pub waiting_for: Option<String>,
    /// What the downtime was made of, once the guest was stopped: the parts that are over.
    pub downtime_parts: Option<DowntimeParts>,
    /// The passes over the dirty bitmap, in order, the latest [`MAX_ROUNDS`] of them; the last one with the guest
    /// stopped.
    pub rounds: Vec<Round>,
    /// RAM.
    pub ram: RamReport,
    /// Of the bytes transferred, those that went before the guest was stopped for the switchover. On the destination this is
    /// as of when it heard that the guest would be.
    #[serde(default)]
    pub precopy_bytes: u64,
    /// These, once the guest was stopped.
    #[serde(skip)]
    before_stop_bytes: Option<u64>,
    /// What `delta` did, up to the last round.
    pub delta: DeltaCounts,
    /// Bytes of device state sent or received.
    pub device_state_bytes: u64,
    /// Bytes on all channels a second, over the latest rounds that moved enough to tell.
    pub bandwidth_bytes_per_second: u64,
    /// Bytes of RAM the guest dirties a second, as of the last round.
    pub dirty_bytes_per_second: u64,
    /// Why the migration is not converging, in a sentence, while it is not.
    pub not_converging: Option<String>,
    /// What auto-converge takes of each vCPU's time at present, in percent; empty while it takes none.
    #[serde(default)]
    pub vcpu_throttle_percent: Vec<u8>,
    /// The most that it has taken of each, in percent; empty if it never took any.
    #[serde(default)]
    pub max_vcpu_throttle_percent: Vec<u8>,
    /// Every data channel.
    pub channels: Vec<ChannelReport>,
    /// CPU time of the engine's threads on each side, where known.
    pub cpu_seconds: CpuSeconds,
    /// Connections that the destination refused or that lost their way, and the latest of them.
    pub refused_connections: RefusedConnections,
    /// What went wrong, if something did.
    pub error: Option<ErrorReport>,
}

impl Report {
    /// An empty report.
    pub fn new(side: Side, guest: GuestPlace) -> Self {
        Self {
            summary: String::new(),
            side,
            status: Status::None,
            guest,
            session: None,
            total_seconds: 0.0,
            setup_seconds: 0.0,
            downtime_seconds: 0.0,
            downtime_limit_seconds: 0.0,
            predicted_downtime_seconds: None,
            stopped_seconds: None,
            waiting_for: None,
            downtime_parts: None,
            rounds: Vec::new(),
            ram: RamReport::default(),
            precopy_bytes: 0,
            before_stop_bytes: None,
            delta: DeltaCounts::default(),
            device_state_bytes: 0,
            bandwidth_bytes_per_second: 0,
            dirty_bytes_per_second: 0,
            not_converging: None,
            vcpu_throttle_percent: Vec::new(),
            max_vcpu_throttle_percent: Vec::new(),
            channels: Vec::new(),
            cpu_seconds: CpuSeconds::default(),
            refused_connections: RefusedConnections::default(),
            error: None,
        }
    }

    /// The guest is stopped for the switchover, when so many bytes have been transferred.
    pub(crate) fn stopped_after(&mut self, transferred_bytes: u64) {
        self.before_stop_bytes.get_or_insert(transferred_bytes);
    }

    /// Another migration begins.
    pub(crate) fn restart_precopy(&mut self) {
        (self.precopy_bytes, self.before_stop_bytes) = (0, None);
    }

    /// Fills in the bytes of precopy, which all are as long as the guest has not been stopped.
    pub(crate) fn fill_in_precopy(&mut self) {
        let transferred = self.ram.transferred_bytes;
        self.precopy_bytes = self.before_stop_bytes.unwrap_or(transferred).min(transferred);
    }

    /// The guest stands still since `stopped`, and what is waited for.
    pub(crate) fn stands_still(&mut self, stopped: Instant, waiting_for: Option<&str>) {
        self.stopped_seconds = Some(stopped.elapsed().as_secs_f64());
        self.waiting_for = waiting_for.map(str::to_owned);
    }

    /// Puts into words what is happening.
    pub(crate) fn summarize(&mut self) {
        self.summary = summary::sentence(self);
    }

    /// Lists a round, in the place of the oldest if there are too many.
    pub(crate) fn push_round(&mut self, round: Round) {
        if self.rounds.len() >= MAX_ROUNDS {
            self.rounds.remove(0);
        }
        self.rounds.push(round);
    }

    /// From here on so much is taken of each vCPU's time, in percent.
    pub(crate) fn set_throttle(&mut self, percent: Vec<u8>) {
        let most = &mut self.max_vcpu_throttle_percent;
        most.resize(most.len().max(percent.len()), 0);
        most.iter_mut().zip(&percent).for_each(|(most, percent)| *most = (*most).max(*percent));
        self.vcpu_throttle_percent = percent;
    }

    /// What is taken and was, for the other side.
    pub(crate) fn throttled(&self) -> Vec<Throttled> {
        let now = self.vcpu_throttle_percent.iter().copied().chain(std::iter::repeat(0));
        self.max_vcpu_throttle_percent.iter().zip(now).map(|(most, now)| Throttled { now, most: *most }).collect()
    }

    /// What the other side says of that.
    pub(crate) fn throttled_by(&mut self, throttled: &[Throttled]) {
        let taken = throttled.iter().any(|vcpu| vcpu.now > 0);
        self.vcpu_throttle_percent = throttled.iter().filter(|_| taken).map(|vcpu| vcpu.now).collect();
        self.max_vcpu_throttle_percent = throttled.iter().map(|vcpu| vcpu.most).collect();
    }

    /// Rounds ended so far, listed or not.
    pub fn rounds_ended(&self) -> u32 {
        self.rounds.last().map_or(0, |round| round.number)
    }
}

/// The parts of a downtime, in the order in which they happen. They add up to it, but for rounding.
#[derive(Debug, Clone, Copy, PartialEq, Default, Deserialize, Serialize)]
pub struct DowntimeParts {
    /// Stopping the vCPUs.
    pub pause_seconds: f64,
    /// Waiting to be continued, where `pause-before-switchover` asks for it.
    #[serde(default)]
    pub wait_seconds: f64,
    /// Finding and sending the last dirty pages.
    pub ram_seconds: f64,
    /// Reading and sending the device state.
    pub device_state_seconds: f64,
    /// Loading and checking at the destination.
    pub load_seconds: f64,
    /// From Ready to Running: the decision and the resume.
    pub handover_seconds: f64,
}

impl DowntimeParts {
    /// How many there are.
    pub(crate) const COUNT: usize = 6;

    /// The downtime that they add up to.
    pub(crate) fn total_seconds(self) -> f64 {
        self.to_seconds().into_iter().sum()
    }

    fn to_seconds(self) -> [f64; Self::COUNT] {
        let Self { pause_seconds, wait_seconds, ram_seconds, device_state_seconds, load_seconds, handover_seconds } =
            self;
        [pause_seconds, wait_seconds, ram_seconds, device_state_seconds, load_seconds, handover_seconds]
    }

    /// As they travel.
    pub(crate) fn to_nanoseconds(self) -> [u64; Self::COUNT] {
        self.to_seconds().map(|seconds| (seconds * 1e9) as u64)
    }

    /// From how they travel; `None` where the source did not know them.
    pub(crate) fn from_nanoseconds(parts: [u64; Self::COUNT]) -> Option<Self> {
        if parts.iter().all(|part| *part == 0) {
            return None;
        }
        let [pause_seconds, wait_seconds, ram_seconds, device_state_seconds, load_seconds, handover_seconds] =
            parts.map(|nanoseconds| nanoseconds as f64 / 1e9);
        Some(Self { pause_seconds, wait_seconds, ram_seconds, device_state_seconds, load_seconds, handover_seconds })
    }
}

/// Figures of RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
pub struct RamReport {
    /// The guest's RAM.
    pub total_bytes: u64,
    /// RAM that is still to go: what of the present round is not known to have arrived, and an estimate, by the latest
    /// rates, of what the guest has dirtied again of the rest. It is 0 only when nothing was dirty at the last look, and when
    /// all has arrived.
    pub remaining_bytes: u64,
    /// Of these, the RAM that belongs to the present round.
    #[serde(default)]
    pub round_remaining_bytes: u64,
    /// Bytes that have gone from the source to the destination on all connections, everything included.
    pub transferred_bytes: u64,
    /// Pages of 4096 bytes sent or received, by the kind they travelled as.
    pub pages: PageCounts,
}

/// Pages by kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
pub struct PageCounts {
    /// All zeros: only the fact travelled.
    pub zero: u64,
    /// As they are.
    pub plain: u64,
    /// What changed since they were sent last.
    pub delta: u64,
    /// Compressed with LZ4.
    pub lz4: u64,
    /// Compressed with Zstandard.
    pub zstd: u64,
}

impl PageCounts {
    /// The counts, in the order of the kinds' numbers on the wire.
    pub(crate) fn to_array(self) -> [u64; PageKind::COUNT] {
        [self.zero, self.plain, self.delta, self.lz4, self.zstd]
    }

    pub(crate) fn from_array([zero, plain, delta, lz4, zstd]: [u64; PageKind::COUNT]) -> Self {
        Self { zero, plain, delta, lz4, zstd }
    }

    fn with(self, other: Self, mut f: impl FnMut(u64, u64) -> u64) -> Self {
        let mut counts = self.to_array();
        counts.iter_mut().zip(other.to_array()).for_each(|(count, other)| *count = f(*count, other));
        Self::from_array(counts)
    }

    /// Every kind's name and count.
    pub fn named(&self) -> [(&'static str, u64); PageKind::COUNT] {
        let names = ["zero", "plain", "delta", "lz4", "zstd"];
        let counts = self.to_array();
        std::array::from_fn(|n| (names.get(n).copied().unwrap_or(""), counts.get(n).copied().unwrap_or(0)))
    }

    /// Pages of all kinds.
    pub fn total(&self) -> u64 {
        self.to_array().into_iter().fold(0, u64::saturating_add)
    }

    /// What came since `before`.
    pub(crate) fn since(self, before: Self) -> Self {
        self.with(before, u64::saturating_sub)
    }
}

/// As a person reads it: the kinds there are any of.
impl fmt::Display for PageCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let there = self.named().into_iter().filter(|(name, count)| *count > 0 || matches!(*name, "zero" | "plain"));
        let there: Vec<String> = there.map(|(name, count)| format!("{count} {name}")).collect();
        f.write_str(&there.join(", "))
    }
}

impl std::ops::AddAssign for PageCounts {
    fn add_assign(&mut self, other: Self) {
        *self = self.with(other, u64::saturating_add);
    }
}

/// What `delta` did, at the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
pub struct DeltaCounts {
    /// Pages whose last version was known and that travelled as a delta.
    pub hits: u64,
    /// Pages sent again whose last version was not known any more.
    pub misses: u64,
    /// Pages whose last version was known but that had changed too much.
    pub overflows: u64,
    /// Bytes of RAM that did not have to travel.
    pub saved_bytes: u64,
}

impl std::ops::AddAssign for DeltaCounts {
    fn add_assign(&mut self, other: Self) {
        self.hits = self.hits.saturating_add(other.hits);
        self.misses = self.misses.saturating_add(other.misses);
        self.overflows = self.overflows.saturating_add(other.overflows);
        self.saved_bytes = self.saved_bytes.saturating_add(other.saved_bytes);
    }
}

/// One pass over the dirty bitmap.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
pub struct Round {
    /// Counted from 1.
    pub number: u32,
    /// How long it took, until the destination had placed all of it.
    pub seconds: f64,
    /// RAM covered.
    pub ram_bytes: u64,
    /// Bytes on all channels.
    pub transferred_bytes: u64,
    /// Pages by kind.
    pub pages: PageCounts,
    /// RAM that was dirty again at its end.
    pub dirty_bytes: u64,
    /// Bytes on all channels a second.
    pub bandwidth_bytes_per_second: u64,
    /// Bytes of RAM the guest dirtied a second.
    pub dirty_bytes_per_second: u64,
    /// The downtime predicted at its end; infinite, which JSON writes as `null`, while nothing gets through.
    #[serde(deserialize_with = "finite_or_infinite")]
    pub predicted_downtime_seconds: f64,
}

fn finite_or_infinite<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::INFINITY))
}

/// Figures of one data channel.
#[derive(Debug, Clone, Copy, PartialEq, Default, Deserialize, Serialize)]
pub struct ChannelReport {
    /// Its number.
    pub index: u8,
    /// Bytes sent or received.
    pub transferred_bytes: u64,
    /// Frames sent or received.
    pub frames: u64,
    /// Pages by kind.
    pub pages: PageCounts,
    /// Of a processor's time, what its thread has used.
    #[serde(default)]
    pub busy_seconds: f64,
    /// How long its thread stood still while a round was under way: for the link, the bandwidth limit, the other side or
    /// a processor.
    #[serde(default)]
    pub waiting_seconds: f64,
    /// At the source: bytes a second that the link carries, while the channel always waits for the link. Nothing while the
    /// link has room, or where that is not known.
    #[serde(default)]
    pub link_bytes_per_second: Option<u64>,
    /// At the source: what the compressor did, if there is one.
    #[serde(default)]
    pub compression: Option<CompressionReport>,
}

/// What a channel's compressor did.
#[derive(Debug, Clone, Copy, PartialEq, Default, Deserialize, Serialize)]
#[non_exhaustive]
pub struct CompressionReport {
    /// CPU time that it took.
    pub busy_seconds: f64,
    /// Of that, CPU time of trials that did not pay.
    pub wasted_seconds: f64,
    /// The level in use; nothing while pages travel as they are. LZ4 has only level 1.
    pub level: Option<i32>,
}

/// CPU time of the engine's threads.
#[derive(Debug, Clone, Copy, PartialEq, Default, Deserialize, Serialize)]
pub struct CpuSeconds {
    /// At the source.
    pub source: Option<f64>,
    /// At the destination.
    pub destination: Option<f64>,
}

/// Connections that came to nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize, Serialize)]
pub struct RefusedConnections {
    /// How many.
    pub count: u64,
    /// The latest: from where, and why.
    pub latest: Option<String>,
}

/// An error, as the report carries it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
pub struct ErrorReport {
    /// The whole sentence.
    pub message: String,
    /// Which side says so.
    pub side: Side,
    /// What it was busy with.
    pub phase: Phase,
    /// Where the guest is.
    pub guest: GuestPlace,
}

impl ErrorReport {
    /// The guest is somewhere else by now.
    pub(crate) fn moved_to(&mut self, guest: GuestPlace) {
        if let Some(rest) = self.message.strip_suffix(&place(self.guest)) {
            self.message = format!("{rest}{}", place(guest));
            self.guest = guest;
        }
    }
}

/// How an error's sentence ends.
fn place(guest: GuestPlace) -> String {
    format!("; the guest is {guest}")
}

impl From<&MigrationError> for ErrorReport {
    fn from(error: &MigrationError) -> Self {
        Self { message: one_line(&error.to_string()), side: error.side, phase: error.phase, guest: error.guest }
    }
}
