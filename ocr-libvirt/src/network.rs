//! [`NetworkBackend`] for libvirt: networks that are there, and isolated ones of our own.

use async_trait::async_trait;
use ocr_core::{
    Access, Deletion, Error, ErrorKind, Name, Network, NetworkBackend, NetworkCapabilities, NetworkFilter, NetworkId,
    NetworkKind, NetworkSpec, Result, VmId,
};
use virt::network::Network as Handle;

use crate::{
    domain::{Ours, derived, libvirt_name},
    error::OPERATION_INVALID,
    link::{Libvirt, if_there, unless},
    xml::Element,
};

const NO_NETWORK: i64 = 43;

#[async_trait]
impl NetworkBackend for Libvirt {
    fn capabilities(&self) -> NetworkCapabilities {
        NetworkCapabilities { vlan: false, routed: false, isolated: true, access: false }
    }

    async fn create_network(&self, spec: &NetworkSpec) -> Result<Network> {
        spec.check(&NetworkBackend::capabilities(self))?;
        let id = NetworkId::from_uuid(derived(&[spec.tags.owner.as_str(), spec.tags.request.as_str(), "network"]));
        let ours = Ours { tags: spec.tags.clone(), name: spec.name.clone(), spec: None };
        let xml = Element::new("network")
            .leaf("name", libvirt_name(&spec.tags, &spec.name))
            .leaf("uuid", id.to_string())
            .child(Element::new("metadata").child(ours.to_element()?))
            .to_xml()?;
        let found = self
            .inner
            .door
            .call("network.create", move |connect| {
                let network = match if_there(connect.lookup_network_by_uuid(*id.as_uuid()), NO_NETWORK)? {
                    Some(network) => network,
                    None => connect.define_network_xml(&xml)?,
                };
                unless(network.create().map(drop), &[OPERATION_INVALID])?;
                network.set_autostart(true).map(drop)?;
                network.xml_desc(0)
            })
            .await
            .map_err(|error| error.on(format!("network {}", spec.name)))?;
        let network = read(&found)?;
        // libvirt redefines what has the same name and UUID; another shape under the same request is refused by us.
        if network.name != spec.name || network.tags.as_ref() != Some(&spec.tags) {
            return Err(Error::new(ErrorKind::AlreadyExists, "the request was used for another network")
                .during("network.create")
                .on(format!("network {}", spec.name)));
        }
        Ok(network)
    }

    async fn get_network(&self, id: NetworkId) -> Result<Network> {
        let xml = self
            .inner
            .door
            .call("network.get", move |connect| connect.lookup_network_by_uuid(*id.as_uuid())?.xml_desc(0))
            .await
            .map_err(|error| match error.kind() {
                ErrorKind::NotFound => Error::not_found(format!("there is no network {id}")).during("network.get"),
                _ => error.on(format!("network {id}")),
            })?;
        read(&xml)
    }

    async fn list_networks(&self, filter: &NetworkFilter) -> Result<Vec<Network>> {
        let documents = self
            .inner
            .door
            .call("network.list", |connect| {
                let mut documents = Vec::new();
                for network in connect.list_all_networks(0)? {
                    documents.extend(if_there(network.xml_desc(0), NO_NETWORK)?);
                }
                Ok(documents)
            })
            .await?;
        let mut networks = Vec::new();
        for document in documents {
            networks.push(read(&document)?);
        }
        networks.retain(|network| filter.matches(network));
        Ok(networks)
    }

    async fn delete_network(&self, id: NetworkId) -> Result<Deletion> {
        let network = match self.get_network(id).await {
            Ok(network) => network,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Deletion::AlreadyGone),
            Err(error) => return Err(error),
        };
        if network.tags.is_none() {
            return Err(Error::new(ErrorKind::Denied, "this network was not made here and is not touched")
                .during("network.delete")
                .on(format!("network {id}")));
        }
        self.inner
            .door
            .call("network.delete", move |connect| {
                let Some(network) = if_there(connect.lookup_network_by_uuid(*id.as_uuid()), NO_NETWORK)? else {
                    return Ok(());
                };
                unless(stop(&network), &[OPERATION_INVALID, NO_NETWORK])?;
                unless(network.undefine().map(drop), &[NO_NETWORK])
            })
            .await
            .map_err(|error| error.on(format!("network {id}")))?;
        Ok(Deletion::Deleted)
    }

    async fn set_access(&self, vm: VmId, _access: &Access) -> Result<()> {
        if self.look(vm).await?.is_none() {
            return Err(Error::not_found("there is no such machine").during("network.set_access").on(format!("vm {vm}")));
        }
        Err(Error::unsupported("access to machines cannot be restricted here yet").during("network.set_access"))
    }
}

fn stop(network: &Handle) -> crate::door::Raw<()> {
    network.destroy().map(drop)
}

fn read(xml: &str) -> Result<Network> {
    let document = Element::parse(xml)?;
    let text = |name: &str| document.get(name).map(|child| child.value().trim()).unwrap_or_default();
    let id: NetworkId = text("uuid").parse().map_err(|_| Error::internal("libvirt gave a network without a UUID"))?;
    let ours = Ours::read(&document);
    let name = match &ours {
        Some(ours) => ours.name.clone(),
        None => Name::new(text("name")).or_else(|_| Name::new(id.to_string()))?,
    };
    let kind = match document.get("forward") {
        None => Some(NetworkKind::Isolated),
        // Its shape may be any of libvirt's many; ours are told by their metadata.
        Some(_) => None,
    };
    Ok(Network { id, name, tags: ours.map(|ours| ours.tags), kind })
}
