//! A machine that has no RAM, served on a real socket, and a client that sends what it likes.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use dunlin::machine::{Machine, MachineError, StateSection};
use dunlin::memory::{DirtyTracker, Ram};
use dunlin::{Guest, StartPermit, SwitchoverCost};
use dunlin_monitor::{Server, Vm};
use serde_json::{Value, json};

pub struct Tiny {
    ram: Ram,
}

impl Machine for Tiny {
    fn ram(&self) -> &Ram {
        &self.ram
    }
    fn dirty_tracker(&self) -> Result<Box<dyn DirtyTracker>, MachineError> {
        Err("it has nothing to track".into())
    }
    fn profile(&self) -> Vec<u8> {
        Vec::new()
    }
    fn accept_profile(&self, _: &[u8]) -> Result<(), MachineError> {
        Ok(())
    }
    fn switchover_cost(&self) -> SwitchoverCost {
        SwitchoverCost::default()
    }
    fn pause(&self) -> Result<(), MachineError> {
        Ok(())
    }
    fn resume(&self, _: &StartPermit) -> Result<(), MachineError> {
        Ok(())
    }
    fn save(&self) -> Result<Vec<StateSection>, MachineError> {
        Ok(Vec::new())
    }
    fn load(&self, _: Vec<StateSection>) -> Result<(), MachineError> {
        Ok(())
    }
}

pub fn tiny() -> Arc<dyn Machine> {
    Arc::new(Tiny { ram: Ram::new(Vec::new()).unwrap() })
}

pub struct Served {
    pub server: Option<Server>,
    pub vm: Arc<Vm>,
    pub path: PathBuf,
    _directory: tempfile::TempDir,
}

pub fn serve(vm: Arc<Vm>) -> Served {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("qmp");
    let server = Some(Server::start(&path, &vm).unwrap());
    Served { server, vm, path, _directory: directory }
}

pub fn serve_tiny() -> Served {
    serve(Vm::new(Guest::new(tiny()), None))
}

pub struct Raw(pub BufReader<UnixStream>);

impl Raw {
    pub fn connect(served: &Served) -> Self {
        let stream = UnixStream::connect(&served.path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        Self(BufReader::new(stream))
    }

    pub fn negotiated(served: &Served) -> Self {
        let mut raw = Self::connect(served);
        raw.line();
        assert_eq!(raw.ask(r#"{"execute": "qmp_capabilities"}"#), json!({"return": {}}));
        raw
    }

    pub fn write(&self, text: &str) {
        let _ = self.0.get_ref().write_all(text.as_bytes());
    }

    pub fn line(&mut self) -> Value {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    pub fn ask(&mut self, text: &str) -> Value {
        self.write(&format!("{text}\n"));
        self.line()
    }
}
