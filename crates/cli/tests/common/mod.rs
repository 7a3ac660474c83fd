//! What the tests of processes share: `dunlin run` as a child, its QMP socket, and a watch that never may see two
//! guests run. The proxy between two such processes is in [`proxy`].

pub mod proxy;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use dunlin::{GuestPlace, Report, Status};
use dunlin_monitor::{Client, ClientError, uri_of_socket_address};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

/// The command under test.
pub const DUNLIN: &str = env!("CARGO_BIN_EXE_dunlin");
/// How long anything may take that ought to happen by itself.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// How long a machine may take to check itself.
const VERIFY: Duration = Duration::from_secs(300);

/// Tests of one binary take turns: each measures time, and there are few cores.
pub fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The number in an environment variable.
pub fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")))
}

/// Whether the long form of everything is asked for.
pub fn full() -> bool {
    number("DUNLIN_TEST_FULL").is_some_and(|full| full != 0)
}

/// A sequence of random numbers that a seed determines.
pub struct Random(u64);

impl Random {
    /// Of `DUNLIN_TEST_SEED`, or of the time; says which.
    pub fn new(what: &str) -> Self {
        let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
        let seed = number("DUNLIN_TEST_SEED").unwrap_or(now % 1_000_000_007);
        println!("{what}: DUNLIN_TEST_SEED={seed}");
        Self(seed)
    }

