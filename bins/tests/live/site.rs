//! Both servers over the rig, with an owner, records and packages of their own: what one test plays on.

use std::{
    collections::BTreeSet,
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use futures::StreamExt;
use ocr_core::{ExecOutput, GuestExecExt, Owner, StateStore, state::MAX_PAGE, state::embedded::EmbeddedStore};
use ocr_grpc::{
    client::{
        ConditionServiceClient, FeatureServiceClient, InjectServiceClient, InstallsClient, MachinesClient,
        VirtualMachineServiceClient,
    },
    proto::{
        Condition, ConditionStreamResponse, Configuration, DeployVirtualMachine, Feature, Identifier, Inject, MetaInfo,
        Source, VirtualMachine,
    },
    v1,
};
use ocr_libvirt::{Libvirt, config::DomainType, xml::volume};
use tokio::sync::SemaphorePermit;
use tonic::{Code, Status, Streaming, transport::Channel};

use crate::{
    redis,
    rig::{Rig, TEMPLATE, rig},
    support::{EXECUTOR, MACHINER, SOON, Server, command, keeper, soon, within},
};

/// How long a guest may take to boot here: software emulation on a machine that others use too.
pub(crate) const BOOT: Duration = Duration::from_secs(180);
const RAM_BYTES: u64 = 128 << 20;

pub(crate) struct Site {
    pub(crate) rig: &'static Rig,
    pub(crate) owner: String,
    pub(crate) packages: PathBuf,
    folder: PathBuf,
    libvirt: Libvirt,
    machiner: Option<(Server, Channel)>,
    executor: Option<(Server, Channel)>,
    _guests: SemaphorePermit<'static>,
}

impl Site {
    /// Both servers, and room for so many guests; `None` after a word why the test is ignored.
    pub(crate) async fn open(name: &str, guests: u32) -> Option<Self> {
        let rig = rig()?;
        let guests = rig.guests.acquire_many(guests).await.unwrap();
        let folder = keeper().new_folder(name);
        let packages = folder.join("packages");
        std::fs::create_dir(&packages).unwrap();
        let config = ocr_libvirt::Config { uri: rig.uri.clone(), domain_type: DomainType::Qemu, ..Default::default() };
        let libvirt = Libvirt::open(config).await.unwrap();
        let owner = format!("{name}-{}", std::process::id());
        let mut site = Self { rig, owner, packages, folder, libvirt, machiner: None, executor: None, _guests: guests };
        site.start_machiner().await;
        site.start_executor().await;
        Some(site)
    }

    async fn start(&self, program: &str, port: &str, name: &str) -> (Server, Channel) {
        let mut command = command(program);
        self.set_up(&mut command, port);
        command.env("STATE_FILE", self.state(name));
        self.run(command, name).await
    }

    /// An Executor more, which shares its records with the others on this Redis.
    pub(crate) async fn executor_on(&self, redis: &redis::Server, lease: Duration, name: &str) -> (Server, Channel) {
        let mut command = command(EXECUTOR);
        self.set_up(&mut command, "EXECUTOR_PORT");
        command.envs([
            ("REDIS_HOST", "127.0.0.1"),
            ("REDIS_PORT", &redis.port.to_string()),
            ("LEASE_TTL", &lease.as_secs().to_string()),
        ]);
        self.run(command, name).await
    }

    fn set_up(&self, command: &mut Command, port: &str) {
        command
            .envs([
                ("GLOBAL_HOST", "127.0.0.1"),
                ("GLOBAL_INSECURE", "false"),
                (port, "0"),
                ("BACKEND", "libvirt"),
                ("HYPERVISOR", &self.rig.uri),
                ("DOMAIN_TYPE", "qemu"),
                ("OWNER", &self.owner),
                ("HYPERVISOR_WAIT_TIMEOUT", &BOOT.as_secs().to_string()),
                ("HYPERVISOR_WAIT_INTERVAL", "1"),
                // What the start does not put in order is to be seen.
                ("RECONCILE_INTERVAL", "3600"),
            ])
            .env("PACKAGE_DIR", &self.packages);
    }

    async fn run(&self, command: Command, name: &str) -> (Server, Channel) {
        let server = Server::start(command, &self.folder.join(format!("{name}.log")));
        server.serving(BOOT).await;
        let channel = server.channel().await;
        (server, channel)
    }

    fn state(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.redb"))
    }

    /// Starts the Machiner with the records that it has, and waits until it is ready.
    pub(crate) async fn start_machiner(&mut self) {
        self.machiner = Some(self.start(MACHINER, "MACHINER_PORT", "machiner").await);
    }

    /// Starts the Executor with the records that it has, and waits until it is ready.
    pub(crate) async fn start_executor(&mut self) {
        self.executor = Some(self.start(EXECUTOR, "EXECUTOR_PORT", "executor").await);
    }

    pub(crate) fn take_machiner(&mut self) -> Server {
        self.machiner.take().unwrap().0
    }

    pub(crate) fn take_executor(&mut self) -> Server {
        self.executor.take().unwrap().0
    }

    pub(crate) fn machiner(&self) -> &Server {
        &self.machiner.as_ref().unwrap().0
    }

    pub(crate) fn executor(&self) -> &Server {
        &self.executor.as_ref().unwrap().0
    }

    fn to_machiner(&self) -> Channel {
        self.machiner.as_ref().unwrap().1.clone()
    }

    fn to_executor(&self) -> Channel {
        self.executor.as_ref().unwrap().1.clone()
    }

    pub(crate) fn vms(&self) -> VirtualMachineServiceClient<Channel> {
        VirtualMachineServiceClient::new(self.to_machiner())
    }

    pub(crate) fn machines(&self) -> MachinesClient<Channel> {
        MachinesClient::new(self.to_machiner())
    }

    pub(crate) fn features(&self) -> FeatureServiceClient<Channel> {
        FeatureServiceClient::new(self.to_executor())
    }

    pub(crate) fn injects(&self) -> InjectServiceClient<Channel> {
        InjectServiceClient::new(self.to_executor())
    }

    pub(crate) fn conditions(&self) -> ConditionServiceClient<Channel> {
        ConditionServiceClient::new(self.to_executor())
    }

    pub(crate) fn installs(&self) -> InstallsClient<Channel> {
        InstallsClient::new(self.to_executor())
    }

    // --- what most tests do -----------------------------------------------------------------------------------

    /// A machine that is ready.
    pub(crate) async fn create(&self, name: &str) -> String {
        within(BOOT, "create", self.vms().create(machine(name))).await.unwrap().into_inner().value
    }

    pub(crate) async fn delete(&self, vm: &str) {
        soon("delete", self.vms().delete(id(vm))).await.unwrap();
    }

    /// A condition that is a shell line, run each second.
    pub(crate) async fn condition(&self, vm: &str, line: &str) -> String {
        self.condition_every(Duration::from_secs(1), vm, line).await
    }

    /// A condition that is a shell line.
    pub(crate) async fn condition_every(&self, interval: Duration, vm: &str, line: &str) -> String {
        let condition = Condition {
            name: "line".to_owned(),
            virtual_machine_id: vm.to_owned(),
            command: line.to_owned(),
            interval: interval.as_secs() as i32,
            ..Condition::default()
        };
        let made = soon("condition", self.conditions().create(condition)).await.unwrap().into_inner();
        made.identifier.unwrap().value
    }

    pub(crate) async fn watch(&self, condition: &str) -> Values {
        Values(soon("stream", self.conditions().stream(id(condition))).await.unwrap().into_inner())
    }

    /// Runs a shell line in the guest, past the servers.
    pub(crate) async fn shell(&self, vm: &str, line: &str) -> ExecOutput {
        within(BOOT, line, self.libvirt.shell(vm.parse().unwrap(), line)).await.unwrap()
    }

    /// What a shell line that succeeds prints.
    pub(crate) async fn shell_text(&self, vm: &str, line: &str) -> String {
        let output = self.shell(vm, line).await;
        assert!(output.success(), "{line}: {output:?}");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    /// Tells one boot of a guest from the next.
    pub(crate) async fn boot_id(&self, vm: &str) -> String {
        self.shell_text(vm, "cat /proc/sys/kernel/random/boot_id").await
    }

    // --- what must hold ---------------------------------------------------------------------------------------

    /// Ids of our machines, as the Machiner tells.
    pub(crate) async fn listed(&self) -> BTreeSet<String> {
        let mut machines = self.machines();
        let list = machines.list(v1::ListMachinesRequest::default());
        soon("list", list).await.unwrap().into_inner().machines.into_iter().map(|machine| machine.id).collect()
    }

    /// What is installed, as the Executor tells.
    pub(crate) async fn installed(&self) -> Vec<v1::Install> {
        let mut installs = self.installs();
        let list = installs.list(v1::ListInstallsRequest::default());
        soon("list", list).await.unwrap().into_inner().installs
    }

    /// Nothing that no record owns: the domains with our tag are those that are listed, a reconcile finds nothing to
    /// end, sweep or forget (so each has a record, and the record says that it is ready), and no disk is without its
    /// domain. Gives the ids of the machines.
    pub(crate) async fn assert_all_owned(&self) -> BTreeSet<String> {
        let domains = self.rig.domains_of(&self.owner);
        assert_eq!(self.listed().await, domains, "what is listed is what is there");
        let report = soon("reconcile", self.machines().reconcile(v1::ReconcileRequest {})).await.unwrap().into_inner();
        assert_eq!(report, v1::ReconcileResponse::default(), "each machine has a record, each record its machine");
        assert_eq!(self.rig.lone_disks(), BTreeSet::new(), "disks without a domain");
        let disks = self.rig.disks_with(&self.mark());
        assert_eq!(disks.len(), domains.len(), "{disks:?} of {domains:?}");
        domains
    }

    /// What the names of this owner's disks have in common.
    fn mark(&self) -> String {
        format!("-{}-", volume::owner_mark(&Owner::new(self.owner.as_str()).unwrap()))
    }

    /// Stops both servers as an operator would. Nothing may be left: no domain, no disk, no record.
    pub(crate) async fn close(mut self) {
        let machiner = self.take_machiner().terminate().await;
        let executor = self.take_executor().terminate().await;
        assert!(machiner.success() && executor.success(), "{machiner} {executor}");
        assert_eq!(self.rig.domains_of(&self.owner), BTreeSet::new());
        assert_eq!(self.rig.disks_with(&self.mark()), BTreeSet::new());
        for name in ["machiner", "executor"] {
            let store = EmbeddedStore::open(self.state(name)).unwrap();
            let records = store.list("", None, MAX_PAGE).await.unwrap();
            let keys: Vec<_> = records.iter().map(|(key, _)| key.as_str()).collect();
            assert!(keys.is_empty(), "left in the records of the {name}: {keys:?}");
        }
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // Servers first, so that nobody makes anything anew.
            self.machiner = None;
            self.executor = None;
            self.rig.clear(&self.owner);
        }
    }
}

/// A condition's stream.
#[derive(Debug)]
pub(crate) struct Values(pub(crate) Streaming<ConditionStreamResponse>);

impl Values {
    /// The next value, or how the stream ended.
    pub(crate) async fn next(&mut self) -> Result<f32, Status> {
        match self.0.next().await {
            Some(item) => item.map(|item| item.command_return_value),
            None => Err(Status::unknown("the stream ended without a status")),
        }
    }

    /// Waits until the value is this.
    pub(crate) async fn show(&mut self, wanted: f32, deadline: Duration) {
        let wait = async { while self.next().await.unwrap() != wanted {} };
        within(deadline, &format!("the value is {wanted}"), wait).await;
    }

    /// Waits until the stream ends.
    pub(crate) async fn end(&mut self, deadline: Duration) -> Status {
        let wait = async {
            loop {
                if let Err(status) = self.next().await {
                    return status;
                }
            }
        };
        within(deadline, "the stream ends", wait).await
    }

    /// The end of a stream whose machine or condition is gone.
    pub(crate) async fn end_not_found(&mut self) {
        let status = self.end(SOON).await;
        assert_eq!(status.code(), Code::NotFound, "{status:?}");
    }
}

// --- requests -----------------------------------------------------------------------------------------------------

pub(crate) fn machine(name: &str) -> DeployVirtualMachine {
    DeployVirtualMachine {
        virtual_machine: Some(VirtualMachine {
            name: name.to_owned(),
            configuration: Some(Configuration { cpu: 1, ram: RAM_BYTES }),
            template_id: TEMPLATE.to_owned(),
            links: Vec::new(),
        }),
        meta_info: Some(MetaInfo {
            exercise_name: "live".to_owned(),
            deployment_name: "test".to_owned(),
            properties: None,
        }),
    }
}

pub(crate) fn id(value: &str) -> Identifier {
    Identifier { value: value.to_owned() }
}

pub(crate) fn source(name: &str) -> Option<Source> {
    Some(Source { name: name.to_owned(), version: "*".to_owned() })
}

pub(crate) fn feature(vm: &str, package: &str) -> Feature {
    Feature {
        name: package.to_owned(),
        virtual_machine_id: vm.to_owned(),
        source: source(package),
        ..Feature::default()
    }
}

pub(crate) fn inject(vm: &str, package: &str) -> Inject {
    Inject { name: package.to_owned(), virtual_machine_id: vm.to_owned(), source: source(package), ..Inject::default() }
}

pub(crate) fn packaged_condition(vm: &str, package: &str) -> Condition {
    Condition {
        name: package.to_owned(),
        virtual_machine_id: vm.to_owned(),
        source: source(package),
        ..Condition::default()
    }
}

/// The middle one.
pub(crate) fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

/// How long something took.
pub(crate) async fn timed<T>(work: impl Future<Output = T>) -> (T, Duration) {
    let begun = Instant::now();
    let done = work.await;
    (done, begun.elapsed())
}
