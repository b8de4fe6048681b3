//! Deploy virtual machines and act inside them: traits, types and engines.

pub mod compute;
#[cfg(feature = "conformance")]
pub mod conformance;
pub mod error;
pub mod exec;
pub mod guest;
pub mod id;
pub mod image;
pub mod lifecycle;
pub mod memory;
pub mod network;
pub mod package;
pub mod queue;
pub mod state;

pub use compute::{
    ComputeBackend, ComputeBackendExt, ComputeCapabilities, Deletion, Nic, PowerAction, Vm, VmFilter, VmSpec, VmState,
};
pub use error::{Error, ErrorKind, Result, Retry};
pub use guest::{
    Command, ExecOutput, ExecRequest, GuestCapabilities, GuestExec, GuestExecExt, GuestInfo, OutputChunk, PutFile,
};
pub use id::{ImageId, InstallId, Name, NetworkId, OperationId, Owner, RequestId, Scope, Tags, VmId};
pub use image::{
    DiskFormat, Image, ImageBackend, ImageBackendExt, ImageCapabilities, ImageFilter, ImageSource, ImageSpec,
    ImageState, OsFamily,
};
pub use network::{
    Access, Network, NetworkBackend, NetworkBackendExt, NetworkCapabilities, NetworkFilter, NetworkKind, NetworkSpec,
};
pub use state::{FencingToken, Key, Lease, Precondition, StateStore, StateStoreExt, Version, Versioned};
