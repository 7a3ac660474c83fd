//! File descriptors that come with commands.

use serde_json::{Value, json};

use super::{Call, Command, GETFD, NOTHING, Oob};
use crate::protocol::Refusal;
use crate::schema::{Object, Type, required};

pub(super) static COMMANDS: &[Command] = &[
    Command {
        name: GETFD,
        help: "Keeps the file descriptor that came with the command (`SCM_RIGHTS`), for `fd:NAME` of any client.",
        takes: &NAME,
        gives: NOTHING,
        oob: Oob::Refused,
        run: getfd,
    },
    Command {
        name: "closefd",
        help: "Closes a descriptor that `getfd` keeps.",
        takes: &NAME,
        gives: NOTHING,
        oob: Oob::Refused,
        run: closefd,
    },
];

static NAME: Object = Object::of("DescriptorName", &[required("fdname", Type::Str)]);

fn getfd(mut call: Call<'_>) -> Result<Value, Refusal> {
    let descriptor = call.descriptor.take();
    let descriptor = descriptor.ok_or_else(|| Refusal::generic("No file descriptor supplied via SCM_RIGHTS"))?;
    let kept = call.vm.descriptors().keep(call.arguments().required("fdname"), descriptor);
    kept.map(|()| json!({})).map_err(Refusal::generic)
}

fn closefd(call: Call<'_>) -> Result<Value, Refusal> {
    let taken = call.vm.descriptors().take(call.arguments().required("fdname"));
    taken.map(|_| json!({})).map_err(Refusal::generic)
}
