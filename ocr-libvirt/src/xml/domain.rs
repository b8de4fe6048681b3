//! A domain: libvirt's word for a machine.

use std::collections::BTreeMap;

use ocr_core::{Error, ImageId, Name, NetworkId, Owner, RequestId, Result, Scope, Tags, VmId, VmSpec};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::{Empty, Quantity, is_carried, read, write};
use crate::config::{CpuMode, Machine};

/// The namespace of what we keep in a domain's metadata. libvirt drops metadata without one.
pub const NAMESPACE: &str = "urn:open-cyber-range:libvirt:machine:1";
/// The namespace of [`Phase`], which changes during a machine's life and so is an element of its own.
pub const PHASE_NAMESPACE: &str = "urn:open-cyber-range:libvirt:phase:1";
/// The prefix that [`PHASE_NAMESPACE`] is written with.
pub const PHASE_PREFIX: &str = "ocrp";
/// The name of the agent's channel in every guest.
pub const AGENT_CHANNEL: &str = "org.qemu.guest_agent.0";

/// The seed of the machine ids that we choose.
const ID_SEED: Uuid = Uuid::from_u128(0x6f63_725f_6c69_6276_6972_745f_766d_0001);

/// NICs on the first bus of [`Machine::Pc`]; the rest is behind a bridge.
const PC_FIRST_SLOT: u8 = 3;
const PC_NICS: usize = 24;

/// The id that a machine of this request has, or will have. Because the id is chosen and not given, libvirt itself
/// refuses to make a second machine for the same request.
pub fn planned_id(owner: &Owner, request: &RequestId) -> VmId {
    // Neither an owner nor a request can hold the separator.
    VmId::from_uuid(Uuid::new_v5(&ID_SEED, format!("{owner}\n{request}").as_bytes()))
}

/// The name that libvirt knows a machine by: readable, and the same for every request that asks for this name
/// in this scope, so that libvirt itself refuses the second one.
pub fn domain_name(owner: &Owner, scope: &Scope, name: &Name) -> String {
    let key = serde_json::json!([owner, scope.exercise, scope.deployment, name]).to_string();
    format!("{name}.{}", &hex(&Sha256::digest(key.as_bytes()))[..12])
}

/// A digest of everything that was asked for, kept in the domain, so that a request that comes again with another
/// wish is noticed.
pub fn spec_digest(spec: &VmSpec) -> Result<String> {
    let json = serde_json::to_vec(spec).map_err(|error| Error::internal("a spec has no digest").with_source(error))?;
    Ok(hex(&Sha256::digest(&json))[..32].to_owned())
}

/// The MAC address of a machine's NIC. It follows from the machine's id, so that making the machine again gives
/// the same; 40 bits of a digest, because libvirt's own 24 random bits collide among some thousand NICs.
pub fn mac(id: VmId, index: usize) -> String {
    let digest = Sha256::digest(format!("{id}/{index}").as_bytes());
    // 0x52: locally administered, unicast.
    format!("52:{:02x}:{:02x}:{:02x}:{:02x}:{:02x}", digest[0], digest[1], digest[2], digest[3], digest[4])
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What a domain is made of, once names are looked up.
#[derive(Clone, Debug)]
pub struct Plan<'a> {
    /// What was asked for.
    pub spec: &'a VmSpec,
    /// The machine's id.
    pub id: VmId,
    /// By hardware (`kvm`) or not (`qemu`).
    pub kvm: bool,
    /// The virtual board.
    pub machine: Machine,
    /// The processor.
    pub cpu: CpuMode,
    /// QEMU's translation cache, in MiB.
    pub tcg_cache_mib: Option<u32>,
    /// The pool of the disk.
    pub pool: &'a str,
    /// The disk's volume.
    pub volume: &'a str,
    /// libvirt's names of the networks of `spec.links`, in the same order.
    pub networks: &'a [String],
}

