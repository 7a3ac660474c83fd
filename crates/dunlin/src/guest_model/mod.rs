//! Who may run the guest, over the real [`Guest`] and the source's real driver.
//!
//! Two guests, each with a machine that is slow, fails, panics or hangs, are driven by a migration between them over links
//! that are cut, lost, and repeat themselves, while people give commands and decide, strangers connect, and hosts freeze,
//! are suspended, or die. All threads run in a [`Simulation`], so that a schedule is a number. Of the code of the source
//! everything is real that decides (`settle`, `advance`, `begin_to_fail`); of the destination's the loop in [`destination`]
//! stands for `Session` and the acceptor.
//!
//! Checked at each entry of a vCPU: no two run, unless a person has decided without looking. Checked at the end of each
//! schedule, with nothing going wrong any more: exactly one side has the guest or can be decided to have it, and the only
//! copy was not thrown away.

mod destination;
mod source;
mod vm;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crate::error::Cause;
use crate::guest::{Guest, GuestEnd, Ownership, TakeBack};
use crate::sync::control::{self, fail, note, random, spawn_on};
use crate::sync::simulated::{Simulation, seeded};
use crate::sync::{Fault, JoinHandle, mpsc, sleep};
use crate::wire::Message;
use vm::Vm;

const A: usize = 1;
const B: usize = 2;
/// `link-timeout`.
const LINK_TIMEOUT: Duration = Duration::from_secs(2);
/// What a side knows of the other's life.
const BEAT: Duration = Duration::from_millis(500);

/// Everything that is not the engine's.
struct World {
    vms: OnceLock<[Arc<Vm>; 2]>,
    guests: OnceLock<[Arc<Guest>; 2]>,
    dead: [AtomicBool; 3],
    /// When, on the clock that never stands still.
    died: std::sync::Mutex<[Option<Duration>; 3]>,
    /// Things may go wrong.
    chaos: AtomicBool,
    /// No connection is made, and those there were are silent.
    parted: AtomicBool,
    links: std::sync::Mutex<Vec<Arc<LinkState>>>,
    listener: std::sync::Mutex<Option<mpsc::Sender<Incoming>>>,
    source: std::sync::Mutex<Option<Arc<source::Handle>>>,
    session: std::sync::Mutex<Option<destination::Current>>,
    /// The destination runs guests that were not released to it.
    broken: bool,
    /// The source has heard that it does.
    broken_heard: AtomicBool,
    handover_timeout: Duration,
    /// The guest has been the destination's.
    arrived: AtomicBool,
    /// Everything was complete at the destination when the source died, which had given it away.
    only_copy: AtomicBool,
    /// The destination has given up for a reason that counts also then.
    gave_up: AtomicBool,
    /// The next Release does not arrive, and its link is cut.
    loses_release: AtomicBool,
    /// A person's decision is under way.
    deciding: AtomicBool,
    /// A person has decided that the guest is the source's, which tells the destination until the handover's time is over.
    tells: AtomicBool,
}

/// A connection, and what it is for.
struct Incoming {
    role: Role,
    end: End,
    answer: mpsc::Sender<bool>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Control,
    Reconnect,
    /// Says hello, and no more.
    Stranger,
}

#[derive(Default)]
struct LinkState {
    /// Both ends know.
    closed: AtomicBool,
    /// Neither does.
    silent: AtomicBool,
}

/// One end of a connection.
struct End {
    state: Arc<LinkState>,
    peer: usize,
    out: mpsc::Sender<Message>,
    incoming: Option<mpsc::Receiver<Message>>,
}

fn closed() -> Cause {
    Cause::Closed { channel: "a link of the model".into() }
}

impl End {
    fn sender(&self) -> Line {
        Line { state: self.state.clone(), out: self.out.clone() }
    }

    fn reader(&mut self, world: &Arc<World>) -> Option<Reader> {
        let incoming = self.incoming.take()?;
        Some(Reader { world: world.clone(), state: self.state.clone(), peer: self.peer, incoming })
    }
}

/// The sending direction of a connection.
#[derive(Clone)]
struct Line {
    state: Arc<LinkState>,
    out: mpsc::Sender<Message>,
}

