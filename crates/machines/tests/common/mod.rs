//! What the migration tests share: pairs of machines, a seeded random generator, and a proxy that does harm.
#![allow(dead_code)]

#[cfg(target_arch = "x86_64")]
pub mod kvm;
pub mod line;
pub mod proxy;
pub mod second;

use std::sync::Arc;
use std::time::{Duration, Instant};

use dunlin::{Destination, Guest, Parameters, Report, Source, Status, Uri};
use dunlin_machines::{Backing, SyntheticConfig, SyntheticMachine};

pub const MIB: u64 = 1 << 20;

/// A repeatable sequence of numbers.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub fn pick<'a, T>(&mut self, among: &'a [T]) -> &'a T {
        &among[self.below(among.len() as u64) as usize]
    }
}

/// How often a test with a count runs: `DUNLIN_TEST_RUNS`, or the default.
pub fn runs(default: u64) -> u64 {
    std::env::var("DUNLIN_TEST_RUNS").ok().and_then(|n| n.parse().ok()).unwrap_or(default)
}

/// A machine and its guest.
pub struct Side {
    pub machine: Arc<SyntheticMachine>,
    pub guest: Arc<Guest>,
}

/// A running machine.
pub fn source(memory_bytes: u64, vcpus: u32, workload: &str, seed: u64) -> Side {
    source_on(Backing::Base, memory_bytes, vcpus, workload, seed)
}

/// A running machine, on pages of the host of some size.
pub fn source_on(backing: Backing, memory_bytes: u64, vcpus: u32, workload: &str, seed: u64) -> Side {
    source_with(backing, memory_bytes, vcpus, workload, seed, "zero:30,random:40,text:30")
}

/// A running machine, on pages of the host of some size, with some contents.
pub fn source_with(backing: Backing, memory_bytes: u64, vcpus: u32, workload: &str, seed: u64, fill: &str) -> Side {
    let config = SyntheticConfig {
        memory_bytes,
        vcpus,
        workload: workload.parse().unwrap(),
        fill: fill.parse().unwrap(),
        seed,
        backing,
    };
    let machine = SyntheticMachine::new(&config).unwrap();
    let guest = Guest::new(machine.clone());
    guest.cont().unwrap();
    Side { machine, guest }
}

/// A machine that waits for another's state.
pub fn empty(memory_bytes: u64, vcpus: u32) -> Side {
    empty_on(Backing::Base, memory_bytes, vcpus)
}

/// A machine that waits for another's state, on pages of the host of some size.
pub fn empty_on(backing: Backing, memory_bytes: u64, vcpus: u32) -> Side {
    let machine = SyntheticMachine::empty(memory_bytes, vcpus, backing).unwrap();
    let guest = Guest::awaited(machine.clone());
    Side { machine, guest }
}

impl Side {
    pub fn listen(&self, uri: &str, parameters: &Parameters) -> Destination {
        Destination::listen(&self.guest, &uri.parse().unwrap(), parameters).unwrap()
    }

    pub fn migrate(&self, uri: &Uri, parameters: &Parameters) -> Source {
        Source::start(&self.guest, uri, parameters).unwrap()
    }

    /// Every page is what it must be.
    pub fn assert_good(&self, what: &str) {
        let report = self.machine.verify().unwrap();
        assert!(report.is_good(), "{what}: {report}");
    }
}

/// Migrates and checks that all went well; the reports of both sides.
pub fn move_guest(from: &Side, to: &Side, uri: &str, parameters: &Parameters) -> (Report, Report) {
    let destination = to.listen(uri, parameters);
    let source = from.migrate(destination.local_uri(), parameters);
    let report = source.wait();
    assert_eq!(report.status, Status::Completed, "source: {:?}, destination: {:?}", report.error, destination.report());
    let there = destination.wait();
    assert_eq!(there.status, Status::Completed, "{:?}", there.error);
    assert!(!from.guest.is_running());
    until("the destination knows the end", || destination.report().cpu_seconds.source.is_some());
    (report, destination.report())
}

/// Waits for something that must come soon.
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < Duration::from_secs(20), "{what}: not within 20 s");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Parameters with `changes` set, and before them what `DUNLIN_TEST_SET` says (`xbzrle=on,multifd-compression=zstd`):
/// so that everything can be tested with everything on.
pub fn parameters(changes: &[(&str, &str)]) -> Parameters {
    let mut parameters = Parameters::default();
    for setting in std::env::var("DUNLIN_TEST_SET").unwrap_or_default().split_terminator(',') {
        let (name, value) = setting.split_once('=').unwrap();
        parameters.set_text(name, value).unwrap();
    }
    for (name, value) in changes {
        parameters.set_text(name, value).unwrap();
    }
    parameters
}

/// Copies both ways between two streams until one ends.
pub fn splice(a: std::net::TcpStream, b: std::net::TcpStream) {
    let (mut a2, mut b2) = (a.try_clone().unwrap(), b.try_clone().unwrap());
    let (mut a, mut b) = (a, b);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            drop(std::io::copy(&mut a, &mut b2));
            drop(b2.shutdown(std::net::Shutdown::Write));
        });
        drop(std::io::copy(&mut b, &mut a2));
        drop(a2.shutdown(std::net::Shutdown::Write));
    });
}
