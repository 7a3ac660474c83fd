//! Dunlin moves running virtual machines from one process to another.
//!
//! A VMM implements [`Machine`] for its machines, puts each into a [`Guest`], and calls
//! [`Source::start`] on one side and [`Destination::listen`] on the other. Everything else happens on the engine's
//! own threads: dirty tracking, rounds, convergence, switchover, and a handover in which at no instant both sides may
//! run the guest. `examples/embed.rs` is a whole program.
//!
//! The engine knows no hypervisor, no monitor and no command line. It never prints, never exits, and has no globals:
//! two migrations in one process do not know of each other.

#![deny(unsafe_code)]

pub mod dirty_rate;
pub mod error;
pub mod handover;
pub mod machine;
#[allow(unsafe_code)]
pub mod memory;
pub mod parameters;
pub mod report;
pub mod units;

#[allow(unsafe_code)]
mod channel;
mod clock;
mod destination;
mod guest;
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod internals;
mod link;
mod page;
mod source;
mod sync;
mod throttle;
mod to_go;
mod wire;

pub use channel::{Uri, UriError};
pub use destination::Destination;
pub use dirty_rate::{DirtyRate, DirtyRateError, DirtyRateMode, DirtyRateRequest, DirtyRateStatus};
pub use error::{Cause, GuestError, GuestPlace, MigrationError, Side};
pub use guest::{Guest, GuestEnd, GuestEvent, Ownership, StartPermit, TakeBack};
pub use machine::{Claim, Machine, MachineError, Need, StateAge, StateSection, SwitchoverCost, Vcpus};
pub use parameters::{PARAMETERS, Parameters};
pub use report::{Report, Status};
pub use source::Source;
pub use throttle::VcpuThrottle;
