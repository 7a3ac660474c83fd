//! Clients written for QEMU, by others: PyPI's `qemu.qmp` drives whole migrations between real processes.

// Clippy's exception for tests does not reach the functions that they call.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout)]

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The repository.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Python that can import `qemu.qmp`, which `.ci/run` puts under `target`; or why there is none.
fn python() -> Result<Command, String> {
    let packages = root().join("target/qmp-python");
    let mut paths = vec![packages];
    paths.extend(std::env::split_paths(&std::env::var_os("PYTHONPATH").unwrap_or_default()));
    let path = std::env::join_paths(paths).unwrap();
    let python = || {
        let mut python = Command::new("python3");
        python.env("PYTHONPATH", &path).env("PYTHONDONTWRITEBYTECODE", "1");
        python
    };
    match python().args(["-c", "import qemu.qmp"]).output() {
        Err(error) => Err(format!("no python3: {error}")),
        Ok(outcome) if outcome.status.success() => Ok(python()),
        Ok(_) => Err("no qemu.qmp; `pip install --target target/qmp-python qemu.qmp` gets it".to_owned()),
    }
}

#[test]
fn qemu_qmp_drives_whole_migrations() {
    let mut python = match python() {
        Ok(python) => python,
        Err(why) => return println!("skipped: {why}"),
    };
    let directory = tempfile::tempdir().unwrap();
    let script = root().join("tests/qmp/drive.py");
    let outcome = python.arg(script).arg(env!("CARGO_BIN_EXE_dunlin")).arg(directory.path()).output().unwrap();
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        outcome.status.success() && said(&outcome.stdout).ends_with("driven\n"),
        "{}{}",
        said(&outcome.stdout),
        said(&outcome.stderr)
    );
}

/// The `dunlin` command reaches a machine at a TCP port as well.
#[test]
fn our_own_commands_over_tcp() {
    let dunlin = env!("CARGO_BIN_EXE_dunlin");
    let directory = tempfile::tempdir().unwrap();
    let unix = format!("unix:{}", directory.path().join("qmp").display());
    let mut machine = Command::new(dunlin)
        .args(["run", "--memory", "16M", "--qmp", &unix, "--qmp", "tcp:127.0.0.1:0"])
        .args(["--exit-with-parent", &std::process::id().to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    BufReader::new(machine.stdout.take().unwrap()).read_line(&mut said).unwrap();
    let (_, addresses) = said.trim().split_once("QMP at ").unwrap();
    let tcp = addresses.strip_prefix(&format!("{unix}, ")).unwrap();
    for (command, wanted) in [("status", "running here"), ("stop", "paused"), ("verify", "verified"), ("quit", "ended")]
    {
        let outcome = Command::new(dunlin).args([command, "--qmp", tcp]).output().unwrap();
        let text = String::from_utf8_lossy(&outcome.stdout).into_owned();
        assert!(outcome.status.success() && text.contains(wanted), "{command}: {outcome:?}");
    }
    assert!(machine.wait().unwrap().success());
    let gone = Command::new(dunlin).args(["status", "--qmp", tcp]).output().unwrap();
    let text = String::from_utf8_lossy(&gone.stderr).into_owned();
    assert!(!gone.status.success() && text.contains(&format!("no machine answers at {tcp}")), "{text}");
}
