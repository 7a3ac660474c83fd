//! How much each vCPU is slowed, and who asked for it.
//!
//! There are two demands on each vCPU: the operator's, which holds until it is cancelled, and that of a migration under
//! way (`auto-converge`). The machine gets the larger of the two. What must stay true: what the machine was told last is
//! what the demands say, so both are changed and told under one lock.

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use crate::error::GuestError;
use crate::link::lock;
use crate::machine::{Machine, Vcpus};

/// The most that a vCPU can be slowed, in percent: it must get on a little.
pub(crate) const MAX_PERCENT: u8 = 99;

/// How much a vCPU is slowed, in percent of its time: it runs for the rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct VcpuThrottle {
    /// Its number, from 0.
    pub vcpu: usize,
    /// What the operator asked for; 0 for nothing.
    pub operator_percent: u8,
    /// What the migration under way asks for; 0 for nothing.
    pub migration_percent: u8,
    /// What is in force: the larger of the two.
    pub effective_percent: u8,
}

/// Who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum By {
    Operator,
    Migration,
}

#[derive(Debug, Default)]
struct Demands {
    operator: Vec<u8>,
    migration: Vec<u8>,
}

impl Demands {
    fn of(&mut self, by: By) -> &mut Vec<u8> {
        match by {
            By::Operator => &mut self.operator,
            By::Migration => &mut self.migration,
        }
    }

    fn of_vcpu(&self, vcpu: usize) -> VcpuThrottle {
        let demand = |demands: &[u8]| demands.get(vcpu).copied().unwrap_or(0);
        let (operator_percent, migration_percent) = (demand(&self.operator), demand(&self.migration));
        VcpuThrottle {
            vcpu,
            operator_percent,
            migration_percent,
            effective_percent: operator_percent.max(migration_percent),
        }
    }
}

/// The throttle of a machine's vCPUs.
pub(crate) struct Throttle {
    machine: Arc<dyn Machine>,
    demands: Mutex<Demands>,
}

impl Throttle {
    pub(crate) fn new(machine: Arc<dyn Machine>) -> Self {
        Self { machine, demands: Mutex::default() }
    }

    /// Changes what one vCPU, or all, are slowed by for the operator.
    pub(crate) fn set_operator(&self, vcpu: Option<usize>, percent: u8) -> Result<(), GuestError> {
        let vcpus = self.machine.vcpus().ok_or(GuestError::CannotThrottle)?;
        let count = vcpus.count();
        if let Some(vcpu) = vcpu
            && vcpu >= count
        {
            return Err(GuestError::NoSuchVcpu { vcpu, count });
        }
        if percent > MAX_PERCENT {
            return Err(GuestError::ThrottlePercent { percent });
        }
        self.change(vcpus, By::Operator, |demands| {
            demands.resize(count, 0);
            let wanted = demands.iter_mut().enumerate().filter(|(number, _)| vcpu.is_none_or(|vcpu| vcpu == *number));
            wanted.for_each(|(_, demand)| *demand = percent);
        });
        Ok(())
    }

    /// Changes what the migration asks for: a percentage for each vCPU, and nothing for those left out.
    pub(crate) fn set_migration(&self, percent: &[u8]) {
        if let Some(vcpus) = self.machine.vcpus() {
            self.change(vcpus, By::Migration, |demands| *demands = percent.to_vec());
        }
    }

    fn change(&self, vcpus: &dyn Vcpus, by: By, change: impl FnOnce(&mut Vec<u8>)) {
        let mut demands = lock(&self.demands);
        let effective = |demands: &Demands| -> Vec<u8> {
            (0..vcpus.count()).map(|vcpu| demands.of_vcpu(vcpu).effective_percent.min(MAX_PERCENT)).collect()
        };
        let before = effective(&demands);
        change(demands.of(by));
        let now = effective(&demands);
        if now != before {
            vcpus.set_throttle(&now);
        }
    }

    /// What the migration asks for; empty for nothing.
    pub(crate) fn of_migration(&self) -> Vec<u8> {
        lock(&self.demands).migration.clone()
    }

    /// Every vCPU's; empty where they cannot be throttled.
    pub(crate) fn all(&self) -> Vec<VcpuThrottle> {
        let count = self.machine.vcpus().map_or(0, Vcpus::count);
        let demands = lock(&self.demands);
        (0..count).map(|vcpu| demands.of_vcpu(vcpu)).collect()
    }
}
