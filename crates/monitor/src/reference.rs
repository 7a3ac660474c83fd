//! The tables of commands and events as docs/qmp.md has them.

use std::fmt::Write;

use crate::commands::{self, Oob};
use crate::events::EVENTS;
use crate::schema::{List, Member, Object, Presence, Type};

/// The tables, in Markdown.
pub fn reference() -> String {
    let mut text = String::from("| command | arguments | gives | what it does |\n|---|---|---|---|\n");
    for command in commands::all() {
        let oob = if command.oob == Oob::Allowed { " May be carried out of band." } else { "" };
        let row = format!(
            "| `{}` | {} | {} | {}{oob} |\n",
            command.name,
            members(command.takes),
            result(command.gives),
            command.help
        );
        text.push_str(&row);
    }
    text.push_str("\n| event | data | when |\n|---|---|---|\n");
    for event in EVENTS {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "| `{}` | {} | {} |", event.name, members(event.data), event.help);
    }
    text
}

fn members(object: &Object) -> String {
    match object.members {
        List::Made(_) => "any row of the table".to_owned(),
        List::These(members) => members.iter().map(member).collect::<Vec<_>>().join(", "),
    }
}

fn member(member: &Member) -> String {
    let optional = if member.presence == Presence::Optional { "?" } else { "" };
    format!("`{}`{optional} {}", member.name, kind(member.kind))
}

fn result(gives: Type) -> String {
    match gives {
        Type::Object(object) if object.members.all().is_empty() => String::new(),
        other => kind(other),
    }
}

fn kind(of: Type) -> String {
    match of {
        Type::Bool => "bool".to_owned(),
        Type::Int => "int".to_owned(),
        Type::Number => "number".to_owned(),
        Type::Str => "str".to_owned(),
        Type::Any => "any".to_owned(),
        Type::Array(element) => format!("[{}]", kind(*element)),
        Type::Object(object) => object.name.to_owned(),
        Type::Enum(choice) => choice.name.to_owned(),
        Type::Alternate(alternate) => {
            alternate.branches.iter().map(|branch| kind(*branch)).collect::<Vec<_>>().join(" or ")
        }
    }
}

#[cfg(test)]
mod tests {
    /// `DUNLIN_UPDATE_DOCS=1 cargo test -p dunlin-monitor reference` writes it.
    #[test]
    fn the_document_has_the_tables() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/qmp.md");
        let document = std::fs::read_to_string(path).unwrap();
        let (begin, end) = ("<!-- tables: begin -->\n", "<!-- tables: end -->\n");
        let (before, rest) = document.split_once(begin).unwrap();
        let (_, after) = rest.split_once(end).unwrap();
        let wanted = format!("{before}{begin}{}{end}{after}", super::reference());
        if std::env::var_os("DUNLIN_UPDATE_DOCS").is_some() {
            std::fs::write(path, &wanted).unwrap();
            return;
        }
        assert!(document == wanted, "docs/qmp.md is stale; see the comment of this test");
    }
}
