//! `ocr conform`: the conformance suite against a backend that is there.

use std::process::ExitCode;

use ocr_core::{
    ImageBackendExt, NetworkFilter,
    conformance::{self, Case, Subject},
};
use serde_json::json;

use super::{
    args::{BackendKind, ConformArgs},
    output::{Failure, Output},
};
use crate::{backends::Backends, service::open_store, settings::Store};

/// Runs the cases; the exit code is 1 when one failed.
pub(crate) async fn run(args: &ConformArgs, output: &Output) -> Result<ExitCode, Failure> {
    let wanted = |case: &Case| case.name.contains(&args.filter);
    if args.list {
        let cases: Vec<_> = conformance::cases().iter().filter(|case| wanted(case)).collect();
        for case in &cases {
            output.line(format_args!("{:32} {}", case.name, case.about));
        }
        if output.is_json() {
            let list: Vec<_> = cases.iter().map(|case| json!({ "name": case.name, "about": case.about })).collect();
            output.result(format_args!(""), &list);
        }
        return Ok(ExitCode::SUCCESS);
    }
    let backends = Backends::open(&args.backend).await?;
    let subject = subject(&backends, args).await?;
    output.line(format_args!("everything made here carries the owner {}", subject.owner));
    let report = conformance::run_observed(&subject, wanted, |case| output.line(format_args!("{case}"))).await;
    output.result(
        format_args!("{} passed, {} failed, {} ignored", report.passed(), report.failed(), report.ignored()),
        &report.to_json(),
    );
    Ok(if report.failed() == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn subject(backends: &Backends, args: &ConformArgs) -> Result<Subject, Failure> {
    // The template of the memory backend has a name of its own.
    let template = match (args.backend.backend, args.backend.template.as_str()) {
        (BackendKind::Memory, "guest.qcow2") => "tiny",
        (_, named) => named,
    };
    let networks = backends.network.list_networks(&NetworkFilter::default()).await?;
    let state = match (&args.state, args.backend.backend) {
        (Some(path), _) => Some(open_store(&Store::Embedded(path.clone()))?),
        (None, BackendKind::Memory) => Some(open_store(&Store::Memory)?),
        (None, BackendKind::Libvirt) => None,
    };
    Ok(Subject {
        state,
        compute: Some(backends.compute.clone()),
        network: Some(backends.network.clone()),
        image: Some(backends.image.clone()),
        guest: Some(backends.guest.clone()),
        template: Some(backends.image.resolve_image(template).await?.id),
        links: networks.iter().filter(|network| network.tags.is_none()).map(|network| network.id).take(2).collect(),
        guest_user: args.guest_user.clone(),
        deadline: args.backend.ready_timeout,
        ..Subject::new()
    })
}
