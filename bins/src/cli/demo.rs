//! `ocr demo`: the whole flow, on a real guest or in memory, with how long each step took.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{ExitCode, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::StreamExt;
use ocr_core::{
    GuestExec, GuestExecExt, ImageFilter, Owner, PowerAction, Retry, VmFilter, VmId, error::seconds,
    exec::SecretStorage, seal::SealKey,
};
use ocr_grpc::{
    client::{self, ConditionServiceClient, FeatureServiceClient, InjectServiceClient, VirtualMachineServiceClient},
    proto::{
        Condition, ConditionStreamResponse, Configuration, DeployVirtualMachine, Feature, Identifier, Inject, MetaInfo,
        Source, VirtualMachine,
    },
};
use secrecy::ExposeSecret;
use serde_json::json;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
};
use tonic::{Streaming, transport::Channel};

use super::{
    args::{BackendKind, DemoArgs},
    output::{Failure, Output},
    serve,
};
use crate::{backends::Backends, settings::Packages};

/// The packages of the demo, file by file.
const PACKAGES: &[(&str, &str)] = &[
    ("demo-service/package.toml", include_str!("../../demo/packages/demo-service/package.toml")),
    ("demo-service/README.md", include_str!("../../demo/packages/demo-service/README.md")),
    ("demo-service/src/service.sh", include_str!("../../demo/packages/demo-service/src/service.sh")),
    ("demo-service/src/service.conf", include_str!("../../demo/packages/demo-service/src/service.conf")),
    ("demo-inject/package.toml", include_str!("../../demo/packages/demo-inject/package.toml")),
    ("demo-inject/README.md", include_str!("../../demo/packages/demo-inject/README.md")),
    ("demo-inject/src/news.txt", include_str!("../../demo/packages/demo-inject/src/news.txt")),
    ("demo-flag/package.toml", include_str!("../../demo/packages/demo-flag/package.toml")),
    ("demo-flag/README.md", include_str!("../../demo/packages/demo-flag/README.md")),
    ("demo-flag/src/flag.sh", include_str!("../../demo/packages/demo-flag/src/flag.sh")),
];

/// How long a server may take from its start until it listens.
const START_DEADLINE: Duration = Duration::from_secs(60);
/// How long a value may be away, a reboot under emulation included.
const VALUE_DEADLINE: Duration = Duration::from_secs(180);

/// Runs the demo.
pub(crate) async fn run(args: &DemoArgs, output: &Output) -> Result<ExitCode, Failure> {
    let work =
        tempfile::Builder::new().prefix("ocr-demo").tempdir().map_err(|error| Failure::new(error.to_string()))?;
    let packages = work.path().join("packages");
    write_packages(&packages).map_err(|error| Failure::new(format!("{}: {error}", packages.display())))?;
    // Its own owner, so that the proof at the end is about this run alone.
    let owner: Owner = format!("demo-{}", uuid::Uuid::new_v4().simple()).parse()?;

    let started = Instant::now();
    let stage = Stage::set(args, &owner, work.path(), &packages).await?;
    let mut steps = Steps { output: *output, started, done: Vec::new() };
    steps.note("servers started", started);
    let outcome = flow(&stage, args, &mut steps).await;
    if outcome.is_err() {
        // The machine must not outlive a demo that failed half way.
        sweep(&stage, &owner).await;
    }
    let begun = Instant::now();
    stage.servers.stop().await;
    steps.note("servers stopped", begun);
    outcome?;
    prove_nothing_is_left(&stage.backends, &owner, &mut steps).await?;
    steps.summary();
    Ok(ExitCode::SUCCESS)
}

/// What the demo plays on.
struct Stage {
    backends: Backends,
    servers: Servers,
    machiner: Channel,
    executor: Channel,
}

enum Servers {
    InProcess(serve::Serving),
    Processes(Vec<Child>),
}

impl Servers {
    async fn stop(self) {
        match self {
            Self::InProcess(serving) => serving.stop().await,
            Self::Processes(children) => {
                for mut child in children {
                    if let Some(pid) = child.id() {
                        // As an operator would: SIGTERM, then wait for the drain.
                        let _ = Command::new("kill").arg(pid.to_string()).status().await;
                    }
                    if tokio::time::timeout(START_DEADLINE, child.wait()).await.is_err() {
                        let _ = child.kill().await;
                    }
                }
            }
        }
    }
}

