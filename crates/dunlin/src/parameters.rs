//! The one table of parameters.
//!
//! [`PARAMETERS`] says of each its name (QEMU's where QEMU has it), type, unit, default, range, side, whether it may
//! change under a running migration, what it conflicts with, and help. The typed struct [`Parameters`], setting and
//! reading by name, QMP, the command line and the listing are all made from it; a new row is all a new one takes.

use std::fmt;
use std::time::Duration;

use crate::units::{self, QuantityError};

/// What a parameter's number counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Bytes a second; 0 where the range allows it means unlimited.
    BytesPerSecond,
    /// Bytes.
    Bytes,
    /// Milliseconds.
    Milliseconds,
    /// Hundredths.
    Percent,
    /// A plain count.
    Count,
    /// Off or on.
    Switch,
    /// One of these, by its place.
    Choice(&'static [&'static str]),
}

impl Unit {
    /// Its name in listings.
    pub fn name(self) -> &'static str {
        match self {
            Self::BytesPerSecond => "bytes/s",
            Self::Bytes => "bytes",
            Self::Milliseconds => "ms",
            Self::Percent => "percent",
            Self::Count => "count",
            Self::Switch | Self::Choice(_) => "",
        }
    }
}

/// Which side reads a parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Applies {
    /// The source alone; the destination learns what it needs over the wire.
    Source,
    /// The destination alone.
    Destination,
    /// Each side for itself.
    Both,
}

impl fmt::Display for Applies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Source => "source",
            Self::Destination => "destination",
            Self::Both => "both",
        })
    }
}

/// Whether a parameter may change while a migration runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Changes {
    /// Takes effect at once.
    Live,
    /// A running migration keeps the value it started with.
    AtStart,
}

/// One row of the table.
#[derive(Debug, Clone, Copy)]
pub struct ParameterInfo {
    /// The name on the command line, in QMP and in listings.
    pub name: &'static str,
    /// What its number counts.
    pub unit: Unit,
    /// The default, in that unit.
    pub default: i64,
    /// The smallest allowed value.
    pub minimum: i64,
    /// The largest allowed value.
    pub maximum: i64,
    /// Which side reads it.
    pub applies: Applies,
    /// Whether it may change while a migration runs.
    pub changes: Changes,
    /// What it does.
    pub help: &'static str,
    get: fn(&Parameters) -> i64,
    set: fn(&mut Parameters, i64),
}

/// A parameter that was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParameterError {
    /// There is none of that name.
    #[error("there is no parameter {name:?}; `dunlin parameters` lists them")]
    Unknown {
        /// The name given.
        name: String,
    },
    /// The value is out of range.
    #[error("parameter {name}: {value} is out of range: {minimum} to {maximum} {unit}")]
    Range {
        /// The parameter.
        name: &'static str,
        /// The value given.
        value: String,
        /// The smallest allowed.
        minimum: i64,
        /// The largest allowed.
        maximum: i64,
        /// The unit of all three.
        unit: &'static str,
    },
    /// The text is not one of the choices.
    #[error("parameter {name}: {value:?} is not one of {choices}")]
    Choice {
        /// The parameter.
        name: &'static str,
        /// The text given.
        value: String,
        /// What it may be.
        choices: String,
    },
    /// The text is not a quantity.
    #[error("parameter {name}: {source}")]
    Text {
        /// The parameter.
        name: &'static str,
        /// What is wrong with it.
        source: QuantityError,
    },
    /// A migration is running and this parameter is not live.
    #[error("parameter {name} cannot change while a migration runs")]
    NotLive {
        /// The parameter.
        name: &'static str,
    },
    /// Two parameters do not go together.
    #[error("{first}={first_value} and {second}={second_value} do not go together: {why}")]
    Conflict {
        /// One party.
        first: &'static str,
        /// As it would be.
        first_value: String,
        /// The other.
        second: &'static str,
        /// As it would be.
        second_value: String,
        /// The reason.
        why: &'static str,
    },
}

