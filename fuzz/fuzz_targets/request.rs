//! Bytes of a QMP client: whatever they are, requests are found, read and checked, or refused.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = dunlin_monitor::internals::read_requests(bytes);
});
