//! The servers themselves, as child processes, against one private libvirtd with real guests.
//!
//! What cannot run here says `ignored: reason`, where it is seen.
#![cfg(feature = "libvirt")]
#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "../support/mod.rs"]
mod support;

#[path = "../../../ocr-core/tests/support/redis.rs"]
mod redis;

mod bad_input;
mod command_line;
mod fleet;
mod flow;
mod hang;
mod kill;
mod reboot;
mod rig;
mod site;
