//! The registers, in and out of order.

use super::*;
use crate::kvm::devices::chain::{Broken, Chain};
use crate::kvm::devices::rng::Rng;

const VERSION_1: u64 = 1 << 32;

fn rig() -> (Rig, Driver) {
    let memory = memory();
    let rig = Rig::new(Box::new(Rng), &memory);
    rig.resume();
    (rig, Driver::new(&memory, 16))
}

/// A device that panics at a request that has something to read.
#[derive(Debug)]
struct Panics(Rng);

impl Device for Panics {
    fn kind(&self) -> u32 {
        self.0.kind()
    }

    fn name(&self) -> &'static str {
        "panics"
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        self.0.queue_sizes()
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn properties(&self) -> Vec<(String, String)> {
        Vec::new()
    }

    fn set_features(&mut self, _: u64) {}

    fn handle(&mut self, queue: usize, chain: &Chain, ram: &GuestRam) -> Result<u32, Broken> {
        assert!(chain.readable.length() == 0, "something to read");
        self.0.handle(queue, chain, ram)
    }
}

/// The driver is told that the device is out of use, the request in hand is still available, and a pause fails: neither a
/// stop nor a migration makes believe that all is well. The rest of the machine can go on.
#[test]
fn a_device_that_panics_is_told_of() {
    let memory = memory();
    let rig = Rig::new(Box::new(Panics(Rng)), &memory);
    let mut driver = Driver::new(&memory, 16);
    rig.resume();
    rig.bring_up(VERSION_1, driver.queue);
    driver.submit(0, &[(0x20_0000, 8, true)]);
    rig.write(0x50, 0);
    driver.wait_for_all("a good request");
    rig.pause();
    rig.resume();
    driver.submit(1, &[(0x20_0000, 8, false)]);
    driver.submit(2, &[(0x20_0000, 8, true)]);
    rig.write(0x50, 0);
    until("it asks for a reset", || rig.read(0x70) == 0x4f);
    assert_eq!(rig.read(0x60) & 2, 2);
    for _ in 0..2 {
        let error = rig.try_pause().unwrap_err().to_string();
        assert!(error.contains("it has failed: something to read"), "{error}");
        assert_eq!(driver.used(), 1);
        let state = postcard::to_stdvec(&rig.transport.save()).unwrap();
        // The queue's size, and its place in the available ring: of three requests the first is done.
        assert!(state.windows(3).any(|bytes| bytes == [64, 1, 1]), "{state:?}");
        rig.resume();
    }
    // A reset does not mend it.
    driver.memory.write_slice(&[0; 0x8000], GuestAddress(driver.queue.start)).unwrap();
    rig.write(0x70, 0);
    for status in [1, 3] {
        rig.write(0x70, status);
    }
    rig.write(0x24, 1);
    rig.write(0x20, 1);
    rig.write(0x70, 0xb);
    rig.write(0x70, 0xf);
    assert_eq!(rig.read(0x70), 0x4f);
}

/// Held, a device takes no more requests; what is rung then is found when it goes on, paused or not.
#[test]
fn no_notification_is_lost_by_a_held_device() {
    let (rig, mut driver) = rig();
    rig.bring_up(VERSION_1, driver.queue);
    for turn in 0..200u16 {
        rig.worker.hold();
        if turn % 2 == 0 {
            rig.pause();
        }
        driver.submit(turn % 8, &[(0x20_0000, 8, true)]);
        rig.write(0x50, 0);
        // One that is only held may have been about to look.
        assert!(turn % 2 == 1 || driver.used() == turn);
        rig.resume();
        driver.wait_for_all("what was rung meanwhile");
    }
}

#[test]
fn it_is_there() {
    let (rig, _) = rig();
    assert_eq!([0, 4, 8].map(|offset| rig.read(offset)), [0x7472_6976, 2, 4]);
    assert_eq!((rig.read(0x34), rig.read(0x44), rig.read(0x70), rig.read(0xfc)), (64, 0, 0, 0));
    assert_eq!(rig.features(), VERSION_1 | 1 << 29 | 1 << 28);
    rig.write(0x30, 1);
    assert_eq!(rig.read(0x34), 0, "there is one queue");
    let mut odd = [7; 2];
    rig.transport.read(0x70, &mut odd);
    assert_eq!(odd, [0; 2]);
    rig.transport.read(0xfff, &mut odd);
}

#[test]
fn random_numbers() {
    for features in [VERSION_1, VERSION_1 | 1 << 29] {
        let (rig, mut driver) = rig();
        rig.bring_up(features, driver.queue);
        for turn in 0..100u16 {
            driver.submit(turn % 8, &[(0x20_0000, 100, true), (0x20_1000, 28, true)][..1 + usize::from(turn % 2)]);
            rig.write(0x50, 0);
            driver.wait_for_all("random numbers");
            assert_eq!(driver.used_entry(turn), (u32::from(turn % 8), 100 + 28 * u32::from(turn % 2)));
            // A driver with EVENT_IDX that never moves used_event is told once.
            let told = || features != VERSION_1 || rig.pulses.count() > u32::from(turn);
            // The interrupt comes after the used ring says so.
            let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
            while !told() && std::time::Instant::now() < deadline {
                std::thread::yield_now();
            }
            assert!(told());
        }
        let bytes: [u8; 100] = driver
            .memory
            .read_obj::<[u8; 32]>(GuestAddress(0x20_0000))
            .map(|b| {
                let mut all = [0; 100];
                all[..32].copy_from_slice(&b);
                all
            })
            .unwrap();
        assert_ne!(bytes, [0; 100]);
        assert_eq!(rig.read(0x60), 1);
        rig.write(0x64, 1);
        assert_eq!(rig.read(0x60), 0);
        let mut pages = Vec::new();
        rig.writes[0].drain(|run| pages.extend(run));
        assert!(pages.contains(&0x200) && pages.contains(&0x201) && pages.contains(&((0x1_6000) >> 12)), "{pages:?}");
    }
}

