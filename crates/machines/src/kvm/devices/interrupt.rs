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

#[cfg(test)]
mod tests {
    use kvm_bindings::{KVM_IRQCHIP_PIC_MASTER, kvm_irqchip};
    use kvm_ioctls::Kvm;

    use super::*;

    /// The edge is kept by KVM until the guest takes it.
    #[test]
    fn an_edge_reaches_the_interrupt_controller() {
        let Ok(vm) = Kvm::new().and_then(|kvm| kvm.create_vm()) else {
            println!("skipped: no KVM");
            return;
        };
        vm.create_irq_chip().unwrap();
        let (vm, lines) = (Arc::new(vm), VmLines::default());
        lines.pulse(5);
        lines.connect(vm.clone());
        lines.pulse(6);
        let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_PIC_MASTER, ..kvm_irqchip::default() };
        vm.get_irqchip(&mut chip).unwrap();
        // SAFETY: the master PIC was asked for.
        let requested = unsafe { chip.chip.pic.irr };
        assert_eq!(requested & 0x60, 0x40, "{requested:#x}");
    }
}