impl Stage {
    async fn set(args: &DemoArgs, owner: &Owner, work: &Path, packages: &Path) -> Result<Self, Failure> {
        let mut backend = args.backend.clone();
        backend.owner = owner.clone();
        let backends = Backends::open(&backend).await?;
        let (servers, machiner, executor) = match backend.backend {
            BackendKind::Memory => {
                let listen = ([127, 0, 0, 1], 0).into();
                let packages = Packages::Folder(packages.to_owned());
                let (keep, none) = (SecretStorage::Memory, None);
                let serving = serve::start(backends.clone(), &backend, listen, &packages, None, keep, none).await?;
                let address = serving.address().to_string();
                (Servers::InProcess(serving), address.clone(), address)
            }
            BackendKind::Libvirt => {
                let common = [
                    ("GLOBAL_HOST", "127.0.0.1".to_owned()),
                    ("GLOBAL_INSECURE", "false".to_owned()),
                    ("BACKEND", "libvirt".to_owned()),
                    ("HYPERVISOR", backend.uri.clone()),
                    ("STORAGE_POOL", backend.pool.clone()),
                    ("DOMAIN_TYPE", backend.domain_type.clone()),
                    ("OWNER", owner.to_string()),
                    ("HYPERVISOR_WAIT_TIMEOUT", backend.ready_timeout.as_secs().to_string()),
                    ("HYPERVISOR_WAIT_INTERVAL", "1".to_owned()),
                    ("PACKAGE_DIR", packages.display().to_string()),
                    ("LOG_LEVEL", "WARN".to_owned()),
                    ("STATE_KEY", SealKey::generate().reveal().expose_secret().to_owned()),
                ];
                let (machiner, one) = start_server("ocr-machiner", "MACHINER_PORT", &common, work).await?;
                let (executor, two) = start_server("ocr-executor", "EXECUTOR_PORT", &common, work).await?;
                (Servers::Processes(vec![machiner, executor]), one, two)
            }
        };
        Ok(Self {
            backends,
            servers,
            machiner: client::connect(&format!("http://{machiner}")).await?,
            executor: client::connect(&format!("http://{executor}")).await?,
        })
    }
}

/// Starts a server beside this program and reads from its first line where it listens.
async fn start_server(
    name: &str,
    port: &str,
    settings: &[(&str, String)],
    work: &Path,
) -> Result<(Child, String), Failure> {
    let program = std::env::current_exe()
        .map_err(|error| Failure::new(error.to_string()))?
        .parent()
        .map_or_else(|| PathBuf::from(name), |folder| folder.join(name));
    let mut child = Command::new(&program)
        .env_clear()
        .envs(std::env::var_os("PATH").map(|path| ("PATH", path)))
        .envs(settings.iter().map(|(name, value)| (*name, value.as_str())))
        .env(port, "0")
        .env("STATE_FILE", work.join(format!("{name}.redb")))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| Failure::new(format!("{}: {error}; build it with `make build`", program.display())))?;
    let stdout = child.stdout.take().ok_or_else(|| Failure::new(format!("{name} has no stdout")))?;
    let mut lines = BufReader::new(stdout).lines();
    let line = tokio::time::timeout(START_DEADLINE, lines.next_line())
        .await
        .map_err(|_| Failure::new(format!("{name} did not listen within {}", seconds(START_DEADLINE))))?
        .ok()
        .flatten();
    match line.as_deref().and_then(|line| line.rsplit(' ').next()) {
        Some(address) => Ok((child, address.to_owned())),
        None => Err(Failure::new(format!("{name} ended before it listened; its reason is above"))),
    }
}

