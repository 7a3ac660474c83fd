//! The driving thread: setup, precopy rounds, and the way into the switchover.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant};

use super::auto_converge::AutoConverge;
use super::contention::Contention;
use super::convergence::{self, Costs, Decision, RoundFigures, Verdict};
use super::costs::{self, Fixed, Measured, Probes};
use super::dirty::DirtyRam;
use super::marks::Marks;
use super::setup::{self, Control};
use super::switchover::PIECE_BYTES;
use super::worker::Common;
use super::workers::Workers;
use super::{Event, Shared, switchover};
use crate::channel::Connections;
use crate::error::{Cause, MachineStep, Phase};
use crate::guest::GuestEvent;
use crate::link::{contain, lock, standstill};
use crate::machine::SwitchoverCost;
use crate::report::{PageCounts, Round, Status};
use crate::to_go::{self, ToGo};
use crate::units::format_size;
use crate::wire::{Message, Probe, Probed, RoundDone, SessionId, data_checksum};

/// How long the machine may take to answer while the guest runs.
pub(super) const MACHINE_LIMIT: Duration = Duration::from_secs(30);

/// Pause before the next round while not the guest's writes but the switchover itself takes too long: only a change of
/// parameters can help.
const NOTHING_TO_GAIN: Duration = Duration::from_millis(100);

/// A connection that has carried nothing for this long is tried before the guest may be stopped.
const PROVEN: Duration = Duration::from_secs(1);

/// A migration on its way.
pub(super) struct Migration<'a> {
    pub(super) shared: &'a Shared,
    pub(super) incoming: &'a Receiver<Event>,
    pub(super) control: Control,
    pub(super) workers: Workers,
    pub(super) common: Arc<Common>,
    pub(super) rounds: Vec<RoundFigures>,
    pub(super) auto_converge: AutoConverge,
    last_sync: Duration,
    /// What the machine says that a switchover costs.
    declared: SwitchoverCost,
    probes: Probes,
    /// Rounds in a row in which the switchover alone takes too long.
    pub(super) too_long: u32,
    contention: Contention,
    marks: Marks,
    /// The figures at the end of the round before.
    moved_before: u64,
    pages_before: PageCounts,
}

/// The whole of a migration.
pub(super) fn run(shared: &Shared, events: &Sender<Event>, incoming: &Receiver<Event>) {
    let meter = shared.cpu.meter();
    let result = migrate(shared, events, incoming);
    // Before the end, after which no figure changes any more.
    drop(meter);
    shared.end(result);
    lock(&shared.events).take();
}

fn migrate(shared: &Shared, events: &Sender<Event>, incoming: &Receiver<Event>) -> Result<(), Cause> {
    let session =
        SessionId::random().map_err(|source| Cause::Io { doing: "make", target: "a session id".into(), source })?;
    *lock(&shared.session) = Some(session);
    lock(&shared.report).session = Some(session.to_string());
    let machine = shared.guest.machine().clone();
    let calls = shared.guest.calls();
    let tracker = calls.call(MachineStep::Track, MACHINE_LIMIT, &shared.cpu, |machine| machine.dirty_tracker())?;
    let declared = calls.declared_cost(MACHINE_LIMIT, &shared.cpu)?;
    switchover::tell_earlier(shared);
    let control = match contain("source", || setup::open(shared, session, events)) {
        Ok(control) => control,
        Err(cause) => return switchover::fail(shared, None, cause),
    };
    let channels = match contain("source", || setup::agree(shared, session, &control, incoming)) {
        Ok(channels) => channels,
        Err(cause) => return switchover::fail(shared, Some(&control), cause),
    };
    let start = || -> Result<_, Cause> {
        tracker.start()?;
        let common = Arc::new(Common {
            ram: machine.ram().clone(),
            dirty: DirtyRam::new(machine.ram(), tracker),
            pacer: shared.pacer.clone(),
            stop: Arc::new(AtomicBool::new(false)),
        });
        *lock(&shared.common) = Some(common.clone());
        let single = shared.uri.connections() == Connections::Single;
        Ok((Workers::start(&common, &channels, single, events, shared)?, common))
    };
    let (workers, common) = match contain("source", start) {
        Ok(started) => started,
        Err(cause) => return switchover::fail(shared, Some(&control), cause),
    };
    let marks = Marks::new(channels.len());
    drop(channels);
    let mut migration = Migration {
        shared,
        incoming,
        control,
        workers,
        common,
        rounds: Vec::new(),
        auto_converge: AutoConverge::new(shared.throttling),
        last_sync: Duration::ZERO,
        declared,
        probes: Probes::default(),
        too_long: 0,
        contention: Contention::new(),
        marks,
        moved_before: shared.transferred_bytes(),
        pages_before: PageCounts::default(),
    };
    match contain("source", || migration.precopy().and_then(|round| migration.switch_over(round + 1))) {
        Ok(()) => Ok(()),
        Err(cause) => {
            let cause = shared.or_wanted(cause);
            let Migration { control, workers, .. } = migration;
            // The guest first: it may be paused, and joining threads takes its time.
            let failed = switchover::begin_to_fail(shared, &cause);
            drop(workers);
            switchover::end_failing(shared, Some(&control), cause, failed)
        }
    }
}

