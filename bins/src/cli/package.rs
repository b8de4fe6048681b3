//! `ocr package`.

use ocr_core::error::reason;
use ocr_grpc::{
    client::{DeputyQueryServiceClient, error},
    proto::{GetPackagesQuery, Identifier},
};
use serde_json::{Value, json};
use tonic::transport::Channel;

use super::{
    args::{Cli, PackagesCommand},
    client,
    install::source,
    output::{Failure, Output},
};

/// The longest page that is shown, in bytes.
const MAX_PAGE_BYTES: usize = 64 << 20;

pub(crate) async fn run(cli: &Cli, command: &PackagesCommand, output: &Output) -> Result<(), Failure> {
    let mut client = DeputyQueryServiceClient::new(client::executor(cli).await?);
    match command {
        PackagesCommand::List { kind } => {
            let query = GetPackagesQuery { package_type: kind.clone() };
            let packages = client.get_packages_by_type(query).await?.into_inner().packages;
            for package in &packages {
                output.line(format_args!("{:<32} {:<16} {}", package.name, package.version, package.r#type));
            }
            if output.is_json() {
                let described = packages
                    .iter()
                    .map(|one| json!({ "name": one.name, "version": one.version, "type": one.r#type }))
                    .collect::<Vec<Value>>();
                output.result(format_args!(""), &described);
            }
        }
        PackagesCommand::Check { package } => {
            client.check_package_exists(source(package)).await?;
            output.result(format_args!("{package} is there"), &json!({ "package": package }));
        }
        PackagesCommand::Show { package } => {
            let text = match client.get_scenario(source(package)).await {
                Ok(scenario) => scenario.into_inner().sdl,
                Err(status) if error(&status).reason() == Some(reason::PACKAGE_TYPE) => {
                    page(&mut client, package).await?
                }
                Err(status) => return Err(status.into()),
            };
            output.result(format_args!("{}", text.trim_end()), &json!({ "package": package, "text": text }));
        }
    }
    Ok(())
}

/// Makes the page, reads it and removes it.
async fn page(client: &mut DeputyQueryServiceClient<Channel>, package: &str) -> Result<String, Failure> {
    let id = Identifier { value: client.create(source(package)).await?.into_inner().id };
    let read = async {
        let mut chunks = client.stream(id.clone()).await?.into_inner();
        let mut page = Vec::new();
        while let Some(part) = chunks.message().await? {
            if page.len() + part.chunk.len() > MAX_PAGE_BYTES {
                return Err(Failure::new(format!("the page is larger than {MAX_PAGE_BYTES} bytes")));
            }
            page.extend(part.chunk);
        }
        Ok(page)
    };
    let page = read.await;
    client.delete(id).await?;
    String::from_utf8(page?).map_err(|_| Failure::new("the page is not text".to_owned()))
}