impl Plan<'_> {
    /// The domain's XML.
    ///
    /// # Errors
    /// `Invalid` for a label that XML cannot carry.
    pub fn xml(&self) -> Result<String> {
        write(&Domain::new(self)?)
    }
}

// --- written ------------------------------------------------------------------------------------------------

#[derive(Debug, Serialize)]
#[serde(rename = "domain")]
struct Domain {
    #[serde(rename = "@type")]
    kind: &'static str,
    name: String,
    uuid: String,
    metadata: Metadata,
    memory: Quantity,
    vcpu: u32,
    os: Os,
    features: Features,
    cpu: Cpu,
    on_poweroff: &'static str,
    on_reboot: &'static str,
    on_crash: &'static str,
    devices: Devices,
}

#[derive(Debug, Serialize)]
struct Metadata {
    #[serde(rename = "ocr:ocr-machine")]
    machine: Kept,
}

#[derive(Debug, Serialize)]
struct Kept {
    #[serde(rename = "@xmlns:ocr")]
    namespace: &'static str,
    #[serde(rename = "ocr:owner")]
    owner: String,
    #[serde(rename = "ocr:request")]
    request: String,
    #[serde(rename = "ocr:exercise")]
    exercise: String,
    #[serde(rename = "ocr:deployment")]
    deployment: String,
    #[serde(rename = "ocr:name")]
    name: String,
    #[serde(rename = "ocr:image")]
    image: String,
    #[serde(rename = "ocr:link")]
    links: Vec<String>,
    #[serde(rename = "ocr:labels")]
    labels: String,
    #[serde(rename = "ocr:spec")]
    spec: String,
}

#[derive(Debug, Serialize)]
struct Os {
    #[serde(rename = "type")]
    kind: OsType,
    boot: Dev,
}

#[derive(Debug, Serialize)]
struct OsType {
    #[serde(rename = "@arch")]
    arch: &'static str,
    #[serde(rename = "@machine")]
    machine: &'static str,
    #[serde(rename = "$text")]
    kind: &'static str,
}

#[derive(Debug, Serialize)]
struct Dev {
    #[serde(rename = "@dev")]
    dev: &'static str,
}

#[derive(Debug, Serialize)]
struct Features {
    // Always: libvirt 9 says `-no-acpi` otherwise, which QEMU 10 no longer knows.
    acpi: Empty,
    apic: Empty,
    #[serde(skip_serializing_if = "Option::is_none")]
    tcg: Option<Tcg>,
}

#[derive(Debug, Serialize)]
struct Tcg {
    #[serde(rename = "tb-cache")]
    cache: Quantity,
}

#[derive(Debug, Serialize)]
struct Cpu {
    #[serde(rename = "@mode")]
    mode: &'static str,
}

impl Cpu {
    fn new(mode: CpuMode, kvm: bool) -> Self {
        let mode = match (mode, kvm) {
            (CpuMode::Auto, true) | (CpuMode::HostModel, _) => "host-model",
            (CpuMode::Auto, false) | (CpuMode::Maximum, _) => "maximum",
            (CpuMode::HostPassthrough, _) => "host-passthrough",
        };
        Self { mode }
    }
}

#[derive(Debug, Serialize)]
struct Devices {
    disk: Disk,
    controller: Vec<Controller>,
    interface: Vec<Interface>,
    serial: Pty,
    console: Pty,
    channel: Channel,
    memballoon: Model,
    rng: Rng,
}

#[derive(Debug, Serialize)]
struct Disk {
    #[serde(rename = "@type")]
    kind: &'static str,
    #[serde(rename = "@device")]
    device: &'static str,
    driver: Driver,
    source: PoolSource,
    target: Target,
}

#[derive(Debug, Serialize)]
struct Driver {
    #[serde(rename = "@name")]
    name: &'static str,
    #[serde(rename = "@type")]
    kind: &'static str,
    #[serde(rename = "@discard")]
    discard: &'static str,
}

#[derive(Debug, Serialize)]
struct PoolSource {
    #[serde(rename = "@pool")]
    pool: String,
    #[serde(rename = "@volume")]
    volume: String,
}

