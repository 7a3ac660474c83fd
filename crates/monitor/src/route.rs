//! Which way a migration goes, as clients say it: QEMU's URIs and its structured form. Beside the engine's addresses
//! these can name a descriptor that came with `getfd`.

use std::net::IpAddr;
use std::str::FromStr;

use dunlin::{Uri, UriError};
use serde_json::Value;

use crate::commands::Arguments;
use crate::protocol::Refusal;

/// Where a migration goes to or comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Route {
    /// An address.
    Address(Uri),
    /// A descriptor that a client has sent, by the name that the client gave it.
    Named(String),
}

impl From<&Uri> for Route {
    fn from(uri: &Uri) -> Self {
        Self::Address(uri.clone())
    }
}

impl FromStr for Route {
    type Err = UriError;

    /// As [`Uri`], but for `fd:NAME`.
    fn from_str(text: &str) -> Result<Self, UriError> {
        match text.strip_prefix("fd:") {
            Some(name) if name.starts_with(|first: char| !first.is_ascii_digit() && first != '-') => {
                Ok(Self::Named(name.to_owned()))
            }
            _ => text.parse().map(Self::Address),
        }
    }
}

impl Route {
    /// The one that a command's `uri` or `channels` say; these are checked to be of their types.
    pub(crate) fn of_arguments(arguments: Arguments<'_>) -> Result<Self, Refusal> {
        let channels = arguments.list("channels");
        match (arguments.text("uri"), arguments.has("channels")) {
            (Some(uri), false) => uri.parse().map_err(Refusal::generic),
            (None, true) => match channels {
                [Value::Object(channel)] => {
                    Arguments(channel).object("addr").map_or_else(|| Err(no_main()), Self::of_address)
                }
                [] => Err(no_main()),
                _ => Err(Refusal::generic("Channel list must have only one entry, for type 'main'")),
            },
            _ => Err(Refusal::generic("need either 'uri' or 'channels' argument")),
        }
    }

    /// QEMU's `MigrationAddress`.
    fn of_address(address: Arguments<'_>) -> Result<Self, Refusal> {
        let text = |name| address.required(name);
        let uri = match (text("transport"), text("type")) {
            ("exec", _) => Uri::Exec(command(address.list("args"))?),
            (_, "inet") => Uri::Tcp { host: host(address)?, port: port(text("port"))? },
            (_, "unix") if text("path").is_empty() => {
                return Err(Refusal::generic("Parameter 'path' must not be empty"));
            }
            (_, "unix") => Uri::Unix(text("path").into()),
            _ => return format!("fd:{}", text("str")).parse().map_err(Refusal::generic),
        };
        Ok(Self::Address(uri))
    }
}

fn port(text: &str) -> Result<u16, Refusal> {
    text.parse().map_err(|_| Refusal::generic("Parameter 'port' expects a number from 0 to 65535, as text"))
}

/// The host, if it is of the families asked for: which is what QEMU's clients say of an address that it gave them.
fn host(address: Arguments<'_>) -> Result<String, Refusal> {
    let host = address.required("host");
    let may_be = |family: &str, other: &str| address.is_true(family) || !address.has(family) && !address.is_true(other);
    let (v4, v6) = (may_be("ipv4", "ipv6"), may_be("ipv6", "ipv4"));
    let fits = match host.parse() {
        Ok(IpAddr::V4(_)) => v4,
        Ok(IpAddr::V6(_)) => v6,
        Err(_) => v4 && v6,
    };
    let wrong =
        || Refusal::generic(format_args!("Parameter 'host' expects an address of the wanted family, not '{host}'"));
    if fits { Ok(host.to_owned()) } else { Err(wrong()) }
}

fn no_main() -> Refusal {
    Refusal::generic("Channel list has no main entry")
}

/// A program and its arguments, as the line for the shell that runs just these.
fn command(words: &[Value]) -> Result<String, Refusal> {
    match words.iter().filter_map(Value::as_str).collect::<Vec<_>>().as_slice() {
        [] => Err(Refusal::generic("Parameter 'args' must name a command")),
        // What QEMU's own `exec:` means.
        ["/bin/sh", "-c", line] => Ok((*line).to_owned()),
        words => {
            let quoted: Vec<String> = words.iter().map(|word| format!("'{}'", word.replace('\'', "'\\''"))).collect();
            Ok(format!("exec {}", quoted.join(" ")))
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn route(arguments: &Value) -> Result<Route, String> {
        Route::of_arguments(Arguments(arguments.as_object().unwrap())).map_err(|refusal| refusal.desc)
    }

    #[test]
    fn both_forms_of_every_transport() {
        let channel = |address: Value| json!({"channels": [{"channel-type": "main", "addr": address}]});
        for (arguments, wanted) in [
            (json!({"uri": "tcp:a:1"}), "tcp:a:1"),
            (channel(json!({"transport": "socket", "type": "inet", "host": "::1", "port": "1"})), "tcp:[::1]:1"),
            (
                channel(json!({"transport": "socket", "type": "inet", "host": "1.2.3.4", "port": "0", "ipv4": true})),
                "tcp:1.2.3.4:0",
            ),
            (channel(json!({"transport": "socket", "type": "unix", "path": "/a b"})), "unix:/a b"),
            (channel(json!({"transport": "socket", "type": "fd", "str": "7"})), "fd:7"),
            (channel(json!({"transport": "exec", "args": ["/bin/sh", "-c", "nc a 1"]})), "exec:nc a 1"),
            (channel(json!({"transport": "exec", "args": ["a b", "it's"]})), "exec:exec 'a b' 'it'\\''s'"),
        ] {
            assert_eq!(route(&arguments), Ok(Route::Address(wanted.parse().unwrap())), "{arguments}");
        }
        let named = Ok(Route::Named("out".to_owned()));
        assert_eq!(route(&json!({"uri": "fd:out"})), named);
        assert_eq!(route(&channel(json!({"transport": "socket", "type": "fd", "str": "out"}))), named);
        assert!(route(&json!({"uri": "fd:-1"})).is_err());
        assert!(route(&json!({"uri": "fd:"})).is_err());
        let one = json!({"channel-type": "main", "addr": {"transport": "exec", "args": ["x"]}});
        for (arguments, wanted) in [
            (json!({}), "need either 'uri' or 'channels' argument"),
            (json!({"uri": "tcp:a:1", "channels": []}), "need either 'uri' or 'channels' argument"),
            (json!({"channels": []}), "Channel list has no main entry"),
            (json!({"channels": [one, one]}), "Channel list must have only one entry, for type 'main'"),
            (
                channel(json!({"transport": "socket", "type": "inet", "host": "name", "port": "0", "ipv4": true})),
                "Parameter 'host' expects an address of the wanted family, not 'name'",
            ),
            (channel(json!({"transport": "exec", "args": []})), "Parameter 'args' must name a command"),
            (
                channel(json!({"transport": "socket", "type": "inet", "host": "a", "port": "x"})),
                "Parameter 'port' expects a number from 0 to 65535, as text",
            ),
        ] {
            assert_eq!(route(&arguments), Err(wanted.to_owned()), "{arguments}");
        }
    }
}
