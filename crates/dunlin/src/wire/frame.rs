//! Frames: the unit on a channel.
//!
//! A frame is a header of fixed size, a table (of page runs, else empty) and data (page contents, or a message's
//! body). Each has a checksum of its own: the header's is checked before its lengths are believed, the table's before
//! its runs are, the data's before it counts. That of pages comes behind them, so that a sender can make it while it
//! sends.

use super::codec::{Reader, Writer};
use super::{ENTRY_BYTES, MAX_ENTRIES, MAX_PAGES_BYTES, WireError};

/// Size of a header.
pub(crate) const HEADER_BYTES: usize = 40;
/// Size of the checksum behind pages.
pub(crate) const PAGES_TRAILER_BYTES: usize = 8;
const MAGIC: u32 = u32::from_le_bytes(*b"DLF1");

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
pub(crate) enum FrameType {
    Start = 1,
    Accepted = 2,
    RoundDone = 3,
    Mark = 4,
    MarkAck = 5,
    Section = 6,
    Offer = 7,
    Ready = 8,
    Release = 9,
    Running = 10,
    Done = 11,
    Abort = 12,
    Query = 13,
    Heartbeat = 14,
    Stopped = 15,
    Probe = 16,
    Probed = 17,
    Pages = 32,
}

impl FrameType {
    pub(crate) const ALL: [Self; 18] = [
        Self::Start,
        Self::Accepted,
        Self::RoundDone,
        Self::Mark,
        Self::MarkAck,
        Self::Section,
        Self::Offer,
        Self::Ready,
        Self::Release,
        Self::Running,
        Self::Done,
        Self::Abort,
        Self::Query,
        Self::Heartbeat,
        Self::Stopped,
        Self::Probe,
        Self::Probed,
        Self::Pages,
    ];

    fn from_number(number: u16) -> Result<Self, WireError> {
        Self::ALL
            .into_iter()
            .find(|t| *t as u16 == number)
            .ok_or(WireError::Value { what: "the frame's type", value: u64::from(number) })
    }

    /// The most data a frame of this type may carry.
    pub(crate) fn data_limit(self) -> u32 {
        match self {
            Self::Start => 4 << 20,
            Self::Section => (1 << 20) + 512,
            Self::Probe => 1 << 20,
            Self::Pages => MAX_PAGES_BYTES,
            _ => 4096,
        }
    }

    /// Whether it is part of a round on a data channel.
    pub(crate) fn is_of_pages(self) -> bool {
        matches!(self, Self::Pages | Self::Mark)
    }

    /// Bytes that follow the data: the checksum of pages.
    pub(crate) fn trailer_bytes(self) -> usize {
        if self == Self::Pages { PAGES_TRAILER_BYTES } else { 0 }
    }

    fn table_limit(self) -> u32 {
        match self {
            Self::Pages => (MAX_ENTRIES * ENTRY_BYTES) as u32,
            _ => 0,
        }
    }

    /// Its name in errors.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Start => "Start",
            Self::Accepted => "Accepted",
            Self::RoundDone => "RoundDone",
            Self::Mark => "Mark",
            Self::MarkAck => "MarkAck",
            Self::Section => "Section",
            Self::Offer => "Offer",
            Self::Ready => "Ready",
            Self::Release => "Release",
            Self::Running => "Running",
            Self::Done => "Done",
            Self::Abort => "Abort",
            Self::Query => "Query",
            Self::Heartbeat => "Heartbeat",
            Self::Stopped => "Stopped",
            Self::Probe => "Probe",
            Self::Probed => "Probed",
            Self::Pages => "Pages",
        }
    }
}

/// A frame's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FrameHeader {
    pub(crate) frame_type: FrameType,
    /// Counts the frames of one direction of one connection, from 0.
    pub(crate) sequence: u64,
    pub(crate) table_length: u32,
    pub(crate) data_length: u32,
    pub(crate) table_checksum: u32,
    /// 0 in a Pages frame.
    pub(crate) data_checksum: u64,
}

impl FrameHeader {
    pub(crate) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut writer = Writer(Vec::with_capacity(HEADER_BYTES));
        writer.u32(MAGIC);
        writer.u16(self.frame_type as u16);
        writer.u16(0);
        writer.u64(self.sequence);
        writer.u32(self.table_length);
        writer.u32(self.data_length);
        writer.u32(self.table_checksum);
        writer.u64(self.data_checksum);
        let sum = table_checksum(&writer.0);
        writer.u32(sum);
        let mut header = [0; HEADER_BYTES];
        for (to, from) in header.iter_mut().zip(writer.0) {
            *to = from;
        }
        header
    }

    /// Decodes a header that must be frame number `expected`.
    pub(crate) fn decode(bytes: &[u8; HEADER_BYTES], expected: u64) -> Result<Self, WireError> {
        let (body, stored) = bytes.split_last_chunk::<4>().ok_or(WireError::Length { what: "a frame's header" })?;
        if table_checksum(body) != u32::from_le_bytes(*stored) {
            return Err(WireError::Checksum { what: "a frame's header" });
        }
        let mut reader = Reader::new(body, "a frame's header");
        let magic = reader.u32()?;
        if magic != MAGIC {
            return Err(WireError::Value { what: "the frame's first word", value: u64::from(magic) });
        }
        let frame_type = FrameType::from_number(reader.u16()?)?;
        let reserved = reader.u16()?;
        reader.reserved(u64::from(reserved))?;
        let header = Self {
            frame_type,
            sequence: reader.u64()?,
            table_length: reader.u32()?,
            data_length: reader.u32()?,
            table_checksum: reader.u32()?,
            data_checksum: reader.u64()?,
        };
        if frame_type == FrameType::Pages {
            reader.reserved(header.data_checksum)?;
        }
        if header.sequence != expected {
            return Err(WireError::Sequence { expected, got: header.sequence });
        }
        let limits = [
            ("a frame's table", header.table_length, frame_type.table_limit()),
            ("a frame's data", header.data_length, frame_type.data_limit()),
        ];
        for (what, length, limit) in limits {
            if length > limit {
                return Err(WireError::TooLong { what, length: u64::from(length), limit: u64::from(limit) });
            }
        }
        Ok(header)
    }
}

/// CRC-32C (Castagnoli, as in iSCSI), for headers and tables.
pub(crate) fn table_checksum(bytes: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(bytes)
}

/// CRC-64/NVME, for data.
pub(crate) fn data_checksum(bytes: &[u8]) -> u64 {
    crc_fast::crc64_nvme(bytes)
}

/// CRC-64/NVME over pieces, as if they were one.
#[derive(Debug)]
pub(crate) struct DataDigest(crc_fast::Digest);

impl Default for DataDigest {
    fn default() -> Self {
        Self(crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc64Nvme))
    }
}

impl DataDigest {
    pub(crate) fn update(&mut self, piece: &[u8]) {
        self.0.update(piece);
    }

    pub(crate) fn value(&self) -> u64 {
        self.0.finalize()
    }
}
