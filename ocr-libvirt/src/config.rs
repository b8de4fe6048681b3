//! How to reach libvirt, and what kind of machines to make there.

use std::time::Duration;

use ocr_core::{Error, Result};
use secrecy::SecretString;

/// Settings of one libvirt. [`Config::default`] is the system's libvirtd of this machine.
///
/// `Debug` does not show the password.
#[derive(Clone, Debug)]
pub struct Config {
    /// libvirt's address, such as `qemu:///system` or `qemu+tcp://host/system`. It never holds a password.
    pub uri: String,
    /// The account for a libvirtd that asks for one (SASL).
    pub user: Option<String>,
    /// Its password.
    pub password: Option<SecretString>,
    /// The storage pool that holds templates and disks: a folder (`dir`, `fs` or `netfs`).
    pub pool: String,
    /// How machines are run.
    pub domain_type: DomainType,
    /// The virtual board.
    pub machine: Machine,
    /// What processor a guest sees.
    pub cpu: CpuMode,
    /// QEMU's translation cache under software emulation, in MiB; `None` is QEMU's own choice (much memory).
    pub tcg_cache_mib: Option<u32>,
    /// Connections for agent commands. Each carries at most [`Config::AGENT_CALLS_PER_CONNECTION`] at once,
    /// because libvirtd reads no more than 5 requests of one connection, and a frozen guest holds its place for
    /// seconds. All of them together must leave some of libvirtd's 20 workers free.
    pub agent_connections: usize,
    /// Connections for everything else.
    pub control_connections: usize,
    /// How long one control call may take before its caller is told.
    pub call_deadline: Duration,
    /// How long making or deleting a machine may take in libvirt (not in the guest).
    pub create_deadline: Duration,
    /// How long the agent may take for one command. A silent agent costs at most 5 s, whatever this says.
    pub agent_deadline: Duration,
    /// How much longer than the guest's own deadline the host waits for the result of a command, so that a guest
    /// that reboots or an agent that restarts is waited for.
    pub exec_margin: Duration,
    /// How often a silent libvirtd is asked for a sign of life; three unanswered ones end the connection.
    pub keepalive: Duration,
    /// The most calls into libvirt at once, those included whose caller has given up.
    pub max_calls: usize,
    /// Where the in-guest runner keeps results.
    pub guest_folder: String,
}

impl Config {
    /// The most agent commands at once on one connection.
    pub const AGENT_CALLS_PER_CONNECTION: usize = 3;

    /// Checks the settings against themselves.
    ///
    /// # Errors
    /// `Invalid` naming the field.
    pub fn check(&self) -> Result<()> {
        for (field, text) in [("uri", &self.uri), ("pool", &self.pool)] {
            if text.is_empty() || text.contains('\0') {
                return Err(Error::invalid(field, "must not be empty nor contain a NUL byte"));
            }
        }
        if self.user.is_some() != self.password.is_some() {
            return Err(Error::invalid("user", "user and password go together"));
        }
        for (field, count, max) in [
            ("agent_connections", self.agent_connections, 5),
            ("control_connections", self.control_connections, 5),
            ("max_calls", self.max_calls, 1024),
        ] {
            if !(1..=max).contains(&count) {
                return Err(Error::invalid(field, format_args!("wants 1 to {max}, got {count}")));
            }
        }
        for (field, time) in [
            ("call_deadline", self.call_deadline),
            ("create_deadline", self.create_deadline),
            ("agent_deadline", self.agent_deadline),
            ("keepalive", self.keepalive),
        ] {
            if time < Duration::from_secs(1) || time > Duration::from_secs(3600) {
                return Err(Error::invalid(field, format_args!("wants 1 s to 1 h, got {time:?}")));
            }
        }
        ocr_core::guest::check_guest_path(&self.guest_folder)
            .map_err(|error| Error::invalid("guest_folder", error.message()))
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            uri: "qemu:///system".to_owned(),
            user: None,
            password: None,
            pool: "default".to_owned(),
            domain_type: DomainType::default(),
            machine: Machine::default(),
            cpu: CpuMode::default(),
            tcg_cache_mib: Some(32),
            agent_connections: 3,
            control_connections: 2,
            call_deadline: Duration::from_secs(30),
            create_deadline: Duration::from_secs(120),
            agent_deadline: Duration::from_secs(10),
            exec_margin: Duration::from_secs(30),
            keepalive: Duration::from_secs(5),
            max_calls: 64,
            guest_folder: "/var/lib/ocr".to_owned(),
        }
    }
}

/// How machines are run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DomainType {
    /// By hardware.
    Kvm,
    /// By software emulation.
    Qemu,
    /// By hardware where a test guest really runs on it, otherwise by software emulation. A `/dev/kvm` that is
    /// there, and even one that opens, proves nothing.
    #[default]
    Auto,
}

/// The virtual board.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Machine {
    /// Intel 440FX with PCI: boots anything. NICs are in slots 3 and up, so Linux calls the first one `ens3`.
    #[default]
    Pc,
    /// Intel Q35 with PCI Express.
    Q35,
}

impl Machine {
    /// The name that QEMU knows.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pc => "pc",
            Self::Q35 => "q35",
        }
    }
}

/// What processor a guest sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CpuMode {
    /// [`CpuMode::HostModel`] by hardware, [`CpuMode::Maximum`] by emulation.
    #[default]
    Auto,
    /// Everything that the emulator can do.
    Maximum,
    /// The nearest named model of the host's; machines can move between hosts.
    HostModel,
    /// The host's own.
    HostPassthrough,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_is_sound_and_faults_are_named() {
        Config::default().check().unwrap();
        let faulty = Config { agent_connections: 0, ..Config::default() };
        assert!(faulty.check().unwrap_err().to_string().contains("agent_connections"));
        let faulty = Config { uri: "a\0b".to_owned(), ..Config::default() };
        assert!(faulty.check().unwrap_err().to_string().contains("uri"));
        let faulty = Config { guest_folder: "ops".to_owned(), ..Config::default() };
        assert!(faulty.check().unwrap_err().to_string().contains("guest_folder"));
    }

    #[test]
    fn the_password_is_not_shown() {
        let config = Config { user: Some("u".into()), password: Some("hunter2".into()), ..Config::default() };
        assert!(!format!("{config:?}").contains("hunter2"));
    }

    #[test]
    fn agent_commands_leave_workers_free() {
        let config = Config::default();
        assert!((config.agent_connections + 1) * Config::AGENT_CALLS_PER_CONNECTION < 15);
    }
}
