//! QMP for machines that Dunlin moves.
//!
//! A [`Vm`] holds one machine and its migrations; its methods are what people and programs ask of it. A [`Server`]
//! offers them to any number of clients on a Unix socket, in QEMU's protocol and words, so that QEMU's tools work.
//! A [`Client`] is the other end of that socket.
//!
//! The way of a command: `framing` (bytes to one JSON text) → `protocol` (the text to a request) → `commands` (the
//! table of commands, their arguments checked) → `vm` → `migration_info` (the engine's figures in QEMU's units).

#![forbid(unsafe_code)]

mod address;
mod client;
mod commands;
mod framing;
mod migration_info;
mod protocol;
mod server;
mod session;
pub mod text;
mod vm;

pub use address::{AddressError, parse_address};
pub use client::{Client, ClientError};
pub use migration_info::uri_of_socket_address;
pub use server::{Server, ServerError};
pub use vm::{RunState, Verification, Verify, Vm, VmError};
