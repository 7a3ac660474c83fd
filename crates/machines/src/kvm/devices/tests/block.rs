//! The disk: what is asked is what the image has, and each request is carried out once, whatever comes in between.

use std::fs;
use std::path::Path;
use std::process::Command;

use dunlin::Claim;
use imago::file::File;
use imago::qcow2::Qcow2;
use imago::{FormatCreateBuilder, Storage, StorageCreateOptions};
use tempfile::TempDir;

use super::*;
use crate::device_config::{DiskAccess, DiskConfig, DiskFormat};
use crate::kvm::devices::block::Block;
use crate::kvm::devices::disk::{Disk, Image};

const VERSION_1: u64 = 1 << 32;
const FLUSH: u64 = 1 << 9;
const EVENT_IDX: u64 = 1 << 29;
const SECTOR: usize = 512;
/// Where a request's parts are; each has a piece of memory.
const AREA: u64 = 0x10_0000;
const AREA_BYTES: u64 = 0x1_0000;
const DATA: u64 = 0x1000;

/// An image of so many sectors, all zeros.
pub(super) fn blank(sectors: u64) -> (TempDir, DiskConfig) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.raw");
    fs::File::create(&path).unwrap().set_len(sectors * SECTOR as u64).unwrap();
    let config =
        DiskConfig { path, format: DiskFormat::Raw, access: DiskAccess::Writable, serial: "dunlin-0".to_owned() };
    (directory, config)
}

fn blank_of(format: DiskFormat, sectors: u64) -> (TempDir, DiskConfig) {
    let (directory, mut config) = blank(sectors);
    if format == DiskFormat::Qcow2 {
        config.path = directory.path().join("disk.qcow2");
        config.format = format;
        let file = File::create_open(StorageCreateOptions::new().filename(&config.path)).unwrap();
        // Small clusters, so that there is much metadata.
        let builder = Qcow2::<File>::create_builder(file).size(sectors * SECTOR as u64);
        builder.cluster_size(4096).create().unwrap();
    }
    (directory, config)
}

pub(super) fn look(config: &DiskConfig) -> Disk {
    Disk::look(config.clone()).unwrap()
}

/// All bytes of the disk, by other means than the device where there are.
fn contents(config: &DiskConfig, bytes: usize) -> Vec<u8> {
    match config.format {
        DiskFormat::Raw => fs::read(&config.path).unwrap(),
        DiskFormat::Qcow2 => {
            let to = config.path.with_extension("converted");
            let converted = Command::new("qemu-img").args(["convert", "-O", "raw"]).args([&config.path, &to]).output();
            match converted {
                Ok(output) => {
                    assert!(output.status.success(), "{output:?}");
                    check_image(&config.path);
                    return fs::read(&to).unwrap();
                }
                Err(error) => println!("skipped: qemu-img: {error}"),
            }
            let mut all = vec![0; bytes];
            Image::open(config).unwrap().read(&mut all, 0).unwrap();
            all
        }
    }
}

fn check_image(path: &Path) {
    let checked = Command::new("qemu-img").arg("check").arg(path).output().unwrap();
    assert!(checked.status.success(), "{checked:?}");
}

impl Driver {
    fn area(head: u16) -> u64 {
        AREA + u64::from(head / 3) * AREA_BYTES
    }

    /// Gives a request to the device: a header, data that the device reads or writes, and a status.
    fn request(&mut self, head: u16, kind: u32, sector: u64, data: Result<&[u8], u32>) {
        let area = Self::area(head);
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        self.memory.write_slice(&header, GuestAddress(area)).unwrap();
        self.memory.write_obj(0xffu8, GuestAddress(area + 0x800)).unwrap();
        let mut buffers = vec![(area, 16, false)];
        match data {
            Ok([]) => {}
            Ok(bytes) => {
                self.memory.write_slice(bytes, GuestAddress(area + DATA)).unwrap();
                buffers.push((area + DATA, bytes.len() as u32, false));
            }
            Err(length) => buffers.push((area + DATA, length, true)),
        }
        buffers.push((area + 0x800, 1, true));
        self.submit(head, &buffers);
    }

    fn status(&self, head: u16) -> u8 {
        self.memory.read_obj(GuestAddress(Self::area(head) + 0x800)).unwrap()
    }

