//! Control messages: the bodies of all frames but Pages.

use std::time::Duration;

use super::WireError;
use super::codec::{Reader, Writer};
use super::frame::FrameType;
use crate::error::GuestPlace;
use crate::guest::GuestEnd;
use crate::machine::Need;
use crate::memory::Ram;
use crate::page::PageKind;
use crate::report::{DeltaCounts, DowntimeParts, PageCounts};

const MAX_PROFILE_BYTES: u64 = 1 << 20;
const MAX_TEXT_BYTES: u16 = 2048;
/// vCPUs of which a RoundDone tells how much they are throttled.
const MAX_THROTTLED: usize = 255;

/// A feature that the source wants to use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Feature {
    pub(crate) name: String,
    /// The migration makes no sense without it.
    pub(crate) required: bool,
}

/// One RAM block, as the other side has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BlockLayout {
    pub(crate) name: String,
    pub(crate) size_bytes: u64,
    pub(crate) host_page_size: u64,
}

/// Source to destination, first of all: what is coming.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Start {
    pub(crate) features: Vec<Feature>,
    /// Data channels beside this one; 0 when this one carries the pages.
    pub(crate) channels: u8,
    pub(crate) blocks: Vec<BlockLayout>,
    /// The machine's own description of itself.
    pub(crate) profile: Vec<u8>,
    pub(crate) downtime_limit: Duration,
}

/// Source to destination, after a round: its figures, so that both sides report the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RoundDone {
    pub(crate) number: u32,
    pub(crate) duration: Duration,
    pub(crate) ram_bytes: u64,
    pub(crate) transferred_bytes: u64,
    pub(crate) pages: PageCounts,
    pub(crate) dirty_bytes: u64,
    pub(crate) bandwidth: u64,
    pub(crate) dirty_rate: u64,
    pub(crate) predicted_downtime: Duration,
    pub(crate) downtime_limit: Duration,
    /// Since the beginning.
    pub(crate) delta: DeltaCounts,
    /// Of each vCPU; nothing if none has been throttled.
    pub(crate) throttle: Vec<Throttled>,
    /// Why the migration does not converge, or empty.
    pub(crate) not_converging: String,
    /// The guest is stopped next, or already was: what comes after this is part of the downtime.
    pub(crate) then_stopped: bool,
}

/// How much of a vCPU's time is taken from it, in percent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Throttled {
    pub(crate) now: u8,
    /// So far.
    pub(crate) most: u8,
}

/// Source to destination, on a data channel: everything of a round has been sent on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mark {
    pub(crate) round: u32,
}

/// Destination to source: everything before that mark is in its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MarkAck {
    pub(crate) channel: u8,
    pub(crate) round: u32,
}

/// Either way: what has come on this connection so far, the hello or its answer included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Heartbeat {
    /// Bytes that were taken.
    pub(crate) received: u64,
    /// Bytes that have come and wait to be taken.
    pub(crate) unread: u64,
}

/// Bytes of a heartbeat's body.
pub(crate) const HEARTBEAT_BYTES: usize = 16;

/// Source to destination: the guest stands still for the switchover.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stopped {
    /// For how long it has.
    pub(crate) stopped: Duration,
    /// RAM that is dirty: what the last round has to bring.
    pub(crate) dirty_bytes: u64,
    /// The migration waits to be continued, as `pause-before-switchover` asks. Otherwise the switchover goes on.
    pub(crate) waits: bool,
}

/// Source to destination, while the guest runs: bytes like those of device state, which are checked as these are and dropped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Probe {
    pub(crate) number: u32,
    /// Nothing follows: this is to be answered.
    pub(crate) last: bool,
    /// CRC-64/NVME of the bytes.
    pub(crate) checksum: u64,
    pub(crate) piece: Vec<u8>,
}

/// Destination to source: everything of that probe has come. With it what the destination knows of its own part of a
/// switchover.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Probed {
    pub(crate) number: u32,
    /// How long loading device state will take.
    pub(crate) load: Duration,
    /// How long starting the guest will take.
    pub(crate) resume: Duration,
    /// How late this side may be to run when it is to.
    pub(crate) late: Duration,
}

