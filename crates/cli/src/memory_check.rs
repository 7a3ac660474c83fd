//! Whether the memory that a machine is about to fill is there. What the host or a cgroup does not have shows when it is
//! touched: the kernel ends the process, without an error that could be told.

use anyhow::{Result, bail};
use dunlin::units::format_size;
use dunlin_machines::{Available, Backing, HostMemory, Limit, Limiter};

use crate::terminal;

/// What a machine's process takes besides page tables, about.
const PROCESS_BYTES: u64 = 16 << 20;
/// Bytes of memory for each byte of its page tables.
const PAGE_TABLES: u64 = 512;

/// Memory that is going to be used.
#[derive(Debug, Clone, Copy)]
pub struct Use {
    /// By whom: "the guest and its process".
    pub who: &'static str,
    /// The machines' RAM.
    pub ram_bytes: u64,
    /// What of it will be filled; `None` where that is not known before it comes: it may be all.
    pub filled_bytes: Option<u64>,
    /// What it is made of.
    pub backing: Backing,
    /// How many processes there are.
    pub processes: u64,
}

/// What follows from a comparison.
#[derive(Debug, PartialEq, Eq)]
enum Finding {
    /// It fits.
    Enough,
    /// It fits, but something may happen later.
    Warning(String),
    /// It does not fit.
    TooLittle {
        /// Why not.
        why: String,
        /// What may be done about it.
        hint: &'static str,
    },
}

/// Compares what will be used with what is available here. Goes on with a warning where it may be too little later, where
/// nobody can tell, and with `force`.
///
/// # Errors
/// When it is too little, with both figures.
pub fn check(wanted: Use, force: bool) -> Result<()> {
    let host = HostMemory::default();
    let available = match wanted.backing {
        Backing::Huge2M | Backing::Huge1G => host.huge_pages(wanted.backing.page_bytes()),
        Backing::Base | Backing::Transparent => host.ordinary(),
    };
    match compare(wanted, &available) {
        Finding::TooLittle { why, hint } if !force => bail!("{why}; {hint}, or go on with --force"),
        Finding::TooLittle { why, .. } => terminal::note(&format!("goes on because of --force: {why}")),
        Finding::Warning(why) => terminal::note(&why),
        Finding::Enough => {}
    }
    if !available.unknown.is_empty() {
        let unknown: Vec<String> = available.unknown.iter().map(ToString::to_string).collect();
        terminal::note(&format!("cannot tell whether there is enough memory: {}", unknown.join("; ")));
    }
    Ok(())
}

