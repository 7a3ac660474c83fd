//! One client's dialogue: greeting, negotiation, then commands until it goes.
//!
//! A thread reads and one writes. Commands are carried out by the reading thread, one after the other, unless the client
//! has asked for out-of-band execution: then a third thread carries them out, and the reading thread those that are
//! out of band. As many commands as QEMU lets wait may wait for it; then nothing is read until one is done.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{self, SyncSender};
use std::sync::{Arc, Mutex};
use std::thread::{self, Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::commands::{self, Call};
use crate::events::ShutdownCause;
use crate::framing::{FramingError, Splitter};
use crate::hmp;
use crate::input::{self, Pending};
use crate::outbox::{Gone, Outbox};
use crate::protocol::{self, Band, OutOfBand, Refusal, Request};
use crate::vm::Vm;

/// Commands that may wait for their turn beside the one that has it.
const QUEUED: usize = 8;
/// How long the reply to `quit` may take to reach its client.
const FAREWELL: Duration = Duration::from_secs(1);
/// How long a client that sends no more may take to read what it has asked for.
const LAST_READ: Duration = Duration::from_secs(30);
/// Bytes that are read at once.
const READ_BYTES: usize = 16 << 10;

/// Serves a client until it closes.
///
/// # Errors
/// When it cannot be read from, or a thread cannot be started.
pub(crate) fn serve(outbox: &Arc<Outbox>, vm: &Vm) -> io::Result<()> {
    let human = Mutex::default();
    thread::scope(|threads| {
        thread::Builder::new().name("qmp-writer".to_owned()).spawn_scoped(threads, || outbox.write_all())?;
        let outcome = read_all(outbox, vm, &human, threads);
        // Everything is answered, and may take some time to be read.
        outbox.finish();
        outbox.drain(Instant::now() + LAST_READ);
        outbox.close();
        outcome
    })
}

fn read_all<'scope, 'env>(
    outbox: &'env Arc<Outbox>,
    vm: &'env Vm,
    human: &'env Mutex<hmp::Session>,
    threads: &'scope Scope<'scope, 'env>,
) -> io::Result<()> {
    if outbox.reply(protocol::line(&protocol::greeting())).is_err() {
        return Ok(());
    }
    let mut session = Session { vm, outbox, human, threads, state: State::Negotiating };
    let (mut splitter, mut pending) = (Splitter::new(), Pending::default());
    let mut buffer = [0; READ_BYTES];
    loop {
        let read = input::receive(outbox.socket().as_fd(), &mut buffer, &mut pending)?;
        if read == 0 {
            return Ok(());
        }
        for byte in buffer.iter().take(read) {
            let Some(text) = splitter.push(*byte) else { continue };
            if session.take(text, &mut pending).is_err() {
                return Ok(());
            }
        }
    }
}

/// Something that is to be answered.
struct Task {
    id: Option<Value>,
    request: Result<Request, Refusal>,
    descriptor: Option<OwnedFd>,
}

enum State<'scope> {
    Negotiating,
    /// Commands are carried out as they are read.
    Plain,
    /// Commands are carried out by a thread of their own.
    OutOfBand(Worker<'scope>),
}

struct Session<'scope, 'env> {
    vm: &'env Vm,
    outbox: &'env Arc<Outbox>,
    human: &'env Mutex<hmp::Session>,
    threads: &'scope Scope<'scope, 'env>,
    state: State<'scope>,
}

impl Session<'_, '_> {
    fn take(&mut self, text: Result<Vec<u8>, FramingError>, pending: &mut Pending) -> Result<(), Gone> {
        let out_of_band = match self.state {
            State::OutOfBand(_) => OutOfBand::On,
            State::Negotiating | State::Plain => OutOfBand::Off,
        };
        let (id, request) = match text {
            Err(error) => (None, Err(error.into())),
            Ok(text) => protocol::parse_request(&text, out_of_band),
        };
        let takes_descriptor = request.as_ref().is_ok_and(|request| request.command == commands::GETFD);
        let descriptor = if takes_descriptor { pending.take() } else { None };
        if !takes_descriptor {
            pending.pass_over();
        }
        let task = Task { id, request, descriptor };
        let at_once = task.request.as_ref().is_ok_and(|request| request.band == Band::OutOf);
        match &self.state {
            State::Negotiating => self.negotiate(task),
            // Errors wait their turn too: answers come in the order of what is answered.
            State::OutOfBand(worker) if !at_once => worker.take(task),
            State::OutOfBand(_) | State::Plain => answer(self.vm, self.human, self.outbox, task),
        }
    }

    /// Before the negotiation, nothing else is carried out.
    fn negotiate(&mut self, task: Task) -> Result<(), Gone> {
        // A browser can be made to send a machine's commands behind the lines of its own protocol.
        let gives_up = task.request.is_err() && !self.outbox.is_local();
        let outcome = task.request.and_then(|request| match request.command.as_str() {
            commands::NEGOTIATE => commands::negotiate(&request.arguments),
            _ => Err(Refusal::not_found("Expecting capabilities negotiation with 'qmp_capabilities'")),
        });
        let outcome = outcome.and_then(|wanted| {
            self.state = match wanted {
                OutOfBand::Off => State::Plain,
                OutOfBand::On => State::OutOfBand(
                    Worker::start(self.vm, self.human, self.outbox, self.threads)
                        .map_err(|error| Refusal::generic(format_args!("could not start a thread: {error}")))?,
                ),
            };
            Ok(Value::Object(serde_json::Map::new()))
        });
        let negotiated = outcome.is_ok();
        let reply = protocol::line(&protocol::reply(task.id, outcome));
        if negotiated {
            return self.vm.events().listen(self.outbox, reply);
        }
        self.outbox.reply(reply)?;
        if gives_up { Err(Gone) } else { Ok(()) }
    }
}

/// The thread that carries out the commands of a client that may send others out of band. Dropping this waits until it
/// has carried out those that it was given.
struct Worker<'scope> {
    queue: Option<SyncSender<Task>>,
    thread: Option<ScopedJoinHandle<'scope, ()>>,
}

