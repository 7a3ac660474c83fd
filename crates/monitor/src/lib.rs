//! QMP for machines that Dunlin moves.
//!
//! A [`Vm`] holds one machine and its migrations; its methods are what people and programs ask of it. A [`Server`]
//! offers them to any number of clients on a Unix socket or a TCP port, in QEMU's protocol and words, so that QEMU's
//! tools work. A [`Client`] is the other end of that socket.
//!
//! The way of a command: `input` (bytes and descriptors from the socket) → `framing` (bytes to one JSON text) → `json`,
//! `protocol` (the text to a request) → `session` (its turn) → `commands` (the table of commands, their arguments checked
//! by `schema`) → `vm` → `migration_info` (the engine's figures in QEMU's units) → `outbox` (what waits to be written).
//! `events` puts what happens to the guest into every client's outbox.

#![forbid(unsafe_code)]

mod address;
mod client;
mod commands;
mod descriptors;
mod events;
mod framing;
pub mod hmp;
mod input;
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod internals;
mod json;
pub mod metrics;
mod migration_info;
mod not_yet;
mod outbox;
mod parameter_info;
mod protocol;
mod reference;
mod route;
mod schema;
mod server;
mod session;
pub mod text;
mod types;
mod vm;

pub use address::{Address, AddressError, parse_address};
pub use client::{Client, ClientError};
pub use descriptors::DescriptorError;
pub use events::ShutdownCause;
pub use migration_info::uri_of_socket_address;
pub use parameter_info::parameter_info;
pub use reference::reference;
pub use route::Route;
pub use server::{Server, ServerError};
pub use vm::{RunState, Verification, Verify, Vm, VmError};