#[derive(Debug, Serialize)]
struct Target {
    #[serde(rename = "@dev", skip_serializing_if = "Option::is_none")]
    dev: Option<&'static str>,
    #[serde(rename = "@bus", skip_serializing_if = "Option::is_none")]
    bus: Option<&'static str>,
    #[serde(rename = "@type", skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    #[serde(rename = "@name", skip_serializing_if = "Option::is_none")]
    name: Option<&'static str>,
    #[serde(rename = "@port", skip_serializing_if = "Option::is_none")]
    port: Option<u8>,
}

#[derive(Debug, Serialize)]
struct Controller {
    #[serde(rename = "@type")]
    kind: &'static str,
    #[serde(rename = "@index", skip_serializing_if = "Option::is_none")]
    index: Option<usize>,
    #[serde(rename = "@model", skip_serializing_if = "Option::is_none")]
    model: Option<&'static str>,
}

impl Controller {
    fn pci(index: usize, model: &'static str) -> Self {
        Self { kind: "pci", index: Some(index), model: Some(model) }
    }
}

#[derive(Debug, Serialize)]
struct Interface {
    #[serde(rename = "@type")]
    kind: &'static str,
    mac: Address,
    source: NetworkSource,
    model: ModelType,
    address: Pci,
}

#[derive(Debug, Serialize)]
struct Address {
    #[serde(rename = "@address")]
    address: String,
}

#[derive(Debug, Serialize)]
struct NetworkSource {
    #[serde(rename = "@network")]
    network: String,
}

#[derive(Debug, Serialize)]
struct ModelType {
    #[serde(rename = "@type")]
    kind: &'static str,
}

#[derive(Debug, Serialize)]
struct Pci {
    #[serde(rename = "@type")]
    kind: &'static str,
    #[serde(rename = "@domain")]
    domain: &'static str,
    #[serde(rename = "@bus")]
    bus: String,
    #[serde(rename = "@slot")]
    slot: String,
    #[serde(rename = "@function")]
    function: &'static str,
}

impl Pci {
    fn new(bus: usize, slot: usize) -> Self {
        Self {
            kind: "pci",
            domain: "0x0000",
            bus: format!("0x{bus:02x}"),
            slot: format!("0x{slot:02x}"),
            function: "0x0",
        }
    }
}

#[derive(Debug, Serialize)]
struct Pty {
    #[serde(rename = "@type")]
    kind: &'static str,
    target: Target,
}

#[derive(Debug, Serialize)]
struct Channel {
    #[serde(rename = "@type")]
    kind: &'static str,
    target: Target,
}

#[derive(Debug, Serialize)]
struct Model {
    #[serde(rename = "@model")]
    model: &'static str,
}

#[derive(Debug, Serialize)]
struct Rng {
    #[serde(rename = "@model")]
    model: &'static str,
    backend: RngBackend,
}

#[derive(Debug, Serialize)]
struct RngBackend {
    #[serde(rename = "@model")]
    model: &'static str,
    #[serde(rename = "$text")]
    source: &'static str,
}

const NO_TARGET: Target = Target { dev: None, bus: None, kind: None, name: None, port: None };

