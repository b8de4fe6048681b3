//! The command line's definition: help, completions and man pages all come from here.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};
use ocr_core::{Scope, VmId};

/// Deploy virtual machines and act inside them.
#[derive(Debug, Parser)]
#[command(name = "ocr", version, propagate_version = true, max_term_width = 100)]
pub struct Cli {
    /// Print JSON for programs instead of text for people
    #[arg(long, global = true)]
    pub json: bool,

    /// Address of the Machiner
    #[arg(long, global = true, env = "OCR_MACHINER", default_value = "http://127.0.0.1:9000", value_name = "URL")]
    pub machiner: String,

    /// Address of the Executor
    #[arg(long, global = true, env = "OCR_EXECUTOR", default_value = "http://127.0.0.1:7000", value_name = "URL")]
    pub executor: String,

    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Create, list, show and delete virtual machines
    #[command(subcommand)]
    Vm(VmCommand),
    /// Install and delete features
    #[command(subcommand)]
    Feature(PackageCommand),
    /// Install and delete injects
    #[command(subcommand)]
    Inject(PackageCommand),
    /// Install, watch and delete conditions
    #[command(subcommand)]
    Condition(ConditionCommand),
    /// List packages, check that one exists, and show the text in one
    #[command(subcommand)]
    Package(PackagesCommand),
    /// Show what the Executor's queue does, and why a machine is busy
    #[command(subcommand)]
    Queue(QueueCommand),
    /// End unfinished work, delete what no record owns, forget what is gone
    Reconcile,
    /// Run the conformance suite against a backend; it touches only what it makes and leaves nothing
    Conform(ConformArgs),
    /// Show the whole flow: deploy, install, inject, watch, reboot, delete
    Demo(DemoArgs),
    /// Print a new key for STATE_KEY or STATE_KEY_FILE
    Key,
    /// Serve everything in one process, with the embedded store
    Serve(ServeArgs),
    /// Forget a machine's pinned SSH host key, when it was changed on purpose; the server must be stopped
    #[cfg(feature = "ssh")]
    ForgetHostKey {
        /// The machine's id
        id: VmId,
        /// File of the embedded store that the server keeps its records in
        #[arg(long, value_name = "FILE")]
        state: PathBuf,
    },
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the man pages into a folder
    Man {
        /// The folder; it is made when it is not there
        folder: PathBuf,
    },
}

/// `ocr vm ...`
#[derive(Debug, Subcommand)]
pub enum VmCommand {
    /// Create a machine and wait until it is ready
    Create(VmCreate),
    /// List our machines
    List {
        /// Whose
        #[command(flatten)]
        scope: ScopeArgs,
    },
    /// Show one machine
    Show {
        /// The machine's id
        id: VmId,
    },
    /// Delete a machine; one that is gone is fine
    Delete {
        /// The machine's id
        id: VmId,
    },
}

/// `ocr vm create`
#[derive(Debug, Args)]
pub struct VmCreate {
    /// The machine's name, unique in its exercise and deployment
    pub name: String,
    /// The template's id or name
    #[arg(long, short)]
    pub template: String,
    /// Virtual cpus
    #[arg(long, default_value_t = 1)]
    pub cpu: u32,
    /// Memory, such as 512MiB or 2GiB
    #[arg(long, default_value = "512MiB", value_parser = parse_size)]
    pub ram: u64,
    /// A network's id or name; one NIC for each, in this order
    #[arg(long = "link", short, value_name = "NETWORK")]
    pub links: Vec<String>,
    /// Where it belongs
    #[command(flatten)]
    pub scope: ScopeArgs,
}

/// Exercise and deployment.
#[derive(Clone, Debug, Args)]
pub struct ScopeArgs {
    /// The exercise
    #[arg(long, default_value = "", hide_default_value = true)]
    pub exercise: String,
    /// The deployment
    #[arg(long, default_value = "", hide_default_value = true)]
    pub deployment: String,
}

impl ScopeArgs {
    /// Both as a checked scope.
    ///
    /// # Errors
    /// When one of them is no name.
    pub fn scope(&self) -> ocr_core::Result<Scope> {
        Scope::new(self.exercise.clone(), self.deployment.clone())
    }

