//! Which figures of a report Prometheus gets, under which names.

use dunlin::report::{ChannelReport, DowntimeParts};
use dunlin::{GuestPlace, Report, Side, Status};

use super::exposition::{Text, Type};
use crate::migration_info::downtime_seconds;

/// The statuses, each a sample of its own: the one that holds is 1.
const STATUSES: [Status; 9] = [
    Status::None,
    Status::Setup,
    Status::Active,
    Status::PreSwitchover,
    Status::Device,
    Status::Completed,
    Status::Failed,
    Status::Cancelling,
    Status::Cancelled,
];

const PLACES: [(GuestPlace, &str); 7] = [
    (GuestPlace::RunningAtSource, "running-at-source"),
    (GuestPlace::PausedAtSource, "paused-at-source"),
    (GuestPlace::AtSource, "at-source"),
    (GuestPlace::RunningAtDestination, "running-at-destination"),
    (GuestPlace::PausedAtDestination, "paused-at-destination"),
    (GuestPlace::Undecided, "undecided"),
    (GuestPlace::Ended, "ended"),
];

/// The figures of a machine's latest migration, in Prometheus's text format. Without one there is only the version.
pub fn exposition(report: Option<&Report>) -> String {
    let mut text = Text::default();
    text.family("dunlin_build_info", Type::Gauge, "The version of dunlin; always 1.")
        .count(&[("version", env!("CARGO_PKG_VERSION"))], 1);
    if let Some(report) = report {
        let figures = Figures { report, side: ("side", side_name(report.side)) };
        figures.state(&mut text);
        figures.times(&mut text);
        figures.ram(&mut text);
        figures.rates(&mut text);
        figures.channels(&mut text);
        figures.others(&mut text);
    }
    text.finish()
}

fn side_name(side: Side) -> &'static str {
    match side {
        Side::Source => "source",
        Side::Destination => "destination",
    }
}

struct Figures<'a> {
    report: &'a Report,
    side: (&'static str, &'static str),
}

