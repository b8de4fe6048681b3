//! `VirtualMachineService` and `ocr.v1.Machines` over a real deployer, with machines in memory.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::{sync::Arc, time::Duration};

use common::{LONG, Running, soon};
use ocr_core::{
    Error, Owner, VmId,
    lifecycle::{DeployConfig, DeployParts, Deployer},
    memory::{Fault, MemoryCloud, MemoryState},
};
use ocr_grpc::{
    Limits, Server,
    client::{CapabilityClient, MachinesClient, VirtualMachineServiceClient},
    proto::{
        Configuration, DeployVirtualMachine, Identifier, MetaInfo, Properties, VirtualMachine,
        capabilities::DeployerType,
    },
    v1::{GetMachineRequest, ListMachinesRequest, Scope},
};
use tonic::{Code, transport::Channel};
use tonic_types::StatusExt as _;

struct Rig {
    cloud: MemoryCloud,
    server: Running,
    machines: VirtualMachineServiceClient<Channel>,
    ours: MachinesClient<Channel>,
}

impl Rig {
    async fn new() -> Self {
        Self::with(Limits::default()).await
    }

    async fn with(limits: Limits) -> Self {
        let cloud = MemoryCloud::new();
        let parts = DeployParts {
            compute: Arc::new(cloud.clone()),
            network: Arc::new(cloud.clone()),
            image: Arc::new(cloud.clone()),
            guest: Some(Arc::new(cloud.clone())),
            store: Arc::new(MemoryState::new()),
        };
        let mut config = DeployConfig::new(Owner::new("test").unwrap());
        config.ready_interval = Duration::from_millis(10);
        let server = Running::start(Server::new().limits(limits).deployer(Deployer::new(parts, config)), LONG).await;
        let channel = server.channel().await;
        let (machines, ours) = (VirtualMachineServiceClient::new(channel.clone()), MachinesClient::new(channel));
        Self { cloud, server, machines, ours }
    }

    async fn names(&mut self) -> Vec<String> {
        let list = soon(self.ours.list(ListMachinesRequest::default())).await.unwrap().into_inner();
        list.machines.into_iter().map(|machine| machine.name).collect()
    }
}

fn web(name: &str) -> DeployVirtualMachine {
    DeployVirtualMachine {
        virtual_machine: Some(VirtualMachine {
            name: name.into(),
            configuration: Some(Configuration { cpu: 2, ram: 256 << 20 }),
            template_id: MemoryCloud::tiny().to_string(),
            links: vec![MemoryCloud::lab_network().to_string(), "default".into()],
        }),
        meta_info: Some(MetaInfo {
            exercise_name: "spring".into(),
            deployment_name: "blue".into(),
            properties: Some(Properties { cidr: "192.0.2.7/24".into(), gateway: String::new() }),
        }),
    }
}

#[tokio::test]
async fn a_machine_is_made_once_seen_and_deleted_twice() {
    let mut rig = Rig::new().await;
    let mut announced = CapabilityClient::new(rig.server.channel().await);
    let announced = soon(announced.get_capabilities(())).await.unwrap().into_inner();
    assert_eq!(announced.values().collect::<Vec<_>>(), [DeployerType::VirtualMachine]);

    let id = soon(rig.machines.create(web("web-0"))).await.unwrap().into_inner();
    id.value.parse::<VmId>().unwrap();
    let again = soon(rig.machines.create(web("web-0"))).await.unwrap().into_inner();
    assert_eq!(again, id);

    let machine = soon(rig.ours.get(GetMachineRequest { id: id.value.clone() })).await.unwrap().into_inner();
    assert_eq!((machine.name.as_str(), machine.state.as_str(), machine.cpus), ("web-0", "running", 2));
    assert_eq!(machine.scope, Some(Scope { exercise: "spring".into(), deployment: "blue".into() }));
    assert_eq!(machine.nics.len(), 2);
    assert_eq!(machine.nics[0].network, MemoryCloud::lab_network().to_string());

    for _ in 0..2 {
        soon(rig.machines.delete(id.clone())).await.unwrap();
    }
    assert!(rig.names().await.is_empty());
    let gone = soon(rig.ours.get(GetMachineRequest { id: id.value })).await.unwrap_err();
    assert_eq!(gone.code(), Code::NotFound);
    rig.server.stopped().await;
}

