//! Clients written for QEMU, by others: PyPI's `qemu.qmp` drives whole migrations between real processes.

// Clippy's exception for tests does not reach the functions that they call.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout)]

use std::path::{Path, PathBuf};
use std::process::Command;

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
