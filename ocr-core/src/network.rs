//! [`NetworkBackend`]: networks, and who may reach a machine on them.

use std::{fmt, net::IpAddr};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::{Deletion, Error, Name, NetworkId, Owner, Result, Scope, Tags, VmId};

/// Makes networks that machines are plugged into.
///
/// Networks that somebody else made are seen, with no `tags`, so that machines can be linked to them.
/// Each MUST is checked by the conformance case named beside it.
#[async_trait]
pub trait NetworkBackend: fmt::Debug + Send + Sync + 'static {
    /// What this backend can do. It never changes while the backend lives.
    fn capabilities(&self) -> NetworkCapabilities;

    /// Makes a network. It is ready for machines when this returns.
    ///
    /// # Behavior
    /// - The network MUST be seen by `get_network` and `list_networks` on return, with its tags [case: net_create_visible].
    /// - A repeat of the same spec MUST return the same network [case: net_create_repeat]; two at once MUST give one
    ///   [case: net_create_race].
    /// - The same request with another spec MUST fail with `AlreadyExists` and change nothing
    ///   [case: net_create_request_reused].
    /// - The same owner, scope and name under another request MUST fail with `AlreadyExists` and make nothing
    ///   [case: net_create_name_taken].
    /// - A VLAN outside 1 to 4094, a gateway outside its range, or a range that is none MUST fail with `Invalid` and
    ///   make nothing [case: net_create_invalid].
    /// - A kind that the capabilities lack MUST fail with `Unsupported` and make nothing [case: net_create_unsupported].
    async fn create_network(&self, spec: &NetworkSpec) -> Result<Network>;

    /// Reads one network.
    ///
    /// # Behavior
    /// - A network that does not exist MUST give `NotFound` [case: net_get_missing].
    async fn get_network(&self, id: NetworkId) -> Result<Network>;

    /// Lists the networks that match every part of the filter, in no particular order.
    ///
    /// # Behavior
    /// - Owner, scope and name MUST each narrow the list; nothing that matches MUST be an empty list [case: net_list_filter].
    async fn list_networks(&self, filter: &NetworkFilter) -> Result<Vec<Network>>;

    /// Deletes a network that no machine uses.
    ///
    /// # Behavior
    /// - It MUST be gone afterwards; deleting what is gone MUST be `Ok(AlreadyGone)` [case: net_delete_gone].
    /// - A network that a machine still uses fails with `Conflict` or goes when the machine does; Ranger deletes
    ///   switches before their machines, so callers repeat.
    async fn delete_network(&self, id: NetworkId) -> Result<Deletion>;

    /// Says who may reach a machine from outside its own networks. A repeat replaces the earlier word.
    ///
    /// # Behavior
    /// - A machine that does not exist MUST give `NotFound` [case: net_access_missing].
    /// - Every [`Access`] MUST be taken, also the same one again [case: net_access_set].
    /// - Without the capability `access` it MUST fail with `Unsupported`, whatever the machine
    ///   [case: net_access_unsupported].
    async fn set_access(&self, vm: VmId, access: &Access) -> Result<()>;
}

/// Comfort over any [`NetworkBackend`]; no backend implements it.
#[async_trait]
pub trait NetworkBackendExt: NetworkBackend {
    /// The network that a user means by an id or, for networks made by others, by a name.
    ///
    /// # Errors
    /// `NotFound` naming what was asked for; `Invalid` when several networks have the name.
    async fn resolve_network(&self, reference: &str) -> Result<Network> {
        if let Ok(id) = reference.parse::<NetworkId>() {
            return self.get_network(id).await;
        }
        let name = Name::new(reference).map_err(|error| {
            Error::invalid("links", format_args!("each is a network's id or name; {}", error.message()))
        })?;
        let filter = NetworkFilter { name: Some(name), ..NetworkFilter::default() };
        let mut found = self.list_networks(&filter).await?;
        match found.len() {
            1 => Ok(found.remove(0)),
            0 => Err(Error::not_found(format!("links: no network has the id or name {}", crate::id::shown(reference)))
                .during("network.resolve")),
            n => Err(Error::invalid(
                "links",
                format_args!("{n} networks are named {}; use the id", crate::id::shown(reference)),
            )),
        }
    }
}

impl<T: NetworkBackend + ?Sized> NetworkBackendExt for T {}

/// What a [`NetworkBackend`] can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetworkCapabilities {
    /// Whether it can make [`NetworkKind::Vlan`].
    pub vlan: bool,
    /// Whether it can make [`NetworkKind::Routed`].
    pub routed: bool,
    /// Whether it can make [`NetworkKind::Isolated`].
    pub isolated: bool,
    /// Whether it can [`NetworkBackend::set_access`].
    pub access: bool,
}

/// What to make.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct NetworkSpec {
    /// Kept on the network.
    pub tags: Tags,
    /// Unique per owner and scope.
    pub name: Name,
    /// Its shape.
    pub kind: NetworkKind,
}

