//! [`NetworkBackend`] in memory.

use std::net::IpAddr;

use async_trait::async_trait;

use super::{Inner, MemoryCloud, World, full, gone};
use crate::{
    Access, Deletion, Error, ErrorKind, Name, Network, NetworkBackend, NetworkCapabilities, NetworkFilter, NetworkId,
    NetworkKind, NetworkSpec, Result, VmId,
};

pub(super) struct StoredNetwork {
    seen: Network,
    spec: Option<NetworkSpec>,
    /// Addresses are given once, in order; used-up ranges give no more.
    given: u32,
}

impl StoredNetwork {
    /// The next address of an IPv4 range after the tenth.
    pub(super) fn next_address(&mut self) -> Option<IpAddr> {
        let Some(NetworkKind::Routed { cidr: (IpAddr::V4(network), prefix), gateway }) = self.seen.kind else {
            return None;
        };
        let last = u32::MAX.checked_shr(prefix.into()).unwrap_or(0);
        loop {
            let host = self.given + 10;
            if host >= last {
                return None;
            }
            self.given += 1;
            let address = IpAddr::V4((network.to_bits() + host).into());
            if address != gateway {
                return Some(address);
            }
        }
    }
}

/// The networks that somebody else made.
pub(super) fn furnish(world: &mut World) {
    let routed =
        NetworkKind::Routed { cidr: (IpAddr::from([192, 0, 2, 0]), 24), gateway: IpAddr::from([192, 0, 2, 1]) };
    let rows = [
        ("default", MemoryCloud::default_network(), routed),
        ("lab", MemoryCloud::lab_network(), NetworkKind::Isolated),
    ];
    for (name, id, kind) in rows {
        if let Ok(name) = Name::new(name) {
            let seen = Network { id, name, tags: None, kind: Some(kind) };
            world.networks.insert(id, StoredNetwork { seen, spec: None, given: 0 });
        }
    }
}

impl Inner {
    fn network_capabilities(&self) -> NetworkCapabilities {
        let make = self.options.make_networks;
        NetworkCapabilities { vlan: make, routed: make, isolated: make, access: self.options.access }
    }

    fn create_network(&self, spec: &NetworkSpec) -> Result<Network> {
        spec.check(&self.network_capabilities())?;
        let mut world = self.world();
        let ours =
            |network: &&StoredNetwork| network.spec.as_ref().is_some_and(|made| made.tags.owner == spec.tags.owner);
        for network in world.networks.values().filter(ours) {
            let Some(made) = &network.spec else { continue };
            if made == spec {
                return Ok(network.seen.clone());
            }
            let why = if made.tags.request == spec.tags.request {
                format!("the request {} already made another network", spec.tags.request)
            } else if made.name == spec.name && made.tags.scope == spec.tags.scope {
                format!("another request already made a network named {}", spec.name)
            } else {
                continue;
            };
            return Err(Error::new(ErrorKind::AlreadyExists, why).on(format!("network {}", network.seen.id)));
        }
        if world.networks.len() >= self.options.max_networks {
            return Err(full("networks", self.options.max_networks));
        }
        let seen = Network {
            id: NetworkId::from_uuid(self.id(&mut world, "network")),
            name: spec.name.clone(),
            tags: Some(spec.tags.clone()),
            kind: Some(spec.kind.clone()),
        };
        let stored = StoredNetwork { seen: seen.clone(), spec: Some(spec.clone()), given: 0 };
        world.networks.insert(seen.id, stored);
        Ok(seen)
    }

    fn delete_network(&self, id: NetworkId) -> Result<Deletion> {
        let mut world = self.world();
        self.settle_all(&mut world);
        if !world.networks.contains_key(&id) {
            return Ok(Deletion::AlreadyGone);
        }
        let user = world.vms.values().find(|machine| machine.vm.nics.iter().any(|nic| nic.network == Some(id)));
        if let Some(machine) = user {
            let why = format!("the machine {} still uses the network", machine.vm.id);
            return Err(Error::new(ErrorKind::Conflict, why).on(format!("network {id}")));
        }
        world.networks.remove(&id);
        Ok(Deletion::Deleted)
    }
}

#[async_trait]
impl NetworkBackend for MemoryCloud {
    fn capabilities(&self) -> NetworkCapabilities {
        self.inner.network_capabilities()
    }

    async fn create_network(&self, spec: &NetworkSpec) -> Result<Network> {
        self.inner.faults.around("network.create_network", async { self.inner.create_network(spec) }).await
    }

    async fn get_network(&self, id: NetworkId) -> Result<Network> {
        let effect = async {
            let found = self.world().networks.get(&id).map(|network| network.seen.clone());
            found.ok_or_else(|| Error::not_found("there is no such network").on(format!("network {id}")))
        };
        self.inner.faults.around("network.get_network", effect).await
    }

    async fn list_networks(&self, filter: &NetworkFilter) -> Result<Vec<Network>> {
        let effect = async {
            let world = self.world();
            let all = world.networks.values().map(|network| &network.seen);
            Ok(all.filter(|network| filter.matches(network)).cloned().collect())
        };
        self.inner.faults.around("network.list_networks", effect).await
    }

    async fn delete_network(&self, id: NetworkId) -> Result<Deletion> {
        self.inner.faults.around("network.delete_network", async { self.inner.delete_network(id) }).await
    }

    async fn set_access(&self, vm: VmId, access: &Access) -> Result<()> {
        let effect = async {
            if !self.inner.options.access {
                return Err(Error::unsupported("this backend cannot say who may reach a machine"));
            }
            if self.change_vm(vm, |machine| machine.access = access.clone()) { Ok(()) } else { Err(gone(vm)) }
        };
        self.inner.faults.around("network.set_access", effect).await
    }
}