/// Two parameters of which some values do not go together.
#[derive(Debug)]
pub struct Conflict {
    /// Their names.
    pub parties: [&'static str; 2],
    /// The reason, in a sentence.
    pub why: &'static str,
    clash: fn(&Parameters) -> bool,
}

/// Every rule on what does not go together. They are checked as a whole, on the values as they would be.
pub static CONFLICTS: &[Conflict] = &[Conflict {
    parties: ["cpu-throttle-initial", "max-cpu-throttle"],
    why: "a vCPU cannot be throttled by at least the one and at most the other",
    clash: |parameters| parameters.cpu_throttle_initial > parameters.max_cpu_throttle,
}];

/// How a field of the struct is made from the table's number and back.
trait Field {
    fn from_number(number: i64) -> Self;
    fn number(&self) -> i64;
}

impl Field for u64 {
    fn from_number(number: i64) -> Self {
        Self::try_from(number).unwrap_or(0)
    }
    fn number(&self) -> i64 {
        i64::try_from(*self).unwrap_or(i64::MAX)
    }
}

impl Field for u8 {
    fn from_number(number: i64) -> Self {
        Self::try_from(number).unwrap_or(Self::MAX)
    }
    fn number(&self) -> i64 {
        i64::from(*self)
    }
}

impl Field for i32 {
    fn from_number(number: i64) -> Self {
        Self::try_from(number).unwrap_or(0)
    }
    fn number(&self) -> i64 {
        i64::from(*self)
    }
}

impl Field for Switch {
    fn from_number(number: i64) -> Self {
        if number == 0 { Self::Off } else { Self::On }
    }
    fn number(&self) -> i64 {
        i64::from(*self == Self::On)
    }
}

impl Field for Duration {
    fn from_number(number: i64) -> Self {
        Self::from_millis(u64::from_number(number))
    }
    fn number(&self) -> i64 {
        i64::try_from(self.as_millis()).unwrap_or(i64::MAX)
    }
}

/// Off or on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Switch {
    /// Off.
    #[default]
    Off,
    /// On.
    On,
}

macro_rules! choice {
    ($(#[$meta:meta])* $name:ident, $names:ident: $($(#[$doc:meta])* $variant:ident = $text:literal),*) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name { $($(#[$doc])* $variant),* }

        const $names: &[&str] = &[$($text),*];

        impl Field for $name {
            fn from_number(number: i64) -> Self {
                let all = [$(Self::$variant),*];
                let [first, ..] = all;
                usize::try_from(number).ok().and_then(|place| all.get(place)).copied().unwrap_or(first)
            }
            fn number(&self) -> i64 {
                *self as i64
            }
        }
    };
}

choice! {
    /// What pages are compressed with.
    MultifdCompression, COMPRESSIONS:
    /// Nothing.
    None = "none",
    /// LZ4: quick.
    Lz4 = "lz4",
    /// Zstandard: shorter.
    Zstd = "zstd"
}

choice! {
    /// What RAM is checked with from end to end.
    Integrity, INTEGRITIES:
    /// Nothing.
    None = "none",
    /// A checksum of the pages as the guest wrote them.
    Checksum = "checksum"
}

/// A parameter's value, as a client sees it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[serde(untagged)]
pub enum Value {
    /// A number of the parameter's unit.
    Number(i64),
    /// Off or on.
    Switch(bool),
    /// One of several.
    Choice(&'static str),
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => number.fmt(f),
            Self::Switch(on) => f.write_str(if *on { "on" } else { "off" }),
            Self::Choice(name) => f.write_str(name),
        }
    }
}

