//! `ocr vm` and `ocr reconcile`.

use std::time::Instant;

use ocr_core::{VmId, error::seconds};
use ocr_grpc::{
    client::{MachinesClient, VirtualMachineServiceClient},
    proto::{Configuration, DeployVirtualMachine, Identifier, MetaInfo, VirtualMachine},
    v1,
};
use serde_json::json;

use super::{
    args::{Cli, ScopeArgs, VmCommand, VmCreate},
    client,
    output::{Failure, Output},
};

pub(crate) async fn run(cli: &Cli, command: &VmCommand, output: &Output) -> Result<(), Failure> {
    match command {
        VmCommand::Create(args) => create(cli, args, output).await,
        VmCommand::List { scope } => list(cli, scope, output).await,
        VmCommand::Show { id } => show(cli, *id, output).await,
        VmCommand::Delete { id } => delete(cli, *id, output).await,
    }
}

async fn create(cli: &Cli, args: &VmCreate, output: &Output) -> Result<(), Failure> {
    let mut machiner = VirtualMachineServiceClient::new(client::machiner(cli).await?);
    let request = DeployVirtualMachine {
        virtual_machine: Some(VirtualMachine {
            name: args.name.clone(),
            configuration: Some(Configuration { cpu: args.cpu, ram: args.ram }),
            template_id: args.template.clone(),
            links: args.links.clone(),
        }),
        meta_info: Some(MetaInfo {
            exercise_name: args.scope.exercise.clone(),
            deployment_name: args.scope.deployment.clone(),
            properties: None,
        }),
    };
    let progress = output.progress(format!("creating {} and waiting until it is ready", args.name));
    let started = Instant::now();
    let id = machiner.create(request).await?.into_inner().value;
    progress.finish_and_clear();
    output.result(
        format_args!("{id}  {} is ready after {}", args.name, seconds(started.elapsed())),
        &json!({ "id": id, "name": args.name, "seconds": started.elapsed().as_secs_f64() }),
    );
    Ok(())
}

async fn list(cli: &Cli, scope: &ScopeArgs, output: &Output) -> Result<(), Failure> {
    let mut machines = MachinesClient::new(client::machiner(cli).await?);
    let scope = (!scope.is_empty())
        .then(|| v1::Scope { exercise: scope.exercise.clone(), deployment: scope.deployment.clone() });
    let found = machines.list(v1::ListMachinesRequest { scope }).await?.into_inner().machines;
    if output.is_json() {
        output.result(format_args!(""), &found.iter().map(as_json).collect::<Vec<_>>());
        return Ok(());
    }
    if found.is_empty() {
        output.line(format_args!("no machines"));
        return Ok(());
    }
    output.line(format_args!("{:36}  {:20}  {:10}  {:>4}  {:>9}  scope", "id", "name", "state", "cpu", "memory"));
    for vm in &found {
        let scope = vm.scope.clone().unwrap_or_default();
        output.line(format_args!(
            "{:36}  {:20}  {:10}  {:>4}  {:>5} MiB  {}/{}",
            vm.id,
            vm.name,
            vm.state,
            vm.cpus,
            vm.ram_bytes >> 20,
            scope.exercise,
            scope.deployment
        ));
    }
    Ok(())
}

async fn show(cli: &Cli, id: VmId, output: &Output) -> Result<(), Failure> {
    let mut machines = MachinesClient::new(client::machiner(cli).await?);
    let vm = machines.get(v1::GetMachineRequest { id: id.to_string() }).await?.into_inner();
    if output.is_json() {
        output.result(format_args!(""), &as_json(&vm));
        return Ok(());
    }
    let scope = vm.scope.clone().unwrap_or_default();
    for (field, value) in [
        ("id", vm.id.clone()),
        ("name", vm.name.clone()),
        ("state", vm.state.clone()),
        ("exercise", scope.exercise),
        ("deployment", scope.deployment),
        ("cpus", vm.cpus.to_string()),
        ("memory", format!("{} MiB", vm.ram_bytes >> 20)),
        ("template", vm.image.clone()),
        ("agent", if vm.has_agent_channel { "channel present" } else { "no channel" }.to_owned()),
    ] {
        output.line(format_args!("{field:12}{value}"));
    }
    for nic in &vm.nics {
        output.line(format_args!("{:12}{} on {} {}", "nic", nic.mac, nic.network, nic.addresses.join(" ")));
    }
    Ok(())
}

async fn delete(cli: &Cli, id: VmId, output: &Output) -> Result<(), Failure> {
    let mut machiner = VirtualMachineServiceClient::new(client::machiner(cli).await?);
    let progress = output.progress(format!("deleting {id}"));
    machiner.delete(Identifier { value: id.to_string() }).await?;
    progress.finish_and_clear();
    output.result(format_args!("{id} is gone"), &json!({ "id": id }));
    Ok(())
}

/// `ocr reconcile`
pub(crate) async fn reconcile(cli: &Cli, output: &Output) -> Result<(), Failure> {
    let mut machines = MachinesClient::new(client::machiner(cli).await?);
    let progress = output.progress("reconciling");
    let report = machines.reconcile(v1::ReconcileRequest {}).await?.into_inner();
    progress.finish_and_clear();
    let parts = [
        ("ended", &report.ended),
        ("swept", &report.swept),
        ("forgotten", &report.forgotten),
        ("failed", &report.failed),
    ];
    if output.is_json() {
        let value: serde_json::Map<_, _> = parts.iter().map(|(name, list)| ((*name).to_owned(), json!(list))).collect();
        output.result(format_args!(""), &value);
        return Ok(());
    }
    if parts.iter().all(|(_, list)| list.is_empty()) {
        output.line(format_args!("nothing to do"));
    }
    for (name, list) in parts {
        for item in list {
            output.line(format_args!("{name:10} {item}"));
        }
    }
    Ok(())
}

fn as_json(vm: &v1::Machine) -> serde_json::Value {
    let scope = vm.scope.clone().unwrap_or_default();
    json!({
        "id": vm.id, "name": vm.name, "state": vm.state, "cpus": vm.cpus, "ram_bytes": vm.ram_bytes,
        "exercise": scope.exercise, "deployment": scope.deployment, "template": vm.image,
        "agent_channel": vm.has_agent_channel,
        "nics": vm.nics.iter()
            .map(|nic| json!({ "network": nic.network, "mac": nic.mac, "addresses": nic.addresses }))
            .collect::<Vec<_>>(),
    })
}
