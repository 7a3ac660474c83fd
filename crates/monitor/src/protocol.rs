//! QMP's own shapes: greeting, request, reply, error.

use serde_json::{Map, Value, json};

use crate::framing::FramingError;

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
        Self::generic(format_args!("JSON parse error, {error}; the rest of the line is skipped"))
    }
}

/// A request that has QMP's shape.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Request {
    pub(crate) command: String,
    pub(crate) arguments: Map<String, Value>,
}

/// Reads a request; its `id` is found even where the rest is wrong.
pub(crate) fn parse_request(text: &[u8]) -> (Option<Value>, Result<Request, Refusal>) {
    match serde_json::from_slice(text) {
        Ok(Value::Object(mut members)) => (members.remove("id"), request(members)),
        Ok(_) => (None, Err(Refusal::generic("QMP input must be a JSON object"))),
        Err(error) => (None, Err(Refusal::generic(format_args!("JSON parse error, {error}")))),
    }
}

fn request(members: Map<String, Value>) -> Result<Request, Refusal> {
    let mut command = None;
    let mut arguments = Map::new();
    for (name, value) in members {
        match (name.as_str(), value) {
            ("execute", Value::String(text)) => command = Some(text),
            ("execute", _) => return Err(Refusal::generic("QMP input member 'execute' must be a string")),
            ("arguments", Value::Object(given)) => arguments = given,
            ("arguments", _) => return Err(Refusal::generic("QMP input member 'arguments' must be an object")),
            _ => return Err(Refusal::generic(format_args!("QMP input member '{name}' is unexpected"))),
        }
    }
    let command = command.ok_or_else(|| Refusal::generic("QMP input lacks member 'execute'"))?;
    Ok(Request { command, arguments })
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
    json!({"QMP": {"version": version(), "capabilities": []}})
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