    fn data(&self, head: u16, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        self.memory.read_slice(&mut data, GuestAddress(Self::area(head) + DATA)).unwrap();
        data
    }

    /// One request and its status.
    fn ask(&mut self, rig: &Rig, kind: u32, sector: u64, data: Result<&[u8], u32>) -> u8 {
        self.request(0, kind, sector, data);
        rig.write(0x50, 0);
        self.wait_for_all("a request");
        self.status(0)
    }
}

fn pattern(seed: u32, bytes: usize) -> Vec<u8> {
    (0..bytes as u32).map(|at| (at / 7).wrapping_mul(31).wrapping_add(seed.wrapping_mul(0x9e37)) as u8).collect()
}

fn range(sector: u64, count: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
}

#[test]
fn every_kind_of_request() {
    for (format, features) in [
        (DiskFormat::Raw, VERSION_1),
        (DiskFormat::Raw, VERSION_1 | FLUSH | EVENT_IDX),
        (DiskFormat::Qcow2, VERSION_1 | FLUSH),
        (DiskFormat::Qcow2, VERSION_1),
    ] {
        let sectors = 4096;
        let bytes = sectors * SECTOR;
        let (_directory, config) = blank_of(format, sectors as u64);
        let memory = memory();
        let rig = Rig::new(Box::new(Block::new(look(&config))), &memory);
        let mut driver = Driver::new(&memory, 64);
        rig.resume();
        assert_eq!(u64::from(rig.read(0x100)), sectors as u64);
        rig.bring_up(features, driver.queue);
        let mut model = vec![0; bytes];
        for (seed, (sector, count)) in [(0, 1), (5, 3), (4095, 1), (1000, 100), (6, 1)].into_iter().enumerate() {
            let data = pattern(seed as u32, count * SECTOR);
            assert_eq!(driver.ask(&rig, 1, sector as u64, Ok(&data)), 0);
            model[sector * SECTOR..][..data.len()].copy_from_slice(&data);
        }
        assert_eq!(driver.ask(&rig, 4, 0, Ok(&[])), 0);
        assert_eq!(contents(&config, bytes), model, "{format}");
        for (sector, count) in [(0, 1), (4, 4), (990, 110), (4095, 1)] {
            assert_eq!(driver.ask(&rig, 0, sector as u64, Err((count * SECTOR) as u32)), 0);
            assert_eq!(driver.used_entry(driver.used().wrapping_sub(1)).1 as usize, count * SECTOR + 1);
            assert_eq!(driver.data(0, count * SECTOR), model[sector * SECTOR..][..count * SECTOR]);
        }
        // Zeros, with and without freeing.
        assert_eq!(driver.ask(&rig, 13, 0, Ok(&range(1010, 8, 0))), 0);
        assert_eq!(driver.ask(&rig, 13, 0, Ok(&range(1030, 16, 1))), 0);
        model[1010 * SECTOR..1018 * SECTOR].fill(0);
        model[1030 * SECTOR..1046 * SECTOR].fill(0);
        assert_eq!(driver.ask(&rig, 11, 0, Ok(&range(2048, 512, 0))), 0);
        assert_eq!(driver.ask(&rig, 8, 0, Err(20)), 0);
        assert_eq!(driver.data(0, 20), b"dunlin-0\0\0\0\0\0\0\0\0\0\0\0\0");
        // What is not possible.
        for (kind, sector, data, status) in [
            (1, 4096, Ok(&[0; 512][..]), 1),
            (1, 4095, Ok(&[0; 1024][..]), 1),
            (1, u64::MAX, Ok(&[0; 512][..]), 1),
            (1, 0, Ok(&[0; 100][..]), 1),
            (0, 4096, Err(512), 1),
            (0, u64::MAX / 512, Err(512), 1),
            (0, 0, Err(511), 1),
            (99, 0, Ok(&[][..]), 2),
            (11, 0, Ok(&range(0, 1, 1)[..]), 2),
            (13, 0, Ok(&range(0, 1, 2)[..]), 2),
            (13, 0, Ok(&range(4096, 1, 0)[..]), 1),
            (13, 0, Ok(&range(u64::MAX, u32::MAX, 0)[..]), 1),
            (13, 0, Ok(&[0; 15][..]), 1),
            // Two ranges.
            (13, 0, Ok(&[0; 32][..]), 1),
            (13, 0, Ok(&[][..]), 1),
        ] {
            assert_eq!(driver.ask(&rig, kind, sector, data), status, "{kind} at {sector}: {data:?}");
        }
        rig.pause();
        assert_eq!(contents(&config, bytes), model, "{format}");
    }
}

