//! A cgroup with limits of its own, of whichever version has the controller here.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::common::{DUNLIN, until};

/// Removed when dropped, with the controllers that had to be turned on for it. Its processes must have ended by then.
pub struct Cgroup {
    directory: PathBuf,
    version: u8,
    turned_on: Option<(PathBuf, &'static str)>,
}

impl Cgroup {
    /// Makes one for a controller, such as `memory`; says why if that cannot be.
    pub fn new(controller: &'static str) -> Result<Self, String> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        if !rustix::process::geteuid().is_root() {
            return Err("only root may make cgroups".to_owned());
        }
        let (top, version) = find(controller)?;
        let mut turned_on = None;
        if version == 2 {
            let subtree = top.join("cgroup.subtree_control");
            let has = |text: String| text.split_whitespace().any(|name| name == controller);
            if !has(fs::read_to_string(&subtree).map_err(|error| error.to_string())?) {
                fs::write(&subtree, format!("+{controller}"))
                    .map_err(|error| format!("the controller {controller} cannot be turned on: {error}"))?;
                turned_on = Some((subtree, controller));
            }
        }
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let directory = top.join(format!("dunlin-test-{}-{number}", std::process::id()));
        fs::create_dir(&directory).map_err(|error| format!("no cgroup can be made: {error}"))?;
        Ok(Self { directory, version, turned_on })
    }

    /// One within it, without limits so far.
    pub fn nested(&self, name: &str) -> Self {
        if self.version == 2 {
            let available = fs::read_to_string(self.directory.join("cgroup.controllers")).unwrap();
            for controller in available.split_whitespace() {
                fs::write(self.directory.join("cgroup.subtree_control"), format!("+{controller}")).unwrap();
            }
        }
        let directory = self.directory.join(name);
        fs::create_dir(&directory).unwrap();
        Self { directory, version: self.version, turned_on: None }
    }

    fn file(&self, version_1: &str, version_2: &str) -> PathBuf {
        self.directory.join(if self.version == 1 { version_1 } else { version_2 })
    }

    /// Limits memory; gives the file that says so.
    pub fn limit_memory(&self, bytes: u64) -> PathBuf {
        let file = self.file("memory.limit_in_bytes", "memory.max");
        fs::write(&file, bytes.to_string()).unwrap();
        // Without swap: what is over the limit is killed.
        let _ = fs::write(self.file("memory.swappiness", "memory.swap.max"), "0");
        file
    }

    /// Limits huge pages of 2 MiB; gives the file that says so.
    pub fn limit_huge_pages(&self, bytes: u64) -> PathBuf {
        let file = self.file("hugetlb.2MB.limit_in_bytes", "hugetlb.2MB.max");
        fs::write(&file, bytes.to_string()).unwrap();
        file
    }

    /// The most memory that its processes took at any time.
    pub fn peak(&self) -> u64 {
        number(&self.file("memory.max_usage_in_bytes", "memory.peak"))
    }

    /// Bytes of huge pages of 2 MiB that its processes have.
    pub fn huge_pages(&self) -> u64 {
        number(&self.file("hugetlb.2MB.usage_in_bytes", "hugetlb.2MB.current"))
    }

    /// Whether a process is in it.
    pub fn holds(&self, pid: u32) -> bool {
        let procs = fs::read_to_string(self.directory.join("cgroup.procs")).unwrap();
        procs.lines().any(|line| line == pid.to_string())
    }

    /// A command that becomes `dunlin` in this cgroup, with the arguments that follow.
    pub fn dunlin(&self) -> Command {
        let mut command = Command::new("sh");
        let procs = self.directory.join("cgroup.procs");
        command.args(["-c", "echo $$ >\"$0\" && exec \"$@\""]).arg(procs).arg(DUNLIN);
        command
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // A process that was killed is in it for a moment more.
        let gone = || (fs::remove_dir(&self.directory).is_ok() || !self.directory.exists()).then_some(());
        if !std::thread::panicking() {
            until("the cgroup can be removed", Duration::from_secs(20), gone);
        } else {
            let _ = gone();
        }
        if let Some((subtree, controller)) = &self.turned_on {
            // Others may use it by now.
            let _ = fs::write(subtree, format!("-{controller}"));
        }
    }
}

fn number(file: &Path) -> u64 {
    let text = fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    text.trim().parse().unwrap()
}

/// The topmost folder of a controller, and its version.
fn find(controller: &str) -> Result<(PathBuf, u8), String> {
    let mounts = fs::read_to_string("/proc/self/mounts").map_err(|error| error.to_string())?;
    for line in mounts.lines() {
        let mut words = line.split(' ').skip(1);
        let (Some(point), Some(kind), Some(options)) = (words.next(), words.next(), words.next()) else { continue };
        let point = PathBuf::from(point);
        if kind == "cgroup" && options.split(',').any(|option| option == controller) {
            return Ok((point, 1));
        }
        let controllers = fs::read_to_string(point.join("cgroup.controllers")).unwrap_or_default();
        if kind == "cgroup2" && controllers.split_whitespace().any(|name| name == controller) {
            return Ok((point, 2));
        }
    }
    Err(format!("no cgroup here has the controller {controller}"))
}
