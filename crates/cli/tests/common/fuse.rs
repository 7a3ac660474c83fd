//! A file system with one file, whose storage can be made to hang.
//!
//! The test process answers the kernel's requests itself, by the protocol of `/dev/fuse`; all numbers here are that protocol's.
//! While storage hangs, requests that write are carried out but not answered, as by a server that is lost. Whatever waits
//! for an answer then cannot be ended, not even by SIGKILL, unless the storage is [`Patience::UntilKilled`].

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, UNIX_EPOCH};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

const FILE_NAME: &[u8] = b"disk";
const ROOT: u64 = 1;
const FILE: u64 = 2;
const WRITE_BYTES: u32 = 128 << 10;
/// Longer than any request.
const BUFFER_BYTES: usize = (WRITE_BYTES as usize) + (64 << 10);
const HEADER_BYTES: usize = 40;

/// How long one who waits for storage that hangs has to wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patience {
    /// Until the storage answers, as for a local disk.
    ForEver,
    /// Until a signal ends the process, as for NFS.
    UntilKilled,
}

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    Write,
    Flush,
    Fsync,
}

#[derive(Default)]
struct State {
    data: Vec<u8>,
    /// When the file was last written.
    written: (u64, u32),
    hangs: Vec<Request>,
    interruptible: bool,
    /// Numbers and answers of the requests that hang.
    held: Vec<(u64, Vec<u8>)>,
}

struct Shared {
    device: File,
    state: Mutex<State>,
}

/// The file system, mounted until this is dropped.
pub struct HangingStorage {
    shared: Arc<Shared>,
    directory: tempfile::TempDir,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn answer(&self, unique: u64, error: i32, body: &[u8]) {
        let mut reply = Vec::with_capacity(16 + body.len());
        reply.extend(u32::try_from(16 + body.len()).unwrap().to_ne_bytes());
        reply.extend((-error).to_ne_bytes());
        reply.extend(unique.to_ne_bytes());
        reply.extend(body);
        // Whoever asked may be gone.
        let _ = (&self.device).write(&reply);
    }

    fn release(&self) {
        let held = {
            let mut state = self.state();
            state.hangs.clear();
            std::mem::take(&mut state.held)
        };
        for (unique, body) in held {
            self.answer(unique, 0, &body);
        }
    }

    fn serve(&self) {
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            match (&self.device).read(&mut buffer) {
                Ok(length) if length >= HEADER_BYTES => self.handle(&buffer[..length]),
                Err(error) if [libc_code::EINTR, libc_code::ENOENT].contains(&error.raw_os_error().unwrap_or(0)) => {}
                // It was unmounted.
                _ => return,
            }
        }
    }

    fn handle(&self, request: &[u8]) {
        let (opcode, unique, node) = (u32_at(request, 4), u64_at(request, 8), u64_at(request, 16));
        let given = &request[HEADER_BYTES..];
        let mut hangs_as = None;
        let answer = match opcode {
            // FORGET, BATCH_FORGET
            2 | 42 => return,
            // INTERRUPT
            36 => return self.interrupt(u64_at(given, 0)),
            // LOOKUP
            1 if node == ROOT && given.strip_suffix(b"\0") == Some(FILE_NAME) => {
                let mut entry = Vec::new();
                entry.extend(FILE.to_ne_bytes());
                entry.extend([0; 32]);
                entry.extend(attributes(&self.state(), FILE));
                Ok(entry)
            }
            1 => Err(libc_code::ENOENT),
            // GETATTR
            3 => Ok(attributes_answer(&self.state(), node)),
            // SETATTR
            4 => {
                let mut state = self.state();
                let valid = u32_at(given, 0);
                if valid & 1 << 3 != 0 {
                    state.data.resize(usize::try_from(u64_at(given, 16)).unwrap(), 0);
                }
                if valid & 1 << 8 != 0 {
                    state.written = now();
                } else if valid & 1 << 5 != 0 {
                    state.written = (u64_at(given, 40), u32_at(given, 60));
                }
                Ok(attributes_answer(&state, node))
            }
            // OPEN, OPENDIR
            14 | 27 => Ok(vec![0; 16]),
            // READ
            15 => {
                let (offset, size) = (usize::try_from(u64_at(given, 8)).unwrap(), u32_at(given, 16) as usize);
                let state = self.state();
                let start = offset.min(state.data.len());
                let end = offset.saturating_add(size).min(state.data.len());
                Ok(state.data[start..end].to_vec())
            }
            // WRITE
            16 => {
                hangs_as = Some(Request::Write);
                let (offset, size) = (usize::try_from(u64_at(given, 8)).unwrap(), u32_at(given, 16) as usize);
                let mut state = self.state();
                let end = offset + size;
                if state.data.len() < end {
                    state.data.resize(end, 0);
                }
                state.data[offset..end].copy_from_slice(&given[40..40 + size]);
                state.written = now();
                Ok([u32_at(given, 16).to_ne_bytes(), [0; 4]].concat())
            }
            // STATFS
            17 => {
                let mut found = vec![0; 80];
                found[40..44].copy_from_slice(&4096u32.to_ne_bytes());
                found[44..48].copy_from_slice(&255u32.to_ne_bytes());
                Ok(found)
            }
            // RELEASE, RELEASEDIR
            18 | 29 => Ok(Vec::new()),
            // FSYNC
            20 => {
                hangs_as = Some(Request::Fsync);
                Ok(Vec::new())
            }
            // FLUSH, which each close(2) waits for
            25 => {
                hangs_as = Some(Request::Flush);
                Ok(Vec::new())
            }
            // INIT
            26 => {
                let mut agreed = Vec::new();
                for number in [7, 31, 64 << 10, 0, 16 | 12 << 16, WRITE_BYTES, 1, 0] {
                    agreed.extend(u32::to_ne_bytes(number));
                }
                agreed.resize(64, 0);
                Ok(agreed)
            }
            _ => Err(libc_code::ENOSYS),
        };
        if let (Some(kind), Ok(body)) = (hangs_as, &answer) {
            let mut state = self.state();
            if state.hangs.contains(&kind) {
                state.held.push((unique, body.clone()));
                return;
            }
        }
        match answer {
            Ok(body) => self.answer(unique, 0, &body),
            Err(error) => self.answer(unique, error, &[]),
        }
    }

    fn interrupt(&self, unique: u64) {
        let mut state = self.state();
        if state.interruptible && state.held.iter().any(|(held, _)| *held == unique) {
            state.held.retain(|(held, _)| *held != unique);
            drop(state);
            self.answer(unique, libc_code::EINTR, &[]);
        }
    }
}

