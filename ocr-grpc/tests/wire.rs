//! The wire itself: paths, field numbers and bytes, as clients in use know them.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};

use ocr_grpc::{
    Generation,
    proto::{
        Account, Capabilities, Condition, ConditionStreamResponse, Configuration, DeployVirtualMachine,
        ExecutorResponse, Feature, FeatureType, Identifier, Inject, MetaInfo, Properties, Source, VirtualMachine,
        capabilities::DeployerType, capability_server, condition_service_server, deputy_query_service_server,
        feature_service_server, inject_service_server, older, virtual_machine_service_server,
    },
};
use prost::Message;

/// Path, request, reply, and whether the reply is a stream.
fn methods(generation: Generation) -> BTreeMap<String, (String, String, bool)> {
    let mut methods = BTreeMap::new();
    for file in generation.descriptors().file {
        for service in file.service {
            for method in service.method {
                assert!(!method.client_streaming());
                let path = match file.package.as_deref().unwrap_or_default() {
                    "" => format!("/{}/{}", service.name.as_deref().unwrap(), method.name()),
                    package => format!("/{package}.{}/{}", service.name.as_deref().unwrap(), method.name()),
                };
                let reply = method.output_type().to_owned();
                methods.insert(path, (method.input_type().to_owned(), reply, method.server_streaming()));
            }
        }
    }
    methods
}

const METHODS: [(&str, &str, &str, bool); 23] = [
    ("/Capability/GetCapabilities", ".google.protobuf.Empty", ".Capabilities", false),
    ("/ConditionService/create", ".Condition", ".ExecutorResponse", false),
    ("/ConditionService/delete", ".Identifier", ".google.protobuf.Empty", false),
    ("/ConditionService/stream", ".Identifier", ".ConditionStreamResponse", true),
    ("/DeputyQueryService/CheckPackageExists", ".Source", ".google.protobuf.Empty", false),
    ("/DeputyQueryService/GetPackagesByType", ".GetPackagesQuery", ".GetPackagesResponse", false),
    ("/DeputyQueryService/GetScenario", ".Source", ".GetScenarioResponse", false),
    ("/DeputyQueryService/create", ".Source", ".DeputyCreateResponse", false),
    ("/DeputyQueryService/delete", ".Identifier", ".google.protobuf.Empty", false),
    ("/DeputyQueryService/stream", ".Identifier", ".DeputyStreamResponse", true),
    ("/FeatureService/create", ".Feature", ".ExecutorResponse", false),
    ("/FeatureService/delete", ".Identifier", ".google.protobuf.Empty", false),
    ("/InjectService/create", ".Inject", ".ExecutorResponse", false),
    ("/InjectService/delete", ".Identifier", ".google.protobuf.Empty", false),
    ("/VirtualMachineService/create", ".DeployVirtualMachine", ".Identifier", false),
    ("/VirtualMachineService/delete", ".Identifier", ".google.protobuf.Empty", false),
    ("/ocr.v1.Installs/List", ".ocr.v1.ListInstallsRequest", ".ocr.v1.ListInstallsResponse", false),
    ("/ocr.v1.Machines/Get", ".ocr.v1.GetMachineRequest", ".ocr.v1.Machine", false),
    ("/ocr.v1.Machines/List", ".ocr.v1.ListMachinesRequest", ".ocr.v1.ListMachinesResponse", false),
    ("/ocr.v1.Machines/Reconcile", ".ocr.v1.ReconcileRequest", ".ocr.v1.ReconcileResponse", false),
    ("/ocr.v1.Queue/Holder", ".ocr.v1.HolderRequest", ".ocr.v1.HolderResponse", false),
    ("/ocr.v1.Queue/Snapshot", ".ocr.v1.SnapshotRequest", ".ocr.v1.QueueSnapshot", false),
    ("/ocr.v1.Queue/Watch", ".ocr.v1.WatchQueueRequest", ".ocr.v1.QueueSnapshot", true),
];

