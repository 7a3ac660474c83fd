//! Device state: what travels besides RAM, and what two machines must agree on.
//!
//! Sections are versioned and encoded with postcard. Everything is checked before anything is taken over.

use dunlin::StateSection;
use serde::{Deserialize, Serialize};

use crate::sections::{StateError, check_known, decode_profile, encode_profile, find, same, section};

use super::device::{Device, LOG_BYTES};
use super::program::Program;
use super::{Fill, Identity, Workload};

#[derive(Debug, Serialize, Deserialize)]
struct Profile {
    vcpus: u32,
}

#[derive(Debug, Serialize, Deserialize)]
struct Config {
    seed: u64,
    memory_bytes: u64,
    vcpus: u32,
    workload: Workload,
    fill: Fill,
}

#[derive(Debug, Serialize, Deserialize)]
struct VcpuState {
    steps: u64,
}

#[derive(Debug, Serialize, Deserialize)]
struct DeviceState {
    ticks: u64,
    log: Vec<u8>,
}

/// A state that was checked.
#[derive(Debug)]
pub(super) struct Loaded {
    pub(super) identity: Identity,
    pub(super) steps: Vec<u64>,
    pub(super) ticks: u64,
    pub(super) log: Vec<u8>,
}

/// What a profile calls such machines.
const KIND: &str = "synthetic";

/// What the other side must agree to. The engine itself compares memory.
pub(super) fn profile(vcpus: u32) -> Vec<u8> {
    // Encoding a number into a growing vector does not fail.
    encode_profile(KIND, &Profile { vcpus }).unwrap_or_default()
}

/// Checks the source's profile.
pub(super) fn accept_profile(profile: &[u8], vcpus: u32) -> Result<(), StateError> {
    let theirs: Profile = decode_profile(profile, KIND)?;
    same("vCPUs", u64::from(theirs.vcpus), u64::from(vcpus))
}

/// All sections of a paused machine.
pub(super) fn save(
    identity: &Identity,
    memory_bytes: u64,
    steps: &[u64],
    device: &Device,
) -> Result<Vec<StateSection>, StateError> {
    let config = Config {
        seed: identity.program.seed,
        memory_bytes,
        vcpus: steps.len() as u32,
        workload: identity.program.workload.clone(),
        fill: identity.fill.clone(),
    };
    let mut sections = vec![section("config", 0, &config)?];
    for (index, steps) in steps.iter().enumerate() {
        sections.push(section("vcpu", index as u32, &VcpuState { steps: *steps })?);
    }
    let (ticks, log) = device.get();
    sections.push(section("device", 0, &DeviceState { ticks, log })?);
    Ok(sections)
}

/// Checks all sections.
pub(super) fn load(sections: &[StateSection], memory_bytes: u64, vcpus: u32) -> Result<Loaded, StateError> {
    check_known(sections, |section| match section.name.as_str() {
        "config" | "device" => section.instance == 0,
        "vcpu" => section.instance < vcpus,
        _ => false,
    })?;
    let config: Config = find(sections, "config", 0)?;
    same("bytes of memory", config.memory_bytes, memory_bytes)?;
    same("vCPUs", u64::from(config.vcpus), u64::from(vcpus))?;
    let steps = (0..vcpus)
        .map(|vcpu| find::<VcpuState>(sections, "vcpu", vcpu).map(|state| state.steps))
        .collect::<Result<_, _>>()?;
    let DeviceState { ticks, log } = find(sections, "device", 0)?;
    same("bytes of device log", log.len() as u64, LOG_BYTES as u64)?;
    let program = Program::new(config.workload, config.seed, vcpus, memory_bytes);
    Ok(Loaded { identity: Identity { program, fill: config.fill }, steps, ticks, log })
}

#[cfg(test)]
mod tests {
    use dunlin::Need;

    use super::*;

    fn sections() -> Vec<StateSection> {
        let workload: Workload = "pattern=zipf".parse().unwrap();
        let identity = Identity { program: Program::new(workload, 9, 2, 1 << 20), fill: Fill::default() };
        save(&identity, 1 << 20, &[5, 6], &Device::default()).unwrap()
    }

    #[test]
    fn what_is_saved_loads() {
        let loaded = load(&sections(), 1 << 20, 2).unwrap();
        assert_eq!((loaded.steps, loaded.identity.program.seed), (vec![5, 6], 9));
        let mut more = sections();
        more.push(StateSection { need: Need::Optional, name: "balloon".into(), ..more[0].clone() });
        assert!(load(&more, 1 << 20, 2).is_ok(), "what is optional is skipped");
    }

    #[test]
    fn whatever_is_wrong_is_named() {
        type Damage = fn(&mut Vec<StateSection>);
        let cases: [(&str, Damage); 7] = [
            ("section \"disk\" (0) is unknown", |s| s[0].name = "disk".into()),
            ("section \"vcpu\" (1) is there 0 times", |s| drop(s.remove(2))),
            ("section \"vcpu\" (0) is there 2 times", |s| s[2].instance = 0),
            ("section \"vcpu\" (9) is unknown", |s| s[2].instance = 9),
            ("section \"device\" has version 2", |s| s[3].version = 2),
            ("1 bytes too many", |s| s[1].data.push(0)),
            ("section \"device\" (0) is damaged", |s| s[3].data.truncate(100)),
        ];
        for (expected, damage) in cases {
            let mut sections = sections();
            damage(&mut sections);
            let error = load(&sections, 1 << 20, 2).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        let error = accept_profile(&profile(4), 2).unwrap_err().to_string();
        assert_eq!(error, "the source has 4 vCPUs, this machine has 2");
    }
}
