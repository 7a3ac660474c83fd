//! What there is: commands, events, and the types of both.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::{Command, Oob};
use crate::events::EVENTS;
use crate::protocol::Refusal;
use crate::schema::{self, Enum, Object, Presence, Type, required};

pub(super) static COMMANDS: &[Command] = &[
    Command {
        name: "query-commands",
        help: "The names of all commands.",
        takes: &schema::NOTHING,
        gives: Type::Array(&Type::Object(&NAMED)),
        oob: Oob::Refused,
        run: |_| Ok(super::all().map(|command| json!({"name": command.name})).collect()),
    },
    Command {
        name: "query-events",
        help: "The names of all events.",
        takes: &schema::NOTHING,
        gives: Type::Array(&Type::Object(&NAMED)),
        oob: Oob::Refused,
        run: |_| Ok(EVENTS.iter().map(|event| json!({"name": event.name})).collect()),
    },
    Command {
        name: "query-qmp-schema",
        help: "The types of what commands take and give and events carry, in QEMU's `SchemaInfo`.",
        takes: &schema::NOTHING,
        gives: Type::Array(&Type::Any),
        oob: Oob::Refused,
        run: |_| -> Result<Value, Refusal> { Ok(describe()) },
    },
];

static NAMED: Object = Object::of("CommandInfo", &[required("name", Type::Str)]);

/// All commands and events and the types that they reach.
fn describe() -> Value {
    let mut described = Described::default();
    for command in super::all() {
        let arguments = described.object(command.takes);
        let result = described.name(command.gives);
        let mut entry =
            json!({"meta-type": "command", "name": command.name, "arg-type": arguments, "ret-type": result});
        if command.oob == Oob::Allowed
            && let Some(members) = entry.as_object_mut()
        {
            members.insert("allow-oob".to_owned(), true.into());
        }
        described.entities.push(entry);
    }
    for event in EVENTS {
        let data = described.object(event.data);
        described.entities.push(json!({"meta-type": "event", "name": event.name, "arg-type": data}));
    }
    described.entities.into()
}

#[derive(Default)]
struct Described {
    entities: Vec<Value>,
    /// What the types are called to the outside, by what they are called here.
    names: BTreeMap<String, String>,
}

impl Described {
    /// The name of a type, which is described if it was not before. That of one with members says nothing, as in QEMU.
    fn name(&mut self, kind: Type) -> String {
        match kind {
            Type::Bool => self.builtin("bool", "boolean"),
            Type::Int => self.builtin("int", "int"),
            Type::Number => self.builtin("number", "number"),
            Type::Str => self.builtin("str", "string"),
            Type::Any => self.builtin("any", "value"),
            Type::Array(element) => {
                let element = self.name(*element);
                let name = format!("[{element}]");
                self.once(
                    &name.clone(),
                    name,
                    |_, name| json!({"meta-type": "array", "name": name, "element-type": element}),
                )
            }
            Type::Object(object) => self.object(object),
            Type::Enum(choice) => self.opaque(choice.name, |_, name| describe_enum(&choice, name)),
            Type::Alternate(alternate) => self.opaque(alternate.name, |described, name| {
                let members = alternate.branches.iter().map(|branch| json!({"type": described.name(*branch)}));
                let members: Vec<Value> = members.collect();
                json!({"meta-type": "alternate", "name": name, "members": members})
            }),
        }
    }

    fn builtin(&mut self, name: &str, json_type: &str) -> String {
        self.once(
            name,
            name.to_owned(),
            |_, name| json!({"meta-type": "builtin", "name": name, "json-type": json_type}),
        )
    }

    fn object(&mut self, object: &'static Object) -> String {
        self.opaque(object.name, |described, name| {
            let members = object.members.all().iter().map(|member| {
                let kind = described.name(member.kind);
                match member.presence {
                    Presence::Required => json!({"name": member.name, "type": kind}),
                    Presence::Optional => json!({"name": member.name, "type": kind, "default": null}),
                }
            });
            let members: Vec<Value> = members.collect();
            let mut entity = json!({"meta-type": "object", "name": name, "members": members});
            if let (Some(variants), Some(entity)) = (&object.variants, entity.as_object_mut()) {
                let cases =
                    variants.cases.iter().map(|(case, kind)| json!({"case": case, "type": described.object(kind)}));
                let cases: Vec<Value> = cases.collect();
                entity.insert("tag".to_owned(), variants.tag.into());
                entity.insert("variants".to_owned(), cases.into());
            }
            entity
        })
    }

    fn opaque(&mut self, internal: &str, describe: impl FnOnce(&mut Self, &str) -> Value) -> String {
        let number = self.names.len().to_string();
        self.once(&format!("type {internal}"), number, describe)
    }

    /// Describes a type when it is met first.
    fn once(&mut self, internal: &str, name: String, describe: impl FnOnce(&mut Self, &str) -> Value) -> String {
        if let Some(known) = self.names.get(internal) {
            return known.clone();
        }
        self.names.insert(internal.to_owned(), name.clone());
        let entity = describe(self, &name);
        self.entities.push(entity);
        name
    }
}

fn describe_enum(choice: &Enum, name: &str) -> Value {
    let values = choice.values.all();
    let members: Vec<Value> = values.iter().map(|value| json!({"name": value})).collect();
    json!({"meta-type": "enum", "name": name, "values": values, "members": members})
}
