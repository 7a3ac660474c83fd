//! The handover under a model checker.
//!
//! The network loses, repeats, delays and reorders; either side may fail, cancel, notice a lost link, or die, at any
//! step; the source may connect again at any time. Checked in every reachable state: never two owners; and if both
//! hosts live, then from there, with the link back and nothing else going wrong, exactly one owner is reached.

use std::collections::BTreeSet;

use stateright::{Checker, Model, Property};

use super::*;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum ToDestination {
    Offer,
    Release,
    /// A Release that the destination takes for too old.
    StaleRelease,
    Done,
    Abort,
    Query,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum ToSource {
    Ready,
    Running,
    Aborted,
    Kept,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct World {
    source: SourceState,
    destination: DestinationState,
    /// The guest runs, or may run, on that side.
    runs_at_source: bool,
    runs_at_destination: bool,
    source_alive: bool,
    destination_alive: bool,
    /// Messages under way. As sets: delivering one leaves it there (repetition, delay) until it is dropped (loss).
    to_destination: BTreeSet<ToDestination>,
    to_source: BTreeSet<ToSource>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Step {
    Source(SourceEvent),
    Destination(DestinationEvent),
    DeliverToDestination(ToDestination),
    DeliverToSource(ToSource),
    LoseToDestination(ToDestination),
    LoseToSource(ToSource),
    SourceDies,
    DestinationDies,
}

impl World {
    fn start() -> Self {
        Self {
            source: SourceState::Running,
            destination: DestinationState::Loading,
            runs_at_source: true,
            runs_at_destination: false,
            source_alive: true,
            destination_alive: true,
            to_destination: BTreeSet::new(),
            to_source: BTreeSet::new(),
        }
    }

    fn source(&mut self, event: SourceEvent) -> bool {
        let Ok((next, actions)) = self.source.on(event) else { return false };
        self.source = next;
        for action in actions {
            match action {
                SourceAction::PauseGuest => self.runs_at_source = false,
                SourceAction::ResumeGuest => self.runs_at_source = true,
                SourceAction::SendOffer => drop(self.to_destination.insert(ToDestination::Offer)),
                SourceAction::SendRelease => {
                    self.to_destination.extend([ToDestination::Release, ToDestination::StaleRelease]);
                }
                SourceAction::SendDone => drop(self.to_destination.insert(ToDestination::Done)),
                SourceAction::SendAbort => drop(self.to_destination.insert(ToDestination::Abort)),
                SourceAction::SendQuery => drop(self.to_destination.insert(ToDestination::Query)),
                // Only after a decision, which is taken here only when the other side is dead.
                SourceAction::SendKept | SourceAction::Reconnect => {}
            }
        }
        true
    }

    fn destination(&mut self, event: DestinationEvent) -> bool {
        let Ok((next, actions)) = self.destination.on(event) else { return false };
        self.destination = next;
        for action in actions {
            match action {
                // From here on a vCPU may have run, whatever becomes of the start; see StartFailed below.
                DestinationAction::StartGuest => self.runs_at_destination = true,
                DestinationAction::SendReady => drop(self.to_source.insert(ToSource::Ready)),
                DestinationAction::SendRunning => drop(self.to_source.insert(ToSource::Running)),
                DestinationAction::SendAborted => drop(self.to_source.insert(ToSource::Aborted)),
                DestinationAction::SendKept => drop(self.to_source.insert(ToSource::Kept)),
                DestinationAction::PauseGuest => self.runs_at_destination = false,
                // The permit sees to it, and StartFailed follows.
                DestinationAction::RevokeStart => {}
            }
        }
        use DestinationEvent::{Expired, StartFailed, StartUnclear, Unheard};
        // In the last case a vCPU may have run, and none does any more.
        if matches!(event, StartFailed | Expired | Unheard | StartUnclear) {
            self.runs_at_destination = false;
        }
        true
    }

    fn deliver_to_destination(&mut self, message: ToDestination) -> bool {
        match message {
            // The driver turns an Offer, once everything it names is there, into Loaded.
            ToDestination::Offer => self.destination(DestinationEvent::Loaded),
            ToDestination::Release => self.destination(DestinationEvent::Release),
            ToDestination::StaleRelease => self.destination(DestinationEvent::StaleRelease),
            ToDestination::Abort => self.destination(DestinationEvent::Abort),
            ToDestination::Query => self.destination(DestinationEvent::Query),
            ToDestination::Done => false,
        }
    }

    fn deliver_to_source(&mut self, message: ToSource) -> bool {
        self.source(match message {
            ToSource::Ready => SourceEvent::Ready,
            ToSource::Running => SourceEvent::Running,
            ToSource::Aborted => SourceEvent::Aborted,
            ToSource::Kept => SourceEvent::Kept,
        })
    }

    fn apply(&mut self, step: Step) -> bool {
        match step {
            Step::Source(event) => self.source(event),
            Step::Destination(event) => self.destination(event),
            Step::DeliverToDestination(message) => self.deliver_to_destination(message),
            Step::DeliverToSource(message) => self.deliver_to_source(message),
            Step::LoseToDestination(message) => self.to_destination.remove(&message),
            Step::LoseToSource(message) => self.to_source.remove(&message),
            Step::SourceDies => {
                self.runs_at_source = false;
                std::mem::replace(&mut self.source_alive, false)
            }
            Step::DestinationDies => {
                self.runs_at_destination = false;
                std::mem::replace(&mut self.destination_alive, false)
            }
        }
    }

    /// What the drivers do once the link is back and nothing else goes wrong: the source notices the break, connects
    /// again, and every message arrives until none is left.
    fn settle(&self) -> Self {
        let mut world = self.clone();
        world.to_destination.clear();
        world.to_source.clear();
        world.destination(DestinationEvent::LinkLost);
        world.source(SourceEvent::Failed);
        world.source(SourceEvent::Reconnected);
        for _ in 0..20 {
            use DestinationState::{Retaking, Starting, TakingOver};
            if matches!(world.destination, Starting | TakingOver | Retaking) {
                world.destination(DestinationEvent::Started);
            }
            for message in std::mem::take(&mut world.to_destination) {
                // The link is good again: what is sent is not old when it arrives.
                if message == ToDestination::StaleRelease {
                    continue;
                }
                world.deliver_to_destination(message);
            }
            for message in std::mem::take(&mut world.to_source) {
                world.deliver_to_source(message);
            }
        }
        world
    }

    /// A person decides, where the destination cannot say whether the guest has run there.
    fn decided(mut self) -> Self {
        if self.destination == DestinationState::Kept && self.source == SourceState::Released {
            self.destination(DestinationEvent::TakeOver);
            self.destination(DestinationEvent::Started);
        }
        self
    }

    fn owners(&self) -> usize {
        usize::from(self.runs_at_source) + usize::from(self.runs_at_destination)
    }
}

struct Handover;

impl Model for Handover {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        vec![World::start()]
    }

    fn actions(&self, world: &World, steps: &mut Vec<Step>) {
        if world.source_alive {
            use SourceEvent::*;
            steps.extend([Pause, Offer, Failed, Reconnected].map(Step::Source));
            steps.extend(world.to_source.iter().map(|m| Step::DeliverToSource(*m)));
            steps.push(Step::SourceDies);
        }
        if world.destination_alive {
            use DestinationEvent::*;
            steps.extend(
                [Started, StartFailed, StartUnclear, Expired, Unheard, LinkLost, Failed].map(Step::Destination),
            );
            steps.extend(world.to_destination.iter().map(|m| Step::DeliverToDestination(*m)));
            steps.push(Step::DestinationDies);
        }
        // A person decides only when sure that the other host is gone.
        if world.source_alive && !world.destination_alive {
            steps.push(Step::Source(SourceEvent::TakeBack));
        }
        if world.destination_alive && !world.source_alive {
            steps.push(Step::Destination(DestinationEvent::TakeOver));
        }
        steps.extend(world.to_source.iter().map(|m| Step::LoseToSource(*m)));
        steps.extend(world.to_destination.iter().map(|m| Step::LoseToDestination(*m)));
    }

    fn next_state(&self, world: &World, step: Step) -> Option<World> {
        let mut next = world.clone();
        next.apply(step).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("never two owners", |_, world: &World| world.owners() <= 1),
            Property::always("both alive and the link back: exactly one owner", |_, world: &World| {
                !(world.source_alive && world.destination_alive) || world.settle().decided().owners() == 1
            }),
            Property::always("source dead before Release: a person can bring up what was ready", |_, world: &World| {
                let mut late = world.clone();
                let ready =
                    !world.source_alive && world.destination_alive && world.destination == DestinationState::Ready;
                if ready {
                    late.destination(DestinationEvent::TakeOver);
                }
                !ready || late.owners() == 1
            }),
            Property::always(
                "destination dead: the source has the guest or a person can take it back",
                |_, world: &World| {
                    if !world.source_alive || world.destination_alive {
                        return true;
                    }
                    let mut late = world.clone();
                    late.source(SourceEvent::Failed);
                    late.source(SourceEvent::TakeBack);
                    // Gone died with the destination, as it would on any host.
                    late.owners() == 1 || late.source == SourceState::Gone
                },
            ),
            Property::sometimes("a guest that may have run is kept", |_, world: &World| {
                world.destination == DestinationState::Kept
            }),
            Property::sometimes("the guest arrives", |_, world: &World| world.source == SourceState::Gone),
            Property::sometimes("the guest is taken back after Release", |_, world: &World| {
                world.source == SourceState::TookBack && world.to_destination.contains(&ToDestination::Release)
            }),
            Property::sometimes("a lost Running is heard by asking again", |_, world: &World| {
                world.source == SourceState::Released
                    && world.destination == DestinationState::Running
                    && !world.to_source.contains(&ToSource::Running)
            }),
        ]
    }
}

#[test]
fn model_holds() {
    let checker = Handover.checker().threads(2).spawn_bfs().join();
    checker.assert_properties();
    let states = checker.unique_state_count();
    println!("handover: {states} states checked");
    assert!(states > 1000, "only {states} states: the model has lost its faults");
}

/// The model can fail: a source that takes the guest back after Release, as some do, gives two owners.
#[test]
fn model_finds_a_source_that_takes_back_after_release() {
    let mut world = World::start();
    for step in [
        Step::Source(SourceEvent::Pause),
        Step::Source(SourceEvent::Offer),
        Step::DeliverToDestination(ToDestination::Offer),
        Step::DeliverToSource(ToSource::Ready),
        Step::DeliverToDestination(ToDestination::Release),
        Step::Source(SourceEvent::TakeBack),
    ] {
        assert!(world.apply(step), "{step:?}");
    }
    assert_eq!(world.owners(), 2);
}

#[test]
fn a_row_for_a_pair_and_no_more() {
    for (index, row) in SOURCE_TABLE.iter().enumerate() {
        assert!(!SOURCE_TABLE[..index].iter().any(|r| (r.0, r.1) == (row.0, row.1)), "{row:?} twice");
    }
    for (index, row) in DESTINATION_TABLE.iter().enumerate() {
        assert!(!DESTINATION_TABLE[..index].iter().any(|r| (r.0, r.1) == (row.0, row.1)), "{row:?} twice");
    }
}

/// `docs/handover.md` shows the tables as they are here.
#[test]
fn documented() {
    fn line(from: &dyn std::fmt::Debug, on: &dyn std::fmt::Debug, to: &dyn std::fmt::Debug, actions: &str) -> String {
        format!("| {from:?} | {on:?} | {to:?} | {} |", actions.trim_matches(['[', ']']))
    }
    let expected: Vec<String> = SOURCE_TABLE
        .iter()
        .map(|(f, o, t, a)| line(f, o, t, &format!("{a:?}")))
        .chain(DESTINATION_TABLE.iter().map(|(f, o, t, a)| line(f, o, t, &format!("{a:?}"))))
        .collect();
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/handover.md");
    let document = std::fs::read_to_string(path).unwrap();
    let shown: Vec<&str> =
        document.lines().filter(|l| l.starts_with("| ") && !l.contains("---") && !l.contains("| event |")).collect();
    assert_eq!(shown, expected, "docs/handover.md is stale; its rows should be:\n{}", expected.join("\n"));
}
