//! The human monitor over a machine that has no RAM.

// Clippy's exception for tests does not reach the functions that they call.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::sync::Arc;

use dunlin::machine::{Machine, MachineError, StateSection};
use dunlin::memory::{DirtyTracker, Ram};
use dunlin::parameters::ParameterInfo;
use dunlin::{Guest, PARAMETERS, StartPermit, SwitchoverCost};
use dunlin_monitor::Vm;
use dunlin_monitor::hmp::{self, Session};

struct Tiny {
    ram: Ram,
}

impl Machine for Tiny {
    fn ram(&self) -> &Ram {
        &self.ram
    }
    fn dirty_tracker(&self) -> Result<Box<dyn DirtyTracker>, MachineError> {
        Err("it has nothing to track".into())
    }
    fn profile(&self) -> Vec<u8> {
        Vec::new()
    }
    fn accept_profile(&self, _: &[u8]) -> Result<(), MachineError> {
        Ok(())
    }
    fn switchover_cost(&self) -> SwitchoverCost {
        SwitchoverCost::default()
    }
    fn pause(&self) -> Result<(), MachineError> {
        Ok(())
    }
    fn resume(&self, _: &StartPermit) -> Result<(), MachineError> {
        Ok(())
    }
    fn save(&self) -> Result<Vec<StateSection>, MachineError> {
        Ok(Vec::new())
    }
    fn load(&self, _: Vec<StateSection>) -> Result<(), MachineError> {
        Ok(())
    }
}

fn machine() -> Arc<dyn Machine> {
    Arc::new(Tiny { ram: Ram::new(Vec::new()).unwrap() })
}

struct Talk {
    vm: Arc<Vm>,
    session: Session,
}

impl Talk {
    fn here() -> Self {
        Self { vm: Vm::new(Guest::new(machine()), None), session: Session::default() }
    }

    fn awaiting() -> Self {
        Self { vm: Vm::new(Guest::awaited(machine()), None), session: Session::default() }
    }

    fn says(&mut self, line: &str) -> String {
        self.session.execute(&self.vm, line).unwrap_or_else(|error| panic!("{line}: {error}"))
    }

    fn refuses(&mut self, line: &str, words: &[&str]) {
        let before = self.vm.parameters();
        let error = self.session.execute(&self.vm, line).unwrap_err().to_string();
        for word in words {
            assert!(error.contains(word), "{line}: {word:?} is not in {error:?}");
        }
        assert_eq!(error.lines().count(), 1, "{error}");
        assert_eq!(self.vm.parameters(), before, "{line} was refused and yet set something");
    }
}

#[test]
fn setting_and_reading() {
    let mut talk = Talk::here();
    assert_eq!(talk.says("migrate_set_parameter max-bandwidth 32M"), "max-bandwidth: 32M/s\n");
    assert_eq!(talk.vm.parameters().max_bandwidth, 32 << 20);
    let said = talk.says("migrate_set_parameter downtime-limit 0.5s multifd-channels 4 multifd-zstd-level -5");
    assert_eq!(said, "downtime-limit: 500ms\nmultifd-channels: 4\nmultifd-zstd-level: -5\n");
    assert_eq!(talk.says("migrate_set_capability events"), "events: on\n");
    assert_eq!(talk.says("migrate_set_capability xbzrle events off"), "xbzrle: on\nevents: off\n");
    assert_eq!(talk.says("migrate_set_parameter xbzrle off"), "xbzrle: off\n");
    // A bare number is in the row's unit.
    talk.says("migrate_set_parameter max-bandwidth 1000");
    assert_eq!(talk.vm.parameters().max_bandwidth, 1000);
    let all = talk.says("info migrate_parameters") + &talk.says("info migrate_capabilities");
    assert_eq!(all.lines().count(), PARAMETERS.len());
    for line in ["downtime-limit: 500ms", "multifd-channels: 4", "multifd: on", "events: off"] {
        assert!(all.lines().any(|one| one == line), "{line} is not in\n{all}");
    }
    talk.says("migrate_set_parameter xbzrle-cache-size 1M");
    assert_eq!(talk.says("info migrate_cache_size"), "xbzrle-cache-size: 1M\n");
    let one = talk.says("info migrate_parameters max-cpu-throttle");
    for words in ["max-cpu-throttle: 99%\n", "1 to 99 percent", "read by: source", "cpu-throttle-initial: a vCPU"] {
        assert!(one.contains(words), "{words:?} is not in\n{one}");
    }
    assert!(talk.says("info migrate_capabilities events").contains("events: off\n  Whether QMP's clients"));
}