impl Domain {
    fn new(plan: &Plan<'_>) -> Result<Self> {
        let Plan { spec, .. } = plan;
        let Tags { owner, request, scope } = &spec.tags;
        let labels = serde_json::to_string(&spec.labels)
            .map_err(|error| Error::internal("labels could not be written").with_source(error))?;
        // JSON escapes what XML would change or refuse, all but two code points that are no characters.
        if !is_carried(&labels) {
            return Err(Error::invalid("labels", "must not contain U+FFFE or U+FFFF"));
        }
        let (nics, buses) = slots(plan.machine, plan.networks.len());
        let mut controllers = vec![Controller { kind: "usb", index: None, model: Some("none") }];
        controllers.extend(buses);
        Ok(Self {
            kind: if plan.kvm { "kvm" } else { "qemu" },
            name: domain_name(owner, scope, &spec.name),
            uuid: plan.id.to_string(),
            metadata: Metadata {
                machine: Kept {
                    namespace: NAMESPACE,
                    owner: owner.to_string(),
                    request: request.to_string(),
                    exercise: scope.exercise.clone(),
                    deployment: scope.deployment.clone(),
                    name: spec.name.to_string(),
                    image: spec.image.to_string(),
                    links: spec.links.iter().map(NetworkId::to_string).collect(),
                    labels,
                    spec: spec_digest(spec)?,
                },
            },
            // A whole number of MiB: QEMU wants its memory aligned.
            memory: Quantity::kib(spec.ram_bytes.div_ceil(1 << 20) << 10),
            vcpu: spec.cpus,
            os: Os {
                kind: OsType { arch: "x86_64", machine: plan.machine.as_str(), kind: "hvm" },
                boot: Dev { dev: "hd" },
            },
            features: Features {
                acpi: Empty {},
                apic: Empty {},
                tcg: plan
                    .tcg_cache_mib
                    .filter(|_| !plan.kvm)
                    .map(|mib| Tcg { cache: Quantity { unit: Some("MiB".to_owned()), value: mib.into() } }),
            },
            cpu: Cpu::new(plan.cpu, plan.kvm),
            on_poweroff: "destroy",
            on_reboot: "restart",
            on_crash: "destroy",
            devices: Devices {
                disk: Disk {
                    kind: "volume",
                    device: "disk",
                    driver: Driver { name: "qemu", kind: "qcow2", discard: "unmap" },
                    source: PoolSource { pool: plan.pool.to_owned(), volume: plan.volume.to_owned() },
                    target: Target { dev: Some("vda"), bus: Some("virtio"), ..NO_TARGET },
                },
                controller: controllers,
                interface: plan
                    .networks
                    .iter()
                    .zip(nics)
                    .enumerate()
                    .map(|(index, (network, address))| Interface {
                        kind: "network",
                        mac: Address { address: mac(plan.id, index) },
                        source: NetworkSource { network: network.clone() },
                        model: ModelType { kind: "virtio" },
                        address,
                    })
                    .collect(),
                serial: Pty { kind: "pty", target: Target { port: Some(0), ..NO_TARGET } },
                console: Pty { kind: "pty", target: Target { kind: Some("serial"), port: Some(0), ..NO_TARGET } },
                channel: Channel {
                    kind: "unix",
                    target: Target { kind: Some("virtio"), name: Some(AGENT_CHANNEL), ..NO_TARGET },
                },
                memballoon: Model { model: "none" },
                rng: Rng { model: "virtio", backend: RngBackend { model: "random", source: "/dev/urandom" } },
            },
        })
    }
}

/// The domain that tries whether hardware virtualisation works: the processor that machines would get, and one disk.
#[derive(Debug, Serialize)]
#[serde(rename = "domain")]
struct Probe {
    #[serde(rename = "@type")]
    kind: &'static str,
    name: String,
    uuid: String,
    memory: Quantity,
    vcpu: u32,
    os: Os,
    features: Features,
    cpu: Cpu,
    on_poweroff: &'static str,
    on_reboot: &'static str,
    on_crash: &'static str,
    devices: ProbeDevices,
}

#[derive(Debug, Serialize)]
struct ProbeDevices {
    disk: Disk,
    controller: Vec<Controller>,
    memballoon: Model,
}

