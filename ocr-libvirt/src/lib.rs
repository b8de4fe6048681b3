//! Deploys virtual machines on libvirt, and acts in them through the QEMU guest agent.

pub mod config;
pub mod error;
pub mod guest;
pub mod xml;

#[cfg(feature = "libvirt")]
mod backend;
#[cfg(feature = "libvirt")]
mod compute;
#[cfg(feature = "libvirt")]
mod door;
#[cfg(feature = "libvirt")]
mod image;
#[cfg(feature = "libvirt")]
mod network;
#[cfg(feature = "libvirt")]
mod probe;
#[cfg(any(feature = "libvirt", test))]
#[cfg_attr(not(feature = "libvirt"), allow(dead_code, reason = "it is tested without libvirt too"))]
mod qcow2;

pub use config::Config;

#[cfg(feature = "libvirt")]
pub use backend::Libvirt;
#[cfg(feature = "libvirt")]
pub use door::Load;
