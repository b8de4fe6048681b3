//! Where a machine's SSH server listens.

use std::{fmt, net::IpAddr, sync::Arc};

use async_trait::async_trait;

use crate::{ComputeBackend, Error, ErrorKind, Result, Vm, VmId, VmState, error::reason, id::shown};

/// Finds the address of a machine's SSH server.
#[async_trait]
pub trait Addresses: fmt::Debug + Send + Sync + 'static {
    /// The address now. It is asked before every connection, and a connection is kept, so it may cost a call.
    ///
    /// # Errors
    /// The states of a guest as [`GuestExec`](crate::GuestExec) lists them: gone, not running, without a way to reach it
    /// (`AGENT_ABSENT`), and not ready while the machine is built or its address is not known yet.
    async fn locate(&self, vm: VmId) -> Result<Endpoint>;
}

/// A host and a port.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Endpoint {
    /// A name or an address, without brackets.
    pub host: String,
    /// The port.
    pub port: u16,
}

impl Endpoint {
    /// SSH's own port.
    pub const SSH_PORT: u16 = 22;

    /// A host and a port.
    pub fn new(host: impl Into<String>, port: u16) -> Self {
        Self { host: host.into(), port }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

/// A range of addresses, such as `10.0.0.0/8`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    base: IpAddr,
    bits: u32,
}

impl Range {
    /// Whether the address is in it.
    pub fn contains(&self, address: IpAddr) -> bool {
        let bits = |address: IpAddr| match address {
            IpAddr::V4(address) => (u128::from(address.to_bits()) << 96, 32),
            IpAddr::V6(address) => (address.to_bits(), 128),
        };
        let ((ours, family), (its, other)) = (bits(self.base), bits(address));
        let mask = u128::MAX.checked_shl(128 - self.bits).unwrap_or(0);
        family == other && ours & mask == its & mask
    }
}

impl std::str::FromStr for Range {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let bad = || Error::invalid("range", format_args!("wants addresses such as 10.0.0.0/8, got {}", shown(text)));
        let (base, bits) = text.split_once('/').unwrap_or((text, ""));
        let base: IpAddr = base.parse().map_err(|_| bad())?;
        let most = if base.is_ipv4() { 32 } else { 128 };
        let bits = if bits.is_empty() { most } else { bits.parse().map_err(|_| bad())? };
        if bits > most { Err(bad()) } else { Ok(Self { base, bits }) }
    }
}

/// Addresses as the cloud knows them, or names made from what it knows of a machine.
#[derive(Clone, Debug)]
pub struct ComputeAddresses {
    compute: Arc<dyn ComputeBackend>,
    port: u16,
    ranges: Vec<Range>,
    pattern: Option<String>,
}

impl ComputeAddresses {
    /// The first IPv4 address of a machine, else the first IPv6 address that is not only for its link; port 22.
    pub fn new(compute: Arc<dyn ComputeBackend>) -> Self {
        Self { compute, port: Endpoint::SSH_PORT, ranges: Vec::new(), pattern: None }
    }

    /// Another port.
    pub fn with_port(mut self, port: u16) -> Self {
        self.port = port;
        self
    }

    /// Only addresses in these ranges; that of the first range first.
    pub fn with_ranges(mut self, ranges: Vec<Range>) -> Self {
        self.ranges = ranges;
        self
    }

    /// A host name made from `{id}`, `{name}`, `{exercise}` and `{deployment}` instead of an address. A machine that
    /// lacks what the pattern names counts as one that cannot be reached.
    ///
    /// # Errors
    /// `Invalid` when something else is in braces, or nothing at all.
    pub fn with_pattern(mut self, pattern: impl Into<String>) -> Result<Self> {
        let pattern = pattern.into();
        Self::check_pattern(&pattern)?;
        self.pattern = Some(pattern);
        Ok(self)
    }

    /// Checks a pattern for [`ComputeAddresses::with_pattern`].
    ///
    /// # Errors
    /// `Invalid` when something else is in braces, or nothing at all.
    pub fn check_pattern(pattern: &str) -> Result<()> {
        let rest = PLACES.iter().fold(pattern.to_owned(), |rest, place| rest.replace(place, ""));
        if rest == pattern || rest.contains(['{', '}', '/', '@', ' ']) {
            return Err(Error::invalid(
                "pattern",
                format_args!("wants a host name with {}, got {}", PLACES.join(", "), shown(pattern)),
            ));
        }
        Ok(())
    }

