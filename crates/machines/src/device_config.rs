//! What devices a microVM has, and how people write that down.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// The devices of a machine. Both sides of a migration have the same, but for where the serial port and network cards lead.
#[derive(Debug, Clone, Default)]
pub struct DeviceConfig {
    /// Where the serial port leads.
    pub serial: SerialTarget,
    /// Disks.
    pub disks: Vec<DiskConfig>,
    /// Network cards.
    pub nets: Vec<NetConfig>,
    /// Sources of random numbers.
    pub rngs: u32,
}

/// Where the serial port leads.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum SerialTarget {
    /// Nowhere.
    #[default]
    Null,
    /// This process's standard input and output.
    Stdio,
    /// To the end of a file.
    File(PathBuf),
    /// To whoever connects to this socket, one at a time.
    Unix(PathBuf),
}

impl fmt::Display for SerialTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Null => f.write_str("null"),
            Self::Stdio => f.write_str("stdio"),
            Self::File(path) => write!(f, "file:{}", path.display()),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl FromStr for SerialTarget {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.split_once(':')) {
            ("null", _) => Ok(Self::Null),
            ("stdio", _) => Ok(Self::Stdio),
            (_, Some(("file", path))) if !path.is_empty() => Ok(Self::File(path.into())),
            (_, Some(("unix", path))) if !path.is_empty() => Ok(Self::Unix(path.into())),
            _ => Err(format!("{text:?}: stdio, file:PATH, unix:PATH or null")),
        }
    }
}

/// What a disk image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DiskFormat {
    /// The file is the disk.
    #[default]
    Raw,
    /// QEMU's, without a backing file.
    Qcow2,
}

impl fmt::Display for DiskFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        })
    }
}

/// Whether a guest can write a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DiskAccess {
    /// It can.
    #[default]
    Writable,
    /// It cannot.
    ReadOnly,
}

impl fmt::Display for DiskAccess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Writable => "writable",
            Self::ReadOnly => "read-only",
        })
    }
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskConfig {
    /// The image.
    pub path: PathBuf,
    /// What it is.
    pub format: DiskFormat,
    /// Whether the guest can write it.
    pub access: DiskAccess,
    /// What the guest knows it by, at most 20 bytes.
    pub serial: String,
}

/// Bytes in a disk's serial number.
pub(crate) const SERIAL_BYTES: usize = 20;

impl FromStr for DiskConfig {
    type Err = String;

    /// `PATH[,format=raw|qcow2][,readonly=on|off][,serial=TEXT]`
    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(',');
        let path = parts.next().filter(|path| !path.is_empty()).ok_or("it begins with the image's path")?;
        let (path, access, serial) = (PathBuf::from(path), DiskAccess::Writable, String::new());
        let mut disk = Self { path, format: DiskFormat::Raw, access, serial };
        for part in parts {
            match part.split_once('=') {
                Some(("format", "raw")) => disk.format = DiskFormat::Raw,
                Some(("format", "qcow2")) => disk.format = DiskFormat::Qcow2,
                Some(("readonly", "on")) => disk.access = DiskAccess::ReadOnly,
                Some(("readonly", "off")) => disk.access = DiskAccess::Writable,
                Some(("serial", serial)) if serial.len() <= SERIAL_BYTES => disk.serial = serial.to_owned(),
                Some(("serial", _)) => return Err(format!("a disk's serial is at most {SERIAL_BYTES} bytes")),
                _ => return Err(format!("{part:?}: format=raw|qcow2, readonly=on|off or serial=TEXT")),
            }
        }
        Ok(disk)
    }
}

/// A network card.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetConfig {
    /// The host's tap device.
    pub tap: String,
    /// The card's address.
    pub mac: [u8; 6],
}

/// A locally administered address.
const USUAL_MAC: [u8; 6] = [0x52, 0x64, 0x6c, 0x6e, 0x00, 0x01];

/// A tap device's name is shorter than that.
const TAP_NAME_BYTES: usize = 16;

/// A card's address as people write it.
pub(crate) fn format_mac(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let bytes: Option<Vec<u8>> = text
        .split(':')
        .map(|part| u8::from_str_radix(part, 16).ok().filter(|_| part.len() == 2 && !part.starts_with('+')))
        .collect();
    // The first bit says that it is a group's address.
    <[u8; 6]>::try_from(bytes?).ok().filter(|[first, ..]| first & 1 == 0)
}

impl FromStr for NetConfig {
    type Err = String;

    /// `tap=NAME[,mac=XX:XX:XX:XX:XX:XX]`
    fn from_str(text: &str) -> Result<Self, String> {
        let mut net = Self { tap: String::new(), mac: USUAL_MAC };
        for part in text.split(',') {
            match part.split_once('=') {
                Some(("tap", name)) if (1..TAP_NAME_BYTES).contains(&name.len()) => net.tap = name.to_owned(),
                Some(("tap", name)) => {
                    return Err(format!("{name:?}: a tap device's name is 1 to {} bytes", TAP_NAME_BYTES - 1));
                }
                Some(("mac", mac)) => {
                    let wanted = "six pairs of hexadecimal digits, the first of them even, as in 52:64:6c:6e:00:01";
                    net.mac = parse_mac(mac).ok_or_else(|| format!("{mac:?}: an address is {wanted}"))?;
                }
                _ => return Err(format!("{part:?}: tap=NAME or mac=ADDRESS")),
            }
        }
        if net.tap.is_empty() { Err("tap=NAME is missing".to_owned()) } else { Ok(net) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_people_write() {
        let disk: DiskConfig = "/a b,format=qcow2,readonly=on,serial=x".parse().unwrap();
        assert_eq!((disk.format, disk.access, disk.serial.as_str()), (DiskFormat::Qcow2, DiskAccess::ReadOnly, "x"));
        assert_eq!("/a".parse::<DiskConfig>().unwrap().format, DiskFormat::Raw);
        assert!("".parse::<DiskConfig>().is_err());
        assert!("/a,serial=123456789012345678901".parse::<DiskConfig>().is_err());
        for text in ["null", "stdio", "file:/a", "unix:/b"] {
            assert_eq!(text.parse::<SerialTarget>().unwrap().to_string(), text);
        }
        assert!("file:".parse::<SerialTarget>().is_err());
        let net: NetConfig = "tap=t0,mac=02:00:00:00:00:0f".parse().unwrap();
        assert_eq!((net.tap.as_str(), format_mac(net.mac).as_str()), ("t0", "02:00:00:00:00:0f"));
        for wrong in
            ["mac=02:00:00:00:00:0f", "tap=", "tap=t,mac=01:00:00:00:00:00", "tap=t,mac=02:00", "tap=0123456789abcdef"]
        {
            assert!(wrong.parse::<NetConfig>().is_err(), "{wrong}");
        }
    }
}
