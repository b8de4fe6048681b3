//! Deploys virtual machines on libvirt, and acts in them through the QEMU guest agent.

pub mod config;
pub mod error;
pub mod xml;
