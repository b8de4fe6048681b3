//! [`GuestExec`] over the QEMU guest agent, whoever carries its commands.
//!
//! The agent alone is a poor executor: it tells the end of a program once, to whoever asks first, and forgets all of
//! them when it restarts; a reply that is too big is lost, and a time-out says nothing about what happened. In guests
//! with a POSIX shell it therefore only carries the scripts of [`ocr_core::guest::posix`].

mod agent;
mod carrier;
#[cfg(feature = "libvirt")]
mod link;
mod windows;

use std::{fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
pub use ocr_core::guest::posix::PosixConfig as AgentGuestConfig;
use ocr_core::{
    Deletion, Error, ExecOutput, ExecRequest, GuestCapabilities, GuestExec, GuestInfo, PutFiles, RemoveFiles, Result,
    VmId, guest::posix::PosixGuest,
};

#[cfg(feature = "libvirt")]
pub(crate) use self::link::Link;
use self::{agent::Agent, carrier::Carrier, windows::Windows};

/// Carries one command of the QEMU guest agent (JSON text) to a machine, and its answer (JSON text) back.
///
/// # Errors
/// The states of a guest as [`GuestExec`] lists them, with their kinds and reasons. An agent that cannot be reached is
/// `Unavailable` with reason `AGENT_NOT_READY`: [`ocr_core::Retry::Safe`] only when the command surely was not executed,
/// otherwise [`ocr_core::Retry::Ambiguous`]. A command that the agent itself refused is `Internal` or `Invalid` without a
/// reason and with the agent's own text in the message; the `{"error": ...}` of the agent may be handed back as well.
#[async_trait]
pub trait AgentLink: fmt::Debug + Send + Sync + 'static {
    /// Sends `command` and waits for the answer, at most `limit`.
    async fn command(&self, vm: VmId, command: &str, limit: Duration) -> Result<String>;
}

/// Acts inside guests through their QEMU guest agent.
///
/// See [`PosixGuest`] for what becomes of commands and their outputs in guests with a POSIX shell. What the agent says of
/// its system tells Windows apart, where paths begin with a drive (`C:\...`), shell lines are for `cmd.exe /c`, and less
/// is promised: commands run as the agent's user alone; a repeat is answered from files in the guest; a deadline is kept
/// as long as this process lives; an older token is refused, and what runs under one is not waited for. No machine with
/// Windows was at hand: that half is tested by exchanges written from the agent's protocol, and by no real guest.
#[derive(Debug)]
pub struct AgentGuest<L> {
    agent: Arc<Agent<L>>,
    posix: PosixGuest<Carrier<L>>,
    windows: Windows<L>,
}

impl<L: AgentLink> AgentGuest<L> {
    /// Guests over this link.
    ///
    /// # Errors
    /// `Invalid` when the folder is no path of a guest.
    pub fn with_config(link: L, config: AgentGuestConfig) -> Result<Self> {
        check_argument("path", &config.base)?;
        let agent = Arc::new(Agent::new(link));
        let windows = Windows::new(agent.clone(), config.clone());
        Ok(Self { posix: PosixGuest::new(Carrier(agent.clone()), config)?, agent, windows })
    }

    async fn is_windows(&self, operation: &'static str, vm: VmId) -> Result<bool> {
        self.agent.is_windows(vm).await.map_err(context(operation, vm))
    }
}

fn context(operation: &'static str, vm: VmId) -> impl Fn(Error) -> Error {
    move |error| error.during(operation).on(format!("vm {vm}"))
}

#[async_trait]
impl<L: AgentLink> GuestExec for AgentGuest<L> {
    fn capabilities(&self) -> GuestCapabilities {
        self.posix.capabilities()
    }

    async fn guest_info(&self, vm: VmId) -> Result<GuestInfo> {
        let info = self.posix.guest_info(vm).await?;
        self.agent.keep_family(vm, info.os_family);
        Ok(info)
    }

    async fn put_files(&self, vm: VmId, request: &PutFiles) -> Result<()> {
        request.files.iter().try_for_each(|file| check_argument("path", &file.path))?;
        if self.is_windows("guest.put_files", vm).await? {
            return self.windows.put_files(vm, request).await.map_err(context("guest.put_files", vm));
        }
        self.posix.put_files(vm, request).await
    }

    async fn get_file(&self, vm: VmId, path: &str, limit_bytes: u64) -> Result<Bytes> {
        check_argument("path", path)?;
        if self.is_windows("guest.get_file", vm).await? {
            return self.windows.get_file(vm, path, limit_bytes).await.map_err(context("guest.get_file", vm));
        }
        self.posix.get_file(vm, path, limit_bytes).await
    }

    async fn remove_files(&self, vm: VmId, request: &RemoveFiles) -> Result<Vec<Result<Deletion>>> {
        request.paths.iter().try_for_each(|path| check_argument("path", path))?;
        if self.is_windows("guest.remove_files", vm).await? {
            return self.windows.remove_files(vm, request).await.map_err(context("guest.remove_files", vm));
        }
        self.posix.remove_files(vm, request).await
    }

    async fn exec(&self, vm: VmId, request: &ExecRequest) -> Result<ExecOutput> {
        if let Some(user) = &request.user {
            check_argument("username", user)?;
        }
        if self.is_windows("guest.exec", vm).await? {
            return self.windows.exec(vm, request).await.map_err(context("guest.exec", vm));
        }
        self.posix.exec(vm, request).await
    }
}

/// Refuses what the agent's JSON reader takes for an error: code points that are no characters. Also where it would go
/// as base64: a file that can be put can be got.
fn check_argument(field: &str, text: &str) -> Result<()> {
    let bad = |c: char| matches!(c, '\u{fdd0}'..='\u{fdef}') || u32::from(c) & 0xfffe == 0xfffe;
    if text.contains(bad) {
        return Err(Error::invalid(field, "must not have code points that are no characters (such as U+FFFE)"));
    }
    Ok(())
}
