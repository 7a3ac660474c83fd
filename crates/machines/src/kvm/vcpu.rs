//! A thread for each vCPU, in KVM_RUN while the machine runs.
//!
//! Stopping: the gate is closed, and a signal makes every vCPU leave KVM_RUN. The signal's handler sets `immediate_exit` of
//! its own thread's vCPU, so that a signal that comes just before KVM_RUN is not lost. What must stay true: a thread looks at
//! the gate between clearing `immediate_exit` and KVM_RUN, and the gate is closed before the signal is sent.
//!
//! A throttled vCPU leaves KVM_RUN at the end of its slice by the same signal, which its thread's own alarm sends. So does
//! a vCPU with a dirty ring from time to time, to read the ring: nobody else is sure to come in time on a busy host.

use std::cell::Cell;
use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dunlin::StartPermit;
use kvm_bindings::KVM_EXIT_DIRTY_RING_FULL;
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::KvmError;
use super::alarm::{Alarm, Metronome};
use super::devices::{Bus, Ended};
use super::tracking::Rings;
use super::x86::PACE_PORT;
use crate::gate::{Gate, Passage, StillInside};
use crate::schedule::{Schedule, Throttle};

/// How long the vCPUs may take to stop. They take longer only where something keeps them, such as a file on storage that
/// hangs.
const STOP_LIMIT: Duration = Duration::from_secs(1);
/// The processor time after which a vCPU reads its dirty ring. The quickest guest seen, one that KVM emulates, takes more than
/// ten times as long to fill the largest.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// How long the end of a machine waits for them.
const END_LIMIT: Duration = Duration::from_millis(200);

/// A vCPU, shared by its thread and by who reads and writes its state while it is stopped.
#[derive(Debug)]
pub(super) struct Vcpu {
    number: usize,
    /// Where room is made when its ring is full.
    rings: Mutex<Rings>,
    /// `None` only while the machine is being made anew.
    fd: Mutex<Option<VcpuFd>>,
    /// Why it cannot run any more.
    stopped: Mutex<Option<String>>,
    /// Time between two steps.
    pace: Mutex<Option<Duration>>,
    throttle: Throttle,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Vcpu {
    /// The vCPU's descriptor. Waits for the vCPU to leave the gate.
    pub(super) fn fd(&self) -> MutexGuard<'_, Option<VcpuFd>> {
        lock(&self.fd)
    }

    /// Why it cannot run any more, if that is so.
    pub(super) fn stopped(&self) -> Option<String> {
        lock(&self.stopped).clone()
    }

    /// Takes another descriptor for this vCPU.
    pub(super) fn replace(&self, fd: Option<VcpuFd>, rings: &Rings) {
        *self.fd() = fd;
        *lock(&self.rings) = rings.clone();
        *lock(&self.stopped) = None;
    }

    pub(super) fn set_pace(&self, pace: Option<Duration>) {
        *lock(&self.pace) = pace;
    }

    /// Its dirty ring is full: no guest's fault, and nothing but reading it makes room.
    fn make_room(&self) -> Result<(), String> {
        let rings = lock(&self.rings).clone();
        let made = rings.ok_or_else(|| "its dirty ring is full, but it has none".to_owned())?.make_room(self.number);
        made.map_err(|error| error.to_string())
    }

    /// Runs the guest until the gate is closed.
    fn run(&self, gate: &Gate, bus: &Bus, alarm: &mut Alarm) {
        let mut fd = self.fd();
        let ended = match &mut *fd {
            Some(fd) => {
                // So that a guest which keeps time by KVM's clock does not take it for a hang that it stood still. KVM refuses
                // as long as a guest does not.
                let _ = fd.kvmclock_ctrl();
                let _kick = Kick::prepare(fd);
                self.run_guest(fd, gate, bus, alarm)
            }
            None => Err("it has not been made".to_owned()),
        };
        drop(fd);
        if let Err(why) = ended {
            *lock(&self.stopped) = Some(why);
            while gate.is_open() {
                gate.sleep(Instant::now() + Duration::from_secs(3600));
            }
        }
    }

