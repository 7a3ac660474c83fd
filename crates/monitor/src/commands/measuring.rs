//! Commands that measure how fast a guest dirties its RAM, at any time.

use std::time::Duration;

use dunlin::{DirtyRateMode, DirtyRateRequest, DirtyRateStatus};
use serde_json::{Map, Value, json};

use super::{Call, Command, NOTHING, Oob, done};
use crate::protocol::Refusal;
use crate::schema::{Enum, Object, Type, optional, required};

pub(super) static COMMANDS: &[Command] = &[
    Command {
        name: "calc-dirty-rate",
        help: "Begins to measure how fast the guest dirties its RAM, for `calc-time`. `sample-pages` are of each GiB, and only for \
               mode `page-sampling`, which is the default.",
        takes: &CALCULATE,
        gives: NOTHING,
        oob: Oob::Refused,
        run: calc_dirty_rate,
    },
    Command {
        name: "query-dirty-rate",
        help: "What the latest measurement has found: `dirty-rate` in MiB/s as in QEMU, but rounded up, and in bytes; and between \
               which bounds it is. A page counts once in `calc-time` for the least, and once in `window-ms` for the most.",
        takes: &QUERY,
        gives: Type::Object(&INFO),
        oob: Oob::Refused,
        run: query_dirty_rate,
    },
];

const UNIT: Type = Type::Enum(Enum::of("TimeUnit", &["second", "millisecond"]));
const MODE: Type = Type::Enum(Enum::of("DirtyRateMeasureMode", &["page-sampling", "dirty-bitmap", "dirty-ring"]));

static CALCULATE: Object = Object::of(
    "CalcDirtyRate",
    &[
        required("calc-time", Type::Int),
        optional("calc-time-unit", UNIT),
        optional("sample-pages", Type::Int),
        optional("mode", MODE),
    ],
);

static QUERY: Object = Object::of("QueryDirtyRate", &[optional("calc-time-unit", UNIT)]);

static INFO: Object = Object::of(
    "DirtyRateInfo",
    &[
        optional("dirty-rate", Type::Int),
        optional("dirty-bytes-per-second", Type::Int),
        optional("at-least-bytes-per-second", Type::Int),
        optional("at-most-bytes-per-second", Type::Int),
        optional("window-ms", Type::Number),
        optional("samples", Type::Int),
        optional("changed-samples", Type::Int),
        required("status", Type::Enum(Enum::of("DirtyRateStatus", &["unstarted", "measuring", "measured"]))),
        required("start-time", Type::Int),
        required("calc-time", Type::Int),
        required("calc-time-unit", UNIT),
        required("sample-pages", Type::Int),
        required("mode", MODE),
        optional("vcpu-dirty-rate", Type::Array(&Type::Object(&VCPU))),
        optional("error-desc", Type::Str),
    ],
);

static VCPU: Object = Object::of(
    "DirtyRateVcpu",
    &[required("id", Type::Int), required("dirty-rate", Type::Int), required("dirty-bytes-per-second", Type::Int)],
);

fn calc_dirty_rate(call: Call<'_>) -> Result<Value, Refusal> {
    let arguments = call.arguments();
    let natural = |name: &str| match arguments.integer(name) {
        None => Ok(None),
        Some(number) => number
            .as_u64()
            .map(Some)
            .ok_or_else(|| Refusal::generic(format_args!("Parameter '{name}' expects a value that is not negative"))),
    };
    let calc_time = natural("calc-time")?.unwrap_or(0);
    let defaults = DirtyRateRequest::default();
    let mode = match arguments.text("mode") {
        Some("dirty-bitmap") => DirtyRateMode::DirtyBitmap,
        Some("dirty-ring") => DirtyRateMode::DirtyRing,
        _ => DirtyRateMode::PageSampling,
    };
    // Nothing is sampled in the others: who says how much has another mode in mind.
    if mode != DirtyRateMode::PageSampling && arguments.has("sample-pages") {
        return Err(Refusal::generic("Parameter 'sample-pages' is only for mode 'page-sampling'"));
    }
    let request = DirtyRateRequest {
        calc_time: match arguments.text("calc-time-unit") {
            Some("millisecond") => Duration::from_millis(calc_time),
            _ => Duration::from_secs(calc_time),
        },
        mode,
        sample_pages: natural("sample-pages")?.unwrap_or(defaults.sample_pages),
    };
    done(call.vm.guest().calc_dirty_rate(&request))
}

fn query_dirty_rate(call: Call<'_>) -> Result<Value, Refusal> {
    let rate = call.vm.guest().dirty_rate();
    let (unit, units_per_second) = match call.arguments().text("calc-time-unit") {
        Some("millisecond") => ("millisecond", 1e3),
        _ => ("second", 1.0),
    };
    let mode = match rate.mode.unwrap_or_default() {
        DirtyRateMode::PageSampling => "page-sampling",
        DirtyRateMode::DirtyBitmap => "dirty-bitmap",
        DirtyRateMode::DirtyRing => "dirty-ring",
    };
    let status = match rate.status {
        DirtyRateStatus::Unstarted => "unstarted",
        DirtyRateStatus::Measuring => "measuring",
        DirtyRateStatus::Measured => "measured",
    };
    let mut info = Map::new();
    let mut put = |name: &str, value: Value| info.insert(name.to_owned(), value);
    put("status", status.into());
    put("mode", mode.into());
    put("start-time", (rate.start_time_seconds.unwrap_or(0.0) as u64).into());
    put("calc-time", ((rate.calc_time_seconds * units_per_second).round() as u64).into());
    put("calc-time-unit", unit.into());
    put("sample-pages", rate.sample_pages.unwrap_or(0).into());
    if let (Some(bytes), Some(mebibytes)) = (rate.dirty_bytes_per_second, rate.dirty_mebibytes_per_second()) {
        put("dirty-bytes-per-second", bytes.into());
        put("dirty-rate", mebibytes.into());
    }
    let bounds = [
        ("at-least-bytes-per-second", rate.at_least_bytes_per_second),
        ("at-most-bytes-per-second", rate.at_most_bytes_per_second),
        ("samples", rate.samples),
        ("changed-samples", rate.changed_samples),
    ];
    bounds.into_iter().for_each(|(name, bound)| {
        if let Some(bound) = bound {
            put(name, bound.into());
        }
    });
    if let Some(window) = rate.window_seconds {
        put("window-ms", (window * 1e3).into());
    }
    if !rate.vcpus.is_empty() {
        let vcpus = rate.vcpus.iter().map(|vcpu| {
            json!({
                "id": vcpu.vcpu,
                "dirty-rate": vcpu.dirty_mebibytes_per_second(),
                "dirty-bytes-per-second": vcpu.dirty_bytes_per_second,
            })
        });
        put("vcpu-dirty-rate", vcpus.collect());
    }
    if let Some(error) = rate.error {
        put("error-desc", error.into());
    }
    Ok(Value::Object(info))
}
