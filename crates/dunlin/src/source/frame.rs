//! A Pages frame in the making: runs, their encodings, and the versions that they replace at the destination.
//!
//! Pages that are neither compressed, or tried, nor kept for deltas stay where they are in guest RAM until the frame is sent. All
//! others are copied once, and encoded where the copy is. What must stay true: what a checksum or a version says of a
//! page is what was sent.

use std::ops::Range;

use super::versions::Versions;
use crate::error::Cause;
use crate::link::{ChannelCounters, FrameSender, PagesData, Way};
use crate::memory::{MemoryError, PAGE_SIZE, Ram, RamBlock};
use crate::page::{self, Encoder, Encodings, Link, MAX_UNIT_BYTES, PageKind};
use crate::parameters::{Integrity, Switch};
use crate::report::DeltaCounts;
use crate::wire::{DataDigest, ENTRY_BYTES, MAX_ENTRIES, MAX_PAGES_BYTES, PageRun, encode_run};

#[derive(Debug)]
pub(super) struct Frame {
    contents: Contents,
    encodings: Encodings,
    table: Vec<u8>,
    /// Plain pages stay where they are until the frame is sent.
    in_place: bool,
    /// Pages of this round are kept for deltas.
    keeps: bool,
    zero_copy: Switch,
    /// Where pages that stay are checked on their way.
    hot: Box<[u8]>,
}

/// Large enough that the other side is not woken for little, small enough for a processor's cache.
const HOT_BYTES: usize = 512 << 10;

/// What a frame is about.
#[derive(Debug)]
struct Contents {
    runs: Vec<PageRun>,
    /// Bytes of the encodings of all runs.
    data_bytes: u64,
    /// Of the pages as the guest wrote them, where pages are to be checked.
    digest: Option<DataDigest>,
    versions: Option<Versions>,
}

impl Frame {
    /// With checksums if `integrity` asks for them, with deltas against `versions` if there are. With `zero_copy`
    /// pages that are sent from where they are go without being copied by the kernel, where it can.
    pub(super) fn new(integrity: Integrity, versions: Option<Versions>, zero_copy: Switch) -> Self {
        let digest = (integrity == Integrity::Checksum).then(DataDigest::default);
        let contents = Contents { runs: Vec::new(), data_bytes: 0, digest, versions };
        let hot = vec![0; if integrity == Integrity::Checksum { HOT_BYTES } else { 0 }].into();
        Self {
            contents,
            encodings: Encodings::default(),
            table: Vec::new(),
            in_place: false,
            keeps: false,
            zero_copy,
            hot,
        }
    }

    /// A round begins.
    pub(super) fn begin(&mut self, round: u32) {
        self.keeps = self.contents.versions.as_mut().is_some_and(|versions| {
            versions.begin(round);
            versions.admits()
        });
    }

    /// What `delta` did so far.
    pub(super) fn delta_counts(&self) -> Option<DeltaCounts> {
        self.contents.versions.as_ref().map(|versions| versions.counts)
    }

    /// Adds pages, at most [`MAX_UNIT_BYTES`] of them, each as the kind that suits it.
    pub(super) fn add(
        &mut self,
        (index, block): (u16, &RamBlock),
        bytes: Range<u64>,
        encoder: &mut Encoder,
        link: &Link,
        counters: &ChannelCounters,
    ) -> Result<(), MemoryError> {
        let length = bytes.end.saturating_sub(bytes.start);
        if self.contents.data_bytes == 0 {
            self.in_place = !self.keeps && !encoder.is_due();
        }
        // Zeros are found where they are, and need no copy.
        if !self.keeps && !self.in_place && block.is_zero(bytes.clone())? {
            Adding { block: index, contents: &mut self.contents, counters }.run(PageKind::Zero, bytes, 0);
            return Ok(());
        }
        let mut out = Adding { block: index, contents: &mut self.contents, counters };
        if self.in_place {
            encoder.pass();
            return page::survey(block, bytes, |kind, bytes| {
                let encoded = if kind == PageKind::Zero { 0 } else { bytes.end.saturating_sub(bytes.start) };
                out.run(kind, bytes, encoded);
            });
        }
        block.read(bytes.start, self.encodings.room(length as usize))?;
        encoder.encode(&mut self.encodings, length as usize, bytes.start, link, &mut out);
        Ok(())
    }

    /// Adds a run of zeros that nobody has to look at.
    pub(super) fn add_hole(&mut self, block: u16, bytes: Range<u64>, counters: &ChannelCounters) {
        Adding { block, contents: &mut self.contents, counters }.run(PageKind::Zero, bytes, 0);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.contents.runs.is_empty()
    }

