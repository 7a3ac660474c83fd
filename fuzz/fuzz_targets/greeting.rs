//! Any bytes as the beginning of a connection. Its checksum is made right, or nearly nothing would get past it.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    dunlin::internals::parse_greeting(bytes);
});
