//! Interrupt lines of devices.

use std::fmt::Debug;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_ioctls::VmFd;

/// Where interrupt lines lead.
pub(super) trait Lines: Debug + Send + Sync {
    /// Raises a line and lets go of it: an edge.
    fn pulse(&self, line: u32);
}

/// The lines of a VM's interrupt controllers. The VM may be made anew.
#[derive(Debug, Default)]
pub(super) struct VmLines(Mutex<Option<Arc<VmFd>>>);

impl VmLines {
    /// From now on lines lead to this VM.
    pub(super) fn connect(&self, vm: Arc<VmFd>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(vm);
    }
}

impl Lines for VmLines {
    fn pulse(&self, line: u32) {
        if let Some(vm) = &*self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            // KVM refuses only for a VM without interrupt controllers, and this one has them.
            let _ = vm.set_irq_line(line, true);
            let _ = vm.set_irq_line(line, false);
        }
    }
}

/// A device's interrupt line.
#[derive(Debug, Clone)]
pub(super) struct Interrupt {
    lines: Arc<dyn Lines>,
    line: u32,
}

impl Interrupt {
    pub(super) fn new(lines: Arc<dyn Lines>, line: u32) -> Self {
        Self { lines, line }
    }

    /// Raises it.
    pub(super) fn raise(&self) {
        self.lines.pulse(self.line);
    }
}

impl vm_superio::Trigger for Interrupt {
    type E = std::convert::Infallible;

    fn trigger(&self) -> Result<(), Self::E> {
        self.raise();
        Ok(())
    }
}