#[test]
fn all_or_none() {
    let mut talk = Talk::here();
    for (line, words) in [
        ("migrate_set_parameter", &["NAME is missing", "migrate_set_parameter NAME VALUE ..."][..]),
        ("migrate_set_parameter max-bandwidth", &["VALUE is missing"]),
        ("migrate_set_parameter max-bandwidth 5M multifd-channels", &["VALUE is missing"]),
        ("migrate_set_parameter max-bandwidth 5M multifd-channels 300", &["multifd-channels", "1 to 255"]),
        ("migrate_set_parameter max-bandwidth 5M max-bandwidht 5M", &["max-bandwidht"]),
        ("migrate_set_parameter max-bandwidth 5parsecs", &["5parsecs", "50M/s"]),
        ("migrate_set_parameter multifd-compression gzip", &["none, lz4, zstd"]),
        (
            "migrate_set_parameter cpu-throttle-initial 60 max-cpu-throttle 50",
            &["cpu-throttle-initial=60%", "max-cpu-throttle=50%", "a vCPU cannot"],
        ),
        ("migrate_set_capability events xbzrle maybe", &["xbzrle", "maybe", "on or off"]),
        ("migrate_set_parameter tls-creds x", &["tls-creds is not there yet: there is no TLS yet"]),
        ("migrate_set_capability events postcopy-ram", &["postcopy-ram is not there yet: there is no postcopy yet"]),
        ("migrate_set_capability events downtime-limit", &["downtime-limit", "migrate_set_parameter"]),
        ("migrate_set_capability", &["NAME is missing", "[on|off]"]),
    ] {
        talk.refuses(line, words);
    }
    talk.says("migrate_set_parameter cpu-throttle-initial 60 max-cpu-throttle 70");
    talk.says("migrate_set_parameter max-cpu-throttle 50 cpu-throttle-initial 40");
}

/// What `info` prints is taken back, line for line and all at once, and says the same again.
#[test]
fn what_is_printed_can_be_typed_back() {
    let all = |talk: &mut Talk| talk.says("info migrate_parameters") + &talk.says("info migrate_capabilities");
    let extremes: [fn(&ParameterInfo) -> i64; 4] = [
        |info| info.minimum,
        |info| info.maximum,
        |info| info.default,
        |info| info.maximum - (info.maximum > 9) as i64,
    ];
    for extreme in extremes {
        let mut talk = Talk::here();
        let numbers = PARAMETERS.iter().map(|info| (info.name, extreme(info)));
        talk.vm.set_parameters(numbers).unwrap();
        let printed = all(&mut talk);
        let wanted = talk.vm.parameters();
        let lines: Vec<_> = printed.lines().map(|line| line.split_once(": ").unwrap()).collect();
        let words: Vec<_> = lines.iter().map(|(name, value)| format!("{name} {value}")).collect();

        let mut other = Talk::here();
        let said = other.says(&format!("migrate_set_parameter {}", words.join(" ")));
        assert_eq!(said, printed);
        assert_eq!(other.vm.parameters(), wanted);
        for (line, word) in printed.lines().zip(&words) {
            let command = if line.ends_with(": on") || line.ends_with(": off") {
                format!("migrate_set_capability {word}")
            } else {
                format!("migrate_set_parameter {word}")
            };
            assert_eq!(other.says(&command), format!("{line}\n"));
        }
        assert_eq!(other.vm.parameters(), wanted);
        assert_eq!(all(&mut other), printed);
    }
}

#[test]
fn old_commands_work_and_say_once_what_to_use() {
    let mut talk = Talk::here();
    let old = "is an old command: use";
    assert_eq!(
        talk.says("migrate_set_speed 32"),
        format!("migrate_set_speed {old} `migrate_set_parameter max-bandwidth 32M/s`\nmax-bandwidth: 32M/s\n")
    );
    assert_eq!(talk.says("migrate_set_speed 1G"), "max-bandwidth: 1G/s\n");
    assert_eq!(
        talk.says("migrate_set_downtime 0.25"),
        format!("migrate_set_downtime {old} `migrate_set_parameter downtime-limit 250ms`\ndowntime-limit: 250ms\n")
    );
    assert_eq!(talk.says("migrate_set_downtime 30ms"), "downtime-limit: 30ms\n");
    assert!(talk.says("migrate_set_cache_size 128").ends_with("xbzrle-cache-size: 128M\n"));
    assert_eq!(talk.says("migrate_set_cache_size 64K"), "xbzrle-cache-size: 64K\n");
    talk.refuses("migrate_set_speed fast", &["fast", "50M/s"]);
    talk.refuses("migrate_set_downtime 99999", &["downtime-limit", "2000000 ms"]);
    talk.refuses("migrate_set_downtime", &["TIME is missing"]);
    // What a line says to use says the same.
    let mut other = Talk::here();
    other.says("migrate_set_parameter max-bandwidth 1G/s downtime-limit 30ms xbzrle-cache-size 64K");
    assert_eq!(other.vm.parameters(), talk.vm.parameters());
    // Another session is told again.
    talk.session = Session::default();
    assert!(talk.says("migrate_set_speed 1G").contains(old));
}

