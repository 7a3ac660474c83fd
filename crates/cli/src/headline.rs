//! A report's sentence, without what is shown in a place of its own beside it.

use dunlin::Report;

/// What is happening and where the guest is, without the error and why it does not converge.
pub fn headline(report: &Report) -> String {
    let error = report.error.as_ref().map(|error| error.message.as_str());
    let shown_elsewhere = [error, report.not_converging.as_deref()];
    let cut = shown_elsewhere.into_iter().flatten().filter(|text| !text.is_empty());
    let end = cut.filter_map(|text| report.summary.find(text)).min();
    match (end, report.summary.as_str()) {
        (_, "") => format!("{}; the guest is {}", report.status, report.guest),
        (None, whole) => whole.to_owned(),
        (Some(end), whole) => {
            let kept = whole.get(..end).unwrap_or(whole);
            let kept = kept.trim_end_matches([':', ' ']).trim_end_matches("; it does not converge");
            let place = format!("the guest is {}", report.guest);
            if kept.contains(&format!("while {place}")) { kept.to_owned() } else { format!("{kept}; {place}") }
        }
    }
}

#[cfg(test)]
mod tests {
    use dunlin::error::Phase;
    use dunlin::report::ErrorReport;
    use dunlin::{GuestPlace, Side, Status};

    use super::*;

    #[test]
    fn what_is_said_elsewhere_is_left_out() {
        let mut report = Report::new(Side::Source, GuestPlace::RunningAtSource);
        report.status = Status::Active;
        assert_eq!(headline(&report), "active; the guest is running at the source");
        report.not_converging = Some("the guest is faster".to_owned());
        let whole = "sending RAM while the guest is running at the source: round 2, 1.00 MiB of 1.00 GiB to go";
        report.summary = whole.to_owned();
        assert_eq!(headline(&report), whole);
        report.summary = format!("{whole}; it does not converge: the guest is faster");
        assert_eq!(headline(&report), whole);
        report.error = Some(ErrorReport {
            message: "source, precopy: lost it; the guest is running at the source".to_owned(),
            side: Side::Source,
            phase: Phase::Precopy,
            guest: GuestPlace::RunningAtSource,
        });
        report.summary = "failed after 2.00 s: source, precopy: lost it; the guest is running at the source".to_owned();
        assert_eq!(headline(&report), "failed after 2.00 s; the guest is running at the source");
    }
}
