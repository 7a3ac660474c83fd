//! The rings against a kernel that is made up, with vCPUs that write at random.

use std::collections::BTreeSet;
use std::time::Duration;

use proptest::prelude::*;
use vm_memory::MmapRegion;

use super::*;
use crate::memory::{CHUNK_SIZE, DirtyTracker, RamBlock};

/// Three chunks and 100 pages, in slots of a chunk, and two chunks and 100 pages.
const PAGES: u64 = 3 * 512 + 100;
const SLOTS: [(u64, u64); 2] = [(0, 512), (512, 1024 + 100)];
const ENTRIES: u32 = 32;
const VCPUS: usize = 3;

/// What KVM remembers of a ring.
#[derive(Debug, Default, Clone, Copy)]
struct Indices {
    dirty: u32,
    reset: u32,
}

#[derive(Debug, Default)]
struct Inside {
    on: BTreeSet<u32>,
    indices: [Indices; VCPUS],
    writable: BTreeSet<u64>,
}

/// A kernel with rings of its own.
#[derive(Debug)]
struct Fake {
    rings: Vec<Box<[Entry]>>,
    inside: Mutex<Inside>,
    /// A reset is interrupted after so many entries.
    patience: u64,
    /// Entries in a ring at which the vCPU does not run on.
    soft_limit: u32,
}

fn slot_of(page: u64) -> (u32, u64) {
    let slot = u32::from(page >= SLOTS[1].0);
    (slot, page - SLOTS[slot as usize].0)
}

impl Inside {
    fn used(&self, vcpu: usize) -> u32 {
        self.indices[vcpu].dirty.wrapping_sub(self.indices[vcpu].reset)
    }
}

impl Fake {
    fn inside(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap()
    }

    fn is_full(&self, vcpu: usize) -> bool {
        self.inside().used(vcpu) >= self.soft_limit
    }

    /// A vCPU writes a page, while KVM is held.
    fn write(&self, inside: &mut Inside, vcpu: usize, page: u64, write: Write) {
        let (slot, offset) = slot_of(page);
        let protected = inside.writable.insert(page);
        if inside.on.contains(&slot) && (protected || write == Write::Emulated) {
            let entry = &self.rings[vcpu][(inside.indices[vcpu].dirty % ENTRIES) as usize];
            entry.slot.store(slot, Ordering::Relaxed);
            entry.offset.store(offset, Ordering::Relaxed);
            entry.flags.store(sys::ENTRY_DIRTY, Ordering::Release);
            inside.indices[vcpu].dirty += 1;
        }
    }
}

impl Kernel for Arc<Fake> {
    fn switch(&self, slot: &KvmSlot, _: u64, switch: Switch) -> io::Result<()> {
        let mut inside = self.inside();
        match switch {
            Switch::On => {
                inside.on.insert(slot.slot);
                inside.writable.retain(|page| slot_of(*page).0 != slot.slot);
            }
            Switch::Off => drop(inside.on.remove(&slot.slot)),
        }
        Ok(())
    }

    fn reset(&self) -> io::Result<u64> {
        let mut inside = self.inside();
        let mut freed = 0;
        for (vcpu, ring) in self.rings.iter().enumerate() {
            while freed < self.patience {
                let entry = &ring[(inside.indices[vcpu].reset % ENTRIES) as usize];
                if entry.flags.load(Ordering::Acquire) & sys::ENTRY_RESET == 0 {
                    break;
                }
                let page = SLOTS[entry.slot.load(Ordering::Relaxed) as usize].0 + entry.offset.load(Ordering::Relaxed);
                inside.writable.remove(&page);
                entry.flags.store(0, Ordering::Release);
                inside.indices[vcpu].reset += 1;
                freed += 1;
            }
        }
        Ok(freed)
    }

    fn ring(&self, vcpu: usize) -> &[Entry] {
        &self.rings[vcpu]
    }
}