    /// Whether it has `enough_bytes` of encodings, or no room for another unit whose pages are a run each.
    pub(super) fn is_full(&self, enough_bytes: u64) -> bool {
        const ROOM: usize = MAX_UNIT_BYTES / PAGE_SIZE as usize;
        let Contents { runs, data_bytes, .. } = &self.contents;
        *data_bytes >= enough_bytes
            || data_bytes.saturating_add(MAX_UNIT_BYTES as u64) > u64::from(MAX_PAGES_BYTES)
            || runs.len() + ROOM > MAX_ENTRIES
    }

    /// Whether its pages are copied though nothing is to be compressed any more, or the other way round.
    pub(super) fn is_outdated(&self, encoder: &Encoder) -> bool {
        !self.keeps && self.contents.data_bytes > 0 && self.in_place == encoder.is_due()
    }

    /// Whether pages in it are compressed.
    pub(super) fn is_compressed(&self) -> bool {
        self.contents.runs.iter().any(|run| matches!(run.kind, PageKind::Lz4 | PageKind::Zstd))
    }

    /// Bytes on the link, but for the header.
    pub(super) fn wire_bytes(&self) -> u64 {
        self.contents.data_bytes.saturating_add((self.contents.runs.len() * ENTRY_BYTES) as u64)
    }

    /// Sends it, and begins anew.
    pub(super) fn send(&mut self, ram: &Ram, sender: &mut FrameSender) -> Result<(), Cause> {
        self.table.clear();
        for run in &self.contents.runs {
            encode_run(&mut self.table, run);
        }
        if self.in_place {
            let plain = self.contents.runs.iter().filter(|run| run.kind == PageKind::Plain);
            let slices = plain.filter_map(|run| {
                let block = ram.blocks().get(usize::from(run.block))?;
                Some(block.io_slice(run.offset, run.length as usize))
            });
            let slices = slices.collect::<Result<Vec<_>, _>>()?;
            let way = match (&self.contents.digest, self.zero_copy) {
                (Some(_), _) => Way::Checked(&mut self.hot),
                (None, Switch::On) => Way::ZeroCopy,
                (None, Switch::Off) => Way::Straight,
            };
            sender.send_pages(&self.table, PagesData::InPlace { slices: &slices, way })?;
        } else {
            let checksum = self.contents.digest.as_ref().map_or(0, DataDigest::value);
            sender.send_pages(&self.table, PagesData::Encoded { bytes: self.encodings.as_slice(), checksum })?;
        }
        self.encodings.clear();
        self.contents.clear();
        Ok(())
    }
}

impl Contents {
    fn clear(&mut self) {
        self.runs.clear();
        self.data_bytes = 0;
        if let Some(digest) = &mut self.digest {
            *digest = DataDigest::default();
        }
    }

    /// Adds a run, joined to the run before where they are one.
    fn push(&mut self, run: PageRun) {
        self.data_bytes = self.data_bytes.saturating_add(u64::from(run.encoded_length));
        if let Some(last) = self.runs.last_mut()
            && (last.block, last.kind) == (run.block, run.kind)
            && run.kind.joins()
            && last.offset.checked_add(u64::from(last.length)) == Some(run.offset)
            && let Some(length) = last.length.checked_add(run.length)
        {
            last.length = length;
            last.encoded_length = last.encoded_length.saturating_add(run.encoded_length);
            return;
        }
        self.runs.push(run);
    }
}

/// Where the encoder puts what it makes.
struct Adding<'a> {
    block: u16,
    contents: &'a mut Contents,
    counters: &'a ChannelCounters,
}

impl Adding<'_> {
    fn run(&mut self, kind: PageKind, bytes: Range<u64>, encoded_length: u64) {
        let length = bytes.end.saturating_sub(bytes.start);
        self.contents.push(PageRun {
            block: self.block,
            kind,
            offset: bytes.start,
            length: length as u32,
            encoded_length: encoded_length as u32,
        });
        self.counters.count(kind, length);
    }
}

impl page::Out for Adding<'_> {
    fn push(&mut self, kind: PageKind, offset: u64, pages: &[u8], encoded: usize) {
        self.run(kind, offset..offset.saturating_add(pages.len() as u64), encoded as u64);
        let Contents { digest, versions, .. } = &mut *self.contents;
        if let (Some(digest), true) = (digest, kind != PageKind::Zero) {
            digest.update(pages);
        }
        if let Some(versions) = versions {
            versions.sent(kind, self.block, offset, pages, encoded);
        }
    }

    fn sent_before(&mut self, offset: u64) -> Option<&[u8]> {
        self.contents.versions.as_ref().and_then(|versions| versions.get(self.block, offset))
    }
}
