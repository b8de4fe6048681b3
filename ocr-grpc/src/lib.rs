//! The Open Cyber Range contract over gRPC: the wire's schema, the services, and the server that carries them.
//!
//! Everything here translates and nothing decides. A request is read once into the core's types ([`parse`]), the core
//! does the work, and its answer or error goes back ([`status`]). Which backend does the work is not known here.
//!
//! | you want to | use |
//! |---|---|
//! | serve a [`Deployer`](ocr_core::lifecycle::Deployer) or an [`Executor`](ocr_core::exec::Executor) | [`Server`] |
//! | call such a server | [`client`] |
//! | answer about packages too, over [`Queries`](ocr_core::package::query::Queries) | [`Server::queries`] |
//! | put a service into a tonic server of your own | [`machiner::Machiner`], [`executor::Features`] and its neighbours |
//! | read the messages | [`proto`] and [`v1`], and `proto/*.proto` for what they mean |

pub mod capability;
pub mod client;
pub mod deputy;
pub mod executor;
pub mod machiner;
pub mod parse;
pub mod proto;
pub mod queue;
pub mod server;
pub mod v1;

mod call;
mod codec;
mod status;

pub use call::{CallId, NotACallId};
pub use proto::Generation;
pub use server::{Bound, Limits, Load, Readiness, Server, Stopped};
pub use status::{DOMAIN, RETRY_DELAY, code, status};

/// The first characters of a text that fit in `max_bytes`.
fn head(text: &str, max_bytes: usize) -> &str {
    let end = (0..=max_bytes.min(text.len())).rev().find(|&end| text.is_char_boundary(end));
    &text[..end.unwrap_or(0)]
}
