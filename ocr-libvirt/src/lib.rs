//! Deploys virtual machines on libvirt, and acts in them through the QEMU guest agent.
//!
//! One type, `Libvirt`, opened from a [`Config`], implements `ComputeBackend`, `ImageBackend`, `NetworkBackend` and `GuestExec` of [`ocr_core`].
//! It is there with the feature `libvirt`, which needs libvirt's headers to build and its library to run; without
//! the feature the crate is settings, XML and the table of errors.
//!
//! ```text
//!   compute  image  network        guest (exec, files)         what callers see: ocr_core's traits
//!      \       |      /                   |
//!       \      |     /              agent commands             typed, one at a time for each guest
//!        +-----+-----+---------+----------+
//!                              |
//!                            door                             lanes, deadlines, connections, threads
//!                              |
//!                       libvirt's library                     blocks as long as it likes
//! ```
//!
//! What must hold:
//! - No call of libvirt's library is made outside of `door`, and no object of its leaves it.
//! - Everything that a machine is known by is in its domain: the id follows from owner and request, the domain's name from
//!   owner, scope and name, so libvirt itself refuses a second one; metadata in a namespace of its own tells the rest.
//!   A domain without it is never changed. The disk bears the machine's id in its name.
//! - A machine is defined first and undefined last, so that whatever was cut off is listed and can be finished or deleted.
//! - A command runs in a guest at most once for its operation id. The in-guest runner (`guest/runner.sh`) decides that, and
//!   keeps the result in a file, since agents forget.
//! - Secrets reach a guest through stdin, never as arguments.

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
