//! A channel's receiving thread: frames in, pages to their place, messages to the session.

use std::sync::Arc;
use std::sync::mpsc::Sender;

use super::Event;
use super::placement::{Placement, Staging};
use crate::clock::Contact;
use crate::error::Cause;
use crate::link::{
    ChannelClock, ChannelCounters, CpuTime, FrameReceiver, Place, Places, Received, Watched, contain, spawn,
};
use crate::wire::Message;

/// What a connection carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Carries {
    /// Messages.
    Control {
        /// Which of the session's connections for messages, one after the other, it is.
        link: u32,
    },
    /// Pages, and marks.
    Pages {
        /// The channel's number.
        channel: u8,
    },
    /// Both; the pages are channel 0's.
    Everything {
        /// As above.
        link: u32,
    },
}

impl Carries {
    fn channel(self) -> Option<u8> {
        match self {
            Self::Control { .. } => None,
            Self::Pages { channel } => Some(channel),
            Self::Everything { .. } => Some(0),
        }
    }

    /// Whether messages come on it too.
    fn link(self) -> Option<u32> {
        match self {
            Self::Control { link } | Self::Everything { link } => Some(link),
            Self::Pages { .. } => None,
        }
    }
}

/// What a receiving thread waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Between {
    /// The next frame of a round.
    Frames,
    /// A round.
    Rounds,
}

/// A connection's receiving thread and what it needs.
pub(super) struct Receiving {
    pub(super) receiver: FrameReceiver,
    pub(super) carries: Carries,
    pub(super) placement: Arc<Placement>,
    /// Pages are counted here.
    pub(super) counters: Arc<ChannelCounters>,
    pub(super) watched: Watched,
    /// Where decisions look for when the source was last heard of; only on the connection for messages.
    pub(super) contact: Option<Arc<Contact>>,
    pub(super) events: Sender<Event>,
    pub(super) places: Arc<Places>,
    pub(super) staging: Staging,
}

impl Receiving {
    /// Starts the thread. It ends with the connection, or at the first thing that is wrong, after telling.
    pub(super) fn start(mut self, cpu: &Arc<CpuTime>) -> Result<std::thread::JoinHandle<()>, Cause> {
        let cpu = cpu.clone();
        spawn("destination receiver", move || {
            let mut meter = cpu.meter();
            let mut clock = ChannelClock::start(self.counters.clone());
            let mut runs = Vec::new();
            let mut between = Between::Rounds;
            loop {
                let step = contain("destination receiver", || self.step(&mut runs, &mut clock, &mut between));
                clock.lap();
                let event = match step {
                    Ok(None) => continue,
                    Ok(Some(event)) => event,
                    Err(cause) => match self.carries.link() {
                        Some(link) => {
                            // Whoever is busy with the guest must know before it comes to the event.
                            if let Some(contact) = &self.contact {
                                contact.lose();
                            }
                            Event::Lost { link, cause }
                        }
                        None => Event::ChannelLost(cause),
                    },
                };
                // Before the event, so that whoever acts on it finds the time up to here counted.
                meter.add();
                let last = matches!(event, Event::Lost { .. } | Event::ChannelLost(_));
                if self.events.send(event).is_err() || last {
                    return;
                }
            }
        })
    }

    fn place(&self) -> Result<Place, Cause> {
        let name = || self.receiver.connection().name().to_owned();
        self.places.take().ok_or_else(|| Cause::Closed { channel: name() })
    }

    fn step(
        &mut self,
        runs: &mut Vec<crate::wire::PageRun>,
        clock: &mut ChannelClock,
        between: &mut Between,
    ) -> Result<Option<Event>, Cause> {
        let received = self.receiver.next(self.placement.block_bytes(), runs);
        if *between == Between::Rounds {
            // No round was under way, so nothing was waited for.
            clock.skip();
        }
        let received = received?;
        *between = match received {
            Received::Pages => Between::Frames,
            Received::Message(_) => Between::Rounds,
        };
        if let Some(contact) = &self.contact {
            contact.touch();
        }
        match (received, self.carries.channel()) {
            (Received::Pages, Some(channel)) => {
                self.placement.place(channel, &self.receiver, runs, &self.counters, &mut self.staging)?;
                Ok(None)
            }
            (Received::Pages, None) => {
                Err(Cause::Unexpected { message: "Pages", expected: "a message on the control connection" })
            }
            (Received::Message(Message::Mark(mark)), Some(channel)) => {
                self.placement.complete(channel)?;
                Ok(Some(Event::Mark { channel, round: mark.round, place: self.place()? }))
            }
            (Received::Message(Message::Heartbeat(heartbeat)), _) => {
                self.watched.hear(heartbeat);
                Ok(None)
            }
            (Received::Message(message), _) if self.carries.link().is_some() => {
                Ok(Some(Event::Message(message, self.place()?)))
            }
            (Received::Message(message), _) => {
                Err(Cause::Unexpected { message: message.name(), expected: "Pages or Mark" })
            }
        }
    }
}
