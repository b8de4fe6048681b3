//! Networks: [`NetworkBackend`] over libvirt's own, as far as plugging machines into them needs.

use async_trait::async_trait;
use ocr_core::{
    Access, Deletion, Error, ErrorKind, Name, Network, NetworkBackend, NetworkCapabilities, NetworkFilter, NetworkId,
    NetworkSpec, Result, VmId,
};
use virt::connect::Connect;

use crate::{
    backend::{Libvirt, found, network_resource},
    door::Effect,
    xml::network::Seen,
};

/// Networks are seen and used. Making them is not yet done here: libvirt before 9.7 keeps no metadata with a
/// network, so what makes one ours needs another place.
const CAPABILITIES: NetworkCapabilities =
    NetworkCapabilities { vlan: false, routed: false, isolated: false, access: false };

#[async_trait]
impl NetworkBackend for Libvirt {
    fn capabilities(&self) -> NetworkCapabilities {
        CAPABILITIES
    }

    async fn create_network(&self, spec: &NetworkSpec) -> Result<Network> {
        spec.check(&CAPABILITIES)?;
        Err(Error::unsupported("this backend cannot make networks").during("network.create_network"))
    }

    async fn get_network(&self, id: NetworkId) -> Result<Network> {
        let seen = self.inner.control("network.get_network", Effect::None, move |connect| {
            let Some(network) = found(connect.lookup_network_by_uuid(*id.as_uuid()))? else { return Ok(None) };
            Ok(Some(Seen::parse(&network.xml_desc(0)?)?))
        });
        let seen = seen.await.map_err(|error| error.on(network_resource(id)))?;
        seen.and_then(network).ok_or_else(|| {
            Error::not_found("there is no such network").during("network.get_network").on(network_resource(id))
        })
    }

    async fn list_networks(&self, filter: &NetworkFilter) -> Result<Vec<Network>> {
        let filter = filter.clone();
        let list = move |connect: &Connect| {
            let mut networks = Vec::new();
            for listed in connect.list_all_networks(0)? {
                let Some(xml) = found(listed.xml_desc(0))? else { continue };
                if let Some(network) = network(Seen::parse(&xml)?)
                    && filter.matches(&network)
                {
                    networks.push(network);
                }
            }
            Ok(networks)
        };
        self.inner.control("network.list_networks", Effect::None, list).await
    }

    async fn delete_network(&self, id: NetworkId) -> Result<Deletion> {
        match self.get_network(id).await {
            Ok(_) => {
                Err(Error::new(ErrorKind::Denied, "this software did not make the network, so it does not delete it")
                    .during("network.delete_network")
                    .on(network_resource(id)))
            }
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Deletion::AlreadyGone),
            Err(error) => Err(error),
        }
    }

    async fn set_access(&self, _vm: VmId, _access: &Access) -> Result<()> {
        Err(Error::unsupported("this backend does not filter who may reach a machine").during("network.set_access"))
    }
}

/// Nobody could ask for a network whose name is none of ours.
fn network(seen: Seen) -> Option<Network> {
    Some(Network { id: seen.id, name: Name::new(seen.name).ok()?, tags: None, kind: seen.kind })
}