/// The shape of a network.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum NetworkKind {
    /// One VLAN of a bridge on the hypervisor.
    Vlan {
        /// The bridge's name.
        bridge: String,
        /// The tag, 1 to 4094.
        vlan: u16,
    },
    /// A range of addresses with a way out through a gateway.
    Routed {
        /// The network's address and prefix length, such as `10.1.0.0/24`.
        cidr: (IpAddr, u8),
        /// The router's address inside `cidr`.
        gateway: IpAddr,
    },
    /// A switch for its machines and nobody else.
    Isolated,
}

impl NetworkSpec {
    /// Checks a spec against itself and against what a backend can do. Backends call this first.
    ///
    /// # Errors
    /// `Invalid` naming the field; `Unsupported` for a kind that the backend lacks.
    pub fn check(&self, capabilities: &NetworkCapabilities) -> Result<()> {
        let able = match &self.kind {
            NetworkKind::Vlan { bridge, vlan } => {
                if bridge.is_empty()
                    || bridge.len() > 15
                    || bridge.chars().any(|c| c == '/' || c.is_whitespace() || c.is_control())
                {
                    return Err(Error::invalid(
                        "bridge",
                        "wants the name of a bridge, 1 to 15 bytes without spaces or '/'",
                    ));
                }
                if !(1..=4094).contains(vlan) {
                    return Err(Error::invalid("vlan", format_args!("wants a tag from 1 to 4094, got {vlan}")));
                }
                capabilities.vlan
            }
            NetworkKind::Routed { cidr: (address, prefix), gateway } => {
                check_gateway(*address, *prefix, *gateway)?;
                capabilities.routed
            }
            NetworkKind::Isolated => capabilities.isolated,
        };
        if able { Ok(()) } else { Err(Error::unsupported("this backend cannot make a network of this kind")) }
    }
}

fn check_gateway(address: IpAddr, prefix: u8, gateway: IpAddr) -> Result<()> {
    let (network, router, width) = match (address, gateway) {
        (IpAddr::V4(a), IpAddr::V4(g)) => (u128::from(a.to_bits()), u128::from(g.to_bits()), 32),
        (IpAddr::V6(a), IpAddr::V6(g)) => (a.to_bits(), g.to_bits(), 128),
        _ => return Err(Error::invalid("gateway", "must be of the same IP version as cidr")),
    };
    // A network of one or two addresses has no room for a gateway and a machine.
    if u32::from(prefix) > width - 2 || prefix == 0 {
        return Err(Error::invalid(
            "cidr",
            format_args!("wants a prefix length from 1 to {}, got {prefix}", width - 2),
        ));
    }
    let host_bits = (1u128 << (width - u32::from(prefix))) - 1;
    if network & host_bits != 0 {
        return Err(Error::invalid(
            "cidr",
            format_args!("{address}/{prefix} has host bits set; give the network's own address"),
        ));
    }
    if router & !host_bits != network || router == network || router == network | host_bits {
        return Err(Error::invalid("gateway", format_args!("{gateway} is not a host address of {address}/{prefix}")));
    }
    Ok(())
}

/// A network as the backend sees it now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Network {
    /// The backend's own id.
    pub id: NetworkId,
    /// Its name.
    pub name: Name,
    /// What we keep on it; `None` when this software did not make it.
    pub tags: Option<Tags>,
    /// Its shape, where the backend can tell.
    pub kind: Option<NetworkKind>,
}

/// Which networks to list; an empty filter lists all, also those that are not ours.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetworkFilter {
    /// Only networks with this owner tag.
    pub owner: Option<Owner>,
    /// Only networks of this exercise and deployment.
    pub scope: Option<Scope>,
    /// Only networks of exactly this name.
    pub name: Option<Name>,
}

impl NetworkFilter {
    /// Whether a network matches; for backends that filter by themselves.
    pub fn matches(&self, network: &Network) -> bool {
        let tags = network.tags.as_ref();
        self.owner.as_ref().is_none_or(|owner| tags.is_some_and(|tags| tags.owner == *owner))
            && self.scope.as_ref().is_none_or(|scope| tags.is_some_and(|tags| tags.scope == *scope))
            && self.name.as_ref().is_none_or(|name| network.name == *name)
    }
}

/// Who may reach a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Access {
    /// Nobody.
    Closed,
    /// Everybody.
    Open,
    /// These addresses only.
    Only(Vec<IpAddr>),
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_gateway_is_a_host_of_its_network(network in any::<u32>(), prefix in 1u8..=30, offset in any::<u32>()) {
            let host_bits = u32::MAX >> prefix;
            let network = network & !host_bits;
            let gateway = network | (offset & host_bits);
            let verdict = check_gateway(
                IpAddr::V4(network.into()),
                prefix,
                IpAddr::V4(gateway.into()),
            );
            prop_assert_eq!(verdict.is_ok(), gateway != network && gateway != network | host_bits);
        }
    }

    #[test]
    fn mixed_versions_and_host_bits_are_refused() {
        let v4 = |s: &str| s.parse::<IpAddr>().unwrap();
        assert!(check_gateway(v4("10.0.0.0"), 24, v4("fe80::1")).is_err());
        assert!(check_gateway(v4("10.0.0.1"), 24, v4("10.0.0.2")).is_err());
        assert!(check_gateway(v4("10.0.0.0"), 31, v4("10.0.0.1")).is_err());
        assert!(check_gateway(v4("fd00::"), 64, v4("fd00::1")).is_ok());
    }
}
