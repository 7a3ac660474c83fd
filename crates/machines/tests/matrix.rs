//! Everything with everything: channels, transports, compression, deltas, checksums, page sizes, idle and dirtying
//! guests. Every cell is migrated and verified; nothing is refused.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]

mod common;

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use common::{MIB, empty_on, parameters, source_with, until};
use dunlin::report::PageCounts;
use dunlin::{Destination, Parameters, Source, Status, Uri};
use dunlin_machines::{Backing, SyntheticMachine};

/// A chunk for each of 8 channels.
const MEMORY: u64 = 16 * MIB;
const DIRTYING: &str = "rate=200M/s,working-set=1M,content=counter";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Transport {
    Tcp,
    Unix,
    Fd,
    Exec,
}

/// The two ends of a connection to be, and what must live as long as it.
struct Ends {
    source: Option<String>,
    destination: String,
    sockets: Vec<UnixStream>,
    _directory: tempfile::TempDir,
}

impl Ends {
    fn new(transport: Transport) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut ends = Self {
            source: None,
            destination: "tcp:127.0.0.1:0".to_owned(),
            sockets: Vec::new(),
            _directory: directory,
        };
        match transport {
            Transport::Tcp => {}
            Transport::Unix => ends.destination = format!("unix:{}", ends._directory.path().join("socket").display()),
            Transport::Fd => {
                let (here, there) = UnixStream::pair().unwrap();
                ends.source = Some(format!("fd:{}", here.as_raw_fd()));
                ends.destination = format!("fd:{}", there.as_raw_fd());
                ends.sockets = vec![here, there];
            }
            Transport::Exec => {
                let pipe = |name: &str| {
                    let path = ends._directory.path().join(name);
                    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
                    rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
                    path.display().to_string()
                };
                let (there, back) = (pipe("there"), pipe("back"));
                ends.source = Some(format!("exec:cat <{back} & cat >{there}"));
                ends.destination = format!("exec:cat <{there} & cat >{back}");
            }
        }
        ends
    }
}

/// A limit under which no guest is stopped: so many round trips take longer.
const NEVER: Duration = Duration::from_millis(1);

/// One cell; the pages sent, by kind.
fn migrate(cell: &str, ends: Ends, backings: (Backing, Backing), workload: &str, set: &[(&str, &str)]) -> PageCounts {
    let from = source_with(backings.0, MEMORY, 2, workload, 11, "zero:60,random:20,text:20");
    let to = empty_on(backings.1, MEMORY, 2);
    let parameters = parameters(set);
    let listen: Uri = ends.destination.parse().unwrap();
    let destination = Destination::listen(&to.guest, &listen, &parameters).unwrap();
    let uri = ends.source.as_ref().map_or_else(|| destination.local_uri().clone(), |uri| uri.parse().unwrap());
    let migration = Source::start(&from.guest, &uri, &parameters).unwrap();
    if parameters.downtime_limit == NEVER {
        // What is sent in the second round is known in the third.
        until(cell, || migration.report().rounds_ended() > 2);
        migration
            .set_parameters(&Parameters { downtime_limit: Parameters::default().downtime_limit, ..parameters })
            .unwrap();
    }
    let report = migration.wait();
    assert_eq!(report.status, Status::Completed, "{cell}: {:?}; {:?}", report.error, destination.report().error);
    assert_eq!(destination.wait().status, Status::Completed, "{cell}");
    to.assert_good(cell);
    drop((migration, destination));
    drop(ends);
    report.ram.pages
}

#[test]
fn every_cell() {
    let mut backings = vec![(Backing::Base, Backing::Base)];
    // Two machines at a time.
    let huge = || SyntheticMachine::empty(MEMORY, 1, Backing::Huge2M);
    match (huge(), huge()) {
        (Ok(_), Ok(_)) => {
            let (base, huge) = (Backing::Base, Backing::Huge2M);
            backings.extend([(base, huge), (huge, base), (huge, huge)]);
        }
        (Err(error), _) | (_, Err(error)) => println!("skipped: the cells with huge pages: {error}"),
    }
    let mut links = vec![("2", Transport::Fd), ("2", Transport::Exec)];
    for channels in ["1", "2", "8"] {
        links.extend([(channels, Transport::Tcp), (channels, Transport::Unix)]);
    }

    let (mut cells, mut all) = (0, PageCounts::default());
    for (channels, transport) in links {
        for compression in ["none", "lz4", "zstd"] {
            for delta in ["off", "on"] {
                for integrity in ["none", "checksum"] {
                    for backing in &backings {
                        for workload in ["idle", DIRTYING] {
                            let cell = format!(
                                "{channels} channels, {transport:?}, {compression}, delta {delta}, {integrity}, \
                                 {} to {}, {workload}",
                                backing.0, backing.1
                            );
                            let dirtying = workload == DIRTYING;
                            let mut set = vec![
                                ("multifd-channels", channels),
                                ("multifd-compression", compression),
                                ("xbzrle", delta),
                                ("integrity", integrity),
                                // Has nothing to say where pages are looked at.
                                ("zero-copy-send", if cells % 4 < 2 { "on" } else { "off" }),
                            ];
                            if dirtying && (compression != "none" || delta == "on") {
                                // Slow enough for a compressor to be worth it.
                                set.push(("max-bandwidth", "60M/s"));
                            }
                            if dirtying && delta == "on" {
                                set.push(("downtime-limit", "1ms"));
                            }
                            let pages = migrate(&cell, Ends::new(transport), *backing, workload, &set);
                            assert!(pages.delta == 0 || delta == "on", "{cell}: {pages}");
                            assert!(pages.lz4 == 0 || compression == "lz4", "{cell}: {pages}");
                            assert!(pages.zstd == 0 || compression == "zstd", "{cell}: {pages}");
                            // Everything asked for was also done.
                            assert!(!dirtying || delta == "off" || pages.delta > 0, "{cell}: {pages}");
                            let compressed = pages.lz4 + pages.zstd;
                            assert!(!dirtying || compression == "none" || compressed > 0, "{cell}: {pages}");
                            all += pages;
                            cells += 1;
                        }
                    }
                }
            }
        }
    }
    println!("{cells} cells, all verified; pages: {all}");
    assert!(all.named().iter().all(|(_, count)| *count > 0), "a kind was never used: {all}");
}
