//! Machines for Dunlin to move.
//!
//! [`synthetic`] needs no hypervisor: its vCPUs are threads that write by a seeded, repeatable program, so that what
//! every page must hold can be computed after any migration. [`kvm`] is a small microVM on /dev/kvm, with guests of which
//! the same is true.

#![deny(unsafe_code)]

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
pub mod kvm;
pub mod synthetic;

mod device_config;
mod gate;
mod host_memory;
mod payload;
mod schedule;
mod sections;
mod tracking;

pub use device_config::{DeviceConfig, DiskAccess, DiskConfig, DiskFormat, NetConfig, SerialTarget};
pub use host_memory::{Available, HostMemory, HostMemoryError, Limit, Limiter};
#[cfg(target_arch = "x86_64")]
pub use kvm::{
    BootError, ClockDifference, CpuModel, CpuModelError, Ended, Kernel, KvmConfig, KvmError, KvmGuest, KvmMachine,
    KvmReport,
};
pub use payload::{MemoryJob, Payload, PayloadError};
pub use synthetic::{Backing, Fault, Fill, SyntheticConfig, SyntheticError, SyntheticMachine, VerifyReport, Workload};
pub use tracking::{DirtyTracking, DirtyTrackingError};
