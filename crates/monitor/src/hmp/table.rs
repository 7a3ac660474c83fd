//! The table of commands and the one of what `info` shows: name, arguments, a line of help, and what it does. Dispatch,
//! help and completion are made from these rows.

use dunlin::parameters::ParameterInfo;

use super::error::HmpError;
use super::settings::Old;
use super::{dirty_rate, help, migration, settings, show, throttle};
use crate::not_yet;
use crate::vm::Vm;

/// A row: a command, or something that `info` shows.
pub(super) struct Command {
    pub(super) name: &'static str,
    pub(super) arguments: &'static [Argument],
    pub(super) help: &'static str,
    pub(super) does: Does,
}

/// What a row does.
pub(super) enum Does {
    /// Calls this.
    Run(fn(&Vm, &Given<'_>) -> Result<String, HmpError>),
    /// Looks its first word up in [`TOPICS`].
    Info,
    /// Sets a parameter as QEMU did before it had `migrate_set_parameter`, and says once what to use instead.
    Old(&'static Old),
    /// Says that it is not there yet, and why: for the reason that QMP's command of this name is not.
    NotYet(&'static str),
}

/// An argument of a command.
pub(super) struct Argument {
    /// As the usage line has it.
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    pub(super) presence: Presence,
}

/// What may stand in an argument's place.
pub(super) enum Kind {
    /// An address, a number or another text of no set of words.
    Text,
    /// The name of a command.
    Command,
    /// The name of something that `info` shows.
    Topic,
    /// The name of a row of the parameters' table that this is true of.
    Parameter(fn(&ParameterInfo) -> bool),
    /// A value of the parameter before it.
    Value,
    /// One of these.
    OneOf(&'static [&'static str]),
}

/// Whether an argument must be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Presence {
    Required,
    Optional,
    /// A flag such as `-d`, before all that are none.
    Flag,
    /// It and the ones from the first such on may come again and again; but this one may be left out.
    Again {
        optional: bool,
    },
}

/// The words that a command was given, checked against its row as far as that tells what is wrong.
pub(super) struct Given<'a> {
    pub(super) command: &'static Command,
    pub(super) flags: Vec<&'a str>,
    pub(super) words: Vec<&'a str>,
}

impl Given<'_> {
    /// The word in this place, if there is one.
    pub(super) fn word(&self, place: usize) -> Option<&str> {
        self.words.get(place).copied()
    }

    /// Whether a flag was given.
    pub(super) fn has(&self, flag: &str) -> bool {
        self.flags.contains(&flag)
    }
}

const fn required(name: &'static str, kind: Kind) -> Argument {
    Argument { name, kind, presence: Presence::Required }
}

const fn optional(name: &'static str, kind: Kind) -> Argument {
    Argument { name, kind, presence: Presence::Optional }
}

const fn flag(name: &'static str) -> Argument {
    Argument { name, kind: Kind::Text, presence: Presence::Flag }
}

const fn any(_: &ParameterInfo) -> bool {
    true
}

const ON_OFF: Kind = Kind::OneOf(&["on", "off"]);
const CAPABILITY: Kind = Kind::Parameter(ParameterInfo::is_capability);

