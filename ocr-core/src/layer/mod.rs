//! Layers: retry, timeout, limit, trace and fault around any backend.
//!
//! A layer is written once, as an [`Around`]: it sees a [`Call`] and may make it, make it again, wait, or refuse.
//! [`Layered`] puts it around all five traits, so that a layered backend is a backend.
//!
//! # Order
//! [`LayerExt::layer`] puts the new layer outside of what is there. The usual stack, inside out:
//!
//! ```text
//! backend  <  TimeoutLayer  <  LimitLayer  <  RetryLayer  <  TraceLayer  <  caller
//! ```
//!
//! Each attempt has its own time, which does not run while it waits for its turn; the repeats share a budget; and the
//! log has one line for a call that failed, however many attempts it took. A [`FaultLayer`] belongs directly around the backend that it stands in for.
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> ocr_core::Result<()> {
//! use std::{sync::Arc, time::Duration};
//!
//! use ocr_core::{
//!     ComputeBackend, LayerExt,
//!     layer::{Fault, FaultLayer, RetryLayer, TimeoutLayer, TraceLayer},
//!     memory::MemoryCloud,
//! };
//!
//! let faults = FaultLayer::new().on("compute.create_vm", 1, Fault::LoseAnswer);
//! let compute: Arc<dyn ComputeBackend> = Arc::new(MemoryCloud::new())
//!     .layer(faults)
//!     .layer(TimeoutLayer::default().limit("compute.create_vm", Duration::from_secs(120)))
//!     .layer(RetryLayer { max_attempts: 3, ..RetryLayer::default() })
//!     .layer(TraceLayer);
//!
//! // The first answer is lost; the repeat finds the machine by its request.
//! let vm = compute.create_vm(&MemoryCloud::tiny_spec("web-0")).await?;
//! assert_eq!(compute.list_vms(&Default::default()).await?, [vm]);
//! # Ok(()) }
//! ```

use std::{fmt, future::Future, pin::Pin, sync::Arc, time::Duration};

use crate::{ImageId, Key, Name, NetworkId, Result, VmId};

mod fault;
mod forward;
mod limit;
mod retry;
mod timeout;
mod trace;

pub use fault::{Fault, FaultLayer};
pub use limit::LimitLayer;
pub use retry::RetryLayer;
pub use timeout::TimeoutLayer;
pub use trace::TraceLayer;

/// Something that happens around every call of a backend.
///
/// It is written once and serves all five traits. `attempt` makes the call; each use of it is one more call of the
/// inner backend. A layer is shared by all tasks, and the future it returns may be dropped at any await.
///
/// ```
/// use std::sync::atomic::{AtomicU64, Ordering};
///
/// use ocr_core::{
///     Result,
///     layer::{Around, Attempt, Call},
/// };
///
/// /// Counts calls that failed.
/// #[derive(Debug, Default)]
/// struct Failures(AtomicU64);
///
/// impl Around for Failures {
///     async fn around<'a, T, F>(&'a self, _call: &'a Call<'a>, attempt: F) -> Result<T>
///     where
///         T: Send + 'a,
///         F: Fn() -> Attempt<'a, T> + Send + Sync + 'a,
///     {
///         let result = attempt().await;
///         self.0.fetch_add(u64::from(result.is_err()), Ordering::Relaxed);
///         result
///     }
/// }
/// ```
pub trait Around: fmt::Debug + Send + Sync + 'static {
    /// Answers one call, by any number of attempts.
    fn around<'a, T, F>(&'a self, call: &'a Call<'a>, attempt: F) -> impl Future<Output = Result<T>> + Send + 'a
    where
        T: Send + 'a,
        F: Fn() -> Attempt<'a, T> + Send + Sync + 'a;
}

/// One call of the inner backend, on its way.
pub type Attempt<'a, T> = Pin<Box<dyn Future<Output = Result<T>> + Send + 'a>>;

/// What a layer knows of a call. It never holds contents: no file, command, environment or record.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Call<'a> {
    /// The method, as `trait.method`: `compute.create_vm`.
    pub operation: &'static str,
    /// What it works on.
    pub resource: Resource<'a>,
    /// Whether a second call does no harm when the first one had its effect.
    pub repeatable: bool,
    /// What the request itself grants: the deadline of a command, the grace of a shutdown. An ordinary call has none.
    pub granted: Option<Duration>,
}

impl<'a> Call<'a> {
    /// A call that may be repeated and grants no time of its own.
    pub fn new(operation: &'static str, resource: Resource<'a>) -> Self {
        Self { operation, resource, repeatable: true, granted: None }
    }
}

/// What a call works on. It becomes text only when somebody wants to read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Resource<'a> {
    /// A machine.
    Vm(VmId),
    /// A network.
    Network(NetworkId),
    /// An image.
    Image(ImageId),
    /// Something that has no id yet: its sort and its name.
    Named(&'static str, &'a Name),
    /// Everything of a sort that a filter lets through.
    Matching(&'static str),
    /// A record.
    Record(&'a Key),
    /// The records under a prefix.
    Records(&'a str),
}

impl fmt::Display for Resource<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vm(id) => write!(f, "vm {id}"),
            Self::Network(id) => write!(f, "network {id}"),
            Self::Image(id) => write!(f, "image {id}"),
            Self::Named(sort, name) => write!(f, "{sort} {name}"),
            Self::Matching(sort) => f.write_str(sort),
            Self::Record(key) => write!(f, "record {key}"),
            Self::Records(prefix) => write!(f, "records {}", crate::id::shown(prefix)),
        }
    }
}

/// Refuses an operation prefix that matches nothing: it would never do anything, and nobody would notice.
fn check_prefix(prefix: &str) {
    let known = crate::memory::Faults::OPERATIONS.iter().any(|operation| operation.starts_with(prefix));
    assert!(known, "no operation begins with {prefix:?}");
}

/// A backend with something around each of its calls.
///
/// It implements those of the five traits that the inner backend implements. Capabilities pass straight through.
#[derive(Debug)]
pub struct Layered<A, B: ?Sized> {
    around: A,
    inner: Arc<B>,
}

impl<A: Around, B: ?Sized> Layered<A, B> {
    /// Puts a layer around a backend.
    pub fn new(around: A, inner: Arc<B>) -> Self {
        Self { around, inner }
    }
}

/// Puts layers around a backend that is shared by `Arc`, a concrete one or a `dyn` trait.
pub trait LayerExt {
    /// The backend inside.
    type Backend: ?Sized;

    /// This backend with one more layer, outside of those it has.
    fn layer<A: Around>(self, around: A) -> Arc<Layered<A, Self::Backend>>;
}

impl<B: ?Sized> LayerExt for Arc<B> {
    type Backend = B;

    fn layer<A: Around>(self, around: A) -> Arc<Layered<A, B>> {
        Arc::new(Layered::new(around, self))
    }
}

/// No layer at all when there is none: for layers that a setting turns on.
impl<A: Around> Around for Option<A> {
    async fn around<'a, T, F>(&'a self, call: &'a Call<'a>, attempt: F) -> Result<T>
    where
        T: Send + 'a,
        F: Fn() -> Attempt<'a, T> + Send + Sync + 'a,
    {
        match self {
            Some(around) => around.around(call, attempt).await,
            None => attempt().await,
        }
    }
}