impl Migration<'_> {
    /// Rounds until the switchover is decided; the number of the last one.
    fn precopy(&mut self) -> Result<u32, Cause> {
        lock(&self.shared.report).setup_seconds = self.shared.began.elapsed().as_secs_f64();
        for number in 1.. {
            let began = Instant::now();
            self.shared.guest.tell(GuestEvent::Pass { number });
            self.shared.set_phase(Phase::Precopy, Status::Active);
            let marked = self.send_round(number)?;
            self.await_placed()?;
            // Nothing was queued behind the last mark, so its answer took a round trip and what was queued before.
            self.shared.answered_within(marked.elapsed());
            // In a long round a channel may have had nothing to do for minutes, and have been forgotten on the way.
            self.control.confirm(PROVEN, &self.shared.stop)?;
            // Under a limit the last frame's time is not over when it has arrived. A stopped guest must not wait for it.
            self.common.pacer.settle(&self.shared.stop);
            let duration = began.elapsed();
            // Before the probe, whose bytes are not the round's.
            let moved = self.moved();
            if self.probes.are_due(Instant::now(), self.common.pacer.rate()) {
                self.probe(bytes_a_second(moved.0, duration))?;
            }
            let verdict = self.end_round(number, duration, moved)?;
            match verdict.decision {
                Decision::SwitchOver => return Ok(number),
                Decision::AnotherRound => {
                    self.throttle(number, &verdict)?;
                    if verdict.fixed_too_long {
                        self.idle(NOTHING_TO_GAIN)?;
                    }
                }
            }
        }
        Err(Cause::Unexpected { message: "too many rounds", expected: "convergence" })
    }

    /// Lets time pass.
    pub(super) fn idle(&mut self, duration: Duration) -> Result<(), Cause> {
        let until = Instant::now() + duration;
        while let Ok(event) = self.incoming.recv_timeout(until.saturating_duration_since(Instant::now())) {
            match self.shared.sorted(event, &self.control)? {
                Event::Message(message, _place) => self.during_round(message)?,
                Event::Worker(_) | Event::Lost(_) | Event::Cancel | Event::Continue => {}
            }
        }
        Ok(())
    }

    /// Sends everything that is dirty; gives when the last of it was sent.
    pub(super) fn send_round(&mut self, number: u32) -> Result<Instant, Cause> {
        self.marks.begin(number);
        self.workers.begin(number)?;
        let mut busy = self.workers.count();
        let mut failed = None;
        let mut marked = Instant::now();
        while busy > 0 {
            match self.shared.next_event(self.incoming, &self.control)? {
                Event::Worker(Ok(sent)) => {
                    busy -= 1;
                    marked = marked.max(sent);
                }
                // The destination may be about to say why.
                Event::Worker(Err(cause)) => {
                    failed = Some(cause);
                    break;
                }
                Event::Message(message, _place) => self.during_round(message)?,
                Event::Lost(_) | Event::Cancel | Event::Continue => {}
            }
        }
        match failed {
            None => Ok(marked),
            Some(cause) => Err(self.shared.reason_for(cause, self.incoming)),
        }
    }

    /// What the destination says while a round is under way.
    fn during_round(&mut self, message: Message) -> Result<(), Cause> {
        match message {
            Message::MarkAck(ack) => self.marks.acknowledge(ack),
            Message::Abort(abort) => Err(setup::aborted(&abort)),
            other => Err(Cause::Unexpected { message: other.name(), expected: "MarkAck" }),
        }
    }

    /// Waits until the destination has put everything of the round in its place: so that the time measured is the
    /// whole way's, and nothing is queued when the guest is stopped.
    fn await_placed(&mut self) -> Result<(), Cause> {
        while !self.marks.are_all_acknowledged() {
            let message = self.shared.next_message(self.incoming, &self.control)?;
            self.during_round(message)?;
        }
        Ok(())
    }

    /// Measures what the way there and back takes, and what the destination needs to take device state.
    fn probe(&mut self, bandwidth: u64) -> Result<(), Cause> {
        let bytes = Probes::size(self.shared.guest.calls().expect(self.declared).state_bytes, bandwidth);
        let began = Instant::now();
        self.answered_probe(0)?;
        let round_trip = began.elapsed();
        let (sent, rate) = (Instant::now(), self.common.pacer.rate());
        let there = self.answered_probe(bytes)?;
        let measured = Measured { round_trip, took: sent.elapsed(), bytes, rate };
        self.common.pacer.settle(&self.shared.stop);
        // What went over is no round's.
        let _ = self.moved();
        self.probes.note(began, Instant::now(), measured, there);
        Ok(())
    }

    /// Sends `bytes` as device state would be sent, and waits for the answer.
    fn answered_probe(&mut self, bytes: u64) -> Result<Probed, Cause> {
        let number = self.probes.next_number();
        let mut left = bytes;
        loop {
            let piece = costs::any_bytes(left.min(PIECE_BYTES as u64) as usize);
            left = left.saturating_sub(piece.len() as u64);
            self.common.pacer.pay(piece.len() as u64, &self.shared.stop);
            if self.stopped() {
                return Err(Cause::Cancelled);
            }
            let (last, checksum) = (left == 0, data_checksum(&piece));
            let sent = self.control.send(&Message::Probe(Probe { number, last, checksum, piece }));
            sent.map_err(|cause| self.shared.reason_for(cause, self.incoming))?;
            if last {
                break;
            }
        }
        match self.shared.next_message(self.incoming, &self.control)? {
            Message::Probed(probed) if probed.number == number => costs::believable(probed),
            Message::Abort(abort) => Err(setup::aborted(&abort)),
            other => Err(Cause::Unexpected { message: other.name(), expected: "the answer to a probe" }),
        }
    }

    /// Figures, decision, report.
    fn end_round(
        &mut self,
        number: u32,
        duration: Duration,
        (moved, pages): (u64, PageCounts),
    ) -> Result<Verdict, Cause> {
        let began = Instant::now();
        let (dirty_bytes, dirty_rate) = self.common.dirty.sync()?;
        self.last_sync = began.elapsed();
        if self.rounds.len() >= convergence::MEMORY {
            self.rounds.remove(0);
        }
        let ram_bytes = pages.total().saturating_mul(crate::memory::PAGE_SIZE);
        self.rounds.push(RoundFigures { duration, ram_bytes, transferred_bytes: moved, dirty_bytes, dirty_rate });
        let (limit, max_bandwidth, avail_switchover_bandwidth) = {
            let parameters = lock(&self.shared.parameters);
            (parameters.downtime_limit, parameters.max_bandwidth, parameters.avail_switchover_bandwidth)
        };
        let speedup_when_stopped = self.contention.factor(self.shared.cpu.total());
        let here = self.shared.guest.calls().expect(self.declared);
        let rate = convergence::limit_when_stopped(max_bandwidth, avail_switchover_bandwidth);
        let fixed = self.probes.fixed(&here, self.last_sync, rate, standstill());
        let costs = Costs { fixed: fixed.total(), max_bandwidth, avail_switchover_bandwidth, speedup_when_stopped };
        let verdict = convergence::decide(&self.rounds, &costs, limit);
        let ram_rate = to_go::ram_rate(number, ram_bytes, moved, verdict.bandwidth);
        self.common.dirty.expect(ToGo::round_beside(dirty_bytes, dirty_rate, ram_rate));
        let advice = || self.auto_converge.advice(self.shared);
        let not_converging =
            verdict.not_converging.then(|| why_not(&verdict, dirty_bytes, dirty_rate, &fixed, limit, &advice()));
        lock(&self.shared.report).not_converging.clone_from(&not_converging);
        let throttle = lock(&self.shared.report).throttled();
        let round = RoundDone {
            number,
            duration,
            ram_bytes,
            transferred_bytes: moved,
            pages,
            dirty_bytes,
            bandwidth: verdict.bandwidth,
            dirty_rate,
            predicted_downtime: verdict.predicted,
            downtime_limit: limit,
            delta: self.shared.delta_counts(),
            throttle,
            not_converging: not_converging.unwrap_or_default(),
            then_stopped: verdict.decision == Decision::SwitchOver,
        };
        self.report_round(&round);
        self.control.send(&Message::RoundDone(Box::new(round)))?;
        Ok(verdict)
    }

    fn report_round(&self, round: &RoundDone) {
        let mut report = lock(&self.shared.report);
        report.push_round(Round::from(round));
        report.bandwidth_bytes_per_second = round.bandwidth;
        report.dirty_bytes_per_second = round.dirty_rate;
        report.predicted_downtime_seconds = Some(round.predicted_downtime.as_secs_f64());
    }

    /// Bytes and pages since the round before.
    pub(super) fn moved(&mut self) -> (u64, PageCounts) {
        let moved = self.shared.transferred_bytes();
        let mut pages = PageCounts::default();
        for counters in lock(&self.shared.channels).iter() {
            pages += counters.pages();
        }
        let since = pages.since(self.pages_before);
        let bytes = moved.saturating_sub(std::mem::replace(&mut self.moved_before, moved));
        self.pages_before = pages;
        (bytes, since)
    }

    /// Totals of all rounds.
    pub(super) fn pages(&self) -> PageCounts {
        self.pages_before
    }

    pub(super) fn stopped(&self) -> bool {
        self.shared.stop.load(Ordering::Acquire)
    }
}

