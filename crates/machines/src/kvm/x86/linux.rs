//! Linux in RAM: the kernel, its command line and initrd, the tables that it starts from, and where its first vCPU starts.
//!
//! A kernel in ELF that has the note for it is entered by the PVH protocol, in 32-bit mode without paging; another one in
//! ELF and a bzImage by Linux' own 64-bit protocol. What must stay true: nothing that is put into RAM here overlaps anything
//! else, and the memory map gives the guest no address that has no RAM behind it.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::start_info::{
    XEN_HVM_MEMMAP_TYPE_RAM, XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use linux_loader::loader::{BzImage, Elf, KernelLoader, PvhBootCapability};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap, ReadVolatile};

use super::acpi::{self, VirtioWindow};

/// Where RAM begins again behind the BIOS' area; kernels are loaded there or above.
const HIGH_MEMORY: u64 = 1 << 20;
/// What lies below: up to where old BIOSes had data of their own.
const LOW_MEMORY_END: u64 = 0x9_fc00;

pub(super) const GDT: u64 = 0x7000;
/// The zero page, or what takes its place.
const START: u64 = 0x8000;
const MEMORY_MAP: u64 = 0x9000;
const MODULES: u64 = 0xa000;
/// Six pages.
pub(super) const PAGE_TABLES: u64 = 0x1_0000;
const COMMAND_LINE: u64 = 0x2_0000;
/// What Linux takes on x86, without the zero at the end.
const COMMAND_LINE_MAX: usize = 2047;

/// None, 32-bit code, and what Linux' protocol has its numbers for: 64-bit code and data.
pub(super) const GDT_ENTRIES: [u64; 4] = [0, 0x00cf_9b00_0000_ffff, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

const PAGE: u64 = 4096;
const GIB: u64 = 1 << 30;
const E820_RAM: u32 = 1;

const ELF_MAGIC: [u8; 4] = *b"\x7fELF";
const BZIMAGE_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
const BOOT_FLAG: u16 = 0xaa55;
/// A loader without a number of its own.
const LOADER: u8 = 0xff;
/// Offset of the 64-bit entry in a bzImage's kernel.
const ENTRY_64: u64 = 0x200;
/// `xloadflags`: there is one.
const HAS_ENTRY_64: u16 = 1;
/// Kernels that do not say take an initrd up to here.
const INITRD_MAX: u64 = 0x37ff_ffff;

/// A Linux kernel and what it is given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    /// In ELF (`vmlinux`) or as bzImage (`vmlinuz`).
    pub image: PathBuf,
    /// Its command line.
    pub command_line: String,
    /// Its first file system.
    pub initrd: Option<PathBuf>,
}

/// Why a kernel cannot be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BootError {
    /// A file that cannot be read.
    #[error("could not read the {what} {path}: {source}")]
    Read {
        /// Kernel or initrd.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// Another kind of file.
    #[error("{path} is not a Linux kernel that can be started here: {why}")]
    NotAKernel {
        /// Its path.
        path: PathBuf,
        /// What it lacks.
        why: String,
    },
    /// There is not enough memory.
    #[error("the {what} {path} needs {needed} bytes of memory up to {limit:#x}, where there are {room}")]
    TooLarge {
        /// Kernel or initrd.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// What it takes.
        needed: u64,
        /// What there is.
        room: u64,
        /// Up to which address.
        limit: u64,
    },
    /// A command line that the kernel would not understand.
    #[error("the kernel's command line is {length} bytes long; it may have {COMMAND_LINE_MAX}, and no zeros")]
    CommandLine {
        /// Its length.
        length: usize,
    },
    /// RAM could not be written.
    #[error("could not write the guest's memory at {address:#x}: {source}")]
    Write {
        /// Where.
        address: u64,
        /// Why not.
        source: vm_memory::GuestMemoryError,
    },
}

/// How and where the first vCPU starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::kvm) enum Entry {
    /// 32-bit mode, no paging; `start` in ebx.
    Pvh {
        /// First instruction.
        code: u64,
        /// What it is told.
        start: u64,
    },
    /// 64-bit mode, memory mapped to itself; `start` in rsi.
    Long {
        /// First instruction.
        code: u64,
        /// What it is told.
        start: u64,
    },
}

/// RAM as a kernel sees it.
#[derive(Debug, Clone, Copy)]
pub(in crate::kvm) struct Map<'a> {
    /// All of it.
    pub(in crate::kvm) memory: &'a GuestMemoryMmap,
    /// Bytes from address 0 on.
    pub(in crate::kvm) low_bytes: u64,
    /// Where there is more, and how many bytes.
    pub(in crate::kvm) high: Option<(u64, u64)>,
}

