//! Whether hardware virtualisation really works here: [`DomainType::Auto`](crate::config::DomainType::Auto).
//!
//! libvirt offers KVM where QEMU could open `/dev/kvm`. That says nothing: there are hosts where guests then hang in
//! their first kernel. So a tiny guest (`guest.s`) is run, which marks its disk after doing what kernels do and
//! a tenth of a second's work; without the mark in time, machines are run by emulation.

use std::time::{Duration, Instant};

use ocr_core::{DiskFormat, Error, Result};
use uuid::Uuid;
use virt::{connect::Connect, storage_pool::StoragePool, storage_vol::StorageVol, stream::Stream, sys};

use crate::{
    backend::{delete_volume, found, pool},
    config::{Config, CpuMode},
    door::{Call, Door, Effect, Lane, Trouble},
    image::{receive, send, through},
    xml::{
        domain::probe_xml,
        volume::{Role, Seen, Volume, probe_name},
    },
};

/// The guest: one sector.
const GUEST: &[u8; SECTOR_BYTES] = include_bytes!("probe.bin");
const SECTOR_BYTES: usize = 512;
const DISK_BYTES: u64 = 64 << 10;
/// What it fills its second sector with.
const MARK: &[u8] = b"OCR!";
/// How long it may take: on hardware it takes a second, most of it the BIOS.
const DEADLINE: Duration = Duration::from_secs(10);
/// Leftovers of a process that was killed are deleted when they are as old as this.
const STALE_S: u64 = 600;

/// Whether a guest made real progress on KVM.
pub(crate) async fn kvm_runs(door: &Door, config: &Config) -> Result<bool> {
    let call = Call {
        operation: "libvirt.probe",
        lane: Lane::Bulk,
        effect: Effect::Some,
        deadline: config.create_deadline + DEADLINE,
    };
    let (pool_name, cpu) = (config.pool.clone(), config.cpu);
    let result = door.call(call, move |connect| probe(connect, &pool_name, cpu)).await;
    let runs = result.map_err(|trouble| trouble.into_error().during("libvirt.probe"))?;
    tracing::info!(kvm = runs, "looked whether guests run on hardware");
    Ok(runs)
}

fn probe(connect: &Connect, pool_name: &str, cpu: CpuMode) -> Result<bool, Trouble> {
    // Where libvirt does not even offer it there is nothing to try.
    if connect.domain_capabilities(None, Some("x86_64"), Some("pc"), Some("kvm"), 0).is_err() {
        return Ok(false);
    }
    let pool = pool(connect, pool_name)?;
    clear(&pool)?;
    let id = Uuid::new_v4();
    let name = probe_name(id);
    let wanted = Volume { name: &name, capacity_bytes: DISK_BYTES, format: DiskFormat::Raw, backing: None };
    let disk = StorageVol::create_xml(&pool, &wanted.xml()?, 0)?;
    let verdict = run(connect, &disk, id, pool_name, &name, cpu);
    if let Err(left) = delete_volume(&disk) {
        tracing::warn!(volume = name, ?left, "the probe's disk is left; the next probe deletes it");
    }
    verdict
}

fn run(
    connect: &Connect,
    disk: &StorageVol,
    id: Uuid,
    pool_name: &str,
    volume: &str,
    cpu: CpuMode,
) -> Result<bool, Trouble> {
    let stream = Stream::new(connect, 0)?;
    disk.upload(&stream, 0, SECTOR_BYTES as u64, 0)?;
    through(stream, |stream| send(stream, GUEST))?;
    // Should this process end, libvirt ends the guest.
    let xml = probe_xml(id, pool_name, volume, cpu)?;
    let domain = match connect.create_domain_xml(&xml, sys::VIR_DOMAIN_START_AUTODESTROY) {
        Ok(domain) => domain,
        Err(error) => {
            tracing::debug!(error = error.message(), "no guest starts on hardware");
            return Ok(false);
        }
    };
    let end = Instant::now() + DEADLINE;
    while Instant::now() < end && found(domain.is_active())?.unwrap_or(false) {
        std::thread::sleep(Duration::from_millis(50));
    }
    if let Err(error) = domain.destroy() {
        tracing::debug!(error = error.message(), "the probe's guest is off already");
    }
    let stream = Stream::new(connect, 0)?;
    disk.download(&stream, SECTOR_BYTES as u64, SECTOR_BYTES as u64, 0)?;
    let sector = receive(stream, SECTOR_BYTES)?;
    Ok(sector.len() == SECTOR_BYTES && sector.chunks(MARK.len()).all(|chunk| chunk == MARK))
}

/// Deletes what probes left that were cut off.
fn clear(pool: &StoragePool) -> Result<(), Trouble> {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let now_s = now.map_err(|error| Error::internal("the clock is before 1970").with_source(error))?.as_secs();
    for volume in pool.list_all_volumes(0)? {
        if Role::of(&volume.name()?) != Role::Probe {
            continue;
        }
        let Some(xml) = found(volume.xml_desc(0))? else { continue };
        if Seen::parse(&xml)?.modified_s.is_some_and(|modified_s| now_s.saturating_sub(modified_s) > STALE_S) {
            delete_volume(&volume)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_is_the_assembled_source() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str| folder.path().join(name);
        std::fs::write(file("guest.s"), include_str!("guest.s")).unwrap();
        let run = |program: &str, arguments: &[&str]| {
            std::process::Command::new(program).args(arguments).current_dir(folder.path()).status()
        };
        let Ok(assembled) = run("as", &["--64", "-o", "probe.o", "guest.s"]) else {
            println!("ignored: there is no assembler");
            return;
        };
        assert!(assembled.success());
        let link = ["-m", "elf_x86_64", "-Ttext", "0x7c00", "--oformat", "binary", "-o", "probe.bin", "probe.o"];
        assert!(run("ld", &link).unwrap().success());
        assert!(std::fs::read(file("probe.bin")).unwrap() == GUEST);
    }
}
