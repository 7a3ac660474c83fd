//! The tracker that a migration has on a VM's rings.
//!
//! What must stay true: its thread, which reads the rings from time to time, ends with it.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::super::super::{CHUNK_SIZE, DirtyBitmap, DirtyTracker, TrackerError};
use super::super::{index, machine};
use super::KvmDirtyRings;

/// [`DirtyTracker`] on the dirty rings of a VM's vCPUs.
#[derive(Debug)]
pub struct KvmDirtyRing {
    rings: Arc<KvmDirtyRings>,
    own_writes: Option<Arc<[DirtyBitmap]>>,
    started: AtomicBool,
    read_every: Option<Duration>,
    reader: Mutex<Option<Reader>>,
}

/// A thread that reads the rings from time to time, until this is dropped.
#[derive(Debug)]
struct Reader {
    stay: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Reader {
    fn start(rings: Arc<KvmDirtyRings>, every: Duration) -> io::Result<Self> {
        let (stay, gone) = mpsc::channel();
        let thread = std::thread::Builder::new().name("dirty rings".to_owned()).spawn(move || {
            while gone.recv_timeout(every) == Err(RecvTimeoutError::Timeout) {
                rings.look();
            }
        })?;
        Ok(Self { stay: Some(stay), thread: Some(thread) })
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.stay = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl KvmDirtyRing {
    /// A tracker that reads these rings. In `own_writes`, one for each block, the VMM marks what it writes itself: each page
    /// after the write to it. A thread of the tracker reads the rings as often as `read_every` says, so that they seldom fill
    /// while the engine waits for something; without, they are read when the engine asks and when one is full. Nothing is
    /// tracked until it is started.
    ///
    /// # Errors
    /// When `own_writes` are not as many as there are blocks.
    pub fn new(
        rings: Arc<KvmDirtyRings>,
        own_writes: Option<Arc<[DirtyBitmap]>>,
        read_every: Option<Duration>,
    ) -> Result<Self, TrackerError> {
        let blocks = rings.ram.blocks().len();
        if let Some(own) = &own_writes
            && own.len() != blocks
        {
            return Err(TrackerError::UnknownBlock { block: blocks.min(own.len()), blocks });
        }
        Ok(Self { rings, own_writes, started: AtomicBool::new(false), read_every, reader: Mutex::default() })
    }

    fn check(&self, block: usize) -> Result<(), TrackerError> {
        let blocks = self.rings.ram.blocks().len();
        if block >= blocks || !self.started.load(Ordering::Acquire) {
            return Err(TrackerError::UnknownBlock { block, blocks });
        }
        Ok(())
    }

    fn own(&self, block: usize) -> Option<&DirtyBitmap> {
        self.own_writes.as_ref()?.get(block)
    }

    fn reader(&self) -> MutexGuard<'_, Option<Reader>> {
        self.reader.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DirtyTracker for KvmDirtyRing {
    fn start(&self) -> Result<(), TrackerError> {
        if self.rings.in_use.swap(true, Ordering::AcqRel) {
            return Err(TrackerError::RingsInUse);
        }
        self.started.store(true, Ordering::Release);
        let begin = || {
            self.rings.start()?;
            let doing = machine("start a thread for the dirty rings of");
            let reader = self.read_every.map(|every| Reader::start(self.rings.clone(), every).map_err(doing));
            *self.reader() = reader.transpose()?;
            Ok(())
        };
        begin().inspect_err(|_| self.stop())
    }

    fn sync(&self, block: usize, dirty: &DirtyBitmap) -> Result<(), TrackerError> {
        self.check(block)?;
        self.rings.sync(block, dirty)?;
        if let Some(own) = self.own(block) {
            own.add_to(dirty);
        }
        Ok(())
    }

    fn rearm(&self, block: usize, range: Range<u64>, dirty: &DirtyBitmap) -> Result<(), TrackerError> {
        self.check(block)?;
        let chunks = index(range.start / CHUNK_SIZE)..index(range.end.div_ceil(CHUNK_SIZE));
        self.rings.rearm(block, chunks.clone(), dirty)?;
        if let Some(own) = self.own(block) {
            chunks.for_each(|chunk| own.move_chunk(chunk, dirty));
        }
        Ok(())
    }

    fn stop(&self) {
        if self.started.swap(false, Ordering::AcqRel) {
            *self.reader() = None;
            self.rings.switch_off();
            // What cannot be emptied now is when the next one starts, or that one says why not.
            let _ = self.rings.forget();
            self.rings.in_use.store(false, Ordering::Release);
        }
    }
}

impl Drop for KvmDirtyRing {
    fn drop(&mut self) {
        self.stop();
    }
}
