//! Machines made, found, switched and deleted wrongly.

use super::{invented, lock, mutants, renamed, swap};
use crate::{
    ComputeBackend, ComputeBackendExt, Deletion, Error, ErrorKind, PowerAction, RequestId, Result, Tags, Vm, VmFilter,
    VmSpec, VmState, memory::MemoryCloud,
};

/// The machine that a request made.
async fn made_by(cloud: &MemoryCloud, tags: &Tags) -> Result<Option<Vm>> {
    let vms = cloud.list_vms(&VmFilter::owned_by(&tags.owner)).await?;
    Ok(vms.into_iter().find(|vm| vm.is_made_by(&tags.request)))
}

/// A machine that the backend must refuse to make, made all the same under a name and a request of its own.
async fn another(cloud: &MemoryCloud, spec: &VmSpec) -> Result<Vm> {
    let tags = Tags { request: RequestId::random(), ..spec.tags.clone() };
    let vm = cloud.create_vm(&VmSpec { tags, name: renamed(&spec.name), ..spec.clone() }).await?;
    Ok(Vm { name: spec.name.clone(), tags: Some(spec.tags.clone()), ..vm })
}

async fn state(cloud: &MemoryCloud, id: crate::VmId) -> Option<VmState> {
    cloud.find_vm(id).await.ok().flatten().map(|vm| vm.state)
}

