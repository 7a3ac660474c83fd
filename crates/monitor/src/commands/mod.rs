//! The table of commands: what each takes, gives and does. A file for each kind.

mod arguments;
mod descriptors;
mod guest;
pub(crate) mod introspection;
mod measuring;
mod migration;
mod parameters;
mod throttling;

use std::os::fd::OwnedFd;
use std::sync::Mutex;

use serde_json::{Map, Value, json};

pub(crate) use arguments::Arguments;

use crate::hmp;
use crate::not_yet;
use crate::protocol::{Band, OutOfBand, Refusal};
use crate::schema::{self, Enum, Object, Type, optional};
use crate::vm::Vm;

/// The command that must come first.
pub(crate) const NEGOTIATE: &str = "qmp_capabilities";
/// The command after whose answer the process ends.
pub(crate) const QUIT: &str = "quit";
/// The command that carries out a line of the monitor for people.
const HUMAN: &str = "human-monitor-command";
const HUMAN_LINE: &str = "command-line";
/// The command that takes a file descriptor.
pub(crate) const GETFD: &str = "getfd";

/// Whether a command may be carried out while another is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Oob {
    Refused,
    Allowed,
}

/// One command.
pub(crate) struct Command {
    pub(crate) name: &'static str,
    /// What it does, in a sentence or two, for docs/qmp.md.
    pub(crate) help: &'static str,
    pub(crate) takes: &'static Object,
    pub(crate) gives: Type,
    pub(crate) oob: Oob,
    pub(crate) run: fn(Call<'_>) -> Result<Value, Refusal>,
}

/// One command being carried out; its arguments are checked.
pub(crate) struct Call<'a> {
    pub(crate) vm: &'a Vm,
    /// The client's dialogue with the monitor for people.
    pub(crate) human: &'a Mutex<hmp::Session>,
    pub(crate) arguments: Map<String, Value>,
    pub(crate) descriptor: Option<OwnedFd>,
}

impl Call<'_> {
    fn arguments(&self) -> Arguments<'_> {
        Arguments(&self.arguments)
    }
}

const NOTHING: Type = Type::Object(&schema::NOTHING);

static CAPABILITIES: &[Command] = &[Command {
    name: NEGOTIATE,
    help: "Must come first. `enable` may have `oob`, for out-of-band execution.",
    takes: &NEGOTIATION,
    gives: NOTHING,
    oob: Oob::Refused,
    run: |_| Err(Refusal::not_found("Capabilities negotiation is already complete, command ignored")),
}];

static NEGOTIATION: Object =
    Object::of("QmpCapabilities", &[optional("enable", Type::Array(&Type::Enum(Enum::of("QMPCapability", &["oob"]))))]);

/// Every command there is.
pub(crate) fn all() -> impl Iterator<Item = &'static Command> {
    let kinds = [
        CAPABILITIES,
        guest::COMMANDS,
        migration::COMMANDS,
        parameters::COMMANDS,
        throttling::COMMANDS,
        measuring::COMMANDS,
        descriptors::COMMANDS,
        introspection::COMMANDS,
    ];
    kinds.into_iter().flatten()
}

/// Carries out a command.
pub(crate) fn execute(call: Call<'_>, name: &str, band: Band) -> Result<Value, Refusal> {
    (check(name, band, &call.arguments)?.run)(call)
}

/// The command of that name, if it may be carried out so.
pub(crate) fn check(name: &str, band: Band, arguments: &Map<String, Value>) -> Result<&'static Command, Refusal> {
    let command = all().find(|command| command.name == name).ok_or_else(|| {
        let why = schema::reason(not_yet::COMMANDS, name);
        Refusal::not_found(format_args!("The command {name} has not been found{why}"))
    })?;
    if band == Band::OutOf && command.oob == Oob::Refused {
        return Err(Refusal::generic(format_args!("The command {name} does not support OOB")));
    }
    command.takes.check_arguments(arguments)?;
    Ok(command)
}

/// Whether the process ends after this command, if it is carried out.
pub(crate) fn quits(name: &str, arguments: &Map<String, Value>) -> bool {
    let line = || arguments.get(HUMAN_LINE).and_then(Value::as_str);
    name == QUIT || name == HUMAN && line().is_some_and(hmp::quits)
}

/// Reads what a client wants of what was offered in the greeting.
pub(crate) fn negotiate(arguments: &Map<String, Value>) -> Result<OutOfBand, Refusal> {
    NEGOTIATION.check_arguments(arguments)?;
    let wanted = Arguments(arguments).list("enable");
    Ok(if wanted.is_empty() { OutOfBand::Off } else { OutOfBand::On })
}

/// The result of a command that gives nothing.
fn done<E: ToString>(outcome: Result<(), E>) -> Result<Value, Refusal> {
    outcome.map(|()| json!({})).map_err(Refusal::generic)
}
