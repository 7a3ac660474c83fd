//! The network card on a real tap device, seen from the host's side by a packet socket. Skipped where tap devices cannot be
//! made.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::*;
use crate::device_config::NetConfig;
use crate::kvm::devices::net::Net;
use crate::kvm::devices::tap::HEADER_BYTES;

const VERSION_1: u64 = 1 << 32;
/// An experimental protocol's frames: the host's network does not deal with them.
const PROTOCOL: [u8; 2] = [0x88, 0xb5];

/// A packet socket on a network interface, which it brings up.
fn packets(name: &str) -> io::Result<OwnedFd> {
    let protocol = i32::from(u16::from_ne_bytes(PROTOCOL));
    // SAFETY: a new descriptor, or an error.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is nobody else's.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: all zeros are a valid request.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = byte as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: the kernel reads a request.
    if unsafe { libc::ioctl(fd.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel reads and writes a request.
    if unsafe { libc::ioctl(fd.as_raw_fd(), libc::SIOCGIFINDEX, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: all zeros are a valid address.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol as u16;
    // SAFETY: the kernel has filled in the index.
    address.sll_ifindex = unsafe { request.ifr_ifru.ifru_ifindex };
    let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: an address of that length.
    if unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), length) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(fd)
}

fn frame(number: u8, length: usize) -> Vec<u8> {
    let mut frame = [[0xff; 6], [2, 0, 0, 0, 0, 9]].concat();
    frame.extend(PROTOCOL);
    frame.resize(length, number);
    frame
}

#[test]
fn frames_go_both_ways() {
    let tap = format!("dunlin{}", std::process::id() % 100_000);
    let config: NetConfig = format!("tap={tap},mac=02:00:00:00:00:07").parse().unwrap();
    let (card, host) = match Net::new(&config).and_then(|card| Ok((card, packets(&tap)?))) {
        Ok(made) => made,
        Err(error) => {
            println!("skipped: no tap device: {error}");
            return;
        }
    };
    let error = Net::new(&config).unwrap_err();
    println!("a second one: {error}");
    let memory = memory();
    let rig = Rig::new(Box::new(card), &memory);
    let mut receive = Driver::at(&memory, 16, 0x1_0000);
    let mut transmit = Driver::at(&memory, 16, 0x2_0000);
    rig.resume();
    let mut mac = [0; 6];
    rig.transport.read(0x100, &mut mac);
    assert_eq!(mac, [2, 0, 0, 0, 0, 7]);
    rig.bring_up_all(VERSION_1, &[receive.queue, transmit.queue]);
    for number in 0..60u8 {
        let sent = frame(number, 60 + usize::from(number) * 20);
        let whole = [&[0; HEADER_BYTES][..], &sent].concat();
        memory.write_slice(&whole, GuestAddress(0x30_0000)).unwrap();
        transmit.submit(0, &[(0x30_0000, whole.len() as u32, false)]);
        rig.write(0x50, 1);
        transmit.wait_for_all("transmission");
        let mut seen = vec![0; 4096];
        let count = rustix::io::read(&host, &mut seen).unwrap();
        assert_eq!(seen[..count], sent);
        // And back, into a buffer that is there before or comes later.
        let back = frame(100 + number, 1200);
        if number % 2 == 0 {
            rustix::io::write(&host, &back).unwrap();
            std::thread::sleep(Duration::from_millis(1));
        }
        if number % 5 == 0 {
            rig.pause();
            let state = rig.transport.save();
            rig.resume();
            assert_eq!(rig.transport.save(), state);
        }
        for turn in 0.. {
            receive.submit(0, &[(0x40_0000, 12, true), (0x40_1000, 2000, true)]);
            rig.write(0x50, 0);
            if number % 2 == 1 && turn == 0 {
                std::thread::sleep(Duration::from_millis(1));
                rustix::io::write(&host, &back).unwrap();
            }
            receive.wait_for_all("reception");
            let mut got = vec![0; 1200];
            memory.read_slice(&mut got, GuestAddress(0x40_1000)).unwrap();
            // The host's own talk comes in between.
            if got[12..14] == PROTOCOL {
                assert_eq!(receive.used_entry(receive.submitted.wrapping_sub(1)), (0, 1212));
                assert_eq!(got, back);
                break;
            }
        }
        assert_eq!(memory.read_obj::<u16>(GuestAddress(0x40_000a)).unwrap(), 1);
    }
}
