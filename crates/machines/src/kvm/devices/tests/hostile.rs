//! Whatever a guest writes into registers and memory, the device ends soon and does not panic.

use proptest::collection::vec;
use proptest::prelude::*;

use super::block::blank;
use super::*;
use crate::kvm::devices::block::Block;
use crate::kvm::devices::rng::Rng;

#[derive(Debug, Clone)]
enum Deed {
    Write(u64, u32),
    Odd(u64, Vec<u8>),
    Memory(u64, Vec<u8>),
    BringUp(u64),
    Offer(u16),
    Work,
    Reload,
}

fn deeds() -> impl Strategy<Value = Vec<Deed>> {
    let offsets = proptest::sample::select(vec![
        0x14u64, 0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x64, 0x70, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4, 0x100,
    ]);
    let small = prop_oneof![0u32..16, Just(0x1_0000), Just(0x1_4000), Just(0x1_6000), any::<u32>()];
    // Descriptors: near or far, short or long, with all flags.
    let address = prop_oneof![0x1_0000u64..0x1_8000, 0u64..MEMORY + 0x1000, any::<u64>()];
    let length = prop_oneof![0u32..64, 500u32..1100, any::<u32>()];
    let descriptor = (address, length, 0u16..8, 0u16..20).prop_map(|(address, length, flags, next)| {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(length.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        bytes
    });
    let table = (0u64..16, vec(descriptor, 1..16))
        .prop_map(|(first, descriptors)| Deed::Memory(0x1_0000 + first * 16, descriptors.concat()));
    let header = (0u32..16, prop_oneof![0u64..40, any::<u64>()]).prop_map(|(kind, sector)| {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend([0; 4]);
        bytes.extend(sector.to_le_bytes());
        Deed::Memory(0x20_0000, bytes)
    });
    let deed = prop_oneof![
        3 => (offsets, small).prop_map(|(offset, value)| Deed::Write(offset, value)),
        1 => (0u64..0x1000, vec(any::<u8>(), 0..9)).prop_map(|(offset, data)| Deed::Odd(offset, data)),
        4 => table,
        2 => header,
        1 => (0x1_0000u64..0x1_7000, vec(any::<u8>(), 1..64)).prop_map(|(at, data)| Deed::Memory(at, data)),
        2 => any::<u64>().prop_map(Deed::BringUp),
        4 => (0u16..17).prop_map(Deed::Offer),
        3 => Just(Deed::Work),
        1 => Just(Deed::Reload),
    ];
    vec(deed, 1..60)
}

fn carry_out(rig: &Rig, memory: &GuestMemoryMmap, deeds: &[Deed]) {
    let mut driver = Driver::new(memory, 16);
    for deed in deeds {
        match deed {
            Deed::Write(offset, value) => rig.write(*offset, *value),
            Deed::Odd(offset, data) => {
                rig.transport.write(*offset, data);
                rig.transport.read(*offset, &mut data.clone());
            }
            Deed::Memory(at, data) => drop(memory.write_slice(data, GuestAddress(*at))),
            Deed::BringUp(choice) => {
                let features = rig.features() & choice | 1 << 32;
                memory.write_slice(&[0; 0x4000], GuestAddress(driver.queue.available())).unwrap();
                driver.submitted = 0;
                rig.bring_up(features, driver.queue);
            }
            Deed::Offer(head) => driver.offer(*head),
            Deed::Work => {
                rig.write(0x50, 0);
                // The worker is at it, or has been.
                std::thread::yield_now();
            }
            Deed::Reload => {
                rig.pause();
                let state = rig.transport.save();
                rig.transport.load(state.clone(), 0).unwrap();
                assert_eq!(rig.transport.save(), state);
                rig.resume();
            }
        }
    }
    let began = Instant::now();
    rig.pause();
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn a_disk_survives(deeds in deeds()) {
        let (_directory, config) = blank(64);
        let memory = memory();
        let rig = Rig::new(Box::new(Block::new(super::block::look(&config))), &memory);
        rig.resume();
        carry_out(&rig, &memory, &deeds);
    }

    #[test]
    fn a_source_of_random_numbers_survives(deeds in deeds()) {
        let memory = memory();
        let rig = Rig::new(Box::new(Rng), &memory);
        rig.resume();
        carry_out(&rig, &memory, &deeds);
    }

    /// A state from a hostile source is refused or taken, and then the device is as with a hostile guest.
    #[test]
    fn damaged_states(flips in vec((any::<prop::sample::Index>(), any::<u8>()), 1..4), deeds in deeds()) {
        let memory = memory();
        let rig = Rig::new(Box::new(Rng), &memory);
        let driver = Driver::new(&memory, 16);
        rig.bring_up(1 << 32, driver.queue);
        let mut bytes = postcard::to_stdvec(&rig.transport.save()).unwrap();
        for (at, value) in flips {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Ok(state) = postcard::from_bytes(&bytes) {
            let _ = rig.transport.load(state, 0);
        }
        rig.resume();
        carry_out(&rig, &memory, &deeds);
    }
}
