//! `dunlin parameters`: the engine's table.

use anyhow::Result;
use dunlin::PARAMETERS;
use dunlin::parameters::{CONFLICTS, Changes, ParameterInfo};
use serde_json::Value;

use crate::Outcome;
use crate::args::ListParameters;
use crate::connection;
use crate::terminal;
use dunlin_monitor::parameter_info;
use dunlin_monitor::text::{Align, table};

const HEADER: [&str; 8] = ["NAME", "TYPE", "UNIT", "DEFAULT", "RANGE", "SIDE", "LIVE", "HELP"];

pub fn parameters(args: &ListParameters) -> Result<Outcome> {
    let text = match (args.json, args.markdown) {
        (true, _) => connection::pretty(&list()),
        (_, true) => markdown(),
        _ => listing() + &conflicts(),
    };
    terminal::out(&text)?;
    Ok(Outcome::Success)
}

fn is_live(info: &ParameterInfo) -> bool {
    info.changes == Changes::Live
}

fn list() -> Value {
    PARAMETERS.iter().map(parameter_info).collect()
}

fn listing() -> String {
    let rows: Vec<Vec<String>> = PARAMETERS
        .iter()
        .map(|info| {
            vec![
                info.name.to_owned(),
                info.type_name().to_owned(),
                info.unit.name().to_owned(),
                info.text(info.default),
                info.range(),
                info.applies.to_string(),
                if is_live(info) { "yes" } else { "no" }.to_owned(),
                info.help.to_owned(),
            ]
        })
        .collect();
    table(Align::Left, &HEADER, &rows)
}

/// What does not go together, a line each.
fn conflicts() -> String {
    let mut text = "\nSome values of these do not go together:\n".to_owned();
    for conflict in CONFLICTS {
        let [first, second] = conflict.parties;
        text.push_str(&format!("{first}, {second}: {}\n", conflict.why));
    }
    text
}

const INTRODUCTION: &str = "\
# Parameters

Made from the table in `crates/dunlin/src/parameters.rs` by `dunlin parameters --markdown`; `.ci/run` checks that it is
what that prints.

A parameter is set for the next migration, and where it is live also for the one under way: by `--set NAME=VALUE` of
`dunlin migrate` and `dunlin demo`, by `migrate_set_parameter NAME VALUE` in [the monitor](monitor.md), by
`migrate-set-parameters` in [QMP](qmp.md). Those of type bool are QEMU's capabilities too. A number without a unit counts
the parameter's own unit, everywhere; on the command line and in the monitor other units can be given: `300M/s`, `64K`,
`1.5s`, `50%`. `K`, `M`, `G` and `T` are powers of 1024.

What is set at a machine stays set: `dunlin migrate --set` too is for that migration and for those after it, until the
parameter is set again.
";

fn markdown() -> String {
    let header = ["name", "type", "unit", "default", "range", "side", "live"];
    let mut text = format!("{INTRODUCTION}\n| {} |\n|{}\n", header.join(" | "), "---|".repeat(header.len()));
    for info in PARAMETERS {
        let cells = [
            format!("[`{0}`](#{0})", info.name),
            info.type_name().to_owned(),
            info.unit.name().to_owned(),
            format!("`{}`", info.text(info.default)),
            info.range(),
            info.applies.to_string(),
            if is_live(info) { "yes" } else { "no" }.to_owned(),
        ];
        text.push_str(&format!("| {} |\n", cells.join(" | ")));
    }
    for info in PARAMETERS {
        text.push_str(&format!("\n## {}\n\n{}\n", info.name, info.help));
        for conflict in info.conflicts() {
            let other = conflict.parties.into_iter().find(|party| *party != info.name).unwrap_or(info.name);
            text.push_str(&format!(
                "\nSome of its values do not go with some of [`{other}`](#{other}): {}.\n",
                conflict.why
            ));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_parameter_has_its_line() {
        let listing = listing();
        assert_eq!(listing.lines().count(), PARAMETERS.len() + 1);
        assert!(listing.lines().zip(PARAMETERS).all(|(_, info)| listing.contains(info.name)));
        assert_eq!(list().as_array().map(Vec::len), Some(PARAMETERS.len()));
    }
}