fn rings(patience: u64) -> (Arc<Fake>, Arc<KvmDirtyRings>) {
    let region: MmapRegion = MmapRegion::new((PAGES * PAGE_SIZE) as usize).unwrap();
    let ram = Ram::new(vec![RamBlock::new("ram", Arc::new(region)).unwrap()]).unwrap();
    let slots: Vec<KvmSlot> = (0..)
        .zip(SLOTS)
        .map(|(slot, (first, pages))| KvmSlot {
            slot,
            guest_address: first * PAGE_SIZE,
            block: 0,
            offset: first * PAGE_SIZE,
            size_bytes: pages * PAGE_SIZE,
        })
        .collect();
    let ring = || std::iter::repeat_with(Entry::default).take(ENTRIES as usize).collect();
    let rings = std::iter::repeat_with(ring).take(VCPUS).collect();
    let fake = Arc::new(Fake { rings, inside: Mutex::default(), patience, soft_limit: ENTRIES - 8 });
    let size = KvmRingSize { entries: ENTRIES };
    (fake.clone(), KvmDirtyRings::on(Box::new(fake), VCPUS, size, &ram, &slots).unwrap())
}

fn pages(bitmap: &DirtyBitmap) -> BTreeSet<u64> {
    let mut pages = BTreeSet::new();
    bitmap.drain(|run| pages.extend(run.map(|page| page as u64)));
    pages
}

