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
    /// Milliseconds.
    Milliseconds,
    /// A plain count.
    Count,
}

impl Unit {
    /// Its name in listings.
    pub fn name(self) -> &'static str {
        match self {
            Self::BytesPerSecond => "bytes/s",
            Self::Milliseconds => "ms",
            Self::Count => "count",
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
    pub default: u64,
    /// The smallest allowed value.
    pub minimum: u64,
    /// The largest allowed value.
    pub maximum: u64,
    /// Which side reads it.
    pub applies: Applies,
    /// Whether it may change while a migration runs.
    pub changes: Changes,
    /// Names of parameters it cannot be combined with.
    pub conflicts: &'static [&'static str],
    /// What it does.
    pub help: &'static str,
    get: fn(&Parameters) -> u64,
    set: fn(&mut Parameters, u64),
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
        value: u64,
        /// The smallest allowed.
        minimum: u64,
        /// The largest allowed.
        maximum: u64,
        /// The unit of all three.
        unit: &'static str,
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
    fn from_number(number: u64) -> Self;
    fn number(&self) -> u64;
}

impl Field for u64 {
    fn from_number(number: u64) -> Self {
        number
    }
    fn number(&self) -> u64 {
        *self
    }
}

impl Field for u8 {
    fn from_number(number: u64) -> Self {
        u8::try_from(number).unwrap_or(u8::MAX)
    }
    fn number(&self) -> u64 {
        u64::from(*self)
    }
}

impl Field for Duration {
    fn from_number(number: u64) -> Self {
        Duration::from_millis(number)
    }
    fn number(&self) -> u64 {
        u64::try_from(self.as_millis()).unwrap_or(u64::MAX)
    }
}

macro_rules! parameters {
    ($($field:ident: $type:ty = $name:literal, $unit:ident, $default:literal, $range:expr, $applies:ident,
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
            unit: Unit::$unit,
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
    max_bandwidth: u64 = "max-bandwidth", BytesPerSecond, 0, 0..=u64::MAX, Source, Live, conflicts [],
        "The most bytes a second that all channels together may carry; 0 is unlimited.";
    downtime_limit: Duration = "downtime-limit", Milliseconds, 300, 0..=2_000_000, Source, Live, conflicts [],
        "A ceiling: the guest is not stopped while its downtime is predicted to be longer.";
    multifd_channels: u8 = "multifd-channels", Count, 2, 1..=255, Source, AtStart, conflicts [],
        "Data channels beside the control channel, on transports that have several connections.";
    handover_timeout: Duration = "handover-timeout", Milliseconds, 30_000, 0..=86_400_000, Both, Live, conflicts [],
        "How long to reconnect after the link was lost with the guest released and not yet heard of.";
    link_timeout: Duration = "link-timeout", Milliseconds, 10_000, 500..=3_600_000, Both, AtStart, conflicts [],
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
            Unit::BytesPerSecond => "size",
            Unit::Milliseconds => "duration",
            Unit::Count => "integer",
        }
    }

    /// A number of the parameter's unit, from what a person wrote.
    ///
    /// # Errors
    /// [`ParameterError::Text`].
    pub fn parse(&'static self, text: &str) -> Result<u64, ParameterError> {
        let parsed = match self.unit {
            Unit::BytesPerSecond => units::parse_rate(text),
            Unit::Milliseconds => units::parse_duration(text, Duration::from_millis(1))
                .map(|duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)),
            Unit::Count => {
                text.trim().parse().map_err(|_| QuantityError { text: text.to_owned(), expected: "a whole number" })
            }
        };
        parsed.map_err(|source| ParameterError::Text { name: self.name, source })
    }
}

impl Parameters {
    /// The value of `info`'s parameter, in its unit.
    pub fn get(&self, info: &ParameterInfo) -> u64 {
        (info.get)(self)
    }

    /// Sets a parameter by name to a number of its unit.
    ///
    /// # Errors
    /// Unknown, or out of range.
    pub fn set(&mut self, name: &str, number: u64) -> Result<(), ParameterError> {
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