/// Source to destination: a piece of a section of device state. Pieces of a section come in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Section {
    pub(crate) name: String,
    pub(crate) instance: u32,
    pub(crate) version: u32,
    pub(crate) need: Need,
    /// CRC-64/NVME of the whole section's data.
    pub(crate) checksum: u64,
    /// Bytes of the whole section.
    pub(crate) total_bytes: u64,
    pub(crate) piece: Vec<u8>,
}

/// Source to destination: everything is sent. The destination counts for itself and compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Offer {
    pub(crate) last_round: u32,
    pub(crate) sections: u32,
    pub(crate) pages: PageCounts,
    /// Whether the guest was running and is to run on.
    pub(crate) run: bool,
    /// The parts of the downtime that are over, as in [`Done`].
    pub(crate) parts: [u64; DowntimeParts::COUNT],
}

/// Destination to source: everything is here and checked. Asks whether the guest is this side's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ready {
    /// Each decision of a person is one higher than all before; 1 without any.
    pub(crate) epoch: u64,
    /// Another one each time: the Release that answers it names it.
    pub(crate) question: u64,
}

/// Source to destination: the guest is yours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Release {
    pub(crate) epoch: u64,
    /// Of the Ready that this answers.
    pub(crate) question: u64,
    /// How long after that Ready was sent the guest may be started: afterwards it is asked again.
    pub(crate) lease: Duration,
}

/// Destination to source: the guest is here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Running {
    /// Loading and checking the device state.
    pub(crate) load: Duration,
    /// Starting the vCPUs.
    pub(crate) resume: Duration,
    /// CPU time of the destination's threads.
    pub(crate) cpu: Duration,
    pub(crate) epoch: u64,
}

/// Source to destination: Running was heard, all is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Done {
    pub(crate) downtime: Duration,
    /// In the order of the struct, in nanoseconds; all zero where they are not known.
    pub(crate) parts: [u64; DowntimeParts::COUNT],
    /// CPU time of the source's threads.
    pub(crate) cpu: Duration,
}

/// Why a side ends a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AbortReason {
    /// Something failed.
    Failed,
    /// A person cancelled.
    Cancelled,
    /// It does not fit.
    Refused,
    /// Nothing ends: this side keeps the guest, paused, which has run there or may have. A person decides.
    Kept,
    /// The guest has ended, at the source: there is none to run.
    Ended(GuestEnd),
}

/// Either way: this side ends the migration. From the destination it means, unless the reason is Kept, that the guest will
/// never run there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Abort {
    pub(crate) reason: AbortReason,
    /// Where the guest is, as far as the sender knows.
    pub(crate) guest: GuestPlace,
    pub(crate) epoch: u64,
    /// In words.
    pub(crate) text: String,
}

/// A control message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Message {
    Start(Start),
    /// Destination to source: RAM may come. Names the features that will be used.
    Accepted {
        features: Vec<String>,
    },
    RoundDone(Box<RoundDone>),
    Mark(Mark),
    MarkAck(MarkAck),
    Section(Section),
    Offer(Offer),
    Ready(Ready),
    Release(Release),
    Running(Running),
    Done(Done),
    Abort(Abort),
    /// Source to destination, over a new connection: where do you stand?
    Query {
        epoch: u64,
    },
    /// Either way, on any connection: this side is alive, and this is what has come.
    Heartbeat(Heartbeat),
    Stopped(Stopped),
    Probe(Probe),
    Probed(Probed),
}

