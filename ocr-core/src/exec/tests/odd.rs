//! A cloud with manners that the one in memory lacks.

use async_trait::async_trait;
use bytes::Bytes;

use super::*;
use crate::{
    ComputeCapabilities, ExecOutput, ExecRequest, GuestCapabilities, GuestInfo, OsFamily, PowerAction, PutFiles,
    RemoveFiles, Vm, VmFilter, VmSpec,
};

#[derive(Clone, Debug)]
pub(super) struct Odd {
    pub(super) cloud: MemoryCloud,
    /// A reboot is only ordered, and comes so much later; the agent answers until then.
    pub(super) reboots_after: Duration,
    /// Guests that tell nobody from which boot they are.
    pub(super) no_boot_id: bool,
    /// A list that shows none of the machines that are there.
    pub(super) lists_nothing: bool,
}

impl Odd {
    pub(super) fn new(cloud: &MemoryCloud) -> Self {
        Self { cloud: cloud.clone(), reboots_after: Duration::ZERO, no_boot_id: false, lists_nothing: false }
    }
}

#[async_trait]
impl ComputeBackend for Odd {
    fn capabilities(&self) -> ComputeCapabilities {
        ComputeBackend::capabilities(&self.cloud)
    }

    async fn create_vm(&self, spec: &VmSpec) -> Result<Vm> {
        self.cloud.create_vm(spec).await
    }

    async fn get_vm(&self, id: VmId) -> Result<Vm> {
        self.cloud.get_vm(id).await
    }

    async fn list_vms(&self, filter: &VmFilter) -> Result<Vec<Vm>> {
        if self.lists_nothing { Ok(Vec::new()) } else { self.cloud.list_vms(filter).await }
    }

    async fn set_power(&self, id: VmId, action: PowerAction) -> Result<()> {
        if let PowerAction::Reboot { .. } = action {
            let (cloud, after) = (self.cloud.clone(), self.reboots_after);
            tokio::spawn(async move {
                tokio::time::sleep(after).await;
                cloud.reboot_guest(id)
            });
            return Ok(());
        }
        self.cloud.set_power(id, action).await
    }

    async fn delete_vm(&self, id: VmId) -> Result<Deletion> {
        self.cloud.delete_vm(id).await
    }
}

#[async_trait]
impl GuestExec for Odd {
    fn capabilities(&self) -> GuestCapabilities {
        GuestExec::capabilities(&self.cloud)
    }

    async fn guest_info(&self, vm: VmId) -> Result<GuestInfo> {
        let info = self.cloud.guest_info(vm).await?;
        let os_family = if self.no_boot_id { OsFamily::Windows } else { info.os_family };
        Ok(GuestInfo { os_family, ..info })
    }

    async fn put_files(&self, vm: VmId, request: &PutFiles) -> Result<()> {
        self.cloud.put_files(vm, request).await
    }

    async fn get_file(&self, vm: VmId, path: &str, limit_bytes: u64) -> Result<Bytes> {
        self.cloud.get_file(vm, path, limit_bytes).await
    }

    async fn remove_files(&self, vm: VmId, request: &RemoveFiles) -> Result<Vec<Result<Deletion>>> {
        self.cloud.remove_files(vm, request).await
    }

    async fn exec(&self, vm: VmId, request: &ExecRequest) -> Result<ExecOutput> {
        self.cloud.exec(vm, request).await
    }
}
