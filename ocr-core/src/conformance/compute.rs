//! Cases of [`ComputeBackend`](crate::ComputeBackend).

use super::context::{Check, Context, ensure, fails};
use crate::{
    ComputeBackendExt, Deletion, ErrorKind, ImageId, NetworkId, PowerAction, Tags, VmFilter, VmId, VmSpec, VmState,
};

const STOP: PowerAction = PowerAction::Stop { grace: None };
const REBOOT: PowerAction = PowerAction::Reboot { grace: None };

async fn nothing_made(c: &Context<'_>) -> Check {
    let listed = c.listed().await?;
    ensure!(listed.is_empty(), "nothing may be left of a refused create, there is {listed:?}");
    Ok(())
}

async fn only(c: &Context<'_>, id: VmId) -> Check {
    let listed = c.listed().await?;
    ensure!(listed.len() == 1 && listed[0].id == id, "there must be one machine, {id}; listed are {listed:?}");
    Ok(())
}

pub(super) async fn vm_create_visible(c: &Context<'_>) -> Check {
    let vm = c.create(&c.spec("a")?).await?;
    let seen = c.compute()?.get_vm(vm.id).await?;
    ensure!(seen.id == vm.id, "get_vm({}) gave the machine {}", vm.id, seen.id);
    only(c, vm.id).await
}

pub(super) async fn vm_create_keeps_tags(c: &Context<'_>) -> Check {
    let spec = c.spec("a")?;
    let created = c.create(&spec).await?;
    let got = c.compute()?.get_vm(created.id).await?;
    let listed = c.listed().await?;
    for (from, vm) in
        [("create_vm", &created), ("get_vm", &got)].into_iter().chain(listed.iter().map(|vm| ("list_vms", vm)))
    {
        ensure!(vm.tags.as_ref() == Some(&spec.tags), "{from}: tags {:?} instead of {:?}", vm.tags, spec.tags);
        ensure!(vm.name == spec.name, "{from}: name {:?} instead of {:?}", vm.name, spec.name);
        ensure!(vm.cpus == spec.cpus, "{from}: {} cpus instead of {}", vm.cpus, spec.cpus);
        // Backends round up to their own unit, the largest of which is a MiB.
        let most = spec.ram_bytes.next_multiple_of(1 << 20);
        ensure!(
            (spec.ram_bytes..=most).contains(&vm.ram_bytes),
            "{from}: {} bytes of memory instead of {}",
            vm.ram_bytes,
            spec.ram_bytes
        );
    }
    ensure!(!listed.is_empty(), "list_vms does not have the machine");
    Ok(())
}

pub(super) async fn vm_create_repeat(c: &Context<'_>) -> Check {
    let spec = c.spec("a")?;
    let first = c.create(&spec).await?;
    let second = c.create(&spec).await?;
    ensure!(first.id == second.id, "a repeat gave {} after {}", second.id, first.id);
    c.becomes(first.id, VmState::Running).await?;
    let third = c.create(&spec).await?;
    ensure!(first.id == third.id, "a repeat after the boot gave {} after {}", third.id, first.id);
    only(c, first.id).await
}

pub(super) async fn vm_create_race(c: &Context<'_>) -> Check {
    let spec = c.spec("a")?;
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..2 {
        let (compute, spec) = (c.compute()?.clone(), spec.clone());
        calls.spawn(async move { compute.create_vm(&spec).await });
    }
    let mut ids = Vec::new();
    for result in calls.join_all().await {
        let id = result?.id;
        c.keep(id);
        ids.push(id);
    }
    ensure!(ids[0] == ids[1], "two at once gave two machines, {ids:?}");
    only(c, ids[0]).await
}

