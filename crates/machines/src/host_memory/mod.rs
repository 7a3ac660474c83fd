//! How much memory this process can still have: what the host has left, what the cgroups of this process leave, and what
//! is in the pools of huge pages.
//!
//! A guest that fills more than that does not get an error: the kernel ends its process, or sends it SIGBUS where huge pages
//! are limited. So whoever makes a machine compares before. What must stay true: everything here is read from files of the
//! kernel, and a file that is missing or unreadable is told and never an end.

mod cgroups;
mod files;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use dunlin::units::format_size;

use cgroups::{Cgroup, Version};

/// A host's accounts of its memory, as files.
#[derive(Debug, Clone)]
pub struct HostMemory {
    root: PathBuf,
}

/// What could not be found out about memory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HostMemoryError {
    /// A file could not be read.
    #[error("could not read {}: {source}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A file holds something unexpected.
    #[error("{} holds {text:?}, which is not {expected}", path.display())]
    Parse {
        /// Which file.
        path: PathBuf,
        /// What it holds, or the part of it that is wrong.
        text: String,
        /// What it should hold.
        expected: &'static str,
    },
    /// A cgroup of this process cannot be seen in any mounted file system.
    #[error("the cgroup {cgroup} of this process is not in any cgroup file system that is mounted here")]
    HiddenCgroup {
        /// Its path, as the kernel tells it.
        cgroup: String,
    },
}

/// Who sets a limit.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Limiter {
    /// The host has no more.
    Host,
    /// A file of a cgroup.
    Cgroup {
        /// Which file.
        file: PathBuf,
        /// What it allows to all processes of the cgroup together.
        limit_bytes: u64,
    },
    /// A pool of huge pages.
    Pool {
        /// The pool's folder.
        directory: PathBuf,
    },
}

/// How much memory a limit leaves to this process.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limit {
    /// Bytes that fit into the host's memory.
    pub memory_bytes: u64,
    /// Bytes that fit into swap besides.
    pub swap_bytes: u64,
    /// Who sets the limit.
    pub limiter: Limiter,
}

impl Limit {
    /// Bytes of memory and swap together: with more than that, the kernel ends a process.
    pub fn total_bytes(&self) -> u64 {
        self.memory_bytes.saturating_add(self.swap_bytes)
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let left = format_size(self.total_bytes());
        match &self.limiter {
            Limiter::Host if self.swap_bytes > 0 => {
                write!(f, "this host has {left} available ({} of it swap)", format_size(self.swap_bytes))
            }
            Limiter::Host => write!(f, "this host has {left} available"),
            Limiter::Cgroup { file, limit_bytes } => {
                write!(f, "the cgroup has {left} left of {} ({})", format_size(*limit_bytes), file.display())
            }
            Limiter::Pool { directory } => {
                write!(f, "the host's pool of huge pages has {left} free ({})", directory.display())
            }
        }
    }
}

/// All limits that were found.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct Available {
    /// The limits. Memory is there as far as every one of them allows.
    pub limits: Vec<Limit>,
    /// What could not be found out: there may be more limits.
    pub unknown: Vec<HostMemoryError>,
}

impl Available {
    /// The limit that leaves least.
    pub fn tightest(&self) -> Option<&Limit> {
        self.limits.iter().min_by_key(|limit| limit.total_bytes())
    }

    /// The limit that leaves least without swap.
    pub fn tightest_without_swap(&self) -> Option<&Limit> {
        self.limits.iter().min_by_key(|limit| limit.memory_bytes)
    }
}

impl Default for HostMemory {
    fn default() -> Self {
        Self::under("/")
    }
}

