//! Commands on the machine and its process.

use std::sync::PoisonError;

use dunlin::TakeBack;
use serde_json::{Map, Value, json};

use super::{Call, Command, HUMAN, NOTHING, Oob, QUIT, done};
use crate::protocol::{self, Refusal};
use crate::schema::{self, Enum, Object, Type, optional, required};

pub(super) static COMMANDS: &[Command] = &[
    Command {
        name: "query-status",
        help: "What the guest does: `running`, `paused`, `inmigrate`, `finish-migrate`, `postmigrate` or `shutdown`.",
        takes: &schema::NOTHING,
        gives: Type::Object(&STATUS_INFO),
        oob: Oob::Refused,
        run: |call| {
            let state = call.vm.run_state();
            Ok(json!({"status": state.name(), "running": state.is_running()}))
        },
    },
    Command {
        name: "query-version",
        help: "The QEMU whose protocol this is, and Dunlin's own version in `package`.",
        takes: &schema::NOTHING,
        gives: Type::Object(&VERSION_INFO),
        oob: Oob::Refused,
        run: |_| Ok(protocol::version()),
    },
    Command {
        name: "query-name",
        help: "Machines have no names: nothing.",
        takes: &schema::NOTHING,
        gives: Type::Object(&NAME_INFO),
        oob: Oob::Refused,
        run: |_| Ok(json!({})),
    },
    Command {
        name: "stop",
        help: "Pauses the guest. A migration under way goes on, and it arrives paused.",
        takes: &schema::NOTHING,
        gives: NOTHING,
        oob: Oob::Refused,
        run: |call| done(call.vm.stop()),
    },
    Command {
        name: "cont",
        help: "Starts or restarts the guest. `x-take-back` first decides that an undecided guest is here, once nothing was heard of the other side for link-timeout. `x-force`: at once, and also on a disk image that is not as the guest left it.",
        takes: &CONT,
        gives: NOTHING,
        oob: Oob::Refused,
        run: cont,
    },
    Command {
        name: "x-verify",
        help: "Has the machine check itself: every page, and what its devices have done. Takes as long as that takes.",
        takes: &schema::NOTHING,
        gives: Type::Any,
        oob: Oob::Refused,
        run: x_verify,
    },
    Command {
        name: HUMAN,
        help: "Carries out a line of the monitor for people, and gives what it prints.",
        takes: &HUMAN_ARGUMENTS,
        gives: Type::Str,
        oob: Oob::Refused,
        run: human_monitor_command,
    },
    Command {
        name: QUIT,
        help: "Ends the process, and the guest with it. A migration out fails, if it still can: its destination hears why.",
        takes: &schema::NOTHING,
        gives: NOTHING,
        oob: Oob::Refused,
        run: |call| {
            call.vm.end_outgoing();
            Ok(json!({}))
        },
    },
];

static STATUS_INFO: Object = Object::of(
    "StatusInfo",
    &[
        required("running", Type::Bool),
        required(
            "status",
            Type::Enum(Enum::of(
                "RunState",
                &["running", "paused", "inmigrate", "finish-migrate", "postmigrate", "shutdown"],
            )),
        ),
    ],
);

static VERSION_INFO: Object =
    Object::of("VersionInfo", &[required("qemu", Type::Object(&VERSION_TRIPLE)), required("package", Type::Str)]);

static VERSION_TRIPLE: Object = Object::of(
    "VersionTriple",
    &[required("major", Type::Int), required("minor", Type::Int), required("micro", Type::Int)],
);

static NAME_INFO: Object = Object::of("NameInfo", &[optional("name", Type::Str)]);
static CONT: Object = Object::of("Cont", &[optional("x-take-back", Type::Bool), optional("x-force", Type::Bool)]);
static HUMAN_ARGUMENTS: Object =
    Object::of("HumanMonitorCommand", &[required(super::HUMAN_LINE, Type::Str), optional("cpu-index", Type::Int)]);

fn cont(call: Call<'_>) -> Result<Value, Refusal> {
    let force = call.arguments().is_true("x-force");
    if call.arguments().is_true("x-take-back") {
        let rule = if force { TakeBack::Anyway } else { TakeBack::WhenSilent };
        call.vm.take_back(rule).map_err(Refusal::generic)?;
    }
    done(if force { call.vm.cont_anyway() } else { call.vm.cont() })
}

fn x_verify(call: Call<'_>) -> Result<Value, Refusal> {
    let verification = call.vm.verify().map_err(Refusal::generic)?;
    let mut members = match verification.report {
        Value::Object(members) => members,
        other => Map::from_iter([("report".to_owned(), other)]),
    };
    members.insert("verified".to_owned(), verification.good.into());
    members.insert("summary".to_owned(), verification.summary.into());
    Ok(Value::Object(members))
}

fn human_monitor_command(call: Call<'_>) -> Result<Value, Refusal> {
    let arguments = call.arguments();
    // No line of ours is about one CPU's registers, but what is given must be a CPU's number.
    if let Some(index) = arguments.integer("cpu-index")
        && index.as_u64().and_then(|index| u32::try_from(index).ok()).is_none()
    {
        return Err(Refusal::generic("Parameter 'cpu-index' expects a CPU number"));
    }
    let mut human = call.human.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(human.answer(call.vm, arguments.required(super::HUMAN_LINE)).into())
}
