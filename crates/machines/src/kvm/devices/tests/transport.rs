//! The registers, in and out of order.

use super::*;
use crate::kvm::devices::rng::Rng;

const VERSION_1: u64 = 1 << 32;

fn rig() -> (Rig, Driver) {
    let memory = memory();
    let rig = Rig::new(Box::new(Rng), &memory);
    rig.resume();
    (rig, Driver::new(&memory, 16))
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
            assert!(features != VERSION_1 || rig.pulses.count() > u32::from(turn));
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