impl Map<'_> {
    /// Pieces of RAM: start and size.
    fn pieces(&self) -> impl Iterator<Item = (u64, u64)> {
        let below = self.low_bytes.saturating_sub(HIGH_MEMORY);
        [(0, LOW_MEMORY_END), (HIGH_MEMORY, below)].into_iter().chain(self.high).filter(|(_, size)| *size > 0)
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), BootError> {
        let written = self.memory.write_slice(bytes, GuestAddress(address));
        written.map_err(|source| BootError::Write { address, source })
    }
}

/// The kernel's place.
struct Loaded {
    /// Where it ends, with all that it will unpack before it looks at its memory.
    end: u64,
    /// The entry, and for Linux' own protocol what the kernel says of itself.
    entry: LoadedEntry,
    /// The highest address of an initrd.
    initrd_max: u64,
}

enum LoadedEntry {
    Pvh(u64),
    Long(u64, Box<setup_header>),
}

/// Puts all that a kernel needs into RAM, which is all zeros.
pub(in crate::kvm) fn load(
    kernel: &Kernel,
    map: Map<'_>,
    vcpus: u32,
    devices: &[VirtioWindow],
) -> Result<Entry, BootError> {
    let loaded = load_image(&kernel.image, map)?;
    let length = kernel.command_line.len();
    let command_line_max = match &loaded.entry {
        LoadedEntry::Long(_, header) if header.cmdline_size > 0 => COMMAND_LINE_MAX.min(header.cmdline_size as usize),
        _ => COMMAND_LINE_MAX,
    };
    if length > command_line_max || kernel.command_line.contains('\0') {
        return Err(BootError::CommandLine { length });
    }
    map.write(COMMAND_LINE, kernel.command_line.as_bytes())?;
    map.write(acpi::ROOT, &acpi::tables(vcpus, devices))?;
    for (index, entry) in (0..).zip(GDT_ENTRIES) {
        map.write(GDT + index * 8, &entry.to_le_bytes())?;
    }
    let initrd = match &kernel.initrd {
        Some(path) => Some(load_initrd(path, map, &loaded)?),
        None => None,
    };
    match loaded.entry {
        LoadedEntry::Pvh(code) => {
            start_info(map, initrd)?;
            Ok(Entry::Pvh { code, start: START })
        }
        LoadedEntry::Long(code, header) => {
            zero_page(map, *header, initrd)?;
            page_tables(map)?;
            Ok(Entry::Long { code, start: START })
        }
    }
}

/// A file and its length.
fn open(what: &'static str, path: &Path) -> Result<(File, u64), BootError> {
    let failed = |source| BootError::Read { what, path: path.to_owned(), source };
    let mut file = File::open(path).map_err(failed)?;
    // The end of a directory cannot be found by reading, and that of a device is not a size.
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(failed(std::io::Error::other("it is not a regular file")));
    }
    let length = file.seek(SeekFrom::End(0)).map_err(failed)?;
    file.rewind().map_err(failed)?;
    Ok((file, length))
}

