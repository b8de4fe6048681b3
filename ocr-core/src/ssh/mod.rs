//! [`GuestExec`](crate::GuestExec) over SSH, for clouds where a tenant has no hypervisor and so no agent.
//!
//! ```text
//!  SshGuest ──> CredentialSource   who logs in
//!     │    ──> Addresses           where to; asked only for a new connection
//!     │    ──> HostKeys            what must be there; pinned at first contact in the StateStore
//!     v
//!   Pool ── one connection per machine and account ──(jump host)──> sshd ──> /bin/sh: the runner
//! ```
//!
//! What is sent is never a secret on a command line: commands, environments and contents go by stdin, as with the agent.
//! There is no terminal, and nothing is forwarded to us.
//!
//! # Limits
//! - Results and fences are kept per account that logs in. Where root acts, that is one place; where users log in
//!   by themselves, each has its own, and a fence of one says nothing to another.
//! - All connections through a jump host share one to it.
//! - A shell of an account must be of sh's kin, or fish; csh is not.
mod address;
mod guest;
mod key;
mod login;
mod pin;
mod pool;
mod run;
mod session;

use std::time::Duration;

pub use self::{
    address::{Addresses, ComputeAddresses, Endpoint, Range},
    guest::SshGuest,
    key::check_private_key,
    pin::HostKeys,
};
use crate::credentials::Credentials;

/// A host that all connections go through.
#[derive(Clone, Debug)]
pub struct Jump {
    /// Where it is.
    pub at: Endpoint,
    /// How to log in there.
    pub credentials: Credentials,
}

/// Settings.
#[derive(Clone, Debug)]
pub struct SshConfig {
    /// How long a connection may take, with login and jump host.
    pub connect_limit: Duration,
    /// After so long without a word from the server it is asked for one.
    pub keepalive: Duration,
    /// So many such questions may stay without an answer; then the connection counts as lost.
    pub keepalive_max: usize,
    /// How long a connection is kept that nobody uses.
    pub idle_limit: Duration,
    /// The most connections to machines at once.
    pub max_connections: usize,
    /// How long a first login may be refused before that is final: a guest that boots may not know the account yet.
    pub login_grace: Duration,
    /// The host that connections go through.
    pub jump: Option<Jump>,
    /// Whether the account that machines are managed by becomes root by `sudo`, without a password.
    pub sudo: bool,
    /// Whether commands may be asked for as a user: that account is root, or is by sudo, or users have credentials.
    pub users: bool,
}

impl Default for SshConfig {
    /// 15 s to connect, 10 s and 3 questions until a connection is lost, 2 min idle, 256 connections, 2 min of grace.
    fn default() -> Self {
        Self {
            connect_limit: Duration::from_secs(15),
            keepalive: Duration::from_secs(10),
            keepalive_max: 3,
            idle_limit: Duration::from_secs(120),
            max_connections: 256,
            login_grace: Duration::from_secs(120),
            jump: None,
            sudo: false,
            users: true,
        }
    }
}
