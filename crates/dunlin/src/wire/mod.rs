//! Bytes: hello, frames, control messages; the only place that parses input.

/// Bytes that are not what the wire format says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Placeholder.
    #[error("bad bytes")]
    Bad,
}