mutants! { Compute
    "a machine is listed only once it runs" fails [
        vm_create_visible vm_create_keeps_tags vm_create_race vm_create_request_reused vm_create_name_taken
        vm_create_name_other_scope vm_list_filter
    ] {
        list_vms: |w, filter| {
            let vms = w.cloud().list_vms(&filter).await?;
            Ok(vms.into_iter().filter(|vm| vm.state != VmState::Building).collect())
        }
    }
    "a machine is not found while it builds" fails [
        vm_create_visible vm_create_keeps_tags vm_create_repeat vm_create_request_reused vm_create_name_other_scope
        vm_create_nics vm_power_repeat vm_power_cycle vm_power_reboot vm_power_reboot_stopped vm_delete_gone
        vm_delete_race vm_delete_frees_name net_access_set image_capture_visible guest_info_stopped guest_booting
        guest_rebooted guest_agent_absent guest_fence_reboot
    ] {
        get_vm: |w, id| match w.cloud().get_vm(id).await? {
            Vm { state: VmState::Building, .. } => Err(Error::not_found("not yet")),
            vm => Ok(vm),
        }
    }
    "get_vm loses the tags" fails [vm_create_keeps_tags] {
        get_vm: |w, id| Ok(Vm { tags: None, ..w.cloud().get_vm(id).await? })
    }
    "the name that comes back is the backend's own" fails [vm_create_keeps_tags] {
        get_vm: |w, id| {
            let vm = w.cloud().get_vm(id).await?;
            Ok(Vm { name: renamed(&vm.name), ..vm })
        }
    }
    "half of the memory comes back" fails [vm_create_keeps_tags] {
        get_vm: |w, id| {
            let vm = w.cloud().get_vm(id).await?;
            Ok(Vm { ram_bytes: vm.ram_bytes / 2, ..vm })
        }
    }
    "one cpu more than asked for" fails [vm_create_keeps_tags] {
        get_vm: |w, id| {
            let vm = w.cloud().get_vm(id).await?;
            Ok(Vm { cpus: vm.cpus + 1, ..vm })
        }
    }
    "a repeat makes a second machine" fails [vm_create_repeat vm_create_race] {
        create_vm: |w, spec| {
            let seen = lock(&w.0.specs).contains(&spec);
            if seen {
                return another(w.cloud(), &spec).await;
            }
            lock(&w.0.specs).push(spec.clone());
            w.cloud().create_vm(&spec).await
        }
    }
    "a repeat is an error" fails [vm_create_repeat vm_create_race] {
        create_vm: |w, spec| match made_by(w.cloud(), &spec.tags).await? {
            Some(_) => Err(Error::new(ErrorKind::AlreadyExists, "it exists")),
            None => w.cloud().create_vm(&spec).await,
        }
    }
    "two at once make two machines" fails [vm_create_race] {
        create_vm: |w, spec| {
            let before = made_by(w.cloud(), &spec.tags).await?;
            tokio::task::yield_now().await;
            match (before, made_by(w.cloud(), &spec.tags).await?) {
                (None, Some(_)) => another(w.cloud(), &spec).await,
                _ => w.cloud().create_vm(&spec).await,
            }
        }
    }
    "a reused request returns the old machine" fails [vm_create_request_reused] {
        create_vm: |w, spec| match made_by(w.cloud(), &spec.tags).await? {
            Some(vm) => Ok(vm),
            None => w.cloud().create_vm(&spec).await,
        }
    }
    "a reused request makes another machine, then says no" fails [vm_create_request_reused] {
        create_vm: |w, spec| {
            let result = w.cloud().create_vm(&spec).await;
            if result.is_err() && made_by(w.cloud(), &spec.tags).await?.is_some() {
                another(w.cloud(), &spec).await?;
            }
            result
        }
    }
    "only the name of a repeat is compared" fails [vm_create_request_reused] {
        create_vm: |w, spec| match made_by(w.cloud(), &spec.tags).await? {
            Some(vm) if vm.name == spec.name => Ok(vm),
            _ => w.cloud().create_vm(&spec).await,
        }
    }
    "names may be given twice" fails [vm_create_name_taken] {
        create_vm: |w, spec| {
            let known = made_by(w.cloud(), &spec.tags).await?.is_some();
            match w.cloud().create_vm(&spec).await {
                Err(error) if error.kind() == ErrorKind::AlreadyExists && !known => another(w.cloud(), &spec).await,
                result => result,
            }
        }
    }
    "a taken name is a conflict" fails [vm_create_name_taken] {
        create_vm: |w, spec| {
            let known = made_by(w.cloud(), &spec.tags).await?.is_some();
            let result = w.cloud().create_vm(&spec).await;
            if known { result } else { swap(result, ErrorKind::AlreadyExists, ErrorKind::Conflict) }
        }
    }
    "names are one's owner's, whatever the scope" fails [vm_create_name_other_scope] {
        create_vm: |w, spec| {
            let filter = VmFilter { name: Some(spec.name.clone()), ..VmFilter::owned_by(&spec.tags.owner) };
            let taken = w.cloud().list_vms(&filter).await?;
            match taken.iter().any(|vm| vm.tags.as_ref().is_some_and(|tags| tags.scope != spec.tags.scope)) {
                true => Err(Error::new(ErrorKind::AlreadyExists, "taken in another scope")),
                false => w.cloud().create_vm(&spec).await,
            }
        }
    }
    "an unknown image is our own fault" fails [vm_create_unknown_image] {
        create_vm: |w, spec| match invented(spec.image.as_uuid()) {
            true => Err(Error::internal(format!("image {} cannot be read", spec.image))),
            false => w.cloud().create_vm(&spec).await,
        }
    }
    "an unknown image or network is not named" fails [vm_create_unknown_image vm_create_unknown_network] {
        create_vm: |w, spec| {
            let result = w.cloud().create_vm(&spec).await;
            result.map_err(|error| match error.kind() {
                ErrorKind::NotFound => Error::not_found("something is missing"),
                _ => error,
            })
        }
    }
    "a machine of an unknown image is left" fails [vm_create_unknown_image] {
        create_vm: |w, spec| {
            let result = w.cloud().create_vm(&spec).await;
            if invented(spec.image.as_uuid()) {
                w.cloud().create_vm(&VmSpec { image: MemoryCloud::tiny(), ..spec }).await?;
            }
            result
        }
    }
    "a machine on an unknown network is left" fails [vm_create_unknown_network] {
        create_vm: |w, spec| {
            let result = w.cloud().create_vm(&spec).await;
            if spec.links.iter().any(|link| invented(link.as_uuid())) {
                w.cloud().create_vm(&VmSpec { links: Vec::new(), ..spec }).await?;
            }
            result
        }
    }
    "unknown networks are passed over" fails [vm_create_unknown_network] {
        create_vm: |w, mut spec| {
            spec.links.retain(|link| !invented(link.as_uuid()));
            w.cloud().create_vm(&spec).await
        }
    }
    "impossible sizes are made possible" fails [vm_create_bad_size] {
        create_vm: |w, mut spec| {
            let can = ComputeBackend::capabilities(w.cloud());
            spec.cpus = spec.cpus.clamp(1, can.max_cpus);
            spec.ram_bytes = spec.ram_bytes.clamp(VmSpec::MIN_RAM_BYTES, can.max_ram_bytes);
            w.cloud().create_vm(&spec).await
        }
    }
    "impossible sizes are used up quota" fails [vm_create_bad_size] {
        create_vm: |w, spec| swap(w.cloud().create_vm(&spec).await, ErrorKind::Invalid, ErrorKind::Exhausted)
    }
    "a machine of an impossible size is left" fails [vm_create_bad_size] {
        create_vm: |w, spec| {
            let result = w.cloud().create_vm(&spec).await;
            if spec.cpus == 0 {
                w.cloud().create_vm(&VmSpec { cpus: 1, ..spec }).await?;
            }
            result
        }
    }
    "NICs are in the opposite order" fails [vm_create_nics] {
        get_vm: |w, id| {
            let mut vm = w.cloud().get_vm(id).await?;
            vm.nics.reverse();
            Ok(vm)
        }
    }
    "only the first link gets a NIC" fails [vm_create_nics] {
        create_vm: |w, mut spec| {
            let known = spec.links.iter().all(|link| !invented(link.as_uuid()));
            spec.links.truncate(if known { 1 } else { spec.links.len() });
            w.cloud().create_vm(&spec).await
        }
    }
    "links without the capability are passed over" (less) fails [vm_create_nics_unsupported] {
        create_vm: |w, spec| w.cloud().create_vm(&VmSpec { links: Vec::new(), ..spec }).await
    }
    "what does not exist is our own fault" fails [vm_get_missing] {
        get_vm: |w, id| match invented(id.as_uuid()) {
            true => Err(Error::internal("no such machine")),
            false => w.cloud().get_vm(id).await,
        }
    }
    "the list ignores the owner" fails [vm_list_filter] {
        list_vms: |w, filter| w.cloud().list_vms(&VmFilter { owner: None, ..filter }).await
    }
    "the list ignores the scope" fails [
        vm_create_name_other_scope vm_list_filter
    ] {
        list_vms: |w, filter| w.cloud().list_vms(&VmFilter { scope: None, ..filter }).await
    }
    "the list ignores the name" fails [vm_list_filter] {
        list_vms: |w, filter| w.cloud().list_vms(&VmFilter { name: None, ..filter }).await
    }
    "the list takes a name for a beginning" fails [vm_list_filter] {
        list_vms: |w, filter| {
            let vms = w.cloud().list_vms(&VmFilter { name: None, ..filter.clone() }).await?;
            let begins = |vm: &Vm| filter.name.as_ref().is_none_or(|name| vm.name.as_str().starts_with(name.as_str()));
            Ok(vms.into_iter().filter(begins).collect())
        }
    }
    "an empty list is an error" fails [
        vm_create_unknown_image vm_create_unknown_network vm_create_bad_size vm_list_empty vm_delete_gone leaves_nothing
    ] {
        list_vms: |w, filter| {
            let vms = w.cloud().list_vms(&filter).await?;
            if vms.is_empty() { Err(Error::not_found("nothing matches")) } else { Ok(vms) }
        }
    }
    "power over nothing is fine" fails [vm_power_missing] {
        set_power: |w, (id, action)| match w.cloud().set_power(id, action).await {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }
    "starting what runs is a conflict" fails [vm_power_repeat] {
        set_power: |w, (id, action)| match (action, state(w.cloud(), id).await) {
            (PowerAction::Start, Some(VmState::Running)) => Err(Error::new(ErrorKind::Conflict, "it runs")),
            _ => w.cloud().set_power(id, action).await,
        }
    }
    "stopping what is stopped starts it" fails [vm_power_repeat] {
        set_power: |w, (id, action)| match (action, state(w.cloud(), id).await) {
            (PowerAction::Stop { .. }, Some(VmState::Stopped)) => w.cloud().set_power(id, PowerAction::Start).await,
            _ => w.cloud().set_power(id, action).await,
        }
    }
    "stop does nothing" fails [vm_power_repeat vm_power_cycle vm_power_reboot_stopped guest_info_stopped] {
        set_power: |w, (id, action)| match (action, state(w.cloud(), id).await) {
            (PowerAction::Stop { .. }, Some(_)) => Ok(()),
            _ => w.cloud().set_power(id, action).await,
        }
    }
    "start does nothing" fails [vm_power_cycle] {
        set_power: |w, (id, action)| match (action, state(w.cloud(), id).await) {
            (PowerAction::Start, Some(_)) => Ok(()),
            _ => w.cloud().set_power(id, action).await,
        }
    }
    "a reboot does nothing" fails [guest_rebooted guest_fence_reboot] {
        set_power: |w, (id, action)| match (action, state(w.cloud(), id).await) {
            (PowerAction::Reboot { .. }, Some(VmState::Running)) => Ok(()),
            _ => w.cloud().set_power(id, action).await,
        }
    }
    "a reboot ends switched off" fails [vm_power_reboot guest_rebooted guest_fence_reboot] {
        set_power: |w, (id, action)| match (action, state(w.cloud(), id).await) {
            (PowerAction::Reboot { grace }, Some(VmState::Running)) => {
                w.cloud().set_power(id, PowerAction::Stop { grace }).await
            }
            _ => w.cloud().set_power(id, action).await,
        }
    }
    "a stopped machine is rebooted" fails [vm_power_reboot_stopped] {
        set_power: |w, (id, action)| match (action, state(w.cloud(), id).await) {
            (PowerAction::Reboot { .. }, Some(VmState::Stopped)) => w.cloud().set_power(id, PowerAction::Start).await,
            _ => w.cloud().set_power(id, action).await,
        }
    }
    "a refused reboot starts the machine" fails [vm_power_reboot_stopped] {
        set_power: |w, (id, action)| {
            let result = w.cloud().set_power(id, action).await;
            if let (PowerAction::Reboot { .. }, Err(_), true) = (action, &result, !invented(id.as_uuid())) {
                w.cloud().set_power(id, PowerAction::Start).await?;
            }
            result
        }
    }
    "power without the capability is fine" (less) fails [vm_power_unsupported] {
        set_power: |_, _| Ok(())
    }
    "power without the capability looks for the machine first" (less) fails [vm_power_unsupported] {
        set_power: |_, _| Err(Error::not_found("no such machine"))
    }
    "delete does nothing" fails [vm_delete_gone vm_delete_missing vm_delete_race vm_delete_frees_name leaves_nothing] {
        delete_vm: |w, id| match state(w.cloud(), id).await {
            Some(_) => Ok(Deletion::Deleted),
            None => Ok(Deletion::AlreadyGone),
        }
    }
    "a deleted machine stays in the list" fails [vm_delete_gone leaves_nothing] {
        delete_vm: |w, id| {
            if let Some(vm) = w.cloud().find_vm(id).await? {
                lock(&w.0.vms).push(vm);
            }
            w.cloud().delete_vm(id).await
        },
        list_vms: |w, filter| {
            let mut vms = w.cloud().list_vms(&filter).await?;
            for ghost in lock(&w.0.vms).iter().filter(|ghost| filter.matches(ghost)) {
                if vms.iter().all(|vm| vm.id != ghost.id) {
                    vms.push(ghost.clone());
                }
            }
            Ok(vms)
        }
    }
    "deleting what is gone is an error" fails [vm_delete_missing] {
        delete_vm: |w, id| match w.cloud().delete_vm(id).await? {
            Deletion::AlreadyGone => Err(Error::not_found("no such machine")),
            deleted => Ok(deleted),
        }
    }
    "deleting what never was is called a deletion" fails [vm_delete_missing] {
        delete_vm: |w, id| match invented(id.as_uuid()) {
            true => Ok(Deletion::Deleted),
            false => w.cloud().delete_vm(id).await,
        }
    }
    "deleting what is being deleted is a conflict" fails [vm_delete_race] {
        delete_vm: |w, id| match state(w.cloud(), id).await {
            Some(VmState::Deleting) => Err(Error::new(ErrorKind::Conflict, "it is being deleted")),
            _ => w.cloud().delete_vm(id).await,
        }
    }
    "a deleted machine's name stays taken" fails [vm_delete_frees_name] {
        create_vm: |w, spec| {
            let same = |old: &VmSpec| {
                old.name == spec.name && old.tags.scope == spec.tags.scope && old.tags.owner == spec.tags.owner
            };
            let taken = lock(&w.0.specs).iter().any(|old| same(old) && old.tags.request != spec.tags.request);
            lock(&w.0.specs).push(spec.clone());
            match taken {
                true => Err(Error::new(ErrorKind::AlreadyExists, "the name was used before")),
                false => w.cloud().create_vm(&spec).await,
            }
        }
    }
}
