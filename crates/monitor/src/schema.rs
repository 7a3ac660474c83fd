//! A small language of types, in which the tables of commands and events say what these take and give.
//!
//! Arguments are checked by it at every depth, in QEMU's words, and `query-qmp-schema` is made from it.

use std::fmt;

use serde_json::{Map, Value};

use crate::protocol::Refusal;

/// A type. Those with members have QEMU's names where QEMU has them.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Type {
    Bool,
    Int,
    Number,
    Str,
    /// Any JSON value.
    Any,
    Array(&'static Type),
    Object(&'static Object),
    Enum(Enum),
    /// One of several, told apart by their JSON types.
    Alternate(&'static Alternate),
}

/// An object: its members, and those that a variant adds.
#[derive(Debug)]
pub(crate) struct Object {
    pub(crate) name: &'static str,
    pub(crate) members: List<Member>,
    pub(crate) variants: Option<Variants>,
    /// Members that QEMU has and that are refused with a reason.
    pub(crate) not_yet: &'static [NotYet],
}

/// Entries that stand in the source, or are made from another table.
#[derive(Debug, Clone, Copy)]
pub(crate) enum List<T: 'static> {
    These(&'static [T]),
    Made(fn() -> &'static [T]),
}

impl<T> List<T> {
    pub(crate) fn all(&self) -> &'static [T] {
        match self {
            Self::These(entries) => entries,
            Self::Made(make) => make(),
        }
    }
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Member {
    pub(crate) name: &'static str,
    pub(crate) kind: Type,
    pub(crate) presence: Presence,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Presence {
    Required,
    Optional,
}

/// What an object has besides, by the value of one of its members.
#[derive(Debug)]
pub(crate) struct Variants {
    pub(crate) tag: &'static str,
    pub(crate) cases: &'static [(&'static str, &'static Object)],
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Enum {
    pub(crate) name: &'static str,
    pub(crate) values: List<&'static str>,
    /// Values that QEMU has and that are refused with a reason.
    pub(crate) not_yet: &'static [NotYet],
}

#[derive(Debug)]
pub(crate) struct Alternate {
    pub(crate) name: &'static str,
    pub(crate) branches: &'static [Type],
}

/// Something that QEMU has and Dunlin has not, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NotYet {
    pub(crate) name: &'static str,
    pub(crate) why: &'static str,
}

/// The reason that `name` is not there, as the end of a sentence.
pub(crate) fn reason(list: &[NotYet], name: &str) -> String {
    list.iter().find(|entry| entry.name == name).map_or_else(String::new, |entry| format!(": {}", entry.why))
}

/// What takes no arguments, or gives nothing.
pub(crate) static NOTHING: Object = Object::of("Nothing", &[]);

pub(crate) const fn required(name: &'static str, kind: Type) -> Member {
    Member { name, kind, presence: Presence::Required }
}

pub(crate) const fn optional(name: &'static str, kind: Type) -> Member {
    Member { name, kind, presence: Presence::Optional }
}

impl Object {
    pub(crate) const fn of(name: &'static str, members: &'static [Member]) -> Self {
        Self { name, members: List::These(members), variants: None, not_yet: &[] }
    }
}

impl Enum {
    pub(crate) const fn of(name: &'static str, values: &'static [&'static str]) -> Self {
        Self { name, values: List::These(values), not_yet: &[] }
    }
}

impl Type {
    /// What QEMU's messages call it.
    fn wanted(self) -> String {
        match self {
            Self::Bool => "boolean".to_owned(),
            Self::Int => "integer".to_owned(),
            Self::Number => "number".to_owned(),
            Self::Str | Self::Enum(_) => "string".to_owned(),
            Self::Any => "any".to_owned(),
            Self::Array(_) => "array".to_owned(),
            Self::Object(_) => "object".to_owned(),
            Self::Alternate(alternate) => {
                let branches: Vec<String> = alternate.branches.iter().map(|branch| branch.wanted()).collect();
                branches.join(" or ")
            }
        }
    }

    /// Whether `value` has this JSON type; what is inside is not looked at.
    fn fits(self, value: &Value) -> bool {
        match self {
            Self::Bool => value.is_boolean(),
            Self::Int => value.is_i64() || value.is_u64(),
            Self::Number => value.is_number(),
            Self::Str | Self::Enum(_) => value.is_string(),
            Self::Any => true,
            Self::Array(_) => value.is_array(),
            Self::Object(_) => value.is_object(),
            Self::Alternate(alternate) => alternate.branches.iter().any(|branch| branch.fits(value)),
        }
    }

    fn check(self, value: &Value, at: &Place<'_>) -> Result<(), Refusal> {
        if !self.fits(value) {
            let wanted = self.wanted();
            return Err(Refusal::generic(format_args!("Invalid parameter type for '{at}', expected: {wanted}")));
        }
        match (self, value) {
            (Self::Array(element), Value::Array(values)) => {
                values.iter().enumerate().try_for_each(|(n, value)| element.check(value, &Place::Element(at, n)))
            }
            (Self::Object(object), Value::Object(members)) => object.check(members, at),
            (Self::Enum(choice), Value::String(text)) => choice.check(text, at),
            (Self::Alternate(alternate), value) => {
                let branch = alternate.branches.iter().find(|branch| branch.fits(value));
                branch.map_or(Ok(()), |branch| branch.check(value, at))
            }
            _ => Ok(()),
        }
    }

    /// Checks something that a command gives, or an event carries.
    #[cfg(test)]
    pub(crate) fn check_result(self, value: &Value) -> Result<(), Refusal> {
        self.check(value, &Place::Top)
    }
}

impl Enum {
    fn check(&self, text: &str, at: &Place<'_>) -> Result<(), Refusal> {
        if self.values.all().contains(&text) {
            return Ok(());
        }
        let name = at.last();
        let why = reason(self.not_yet, text);
        Err(Refusal::generic(format_args!("Parameter '{name}' does not accept value '{text}'{why}")))
    }
}

impl Object {
    /// Checks the arguments of a command.
    pub(crate) fn check_arguments(&self, arguments: &Map<String, Value>) -> Result<(), Refusal> {
        self.check(arguments, &Place::Top)
    }

    fn check(&self, given: &Map<String, Value>, at: &Place<'_>) -> Result<(), Refusal> {
        let mut known = Vec::new();
        self.check_members(given, at, &mut known)?;
        let Some(name) = given.keys().find(|name| !known.contains(&name.as_str())) else { return Ok(()) };
        let why = reason(self.not_yet, name);
        let place = Place::Member(at, name);
        Err(Refusal::generic(format_args!("Parameter '{place}' is unexpected{why}")))
    }

    fn check_members(
        &self,
        given: &Map<String, Value>,
        at: &Place<'_>,
        known: &mut Vec<&'static str>,
    ) -> Result<(), Refusal> {
        for member in self.members.all() {
            known.push(member.name);
            let place = Place::Member(at, member.name);
            match (given.get(member.name), member.presence) {
                (Some(value), _) => member.kind.check(value, &place)?,
                (None, Presence::Optional) => {}
                (None, Presence::Required) => {
                    return Err(Refusal::generic(format_args!("Parameter '{place}' is missing")));
                }
            }
        }
        let Some(variants) = &self.variants else { return Ok(()) };
        let tag = given.get(variants.tag).and_then(Value::as_str);
        match variants.cases.iter().find(|(case, _)| Some(*case) == tag) {
            Some((_, object)) => object.check_members(given, at, known),
            None => Ok(()),
        }
    }
}

/// Where in the arguments a value stands, as QEMU writes it: `capabilities[0].state`.
enum Place<'a> {
    Top,
    Member(&'a Place<'a>, &'a str),
    Element(&'a Place<'a>, usize),
}

impl Place<'_> {
    /// The last step of it.
    fn last(&self) -> String {
        match self {
            Self::Member(_, name) => (*name).to_owned(),
            whole => whole.to_string(),
        }
    }
}

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Top => Ok(()),
            Self::Member(Place::Top, name) => f.write_str(name),
            Self::Member(parent, name) => write!(f, "{parent}.{name}"),
            Self::Element(parent, n) => write!(f, "{parent}[{n}]"),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    static COLOUR: Type = Type::Enum(Enum {
        name: "Colour",
        values: List::These(&["red", "green"]),
        not_yet: &[NotYet { name: "blue", why: "there is no blue yet" }],
    });
    static POINT: Object = Object::of("Point", &[required("x", Type::Int), optional("colour", COLOUR)]);
    static SQUARE: Object = Object::of("Square", &[required("side", Type::Number)]);
    static ROUND: Object = Object::of("Round", &[]);
    static SHAPE: Object = Object {
        name: "Shape",
        members: List::These(&[required("form", Type::Enum(Enum::of("Form", &["square", "round"])))]),
        variants: Some(Variants { tag: "form", cases: &[("square", &SQUARE), ("round", &ROUND)] }),
        not_yet: &[NotYet { name: "angle", why: "nothing turns" }],
    };
    static TEXT_OR_NUMBER: Alternate = Alternate { name: "TextOrNumber", branches: &[Type::Int, Type::Str] };
    static DRAWING: Object = Object::of(
        "Drawing",
        &[
            required("points", Type::Array(&Type::Object(&POINT))),
            optional("shape", Type::Object(&SHAPE)),
            optional("size", Type::Alternate(&TEXT_OR_NUMBER)),
            optional("any", Type::Any),
        ],
    );

    #[test]
    fn every_depth_in_qemus_words() {
        for (given, wanted) in [
            (json!({}), "Parameter 'points' is missing"),
            (json!({"points": {}}), "Invalid parameter type for 'points', expected: array"),
            (json!({"points": [1]}), "Invalid parameter type for 'points[0]', expected: object"),
            (json!({"points": [{"x": 1}, {}]}), "Parameter 'points[1].x' is missing"),
            (json!({"points": [{"x": 1.5}]}), "Invalid parameter type for 'points[0].x', expected: integer"),
            (json!({"points": [{"x": 1, "y": 2}]}), "Parameter 'points[0].y' is unexpected"),
            (json!({"points": [{"x": 1, "colour": "pink"}]}), "Parameter 'colour' does not accept value 'pink'"),
            (
                json!({"points": [{"x": 1, "colour": "blue"}]}),
                "Parameter 'colour' does not accept value 'blue': there is no blue yet",
            ),
            (json!({"points": [], "shape": {"form": "square"}}), "Parameter 'shape.side' is missing"),
            (json!({"points": [], "shape": {"form": "round", "side": 1}}), "Parameter 'shape.side' is unexpected"),
            (
                json!({"points": [], "shape": {"form": "round", "angle": 1}}),
                "Parameter 'shape.angle' is unexpected: nothing turns",
            ),
            (json!({"points": [], "size": null}), "Invalid parameter type for 'size', expected: integer or string"),
            (json!({"points": [], "sizes": 1}), "Parameter 'sizes' is unexpected"),
        ] {
            let refusal = DRAWING.check_arguments(given.as_object().unwrap()).unwrap_err();
            assert_eq!(refusal, Refusal::generic(wanted), "{given}");
        }
        for good in [
            json!({"points": []}),
            json!({"points": [{"x": u64::MAX}], "shape": {"form": "square", "side": 1.5}, "size": "2M", "any": [{}]}),
            json!({"points": [{"x": -1, "colour": "red"}], "size": 3, "any": null}),
        ] {
            assert_eq!(DRAWING.check_arguments(good.as_object().unwrap()), Ok(()), "{good}");
        }
    }
}