impl Line {
    fn send(&self, world: &World, message: &Message) -> Result<(), Cause> {
        note(|| format!("sends {}", brief(message)));
        if world.chaotic() && random(|random| random.one_in(30)) {
            sleep(Duration::from_millis(random(|random| random.below(3000))));
        }
        if self.state.closed.load(Ordering::Acquire) {
            return Err(closed());
        }
        if self.state.silent.load(Ordering::Acquire) {
            return Ok(());
        }
        let lost = matches!(message, Message::Release(_)) && world.loses_release.swap(false, Ordering::AcqRel);
        let cut = lost || world.chaotic() && random(|random| random.one_in(25));
        let arrives = !lost && (!cut || random(|random| random.one_in(2)));
        let twice = world.chaotic() && random(|random| random.one_in(30));
        if arrives {
            let _ = self.out.send(message.clone());
            if twice {
                let _ = self.out.send(message.clone());
            }
        }
        if cut {
            note(|| "which cuts the link".to_owned());
            let silently = random(|random| random.one_in(2));
            let how = if silently { &self.state.silent } else { &self.state.closed };
            how.store(true, Ordering::Release);
        }
        Ok(())
    }

    fn close(&self) {
        self.state.closed.store(true, Ordering::Release);
    }
}

/// The receiving direction of a connection. Signs of life come by themselves, as long as the peer can give them.
struct Reader {
    world: Arc<World>,
    state: Arc<LinkState>,
    peer: usize,
    incoming: mpsc::Receiver<Message>,
}