#[test]
fn paths_and_types_are_those_of_the_contract() {
    let wanted = METHODS.map(|(path, request, reply, stream)| (path.into(), (request.into(), reply.into(), stream)));
    assert_eq!(methods(Generation::Newer), BTreeMap::from(wanted));
}

#[test]
fn the_older_generation_differs_in_the_reply_of_one_method_alone() {
    let mut wanted = methods(Generation::Newer);
    wanted.get_mut("/ConditionService/create").unwrap().1 = ".Identifier".into();
    assert_eq!(methods(Generation::Older), wanted);
}

#[test]
fn the_generated_services_have_the_contracts_names() {
    assert_eq!(
        [
            capability_server::SERVICE_NAME,
            virtual_machine_service_server::SERVICE_NAME,
            feature_service_server::SERVICE_NAME,
            inject_service_server::SERVICE_NAME,
            condition_service_server::SERVICE_NAME,
            older::condition_service_server::SERVICE_NAME,
            deputy_query_service_server::SERVICE_NAME,
        ],
        [
            "Capability",
            "VirtualMachineService",
            "FeatureService",
            "InjectService",
            "ConditionService",
            "ConditionService",
            "DeputyQueryService",
        ]
    );
}

#[test]
fn fields_have_the_contracts_names_and_numbers() {
    let mut fields = BTreeSet::new();
    for file in Generation::Newer.descriptors().file {
        if file.package.is_some() {
            continue;
        }
        for message in &file.message_type {
            let text = message.field.iter().map(|field| format!("{}={}", field.name(), field.number()));
            fields.insert(format!("{}: {}", message.name(), text.collect::<Vec<_>>().join(" ")));
        }
    }
    let wanted = [
        "Account: username=1 password=2 private_key=3",
        "Capabilities: values=1",
        "Condition: name=1 virtual_machine_id=2 account=3 source=4 command=5 interval=6 environment=7",
        "ConditionStreamResponse: response=1 command_return_value=2",
        "Configuration: cpu=1 ram=2",
        "DeputyCreateResponse: id=1 checksum=2 filename=3 size=4",
        "DeputyStreamResponse: chunk=1",
        "DeployVirtualMachine: virtualMachine=1 metaInfo=2",
        "ExecutorResponse: identifier=1 stdout=2 stderr=3",
        "Feature: name=1 virtual_machine_id=2 featureType=3 source=4 account=5 environment=7",
        "GetPackagesQuery: package_type=1",
        "GetPackagesResponse: packages=1",
        "GetScenarioResponse: sdl=1",
        "Identifier: value=1",
        "Inject: name=1 virtual_machine_id=2 source=3 account=4 to_entities=5 environment=7",
        "MetaInfo: exerciseName=1 deploymentName=2 properties=3",
        "Package: name=1 version=2 type=3",
        "Properties: cidr=1 gateway=2",
        "Source: name=1 version=2",
        "VirtualMachine: name=1 configuration=2 templateId=3 links=4",
    ];
    assert_eq!(fields, wanted.map(str::to_owned).into());
}

/// The bytes are as given, and read back they are the message.
fn golden<M: Message + Default + PartialEq + std::fmt::Debug>(message: M, hex: &str) {
    let bytes = message.encode_to_vec();
    assert_eq!(bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>(), hex.replace([' ', '\n'], ""));
    assert_eq!(M::decode(&bytes[..]).unwrap(), message);
}

fn source() -> Option<Source> {
    Some(Source { name: "web".into(), version: "*".into() })
}

fn account() -> Option<Account> {
    Some(Account { username: "u".into(), password: "p".into(), private_key: "k".into() })
}

// The golden bytes are written out by hand from the field table: tag = number << 3 | wire type, then the length.

#[test]
fn capabilities_are_packed_numbers() {
    use DeployerType::*;
    let all = [VirtualMachine, Switch, Template, Feature, Condition, Inject, EventInfo, DeputyQuery];
    assert_eq!(all.map(|one| one as i32), [0, 1, 2, 3, 4, 5, 6, 7]);
    golden(Capabilities { values: all.map(Into::into).into() }, "0a08 0001020304050607");
}

