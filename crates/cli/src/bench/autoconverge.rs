//! `dunlin bench autoconverge`: guests that dirty their memory at 0.5 to 8 times what the link carries, without throttling,
//! with QEMU's fixed steps and by need; and a guest of which one vCPU alone dirties so much.
//!
//! What a guest's work is worth is counted in its steps: how many it did from the start of the migration to its end, of
//! those that it does in as long beforehand.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use dunlin::{Guest, Parameters, Source, Status, internals};

use super::subject::{Build, Receiver};
use super::{Column, Measured};
use crate::args::{BenchAutoconverge, MachineKind};
use crate::terminal;

const COLUMNS: &[Column] = &[
    Column { heading: "converged", key: "converged", scale: 1.0, decimals: 0 },
    Column { heading: "total s", key: "total_seconds", scale: 1.0, decimals: 1 },
    Column { heading: "rounds", key: "rounds", scale: 1.0, decimals: 0 },
    Column { heading: "throttle %", key: "most_throttled_percent", scale: 1.0, decimals: 0 },
    Column { heading: "work lost s", key: "work_lost_seconds", scale: 1.0, decimals: 1 },
    Column { heading: "speed %", key: "speed_of_all", scale: 100.0, decimals: 0 },
    Column { heading: "of the others", key: "speed_of_others", scale: 100.0, decimals: 0 },
    Column { heading: "downtime ms", key: "downtime_seconds", scale: 1e3, decimals: 0 },
];
/// How long a guest runs before its speed is measured, and for how long that is.
const WARM_UP: Duration = Duration::from_millis(300);
const REFERENCE: Duration = Duration::from_millis(700);
/// How long a guest may stand still: the time in which the link carries an eighth of what it goes round in.
const DOWNTIME_LIMIT: &str = "50ms";

/// A machine and a link that is to it as others are to larger ones.
struct Rig {
    kind: MachineKind,
    memory: u64,
    /// Bytes a second.
    link: u64,
    working_set: u64,
}

const RIGS: [Rig; 2] = [
    Rig { kind: MachineKind::Synthetic, memory: 64 << 20, link: 40_000_000, working_set: 16 << 20 },
    Rig { kind: MachineKind::Kvm, memory: 16 << 20, link: 4_000_000, working_set: 1_600 << 10 },
];

/// Dirty rates, in eighths of the link's bandwidth.
const TIMES: [(&str, u64); 5] = [("0.5", 4), ("1", 8), ("2", 16), ("4", 32), ("8", 64)];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    None,
    FixedSteps,
    ByNeed,
}

const WAYS: [(&str, Way); 3] =
    [("not throttled", Way::None), ("fixed steps", Way::FixedSteps), ("by need", Way::ByNeed)];

pub fn measure(args: &BenchAutoconverge) -> Result<Measured> {
    let mut measured = Measured::new(COLUMNS);
    for rig in RIGS.iter().filter(|rig| args.machine.is_none_or(|kind| kind == rig.kind)) {
        if let Err(why) = available(rig.kind) {
            terminal::note(&format!("without the machine {}: {why}", rig.kind.name()));
            continue;
        }
        for (times, eighths) in TIMES {
            let job = rig.job(rig.link * eighths / 8, None);
            rig.scene(args, 2, &job, &format!("{} {times}x", rig.kind.name()), &mut measured)?;
        }
        // The first of three vCPUs goes round in its third of the region.
        let mixed = Rig { working_set: rig.working_set * 3, ..*rig };
        let job = mixed.job(rig.link * 8, Some(rig.link / 100));
        mixed.scene(args, 3, &job, &format!("{} 8x by one of three", rig.kind.name()), &mut measured)?;
    }
    Ok(measured)
}

fn available(kind: MachineKind) -> Result<()> {
    match kind {
        MachineKind::Synthetic => Ok(()),
        #[cfg(target_arch = "x86_64")]
        MachineKind::Kvm => Ok(dunlin_machines::KvmMachine::available()?),
        #[cfg(not(target_arch = "x86_64"))]
        MachineKind::Kvm => bail!("machines on KVM are for x86-64 only"),
    }
}

/// What came of a migration.
struct Sample {
    converged: bool,
    values: [Option<f64>; COLUMNS.len()],
}

impl Rig {
    fn job(&self, rate: u64, others: Option<u64>) -> String {
        let others = others.map_or(String::new(), |others| format!(",others={others}/s"));
        let working_set = self.working_set & !4095;
        match self.kind {
            MachineKind::Synthetic => format!("pattern=uniform,rate={rate}/s,working-set={working_set}{others}"),
            MachineKind::Kvm => format!("dirty:working-set={working_set},rate={rate}/s{others}"),
        }
    }

