//! A machine as a libvirt domain: the definition that we write, and what we read back.

use ocr_core::{Error, ImageId, Name, NetworkId, Owner, RequestId, Result, Scope, Tags, VmId, VmSpec};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::{
    config::{DomainType, Machine},
    xml::Element,
};

/// The namespace of our metadata. libvirt keeps metadata only under a namespace.
const NAMESPACE: &str = "urn:open-cyber-range:deployer:1";
/// The namespace of UUIDs made of owner and request.
const IDS: Uuid = Uuid::from_u128(0x6f63_7264_6570_4c6f_8a5e_0001_0001_0001);
/// The channel that the QEMU guest agent listens on.
const AGENT_CHANNEL: &str = "org.qemu.guest_agent.0";

/// The id of the machine of a request: every create of the request comes to the same one.
pub(crate) fn id_of(tags: &Tags) -> VmId {
    VmId::from_uuid(derived(&[tags.owner.as_str(), tags.request.as_str()]))
}

/// A UUID made of texts.
pub(crate) fn derived(parts: &[&str]) -> Uuid {
    Uuid::new_v5(&IDS, parts.join("\0").as_bytes())
}

/// The object's name for libvirt: a person recognises it, and two of one owner and scope collide.
pub(crate) fn libvirt_name(tags: &Tags, name: &Name) -> String {
    let whose = [tags.owner.as_str(), &tags.scope.exercise, &tags.scope.deployment, name.as_str()].join("\0");
    let digest = Sha256::digest(whose);
    format!("{name}-{:02x}{:02x}{:02x}{:02x}{:02x}", digest[0], digest[1], digest[2], digest[3], digest[4])
}

/// The file name of a machine's disk.
pub(crate) fn disk_name(id: VmId) -> String {
    format!("{id}.qcow2")
}

/// The machine whose disk has this file name.
pub(crate) fn machine_of_disk(volume: &str) -> Option<VmId> {
    volume.strip_suffix(".qcow2")?.parse().ok()
}

/// What is ours in an object's metadata.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ours {
    pub(crate) tags: Tags,
    pub(crate) name: Name,
    /// For a machine: all that was asked for.
    pub(crate) spec: Option<VmSpec>,
}

impl Ours {
    /// As an element for `<metadata>`.
    pub(crate) fn to_element(&self) -> Result<Element> {
        let mut element = Element::new("ocr:object")
            .attribute("xmlns:ocr", NAMESPACE)
            .leaf("ocr:owner", self.tags.owner.as_str())
            .leaf("ocr:request", self.tags.request.as_str())
            .leaf("ocr:exercise", &self.tags.scope.exercise)
            .leaf("ocr:deployment", &self.tags.scope.deployment)
            .leaf("ocr:name", self.name.as_str());
        if let Some(spec) = &self.spec {
            let json = serde_json::to_string(spec)
                .map_err(|error| Error::internal("a spec cannot be written").with_source(error))?;
            element = element.leaf("ocr:spec", json);
        }
        Ok(element)
    }

    /// From an object's document; `None` when it is not ours.
    pub(crate) fn read(document: &Element) -> Option<Self> {
        let object = document
            .get("metadata")?
            .children
            .iter()
            .find(|child| child.get_attribute("xmlns:ocr") == Some(NAMESPACE))?;
        let text = |name| object.get(name).map(Element::value).unwrap_or_default().to_owned();
        let tags = Tags {
            owner: Owner::new(text("owner")).ok()?,
            request: RequestId::new(text("request")).ok()?,
            scope: Scope::new(text("exercise"), text("deployment")).ok()?,
        };
        let spec = object.get("spec").and_then(|spec| serde_json::from_str(spec.value()).ok());
        Some(Self { tags, name: Name::new(text("name")).ok()?, spec })
    }
}

/// What a new domain is made of.
#[derive(Debug)]
pub(crate) struct Definition<'a> {
    pub(crate) id: VmId,
    pub(crate) spec: &'a VmSpec,
    /// Never `Auto`: that has been decided.
    pub(crate) domain_type: DomainType,
    pub(crate) machine: Machine,
    pub(crate) tcg_cache_mib: u32,
    pub(crate) pool: &'a str,
    /// libvirt's names of the networks, in the order of the spec's links.
    pub(crate) networks: &'a [String],
}

