//! A vCPU's first state: in 64-bit mode at the built-in guest's code, or as Linux' boot protocols want it.

use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;

use super::linux::{self, Entry};
use super::program::{CODE, GDT, IDT, PAGE_TABLES, Program, Progress, Slice};
use super::state;
use crate::kvm::{KvmError, kvm};

/// None, code and data.
pub(super) const GDT_ENTRIES: [u64; 3] = [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// Protected mode, extension type, numeric errors, paging.
const CR0: u64 = 1 | 1 << 4 | 1 << 5 | 1 << 31;
/// Physical address extension, and SSE.
const CR4: u64 = 1 << 5 | 1 << 9 | 1 << 10;
/// Long mode, enabled and active.
const EFER: u64 = 1 << 8 | 1 << 10;

/// An interrupt's way to its handler.
pub(super) fn gate(handler: u64) -> [u8; 16] {
    /// The code segment, present, no interrupts while it is handled.
    const KIND: u64 = 8 << 16 | 0x8e << 40;
    let low = handler & 0xffff | KIND | (handler >> 16 & 0xffff) << 48;
    (u128::from(low) | u128::from(handler >> 32) << 64).to_le_bytes()
}

fn segment(selector: u16, kind: u8, long: u8) -> kvm_segment {
    kvm_segment {
        limit: u32::MAX,
        selector,
        type_: kind,
        present: 1,
        db: 1 - long,
        s: 1,
        l: long,
        g: 1,
        ..kvm_segment::default()
    }
}

/// Sets a new vCPU's registers for Linux: the first starts at its entry, the others wait for it to start them.
pub(in crate::kvm) fn boot_linux(fd: &VcpuFd, vcpu: usize, entry: Entry) -> Result<(), KvmError> {
    state::write_back_memory(fd)?;
    if vcpu > 0 {
        return Ok(());
    }
    let mut sregs = fd.get_sregs().map_err(kvm("get a vCPU's system registers"))?;
    let data = segment(0x18, 3, 0);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    // A task state segment that is busy.
    sregs.tr = kvm_segment { limit: 0x67, type_: 0xb, present: 1, ..kvm_segment::default() };
    sregs.gdt.base = linux::GDT;
    sregs.gdt.limit = (size_of_val(&linux::GDT_ENTRIES) - 1) as u16;
    (sregs.idt.base, sregs.idt.limit) = (0, 0);
    let mut regs = kvm_regs { rflags: 2, ..kvm_regs::default() };
    match entry {
        Entry::Pvh { code, start } => {
            sregs.cs = segment(8, 0xb, 0);
            // Protected mode, and the bit that cannot be cleared.
            (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (1 | 1 << 4, 0, 0, 0);
            (regs.rip, regs.rbx) = (code, start);
        }
        Entry::Long { code, start } => {
            sregs.cs = segment(0x10, 0xb, 1);
            (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (CR0, linux::PAGE_TABLES, CR4, EFER);
            (regs.rip, regs.rsi) = (code, start);
        }
    }
    fd.set_sregs(&sregs).map_err(kvm("set a vCPU's system registers"))?;
    fd.set_regs(&regs).map_err(kvm("set a vCPU's registers"))
}

/// Sets a new vCPU's registers.
pub(in crate::kvm) fn boot(fd: &VcpuFd, vcpu: usize, program: &Program) -> Result<(), KvmError> {
    let mut sregs = fd.get_sregs().map_err(kvm("get a vCPU's system registers"))?;
    sregs.cs = segment(8, 0xb, 1);
    let data = segment(16, 3, 0);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.gdt.base = GDT;
    sregs.gdt.limit = (size_of_val(&GDT_ENTRIES) - 1) as u16;
    sregs.idt.base = IDT;
    sregs.idt.limit = 0xfff;
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (CR0, PAGE_TABLES, CR4, EFER);
    fd.set_sregs(&sregs).map_err(kvm("set a vCPU's system registers"))?;
    let slice = program.slices.get(vcpu);
    let regs = kvm_regs {
        rip: CODE,
        rflags: 2,
        rbx: slice.map_or(0, |slice| slice.start),
        rdi: slice.map_or(0, |slice| slice.start),
        rsi: slice.map_or(0, |slice| slice.end()),
        r10: slice.map_or(0, |slice| slice.stride),
        rcx: 1,
        r8: Program::board(vcpu),
        rsp: Program::stack_top(vcpu),
        ..kvm_regs::default()
    };
    fd.set_regs(&regs).map_err(kvm("set a vCPU's registers"))?;
    // The others would wait for the first to start them.
    let runnable = kvm_bindings::kvm_mp_state { mp_state: kvm_bindings::KVM_MP_STATE_RUNNABLE };
    fd.set_mp_state(runnable).map_err(kvm("make a vCPU runnable"))
}

/// What a stopped vCPU has done, if its registers are what they must be after that.
pub(in crate::kvm) fn progress(
    fd: &VcpuFd,
    vcpu: usize,
    program: &Program,
) -> Result<Result<Progress, String>, KvmError> {
    let regs = fd.get_regs().map_err(kvm("get a vCPU's registers"))?;
    let kvm_regs { r9: steps, r12: ticks, r11: intervals, r14: units, r15: requests, .. } = regs;
    // A timer has been set once more than it has ticked, but for when it is being set.
    let timed = match program.payload.timer {
        Some(_) => regs.r13.wrapping_sub(ticks) <= 1,
        None => regs.r13 == 0 && ticks == 0 && intervals == 0,
    };
    let right = timed && regs.r8 == Program::board(vcpu) && is_placed(&regs, steps, program.slices.get(vcpu));
    Ok(if right {
        Ok(Progress { steps, ticks, intervals, units, requests })
    } else {
        Err(format!("the registers of vCPU {vcpu} are not what they must be after {steps} steps: {regs:x?}"))
    })
}

/// Whether a vCPU is where it must be in its part of the working set.
fn is_placed(regs: &kvm_regs, steps: u64, slice: Option<&Slice>) -> bool {
    let Some(slice) = slice else { return true };
    let fixed = (regs.rdi, regs.rsi, regs.r10) == (slice.start, slice.end(), slice.stride);
    let visited = regs.rbx.wrapping_sub(slice.start) / slice.stride;
    let position = regs.rcx.wrapping_sub(1).wrapping_mul(slice.pages).wrapping_add(visited);
    // Behind by one between counting and going on, and by a whole round before the next begins.
    let behind = steps.wrapping_sub(position);
    fixed && regs.rbx <= slice.end() && (behind <= 1 || (behind == slice.pages && visited == 0))
}