/// The XML of a domain that boots a volume by hardware, and ends when it switches itself off.
///
/// # Errors
/// `Internal` when it cannot be written.
pub fn probe_xml(id: Uuid, pool: &str, volume: &str, cpu: CpuMode) -> Result<String> {
    write(&Probe {
        kind: "kvm",
        name: super::volume::probe_name(id),
        uuid: id.to_string(),
        memory: Quantity::kib(16 << 10),
        vcpu: 1,
        os: Os { kind: OsType { arch: "x86_64", machine: Machine::Pc.as_str(), kind: "hvm" }, boot: Dev { dev: "hd" } },
        features: Features { acpi: Empty {}, apic: Empty {}, tcg: None },
        cpu: Cpu::new(cpu, true),
        on_poweroff: "destroy",
        on_reboot: "destroy",
        on_crash: "destroy",
        devices: ProbeDevices {
            disk: Disk {
                kind: "volume",
                device: "disk",
                driver: Driver { name: "qemu", kind: "raw", discard: "ignore" },
                source: PoolSource { pool: pool.to_owned(), volume: volume.to_owned() },
                // What the BIOS of every board can drive.
                target: Target { dev: Some("hda"), bus: Some("ide"), ..NO_TARGET },
            },
            controller: vec![Controller { kind: "usb", index: None, model: Some("none") }],
            memballoon: Model { model: "none" },
        },
    })
}

/// Where the NICs are, in an order that every guest finds them in, and the buses that this takes.
fn slots(machine: Machine, nics: usize) -> (Vec<Pci>, Vec<Controller>) {
    match machine {
        Machine::Pc => {
            let addresses = (0..nics)
                .map(|index| match index.checked_sub(PC_NICS) {
                    None => Pci::new(0, usize::from(PC_FIRST_SLOT) + index),
                    Some(further) => Pci::new(1, 1 + further),
                })
                .collect();
            let bridges = (nics > PC_NICS).then(|| Controller::pci(1, "pci-bridge"));
            (addresses, bridges.into_iter().collect())
        }
        // One port for each NIC: buses are numbered by their ports' indices, which we choose.
        Machine::Q35 => (
            (1..=nics).map(|bus| Pci::new(bus, 0)).collect(),
            (1..=nics).map(|bus| Controller::pci(bus, "pcie-root-port")).collect(),
        ),
    }
}

// --- read ---------------------------------------------------------------------------------------------------

/// How far a machine of ours is, as its own metadata says. It tells a half-made machine from a stopped one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Defined, not yet started for the first time.
    Making,
    /// It has run.
    Made,
    /// Its deletion has begun.
    Deleting,
}

impl Phase {
    /// The element's content.
    pub fn element(self) -> &'static str {
        match self {
            Self::Making => "<phase>making</phase>",
            Self::Made => "<phase>made</phase>",
            Self::Deleting => "<phase>deleting</phase>",
        }
    }
}

/// What we want to know of a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The machine's id.
    pub id: VmId,
    /// libvirt's name for it.
    pub domain_name: String,
    /// Whether it is on.
    pub is_active: bool,
    /// Virtual cpus.
    pub cpus: u32,
    /// Memory in bytes.
    pub ram_bytes: u64,
    /// What we keep on it, when it is ours.
    pub ours: Option<Ours>,
    /// MAC address and network name of each NIC.
    pub nics: Vec<(Option<String>, Option<String>)>,
    /// The agent's channel: `None` without one, otherwise whether libvirt says that the agent holds its end.
    pub agent: Option<bool>,
}

/// What we keep in a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ours {
    /// Who made it, for which request.
    pub tags: Tags,
    /// The name that was asked for.
    pub name: Name,
    /// The image of its disk.
    pub image: ImageId,
    /// The networks of its NICs.
    pub links: Vec<NetworkId>,
    /// Further metadata.
    pub labels: BTreeMap<String, String>,
    /// [`spec_digest`].
    pub spec: String,
    /// How far it is.
    pub phase: Phase,
}