pub(super) async fn vm_create_request_reused(c: &Context<'_>) -> Check {
    let spec = c.spec("a")?;
    let vm = c.create(&spec).await?;
    let before = c.compute()?.get_vm(vm.id).await?;
    let other_name = VmSpec { name: c.name("b")?, ..spec.clone() };
    let less = spec.ram_bytes.saturating_sub(16 << 20);
    let ram_bytes = if less >= VmSpec::MIN_RAM_BYTES { less } else { spec.ram_bytes + (16 << 20) };
    let other_size = VmSpec { ram_bytes, ..spec.clone() };
    for (other, what) in
        [(other_name, "the same request for another name"), (other_size, "the same request for another size")]
    {
        let result = c.compute()?.create_vm(&other).await;
        result.iter().for_each(|made| c.keep(made.id));
        fails(result, &[ErrorKind::AlreadyExists], what)?;
    }
    let after = c.compute()?.get_vm(vm.id).await?;
    ensure!(
        (after.name.as_str(), after.ram_bytes) == (before.name.as_str(), before.ram_bytes),
        "the machine was changed from {before:?} to {after:?}"
    );
    only(c, vm.id).await
}

pub(super) async fn vm_create_name_taken(c: &Context<'_>) -> Check {
    let spec = c.spec("a")?;
    let vm = c.create(&spec).await?;
    let result = c.compute()?.create_vm(&VmSpec { tags: c.tags(), ..spec }).await;
    result.iter().for_each(|made| c.keep(made.id));
    fails(result, &[ErrorKind::AlreadyExists], "a name under another request")?;
    only(c, vm.id).await
}

pub(super) async fn vm_create_name_other_scope(c: &Context<'_>) -> Check {
    let spec = c.spec("a")?;
    let one = c.create(&spec).await?;
    let two = c.create(&VmSpec { tags: Tags { scope: c.other_scope(), ..c.tags() }, ..spec }).await?;
    ensure!(one.id != two.id, "another scope gave the same machine");
    c.compute()?.get_vm(two.id).await?;
    only(c, one.id).await
}

pub(super) async fn vm_create_unknown_image(c: &Context<'_>) -> Check {
    let image = ImageId::random();
    let result = c.compute()?.create_vm(&VmSpec { image, ..c.spec("a")? }).await;
    let error = fails(result, &[ErrorKind::NotFound], "an unknown image")?;
    ensure!(error.to_string().contains(&image.to_string()), "the error must name the image {image}: {error}");
    nothing_made(c).await
}

pub(super) async fn vm_create_unknown_network(c: &Context<'_>) -> Check {
    let link = NetworkId::random();
    // The known one comes first: what was made for it must go again.
    let links = c.subject.links.iter().take(1).copied().chain([link]).collect();
    let result = c.compute()?.create_vm(&VmSpec { links, ..c.spec("a")? }).await;
    let error = fails(result, &[ErrorKind::NotFound], "an unknown network")?;
    ensure!(error.to_string().contains(&link.to_string()), "the error must name the network {link}: {error}");
    nothing_made(c).await
}

pub(super) async fn vm_create_bad_size(c: &Context<'_>) -> Check {
    let can = c.compute()?.capabilities();
    let spec = c.spec("a")?;
    let bad = [
        (VmSpec { cpus: 0, ..spec.clone() }, "no cpu"),
        (VmSpec { ram_bytes: 0, ..spec.clone() }, "no memory"),
        (VmSpec { cpus: can.max_cpus.saturating_add(1), ..spec.clone() }, "too many cpus"),
        (VmSpec { ram_bytes: can.max_ram_bytes.saturating_add(1), ..spec }, "too much memory"),
    ];
    for (spec, what) in bad {
        let (cpus, ram_bytes) = (spec.cpus, spec.ram_bytes);
        if cpus == u32::MAX || ram_bytes == u64::MAX {
            // A backend without a limit of its own: there is nothing above it.
            continue;
        }
        let result = c.compute()?.create_vm(&spec).await;
        result.iter().for_each(|made| c.keep(made.id));
        fails(result, &[ErrorKind::Invalid], what)?;
    }
    nothing_made(c).await
}