    /// Whether neither is given.
    pub fn is_empty(&self) -> bool {
        self.exercise.is_empty() && self.deployment.is_empty()
    }
}

/// `ocr feature ...` and `ocr inject ...`
#[derive(Debug, Subcommand)]
pub enum PackageCommand {
    /// Copy a package's assets into a machine and run its action
    Install(PackageInstall),
    /// Remove its assets, and run its delete action where it has one
    Delete {
        /// The id that install printed
        id: String,
    },
}

/// `ocr feature install`
#[derive(Debug, Args)]
pub struct PackageInstall {
    /// The machine's id
    pub vm: VmId,
    /// The package, as name or name@requirement, such as web@^1.2
    pub package: String,
    /// What to call it; the package's name when not given
    #[arg(long)]
    pub name: Option<String>,
    /// As whom
    #[command(flatten)]
    pub account: AccountArgs,
    /// A variable for the action; may be repeated
    #[arg(long = "env", short, value_name = "NAME=VALUE")]
    pub environment: Vec<String>,
}

/// The guest's account.
#[derive(Debug, Args)]
pub struct AccountArgs {
    /// The guest's user that the action runs as; the agent's own (root) when not given
    #[arg(long, short, default_value = "", hide_default_value = true)]
    pub user: String,
}

/// `ocr package ...`
#[derive(Debug, Subcommand)]
pub enum PackagesCommand {
    /// List packages, each version of them
    List {
        /// Only of this type: vm, feature, condition, inject, event, malware, exercise, banner or other
        #[arg(long = "type", value_name = "TYPE", default_value = "", hide_default_value = true)]
        kind: String,
    },
    /// Say whether there is a package that would be taken
    Check {
        /// The package, as name or name@requirement, such as web@^1.2
        package: String,
    },
    /// Print the scenario of an exercise, or an event or banner as HTML
    Show {
        /// The package, as name or name@requirement, such as web@^1.2
        package: String,
    },
}

/// `ocr condition ...`
#[derive(Debug, Subcommand)]
pub enum ConditionCommand {
    /// Install a condition; it runs while it is watched
    Install(ConditionInstall),
    /// Show a live line for each condition: value, time since the last one, lateness
    Watch(ConditionWatch),
    /// Remove a condition
    Delete {
        /// The id that install printed
        id: String,
    },
}

/// `ocr condition install`
#[derive(Debug, Args)]
pub struct ConditionInstall {
    /// The machine's id
    pub vm: VmId,
    /// A condition package, as name or name@requirement
    #[arg(required_unless_present = "command", conflicts_with = "command")]
    pub package: Option<String>,
    /// A shell line that prints a number from 0 to 1, instead of a package
    #[arg(long, requires = "interval")]
    pub command: Option<String>,
    /// From one run of the command to the next, such as 10s; whole seconds
    #[arg(long, value_parser = humantime::parse_duration, conflicts_with = "package")]
    pub interval: Option<Duration>,
    /// What to call it
    #[arg(long)]
    pub name: Option<String>,
    /// As whom
    #[command(flatten)]
    pub account: AccountArgs,
    /// A variable for the command; may be repeated
    #[arg(long = "env", short, value_name = "NAME=VALUE")]
    pub environment: Vec<String>,
}

/// `ocr condition watch`
#[derive(Debug, Args)]
pub struct ConditionWatch {
    /// The conditions' ids
    #[arg(required = true)]
    pub ids: Vec<String>,
    /// End after so many values of each
    #[arg(long)]
    pub count: Option<u64>,
}

/// `ocr queue ...`
#[derive(Debug, Subcommand)]
pub enum QueueCommand {
    /// Show a live table of machines and conditions, the latest first; q ends it
    Top(QueueTop),
    /// Tell what has a machine, and since when
    Holder {
        /// The machine's id
        vm: VmId,
    },
}

/// `ocr queue top`
#[derive(Debug, Args)]
pub struct QueueTop {
    /// Show it once, as plain lines
    #[arg(long)]
    pub once: bool,
    /// From one look to the next, such as 500ms or 5s; at least 100ms
    #[arg(long, value_parser = humantime::parse_duration, default_value = "1s")]
    pub interval: Duration,
    /// How many machines and conditions at most, of each; at most 1000
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub top: u32,
    /// Only this machine
    #[arg(long)]
    pub vm: Option<VmId>,
    /// End after so many looks
    #[arg(long, conflicts_with = "once")]
    pub count: Option<u64>,
}

