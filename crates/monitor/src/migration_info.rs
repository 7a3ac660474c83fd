//! A report in the fields and units of QEMU's `query-migrate`: milliseconds, pages, megabits.
//!
//! Unlike QEMU's, the figures are there on both sides and stay after a failure.

use std::net::IpAddr;
use std::path::Path;

use dunlin::parameters::Switch;
use dunlin::{Parameters, Report, Side, Status, Uri};
use serde_json::{Map, Value, json};

use crate::schema::{Object, Type, optional, required};
use crate::types::{MIGRATION_STATUS, SOCKET_ADDRESS};

const PAGE_SIZE: u64 = 4096;

/// QEMU's `MigrationInfo`, as far as there is something to say.
pub(crate) static MIGRATION_INFO: Object = Object::of(
    "MigrationInfo",
    &[
        optional("status", MIGRATION_STATUS),
        optional("ram", Type::Object(&MIGRATION_STATS)),
        optional("xbzrle-cache", Type::Object(&XBZRLE_CACHE_STATS)),
        optional("total-time", Type::Int),
        optional("expected-downtime", Type::Int),
        optional("downtime", Type::Int),
        optional("stopped-time", Type::Int),
        optional("waiting-for", Type::Str),
        optional("setup-time", Type::Int),
        optional("cpu-throttle-percentage", Type::Int),
        optional("error-desc", Type::Str),
        optional("socket-address", Type::Array(&Type::Object(&SOCKET_ADDRESS))),
    ],
);

static MIGRATION_STATS: Object = Object::of(
    "MigrationStats",
    &[
        required("transferred", Type::Int),
        required("remaining", Type::Int),
        required("total", Type::Int),
        required("duplicate", Type::Int),
        required("normal", Type::Int),
        required("normal-bytes", Type::Int),
        required("dirty-pages-rate", Type::Int),
        required("mbps", Type::Number),
        required("dirty-sync-count", Type::Int),
        required("postcopy-requests", Type::Int),
        required("page-size", Type::Int),
        required("multifd-bytes", Type::Int),
        required("pages-per-second", Type::Int),
        required("precopy-bytes", Type::Int),
        required("downtime-bytes", Type::Int),
        required("postcopy-bytes", Type::Int),
        required("dirty-sync-missed-zero-copy", Type::Int),
    ],
);

static XBZRLE_CACHE_STATS: Object = Object::of(
    "XBZRLECacheStats",
    &[
        required("cache-size", Type::Int),
        required("bytes", Type::Int),
        required("pages", Type::Int),
        required("cache-miss", Type::Int),
        required("cache-miss-rate", Type::Number),
        required("encoding-rate", Type::Number),
        required("overflow", Type::Int),
    ],
);

/// QEMU's `MigrationInfo`.
pub(crate) fn migration_info(report: Option<&Report>, listening_on: Option<&Uri>, in_force: &Parameters) -> Value {
    let mut info = match report {
        Some(report) if report.status != Status::None => members(report),
        _ => Map::new(),
    };
    if let Some(report) = report
        && report.side == Side::Source
        && in_force.xbzrle == Switch::On
    {
        info.insert("xbzrle-cache".to_owned(), xbzrle_cache(report, in_force));
    }
    if let Some(address) = listening_on.and_then(socket_address) {
        info.insert("socket-address".to_owned(), json!([address]));
    }
    Value::Object(info)
}

fn members(report: &Report) -> Map<String, Value> {
    let mut info = Map::new();
    let mut put = |name: &str, value: Value| info.insert(name.to_owned(), value);
    put("status", report.status.to_string().into());
    put("total-time", milliseconds(report.total_seconds));
    put("setup-time", milliseconds(report.setup_seconds));
    put("ram", ram(report));
    if !report.status.is_final() {
        let expected = report.predicted_downtime_seconds.unwrap_or(report.downtime_limit_seconds);
        put("expected-downtime", milliseconds(expected));
    }
    if let Some(downtime) = downtime_seconds(report)
        && (report.status == Status::Completed || downtime > 0.0)
    {
        put("downtime", milliseconds(downtime));
    }
    // Dunlin's own: how long the guest has stood still, and what for.
    if let Some(stopped) = report.stopped_seconds {
        put("stopped-time", milliseconds(stopped));
    }
    if let Some(waiting_for) = &report.waiting_for {
        put("waiting-for", waiting_for.clone().into());
    }
    // QEMU throttles all vCPUs alike.
    if let Some(percent) = report.vcpu_throttle_percent.iter().max().filter(|percent| **percent > 0) {
        put("cpu-throttle-percentage", (*percent).into());
    }
    if let Some(error) = &report.error {
        put("error-desc", error.message.clone().into());
    }
    info
}