/// Every command.
pub(super) static COMMANDS: &[Command] = &[
    Command {
        name: "help",
        arguments: &[optional("COMMAND", Kind::Command), optional("NAME", Kind::Topic)],
        help: "list the commands, or tell more of one",
        does: Does::Run(help::help),
    },
    Command {
        name: "info",
        arguments: &[optional("WHAT", Kind::Topic)],
        help: "show something; alone: list what there is to show",
        does: Does::Info,
    },
    Command {
        name: "migrate",
        arguments: &[flag("-d"), flag("-r"), optional("URI", Kind::Text)],
        help: "migrate to URI; -d: do not wait for the end; -r: ask again for a released guest",
        does: Does::Run(migration::migrate),
    },
    Command {
        name: "migrate_cancel",
        arguments: &[],
        help: "cancel the migration that is running",
        does: Does::Run(migration::cancel),
    },
    Command {
        name: "migrate_incoming",
        arguments: &[required("URI", Kind::Text)],
        help: "wait for a migration on URI",
        does: Does::Run(migration::incoming),
    },
    Command {
        name: "migrate_continue",
        arguments: &[required("STATE", Kind::OneOf(&["pre-switchover"]))],
        help: "have a migration go on that waits in STATE",
        does: Does::Run(migration::resume_switchover),
    },
    Command {
        name: "migrate_pause",
        arguments: &[],
        help: "pause a postcopy: there is none yet",
        does: Does::Run(migration::pause),
    },
    Command {
        name: "migrate_set_capability",
        arguments: &[
            Argument { name: "NAME", kind: CAPABILITY, presence: Presence::Again { optional: false } },
            Argument { name: "on|off", kind: ON_OFF, presence: Presence::Again { optional: true } },
        ],
        help: "switch capabilities, all together or none; a name alone means on",
        does: Does::Run(settings::set_capabilities),
    },
    Command {
        name: "migrate_set_parameter",
        arguments: &[
            Argument { name: "NAME", kind: Kind::Parameter(any), presence: Presence::Again { optional: false } },
            Argument { name: "VALUE", kind: Kind::Value, presence: Presence::Again { optional: false } },
        ],
        help: "set parameters, all together or none; a number alone is in the parameter's unit",
        does: Does::Run(settings::set_parameters),
    },
    Command {
        name: "migrate_set_speed",
        arguments: &[required("RATE", Kind::Text)],
        help: "old, for migrate_set_parameter max-bandwidth; a number alone is in MiB/s",
        does: Does::Old(&settings::SPEED),
    },
    Command {
        name: "migrate_set_downtime",
        arguments: &[required("TIME", Kind::Text)],
        help: "old, for migrate_set_parameter downtime-limit; a number alone is in seconds",
        does: Does::Old(&settings::DOWNTIME),
    },
    Command {
        name: "migrate_set_cache_size",
        arguments: &[required("SIZE", Kind::Text)],
        help: "old, for migrate_set_parameter xbzrle-cache-size; a number alone is in MiB",
        does: Does::Old(&settings::CACHE_SIZE),
    },
    Command { name: "stop", arguments: &[], help: "pause the guest", does: Does::Run(migration::stop) },
    Command {
        name: "cont",
        arguments: &[flag("-t"), flag("-f")],
        help: "start or restart the guest; -t: it is undecided where it is, and it is here; -f: at once, and on a changed disk image",
        does: Does::Run(migration::cont),
    },
    Command {
        name: "calc_dirty_rate",
        arguments: &[flag("-r"), flag("-b"), optional("SECONDS", Kind::Text), optional("PAGES", Kind::Text)],
        help: "measure how fast RAM is dirtied: by PAGES of each GiB, -b: all pages, -r: all of each vCPU",
        does: Does::Run(dirty_rate::calc),
    },
    Command {
        name: "set_vcpu_throttle",
        arguments: &[required("PERCENT", Kind::Text), optional("VCPU", Kind::Text)],
        help: "take this part of a vCPU's time, or of all vCPUs', until it is cancelled",
        does: Does::Run(throttle::set),
    },
    Command {
        name: "cancel_vcpu_throttle",
        arguments: &[optional("VCPU", Kind::Text)],
        help: "give a vCPU, or all, their whole time again",
        does: Does::Run(throttle::cancel),
    },
    Command { name: QUIT, arguments: &[], help: "end the machine's process", does: Does::Run(migration::quit) },
    not_yet("migrate_start_postcopy", "migrate-start-postcopy"),
    not_yet("migrate_recover", "migrate-recover"),
    not_yet("savevm", "snapshot-save"),
    not_yet("loadvm", "snapshot-load"),
    not_yet("delvm", "snapshot-delete"),
    not_yet("set_vcpu_dirty_limit", "set-vcpu-dirty-limit"),
    not_yet("cancel_vcpu_dirty_limit", "cancel-vcpu-dirty-limit"),
    not_yet("x_colo_lost_heartbeat", "x-colo-lost-heartbeat"),
    not_yet("announce_self", "announce-self"),
    not_yet("client_migrate_info", "client_migrate_info"),
    not_yet("nbd_server_start", "nbd-server-start"),
    not_yet("nbd_server_add", "nbd-server-add"),
    not_yet("nbd_server_remove", "nbd-server-remove"),
    not_yet("nbd_server_stop", "nbd-server-stop"),
    not_yet("drive_mirror", "drive-mirror"),
];

/// The command that ends the process.
pub(super) const QUIT: &str = "quit";

/// Everything that `info` shows.
pub(super) static TOPICS: &[Command] = &[
    Command {
        name: "migrate",
        arguments: &[],
        help: "the migration that began last: what is happening, and all its figures",
        does: Does::Run(show::migration),
    },
    Command {
        name: "migrate_capabilities",
        arguments: &[optional("NAME", CAPABILITY)],
        help: "which capabilities are on; of one, all there is to know",
        does: Does::Run(show::capabilities),
    },
    Command {
        name: "migrate_parameters",
        arguments: &[optional("NAME", Kind::Parameter(any))],
        help: "what the parameters are set to; of one, all there is to know",
        does: Does::Run(show::parameters),
    },
    Command {
        name: "migrate_cache_size",
        arguments: &[],
        help: "what xbzrle-cache-size is set to",
        does: Does::Run(show::cache_size),
    },
    Command { name: "status", arguments: &[], help: "what the guest does", does: Does::Run(show::status) },
    Command {
        name: "dirty_rate",
        arguments: &[],
        help: "what calc_dirty_rate measured",
        does: Does::Run(dirty_rate::show),
    },
    Command {
        name: "vcpu_throttle",
        arguments: &[],
        help: "how much of each vCPU's time is taken",
        does: Does::Run(throttle::show),
    },
    not_yet("vcpu_dirty_limit", "query-vcpu-dirty-limit"),
    not_yet("snapshots", "snapshot-save"),
];

