//! What can go wrong with a machine on KVM.

use std::io;

use dunlin::memory::{MemoryError, TrackerError};

use super::MAX_VCPUS;
use super::x86::cpu::CpuModel;
use super::x86::{BootError, LOW_BYTES};
use crate::sections::StateError;
use crate::synthetic::SyntheticError;

/// What can go wrong with a machine on KVM.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KvmError {
    /// There is no KVM, or not for this process.
    #[error("could not use /dev/kvm: {source}; this machine needs KVM, the synthetic one does not")]
    NoKvm {
        /// The system's answer.
        source: io::Error,
    },
    /// KVM refused.
    #[error("could not {doing}: {source}")]
    Kvm {
        /// What was being done.
        doing: &'static str,
        /// Its answer.
        source: io::Error,
    },
    /// KVM refused a model specific register.
    #[error("could not {doing} the model specific register {msr:#x} of a vCPU")]
    Msr {
        /// What was being done.
        doing: &'static str,
        /// Its number.
        msr: u32,
    },
    /// The vector registers of another host.
    #[error("the source's vector registers take {theirs} bytes, this host's {ours}")]
    Xsave {
        /// At the source.
        theirs: usize,
        /// Here.
        ours: usize,
    },
    /// CPU features that this host has not.
    #[error("the guest was given CPU features that this host does not have: {missing}")]
    Features {
        /// Which.
        missing: String,
    },
    /// CPU features of a model that this host has not.
    #[error("this host does not have all CPU features of the model {model}: {missing}; choose another")]
    CpuModel {
        /// The model.
        model: CpuModel,
        /// Which.
        missing: String,
    },
    /// Time stamp counters of another frequency.
    #[error(
        "the guest's time stamp counter has {theirs_khz} kHz, this host's {ours_khz} kHz, and this host cannot give a guest \
         another"
    )]
    TscFrequency {
        /// The guest's.
        theirs_khz: u32,
        /// This host's.
        ours_khz: u32,
    },
    /// Another vendor's CPU.
    #[error("the guest was given a CPU of {theirs}, this host's is one of {ours}")]
    CpuVendor {
        /// The guest's.
        theirs: String,
        /// This host's.
        ours: String,
    },
    /// The memory's size.
    #[error("{bytes} bytes of memory: it must be a multiple of its pages, at least 2 MiB and at most 64 GiB")]
    MemorySize {
        /// What was asked for.
        bytes: u64,
    },
    /// The number of vCPUs.
    #[error("{vcpus} vCPUs: it must be 1 to {MAX_VCPUS}")]
    Vcpus {
        /// What was asked for.
        vcpus: u32,
    },
    /// The region that a payload writes.
    #[error(
        "a working set of {bytes} bytes: it must be at least {least}, and at most {room}, what lies between {LOW_BYTES} \
         and the end of the memory or its hole"
    )]
    WorkingSet {
        /// What was asked for.
        bytes: u64,
        /// A page for each vCPU.
        least: u64,
        /// What there is.
        room: u64,
    },
    /// A payload without the disk that it works on.
    #[error("the payload io works on a disk of at least {least} bytes: give the machine one")]
    NoDisk {
        /// What it takes.
        least: u64,
    },
    /// The system refused memory or a thread.
    #[error("could not {doing}: {source}")]
    System {
        /// What was being done.
        doing: &'static str,
        /// Its answer.
        source: io::Error,
    },
    /// The guest's writes cannot be tracked as asked.
    #[error("{0}")]
    Tracker(#[from] TrackerError),
    /// RAM could not be used.
    #[error("{0}")]
    Memory(#[from] MemoryError),
    /// RAM could not be filled.
    #[error("{0}")]
    Fill(#[from] SyntheticError),
    /// A kernel could not be put into memory.
    #[error("{0}")]
    Boot(#[from] BootError),
    /// Nobody knows what this guest's memory must hold.
    #[error(
        "this guest cannot be verified: it is a kernel, and only of built-in guests is it known what memory must hold"
    )]
    NotVerifiable,
    /// There is nothing to run yet.
    #[error("the machine is empty: no state has been loaded into it")]
    Empty,
    /// A vCPU cannot go on.
    #[error("vCPU {vcpu} has stopped: {why}")]
    Stopped {
        /// Its number.
        vcpu: usize,
        /// Why.
        why: String,
    },
    /// vCPUs could not be stopped.
    #[error("{vcpus} vCPUs did not stop within {seconds} s: something on this host keeps them; all run on")]
    Kept {
        /// How many.
        vcpus: usize,
        /// How long they were waited for.
        seconds: u64,
    },
    /// Somebody else starts, stops or verifies the machine.
    #[error("the machine is being started, stopped or verified, and that has not ended within {seconds} s")]
    InUse {
        /// How long that was waited for.
        seconds: u64,
    },
    /// A device could not be used.
    #[error("could not {doing} {device}: {source}")]
    Device {
        /// Which.
        device: String,
        /// What was being done.
        doing: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// More devices than there are interrupt lines.
    #[error("{devices} devices: there is room for {room}")]
    TooManyDevices {
        /// What was asked for.
        devices: usize,
        /// What there is.
        room: usize,
    },
    /// The source has other devices.
    #[error("the source has these devices: {theirs}; this machine has: {ours}")]
    OtherDevices {
        /// At the source.
        theirs: String,
        /// Here.
        ours: String,
    },
    /// A device differs.
    #[error("{device}: its {property} is {theirs} at the source and {ours} here")]
    OtherDevice {
        /// Which.
        device: String,
        /// In what.
        property: String,
        /// At the source.
        theirs: String,
        /// Here.
        ours: String,
    },
    /// The state of another machine does not fit.
    #[error("device state: {0}")]
    State(#[from] StateError),
}

/// An error of KVM while `doing` something.
pub(super) fn kvm(doing: &'static str) -> impl Fn(kvm_ioctls::Error) -> KvmError {
    move |error| KvmError::Kvm { doing, source: error.into() }
}