impl Figures<'_> {
    fn state(&self, text: &mut Text) {
        let Self { report, side } = *self;
        let mut status = text.family(
            "dunlin_migration_status",
            Type::Gauge,
            "Where the migration stands: 1 for the status that holds, 0 for the others.",
        );
        for each in STATUSES {
            status.count(&[side, ("status", &each.to_string())], u64::from(each == report.status));
        }
        let mut place = text.family(
            "dunlin_migration_guest_place",
            Type::Gauge,
            "Where the guest is as far as this side knows: 1 for the place that holds, 0 for the others.",
        );
        for (each, name) in PLACES {
            place.count(&[side, ("place", name)], u64::from(each == report.guest));
        }
        text.family(
            "dunlin_migration_not_converging",
            Type::Gauge,
            "1 while the migration does not converge, and after one that failed or was cancelled then.",
        )
        .count(&[side], u64::from(report.not_converging.is_some()));
    }

    fn times(&self, text: &mut Text) {
        let Self { report, side } = *self;
        let mut gauge = |name: &str, help: &str, value: f64| {
            text.family(name, Type::Gauge, help).sample(&[side], value);
        };
        gauge("dunlin_migration_duration_seconds", "From the start to the end, or to now.", report.total_seconds);
        gauge("dunlin_migration_setup_seconds", "From the start until the first page.", report.setup_seconds);
        gauge(
            "dunlin_migration_downtime_limit_seconds",
            "The longest downtime asked for.",
            report.downtime_limit_seconds,
        );
        if let Some(predicted) = report.predicted_downtime_seconds {
            gauge(
                "dunlin_migration_downtime_predicted_seconds",
                "The downtime if the guest were stopped now; at the end, what was predicted when it was.",
                predicted,
            );
        }
        if let Some(downtime) = downtime_seconds(report) {
            gauge(
                "dunlin_migration_downtime_seconds",
                "vCPUs stopped at the source to vCPUs running again; 0 while neither has happened. At a destination once \
                 the source has told it.",
                downtime,
            );
        }
        if let Some(parts) = report.downtime_parts {
            let mut family =
                text.family("dunlin_migration_downtime_part_seconds", Type::Gauge, "What the downtime is made of.");
            for (part, seconds) in named_parts(&parts) {
                family.sample(&[side, ("part", part)], seconds);
            }
        }
    }

    fn ram(&self, text: &mut Text) {
        let Self { report, side } = *self;
        let ram = &report.ram;
        text.family("dunlin_migration_ram_bytes", Type::Gauge, "The guest's RAM.").count(&[side], ram.total_bytes);
        text.family(
            "dunlin_migration_ram_remaining_bytes",
            Type::Gauge,
            "RAM that is still to go, with what the guest is expected to have dirtied again.",
        )
        .count(&[side], ram.remaining_bytes);
        text.family(
            "dunlin_migration_transferred_bytes_total",
            Type::Counter,
            "Bytes sent or received on all channels, frames and messages included.",
        )
        .count(&[side], ram.transferred_bytes);
        let mut pages = text.family(
            "dunlin_migration_pages_total",
            Type::Counter,
            "Pages of 4096 bytes sent or received, by the kind they travelled as.",
        );
        for (kind, count) in ram.pages.named() {
            pages.count(&[side, ("kind", kind)], count);
        }
        let delta = &report.delta;
        let mut tried = text.family(
            "dunlin_migration_delta_pages_total",
            Type::Counter,
            "Pages sent again, by what came of sending them as a delta.",
        );
        for (result, count) in [("hit", delta.hits), ("miss", delta.misses), ("overflow", delta.overflows)] {
            tried.count(&[side, ("result", result)], count);
        }
        text.family(
            "dunlin_migration_delta_saved_bytes_total",
            Type::Counter,
            "Bytes of RAM that did not have to travel because of deltas.",
        )
        .count(&[side], delta.saved_bytes);
        text.family(
            "dunlin_migration_device_state_bytes_total",
            Type::Counter,
            "Bytes of device state sent or received.",
        )
        .count(&[side], report.device_state_bytes);
    }

    fn rates(&self, text: &mut Text) {
        let Self { report, side } = *self;
        text.family("dunlin_migration_rounds_total", Type::Counter, "Passes over the dirty bitmap that have ended.")
            .count(&[side], u64::from(report.rounds_ended()));
        text.family(
            "dunlin_migration_bandwidth_bytes_per_second",
            Type::Gauge,
            "Bytes on all channels a second, over the latest rounds that moved enough to tell.",
        )
        .count(&[side], report.bandwidth_bytes_per_second);
        text.family(
            "dunlin_migration_dirty_bytes_per_second",
            Type::Gauge,
            "Bytes of RAM that the guest dirties a second, as of the last round.",
        )
        .count(&[side], report.dirty_bytes_per_second);
    }

    fn channels(&self, text: &mut Text) {
        let Self { report, side } = *self;
        let each = |text: &mut Text, name: &str, help: &str, value: fn(&ChannelReport) -> u64| {
            let mut family = text.family(name, Type::Counter, help);
            for channel in &report.channels {
                family.count(&[side, ("channel", &channel.index.to_string())], value(channel));
            }
        };
        each(
            text,
            "dunlin_migration_channel_transferred_bytes_total",
            "Bytes sent or received on a data channel.",
            |channel| channel.transferred_bytes,
        );
        each(text, "dunlin_migration_channel_frames_total", "Frames sent or received on a data channel.", |channel| {
            channel.frames
        });
        let seconds = |text: &mut Text, name: &str, help: &str, value: fn(&ChannelReport) -> f64| {
            let mut family = text.family(name, Type::Counter, help);
            for channel in &report.channels {
                family.sample(&[side, ("channel", &channel.index.to_string())], value(channel));
            }
        };
        seconds(
            text,
            "dunlin_migration_channel_busy_seconds_total",
            "What a data channel's thread has used of a processor's time.",
            |channel| channel.busy_seconds,
        );
        seconds(
            text,
            "dunlin_migration_channel_waiting_seconds_total",
            "How long a data channel's thread stood still while a round was under way.",
            |channel| channel.waiting_seconds,
        );
        let mut pages = text.family(
            "dunlin_migration_channel_pages_total",
            Type::Counter,
            "Pages of 4096 bytes sent or received on a data channel, by the kind they travelled as.",
        );
        for channel in &report.channels {
            for (kind, count) in channel.pages.named() {
                pages.count(&[side, ("channel", &channel.index.to_string()), ("kind", kind)], count);
            }
        }
    }

    fn others(&self, text: &mut Text) {
        let Self { report, side } = *self;
        let mut throttle = text.family(
            "dunlin_migration_vcpu_throttle_ratio",
            Type::Gauge,
            "The part of each vCPU's time that auto-converge takes: 0 to 1; none while it takes none.",
        );
        for (vcpu, percent) in report.vcpu_throttle_percent.iter().enumerate() {
            throttle.sample(&[side, ("vcpu", &vcpu.to_string())], f64::from(*percent) / 100.0);
        }
        let mut cpu = text.family(
            "dunlin_migration_cpu_seconds_total",
            Type::Counter,
            "CPU time of the engine's threads, at the source and at the destination, where known.",
        );
        for (at, seconds) in [("source", report.cpu_seconds.source), ("destination", report.cpu_seconds.destination)] {
            if let Some(seconds) = seconds {
                cpu.sample(&[side, ("at", at)], seconds);
            }
        }
        text.family(
            "dunlin_migration_refused_connections_total",
            Type::Counter,
            "Connections that the destination refused or that lost their way.",
        )
        .count(&[side], report.refused_connections.count);
    }
}

fn named_parts(parts: &DowntimeParts) -> [(&'static str, f64); 6] {
    [
        ("pause", parts.pause_seconds),
        ("wait", parts.wait_seconds),
        ("ram", parts.ram_seconds),
        ("device-state", parts.device_state_seconds),
        ("load", parts.load_seconds),
        ("handover", parts.handover_seconds),
    ]
}
