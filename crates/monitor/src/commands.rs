//! The table of commands: name, arguments, what each does.

use dunlin::parameters::{ParameterInfo, Unit};
use dunlin::{PARAMETERS, Uri};
use serde_json::{Map, Value, json};

use crate::migration_info;
use crate::protocol::{self, Refusal};
use crate::vm::Vm;

type Arguments = Map<String, Value>;

/// The command after whose answer the process ends.
pub(crate) const QUIT: &str = "quit";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Text,
    Flag,
    Number,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Text => "string",
            Self::Flag => "boolean",
            Self::Number => "integer",
        }
    }

    fn fits(self, value: &Value) -> bool {
        match self {
            Self::Text => value.is_string(),
            Self::Flag => value.is_boolean(),
            Self::Number => value.is_i64() || value.is_u64(),
        }
    }
}

/// What arguments a command takes; all may be left out, but those that the command itself asks for.
enum Takes {
    These(&'static [(&'static str, Kind)]),
    /// One for each row of the engine's table.
    EachParameter,
}

const NOTHING: Takes = Takes::These(&[]);

struct Command {
    name: &'static str,
    takes: Takes,
    run: fn(&Vm, &Arguments) -> Result<Value, Refusal>,
}

static COMMANDS: &[Command] = &[
    Command { name: "query-status", takes: NOTHING, run: query_status },
    Command { name: "query-version", takes: NOTHING, run: |_, _| Ok(protocol::version()) },
    Command { name: "query-commands", takes: NOTHING, run: query_commands },
    Command {
        name: "migrate",
        takes: Takes::These(&[("uri", Kind::Text), ("detach", Kind::Flag), ("resume", Kind::Flag)]),
        run: migrate,
    },
    Command { name: "migrate-incoming", takes: Takes::These(&[("uri", Kind::Text)]), run: migrate_incoming },
    Command { name: "migrate_cancel", takes: NOTHING, run: |vm, _| done(vm.cancel()) },
    Command { name: "query-migrate", takes: NOTHING, run: query_migrate },
    Command { name: "migrate-set-parameters", takes: Takes::EachParameter, run: migrate_set_parameters },
    Command { name: "query-migrate-parameters", takes: NOTHING, run: query_migrate_parameters },
    Command { name: "query-migration-report", takes: NOTHING, run: query_migration_report },
    Command { name: "stop", takes: NOTHING, run: |vm, _| done(vm.stop()) },
    Command { name: "cont", takes: Takes::These(&[("x-take-back", Kind::Flag)]), run: cont },
    Command { name: "x-verify", takes: NOTHING, run: x_verify },
    Command { name: QUIT, takes: NOTHING, run: quit },
];

/// Runs a command of the table.
pub(crate) fn execute(vm: &Vm, name: &str, arguments: &Arguments) -> Result<Value, Refusal> {
    let command = COMMANDS
        .iter()
        .find(|command| command.name == name)
        .ok_or_else(|| Refusal::not_found(format_args!("The command {name} has not been found")))?;
    check(&command.takes, arguments)?;
    (command.run)(vm, arguments)
}

/// Checks the arguments of `qmp_capabilities`: there is no capability to enable.
pub(crate) fn check_no_capabilities(arguments: &Arguments) -> Result<(), Refusal> {
    for (name, value) in arguments {
        match (name.as_str(), value.as_array()) {
            ("enable", Some(list)) if list.is_empty() => {}
            ("enable", Some(_)) => return Err(Refusal::generic("no capability can be enabled: none was offered")),
            ("enable", None) => return Err(wrong_type("enable", "array")),
            _ => return Err(unexpected(name)),
        }
    }
    Ok(())
}

fn check(takes: &Takes, arguments: &Arguments) -> Result<(), Refusal> {
    for (name, value) in arguments {
        let kind = match takes {
            Takes::These(known) => known.iter().find(|(known, _)| known == name).map(|(_, kind)| *kind),
            Takes::EachParameter => PARAMETERS.iter().find(|info| info.name == name).map(|info| match info.unit {
                Unit::Switch => Kind::Flag,
                Unit::Choice(_) => Kind::Text,
                _ => Kind::Number,
            }),
        };
        let kind = kind.ok_or_else(|| unexpected(name))?;
        if !kind.fits(value) {
            return Err(wrong_type(name, kind.name()));
        }
    }
    Ok(())
}

