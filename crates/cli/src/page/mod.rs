//! `dunlin report`: a recording as a page that needs nothing else: no network, no script, no font.

mod plot;
mod plots;
mod tables;

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use dunlin::{Report, Status};
use maud::{DOCTYPE, Markup, html};

use crate::Outcome;
use crate::args::MakeReport;
use crate::headline::headline;
use crate::recording::{self, Recording};
use crate::terminal;

const STYLE: &str = include_str!("style.css");

pub fn report(args: &MakeReport) -> Result<Outcome> {
    let recording = recording::read(&args.recording)?;
    let page = page(&recording).into_string();
    if args.output == Path::new("-") {
        terminal::out(&page)?;
        return Ok(Outcome::Success);
    }
    let path = args.output.display();
    fs::write(&args.output, page).with_context(|| format!("could not write {path}"))?;
    if recording.cut_off {
        terminal::note("the recording's last line is not whole and was left out: whoever wrote it was ended");
    }
    terminal::out(&format!("{path}: {} samples of a migration", recording.samples))?;
    Ok(Outcome::Success)
}

/// The page of a recording.
pub fn page(recording: &Recording) -> Markup {
    let series = &recording.series;
    let Some(report) = series.latest() else { return html! {} };
    let heading = plots::heading(report.status);
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                meta name="generator" content={ "dunlin " (env!("CARGO_PKG_VERSION")) };
                title { (heading) " – " (recording.header.machine) }
                style { (plot::ours(STYLE)) }
            }
            body {
                header {
                    h1 class=(report.status.to_string()) { (heading) }
                    p class="summary" { (sentence(report)) }
                    p class="origin" { (origin(recording, report)) }
                }
                main {
                    (notices(recording, report))
                    (tables::key_figures(series, report))
                    (plots::plots(series, report))
                    section class="tables" {
                        (tables::rounds(series, report))
                        (tables::channels(report))
                        (tables::moments(series))
                    }
                }
                footer { "Made by dunlin " (env!("CARGO_PKG_VERSION")) " from a recording." }
            }
        }
    }
}

/// The report's sentence, as one.
fn sentence(report: &Report) -> String {
    let text = headline(report);
    let mut letters = text.chars();
    letters.next().map_or(String::new(), |first| format!("{}{}.", first.to_uppercase(), letters.as_str()))
}

fn origin(recording: &Recording, report: &Report) -> String {
    let header = &recording.header;
    let session = report.session.as_ref().map_or(String::new(), |session| format!(", session {session}"));
    format!(
        "Seen by the {} at {}{session}; recorded from {} by dunlin {}, {} samples.",
        report.side, header.machine, header.began, header.dunlin, recording.samples
    )
}

fn notices(recording: &Recording, report: &Report) -> Markup {
    html! {
        @if let Some(error) = &report.error {
            section class={ "notice " (report.status) } {
                h2 { @if report.status == Status::Cancelled { "Cancelled" } @else { "Error" } }
                p { (error.message) }
                p { "Said by the " (error.side) "; the guest is " (error.guest) "." }
            }
        }
        @if let Some(why) = &report.not_converging {
            section class="notice" { h2 { "It did not converge" } p { (why) } }
        }
        @if report.refused_connections.count > 0 {
            section class="notice" {
                h2 { "Refused connections" }
                p {
                    (report.refused_connections.count)
                    @if let Some(latest) = &report.refused_connections.latest { "; the latest: " (latest) }
                }
            }
        }
        @if recording.cut_off {
            section class="notice" {
                h2 { "The recording was cut off" }
                p { "Its last line is not whole and was left out." }
            }
        }
        @if !report.status.is_final() {
            section class="notice" {
                h2 { "The recording ends before the migration" }
                p { "What is shown is how it stood then." }
            }
        }
        @if recording.migrations > 1 {
            section class="notice" {
                h2 { "The last of several" }
                p { "The recording has " (recording.migrations) " migrations; this is the last of them." }
            }
        }
    }
}

#[cfg(test)]
mod tests;
