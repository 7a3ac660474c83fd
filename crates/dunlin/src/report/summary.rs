//! A report in a sentence: what is happening, and where the guest is.

use super::{ChannelReport, Report, Status};
use crate::error::Side;
use crate::units::{format_seconds, format_size};

/// The sentence. It begins in lower case and ends without a full stop.
pub(super) fn sentence(report: &Report) -> String {
    let guest = report.guest;
    match (report.status, report.side) {
        (Status::None, _) => format!("no migration was started; the guest is {guest}"),
        (Status::Setup, Side::Source) => format!("connecting to the destination and agreeing; the guest is {guest}"),
        (Status::Setup, Side::Destination) => "waiting for a migration to come in".to_owned(),
        (Status::Active, _) => active(report),
        (Status::PreSwitchover, _) => format!("waiting to be continued; the guest is {guest}{}", stands_still(report)),
        (Status::Device, _) => {
            let waiting = report.waiting_for.as_ref().map_or_else(String::new, |what| format!(", waiting for {what}"));
            format!("switching over{waiting}; the guest is {guest}{}", stands_still(report))
        }
        (Status::Completed, _) if report.downtime_seconds > 0.0 => format!(
            "completed in {}, of which the guest stood still for {}; it is {guest}",
            format_seconds(report.total_seconds),
            format_seconds(report.downtime_seconds)
        ),
        (Status::Completed, _) => {
            format!("completed in {}; the guest is {guest}", format_seconds(report.total_seconds))
        }
        (Status::Failed | Status::Cancelled, _) => {
            let began = report.total_seconds > 0.0;
            let after = if began { format!(" after {}", format_seconds(report.total_seconds)) } else { String::new() };
            match &report.error {
                Some(error) => format!("{}{after}: {}{}", report.status, error.message, stands_still(report)),
                None => format!("{}{after}; the guest is {guest}{}", report.status, stands_still(report)),
            }
        }
        (Status::Cancelling, _) => format!("being cancelled; the guest is {guest}{}", stands_still(report)),
    }
}

/// Since when, behind where the guest is.
fn stands_still(report: &Report) -> String {
    report
        .stopped_seconds
        .map_or_else(String::new, |seconds| format!(" and has stood still for {}", format_seconds(seconds)))
}

fn active(report: &Report) -> String {
    let round = report.rounds_ended().saturating_add(1);
    let ram = &report.ram;
    let mut text = format!(
        "sending RAM while the guest is {}: round {round}, {} of {} to go",
        report.guest,
        format_size(ram.remaining_bytes),
        format_size(ram.total_bytes)
    );
    match (&report.not_converging, report.vcpu_throttle_percent.iter().max()) {
        (Some(why), _) => text.push_str(&format!("; it does not converge: {why}")),
        (None, Some(most)) => text.push_str(&format!("; the vCPUs are throttled by up to {most} %")),
        (None, None) => {}
    }
    if let Some((channel, speed)) = slowest(&report.channels) {
        text.push_str(&format!("; data channel {channel} is slow: its link carries {}/s", format_size(speed)));
    }
    text
}

/// The slowest channel, where its link carries little, by itself or beside those of the other channels.
fn slowest(channels: &[ChannelReport]) -> Option<(u8, u64)> {
    /// What is called slow, whatever the others do.
    const SLOW: u64 = 1 << 20;
    /// What part of the quickest is.
    const PART: u64 = 8;
    let speeds = || channels.iter().filter_map(|channel| Some((channel.index, channel.link_bytes_per_second?)));
    let (_, quickest) = speeds().max_by_key(|(_, speed)| *speed)?;
    speeds().min_by_key(|(_, speed)| *speed).filter(|(_, speed)| *speed < SLOW || *speed < quickest / PART)
}
