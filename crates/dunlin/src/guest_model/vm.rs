//! A machine that does what a bad VMM does.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use super::World;
use crate::guest::{GuestEnd, StartPermit};
use crate::machine::{Claim, Machine, MachineError, StateSection, SwitchoverCost};
use crate::memory::{DirtyTracker, Ram};
use crate::sync::control::{fail, note, random};
use crate::sync::simulated::point;
use crate::sync::{Condvar, Mutex, lock, sleep};

#[derive(Default)]
struct Wish {
    /// Under what the vCPU is to run.
    permit: Option<StartPermit>,
    runs: bool,
    /// Before it enters.
    late: Duration,
}

pub(super) struct Vm {
    host: usize,
    world: Weak<World>,
    ram: Ram,
    ill: AtomicBool,
    called: AtomicBool,
    wish: Mutex<Wish>,
    changed: Arc<Condvar>,
    running: AtomicBool,
    /// The guest has ended here, by itself.
    ended: AtomicBool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Well,
    Slow,
    Fails,
    Panics,
    Hangs,
}

/// Says that a method has ended, however it did.
struct Called<'a>(&'a AtomicBool);

impl Drop for Called<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

impl Vm {
    pub(super) fn new(world: &Arc<World>, host: usize) -> Arc<Self> {
        Arc::new(Self {
            host,
            world: Arc::downgrade(world),
            ram: Ram::new(Vec::new()).expect("no RAM"),
            ill: AtomicBool::new(false),
            called: AtomicBool::new(false),
            wish: Mutex::default(),
            changed: Arc::default(),
            running: AtomicBool::new(false),
            ended: AtomicBool::new(false),
        })
    }

    pub(super) fn well(&self) {
        self.ill.store(false, Ordering::Release);
    }

    pub(super) fn ill(&self) {
        self.ill.store(true, Ordering::Release);
    }

    /// A vCPU is in the guest.
    pub(super) fn runs(&self) -> bool {
        self.running.load(Ordering::Acquire)
    }

    /// One is, or will be without anybody being asked.
    pub(super) fn may_run(&self) -> bool {
        // A broken destination asks nobody.
        let broken = self.world.upgrade().is_some_and(|world| world.broken);
        self.runs() || lock(&self.wish).permit.as_ref().is_some_and(|permit| broken || permit.was_entered())
    }

    /// Whether the guest has ended here by itself.
    pub(super) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// The guest ends by itself, if it runs here; tells whether it has.
    pub(super) fn end(&self) -> bool {
        let mut wish = lock(&self.wish);
        if !wish.runs {
            return false;
        }
        note(|| format!("the guest ends on host {}", self.host));
        self.ended.store(true, Ordering::Release);
        self.changed.notify_all();
        while wish.runs {
            wish = self.changed.wait(wish).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        true
    }

    /// The vCPU's thread.
    pub(super) fn vcpu(&self) {
        let mut wish = lock(&self.wish);
        loop {
            let Some(permit) = wish.permit.clone().filter(|_| !self.has_ended()) else {
                wish = self.changed.wait(wish).unwrap_or_else(std::sync::PoisonError::into_inner);
                continue;
            };
            let late = std::mem::take(&mut wish.late);
            drop(wish);
            sleep(late);
            wish = lock(&self.wish);
            if wish.permit.is_none() || self.has_ended() {
                continue;
            }
            drop(wish);
            // From here to the mark no other thread runs.
            let entered = permit.enter();
            if entered {
                self.running.store(true, Ordering::Release);
                if let Some(world) = self.world.upgrade() {
                    world.enters(self.host);
                }
            }
            wish = lock(&self.wish);
            wish.runs = entered;
            while entered && wish.permit.is_some() && permit.is_valid() && !self.has_ended() {
                wish = self.changed.wait(wish).unwrap_or_else(std::sync::PoisonError::into_inner);
            }
            if entered {
                note(|| "the vCPU is out".to_owned());
            }
            self.running.store(false, Ordering::Release);
            wish.runs = false;
            if !permit.is_valid() && !crate::sync::seeded(crate::sync::Fault::PermitUnchecked) {
                wish.permit = None;
            }
            self.changed.notify_all();
        }
    }

    /// A method begins; how it goes.
    fn call(&self, name: &str) -> (Called<'_>, Way) {
        point();
        if self.called.swap(true, Ordering::AcqRel) {
            fail(format!("{name} of host {} is called while another method runs", self.host));
        }
        let called = Called(&self.called);
        let way = match self.ill.load(Ordering::Acquire) {
            false => Way::Well,
            true => random(|random| match random.below(16) {
                0..=8 => Way::Well,
                9..=11 => Way::Slow,
                12 | 13 => Way::Fails,
                14 => Way::Panics,
                _ => Way::Hangs,
            }),
        };
        note(|| format!("{name}: {way:?}"));
        match way {
            Way::Well => sleep(Duration::from_micros(random(|random| random.below(2000)))),
            Way::Slow => sleep(Duration::from_millis(random(|random| random.below(4000)))),
            Way::Hangs => sleep(Duration::from_secs(random(|random| random.below(50)))),
            Way::Fails | Way::Panics => {}
        }
        (called, way)
    }
}

fn go_wrong(way: Way) -> Result<(), MachineError> {
    match way {
        Way::Fails => Err("the model's machine fails".into()),
        // Without a word on the terminal.
        Way::Panics => std::panic::resume_unwind(Box::new("the model's machine panics".to_owned())),
        _ => Ok(()),
    }
}

impl Machine for Vm {
    fn ram(&self) -> &Ram {
        &self.ram
    }

