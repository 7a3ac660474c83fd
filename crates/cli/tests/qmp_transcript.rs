//! The dialogue that QEMU 10 has with a client, word for word in its members and types (`tests/qmp/qemu-10.json`),
//! with two of our machines: every difference is one that docs/qmp.md lists, and every one that it lists is there.
//!
//! Where there is a QEMU, of whatever version, it has the same dialogue: what it answers must not contradict the file.

// Clippy's exception for tests does not reach the functions that they call.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]
#![allow(dead_code, reason = "each test binary uses a part of the harness")]

mod common;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::{Machine, turn, until};
use serde_json::{Map, Value, json};

const PATIENCE: Duration = Duration::from_secs(20);

/// A difference: the step, and `-` for what is missing, `+` for what is too much, `~` for what is otherwise, with its place.
type Difference = (String, String);

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn steps() -> Vec<Value> {
    serde_json::from_str(&fs::read_to_string(root().join("tests/qmp/qemu-10.json")).unwrap()).unwrap()
}

/// One side's connection: replies and events apart.
struct Side {
    reader: BufReader<UnixStream>,
    events: VecDeque<Value>,
}

impl Side {
    fn connect(path: &Path) -> Self {
        let stream = until("somebody listens", PATIENCE, || UnixStream::connect(path).ok());
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { reader: BufReader::new(stream), events: VecDeque::new() }
    }

    fn line(&mut self, what: &str) -> Value {
        let mut line = String::new();
        self.reader.read_line(&mut line).unwrap_or_else(|error| panic!("{what}: {error}"));
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{what}: {line:?}: {error}"))
    }

    /// The next line that is no event.
    fn reply(&mut self, what: &str) -> Value {
        loop {
            let line = self.line(what);
            match line.get("event") {
                Some(_) => self.events.push_back(line),
                None => return line,
            }
        }
    }

    fn event(&mut self, what: &str) -> Value {
        self.events.pop_front().unwrap_or_else(|| self.line(what))
    }

    fn send(&self, text: &str) {
        // A character of the file is a byte, so that it can have one that no text has.
        let mut bytes: Vec<u8> = text.chars().map(|c| u8::try_from(u32::from(c)).unwrap()).collect();
        bytes.push(b'\n');
        self.reader.get_ref().write_all(&bytes).unwrap();
    }
}

/// Has the dialogue; gives every difference, and by which steps they came.
fn dialogue(source: &Path, destination: &Path, wanted: impl Fn(&Value) -> bool) -> BTreeSet<Difference> {
    let mut sides = BTreeMap::from([("source", Side::connect(source)), ("destination", Side::connect(destination))]);
    sides.get_mut("destination").unwrap().reply("the destination's greeting");
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut words = BTreeMap::from([("$silent", format!("tcp:{}", silent.local_addr().unwrap()))]);
    let mut differences = BTreeSet::new();
    for step in steps().iter().filter(|step| wanted(step)) {
        let name = step["step"].as_str().unwrap();
        let side = sides.get_mut(step["to"].as_str().unwrap()).unwrap();
        let mut differ = |sign: char, place: &str| differences.extend([(name.to_owned(), format!("{sign}{place}"))]);
        if step.get("with").is_some() {
            // What came before has nothing to do with this.
            side.events.clear();
        }
        if let Some(text) = step.get("text").and_then(Value::as_str) {
            side.send(text);
        } else if let Some(request) = step.get("send") {
            let request = words.iter().fold(request.to_string(), |text, (word, meant)| text.replace(word, meant));
            side.send(&request);
        }
        if let Some(shape) = step.get("gets") {
            let reply = side.reply(name);
            compare(shape, &reply, "", &mut differ);
            if step.get("keep").is_some() {
                let port = reply["return"]["socket-address"][0]["port"].as_str().unwrap();
                words.insert("$address", format!("tcp:127.0.0.1:{port}"));
            }
            for shape in list(step, "with") {
                match side.events.pop_front() {
                    Some(event) => compare(shape, &event, "event", &mut differ),
                    None => differ('-', "event"),
                }
            }
        }
        compare_events(side, &list(step, "events"), name, &mut differ);
        if let Some(shape) = step.get("until") {
            loop {
                let mut matches = true;
                compare(shape, &side.event(name), "", &mut |_, _| matches = false);
                if matches {
                    break;
                }
            }
        }
    }
    differences
}

