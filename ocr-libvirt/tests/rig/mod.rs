//! One private libvirtd for a test binary, with the tiny guest as its template.
//!
//! It is started by the first test that asks and torn down when the test process ends, however it ends: a helper
//! process waits for its stdin, which is a pipe from here, to close.

#![allow(dead_code, reason = "each test binary uses its own part")]

use std::{
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, OnceLock},
    time::Duration,
};

use ocr_core::{
    ComputeBackend, GuestExecExt, ImageBackendExt, ImageId, Name, NetworkBackendExt, NetworkId, Owner, RequestId,
    Scope, Tags, Vm, VmSpec,
};
use ocr_libvirt::{Config, Libvirt, config::DomainType};

/// How long a guest may take to boot here: software emulation on a machine that others use too.
pub(crate) const BOOT: Duration = Duration::from_secs(180);

pub(crate) struct Rig {
    state: PathBuf,
    pub(crate) uri: String,
    _keeper: Child,
}

/// The rig, or `None` with a word why the test is ignored.
pub(crate) fn rig() -> Option<Arc<Rig>> {
    static RIG: OnceLock<Result<Arc<Rig>, String>> = OnceLock::new();
    match RIG.get_or_init(Rig::start) {
        Ok(rig) => Some(rig.clone()),
        Err(why) => {
            // Where all that is needed was installed, what cannot run has failed.
            assert!(std::env::var_os("OCR_IGNORE_NOTHING").is_none(), "ignored: {why}");
            println!("ignored: {why}");
            None
        }
    }
}

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/live").join(name)
}

impl Rig {
    fn start() -> Result<Arc<Self>, String> {
        for tool in ["libvirtd", "virsh", "qemu-system-x86_64", "tini"] {
            let path = std::env::var_os("PATH").unwrap_or_default();
            let mut folders: Vec<_> = std::env::split_paths(&path).collect();
            folders.extend(["/usr/sbin".into(), "/sbin".into()]);
            if !folders.iter().any(|folder| folder.join(tool).exists()) {
                return Err(format!("{tool} is not installed (.ci/setup does it)"));
            }
        }
        let guest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/guest");
        let built = Command::new(script("build-guest")).arg(&guest).output().unwrap();
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        let state = tempfile::Builder::new().prefix("ocr-live-").tempdir().unwrap().keep();
        let keeper = Command::new("sh")
            .args(["-c", "cat >/dev/null; \"$1\" down \"$2\"; rm -rf \"$2\"", "keeper"])
            .args([script("libvirtd").as_os_str(), state.as_os_str()])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // A Ctrl-C is for the tests; the keeper cleans up after them.
            .process_group(0)
            .spawn()
            .unwrap();
        std::fs::create_dir(state.join("pool")).unwrap();
        std::fs::copy(guest.join("guest.qcow2"), state.join("pool/guest.qcow2")).unwrap();
        let up = Command::new(script("libvirtd")).arg("up").arg(&state).output().unwrap();
        assert!(up.status.success(), "{}", String::from_utf8_lossy(&up.stderr));
        let uri = String::from_utf8(up.stdout).unwrap().trim().to_owned();
        Ok(Arc::new(Self { state, uri, _keeper: keeper }))
    }

    /// `libvirtd COMMAND STATE ARGUMENTS...`
    pub(crate) fn libvirtd(&self, command: &str, arguments: &[&str]) -> String {
        let output = Command::new(script("libvirtd")).arg(command).arg(&self.state).args(arguments).output().unwrap();
        assert!(output.status.success(), "{command} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Names of the files in the pool's folder.
    pub(crate) fn pool(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.state.join("pool")).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    pub(crate) fn pool_folder(&self) -> PathBuf {
        self.state.join("pool")
    }

    pub(crate) fn config(&self) -> Config {
        Config {
            uri: self.uri.clone(),
            domain_type: DomainType::Qemu,
            keepalive: Duration::from_secs(2),
            ..Config::default()
        }
    }

    pub(crate) async fn open(&self) -> Libvirt {
        Libvirt::open(self.config()).await.unwrap()
    }
}

pub(crate) async fn template(libvirt: &Libvirt) -> ImageId {
    libvirt.resolve_image("guest.qcow2").await.unwrap().id
}

pub(crate) async fn network(libvirt: &Libvirt, name: &str) -> NetworkId {
    libvirt.resolve_network(name).await.unwrap().id
}

/// A spec of a machine of its own owner.
pub(crate) async fn spec(libvirt: &Libvirt, name: &str) -> VmSpec {
    VmSpec {
        tags: Tags {
            owner: Owner::new(format!("test-{}", &RequestId::random().as_str()[..8])).unwrap(),
            request: RequestId::random(),
            scope: Scope::new("live tests", "").unwrap(),
        },
        name: Name::new(name).unwrap(),
        cpus: 1,
        ram_bytes: 96 << 20,
        image: template(libvirt).await,
        links: Vec::new(),
        labels: Default::default(),
    }
}

/// A machine whose agent answers.
pub(crate) async fn guest(libvirt: &Libvirt, name: &str) -> Vm {
    let vm = libvirt.create_vm(&spec(libvirt, name).await).await.unwrap();
    libvirt.wait_ready(vm.id, BOOT, Duration::from_millis(500)).await.unwrap();
    vm
}
