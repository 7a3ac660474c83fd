//! Types that several commands and events have.

use std::sync::LazyLock;

use dunlin::PARAMETERS;
use dunlin::parameters::{ParameterInfo, Unit};

use crate::not_yet;
use crate::schema::{Alternate, Enum, List, Member, Object, Type, Variants, optional, required};

pub(crate) const MIGRATION_STATUS: Type = Type::Enum(Enum {
    name: "MigrationStatus",
    values: List::These(&[
        "none",
        "setup",
        "cancelling",
        "cancelled",
        "active",
        "completed",
        "failed",
        "pre-switchover",
        "device",
    ]),
    not_yet: not_yet::STATUSES,
});

/// The table's rows, each with the type in which it is set.
pub(crate) static PARAMETERS_TO_SET: Object = Object {
    name: "MigrateSetParameters",
    members: List::Made(|| {
        static MEMBERS: LazyLock<Vec<Member>> =
            LazyLock::new(|| PARAMETERS.iter().map(|info| optional(info.name, to_set(info))).collect());
        &MEMBERS
    }),
    variants: None,
    not_yet: not_yet::PARAMETERS,
};

/// The table's rows that are no capabilities, each with the type in which it is read.
pub(crate) static PARAMETERS_READ: Object = Object {
    name: "MigrationParameters",
    members: List::Made(|| {
        static MEMBERS: LazyLock<Vec<Member>> = LazyLock::new(|| {
            let rows = PARAMETERS.iter().filter(|info| !info.is_capability());
            rows.map(|info| optional(info.name, to_read(info))).collect()
        });
        &MEMBERS
    }),
    variants: None,
    not_yet: &[],
};

/// A number in the parameter's unit, or text with a suffix: `"64M"`.
static QUANTITY: Alternate = Alternate { name: "Quantity", branches: &[Type::Int, Type::Str] };

fn to_set(info: &'static ParameterInfo) -> Type {
    match to_read(info) {
        Type::Int => Type::Alternate(&QUANTITY),
        other => other,
    }
}

fn to_read(info: &'static ParameterInfo) -> Type {
    match info.unit {
        Unit::Switch => Type::Bool,
        Unit::Choice(names) => Type::Enum(Enum::of(info.name, names)),
        Unit::BytesPerSecond | Unit::Bytes | Unit::Milliseconds | Unit::Percent | Unit::Count => Type::Int,
    }
}

pub(crate) static CAPABILITY_STATUS: Object = Object::of(
    "MigrationCapabilityStatus",
    &[
        required(
            "capability",
            Type::Enum(Enum {
                name: "MigrationCapability",
                values: List::Made(|| {
                    static NAMES: LazyLock<Vec<&'static str>> = LazyLock::new(|| {
                        PARAMETERS.iter().filter(|info| info.is_capability()).map(|info| info.name).collect()
                    });
                    &NAMES
                }),
                not_yet: not_yet::CAPABILITIES,
            }),
        ),
        required("state", Type::Bool),
    ],
);

/// Where a migration goes or comes from, in QEMU's structured form.
pub(crate) static CHANNEL: Object = Object::of(
    "MigrationChannel",
    &[
        required(
            "channel-type",
            Type::Enum(Enum {
                name: "MigrationChannelType",
                values: List::These(&["main"]),
                not_yet: not_yet::CHANNEL_TYPES,
            }),
        ),
        required("addr", Type::Object(&ADDRESS)),
    ],
);

static ADDRESS: Object = Object {
    name: "MigrationAddress",
    members: List::These(&[required(
        "transport",
        Type::Enum(Enum {
            name: "MigrationAddressType",
            values: List::These(&["socket", "exec"]),
            not_yet: not_yet::TRANSPORTS,
        }),
    )]),
    variants: Some(Variants { tag: "transport", cases: &[("socket", &SOCKET_ADDRESS), ("exec", &EXEC)] }),
    not_yet: &[],
};

static EXEC: Object = Object::of("MigrationExecCommand", &[required("args", Type::Array(&Type::Str))]);

pub(crate) static SOCKET_ADDRESS: Object = Object {
    name: "SocketAddress",
    members: List::These(&[required(
        "type",
        Type::Enum(Enum {
            name: "SocketAddressType",
            values: List::These(&["inet", "unix", "fd"]),
            not_yet: not_yet::SOCKETS,
        }),
    )]),
    variants: Some(Variants { tag: "type", cases: &[("inet", &INET), ("unix", &UNIX), ("fd", &FD)] }),
    not_yet: &[],
};

static INET: Object = Object {
    name: "InetSocketAddress",
    members: List::These(&[
        required("host", Type::Str),
        required("port", Type::Str),
        optional("ipv4", Type::Bool),
        optional("ipv6", Type::Bool),
    ]),
    variants: None,
    not_yet: not_yet::INET,
};
static UNIX: Object = Object::of("UnixSocketAddress", &[required("path", Type::Str)]);
static FD: Object = Object::of("FdSocketAddress", &[required("str", Type::Str)]);