fn compare(wanted: Use, available: &Available) -> Finding {
    let Use { who, ram_bytes, filled_bytes, backing, processes } = wanted;
    let Some(tightest) = available.tightest() else { return Finding::Enough };
    if matches!(backing, Backing::Huge2M | Backing::Huge1G) {
        // All of RAM is reserved in the pool, and a guest that touches a page over the cgroup's limit gets SIGBUS.
        if ram_bytes <= tightest.total_bytes() {
            return Finding::Enough;
        }
        let hint = match tightest.limiter {
            Limiter::Pool { .. } => "use less --memory, or give the pool more pages (vm.nr_hugepages)",
            _ => "use less --memory, or raise the limit",
        };
        let why = format!("{who} will take {} of huge pages, but {tightest}", format_size(ram_bytes));
        return Finding::TooLittle { why, hint };
    }
    let process = PROCESS_BYTES.saturating_mul(processes);
    let taken = |bytes: u64| bytes.saturating_add(bytes / PAGE_TABLES).saturating_add(process);
    let (sure, most) = (taken(filled_bytes.unwrap_or(ram_bytes)), taken(ram_bytes));
    let takes = match filled_bytes {
        Some(_) => format!("{who} will take {} of memory", format_size(sure)),
        None => format!("{who} may take {} of memory", format_size(sure)),
    };
    if sure > tightest.total_bytes() {
        return Finding::TooLittle { why: format!("{takes}, but {tightest}"), hint: "use less --memory" };
    }
    let swapping = |limit: &&Limit| sure > limit.memory_bytes;
    if let Some(limit) = available.tightest_without_swap().filter(swapping) {
        let swapped = format_size(sure.saturating_sub(limit.memory_bytes));
        return Finding::Warning(format!("{takes}, but {limit}: {swapped} will have to go into swap"));
    }
    if most > tightest.total_bytes() {
        let most = format_size(most);
        return Finding::Warning(format!(
            "{who} may take {most} of memory as the guest uses its RAM, but {tightest}: when that is used up, the kernel ends \
             the process"
        ));
    }
    Finding::Enough
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const MIB: u64 = 1 << 20;

    /// A host with so many MiB of memory, swap, and huge pages of 2 MiB.
    fn host(memory: u64, swap: u64, huge: u64) -> (tempfile::TempDir, HostMemory) {
        let root = tempfile::tempdir().unwrap();
        let (own, pool) = (root.path().join("proc/self"), root.path().join("sys/kernel/mm/hugepages/hugepages-2048kB"));
        fs::create_dir_all(&own).unwrap();
        fs::create_dir_all(&pool).unwrap();
        let meminfo = format!("MemAvailable: {} kB\nSwapFree: {} kB\n", memory << 10, swap << 10);
        fs::write(root.path().join("proc/meminfo"), meminfo).unwrap();
        for name in ["resv_hugepages", "nr_overcommit_hugepages", "surplus_hugepages"] {
            fs::write(pool.join(name), "0\n").unwrap();
        }
        fs::write(pool.join("free_hugepages"), format!("{}\n", huge / 2)).unwrap();
        let memory = HostMemory::under(root.path());
        (root, memory)
    }

    fn wanted(ram: u64, filled: Option<u64>, backing: Backing) -> Use {
        let filled_bytes = filled.map(|mib| mib * MIB);
        Use { who: "the guest", ram_bytes: ram * MIB, filled_bytes, backing, processes: 1 }
    }

    #[test]
    fn what_is_filled_is_compared() {
        let (_root, host) = host(1024, 512, 64);
        let available = host.ordinary();
        let compare = |ram, filled, backing| compare(wanted(ram, filled, backing), &available);
        for (ram, filled) in [(512, Some(512)), (1000, Some(0)), (512, None)] {
            assert_eq!(compare(ram, filled, Backing::Base), Finding::Enough, "{ram} {filled:?}");
        }
        for (ram, filled, words) in [
            (1024, Some(1024), &["will take 1.02 GiB", "this host has 1.50 GiB available", "18.00 MiB", "swap"][..]),
            (4096, Some(512), &["may take 4.02 GiB", "1.50 GiB", "ends the process"]),
            (u64::MAX / MIB, Some(0), &["may take 16777216.00 TiB"]),
        ] {
            let Finding::Warning(said) = compare(ram, filled, Backing::Transparent) else { panic!("{ram} {filled:?}") };
            assert!(words.iter().all(|word| said.contains(word)), "{said}");
        }
        for (ram, filled, words) in [
            (2048, Some(2048), ["the guest will take 2.02 GiB", "this host has 1.50 GiB available"]),
            (2048, None, ["the guest may take 2.02 GiB", "1.50 GiB available"]),
        ] {
            let found = compare(ram, filled, Backing::Base);
            let Finding::TooLittle { why: said, hint: "use less --memory" } = found else { panic!("{found:?}") };
            assert!(words.iter().all(|word| said.contains(word)), "{said}");
        }
    }

    #[test]
    fn all_huge_pages_are_compared() {
        let (_root, host) = host(1, 0, 64);
        let available = host.huge_pages(2 << 20);
        assert_eq!(compare(wanted(64, Some(64), Backing::Huge2M), &available), Finding::Enough);
        let short = compare(wanted(66, Some(0), Backing::Huge2M), &available);
        let Finding::TooLittle { why, hint } = short else { panic!("{short:?}") };
        assert!(why.contains("will take 66.00 MiB of huge pages") && why.contains("has 64.00 MiB free"), "{why}");
        assert!(hint.contains("vm.nr_hugepages"), "{hint}");
    }

    #[test]
    fn nobody_knows() {
        let root = tempfile::tempdir().unwrap();
        let available = HostMemory::under(root.path()).ordinary();
        assert_eq!(compare(wanted(1 << 40, None, Backing::Base), &available), Finding::Enough);
        assert!(!available.unknown.is_empty());
    }
}
