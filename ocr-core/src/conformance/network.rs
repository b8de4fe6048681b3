//! Cases of [`NetworkBackend`](crate::NetworkBackend).

use std::net::IpAddr;

use super::context::{Check, Context, ensure, fails};
use crate::{Access, Deletion, ErrorKind, Network, NetworkFilter, NetworkId, NetworkKind, NetworkSpec, Tags, VmId};

fn spec(c: &Context<'_>, suffix: &str) -> Check<NetworkSpec> {
    Ok(NetworkSpec { tags: c.tags(), name: c.name(suffix)?, kind: c.network_kind()? })
}

async fn listed(c: &Context<'_>) -> Check<Vec<Network>> {
    let filter = NetworkFilter { owner: Some(c.subject.owner.clone()), scope: Some(c.scope()), name: None };
    Ok(c.network()?.list_networks(&filter).await?)
}

async fn only(c: &Context<'_>, id: NetworkId) -> Check {
    let listed = listed(c).await?;
    ensure!(listed.len() == 1 && listed[0].id == id, "there must be one network, {id}; listed are {listed:?}");
    Ok(())
}

pub(super) async fn net_create_visible(c: &Context<'_>) -> Check {
    let spec = spec(c, "a")?;
    let made = c.network()?.create_network(&spec).await?;
    let got = c.network()?.get_network(made.id).await?;
    only(c, made.id).await?;
    for network in [&made, &got, &listed(c).await?[0]] {
        ensure!(network.id == made.id, "the network {} is seen as {}", made.id, network.id);
        ensure!(network.name == spec.name, "name {:?} instead of {:?}", network.name, spec.name);
        ensure!(network.tags.as_ref() == Some(&spec.tags), "tags {:?} instead of {:?}", network.tags, spec.tags);
    }
    Ok(())
}

pub(super) async fn net_create_repeat(c: &Context<'_>) -> Check {
    let spec = spec(c, "a")?;
    let first = c.network()?.create_network(&spec).await?.id;
    let second = c.network()?.create_network(&spec).await?.id;
    ensure!(first == second, "a repeat gave {second} after {first}");
    only(c, first).await
}

pub(super) async fn net_create_race(c: &Context<'_>) -> Check {
    let spec = spec(c, "a")?;
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..2 {
        let (network, spec) = (c.network()?.clone(), spec.clone());
        calls.spawn(async move { network.create_network(&spec).await });
    }
    let mut ids = Vec::new();
    for result in calls.join_all().await {
        ids.push(result?.id);
    }
    ensure!(ids[0] == ids[1], "two at once gave two networks, {ids:?}");
    only(c, ids[0]).await
}

pub(super) async fn net_create_request_reused(c: &Context<'_>) -> Check {
    let spec = spec(c, "a")?;
    let made = c.network()?.create_network(&spec).await?;
    let result = c.network()?.create_network(&NetworkSpec { name: c.name("b")?, ..spec }).await;
    fails(result, &[ErrorKind::AlreadyExists], "the same request for another name")?;
    only(c, made.id).await
}

pub(super) async fn net_create_name_taken(c: &Context<'_>) -> Check {
    let spec = spec(c, "a")?;
    let made = c.network()?.create_network(&spec).await?;
    let result = c.network()?.create_network(&NetworkSpec { tags: c.tags(), ..spec }).await;
    fails(result, &[ErrorKind::AlreadyExists], "a name under another request")?;
    only(c, made.id).await
}

pub(super) async fn net_create_invalid(c: &Context<'_>) -> Check {
    let can = c.network()?.capabilities();
    let vlan = |bridge: &str, vlan| NetworkKind::Vlan { bridge: bridge.to_owned(), vlan };
    let routed = |address: [u8; 4], prefix, gateway: [u8; 4]| NetworkKind::Routed {
        cidr: (IpAddr::from(address), prefix),
        gateway: IpAddr::from(gateway),
    };
    let mut bad = Vec::new();
    if can.vlan {
        bad.extend([vlan("br0", 0), vlan("br0", 4095), vlan("", 1)]);
    }
    if can.routed {
        bad.extend([
            routed([198, 51, 100, 0], 24, [198, 51, 101, 1]),
            routed([198, 51, 100, 0], 24, [198, 51, 100, 0]),
            routed([198, 51, 100, 7], 24, [198, 51, 100, 1]),
            routed([198, 51, 100, 0], 33, [198, 51, 100, 1]),
            NetworkKind::Routed {
                cidr: ([198, 51, 100, 0].into(), 24),
                gateway: IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, 1]),
            },
        ]);
    }
    for kind in bad {
        let what = format!("{kind:?}");
        let result = c.network()?.create_network(&NetworkSpec { kind, ..spec(c, "a")? }).await;
        fails(result, &[ErrorKind::Invalid], &what)?;
    }
    let listed = listed(c).await?;
    ensure!(listed.is_empty(), "nothing may be left of a refused create, there is {listed:?}");
    Ok(())
}

