//! The `ocr.v1` services: looking at machines and installs, and reconciling.

#[allow(missing_docs, unreachable_pub, clippy::all, unused_qualifications, reason = "generated")]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/ocr.v1.rs"));
}

use ocr_core::{
    Scope as CoreScope, Vm, VmId,
    exec::{Executor, InstallRecord},
    lifecycle::Deployer,
};
use tonic::{Request, Response, Status, async_trait};

pub use self::generated::*;
use crate::status::to_status;

/// [`machines_server::Machines`] over a [`Deployer`].
#[derive(Clone, Debug)]
pub struct MachinesService {
    deployer: Deployer,
}

impl MachinesService {
    /// Serves this deployer's machines.
    pub fn new(deployer: Deployer) -> Self {
        Self { deployer }
    }
}

#[async_trait]
impl machines_server::Machines for MachinesService {
    async fn list(&self, request: Request<ListMachinesRequest>) -> Result<Response<ListMachinesResponse>, Status> {
        let scope = request
            .into_inner()
            .scope
            .map(|scope| CoreScope::new(scope.exercise, scope.deployment))
            .transpose()
            .map_err(to_status)?;
        let machines = self.deployer.list(scope.as_ref()).await.map_err(to_status)?;
        Ok(Response::new(ListMachinesResponse { machines: machines.into_iter().map(Machine::from).collect() }))
    }

    async fn get(&self, request: Request<GetMachineRequest>) -> Result<Response<Machine>, Status> {
        let id: VmId = request.into_inner().id.parse().map_err(to_status)?;
        Ok(Response::new(self.deployer.get(id).await.map_err(to_status)?.into()))
    }

    async fn reconcile(&self, _: Request<ReconcileRequest>) -> Result<Response<ReconcileResponse>, Status> {
        let report = self.deployer.reconcile().await.map_err(to_status)?;
        Ok(Response::new(ReconcileResponse {
            ended: report.ended,
            swept: report.swept.iter().map(ToString::to_string).collect(),
            forgotten: report.forgotten,
            failed: report.failed,
        }))
    }
}

/// [`installs_server::Installs`] over an [`Executor`].
#[derive(Clone, Debug)]
pub struct InstallsService {
    executor: Executor,
}

impl InstallsService {
    /// Serves this executor's installs.
    pub fn new(executor: Executor) -> Self {
        Self { executor }
    }
}

#[async_trait]
impl installs_server::Installs for InstallsService {
    async fn list(&self, request: Request<ListInstallsRequest>) -> Result<Response<ListInstallsResponse>, Status> {
        let vm = request.into_inner().virtual_machine_id;
        let vm = if vm.is_empty() { None } else { Some(vm.parse::<VmId>().map_err(to_status)?) };
        let installs = self.executor.list(vm).await.map_err(to_status)?;
        Ok(Response::new(ListInstallsResponse { installs: installs.into_iter().map(Install::from).collect() }))
    }
}

impl From<Vm> for Machine {
    fn from(vm: Vm) -> Self {
        let scope = vm.tags.map(|tags| Scope { exercise: tags.scope.exercise, deployment: tags.scope.deployment });
        Self {
            id: vm.id.to_string(),
            name: vm.name.to_string(),
            scope,
            state: vm.state.to_string(),
            cpus: vm.cpus,
            ram_bytes: vm.ram_bytes,
            image: vm.image.map(|image| image.to_string()).unwrap_or_default(),
            nics: vm
                .nics
                .into_iter()
                .map(|nic| Nic {
                    network: nic.network.map(|network| network.to_string()).unwrap_or_default(),
                    mac: nic.mac.unwrap_or_default(),
                    addresses: nic.addresses.iter().map(ToString::to_string).collect(),
                })
                .collect(),
            has_agent_channel: vm.has_agent_channel,
        }
    }
}

impl From<InstallRecord> for Install {
    fn from(record: InstallRecord) -> Self {
        let (package, package_version) = record.package.unwrap_or_default();
        Self {
            id: record.id.to_string(),
            kind: record.kind.to_string(),
            name: record.name,
            virtual_machine_id: record.vm.to_string(),
            package,
            package_version,
            interval_ms: record.interval.map_or(0, |interval| u64::try_from(interval.as_millis()).unwrap_or(u64::MAX)),
        }
    }
}
