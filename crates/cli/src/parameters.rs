//! `dunlin parameters`: the engine's table.

use anyhow::Result;
use dunlin::PARAMETERS;
use dunlin::parameters::{Changes, ParameterInfo};
use serde_json::{Value, json};

use crate::Outcome;
use crate::connection;
use crate::terminal;
use dunlin_monitor::text::{Align, table};

const HEADER: [&str; 8] = ["NAME", "TYPE", "UNIT", "DEFAULT", "RANGE", "SIDE", "LIVE", "HELP"];

pub fn parameters(json: bool) -> Result<Outcome> {
    terminal::out(&if json { connection::pretty(&list()) } else { listing() })?;
    Ok(Outcome::Success)
}

fn is_live(info: &ParameterInfo) -> bool {
    info.changes == Changes::Live
}

fn list() -> Value {
    let rows = PARAMETERS.iter().map(|info| {
        json!({
            "name": info.name,
            "type": info.type_name(),
            "unit": info.unit.name(),
            "default": info.value(info.default),
            "range": info.range(),
            "minimum": info.minimum,
            "maximum": info.maximum,
            "side": info.applies.to_string(),
            "live": is_live(info),
            "conflicts": info.conflicts().map(|conflict| json!({"parties": conflict.parties, "why": conflict.why})).collect::<Vec<_>>(),
            "help": info.help,
        })
    });
    rows.collect()
}

fn listing() -> String {
    let rows: Vec<Vec<String>> = PARAMETERS
        .iter()
        .map(|info| {
            vec![
                info.name.to_owned(),
                info.type_name().to_owned(),
                info.unit.name().to_owned(),
                info.value(info.default).to_string(),
                info.range(),
                info.applies.to_string(),
                if is_live(info) { "yes" } else { "no" }.to_owned(),
                info.help.to_owned(),
            ]
        })
        .collect();
    table(Align::Left, &HEADER, &rows)
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