async fn flow(stage: &Stage, args: &DemoArgs, steps: &mut Steps) -> Result<(), Failure> {
    let (compute, guest) = (&stage.backends.compute, &stage.backends.guest);
    let environment = vec!["TEAM=blue".to_owned()];

    let begun = Instant::now();
    let mut machines = VirtualMachineServiceClient::new(stage.machiner.clone());
    let template = match (args.backend.backend, args.backend.template.as_str()) {
        // The template of the memory backend has a name of its own.
        (BackendKind::Memory, "guest.qcow2") => "tiny",
        (_, named) => named,
    };
    let request = deploy(template, &links(&stage.backends).await?);
    let vm = steps.during("a machine boots", machines.create(request.clone())).await?.into_inner().value;
    let vm_id: VmId = vm.parse()?;
    steps.note(&format!("created machine {vm}: it runs and its agent answers"), begun);

    let begun = Instant::now();
    let again = machines.create(request).await?.into_inner().value;
    if again != vm {
        return Err(Failure::new(format!("a repeated create made another machine: {again}")));
    }
    steps.note("asked for it again: the same machine", begun);

    let begun = Instant::now();
    let mut features = FeatureServiceClient::new(stage.executor.clone());
    let feature = features
        .create(Feature {
            name: "service".to_owned(),
            virtual_machine_id: vm.clone(),
            source: Some(source("demo-service")),
            environment: environment.clone(),
            ..Feature::default()
        })
        .await?
        .into_inner();
    steps.note(&format!("installed a feature; its action says {:?}", feature.stdout), begun);

    let begun = Instant::now();
    let mut conditions = ConditionServiceClient::new(stage.executor.clone());
    let condition = conditions
        .create(Condition {
            name: "flag".to_owned(),
            virtual_machine_id: vm.clone(),
            source: Some(source("demo-flag")),
            ..Condition::default()
        })
        .await?
        .into_inner()
        .identifier
        .unwrap_or_default();
    let mut values = conditions.stream(condition.clone()).await?.into_inner();
    next_value(&mut values, 0.0).await?;
    steps.note("watching a condition: its value is 0", begun);

    let begun = Instant::now();
    let mut injects = InjectServiceClient::new(stage.executor.clone());
    let inject = injects
        .create(Inject {
            name: "news".to_owned(),
            virtual_machine_id: vm.clone(),
            source: Some(source("demo-inject")),
            environment,
            ..Inject::default()
        })
        .await?
        .into_inner();
    steps.note(&format!("ran an inject; its action says {:?}", inject.stdout), begun);

    let begun = Instant::now();
    guest.shell(vm_id, "touch /opt/demo/state/flag && sync").await?;
    next_value(&mut values, 1.0).await?;
    steps.note("changed the guest: the condition's value is 1", begun);

    let begun = Instant::now();
    let boot = boot_id(guest, vm_id).await?;
    compute.set_power(vm_id, PowerAction::Reboot { grace: None }).await?;
    steps.during("the guest reboots", still_streams(guest, vm_id, &boot, &mut values)).await?;
    steps.note("reset the guest: the same stream carries on with 1", begun);

    let begun = Instant::now();
    injects.delete(inject.identifier.unwrap_or_default()).await?;
    features.delete(feature.identifier.unwrap_or_default()).await?;
    next_value(&mut values, 0.0).await?;
    steps.note("deleted inject and feature: the value is 0 again", begun);

    let begun = Instant::now();
    machines.delete(Identifier { value: vm.clone() }).await?;
    steps.note("deleted the machine", begun);

    let begun = Instant::now();
    let end = async {
        loop {
            match values.next().await {
                Some(Ok(_)) => {}
                Some(Err(status)) => return Some(status),
                None => return None,
            }
        }
    };
    match tokio::time::timeout(VALUE_DEADLINE, end).await {
        Ok(Some(status)) if status.code() == tonic::Code::NotFound => {}
        other => return Err(Failure::new(format!("the stream should have ended with NOT_FOUND, got {other:?}"))),
    }
    steps.note("the stream ended: NOT_FOUND, the machine is gone", begun);
    Ok(())
}

fn deploy(template: &str, links: &[String]) -> DeployVirtualMachine {
    DeployVirtualMachine {
        virtual_machine: Some(VirtualMachine {
            name: "web".to_owned(),
            configuration: Some(Configuration { cpu: 1, ram: 128 << 20 }),
            template_id: template.to_owned(),
            links: links.to_vec(),
        }),
        meta_info: Some(MetaInfo {
            exercise_name: "demo".to_owned(),
            deployment_name: "first".to_owned(),
            properties: None,
        }),
    }
}

/// One NIC on the network `default`, where there is one.
async fn links(backends: &Backends) -> Result<Vec<String>, Failure> {
    let networks = backends.network.list_networks(&ocr_core::NetworkFilter::default()).await?;
    Ok(networks
        .iter()
        .filter(|network| network.name.as_str() == "default")
        .map(|network| network.id.to_string())
        .collect())
}

fn source(name: &str) -> Source {
    Source { name: name.to_owned(), version: "*".to_owned() }
}

