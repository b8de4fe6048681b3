//! Deploy virtual machines and act inside them.
//!
//! Five traits say what a place with machines can do. Engines over them do the work of a cyber range's deployer: they
//! create machines so that nothing is ever left behind, copy files and run commands in guests in a fair order, and watch
//! conditions. Backends implement the traits; this crate brings one in memory, others are crates of their own.
//!
//! # Which trait do I need?
//!
//! | you want to | trait | engine over it |
//! |---|---|---|
//! | create, start, stop, delete machines | [`ComputeBackend`] | [`lifecycle::Deployer`]: plans with a journal |
//! | make networks for them | [`NetworkBackend`] | |
//! | keep the images they are made from | [`ImageBackend`] | |
//! | copy files and run commands in them | [`GuestExec`] | [`exec::Executor`]: features, injects, conditions |
//! | keep records | [`StateStore`] | leases with fencing tokens, in [`StateStoreExt`] |
//!
//! What is installed comes from [`package`]s: from a folder, or from a registry with the feature `deputy`.
//!
//! Around any of them go [`layer`]s: retry, timeout, trace, fault. In front of guests stands the [`queue`]: one operation
//! at a time on one machine, so many over all. Who writes a backend proves it with the `conformance` suite.
//!
//! # An example
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> ocr_core::Result<()> {
//! use std::{collections::BTreeMap, sync::Arc};
//!
//! use ocr_core::{
//!     GuestExecExt, Name, Owner, Scope,
//!     lifecycle::{CreateRequest, DeployConfig, DeployParts, Deployer},
//!     memory::{MemoryCloud, MemoryState},
//! };
//!
//! // Any backend will do; this one is in memory.
//! let cloud = Arc::new(MemoryCloud::new());
//! let parts = DeployParts {
//!     compute: cloud.clone(),
//!     network: cloud.clone(),
//!     image: cloud.clone(),
//!     guest: Some(cloud.clone()),
//!     store: Arc::new(MemoryState::new()),
//! };
//! let deployer = Deployer::new(parts, DeployConfig::new(Owner::new("example")?));
//!
//! // Answers when the machine runs and its agent does too.
//! let vm = deployer
//!     .create(CreateRequest {
//!         scope: Scope::new("exercise", "blue team")?,
//!         name: Name::new("web")?,
//!         cpus: 1,
//!         ram_bytes: 512 << 20,
//!         template: "tiny".to_owned(),
//!         links: vec!["default".to_owned()],
//!         labels: BTreeMap::new(),
//!     })
//!     .await?;
//! assert_eq!(cloud.shell(vm.id, "echo hello").await?.stdout, "hello\n");
//! deployer.delete(vm.id).await?;
//! # Ok(()) }
//! ```

pub mod compute;
#[cfg(feature = "conformance")]
pub mod conformance;
pub mod credentials;
pub mod error;
pub mod exec;
pub mod fleet;
pub mod guest;
#[cfg(feature = "http")]
pub mod http;
pub mod id;
pub mod image;
pub mod layer;
pub mod lifecycle;
pub mod memory;
pub mod network;
pub mod package;
pub mod queue;
pub mod seal;
pub mod signal;
#[cfg(feature = "ssh")]
pub mod ssh;
pub mod state;

#[cfg(test)]
mod test_log;

pub use compute::{
    ComputeBackend, ComputeBackendExt, ComputeCapabilities, Deletion, Nic, PowerAction, Vm, VmFilter, VmSpec, VmState,
};
pub use error::{Error, ErrorKind, Result, Retry};
pub use guest::{
    Command, ExecOutput, ExecRequest, GuestCapabilities, GuestExec, GuestExecExt, GuestInfo, OutputChunk, PutFile,
    PutFiles, RemoveFiles,
};
pub use id::{
    DocumentId, ImageId, InstallId, MemberId, Name, NetworkId, OperationId, Owner, RequestId, Scope, Tags, VmId,
};
pub use image::{
    DiskFormat, Image, ImageBackend, ImageBackendExt, ImageCapabilities, ImageFilter, ImageSource, ImageSpec,
    ImageState, OsFamily,
};
pub use layer::LayerExt;
pub use network::{
    Access, Network, NetworkBackend, NetworkBackendExt, NetworkCapabilities, NetworkFilter, NetworkKind, NetworkSpec,
};
pub use signal::{Notice, NoticeStream, Signals};
pub use state::{FencingToken, Key, Lease, Precondition, StateStore, StateStoreExt, Version, Versioned};
