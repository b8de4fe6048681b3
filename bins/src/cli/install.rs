//! `ocr feature` and `ocr inject`.

use ocr_grpc::{
    client::{FeatureServiceClient, InjectServiceClient},
    proto::{Account, ExecutorResponse, Feature, Identifier, Inject, Source},
};
use serde_json::json;

use super::{
    args::{AccountArgs, Cli, PackageCommand, PackageInstall},
    client,
    output::{Failure, Output},
};

/// Which of the two.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    Feature,
    Inject,
}

pub(crate) async fn run(cli: &Cli, kind: Kind, command: &PackageCommand, output: &Output) -> Result<(), Failure> {
    let channel = client::executor(cli).await?;
    match command {
        PackageCommand::Install(args) => {
            let progress = output.progress(format!("installing {} on {}", args.package, args.vm));
            let response = match kind {
                Kind::Feature => FeatureServiceClient::new(channel).create(feature(args)).await?,
                Kind::Inject => InjectServiceClient::new(channel).create(inject(args)).await?,
            };
            progress.finish_and_clear();
            installed(response.into_inner(), output);
        }
        PackageCommand::Delete { id } => {
            let id = Identifier { value: id.clone() };
            match kind {
                Kind::Feature => FeatureServiceClient::new(channel).delete(id.clone()).await?,
                Kind::Inject => InjectServiceClient::new(channel).delete(id.clone()).await?,
            };
            output.result(format_args!("{} is gone", id.value), &json!({ "id": id.value }));
        }
    }
    Ok(())
}

/// Says what an install answered.
pub(crate) fn installed(response: ExecutorResponse, output: &Output) {
    let id = response.identifier.map(|id| id.value).unwrap_or_default();
    let value = json!({ "id": id, "stdout": response.stdout, "stderr": response.stderr });
    output.result(format_args!("{id}"), &value);
    for (stream, text) in [("stdout", &response.stdout), ("stderr", &response.stderr)] {
        for line in text.lines() {
            output.line(format_args!("  {stream}: {line}"));
        }
    }
}

/// `name` or `name@requirement`.
pub(crate) fn source(package: &str) -> Source {
    let (name, version) = package.split_once('@').unwrap_or((package, "*"));
    Source { name: name.to_owned(), version: version.to_owned() }
}

pub(crate) fn account(args: &AccountArgs) -> Account {
    Account { username: args.user.clone(), ..Account::default() }
}

fn name(args: &PackageInstall) -> String {
    args.name.clone().unwrap_or_else(|| source(&args.package).name)
}

fn feature(args: &PackageInstall) -> Feature {
    Feature {
        name: name(args),
        virtual_machine_id: args.vm.to_string(),
        feature_type: 0,
        source: Some(source(&args.package)),
        account: Some(account(&args.account)),
        environment: args.environment.clone(),
    }
}

fn inject(args: &PackageInstall) -> Inject {
    Inject {
        name: name(args),
        virtual_machine_id: args.vm.to_string(),
        source: Some(source(&args.package)),
        account: Some(account(&args.account)),
        to_entities: Vec::new(),
        environment: args.environment.clone(),
    }
}
