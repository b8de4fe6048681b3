//! A network.

use std::net::IpAddr;

use ocr_core::{NetworkId, NetworkKind, Result};
use serde::Deserialize;

use super::read;

/// What we want to know of a network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Its id.
    pub id: NetworkId,
    /// libvirt's name for it.
    pub name: String,
    /// Its shape, where it is one that we have a word for.
    pub kind: Option<NetworkKind>,
}

impl Seen {
    /// Reads a network's XML.
    ///
    /// # Errors
    /// `Internal` when it makes no sense.
    pub fn parse(xml: &str) -> Result<Self> {
        let network: ReadNetwork = read(xml)?;
        let kind = network.kind();
        Ok(Self { id: network.uuid.parse()?, name: network.name, kind })
    }
}

#[derive(Debug, Deserialize)]
struct ReadNetwork {
    name: String,
    uuid: String,
    forward: Option<ReadForward>,
    bridge: Option<ReadBridge>,
    vlan: Option<ReadVlan>,
    #[serde(default)]
    ip: Vec<ReadIp>,
}

#[derive(Debug, Deserialize)]
struct ReadForward {
    #[serde(rename = "@mode")]
    mode: Option<String>,
}

#[derive(Debug, Deserialize)]
struct ReadBridge {
    #[serde(rename = "@name")]
    name: Option<String>,
}

#[derive(Debug, Deserialize)]
struct ReadVlan {
    #[serde(default)]
    tag: Vec<ReadTag>,
}

#[derive(Debug, Deserialize)]
struct ReadTag {
    #[serde(rename = "@id")]
    id: u16,
}

#[derive(Debug, Deserialize)]
struct ReadIp {
    #[serde(rename = "@address")]
    address: Option<IpAddr>,
    #[serde(rename = "@netmask")]
    netmask: Option<IpAddr>,
    #[serde(rename = "@prefix")]
    prefix: Option<u8>,
}

impl ReadNetwork {
    fn kind(&self) -> Option<NetworkKind> {
        match self.forward.as_ref().map(|forward| forward.mode.as_deref().unwrap_or("nat")) {
            None => Some(NetworkKind::Isolated),
            Some("bridge") => {
                let bridge = self.bridge.as_ref()?.name.clone()?;
                match self.vlan.as_ref()?.tag.as_slice() {
                    [tag] => Some(NetworkKind::Vlan { bridge, vlan: tag.id }),
                    _ => None,
                }
            }
            Some("nat" | "route" | "open") => match self.ip.as_slice() {
                [ip] => ip.routed(),
                _ => None,
            },
            Some(_) => None,
        }
    }
}

impl ReadIp {
    fn routed(&self) -> Option<NetworkKind> {
        let gateway = self.address?;
        let prefix = match (self.prefix, self.netmask) {
            (Some(prefix), _) => prefix,
            (None, Some(IpAddr::V4(mask))) => u8::try_from(mask.to_bits().leading_ones()).ok()?,
            _ => return None,
        };
        let network = match gateway {
            IpAddr::V4(ip) => {
                let mask = u32::MAX.checked_shl(32u32.checked_sub(prefix.into())?).unwrap_or(0);
                IpAddr::V4((ip.to_bits() & mask).into())
            }
            IpAddr::V6(ip) => {
                let mask = u128::MAX.checked_shl(128u32.checked_sub(prefix.into())?).unwrap_or(0);
                IpAddr::V6((ip.to_bits() & mask).into())
            }
        };
        Some(NetworkKind::Routed { cidr: (network, prefix), gateway })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(inner: &str) -> Option<NetworkKind> {
        let xml = format!(
            "<network connections='1'><name>n</name><uuid>11111111-1111-4111-8111-111111111111</uuid>{inner}</network>"
        );
        Seen::parse(&xml).unwrap().kind
    }

    #[test]
    fn shapes_are_recognised() {
        assert_eq!(kind("<bridge name='virbr1' stp='on' delay='0'/>"), Some(NetworkKind::Isolated));
        assert_eq!(
            kind(
                "<forward mode='bridge'/><bridge name='br0'/><virtualport type='openvswitch'/><vlan><tag id='10'/></vlan>"
            ),
            Some(NetworkKind::Vlan { bridge: "br0".into(), vlan: 10 })
        );
        assert_eq!(
            kind("<forward mode='nat'/><ip address='192.168.122.1' netmask='255.255.255.0'><dhcp/></ip>"),
            Some(NetworkKind::Routed { cidr: ([192, 168, 122, 0].into(), 24), gateway: [192, 168, 122, 1].into() })
        );
        assert_eq!(
            kind("<forward mode='bridge'/><bridge name='br0'/><vlan trunk='yes'><tag id='1'/><tag id='2'/></vlan>"),
            None
        );
        assert_eq!(kind("<forward mode='hostdev'/>"), None);
        assert_eq!(kind("<forward mode='nat'/><ip family='ipv6' address='fd00::1' prefix='200'/>"), None);
    }
}
