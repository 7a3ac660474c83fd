//! `auto-converge`: measures what the vCPUs dirty and slows them, after rounds after which the guest cannot be stopped yet.
//! What is done is `throttling`'s decision.

use std::time::Instant;

use super::Shared;
use super::convergence::{Verdict, encoded_part};
use super::migration::Migration;
use super::throttling::{self, FixedSteps, Sample, Settings, WINDOW};
use crate::error::Cause;
use crate::link::lock;
use crate::machine::Vcpus;
use crate::parameters::{Parameters, Switch};

/// How it is decided by how much vCPUs are slowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ThrottlePolicy {
    /// Each by what it dirties.
    ByNeed,
    /// All alike, step by step, as QEMU does.
    #[cfg_attr(not(feature = "internals"), expect(dead_code, reason = "the benches compare with it"))]
    FixedSteps,
}

/// What `auto-converge` remembers from round to round.
#[derive(Debug)]
pub(super) enum AutoConverge {
    ByNeed,
    FixedSteps(FixedSteps),
}

impl AutoConverge {
    pub(super) fn new(policy: ThrottlePolicy) -> Self {
        match policy {
            ThrottlePolicy::ByNeed => Self::ByNeed,
            ThrottlePolicy::FixedSteps => Self::FixedSteps(FixedSteps::default()),
        }
    }

    /// What can be done when a guest dirties too much, in half a sentence.
    pub(super) fn advice(&self, shared: &Shared) -> String {
        let raise = "raise max-bandwidth or downtime-limit";
        let throttled = shared.guest.throttled_for_migration();
        if lock(&shared.parameters).auto_converge == Switch::Off {
            return format!("{raise}, or turn on auto-converge");
        }
        if shared.guest.machine().vcpus().is_none() {
            return format!("{raise}; auto-converge can do nothing, because this machine's vCPUs cannot be throttled");
        }
        match (throttled.iter().min(), throttled.iter().max()) {
            (Some(least), Some(most)) if least == most => format!("{raise}; the vCPUs are throttled by {most} %"),
            (Some(_), Some(_)) => {
                let each: Vec<String> = throttled.iter().map(ToString::to_string).collect();
                format!("{raise}; the vCPUs are throttled by {} %", each.join(", "))
            }
            _ => raise.to_owned(),
        }
    }
}

/// Rounds in a row in which the switchover alone takes too long, after which the guest is let go.
const PERSISTENT: u32 = 3;

fn settings(parameters: &Parameters) -> Settings {
    Settings {
        threshold: parameters.throttle_trigger_threshold,
        initial: parameters.cpu_throttle_initial,
        increment: parameters.cpu_throttle_increment,
        max: parameters.max_cpu_throttle,
    }
}

impl Migration<'_> {
    /// After a round after which the guest cannot be stopped yet, or could be sooner: slows the vCPUs by what it takes.
    pub(super) fn throttle(&mut self, number: u32, verdict: &Verdict) -> Result<(), Cause> {
        let machine = self.shared.guest.machine().clone();
        let (switch, limit, max_bandwidth, settings) = {
            let parameters = lock(&self.shared.parameters);
            let Parameters { auto_converge, downtime_limit, max_bandwidth, .. } = *parameters;
            (auto_converge, downtime_limit, max_bandwidth, settings(&parameters))
        };
        let (Some(vcpus), Some(round)) = (machine.vcpus(), self.rounds.last().copied()) else { return Ok(()) };
        // The guest's writes are not what keeps a switchover that takes too long by itself.
        if switch == Switch::Off {
            self.set_throttle(&[]);
            return Ok(());
        }
        if verdict.fixed_too_long {
            self.too_long = self.too_long.saturating_add(1);
            // One that did so once may have been held up.
            if self.too_long >= PERSISTENT {
                self.set_throttle(&[]);
            }
            return Ok(());
        }
        self.too_long = 0;
        if verdict.predicted <= limit {
            return Ok(());
        }
        // How fast zeros are found in memory says nothing of the link, where it was not the limit that held them up.
        let limited = max_bandwidth > 0 && verdict.bandwidth > max_bandwidth / 2;
        if number == 1 && round.transferred_bytes < round.ram_bytes / 2 && !limited {
            return Ok(());
        }
        let part = encoded_part(&self.rounds);
        let mut now = self.shared.guest.throttled_for_migration();
        now.resize(vcpus.count(), 0);
        if let AutoConverge::FixedSteps(steps) = &mut self.auto_converge {
            let too_much = throttling::leaves_too_much(&round, part, settings.threshold);
            let percent = steps.after(too_much, now.first().copied().unwrap_or(0), &settings);
            self.set_throttle(&vec![percent; now.len()]);
            return Ok(());
        }
        let target = verdict.bandwidth as f64 / part.max(0.001) * f64::from(settings.threshold) / 100.0;
        let before = now.clone();
        for _ in 0..throttling::windows(&round, part, settings.threshold, &now) {
            let sample = self.measure(vcpus)?;
            let next = throttling::adjust(&now, &before, &sample, target, &settings);
            let raised = next.iter().zip(&now).any(|(next, now)| next > now);
            self.set_throttle(&next);
            now = next;
            // Whether it was enough is worth another look.
            if !raised {
                break;
            }
        }
        Ok(())
    }

    /// What becomes dirty in a moment, with the throttle as it is.
    fn measure(&mut self, vcpus: &dyn Vcpus) -> Result<Sample, Cause> {
        // Both take their time where there is much RAM: on the average a page is exposed from the middle of the one to that
        // of the other.
        let began = Instant::now();
        self.common.dirty.begin_window()?;
        let (began, before) = (began + began.elapsed() / 2, vcpus.dirtied());
        self.idle(WINDOW)?;
        let looked = Instant::now();
        let bytes = self.common.dirty.end_window()?;
        let (took, after) = ((looked + looked.elapsed() / 2).saturating_duration_since(began), vcpus.dirtied());
        let weights = before.zip(after).map(|(before, after)| {
            after.iter().zip(&before).map(|(after, before)| after.saturating_sub(*before)).collect()
        });
        let throttled = self.shared.guest.vcpu_throttle().iter().map(|vcpu| vcpu.effective_percent).collect();
        Ok(Sample { bytes_per_second: bytes as f64 / took.as_secs_f64().max(1e-9), weights, throttled })
    }

    fn set_throttle(&self, percent: &[u8]) {
        let percent = if percent.iter().any(|percent| *percent > 0) { percent } else { &[] };
        self.shared.guest.throttle_for_migration(percent);
        lock(&self.shared.report).set_throttle(percent.to_vec());
    }
}
