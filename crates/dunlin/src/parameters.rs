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
    /// Names of parameters it cannot be combined with.
    pub conflicts: &'static [&'static str],
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
        value: i64,
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
}

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
       $changes:ident, conflicts $conflicts:expr, $help:literal;)*) => {
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
            conflicts: &$conflicts,
            help: $help,
            get: |parameters| parameters.$field.number(),
            set: |parameters, number| parameters.$field = <$type as Field>::from_number(number),
        },)*];
    };
}

parameters! {
    max_bandwidth: u64 = "max-bandwidth", Unit::BytesPerSecond, 0, 0..=i64::MAX, Source, Live, conflicts [],
        "The most bytes a second that all channels together may carry; 0 is unlimited.";
    downtime_limit: Duration = "downtime-limit", Unit::Milliseconds, 300, 0..=2_000_000, Source, Live, conflicts [],
        "A ceiling: the guest is not stopped while its downtime is predicted to be longer.";
    multifd_channels: u8 = "multifd-channels", Unit::Count, 2, 1..=255, Source, AtStart, conflicts [],
        "Data channels beside the control channel, on transports that have several connections.";
    multifd_compression: MultifdCompression = "multifd-compression", Unit::Choice(COMPRESSIONS), 0, 0..=2,
        Source, AtStart, conflicts [],
        "What pages are compressed with, where that is quicker than sending them as they are.";
    multifd_zstd_level: i32 = "multifd-zstd-level", Unit::Count, 1, -131_072..=22, Source, AtStart, conflicts [],
        "Level of zstd: the higher the shorter and slower; negative ones are the quickest.";
    xbzrle: Switch = "xbzrle", Unit::Switch, 0, 0..=1, Source, AtStart, conflicts [],
        "Whether pages sent again travel as what has changed in them.";
    xbzrle_cache_size: u64 = "xbzrle-cache-size", Unit::Bytes, 67_108_864, 32_768..=i64::MAX, Source, AtStart,
        conflicts [],
        "Memory for the versions last sent, that of all channels together.";
    integrity: Integrity = "integrity", Unit::Choice(INTEGRITIES), 1, 0..=1, Source, AtStart, conflicts [],
        "What RAM is checked with from end to end.";
    zero_copy_send: Switch = "zero-copy-send", Unit::Switch, 0, 0..=1, Source, AtStart, conflicts [],
        "Whether pages that are neither checked, compressed nor kept for deltas go from the guest's file to the socket.";
    handover_timeout: Duration = "handover-timeout", Unit::Milliseconds, 30_000, 0..=86_400_000, Both, Live,
        conflicts [],
        "How long to reconnect after the link was lost with the guest released and not yet heard of.";
    link_timeout: Duration = "link-timeout", Unit::Milliseconds, 10_000, 500..=3_600_000, Both, AtStart, conflicts [],
        "A link on which nothing is heard for this long is taken for lost.";
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
            Unit::Count => "integer",
            Unit::Switch => "bool",
            Unit::Choice(_) => "enum",
        }
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
            Unit::BytesPerSecond => units::parse_rate(text).map(|rate| rate.number()),
            Unit::Bytes => units::parse_size(text).map(|bytes| bytes.number()),
            Unit::Milliseconds => {
                units::parse_duration(text, Duration::from_millis(1)).map(|duration| duration.number())
            }
            Unit::Count => text.trim().parse().map_err(|_| wanted("a whole number")),
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

    /// Sets a parameter by name to a number of its unit.
    ///
    /// # Errors
    /// Unknown, or out of range.
    pub fn set(&mut self, name: &str, number: i64) -> Result<(), ParameterError> {
        let info = ParameterInfo::find(name)?;
        if number < info.minimum || number > info.maximum {
            return Err(ParameterError::Range {
                name: info.name,
                value: number,
                minimum: info.minimum,
                maximum: info.maximum,
                unit: info.unit.name(),
            });
        }
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

    /// Takes over what `wanted` changes, if all of it may change while a migration runs.
    ///
    /// # Errors
    /// [`ParameterError::NotLive`]; nothing is changed then.
    pub fn change_live(&mut self, wanted: &Self) -> Result<(), ParameterError> {
        for info in PARAMETERS {
            if info.changes == Changes::AtStart && self.get(info) != wanted.get(info) {
                return Err(ParameterError::NotLive { name: info.name });
            }
        }
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
            for other in info.conflicts {
                assert!(ParameterInfo::find(other).is_ok(), "{} conflicts with nothing", info.name);
            }
            for edge in [info.minimum, info.maximum] {
                let mut parameters = Parameters::default();
                parameters.set(info.name, edge).unwrap();
                assert_eq!(parameters.get(info), edge, "{} at its edge", info.name);
            }
        }
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