impl HangingStorage {
    /// Mounts one whose file has so many bytes; says why if that cannot be.
    pub fn mount(bytes: usize) -> Result<Self, String> {
        if !rustix::process::geteuid().is_root() {
            return Err("only root may mount".to_owned());
        }
        let device = File::options().read(true).write(true).open("/dev/fuse");
        let device = device.map_err(|error| format!("could not open /dev/fuse: {error}"))?;
        let directory = tempfile::tempdir().unwrap();
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
        let options = std::ffi::CString::new(options).unwrap();
        mount("dunlin-test", directory.path(), "fuse", MountFlags::NOSUID | MountFlags::NODEV, Some(&*options))
            .map_err(|error| format!("could not mount: {error}"))?;
        let state = State { data: vec![0; bytes], written: now(), ..State::default() };
        let shared = Arc::new(Shared { device, state: Mutex::new(state) });
        let serves = shared.clone();
        // Ends when the file system is unmounted.
        thread::spawn(move || serves.serve());
        Ok(Self { shared, directory })
    }

    /// The file.
    pub fn file(&self) -> PathBuf {
        self.mountpoint().join("disk")
    }

    fn mountpoint(&self) -> &Path {
        self.directory.path()
    }

    /// Has such requests hang from now on, until what this gives is dropped.
    #[must_use]
    pub fn hang(&self, requests: &[Request], patience: Patience) -> Hang<'_> {
        let mut state = self.shared.state();
        state.hangs = requests.to_vec();
        state.interruptible = patience == Patience::UntilKilled;
        Hang(&self.shared)
    }
}

impl Drop for HangingStorage {
    fn drop(&mut self) {
        self.shared.release();
        let _ = unmount(self.mountpoint(), UnmountFlags::DETACH);
    }
}

/// While it lives storage hangs.
pub struct Hang<'a>(&'a Shared);

impl Hang<'_> {
    /// How many requests hang.
    pub fn held(&self) -> usize {
        self.0.state().held.len()
    }

    /// Storage answers again.
    pub fn release(self) {}
}

impl Drop for Hang<'_> {
    fn drop(&mut self) {
        self.0.release();
    }
}

fn now() -> (u64, u32) {
    let now: Duration = UNIX_EPOCH.elapsed().unwrap();
    (now.as_secs(), now.subsec_nanos())
}

fn attributes(state: &State, node: u64) -> Vec<u8> {
    let (mode, size) = if node == ROOT { (0o40755, 0) } else { (0o100_600, state.data.len() as u64) };
    let (seconds, nanoseconds) = state.written;
    let mut found = Vec::new();
    for number in [node, size, size.div_ceil(512), seconds, seconds, seconds] {
        found.extend(number.to_ne_bytes());
    }
    for number in [nanoseconds, nanoseconds, nanoseconds, mode, 1, 0, 0, 0, 4096, 0] {
        found.extend(number.to_ne_bytes());
    }
    found
}

/// Attributes that hold for no time: each look asks again.
fn attributes_answer(state: &State, node: u64) -> Vec<u8> {
    [vec![0; 16], attributes(state, node)].concat()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Error numbers of Linux.
mod libc_code {
    pub const ENOENT: i32 = 2;
    pub const EINTR: i32 = 4;
    pub const ENOSYS: i32 = 38;
}