impl HostMemory {
    /// The accounts in `/proc` and `/sys` of a file system whose root is `root`.
    pub fn under(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// What is available of ordinary pages, transparent huge pages included: `MemAvailable` of the host, and what the
    /// process's cgroup and those above it leave of `memory.max` and `memory.high` (in version 1, of
    /// `memory.limit_in_bytes` and `memory.memsw.limit_in_bytes`).
    ///
    /// Files in the page cache count as available, since the kernel gives them up first.
    pub fn ordinary(&self) -> Available {
        let mut available = Available::default();
        let swap_free = self.host(&mut available);
        for cgroup in self.cgroups(&mut available) {
            cgroup.memory_limits(swap_free, &mut available);
        }
        available
    }

    /// What is available of huge pages of `page_bytes` from the host's pool: pages that are free and not reserved, pages
    /// that the pool may grow by, and what the process's cgroup and those above it leave of `hugetlb.SIZE.max` and
    /// `hugetlb.SIZE.rsvd.max` (in version 1, `limit_in_bytes`).
    pub fn huge_pages(&self, page_bytes: u64) -> Available {
        let mut available = Available::default();
        match self.pool(page_bytes) {
            Ok(limit) => available.limits.push(limit),
            Err(error) => available.unknown.push(error),
        }
        for cgroup in self.cgroups(&mut available) {
            cgroup.huge_page_limits(page_bytes, &mut available);
            if cgroup.charges_huge_pages {
                cgroup.memory_limits(0, &mut available);
            }
        }
        available
    }

    /// Adds what the host has available; gives how much of its swap is free.
    fn host(&self, available: &mut Available) -> u64 {
        let found = files::read(&self.root.join("proc/meminfo")).and_then(|(path, text)| {
            let field = |name| files::field(&path, &text, name);
            Ok((files::kib(field("MemAvailable:")?), files::kib(field("SwapFree:")?)))
        });
        match found {
            Ok((memory_bytes, swap_bytes)) => {
                available.limits.push(Limit { memory_bytes, swap_bytes, limiter: Limiter::Host });
                swap_bytes
            }
            Err(error) => {
                available.unknown.push(error);
                0
            }
        }
    }

    fn pool(&self, page_bytes: u64) -> Result<Limit, HostMemoryError> {
        let directory = self.root.join(format!("sys/kernel/mm/hugepages/hugepages-{}kB", page_bytes / 1024));
        let number =
            |name: &str| files::read(&directory.join(name)).and_then(|(path, text)| files::number(&path, &text));
        let free = number("free_hugepages")?.saturating_sub(number("resv_hugepages")?);
        let grows = number("nr_overcommit_hugepages")?.saturating_sub(number("surplus_hugepages")?);
        let memory_bytes = free.saturating_add(grows).saturating_mul(page_bytes);
        Ok(Limit { memory_bytes, swap_bytes: 0, limiter: Limiter::Pool { directory } })
    }

    /// The cgroups that limit this process, from its own up to the topmost that can be seen.
    fn cgroups(&self, available: &mut Available) -> Vec<Cgroup> {
        match cgroups::of_this_process(&self.root, &mut available.unknown) {
            Ok(cgroups) => cgroups,
            Err(error) => {
                available.unknown.push(error);
                Vec::new()
            }
        }
    }
}

impl Cgroup {
    /// Adds what the cgroup leaves of memory and swap.
    fn memory_limits(&self, swap_free: u64, available: &mut Available) {
        match self.version {
            Version::Two => {
                for name in ["memory.max", "memory.high"] {
                    self.limit(name, "memory.current", available, |left| {
                        let cache = self.page_cache(["inactive_file", "active_file"])?;
                        let swap = self.left("memory.swap.max", "memory.swap.current")?;
                        let swap_bytes = swap.map_or(swap_free, |(_, swap)| swap.min(swap_free));
                        Ok((left.saturating_add(cache), swap_bytes))
                    });
                }
            }
            Version::One => {
                let cache = || self.page_cache(["total_inactive_file", "total_active_file"]);
                self.limit("memory.limit_in_bytes", "memory.usage_in_bytes", available, |left| {
                    Ok((left.saturating_add(cache()?), swap_free))
                });
                // Memory and swap together.
                self.limit("memory.memsw.limit_in_bytes", "memory.memsw.usage_in_bytes", available, |left| {
                    Ok((left.saturating_add(cache()?), 0))
                });
            }
        }
    }

    /// Adds what the cgroup leaves of huge pages.
    fn huge_page_limits(&self, page_bytes: u64, available: &mut Available) {
        let size = match page_bytes {
            bytes if bytes >= 1 << 30 => format!("{}GB", bytes >> 30),
            bytes if bytes >= 1 << 20 => format!("{}MB", bytes >> 20),
            bytes => format!("{}KB", bytes >> 10),
        };
        let (limit, usage) = match self.version {
            Version::Two => ("max", "current"),
            Version::One => ("limit_in_bytes", "usage_in_bytes"),
        };
        for kind in [format!("hugetlb.{size}"), format!("hugetlb.{size}.rsvd")] {
            self.limit(&format!("{kind}.{limit}"), &format!("{kind}.{usage}"), available, |left| Ok((left, 0)));
        }
    }

    /// Adds the limit in the file `limit`, if the cgroup has one, of whose bytes the file `usage` says how many are taken.
    /// `split` makes bytes of memory and of swap of what is left.
    fn limit(
        &self,
        limit: &str,
        usage: &str,
        available: &mut Available,
        split: impl FnOnce(u64) -> Result<(u64, u64), HostMemoryError>,
    ) {
        let found = self.left(limit, usage).and_then(|found| match found {
            Some((limit_bytes, left)) => split(left).map(|(memory, swap)| Some((limit_bytes, memory, swap))),
            None => Ok(None),
        });
        match found {
            Ok(Some((limit_bytes, memory_bytes, swap_bytes))) => {
                let memory_bytes = memory_bytes.min(limit_bytes);
                let limiter = Limiter::Cgroup { file: self.directory.join(limit), limit_bytes };
                available.limits.push(Limit { memory_bytes, swap_bytes, limiter });
            }
            Ok(None) => {}
            Err(error) => available.unknown.push(error),
        }
    }

    /// A limit and what is left of it; `None` if the cgroup does not have that limit.
    fn left(&self, limit: &str, usage: &str) -> Result<Option<(u64, u64)>, HostMemoryError> {
        let Some(limit_bytes) = self.number(limit)? else { return Ok(None) };
        let used = self.number(usage)?.unwrap_or(0);
        Ok(Some((limit_bytes, limit_bytes.saturating_sub(used))))
    }

    /// The number in a file; `None` where the file is not there, or says that there is no limit.
    fn number(&self, name: &str) -> Result<Option<u64>, HostMemoryError> {
        /// Version 1 says "no limit" by the largest number of whole pages.
        const UNLIMITED: u64 = 1 << 62;
        let Some((path, text)) = files::read_if_there(&self.directory.join(name))? else { return Ok(None) };
        if text.trim() == "max" {
            return Ok(None);
        }
        files::number(&path, &text).map(|number| Some(number).filter(|number| *number < UNLIMITED))
    }

    /// Bytes of files that the cgroup has in the page cache, which the kernel gives up first.
    fn page_cache(&self, fields: [&str; 2]) -> Result<u64, HostMemoryError> {
        let Some((path, text)) = files::read_if_there(&self.directory.join("memory.stat"))? else { return Ok(0) };
        let mut bytes = 0u64;
        for name in fields {
            bytes = bytes.saturating_add(files::field(&path, &text, name)?);
        }
        Ok(bytes)
    }
}

/// A path of the host below another root.
fn below(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}
