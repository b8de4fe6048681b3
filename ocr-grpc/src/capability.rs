//! [`Announcement`]: `Capability`, from the list of what is served.

use tonic::{Request, Response, Status};

use crate::proto::{Capabilities, capabilities::DeployerType, capability_server::Capability};

/// `Capability`: tells clients what this server does.
#[derive(Clone, Debug)]
pub struct Announcement {
    served: Vec<DeployerType>,
}

impl Announcement {
    /// Announces these, each once, in the schema's order.
    pub fn new(served: impl IntoIterator<Item = DeployerType>) -> Self {
        let mut served = served.into_iter().collect::<Vec<_>>();
        served.sort_unstable();
        served.dedup();
        Self { served }
    }
}

#[tonic::async_trait]
impl Capability for Announcement {
    async fn get_capabilities(&self, _: Request<()>) -> Result<Response<Capabilities>, Status> {
        Ok(Response::new(Capabilities { values: self.served.iter().map(|&served| served.into()).collect() }))
    }
}