    fn run_guest(&self, fd: &mut VcpuFd, gate: &Gate, bus: &Bus, alarm: &mut Alarm) -> Result<(), String> {
        let mut schedule = Schedule::new(gate, &self.throttle, *lock(&self.pace));
        let mut unfinished = false;
        let permit = gate.permit();
        let rings = lock(&self.rings).clone();
        let _metronome = match &rings {
            Some(_) => Some(
                Metronome::for_this_thread(signal(), LOOK_EVERY)
                    .map_err(|error| format!("the timer to read its dirty ring could not be set: {error}"))?,
            ),
            None => None,
        };
        loop {
            fd.set_kvm_immediate_exit(0);
            // Here too nothing is lost: an alarm that comes before KVM_RUN makes it return.
            if let Some(slice_end) = schedule.pass() {
                alarm.set(slice_end).map_err(|error| format!("the end of its time slice could not be set: {error}"))?;
            }
            if !gate.is_open() {
                if !unfinished {
                    return Ok(());
                }
                // An instruction that came out for the VMM is only finished by the next KVM_RUN, which must not go on to
                // others. It may come out once more, as one that reads and writes a device's register does.
                fd.set_kvm_immediate_exit(1);
            } else if bus.ended().is_some() || !permit.as_ref().is_some_and(StartPermit::enter) {
                gate.sleep(Instant::now() + Duration::from_secs(3600));
                continue;
            }
            let exit = fd.run();
            unfinished = exit.is_ok();
            match exit {
                Ok(VcpuExit::IoOut(port, _)) if port == u16::from(PACE_PORT) => schedule.step(),
                Ok(VcpuExit::IoOut(port, data)) => bus.write_port(port, data, gate),
                Ok(VcpuExit::IoIn(port, data)) => bus.read_port(port, data),
                Ok(VcpuExit::MmioRead(address, data)) => bus.read_memory(address, data),
                Ok(VcpuExit::MmioWrite(address, data)) => bus.write_memory(address, data),
                Ok(VcpuExit::Shutdown) => bus.end(Ended::Shutdown),
                Ok(VcpuExit::Hlt) => bus.end(Ended::Halted),
                Ok(VcpuExit::Intr) => rings.iter().for_each(|rings| rings.look()),
                Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => self.make_room()?,
                Ok(VcpuExit::FailEntry(reason, _)) => {
                    return Err(format!("KVM could not enter the guest: {reason:#x}"));
                }
                Ok(VcpuExit::InternalError) => return Err(internal_error(fd)),
                Ok(exit) => return Err(format!("the guest did what this machine does not know: {exit:?}")),
                Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => {
                    rings.iter().for_each(|rings| rings.look());
                }
                Err(e) => return Err(format!("KVM_RUN failed: {}", io::Error::from(e))),
            }
        }
    }
}

fn internal_error(fd: &mut VcpuFd) -> String {
    let rip = fd.get_regs().map_or(0, |regs| regs.rip);
    // SAFETY: the exit reason, which the caller has looked at, says which part of the union KVM has filled.
    let suberror = unsafe { fd.get_kvm_run().__bindgen_anon_1.internal.suberror };
    format!("KVM could not go on at {rip:#x} (internal error {suberror})")
}

thread_local! {
    /// Where the signal's handler finds `immediate_exit` of the vCPU that this thread runs.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(std::ptr::null_mut()) };
}

/// While it lives a signal makes this thread's vCPU leave KVM_RUN.
struct Kick;

impl Kick {
    fn prepare(fd: &mut VcpuFd) -> Self {
        IMMEDIATE_EXIT.set(&raw mut fd.get_kvm_run().immediate_exit);
        Self
    }
}

impl Drop for Kick {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(std::ptr::null_mut());
    }
}

pub(super) fn signal() -> libc::c_int {
    libc::SIGRTMIN().saturating_add(3)
}

extern "C" fn on_kick(_: libc::c_int) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: set by this thread to a byte of the vCPU's page that it holds, and set back before it lets go of it.
        unsafe { flag.write_volatile(1) };
    }
}