pub(super) async fn net_create_unsupported(c: &Context<'_>) -> Check {
    let can = c.network()?.capabilities();
    let kinds = [
        (can.vlan, NetworkKind::Vlan { bridge: "br0".to_owned(), vlan: 7 }),
        (can.routed, NetworkKind::Routed { cidr: ([198, 51, 100, 0].into(), 24), gateway: [198, 51, 100, 1].into() }),
        (can.isolated, NetworkKind::Isolated),
    ];
    for (_, kind) in kinds.into_iter().filter(|(able, _)| !able) {
        let what = format!("{kind:?} without the capability");
        let spec = NetworkSpec { tags: c.tags(), name: c.name("a")?, kind };
        fails(c.network()?.create_network(&spec).await, &[ErrorKind::Unsupported], &what)?;
    }
    let listed = listed(c).await?;
    ensure!(listed.is_empty(), "nothing may be left of a refused create, there is {listed:?}");
    Ok(())
}

pub(super) async fn net_get_missing(c: &Context<'_>) -> Check {
    fails(c.network()?.get_network(NetworkId::random()).await, &[ErrorKind::NotFound], "an id that nobody has")?;
    Ok(())
}

pub(super) async fn net_list_filter(c: &Context<'_>) -> Check {
    let spec_a = spec(c, "a")?;
    let one = c.network()?.create_network(&spec_a).await?.id;
    let other_scope = Tags { scope: c.other_scope(), ..c.tags() };
    // One kind of network may be there only once (a VLAN, a range of addresses), so there are no more than two; the second
    // is of another kind where one is given.
    let second = match &c.subject.network_kind {
        Some(_) => None,
        None => Some(c.network()?.create_network(&NetworkSpec { tags: other_scope, ..spec(c, "ab")? }).await?.id),
    };
    let (owner, scope, name) = (Some(c.subject.owner.clone()), Some(c.scope()), Some(spec_a.name.clone()));
    let nobody = NetworkFilter { owner: Some(c.other_owner()?), ..NetworkFilter::default() };
    let rows = [
        ("owner", NetworkFilter { owner: owner.clone(), ..NetworkFilter::default() }, [true, true]),
        ("scope", NetworkFilter { scope: scope.clone(), ..NetworkFilter::default() }, [true, false]),
        ("name", NetworkFilter { name: name.clone(), ..NetworkFilter::default() }, [true, false]),
        ("owner, scope and name", NetworkFilter { owner, scope, name }, [true, false]),
        ("nothing", NetworkFilter::default(), [true, true]),
        ("an owner of nothing", nobody, [false, false]),
    ];
    for (what, filter, wanted) in rows {
        let listed = c.network()?.list_networks(&filter).await?;
        let has = |id| listed.iter().any(|network: &Network| network.id == id);
        let found = [has(one), second.map_or(wanted[1], has)];
        ensure!(found == wanted, "filtered by {what}: of two networks {found:?} are listed instead of {wanted:?}");
        let strange = listed.iter().find(|network| !filter.matches(network));
        ensure!(strange.is_none(), "filtered by {what}: {strange:?} does not match");
    }
    Ok(())
}

pub(super) async fn net_delete_gone(c: &Context<'_>) -> Check {
    let id = c.network()?.create_network(&spec(c, "a")?).await?.id;
    let deletion = c.network()?.delete_network(id).await?;
    ensure!(deletion == Deletion::Deleted, "deleting a network that is there gave {deletion:?}");
    fails(c.network()?.get_network(id).await, &[ErrorKind::NotFound], "a deleted network")?;
    let listed = listed(c).await?;
    ensure!(listed.is_empty(), "a deleted network is listed: {listed:?}");
    for id in [id, NetworkId::random()] {
        let deletion = c.network()?.delete_network(id).await?;
        ensure!(deletion == Deletion::AlreadyGone, "deleting what is not there gave {deletion:?}");
    }
    Ok(())
}

pub(super) async fn net_access_missing(c: &Context<'_>) -> Check {
    let result = c.network()?.set_access(VmId::random(), &Access::Closed).await;
    fails(result, &[ErrorKind::NotFound], "a machine that does not exist")?;
    Ok(())
}

pub(super) async fn net_access_set(c: &Context<'_>) -> Check {
    let vm = c.running("a").await?.id;
    let only = Access::Only(vec![[198, 51, 100, 7].into()]);
    for access in [Access::Closed, only.clone(), only, Access::Open] {
        c.network()?.set_access(vm, &access).await?;
    }
    Ok(())
}

pub(super) async fn net_access_unsupported(c: &Context<'_>) -> Check {
    let result = c.network()?.set_access(VmId::random(), &Access::Closed).await;
    fails(result, &[ErrorKind::Unsupported], "access without the capability")?;
    Ok(())
}