fn bytes_of(chunk: u64) -> Range<u64> {
    chunk * CHUNK_SIZE..((chunk + 1) * CHUNK_SIZE).min(PAGES * PAGE_SIZE)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Write {
    /// The processor's own: an entry only if the page was protected.
    Plain,
    /// Done by KVM for the guest: always an entry.
    Emulated,
}

#[derive(Debug, Clone)]
enum Step {
    Guest(usize, u64, Write),
    Own(u64),
    Collect,
    MakeRoom(usize),
    Sync,
    Rearm(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let write = prop_oneof![4 => Just(Write::Plain), 1 => Just(Write::Emulated)];
    // Near pages come again and again.
    let page = prop_oneof![0..PAGES, 500..530u64, Just(PAGES - 1)];
    let step = prop_oneof![
        20 => (0..VCPUS, page, write).prop_map(|(vcpu, page, write)| Step::Guest(vcpu, page, write)),
        2 => (0..PAGES).prop_map(Step::Own),
        1 => Just(Step::Collect),
        1 => (0..VCPUS).prop_map(Step::MakeRoom),
        1 => Just(Step::Sync),
        3 => (0..4u64).prop_map(Step::Rearm),
    ];
    prop::collection::vec(step, 0..300)
}

proptest! {
    /// Exactly what was written since the start and until it is re-armed, and what was re-armed is protected.
    #[test]
    fn reports_what_was_written(patience in 1u64..40, steps in steps(), turns in 1..3) {
        let (fake, rings) = rings(patience);
        let own: Arc<[DirtyBitmap]> = Arc::new([DirtyBitmap::new(PAGES * PAGE_SIZE)]);
        let dirty = DirtyBitmap::new(PAGES * PAGE_SIZE);
        for _ in 0..turns {
            let tracker = KvmDirtyRing::new(rings.clone(), Some(own.clone()), None).unwrap();
            tracker.start().unwrap();
            let mut written = BTreeSet::new();
            for step in &steps {
                match *step {
                    Step::Guest(vcpu, page, write) => {
                        if fake.is_full(vcpu) {
                            rings.make_room(vcpu).unwrap();
                            prop_assert_eq!(fake.inside().used(vcpu), 0);
                        }
                        fake.write(&mut fake.inside(), vcpu, page, write);
                        written.insert(page);
                    }
                    Step::Own(page) => {
                        own[0].set(page as usize..page as usize + 1);
                        written.insert(page);
                    }
                    Step::Collect => rings.collect(&mut rings.state()).unwrap(),
                    Step::MakeRoom(vcpu) => rings.make_room(vcpu).unwrap(),
                    Step::Sync => {
                        tracker.sync(0, &dirty).unwrap();
                        prop_assert_eq!(pages(&dirty), written.clone());
                    }
                    Step::Rearm(chunk) => {
                        tracker.rearm(0, bytes_of(chunk), &dirty).unwrap();
                        let mine = |page: &u64| page / 512 == chunk;
                        let expected: BTreeSet<u64> = written.iter().copied().filter(mine).collect();
                        prop_assert_eq!(pages(&dirty), expected);
                        let open: Vec<u64> = fake.inside().writable.iter().copied().filter(mine).collect();
                        prop_assert!(open.is_empty(), "not protected: {open:?}");
                        written.retain(|page| !mine(page));
                    }
                }
            }
            tracker.stop();
            prop_assert!(fake.inside().on.is_empty(), "the watch is off at the end");
            prop_assert_eq!((0..VCPUS).map(|vcpu| fake.inside().used(vcpu)).sum::<u32>(), 0);
            own[0].drain(drop);
        }
    }

    /// A KVM that does not stop a vCPU whose ring is full: either nothing is missing or it is said, and the guest goes on.
    #[test]
    fn an_overflow_is_found(
        before in 0..ENTRIES,
        read in any::<bool>(),
        burst in 0..4 * ENTRIES,
        others in 0..ENTRIES - 8,
        patience in prop_oneof![Just(u64::MAX), 1u64..40],
    ) {
        let (fake, rings) = rings(patience);
        let tracker = KvmDirtyRing::new(rings.clone(), None, None).unwrap();
        tracker.start().unwrap();
        let dirty = DirtyBitmap::new(PAGES * PAGE_SIZE);
        let mut written = BTreeSet::new();
        let mut write = |vcpu, count: u32, first: u64| for page in (first..).take(count as usize) {
            fake.write(&mut fake.inside(), vcpu, page, Write::Plain);
            written.insert(page);
        };
        write(1, before, 0);
        if read {
            // Read and not reset, unless it is much.
            let _ = rings.collect(&mut rings.state());
        }
        write(1, burst, 300);
        write(2, others, 1000);
        let over = fake.inside().used(1) > ENTRIES;
        match tracker.sync(0, &dirty) {
            Ok(()) => {
                prop_assert_eq!(pages(&dirty), written);
                prop_assert!(!over || tracker.rearm(0, bytes_of(0), &dirty).is_err());
            }
            Err(error) => {
                prop_assert!(matches!(error, TrackerError::RingOverflow));
                prop_assert!(fake.inside().used(1) >= ENTRIES);
                prop_assert!(fake.inside().on.is_empty());
                prop_assert!(matches!(tracker.rearm(0, bytes_of(1), &dirty), Err(TrackerError::RingOverflow)));
                tracker.stop();
                prop_assert!(matches!(tracker.start(), Err(TrackerError::RingOverflow)));
            }
        }
        // Each had come out for a full ring, when another made room before it could ask for some.
        for vcpu in (0..VCPUS).rev() {
            rings.make_room(vcpu).unwrap();
        }
        for vcpu in 0..VCPUS {
            prop_assert!(fake.inside().used(vcpu) <= 5 * ENTRIES, "more was freed than there was");
            let mut times = 0;
            while fake.is_full(vcpu) {
                rings.make_room(vcpu).unwrap();
                times += 1;
                prop_assert!(times < 40, "no room is made");
            }
        }
    }
}

/// vCPUs that write, and make room when they must, beside an engine that re-arms and reads: what was read last is what
/// there is.
#[test]
fn nothing_is_missed_while_the_guest_runs() {
    let (fake, rings) = rings(7);
    let ram: Vec<AtomicU64> = std::iter::repeat_with(AtomicU64::default).take(PAGES as usize).collect();
    let tracker = KvmDirtyRing::new(rings.clone(), None, Some(Duration::from_millis(1))).unwrap();
    tracker.start().unwrap();
    let dirty = DirtyBitmap::new(PAGES * PAGE_SIZE);
    let mut sent = vec![0; PAGES as usize];
    let running = AtomicBool::new(true);
    let send = |sent: &mut Vec<u64>| {
        for chunk in 0..4 {
            tracker.rearm(0, bytes_of(chunk), &dirty).unwrap();
            for page in pages(&dirty) {
                sent[page as usize] = ram[page as usize].load(Ordering::SeqCst);
            }
        }
    };
    std::thread::scope(|scope| {
        for vcpu in 0..VCPUS {
            let (fake, rings, ram, running) = (&fake, &rings, &ram, &running);
            scope.spawn(move || {
                let mut random = vcpu as u64 + 1;
                while running.load(Ordering::Relaxed) {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    let page = (random >> 33) % if random >> 63 == 0 { PAGES } else { 20 };
                    while fake.is_full(vcpu) {
                        rings.make_room(vcpu).unwrap();
                    }
                    // One step for the processor, and so one here: no reset comes between the entry and the write.
                    let mut inside = fake.inside();
                    fake.write(&mut inside, vcpu, page, Write::Plain);
                    ram[page as usize].fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        let until = std::time::Instant::now() + Duration::from_millis(500);
        while std::time::Instant::now() < until {
            send(&mut sent);
            tracker.sync(0, &dirty).unwrap();
        }
        running.store(false, Ordering::Relaxed);
    });
    send(&mut sent);
    let now: Vec<u64> = ram.iter().map(|page| page.load(Ordering::SeqCst)).collect();
    assert!(now.iter().sum::<u64>() > 1000);
    assert_eq!(sent, now);
}

/// A vCPU comes out for a full ring again and again, and each time another thread has made room before it asks.
#[test]
fn others_may_make_room_all_the_time() {
    let (fake, rings) = rings(u64::MAX);
    let tracker = KvmDirtyRing::new(rings.clone(), None, None).unwrap();
    tracker.start().unwrap();
    let dirty = DirtyBitmap::new(PAGES * PAGE_SIZE);
    for _ in 0..3 * TRIES {
        for page in (0..).take_while(|_| !fake.is_full(0)) {
            fake.write(&mut fake.inside(), 0, page, Write::Plain);
        }
        tracker.rearm(0, bytes_of(0), &dirty).unwrap();
        rings.make_room(0).unwrap();
    }
    assert!(!rings.are_lost());
}

#[test]
fn refusals() {
    let (fake, rings) = rings(u64::MAX);
    let first = KvmDirtyRing::new(rings.clone(), None, Some(Duration::from_millis(1))).unwrap();
    let dirty = DirtyBitmap::new(PAGES * PAGE_SIZE);
    assert!(first.sync(0, &dirty).is_err(), "not started");
    first.start().unwrap();
    assert!(first.sync(1, &dirty).is_err(), "no such block");
    let second = KvmDirtyRing::new(rings.clone(), None, Some(Duration::from_millis(1))).unwrap();
    assert!(matches!(second.start(), Err(TrackerError::RingsInUse)));
    drop(second);
    first.sync(0, &dirty).unwrap();
    drop(first);
    // Entries of no slot, beyond a slot's end, and of no vCPU.
    for (slot, offset) in [(7, 0), (0, 512), (1, u64::MAX), (u32::MAX, u64::MAX)] {
        rings.mark(slot, offset);
    }
    assert!(rings.fresh.iter().all(|fresh| fresh.count() == 0));
    rings.make_room(VCPUS).unwrap();
    // A vCPU that is said to be stopped for a full ring, for ever.
    let mut times = 0;
    while !rings.state().lost {
        let _ = rings.make_room(0);
        times += 1;
        assert!(times < 1000);
    }
    assert!(KvmDirtyRing::new(rings, Some(Arc::new([])), None).is_err());
    drop(fake);
}
