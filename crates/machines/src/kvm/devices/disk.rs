//! A disk image in a file, which both sides of a migration share.
//!
//! What must stay true: an image is open for use only while its owner's byte is locked, and nothing that was read is kept over a
//! pause, because another side may write the image before the guest goes on here. The locks follow the ownership of the guest
//! and not whether it runs ([`ImageLock`]), and a guest goes on only on an image that is as the guest has left it.

use std::fmt;
use std::io;
use std::os::unix::fs::MetadataExt;

use dunlin::Claim;
use imago::file::File;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, Storage, StorageOpenOptions};
use rustix::fs::{Timespec, Timestamps, UTIME_OMIT};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use super::image_lock::ImageLock;
use crate::device_config::{DiskAccess, DiskConfig, DiskFormat};

/// How a guest has left an image: what tells whether somebody else has written it since. It travels with the guest, so it
/// has only what every host sees the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Left {
    /// Bytes of the file.
    bytes: u64,
    /// When it was last written: seconds and nanoseconds.
    written: (i64, i64),
}

impl Left {
    fn of(file: &std::fs::File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        Ok(Self { bytes: metadata.len(), written: (metadata.mtime(), metadata.mtime_nsec()) })
    }
}

impl fmt::Display for Left {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (seconds, nanoseconds) = self.written;
        write!(f, "{} bytes, last written at {seconds}.{nanoseconds:09}", self.bytes)
    }
}

/// A disk image.
pub(super) struct Disk {
    pub(super) config: DiskConfig,
    /// Bytes that the guest sees.
    pub(super) size: u64,
    // Dropped in this order: dropping an image writes out what it has kept.
    image: Option<FormatAccess<File>>,
    lock: ImageLock,
    /// The machine runs: the image may be opened whenever it is needed.
    in_use: bool,
    /// How the guest has left it, here or at its source.
    left: Option<Left>,
    /// Something was written that may not be on the medium yet.
    written: bool,
    /// Something was written since the machine began to run.
    changed: bool,
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disk").field("config", &self.config).field("size", &self.size).finish_non_exhaustive()
    }
}

fn open(config: &DiskConfig, access: DiskAccess) -> io::Result<FormatAccess<File>> {
    let write = access == DiskAccess::Writable;
    let file = File::open(StorageOpenOptions::new().write(write).filename(&config.path))?;
    // An image names other files only if who wrote it wanted so, which may have been a guest.
    let gate = DenyImplicitOpenGate::default();
    Ok(match config.format {
        DiskFormat::Raw => FormatAccess::new(Raw::builder(file).write(write).open(gate)?),
        DiskFormat::Qcow2 => FormatAccess::new(Qcow2::<File>::builder(file).write(write).open(gate)?),
    })
}

/// An image as others see it, only to be read.
pub(in crate::kvm) struct Image(FormatAccess<File>);

impl Image {
    pub(super) fn open(config: &DiskConfig) -> io::Result<Self> {
        Ok(Self(open(config, DiskAccess::ReadOnly)?))
    }

    /// Reads all of `to` from `offset` on.
    pub(in crate::kvm) fn read(&self, to: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read(to, offset)
    }
}

impl Disk {
    /// Looks at an image without keeping or writing anything.
    pub(super) fn look(config: DiskConfig) -> io::Result<Self> {
        let size = Image::open(&config)?.0.size();
        Ok(Self {
            config,
            size,
            image: None,
            lock: ImageLock::default(),
            in_use: false,
            left: None,
            written: false,
            changed: false,
        })
    }

    fn check_size(&self, size: u64) -> io::Result<()> {
        if size == self.size {
            return Ok(());
        }
        Err(io::Error::other(format!("it has {size} bytes now and had {} before", self.size)))
    }

    /// The guest comes from elsewhere, where it has left the image like this, if that is known. Forgets what was known of it,
    /// and looks whether it can be used, without writing anything.
    pub(super) fn renew(&mut self, left: Option<Left>) -> io::Result<()> {
        self.image = None;
        self.in_use = false;
        self.left = left;
        self.check_size(Image::open(&self.config)?.0.size())
    }

    /// Takes or gives up its locks.
    pub(super) fn claim(&mut self, claim: Claim) -> io::Result<()> {
        if claim != Claim::Anyway {
            return self.lock.claim(&self.config, claim);
        }
        self.lock.claim(&self.config, Claim::Whole)?;
        self.left = None;
        Ok(())
    }

    /// What is locked.
    pub(super) fn claimed(&self) -> Claim {
        self.lock.claimed()
    }

    /// How the guest has left it, once it was paused.
    pub(super) fn left(&self) -> Option<Left> {
        self.left
    }