/// Has the process take the signal. Doing it again changes nothing.
fn install_handler() -> io::Result<()> {
    // SAFETY: all zeros are a valid `sigaction`, without flags: system calls are to be interrupted.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_kick as *const () as libc::sighandler_t;
    // SAFETY: the handler touches nothing but a thread-local cell and what that points to.
    match unsafe { libc::sigaction(signal(), &action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// All vCPUs of a machine and their threads, which end when this is dropped.
#[derive(Debug)]
pub(super) struct Vcpus {
    vcpus: Vec<Arc<Vcpu>>,
    threads: Arc<Mutex<Vec<JoinHandle<()>>>>,
    gate: Arc<Gate>,
}

impl Vcpus {
    /// Starts the threads; they wait at a gate.
    pub(super) fn start(count: u32, bus: &Arc<Bus>) -> io::Result<Self> {
        install_handler()?;
        let mut all = Self { vcpus: Vec::new(), threads: Arc::default(), gate: Arc::default() };
        for index in 0..count {
            let vcpu = Arc::new(Vcpu {
                number: index as usize,
                rings: Mutex::default(),
                fd: Mutex::default(),
                stopped: Mutex::default(),
                pace: Mutex::default(),
                throttle: Throttle::default(),
            });
            all.vcpus.push(vcpu.clone());
            let (gate, bus) = (all.gate.clone(), bus.clone());
            let (ready, made) = mpsc::channel();
            let thread = std::thread::Builder::new().name(format!("kvm vcpu {index}")).spawn(move || {
                let mut alarm = match Alarm::for_this_thread(signal()) {
                    Ok(alarm) => alarm,
                    Err(error) => {
                        let _ = ready.send(Err(error));
                        return;
                    }
                };
                let _ = ready.send(Ok(()));
                while gate.enter() == Passage::Run {
                    vcpu.run(&gate, &bus, &mut alarm);
                    gate.leave();
                }
            })?;
            lock(&all.threads).push(thread);
            made.recv().unwrap_or_else(|_| Err(io::Error::other("it has ended")))?;
        }
        Ok(all)
    }

    pub(super) fn all(&self) -> &[Arc<Vcpu>] {
        &self.vcpus
    }

    /// What they run under, or ran under last.
    pub(super) fn permit(&self) -> Option<StartPermit> {
        self.gate.permit()
    }

    /// Lets all run under `permit`.
    pub(super) fn resume(&self, permit: &StartPermit) {
        self.gate.open(permit);
        let (gate, threads) = (self.gate.clone(), Arc::downgrade(&self.threads));
        permit.on_revoke(move || {
            gate.shut();
            if let Some(threads) = threads.upgrade() {
                kick(&lock(&threads));
            }
        });
    }

    /// Stops all and waits until they have; tells whether they ran.
    ///
    /// # Errors
    /// When some do not stop in time, because something here keeps them. All run on then.
    pub(super) fn pause(&self) -> Result<bool, KvmError> {
        let paused = self.gate.close_within(STOP_LIMIT, || self.kick());
        paused.map_err(|StillInside(vcpus)| KvmError::Kept { vcpus, seconds: STOP_LIMIT.as_secs() })
    }

    /// Throttles each by its percentage.
    pub(super) fn set_throttle(&self, percent: &[u8]) {
        self.vcpus.iter().zip(percent).for_each(|(vcpu, percent)| vcpu.throttle.set(*percent));
        self.gate.nudge();
        self.kick();
    }

    /// Has those in the guest come out and look at what has changed.
    pub(super) fn interrupt(&self) {
        self.kick();
    }

    fn kick(&self) {
        kick(&lock(&self.threads));
    }
}

fn kick(threads: &[JoinHandle<()>]) {
    for thread in threads {
        // SAFETY: a thread that has not been joined can be sent a signal. One that has ended does not mind.
        unsafe { libc::pthread_kill(thread.as_pthread_t(), signal()) };
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.gate.end();
        self.kick();
        let mut threads = std::mem::take(&mut *lock(&self.threads));
        let deadline = Instant::now() + END_LIMIT;
        while threads.iter().any(|thread| !thread.is_finished()) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        // One that hangs is left behind. It holds what it uses.
        threads.retain(JoinHandle::is_finished);
        for thread in threads {
            let _ = thread.join();
        }
    }
}