pub(super) async fn vm_create_nics(c: &Context<'_>) -> Check {
    let links: Vec<_> = c.subject.links.iter().take(2).rev().copied().collect();
    let spec = VmSpec { links: links.clone(), ..c.spec("a")? };
    let vm = c.create(&spec).await?;
    c.becomes(vm.id, VmState::Running).await?;
    let nics = c.compute()?.get_vm(vm.id).await?.nics;
    ensure!(nics.len() == links.len(), "{} NICs for {} links: {nics:?}", nics.len(), links.len());
    for (nic, link) in nics.iter().zip(&links) {
        ensure!(nic.network.is_none_or(|network| network == *link), "NICs {nics:?} for the links {links:?}");
    }
    Ok(())
}

pub(super) async fn vm_create_nics_unsupported(c: &Context<'_>) -> Check {
    let link = c.subject.links.first().copied().unwrap_or_else(NetworkId::random);
    let result = c.compute()?.create_vm(&VmSpec { links: vec![link], ..c.spec("a")? }).await;
    result.iter().for_each(|made| c.keep(made.id));
    fails(result, &[ErrorKind::Unsupported], "a link without the capability nics")?;
    nothing_made(c).await
}

pub(super) async fn vm_get_missing(c: &Context<'_>) -> Check {
    fails(c.compute()?.get_vm(VmId::random()).await, &[ErrorKind::NotFound], "an id that nobody has")?;
    Ok(())
}

pub(super) async fn vm_list_filter(c: &Context<'_>) -> Check {
    let spec = c.spec("a")?;
    let one = c.create(&spec).await?.id;
    let other_scope = Tags { scope: c.other_scope(), ..c.tags() };
    let two = c.create(&VmSpec { tags: other_scope, name: c.name("ab")?, ..spec.clone() }).await?.id;
    let other_owner = Tags { owner: c.other_owner()?, ..c.tags() };
    let three = c.create(&VmSpec { tags: other_owner, ..spec.clone() }).await?.id;
    let (owner, scope, name) = (Some(c.subject.owner.clone()), Some(c.scope()), Some(spec.name));
    let rows = [
        ("owner", VmFilter { owner: owner.clone(), ..VmFilter::default() }, [true, true, false]),
        ("scope", VmFilter { scope: scope.clone(), ..VmFilter::default() }, [true, false, true]),
        ("name", VmFilter { name: name.clone(), ..VmFilter::default() }, [true, false, true]),
        ("owner, scope and name", VmFilter { owner, scope, name }, [true, false, false]),
        ("nothing", VmFilter::default(), [true, true, true]),
    ];
    for (what, filter, wanted) in rows {
        let listed = c.compute()?.list_vms(&filter).await?;
        let found = [one, two, three].map(|id| listed.iter().any(|vm| vm.id == id));
        ensure!(found == wanted, "filtered by {what}: of three machines {found:?} are listed instead of {wanted:?}");
        let strange = listed.iter().find(|vm| !filter.matches(vm));
        ensure!(strange.is_none(), "filtered by {what}: {strange:?} does not match");
    }
    Ok(())
}

pub(super) async fn vm_list_empty(c: &Context<'_>) -> Check {
    let name = Some(c.name("nobody")?);
    let listed = c.compute()?.list_vms(&VmFilter { name, ..VmFilter::default() }).await?;
    ensure!(listed.is_empty(), "a name that nobody has lists {listed:?}");
    let listed =
        c.compute()?.list_vms(&VmFilter { scope: Some(c.scope()), ..VmFilter::owned_by(&c.subject.owner) }).await?;
    ensure!(listed.is_empty(), "a scope with nothing in it lists {listed:?}");
    Ok(())
}

pub(super) async fn vm_power_missing(c: &Context<'_>) -> Check {
    for action in [PowerAction::Start, STOP, REBOOT] {
        let result = c.compute()?.set_power(VmId::random(), action).await;
        fails(result, &[ErrorKind::NotFound], &format!("{action:?} of an id that nobody has"))?;
    }
    Ok(())
}

