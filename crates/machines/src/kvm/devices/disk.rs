//! A disk image in a file, which both sides of a migration share.
//!
//! What must stay true: an image is open for use only while it is locked, and nothing that was read is kept once it is
//! unlocked, as others may write it then; and it is locked while its machine runs, so that no two machines run on it by
//! mistake.

use std::fmt;
use std::fs;
use std::io;

use imago::file::File;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, Storage, StorageOpenOptions};

use crate::device_config::{DiskAccess, DiskConfig, DiskFormat};

/// A disk image.
pub(super) struct Disk {
    pub(super) config: DiskConfig,
    /// Bytes that the guest sees.
    pub(super) size: u64,
    // Dropped in this order: dropping an image writes out what it has kept.
    image: Option<FormatAccess<File>>,
    lock: Option<fs::File>,
    /// Something was written that may not be on the medium yet.
    written: bool,
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
        Ok(Self { config, size, image: None, lock: None, written: false })
    }

    fn check_size(&self, size: u64) -> io::Result<()> {
        if size == self.size {
            return Ok(());
        }
        Err(io::Error::other(format!("it has {size} bytes now and had {} before", self.size)))
    }

    /// Forgets what was known of it, and looks whether it can be used, without writing anything.
    pub(super) fn renew(&mut self) -> io::Result<()> {
        self.image = None;
        self.check_size(Image::open(&self.config)?.0.size())
    }

    /// Locks it and opens it anew, unless it has been locked all the time.
    pub(super) fn acquire(&mut self) -> io::Result<()> {
        if self.lock.is_none() {
            let file = fs::File::open(&self.config.path)?;
            let locked = match self.config.access {
                DiskAccess::Writable => file.try_lock(),
                DiskAccess::ReadOnly => file.try_lock_shared(),
            };
            match locked {
                Ok(()) => self.lock = Some(file),
                Err(fs::TryLockError::WouldBlock) => return Err(io::Error::other("another machine runs on it")),
                Err(fs::TryLockError::Error(error)) => return Err(error),
            }
        }
        if self.image.is_none() {
            let image = open(&self.config, self.config.access)?;
            self.check_size(image.size())?;
            self.image = Some(image);
        }
        Ok(())
    }

    /// Makes others see all of it, has it on the medium, keeps nothing of it, and unlocks it.
    ///
    /// # Errors
    /// When what was written could not be written out. It stays open and locked then: what is kept is the only copy.
    pub(super) fn release(&mut self) -> io::Result<()> {
        if let Some(image) = &self.image {
            image.flush()?;
            // A flush at another host does not cover what was written here.
            if self.written {
                image.sync()?;
                self.written = false;
            }
        }
        self.image = None;
        // Closing alone would leave it with a child process that has just been forked, until that executes its program.
        self.lock.take().map_or(Ok(()), |lock| lock.unlock())
    }

    fn image(&mut self) -> io::Result<&mut FormatAccess<File>> {
        self.image.as_mut().ok_or_else(|| io::Error::other("the image is not open"))
    }

    /// The image, to write to it.
    fn writable(&mut self) -> io::Result<&mut FormatAccess<File>> {
        self.written = true;
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
