//! A row of the engine's table, for programs.

use dunlin::parameters::{Changes, ParameterInfo, Unit};
use serde_json::{Map, Value, json};

use crate::schema::{Enum, Object, Type, optional, required};

pub(crate) static PARAMETER_INFO: Object = Object::of(
    "MigrationParameterInfo",
    &[
        required("name", Type::Str),
        required("type", Type::Str),
        required("unit", Type::Str),
        required("default", Type::Any),
        optional("minimum", Type::Int),
        optional("maximum", Type::Int),
        optional("choices", Type::Array(&Type::Str)),
        required("side", Type::Enum(Enum::of("MigrationParameterSide", &["source", "destination", "both"]))),
        required("live", Type::Bool),
        required("capability", Type::Bool),
        required("conflicts", Type::Array(&Type::Object(&CONFLICT))),
        required("help", Type::Str),
    ],
);

static CONFLICT: Object =
    Object::of("MigrationParameterConflict", &[required("with", Type::Str), required("why", Type::Str)]);

/// What `query-migrate-parameters-info` says of a parameter.
pub fn parameter_info(info: &ParameterInfo) -> Value {
    let conflicts = info.conflicts().flat_map(|conflict| {
        let others = conflict.parties.into_iter().filter(|party| *party != info.name);
        others.map(|other| json!({"with": other, "why": conflict.why}))
    });
    let mut members = Map::new();
    let mut put = |name: &str, value: Value| members.insert(name.to_owned(), value);
    put("name", info.name.into());
    put("type", info.type_name().into());
    put("unit", info.unit.name().into());
    put("default", json(info, info.default));
    match info.unit {
        Unit::Switch => {}
        Unit::Choice(names) => {
            put("choices", names.into());
        }
        _ => {
            put("minimum", info.minimum.into());
            put("maximum", info.maximum.into());
        }
    }
    put("side", info.applies.to_string().into());
    put("live", (info.changes == Changes::Live).into());
    put("capability", info.is_capability().into());
    put("conflicts", conflicts.collect());
    put("help", info.help.into());
    Value::Object(members)
}

/// A parameter's number as its JSON type has it.
pub(crate) fn json(info: &ParameterInfo, number: i64) -> Value {
    match info.value(number) {
        dunlin::parameters::Value::Number(number) => number.into(),
        dunlin::parameters::Value::Switch(on) => on.into(),
        dunlin::parameters::Value::Choice(name) => name.into(),
    }
}