/// How long the guest has stood still, or nothing where this side does not know: a destination knows it from the moment at
/// which the guest is there.
pub(crate) fn downtime_seconds(report: &Report) -> Option<f64> {
    let is_known = report.side == Side::Source || report.downtime_parts.is_some() || report.downtime_seconds > 0.0;
    is_known.then_some(report.downtime_seconds)
}

/// How often the dirty bitmap was looked at, as QEMU counts: at the end of the setup, and after each round.
fn dirty_syncs(report: &Report) -> u32 {
    let rounds = report.rounds_ended();
    let is_set_up = report.setup_seconds > 0.0 || rounds > 0 || report.ram.pages.total() > 0;
    if is_set_up { rounds.saturating_add(1) } else { 0 }
}

fn milliseconds(seconds: f64) -> Value {
    Value::from((seconds * 1e3).round() as u64)
}

fn ram(report: &Report) -> Value {
    let ram = &report.ram;
    // Whole pages, compressed or not.
    let normal = ram.pages.total().saturating_sub(ram.pages.zero).saturating_sub(ram.pages.delta);
    let last_round = report.rounds.last();
    let pages_per_second = last_round.filter(|round| round.seconds > 0.0).map_or(0, |round| {
        let pages = round.pages.total();
        (pages as f64 / round.seconds) as u64
    });
    let multifd_bytes = report.channels.iter().fold(0u64, |sum, channel| sum.saturating_add(channel.transferred_bytes));
    json!({
        "transferred": ram.transferred_bytes,
        "remaining": ram.remaining_bytes,
        "total": ram.total_bytes,
        "duplicate": ram.pages.zero,
        "normal": normal,
        "normal-bytes": normal.saturating_mul(PAGE_SIZE),
        "dirty-pages-rate": report.dirty_bytes_per_second / PAGE_SIZE,
        "mbps": bytes_per_second(report) * 8.0 / 1e6,
        "dirty-sync-count": dirty_syncs(report),
        "page-size": PAGE_SIZE,
        "pages-per-second": pages_per_second,
        "multifd-bytes": multifd_bytes,
        "precopy-bytes": report.precopy_bytes,
        "downtime-bytes": ram.transferred_bytes.saturating_sub(report.precopy_bytes),
        "postcopy-bytes": 0,
        "postcopy-requests": 0,
        "dirty-sync-missed-zero-copy": 0,
    })
}

/// QEMU's `mbps` changes its meaning: in the end it is that of everything after the setup.
fn bytes_per_second(report: &Report) -> f64 {
    let seconds = report.total_seconds - report.setup_seconds;
    if report.status == Status::Completed && seconds > 0.0 {
        report.ram.transferred_bytes as f64 / seconds
    } else {
        report.bandwidth_bytes_per_second as f64
    }
}

/// The two rates are those of the whole migration.
fn xbzrle_cache(report: &Report, in_force: &Parameters) -> Value {
    let delta = &report.delta;
    let raw = delta.hits.saturating_mul(PAGE_SIZE);
    let bytes = raw.saturating_sub(delta.saved_bytes);
    let looked_up = delta.hits.saturating_add(delta.misses).saturating_add(delta.overflows);
    let rate = |part: u64, whole: u64| if whole == 0 { 0.0 } else { part as f64 / whole as f64 };
    json!({
        "cache-size": in_force.xbzrle_cache_size,
        "bytes": bytes,
        "pages": delta.hits,
        "cache-miss": delta.misses,
        "cache-miss-rate": rate(delta.misses, looked_up),
        "encoding-rate": rate(raw, bytes),
        "overflow": delta.overflows,
    })
}

