//! What QEMU 10 has of migration and Dunlin has not, each with the reason, so that who asks for it is told.
//!
//! None of it is listed by `query-commands`, `query-migrate-capabilities`, `query-migrate-parameters` or
//! `query-qmp-schema`: that is how clients find out what is there.

use crate::schema::NotYet;

const POSTCOPY: &str = "there is no postcopy yet";
const STANDBY: &str = "there is no standby (COLO) yet";
const SNAPSHOTS: &str = "there are no snapshots yet";
const TLS: &str = "there is no TLS yet";
const DISKS: &str = "disks that are not shared are not moved yet";
const FILES: &str = "migrating to a file is not there yet";
const ANNOUNCE: &str = "guests are not announced on the network yet";
const DIRTY_LIMIT: &str = "vCPUs are not limited by the rate at which they dirty RAM";
const CPR: &str = "a machine cannot be handed to a new process on the same host without copying its RAM yet";
const XEN: &str = "it is for Xen";
const ZERO_PAGES: &str = "pages of zeros are always looked for by the channels' own threads";

const fn because(why: &'static str, name: &'static str) -> NotYet {
    NotYet { name, why }
}

/// Commands.
pub(crate) const COMMANDS: &[NotYet] = &[
    because(POSTCOPY, "migrate-start-postcopy"),
    because(POSTCOPY, "migrate-recover"),
    because(STANDBY, "x-colo-lost-heartbeat"),
    because(STANDBY, "query-colo-status"),
    because(SNAPSHOTS, "snapshot-save"),
    because(SNAPSHOTS, "snapshot-load"),
    because(SNAPSHOTS, "snapshot-delete"),
    because(SNAPSHOTS, "query-jobs"),
    because(SNAPSHOTS, "job-cancel"),
    because(SNAPSHOTS, "job-dismiss"),
    because("auto-converge and set-vcpu-throttle take a part of a vCPU's time", "set-vcpu-dirty-limit"),
    because("auto-converge and set-vcpu-throttle take a part of a vCPU's time", "cancel-vcpu-dirty-limit"),
    because("auto-converge and set-vcpu-throttle take a part of a vCPU's time", "query-vcpu-dirty-limit"),
    because("query-migration-report has the CPU time of all of them", "query-migrationthreads"),
    because("use migrate_cancel", "yank"),
    because("use migrate_cancel", "query-yank"),
    because(ANNOUNCE, "announce-self"),
    because("there is no display to hand over", "client_migrate_info"),
    because(FILES, "add-fd"),
    because(FILES, "remove-fd"),
    because(FILES, "query-fdsets"),
    because(DISKS, "nbd-server-start"),
    because(DISKS, "nbd-server-add"),
    because(DISKS, "nbd-server-remove"),
    because(DISKS, "nbd-server-stop"),
    because(DISKS, "block-export-add"),
    because(DISKS, "block-export-del"),
    because(DISKS, "blockdev-mirror"),
    because(DISKS, "drive-mirror"),
    because(DISKS, "blockdev-set-active"),
    because(XEN, "xen-save-devices-state"),
    because(XEN, "xen-load-devices-state"),
    because(XEN, "xen-set-global-dirty-log"),
    because(XEN, "xen-set-replication"),
    because(XEN, "query-xen-replication-status"),
    because(XEN, "xen-colo-do-checkpoint"),
];

/// Parameters of `migrate-set-parameters`.
pub(crate) const PARAMETERS: &[NotYet] = &[
    because(ANNOUNCE, "announce-initial"),
    because(ANNOUNCE, "announce-max"),
    because(ANNOUNCE, "announce-rounds"),
    because(ANNOUNCE, "announce-step"),
    because("auto-converge takes as much as it needs, no less at its end", "cpu-throttle-tailslow"),
    because(TLS, "tls-creds"),
    because(TLS, "tls-hostname"),
    because(TLS, "tls-authz"),
    because(STANDBY, "x-checkpoint-delay"),
    because(POSTCOPY, "max-postcopy-bandwidth"),
    because("pages are compressed with lz4 or zstd", "multifd-zlib-level"),
    because("pages are compressed with lz4 or zstd", "multifd-qatzip-level"),
    because(DISKS, "block-bitmap-mapping"),
    because(DIRTY_LIMIT, "x-vcpu-dirty-limit-period"),
    because(DIRTY_LIMIT, "vcpu-dirty-limit"),
    because(CPR, "mode"),
    because(ZERO_PAGES, "zero-page-detection"),
    because(FILES, "direct-io"),
];

/// Capabilities.
pub(crate) const CAPABILITIES: &[NotYet] = &[
    because("there is no RDMA yet", "rdma-pin-all"),
    because("QEMU has it without an effect", "zero-blocks"),
    because(POSTCOPY, "postcopy-ram"),
    because(STANDBY, "x-colo"),
    because(POSTCOPY, "release-ram"),
    because(DISKS, "dirty-bitmaps"),
    because(POSTCOPY, "postcopy-blocktime"),
    because("RAM that both sides share is not left out yet", "x-ignore-shared"),
    because("machines have no UUID yet", "validate-uuid"),
    because(SNAPSHOTS, "background-snapshot"),
    because(POSTCOPY, "postcopy-preempt"),
    because("both sides always agree before the guest is released", "switchover-ack"),
    because(DIRTY_LIMIT, "dirty-limit"),
    because(FILES, "mapped-ram"),
];

/// Statuses of a migration.
pub(crate) const STATUSES: &[NotYet] = &[
    because(POSTCOPY, "postcopy-active"),
    because(POSTCOPY, "postcopy-paused"),
    because(POSTCOPY, "postcopy-recover-setup"),
    because(POSTCOPY, "postcopy-recover"),
    because(STANDBY, "colo"),
    because("there are no devices to wait for", "wait-unplug"),
];

/// Channels of `migrate` beside the main one.
pub(crate) const CHANNEL_TYPES: &[NotYet] = &[because(CPR, "cpr")];

/// Transports.
pub(crate) const TRANSPORTS: &[NotYet] = &[because("there is no RDMA yet", "rdma"), because(FILES, "file")];

/// Kinds of sockets.
pub(crate) const SOCKETS: &[NotYet] = &[because("there is no vsock yet", "vsock")];

/// What QEMU lets one say of an internet address.
pub(crate) const INET: &[NotYet] = &[
    because("the port is a number in any case", "numeric"),
    because("a port is one, not a range; port 0 takes any that is free", "to"),
    because("links have a watch of their own, see link-timeout", "keep-alive"),
    because("there is no multipath TCP yet", "mptcp"),
];