#[test]
fn the_bytes_of_a_machine_are_pinned() {
    golden(Identifier { value: "id".into() }, "0a02 6964");
    golden(Configuration { cpu: 2, ram: 1 << 31 }, "0802 108080808008");
    golden(Properties { cidr: "a".into(), gateway: "b".into() }, "0a01 61 1201 62");
    let virtual_machine = VirtualMachine {
        name: "vm".into(),
        configuration: Some(Configuration { cpu: 2, ram: 1 << 31 }),
        template_id: "t".into(),
        links: vec!["x".into(), "y".into()],
    };
    golden(virtual_machine.clone(), "0a02 766d 1208 0802108080808008 1a01 74 2201 78 2201 79");
    let meta_info = MetaInfo {
        exercise_name: "e".into(),
        deployment_name: "d".into(),
        properties: Some(Properties { cidr: "a".into(), gateway: "b".into() }),
    };
    golden(meta_info.clone(), "0a01 65 1201 64 1a06 0a0161120162");
    golden(
        DeployVirtualMachine { virtual_machine: Some(virtual_machine), meta_info: Some(meta_info) },
        "0a17 0a02766d12080802108080808008 1a0174220178220179 120e 0a01651201641a060a0161120162",
    );
}

#[test]
fn the_bytes_of_installs_are_pinned() {
    golden(source().unwrap(), "0a03 776562 1201 2a");
    golden(account().unwrap(), "0a01 75 1201 70 1a01 6b");
    golden(
        Feature {
            name: "f".into(),
            virtual_machine_id: "v".into(),
            feature_type: FeatureType::Artifact.into(),
            source: source(),
            account: account(),
            environment: vec!["A=1".into(), "B=2".into()],
        },
        "0a01 66 1201 76 1802 2208 0a0377656212012a 2a09 0a01751201701a016b 3a03 413d31 3a03 423d32",
    );
    golden(
        Inject {
            name: "i".into(),
            virtual_machine_id: "v".into(),
            source: source(),
            account: account(),
            to_entities: vec!["blue".into()],
            environment: vec!["A=1".into()],
        },
        "0a01 69 1201 76 1a08 0a0377656212012a 2209 0a01751201701a016b 2a04 626c7565 3a03 413d31",
    );
    golden(
        ExecutorResponse {
            identifier: Some(Identifier { value: "id".into() }),
            stdout: "o".into(),
            stderr: "e".into(),
        },
        "0a04 0a026964 1201 6f 1a01 65",
    );
}

#[test]
fn the_bytes_of_conditions_are_pinned() {
    golden(
        Condition {
            name: "c".into(),
            virtual_machine_id: "v".into(),
            account: account(),
            source: source(),
            command: "x".into(),
            interval: 5,
            environment: vec!["A=1".into()],
        },
        "0a01 63 1201 76 1a09 0a01751201701a016b 2208 0a0377656212012a 2a01 78 3005 3a03 413d31",
    );
    // A negative interval is ten bytes long, and arrives as it was sent.
    golden(Condition { interval: -1, ..Default::default() }, "30 ffffffffffffffffff01");
    golden(ConditionStreamResponse { response: "id".into(), command_return_value: 0.5 }, "0a02 6964 15 0000003f");
}

#[test]
fn the_generations_misread_each_other_so_a_server_speaks_one() {
    let id = Identifier { value: "6f1c9f0e-3d0b-4d3c-9f6e-0a7b5c2d1e4f".into() };
    let newer = ExecutorResponse { identifier: Some(id.clone()), ..Default::default() }.encode_to_vec();
    assert_ne!(Identifier::decode(&newer[..]).unwrap(), id);
    assert!(ExecutorResponse::decode(&id.encode_to_vec()[..]).is_err());
}

#[test]
fn reflection_of_some_services_has_no_others() {
    for generation in [Generation::Newer, Generation::Older] {
        let set = generation.descriptors_of(&["VirtualMachineService", "Capability"]);
        let names = set.file.iter().flat_map(|file| &file.service).map(|service| service.name()).collect::<Vec<_>>();
        assert_eq!(names, ["Capability", "VirtualMachineService"]);
    }
}