#[tokio::test]
async fn a_bad_request_has_the_right_code_and_makes_nothing() {
    let mut rig = Rig::new().await;
    type Spoil = fn(&mut VirtualMachine);
    let faults: [(Code, &str, Spoil); 7] = [
        (Code::InvalidArgument, "virtualMachine.name", |vm| vm.name.clear()),
        (Code::InvalidArgument, "virtualMachine.configuration.cpu", |vm| vm.configuration.as_mut().unwrap().cpu = 0),
        (Code::InvalidArgument, "cpu", |vm| vm.configuration.as_mut().unwrap().cpu = 1000),
        (Code::InvalidArgument, "ram", |vm| vm.configuration.as_mut().unwrap().ram = 1),
        (Code::NotFound, "nothing-has-this-name", |vm| vm.template_id = "nothing-has-this-name".into()),
        (Code::NotFound, "0a1b2c3d", |vm| vm.template_id = "0a1b2c3d-0000-4000-8000-000000000000".into()),
        (Code::NotFound, "no-such-network", |vm| vm.links.push("no-such-network".into())),
    ];
    for (code, words, spoil) in faults {
        let mut request = web("web-0");
        spoil(request.virtual_machine.as_mut().unwrap());
        let status = soon(rig.machines.create(request)).await.unwrap_err();
        assert_eq!(status.code(), code, "{words}: {status:?}");
        assert!(status.message().contains(words), "{words}: {status:?}");
        let named =
            status.get_error_details().bad_request().is_some_and(|bad| !bad.field_violations[0].field.is_empty());
        assert_eq!(named, code == Code::InvalidArgument, "{status:?}");
    }
    let status = soon(rig.machines.delete(Identifier { value: "web-0".into() })).await.unwrap_err();
    assert_eq!((status.code(), status.message().contains("wants a UUID")), (Code::InvalidArgument, true));
    assert!(rig.names().await.is_empty());
    assert_eq!(rig.cloud.faults().calls("compute.create_vm"), 0);
    rig.server.stopped().await;
}

#[tokio::test]
async fn a_machine_of_another_shape_under_the_same_name_is_refused() {
    let mut rig = Rig::new().await;
    soon(rig.machines.create(web("web-0"))).await.unwrap();
    let mut other = web("web-0");
    other.virtual_machine.as_mut().unwrap().configuration.as_mut().unwrap().cpu = 3;
    let status = soon(rig.machines.create(other)).await.unwrap_err();
    assert_eq!(status.code(), Code::AlreadyExists, "{status:?}");
    rig.server.stopped().await;
}

#[tokio::test]
async fn a_machine_of_somebody_elses_is_not_deleted() {
    let mut rig = Rig::new().await;
    let foreign = rig.cloud.add_foreign_vm(&"theirs".parse().unwrap());
    let status = soon(rig.machines.delete(Identifier { value: foreign.to_string() })).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "{status:?}");
    rig.server.stopped().await;
}

#[tokio::test]
async fn what_the_backend_says_of_its_inside_stays_inside() {
    let mut rig = Rig::new().await;
    let cause = Error::internal("the answer makes no sense").with_source(std::io::Error::other("hidden-cause"));
    rig.cloud.fault("compute.create_vm", 1, Fault::Before(cause));
    let status = soon(rig.machines.create(web("web-0"))).await.unwrap_err();
    assert!(!format!("{status:?}").contains("hidden-cause"), "{status:?}");
    assert_eq!(status.code(), Code::Internal);
    assert!(status.message().starts_with("an internal fault; the server's log has it under request id "), "{status:?}");
    assert!(rig.names().await.is_empty());
    rig.server.stopped().await;
}

#[tokio::test]
async fn machines_are_listed_by_scope() {
    let mut rig = Rig::new().await;
    for (name, deployment) in [("b", "blue"), ("a", "blue"), ("c", "red")] {
        let mut request = web(name);
        request.meta_info.as_mut().unwrap().deployment_name = deployment.into();
        soon(rig.machines.create(request)).await.unwrap();
    }
    let scope = |deployment: &str| Some(Scope { exercise: "spring".into(), deployment: deployment.into() });
    let list = soon(rig.ours.list(ListMachinesRequest { scope: scope("blue") })).await.unwrap().into_inner();
    assert_eq!(list.machines.iter().map(|machine| machine.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
    let status = soon(rig.ours.list(ListMachinesRequest { scope: scope("a/b") })).await.unwrap_err();
    assert!(status.message().starts_with("scope.deployment: "), "{status:?}");
    let status = soon(rig.ours.get(GetMachineRequest { id: "x".into() })).await.unwrap_err();
    assert!(status.message().starts_with("id: "), "{status:?}");
    rig.server.stopped().await;
}

#[tokio::test]
async fn a_reply_over_the_limit_is_refused_with_resource_exhausted_too() {
    let mut rig = Rig::with(Limits { max_message_bytes: 300, ..Limits::default() }).await;
    soon(rig.machines.create(web("web-0"))).await.unwrap();
    assert_eq!(rig.names().await, ["web-0"]);
    soon(rig.machines.create(web("web-1"))).await.unwrap();
    let status = soon(rig.ours.list(ListMachinesRequest::default())).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    let status = soon(rig.machines.create(web(&"x".repeat(400)))).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    rig.server.stopped().await;
}