    /// A guest in all ways.
    fn scene(
        &self,
        args: &BenchAutoconverge,
        vcpus: u32,
        job: &str,
        what: &str,
        measured: &mut Measured,
    ) -> Result<()> {
        let mut rows: Vec<Vec<Vec<f64>>> = WAYS.iter().map(|_| vec![Vec::new(); COLUMNS.len()]).collect();
        let mut hopeless = false;
        for _ in 0..args.runs {
            for ((_, way), samples) in WAYS.iter().zip(&mut rows) {
                // Who has not converged without help within the patience need not be waited for again.
                if *way == Way::None && hopeless {
                    continue;
                }
                let sample = self.run(args, vcpus, job, *way).with_context(|| format!("{what}: {way:?}"))?;
                hopeless |= *way == Way::None && !sample.converged;
                samples.iter_mut().zip(sample.values).for_each(|(samples, value)| samples.extend(value));
            }
        }
        for ((how, _), samples) in WAYS.iter().zip(rows) {
            measured.add(format!("{what}: {how}"), samples);
        }
        Ok(())
    }

    fn run(&self, args: &BenchAutoconverge, vcpus: u32, job: &str, way: Way) -> Result<Sample> {
        let build = Build { kind: self.kind, memory: self.memory, vcpus };
        let receiver = Receiver::start(build)?;
        let subject = build.make(job)?;
        let guest = Guest::new(subject.machine());
        guest.cont()?;
        thread::sleep(WARM_UP);
        let (began, before) = (Instant::now(), subject.steps()?);
        thread::sleep(REFERENCE);
        let reference = speeds(&before, &subject.steps()?, began.elapsed());

        let parameters = self.parameters(way)?;
        let (began, before) = (Instant::now(), subject.steps()?);
        let source = match way {
            Way::FixedSteps => internals::start_with_fixed_steps(&guest, &receiver.address, &parameters)?,
            Way::None | Way::ByNeed => Source::start(&guest, &receiver.address, &parameters)?,
        };
        let patience = Duration::from_secs(args.patience);
        while !source.report().status.is_final() && began.elapsed() < patience {
            thread::sleep(Duration::from_millis(2));
        }
        let (took, after) = (began.elapsed(), subject.steps()?);
        // That is no error where it has come meanwhile.
        source.cancel()?;
        let report = source.wait();
        let converged = report.status == Status::Completed;
        match report.status {
            Status::Completed => receiver.finish()?,
            Status::Cancelled => drop(receiver),
            _ => bail!("{}", report.error.map_or_else(|| report.status.to_string(), |error| error.message)),
        }
        let speeds = speeds(&before, &after, took);
        let parts: Vec<f64> = speeds.iter().zip(&reference).map(|(now, then)| now / then.max(1e-9)).collect();
        let all = speeds.iter().sum::<f64>() / reference.iter().sum::<f64>().max(1e-9);
        let others = parts.iter().skip(1).copied().reduce(f64::min);
        let mixed = job.contains("others=");
        let most = report.max_vcpu_throttle_percent.iter().max().copied().unwrap_or(0);
        let values = [
            Some(f64::from(u8::from(converged))),
            Some(took.as_secs_f64()),
            Some(f64::from(report.rounds_ended())),
            Some(f64::from(most)),
            Some((1.0 - all).max(0.0) * took.as_secs_f64()),
            Some(all),
            others.filter(|_| mixed),
            converged.then_some(report.downtime_seconds),
        ];
        Ok(Sample { converged, values })
    }

    fn parameters(&self, way: Way) -> Result<Parameters> {
        let link = format!("{}/s", self.link);
        let mut set = vec![("max-bandwidth", link.as_str()), ("downtime-limit", DOWNTIME_LIMIT)];
        match way {
            Way::None => {}
            Way::FixedSteps => {
                set.extend([("auto-converge", "on"), ("cpu-throttle-initial", "20"), ("cpu-throttle-increment", "10")]);
            }
            Way::ByNeed => set.push(("auto-converge", "on")),
        }
        let mut parameters = Parameters::default();
        set.into_iter().try_for_each(|(name, value)| parameters.set_text(name, value))?;
        Ok(parameters)
    }
}

/// Steps a second of each vCPU.
fn speeds(before: &[u64], after: &[u64], took: Duration) -> Vec<f64> {
    let steps = before.iter().zip(after).map(|(before, after)| after.saturating_sub(*before));
    steps.map(|steps| steps as f64 / took.as_secs_f64().max(1e-9)).collect()
}