fn list<'a>(step: &'a Value, name: &str) -> Vec<&'a Value> {
    step.get(name).and_then(Value::as_array).map_or_else(Vec::new, |list| list.iter().collect())
}

/// Events in their order. How many passes there are is the guest's doing: more than are wanted are passed over.
fn compare_events(side: &mut Side, shapes: &[&Value], step: &str, differ: &mut impl FnMut(char, &str)) {
    const PASS: &str = "MIGRATION_PASS";
    let kind = |event: &Value| {
        let status = event["data"]["status"].as_str().unwrap_or_default();
        format!("{} {status}", event["event"].as_str().unwrap()).replace('=', "").trim().to_owned()
    };
    for (n, shape) in shapes.iter().enumerate() {
        let wanted = kind(shape);
        let later = |event: &str| shapes[n..].iter().any(|shape| kind(shape) == event);
        let mut event = side.event(step);
        while !later(&kind(&event)) {
            if kind(&event) != PASS {
                differ('+', &kind(&event));
            }
            event = side.event(step);
        }
        if kind(&event) == wanted {
            let mut data = (*shape).clone();
            if wanted == PASS {
                data["data"]["pass"] = json!("int");
            }
            compare(&data, &event, &wanted, differ);
        } else {
            // Missing, or out of its order: the one that came is a later one.
            differ('-', &wanted);
            side.events.push_front(event);
        }
    }
}

/// Compares `value` with `shape`: names of types, `=TEXT` for exactly that, arrays of one shape for all elements, and
/// objects; those with `@by` stand for arrays whose elements are told apart by that member.
fn compare(shape: &Value, value: &Value, at: &str, differ: &mut impl FnMut(char, &str)) {
    let fits = match (shape, value) {
        (Value::String(wanted), value) => match (wanted.strip_prefix('='), wanted.as_str()) {
            (Some(text), _) => value.as_str().map_or_else(|| value.to_string(), str::to_owned) == text,
            (None, "str") => value.is_string(),
            (None, "bool") => value.is_boolean(),
            (None, "int") => value.is_i64() || value.is_u64(),
            (None, "number") => value.is_number(),
            (None, "null") => value.is_null(),
            _ => panic!("{wanted} is no type"),
        },
        (Value::Array(shapes), Value::Array(values)) => {
            values
                .iter()
                .for_each(|value| shapes.iter().for_each(|shape| compare(shape, value, &format!("{at}[]"), differ)));
            true
        }
        (Value::Object(shapes), Value::Object(values)) => {
            compare_members(shapes, values, at, differ);
            true
        }
        (Value::Object(shapes), Value::Array(values)) if shapes.contains_key("@by") => {
            let by = shapes["@by"].as_str().unwrap();
            let keyed = values.iter().map(|value| {
                let mut members = value.as_object().unwrap().clone();
                let key = members.remove(by).unwrap().as_str().unwrap().to_owned();
                (key, Value::Object(members))
            });
            let keyed: Map<String, Value> =
                keyed.filter(|(key, _)| !shapes.contains_key("@among") || shapes.contains_key(key)).collect();
            let shapes: Map<String, Value> =
                shapes.clone().into_iter().filter(|(key, _)| !key.starts_with('@')).collect();
            compare_members(&shapes, &keyed, at, differ);
            true
        }
        _ => false,
    };
    if !fits {
        differ('~', at);
    }
}

