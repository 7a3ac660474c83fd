//! The part of a processor that this process may use, where a control group limits it.
//!
//! A process that has used up its part stands still until the next period begins, in the middle of anything. While it has
//! little to do nothing shows that, so it is read from the control groups: of the process itself and of all above it.
//! Sources: `Documentation/admin-guide/cgroup-v2.rst` and `Documentation/scheduler/sched-bwc.rst` of the kernel.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where control groups are mounted, as everybody does it.
const ROOT: &str = "/sys/fs/cgroup";

/// Reads microseconds of each period from a group: the quota and the period.
type Read = fn(&Path) -> Option<(u64, u64)>;

/// How long this process may have to stand still because it has used up its part of a processor: zero where it may use a whole
/// one, and where that cannot be read.
pub(crate) fn longest_standstill() -> Duration {
    let Ok(groups) = fs::read_to_string("/proc/self/cgroup") else { return Duration::ZERO };
    standstill_in(&groups, Path::new(ROOT))
}

/// As [`longest_standstill`], of a process in these groups.
fn standstill_in(groups: &str, root: &Path) -> Duration {
    let mut longest = Duration::ZERO;
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let (mount, read): (PathBuf, Read) = match controllers {
            "" => (root.to_owned(), unified),
            list if list.split(',').any(|controller| controller == "cpu") => (root.join(list), legacy),
            _ => continue,
        };
        let group = mount.join(path.trim_start_matches('/'));
        // What lies above the mount is not a group's.
        for above in group.ancestors().take_while(|above| above.starts_with(&mount)) {
            if let Some((quota, period)) = read(above) {
                longest = longest.max(Duration::from_micros(period.saturating_sub(quota)));
            }
        }
    }
    longest
}

/// Microseconds of each period, both as a group of version 2 has them.
fn unified(group: &Path) -> Option<(u64, u64)> {
    let text = fs::read_to_string(group.join("cpu.max")).ok()?;
    let mut fields = text.split_whitespace();
    // `max` is no number, and no limit.
    Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
}

/// As [`unified`], of version 1.
fn legacy(group: &Path) -> Option<(u64, u64)> {
    let number = |file| fs::read_to_string(group.join(file)).ok()?.trim().parse().ok();
    // No limit is -1, which does not parse.
    Some((number("cpu.cfs_quota_us")?, number("cpu.cfs_period_us")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_narrowest_group_counts() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        let write = |file: &str, text: &str| {
            let path = root.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let ms = Duration::from_millis;
        assert_eq!(standstill_in("0::/a/b\n", root), ms(0), "nothing can be read");
        write("a/cpu.max", "25000 100000\n");
        write("a/b/cpu.max", "max 100000\n");
        assert_eq!(standstill_in("0::/a/b\n", root), ms(75), "a group above has the limit");
        write("a/b/cpu.max", "10000 100000\n");
        assert_eq!(standstill_in("0::/a/b\n", root), ms(90));
        write("a/b/cpu.max", "200000 100000\n");
        write("a/cpu.max", "rubbish\n");
        assert_eq!(standstill_in("0::/a/b\n", root), ms(0), "two processors, and what cannot be read");
        write("cpu,cpuacct/c/cpu.cfs_quota_us", "5000\n");
        write("cpu,cpuacct/c/cpu.cfs_period_us", "50000\n");
        let groups = "2:cpu,cpuacct:/c\n1:memory:/a\n0::/a/b\n";
        assert_eq!(standstill_in(groups, root), ms(45));
        write("cpu,cpuacct/c/cpu.cfs_quota_us", "-1\n");
        assert_eq!(standstill_in(groups, root), ms(0));
        assert_eq!(standstill_in("nonsense\n::\n0::/../../a\n", root), ms(0));
    }
}
