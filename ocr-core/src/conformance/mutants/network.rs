//! Networks made, found and deleted wrongly.

use std::net::IpAddr;

use super::{invented, lock, mutants, renamed, swap};
use crate::{
    Deletion, Error, ErrorKind, Network, NetworkBackend, NetworkFilter, NetworkKind, NetworkSpec, RequestId, Result,
    Tags, memory::MemoryCloud,
};

async fn made_by(cloud: &MemoryCloud, tags: &Tags) -> Result<Option<Network>> {
    let networks = cloud.list_networks(&NetworkFilter::default()).await?;
    Ok(networks.into_iter().find(|network| network.tags.as_ref().is_some_and(|made| made.request == tags.request)))
}

async fn another(cloud: &MemoryCloud, spec: &NetworkSpec) -> Result<Network> {
    let tags = Tags { request: RequestId::random(), ..spec.tags.clone() };
    cloud.create_network(&NetworkSpec { tags, name: renamed(&spec.name), kind: spec.kind.clone() }).await
}

mutants! { Network
    "a new network is not found at first" fails [net_create_visible] {
        get_network: |w, id| match w.times(id) {
            1 => Err(Error::not_found("not yet")),
            _ => w.cloud().get_network(id).await,
        }
    }
    "a network's tags are lost" fails [net_create_visible] {
        get_network: |w, id| Ok(Network { tags: None, ..w.cloud().get_network(id).await? })
    }
    "a repeat makes a second network" fails [net_create_repeat net_create_race] {
        create_network: |w, spec| match made_by(w.cloud(), &spec.tags).await? {
            Some(made) if made.name == spec.name => another(w.cloud(), &spec).await,
            _ => w.cloud().create_network(&spec).await,
        }
    }
    "two at once make two networks" fails [net_create_race] {
        create_network: |w, spec| {
            let before = made_by(w.cloud(), &spec.tags).await?;
            tokio::task::yield_now().await;
            match (before, made_by(w.cloud(), &spec.tags).await?) {
                (None, Some(_)) => another(w.cloud(), &spec).await,
                _ => w.cloud().create_network(&spec).await,
            }
        }
    }
    "a reused request returns the old network" fails [net_create_request_reused] {
        create_network: |w, spec| match made_by(w.cloud(), &spec.tags).await? {
            Some(made) => Ok(made),
            None => w.cloud().create_network(&spec).await,
        }
    }
    "a taken name returns the old network" fails [net_create_name_taken] {
        create_network: |w, spec| {
            let filter = NetworkFilter {
                owner: Some(spec.tags.owner.clone()),
                scope: Some(spec.tags.scope.clone()),
                name: Some(spec.name.clone()),
            };
            match w.cloud().list_networks(&filter).await?.pop() {
                Some(made) => Ok(made),
                None => w.cloud().create_network(&spec).await,
            }
        }
    }
    "a taken name makes another network, then says no" fails [net_create_name_taken] {
        create_network: |w, spec| {
            let known = made_by(w.cloud(), &spec.tags).await?.is_some();
            let result = w.cloud().create_network(&spec).await;
            if !known && result.as_ref().is_err_and(|error| error.kind() == ErrorKind::AlreadyExists) {
                another(w.cloud(), &spec).await?;
            }
            result
        }
    }
    "a VLAN tag that is none becomes one" fails [net_create_invalid] {
        create_network: |w, mut spec| {
            if let NetworkKind::Vlan { vlan, .. } = &mut spec.kind {
                *vlan = (*vlan).clamp(1, 4094);
            }
            w.cloud().create_network(&spec).await
        }
    }
    "a gateway outside its range is moved into it" fails [net_create_invalid] {
        create_network: |w, mut spec| {
            if let NetworkKind::Routed { cidr: (IpAddr::V4(network), 24), gateway } = &mut spec.kind {
                let [a, b, c, _] = network.octets();
                *gateway = [a, b, c, 1].into();
            }
            w.cloud().create_network(&spec).await
        }
    }
    "an impossible network is a conflict" fails [net_create_invalid] {
        create_network: |w, spec| swap(w.cloud().create_network(&spec).await, ErrorKind::Invalid, ErrorKind::Conflict)
    }
    "an impossible network leaves another" fails [net_create_invalid] {
        create_network: |w, spec| {
            let result = w.cloud().create_network(&spec).await;
            if result.as_ref().is_err_and(|error| error.kind() == ErrorKind::Invalid) {
                w.cloud().create_network(&NetworkSpec { kind: NetworkKind::Isolated, ..spec }).await?;
            }
            result
        }
    }
    "a kind without the capability is called impossible" (less) fails [net_create_unsupported] {
        create_network: |w, spec| swap(w.cloud().create_network(&spec).await, ErrorKind::Unsupported, ErrorKind::Invalid)
    }
    "a network that does not exist is our own fault" fails [net_get_missing] {
        get_network: |w, id| match invented(id.as_uuid()) {
            true => Err(Error::internal("no such network")),
            false => w.cloud().get_network(id).await,
        }
    }
    "the networks' list ignores the owner" fails [net_list_filter] {
        list_networks: |w, filter| w.cloud().list_networks(&NetworkFilter { owner: None, ..filter }).await
    }
    "the networks' list ignores the scope" fails [net_list_filter] {
        list_networks: |w, filter| w.cloud().list_networks(&NetworkFilter { scope: None, ..filter }).await
    }
    "the networks' list ignores the name" fails [net_list_filter] {
        list_networks: |w, filter| w.cloud().list_networks(&NetworkFilter { name: None, ..filter }).await
    }
    "no networks are an error" fails [net_create_invalid net_list_filter net_delete_gone] {
        list_networks: |w, filter| {
            let networks = w.cloud().list_networks(&filter).await?;
            if networks.is_empty() { Err(Error::not_found("nothing matches")) } else { Ok(networks) }
        }
    }
    "deleting a network does nothing" fails [net_delete_gone leaves_nothing] {
        delete_network: |w, id| match w.cloud().get_network(id).await {
            Ok(_) => Ok(Deletion::Deleted),
            Err(_) => Ok(Deletion::AlreadyGone),
        }
    }
    "a deleted network stays in the list" fails [net_delete_gone leaves_nothing] {
        delete_network: |w, id| {
            if let Ok(network) = w.cloud().get_network(id).await {
                lock(&w.0.networks).push(network);
            }
            w.cloud().delete_network(id).await
        },
        list_networks: |w, filter| {
            let mut networks = w.cloud().list_networks(&filter).await?;
            networks.extend(lock(&w.0.networks).iter().filter(|ghost| filter.matches(ghost)).cloned());
            Ok(networks)
        }
    }
    "deleting a network that is gone is an error" fails [net_delete_gone] {
        delete_network: |w, id| match w.cloud().delete_network(id).await? {
            Deletion::AlreadyGone => Err(Error::not_found("no such network")),
            deleted => Ok(deleted),
        }
    }
    "access to nothing is fine" fails [net_access_missing] {
        set_access: |w, (vm, access)| match w.cloud().set_access(vm, &access).await {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }
    "the same access again is a conflict" fails [net_access_set] {
        set_access: |w, (vm, access)| match w.cloud().access(vm) == Some(access.clone()) {
            true => Err(Error::new(ErrorKind::Conflict, "it is so already")),
            false => w.cloud().set_access(vm, &access).await,
        }
    }
    "access without the capability is fine" (less) fails [net_access_unsupported] {
        set_access: |_, _| Ok(())
    }
}
