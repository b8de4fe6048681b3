//! Deploys virtual machines on libvirt, and acts in them through the QEMU guest agent.

pub mod config;
pub mod error;
pub mod xml;

#[cfg(feature = "libvirt")]
mod backend;
#[cfg(feature = "libvirt")]
mod compute;
#[cfg(feature = "libvirt")]
mod door;
#[cfg(any(feature = "libvirt", test))]
mod guest;
#[cfg(feature = "libvirt")]
mod image;
#[cfg(feature = "libvirt")]
mod network;
#[cfg(feature = "libvirt")]
mod probe;
#[cfg(any(feature = "libvirt", test))]
mod qcow2;

pub use config::Config;

#[cfg(feature = "libvirt")]
pub use backend::Libvirt;
#[cfg(feature = "libvirt")]
pub use door::Load;
