//! Whether the processor's virtualisation really works here.
//!
//! That `/dev/kvm` is there, and that libvirt offers `kvm`, proves nothing: there are hosts where a domain does not
//! start, and hosts where it starts and hangs. So a domain is started, with the processor model that machines get,
//! from a disk of one sector. Its code goes the way of every boot loader, from real mode to long mode with paging,
//! and switches the machine off. A domain that is off in time has made progress; any other verdict is emulation.

use std::time::Duration;

use ocr_core::{Error, Result};
use uuid::Uuid;
use virt::{domain::Domain, storage_vol::StorageVol, stream::Stream, sys};

use crate::{
    config::{Config, DomainType},
    domain::volume_xml,
    door::Door,
    error::NO_DOMAIN,
    link::{if_there, pool_of, unless},
    xml::Element,
};

/// How long the domain may take. Where it works it takes well below a second, and a few where all is slow.
const DEADLINE: Duration = Duration::from_secs(10);
const SECTOR_BYTES: usize = 512;

/// The sector's code, for 16 bits at 0x7c00:
///
/// ```text
///   clear the segments; zero 0x1000..0x4000
///   [0x1000] = 0x2003; [0x2000] = 0x3003; [0x3000] = 0x83      page tables: the first 2 MiB, one to one
///   cr4 |= PAE; cr3 = 0x1000; EFER |= LME; lgdt; cr0 |= PE | PG; far jump
///   64 bits: out 0x604, 0x2000                                  ACPI: switch off
///   halt for ever
/// ```
const CODE: &[u8] = &[
    0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0, 0xbc, 0x00, 0x7c, 0xfc, 0xbf, 0x00, 0x10,
    0x66, 0x31, 0xc0, 0xb9, 0x00, 0x0c, 0x66, 0xf3, 0xab, 0x66, 0xc7, 0x06, 0x00, 0x10, 0x03, 0x20,
    0x00, 0x00, 0x66, 0xc7, 0x06, 0x00, 0x20, 0x03, 0x30, 0x00, 0x00, 0x66, 0xc7, 0x06, 0x00, 0x30,
    0x83, 0x00, 0x00, 0x00, 0x0f, 0x20, 0xe0, 0x66, 0x83, 0xc8, 0x20, 0x0f, 0x22, 0xe0, 0x66, 0xb8,
    0x00, 0x10, 0x00, 0x00, 0x0f, 0x22, 0xd8, 0x66, 0xb9, 0x80, 0x00, 0x00, 0xc0, 0x0f, 0x32, 0x66,
    0x0d, 0x00, 0x01, 0x00, 0x00, 0x0f, 0x30, 0x0f, 0x01, 0x16, 0x90, 0x7c, 0x0f, 0x20, 0xc0, 0x66,
    0x0d, 0x01, 0x00, 0x00, 0x80, 0x0f, 0x22, 0xc0, 0xea, 0x6d, 0x7c, 0x08, 0x00, 0x66, 0xba, 0x04,
    0x06, 0x66, 0xb8, 0x00, 0x20, 0x66, 0xef, 0xf4, 0xeb, 0xfd, 0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00,
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x9a, 0x20, 0x00,
    0x0f, 0x00, 0x80, 0x7c, 0x00, 0x00,
];

/// The type that machines get where `auto` is set.
pub(crate) async fn find_out(door: &Door, config: &Config) -> DomainType {
    match works(door, config).await {
        Ok(()) => DomainType::Kvm,
        Err(why) => {
            tracing::info!(%why, "machines are emulated: a domain of type kvm did not work");
            DomainType::Qemu
        }
    }
}

async fn works(door: &Door, config: &Config) -> Result<()> {
    let name = format!("ocr-probe-{}", Uuid::new_v4().simple());
    let disk = format!("{name}.raw");
    let domain = domain_xml(&name, &disk, &config.pool)?;
    let volume = volume_xml(&disk, SECTOR_BYTES as u64, "raw")?;
    let (pool, began) = (config.pool.clone(), name.clone());
    let started = door.call("libvirt.probe", move |connect| {
        let volume = StorageVol::create_xml(&pool_of(connect, &pool)?, &volume, 0)?;
        let stream = Stream::new(connect, 0)?;
        volume.upload(&stream, 0, SECTOR_BYTES as u64, 0)?;
        let sector = sector();
        let mut sent = 0;
        while sent < sector.len() {
            sent += usize::try_from(stream.send(&sector[sent..])?).unwrap_or(0);
        }
        stream.finish()?;
        // Transient: when it is off it is gone.
        connect.create_domain_xml(&domain, sys::VIR_DOMAIN_NONE).map(drop)
    });
    let outcome = match started.await {
        Ok(()) => wait_until_off(door, &began).await,
        Err(error) => Err(error),
    };
    let pool = config.pool.clone();
    let cleaned = door.call("libvirt.probe", move |connect| {
        if let Some(domain) = if_there(connect.lookup_domain_by_name(&name), NO_DOMAIN)? {
            unless(domain.destroy().map(drop), &[NO_DOMAIN])?;
        }
        match pool_of(connect, &pool)?.lookup_storage_vol_by_name(&disk) {
            Ok(volume) => volume.delete(0).map(drop),
            Err(_) => Ok(()),
        }
    });
    if let Err(error) = cleaned.await {
        tracing::warn!(%error, "the probe's domain could not be removed");
    }
    outcome
}

async fn wait_until_off(door: &Door, name: &str) -> Result<()> {
    let end = tokio::time::Instant::now() + DEADLINE;
    while tokio::time::Instant::now() < end {
        let name = name.to_owned();
        let there = door.call("libvirt.probe", move |connect| {
            let domain: Option<Domain> = if_there(connect.lookup_domain_by_name(&name), NO_DOMAIN)?;
            Ok(domain.is_some())
        });
        if !there.await? {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Err(Error::timed_out("the domain started and made no progress").during("libvirt.probe"))
}

fn sector() -> [u8; SECTOR_BYTES] {
    let mut sector = [0; SECTOR_BYTES];
    sector[..CODE.len()].copy_from_slice(CODE);
    // What makes a sector bootable.
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

fn domain_xml(name: &str, disk: &str, pool: &str) -> Result<String> {
    let disk = Element::new("disk")
        .attribute("type", "volume")
        .attribute("device", "disk")
        .child(Element::new("driver").attribute("name", "qemu").attribute("type", "raw"))
        .child(Element::new("source").attribute("pool", pool).attribute("volume", disk))
        .child(Element::new("target").attribute("dev", "hda").attribute("bus", "ide"));
    let os = Element::new("os")
        .child(Element::new("type").attribute("arch", "x86_64").attribute("machine", "pc").text("hvm"))
        .child(Element::new("boot").attribute("dev", "hd"));
    let devices = Element::new("devices")
        .child(Element::new("controller").attribute("type", "usb").attribute("model", "none"))
        .child(disk)
        .child(Element::new("memballoon").attribute("model", "none"));
    Element::new("domain")
        .attribute("type", "kvm")
        .leaf("name", name)
        .child(Element::new("memory").attribute("unit", "MiB").text("16"))
        .leaf("vcpu", "1")
        .child(os)
        .child(Element::new("features").child(Element::new("acpi")))
        .child(Element::new("cpu").attribute("mode", "host-passthrough"))
        .leaf("on_poweroff", "destroy")
        .leaf("on_crash", "destroy")
        .child(devices)
        .to_xml()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sector_is_one_and_bootable() {
        let sector = sector();
        assert!(CODE.len() <= 510);
        assert_eq!(sector[510..], [0x55, 0xaa]);
    }
}
