//! The workers of all channels, as the driving thread commands them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::frame::Frame;
use super::setup::DataChannel;
use super::versions::Versions;
use super::worker::{Common, Worker};
use super::{Event, Shared};
use crate::channel::{Connection, block_broken_pipe_signal};
use crate::error::Cause;
use crate::link::{contain, lock, spawn};
use crate::page::{Compression, Encoder, Link};
use crate::parameters::{MultifdCompression, Switch};

/// How long a worker that shares its connection with the control messages may take to notice that it should stop,
/// before the connection is cut under it.
const PATIENCE: Duration = Duration::from_millis(500);

/// A thread a channel. They end, and their channels with them, when this is dropped.
pub(super) struct Workers {
    rounds: Vec<Sender<u32>>,
    threads: Vec<JoinHandle<()>>,
    connections: Vec<Arc<Connection>>,
    stop: Arc<AtomicBool>,
    /// The pages travel on the control connection.
    shares_control: bool,
}

impl Workers {
    pub(super) fn start(
        common: &Arc<Common>,
        channels: &[DataChannel],
        shares_control: bool,
        events: &Sender<Event>,
        shared: &Shared,
    ) -> Result<Self, Cause> {
        let parameters = lock(&shared.parameters).clone();
        let compression = match parameters.multifd_compression {
            MultifdCompression::None => Compression::None,
            MultifdCompression::Lz4 => Compression::Lz4,
            MultifdCompression::Zstd => Compression::Zstd { level: parameters.multifd_zstd_level },
        };
        // More than there is RAM is of no use.
        let cache_bytes = parameters.xbzrle_cache_size.min(common.ram.total_bytes()) / channels.len().max(1) as u64;
        let mut workers = Self {
            rounds: Vec::new(),
            threads: Vec::new(),
            connections: Vec::new(),
            stop: common.stop.clone(),
            shares_control,
        };
        for (index, channel) in channels.iter().enumerate() {
            let mut worker = Worker {
                index,
                workers: channels.len(),
                common: common.clone(),
                sender: channel.sender.clone(),
                counters: channel.counters.clone(),
                clock: None,
                encoder: Encoder::new(compression).map_err(|source| Cause::Io {
                    doing: "make",
                    target: "a compressor".into(),
                    source,
                })?,
                link: Link::default(),
                latest_bytes: 0,
                frame: Frame::new(
                    parameters.integrity,
                    (parameters.xbzrle == Switch::On).then(|| Versions::new(cache_bytes)),
                    parameters.zero_copy_send,
                ),
                frame_rate: 0,
                parts: Vec::new(),
            };
            workers.connections.push(lock(&channel.sender).connection().clone());
            let (rounds, wanted) = mpsc::channel();
            let (events, cpu) = (events.clone(), shared.cpu.clone());
            workers.threads.push(spawn("source worker", move || {
                let mut meter = cpu.meter();
                // `sendfile` to a peer that has gone would end the VMM's process.
                block_broken_pipe_signal();
                for round in wanted {
                    let result = contain("source worker", || worker.round(round));
                    meter.add();
                    if events.send(Event::Worker(result)).is_err() {
                        return;
                    }
                }
            })?);
            workers.rounds.push(rounds);
        }
        Ok(workers)
    }

    pub(super) fn count(&self) -> usize {
        self.rounds.len()
    }

    /// Lets every worker begin `round`.
    pub(super) fn begin(&self, round: u32) -> Result<(), Cause> {
        for rounds in &self.rounds {
            let gone = |_| Cause::Thread { thread: "source worker", what: "ended".into() };
            rounds.send(round).map_err(gone)?;
        }
        Ok(())
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.rounds.clear();
        if self.shares_control {
            let deadline = Instant::now() + PATIENCE;
            while Instant::now() < deadline && self.threads.iter().any(|thread| !thread.is_finished()) {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        if !self.shares_control || self.threads.iter().any(|thread| !thread.is_finished()) {
            self.connections.iter().for_each(|connection| connection.shutdown());
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
