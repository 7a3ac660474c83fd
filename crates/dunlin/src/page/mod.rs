//! The kinds a page can travel as.