#[test]
fn a_read_only_disk_is_not_written() {
    let (_directory, mut config) = blank(64);
    fs::write(&config.path, pattern(3, 64 * SECTOR)).unwrap();
    config.access = DiskAccess::ReadOnly;
    let memory = memory();
    let rig = Rig::new(Box::new(Block::new(look(&config))), &memory);
    let mut driver = Driver::new(&memory, 16);
    rig.resume();
    assert_eq!(rig.features() & (1 << 5 | 1 << 13 | 1 << 14), 1 << 5);
    rig.bring_up(VERSION_1, driver.queue);
    assert_eq!(driver.ask(&rig, 1, 0, Ok(&[1; 512])), 1);
    assert_eq!(driver.ask(&rig, 13, 0, Ok(&range(0, 8, 1))), 1);
    assert_eq!(driver.ask(&rig, 11, 0, Ok(&range(0, 8, 0))), 1);
    assert_eq!(driver.ask(&rig, 4, 0, Ok(&[])), 0);
    assert_eq!(driver.ask(&rig, 0, 0, Err(512)), 0);
    assert_eq!(fs::read(&config.path).unwrap(), pattern(3, 64 * SECTOR));
}

#[test]
fn an_image_has_one_machine() {
    let (_directory, config) = blank(8);
    let (mut one, mut other) = (look(&config), look(&config));
    one.acquire().unwrap();
    let error = other.acquire().unwrap_err().to_string();
    assert!(error.contains("another machine"), "{error}");
    one.settle().unwrap();
    assert!(other.acquire().is_err(), "a paused guest's image stays its own");
    one.claim(Claim::Nothing).unwrap();
    other.acquire().unwrap();
    assert!(one.acquire().is_err());
    other.claim(Claim::Nothing).unwrap();
    let reader = DiskConfig { access: DiskAccess::ReadOnly, ..config.clone() };
    let (mut one, mut other) = (look(&reader), look(&reader));
    one.acquire().unwrap();
    other.acquire().unwrap();
    assert!(look(&config).acquire().is_err(), "who writes it has it alone");
}

/// A move from hand to hand: whoever else tries fails at every step, and each side can do only what its part allows.
#[test]
fn a_third_never_gets_in_between() {
    let (_directory, config) = blank(8);
    let mut one = look(&config);
    let third_fails = |step: &str| {
        let error = look(&config).acquire().expect_err(step).to_string();
        assert!(error.contains("another machine has it"), "{step}: {error}");
    };
    one.claim(Claim::Whole).unwrap();
    third_fails("whole");
    for hop in 0..3 {
        let mut next = look(&config);
        assert!(next.claim(Claim::Arrived).is_err(), "not before it is released");
        assert_eq!(next.claimed(), Claim::Nothing);
        one.claim(Claim::Released).unwrap();
        third_fails("released");
        assert!(one.acquire().is_err(), "what was released is not used");
        // Every other hop comes to nothing: the source takes it back.
        if hop == 1 {
            one.claim(Claim::Whole).unwrap();
            third_fails("taken back");
            assert!(next.claim(Claim::Arrived).is_err());
            one.claim(Claim::Released).unwrap();
        }
        next.claim(Claim::Arrived).unwrap();
        third_fails("arrived");
        assert!(one.claim(Claim::Whole).is_err(), "the other side has it");
        assert_eq!(one.claimed(), Claim::Released);
        one.claim(Claim::Nothing).unwrap();
        third_fails("its source has let go");
        next.claim(Claim::Whole).unwrap();
        third_fails("whole again");
        one = next;
    }
    one.claim(Claim::Nothing).unwrap();
    look(&config).acquire().unwrap();
}