    fn dirty_tracker(&self) -> Result<Box<dyn DirtyTracker>, MachineError> {
        Err("there is no RAM".into())
    }

    fn profile(&self) -> Vec<u8> {
        Vec::new()
    }

    fn accept_profile(&self, _: &[u8]) -> Result<(), MachineError> {
        Ok(())
    }

    fn switchover_cost(&self) -> SwitchoverCost {
        let none = Duration::ZERO;
        SwitchoverCost { pause: none, save: none, load: none, resume: none, state_bytes: 0 }
    }

    fn pause(&self) -> Result<(), MachineError> {
        let (_called, way) = self.call("pause");
        go_wrong(way)?;
        let mut wish = lock(&self.wish);
        wish.permit = None;
        self.changed.notify_all();
        while wish.runs {
            wish = self.changed.wait(wish).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        drop(wish);
        if way == Way::Slow {
            sleep(Duration::from_millis(random(|random| random.below(1500))));
        }
        Ok(())
    }

    fn ended(&self) -> Option<GuestEnd> {
        self.has_ended().then_some(GuestEnd::PoweredOff)
    }

    fn resume(&self, permit: &StartPermit) -> Result<(), MachineError> {
        let (_called, way) = self.call("resume");
        if way == Way::Fails || way == Way::Panics && random(|random| random.one_in(2)) {
            go_wrong(way)?;
        }
        let changed = self.changed.clone();
        permit.on_revoke(move || changed.notify_all());
        let mut wish = lock(&self.wish);
        if wish.permit.is_none() {
            wish.permit = Some(permit.clone());
            if random(|random| random.one_in(3)) {
                wish.late = Duration::from_micros(random(|random| random.below(1 << 20)));
            }
        }
        self.changed.notify_all();
        drop(wish);
        if way == Way::Slow {
            sleep(Duration::from_millis(random(|random| random.below(1500))));
        }
        go_wrong(way)
    }

    fn save(&self) -> Result<Vec<StateSection>, MachineError> {
        let (_called, way) = self.call("save");
        go_wrong(way).map(|()| Vec::new())
    }

    fn load(&self, _: Vec<StateSection>) -> Result<(), MachineError> {
        let (_called, way) = self.call("load");
        go_wrong(way)
    }

    fn claim(&self, claim: Claim) -> Result<(), MachineError> {
        let (_called, way) = self.call("claim");
        note(|| format!("claim {claim:?}"));
        match claim {
            Claim::Released | Claim::Nothing => Ok(()),
            _ => go_wrong(way),
        }
    }
}
