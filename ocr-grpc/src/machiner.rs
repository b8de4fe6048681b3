//! [`Machiner`]: `VirtualMachineService` over the core's [`Deployer`].

use ocr_core::lifecycle::Deployer;
use tonic::{Request, Response, Status};

use crate::{
    CallId, parse,
    proto::{DeployVirtualMachine, Identifier, virtual_machine_service_server::VirtualMachineService},
    status::answer,
};

/// `VirtualMachineService`. It translates; the deployer decides.
#[derive(Clone, Debug)]
pub struct Machiner {
    deployer: Deployer,
}

impl Machiner {
    /// The service over this deployer.
    pub fn new(deployer: Deployer) -> Self {
        Self { deployer }
    }
}

#[tonic::async_trait]
impl VirtualMachineService for Machiner {
    async fn create(&self, request: Request<DeployVirtualMachine>) -> Result<Response<Identifier>, Status> {
        let call = CallId::given(&request);
        let done = async {
            let vm = self.deployer.create(parse::create_vm(request.into_inner())?).await?;
            Ok(Identifier::from(*vm.id.as_uuid()))
        };
        answer(&call, done.await)
    }

    async fn delete(&self, request: Request<Identifier>) -> Result<Response<()>, Status> {
        let call = CallId::given(&request);
        let done = async {
            // Gone already is gone.
            let _ = self.deployer.delete(parse::vm_id(request.get_ref())?).await?;
            Ok(())
        };
        answer(&call, done.await)
    }
}
