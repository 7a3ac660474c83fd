//! What may be asked of the benchmarks.

use clap::{Args, Subcommand, ValueEnum};
use dunlin::Uri;
use dunlin_machines::Backing;

use super::{MachineKind, Setting, Transport, setting, size, uri};

#[derive(Debug, Subcommand)]
pub enum Bench {
    /// Dirty bitmaps: setting, counting, and walking while taking, by how many pages are dirty.
    Bitmap(BenchBitmap),
    /// Idle machines from one process to another, beside the ways of copying their memory without a migration.
    Throughput(BenchThroughput),
    /// Pages by what they hold, to encodings and back, on one thread.
    Kinds(BenchKinds),
    /// How long guests are stopped, and how well that was predicted, by how fast they dirty their memory.
    Downtime(BenchDowntime),
    /// A fast guest (128 MiB rewritten at 300 MB/s over 100 MB/s, 1 % of the bytes new each time), a slow link (512 MiB of
    /// text over 50 MB/s) and a fast link (2 GiB of random bytes), with and without what may help.
    Convergence(BenchConvergence),
    /// Idle machines from one process to another with each compressor, beside the same without one, by what memory holds.
    Compression(BenchCompression),
    /// Guests that dirty their memory at 0.5 to 8 times what the link carries, on both machines, without auto-converge, with
    /// fixed steps as QEMU has them, and with auto-converge; and one of which one vCPU alone does.
    Autoconverge(BenchAutoconverge),
    /// The receiving process of a measurement.
    #[command(hide = true)]
    Peer(BenchPeer),
    /// The receiving process of a measurement, with a machine that runs.
    #[command(hide = true)]
    Receiver(BenchReceiver),
}

#[derive(Debug, Args)]
pub struct BenchAutoconverge {
    /// Measure one machine alone [default: both].
    #[arg(long, value_enum)]
    pub machine: Option<MachineKind>,
    /// How often everything is measured, by turns.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    pub runs: u32,
    /// A migration that takes longer counts as one that does not converge, and is cancelled.
    #[arg(long, value_name = "SECONDS", default_value_t = 12)]
    pub patience: u64,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct BenchReceiver {
    #[arg(long, value_enum)]
    pub machine: MachineKind,
    #[arg(long, value_parser = size)]
    pub memory: u64,
    #[arg(long)]
    pub vcpus: u32,
    #[arg(long)]
    pub exit_with_parent: u32,
}

#[derive(Debug, Args)]
pub struct BenchKinds {
    /// Pages to encode; more than the processor's caches hold.
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = size)]
    pub memory: u64,
    /// How often everything is measured.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pub runs: u32,
    /// Go on even if it will fill more memory than is available.
    #[arg(long)]
    pub force: bool,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct BenchDowntime {
    /// The guest's RAM.
    #[arg(long, value_name = "SIZE", default_value = "2G", value_parser = size)]
    pub memory: u64,
    /// The part of it that the guest writes.
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = size)]
    pub working_set: u64,
    /// The ceiling.
    #[arg(long, value_name = "TIME", default_value = "300ms")]
    pub downtime_limit: String,
    /// How often everything is measured, by turns.
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    pub runs: u32,
    /// Go on even if it will fill more memory than is available.
    #[arg(long)]
    pub force: bool,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct BenchConvergence {
    /// How often everything is measured, by turns.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    pub runs: u32,
    /// A migration that takes longer counts as one that does not converge, and is cancelled.
    #[arg(long, value_name = "SECONDS", default_value_t = 20)]
    pub patience: u64,
    /// Go on even if it will fill more memory than is available.
    #[arg(long)]
    pub force: bool,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct BenchCompression {
    /// The machine's RAM; each of the two processes has as much.
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = size)]
    pub memory: u64,
    /// Connections that pages travel on.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub channels: u8,
    /// How the two are connected.
    #[arg(long, value_enum, default_value_t = Transport::Tcp)]
    pub transport: Transport,
    /// The host's pages that RAM is made of.
    #[arg(long, value_name = "SIZE", default_value_t = Backing::Base)]
    pub hugepages: Backing,
    /// A parameter of all migrations, max-bandwidth for instance.
    #[arg(long, value_name = "NAME=VALUE")]
    pub set: Vec<String>,
    /// How often everything is measured, by turns.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pub runs: u32,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct BenchThroughput {
    /// The machine's RAM; each of the two processes has as much.
    #[arg(long, value_name = "SIZE", default_value = "2G", value_parser = size)]
    pub memory: u64,
    /// Connections that pages travel on.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub channels: u8,
    /// How the two are connected.
    #[arg(long, value_enum, default_value_t = Transport::Tcp)]
    pub transport: Transport,
    /// The host's pages that RAM is made of at the source: 4K, transparent (huge pages where the kernel has them), or 2M
    /// or 1G from the host's pool of huge pages.
    #[arg(long, value_name = "SIZE", default_value_t = Backing::Base)]
    pub hugepages: Backing,
    /// The same at the destination [default: as at the source].
    #[arg(long, value_name = "SIZE")]
    pub into: Option<Backing>,
    /// How often everything is measured, by turns.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pub runs: u32,
    /// Measure every way of copying, not only the one to compare with.
    #[arg(long)]
    pub ways: bool,
    /// Go on even if it will fill more memory than is available.
    #[arg(long)]
    pub force: bool,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// How a bare copy gets memory into a socket and out of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Way {
    /// `write` from the mapping, pages populated ahead, `read` into the mapping.
    Populate,
    /// `write` from the mapping, `read` into the mapping, whose pages come as they are touched.
    Straight,
    /// `write` from the mapping, `read` into a buffer, `pwrite` into the memory's file.
    Pwrite,
    /// The same, and then its pages are mapped, as they are after the other ways.
    PwriteMap,
    /// `sendfile` from the memory's file, pages populated ahead, `read` into the mapping.
    Sendfile,
    /// `sendfile` from the memory's file, `read` into a buffer, `pwrite` into the memory's file.
    SendfilePwrite,
    /// `splice` through a pipe on both sides.
    Splice,
}

#[derive(Debug, Args)]
pub struct BenchPeer {
    #[arg(long, value_parser = size)]
    pub memory: u64,
    #[arg(long)]
    pub hugepages: Backing,
    /// Where to listen.
    #[arg(long, value_parser = uri)]
    pub listen: Uri,
    /// Connections that a bare copy comes on; without, a migration is received.
    #[arg(long, requires = "way")]
    pub bare: Option<u8>,
    #[arg(long, value_enum)]
    pub way: Option<Way>,
    #[arg(long, value_parser = setting)]
    pub set: Vec<Setting>,
    #[arg(long)]
    pub exit_with_parent: u32,
}

#[derive(Debug, Args)]
pub struct BenchBitmap {
    /// The RAM that the bitmap is of; none of it is allocated.
    #[arg(long, value_name = "SIZE", default_value = "1T", value_parser = size)]
    pub memory: u64,
    /// Go on even if it will fill more memory than is available.
    #[arg(long)]
    pub force: bool,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}