    fn host(&self, vm: &Vm) -> Option<String> {
        let Some(pattern) = &self.pattern else {
            return self.address(vm).map(|address| address.to_string());
        };
        let scope = vm.tags.as_ref().map(|tags| &tags.scope);
        let (exercise, deployment) =
            scope.map_or(("", ""), |scope| (scope.exercise.as_str(), scope.deployment.as_str()));
        let values = [vm.id.to_string(), vm.name.to_string(), exercise.to_owned(), deployment.to_owned()];
        let mut host = pattern.clone();
        for (place, value) in PLACES.iter().zip(&values) {
            let label = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            if host.contains(place) && (value.is_empty() || !value.chars().all(label)) {
                return None;
            }
            host = host.replace(place, value);
        }
        Some(host)
    }

    fn address(&self, vm: &Vm) -> Option<IpAddr> {
        let all = || vm.nics.iter().flat_map(|nic| nic.addresses.iter().copied());
        let usable = |address: &IpAddr| match address {
            IpAddr::V4(address) => !address.is_link_local(),
            IpAddr::V6(address) => !address.is_unicast_link_local(),
        };
        if self.ranges.is_empty() {
            return all().find(IpAddr::is_ipv4).filter(usable).or_else(|| all().find(usable));
        }
        self.ranges.iter().find_map(|range| all().find(|address| range.contains(*address)))
    }
}

const PLACES: [&str; 4] = ["{id}", "{name}", "{exercise}", "{deployment}"];

#[async_trait]
impl Addresses for ComputeAddresses {
    async fn locate(&self, vm: VmId) -> Result<Endpoint> {
        let machine = match self.compute.get_vm(vm).await {
            Ok(machine) => machine,
            Err(error) if error.kind() == ErrorKind::NotFound => return Err(gone()),
            Err(error) => return Err(error),
        };
        match machine.state {
            VmState::Running => {}
            VmState::Building => return Err(not_ready("the machine is still being built")),
            VmState::Deleting => return Err(gone()),
            VmState::Stopped | VmState::Paused | VmState::Failed(_) => {
                return Err(Error::new(ErrorKind::Conflict, "the machine is not running")
                    .with_reason(reason::GUEST_NOT_RUNNING));
            }
        }
        match self.host(&machine) {
            Some(host) => Ok(Endpoint { host, port: self.port }),
            None if self.pattern.is_some() => {
                Err(absent("the machine has not what the pattern for host names wants, or no host name can have it"))
            }
            None if machine.nics.is_empty() => Err(absent("the machine has no network card, so SSH has no way to it")),
            // A lease may come, or be seen, late.
            None => Err(not_ready("the cloud knows no address of the machine yet that SSH could use")),
        }
    }
}

fn gone() -> Error {
    Error::not_found("the machine is gone").with_reason(reason::GUEST_GONE)
}

fn absent(message: &str) -> Error {
    Error::unsupported(message).with_reason(reason::AGENT_ABSENT)
}

