//! Commands that slow vCPUs down, at any time.

use serde_json::{Value, json};

use super::{Arguments, Call, Command, NOTHING, Oob, done};
use crate::protocol::Refusal;
use crate::schema::{self, Object, Type, optional, required};

pub(super) static COMMANDS: &[Command] = &[
    Command {
        name: "set-vcpu-throttle",
        help: "Takes `percentage` of its time from a vCPU, or from all, until it is cancelled. A migration that needs more \
               (`auto-converge`) takes more.",
        takes: &SET,
        gives: NOTHING,
        oob: Oob::Refused,
        run: set_vcpu_throttle,
    },
    Command {
        name: "cancel-vcpu-throttle",
        help: "Gives a vCPU, or all, what `set-vcpu-throttle` took.",
        takes: &CANCEL,
        gives: NOTHING,
        oob: Oob::Refused,
        run: |call| {
            let vcpu = cpu_index(call.arguments())?;
            done(call.vm.guest().cancel_vcpu_throttle(vcpu))
        },
    },
    Command {
        name: "query-vcpu-throttle",
        help: "What is taken of each vCPU's time, in percent: what was set, what the migration asks for, and the larger of \
               the two, which is in force. Nothing for machines whose vCPUs cannot be slowed.",
        takes: &schema::NOTHING,
        gives: Type::Array(&Type::Object(&VCPU_THROTTLE)),
        oob: Oob::Refused,
        run: query_vcpu_throttle,
    },
];

static SET: Object =
    Object::of("SetVcpuThrottle", &[optional("cpu-index", Type::Int), required("percentage", Type::Int)]);
static CANCEL: Object = Object::of("CancelVcpuThrottle", &[optional("cpu-index", Type::Int)]);

static VCPU_THROTTLE: Object = Object::of(
    "VcpuThrottle",
    &[
        required("cpu-index", Type::Int),
        required("percentage", Type::Int),
        required("set-percentage", Type::Int),
        required("migration-percentage", Type::Int),
    ],
);

/// The vCPU that is meant, or all.
fn cpu_index(arguments: Arguments<'_>) -> Result<Option<usize>, Refusal> {
    let Some(index) = arguments.integer("cpu-index") else { return Ok(None) };
    let index = index.as_u64().and_then(|index| usize::try_from(index).ok());
    index.map(Some).ok_or_else(|| Refusal::generic("Parameter 'cpu-index' expects a CPU number"))
}

fn set_vcpu_throttle(call: Call<'_>) -> Result<Value, Refusal> {
    let arguments = call.arguments();
    let vcpu = cpu_index(arguments)?;
    let percentage = arguments.integer("percentage").and_then(Value::as_u64);
    let percentage =
        percentage.and_then(|percentage| u8::try_from(percentage).ok()).filter(|percentage| *percentage < 100);
    let percentage =
        percentage.ok_or_else(|| Refusal::generic("Parameter 'percentage' expects a value from 0 to 99"))?;
    done(call.vm.guest().set_vcpu_throttle(vcpu, percentage))
}

fn query_vcpu_throttle(call: Call<'_>) -> Result<Value, Refusal> {
    let throttles = call.vm.guest().vcpu_throttle().into_iter().map(|throttle| {
        json!({
            "cpu-index": throttle.vcpu,
            "percentage": throttle.effective_percent,
            "set-percentage": throttle.operator_percent,
            "migration-percentage": throttle.migration_percent,
        })
    });
    Ok(throttles.collect())
}