impl Seen {
    /// Reads a domain's XML.
    ///
    /// # Errors
    /// `Internal` when it makes no sense.
    pub fn parse(xml: &str) -> Result<Self> {
        let domain: ReadDomain = read(xml)?;
        let ours = domain.metadata.and_then(|metadata| {
            let phase = match metadata.phase.iter().find(|p| p.namespace.as_deref() == Some(PHASE_NAMESPACE)) {
                Some(phase) if phase.text == "made" => Phase::Made,
                Some(phase) if phase.text == "deleting" => Phase::Deleting,
                _ => Phase::Making,
            };
            let machine = metadata.machine.into_iter().find(|m| m.namespace.as_deref() == Some(NAMESPACE))?;
            machine.parse(phase)
        });
        Ok(Self {
            id: domain.uuid.parse()?,
            domain_name: domain.name,
            is_active: domain.id.is_some(),
            cpus: domain.vcpu.map_or(1, |vcpu| vcpu.current.unwrap_or(vcpu.value)),
            ram_bytes: domain.memory.and_then(|memory| memory.in_bytes("KiB")).unwrap_or(0),
            ours,
            nics: domain
                .devices
                .interface
                .into_iter()
                .map(|nic| (nic.mac.map(|mac| mac.address.to_lowercase()), nic.source.and_then(|s| s.network)))
                .collect(),
            agent: domain
                .devices
                .channel
                .iter()
                .filter_map(|channel| channel.target.as_ref())
                .find(|target| target.name.as_deref() == Some(AGENT_CHANNEL))
                .map(|target| target.state.as_deref() == Some("connected")),
        })
    }
}

#[derive(Debug, Deserialize)]
struct ReadDomain {
    #[serde(rename = "@id")]
    id: Option<String>,
    name: String,
    uuid: String,
    metadata: Option<ReadMetadata>,
    memory: Option<Quantity>,
    vcpu: Option<ReadVcpu>,
    #[serde(default)]
    devices: ReadDevices,
}

#[derive(Debug, Deserialize)]
struct ReadMetadata {
    #[serde(rename = "ocr-machine", default)]
    machine: Vec<ReadMachine>,
    #[serde(default)]
    phase: Vec<ReadPhase>,
}

#[derive(Debug, Deserialize)]
struct ReadPhase {
    #[serde(rename = "@xmlns:ocrp")]
    namespace: Option<String>,
    #[serde(rename = "$text", default)]
    text: String,
}

#[derive(Debug, Deserialize)]
struct ReadMachine {
    #[serde(rename = "@xmlns:ocr")]
    namespace: Option<String>,
    #[serde(default)]
    owner: String,
    #[serde(default)]
    request: String,
    #[serde(default)]
    exercise: String,
    #[serde(default)]
    deployment: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    image: String,
    #[serde(default, rename = "link")]
    links: Vec<String>,
    #[serde(default)]
    labels: String,
    #[serde(default)]
    spec: String,
}

impl ReadMachine {
    /// `None` when somebody changed it beyond recognition: then it is not ours any more.
    fn parse(self, phase: Phase) -> Option<Ours> {
        Some(Ours {
            tags: Tags {
                owner: Owner::new(self.owner).ok()?,
                request: RequestId::new(self.request).ok()?,
                scope: Scope::new(self.exercise, self.deployment).ok()?,
            },
            name: Name::new(self.name).ok()?,
            image: self.image.parse().ok()?,
            links: self.links.iter().map(|link| link.parse().ok()).collect::<Option<_>>()?,
            labels: serde_json::from_str(&self.labels).ok()?,
            spec: self.spec,
            phase,
        })
    }
}

#[derive(Debug, Deserialize)]
struct ReadVcpu {
    #[serde(rename = "@current")]
    current: Option<u32>,
    #[serde(rename = "$text")]
    value: u32,
}

#[derive(Debug, Default, Deserialize)]
struct ReadDevices {
    #[serde(default)]
    interface: Vec<ReadInterface>,
    #[serde(default)]
    channel: Vec<ReadChannel>,
}

#[derive(Debug, Deserialize)]
struct ReadInterface {
    mac: Option<ReadMac>,
    source: Option<ReadSource>,
}

#[derive(Debug, Deserialize)]
struct ReadMac {
    #[serde(rename = "@address")]
    address: String,
}

#[derive(Debug, Deserialize)]
struct ReadSource {
    #[serde(rename = "@network")]
    network: Option<String>,
}

#[derive(Debug, Deserialize)]
struct ReadChannel {
    target: Option<ReadTarget>,
}