fn compare_members(
    shapes: &Map<String, Value>,
    values: &Map<String, Value>,
    at: &str,
    differ: &mut impl FnMut(char, &str),
) {
    let place = |name: &str| if at.is_empty() { name.to_owned() } else { format!("{at}.{name}") };
    for (name, shape) in shapes {
        match values.get(name) {
            Some(value) => compare(shape, value, &place(name), differ),
            None => differ('-', &place(name)),
        }
    }
    for name in values.keys().filter(|name| !shapes.contains_key(*name)) {
        differ('+', &place(name));
    }
}

/// What docs/qmp.md lists: the steps and the differences of each row of its last table.
fn listed() -> BTreeSet<Difference> {
    let document = fs::read_to_string(root().join("docs/qmp.md")).unwrap();
    let table = document.split("<!-- differences: begin -->").nth(1).unwrap();
    let table = table.split("<!-- differences: end -->").next().unwrap();
    let quoted = |cell: &str| -> Vec<String> { cell.split('`').skip(1).step_by(2).map(str::to_owned).collect() };
    let mut listed = BTreeSet::new();
    for row in table.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<&str> = row.split('|').collect();
        assert!(cells.len() == 5 && !cells[3].trim().is_empty(), "a reason is missing: {row}");
        for step in quoted(cells[1]) {
            for difference in quoted(cells[2]) {
                assert!(listed.insert((step.clone(), difference.clone())), "twice: {step}: {difference}");
            }
        }
    }
    listed
}

#[test]
fn as_with_qemu_10_but_for_what_is_listed() {
    let _turn = turn();
    let directory = tempfile::tempdir().unwrap();
    let source = Machine::start("source", directory.path(), &["--memory", "16M"]);
    let destination = Machine::start("destination", directory.path(), &["--memory", "16M", "--incoming", "defer"]);
    let found = dialogue(&source.qmp, &destination.qmp, |_| true);
    let listed = listed();
    let lines = |differences: Vec<&Difference>| -> String {
        differences.iter().map(|(step, difference)| format!("\n  `{step}` `{difference}`")).collect()
    };
    let missing = lines(found.difference(&listed).collect());
    let stale = lines(listed.difference(&found).collect());
    assert!(
        missing.is_empty() && stale.is_empty(),
        "not in docs/qmp.md:{missing}\nno more, but in docs/qmp.md:{stale}"
    );
}

/// A QEMU without a machine. Killed and reaped when dropped.
struct Qemu {
    child: Child,
    qmp: PathBuf,
}

impl Qemu {
    fn start(directory: &Path, name: &str, more: &[&str]) -> Option<Self> {
        let qmp = directory.join(name);
        let child = Command::new("qemu-system-x86_64")
            .args(["-machine", "none", "-display", "none", "-nodefaults"])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", qmp.display())])
            .args(more)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        child.ok().map(|child| Self { child, qmp })
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn the_file_is_what_a_qemu_says() {
    let _turn = turn();
    let directory = tempfile::tempdir().unwrap();
    let start = |name, more: &[&str]| Qemu::start(directory.path(), name, more);
    let (Some(source), Some(destination)) = (start("source", &[]), start("destination", &["-incoming", "defer"]))
    else {
        return println!("skipped: no qemu-system-x86_64");
    };
    let version = {
        let mut side = Side::connect(&source.qmp);
        side.reply("the greeting")["QMP"]["version"]["qemu"]["major"].as_u64().unwrap()
    };
    let wanted = |step: &Value| step.get("since").and_then(Value::as_u64).is_none_or(|since| since <= version);
    let differences = dialogue(&source.qmp, &destination.qmp, wanted);
    // What another version has not, or has besides, is its own affair.
    let contradicts =
        |difference: &str| difference.starts_with('~') || ["-return", "-error", "-event"].contains(&difference);
    let against: Vec<_> = differences.iter().filter(|(_, difference)| contradicts(difference)).collect();
    println!("QEMU {version}: {} steps, {} members otherwise", steps().len(), differences.len());
    assert!(against.is_empty(), "QEMU {version} says otherwise: {against:#?}");
}
