//! Where the cgroups of this process are: its own and all above it, in version 2 and, for memory and huge pages, in
//! version 1.

use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

use super::{HostMemoryError, below, files};

/// The longest path in Linux.
const PATH_BYTES: usize = 4096;

/// Which of the kernel's two kinds of cgroups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Version {
    One,
    Two,
}

/// A cgroup's folder.
#[derive(Debug)]
pub(super) struct Cgroup {
    pub(super) directory: PathBuf,
    pub(super) version: Version,
    /// Whether huge pages count as memory too (`memory_hugetlb_accounting`).
    pub(super) charges_huge_pages: bool,
}

/// A mounted file system of cgroups.
#[derive(Debug)]
struct Mount {
    /// The topmost cgroup that it shows.
    top: PathBuf,
    point: PathBuf,
    version: Version,
    /// Options, among them the controllers of version 1.
    options: Vec<String>,
}

/// The cgroups that limit memory or huge pages of this process. Those that cannot be seen are told in `unknown`.
pub(super) fn of_this_process(root: &Path, unknown: &mut Vec<HostMemoryError>) -> Result<Vec<Cgroup>, HostMemoryError> {
    let list = root.join("proc/self/cgroup");
    // A kernel without cgroups has /proc without this file.
    let Some((list, text)) = files::read_if_there(&list)? else {
        return if root.join("proc/self").exists() { Ok(Vec::new()) } else { files::read(&list).map(|_| Vec::new()) };
    };
    let (mounts_path, mounts) = files::read(&root.join("proc/self/mountinfo"))?;
    let mounts = parse_mounts(&mounts_path, &mounts)?;
    let controls_memory =
        |line: &str| line.split(':').nth(1).is_some_and(|list| list.split(',').any(|name| name == "memory"));
    let version_1_has_memory = text.lines().any(controls_memory);
    let mut cgroups: Vec<Cgroup> = Vec::new();
    for line in text.lines().filter(|line| !line.is_empty()) {
        // The number of the hierarchy, its controllers, and the path, which may hold colons.
        let mut parts = line.splitn(3, ':');
        let (Some(number), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(files::wrong(&list, line, "NUMBER:CONTROLLERS:PATH"));
        };
        if path.len() > PATH_BYTES {
            return Err(files::wrong(&list, line, "a path that the kernel allows"));
        }
        let version = if number == "0" && controllers.is_empty() { Version::Two } else { Version::One };
        let matters = |controller: &str| matches!(controller, "memory" | "hugetlb");
        if version == Version::One && !controllers.split(',').any(matters) {
            continue;
        }
        let shows = |mount: &&Mount| {
            let same = match version {
                Version::Two => mount.version == Version::Two,
                Version::One => {
                    let mut wanted = controllers.split(',').filter(|controller| matters(controller));
                    mount.version == Version::One
                        && wanted.all(|controller| mount.options.iter().any(|option| option == controller))
                }
            };
            same && is_below(Path::new(path), &mount.top)
        };
        // The mount that shows most of the cgroups above.
        let Some(mount) = mounts.iter().filter(shows).min_by_key(|mount| mount.top.components().count()) else {
            // Where version 1 has the memory, version 2 is often not even mounted, and limits nothing.
            if version == Version::One || !version_1_has_memory {
                unknown.push(HostMemoryError::HiddenCgroup { cgroup: path.to_owned() });
            }
            continue;
        };
        let charges_huge_pages = mount.options.iter().any(|option| option == "memory_hugetlb_accounting");
        let within = Path::new(path).strip_prefix(&mount.top).unwrap_or(Path::new(""));
        for ancestor in within.ancestors() {
            let directory = below(root, &mount.point).join(ancestor);
            if !cgroups.iter().any(|known| known.directory == directory) {
                cgroups.push(Cgroup { directory, version, charges_huge_pages });
            }
        }
    }
    Ok(cgroups)
}

/// Whether `path` is `top` or below it. One outside of this process's cgroup namespace begins with `/..`.
fn is_below(path: &Path, top: &Path) -> bool {
    let plain = |path: &Path| !path.components().any(|part| part == Component::ParentDir);
    plain(path) && plain(top) && path.starts_with(top)
}

/// The file systems of cgroups in /proc/self/mountinfo.
fn parse_mounts(path: &Path, text: &str) -> Result<Vec<Mount>, HostMemoryError> {
    let mut mounts = Vec::new();
    for line in text.lines().filter(|line| !line.is_empty()) {
        let wrong = || files::wrong(path, line, "a line of mountinfo");
        let (before, after) = line.split_once(" - ").ok_or_else(wrong)?;
        let mut after = after.split(' ');
        let version = match after.next() {
            Some("cgroup2") => Version::Two,
            Some("cgroup") => Version::One,
            _ => continue,
        };
        let options = after.nth(1).unwrap_or_default();
        let mut before = before.split(' ').skip(3);
        let (top, point) = (before.next().ok_or_else(wrong)?, before.next().ok_or_else(wrong)?);
        mounts.push(Mount {
            top: unescape(top),
            point: unescape(point),
            version,
            options: options.split(',').map(str::to_owned).collect(),
        });
    }
    Ok(mounts)
}

/// Takes `\040` and its like, as the kernel writes spaces, for what they stand for.
fn unescape(text: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let code = after.get(..3).filter(|_| *first == b'\\').and_then(|code| std::str::from_utf8(code).ok());
        match code.and_then(|code| u8::from_str_radix(code, 8).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = after.get(3..).unwrap_or_default();
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    std::ffi::OsString::from_vec(bytes).into()
}