#[test]
fn the_guest_and_its_migrations() {
    let mut talk = Talk::here();
    talk.says("cont");
    assert_eq!(talk.says("info status"), "VM status: running\n");
    talk.says("stop");
    assert_eq!(talk.says("info status"), "VM status: paused\n");
    assert_eq!(talk.says("info migrate"), "no migration yet\n");
    assert_eq!(talk.says("migrate_cancel"), "");
    talk.refuses("migrate", &["URI is missing", "migrate [-d] [-r] [URI]"]);
    talk.refuses("migrate localhost:4444", &["localhost:4444", "tcp:HOST:PORT"]);
    talk.refuses("migrate -x tcp:localhost:4444", &["'-x'", "migrate [-d] [-r] [URI]"]);
    talk.refuses("migrate tcp:localhost:1 now", &["'now' is too much"]);
    talk.refuses("migrate -r", &["no outgoing migration to resume"]);
    talk.refuses("migrate_continue pre-switchover", &["not in expected state: none"]);
    talk.refuses("migrate_continue device", &["'device'", "pre-switchover"]);
    talk.refuses("migrate_incoming tcp:127.0.0.1:0", &["a guest is here already"]);
    talk.refuses("cont -t", &["nothing is undecided"]);

    talk.refuses("calc_dirty_rate soon", &["'soon'", "500ms", "[SECONDS] [PAGES]"]);
    talk.refuses("calc_dirty_rate 90", &["50 ms to 60 s"]);
    talk.refuses("calc_dirty_rate -r -b", &["one way of measuring"]);
    talk.refuses("calc_dirty_rate -b 1 512", &["'512' is too much"]);
    talk.refuses("set_vcpu_throttle 20", &["throttle"]);
    assert_eq!(talk.says("info vcpu_throttle"), "this machine cannot throttle its vCPUs\n");

    let mut talk = Talk::awaiting();
    assert_eq!(talk.says("info status"), "VM status: paused (inmigrate)\n");
    let said = talk.says("migrate_incoming tcp:127.0.0.1:0");
    assert!(said.starts_with("waiting for a migration on tcp:127.0.0.1:") && !said.contains(":0\n"), "{said}");
    assert!(talk.says("info migrate").starts_with(&said));
    talk.refuses("cont", &["the guest is not here yet"]);
}

#[test]
fn help_has_every_row() {
    let mut talk = Talk::here();
    let help = talk.says("help");
    for name in ["migrate [-d] [-r] [URI] -- ", "info [WHAT] -- ", "migrate_set_capability NAME [on|off] ... -- "] {
        assert!(help.contains(name), "{name} is not in\n{help}");
    }
    assert!(help.contains("savevm -- not there yet: there are no snapshots yet\n"), "{help}");
    let names: Vec<&str> = help.lines().map(|line| line.split_whitespace().next().unwrap()).collect();
    for name in &names {
        assert!(talk.says(&format!("help {name}")).starts_with(name));
    }
    let info = talk.says("info");
    for line in info.lines() {
        assert!(line.starts_with("info "), "{line}");
        let name = line.split_whitespace().nth(1).unwrap();
        assert!(talk.says(&format!("help info {name}")).starts_with(&format!("info {name}")));
    }
    assert!(talk.says("help info").ends_with(&info));
    let set = talk.says("help migrate_set_parameter");
    assert!(PARAMETERS.iter().all(|row| set.contains(row.name) && set.contains(row.help)));
    talk.refuses("help nonsense", &["unknown command: 'nonsense'"]);
    talk.refuses("nonsense", &["unknown command: 'nonsense'", "`help`"]);
    talk.refuses("info nonsense", &["'nonsense'", "`info`"]);
    talk.refuses("savevm a", &["savevm is not there yet", "snapshots"]);
    talk.refuses("migrate_start_postcopy", &["not there yet", "postcopy"]);
    talk.refuses("migrate \"exec:", &["quotation mark"]);
    assert_eq!(talk.says("  "), "");
}

#[test]
fn as_text_for_programs() {
    let mut talk = Talk::here();
    let vm = talk.vm.clone();
    assert_eq!(talk.session.answer(&vm, "info status"), "VM status: paused\r\n");
    let error = talk.session.answer(&vm, "info nonsense");
    assert!(error.starts_with(hmp::ERROR) && error.ends_with("\r\n"), "{error:?}");
    assert!(hmp::quits(" quit ") && !hmp::quits("quit now") && !hmp::quits("help quit"));
    for (line, detached) in [
        (" migrate tcp:a:1", Some("migrate -d tcp:a:1")),
        ("migrate -r", Some("migrate -d -r")),
        ("migrate exec:-d", Some("migrate -d exec:-d")),
        ("migrate -r -d tcp:a:1", None),
        ("migrate_cancel", None),
        ("help migrate", None),
    ] {
        assert_eq!(hmp::detached(line).as_deref(), detached, "{line}");
    }
}