macro_rules! parameters {
    ($($field:ident: $type:ty = $name:literal, $unit:expr, $default:literal, $range:expr, $applies:ident,
       $changes:ident, $help:literal;)*) => {
        /// The parameters of a migration. A migration takes a copy when it starts.
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub struct Parameters {
            $(#[doc = $help] pub $field: $type,)*
        }

        impl Default for Parameters {
            fn default() -> Self {
                Self { $($field: <$type as Field>::from_number($default),)* }
            }
        }

        /// Every parameter there is.
        pub static PARAMETERS: &[ParameterInfo] = &[$(ParameterInfo {
            name: $name,
            unit: $unit,
            default: $default,
            minimum: *$range.start(),
            maximum: *$range.end(),
            applies: Applies::$applies,
            changes: Changes::$changes,
            help: $help,
            get: |parameters| parameters.$field.number(),
            set: |parameters, number| parameters.$field = <$type as Field>::from_number(number),
        },)*];
    };
}

parameters! {
    max_bandwidth: u64 = "max-bandwidth", Unit::BytesPerSecond, 0, 0..=i64::MAX, Source, Live,
        "The most bytes a second that all channels together may carry; 0 is unlimited.";
    avail_switchover_bandwidth: u64 = "avail-switchover-bandwidth", Unit::BytesPerSecond, 0, 0..=i64::MAX, Source, Live,
        "What the link will carry while the guest is stopped: the downtime is predicted with it, and max-bandwidth does not hold it up then; 0 takes what is measured.";
    downtime_limit: Duration = "downtime-limit", Unit::Milliseconds, 300, 0..=2_000_000, Source, Live,
        "A ceiling: the guest is not stopped while its downtime is predicted to be longer.";
    multifd: Switch = "multifd", Unit::Switch, 1, 0..=1, Source, AtStart,
        "Whether pages travel on as many data channels as multifd-channels says; off: on one.";
    multifd_channels: u8 = "multifd-channels", Unit::Count, 2, 1..=255, Source, AtStart,
        "Data channels beside the control channel, on transports that have several connections.";
    multifd_compression: MultifdCompression = "multifd-compression", Unit::Choice(COMPRESSIONS), 0, 0..=2,
        Source, AtStart,
        "What pages are compressed with, where the link would take longer for the bytes saved than compressing takes. Trials that show it does not pay take at most 5 % of a channel's time.";
    multifd_zstd_level: i32 = "multifd-zstd-level", Unit::Count, 1, -131_072..=22, Source, AtStart,
        "The highest level of zstd that is used: the higher the shorter and slower; negative ones are the quickest. A lower level is used where the link is too fast for this one to pay.";
    xbzrle: Switch = "xbzrle", Unit::Switch, 0, 0..=1, Source, AtStart,
        "Whether pages sent again travel as what has changed in them.";
    xbzrle_cache_size: u64 = "xbzrle-cache-size", Unit::Bytes, 67_108_864, 32_768..=i64::MAX, Source, AtStart,
        "Memory for the versions last sent, that of all channels together.";
    integrity: Integrity = "integrity", Unit::Choice(INTEGRITIES), 1, 0..=1, Source, AtStart,
        "What RAM is checked with from end to end.";
    zero_copy_send: Switch = "zero-copy-send", Unit::Switch, 0, 0..=1, Source, AtStart,
        "Whether pages that are neither checked, compressed nor kept for deltas go from the guest's file to the socket.";
    auto_converge: Switch = "auto-converge", Unit::Switch, 0, 0..=1, Source, Live,
        "Whether vCPUs that dirty RAM faster than it can be sent are slowed down, by as much as it takes.";
    throttle_trigger_threshold: u8 = "throttle-trigger-threshold", Unit::Percent, 50, 1..=100, Source, Live,
        "auto-converge slows vCPUs down when more than this part of what a round sent is dirty again, and to this part.";
    cpu_throttle_initial: u8 = "cpu-throttle-initial", Unit::Percent, 1, 1..=99, Source, Live,
        "The least that auto-converge takes of a vCPU's time once it takes any.";
    cpu_throttle_increment: u8 = "cpu-throttle-increment", Unit::Percent, 99, 1..=99, Source, Live,
        "By how much of a vCPU's time auto-converge raises what it takes in one round, at most.";
    max_cpu_throttle: u8 = "max-cpu-throttle", Unit::Percent, 99, 1..=99, Source, Live,
        "The most that auto-converge takes of a vCPU's time.";
    pause_before_switchover: Switch = "pause-before-switchover", Unit::Switch, 0, 0..=1, Source, Live,
        "Whether a migration waits in pre-switchover, with the guest paused, until migrate-continue.";
    switchover_timeout: Duration = "switchover-timeout", Unit::Milliseconds, 0, 0..=3_600_000, Both, Live,
        "The longest the guest may be kept stopped for the switchover before it goes on at the source, and the longest it may take to start at the destination; 0 is downtime-limit and five seconds.";
    handover_timeout: Duration = "handover-timeout", Unit::Milliseconds, 30_000, 0..=86_400_000, Both, Live,
        "How long to reconnect after the link was lost with the guest released and not yet heard of.";
    link_timeout: Duration = "link-timeout", Unit::Milliseconds, 10_000, 500..=3_600_000, Both, AtStart,
        "A connection on which nothing arrives for this long is dead; for one second, while a migration keeps the guest stopped.";
    events: Switch = "events", Unit::Switch, 0, 0..=1, Both, Live,
        "Whether QMP's clients are sent MIGRATION and MIGRATION_PASS events.";
    return_path: Switch = "return-path", Unit::Switch, 1, 0..=1, Both, AtStart,
        "For QEMU's clients, which set it: the destination always answers, whatever this says.";
    late_block_activate: Switch = "late-block-activate", Unit::Switch, 1, 0..=1, Both, AtStart,
        "For QEMU's clients, which set it: the disks are always the guest's owner's alone, whatever this says.";
}

impl ParameterInfo {
    /// The row of that name.
    ///
    /// # Errors
    /// [`ParameterError::Unknown`].
    pub fn find(name: &str) -> Result<&'static Self, ParameterError> {
        PARAMETERS
            .iter()
            .find(|info| info.name == name)
            .ok_or_else(|| ParameterError::Unknown { name: name.to_owned() })
    }

    /// The name of its type.
    pub fn type_name(&self) -> &'static str {
        match self.unit {
            Unit::BytesPerSecond | Unit::Bytes => "size",
            Unit::Milliseconds => "duration",
            Unit::Count | Unit::Percent => "integer",
            Unit::Switch => "bool",
            Unit::Choice(_) => "enum",
        }
    }

    /// Whether QEMU's clients know it as a capability: the booleans are.
    pub fn is_capability(&self) -> bool {
        self.unit == Unit::Switch
    }

    /// `number` for people, with its unit; [`parse`](Self::parse) takes it back.
    pub fn text(&self, number: i64) -> String {
        let size = || {
            let size = units::exact_size(u64::try_from(number).unwrap_or(0));
            if size.ends_with(|last: char| last.is_ascii_digit()) { format!("{size}B") } else { size }
        };
        match self.unit {
            Unit::BytesPerSecond => format!("{}/s", size()),
            Unit::Bytes => size(),
            Unit::Milliseconds => format!("{number}ms"),
            Unit::Percent => format!("{number}%"),
            Unit::Count | Unit::Switch | Unit::Choice(_) => self.value(number).to_string(),
        }
    }

    /// The refusal of `value`, which is out of range.
    pub fn out_of_range(&self, value: impl ToString) -> ParameterError {
        ParameterError::Range {
            name: self.name,
            value: value.to_string(),
            minimum: self.minimum,
            maximum: self.maximum,
            unit: self.unit.name(),
        }
    }

    fn check(&self, number: i64) -> Result<(), ParameterError> {
        let fits = (self.minimum..=self.maximum).contains(&number);
        if fits { Ok(()) } else { Err(self.out_of_range(number)) }
    }

    /// The rules that this parameter is a party of.
    pub fn conflicts(&self) -> impl Iterator<Item = &'static Conflict> + use<'_> {
        CONFLICTS.iter().filter(|conflict| conflict.parties.contains(&self.name))
    }

    /// What `number` stands for.
    pub fn value(&self, number: i64) -> Value {
        match self.unit {
            Unit::Switch => Value::Switch(number != 0),
            Unit::Choice(names) => {
                let name = usize::try_from(number).ok().and_then(|place| names.get(place));
                name.map_or(Value::Number(number), |name| Value::Choice(name))
            }
            _ => Value::Number(number),
        }
    }

    /// What the parameter may be, for people.
    pub fn range(&self) -> String {
        match (self.unit, self.maximum) {
            (Unit::Switch, _) => "on, off".to_owned(),
            (Unit::Choice(names), _) => names.join(", "),
            (_, i64::MAX) => format!("{} or more", self.minimum),
            (_, maximum) => format!("{} to {maximum}", self.minimum),
        }
    }

    /// A number of the parameter's unit, from what a person wrote.
    ///
    /// # Errors
    /// [`ParameterError::Text`].
    pub fn parse(&'static self, text: &str) -> Result<i64, ParameterError> {
        let wanted = |expected| QuantityError { text: text.to_owned(), expected };
        let parsed = match self.unit {
            Unit::BytesPerSecond => match units::parse_rate(text) {
                Ok(rate) => return i64::try_from(rate).map_err(|_| self.out_of_range(rate)),
                Err(error) => Err(error),
            },
            Unit::Bytes => match units::parse_size(text) {
                Ok(bytes) => return i64::try_from(bytes).map_err(|_| self.out_of_range(bytes)),
                Err(error) => Err(error),
            },
            Unit::Milliseconds => match units::parse_duration(text, Duration::from_millis(1)) {
                Ok(duration) if duration.number() == 0 && !duration.is_zero() => {
                    Err(wanted("a millisecond or more, or 0"))
                }
                duration => duration.map(|duration| duration.number()),
            },
            Unit::Count => text.trim().parse().map_err(|_| wanted("a whole number")),
            Unit::Percent => {
                let number = text.trim().strip_suffix('%').unwrap_or(text).trim();
                number.parse().map_err(|_| wanted("a whole number of percent"))
            }
            Unit::Switch => match text.trim() {
                "on" | "true" => Ok(1),
                "off" | "false" => Ok(0),
                _ => Err(wanted("on or off")),
            },
            Unit::Choice(names) => {
                let place = names.iter().position(|name| *name == text.trim());
                let place = place.and_then(|place| i64::try_from(place).ok());
                return place.ok_or_else(|| ParameterError::Choice {
                    name: self.name,
                    value: text.to_owned(),
                    choices: names.join(", "),
                });
            }
        };
        parsed.map_err(|source| ParameterError::Text { name: self.name, source })
    }
}

