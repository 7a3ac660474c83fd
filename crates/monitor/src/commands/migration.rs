//! Commands on migrations.

use dunlin::Status;
use serde::Deserialize;
use serde::de::IntoDeserializer;
use serde::de::value::{Error as StatusError, StrDeserializer};
use serde_json::Value;

use super::{Call, Command, NOTHING, Oob, done};
use crate::migration_info;
use crate::protocol::Refusal;
use crate::route::Route;
use crate::schema::{self, Object, Type, optional, required};
use crate::types::{CHANNEL, MIGRATION_STATUS};

pub(super) static COMMANDS: &[Command] = &[
    Command {
        name: "migrate",
        help: "Starts a migration to `uri`, or to the one main entry of `channels`; returns at once, so `detach` says \
               nothing. `resume` asks again for a guest that \
               was released and not heard of, where it was released to.",
        takes: &MIGRATE,
        gives: NOTHING,
        oob: Oob::Refused,
        run: migrate,
    },
    Command {
        name: "migrate-incoming",
        help: "Waits for a migration at `uri`, or at the one main entry of `channels`: after `--incoming defer`, or when \
               the guest has gone: it may come back. The process never exits because of a migration, whatever \
               `exit-on-error` says.",
        takes: &MIGRATE_INCOMING,
        gives: NOTHING,
        oob: Oob::Refused,
        run: |call| done(call.vm.listen_at(Route::of_arguments(call.arguments())?)),
    },
    Command {
        name: "migrate_cancel",
        help: "Ends the migration, on either side. Not an error when none runs.",
        takes: &schema::NOTHING,
        gives: NOTHING,
        oob: Oob::Refused,
        run: |call| done(call.vm.cancel()),
    },
    Command {
        name: "migrate-continue",
        help: "Has a migration go on that waits in `state`, which can be `pre-switchover`.",
        takes: &MIGRATE_CONTINUE,
        gives: NOTHING,
        oob: Oob::Refused,
        run: migrate_continue,
    },
    Command {
        name: "migrate-pause",
        help: "Breaks the link of a postcopy, of which there is none yet: refused in QEMU's words.",
        takes: &schema::NOTHING,
        gives: NOTHING,
        oob: Oob::Allowed,
        run: |_| {
            Err(Refusal::generic(
                "migrate-pause is currently only supported during postcopy-active or postcopy-recover state",
            ))
        },
    },
    Command {
        name: "query-migrate",
        help: "The latest migration, out or in, in QEMU's fields and units.",
        takes: &schema::NOTHING,
        gives: Type::Object(&migration_info::MIGRATION_INFO),
        oob: Oob::Refused,
        run: |call| Ok(call.vm.migration_info()),
    },
    Command {
        name: "query-migration-report",
        help: "The latest migration in our own report: bytes and seconds, on both sides alike, and after a failure too. \
               `null` when there was none.",
        takes: &schema::NOTHING,
        gives: Type::Any,
        oob: Oob::Refused,
        run: |call| serde_json::to_value(call.vm.report()).map_err(Refusal::generic),
    },
];

static MIGRATE: Object = Object::of(
    "Migrate",
    &[
        optional("uri", Type::Str),
        optional("channels", Type::Array(&Type::Object(&CHANNEL))),
        optional("detach", Type::Bool),
        optional("resume", Type::Bool),
    ],
);

static MIGRATE_INCOMING: Object = Object::of(
    "MigrateIncoming",
    &[
        optional("uri", Type::Str),
        optional("channels", Type::Array(&Type::Object(&CHANNEL))),
        optional("exit-on-error", Type::Bool),
    ],
);

static MIGRATE_CONTINUE: Object = Object::of("MigrateContinue", &[required("state", MIGRATION_STATUS)]);

fn migrate(call: Call<'_>) -> Result<Value, Refusal> {
    let arguments = call.arguments();
    if arguments.is_true("resume") {
        let says_where = arguments.has("uri") || arguments.has("channels");
        let route = if says_where { Some(Route::of_arguments(arguments)?) } else { None };
        return done(call.vm.reconnect(route.as_ref()));
    }
    done(call.vm.migrate_by(Route::of_arguments(arguments)?))
}

fn migrate_continue(call: Call<'_>) -> Result<Value, Refusal> {
    let text: StrDeserializer<'_, StatusError> = call.arguments().required("state").into_deserializer();
    let waiting_in = Status::deserialize(text).map_err(Refusal::generic)?;
    done(call.vm.resume_switchover(waiting_in))
}