    /// Of this seed.
    pub fn seeded(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number, of splitmix64.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number from 0 to 1.
    pub fn fraction(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// Looks until `look` gives something.
pub fn until<T>(what: &str, timeout: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + timeout;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what}: not within {timeout:?}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Ends a process once, from whichever thread.
#[derive(Clone)]
pub struct Killer(Arc<Mutex<Child>>);

impl Killer {
    /// SIGSTOP: when this returns it stands still, all threads of it, until [`thaw`](Self::thaw).
    pub fn freeze(&self) {
        self.signal(Signal::STOP);
        let tasks = format!("/proc/{}/task", self.0.lock().unwrap().id());
        // The signal is sent before the last thread has stopped.
        let stands = |task: &Path| {
            let stat = fs::read_to_string(task.join("stat")).unwrap_or_default();
            stat.rsplit(')').next().is_none_or(|rest| rest.trim_start().starts_with('T') || rest.is_empty())
        };
        until("it stands still", PATIENCE, || {
            fs::read_dir(&tasks).unwrap().all(|task| stands(&task.unwrap().path())).then_some(())
        });
    }

    /// SIGTERM.
    pub fn terminate(&self) {
        self.signal(Signal::TERM);
    }

    /// SIGCONT.
    pub fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.0.lock().unwrap());
        kill_process(pid, signal).unwrap();
    }

    /// SIGKILL, and waits for it.
    pub fn kill(&self) {
        let mut child = self.0.lock().unwrap();
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// A `dunlin run`. Killed and reaped when dropped.
pub struct Machine {
    pub name: &'static str,
    pub qmp: PathBuf,
    child: Killer,
    client: Mutex<Option<Client>>,
    log: PathBuf,
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.child.kill();
        if thread::panicking() {
            let log = fs::read_to_string(&self.log).unwrap_or_default();
            println!("--- what the {} said:\n{}---", self.name, log);
        }
    }
}

impl Machine {
    /// Starts one in `directory`.
    pub fn start(name: &'static str, directory: &Path, arguments: &[&str]) -> Self {
        Self::start_in(name, directory, arguments, &[])
    }

    /// Starts one with these environment variables.
    pub fn start_in(
        name: &'static str,
        directory: &Path,
        arguments: &[&str],
        environment: &[(&'static str, &'static str)],
    ) -> Self {
        let mut launcher = Command::new(DUNLIN);
        launcher.envs(environment.iter().copied());
        Self::start_by(launcher, name, directory, arguments)
    }

    /// Starts one by a command that becomes `dunlin` with the arguments that follow.
    pub fn start_by(mut launcher: Command, name: &'static str, directory: &Path, arguments: &[&str]) -> Self {
        let qmp = directory.join(format!("{name}.qmp"));
        let log = directory.join(format!("{name}.log"));
        let child = launcher
            .arg("run")
            .args(arguments)
            .args(["--qmp", &format!("unix:{}", qmp.display())])
            .args(["--exit-with-parent", &std::process::id().to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log).unwrap())
            .spawn()
            .unwrap();
        Self { name, qmp, child: Killer(Arc::new(Mutex::new(child))), client: Mutex::default(), log }
    }

    /// A source with the usual guest of `memory`.
    pub fn source(directory: &Path, memory: &str, workload: &str, more: &[&str]) -> Self {
        Self::start("source", directory, &[&["--memory", memory, "--workload", workload], more].concat())
    }

    /// A destination that listens on a TCP port of its own choice.
    pub fn destination(directory: &Path, memory: &str) -> Self {
        Self::start("destination", directory, &["--memory", memory, "--incoming", "tcp:127.0.0.1:0"])
    }

    /// Its process's number.
    pub fn pid(&self) -> u32 {
        self.child.0.lock().unwrap().id()
    }

    /// What ends it.
    pub fn killer(&self) -> Killer {
        self.child.clone()
    }

    /// SIGKILL.
    pub fn kill(&self) {
        self.child.kill();
    }

    /// Whether its process still runs.
    pub fn is_alive(&self) -> bool {
        self.child.0.lock().unwrap().try_wait().unwrap().is_none()
    }

    /// Its exit status, once it has ended.
    pub fn exit_code(&self) -> Option<i32> {
        self.child.0.lock().unwrap().try_wait().unwrap().and_then(|status| status.code())
    }

    /// What it has said on standard error so far.
    pub fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// A connection of one's own.
    pub fn connect(&self) -> Client {
        until(&format!("the {} answers", self.name), PATIENCE, || {
            assert!(self.is_alive(), "the {} has ended: {}", self.name, self.said());
            Client::connect(&self.qmp).ok()
        })
    }

    /// Carries out a QMP command.
    pub fn try_execute(&self, command: &str, arguments: Value) -> Result<Value, ClientError> {
        let mut client = self.client.lock().unwrap();
        client.get_or_insert_with(|| self.connect()).execute_within(VERIFY, command, arguments)
    }

    /// Carries out a QMP command that must succeed.
    pub fn execute(&self, command: &str, arguments: Value) -> Value {
        self.try_execute(command, arguments.clone())
            .unwrap_or_else(|error| panic!("{} {command} {arguments}: {error}", self.name))
    }

    /// Sets parameters.
    pub fn set(&self, parameters: Value) {
        self.execute("migrate-set-parameters", parameters);
    }

    /// The address it listens on.
    pub fn address(&self) -> String {
        let info = self.execute("query-migrate", json!({}));
        uri_of_socket_address(&info).unwrap_or_else(|| panic!("{} listens nowhere: {info}", self.name)).to_string()
    }

    /// Starts a migration, with what `DUNLIN_TEST_SET` says beside what was set (`xbzrle=on,multifd-compression=zstd`): so
    /// that everything can be tested with everything on.
    pub fn migrate(&self, uri: &str) {
        for setting in std::env::var("DUNLIN_TEST_SET").unwrap_or_default().split_terminator(',') {
            let (name, text) = setting.split_once('=').unwrap();
            let value = match (text, text.parse::<i64>()) {
                ("on" | "off", _) => json!(text == "on"),
                (_, Ok(number)) => json!(number),
                (_, Err(_)) => json!(text),
            };
            self.set(json!({name: value}));
        }
        self.execute("migrate", json!({"uri": uri}));
    }

    /// The state of its guest, in QEMU's words.
    pub fn state(&self) -> String {
        self.execute("query-status", json!({}))["status"].as_str().unwrap().to_owned()
    }

    /// Whether the guest runs here.
    pub fn is_running(&self) -> bool {
        self.execute("query-status", json!({}))["running"].as_bool().unwrap()
    }

    /// The report of its latest migration.
    pub fn report(&self) -> Option<Report> {
        serde_json::from_value(self.execute("query-migration-report", json!({}))).unwrap()
    }

    /// Waits for its latest migration to end.
    pub fn ended(&self) -> Report {
        until(&format!("the migration ends at the {}", self.name), PATIENCE, || {
            self.report().filter(|report| report.status.is_final())
        })
    }

    /// Waits for its latest migration to complete.
    pub fn completed(&self) -> Report {
        let report = self.ended();
        assert_eq!(report.status, Status::Completed, "{}: {:?}", self.name, report.error);
        report
    }

    /// Has it check every page; gives the summary.
    pub fn verify(&self) -> Result<String, String> {
        let found = self.try_execute("x-verify", json!({})).map_err(|error| error.to_string())?;
        let summary = found["summary"].as_str().unwrap_or_default().to_owned();
        if found["verified"] == true { Ok(summary) } else { Err(summary) }
    }

    /// Has it check every page, which must be right.
    pub fn verified(&self) -> String {
        self.verify().unwrap_or_else(|why| panic!("the guest at the {} is not right: {why}", self.name))
    }
}

/// An error must be on one line and say where the guest is.
pub fn check_error(report: &Report) -> Result<(), String> {
    let Some(error) = &report.error else {
        return Err(format!("the {}'s report says {} and has no error", report.side, report.status));
    };
    let message = &error.message;
    let place = error.guest.to_string();
    if message.lines().count() != 1 || !message.contains(&format!("the guest is {place}")) {
        return Err(format!("the {}'s error is not one line that says where the guest is: {message:?}", report.side));
    }
    if error.guest != report.guest {
        return Err(format!("the {}'s report says {}, its error {message:?}", report.side, report.guest));
    }
    if error.guest == GuestPlace::Undecided && !message.contains("--take-back") {
        return Err(format!("the {}'s error does not say what to do: {message:?}", report.side));
    }
    Ok(())
}

/// Looks at both sides all the time. Two guests must never run.
///
/// The destination is asked first: a guest never goes back by itself, so one that runs there and then runs at the
/// source runs twice, however much time has passed between the two answers.
pub struct Watch {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<(u64, u64)>>,
}

impl Watch {
    pub fn start(source: &Machine, destination: &Machine) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let mut clients = (source.connect(), destination.connect());
        let thread = thread::spawn(move || {
            let (mut looks, mut doubles) = (0, 0);
            while !stopped.load(Ordering::Acquire) {
                let at_destination = runs(&mut clients.1);
                let at_source = runs(&mut clients.0);
                looks += 1;
                doubles += u64::from(at_source && at_destination);
                thread::sleep(Duration::from_millis(1));
            }
            (looks, doubles)
        });
        Self { stop, thread: Some(thread) }
    }

    /// How often it has looked, and how often it has seen two guests run.
    pub fn finish(mut self) -> (u64, u64) {
        self.stop.store(true, Ordering::Release);
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A machine that is dead runs nothing.
fn runs(client: &mut Client) -> bool {
    client.execute("query-status", json!({})).is_ok_and(|status| status["running"] == true)
}

/// Runs `dunlin` with `arguments` to its end.
pub fn dunlin(arguments: &[&str]) -> Output {
    Command::new(DUNLIN).args(arguments).stdin(Stdio::null()).output().unwrap()
}

/// A command that must fail with `code` and one line on standard error that holds every one of `words`; what it said
/// of its progress before does not count.
pub fn fails(arguments: &[&str], code: i32, words: &[&str]) -> String {
    let output = dunlin(arguments);
    let said = String::from_utf8(output.stderr).unwrap();
    let progress = |line: &&str| *line == "dunlin: connecting\n" || line.starts_with("dunlin: machine ");
    let line: String = said.split_inclusive('\n').skip_while(progress).collect();
    let shown = format!("dunlin {}\n  code {:?}: {line}", arguments.join(" "), output.status.code());
    println!("{shown}");
    assert_eq!(output.status.code(), Some(code), "{shown}");
    assert_eq!(line.trim_end().lines().count(), 1, "not one line: {shown}");
    for word in words {
        assert!(line.contains(word), "{word:?} is missing: {shown}");
    }
    line
}
