//! Files as kernels write them, in a folder of the test's own.

use std::fs;
use std::path::Path;

use super::{Available, HostMemory, HostMemoryError, Limiter};

const MIB: u64 = 1 << 20;
const MEMINFO: &str = "MemTotal:       24683652 kB\nMemFree:         1024 kB\nMemAvailable:   2097152 kB\nSwapTotal:      524288 kB\nSwapFree:       262144 kB\nHugePages_Total:      64\n";

/// A host whose files are these.
struct Host(tempfile::TempDir);

impl Host {
    fn new(files: &[(&str, &str)]) -> Self {
        let host = Self(tempfile::tempdir().unwrap());
        host.add("", files);
        host
    }

    fn add(&self, folder: &str, files: &[(&str, &str)]) {
        for (name, text) in files {
            let path = self.0.path().join(folder).join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
    }

    fn memory(&self) -> HostMemory {
        HostMemory::under(self.0.path())
    }

    /// Each limit as its name below the root, MiB of memory and MiB of swap.
    fn told(&self, available: &Available) -> Vec<(String, u64, u64)> {
        let name = |path: &Path| path.strip_prefix(self.0.path()).unwrap().display().to_string();
        let limits = available.limits.iter().map(|limit| {
            let who = match &limit.limiter {
                Limiter::Host => "host".to_owned(),
                Limiter::Cgroup { file, .. } => name(file),
                Limiter::Pool { directory } => name(directory),
            };
            (who, limit.memory_bytes / MIB, limit.swap_bytes / MIB)
        });
        limits.collect()
    }
}

fn known(available: &Available) {
    assert!(available.unknown.is_empty(), "{:?}", available.unknown);
}

fn mount_v2(options: &str) -> String {
    format!(
        "24 1 0:22 / /proc rw - proc proc rw\n41 31 0:38 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw{options}\n"
    )
}

fn v2(cgroup: &str) -> Host {
    Host::new(&[
        ("proc/meminfo", MEMINFO),
        ("proc/self/cgroup", &format!("0::{cgroup}\n")),
        ("proc/self/mountinfo", &mount_v2("")),
    ])
}

#[test]
fn the_host_alone() {
    let host = v2("/");
    let available = host.memory().ordinary();
    known(&available);
    assert_eq!(host.told(&available), [("host".to_owned(), 2048, 256)]);
    assert_eq!(available.tightest().unwrap().total_bytes(), 2304 * MIB);
    assert_eq!(available.tightest().unwrap().to_string(), "this host has 2.25 GiB available (256.00 MiB of it swap)");
}

/// Each cgroup above counts, the page cache is given up first, and swap has a limit of its own.
#[test]
fn nested_cgroups() {
    let host = v2("/a/b:c/d");
    let folder = "sys/fs/cgroup/a";
    host.add(
        folder,
        &[
            ("memory.max", "1073741824\n"),
            ("memory.high", "max\n"),
            ("memory.current", "943718400\n"),
            ("memory.stat", "anon 1\ninactive_file 104857600\nactive_file 209715200\nworkingset_x 3\n"),
            ("memory.swap.max", "max\n"),
            ("memory.swap.current", "0\n"),
            ("b:c/memory.max", "max\n"),
            ("b:c/memory.high", "536870912\n"),
            ("b:c/memory.current", "104857600\n"),
            ("b:c/memory.swap.max", "0\n"),
            // Its own has no controller for memory.
            ("b:c/d/cgroup.procs", "1\n"),
        ],
    );
    let available = host.memory().ordinary();
    known(&available);
    let limit = |name: &str, memory, swap| (name.to_owned(), memory, swap);
    assert_eq!(
        host.told(&available),
        [
            limit("host", 2048, 256),
            limit("sys/fs/cgroup/a/b:c/memory.high", 412, 0),
            limit("sys/fs/cgroup/a/memory.max", 424, 256)
        ]
    );
    let said = available.tightest().unwrap().to_string();
    assert!(
        said.starts_with("the cgroup has 412.00 MiB left of 512.00 MiB (") && said.ends_with("b:c/memory.high)"),
        "{said}"
    );
    // More in use than is allowed, as after a limit was lowered, leaves nothing.
    host.add(folder, &[("b:c/memory.current", "9999999999\n")]);
    assert_eq!(host.memory().ordinary().tightest().unwrap().memory_bytes, 0);
}

/// As Docker mounts version 1: the container's own cgroup is what is shown as the topmost.
#[test]
fn version_1() {
    let host = Host::new(&[
        ("proc/meminfo", MEMINFO),
        ("proc/self/cgroup", "9:name=systemd:/x\n8:pids:/x\n4:memory:/docker/f00/inner\n3:cpu,hugetlb:/\n0::/\n"),
        (
            "proc/self/mountinfo",
            "30 1 0:1 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,hugetlb\n\
             31 1 0:2 /docker/f00 /sys/fs/cgroup/mem\\040ory rw - cgroup cgroup rw,memory\n\
             32 1 0:3 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
        ),
        ("sys/fs/cgroup/mem ory/memory.limit_in_bytes", "314572800\n"),
        ("sys/fs/cgroup/mem ory/memory.usage_in_bytes", "104857600\n"),
        ("sys/fs/cgroup/mem ory/memory.memsw.limit_in_bytes", "9223372036854771712\n"),
        ("sys/fs/cgroup/mem ory/memory.stat", "inactive_file 1\ntotal_inactive_file 1048576\ntotal_active_file 0\n"),
        ("sys/fs/cgroup/mem ory/inner/memory.limit_in_bytes", "9223372036854771712\n"),
        ("sys/fs/cgroup/cpu/hugetlb.2MB.limit_in_bytes", "33554432\n"),
        ("sys/fs/cgroup/cpu/hugetlb.2MB.usage_in_bytes", "4194304\n"),
        ("sys/fs/cgroup/cpu/hugetlb.2MB.rsvd.limit_in_bytes", "16777216\n"),
        ("sys/fs/cgroup/cpu/hugetlb.2MB.rsvd.usage_in_bytes", "0\n"),
        ("sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "20\n"),
        ("sys/kernel/mm/hugepages/hugepages-2048kB/resv_hugepages", "5\n"),
        ("sys/kernel/mm/hugepages/hugepages-2048kB/nr_overcommit_hugepages", "3\n"),
        ("sys/kernel/mm/hugepages/hugepages-2048kB/surplus_hugepages", "1\n"),
    ]);
    let limit = |name: &str, memory, swap| (name.to_owned(), memory, swap);
    let ordinary = host.memory().ordinary();
    known(&ordinary);
    assert_eq!(
        host.told(&ordinary),
        [limit("host", 2048, 256), limit("sys/fs/cgroup/mem ory/memory.limit_in_bytes", 201, 256)]
    );
    let huge = host.memory().huge_pages(2 * MIB);
    known(&huge);
    assert_eq!(
        host.told(&huge),
        [
            limit("sys/kernel/mm/hugepages/hugepages-2048kB", 34, 0),
            limit("sys/fs/cgroup/cpu/hugetlb.2MB.limit_in_bytes", 28, 0),
            limit("sys/fs/cgroup/cpu/hugetlb.2MB.rsvd.limit_in_bytes", 16, 0)
        ]
    );
    // Memory and swap together.
    host.add(
        "sys/fs/cgroup/mem ory",
        &[("memory.memsw.limit_in_bytes", "209715200\n"), ("memory.memsw.usage_in_bytes", "104857600\n")],
    );
    let tightest = host.memory().ordinary();
    assert_eq!(tightest.tightest().unwrap().total_bytes(), 101 * MIB);
}

#[test]
fn huge_pages_of_version_2() {
    let host = v2("/a/b");
    host.add(
        "sys/fs/cgroup/a",
        &[
            ("hugetlb.1GB.max", "2147483648\n"),
            ("hugetlb.1GB.current", "1073741824\n"),
            ("b/hugetlb.1GB.max", "max\n"),
            ("b/hugetlb.1GB.rsvd.max", "0\n"),
            ("b/hugetlb.1GB.rsvd.current", "0\n"),
            ("b/hugetlb.2MB.max", "0\n"),
            ("memory.max", "1073741824\n"),
            ("memory.current", "0\n"),
        ],
    );
    let folder = "sys/kernel/mm/hugepages/hugepages-1048576kB";
    host.add(
        folder,
        &[
            ("free_hugepages", "8\n"),
            ("resv_hugepages", "8\n"),
            ("nr_overcommit_hugepages", "0\n"),
            ("surplus_hugepages", "0\n"),
        ],
    );
    let limit = |name: &str, mib| (name.to_owned(), mib, 0);
    let huge = host.memory().huge_pages(1 << 30);
    known(&huge);
    let mut expected = vec![
        limit(folder, 0),
        limit("sys/fs/cgroup/a/b/hugetlb.1GB.rsvd.max", 0),
        limit("sys/fs/cgroup/a/hugetlb.1GB.max", 1024),
    ];
    assert_eq!(host.told(&huge), expected);
    // Where the mount says so, huge pages count as memory too.
    host.add("", &[("proc/self/mountinfo", &mount_v2(",memory_hugetlb_accounting"))]);
    expected.push(limit("sys/fs/cgroup/a/memory.max", 1024));
    assert_eq!(host.told(&host.memory().huge_pages(1 << 30)), expected);
    // A kernel that has no pages of that size.
    host.add("", &[("proc/self/mountinfo", &mount_v2(""))]);
    let huge = host.memory().huge_pages(64 << 10);
    assert!(huge.limits.is_empty());
    let said = huge.unknown.first().unwrap().to_string();
    assert!(said.contains("hugepages-64kB") && said.contains("No such file"), "{said}");
}

/// What is not there is told, and what is there counts.
#[test]
fn what_is_missing() {
    let empty = Host::new(&[]);
    let available = empty.memory().ordinary();
    assert!(available.limits.is_empty() && available.tightest().is_none());
    assert_eq!(available.unknown.len(), 2, "{:?}", available.unknown);
    assert!(available.unknown.first().unwrap().to_string().contains("proc/meminfo: No such file"));
    // A kernel without cgroups.
    let host = Host::new(&[("proc/meminfo", MEMINFO), ("proc/self/status", "")]);
    let available = host.memory().ordinary();
    known(&available);
    assert_eq!(available.limits.len(), 1);
    // A process whose cgroup is outside of what is mounted, or of its namespace.
    for cgroup in ["/b", "/../b"] {
        let host = v2(cgroup);
        host.add("", &[("proc/self/mountinfo", "41 31 0:38 /a /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")]);
        let available = host.memory().ordinary();
        assert_eq!(available.limits.len(), 1);
        let unknown = available.unknown.first().unwrap();
        assert!(matches!(unknown, HostMemoryError::HiddenCgroup { cgroup: hidden } if hidden == cgroup), "{unknown}");
    }
}

/// Version 1 is mounted, and version 2, in which nothing is limited then, is not.
#[test]
fn version_2_that_is_not_mounted() {
    let files = [
        ("proc/meminfo", MEMINFO),
        ("proc/self/cgroup", "4:memory:/a\n0::/a\n"),
        ("proc/self/mountinfo", "31 1 0:2 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"),
        ("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "1048576\n"),
        ("sys/fs/cgroup/memory/a/memory.usage_in_bytes", "0\n"),
    ];
    let host = Host::new(&files);
    let available = host.memory().ordinary();
    known(&available);
    assert_eq!(available.tightest().unwrap().memory_bytes, MIB);
    // But version 1 that is not mounted may limit something.
    host.add("", &[("proc/self/mountinfo", "31 1 0:2 / /x rw - cgroup2 cgroup2 rw\n")]);
    assert_eq!(host.memory().ordinary().unknown.len(), 1);
}

#[test]
fn what_cannot_be_read() {
    for (name, text) in [
        ("proc/meminfo", "MemAvailable: much kB\nSwapFree: 0 kB\n"),
        ("proc/meminfo", "MemTotal: 5 kB\n"),
        ("proc/meminfo", ""),
        ("proc/self/cgroup", "nonsense\n"),
        ("proc/self/cgroup", "0:\n"),
        ("proc/self/mountinfo", "41 31 0:38 / /sys/fs/cgroup rw cgroup2\n"),
        ("proc/self/mountinfo", "41 - cgroup2 a b\n"),
        ("sys/fs/cgroup/a/memory.max", "-1\n"),
        ("sys/fs/cgroup/a/memory.max", "99999999999999999999999\n"),
        ("sys/fs/cgroup/a/memory.current", "\n"),
        ("sys/fs/cgroup/a/memory.stat", "anon 5\n"),
        ("sys/fs/cgroup/a/memory.stat", "inactive_file\nactive_file 5\n"),
    ] {
        let host = v2("/a");
        host.add("sys/fs/cgroup/a", &[("memory.max", "1048576\n"), ("memory.current", "0\n")]);
        host.add("", &[(name, text)]);
        let available = host.memory().ordinary();
        assert_eq!(available.unknown.len(), 1, "{name} {text:?}: {:?}", available.unknown);
        let unknown = available.unknown.first().unwrap();
        assert!(matches!(unknown, HostMemoryError::Parse { .. }) && unknown.to_string().contains(name), "{unknown}");
        // The other limit counts all the same.
        assert_eq!(available.limits.len(), 1, "{name} {text:?}: {:?}", available.limits);
    }
    // Bytes that are not text, and a text without an end.
    let host = v2("/a");
    fs::write(host.0.path().join("proc/meminfo"), [0xff, 0xfe, 0, b'\n']).unwrap();
    host.add("", &[("proc/self/cgroup", &"0::/".repeat(1 << 16))]);
    assert!(!host.memory().ordinary().unknown.is_empty());
}

/// This host's own files can be read.
#[test]
fn here() {
    let available = HostMemory::default().ordinary();
    println!("{available:?}");
    assert!(available.limits.iter().any(|limit| limit.limiter == Limiter::Host && limit.memory_bytes > 0));
}