impl<'scope> Worker<'scope> {
    fn start<'env>(
        vm: &'env Vm,
        human: &'env Mutex<hmp::Session>,
        outbox: &'env Arc<Outbox>,
        threads: &'scope Scope<'scope, 'env>,
    ) -> io::Result<Self> {
        let (queue, tasks) = mpsc::sync_channel::<Task>(QUEUED);
        // What a client that is gone has asked for is not done any more, but for what is being done.
        let run = move || {
            for task in tasks {
                if !outbox.is_closed() {
                    let _ = answer(vm, human, outbox, task);
                }
            }
        };
        let thread = thread::Builder::new().name("qmp-worker".to_owned()).spawn_scoped(threads, run)?;
        Ok(Self { queue: Some(queue), thread: Some(thread) })
    }

    fn take(&self, task: Task) -> Result<(), Gone> {
        self.queue.as_ref().ok_or(Gone)?.send(task).map_err(|_| Gone)
    }
}

impl Drop for Worker<'_> {
    fn drop(&mut self) {
        self.queue = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Carries out a command and answers.
fn answer(vm: &Vm, human: &Mutex<hmp::Session>, outbox: &Outbox, task: Task) -> Result<(), Gone> {
    let mut quits = false;
    let outcome = task.request.and_then(|request| {
        quits = commands::quits(&request.command, &request.arguments);
        commands::execute(
            Call { vm, human, arguments: request.arguments, descriptor: task.descriptor },
            &request.command,
            request.band,
        )
    });
    // What the command has made happen comes before its reply.
    vm.deliver_events();
    quits &= outcome.is_ok();
    if quits {
        vm.events().shutdown(ShutdownCause::HostQmpQuit);
    }
    let replied = outbox.reply(protocol::line(&protocol::reply(task.id, outcome)));
    if quits {
        // Even if the client is gone before it hears the answer: it did ask.
        outbox.drain(Instant::now() + FAREWELL);
        vm.request_quit();
    }
    replied
}
