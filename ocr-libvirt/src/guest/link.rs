//! [`AgentLink`] over libvirt, and [`GuestExec`] of [`Libvirt`].

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use ocr_core::{
    Deletion, Error, ErrorKind, ExecOutput, ExecRequest, GuestCapabilities, GuestExec, GuestInfo, PutFiles,
    RemoveFiles, Result, VmId, error::reason,
};
use tokio::time::Instant;

use super::AgentLink;
use crate::{
    Libvirt,
    backend::{Inner, vm_resource},
    door::{Call, Effect, Lane, Trouble},
    error::Meaning,
};

/// libvirt's own limit for the handshake that precedes every command.
const HANDSHAKE: Duration = Duration::from_secs(5);

/// Agent commands through the door.
#[derive(Debug)]
pub(crate) struct Link(pub(crate) Arc<Inner>);

#[async_trait]
impl AgentLink for Link {
    async fn command(&self, vm: VmId, command: &str, limit: Duration) -> Result<String> {
        let patience = limit.min(self.0.config.agent_deadline);
        let timeout_s = i32::try_from(patience.as_secs().max(1)).unwrap_or(i32::MAX);
        let deadline = patience + HANDSHAKE;
        let machine = self.0.machine(vm);
        let turn = machine.agent(Instant::now() + deadline).await?;
        let call = Call {
            operation: "libvirt.agent_command",
            lane: if machine.is_suspect() { Lane::Suspect } else { Lane::Agent },
            // What only asks may be asked again on another connection.
            effect: if command.contains(r#""execute":"guest-info""#) { Effect::None } else { Effect::Some },
            deadline,
        };
        let uuid = *vm.as_uuid();
        let json = command.to_owned();
        let answered = self.0.door.call(call, move |connect| {
            // Held until libvirt lets go, even when nobody waits any more: the agent is busy for as long.
            let _turn = &turn;
            Ok(connect.lookup_domain_by_uuid(uuid)?.qemu_agent_command(&json, timeout_s, 0)?)
        });
        let trouble = match answered.await {
            Ok(answer) => {
                machine.set_suspect(false);
                return Ok(answer);
            }
            Err(trouble) => trouble,
        };
        let is_silent = match &trouble {
            Trouble::Libvirt(failure) => failure.meaning() == Meaning::AgentSilent,
            Trouble::Ours(_) => true,
        };
        let error = not_ready(trouble.into_agent_error());
        machine.set_suspect(is_silent && error.reason() == Some(reason::AGENT_NOT_READY));
        Err(error.on(vm_resource(vm)))
    }
}

/// The agent itself, for what no trait has. Whoever uses it shares the machine's turn with [`GuestExec`].
#[async_trait]
impl AgentLink for Libvirt {
    async fn command(&self, vm: VmId, command: &str, limit: Duration) -> Result<String> {
        Link(self.inner.clone()).command(vm, command, limit).await
    }
}

/// Past our own deadline it is all the same to the caller: the agent does not answer now.
fn not_ready(error: Error) -> Error {
    if error.kind() != ErrorKind::TimedOut {
        return error;
    }
    let retry = error.retry();
    Error::unavailable("the guest agent does not answer")
        .with_reason(reason::AGENT_NOT_READY)
        .with_retry(retry)
        .with_source(error)
}

/// Serves every machine of the hypervisor, also those that other software made.
#[async_trait]
impl GuestExec for Libvirt {
    fn capabilities(&self) -> GuestCapabilities {
        self.guest.capabilities()
    }

    async fn guest_info(&self, vm: VmId) -> Result<GuestInfo> {
        self.guest.guest_info(vm).await
    }

    async fn put_files(&self, vm: VmId, request: &PutFiles) -> Result<()> {
        self.guest.put_files(vm, request).await
    }

    async fn get_file(&self, vm: VmId, path: &str, limit_bytes: u64) -> Result<Bytes> {
        self.guest.get_file(vm, path, limit_bytes).await
    }

    async fn remove_files(&self, vm: VmId, request: &RemoveFiles) -> Result<Vec<Result<Deletion>>> {
        self.guest.remove_files(vm, request).await
    }

    async fn exec(&self, vm: VmId, request: &ExecRequest) -> Result<ExecOutput> {
        self.guest.exec(vm, request).await
    }
}
