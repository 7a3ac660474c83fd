//! Machines for Dunlin to move.
//!
//! [`synthetic`] needs no hypervisor: its vCPUs are threads that write by a seeded, repeatable program, so that what
//! every page must hold can be computed after any migration.

#![forbid(unsafe_code)]

pub mod synthetic;

pub use synthetic::{Backing, Fault, Fill, SyntheticConfig, SyntheticError, SyntheticMachine, VerifyReport, Workload};