fn load_image(path: &Path, map: Map<'_>) -> Result<Loaded, BootError> {
    let (mut file, length) = open("kernel", path)?;
    let failed = |source| BootError::Read { what: "kernel", path: path.to_owned(), source };
    let room = map.low_bytes.saturating_sub(HIGH_MEMORY);
    let too_large =
        |needed| BootError::TooLarge { what: "kernel", path: path.to_owned(), needed, room, limit: map.low_bytes };
    if length > room {
        return Err(too_large(length));
    }
    let mut beginning = Vec::new();
    (&mut file).take(0x206).read_to_end(&mut beginning).map_err(failed)?;
    file.rewind().map_err(failed)?;
    let not = |why: &str| BootError::NotAKernel { path: path.to_owned(), why: why.to_owned() };
    let refused =
        |error: linux_loader::loader::Error| BootError::NotAKernel { path: path.to_owned(), why: error.to_string() };
    if beginning.starts_with(&ELF_MAGIC) {
        let start = Some(GuestAddress(HIGH_MEMORY));
        let loaded = Elf::load(map.memory, None, &mut file, start).map_err(refused)?;
        if loaded.kernel_end > map.low_bytes {
            return Err(too_large(loaded.kernel_end.saturating_sub(HIGH_MEMORY)));
        }
        let entry = match loaded.pvh_boot_cap {
            PvhBootCapability::PvhEntryPresent(code) => LoadedEntry::Pvh(code.0),
            // Such a kernel says nothing of itself.
            _ => LoadedEntry::Long(loaded.kernel_load.0, Box::default()),
        };
        return Ok(Loaded { end: loaded.kernel_end, entry, initrd_max: INITRD_MAX });
    }
    if beginning.get(0x202..) != Some(&BZIMAGE_MAGIC.to_le_bytes()) {
        return Err(not("it is neither ELF nor a bzImage"));
    }
    let loaded = BzImage::load(map.memory, None, &mut file, Some(GuestAddress(HIGH_MEMORY))).map_err(refused)?;
    let header = loaded.setup_header.ok_or_else(|| not("its header is missing"))?;
    if header.version < 0x20c || header.xloadflags & HAS_ENTRY_64 == 0 {
        return Err(not("it has no 64-bit entry"));
    }
    // It unpacks itself to where it prefers to be, or to where it was loaded if that is higher.
    let unpacked = loaded.kernel_load.0.max(header.pref_address).saturating_add(header.init_size.into());
    let end = loaded.kernel_end.max(unpacked);
    if end > map.low_bytes {
        return Err(too_large(end.saturating_sub(HIGH_MEMORY)));
    }
    let code = loaded.kernel_load.0.saturating_add(ENTRY_64);
    let initrd_max = Some(header.initrd_addr_max.into()).filter(|max| *max > 0).unwrap_or(INITRD_MAX);
    Ok(Loaded { end, entry: LoadedEntry::Long(code, Box::new(header)), initrd_max })
}

/// As high as the kernel can reach, as others do it. Address and size.
fn load_initrd(path: &Path, map: Map<'_>, loaded: &Loaded) -> Result<(u64, u64), BootError> {
    let (mut file, length) = open("initrd", path)?;
    let limit = map.low_bytes.min(loaded.initrd_max.saturating_add(1));
    let lowest = loaded.end.next_multiple_of(PAGE);
    let address = limit.checked_sub(length).map(|address| address & !(PAGE - 1)).filter(|at| *at >= lowest);
    let Some(address) = address else {
        let room = limit.saturating_sub(lowest);
        return Err(BootError::TooLarge { what: "initrd", path: path.to_owned(), needed: length, room, limit });
    };
    read_into(map.memory, address, &mut file, length).map_err(|source| BootError::Read {
        what: "initrd",
        path: path.to_owned(),
        source,
    })?;
    Ok((address, length))
}

fn read_into(memory: &GuestMemoryMmap, address: u64, file: &mut impl ReadVolatile, length: u64) -> std::io::Result<()> {
    let length = usize::try_from(length).map_err(std::io::Error::other)?;
    memory.read_exact_volatile_from(GuestAddress(address), file, length).map_err(std::io::Error::other)
}

fn start_info(map: Map<'_>, initrd: Option<(u64, u64)>) -> Result<(), BootError> {
    let mut pieces = 0;
    for (at, (addr, size)) in (MEMORY_MAP..).step_by(size_of::<hvm_memmap_table_entry>()).zip(map.pieces()) {
        let piece = hvm_memmap_table_entry { addr, size, type_: XEN_HVM_MEMMAP_TYPE_RAM, reserved: 0 };
        map.write(at, piece.as_slice())?;
        pieces += 1;
    }
    if let Some((paddr, size)) = initrd {
        map.write(MODULES, hvm_modlist_entry { paddr, size, ..Default::default() }.as_slice())?;
    }
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        nr_modules: u32::from(initrd.is_some()),
        modlist_paddr: if initrd.is_some() { MODULES } else { 0 },
        cmdline_paddr: COMMAND_LINE,
        rsdp_paddr: acpi::ROOT,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: pieces,
        ..Default::default()
    };
    map.write(START, info.as_slice())
}

