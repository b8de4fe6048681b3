//! The five traits for [`Layered`]: the only place that knows every method.

use std::{path::Path, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;

use super::{Around, Call, Layered, Resource};
use crate::{
    Access, ComputeBackend, ComputeCapabilities, Deletion, ExecOutput, ExecRequest, GuestCapabilities, GuestExec,
    GuestInfo, Image, ImageBackend, ImageCapabilities, ImageFilter, ImageId, ImageSpec, Key, Name, Network,
    NetworkBackend, NetworkCapabilities, NetworkFilter, NetworkId, NetworkSpec, PowerAction, Precondition, PutFiles,
    RemoveFiles, Result, StateStore, Tags, Version, Versioned, Vm, VmFilter, VmId, VmSpec,
};

#[async_trait]
impl<A: Around, B: ComputeBackend + ?Sized> ComputeBackend for Layered<A, B> {
    fn capabilities(&self) -> ComputeCapabilities {
        self.inner.capabilities()
    }

    async fn create_vm(&self, spec: &VmSpec) -> Result<Vm> {
        let call = Call::new("compute.create_vm", Resource::Named("vm", &spec.name));
        self.around.around(&call, || self.inner.create_vm(spec)).await
    }

    async fn get_vm(&self, id: VmId) -> Result<Vm> {
        let call = Call::new("compute.get_vm", Resource::Vm(id));
        self.around.around(&call, || self.inner.get_vm(id)).await
    }

    async fn list_vms(&self, filter: &VmFilter) -> Result<Vec<Vm>> {
        let call = Call::new("compute.list_vms", Resource::Matching("vms"));
        self.around.around(&call, || self.inner.list_vms(filter)).await
    }

    async fn set_power(&self, id: VmId, action: PowerAction) -> Result<()> {
        let (repeatable, granted) = match action {
            PowerAction::Start => (true, None),
            PowerAction::Stop { grace } => (true, grace),
            // A second reboot is not the same as one: it ends what the guest began after the first.
            PowerAction::Reboot { grace } => (false, grace),
        };
        let call = Call { repeatable, granted, ..Call::new("compute.set_power", Resource::Vm(id)) };
        self.around.around(&call, || self.inner.set_power(id, action)).await
    }

    async fn delete_vm(&self, id: VmId) -> Result<Deletion> {
        let call = Call::new("compute.delete_vm", Resource::Vm(id));
        self.around.around(&call, || self.inner.delete_vm(id)).await
    }
}

#[async_trait]
impl<A: Around, B: NetworkBackend + ?Sized> NetworkBackend for Layered<A, B> {
    fn capabilities(&self) -> NetworkCapabilities {
        self.inner.capabilities()
    }

    async fn create_network(&self, spec: &NetworkSpec) -> Result<Network> {
        let call = Call::new("network.create_network", Resource::Named("network", &spec.name));
        self.around.around(&call, || self.inner.create_network(spec)).await
    }

    async fn get_network(&self, id: NetworkId) -> Result<Network> {
        let call = Call::new("network.get_network", Resource::Network(id));
        self.around.around(&call, || self.inner.get_network(id)).await
    }

    async fn list_networks(&self, filter: &NetworkFilter) -> Result<Vec<Network>> {
        let call = Call::new("network.list_networks", Resource::Matching("networks"));
        self.around.around(&call, || self.inner.list_networks(filter)).await
    }

    async fn delete_network(&self, id: NetworkId) -> Result<Deletion> {
        let call = Call::new("network.delete_network", Resource::Network(id));
        self.around.around(&call, || self.inner.delete_network(id)).await
    }

    async fn set_access(&self, vm: VmId, access: &Access) -> Result<()> {
        let call = Call::new("network.set_access", Resource::Vm(vm));
        self.around.around(&call, || self.inner.set_access(vm, access)).await
    }
}

#[async_trait]
impl<A: Around, B: ImageBackend + ?Sized> ImageBackend for Layered<A, B> {
    fn capabilities(&self) -> ImageCapabilities {
        self.inner.capabilities()
    }

    async fn import_image(&self, spec: &ImageSpec) -> Result<Image> {
        let call = Call::new("image.import_image", Resource::Named("image", &spec.name));
        self.around.around(&call, || self.inner.import_image(spec)).await
    }

    async fn find_images(&self, filter: &ImageFilter) -> Result<Vec<Image>> {
        let call = Call::new("image.find_images", Resource::Matching("images"));
        self.around.around(&call, || self.inner.find_images(filter)).await
    }

    async fn get_image(&self, id: ImageId) -> Result<Image> {
        let call = Call::new("image.get_image", Resource::Image(id));
        self.around.around(&call, || self.inner.get_image(id)).await
    }

    async fn delete_image(&self, id: ImageId) -> Result<Deletion> {
        let call = Call::new("image.delete_image", Resource::Image(id));
        self.around.around(&call, || self.inner.delete_image(id)).await
    }

    async fn capture_vm(&self, vm: VmId, name: &Name, tags: &Tags) -> Result<Image> {
        let call = Call::new("image.capture_vm", Resource::Vm(vm));
        self.around.around(&call, || self.inner.capture_vm(vm, name, tags)).await
    }

    async fn export_image(&self, id: ImageId, to: &Path) -> Result<u64> {
        let call = Call::new("image.export_image", Resource::Image(id));
        self.around.around(&call, || self.inner.export_image(id, to)).await
    }
}

#[async_trait]
impl<A: Around, B: GuestExec + ?Sized> GuestExec for Layered<A, B> {
    fn capabilities(&self) -> GuestCapabilities {
        self.inner.capabilities()
    }

    async fn guest_info(&self, vm: VmId) -> Result<GuestInfo> {
        let call = Call::new("guest.guest_info", Resource::Vm(vm));
        self.around.around(&call, || self.inner.guest_info(vm)).await
    }

    async fn put_files(&self, vm: VmId, request: &PutFiles) -> Result<()> {
        let call = Call::new("guest.put_files", Resource::Vm(vm));
        self.around.around(&call, || self.inner.put_files(vm, request)).await
    }

    async fn get_file(&self, vm: VmId, path: &str, limit_bytes: u64) -> Result<Bytes> {
        let call = Call::new("guest.get_file", Resource::Vm(vm));
        self.around.around(&call, || self.inner.get_file(vm, path, limit_bytes)).await
    }

    async fn remove_files(&self, vm: VmId, request: &RemoveFiles) -> Result<Vec<Result<Deletion>>> {
        let call = Call::new("guest.remove_files", Resource::Vm(vm));
        self.around.around(&call, || self.inner.remove_files(vm, request)).await
    }

    async fn exec(&self, vm: VmId, request: &ExecRequest) -> Result<ExecOutput> {
        // Repeatable by its operation id: the guest answers a repeat and does not run it again.
        // Under a fence it may first wait as long for what runs under an older one.
        let waits = if request.fence.is_some() { 2 } else { 1 };
        let granted = request.deadline.saturating_mul(waits);
        let call = Call { granted: Some(granted), ..Call::new("guest.exec", Resource::Vm(vm)) };
        self.around.around(&call, || self.inner.exec(vm, request)).await
    }
}

#[async_trait]
impl<A: Around, B: StateStore + ?Sized> StateStore for Layered<A, B> {
    async fn get(&self, key: &Key) -> Result<Option<Versioned>> {
        let call = Call::new("state.get", Resource::Record(key));
        self.around.around(&call, || self.inner.get(key)).await
    }

    async fn put(&self, key: &Key, value: Bytes, only: Precondition, ttl: Option<Duration>) -> Result<Version> {
        // After a write that had its effect, a repeat finds its own record and takes it for somebody else's.
        let repeatable = only == Precondition::Any;
        let call = Call { repeatable, ..Call::new("state.put", Resource::Record(key)) };
        self.around.around(&call, move || self.inner.put(key, value.clone(), only, ttl)).await
    }

    async fn delete(&self, key: &Key, only: Precondition) -> Result<Deletion> {
        let repeatable = only == Precondition::Any;
        let call = Call { repeatable, ..Call::new("state.delete", Resource::Record(key)) };
        self.around.around(&call, || self.inner.delete(key, only)).await
    }

    async fn list(&self, prefix: &str, after: Option<&Key>, limit: usize) -> Result<Vec<(Key, Versioned)>> {
        let call = Call::new("state.list", Resource::Records(prefix));
        self.around.around(&call, || self.inner.list(prefix, after, limit)).await
    }
}
