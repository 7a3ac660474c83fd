//! Commands on the engine's table of parameters. Its booleans are QEMU's capabilities.

use dunlin::PARAMETERS;
use dunlin::parameters::ParameterInfo;
use serde_json::{Map, Value, json};

use super::{Arguments, Call, Command, NOTHING, Oob, done};
use crate::parameter_info;
use crate::protocol::Refusal;
use crate::schema::{self, Object, Type, required};
use crate::types::{CAPABILITY_STATUS, PARAMETERS_READ, PARAMETERS_TO_SET};

pub(super) static COMMANDS: &[Command] = &[
    Command {
        name: "migrate-set-capabilities",
        help: "Sets rows of the table that are on or off: all of them or none.",
        takes: &CAPABILITIES,
        gives: NOTHING,
        oob: Oob::Refused,
        run: migrate_set_capabilities,
    },
    Command {
        name: "query-migrate-capabilities",
        help: "All rows of the table that are on or off.",
        takes: &schema::NOTHING,
        gives: Type::Array(&Type::Object(&CAPABILITY_STATUS)),
        oob: Oob::Refused,
        run: query_migrate_capabilities,
    },
    Command {
        name: "migrate-set-parameters",
        help: "Sets rows of the table, those that are on or off too: all of them or none. Numbers are in the row's unit, \
               or text with a suffix (`\"64M\"`). A running migration takes live ones only.",
        takes: &PARAMETERS_TO_SET,
        gives: NOTHING,
        oob: Oob::Refused,
        run: migrate_set_parameters,
    },
    Command {
        name: "query-migrate-parameters",
        help: "All rows of the table that are not on or off, in their units.",
        takes: &schema::NOTHING,
        gives: Type::Object(&PARAMETERS_READ),
        oob: Oob::Refused,
        run: query_migrate_parameters,
    },
    Command {
        name: "query-migrate-parameters-info",
        help: "The table itself: of each row its type, unit, default, range, side, what it conflicts with, and help.",
        takes: &schema::NOTHING,
        gives: Type::Array(&Type::Object(&parameter_info::PARAMETER_INFO)),
        oob: Oob::Refused,
        run: |_| Ok(PARAMETERS.iter().map(parameter_info::parameter_info).collect()),
    },
];

static CAPABILITIES: Object =
    Object::of("MigrateSetCapabilities", &[required("capabilities", Type::Array(&Type::Object(&CAPABILITY_STATUS)))]);

fn migrate_set_capabilities(call: Call<'_>) -> Result<Value, Refusal> {
    let wanted = call.arguments().list("capabilities").iter().filter_map(Value::as_object).map(Arguments);
    let numbers = wanted.map(|status| (status.required("capability"), i64::from(status.is_true("state"))));
    done(call.vm.set_parameters(numbers))
}

fn query_migrate_capabilities(call: Call<'_>) -> Result<Value, Refusal> {
    let parameters = call.vm.parameters();
    let rows = PARAMETERS.iter().filter(|info| info.is_capability());
    Ok(rows.map(|info| json!({"capability": info.name, "state": parameters.get(info) != 0})).collect())
}

fn migrate_set_parameters(call: Call<'_>) -> Result<Value, Refusal> {
    let mut numbers = Vec::new();
    for (name, value) in &call.arguments {
        let info = ParameterInfo::find(name).map_err(Refusal::generic)?;
        numbers.push((info.name, number(info, value)?));
    }
    done(call.vm.set_parameters(numbers))
}

/// The table's number for what a client gave.
fn number(info: &'static ParameterInfo, value: &Value) -> Result<i64, Refusal> {
    let number = match value {
        Value::Bool(on) => Ok(i64::from(*on)),
        Value::String(text) => info.parse(text),
        // The table's numbers end below JSON's.
        other => other.as_i64().ok_or_else(|| info.out_of_range(other)),
    };
    number.map_err(Refusal::generic)
}

fn query_migrate_parameters(call: Call<'_>) -> Result<Value, Refusal> {
    let parameters = call.vm.parameters();
    let mut members = Map::new();
    for info in PARAMETERS.iter().filter(|info| !info.is_capability()) {
        members.insert(info.name.to_owned(), parameter_info::json(info, parameters.get(info)));
    }
    Ok(Value::Object(members))
}
