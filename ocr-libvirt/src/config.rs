//! How to reach a hypervisor, and how machines are made there.

use std::{fmt, str::FromStr, time::Duration};

use ocr_core::{Error, Result};
use secrecy::SecretString;

/// Settings of a hypervisor.
#[derive(Clone, Debug)]
pub struct Config {
    /// libvirt's connection address, such as `qemu:///system`.
    pub uri: String,
    /// User name, for addresses that ask for one.
    pub user: Option<String>,
    /// Password, for addresses that ask for one.
    pub password: Option<SecretString>,
    /// How machines are virtualised.
    pub domain_type: DomainType,
    /// The machine type of new machines.
    pub machine: Machine,
    /// The storage pool with the templates; machines' disks are made there.
    pub pool: String,
    /// How long an ordinary call may take.
    pub call_deadline: Duration,
    /// How long a call may take that moves a disk's data.
    pub transfer_deadline: Duration,
    /// Connections for ordinary calls.
    pub control_connections: usize,
    /// Connections for agent commands. libvirt serves five calls of a connection at once, and a guest that hangs holds
    /// one of them for seconds; at most three commands are sent over each.
    pub agent_connections: usize,
    /// The most memory of QEMU's translation cache, in MiB, where machines are emulated: a machine then takes
    /// about 180 MB where the default takes 220.
    pub tcg_cache_mib: u32,
}

impl Config {
    /// The usual settings for an address.
    pub fn new(uri: impl Into<String>) -> Self {
        Self {
            uri: uri.into(),
            user: None,
            password: None,
            domain_type: DomainType::Auto,
            machine: Machine::Pc,
            pool: "default".to_owned(),
            call_deadline: Duration::from_secs(30),
            transfer_deadline: Duration::from_secs(3600),
            control_connections: 2,
            agent_connections: 4,
            tcg_cache_mib: 32,
        }
    }

    /// Checks what can be checked without the hypervisor.
    ///
    /// # Errors
    /// `Invalid` naming the setting.
    pub fn check(&self) -> Result<()> {
        // The C library's wrapper panics on a NUL byte.
        for (name, text) in [("HYPERVISOR", &self.uri), ("STORAGE_POOL", &self.pool)] {
            if text.is_empty() || text.contains('\0') {
                return Err(Error::invalid(name, "must not be empty, and without NUL bytes"));
            }
        }
        if self.user.is_some() != self.password.is_some() {
            return Err(Error::invalid("HYPERVISOR_USER", "and HYPERVISOR_PASSWORD are given together or not at all"));
        }
        if self.control_connections == 0 || self.agent_connections == 0 {
            return Err(Error::invalid("connections", "wants at least one for control and one for agents"));
        }
        Ok(())
    }
}

/// How machines are virtualised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DomainType {
    /// By the processor.
    Kvm,
    /// By QEMU's emulation.
    Qemu,
    /// By the processor where a domain of that type really makes progress, by emulation elsewhere. That `/dev/kvm` is
    /// there proves nothing: there are hosts where it opens and guests hang.
    Auto,
}

impl FromStr for DomainType {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text.to_ascii_lowercase().as_str() {
            "kvm" => Ok(Self::Kvm),
            "qemu" => Ok(Self::Qemu),
            "auto" => Ok(Self::Auto),
            _ => Err(Error::invalid(
                "DOMAIN_TYPE",
                format_args!("wants kvm, qemu or auto, got {}", ocr_core::id::shown(text)),
            )),
        }
    }
}

impl fmt::Display for DomainType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
            Self::Qemu => "qemu",
            Self::Auto => "auto",
        })
    }
}

/// A machine type of QEMU's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Machine {
    /// The older chipset; every guest knows it.
    Pc,
    /// The newer one, with PCI Express.
    Q35,
}

impl Machine {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Pc => "pc",
            Self::Q35 => "q35",
        }
    }
}