impl Reader {
    fn next(&self, alive: impl Fn()) -> Result<Message, Cause> {
        let mut heard = crate::sync::boot_time();
        loop {
            match self.incoming.recv_timeout(BEAT) {
                Ok(message) => {
                    alive();
                    return Ok(message);
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => return Err(closed()),
                Err(mpsc::RecvTimeoutError::Timeout) => {}
            }
            if self.state.closed.load(Ordering::Acquire) {
                return Err(closed());
            }
            let silent = self.state.silent.load(Ordering::Acquire) || self.world.is_dead(self.peer);
            let now = crate::sync::boot_time();
            if !silent && !control::is_frozen(self.peer) {
                alive();
                heard = now;
            } else if now.saturating_sub(heard) >= LINK_TIMEOUT {
                return Err(Cause::Silent { waiting_for: "a sign of life", after: LINK_TIMEOUT });
            }
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.state.closed.store(true, Ordering::Release);
    }
}

fn brief(message: &Message) -> String {
    let text = format!("{message:?}");
    text.chars().take(100).collect()
}

impl World {
    fn chaotic(&self) -> bool {
        self.chaos.load(Ordering::Acquire)
    }

    fn is_dead(&self, host: usize) -> bool {
        self.dead.get(host).is_some_and(|dead| dead.load(Ordering::Acquire))
    }

    fn has_been_dead_for(&self, host: usize, time: Duration) -> bool {
        let now = crate::sync::boot_time();
        crate::link::lock(&self.died)[host].is_some_and(|died| now.saturating_sub(died) >= time)
    }

    fn vm(&self, host: usize) -> &Arc<Vm> {
        let vms = self.vms.get().expect("set at the beginning");
        if host == A { &vms[0] } else { &vms[1] }
    }

    fn guest(&self, host: usize) -> &Arc<Guest> {
        let guests = self.guests.get().expect("set at the beginning");
        if host == A { &guests[0] } else { &guests[1] }
    }

    /// Connects to the destination; `Ok` when it said welcome.
    fn connect(self: &Arc<Self>, role: Role, limit: Duration) -> Result<End, Cause> {
        let ((to_b, from_a), (to_a, from_b)) = (mpsc::channel(), mpsc::channel());
        let state: Arc<LinkState> = Arc::default();
        let (answer, answered) = mpsc::channel();
        let theirs = End { state: state.clone(), peer: A, out: to_a, incoming: Some(from_a) };
        let listener = crate::link::lock(&self.listener).clone();
        let refused = || Cause::Silent { waiting_for: "an answer", after: limit };
        if self.parted.load(Ordering::Acquire) || self.is_dead(B) {
            sleep(limit);
            return Err(refused());
        }
        let Some(listener) = listener else { return Err(closed()) };
        if self.chaotic() && random(|random| random.one_in(12)) {
            // Reset at once.
            state.closed.store(true, Ordering::Release);
        }
        crate::link::lock(&self.links).push(state.clone());
        listener.send(Incoming { role, end: theirs, answer }).map_err(|_| closed())?;
        match answered.recv_timeout(limit) {
            Ok(true) => Ok(End { state, peer: B, out: to_b, incoming: Some(from_b) }),
            Ok(false) => Err(Cause::Refused { by: crate::error::Side::Destination, reason: "the model's".into() }),
            Err(_) => Err(refused()),
        }
    }

    /// Cuts every connection.
    fn cut(&self, silently: bool) {
        for link in crate::link::lock(&self.links).drain(..) {
            let how = if silently { &link.silent } else { &link.closed };
            how.store(true, Ordering::Release);
        }
    }

    /// A vCPU of `host` enters the guest.
    fn enters(&self, host: usize) {
        let other = A + B - host;
        note(|| "the vCPU enters".to_owned());
        if self.broken && !self.broken_heard.load(Ordering::Acquire) {
            // What it does before its source can know is nobody's fault but its own.
            control::be_careless();
        }
        if self.vm(other).runs() && !self.is_dead(other) && !control::was_careless() {
            fail(format!("two guests: a vCPU of host {host} enters while one of host {other} runs"));
        }
        // Of a host that is dead nobody can know what its guest did after it was taken back there.
        if self.vm(other).has_ended() && !self.is_dead(other) && !self.broken && !control::was_careless() {
            fail(format!("a guest that has ended on host {other} runs on host {host}"));
        }
        if host == B {
            self.arrived.store(true, Ordering::Release);
        }
    }

    fn die(&self, host: usize) {
        if self.is_dead(host) {
            return;
        }
        if host == A && !self.is_dead(B) {
            let source = self.guest(A).ownership();
            let gave = matches!(source, Ownership::Undecided | Ownership::Gone);
            let complete = matches!(self.guest(B).ownership(), Ownership::Undecided | Ownership::Here);
            self.only_copy.store(gave && complete, Ordering::Release);
        }
        self.dead[host].store(true, Ordering::Release);
        let now = crate::sync::boot_time();
        crate::link::lock(&self.died)[host] = Some(now);
        note(|| format!("host {host} dies"));
        control::kill(host);
        self.cut(random(|random| random.one_in(2)));
    }

    /// A person decides that the guest is on `host`.
    fn decide(&self, host: usize, rule: TakeBack) -> Result<(), String> {
        if seeded(Fault::HandleDecides) {
            let dropped = match host {
                A => crate::link::lock(&self.source).is_none(),
                _ => crate::link::lock(&self.session).is_none(),
            };
            if dropped {
                return Err("the handle was dropped".into());
            }
        }
        let guest = self.guest(host);
        let before = guest.ownership();
        let done = guest.take_back(rule);
        note(|| format!("decided {rule:?}: {done:?}"));
        // Whatever came of it: what a person could have is not thrown away by that, and nobody else is there to do so.
        let alone = self.is_dead(A + B - host) && !self.gave_up.load(Ordering::Acquire);
        if alone && before == Ownership::Undecided && guest.ownership() == Ownership::Awaited {
            fail(format!("a decision throws away the guest: {done:?}"));
        }
        done.map_err(|error| error.to_string())
    }

    /// Waits for a moment until a person could decide that the guest is on `host`; false where that does not come.
    fn becomes_undecided(&self, host: usize) -> bool {
        for _ in 0..400 {
            if self.is_dead(A) || self.is_dead(B) {
                return false;
            }
            if self.guest(host).ownership() == Ownership::Undecided {
                return true;
            }
            sleep(Duration::from_millis(5));
        }
        false
    }

    /// Whether a person who looks there may take the guest over on `host`.
    fn seems_safe(&self, host: usize) -> bool {
        let other = A + B - host;
        if self.is_dead(other) {
            return true;
        }
        if !self.parted.load(Ordering::Acquire) {
            return false;
        }
        let place = self.guest(other).ownership();
        !matches!(place, Ownership::Here | Ownership::HandingOver) && !self.vm(other).may_run()
    }
}

fn pause_a_little(most: u64) {
    let time = random(|random| if random.one_in(3) { random.below(50) } else { random.below(most * 1000) });
    sleep(Duration::from_micros(time));
}

/// One schedule.
fn schedule() {
    let [broken, patient, loses, ops] = random(|random| {
        let broken = random.one_in(12);
        [u64::from(broken), u64::from(!random.one_in(4)), u64::from(random.one_in(6)), 2 + random.below(7)]
    });
    let world = Arc::new(World {
        vms: OnceLock::new(),
        guests: OnceLock::new(),
        dead: Default::default(),
        died: Default::default(),
        chaos: AtomicBool::new(true),
        parted: AtomicBool::new(false),
        links: Default::default(),
        listener: Default::default(),
        source: Default::default(),
        session: Default::default(),
        broken: broken == 1,
        broken_heard: AtomicBool::new(false),
        handover_timeout: if patient == 1 { Duration::from_secs(60) } else { Duration::from_secs(3) },
        arrived: AtomicBool::new(false),
        only_copy: AtomicBool::new(false),
        gave_up: AtomicBool::new(false),
        loses_release: AtomicBool::new(loses == 1),
        deciding: AtomicBool::new(false),
        tells: AtomicBool::new(false),
    });
    let vms = [A, B].map(|host| Vm::new(&world, host));
    let guests = [Guest::new(vms[0].clone()), Guest::awaited(vms[1].clone())];
    for (host, vm) in [A, B].into_iter().zip(&vms) {
        let vm = vm.clone();
        drop(spawn_on(host, "vcpu", move || vm.vcpu()));
    }
    let _ = (world.vms.set(vms), world.guests.set(guests));
    if !random(|random| random.one_in(5)) {
        world.vm(A).well();
        let _ = world.guest(A).cont();
    }
    world.vm(A).ill();
    world.vm(B).ill();
    destination::start(&world);
    let driving = world.clone();
    let source = spawn_on(A, "source", move || source::migrate(&driving));
    for _ in 0..ops {
        pause_a_little(if random(|random| random.one_in(3)) { 4000 } else { 300 });
        step(&world);
    }
    // Nothing goes wrong any more.
    note(|| "the end begins".to_owned());
    world.chaos.store(false, Ordering::Release);
    world.vm(A).well();
    world.vm(B).well();
    sleep(Duration::from_secs(1));
    world.parted.store(false, Ordering::Release);
    sleep(Duration::from_secs(200));
    check_end(&world, source);
}

fn on(world: &Arc<World>, host: usize, name: &'static str, act: impl FnOnce(&Arc<World>) + Send + 'static) {
    let world = world.clone();
    drop(spawn_on(host, name, move || act(&world)));
}

/// Something happens.
fn step(world: &Arc<World>) {
    let host = random(|random| if random.one_in(2) { A } else { B });
    match random(|random| random.below(28)) {
        0 | 1 => on(world, host, "cont", move |world| {
            let done = world.guest(host).cont();
            note(|| format!("cont: {done:?}"));
        }),
        2 | 3 => on(world, host, "stop", move |world| {
            let done = world.guest(host).stop();
            note(|| format!("stop: {done:?}"));
        }),
        4 => on(world, A, "cancel", |world| {
            let source = crate::link::lock(&world.source).clone();
            if let Some(source) = source {
                source.cancel();
            }
        }),
        5 => on(world, B, "cancel", |world| destination::cancel(world)),
        6..=8 => {
            let (time, suspended) = random(|random| (random.below(6000), random.one_in(2)));
            note(|| format!("host {host} freezes for {time} ms, suspended: {suspended}"));
            control::freeze(host, Duration::from_millis(time), suspended);
        }
        9 | 10 => {
            note(|| "the hosts are parted".to_owned());
            world.parted.store(true, Ordering::Release);
            world.cut(true);
            let (healing, time) = (world.clone(), random(|random| random.below(9000)));
            drop(spawn_on(0, "net", move || {
                sleep(Duration::from_millis(time));
                note(|| "and joined".to_owned());
                healing.parted.store(false, Ordering::Release);
            }));
        }
        11 => world.cut(random(|random| random.one_in(2))),
        12 => on(world, A, "drop", |world| {
            let source = crate::link::lock(&world.source).take();
            if let Some(source) = source {
                source.abandon();
            }
        }),
        13 => on(world, B, "drop", |world| destination::close(world)),
        14 if random(|random| random.one_in(2)) && !world.is_dead(A + B - host) => world.die(host),
        15 | 16 => {
            let world = world.clone();
            drop(spawn_on(0, "stranger", move || drop(world.connect(Role::Stranger, LINK_TIMEOUT))));
        }
        17 => {
            // Somebody's connection for the session that is gone at once.
            let world = world.clone();
            drop(spawn_on(0, "reset", move || {
                let end = world.connect(Role::Reconnect, LINK_TIMEOUT);
                if let Ok(end) = end {
                    end.sender().close();
                }
            }));
        }
        18 if random(|random| random.one_in(3)) => decide(world, host, true),
        18 => on(world, host, "guest", move |world| {
            // Whoever has it run here tells at once, or only its machine knows.
            if world.vm(host).end() && random(|random| random.one_in(2)) {
                let done = world.guest(host).ended(GuestEnd::PoweredOff);
                note(|| format!("told: {done:?}"));
            }
        }),
        24 | 25 if world.becomes_undecided(B) => {
            // The source dies when all is ready, and a person takes the guest over.
            world.die(A);
            sleep(LINK_TIMEOUT * 2);
            decide(world, B, false);
        }
        26 | 27 if world.becomes_undecided(A) => {
            // The hosts are parted when the guest is released, and joined when a person is about to take it back.
            note(|| "the hosts are parted".to_owned());
            world.parted.store(true, Ordering::Release);
            world.cut(true);
            sleep(LINK_TIMEOUT + Duration::from_millis(random(|random| random.below(500))));
            decide(world, A, false);
            pause_a_little(1500);
            note(|| "and joined".to_owned());
            world.parted.store(false, Ordering::Release);
        }
        19..=23 => decide(world, host, false),
        _ => {}
    }
}

/// A person may decide that the guest is on `host`.
fn decide(world: &Arc<World>, host: usize, careless: bool) {
    if world.is_dead(host) || world.deciding.swap(true, Ordering::AcqRel) {
        return;
    }
    // A person who wants it waits until it is allowed.
    if !careless && random(|random| random.one_in(2)) && !world.parted.swap(true, Ordering::AcqRel) {
        note(|| "a person parts the hosts".to_owned());
        world.cut(true);
        sleep(LINK_TIMEOUT + Duration::from_millis(random(|random| random.below(1500))));
        let healing = world.clone();
        drop(spawn_on(0, "net", move || {
            sleep(Duration::from_millis(random(|random| random.below(1500))));
            healing.parted.store(false, Ordering::Release);
        }));
    }
    let mut rule = TakeBack::WhenSilent;
    if careless {
        if !world.is_dead(A + B - host) {
            control::be_careless();
        }
        rule = TakeBack::Anyway;
    } else if !world.seems_safe(host) {
        world.deciding.store(false, Ordering::Release);
        return;
    }
    // For so long nothing that could be under way makes what was seen untrue.
    let holds = if world.is_dead(A + B - host) { Duration::MAX / 4 } else { LINK_TIMEOUT / 4 };
    control::looked(holds);
    on(world, host, "person", move |world| {
        let _ = world.decide(host, rule);
        world.deciding.store(false, Ordering::Release);
    });
}

fn check_end(world: &Arc<World>, source: JoinHandle<()>) {
    let place = |host| if world.is_dead(host) { None } else { Some(world.guest(host).ownership()) };
    let show = || format!("{:?} and {:?}", place(A), place(B));
    // What a dead host had locked stays locked.
    let guest = |host| (!world.is_dead(host)).then(|| world.guest(host));
    note(|| format!("it ends as {:?} and {:?}", guest(A), guest(B)));
    if !world.is_dead(A) && !source.is_finished() {
        fail(format!("the source does not come to an end: {}", show()));
    }
    if place(A) == Some(Ownership::HandingOver) {
        fail(format!("a handover never ends: {}", show()));
    }
    // The source asks once more.
    if place(A) == Some(Ownership::Undecided) && place(B) == Some(Ownership::Here) {
        source::ask(world);
    }
    let of = |host, what: Ownership| place(host) == Some(what);
    if of(A, Ownership::Here) && of(B, Ownership::Here) && world.handover_timeout > Duration::from_secs(20) {
        let told = matches!(crate::link::lock(&world.source).as_ref(), Some(handle) if !handle.is_abandoned());
        let listens = crate::link::lock(&world.listener).is_some();
        if !control::was_careless() || told && listens && world.tells.load(Ordering::Acquire) {
            fail(format!("two owners: {}", show()));
        }
        return;
    }
    if world.vm(A).runs() && world.vm(B).runs() && !world.is_dead(A) && !world.is_dead(B) && !control::was_careless() {
        fail("two guests run at the end");
    }
    if of(A, Ownership::Here) || of(B, Ownership::Here) {
        return;
    }
    // A person decides.
    let mut undecided: Vec<usize> = [A, B].into_iter().filter(|host| of(*host, Ownership::Undecided)).collect();
    if random(|random| random.one_in(2)) {
        undecided.reverse();
    }
    let Some(&host) = undecided.first() else {
        let lost = match (world.is_dead(A), world.is_dead(B)) {
            (false, false) => true,
            // What the dead one had is gone with it.
            (true, _) => world.only_copy.load(Ordering::Acquire) && !world.gave_up.load(Ordering::Acquire),
            (_, true) => !world.arrived.load(Ordering::Acquire) && !of(A, Ownership::Gone),
        };
        if lost && !world.broken {
            fail(format!("nobody has the guest: {}", show()));
        }
        return;
    };
    let others = undecided.len();
    if world.broken && !world.is_dead(A + B - host) && world.vm(A + B - host).runs() {
        // A person finds it there, and leaves it alone.
        return;
    }
    for _ in 0..3 {
        if !world.is_dead(A + B - host) && others > 1 {
            world.parted.store(true, Ordering::Release);
            world.cut(true);
        }
        sleep(LINK_TIMEOUT * 3);
        control::looked(Duration::from_secs(60));
        if world.decide(host, TakeBack::WhenSilent).is_ok() {
            break;
        }
    }
    if !of(host, Ownership::Here) {
        fail(format!("what is undecided cannot be decided: {}", show()));
    }
}

/// How many schedules a thread goes through when nothing else is asked for.
const USUAL: u64 = 4000;

/// As many schedules as there is time for, from a seed.
fn explore(first: u64, fault: Option<Fault>, time: Duration, most: u64) -> (u64, Option<(u64, String)>) {
    let began = Instant::now();
    let mut seed = first;
    while began.elapsed() < time && seed - first < most {
        if let Err(failed) = Simulation::run(seed, fault, false, schedule) {
            return (seed - first + 1, Some((seed, failed)));
        }
        seed += 1;
    }
    (seed - first, None)
}

fn environment(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// As many threads as there are processors, each with its own seeds.
#[test]
fn no_schedule_breaks_it() {
    if let Some(seed) = environment("DUNLIN_MODEL_SEED") {
        match Simulation::run(seed, None, true, schedule) {
            Ok(log) => println!("{}\nseed {seed}: nothing wrong", log.join("\n")),
            Err(failed) => panic!("seed {seed}: {failed}"),
        }
        return;
    }
    // The same schedules each time, or for as long as somebody has time.
    let seconds = environment("DUNLIN_MODEL_SECONDS");
    let time = Duration::from_secs(seconds.unwrap_or(300));
    let most = if seconds.is_some() { u64::MAX >> 24 } else { USUAL };
    let base = environment("DUNLIN_MODEL_BASE").unwrap_or(1);
    let results: Vec<_> = std::thread::scope(|scope| {
        let run = |worker: u64| scope.spawn(move || explore(base + (worker << 40), None, time, most));
        [0, 1].map(run).into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let total: u64 = results.iter().map(|(runs, _)| runs).sum();
    println!("{total} schedules");
    for (_, found) in results {
        if let Some((seed, failed)) = found {
            panic!("DUNLIN_MODEL_SEED={seed} shows: {failed}");
        }
    }
    assert!(total > 20, "too few schedules: {total}");
}

fn finds(fault: Fault) {
    let time = Duration::from_secs(environment("DUNLIN_MODEL_SECONDS").unwrap_or(300));
    let (runs, found) = explore(1, Some(fault), time, 3 * USUAL);
    let Some((seed, failed)) = found else { panic!("{fault:?} was not found in {runs} schedules") };
    // The fault is what it is found by.
    assert_eq!(Simulation::run(seed, None, false, schedule).map(drop), Ok(()), "seed {seed} without {fault:?}");
    println!("{fault:?}: seed {seed}, after {runs} schedules: {}", failed.lines().next().unwrap_or_default());
    if environment("DUNLIN_MODEL_LOG").is_some() {
        println!("{:?}", Simulation::run(seed, Some(fault), true, schedule).map_err(|e| println!("{e}")));
    }
}

macro_rules! found {
    ($($name:ident: $fault:ident,)*) => {
        $(#[test]
        fn $name() {
            finds(Fault::$fault);
        })*
    };
}

found! {
    finds_an_owner_before_the_start: HereTooSoon,
    finds_a_stranger_that_evicts: StrangerEvicts,
    finds_a_connection_for_nothing: ConnectedForNothing,
    finds_a_decision_of_the_handle: HandleDecides,
    finds_running_that_fails: RunningFails,
    finds_a_permit_unchecked: PermitUnchecked,
    finds_a_panic_forgotten: PanicForgotten,
    finds_an_old_release: OldRelease,
    finds_a_take_over_that_throws_away: TakeOverThrowsAway,
    finds_a_decision_unlocked: DecisionUnlocked,
    finds_an_end_forgotten: EndForgotten,
}
