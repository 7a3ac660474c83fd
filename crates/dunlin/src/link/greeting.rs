//! The first words on a connection, and finding out who answers when it is not a Dunlin destination.

use std::io::{ErrorKind, IoSlice};
use std::time::Duration;

use crate::channel::Connection;
use crate::error::{Cause, Side};
use crate::wire::{Hello, HelloReply, REPLY_BYTES, Role, SessionId, WireError, check_beginning};

/// How long who answers with something else may take to say a little more, so that it can be named.
const MORE: Duration = Duration::from_millis(200);
/// How much of it is enough.
const ENOUGH: usize = 64;

/// Says hello on a new connection and waits for the answer: for `silence` until it begins, then for `timeout`.
pub(crate) fn say_hello(
    connection: &Connection,
    role: Role,
    session: SessionId,
    silence: Duration,
    timeout: Duration,
) -> Result<(), Cause> {
    let hello = Hello { role, session };
    connection.set_receive_timeout(Some(silence))?;
    connection.set_send_timeout(Some(timeout))?;
    let sent = connection.send_all(&mut [IoSlice::new(&hello.encode())]);
    let answer = match sent {
        Ok(()) => await_answer(connection, silence, timeout),
        // Whoever has gone may have said something before, which says more than that it has gone.
        Err(gone) => {
            connection.set_receive_timeout(Some(MORE))?;
            let said = await_answer(connection, MORE, MORE);
            said.map_err(|said| if matches!(said, Cause::Wire { .. }) { said } else { gone })
        }
    };
    let answer = answer.map_err(|cause| connection.explain(cause))?;
    connection.set_receive_timeout(None)?;
    match HelloReply::decode(&answer) {
        Ok(HelloReply::Welcome) => Ok(()),
        Ok(HelloReply::Refused { reason }) => Err(Cause::Refused { by: Side::Destination, reason }),
        Err(source) => Err(connection.explain(Cause::Wire { channel: connection.name().to_owned(), source })),
    }
}

/// Receives the answer, and finds out at its first wrong byte that it is none.
fn await_answer(connection: &Connection, silence: Duration, timeout: Duration) -> Result<[u8; REPLY_BYTES], Cause> {
    let channel = || connection.name().to_owned();
    let mut answer = [0; REPLY_BYTES];
    let mut filled = 0usize;
    let mut stranger: Option<WireError> = None;
    while let Some(space) = answer.get_mut(filled..).filter(|space| !space.is_empty()) {
        let came = connection.recv_some(space);
        if let Ok(got @ 1..) = came {
            let first = filled == 0;
            filled = filled.saturating_add(got);
            stranger = check_beginning(answer.get(..filled).unwrap_or_default()).err();
            if stranger.is_some() && filled >= ENOUGH {
                break;
            }
            if first || stranger.is_some() {
                connection.set_receive_timeout(Some(if stranger.is_some() { MORE } else { timeout }))?;
            }
            continue;
        }
        // What has come before the end says who is there.
        if stranger.is_some() {
            break;
        }
        let kind = match &came {
            Err(Cause::Io { source, .. }) => Some(source.kind()),
            _ => None,
        };
        return Err(match (came, kind) {
            (Ok(_), _) | (_, Some(ErrorKind::ConnectionReset)) if filled == 0 => {
                Cause::Unanswered { channel: channel() }
            }
            (_, Some(ErrorKind::TimedOut)) if filled == 0 => Cause::Mute { channel: channel(), after: silence },
            (Ok(_), _) => Cause::Closed { channel: channel() },
            (Err(cause), _) => cause,
        });
    }
    match stranger {
        Some(source) => Err(Cause::Wire { channel: channel(), source }),
        None => Ok(answer),
    }
}

/// Answers a hello.
pub(crate) fn answer_hello(connection: &Connection, reply: &HelloReply) -> Result<(), Cause> {
    connection.send_all(&mut [IoSlice::new(&reply.encode())])
}
