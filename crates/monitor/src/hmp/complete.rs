//! What may stand where a line ends, from the tables.

use dunlin::PARAMETERS;
use dunlin::parameters::{ParameterInfo, Unit};

use super::table::{self, Argument, COMMANDS, Command, Does, Kind, Presence, TOPICS};
use super::words;

/// A word that may stand at a line's end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// The whole word.
    pub word: String,
    /// What it is, in a line.
    pub help: String,
}

/// What may stand at a line's end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Completion {
    /// Where the word to be completed begins, in bytes.
    pub start: usize,
    /// What it may become, in the table's order.
    pub candidates: Vec<Candidate>,
}

/// What the word at the end of `line` may become; after a blank, what may stand there.
pub fn complete(line: &str) -> Completion {
    // In an open quotation mark there is an address or a command for a shell.
    let Ok(mut words) = words::split(line) else { return Completion { start: line.len(), candidates: Vec::new() } };
    let start = words.last.unwrap_or(line.len());
    let begun = if words.last.is_some() { words.said.pop().unwrap_or_default() } else { String::new() };
    let mut candidates = after(&words.said);
    candidates.retain(|candidate| candidate.word.starts_with(&begun));
    // Flags that were not asked for are in the way of the rest.
    if !begun.starts_with('-') && candidates.iter().any(|candidate| !candidate.word.starts_with('-')) {
        candidates.retain(|candidate| !candidate.word.starts_with('-'));
    }
    Completion { start, candidates }
}

fn after(said: &[String]) -> Vec<Candidate> {
    let Some((name, said)) = said.split_first() else { return rows(COMMANDS) };
    let Ok(mut command) = table::command(name) else { return Vec::new() };
    let mut said = said;
    if let (Does::Info, Some((topic, rest))) = (&command.does, said.split_first()) {
        let Ok(topic) = table::topic(topic) else { return Vec::new() };
        (command, said) = (topic, rest);
    }
    let flags = said.iter().take_while(|word| word.starts_with('-')).count();
    let place = said.len().saturating_sub(if takes_flags(command) { flags } else { 0 });
    let mut candidates = Vec::new();
    if place == 0 {
        let flags = command.arguments.iter().filter(|argument| argument.presence == Presence::Flag);
        let new = flags.filter(|flag| !said.iter().any(|word| word == flag.name));
        candidates.extend(new.map(|flag| candidate(flag.name, command.help)));
    }
    candidates.extend(command.argument(place).map(|argument| words_for(argument, said)).unwrap_or_default());
    // Where an argument may be left out, the one after it may stand too.
    if command.argument(place).is_some_and(|argument| argument.presence == Presence::Again { optional: true }) {
        candidates.extend(command.argument(place + 1).map(|argument| words_for(argument, said)).unwrap_or_default());
    }
    candidates
}

fn takes_flags(command: &Command) -> bool {
    command.arguments.iter().any(|argument| argument.presence == Presence::Flag)
}

fn words_for(argument: &Argument, said: &[String]) -> Vec<Candidate> {
    match argument.kind {
        Kind::Text => Vec::new(),
        Kind::Command => rows(COMMANDS),
        Kind::Topic => match said.first() {
            None => rows(TOPICS),
            Some(command) if command == "info" => rows(TOPICS),
            Some(_) => Vec::new(),
        },
        Kind::Parameter(which) => {
            let rows = PARAMETERS.iter().filter(|info| which(info));
            rows.map(|info| candidate(info.name, info.help)).collect()
        }
        Kind::Value => said.last().and_then(|name| ParameterInfo::find(name).ok()).map(values).unwrap_or_default(),
        Kind::OneOf(words) => words.iter().map(|word| candidate(word, "")).collect(),
    }
}

/// What may be offered as a parameter's value: all that it can be, or, of a number, its default as an example.
pub fn values(info: &ParameterInfo) -> Vec<Candidate> {
    match info.unit {
        Unit::Switch => ["on", "off"].map(|word| candidate(word, "")).into(),
        Unit::Choice(names) => names.iter().map(|name| candidate(name, "")).collect(),
        _ => vec![candidate(&info.text(info.default), "the default")],
    }
}

fn rows(rows: &[Command]) -> Vec<Candidate> {
    rows.iter().filter(|row| row.is_there()).map(|row| candidate(row.name, row.help)).collect()
}

fn candidate(word: &str, help: &str) -> Candidate {
    Candidate { word: word.to_owned(), help: help.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offered(line: &str) -> (usize, Vec<String>) {
        let completion = complete(line);
        (completion.start, completion.candidates.into_iter().map(|candidate| candidate.word).collect())
    }

    #[test]
    fn words_by_their_place() {
        for (line, start, wanted) in [
            ("", 0, &["help", "info", "migrate", "migrate_set_parameter", "quit"][..]),
            ("migrate_s", 0, &["migrate_set_capability", "migrate_set_parameter", "migrate_set_speed"]),
            ("info ", 5, &["migrate", "status", "migrate_cache_size"]),
            ("help info migrate_c", 10, &["migrate_capabilities", "migrate_cache_size"]),
            ("info migrate_parameters x", 24, &["xbzrle", "xbzrle-cache-size"]),
            ("migrate_set_capability e", 23, &["events"]),
            ("migrate_set_capability events ", 30, &["on", "off", "xbzrle"]),
            ("migrate_set_capability events off ", 34, &["xbzrle"]),
            ("migrate_set_parameter ", 22, &["max-bandwidth", "xbzrle"]),
            ("migrate_set_parameter multifd-compression ", 42, &["none", "lz4", "zstd"]),
            ("migrate_set_parameter xbzrle o", 29, &["on", "off"]),
            ("migrate_set_parameter xbzrle on integ", 32, &["integrity"]),
            ("migrate_set_parameter downtime-limit ", 37, &["300ms"]),
            ("migrate -", 8, &["-d", "-r"]),
            ("migrate -d -", 11, &["-r"]),
            ("migrate_continue ", 17, &["pre-switchover"]),
        ] {
            let (at, words) = offered(line);
            assert_eq!(at, start, "{line}");
            for word in wanted {
                assert!(words.iter().any(|one| one == word), "{line}: {word} is not among {words:?}");
            }
        }
        assert_eq!(offered("migrate_set_capability m").1, ["multifd"]);
        assert!(!offered("migrate_set_capability events off ").1.contains(&"on".to_owned()));
        assert_eq!(offered("migrate_set_parameter xbzrle on integ").1, ["integrity"]);
    }

    #[test]
    fn nothing_where_nothing_is_known() {
        for line in ["nonsense ", "migrate tcp", "migrate \"exec:nc ", "stop ", "info status ", "help stop ", "savev"] {
            assert_eq!(offered(line).1, Vec::<String>::new(), "{line}");
        }
    }

    /// Whatever is offered for a row of the table is understood there.
    #[test]
    fn offers_are_understood() {
        for info in PARAMETERS {
            let words = values(info);
            assert!(!words.is_empty());
            for Candidate { word, .. } in words {
                assert!(info.parse(&word).is_ok(), "{} {word}", info.name);
            }
        }
    }
}