pub(super) fn not_ready(message: impl Into<String>) -> Error {
    Error::unavailable(message).with_reason(reason::AGENT_NOT_READY)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::{
        Name, Nic, Owner, PowerAction, Retry, Tags, VmSpec,
        memory::{MemoryCloud, MemoryOptions},
    };

    fn nic(addresses: &[&str]) -> Nic {
        let addresses = addresses.iter().map(|text| text.parse().unwrap()).collect();
        Nic { network: None, mac: None, addresses }
    }

    fn vm(nics: Vec<Nic>) -> Vm {
        let tags = Tags {
            owner: Owner::new("o").unwrap(),
            request: crate::RequestId::random(),
            scope: crate::Scope::new("ex", "blue team").unwrap(),
        };
        Vm {
            id: VmId::random(),
            name: Name::new("web").unwrap(),
            tags: Some(tags),
            state: VmState::Running,
            cpus: 1,
            ram_bytes: 1 << 30,
            image: None,
            nics,
            has_agent_channel: false,
        }
    }

    fn addresses() -> ComputeAddresses {
        ComputeAddresses::new(Arc::new(MemoryCloud::new()))
    }

    #[test]
    fn the_first_usable_address_is_taken() {
        let of = |nics| addresses().address(&vm(nics)).map(|address| address.to_string());
        assert_eq!(of(vec![nic(&["fd00::1"]), nic(&["10.0.0.1", "10.0.0.2"])]).as_deref(), Some("10.0.0.1"));
        assert_eq!(of(vec![nic(&["fe80::1", "fd00::1"])]).as_deref(), Some("fd00::1"));
        assert_eq!(of(vec![nic(&["fe80::1"]), nic(&["169.254.1.1"])]), None);
    }

    #[test]
    fn ranges_choose_in_their_order() {
        let ranges = ["203.0.113.0/24", "10.0.0.0/8"].map(|text| text.parse().unwrap());
        let by_range = addresses().with_ranges(ranges.to_vec());
        let of = |nics| by_range.address(&vm(nics)).map(|address| address.to_string());
        assert_eq!(of(vec![nic(&["192.168.0.1", "10.9.9.9", "203.0.113.7"])]).as_deref(), Some("203.0.113.7"));
        assert_eq!(of(vec![nic(&["192.168.0.1", "10.9.9.9"])]).as_deref(), Some("10.9.9.9"));
        assert_eq!(of(vec![nic(&["192.168.0.1"])]), None);
    }

    #[test]
    fn a_range_has_a_form() {
        let contains = |range: &str, address: &str| range.parse::<Range>().unwrap().contains(address.parse().unwrap());
        assert!(contains("10.1.0.0/16", "10.1.255.255") && !contains("10.1.0.0/16", "10.2.0.0"));
        assert!(contains("0.0.0.0/0", "1.2.3.4") && !contains("0.0.0.0/0", "::1"));
        assert!(contains("fd00::/8", "fd12::1") && contains("10.0.0.1", "10.0.0.1"));
        assert!(!contains("10.0.0.1", "10.0.0.2"));
        for bad in ["", "10.0.0.0/33", "fd00::/129", "10.0.0.0/x", "10.0.0/8", "host/8"] {
            assert!(bad.parse::<Range>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_pattern_makes_a_host_name() {
        let of = |pattern: &str, vm: &Vm| addresses().with_pattern(pattern).unwrap().host(vm);
        let machine = vm(Vec::new());
        assert_eq!(of("{name}.{exercise}.example", &machine).as_deref(), Some("web.ex.example"));
        assert_eq!(of("vm-{id}", &machine), Some(format!("vm-{}", machine.id)));
        // A blank is in no host name.
        assert_eq!(of("{name}.{deployment}.example", &machine), None);
        for bad in ["", "host", "{ip}.example", "{name}/x", "{name"] {
            assert!(addresses().with_pattern(bad).is_err(), "{bad}");
        }
    }

    async fn fails(cloud: &MemoryCloud, id: VmId) -> (ErrorKind, Option<&'static str>, Retry) {
        let error = ComputeAddresses::new(Arc::new(cloud.clone())).locate(id).await.unwrap_err();
        (error.kind(), error.reason(), error.retry())
    }

    #[tokio::test]
    async fn each_state_of_a_machine_is_its_own_error() {
        let cloud = MemoryCloud::with(MemoryOptions { single_steps: true, ..MemoryOptions::default() });
        let gone = (ErrorKind::NotFound, Some(reason::GUEST_GONE), Retry::Never);
        assert_eq!(fails(&cloud, VmId::random()).await, gone);
        let spec = VmSpec { links: Vec::new(), labels: BTreeMap::new(), ..MemoryCloud::tiny_spec("a") };
        let id = cloud.create_vm(&spec).await.unwrap().id;
        let not_ready = (ErrorKind::Unavailable, Some(reason::AGENT_NOT_READY), Retry::Safe);
        assert_eq!(fails(&cloud, id).await, not_ready);
        while cloud.step().is_some() {}
        let absent = (ErrorKind::Unsupported, Some(reason::AGENT_ABSENT), Retry::Never);
        assert_eq!(fails(&cloud, id).await, absent);
        cloud.set_power(id, PowerAction::Stop { grace: None }).await.unwrap();
        let stopped = (ErrorKind::Conflict, Some(reason::GUEST_NOT_RUNNING), Retry::Never);
        assert_eq!(fails(&cloud, id).await, stopped);
        cloud.delete_vm(id).await.unwrap();
        assert_eq!(fails(&cloud, id).await, gone);
    }
}
