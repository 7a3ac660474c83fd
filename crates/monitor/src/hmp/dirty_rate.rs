//! Measuring how fast the guest dirties its RAM.

use std::fmt::Write;
use std::time::{Duration, UNIX_EPOCH};

use dunlin::dirty_rate::{DirtyRate, DirtyRateMode, DirtyRateRequest, DirtyRateStatus};
use dunlin::units::{format_seconds, format_size, parse_duration};

use super::error::HmpError;
use super::table::Given;
use crate::vm::Vm;

/// `calc_dirty_rate [-r] [-b] [TIME] [PAGES]`
pub(super) fn calc(vm: &Vm, given: &Given<'_>) -> Result<String, HmpError> {
    let not_that =
        |word: &str, wanted| HmpError::NotThat { word: word.to_owned(), wanted, usage: given.command.usage() };
    let mode = match (given.has("-r"), given.has("-b")) {
        (false, false) => DirtyRateMode::PageSampling,
        (false, true) => DirtyRateMode::DirtyBitmap,
        (true, false) => DirtyRateMode::DirtyRing,
        (true, true) => return Err(not_that("-r -b", "one way of measuring")),
    };
    let mut request = DirtyRateRequest { mode, ..Default::default() };
    if let Some(word) = given.word(0) {
        let time = parse_duration(word, Duration::from_secs(1));
        request.calc_time = time.map_err(|_| not_that(word, "a time, such as 2 or 500ms"))?;
    }
    if let Some(word) = given.word(1) {
        // Nothing is sampled otherwise.
        if mode != DirtyRateMode::PageSampling {
            return Err(HmpError::TooMuch { word: word.to_owned(), usage: given.command.usage() });
        }
        request.sample_pages = word.parse().map_err(|_| not_that(word, "a number of pages of each GiB"))?;
    }
    vm.guest().calc_dirty_rate(&request)?;
    let time = format_seconds(request.calc_time.as_secs_f64());
    Ok(format!("measuring for {time}; `info dirty_rate` has the result then\n"))
}

/// `info dirty_rate`
pub(super) fn show(vm: &Vm, _: &Given<'_>) -> Result<String, HmpError> {
    Ok(text(&vm.guest().dirty_rate(), UNIX_EPOCH.elapsed().unwrap_or_default()))
}

/// `now` is since 1970, as the measurement's start is.
fn text(rate: &DirtyRate, now: Duration) -> String {
    let how = how(rate);
    let mut text = match (rate.status, rate.dirty_bytes_per_second, &rate.error) {
        (DirtyRateStatus::Measuring, ..) => format!("being measured, {how}\n"),
        (DirtyRateStatus::Measured, Some(bytes), _) => format!("dirty rate: {}/s, {how}\n", format_size(bytes)),
        (_, _, Some(error)) => format!("the last measurement came to nothing: {error}\n"),
        _ => "not measured yet; `calc_dirty_rate` does\n".to_owned(),
    };
    if rate.status == DirtyRateStatus::Unstarted {
        return text;
    }
    // Writing to a string does not fail.
    if let Some(start) = rate.start_time_seconds {
        let _ = writeln!(text, "begun {} ago", format_seconds((now.as_secs_f64() - start).max(0.0)));
    }
    text.push_str(&bounds(rate));
    for vcpu in &rate.vcpus {
        let _ = writeln!(text, "vCPU {}: {}/s", vcpu.vcpu, format_size(vcpu.dirty_bytes_per_second));
    }
    text
}

/// What the figure can tell, and what it cannot.
fn bounds(rate: &DirtyRate) -> String {
    let (Some(least), Some(most)) = (rate.at_least_bytes_per_second, rate.at_most_bytes_per_second) else {
        return String::new();
    };
    let window = format_seconds(rate.window_seconds.unwrap_or(rate.calc_time_seconds));
    let mut text = format!(
        "at least {}/s, each page once in {}; at most {}/s, each page once in {window}\n",
        format_size(least),
        format_seconds(rate.calc_time_seconds),
        format_size(most),
    );
    // Writing to a string does not fail.
    match (rate.samples, rate.changed_samples) {
        (Some(samples), Some(0)) => {
            let _ =
                writeln!(text, "none of {samples} samples had changed: it may have written a little; -b counts pages");
        }
        (Some(samples), Some(changed)) => {
            let _ = writeln!(text, "{changed} of {samples} samples had changed");
        }
        _ => {}
    }
    text
}

fn how(rate: &DirtyRate) -> String {
    let by = match rate.mode {
        Some(DirtyRateMode::DirtyBitmap) => "by counting written pages".to_owned(),
        Some(DirtyRateMode::DirtyRing) => "by counting each vCPU's written pages".to_owned(),
        Some(DirtyRateMode::PageSampling) | None => match rate.sample_pages {
            Some(pages) => format!("by {pages} sampled pages of each GiB"),
            None => "by sampled pages".to_owned(),
        },
    };
    format!("{by}, over {}", format_seconds(rate.calc_time_seconds))
}

#[cfg(test)]
mod tests {
    use dunlin::dirty_rate::VcpuDirtyRate;

    use super::*;

    #[test]
    fn from_nothing_to_a_result() {
        let now = Duration::from_secs(1_000);
        assert_eq!(text(&DirtyRate::default(), now), "not measured yet; `calc_dirty_rate` does\n");
        let mut rate = DirtyRate {
            status: DirtyRateStatus::Measuring,
            mode: Some(DirtyRateMode::PageSampling),
            start_time_seconds: Some(998.5),
            calc_time_seconds: 2.0,
            sample_pages: Some(512),
            ..DirtyRate::default()
        };
        let measuring = "being measured, by 512 sampled pages of each GiB, over 2.00 s\nbegun 1.50 s ago\n";
        assert_eq!(text(&rate, now), measuring);
        rate.status = DirtyRateStatus::Measured;
        rate.mode = Some(DirtyRateMode::DirtyRing);
        rate.dirty_bytes_per_second = Some(3 << 20);
        rate.vcpus = vec![VcpuDirtyRate { vcpu: 0, dirty_bytes_per_second: 3 << 20 }];
        let measured = "dirty rate: 3.00 MiB/s, by counting each vCPU's written pages, over 2.00 s\n\
                        begun 1.50 s ago\nvCPU 0: 3.00 MiB/s\n";
        assert_eq!(text(&rate, now), measured);
        rate = DirtyRate {
            mode: Some(DirtyRateMode::PageSampling),
            dirty_bytes_per_second: Some(0),
            at_least_bytes_per_second: Some(0),
            at_most_bytes_per_second: Some(5 << 20),
            window_seconds: Some(0.25),
            samples: Some(2048),
            changed_samples: Some(0),
            vcpus: Vec::new(),
            ..rate
        };
        let nothing = "dirty rate: 0 B/s, by 512 sampled pages of each GiB, over 2.00 s\nbegun 1.50 s ago\n\
                       at least 0 B/s, each page once in 2.00 s; at most 5.00 MiB/s, each page once in 250.0 ms\n\
                       none of 2048 samples had changed: it may have written a little; -b counts pages\n";
        assert_eq!(text(&rate, now), nothing);
    }
}