/// A byte that the other side gives up a little later is waited for.
#[test]
fn a_guest_that_arrives_waits_for_its_source() {
    let (_directory, config) = blank(8);
    let (mut one, mut other) = (look(&config), look(&config));
    one.claim(Claim::Whole).unwrap();
    std::thread::scope(|threads| {
        let arrives = threads.spawn(|| other.claim(Claim::Arrived));
        std::thread::sleep(std::time::Duration::from_millis(50));
        one.claim(Claim::Released).unwrap();
        arrives.join().unwrap().unwrap();
    });
}

/// A guest goes on only on the image that it has left, wherever it goes on.
#[test]
fn a_changed_image_is_refused() {
    type Change = fn(&Path);
    let overwritten: Change = |path| {
        use std::os::unix::fs::FileExt;
        let file = fs::File::options().write(true).open(path).unwrap();
        // Not the head, by which a format is known.
        file.write_all_at(&[9; SECTOR], file.metadata().unwrap().len() - SECTOR as u64).unwrap();
    };
    let longer: Change = |path| fs::File::options().write(true).open(path).unwrap().set_len(1 << 20).unwrap();
    let replaced: Change = |path| {
        let copy = path.with_extension("copy");
        fs::copy(path, &copy).unwrap();
        fs::rename(copy, path).unwrap();
    };
    for (name, change) in [("overwritten", overwritten), ("longer", longer), ("replaced", replaced)] {
        for format in [DiskFormat::Raw, DiskFormat::Qcow2] {
            let (_directory, config) = blank_of(format, 64);
            let (mut one, mut other) = (look(&config), look(&config));
            one.acquire().unwrap();
            one.write(&[1; SECTOR], 0).unwrap();
            one.settle().unwrap();
            let left = one.left();
            assert!(left.is_some());
            // As it was: it goes on, here and elsewhere.
            one.acquire().unwrap();
            one.settle().unwrap();
            assert_eq!(one.left(), left, "only looking at it leaves it as it was");
            // At once, so that the kernel's coarse time of a write is of no help.
            change(&config.path);
            let error = one.acquire().expect_err(name).to_string();
            let expected =
                if name == "replaced" { "another file" } else { "it was changed while the guest was paused" };
            assert!(error.contains(expected) || error.contains("bytes now"), "{name}: {error}");
            one.claim(Claim::Released).unwrap();
            if name == "overwritten" {
                other.renew(left).unwrap();
                other.claim(Claim::Arrived).unwrap();
                let error = other.acquire().expect_err(name).to_string();
                assert!(error.contains(expected), "{name}: {error}");
            }
        }
    }
}

/// While a machine stands still another process may write its image: nothing that was read before is kept.
#[test]
fn what_others_wrote_meanwhile_is_seen() {
    for format in [DiskFormat::Raw, DiskFormat::Qcow2] {
        let (_directory, config) = blank_of(format, 64);
        let (mut one, mut other) = (look(&config), look(&config));
        let mut sector = [0; SECTOR];
        for (turn, value) in (1..20u8).enumerate() {
            one.acquire().unwrap();
            one.read(&mut sector, 0).unwrap();
            assert_eq!(sector, [value - 1; SECTOR], "{format}");
            // New clusters, so that an old mapping would show.
            one.write(&[value; SECTOR], (turn * 4096 % (64 * SECTOR)) as u64).unwrap();
            one.settle().unwrap();
            one.claim(Claim::Released).unwrap();
            assert!(one.read(&mut sector, 0).is_err(), "it is not open");
            other.renew(one.left()).unwrap();
            assert!(other.write(&sector, 0).is_err(), "not before it is locked");
            other.claim(Claim::Arrived).unwrap();
            one.claim(Claim::Nothing).unwrap();
            other.acquire().unwrap();
            other.read(&mut sector, (turn * 4096 % (64 * SECTOR)) as u64).unwrap();
            assert_eq!(sector, [value; SECTOR], "{format}");
            other.write(&[value; SECTOR], 0).unwrap();
            other.settle().unwrap();
            other.claim(Claim::Nothing).unwrap();
            one.renew(other.left()).unwrap();
        }
        if format == DiskFormat::Qcow2 && Command::new("qemu-img").arg("--version").output().is_ok() {
            check_image(&config.path);
        }
    }
}

