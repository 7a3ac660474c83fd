//! What is told of a migration in.

use dunlin::error::Phase;
use dunlin::report::ErrorReport;
use dunlin::{Destination, Report, Side, Status};

/// The destination's report. One whose only connection came to nothing, as that of `fd:` may, would say for ever that it
/// waits: nothing can come in by it any more, so it has failed.
pub(crate) fn report(destination: &Destination) -> Report {
    // Looked at first: what it reports after it has ended stays.
    let is_over = !destination.is_listening();
    let mut report = destination.report();
    if is_over && report.status == Status::Setup {
        fail(&mut report, &destination.local_uri().to_string());
    }
    report
}

fn fail(report: &mut Report, address: &str) {
    let (side, phase, guest) = (Side::Destination, Phase::Setup, report.guest);
    let why = match &report.refused_connections.latest {
        Some(latest) => format!(", after {latest}"),
        None => String::new(),
    };
    let message = format!("{side}, {phase}: no migration can come in on {address} any more{why}; the guest is {guest}");
    report.status = Status::Failed;
    report.summary = format!("failed: {message}");
    report.error = Some(ErrorReport { message, side, phase, guest });
}

#[cfg(test)]
mod tests {
    use dunlin::GuestPlace;

    use super::*;

    #[test]
    fn says_what_became_of_the_connection() {
        let mut report = Report::new(Side::Destination, GuestPlace::AtSource);
        report.status = Status::Setup;
        report.refused_connections.count = 1;
        report.refused_connections.latest = Some("fd:9: the other side closed it".to_owned());
        fail(&mut report, "fd:9");
        let message = "destination, setup: no migration can come in on fd:9 any more, after fd:9: the other side closed \
                       it; the guest is at the source";
        assert_eq!((report.status, report.error.unwrap().message.as_str()), (Status::Failed, message));
        assert!(report.summary.contains(message), "{}", report.summary);
    }
}