impl Definition<'_> {
    pub(crate) fn to_xml(&self) -> Result<String> {
        let spec = self.spec;
        let ours = Ours { tags: spec.tags.clone(), name: spec.name.clone(), spec: Some(spec.clone()) };
        let emulated = self.domain_type != DomainType::Kvm;
        // ACPI always: a domain without it does not start with QEMU 10, and cannot be shut down gently.
        let mut features = Element::new("features").child(Element::new("acpi")).child(Element::new("apic"));
        if emulated {
            let cache = Element::new("tb-cache").attribute("unit", "MiB").text(self.tcg_cache_mib.to_string());
            features = features.child(Element::new("tcg").child(cache));
        }
        let os = Element::new("os")
            .child(Element::new("type").attribute("arch", "x86_64").attribute("machine", self.machine.as_str()).text("hvm"))
            .child(Element::new("boot").attribute("dev", "hd"));
        let cpu = Element::new("cpu").attribute("mode", if emulated { "maximum" } else { "host-passthrough" });
        let document = Element::new("domain")
            .attribute("type", self.domain_type.to_string())
            .leaf("name", libvirt_name(&spec.tags, &spec.name))
            .leaf("uuid", self.id.to_string())
            .child(Element::new("metadata").child(ours.to_element()?))
            .child(Element::new("memory").attribute("unit", "KiB").text(spec.ram_bytes.div_ceil(1024).to_string()))
            .leaf("vcpu", spec.cpus.to_string())
            .child(os)
            .child(features)
            .child(cpu)
            .child(Element::new("clock").attribute("offset", "utc"))
            .leaf("on_poweroff", "destroy")
            .leaf("on_reboot", "restart")
            .leaf("on_crash", "destroy")
            .child(self.devices());
        document.to_xml()
    }

    fn devices(&self) -> Element {
        let disk = Element::new("disk")
            .attribute("type", "volume")
            .attribute("device", "disk")
            .child(Element::new("driver").attribute("name", "qemu").attribute("type", "qcow2").attribute("discard", "unmap"))
            .child(Element::new("source").attribute("pool", self.pool).attribute("volume", disk_name(self.id)))
            .child(Element::new("target").attribute("dev", "vda").attribute("bus", "virtio"));
        let interface = |network: &String| {
            Element::new("interface")
                .attribute("type", "network")
                .child(Element::new("source").attribute("network", network.as_str()))
                .child(Element::new("model").attribute("type", "virtio"))
        };
        let agent = Element::new("channel")
            .attribute("type", "unix")
            .child(Element::new("target").attribute("type", "virtio").attribute("name", AGENT_CHANNEL));
        Element::new("devices")
            .child(Element::new("controller").attribute("type", "usb").attribute("model", "none"))
            .child(disk)
            // libvirt gives PCI addresses in this order, so the guest sees its NICs in this order.
            .children(self.networks.iter().map(interface))
            .child(Element::new("serial").attribute("type", "pty"))
            .child(agent)
            .child(Element::new("memballoon").attribute("model", "none"))
    }
}

/// What we read of a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct View {
    pub(crate) id: VmId,
    pub(crate) libvirt_name: String,
    pub(crate) ours: Option<Ours>,
    pub(crate) cpus: u32,
    pub(crate) ram_bytes: u64,
    pub(crate) has_agent_channel: bool,
    /// Each NIC's network, by libvirt's name, and MAC address.
    pub(crate) nics: Vec<(Option<String>, Option<String>)>,
}

impl View {
    pub(crate) fn read(xml: &str) -> Result<Self> {
        let document = Element::parse(xml)?;
        let text = |name: &str| document.get(name).map(|child| child.value().trim().to_owned()).unwrap_or_default();
        let memory = document.get("memory");
        let unit: u64 = match memory.and_then(|memory| memory.get_attribute("unit")).unwrap_or("KiB") {
            "b" | "bytes" => 1,
            "MiB" | "M" => 1 << 20,
            "GiB" | "G" => 1 << 30,
            _ => 1 << 10,
        };
        let devices = document.get("devices").cloned().unwrap_or_default();
        let has_agent_channel = devices.all("channel").any(|channel| {
            channel.get("target").and_then(|target| target.get_attribute("name")) == Some(AGENT_CHANNEL)
        });
        let attribute = |element: &Element, child: &str, name: &str| {
            element.get(child).and_then(|child| child.get_attribute(name)).map(str::to_owned)
        };
        Ok(Self {
            id: text("uuid").parse().map_err(|_| Error::internal("libvirt gave a domain without a UUID"))?,
            libvirt_name: text("name"),
            ours: Ours::read(&document),
            cpus: text("vcpu").parse().unwrap_or(0),
            ram_bytes: text("memory").parse::<u64>().unwrap_or(0).saturating_mul(unit),
            has_agent_channel,
            nics: devices
                .all("interface")
                .map(|nic| {
                    (attribute(nic, "source", "network"), attribute(nic, "mac", "address").map(|mac| mac.to_lowercase()))
                })
                .collect(),
        })
    }

    /// The name that users know it by.
    pub(crate) fn name(&self) -> Result<Name> {
        match &self.ours {
            Some(ours) => Ok(ours.name.clone()),
            // Somebody else's names may be anything.
            None => Name::new(self.libvirt_name.as_str()).or_else(|_| Name::new(self.id.to_string())),
        }
    }

    pub(crate) fn image(&self) -> Option<ImageId> {
        self.ours.as_ref().and_then(|ours| ours.spec.as_ref()).map(|spec| spec.image)
    }

    pub(crate) fn links(&self) -> &[NetworkId] {
        self.ours.as_ref().and_then(|ours| ours.spec.as_ref()).map_or(&[], |spec| &spec.links)
    }
}