impl Parameters {
    /// The value of `info`'s parameter, in its unit.
    pub fn get(&self, info: &ParameterInfo) -> i64 {
        (info.get)(self)
    }

    /// Sets a parameter by name to a number of its unit. Whether it goes with the others, [`check`](Self::check) tells.
    ///
    /// # Errors
    /// Unknown, or out of range.
    pub fn set(&mut self, name: &str, number: i64) -> Result<(), ParameterError> {
        let info = ParameterInfo::find(name)?;
        info.check(number)?;
        (info.set)(self, number);
        Ok(())
    }

    /// Sets a parameter by name to what a person wrote.
    ///
    /// # Errors
    /// Unknown, not a quantity, or out of range.
    pub fn set_text(&mut self, name: &str, text: &str) -> Result<(), ParameterError> {
        let number = ParameterInfo::find(name)?.parse(text)?;
        self.set(name, number)
    }

    /// Sets several parameters by name, to numbers of their units: all of them or, when one is refused, none.
    ///
    /// # Errors
    /// Unknown, out of range, or in conflict with another.
    pub fn set_all<'a>(&mut self, numbers: impl IntoIterator<Item = (&'a str, i64)>) -> Result<(), ParameterError> {
        let mut wanted = self.clone();
        for (name, number) in numbers {
            wanted.set(name, number)?;
        }
        wanted.check()?;
        *self = wanted;
        Ok(())
    }

    /// Checks that each value is in its range, and that all go together.
    ///
    /// # Errors
    /// [`ParameterError::Range`] or [`ParameterError::Conflict`].
    pub fn check(&self) -> Result<(), ParameterError> {
        for info in PARAMETERS {
            info.check(self.get(info))?;
        }
        let Some(conflict) = CONFLICTS.iter().find(|conflict| (conflict.clash)(self)) else { return Ok(()) };
        let [first, second] = conflict.parties.map(ParameterInfo::find);
        let (first, second) = (first?, second?);
        Err(ParameterError::Conflict {
            first: first.name,
            first_value: first.text(self.get(first)),
            second: second.name,
            second_value: second.text(self.get(second)),
            why: conflict.why,
        })
    }

    /// How long the guest may be kept stopped for the switchover.
    pub(crate) fn switchover_limit(&self) -> Duration {
        const OVER_DOWNTIME: Duration = Duration::from_secs(5);
        match self.switchover_timeout {
            Duration::ZERO => self.downtime_limit.saturating_add(OVER_DOWNTIME),
            limit => limit,
        }
    }

    /// Data channels on a transport that can have several connections.
    pub(crate) fn data_channels(&self) -> u8 {
        match self.multifd {
            Switch::On => self.multifd_channels,
            Switch::Off => 1,
        }
    }

    /// Takes over what `wanted` changes, if all of it may change while a migration runs.
    ///
    /// # Errors
    /// [`ParameterError::NotLive`], or what [`check`](Self::check) finds; nothing is changed then.
    pub fn change_live(&mut self, wanted: &Self) -> Result<(), ParameterError> {
        for info in PARAMETERS {
            if info.changes == Changes::AtStart && self.get(info) != wanted.get(info) {
                return Err(ParameterError::NotLive { name: info.name });
            }
        }
        wanted.check()?;
        self.clone_from(wanted);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_sound() {
        let mut names = std::collections::BTreeSet::new();
        for info in PARAMETERS {
            assert!(names.insert(info.name), "{} twice", info.name);
            assert!((info.minimum..=info.maximum).contains(&info.default), "{}", info.name);
            assert_eq!(Parameters::default().get(info), info.default, "{}", info.name);
            for edge in [info.minimum, info.maximum] {
                let mut parameters = Parameters::default();
                parameters.set(info.name, edge).unwrap();
                assert_eq!(parameters.get(info), edge, "{} at its edge", info.name);
            }
            for number in [info.minimum, info.default, info.maximum] {
                let text = info.text(number);
                assert_eq!(info.parse(&text), Ok(number), "{} as it is printed: {text}", info.name);
            }
        }
        for conflict in CONFLICTS {
            assert!(conflict.parties.iter().all(|name| ParameterInfo::find(name).is_ok()), "{conflict:?}");
        }
        assert_eq!(Parameters::default().check(), Ok(()));
    }

    #[test]
    fn what_was_put_into_the_struct_is_checked_too() {
        let none = Parameters { multifd_channels: 0, ..Default::default() };
        assert!(matches!(none.check(), Err(ParameterError::Range { name: "multifd-channels", .. })));
        assert!(
            Parameters::default().change_live(&Parameters { max_cpu_throttle: 100, ..Default::default() }).is_err()
        );
    }

    /// On the values as they would be, whatever the order, and all or nothing.
    #[test]
    fn conflicts_are_checked_as_a_whole() {
        let mut parameters = Parameters::default();
        let [initial, max] = ["cpu-throttle-initial", "max-cpu-throttle"];
        let error = parameters.set_all([("max-bandwidth", 7), (initial, 60), (max, 50)]).unwrap_err().to_string();
        assert!(error.starts_with("cpu-throttle-initial=60% and max-cpu-throttle=50% do not go together: "), "{error}");
        assert_eq!(parameters, Parameters::default());
        parameters.set_all([(initial, 60), (max, 70)]).unwrap();
        assert!(parameters.set_all([(max, 50)]).is_err());
        parameters.set_all([(max, 50), (initial, 40)]).unwrap();
        assert_eq!((parameters.cpu_throttle_initial, parameters.max_cpu_throttle), (40, 50));
    }

    #[test]
    fn refusals() {
        let mut parameters = Parameters::default();
        for (name, text, wanted) in [
            ("max-bandwidht", "1", "there is no parameter"),
            ("multifd-channels", "0", "1 to 255 count"),
            ("multifd-channels", "two", "not a whole number"),
            ("downtime-limit", "2000001", "0 to 2000000 ms"),
            ("max-bandwidth", "10parsecs", "not a rate"),
            ("max-bandwidth", "0.5", "not a rate"),
            ("max-bandwidth", "18446744073709551615", "18446744073709551615 is out of range"),
            ("downtime-limit", "0.9ms", "not a millisecond or more"),
            ("multifd-compression", "gzip", "not one of none, lz4, zstd"),
            ("xbzrle", "maybe", "on or off"),
            ("multifd-zstd-level", "23", "-131072 to 22"),
        ] {
            let error = parameters.set_text(name, text).unwrap_err().to_string();
            assert!(error.contains(wanted), "{error}");
        }
        assert_eq!(parameters, Parameters::default());
        parameters.set_text("downtime-limit", "1.5s").unwrap();
        assert_eq!(parameters.downtime_limit, Duration::from_millis(1500));
    }

    #[test]
    fn only_live_ones_change_under_way() {
        let mut running = Parameters::default();
        let mut wanted = running.clone();
        wanted.set_text("max-bandwidth", "5M/s").unwrap();
        running.change_live(&wanted).unwrap();
        wanted.multifd_channels = 7;
        assert!(running.change_live(&wanted).is_err());
        assert_eq!(running.multifd_channels, 2);
    }
}
