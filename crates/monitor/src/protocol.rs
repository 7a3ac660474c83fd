//! QMP's own shapes: greeting, request, reply, error, event.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use crate::framing::FramingError;
use crate::json;

/// QEMU's classes of errors, as far as they occur here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    Generic,
    CommandNotFound,
}

/// An error for the client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) class: Class,
    pub(crate) desc: String,
}

impl Refusal {
    pub(crate) fn generic(desc: impl ToString) -> Self {
        Self { class: Class::Generic, desc: desc.to_string() }
    }

    pub(crate) fn not_found(desc: impl ToString) -> Self {
        Self { class: Class::CommandNotFound, desc: desc.to_string() }
    }
}

impl From<FramingError> for Refusal {
    fn from(error: FramingError) -> Self {
        Self::generic(format_args!("JSON parse error, {error}"))
    }
}

/// How a command is to be carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Band {
    /// In its turn.
    In,
    /// At once, whatever is being carried out.
    OutOf,
}

/// A request that has QMP's shape.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Request {
    pub(crate) command: String,
    pub(crate) band: Band,
    pub(crate) arguments: Map<String, Value>,
}

/// Whether a client has asked for out-of-band execution.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OutOfBand {
    Off,
    On,
}

/// Reads a request; its `id` is found even where the rest is wrong.
pub(crate) fn parse_request(text: &[u8], out_of_band: OutOfBand) -> (Option<Value>, Result<Request, Refusal>) {
    match json::parse(text) {
        Ok(Value::Object(mut members)) => (members.remove("id"), request(members, out_of_band)),
        Ok(_) => (None, Err(Refusal::generic("QMP input must be a JSON object"))),
        Err(error) => (None, Err(Refusal::generic(format_args!("JSON parse error, {error}")))),
    }
}

fn request(members: Map<String, Value>, out_of_band: OutOfBand) -> Result<Request, Refusal> {
    let mut command = None;
    let mut arguments = Map::new();
    for (name, value) in members {
        let band = match name.as_str() {
            "execute" => Band::In,
            "exec-oob" if out_of_band == OutOfBand::On => Band::OutOf,
            "arguments" => {
                let Value::Object(given) = value else {
                    return Err(Refusal::generic("QMP input member 'arguments' must be an object"));
                };
                arguments = given;
                continue;
            }
            _ => return Err(Refusal::generic(format_args!("QMP input member '{name}' is unexpected"))),
        };
        let Value::String(text) = value else {
            return Err(Refusal::generic(format_args!("QMP input member '{name}' must be a string")));
        };
        if command.replace((text, band)).is_some() {
            return Err(Refusal::generic("QMP input member 'execute' clashes with 'exec-oob'"));
        }
    }
    let (command, band) = command.ok_or_else(|| Refusal::generic("QMP input lacks member 'execute'"))?;
    Ok(Request { command, band, arguments })
}

/// The version, as QEMU gives its own: that of the QEMU whose protocol this is.
pub(crate) fn version() -> Value {
    json!({
        "qemu": {"major": 10, "minor": 0, "micro": 2},
        "package": concat!("dunlin ", env!("CARGO_PKG_VERSION")),
    })
}

/// The first line a client gets.
pub(crate) fn greeting() -> Value {
    json!({"QMP": {"version": version(), "capabilities": ["oob"]}})
}

/// The answer to a request.
pub(crate) fn reply(id: Option<Value>, outcome: Result<Value, Refusal>) -> Value {
    let mut reply = match outcome {
        Ok(value) => json!({ "return": value }),
        Err(refusal) => {
            let class = match refusal.class {
                Class::Generic => "GenericError",
                Class::CommandNotFound => "CommandNotFound",
            };
            json!({"error": {"class": class, "desc": refusal.desc}})
        }
    };
    if let (Some(id), Some(members)) = (id, reply.as_object_mut()) {
        members.insert("id".to_owned(), id);
    }
    reply
}

/// An event that happens now.
pub(crate) fn event(name: &str, data: Option<Value>) -> Value {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let timestamp = json!({"seconds": now.as_secs(), "microseconds": now.subsec_micros()});
    let mut event = json!({"event": name, "timestamp": timestamp});
    if let (Some(data), Some(members)) = (data, event.as_object_mut()) {
        members.insert("data".to_owned(), data);
    }
    event
}

/// A value on a line of its own, as it is sent.
pub(crate) fn line(value: &Value) -> Vec<u8> {
    format!("{value}\r\n").into_bytes()
}