/// Waits for a certain value.
async fn next_value(values: &mut Streaming<ConditionStreamResponse>, wanted: f32) -> Result<(), Failure> {
    let wait = async {
        loop {
            match values.next().await {
                Some(Ok(item)) if item.command_return_value == wanted => return Ok(()),
                Some(Ok(_)) => {}
                Some(Err(status)) => return Err(Failure::from(status)),
                None => return Err(Failure::new("the condition's stream ended")),
            }
        }
    };
    tokio::time::timeout(VALUE_DEADLINE, wait).await.unwrap_or_else(|_| {
        Err(Failure::new(format!("the condition did not show {wanted} within {}", seconds(VALUE_DEADLINE))))
    })
}

/// What the guest's kernel calls this boot.
async fn boot_id(guest: &Arc<dyn GuestExec>, vm: VmId) -> ocr_core::Result<Bytes> {
    Ok(guest.shell(vm, "cat /proc/sys/kernel/random/boot_id").await?.stdout)
}

/// Two values after the guest is up in another boot prove that the stream outlived the reset: one may have been on
/// its way before.
async fn still_streams(
    guest: &Arc<dyn GuestExec>,
    vm: VmId,
    before: &Bytes,
    values: &mut Streaming<ConditionStreamResponse>,
) -> Result<(), Failure> {
    let another_boot = async {
        loop {
            match boot_id(guest, vm).await {
                Ok(now) if now != before => return Ok(()),
                Ok(_) => {}
                Err(error) if error.retry() == Retry::Never => return Err(Failure::from(error)),
                Err(_) => {}
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    tokio::time::timeout(VALUE_DEADLINE, another_boot)
        .await
        .unwrap_or_else(|_| Err(Failure::new("the guest did not come back from its reset")))?;
    next_value(values, 1.0).await?;
    next_value(values, 1.0).await
}

/// After a failure: nothing of this run stays.
async fn sweep(stage: &Stage, owner: &Owner) {
    if let Ok(machines) = stage.backends.compute.list_vms(&VmFilter::owned_by(owner)).await {
        for vm in machines {
            if let Err(error) = stage.backends.compute.delete_vm(vm.id).await {
                tracing::warn!(%error, "the demo's machine could not be deleted");
            }
        }
    }
}

async fn prove_nothing_is_left(backends: &Backends, owner: &Owner, steps: &mut Steps) -> Result<(), Failure> {
    let begun = Instant::now();
    let machines = backends.compute.list_vms(&VmFilter::owned_by(owner)).await?;
    let images = backends.image.find_images(&ImageFilter { owner: Some(owner.clone()), name: None }).await?;
    let files = backends.sweep_disks(owner).await?;
    if machines.is_empty() && images.is_empty() && files.is_empty() {
        steps.note("nothing is left: no machine, no image, no disk", begun);
        return Ok(());
    }
    Err(Failure::new(format!(
        "left behind: machines {:?}, images {:?}, disks {files:?}",
        machines.iter().map(|vm| vm.id.to_string()).collect::<Vec<_>>(),
        images.iter().map(|image| image.id.to_string()).collect::<Vec<_>>(),
    )))
}

fn write_packages(folder: &Path) -> std::io::Result<()> {
    for (path, text) in PACKAGES {
        let path = folder.join(path);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(path, text)?;
    }
    Ok(())
}

/// Says what was done and how long it took.
struct Steps {
    output: Output,
    started: Instant,
    done: Vec<(String, Duration)>,
}

impl Steps {
    fn note(&mut self, what: &str, begun: Instant) {
        let took = begun.elapsed();
        self.output.line(format_args!("{:>7.2} s  {what}", took.as_secs_f64()));
        self.done.push((what.to_owned(), took));
    }

    async fn during<T>(&self, what: &str, work: impl Future<Output = T>) -> T {
        let progress = self.output.progress(what);
        let outcome = work.await;
        progress.finish_and_clear();
        outcome
    }

    fn summary(&self) {
        let steps: Vec<_> =
            self.done.iter().map(|(what, took)| json!({ "step": what, "seconds": took.as_secs_f64() })).collect();
        self.output.result(
            format_args!("{:>7.2} s  in all", self.started.elapsed().as_secs_f64()),
            &json!({ "steps": steps, "seconds": self.started.elapsed().as_secs_f64() }),
        );
    }
}
