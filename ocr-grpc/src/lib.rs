//! The Open Cyber Range contract: the wire, and services that translate between it and the core.
mod call;
pub mod parse;
pub mod proto;
mod status;
pub use call::{CallId, NotACallId};
pub use status::{DOMAIN, RETRY_DELAY, code, status};