/// A command of which QMP's of the name `qmp` is not there either.
const fn not_yet(name: &'static str, qmp: &'static str) -> Command {
    Command { name, arguments: &[], help: "", does: Does::NotYet(qmp) }
}

impl Command {
    /// Whether it does what it is called.
    pub(super) fn is_there(&self) -> bool {
        !matches!(self.does, Does::NotYet(_))
    }

    /// How it is used: name and arguments.
    pub(super) fn usage(&self) -> String {
        let mut words = vec![self.name.to_owned()];
        let again = |argument: &Argument| matches!(argument.presence, Presence::Again { .. });
        for argument in self.arguments {
            words.push(match argument.presence {
                Presence::Required | Presence::Again { optional: false } => argument.name.to_owned(),
                Presence::Optional | Presence::Flag | Presence::Again { optional: true } => {
                    format!("[{}]", argument.name)
                }
            });
        }
        if self.arguments.iter().any(again) {
            words.push("...".to_owned());
        }
        words.join(" ")
    }

    /// The argument that the word in this place, after the flags, is.
    pub(super) fn argument(&self, place: usize) -> Option<&Argument> {
        let mut plain = self.arguments.iter().filter(|argument| argument.presence != Presence::Flag);
        let found = plain.clone().nth(place);
        if found.is_some() {
            return found;
        }
        // What may come again comes in turns.
        let repeated = plain.clone().filter(|argument| matches!(argument.presence, Presence::Again { .. })).count();
        let first = plain.position(|argument| matches!(argument.presence, Presence::Again { .. }))?;
        let turn = place.checked_sub(first)?.checked_rem(repeated)?;
        self.arguments.iter().filter(|argument| matches!(argument.presence, Presence::Again { .. })).nth(turn)
    }

    /// Sorts the words behind the command's name into flags and arguments, and counts them.
    pub(super) fn take<'a>(&'static self, words: &[&'a str]) -> Result<Given<'a>, HmpError> {
        let usage = || self.usage();
        let known = |flag: &str| self.arguments.iter().any(|one| one.presence == Presence::Flag && one.name == flag);
        let takes_flags = self.arguments.iter().any(|one| one.presence == Presence::Flag);
        let is_flag = |word: &&&str| takes_flags && word.starts_with('-') && word.len() > 1;
        let count = words.iter().take_while(is_flag).count();
        let (flags, words) = words.split_at_checked(count).unwrap_or((words, &[]));
        if let Some(flag) = flags.iter().find(|flag| !known(flag)) {
            return Err(HmpError::UnknownFlag { flag: (*flag).to_owned(), usage: usage() });
        }
        if let Some((_, word)) = words.iter().enumerate().find(|(place, _)| self.argument(*place).is_none()) {
            return Err(HmpError::TooMuch { word: (*word).to_owned(), usage: usage() });
        }
        let wanted = |argument: &&Argument| {
            matches!(argument.presence, Presence::Required | Presence::Again { optional: false })
        };
        if let Some(missing) = self.arguments.iter().filter(wanted).nth(words.len()) {
            return Err(HmpError::Missing { missing: missing.name, usage: usage() });
        }
        Ok(Given { command: self, flags: flags.to_vec(), words: words.to_vec() })
    }
}

/// The name of a parameter.
pub(super) fn parameter(name: &str) -> Result<&'static ParameterInfo, HmpError> {
    let lists = [not_yet::PARAMETERS, not_yet::CAPABILITIES];
    let lacking = || lists.into_iter().flatten().find(|entry| entry.name == name);
    ParameterInfo::find(name).map_err(|unknown| match lacking() {
        Some(entry) => HmpError::NotYet { name: entry.name, why: entry.why },
        None => unknown.into(),
    })
}

/// Why QMP's command of that name is not there.
pub(super) fn why(qmp: &str) -> &'static str {
    let entry = not_yet::COMMANDS.iter().find(|entry| entry.name == qmp);
    entry.map_or("this version does not have it", |entry| entry.why)
}

/// The command of that name.
pub(super) fn command(name: &str) -> Result<&'static Command, HmpError> {
    let found = COMMANDS.iter().find(|command| command.name == name);
    found.ok_or_else(|| HmpError::UnknownCommand { name: name.to_owned() })
}

/// What `info` shows under that name.
pub(super) fn topic(name: &str) -> Result<&'static Command, HmpError> {
    let found = TOPICS.iter().find(|topic| topic.name == name);
    found.ok_or_else(|| HmpError::UnknownTopic { name: name.to_owned() })
}
