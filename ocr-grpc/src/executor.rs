//! [`Features`], [`Injects`] and [`Conditions`]: the three services over the core's [`Executor`].

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use futures::{Stream, StreamExt as _};
use ocr_core::{
    Result as CoreResult,
    exec::{ConditionStream, ConditionValue, Executor, InstallKind, Installed},
};
use tonic::{Request, Response, Status};

use crate::{
    CallId, head, parse,
    proto::{
        Condition, ConditionStreamResponse, ExecutorResponse, Feature, Identifier, Inject,
        condition_service_server::ConditionService, feature_service_server::FeatureService,
        inject_service_server::InjectService, older,
    },
    status::{answer, status},
};

/// The most of stdout, and of stderr, that a reply carries, in bytes. An executor's own limit should be no larger;
/// both together and their frame stay below the message limit, so that no reply is lost for its size.
pub const MAX_REPLY_OUTPUT_BYTES: usize = 1 << 20;

/// The values of one condition, as they are sent: finite ones only, and a status at the end. The core's own stream gives
/// a slow reader the latest.
///
/// Nothing is kept beside that stream, so dropping this (the client went away) drops that, at once.
#[derive(Debug)]
pub struct ValueStream<S = ConditionStream> {
    values: S,
    call: CallId,
}

/// `FeatureService`. It translates; the executor decides.
#[derive(Clone, Debug)]
pub struct Features {
    executor: Executor,
}

/// `InjectService`. It translates; the executor decides.
#[derive(Clone, Debug)]
pub struct Injects {
    executor: Executor,
}

/// `ConditionService`, of both generations. It translates; the executor decides.
#[derive(Clone, Debug)]
pub struct Conditions {
    executor: Executor,
}

impl Features {
    /// The service over this executor.
    pub fn new(executor: Executor) -> Self {
        Self { executor }
    }
}

impl Injects {
    /// The service over this executor.
    pub fn new(executor: Executor) -> Self {
        Self { executor }
    }
}

impl Conditions {
    /// The service over this executor.
    pub fn new(executor: Executor) -> Self {
        Self { executor }
    }

    async fn install(&self, condition: Condition) -> CoreResult<Installed> {
        self.executor.create_condition(parse::condition(condition)?).await
    }

    async fn values(&self, request: Request<Identifier>) -> Result<Response<ValueStream>, Status> {
        let call = CallId::given(&request);
        let watched = async { self.executor.watch(parse::install_id(request.get_ref())?).await };
        let values = watched.await.map_err(|error| status(&error, &call))?;
        Ok(Response::new(ValueStream { values, call }))
    }

    async fn remove(&self, request: Request<Identifier>) -> Result<Response<()>, Status> {
        remove(&self.executor, InstallKind::Condition, request).await
    }
}

#[tonic::async_trait]
impl FeatureService for Features {
    async fn create(&self, request: Request<Feature>) -> Result<Response<ExecutorResponse>, Status> {
        let call = CallId::given(&request);
        let done = async { self.executor.install(parse::feature(request.into_inner())?).await.map(installed) };
        answer(&call, done.await)
    }

    async fn delete(&self, request: Request<Identifier>) -> Result<Response<()>, Status> {
        remove(&self.executor, InstallKind::Feature, request).await
    }
}

#[tonic::async_trait]
impl InjectService for Injects {
    async fn create(&self, request: Request<Inject>) -> Result<Response<ExecutorResponse>, Status> {
        let call = CallId::given(&request);
        let done = async { self.executor.install(parse::inject(request.into_inner())?).await.map(installed) };
        answer(&call, done.await)
    }

    async fn delete(&self, request: Request<Identifier>) -> Result<Response<()>, Status> {
        remove(&self.executor, InstallKind::Inject, request).await
    }
}

#[tonic::async_trait]
impl ConditionService for Conditions {
    type streamStream = ValueStream;

    async fn create(&self, request: Request<Condition>) -> Result<Response<ExecutorResponse>, Status> {
        let call = CallId::given(&request);
        answer(&call, self.install(request.into_inner()).await.map(installed))
    }

    async fn stream(&self, request: Request<Identifier>) -> Result<Response<ValueStream>, Status> {
        self.values(request).await
    }

    async fn delete(&self, request: Request<Identifier>) -> Result<Response<()>, Status> {
        self.remove(request).await
    }
}

#[tonic::async_trait]
impl older::condition_service_server::ConditionService for Conditions {
    type streamStream = ValueStream;

    async fn create(&self, request: Request<Condition>) -> Result<Response<Identifier>, Status> {
        let call = CallId::given(&request);
        let installed = self.install(request.into_inner()).await;
        answer(&call, installed.map(|installed| Identifier::from(*installed.id.as_uuid())))
    }

