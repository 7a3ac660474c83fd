//! Asks the machine, on a thread of its own: the screen answers to keys also when the machine does not.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::Result;
use dunlin::Report;
use dunlin_monitor::{Address, Client};
use serde_json::{Value, json};

use crate::connection;
use crate::recording;
use crate::terminal;

/// How long an attempt to end waits for a machine that does not answer. The process ends soon after.
const PATIENCE: Duration = Duration::from_millis(300);
/// How often people see something new.
const SCREEN: Duration = Duration::from_millis(100);

/// What the machine says.
#[derive(Debug)]
pub enum News {
    /// Its state, and the report of its latest migration.
    Seen { state: String, migration: Option<Box<(Value, Report)>> },
    /// It does not answer any more.
    Lost(String),
}

/// How often the machine is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pace {
    /// For people.
    Screen,
    /// For a recording.
    Recording,
}

impl Pace {
    fn interval(self, news: &News) -> Duration {
        match (self, news) {
            (Self::Recording, News::Seen { migration: Some(migration), .. }) => recording::interval(Some(&migration.1)),
            _ => SCREEN,
        }
    }
}

/// The thread.
#[derive(Debug)]
pub struct Poller {
    news: Receiver<News>,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Poller {
    /// Connects to the machine at `address`, and asks it again and again.
    pub fn start(address: &Address, pace: Pace) -> Result<Self> {
        let client = connection::connect(address)?;
        // A screen that is slow gets old news, and few of them.
        let (sender, news) = mpsc::sync_channel(4);
        let over = Arc::new(AtomicBool::new(false));
        let asking = Asking { client, address: address.clone(), over: Arc::clone(&over), sender };
        let thread = thread::Builder::new().name("poller".to_owned()).spawn(move || asking.run(pace))?;
        Ok(Self { news, over, thread: Some(thread) })
    }

    /// What was said and not yet taken, waiting a while for it.
    pub fn next(&self, patience: Duration) -> Option<News> {
        self.news.recv_timeout(patience).ok()
    }
}

impl Drop for Poller {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        let Some(thread) = self.thread.take() else { return };
        let deadline = Instant::now() + PATIENCE;
        while !thread.is_finished() && Instant::now() < deadline {
            // It may be waiting for room.
            let _ = self.news.recv_timeout(Duration::from_millis(5));
        }
        if thread.is_finished() {
            let _ = thread.join();
        }
    }
}

struct Asking {
    client: Client,
    address: Address,
    over: Arc<AtomicBool>,
    sender: SyncSender<News>,
}

impl Asking {
    fn run(mut self, pace: Pace) {
        let mut failed_before = false;
        loop {
            let begun = Instant::now();
            let news = match look(&mut self.client) {
                Ok(news) => {
                    failed_before = false;
                    news
                }
                // A machine that answers, but not so that it can be understood, will not do better.
                Err(error) if std::mem::replace(&mut failed_before, true) => {
                    let _ = self.sender.send(News::Lost(terminal::one_line(&error)));
                    return;
                }
                Err(error) => match Client::connect(&self.address) {
                    Ok(client) => {
                        self.client = client;
                        if self.is_over_within(SCREEN) {
                            return;
                        }
                        continue;
                    }
                    Err(_) => {
                        let _ = self.sender.send(News::Lost(terminal::one_line(&error)));
                        return;
                    }
                },
            };
            let interval = pace.interval(&news);
            if self.sender.send(news).is_err() || self.is_over_within(interval.saturating_sub(begun.elapsed())) {
                return;
            }
        }
    }

    /// Waits; tells whether it is over.
    fn is_over_within(&self, time: Duration) -> bool {
        let deadline = Instant::now() + time;
        while !self.over.load(Ordering::Relaxed) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            thread::sleep(left.min(Duration::from_millis(50)));
        }
        true
    }
}

fn look(client: &mut Client) -> Result<News> {
    let state = client.execute("query-status", json!({}))?;
    let state = state.get("status").and_then(Value::as_str).unwrap_or("unknown").to_owned();
    Ok(News::Seen { state, migration: connection::report(client)?.map(Box::new) })
}
