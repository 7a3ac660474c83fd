//! Connecting, agreeing, and opening the data channels.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::migration::MACHINE_LIMIT;
use super::{Event, Shared};
use crate::channel::{Connection, Connections};
use crate::error::{Cause, MachineStep, Side};
use crate::link::{
    COUNTED_HELLO_BYTES, ChannelCounters, FrameReceiver, FrameSender, Part, Places, SharedSender, Watch, lock,
    say_hello, spawn,
};
use crate::page::{self, PageKind};
use crate::parameters::{Integrity, MultifdCompression, Parameters, Switch};
use crate::wire::{AbortReason, Feature, Message, Role, SessionId, Start, UNCHECKED_PAGES};

/// How long what listens at an address may say nothing to the first hello.
const SILENCE: Duration = Duration::from_secs(3);

/// A data channel: its sender and its figures.
pub(super) struct DataChannel {
    pub(super) sender: SharedSender,
    pub(super) counters: Arc<ChannelCounters>,
}

/// The control connection and what keeps it alive. Dropping it ends the connection and its threads.
pub(super) struct Control {
    pub(super) sender: SharedSender,
    connection: Arc<Connection>,
    places: Arc<Places>,
    watch: Option<Watch>,
    reader: Option<std::thread::JoinHandle<()>>,
}

impl Control {
    /// Takes over a connection whose hello was answered: has it watched, and starts its reader, which turns what comes
    /// into events.
    pub(super) fn open(
        connection: Arc<Connection>,
        counters: Arc<ChannelCounters>,
        shared: &Shared,
        events: Sender<Event>,
    ) -> Result<Self, Cause> {
        let timeout = lock(&shared.parameters).link_timeout;
        let sender: SharedSender = Arc::new(FrameSender::new(connection.clone(), counters).into());
        // How long it may take to send something is the watch's business: a slow link is not a dead one.
        connection.set_send_timeout(None)?;
        let lost = Mutex::new(events.clone());
        // Of no use to anybody when the migration has ended meanwhile.
        let lost = move |cause| drop(lock(&lost).send(Event::Lost(cause)));
        let watch = Watch::start(Part::Asks, connection.clone(), sender.clone(), timeout, lost)?;
        let watched = watch.messages();
        let mut receiver = FrameReceiver::new(connection.clone(), Arc::default());
        let cpu = shared.cpu.clone();
        let places = Arc::new(Places::default());
        let queue = places.clone();
        let contact = shared.contact.clone();
        let reader = spawn("source reader", move || {
            let _meter = cpu.meter();
            loop {
                let message = receiver.next_message();
                if message.is_ok() {
                    contact.touch();
                }
                let event = match message {
                    Ok(Message::Heartbeat(heartbeat)) => {
                        watched.hear(heartbeat);
                        continue;
                    }
                    Ok(message) => {
                        // It has everything.
                        if matches!(message, Message::Ready(_)) {
                            watched.retire_data();
                        }
                        match queue.take() {
                            Some(place) => Event::Message(message, place),
                            None => return,
                        }
                    }
                    Err(cause) => Event::Lost(cause),
                };
                let last = matches!(event, Event::Lost(_));
                if events.send(event).is_err() || last {
                    return;
                }
            }
        })?;
        Ok(Self { sender, connection, places, watch: Some(watch), reader: Some(reader) })
    }

    pub(super) fn send(&self, message: &Message) -> Result<(), Cause> {
        lock(&self.sender).send(message)
    }

    /// How long nothing was heard before the connection was given up for that, if it was.
    pub(super) fn found_silence(&self) -> Option<Duration> {
        self.watch.as_ref().and_then(Watch::found_silence)
    }

    /// The guest is stopped: a dead connection is to be found soon.
    pub(super) fn guest_stopped(&self, shared: &Shared) {
        if let Some(watch) = &self.watch {
            watch.guest_stopped(*lock(&shared.round_trip));
        }
    }

    /// Waits until every connection has carried something to the destination within the last `age`.
    ///
    /// # Errors
    /// When one is dead, or the migration is to end.
    pub(super) fn confirm(&self, age: Duration, stop: &AtomicBool) -> Result<(), Cause> {
        self.watch.as_ref().map_or(Ok(()), |watch| watch.confirm(age, stop))
    }