fn duration_out(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl Start {
    /// The layout of `ram`.
    pub(crate) fn layout(ram: &Ram) -> Vec<BlockLayout> {
        ram.blocks()
            .iter()
            .map(|block| BlockLayout {
                name: block.name().to_owned(),
                size_bytes: block.size_bytes(),
                host_page_size: block.host_page_size(),
            })
            .collect()
    }

    fn encode(&self, out: &mut Writer) {
        out.u8(self.channels);
        out.u16(self.features.len() as u16);
        for feature in &self.features {
            out.u8(u8::from(feature.required));
            out.name(&feature.name);
        }
        out.u16(self.blocks.len() as u16);
        for block in &self.blocks {
            out.u64(block.size_bytes);
            out.u64(block.host_page_size);
            out.name(&block.name);
        }
        out.bytes(&self.profile);
        out.u64(duration_out(self.downtime_limit));
    }

    fn decode(input: &mut Reader<'_>) -> Result<Self, WireError> {
        let channels = input.u8()?;
        let mut features = Vec::new();
        for _ in 0..input.u16()? {
            let required = flag(input.u8()?)?;
            features.push(Feature { required, name: input.name()? });
        }
        let mut blocks = Vec::new();
        for _ in 0..input.u16()? {
            let (size_bytes, host_page_size) = (input.u64()?, input.u64()?);
            blocks.push(BlockLayout { size_bytes, host_page_size, name: input.name()? });
        }
        let profile = input.bytes(MAX_PROFILE_BYTES)?.to_vec();
        let downtime_limit = Duration::from_nanos(input.u64()?);
        Ok(Self { features, channels, blocks, profile, downtime_limit })
    }
}

fn counts_out(out: &mut Writer, pages: PageCounts) {
    pages.to_array().into_iter().for_each(|count| out.u64(count));
}

fn counts_in(input: &mut Reader<'_>) -> Result<PageCounts, WireError> {
    let mut counts = [0; PageKind::COUNT];
    for count in &mut counts {
        *count = input.u64()?;
    }
    Ok(PageCounts::from_array(counts))
}

fn parts_in(input: &mut Reader<'_>) -> Result<[u64; DowntimeParts::COUNT], WireError> {
    let mut parts = [0; DowntimeParts::COUNT];
    for part in &mut parts {
        *part = input.u64()?;
    }
    Ok(parts)
}

fn flag(value: u8) -> Result<bool, WireError> {
    match value {
        0 => Ok(false),
        1 => Ok(true),
        value => Err(WireError::Value { what: "a flag", value: u64::from(value) }),
    }
}

impl AbortReason {
    /// The first is number 0.
    const NOT_ENDED: [Self; 4] = [Self::Failed, Self::Cancelled, Self::Refused, Self::Kept];

    /// All reasons, by their numbers: the guest's ends come last, so that there can be more.
    fn all() -> impl Iterator<Item = Self> {
        Self::NOT_ENDED.into_iter().chain(GuestEnd::ALL.map(Self::Ended))
    }
}

/// The number of `value` among `all`, and back: how enums travel.
fn number<T: PartialEq>(all: impl IntoIterator<Item = T>, value: &T) -> u8 {
    all.into_iter().position(|v| v == *value).unwrap_or(0) as u8
}

fn numbered<T>(all: impl IntoIterator<Item = T>, number: u8, what: &'static str) -> Result<T, WireError> {
    all.into_iter().nth(usize::from(number)).ok_or(WireError::Value { what, value: u64::from(number) })
}

impl Message {
    /// The type of the frame it travels in.
    pub(crate) fn frame_type(&self) -> FrameType {
        match self {
            Self::Start(_) => FrameType::Start,
            Self::Accepted { .. } => FrameType::Accepted,
            Self::RoundDone(_) => FrameType::RoundDone,
            Self::Mark(_) => FrameType::Mark,
            Self::MarkAck(_) => FrameType::MarkAck,
            Self::Section(_) => FrameType::Section,
            Self::Offer(_) => FrameType::Offer,
            Self::Ready(_) => FrameType::Ready,
            Self::Release(_) => FrameType::Release,
            Self::Running(_) => FrameType::Running,
            Self::Done(_) => FrameType::Done,
            Self::Abort(_) => FrameType::Abort,
            Self::Query { .. } => FrameType::Query,
            Self::Heartbeat(_) => FrameType::Heartbeat,
            Self::Stopped(_) => FrameType::Stopped,
            Self::Probe(_) => FrameType::Probe,
            Self::Probed(_) => FrameType::Probed,
        }
    }

    /// Its name in errors.
    pub(crate) fn name(&self) -> &'static str {
        self.frame_type().name()
    }

    /// The body.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Writer::default();
        match self {
            Self::Start(start) => start.encode(&mut out),
            Self::Accepted { features } => {
                out.u16(features.len() as u16);
                features.iter().for_each(|name| out.name(name));
            }
            Self::RoundDone(round) => {
                out.u32(round.number);
                out.u64(duration_out(round.duration));
                out.u64(round.ram_bytes);
                out.u64(round.transferred_bytes);
                counts_out(&mut out, round.pages);
                out.u64(round.dirty_bytes);
                out.u64(round.bandwidth);
                out.u64(round.dirty_rate);
                out.u64(duration_out(round.predicted_downtime));
                out.u64(duration_out(round.downtime_limit));
                let DeltaCounts { hits, misses, overflows, saved_bytes } = round.delta;
                [hits, misses, overflows, saved_bytes].into_iter().for_each(|count| out.u64(count));
                let throttle = round.throttle.get(..MAX_THROTTLED).unwrap_or(&round.throttle);
                out.u8(throttle.len() as u8);
                throttle.iter().for_each(|vcpu| out.0.extend([vcpu.now, vcpu.most]));
                out.text(&round.not_converging, MAX_TEXT_BYTES);
                out.u8(u8::from(round.then_stopped));
            }
            Self::Mark(mark) => out.u32(mark.round),
            Self::MarkAck(ack) => {
                out.u32(ack.round);
                out.u8(ack.channel);
            }
            Self::Section(section) => {
                out.u32(section.instance);
                out.u32(section.version);
                out.u8(u8::from(section.need == Need::Optional));
                out.u64(section.checksum);
                out.u64(section.total_bytes);
                out.name(&section.name);
                out.0.extend(&section.piece);
            }
            Self::Offer(offer) => {
                out.u32(offer.last_round);
                out.u32(offer.sections);
                counts_out(&mut out, offer.pages);
                out.u8(u8::from(offer.run));
                offer.parts.into_iter().for_each(|part| out.u64(part));
            }
            Self::Running(running) => {
                out.u64(duration_out(running.load));
                out.u64(duration_out(running.resume));
                out.u64(duration_out(running.cpu));
                out.u64(running.epoch);
            }
            Self::Done(done) => {
                out.u64(duration_out(done.downtime));
                done.parts.into_iter().for_each(|part| out.u64(part));
                out.u64(duration_out(done.cpu));
            }
            Self::Abort(abort) => {
                out.u8(number(AbortReason::all(), &abort.reason));
                out.u8(number(GuestPlace::ALL, &abort.guest));
                out.u64(abort.epoch);
                out.text(&abort.text, MAX_TEXT_BYTES);
            }
            Self::Ready(ready) => {
                out.u64(ready.epoch);
                out.u64(ready.question);
            }
            Self::Release(release) => {
                out.u64(release.epoch);
                out.u64(release.question);
                out.u64(duration_out(release.lease));
            }
            Self::Query { epoch } => out.u64(*epoch),
            Self::Heartbeat(heartbeat) => {
                out.u64(heartbeat.received);
                out.u64(heartbeat.unread);
            }
            Self::Stopped(stopped) => {
                out.u64(duration_out(stopped.stopped));
                out.u64(stopped.dirty_bytes);
                out.u8(u8::from(stopped.waits));
            }
            Self::Probe(probe) => {
                out.u32(probe.number);
                out.u8(u8::from(probe.last));
                out.u64(probe.checksum);
                out.0.extend(&probe.piece);
            }
            Self::Probed(probed) => {
                out.u32(probed.number);
                [probed.load, probed.resume, probed.late].into_iter().for_each(|time| out.u64(duration_out(time)));
            }
        }
        out.0
    }

    /// Decodes the body of a frame of type `frame_type`, which is not Pages.
    pub(crate) fn decode(frame_type: FrameType, body: &[u8]) -> Result<Self, WireError> {
        let mut input = Reader::new(body, frame_type.name());
        let message = match frame_type {
            FrameType::Start => Self::Start(Start::decode(&mut input)?),
            FrameType::Accepted => {
                let count = input.u16()?;
                Self::Accepted { features: (0..count).map(|_| input.name()).collect::<Result<_, _>>()? }
            }
            FrameType::RoundDone => Self::RoundDone(Box::new(RoundDone {
                number: input.u32()?,
                duration: Duration::from_nanos(input.u64()?),
                ram_bytes: input.u64()?,
                transferred_bytes: input.u64()?,
                pages: counts_in(&mut input)?,
                dirty_bytes: input.u64()?,
                bandwidth: input.u64()?,
                dirty_rate: input.u64()?,
                predicted_downtime: Duration::from_nanos(input.u64()?),
                downtime_limit: Duration::from_nanos(input.u64()?),
                delta: DeltaCounts {
                    hits: input.u64()?,
                    misses: input.u64()?,
                    overflows: input.u64()?,
                    saved_bytes: input.u64()?,
                },
                throttle: {
                    let count = input.u8()?;
                    let mut throttled = || {
                        let [now, most] = [input.u8()?, input.u8()?];
                        match now.max(most) {
                            much @ 100.. => Err(WireError::Value { what: "a vCPU's throttle", value: u64::from(much) }),
                            _ => Ok(Throttled { now, most }),
                        }
                    };
                    (0..count).map(|_| throttled()).collect::<Result<_, _>>()?
                },
                not_converging: input.text()?,
                then_stopped: flag(input.u8()?)?,
            })),
            FrameType::Mark => Self::Mark(Mark { round: input.u32()? }),
            FrameType::MarkAck => Self::MarkAck(MarkAck { round: input.u32()?, channel: input.u8()? }),
            FrameType::Section => Self::Section(Section {
                instance: input.u32()?,
                version: input.u32()?,
                need: if flag(input.u8()?)? { Need::Optional } else { Need::Required },
                checksum: input.u64()?,
                total_bytes: input.u64()?,
                name: input.name()?,
                piece: input.rest().to_vec(),
            }),
            FrameType::Offer => Self::Offer(Offer {
                last_round: input.u32()?,
                sections: input.u32()?,
                pages: counts_in(&mut input)?,
                run: flag(input.u8()?)?,
                parts: parts_in(&mut input)?,
            }),
            FrameType::Ready => Self::Ready(Ready { epoch: input.u64()?, question: input.u64()? }),
            FrameType::Release => Self::Release(Release {
                epoch: input.u64()?,
                question: input.u64()?,
                lease: Duration::from_nanos(input.u64()?),
            }),
            FrameType::Running => Self::Running(Running {
                load: Duration::from_nanos(input.u64()?),
                resume: Duration::from_nanos(input.u64()?),
                cpu: Duration::from_nanos(input.u64()?),
                epoch: input.u64()?,
            }),
            FrameType::Done => Self::Done(Done {
                downtime: Duration::from_nanos(input.u64()?),
                parts: parts_in(&mut input)?,
                cpu: Duration::from_nanos(input.u64()?),
            }),
            FrameType::Abort => Self::Abort(Abort {
                reason: numbered(AbortReason::all(), input.u8()?, "the reason of an Abort")?,
                guest: numbered(GuestPlace::ALL, input.u8()?, "the guest's place")?,
                epoch: input.u64()?,
                text: input.text()?,
            }),
            FrameType::Stopped => Self::Stopped(Stopped {
                stopped: Duration::from_nanos(input.u64()?),
                dirty_bytes: input.u64()?,
                waits: flag(input.u8()?)?,
            }),
            FrameType::Probe => Self::Probe(Probe {
                number: input.u32()?,
                last: flag(input.u8()?)?,
                checksum: input.u64()?,
                piece: input.rest().to_vec(),
            }),
            FrameType::Probed => Self::Probed(Probed {
                number: input.u32()?,
                load: Duration::from_nanos(input.u64()?),
                resume: Duration::from_nanos(input.u64()?),
                late: Duration::from_nanos(input.u64()?),
            }),
            FrameType::Query => Self::Query { epoch: input.u64()? },
            FrameType::Heartbeat => Self::Heartbeat(Heartbeat { received: input.u64()?, unread: input.u64()? }),
            FrameType::Pages => return Err(WireError::Value { what: "a message's type", value: 32 }),
        };
        input.end()?;
        Ok(message)
    }
}