fn zero_page(map: Map<'_>, header: setup_header, initrd: Option<(u64, u64)>) -> Result<(), BootError> {
    let mut params = boot_params { hdr: header, acpi_rsdp_addr: acpi::ROOT, ..Default::default() };
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = BZIMAGE_MAGIC;
    params.hdr.type_of_loader = LOADER;
    params.hdr.cmd_line_ptr = COMMAND_LINE as u32;
    params.hdr.cmdline_size = COMMAND_LINE_MAX as u32;
    if let Some((address, size)) = initrd {
        // The place was chosen below 4 GiB.
        (params.hdr.ramdisk_image, params.hdr.ramdisk_size) = (address as u32, size as u32);
    }
    let mut table = params.e820_table;
    let mut pieces = 0;
    for (entry, (addr, size)) in table.iter_mut().zip(map.pieces()) {
        *entry = boot_e820_entry { addr, size, r#type: E820_RAM };
        pieces += 1;
    }
    (params.e820_table, params.e820_entries) = (table, pieces);
    map.write(START, params.as_slice())
}

/// The first 4 GiB, mapped to themselves by pages of 2 MiB.
fn page_tables(map: Map<'_>) -> Result<(), BootError> {
    const TABLE: u64 = 3;
    const LARGE_PAGE: u64 = 0x83;
    const SPAN: u64 = 4;
    let (pointers, directories) = (PAGE_TABLES + PAGE, PAGE_TABLES + 2 * PAGE);
    map.write(PAGE_TABLES, &(pointers | TABLE).to_le_bytes())?;
    for gib in 0..SPAN {
        map.write(pointers + gib * 8, &((directories + gib * PAGE) | TABLE).to_le_bytes())?;
        for page in 0..512 {
            let entry = (gib * GIB + page * (2 << 20)) | LARGE_PAGE;
            map.write(directories + gib * PAGE + page * 8, &entry.to_le_bytes())?;
        }
    }
    Ok(())
}

const _: () = {
    assert!(PAGE_TABLES + 6 * PAGE <= COMMAND_LINE && COMMAND_LINE + (COMMAND_LINE_MAX as u64) < LOW_MEMORY_END);
    assert!(START + size_of::<boot_params>() as u64 <= MEMORY_MAP && acpi::ROOT + acpi::BYTES <= HIGH_MEMORY);
};

#[cfg(test)]
mod tests {
    use super::*;

    const LOW: u64 = 64 << 20;

    fn memory(low: u64) -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), low as usize), (GuestAddress(4 << 30), 2 << 20)]).unwrap()
    }

    fn start(kernel: &Kernel, memory: &GuestMemoryMmap, low_bytes: u64) -> Result<Entry, BootError> {
        load(kernel, Map { memory, low_bytes, high: Some((4 << 30, 2 << 20)) }, 2, &[])
    }

    fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
        image[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// A bzImage of one sector of setup code, one of kernel and a header that asks for 8 MiB at 16 MiB.
    fn bzimage(xloadflags: u16) -> Vec<u8> {
        let mut image = vec![0x90; 512 * 3];
        put(&mut image, 0x1f1, &[0; 0x7b]);
        put(&mut image, 0x1f1, &[1]);
        put(&mut image, 0x202, b"HdrS\x0f\x02");
        put(&mut image, 0x211, &[1]);
        put(&mut image, 0x214, &0x10_0000_u32.to_le_bytes());
        put(&mut image, 0x22c, &0x7fff_ffff_u32.to_le_bytes());
        put(&mut image, 0x236, &xloadflags.to_le_bytes());
        put(&mut image, 0x238, &2047_u32.to_le_bytes());
        put(&mut image, 0x258, &0x100_0000_u64.to_le_bytes());
        put(&mut image, 0x260, &0x80_0000_u32.to_le_bytes());
        image
    }

    /// An ELF kernel of one segment at 1 MiB, with a PVH note or without.
    fn elf(pvh: Option<u64>) -> Vec<u8> {
        let mut image = vec![0; 0x1100];
        put(&mut image, 0, b"\x7fELF\x02\x01\x01");
        put(&mut image, 0x18, &0x10_0040_u64.to_le_bytes());
        put(&mut image, 0x20, &0x40_u64.to_le_bytes());
        put(&mut image, 0x36, &56_u16.to_le_bytes());
        put(&mut image, 0x38, &(1 + u16::from(pvh.is_some())).to_le_bytes());
        let mut header = |at: usize, kind: u32, offset: u64, address: u64, size: u64| {
            put(&mut image, at, &kind.to_le_bytes());
            for (field, value) in [(8, offset), (24, address), (32, size), (40, size), (48, 4)] {
                put(&mut image, at + field, &value.to_le_bytes());
            }
        };
        header(0x40, 1, 0x1000, 0x10_0000, 0x100);
        header(0x78, 4, 0x200, 0, 24);
        put(&mut image, 0x1000, b"kernel");
        if let Some(entry) = pvh {
            put(&mut image, 0x200, &[4, 0, 0, 0, 8, 0, 0, 0, 18, 0, 0, 0]);
            put(&mut image, 0x20c, b"Xen\0");
            put(&mut image, 0x210, &entry.to_le_bytes());
        }
        image
    }

    struct Files(tempfile::TempDir);

    impl Files {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn kernel(&self, image: &[u8], initrd: Option<&[u8]>) -> Kernel {
            let put = |name: &str, bytes: &[u8]| {
                let path = self.0.path().join(name);
                std::fs::write(&path, bytes).unwrap();
                path
            };
            let initrd = initrd.map(|bytes| put("initrd", bytes));
            Kernel { image: put("kernel", image), command_line: "console=ttyS0".to_owned(), initrd }
        }
    }

    fn text(memory: &GuestMemoryMmap, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    #[test]
    fn bzimage_with_initrd() {
        let (files, memory) = (Files::new(), memory(LOW));
        let kernel = files.kernel(&bzimage(1), Some(b"first files"));
        assert_eq!(start(&kernel, &memory, LOW).unwrap(), Entry::Long { code: 0x10_0200, start: START });
        let page: boot_params = memory.read_obj(GuestAddress(START)).unwrap();
        let (header, table) = (page.hdr, page.e820_table);
        assert_eq!({ header.cmd_line_ptr }, COMMAND_LINE as u32);
        assert_eq!(text(&memory, COMMAND_LINE, 14), b"console=ttyS0\0");
        assert_eq!(text(&memory, header.ramdisk_image.into(), header.ramdisk_size as usize), b"first files");
        assert!(u64::from(header.ramdisk_image) >= 0x180_0000, "above all that the kernel unpacks");
        let pieces: Vec<_> = table.iter().take(page.e820_entries.into()).map(|e| (e.addr, e.size)).collect();
        assert_eq!(pieces, [(0, LOW_MEMORY_END), (HIGH_MEMORY, LOW - HIGH_MEMORY), (4 << 30, 2 << 20)]);
        assert_eq!(text(&memory, page.acpi_rsdp_addr, 8), b"RSD PTR ");
        assert_eq!(text(&memory, 0x10_0000, 2), [0x90, 0x90]);
    }

    #[test]
    fn elf_by_pvh_or_its_entry() {
        let files = Files::new();
        let with = memory(LOW);
        let entry = start(&files.kernel(&elf(Some(0x10_0080)), Some(b"files")), &with, LOW).unwrap();
        assert_eq!(entry, Entry::Pvh { code: 0x10_0080, start: START });
        let info: hvm_start_info = with.read_obj(GuestAddress(START)).unwrap();
        assert_eq!((info.magic, info.nr_modules, info.memmap_entries), (XEN_HVM_START_MAGIC_VALUE, 1, 3));
        let module: hvm_modlist_entry = with.read_obj(GuestAddress(info.modlist_paddr)).unwrap();
        assert_eq!(text(&with, module.paddr, module.size as usize), b"files");
        let without = memory(LOW);
        let entry = start(&files.kernel(&elf(None), None), &without, LOW).unwrap();
        assert_eq!(entry, Entry::Long { code: 0x10_0040, start: START });
        assert_eq!(text(&without, 0x10_0000, 6), b"kernel");
    }

    #[test]
    fn what_cannot_be_started_is_named() {
        let (files, memory) = (Files::new(), memory(LOW));
        let error = |kernel: &Kernel| start(kernel, &memory, LOW).unwrap_err().to_string();
        let absent = Kernel { image: "/no/kernel".into(), command_line: String::new(), initrd: None };
        assert!(error(&absent).contains("could not read the kernel /no/kernel"), "{}", error(&absent));
        assert!(error(&files.kernel(b"#!/bin/sh", None)).contains("neither ELF nor a bzImage"));
        assert!(error(&files.kernel(&[], None)).contains("neither ELF nor a bzImage"));
        assert!(error(&files.kernel(b"\x7fELF", None)).contains("not a Linux kernel"));
        assert!(error(&files.kernel(&bzimage(0), None)).contains("no 64-bit entry"));
        let large = error(&files.kernel(&bzimage(1), Some(&vec![1; 48 << 20])));
        assert!(large.contains("the initrd") && large.contains("needs 50331648 bytes"), "{large}");
        let long = Kernel { command_line: "x".repeat(2048), ..files.kernel(&bzimage(1), None) };
        assert!(error(&long).contains("2048 bytes long"));
        // 8 MiB from 16 MiB on.
        let small = start(&files.kernel(&bzimage(1), None), &memory, 20 << 20).unwrap_err().to_string();
        assert!(small.contains("the kernel") && small.contains("bytes of memory"), "{small}");
        let mut cut = elf(None);
        cut.truncate(0x1010);
        assert!(error(&files.kernel(&cut, None)).contains("not a Linux kernel"));
    }
}
