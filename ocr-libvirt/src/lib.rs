//! libvirt for `ocr-core`: machines on one hypervisor, and acting inside them through the QEMU guest agent.
//!
//! One type, [`Libvirt`], implements `ComputeBackend`, `NetworkBackend`, `ImageBackend` and `GuestExec`. It is there
//! with the feature `libvirt`, which needs libvirt's headers to build (Debian: `libvirt-dev pkg-config`). Without it
//! the crate builds on any machine and holds what needs no C library: settings, XML, error codes, the agent's protocol.
//!
//! # How machines are kept
//! A machine is a persistent domain whose UUID is made of owner and request, and whose name is the machine's own with
//! a short digest of owner, scope and name. So libvirt itself refuses a second machine for a request or for a name.
//! Everything else is in the domain's metadata, under a namespace of ours; a domain without it is never touched.
//!
//! A machine is made in the order *define, disk, start*, and unmade in the order *stop, disk, undefine*: whatever
//! a kill leaves is visible through its domain. Its disk is an overlay over the template, named after its UUID.

pub mod config;
mod domain;
mod error;
pub mod guest;
mod xml;

#[cfg(feature = "libvirt")]
mod compute;
#[cfg(feature = "libvirt")]
mod door;
#[cfg(feature = "libvirt")]
mod image;
#[cfg(feature = "libvirt")]
mod link;
#[cfg(feature = "libvirt")]
mod network;
#[cfg(feature = "libvirt")]
mod probe;

pub use config::{Config, DomainType, Machine};
#[cfg(feature = "libvirt")]
pub use link::Libvirt;