#[test]
fn bits_of_the_status_in_order() {
    let (rig, driver) = rig();
    for wrong in [2, 4, 8, 0xf & !1, 0x40] {
        rig.write(0x70, wrong);
        assert_eq!(rig.read(0x70), 0, "{wrong:#x}");
    }
    rig.write(0x70, 3);
    // Without VERSION_1, or with what was not offered, features are not settled.
    rig.write(0x70, 0xb);
    assert_eq!(rig.read(0x70), 3);
    rig.write(0x24, 1);
    rig.write(0x20, 3);
    rig.write(0x70, 0xb);
    assert_eq!(rig.read(0x70), 3);
    // A queue cannot be set up yet.
    rig.write(0x38, 4);
    rig.write(0x44, 1);
    assert_eq!(rig.read(0x44), 0);
    rig.write(0x20, 1);
    rig.write(0x70, 0xb);
    assert_eq!(rig.read(0x70), 0xb);
    // Features are settled now, and bits do not go off again.
    rig.write(0x20, 0);
    rig.write(0x70, 3);
    assert_eq!(rig.read(0x70), 0xb);
    rig.write(0x70, 0xf);
    assert_eq!(rig.read(0x70), 0xf);
    rig.write(0x44, 1);
    assert_eq!(rig.read(0x44), 0, "too late for a queue");
    rig.bring_up(VERSION_1, driver.queue);
    rig.write(0x70, 0);
    assert_eq!((rig.read(0x70), rig.read(0x44), rig.read(0x60)), (0, 0, 0));
}

#[test]
fn impossible_queues_ask_for_a_reset() {
    for (size, address) in [(3, 0x1_0000u64), (0, 0x1_0000), (1 << 16, 0x1_0000), (128, 0x1_0000), (16, 0x1_0001)]
        .into_iter()
        .chain([(16, MEMORY - 8), (16, 1 << 40), (16, !0xff)])
    {
        let (rig, _) = rig();
        for status in [1, 3] {
            rig.write(0x70, status);
        }
        rig.write(0x24, 1);
        rig.write(0x20, 1);
        rig.write(0x70, 0xb);
        rig.write(0x38, size);
        for offset in [0x80, 0x90, 0xa0] {
            rig.write(offset, address as u32);
            rig.write(offset + 4, (address >> 32) as u32);
        }
        rig.write(0x44, 1);
        assert_eq!((rig.read(0x44), rig.read(0x70)), (0, 0x4b), "size {size}, address {address:#x}");
        rig.write(0x70, 0);
        assert_eq!(rig.read(0x70), 0);
    }
}

#[test]
fn impossible_requests_ask_for_a_reset() {
    type Spoil = fn(&mut Driver);
    let spoils: [Spoil; 5] = [
        // An index beyond the queue.
        |driver| driver.offer(16),
        // More at once than the queue holds.
        |driver| {
            driver.submitted = 500;
            driver.offer(0);
        },
        // Outside memory.
        |driver| driver.submit(0, &[(MEMORY, 8, true)]),
        |driver| driver.submit(0, &[(u64::MAX - 3, 8, true)]),
        // An indirect table outside memory.
        |driver| {
            driver.descriptor(0, (1 << 50, 160, false), 4, 0);
            driver.offer(0);
        },
    ];
    for (number, spoil) in spoils.into_iter().enumerate() {
        let (rig, mut driver) = rig();
        rig.bring_up(VERSION_1, driver.queue);
        spoil(&mut driver);
        rig.write(0x50, 0);
        until(&format!("reset after {number}"), || rig.read(0x70) == 0x4f);
        assert_eq!(rig.read(0x60), 2);
        // And it works after a reset.
        let mut driver = Driver::new(&driver.memory, 16);
        driver.memory.write_slice(&[0; 0x8000], GuestAddress(driver.queue.start)).unwrap();
        rig.bring_up(VERSION_1, driver.queue);
        driver.submit(0, &[(0x20_0000, 8, true)]);
        rig.write(0x50, 0);
        driver.wait_for_all("after a reset");
    }
    // Descriptors in a ring are a request that ends.
    let (rig, mut driver) = rig();
    rig.bring_up(VERSION_1, driver.queue);
    for index in 0..16 {
        driver.descriptor(index, (0x20_0000, 1, true), 1, (index + 1) % 16);
    }
    driver.offer(0);
    rig.write(0x50, 0);
    driver.wait_for_all("a ring of descriptors");
}

/// A state with features that are not offered is refused, also one that says that nobody settled on them.
#[test]
fn features_of_a_hostile_state() {
    let (rig, driver) = rig();
    rig.bring_up(VERSION_1, driver.queue);
    rig.pause();
    // The kind, and then the status.
    let mut bytes = postcard::to_stdvec(&rig.transport.save()).unwrap();
    assert_eq!(bytes[..2], [4, 0xf]);
    for status in [0x7, 0x4, 0xd, 0xe] {
        bytes[1] = status;
        assert!(rig.transport.load(postcard::from_bytes(&bytes).unwrap(), 0).is_err(), "{status:#x}");
    }
    bytes[1] = 0xf;
    rig.transport.load(postcard::from_bytes(&bytes).unwrap(), 0).unwrap();
}