/// A burst of writes and reads is interrupted anywhere, goes on in another device over the same memory and image, and
/// maybe back: each request is carried out once.
#[test]
fn each_request_once_through_handovers() {
    const SLOTS: u16 = 20;
    let mut all_left_over = 0;
    for (format, features) in [
        (DiskFormat::Raw, VERSION_1 | FLUSH),
        (DiskFormat::Raw, VERSION_1 | FLUSH | EVENT_IDX),
        (DiskFormat::Qcow2, VERSION_1 | FLUSH),
    ] {
        let sectors = if format == DiskFormat::Raw { 4096 } else { 65536 };
        let bytes = sectors * SECTOR;
        let (_directory, config) = blank_of(format, sectors as u64);
        let memory = memory();
        let rigs = [0, 1].map(|_| Rig::new(Box::new(Block::new(look(&config))), &memory));
        let mut driver = Driver::new(&memory, 64);
        let mut model = vec![0; bytes];
        rigs[0].resume();
        rigs[0].bring_up(features, driver.queue);
        let mut random = 12345u64;
        let mut next = |below: u64| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (random >> 33) % below
        };
        let (mut at, mut left_over, mut longest) = (0, 0, Duration::ZERO);
        let turns = 150u32;
        for turn in 0..turns {
            let rig = &rigs[at];
            let before = driver.used();
            let mut expected = Vec::new();
            for slot in 0..SLOTS {
                let count = 1 + next(100) as usize;
                let sector = next((sectors - count) as u64) as usize;
                let kind = next(8);
                if kind < 2 {
                    driver.request(slot * 3, 0, sector as u64, Err((count * SECTOR) as u32));
                    expected.push((slot * 3, model[sector * SECTOR..][..count * SECTOR].to_vec()));
                } else if kind == 2 {
                    let zeros = range(sector as u64, count as u32, next(2) as u32);
                    driver.request(slot * 3, 13, 0, Ok(&zeros));
                    model[sector * SECTOR..][..count * SECTOR].fill(0);
                } else {
                    let data = pattern(turn * 100 + u32::from(slot), count * SECTOR);
                    driver.request(slot * 3, 1, sector as u64, Ok(&data));
                    model[sector * SECTOR..][..data.len()].copy_from_slice(&data);
                }
            }
            rig.write(0x50, 0);
            // Anywhere between nothing done and all done.
            let enough = next(u64::from(SLOTS) + 1) as u16;
            until("enough", || driver.used().wrapping_sub(before) >= enough);
            let began = Instant::now();
            rig.pause();
            longest = longest.max(began.elapsed());
            let done = driver.used().wrapping_sub(before);
            left_over += u32::from(done > 0 && done < SLOTS);
            let state = rig.transport.save();
            std::thread::sleep(Duration::from_micros(50));
            assert_eq!(driver.used().wrapping_sub(before), done, "nothing happens once paused");
            // On to the other, or the other gets as far as it can and fails, or nothing.
            let choice = next(4);
            if choice > 0 {
                let other = &rigs[1 - at];
                other.transport.load(state.clone(), 0).unwrap();
                other.transport.renew(rigs[at].transport.left()).unwrap();
                assert_eq!(other.transport.save(), state);
                if choice > 1 {
                    rigs[at].transport.claim(Claim::Nothing).unwrap();
                    at = 1 - at;
                }
            }
            rigs[at].resume();
            driver.wait_for_all("the burst");
            assert_eq!(driver.used().wrapping_sub(before), SLOTS);
            let mut heads: Vec<_> = (0..SLOTS).map(|n| driver.used_entry(before.wrapping_add(n)).0).collect();
            heads.sort_unstable();
            assert!(heads.iter().copied().eq((0..SLOTS).map(|slot| u32::from(slot * 3))), "{heads:?}");
            for slot in 0..SLOTS {
                assert_eq!(driver.status(slot * 3), 0);
            }
            for (head, data) in expected {
                assert!(driver.data(head, data.len()) == data, "turn {turn}, request {head}");
            }
        }
        rigs[at].pause();
        assert!(contents(&config, bytes) == model);
        assert_eq!(driver.used(), driver.submitted);
        println!("{format}: {turns} bursts, {left_over} interrupted in the middle, longest pause {longest:?}");
        all_left_over += left_over;
    }
    assert!(all_left_over > 0, "some bursts are interrupted in the middle");
}
