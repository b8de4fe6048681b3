//! Stands between an executor and its backends: no call without a permit, none past the session's end.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

use super::{Fleet, Permit};
use crate::{
    ComputeBackend, ComputeCapabilities, Deletion, ExecOutput, ExecRequest, GuestCapabilities, GuestExec, GuestInfo,
    PowerAction, PutFiles, RemoveFiles, Result, Vm, VmFilter, VmId, VmSpec, error::reason,
};

/// A backend whose machines belong to members of a fleet.
///
/// Each call in a guest wants the machine to be ours, goes out under the machine's token, and is dropped at once when the session ends, with reason `LEASE_LOST`
/// and safe to come again: the operation id is the same, so what ran is not run twice. So does a change of a machine's
/// power. Reading what the compute backend knows takes no permit.
#[derive(Debug)]
pub struct Guarded<B: ?Sized> {
    fleet: Fleet,
    inner: Arc<B>,
}

impl<B: ?Sized> Guarded<B> {
    /// Puts the guard around a backend.
    pub fn new(fleet: Fleet, inner: Arc<B>) -> Self {
        Self { fleet, inner }
    }

    async fn call<T>(&self, vm: VmId, call: impl Future<Output = Result<T>>) -> Result<T> {
        self.fleet.permit(vm)?.during(vm, call).await
    }

    /// A guest that has seen a newer token than the owner's needs a newer one still.
    fn heed<T>(&self, vm: VmId, permit: &Permit, result: Result<T>) -> Result<T> {
        if let Err(error) = &result
            && error.reason() == Some(reason::FENCED)
        {
            self.fleet.fenced(vm, permit.token());
        }
        result
    }
}

#[async_trait]
impl<B: GuestExec + ?Sized> GuestExec for Guarded<B> {
    fn capabilities(&self) -> GuestCapabilities {
        self.inner.capabilities()
    }

    async fn guest_info(&self, vm: VmId) -> Result<GuestInfo> {
        self.call(vm, self.inner.guest_info(vm)).await
    }

    async fn put_files(&self, vm: VmId, request: &PutFiles) -> Result<()> {
        let permit = self.fleet.permit(vm)?;
        let request = PutFiles { fence: Some(permit.token()), ..request.clone() };
        self.heed(vm, &permit, permit.during(vm, self.inner.put_files(vm, &request)).await)
    }

    async fn get_file(&self, vm: VmId, path: &str, limit_bytes: u64) -> Result<Bytes> {
        self.call(vm, self.inner.get_file(vm, path, limit_bytes)).await
    }

    async fn remove_files(&self, vm: VmId, request: &RemoveFiles) -> Result<Vec<Result<Deletion>>> {
        let permit = self.fleet.permit(vm)?;
        let request = RemoveFiles { fence: Some(permit.token()), ..request.clone() };
        self.heed(vm, &permit, permit.during(vm, self.inner.remove_files(vm, &request)).await)
    }

    async fn exec(&self, vm: VmId, request: &ExecRequest) -> Result<ExecOutput> {
        let permit = self.fleet.permit(vm)?;
        let request = ExecRequest { fence: Some(permit.token()), ..request.clone() };
        self.heed(vm, &permit, permit.during(vm, self.inner.exec(vm, &request)).await)
    }
}

#[async_trait]
impl<B: ComputeBackend + ?Sized> ComputeBackend for Guarded<B> {
    fn capabilities(&self) -> ComputeCapabilities {
        self.inner.capabilities()
    }

    async fn create_vm(&self, spec: &VmSpec) -> Result<Vm> {
        self.inner.create_vm(spec).await
    }

    async fn get_vm(&self, id: VmId) -> Result<Vm> {
        self.inner.get_vm(id).await
    }

    async fn list_vms(&self, filter: &VmFilter) -> Result<Vec<Vm>> {
        self.inner.list_vms(filter).await
    }

    async fn set_power(&self, id: VmId, action: PowerAction) -> Result<()> {
        self.call(id, self.inner.set_power(id, action)).await
    }

    async fn delete_vm(&self, id: VmId) -> Result<Deletion> {
        self.inner.delete_vm(id).await
    }
}
