//! The `ocr.v1` services: looking at machines and installs, and reconciling.

#[allow(missing_docs, unreachable_pub, clippy::all, unused_qualifications, reason = "generated")]
pub(crate) mod generated {
    include!(concat!(env!("OUT_DIR"), "/ocr.v1.rs"));
}

use ocr_core::{
    Vm,
    exec::{Executor, InstallRecord},
    lifecycle::Deployer,
};
use tonic::{Request, Response, Status};

pub use self::generated::*;
use crate::{CallId, parse, status::answer};

/// `ocr.v1.Machines`. It translates; the deployer decides.
#[derive(Clone, Debug)]
pub struct Machines {
    deployer: Deployer,
}

impl Machines {
    /// The service over this deployer.
    pub fn new(deployer: Deployer) -> Self {
        Self { deployer }
    }
}

#[tonic::async_trait]
impl machines_server::Machines for Machines {
    async fn list(&self, request: Request<ListMachinesRequest>) -> Result<Response<ListMachinesResponse>, Status> {
        let call = CallId::given(&request);
        let done = async {
            let scope = request.into_inner().scope;
            let fields = ["scope.exercise", "scope.deployment"];
            let scope = scope.map(|scope| parse::scope_in(fields, scope.exercise, scope.deployment)).transpose()?;
            let machines = self.deployer.list(scope.as_ref()).await?;
            Ok(ListMachinesResponse { machines: machines.into_iter().map(Machine::from).collect() })
        };
        answer(&call, done.await)
    }

    async fn get(&self, request: Request<GetMachineRequest>) -> Result<Response<Machine>, Status> {
        let call = CallId::given(&request);
        let done = async { Ok(self.deployer.get(parse::vm_id_in("id", &request.get_ref().id)?).await?.into()) };
        answer(&call, done.await)
    }

    async fn reconcile(&self, request: Request<ReconcileRequest>) -> Result<Response<ReconcileResponse>, Status> {
        let call = CallId::given(&request);
        let done = async {
            let report = self.deployer.reconcile().await?;
            Ok(ReconcileResponse {
                ended: report.ended,
                swept: report.swept.iter().map(ToString::to_string).collect(),
                forgotten: report.forgotten,
                failed: report.failed,
            })
        };
        answer(&call, done.await)
    }
}

/// `ocr.v1.Installs`. It translates; the executor decides.
#[derive(Clone, Debug)]
pub struct Installs {
    executor: Executor,
}

impl Installs {
    /// The service over this executor.
    pub fn new(executor: Executor) -> Self {
        Self { executor }
    }
}

#[tonic::async_trait]
impl installs_server::Installs for Installs {
    async fn list(&self, request: Request<ListInstallsRequest>) -> Result<Response<ListInstallsResponse>, Status> {
        let call = CallId::given(&request);
        let done = async {
            let vm = &request.get_ref().virtual_machine_id;
            let vm = if vm.is_empty() { None } else { Some(parse::vm_id_in("virtual_machine_id", vm)?) };
            let installs = self.executor.list(vm).await?;
            Ok(ListInstallsResponse { installs: installs.into_iter().map(Install::from).collect() })
        };
        answer(&call, done.await)
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