    /// Lets what was sent arrive before the connection is closed.
    pub(super) fn finish(&self) {
        self.connection.finish(Duration::from_secs(1));
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.connection.shutdown();
        self.places.close();
        self.watch.take();
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

/// Connects and says hello.
pub(super) fn connect(
    shared: &Shared,
    role: Role,
    session: SessionId,
    timeout: Duration,
    stop: &AtomicBool,
) -> Result<Arc<Connection>, Cause> {
    let given = lock(&shared.given).take();
    let mut connection = match given {
        Some(connection) => connection,
        None => shared.uri.connect(timeout, stop)?,
    };
    connection.rename(&role.to_string());
    let connection = Arc::new(connection);
    // Whoever sets `stop` cuts this connection, so as not to have to wait for the answer.
    *lock(&shared.greeting) = Some(connection.clone());
    // Who is no destination often waits for more. One that is known, and a command that takes its time, may do so.
    let silence = match (role, shared.uri.connections()) {
        (Role::Control, Connections::Many) => timeout.min(SILENCE),
        _ => timeout,
    };
    let asked = Instant::now();
    let stopped = || stop.load(Ordering::Acquire);
    let said = if stopped() { Err(Cause::Cancelled) } else { say_hello(&connection, role, session, silence, timeout) };
    // One that is connected again stays there, for as long as its answers are waited for.
    if role != Role::Reconnect || said.is_err() {
        lock(&shared.greeting).take();
    }
    match said {
        Err(_) if stopped() => Err(Cause::Cancelled),
        Err(cause) => Err(cause),
        Ok(()) => {
            shared.answered_within(asked.elapsed());
            Ok(connection)
        }
    }
}

/// Data channels beside the control connection.
fn data_channels(shared: &Shared) -> u8 {
    match shared.uri.connections() {
        Connections::Single => 0,
        Connections::Many => lock(&shared.parameters).data_channels(),
    }
}

/// Opens the control connection.
pub(super) fn open(shared: &Shared, session: SessionId, events: &Sender<Event>) -> Result<Control, Cause> {
    let timeout = lock(&shared.parameters).link_timeout;
    let role = if data_channels(shared) == 0 { Role::Single } else { Role::Control };
    let connection = connect(shared, role, session, timeout, &shared.stop)?;
    shared.control.bytes.fetch_add(COUNTED_HELLO_BYTES, Ordering::Relaxed);
    Control::open(connection, shared.control.clone(), shared, events.clone())
}

/// Agrees with the destination on everything and opens the data channels.
pub(super) fn agree(
    shared: &Shared,
    session: SessionId,
    control: &Control,
    incoming: &std::sync::mpsc::Receiver<Event>,
) -> Result<Vec<DataChannel>, Cause> {
    let wanted = data_channels(shared);
    let (timeout, downtime_limit) = {
        let parameters = lock(&shared.parameters);
        (parameters.link_timeout, parameters.downtime_limit)
    };
    let machine = shared.guest.machine();
    let calls = shared.guest.calls();
    let profile = calls.call(MachineStep::Profile, MACHINE_LIMIT, &shared.cpu, |machine| Ok(machine.profile()))?;
    let start = Start {
        features: features(&lock(&shared.parameters)),
        channels: wanted,
        blocks: Start::layout(machine.ram()),
        profile,
        downtime_limit,
    };
    let features = start.features.clone();
    let asked = Instant::now();
    control.send(&Message::Start(start))?;
    match shared.next_message(incoming, control)? {
        Message::Accepted { features: accepted } => {
            // The hello may have waited for the peer of an `exec` connection to come up; this has not.
            shared.answered_within(asked.elapsed());
            if let Some(missing) = features.iter().find(|f| f.required && !accepted.contains(&f.name)) {
                let reason = format!("the destination did not accept the feature {}, which is needed", missing.name);
                return Err(Cause::Incompatible { reason });
            }
        }
        Message::Abort(abort) => return Err(aborted(&abort)),
        other => return Err(Cause::Unexpected { message: other.name(), expected: "Accepted" }),
    }
    let mut channels = Vec::new();
    if wanted == 0 {
        let counters = Arc::new(ChannelCounters::default());
        lock(&control.sender).count_pages_in(counters.clone());
        if let Some(watch) = &control.watch {
            watch.tell_speed_in(counters.clone());
        }
        channels.push(DataChannel { sender: control.sender.clone(), counters });
    }
    for index in 0..wanted {
        let counters = Arc::new(ChannelCounters::default());
        let connection = connect(shared, Role::Data { index }, session, timeout, &shared.stop)
            .map_err(|cause| shared.reason_for(cause, incoming))?;
        counters.bytes.fetch_add(COUNTED_HELLO_BYTES, Ordering::Relaxed);
        connection.set_send_timeout(None)?;
        let sender: SharedSender = Arc::new(FrameSender::new(connection.clone(), counters.clone()).into());
        if let Some(watch) = &control.watch {
            watch.add(connection, sender.clone(), counters.clone());
        }
        channels.push(DataChannel { sender, counters });
    }
    lock(&shared.channels).extend(channels.iter().map(|channel| channel.counters.clone()));
    Ok(channels)
}

/// What the destination must know for this migration, and what it may.
fn features(parameters: &Parameters) -> Vec<Feature> {
    let used = |name: &str| match name {
        _ if name == PageKind::Delta.feature() => parameters.xbzrle == Switch::On,
        _ if name == PageKind::Lz4.feature() => parameters.multifd_compression == MultifdCompression::Lz4,
        _ if name == PageKind::Zstd.feature() => parameters.multifd_compression == MultifdCompression::Zstd,
        _ => true,
    };
    let mut features: Vec<_> =
        page::features().map(|name| Feature { name: name.to_owned(), required: used(name) }).collect();
    if parameters.integrity == Integrity::None {
        features.push(Feature { name: UNCHECKED_PAGES.to_owned(), required: true });
    }
    features
}

/// What an Abort from the destination means here.
pub(super) fn aborted(abort: &crate::wire::Abort) -> Cause {
    let by = Side::Destination;
    match abort.reason {
        // The guest is here: that it ended is not for the other side to say.
        AbortReason::Failed | AbortReason::Kept | AbortReason::Ended(_) => {
            Cause::Peer { by, reason: abort.text.clone() }
        }
        AbortReason::Cancelled => Cause::CancelledByPeer { by },
        AbortReason::Refused => Cause::Refused { by, reason: abort.text.clone() },
    }
}
