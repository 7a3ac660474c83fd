//! A thread's own alarms: timers of the kernel that send it a signal.

use std::io;
use std::time::{Duration, Instant};

/// A timer whose signal goes to the thread that made it. It costs nothing while it is not set.
#[derive(Debug)]
pub(super) struct Alarm {
    timer: libc::timer_t,
    /// When it goes off, or went off last.
    at: Option<Instant>,
}

impl Alarm {
    /// One by the clock.
    pub(super) fn for_this_thread(signal: libc::c_int) -> io::Result<Self> {
        Self::by(libc::CLOCK_MONOTONIC, signal)
    }

    fn by(clock: libc::clockid_t, signal: libc::c_int) -> io::Result<Self> {
        // SAFETY: all zeros are a valid `sigevent`.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = signal;
        // SAFETY: it takes nothing.
        event.sigev_notify_thread_id = unsafe { libc::gettid() };
        let mut timer: libc::timer_t = std::ptr::null_mut();
        // SAFETY: both live until the call returns.
        match unsafe { libc::timer_create(clock, &raw mut event, &raw mut timer) } {
            0 => Ok(Self { timer, at: None }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Has it go off at that time, and not at another that was set before. At once if that has passed.
    pub(super) fn set(&mut self, at: Instant) -> io::Result<()> {
        if self.at == Some(at) {
            return Ok(());
        }
        // Nothing at all would turn it off.
        let left = at.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
        self.arm(left, Duration::ZERO)?;
        self.at = Some(at);
        Ok(())
    }

    /// Has it go off after `first`, and then, unless that is zero, after each `period`.
    fn arm(&self, first: Duration, period: Duration) -> io::Result<()> {
        let setting = libc::itimerspec { it_interval: timespec(period), it_value: timespec(first) };
        // SAFETY: the timer is this one's, and the setting lives until the call returns.
        match unsafe { libc::timer_settime(self.timer, 0, &raw const setting, std::ptr::null_mut()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

fn timespec(duration: Duration) -> libc::timespec {
    libc::timespec {
        tv_sec: libc::time_t::try_from(duration.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: libc::c_long::from(duration.subsec_nanos().cast_signed()),
    }
}

/// A signal each time that this thread has used so much processor time, the guest's on it included, until it is dropped.
#[derive(Debug)]
pub(super) struct Metronome(#[allow(dead_code, reason = "it ends when it is dropped")] Alarm);

impl Metronome {
    pub(super) fn for_this_thread(signal: libc::c_int, period: Duration) -> io::Result<Self> {
        let alarm = Alarm::by(libc::CLOCK_THREAD_CPUTIME_ID, signal)?;
        alarm.arm(period, period)?;
        Ok(Self(alarm))
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        // SAFETY: the timer is this one's and is not used afterwards.
        unsafe { libc::timer_delete(self.timer) };
    }
}
