//! [`DeputyQueries`]: `DeputyQueryService` over the core's [`Queries`].

use std::pin::Pin;

use bytes::Bytes;
use futures::{Stream, StreamExt as _, stream};
use ocr_core::{
    Error, ErrorKind, Result as CoreResult,
    package::{PackageSummary, query::Queries},
};
use tonic::{Request, Response, Status};

use crate::{
    CallId, parse,
    proto::{
        DeputyCreateResponse, DeputyStreamResponse, GetPackagesQuery, GetPackagesResponse, GetScenarioResponse,
        Identifier, Package, Source, deputy_query_service_server::DeputyQueryService,
    },
    status::{answer, status},
};

/// The words by which Ranger knows that a package is missing.
pub const PACKAGE_MISSING: &str = "Failed to get package checksum";

/// The most of a page that one message carries, in bytes.
const CHUNK_BYTES: usize = 32 << 10;

/// A page, as it is sent.
pub type ChunkStream = Pin<Box<dyn Stream<Item = Result<DeputyStreamResponse, Status>> + Send>>;

/// `DeputyQueryService`. It translates; the core answers.
#[derive(Clone, Debug)]
pub struct DeputyQueries {
    queries: Queries,
}

impl DeputyQueries {
    /// The service over these answers.
    pub fn new(queries: Queries) -> Self {
        Self { queries }
    }
}

#[tonic::async_trait]
impl DeputyQueryService for DeputyQueries {
    async fn get_packages_by_type(
        &self,
        request: Request<GetPackagesQuery>,
    ) -> Result<Response<GetPackagesResponse>, Status> {
        let call = CallId::given(&request);
        let done = async {
            let packages = self.queries.packages(parse::package_kind(request.get_ref())?).await?;
            Ok(GetPackagesResponse { packages: packages.into_iter().map(Package::from).collect() })
        };
        answer(&call, done.await)
    }

    async fn get_scenario(&self, request: Request<Source>) -> Result<Response<GetScenarioResponse>, Status> {
        let call = CallId::given(&request);
        let done = async {
            let package = parse::source(request.into_inner())?;
            let sdl = self.queries.scenario(&package.name, &package.version).await?;
            Ok(GetScenarioResponse { sdl })
        };
        answer(&call, done.await)
    }

    async fn check_package_exists(&self, request: Request<Source>) -> Result<Response<()>, Status> {
        let call = CallId::given(&request);
        let done = async {
            let package = parse::source(request.into_inner())?;
            self.queries.check(&package.name, &package.version).await.map(drop).map_err(missing)
        };
        answer(&call, done.await)
    }

    async fn create(&self, request: Request<Source>) -> Result<Response<DeputyCreateResponse>, Status> {
        let call = CallId::given(&request);
        let done = async {
            let package = parse::source(request.into_inner())?;
            let page = self.queries.create(&package.name, &package.version).await?;
            Ok(DeputyCreateResponse {
                id: page.id.to_string(),
                checksum: page.checksum,
                filename: page.file_name,
                size: i64::try_from(page.bytes).unwrap_or(i64::MAX),
            })
        };
        answer(&call, done.await)
    }

    type streamStream = ChunkStream;

    async fn stream(&self, request: Request<Identifier>) -> Result<Response<ChunkStream>, Status> {
        let call = CallId::given(&request);
        let read = async { self.queries.read(parse::document_id(request.get_ref())?).await };
        let pages = read.await.map_err(|error| status(&error, &call))?;
        let chunks = pages.flat_map(move |part| stream::iter(chunks(part, &call)));
        Ok(Response::new(Box::pin(chunks)))
    }

    async fn delete(&self, request: Request<Identifier>) -> Result<Response<()>, Status> {
        let call = CallId::given(&request);
        let done = async {
            // Gone already is gone.
            let _ = self.queries.delete(parse::document_id(request.get_ref())?).await?;
            Ok(())
        };
        answer(&call, done.await)
    }
}

/// Says in Ranger's words that a package is missing. A registry that is away is none of that: nobody knows then.
fn missing(error: Error) -> Error {
    match error.kind() {
        // Yanked is a conflict.
        ErrorKind::NotFound | ErrorKind::Conflict | ErrorKind::Invalid => error.with_note(PACKAGE_MISSING),
        _ => error,
    }
}

fn chunks(part: CoreResult<Bytes>, call: &CallId) -> Vec<Result<DeputyStreamResponse, Status>> {
    match part {
        Err(error) => vec![Err(status(&error, call))],
        Ok(part) => part.chunks(CHUNK_BYTES).map(|chunk| Ok(DeputyStreamResponse { chunk: chunk.to_vec() })).collect(),
    }
}

impl From<PackageSummary> for Package {
    fn from(package: PackageSummary) -> Self {
        Self { name: package.name, version: package.version.to_string(), r#type: package.kind.to_string() }
    }
}