fn bytes_a_second(bytes: u64, time: Duration) -> u64 {
    (bytes as f64 / time.as_secs_f64().max(1e-9)) as u64
}

/// Why rounds bring nothing, in a sentence.
fn why_not(
    verdict: &Verdict,
    dirty_bytes: u64,
    dirty_rate: u64,
    fixed: &Fixed,
    limit: Duration,
    advice: &str,
) -> String {
    let limit = limit.as_secs_f64() * 1e3;
    if verdict.fixed_too_long {
        return format!(
            "stopping the guest here and starting it there takes about {:.0} ms by itself, where {limit:.0} ms are allowed: \
             {}; raise downtime-limit",
            fixed.total().as_secs_f64() * 1e3,
            fixed.longest(),
        );
    }
    format!(
        "the guest dirties {}/s while {}/s can be sent; after each round {} are dirty again, which would stop it for \
         {:.0} ms where {limit:.0} ms are allowed; {advice}",
        format_size(dirty_rate),
        format_size(verdict.bandwidth),
        format_size(dirty_bytes),
        verdict.predicted.as_secs_f64() * 1e3,
    )
}

impl From<&RoundDone> for Round {
    fn from(round: &RoundDone) -> Self {
        Self {
            number: round.number,
            seconds: round.duration.as_secs_f64(),
            ram_bytes: round.ram_bytes,
            transferred_bytes: round.transferred_bytes,
            pages: round.pages,
            dirty_bytes: round.dirty_bytes,
            bandwidth_bytes_per_second: round.bandwidth,
            dirty_bytes_per_second: round.dirty_rate,
            predicted_downtime_seconds: round.predicted_downtime.as_secs_f64(),
        }
    }
}