/// A volume over a template: it holds what differs.
pub(crate) fn overlay_xml(name: &str, capacity_bytes: u64, template_path: &str, template_format: &str) -> Result<String> {
    Element::new("volume")
        .leaf("name", name)
        .child(Element::new("capacity").attribute("unit", "bytes").text(capacity_bytes.to_string()))
        .child(Element::new("target").child(Element::new("format").attribute("type", "qcow2")))
        // The format is always said: what is not said is guessed, and a guest may have written what is guessed at.
        .child(
            Element::new("backingStore")
                .leaf("path", template_path)
                .child(Element::new("format").attribute("type", template_format)),
        )
        .to_xml()
}

/// A volume to fill by an upload.
pub(crate) fn volume_xml(name: &str, capacity_bytes: u64, format: &str) -> Result<String> {
    Element::new("volume")
        .leaf("name", name)
        .child(Element::new("capacity").attribute("unit", "bytes").text(capacity_bytes.to_string()))
        .child(Element::new("allocation").text("0"))
        .child(Element::new("target").child(Element::new("format").attribute("type", format)))
        .to_xml()
}

/// What we read of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct VolumeView {
    pub(crate) name: String,
    pub(crate) path: String,
    pub(crate) format: String,
    pub(crate) capacity_bytes: u64,
    pub(crate) allocation_bytes: u64,
    /// The template under it.
    pub(crate) backing: Option<String>,
}

impl VolumeView {
    pub(crate) fn read(xml: &str) -> Result<Self> {
        let document = Element::parse(xml)?;
        let text = |path: &[&str]| document.at(path).map(|found| found.value().trim().to_owned()).unwrap_or_default();
        let format = document.at(&["target", "format"]).and_then(|format| format.get_attribute("type"));
        Ok(Self {
            name: text(&["name"]),
            path: text(&["target", "path"]),
            format: format.unwrap_or("raw").to_owned(),
            // libvirt always answers in bytes.
            capacity_bytes: text(&["capacity"]).parse().unwrap_or(0),
            allocation_bytes: text(&["allocation"]).parse().unwrap_or(0),
            backing: Some(text(&["backingStore", "path"])).filter(|path| !path.is_empty()),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn spec(name: &str, exercise: &str) -> VmSpec {
        VmSpec {
            tags: Tags {
                owner: Owner::new("golden").unwrap(),
                request: RequestId::new("r-1").unwrap(),
                scope: Scope::new(exercise, "blue").unwrap(),
            },
            name: Name::new(name).unwrap(),
            cpus: 2,
            ram_bytes: 128 << 20,
            image: ImageId::from_uuid(derived(&["image"])),
            links: vec![NetworkId::from_uuid(derived(&["net"]))],
            labels: BTreeMap::from([("note".to_owned(), "<&\"'>".to_owned())]),
        }
    }

    fn xml(spec: &VmSpec) -> String {
        let networks = ["default".to_owned(), "lab & <co>".to_owned()];
        let definition = Definition {
            id: id_of(&spec.tags),
            spec,
            domain_type: DomainType::Qemu,
            machine: Machine::Pc,
            tcg_cache_mib: 32,
            pool: "default",
            networks: &networks,
        };
        definition.to_xml().unwrap()
    }

    #[test]
    fn the_definition_is_the_golden_one() {
        let golden = include_str!("../tests/golden/domain.xml");
        assert_eq!(xml(&spec("web", "exercise")).trim(), golden.trim());
    }

    #[test]
    fn a_foreign_domain_is_read_and_not_ours() {
        let view = View::read(include_str!("../tests/golden/foreign.xml")).unwrap();
        assert_eq!(view.ours, None);
        assert_eq!(view.name().unwrap().as_str(), view.id.to_string());
        assert_eq!((view.cpus, view.ram_bytes, view.has_agent_channel), (1, 96 << 20, true));
        assert_eq!(view.nics, [(Some("default".to_owned()), Some("52:54:00:aa:bb:cc".to_owned()))]);
    }

    #[test]
    fn a_volume_names_its_template_and_its_format() {
        let xml = overlay_xml("a&b", 1 << 26, "/pool/x<y.qcow2", "qcow2").unwrap();
        let document = Element::parse(&xml).unwrap();
        assert_eq!(document.at(&["backingStore", "path"]).unwrap().value(), "/pool/x<y.qcow2");
        assert_eq!(document.at(&["backingStore", "format"]).unwrap().get_attribute("type"), Some("qcow2"));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(
            name in "[a-zA-Z0-9_:@+][a-zA-Z0-9_.:@+-]{0,79}",
            exercise in "([a-zA-Z0-9_:@+][a-zA-Z0-9_.:@+-]{0,19})?",
        ) {
            let spec = spec(&name, &exercise);
            let view = View::read(&xml(&spec)).unwrap();
            prop_assert_eq!(view.id, id_of(&spec.tags));
            let ours = view.ours.unwrap();
            prop_assert_eq!(&ours.tags, &spec.tags);
            prop_assert_eq!(ours.spec.as_ref(), Some(&spec));
            prop_assert_eq!(view.nics.len(), 2);
            prop_assert_eq!(view.nics[1].0.as_deref(), Some("lab & <co>"));
        }
    }
}
