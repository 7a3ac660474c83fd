//! The serial port: a 16550 at the usual ports.
//!
//! What must stay true: it changes only by the guest's accesses and, while the machine runs, by input; so that its state
//! is settled once the machine is paused.

use std::convert::Infallible;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vm_superio::serial::{Error, NoEvents, SerialState};
use vm_superio::{Serial, Trigger};

use super::console::{self, Console, Output, Room, Sink};
use super::interrupt::Interrupt;
use crate::device_config::SerialTarget;

/// A port of a loop back to itself: it takes no input.
const LOOPBACK: u8 = 1 << 4;
/// Input that it holds for the guest.
const FIFO_BYTES: usize = 64;

/// Writes where the port's output goes.
#[derive(Debug, Clone)]
struct Out(Arc<Output>);

impl io::Write for Out {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        (&*self.0).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The port's interrupt line, which can be muted.
#[derive(Debug, Clone)]
struct Line {
    interrupt: Interrupt,
    muted: Arc<AtomicBool>,
}

impl Trigger for Line {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        if !self.muted.load(Ordering::Relaxed) {
            self.interrupt.raise();
        }
        Ok(())
    }
}

impl Line {
    fn new(interrupt: Interrupt) -> Self {
        Self { interrupt, muted: Arc::default() }
    }
}

type Uart = Serial<Line, NoEvents, Out>;

struct Inner {
    uart: Uart,
    /// Input is let in.
    running: bool,
}

/// What the thread for input and those for the guest share.
struct Shared(Mutex<Inner>);

/// The port's state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PortState {
    divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    /// Input that the guest has not taken.
    pub(super) input: Vec<u8>,
}

/// The port and its outside end.
pub(super) struct SerialPort {
    shared: Arc<Shared>,
    output: Arc<Output>,
    interrupt: Interrupt,
    /// Ends after the port is out of use.
    _console: Console,
}

impl fmt::Debug for SerialPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SerialPort").finish_non_exhaustive()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn room(&self) -> Room {
        let loops = self.uart.state().modem_control & LOOPBACK != 0;
        match (self.running, loops, self.uart.fifo_capacity()) {
            (false, ..) => Room::Closed,
            (true, true, _) | (true, _, 0) => Room::Full,
            _ => Room::Free,
        }
    }
}

impl Sink for Shared {
    fn take(&self, read: &mut dyn FnMut(&mut [u8]) -> io::Result<usize>) -> Option<io::Result<usize>> {
        let mut inner = self.lock();
        if inner.room() != Room::Free {
            return None;
        }
        let mut bytes = [0; FIFO_BYTES];
        let room = inner.uart.fifo_capacity().min(FIFO_BYTES);
        let result = read(bytes.get_mut(..room)?);
        if let Ok(count) = result
            && let Some(given @ [_, ..]) = bytes.get(..count)
        {
            // There is room for all of it, and raising an interrupt does not fail.
            let _ = inner.uart.enqueue_raw_bytes(given);
        }
        Some(result)
    }

    fn room(&self) -> Room {
        self.lock().room()
    }
}

impl SerialPort {
    /// A port out of reset.
    pub(super) fn new(target: &SerialTarget, interrupt: Interrupt) -> io::Result<Self> {
        let (output, outside) = console::open(target)?;
        let uart = Serial::new(Line::new(interrupt.clone()), Out(output.clone()));
        let shared = Arc::new(Shared(Mutex::new(Inner { uart, running: false })));
        let console = Console::start(output.clone(), outside, shared.clone())?;
        Ok(Self { shared, output, interrupt, _console: console })
    }

    /// Whether the guest has to wait before it puts out more.
    pub(super) fn is_full(&self) -> bool {
        self.output.is_full()
    }

    /// The guest reads a register.
    pub(super) fn read(&self, offset: u8) -> u8 {
        self.shared.lock().uart.read(offset)
    }

    /// The guest writes a register.
    pub(super) fn write(&self, offset: u8, value: u8) {
        // Neither taking output nor raising an interrupt fails; a full FIFO loses what comes, as the real one does.
        let _ = self.shared.lock().uart.write(offset, value);
    }

    /// Lets input in, or no more.
    pub(super) fn pause(&self) {
        self.shared.lock().running = false;
    }

    /// Lets input in.
    pub(super) fn resume(&self) {
        self.shared.lock().running = true;
        self.output.ring();
    }

    /// The paused port's state.
    pub(super) fn save(&self) -> PortState {
        let state = self.shared.lock().uart.state();
        PortState {
            divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            input: state.in_buffer,
        }
    }

    /// Takes over a state. An interrupt that is due is in the state of the interrupt controllers, and not raised again.
    ///
    /// # Errors
    /// When it has more input than there is room for.
    pub(super) fn load(&self, state: PortState) -> Result<(), String> {
        let [baud_divisor_low, baud_divisor_high] = state.divisor;
        let state = SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.input,
        };
        let out = Out(self.output.clone());
        let line = Line::new(self.interrupt.clone());
        line.muted.store(true, Ordering::Relaxed);
        let uart = Serial::from_state(&state, line.clone(), NoEvents, out);
        let uart = uart.map_err(|error: Error<Infallible>| error.to_string())?;
        line.muted.store(false, Ordering::Relaxed);
        self.shared.lock().uart = uart;
        Ok(())
    }
}