    /// Opens it for use. A machine that nobody told what it owns takes the image as one that starts by itself.
    ///
    /// # Errors
    /// When it is not this machine's, is not as the guest has left it, or cannot be opened.
    pub(super) fn acquire(&mut self) -> io::Result<()> {
        if self.lock.is_free() {
            self.lock.claim(&self.config, Claim::Whole)?;
        }
        // What was opened for a start that came to nothing may be outdated; what could not be written out is the only copy.
        if !self.written {
            self.image = None;
        }
        self.open()?;
        self.in_use = true;
        Ok(())
    }

    fn open(&mut self) -> io::Result<()> {
        if !self.lock.is_owner() {
            return Err(io::Error::other("this machine does not own it: the guest was released to another"));
        }
        if self.image.is_none() {
            self.check_left()?;
            let image = open(&self.config, self.config.access)?;
            self.check_size(image.size())?;
            self.image = Some(image);
        }
        Ok(())
    }

    /// Checks that nobody has written the image since the guest was paused.
    fn check_left(&self) -> io::Result<()> {
        let locked = self.lock.file().ok_or_else(|| io::Error::other("it is not locked"))?.metadata()?;
        let named = std::fs::metadata(&self.config.path)?;
        if (named.dev(), named.ino()) != (locked.dev(), locked.ino()) {
            return Err(io::Error::other("another file has taken its place since it was locked"));
        }
        let Some(left) = self.left else { return Ok(()) };
        let found = Left { bytes: locked.len(), written: (locked.mtime(), locked.mtime_nsec()) };
        if found == left {
            return Ok(());
        }
        Err(io::Error::other(format!(
            "it was changed while the guest was paused (the guest left {left}; now it has {found}); going on would damage what \
             is on it"
        )))
    }

    /// The machine is paused: makes others see all of it, has it on the medium, and keeps nothing of it but its locks.
    ///
    /// # Errors
    /// When what was written could not be written out. It stays open then: what is kept is the only copy.
    pub(super) fn settle(&mut self) -> io::Result<()> {
        if let Some(image) = &self.image {
            image.flush()?;
            // A flush at another host does not cover what was written here.
            if self.written {
                image.sync()?;
                self.written = false;
            }
            self.image = None;
            self.leave()?;
        }
        self.in_use = false;
        Ok(())
    }

    /// The machine does not run after all; nothing was written.
    pub(super) fn let_go(&mut self) {
        self.in_use = false;
        if !self.written {
            self.image = None;
        }
    }

    /// The machine goes on after all: what [`settle`](Self::settle) has closed is opened when it is needed.
    pub(super) fn keep_on(&mut self) {
        self.in_use = true;
    }

    /// Notes how the image is left.
    fn leave(&mut self) -> io::Result<()> {
        let Some(file) = self.lock.file() else { return Ok(()) };
        if std::mem::take(&mut self.changed) && file.metadata()?.is_file() {
            // The kernel's own time of a write is that of its latest tick: another write within the tick would not show. The
            // exact time is one that no write gets. Who may not set it does without.
            let now = clock_gettime(ClockId::Realtime);
            let omit = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };
            let times = Timestamps {
                last_access: omit,
                last_modification: Timespec { tv_sec: now.tv_sec, tv_nsec: now.tv_nsec },
            };
            let _ = rustix::fs::futimens(file, &times);
        }
        self.left = Some(Left::of(file)?);
        Ok(())
    }

    fn image(&mut self) -> io::Result<&mut FormatAccess<File>> {
        if self.in_use {
            self.open()?;
        }
        self.image.as_mut().ok_or_else(|| io::Error::other("the image is not open"))
    }

    /// The image, to write to it.
    fn writable(&mut self) -> io::Result<&mut FormatAccess<File>> {
        self.image()?;
        (self.written, self.changed) = (true, true);
        self.image()
    }

    pub(super) fn read(&mut self, to: &mut [u8], offset: u64) -> io::Result<()> {
        self.image()?.read(to, offset)
    }

    pub(super) fn write(&mut self, from: &[u8], offset: u64) -> io::Result<()> {
        self.writable()?.write(from, offset)
    }

    /// Has everything on the medium.
    pub(super) fn sync(&mut self) -> io::Result<()> {
        let image = self.image()?;
        image.flush()?;
        image.sync()?;
        self.written = false;
        Ok(())
    }

    /// Says that what is there is not needed. Nothing may come of it.
    pub(super) fn discard(&mut self, offset: u64, length: u64) -> io::Result<()> {
        match self.writable()?.discard_to_any(offset, length) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            other => other,
        }
    }

    /// Has zeros there, and less room taken where that can be.
    pub(super) fn zero_and_free(&mut self, offset: u64, length: u64) -> io::Result<()> {
        match self.writable()?.discard_to_zero(offset, length) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => self.zero(offset, length),
            other => other,
        }
    }

    /// Has zeros there.
    pub(super) fn zero(&mut self, offset: u64, length: u64) -> io::Result<()> {
        self.writable()?.write_zeroes(offset, length)
    }
}