/// `ocr conform`
#[derive(Debug, Args)]
pub struct ConformArgs {
    /// Where machines are
    #[command(flatten)]
    pub backend: BackendArgs,
    /// Run only the cases whose name contains this
    #[arg(long, default_value = "", hide_default_value = true)]
    pub filter: String,
    /// Check the embedded store too, in this file; it is made when it is not there
    #[arg(long, value_name = "FILE")]
    pub state: Option<PathBuf>,
    /// A user of the guest other than the agent's own, for the cases that run commands as one
    #[arg(long)]
    pub guest_user: Option<String>,
    /// List the cases and run none
    #[arg(long)]
    pub list: bool,
}

/// `ocr demo`
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Where machines are
    #[command(flatten)]
    pub backend: BackendArgs,
}

/// `ocr serve`
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Where machines are
    #[command(flatten)]
    pub backend: BackendArgs,
    /// Address to listen on; port 0 takes a free one
    #[arg(long, default_value = "127.0.0.1:9000")]
    pub listen: std::net::SocketAddr,
    /// Folder with Deputy packages
    #[arg(long, value_name = "FOLDER", required_unless_present = "registry", conflicts_with = "registry")]
    pub packages: Option<PathBuf>,
    /// Address of a Deputy registry, instead of a folder
    #[arg(long, value_name = "URL", requires = "registry_cache")]
    pub registry: Option<String>,
    /// Folder that keeps what came from the registry
    #[arg(long, value_name = "FOLDER", requires = "registry")]
    pub registry_cache: Option<PathBuf>,
    /// Address of the metrics page, such as 127.0.0.1:9100; without it there is none
    #[arg(long, value_name = "ADDRESS")]
    pub metrics: Option<std::net::SocketAddr>,
    /// File of the embedded store; without it records are lost at the end
    #[arg(long, value_name = "FILE")]
    pub state: Option<PathBuf>,
    /// File of keys that seal what is secret in the records; `ocr key` makes one
    #[arg(long, env = "STATE_KEY_FILE", value_name = "FILE")]
    pub state_key_file: Option<PathBuf>,
}

/// Which backend, and how to reach it.
#[derive(Clone, Debug, Args)]
pub struct BackendArgs {
    /// Where machines are
    #[arg(long, value_enum, default_value_t = BackendKind::Libvirt)]
    pub backend: BackendKind,
    /// libvirt: connection address
    #[arg(long, env = "HYPERVISOR", default_value = "qemu:///system", value_name = "URI")]
    pub uri: String,
    /// libvirt: storage pool with the templates
    #[arg(long, env = "STORAGE_POOL", default_value = "default")]
    pub pool: String,
    /// libvirt: kvm, qemu (emulation), or auto, which tries
    #[arg(long, env = "DOMAIN_TYPE", default_value = "auto")]
    pub domain_type: String,
    /// The template's id or name, for demo and conform
    #[arg(long, default_value = "guest.qcow2")]
    pub template: String,
    /// Tag on everything that is made
    #[arg(long, env = "OWNER", default_value = "ocr")]
    pub owner: ocr_core::Owner,
    /// How long a machine may take to be ready
    #[arg(long, value_parser = humantime::parse_duration, default_value = "300s")]
    pub ready_timeout: Duration,
}

/// A backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BackendKind {
    /// A hypervisor through libvirt
    Libvirt,
    /// In this process, without any hypervisor
    Memory,
}

/// Reads `512MiB`, `2 GiB`, `1g` or plain bytes.
fn parse_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        _ => return Err(format!("wants a number of bytes, KiB, MiB, GiB or TiB, got {text:?}")),
    };
    number
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| format!("wants a size such as 512MiB, got {text:?}"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_are_powers_of_two() {
        assert_eq!(parse_size("512MiB"), Ok(512 << 20));
        assert_eq!(parse_size("2 gib"), Ok(2 << 30));
        assert_eq!(parse_size("77"), Ok(77));
        for bad in ["", "MiB", "-1", "1.5GiB", "99999999999TiB", "1 parsec"] {
            assert!(parse_size(bad).is_err(), "{bad:?}");
        }
    }
}
