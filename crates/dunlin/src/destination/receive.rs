//! A channel's receiving thread: frames in, pages to their place, messages to the session.

use std::sync::Arc;
use std::sync::mpsc::Sender;

use super::Event;
use super::placement::Placement;
use crate::error::Cause;
use crate::link::{ChannelCounters, CpuTime, FrameReceiver, LastHeard, Received, spawn};
use crate::wire::Message;

/// What a connection carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Carries {
    /// Messages.
    Control,
    /// Pages, and marks.
    Pages {
        /// The channel's number.
        channel: u8,
    },
    /// Both; the pages are channel 0's.
    Everything,
}

impl Carries {
    fn channel(self) -> Option<u8> {
        match self {
            Self::Control => None,
            Self::Pages { channel } => Some(channel),
            Self::Everything => Some(0),
        }
    }
}

/// A connection's receiving thread and what it needs.
pub(super) struct Receiving {
    pub(super) receiver: FrameReceiver,
    pub(super) carries: Carries,
    pub(super) placement: Arc<Placement>,
    /// Pages are counted here.
    pub(super) counters: Arc<ChannelCounters>,
    pub(super) heard: Arc<LastHeard>,
    pub(super) events: Sender<Event>,
}

impl Receiving {
    /// Starts the thread. It ends with the connection, or at the first thing that is wrong, after telling.
    pub(super) fn start(mut self, cpu: &Arc<CpuTime>) -> Result<std::thread::JoinHandle<()>, Cause> {
        let cpu = cpu.clone();
        spawn("destination receiver", move || {
            let mut meter = cpu.meter();
            let mut runs = Vec::new();
            loop {
                let event = match self.step(&mut runs) {
                    Ok(None) => continue,
                    Ok(Some(event)) => event,
                    Err(cause) => Event::Lost { control: self.is_control(), cause },
                };
                // Before the event, so that whoever acts on it finds the time up to here counted.
                meter.add();
                let last = matches!(event, Event::Lost { .. });
                if self.events.send(event).is_err() || last {
                    return;
                }
            }
        })
    }

    fn is_control(&self) -> bool {
        !matches!(self.carries, Carries::Pages { .. })
    }

    fn step(&mut self, runs: &mut Vec<crate::wire::PageRun>) -> Result<Option<Event>, Cause> {
        let received = self.receiver.next(self.placement.block_bytes(), runs)?;
        self.heard.touch();
        match (received, self.carries.channel()) {
            (Received::Pages(frame), Some(_)) => {
                self.placement.place(&self.receiver, frame, runs, &self.counters)?;
                Ok(None)
            }
            (Received::Pages(_), None) => {
                Err(Cause::Unexpected { message: "Pages", expected: "a message on the control connection" })
            }
            (Received::Message(Message::Mark(mark)), Some(channel)) => {
                Ok(Some(Event::Mark { channel, round: mark.round }))
            }
            (Received::Message(Message::Heartbeat), _) => Ok(None),
            (Received::Message(message), _) if self.is_control() => Ok(Some(Event::Message(message))),
            (Received::Message(message), _) => {
                Err(Cause::Unexpected { message: message.name(), expected: "Pages or Mark" })
            }
        }
    }
}