    async fn stream(&self, request: Request<Identifier>) -> Result<Response<ValueStream>, Status> {
        self.values(request).await
    }

    async fn delete(&self, request: Request<Identifier>) -> Result<Response<()>, Status> {
        self.remove(request).await
    }
}

async fn remove(executor: &Executor, kind: InstallKind, request: Request<Identifier>) -> Result<Response<()>, Status> {
    let call = CallId::given(&request);
    let done = async {
        // Gone already is gone.
        let _ = executor.remove(kind, parse::install_id(request.get_ref())?).await?;
        Ok(())
    };
    answer(&call, done.await)
}

fn installed(installed: Installed) -> ExecutorResponse {
    ExecutorResponse {
        identifier: Some(Identifier::from(*installed.id.as_uuid())),
        stdout: cut(installed.stdout),
        stderr: cut(installed.stderr),
    }
}

/// The executor keeps its own limit; this one keeps a reply from being refused after the work was done.
fn cut(mut text: String) -> String {
    let whole_bytes = text.len();
    if whole_bytes > MAX_REPLY_OUTPUT_BYTES {
        let mark = format!("\n... (cut, {whole_bytes} bytes in all)");
        text.truncate(head(&text, MAX_REPLY_OUTPUT_BYTES - mark.len()).len());
        text.push_str(&mark);
    }
    text
}

impl<S: Stream<Item = CoreResult<ConditionValue>> + Unpin> Stream for ValueStream<S> {
    type Item = Result<ConditionStreamResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        loop {
            return Poll::Ready(match ready!(this.values.poll_next_unpin(cx)) {
                None => None,
                Some(Err(error)) => Some(Err(status(&error, &this.call))),
                Some(Ok(value)) if !is_finite(&value, &this.call) => continue,
                Some(Ok(ConditionValue { condition, value, .. })) => {
                    Some(Ok(ConditionStreamResponse { response: condition.to_string(), command_return_value: value }))
                }
            });
        }
    }
}

/// A value that is not finite kills the client's own handler, silently and for good; it must never leave.
fn is_finite(value: &ConditionValue, call: &CallId) -> bool {
    let finite = value.value.is_finite();
    if !finite {
        tracing::error!(request_id = %call, condition = %value.condition, "a condition's value is not finite; it is not sent");
    }
    finite
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures::{executor::block_on, stream};
    use ocr_core::{Error, InstallId};
    use proptest::prelude::*;
    use tonic::Code;

    use super::*;

    fn value(value: f32) -> CoreResult<ConditionValue> {
        Ok(ConditionValue { condition: InstallId::from_uuid(uuid::Uuid::nil()), value, lateness: Duration::ZERO })
    }

    fn stream(items: Vec<CoreResult<ConditionValue>>) -> impl Stream<Item = Result<ConditionStreamResponse, Status>> {
        ValueStream { values: stream::iter(items), call: CallId::random() }
    }

    fn sent(items: Vec<CoreResult<ConditionValue>>) -> Vec<Result<f32, Code>> {
        let items = block_on(stream(items).collect::<Vec<_>>()).into_iter();
        items.map(|item| item.map(|item| item.command_return_value).map_err(|status| status.code())).collect()
    }

    #[test]
    fn the_stream_of_a_machine_that_is_gone_ends_with_not_found() {
        assert_eq!(
            sent(vec![value(0.5), Err(Error::not_found("the machine is gone"))]),
            [Ok(0.5), Err(Code::NotFound)]
        );
    }

    #[test]
    fn a_reply_names_its_condition() {
        let reply = block_on(std::pin::pin!(stream(vec![value(1.0)])).next()).unwrap().unwrap();
        assert_eq!(reply.response, "00000000-0000-0000-0000-000000000000");
    }

    #[test]
    fn output_that_is_too_long_is_cut_and_says_so() {
        let whole = "ä".repeat(MAX_REPLY_OUTPUT_BYTES);
        let short = cut(whole.clone());
        assert!(short.len() <= MAX_REPLY_OUTPUT_BYTES);
        assert!(short.ends_with(&format!("(cut, {} bytes in all)", whole.len())));
        let fits = "x".repeat(MAX_REPLY_OUTPUT_BYTES);
        assert_eq!(cut(fits.clone()), fits);
    }

    proptest! {
        #[test]
        fn only_finite_values_are_ever_sent(values in prop::collection::vec(any::<f32>(), 0..20)) {
            let finite: Vec<_> = values.iter().copied().filter(|value| value.is_finite()).map(Ok).collect();
            prop_assert_eq!(sent(values.into_iter().map(value).collect()), finite);
        }
    }
}
