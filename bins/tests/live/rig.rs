//! One private libvirtd for this test process, looked at from outside with `virsh`, never through the code under test.

use std::{
    collections::BTreeSet,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use tokio::sync::Semaphore;

use crate::support::{keeper, say};

/// How many guests may run at once: two cores emulate them.
pub(crate) const MAX_GUESTS: u32 = 4;
/// The template's name.
pub(crate) const TEMPLATE: &str = "guest.qcow2";
/// The namespace of what the backend keeps in a domain's metadata.
const METADATA: &str = "urn:open-cyber-range:libvirt:machine:1";

pub(crate) struct Rig {
    state: PathBuf,
    pub(crate) uri: String,
    pub(crate) guests: Semaphore,
}

/// The rig, or `None` after a word why the test is ignored.
pub(crate) fn rig() -> Option<&'static Rig> {
    static RIG: OnceLock<Result<Rig, String>> = OnceLock::new();
    match RIG.get_or_init(Rig::start) {
        Ok(rig) => Some(rig),
        Err(why) => {
            // Where all that is needed was installed, what cannot run has failed.
            assert!(std::env::var_os("OCR_IGNORE_NOTHING").is_none(), "ignored: {why}");
            say(format!("ignored: {why}"));
            None
        }
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn is_installed(tool: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<_> = std::env::split_paths(&path).collect();
    folders.extend(["/usr/sbin".into(), "/sbin".into()]);
    folders.iter().any(|folder| folder.join(tool).exists())
}

/// Runs a program that must succeed; its stdout.
pub(crate) fn output(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

impl Rig {
    fn start() -> Result<Self, String> {
        for tool in ["libvirtd", "virsh", "qemu-system-x86_64", "tini", "dnsmasq"] {
            if !is_installed(tool) {
                return Err(format!("{tool} is not installed (.ci/setup does it)"));
            }
        }
        let image = root().join("target/guest").join(TEMPLATE);
        if !image.exists() {
            return Err(format!("there is no guest image {} (`make guest` builds it)", image.display()));
        }
        if std::fs::metadata("/proc/self").unwrap().uid() != 0 {
            return Err("a private libvirtd needs root".to_owned());
        }
        // The keeper takes it down by this name.
        let state = keeper().folder().join("libvirt");
        std::fs::create_dir_all(state.join("pool")).unwrap();
        std::fs::copy(image, state.join("pool").join(TEMPLATE)).unwrap();
        let up = output(Command::new(script()).arg("up").arg(&state));
        Ok(Self { state, uri: up.trim().to_owned(), guests: Semaphore::new(MAX_GUESTS as usize) })
    }

    pub(crate) fn virsh(&self, arguments: &[&str]) -> String {
        self.try_virsh(arguments).unwrap_or_else(|why| panic!("virsh {arguments:?}: {why}"))
    }

    pub(crate) fn try_virsh(&self, arguments: &[&str]) -> Result<String, String> {
        let virsh = Command::new("virsh").args(["--quiet", "--connect", &self.uri]).args(arguments).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        if virsh.status.success() { Ok(text(&virsh.stdout)) } else { Err(text(&virsh.stderr)) }
    }

    /// Ids of all domains.
    fn domains(&self) -> BTreeSet<String> {
        let all = self.virsh(&["list", "--all", "--uuid"]);
        all.lines().map(|line| line.trim().to_owned()).filter(|line| !line.is_empty()).collect()
    }

    /// Ids of the domains whose metadata names the owner.
    pub(crate) fn domains_of(&self, owner: &str) -> BTreeSet<String> {
        let tag = format!("owner>{owner}<");
        // One that goes while we look is none.
        let is_ours = |id: &String| self.try_virsh(&["metadata", id, METADATA]).is_ok_and(|xml| xml.contains(&tag));
        self.domains().into_iter().filter(is_ours).collect()
    }

    /// Names of the files in the pool, without the template.
    fn disks(&self) -> BTreeSet<String> {
        let entries = std::fs::read_dir(self.state.join("pool")).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name != TEMPLATE).collect()
    }

    /// Files in the pool that are no domain's disk.
    pub(crate) fn lone_disks(&self) -> BTreeSet<String> {
        let disks = self.disks();
        let domains = self.domains();
        let lone = disks.into_iter().filter(|disk| !domains.iter().any(|id| disk.contains(id.as_str())));
        // A disk goes before its domain, so one whose domain went while we looked is gone too.
        let still = self.disks();
        lone.filter(|disk| still.contains(disk)).collect()
    }

    /// Files in the pool that have this in their name.
    pub(crate) fn disks_with(&self, part: &str) -> BTreeSet<String> {
        self.disks().into_iter().filter(|disk| disk.contains(part)).collect()
    }

    /// The guest's serial console.
    pub(crate) fn console(&self, vm: &str) -> PathBuf {
        self.virsh(&["ttyconsole", vm]).into()
    }

    /// Pulls the plug of an owner's machines: what a test that failed has left must not slow down the others.
    pub(crate) fn clear(&self, owner: &str) {
        for id in self.domains_of(owner) {
            let _ = self.try_virsh(&["destroy", &id]);
            let _ = self.try_virsh(&["undefine", &id, "--remove-all-storage"]);
        }
    }
}

fn script() -> PathBuf {
    root().join("ocr-libvirt/tests/live/libvirtd")
}