#[derive(Debug, Deserialize)]
struct ReadTarget {
    #[serde(rename = "@name")]
    name: Option<String>,
    #[serde(rename = "@state")]
    state: Option<String>,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn spec() -> VmSpec {
        VmSpec {
            tags: Tags {
                owner: Owner::new("range-1").unwrap(),
                request: RequestId::new("4c0f7a52").unwrap(),
                scope: Scope::new("Exercise 1", "blue").unwrap(),
            },
            name: Name::new("web server").unwrap(),
            cpus: 2,
            ram_bytes: 512 << 20,
            image: "2c3f1f52-1c7e-5a38-9d2c-0c0d1b0a0908".parse().unwrap(),
            links: vec![
                "11111111-1111-4111-8111-111111111111".parse().unwrap(),
                "22222222-2222-4222-8222-222222222222".parse().unwrap(),
            ],
            labels: BTreeMap::from([("role".to_owned(), "<front> & \"back\"\n\u{1}".to_owned())]),
        }
    }

    fn plan<'a>(spec: &'a VmSpec, networks: &'a [String]) -> Plan<'a> {
        Plan {
            spec,
            id: planned_id(&spec.tags.owner, &spec.tags.request),
            kvm: false,
            machine: Machine::Pc,
            cpu: CpuMode::Auto,
            tcg_cache_mib: Some(32),
            pool: "default",
            volume: "ocr-1.qcow2",
            networks,
        }
    }

    /// Compares with a file beside the tests; `OCR_UPDATE_GOLDEN=1` writes it anew.
    fn golden(name: &str, text: &str) {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
        if std::env::var_os("OCR_UPDATE_GOLDEN").is_some() {
            std::fs::write(&path, format!("{text}\n")).unwrap();
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap().trim_end(), text, "{}", path.display());
    }

    #[test]
    fn domains_are_written_as_the_golden_files_say() {
        let spec = spec();
        let networks = ["default".to_owned(), "lab".to_owned()];
        golden("domain-pc-qemu.xml", &plan(&spec, &networks).xml().unwrap());
        let q35 = Plan { machine: Machine::Q35, kvm: true, ..plan(&spec, &networks) };
        golden("domain-q35-kvm.xml", &q35.xml().unwrap());
        golden("domain-probe.xml", &probe_xml(Uuid::nil(), "default", "ocr-probe-0", CpuMode::Auto).unwrap());
    }

    #[test]
    fn what_is_written_is_read() {
        let spec = spec();
        let networks = ["default".to_owned(), "lab".to_owned()];
        let plan = plan(&spec, &networks);
        let seen = Seen::parse(&plan.xml().unwrap()).unwrap();
        assert_eq!((seen.id, seen.is_active, seen.cpus, seen.ram_bytes), (plan.id, false, 2, 512 << 20));
        assert_eq!(seen.agent, Some(false));
        assert_eq!(seen.nics[1], (Some(mac(plan.id, 1)), Some("lab".to_owned())));
        let ours = seen.ours.unwrap();
        assert_eq!(ours.tags, spec.tags);
        assert_eq!((ours.name, ours.image, ours.links, ours.labels), (spec.name, spec.image, spec.links, spec.labels));
        assert_eq!(ours.phase, Phase::Making);
    }

    #[test]
    fn a_foreign_domain_is_read_and_is_not_ours() {
        let seen = Seen::parse(
            "<domain type='kvm' id='7'><name>x</name><uuid>11111111-1111-4111-8111-111111111111</uuid>
             <metadata><nova:instance xmlns:nova='http://openstack.org/xmlns/libvirt/nova/1.1'><nova:name>n</nova:name>
             </nova:instance><app:phase xmlns:app='urn:x'>made</app:phase></metadata>
             <memory>1024</memory><vcpu placement='static' current='1'>4</vcpu>
             <devices><interface type='bridge'><mac address='52:54:00:AA:00:01'/><source bridge='br0'/></interface>
             <disk/><interface type='user'/>
             <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0' state='connected'/></channel>
             </devices></domain>",
        )
        .unwrap();
        assert_eq!((seen.is_active, seen.cpus, seen.ram_bytes, seen.agent), (true, 1, 1 << 20, Some(true)));
        assert_eq!(seen.nics, [(Some("52:54:00:aa:00:01".to_owned()), None), (None, None)]);
        assert_eq!(seen.ours, None);
    }

