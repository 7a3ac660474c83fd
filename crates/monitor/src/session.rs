//! One client's dialogue: greeting, negotiation, then commands until it goes.

use std::io::{self, BufReader, Read, Write};
use std::os::unix::net::UnixStream;

use serde_json::{Value, json};

use crate::commands;
use crate::framing::Splitter;
use crate::protocol::{self, Refusal, Request};
use crate::vm::Vm;

const NEGOTIATE: &str = "qmp_capabilities";

/// Serves a client until it closes.
///
/// # Errors
/// When it cannot be read from or written to.
pub(crate) fn serve(stream: &UnixStream, vm: &Vm) -> io::Result<()> {
    send(stream, &protocol::greeting())?;
    let mut session = Session { vm, negotiated: false };
    let mut splitter = Splitter::new();
    for byte in BufReader::new(stream).bytes() {
        let Some(text) = splitter.push(byte?) else { continue };
        let quits = match text {
            Err(error) => {
                send(stream, &protocol::reply(None, Err(error.into())))?;
                false
            }
            Ok(text) => session.answer(stream, &text)?,
        };
        if quits {
            vm.request_quit();
        }
    }
    Ok(())
}

struct Session<'a> {
    vm: &'a Vm,
    negotiated: bool,
}

impl Session<'_> {
    /// Answers one request; tells whether the machine is to end.
    fn answer(&mut self, stream: &UnixStream, text: &[u8]) -> io::Result<bool> {
        let (id, request) = protocol::parse_request(text);
        let mut quits = false;
        let outcome = request.and_then(|request| {
            quits = request.command == commands::QUIT;
            self.run(&request)
        });
        quits &= outcome.is_ok();
        // Even if the client is gone before it hears the answer: it did ask.
        let sent = send(stream, &protocol::reply(id, outcome));
        if quits { Ok(true) } else { sent.map(|()| false) }
    }

    fn run(&mut self, request: &Request) -> Result<Value, Refusal> {
        match (request.command.as_str(), self.negotiated) {
            (NEGOTIATE, false) => {
                commands::check_no_capabilities(&request.arguments)?;
                self.negotiated = true;
                Ok(json!({}))
            }
            (NEGOTIATE, true) => {
                Err(Refusal::not_found("Capabilities negotiation is already complete, command ignored"))
            }
            (_, false) => Err(Refusal::not_found("Expecting capabilities negotiation with 'qmp_capabilities'")),
            (command, true) => commands::execute(self.vm, command, &request.arguments),
        }
    }
}

/// Sends one value on a line of its own.
pub(crate) fn send(mut stream: &UnixStream, value: &Value) -> io::Result<()> {
    stream.write_all(format!("{value}\r\n").as_bytes())
}
