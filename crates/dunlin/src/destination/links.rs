//! The connections of a session and their threads. What must stay true: dropping one closes it and joins its threads.

use std::sync::Arc;
use std::thread::JoinHandle;

use crate::channel::Connection;
use crate::link::{Places, SharedSender, Watch};

/// A connection to the source that carries messages. Dropping it closes it and joins its threads.
pub(super) struct Link {
    pub(super) number: u32,
    pub(super) connection: Arc<Connection>,
    pub(super) places: Arc<Places>,
    pub(super) sender: SharedSender,
    /// Of this connection and, beside the session's first, of the data channels.
    pub(super) watch: Option<Watch>,
    pub(super) receiver: Option<JoinHandle<()>>,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.connection.shutdown();
        self.places.close();
        self.watch.take();
        if let Some(receiver) = self.receiver.take() {
            let _ = receiver.join();
        }
    }
}

/// A data channel and its thread. Dropping it closes it and joins the thread.
pub(super) struct Channel {
    pub(super) index: u8,
    pub(super) connection: Arc<Connection>,
    pub(super) places: Arc<Places>,
    pub(super) receiver: Option<JoinHandle<()>>,
    /// The latest round that has arrived as a whole.
    pub(super) round: u32,
}

impl Drop for Channel {
    fn drop(&mut self) {
        self.connection.shutdown();
        self.places.close();
        if let Some(receiver) = self.receiver.take() {
            let _ = receiver.join();
        }
    }
}