fn unexpected(name: &str) -> Refusal {
    Refusal::generic(format_args!("Parameter '{name}' is unexpected"))
}

fn wrong_type(name: &str, wanted: &str) -> Refusal {
    Refusal::generic(format_args!("Invalid parameter type for '{name}', expected: {wanted}"))
}

fn done<E: ToString>(outcome: Result<(), E>) -> Result<Value, Refusal> {
    outcome.map(|()| json!({})).map_err(Refusal::generic)
}

fn flag(arguments: &Arguments, name: &str) -> bool {
    arguments.get(name).and_then(Value::as_bool).unwrap_or(false)
}

fn uri(arguments: &Arguments) -> Result<Uri, Refusal> {
    let text = arguments.get("uri").and_then(Value::as_str);
    text.ok_or_else(|| Refusal::generic("Parameter 'uri' is missing"))?.parse().map_err(Refusal::generic)
}

fn query_status(vm: &Vm, _: &Arguments) -> Result<Value, Refusal> {
    let state = vm.run_state();
    Ok(json!({"status": state.name(), "running": state.is_running()}))
}

fn query_commands(_: &Vm, _: &Arguments) -> Result<Value, Refusal> {
    let names = std::iter::once("qmp_capabilities").chain(COMMANDS.iter().map(|command| command.name));
    Ok(names.map(|name| json!({ "name": name })).collect())
}

fn migrate(vm: &Vm, arguments: &Arguments) -> Result<Value, Refusal> {
    if flag(arguments, "resume") {
        return done(vm.reconnect());
    }
    done(vm.migrate(&uri(arguments)?))
}

fn migrate_incoming(vm: &Vm, arguments: &Arguments) -> Result<Value, Refusal> {
    done(vm.listen(&uri(arguments)?))
}

fn query_migrate(vm: &Vm, _: &Arguments) -> Result<Value, Refusal> {
    let address = vm.listening_on();
    Ok(migration_info::migration_info(vm.report().as_ref(), address.as_ref()))
}

fn query_migration_report(vm: &Vm, _: &Arguments) -> Result<Value, Refusal> {
    serde_json::to_value(vm.report()).map_err(Refusal::generic)
}

fn migrate_set_parameters(vm: &Vm, arguments: &Arguments) -> Result<Value, Refusal> {
    let mut numbers = Vec::new();
    for (name, value) in arguments {
        let info = ParameterInfo::find(name).map_err(Refusal::generic)?;
        let number = match value {
            Value::Bool(on) => i64::from(*on),
            Value::String(text) => info.parse(text).map_err(Refusal::generic)?,
            other => other.as_i64().ok_or_else(|| {
                Refusal::generic(format_args!("parameter {name}: {other} is more than {}", info.maximum))
            })?,
        };
        numbers.push((info.name, number));
    }
    done(vm.set_parameters(numbers))
}

fn query_migrate_parameters(vm: &Vm, _: &Arguments) -> Result<Value, Refusal> {
    let parameters = vm.parameters();
    let mut members = Map::new();
    for info in PARAMETERS {
        let value = serde_json::to_value(info.value(parameters.get(info))).map_err(Refusal::generic)?;
        members.insert(info.name.to_owned(), value);
    }
    Ok(Value::Object(members))
}

fn cont(vm: &Vm, arguments: &Arguments) -> Result<Value, Refusal> {
    if flag(arguments, "x-take-back") {
        vm.take_back().map_err(Refusal::generic)?;
    }
    done(vm.cont())
}

fn x_verify(vm: &Vm, _: &Arguments) -> Result<Value, Refusal> {
    let verification = vm.verify().map_err(Refusal::generic)?;
    let mut members = match verification.report {
        Value::Object(members) => members,
        other => Map::from_iter([("report".to_owned(), other)]),
    };
    members.insert("verified".to_owned(), verification.good.into());
    members.insert("summary".to_owned(), verification.summary.into());
    Ok(Value::Object(members))
}

fn quit(vm: &Vm, _: &Arguments) -> Result<Value, Refusal> {
    vm.cancel_outgoing();
    Ok(json!({}))
}
