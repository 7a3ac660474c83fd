//! Whether what the source announces fits this machine. Checked as a whole before any RAM is sent.

use std::sync::Arc;
use std::time::Duration;

use crate::error::{Cause, GuestError, MachineStep};
use crate::guest::Guest;
use crate::link::CpuTime;
use crate::machine::Machine;
use crate::page;
use crate::units::format_size;
use crate::wire::{Start, UNCHECKED_PAGES};

/// How long the machine may take to look at the other one's description: it may have to be made anew.
pub(super) const LOOK_LIMIT: Duration = Duration::from_secs(30);

fn refuse<T>(reason: String) -> Result<T, Cause> {
    Err(Cause::Incompatible { reason })
}

/// Checks features, RAM layout and the machine's profile; gives the features that will be used.
pub(super) fn check(start: &Start, guest: &Guest, cpu: &Arc<CpuTime>) -> Result<Vec<String>, Cause> {
    let mut accepted = Vec::new();
    for feature in &start.features {
        if page::features().chain([UNCHECKED_PAGES]).any(|known| known == feature.name) {
            accepted.push(feature.name.clone());
        } else if feature.required {
            return refuse(format!("the source needs the feature {:?}, which this side does not have", feature.name));
        }
    }
    // First what the machine makes of it: another kind of machine has other RAM blocks, which is not the point.
    let profile = start.profile.clone();
    let look = move |machine: &dyn Machine| machine.accept_profile(&profile);
    match guest.calls().call(MachineStep::AcceptProfile, LOOK_LIMIT, cpu, look) {
        Ok(()) => {}
        Err(GuestError::Machine { source, .. }) => return refuse(source.to_string()),
        Err(error) => return Err(error.into()),
    }
    check_layout(start, &**guest.machine())?;
    Ok(accepted)
}

fn check_layout(start: &Start, machine: &dyn Machine) -> Result<(), Cause> {
    let here = machine.ram().blocks();
    if here.len() != start.blocks.len() {
        return refuse(format!("the source has {} RAM blocks, this machine {}", start.blocks.len(), here.len()));
    }
    for (theirs, ours) in start.blocks.iter().zip(here) {
        if theirs.name != ours.name() {
            return refuse(format!(
                "the source's RAM block {:?} stands where this machine has {:?}",
                theirs.name,
                ours.name()
            ));
        }
        if theirs.size_bytes != ours.size_bytes() {
            return refuse(format!(
                "RAM block {:?} has {} ({} bytes) at the source and {} ({} bytes) here; give both machines the same memory",
                theirs.name,
                format_size(theirs.size_bytes),
                theirs.size_bytes,
                format_size(ours.size_bytes()),
                ours.size_bytes()
            ));
        }
    }
    Ok(())
}