    #[test]
    fn another_namespace_or_a_damaged_tag_is_not_ours() {
        let spec = spec();
        let xml = plan(&spec, &["a".to_owned(), "b".to_owned()]).xml().unwrap();
        assert!(Seen::parse(&xml).unwrap().ours.is_some());
        assert!(Seen::parse(&xml.replace(NAMESPACE, "urn:other")).unwrap().ours.is_none());
        assert!(Seen::parse(&xml.replace("range-1", "")).unwrap().ours.is_none());
    }

    #[test]
    fn phases_are_read() {
        let xml = plan(&spec(), &[]).xml().unwrap();
        for (phase, word) in [(Phase::Made, "made"), (Phase::Deleting, "deleting"), (Phase::Making, "making")] {
            assert!(phase.element().contains(word));
            let element = format!("<ocrp:phase xmlns:ocrp=\"{PHASE_NAMESPACE}\">{word}</ocrp:phase></metadata>");
            let seen = Seen::parse(&xml.replace("</metadata>", &element)).unwrap();
            assert_eq!(seen.ours.unwrap().phase, phase);
        }
    }

    #[test]
    fn nics_have_places_of_their_own_in_order() {
        for machine in [Machine::Pc, Machine::Q35] {
            for count in [0, 1, 24, 25, VmSpec::MAX_LINKS] {
                let (addresses, _) = slots(machine, count);
                let places: Vec<_> = addresses.iter().map(|a| (a.bus.clone(), a.slot.clone())).collect();
                assert_eq!(places.len(), count);
                assert!(places.is_sorted());
                assert_eq!(places.iter().collect::<std::collections::BTreeSet<_>>().len(), count);
            }
        }
    }

    #[test]
    fn the_same_name_is_the_same_domain_and_scopes_are_apart() {
        let (owner, name) = (Owner::new("o").unwrap(), Name::new("web").unwrap());
        let one = domain_name(&owner, &Scope::new("a", "bc").unwrap(), &name);
        assert_eq!(one, domain_name(&owner, &Scope::new("a", "bc").unwrap(), &name));
        assert_ne!(one, domain_name(&owner, &Scope::new("ab", "c").unwrap(), &name));
        assert_ne!(one, domain_name(&Owner::new("p").unwrap(), &Scope::new("a", "bc").unwrap(), &name));
    }

    proptest! {
        #[test]
        fn labels_cannot_break_out(key in any::<String>(), value in any::<String>()) {
            let mut spec = spec();
            spec.labels = BTreeMap::from([(key, value)]);
            let networks = ["a]]><b".to_owned(), "c&\"'<".to_owned()];
            match plan(&spec, &networks).xml() {
                Ok(xml) => {
                    let seen = Seen::parse(&xml).unwrap();
                    prop_assert_eq!(&seen.nics[0].1, &Some(networks[0].clone()));
                    prop_assert_eq!(&seen.nics[1].1, &Some(networks[1].clone()));
                    prop_assert_eq!(seen.ours.unwrap().labels, spec.labels);
                }
                Err(error) => prop_assert_eq!(error.kind(), ocr_core::ErrorKind::Invalid),
            }
        }

        #[test]
        fn macs_are_unicast_and_local(seed in any::<u128>(), index in 0usize..32) {
            let id = VmId::from_uuid(Uuid::from_u128(seed));
            let mac = mac(id, index);
            prop_assert!(mac.starts_with("52:") && mac.len() == 17);
            prop_assert_ne!(mac, super::mac(id, index + 1));
        }
    }
}