/// QEMU's `SocketAddress`, for the transports that have one.
fn socket_address(uri: &Uri) -> Option<Value> {
    match uri {
        Uri::Tcp { host, port } => {
            let mut address = json!({"type": "inet", "host": host, "port": port.to_string()});
            let family = host.parse().map(|ip: IpAddr| if ip.is_ipv4() { "ipv4" } else { "ipv6" });
            if let (Ok(family), Some(members)) = (family, address.as_object_mut()) {
                members.insert(family.to_owned(), true.into());
            }
            Some(address)
        }
        Uri::Unix(path) => Some(json!({"type": "unix", "path": path.to_string_lossy()})),
        Uri::Fd(_) | Uri::Exec(_) => None,
    }
}

/// The address that a source connects to, out of the `socket-address` of a `query-migrate` answer.
pub fn uri_of_socket_address(migration_info: &Value) -> Option<Uri> {
    let address = migration_info.get("socket-address")?.get(0)?;
    let text = |name: &str| address.get(name).and_then(Value::as_str);
    match text("type")? {
        "inet" => Some(Uri::Tcp { host: text("host")?.to_owned(), port: text("port")?.parse().ok()? }),
        "unix" => Some(Uri::Unix(Path::new(text("path")?).to_owned())),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use dunlin::error::Phase;
    use dunlin::report::{ChannelReport, DeltaCounts, DowntimeParts, ErrorReport, PageCounts, RamReport, Round};
    use dunlin::{GuestPlace, Side};

    use super::*;

    fn report() -> Report {
        let mut report = Report::new(Side::Source, GuestPlace::RunningAtSource);
        report.status = Status::Active;
        report.total_seconds = 2.0344;
        report.setup_seconds = 0.0121;
        report.downtime_limit_seconds = 0.3;
        report.ram = RamReport {
            total_bytes: 1 << 30,
            remaining_bytes: 8192,
            round_remaining_bytes: 8192,
            transferred_bytes: 5_000_000,
            pages: PageCounts { zero: 7, plain: 1000, ..Default::default() },
        };
        report.precopy_bytes = 5_000_000;
        report.bandwidth_bytes_per_second = 125_000_000;
        report.dirty_bytes_per_second = 40_960;
        report.channels = vec![
            ChannelReport { transferred_bytes: 10, ..Default::default() },
            ChannelReport { index: 1, transferred_bytes: 20, ..Default::default() },
        ];
        report.rounds.push(Round {
            number: 1,
            seconds: 0.5,
            ram_bytes: 1 << 30,
            transferred_bytes: 4_000_000,
            pages: PageCounts { zero: 7, plain: 993, ..Default::default() },
            dirty_bytes: 8192,
            bandwidth_bytes_per_second: 1,
            dirty_bytes_per_second: 1,
            predicted_downtime_seconds: 0.1,
        });
        report
    }

    #[test]
    fn units() {
        let info = migration_info(Some(&report()), None, &Parameters::default());
        assert_eq!(
            info,
            json!({
                "status": "active", "total-time": 2034, "setup-time": 12, "expected-downtime": 300,
                "ram": {
                    "transferred": 5_000_000, "remaining": 8192, "total": 1 << 30, "duplicate": 7, "normal": 1000,
                    "normal-bytes": 4_096_000, "dirty-pages-rate": 10, "mbps": 1000.0, "dirty-sync-count": 2,
                    "page-size": 4096, "pages-per-second": 2000, "multifd-bytes": 30, "precopy-bytes": 5_000_000,
                    "downtime-bytes": 0, "postcopy-bytes": 0, "postcopy-requests": 0,
                    "dirty-sync-missed-zero-copy": 0,
                },
            })
        );
    }

    #[test]
    fn figures_stay_after_the_end() {
        let mut report = report();
        report.status = Status::Failed;
        report.precopy_bytes = 3_000_000;
        report.downtime_seconds = 0.0106;
        report.downtime_parts = Some(DowntimeParts { ram_seconds: 0.001, ..Default::default() });
        report.error = Some(ErrorReport {
            message: "source, handover: cancelled".to_owned(),
            side: Side::Source,
            phase: Phase::Handover,
            guest: GuestPlace::RunningAtSource,
        });
        let info = migration_info(Some(&report), None, &Parameters::default());
        assert_eq!(info["status"], "failed");
        assert_eq!(info["downtime"], 11);
        assert_eq!(info["error-desc"], "source, handover: cancelled");
        assert_eq!(info["ram"]["precopy-bytes"], 3_000_000);
        assert_eq!(info["ram"]["downtime-bytes"], 2_000_000);
        assert_eq!(info.get("expected-downtime"), None);
    }

    #[test]
    fn the_rate_in_the_end_is_of_all_of_it() {
        let mut report = report();
        report.status = Status::Completed;
        (report.setup_seconds, report.total_seconds) = (1.0, 6.0);
        let info = migration_info(Some(&report), None, &Parameters::default());
        assert_eq!(info["ram"]["mbps"], 8.0);
    }

    #[test]
    fn a_guest_that_stands_still() {
        let mut report = report();
        report.status = Status::PreSwitchover;
        (report.stopped_seconds, report.waiting_for) = (Some(61.2345), Some("a person".to_owned()));
        let info = migration_info(Some(&report), None, &Parameters::default());
        assert_eq!((&info["stopped-time"], &info["waiting-for"]), (&json!(61_235), &json!("a person")));
        Type::Object(&MIGRATION_INFO).check_result(&info).unwrap();
    }

    /// A source measures its downtime; a destination has it from the source, and says nothing until then.
    #[test]
    fn a_downtime_that_is_not_known() {
        let downtime =
            |report: &Report| migration_info(Some(report), None, &Parameters::default()).get("downtime").cloned();
        let mut report = report();
        report.status = Status::Completed;
        assert_eq!(downtime(&report), Some(json!(0)));
        report.side = Side::Destination;
        assert_eq!(downtime(&report), None);
        report.downtime_parts = Some(DowntimeParts::default());
        assert_eq!(downtime(&report), Some(json!(0)));
        report.downtime_seconds = 0.0021;
        assert_eq!(downtime(&report), Some(json!(2)));
    }

    #[test]
    fn syncs_of_the_dirty_bitmap() {
        let syncs = |report: &Report| ram(report)["dirty-sync-count"].clone();
        let mut fresh = Report::new(Side::Source, GuestPlace::RunningAtSource);
        for status in [Status::None, Status::Setup, Status::Failed] {
            fresh.status = status;
            assert_eq!(syncs(&fresh), 0, "{status}");
        }
        fresh.status = Status::Active;
        fresh.setup_seconds = 0.01;
        assert_eq!(syncs(&fresh), 1);
        // It never goes back.
        for status in [Status::Cancelling, Status::Cancelled] {
            fresh.status = status;
            assert_eq!(syncs(&fresh), 1, "{status}");
        }
        let mut report = report();
        report.status = Status::Failed;
        assert_eq!(syncs(&report), 2);
    }

    #[test]
    fn deltas() {
        let mut report = report();
        report.delta = DeltaCounts { hits: 10, misses: 5, overflows: 5, saved_bytes: 9 * 4096 };
        let parameters = Parameters { xbzrle: Switch::On, ..Parameters::default() };
        let info = migration_info(Some(&report), None, &parameters);
        assert_eq!(
            info["xbzrle-cache"],
            json!({
                "cache-size": 64 << 20, "bytes": 4096, "pages": 10, "cache-miss": 5, "cache-miss-rate": 0.25,
                "encoding-rate": 10.0, "overflow": 5,
            })
        );
        Type::Object(&MIGRATION_INFO).check_result(&info).unwrap();
    }

    #[test]
    fn addresses() {
        assert_eq!(migration_info(None, None, &Parameters::default()), json!({}));
        for (uri, address) in [
            ("tcp:[::1]:4444", json!({"type": "inet", "host": "::1", "port": "4444", "ipv6": true})),
            ("unix:/a b", json!({"type": "unix", "path": "/a b"})),
        ] {
            let uri: Uri = uri.parse().unwrap();
            let info = migration_info(None, Some(&uri), &Parameters::default());
            assert_eq!(info, json!({ "socket-address": [address] }));
            assert_eq!(uri_of_socket_address(&info), Some(uri));
        }
        assert_eq!(uri_of_socket_address(&json!({"status": "setup"})), None);
    }
}