pub(super) async fn vm_power_repeat(c: &Context<'_>) -> Check {
    let vm = c.running("a").await?.id;
    c.compute()?.set_power(vm, PowerAction::Start).await?;
    let state = c.compute()?.get_vm(vm).await?.state;
    ensure!(state == VmState::Running, "starting what runs made it {state}");
    c.compute()?.set_power(vm, STOP).await?;
    c.becomes(vm, VmState::Stopped).await?;
    c.compute()?.set_power(vm, STOP).await?;
    let state = c.compute()?.get_vm(vm).await?.state;
    ensure!(state == VmState::Stopped, "stopping what is stopped made it {state}");
    Ok(())
}

pub(super) async fn vm_power_cycle(c: &Context<'_>) -> Check {
    let vm = c.running("a").await?.id;
    c.compute()?.set_power(vm, STOP).await?;
    c.becomes(vm, VmState::Stopped).await?;
    c.compute()?.set_power(vm, PowerAction::Start).await?;
    c.becomes(vm, VmState::Running).await?;
    only(c, vm).await
}

pub(super) async fn vm_power_reboot(c: &Context<'_>) -> Check {
    let vm = c.running("a").await?.id;
    c.compute()?.set_power(vm, REBOOT).await?;
    c.becomes(vm, VmState::Running).await?;
    only(c, vm).await
}

pub(super) async fn vm_power_reboot_stopped(c: &Context<'_>) -> Check {
    let vm = c.running("a").await?.id;
    c.compute()?.set_power(vm, STOP).await?;
    c.becomes(vm, VmState::Stopped).await?;
    fails(c.compute()?.set_power(vm, REBOOT).await, &[ErrorKind::Conflict], "rebooting a stopped machine")?;
    let state = c.compute()?.get_vm(vm).await?.state;
    ensure!(state == VmState::Stopped, "a refused reboot made it {state}");
    Ok(())
}

pub(super) async fn vm_power_unsupported(c: &Context<'_>) -> Check {
    for action in [PowerAction::Start, STOP, REBOOT] {
        let result = c.compute()?.set_power(VmId::random(), action).await;
        fails(result, &[ErrorKind::Unsupported], &format!("{action:?} without the capability power"))?;
    }
    Ok(())
}

pub(super) async fn vm_delete_gone(c: &Context<'_>) -> Check {
    let vm = c.running("a").await?.id;
    let deletion = c.compute()?.delete_vm(vm).await?;
    ensure!(deletion == Deletion::Deleted, "deleting a machine that is there gave {deletion:?}");
    c.goes(vm).await?;
    nothing_made(c).await
}

pub(super) async fn vm_delete_missing(c: &Context<'_>) -> Check {
    let deletion = c.compute()?.delete_vm(VmId::random()).await?;
    ensure!(deletion == Deletion::AlreadyGone, "deleting an id that nobody has gave {deletion:?}");
    let vm = c.create(&c.spec("a")?).await?.id;
    c.compute()?.delete_vm(vm).await?;
    c.goes(vm).await?;
    let deletion = c.compute()?.delete_vm(vm).await?;
    ensure!(deletion == Deletion::AlreadyGone, "deleting what is gone gave {deletion:?}");
    Ok(())
}

pub(super) async fn vm_delete_race(c: &Context<'_>) -> Check {
    let vm = c.running("a").await?.id;
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..2 {
        let compute = c.compute()?.clone();
        calls.spawn(async move { compute.delete_vm(vm).await });
    }
    for result in calls.join_all().await {
        result?;
    }
    c.goes(vm).await
}

pub(super) async fn vm_delete_frees_name(c: &Context<'_>) -> Check {
    let spec = c.spec("a")?;
    let old = c.create(&spec).await?.id;
    c.compute()?.delete_vm(old).await?;
    c.goes(old).await?;
    let new = c.create(&VmSpec { tags: c.tags(), ..spec }).await?.id;
    let seen = c.compute()?.find_vm(new).await?;
    ensure!(seen.is_some() && new != old, "the name gave the machine {new} after {old}, seen as {seen:?}");
    Ok(())
}
