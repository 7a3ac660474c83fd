//! The program of the vCPUs: which page a step writes.
//!
//! Only integers, so that both sides of a migration compute the same. The working set is cut into a slice a vCPU, so
//! that every page has one writer and its last write is known.

use std::ops::Range;

use super::workload::{Pattern, Workload};

/// A well-mixed 64-bit number from another (the finaliser of splitmix64).
pub(super) fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// What all vCPUs do.
#[derive(Debug, Clone)]
pub(super) struct Program {
    pub(super) workload: Workload,
    pub(super) seed: u64,
    vcpus: u64,
    /// Pages of the working set.
    pages: u64,
}

impl Program {
    /// The program of so many vCPUs on so much memory.
    pub(super) fn new(workload: Workload, seed: u64, vcpus: u32, memory_bytes: u64) -> Self {
        let writes = workload.writes();
        let bytes = writes.map_or(0, |writes| writes.working_set_bytes.unwrap_or(u64::MAX).min(memory_bytes));
        Self { workload, seed, vcpus: u64::from(vcpus), pages: bytes / super::PAGE_BYTES as u64 }
    }

    pub(super) fn vcpus(&self) -> u64 {
        self.vcpus
    }

    /// The pages that `vcpu` writes; none when it has nothing to do.
    pub(super) fn slice(&self, vcpu: usize) -> Range<u64> {
        let edge = |n: u64| (u128::from(self.pages) * u128::from(n) / u128::from(self.vcpus.max(1))) as u64;
        edge(vcpu as u64)..edge(vcpu as u64 + 1)
    }

    /// What a vCPU's contents and choices follow from.
    pub(super) fn vcpu_seed(&self, vcpu: usize) -> u64 {
        mix(self.seed ^ mix(vcpu as u64 + 1))
    }

    /// The page, counted from the start of a slice of `pages`, that a vCPU writes in `step`.
    pub(super) fn page(&self, vcpu_seed: u64, step: u64, pages: u64) -> u64 {
        let random = mix(vcpu_seed ^ step.wrapping_mul(0xD6E8_FEB8_6659_FD93));
        let pick = |random: u64, among: u64| ((u128::from(random) * u128::from(among)) >> 64) as u64;
        match self.workload.writes().map(|writes| writes.pattern) {
            None => 0,
            Some(Pattern::Uniform) => pick(random, pages),
            Some(Pattern::Sequential) => step % pages.max(1),
            Some(Pattern::Zipf) => scatter(zipf_rank(random, pages), pages),
            Some(Pattern::HotCold) => {
                let hot = (pages / 10).max(1).min(pages);
                let place = mix(random);
                if random % 10 < 9 || hot == pages { pick(place, hot) } else { hot + pick(place, pages - hot) }
            }
        }
    }
}

/// A rank below `pages` with a probability that falls as one over the rank: a power of two is chosen evenly, then a
/// rank between it and the next.
fn zipf_rank(random: u64, pages: u64) -> u64 {
    let levels = u64::from(u64::BITS - pages.leading_zeros()).max(1);
    let level = (random >> 32) % levels;
    let first = (1u64 << level) - 1;
    let width = (1u64 << level).min(pages.saturating_sub(first)).max(1);
    (first + (random & 0xFFFF_FFFF) % width).min(pages.saturating_sub(1))
}

/// Spreads ranks over the slice, one to one: the multiplier is a prime larger than any slice.
fn scatter(rank: u64, pages: u64) -> u64 {
    const PRIME: u128 = 1_000_000_000_039;
    (u128::from(rank) * PRIME % u128::from(pages.max(1))) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(text: &str, vcpus: u32) -> Program {
        Program::new(text.parse().unwrap(), 7, vcpus, 64 << 20)
    }

    #[test]
    fn slices_cover_the_working_set_once() {
        for vcpus in [1, 2, 3, 7, 64] {
            let program = program("pattern=uniform,working-set=10M", vcpus);
            let mut next = 0;
            for vcpu in 0..vcpus as usize {
                let slice = program.slice(vcpu);
                assert_eq!(slice.start, next);
                next = slice.end;
            }
            assert_eq!(next, (10 << 20) / 4096);
        }
    }

    /// Each pattern stays inside its slice and has the shape its name says.
    #[test]
    fn patterns_have_their_shape() {
        let pages = 1000u64;
        for (text, hottest_tenth) in
            [("uniform", 0.08..0.14), ("sequential", 0.09..0.11), ("zipf", 0.5..0.9), ("hotcold", 0.88..0.93)]
        {
            let program = program(&format!("pattern={text}"), 1);
            let mut counts = vec![0u64; pages as usize];
            for step in 1..=100_000 {
                counts[program.page(program.vcpu_seed(0), step, pages) as usize] += 1;
            }
            assert!(text == "zipf" || counts.iter().all(|c| *c > 0), "{text} reaches every page");
            counts.sort_unstable_by(|a, b| b.cmp(a));
            let share = counts[..100].iter().sum::<u64>() as f64 / 100_000.0;
            assert!(hottest_tenth.contains(&share), "{text}: {share}");
        }
        for pages in 1..40 {
            for text in ["uniform", "sequential", "zipf", "hotcold"] {
                let program = program(&format!("pattern={text}"), 1);
                assert!((1..500).all(|step| program.page(3, step, pages) < pages), "{text} of {pages}");
            }
        }
    }
}
