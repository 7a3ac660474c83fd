//! A machine that does nothing: memory to be moved, by a migration or by a bare copy.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow};
use dunlin::memory::{DirtyTracker, Ram, RamBlock, WriteProtectTracker};
use dunlin::units::format_size;
use dunlin::{Machine, MachineError, StartPermit, StateSection, SwitchoverCost};
use dunlin_machines::Backing;
use vm_memory::{MmapRegion, VolatileMemory, VolatileSlice};

/// Numbers that look random and are the same every time (xorshift64).
#[derive(Debug)]
pub struct Random(u64);

impl Default for Random {
    fn default() -> Self {
        Self(0x9E37_79B9_7F4A_7C15)
    }
}

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// One of `0..limit`; 0 if there is none.
    pub fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() >> 11).unwrap_or(0) % limit.max(1)
    }
}

/// Memory of this host, in one block.
#[derive(Debug)]
pub struct Idle {
    region: Arc<MmapRegion>,
    ram: Ram,
}

impl Idle {
    /// Fresh memory: nothing of it is present.
    pub fn new(bytes: u64, backing: Backing) -> Result<Arc<Self>> {
        let failed = || format!("could not make a memory of {} on pages of {backing}iB", format_size(bytes));
        let region = Arc::new(backing.map(usize::try_from(bytes)?).with_context(failed)?);
        let ram = Ram::new(vec![backing.block("ram", region.clone())?])?;
        Ok(Arc::new(Self { region, ram }))
    }

    pub fn block(&self) -> Result<&RamBlock> {
        self.ram.blocks().first().context("a machine without RAM")
    }

    /// The file behind the memory.
    pub fn file(&self) -> Result<BorrowedFd<'_>> {
        Ok(self.region.file_offset().context("memory without a file")?.file().as_fd())
    }

    pub fn slice(&self, offset: u64, length: u64) -> Result<VolatileSlice<'_>> {
        let slice = self.region.get_slice(usize::try_from(offset)?, usize::try_from(length)?);
        slice.map_err(|error| anyhow!("{error}"))
    }

    /// Makes every page present, and fills it with what `page` says of its number.
    pub fn fill(&self, mut page: impl FnMut(u64, &mut [u8; 4096])) -> Result<()> {
        let block = self.block()?;
        block.populate(0..block.size_bytes())?;
        let mut bytes = [0; 4096];
        for number in 0..block.size_bytes() / 4096 {
            page(number, &mut bytes);
            block.write(number * 4096, &bytes)?;
        }
        Ok(())
    }

    /// A digest of all of the memory; holes stay holes.
    pub fn digest(&self) -> Result<u64> {
        let block = self.block()?;
        let mut digest = 0u64;
        let mut page = [0; 4096];
        for number in 0..block.size_bytes() / 4096 {
            let mut sum = number;
            match self.region.file_offset() {
                // What the file has as a hole reads as zeros, without a page being made for it.
                Some(file) => drop(rustix::io::pread(file.file(), &mut page, number * 4096)?),
                None => block.read(number * 4096, &mut page)?,
            }
            for word in page.as_chunks::<8>().0 {
                sum = (sum ^ u64::from_le_bytes(*word)).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(31);
            }
            digest = digest.wrapping_add(sum);
        }
        Ok(digest)
    }

    /// Bytes of the host's memory behind it, where there is a file to ask.
    pub fn present_bytes(&self) -> Result<Option<u64>> {
        let Some(file) = self.region.file_offset() else { return Ok(None) };
        Ok(Some(u64::try_from(rustix::fs::fstat(file.file())?.st_blocks)? * 512))
    }
}

impl Machine for Idle {
    fn ram(&self) -> &Ram {
        &self.ram
    }

    fn dirty_tracker(&self) -> Result<Box<dyn DirtyTracker>, MachineError> {
        Ok(Box::new(WriteProtectTracker::new(&self.ram)?))
    }

    fn profile(&self) -> Vec<u8> {
        b"idle machine, version 1".to_vec()
    }

    fn accept_profile(&self, profile: &[u8]) -> Result<(), MachineError> {
        if profile == self.profile() { Ok(()) } else { Err("the source is not an idle machine".into()) }
    }

    fn switchover_cost(&self) -> SwitchoverCost {
        let none = std::time::Duration::ZERO;
        SwitchoverCost { pause: none, save: none, load: none, resume: none, state_bytes: 0 }
    }

    fn pause(&self) -> Result<(), MachineError> {
        Ok(())
    }

    fn resume(&self, _: &StartPermit) -> Result<(), MachineError> {
        Ok(())
    }

    fn save(&self) -> Result<Vec<StateSection>, MachineError> {
        Ok(Vec::new())
    }

    fn load(&self, _sections: Vec<StateSection>) -> Result<(), MachineError> {
        Ok(())
    }
}
