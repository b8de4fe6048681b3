//! [`Dispatch`]: what every call goes through on its way to its service and back.
//!
//! It gives the call an id and a span, keeps the client's deadline, bounds how long the request may take to arrive and
//! what all arriving requests hold, ends open streams when the server stops, answers for a handler that panics, and
//! sets right two codes of the library below. The log tells method, code and duration of a call, never its contents.

use std::{
    convert::Infallible,
    net::SocketAddr,
    panic::AssertUnwindSafe,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use futures::FutureExt as _;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::body::Incoming;
use ocr_core::Error;
use tokio::time::Sleep;
use tonic::{
    Code, Status,
    body::Body,
    codegen::{Bytes, Service as _},
    service::Routes,
};
use tracing::{Instrument as _, Span};

use super::calls::{Calls, OpenEnded};
use crate::{CallId, head, status};

const GRPC_STATUS: &str = "grpc-status";
const GRPC_MESSAGE: &str = "grpc-message";

/// Calls that end when the server stops, because they have no end of their own.
const OPEN_ENDED: [&str; 5] = [
    "/ConditionService/stream",
    "/ocr.v1.Queue/Watch",
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
];

/// How much of a path the log shows, in bytes.
const MAX_SHOWN_PATH_BYTES: usize = 96;

/// The HTTP/2 service of one connection.
pub(super) struct Dispatch {
    pub(super) routes: Routes,
    pub(super) calls: Calls,
    pub(super) max_calls: usize,
    pub(super) request_deadline: Duration,
    pub(super) arriving: Arc<Arriving>,
    pub(super) peer: Arc<SocketAddr>,
}

/// What all requests hold together that have not arrived whole, in bytes.
pub(super) struct Arriving {
    held_bytes: AtomicUsize,
    max_bytes: usize,
}

impl Arriving {
    pub(super) fn new(max_bytes: usize) -> Arc<Self> {
        Arc::new(Self { held_bytes: AtomicUsize::new(0), max_bytes })
    }
}

impl hyper::service::Service<Request<Incoming>> for Dispatch {
    type Response = Response<Reply>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn call(&self, mut request: Request<Incoming>) -> Self::Future {
        let call = CallId::of(request.headers());
        let path = request.uri().path();
        let shown = head(path, MAX_SHOWN_PATH_BYTES);
        let span = tracing::info_span!("call", request_id = %call, method = shown, peer = %self.peer);
        let open_ended = OPEN_ENDED.into_iter().find(|known| *known == path);
        // The request of a conversation has no end of its own either; its messages are small, each is gone when read.
        let conversation = path.starts_with("/grpc.reflection.");
        let patience = (!conversation).then_some(self.request_deadline);
        let deadline = timeout(request.headers());
        request.extensions_mut().insert(call.clone());
        let arriving = Arc::clone(&self.arriving);
        let request = request.map(|body| Body::new(Arrival { body, patience, sleep: None, arriving, held_bytes: 0 }));
        let mut outcome = Outcome { started: Instant::now(), trace: Trace::Live(Box::new(span.clone())), told: false };
        if self.calls.len() >= self.max_calls {
            outcome.tell(Code::ResourceExhausted);
            let full = Status::resource_exhausted("the server has as many open calls as it takes; come back later");
            return std::future::ready(Ok(full.into_http().map(|body| Reply { body, open: None, outcome }))).boxed();
        }
        let answer = self.routes.clone().call(request);
        let (calls, peer) = (self.calls.clone(), Arc::clone(&self.peer));
        let answered = async move {
            // A panic is this call's alone; what it was is told by the panic hook.
            let answer = AssertUnwindSafe(answer).catch_unwind().map(|answer| {
                answer
                    .unwrap_or_else(|_| Ok(status(&Error::internal("the call's handler panicked"), &call).into_http()))
            });
            let answer = match deadline {
                None => answer.await,
                Some(deadline) => match tokio::time::timeout(deadline, answer).await {
                    Ok(answer) => answer,
                    Err(_) => Ok(Status::deadline_exceeded("the client's own deadline has passed").into_http()),
                },
            };
            let Ok(mut answer) = answer;
            let headers = answer.headers_mut();
            if let Ok(id) = HeaderValue::from_str(call.as_str()) {
                headers.insert(CallId::HEADER, id);
            }
            set_right(headers);
            let code = code(headers);
            if let Some(code) = code {
                outcome.tell(code);
            }
            let open = match open_ended {
                Some(method) if code.is_none() => {
                    // Tens of thousands are open and silent: no span is kept for their one line at the end.
                    outcome.trace = Trace::Later { call, method, peer };
                    Some(calls.open())
                }
                _ => None,
            };
            Ok(answer.map(|body| Reply { body, open, outcome }))
        };
        answered.instrument(span).boxed()
    }
}

/// The code in headers or trailers, when there is one.
fn code(headers: &HeaderMap) -> Option<Code> {
    headers.get(GRPC_STATUS).map(|value| Code::from_bytes(value.as_bytes()))
}

/// The library below calls a message that is too large OUT_OF_RANGE; every other gRPC library, and our documentation,
/// says RESOURCE_EXHAUSTED. No code of ours is OUT_OF_RANGE. It also refuses an unknown method without a word.
fn set_right(headers: &mut HeaderMap) {
    match code(headers) {
        Some(Code::OutOfRange) => {
            headers.insert(GRPC_STATUS, HeaderValue::from(Code::ResourceExhausted as i32));
        }
        Some(Code::Unimplemented) if headers.get(GRPC_MESSAGE).is_none_or(HeaderValue::is_empty) => {
            headers.insert(GRPC_MESSAGE, HeaderValue::from_static("this server has no such service or method"));
        }
        _ => {}
    }
}

/// The client's deadline: `grpc-timeout`, 1 to 8 digits and a unit. One that makes no sense is none.
fn timeout(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get("grpc-timeout")?.to_str().ok()?;
    let (at, unit) = text.char_indices().next_back()?;
    let digits = &text[..at];
    if digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let count = digits.parse::<u64>().ok()?;
    match unit {
        'H' => Some(Duration::from_secs(count * 60 * 60)),
        'M' => Some(Duration::from_secs(count * 60)),
        'S' => Some(Duration::from_secs(count)),
        'm' => Some(Duration::from_millis(count)),
        'u' => Some(Duration::from_micros(count)),
        'n' => Some(Duration::from_nanos(count)),
        _ => None,
    }
}

/// Tells the log once how a call ended.
struct Outcome {
    started: Instant,
    trace: Trace,
    told: bool,
}

/// Where a call's log lines belong.
enum Trace {
    Live(Box<Span>),
    /// What the span is made of, when there is something to say.
    Later {
        call: CallId,
        method: &'static str,
        peer: Arc<SocketAddr>,
    },
}

impl Trace {
    fn span(&self) -> Span {
        match self {
            Self::Live(span) => Span::clone(span),
            Self::Later { call, method, peer } => {
                tracing::info_span!("call", request_id = %call, method, peer = %peer)
            }
        }
    }
}

impl Outcome {
    fn tell(&mut self, code: Code) {
        self.told = true;
        tracing::debug!(parent: &self.trace.span(), ?code, elapsed_ms = self.elapsed_ms(), "call ended");
    }

    fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

impl Drop for Outcome {
    fn drop(&mut self) {
        if !self.told {
            tracing::debug!(parent: &self.trace.span(), elapsed_ms = self.elapsed_ms(), "call left by its client");
        }
    }
}

/// A request that must arrive whole in time, and takes its share of what all may hold together.
struct Arrival {
    body: Incoming,
    /// `None` for a conversation.
    patience: Option<Duration>,
    /// Set when the body has to be waited for.
    sleep: Option<Pin<Box<Sleep>>>,
    arriving: Arc<Arriving>,
    /// This request's share.
    held_bytes: usize,
}

impl Arrival {
    fn hold(&mut self, bytes: usize) -> Result<(), Status> {
        self.held_bytes += bytes;
        let before = self.arriving.held_bytes.fetch_add(bytes, Ordering::Relaxed);
        if before + bytes > self.arriving.max_bytes {
            return Err(Status::resource_exhausted("too much is being sent to this server at once; come back later"));
        }
        Ok(())
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        self.arriving.held_bytes.fetch_sub(self.held_bytes, Ordering::Relaxed);
    }
}

impl HttpBody for Arrival {
    type Data = Bytes;
    type Error = Box<dyn std::error::Error + Send + Sync>;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = &mut *self;
        if let Poll::Ready(frame) = Pin::new(&mut this.body).poll_frame(cx) {
            let Some(Ok(frame)) = frame else { return Poll::Ready(frame.map(|frame| frame.map_err(Into::into))) };
            let bytes = frame.data_ref().map_or(0, Bytes::len);
            let held = if this.patience.is_some() { this.hold(bytes) } else { Ok(()) };
            return Poll::Ready(Some(held.map(|()| frame).map_err(Into::into)));
        }
        let Some(patience) = this.patience else { return Poll::Pending };
        let sleep = this.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep(patience)));
        ready!(sleep.as_mut().poll(cx));
        let late = Status::deadline_exceeded(format!("the request was not there after {} s", patience.as_secs_f64()));
        Poll::Ready(Some(Err(late.into())))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A reply on its way to the client.
pub(super) struct Reply {
    body: Body,
    /// For a call without an end of its own, until it has one.
    open: Option<OpenEnded>,
    outcome: Outcome,
}

impl Reply {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        match Pin::new(&mut self.body).poll_frame(cx) {
            Poll::Ready(Some(Ok(mut frame))) => {
                if let Some(trailers) = frame.trailers_mut() {
                    set_right(trailers);
                    self.outcome.tell(code(trailers).unwrap_or(Code::Unknown));
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Pending => {
                let Some(open) = &mut self.open else { return Poll::Pending };
                ready!(open.poll_stop(cx.waker()));
                self.open = None;
                // From here on it is at its end.
                self.body = Body::empty();
                self.outcome.tell(Code::Unavailable);
                let mut trailers =
                    Status::unavailable("the server is stopping").into_http::<()>().into_parts().0.headers;
                trailers.remove(http::header::CONTENT_TYPE);
                Poll::Ready(Some(Ok(Frame::trailers(trailers))))
            }
            other => other,
        }
    }
}

impl HttpBody for Reply {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        if let Trace::Live(span) = &this.outcome.trace {
            let span = Span::clone(span);
            return span.in_scope(|| this.poll(cx));
        }
        this.poll(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        if self.open.is_some() { SizeHint::default() } else { self.body.size_hint() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_timeout(text: &str) -> HeaderMap {
        HeaderMap::from_iter([(http::HeaderName::from_static("grpc-timeout"), text.parse().unwrap())])
    }

    #[test]
    fn a_clients_deadline_is_read_in_every_unit() {
        for (text, wanted) in [
            ("2H", Duration::from_secs(7200)),
            ("3M", Duration::from_secs(180)),
            ("10S", Duration::from_secs(10)),
            ("250m", Duration::from_millis(250)),
            ("7u", Duration::from_micros(7)),
            ("99999999n", Duration::from_nanos(99_999_999)),
        ] {
            assert_eq!(timeout(&with_timeout(text)), Some(wanted), "{text}");
        }
        for text in ["", "S", "10", "1.5S", "-1S", "+1S", "123456789S", "10s ", "10D"] {
            assert_eq!(timeout(&with_timeout(text)), None, "{text:?}");
        }
    }

    #[test]
    fn only_the_two_codes_are_set_right() {
        for code_before in 0..=16 {
            let mut headers = HeaderMap::new();
            headers.insert(GRPC_STATUS, HeaderValue::from(code_before));
            headers.insert(GRPC_MESSAGE, HeaderValue::from_static("words"));
            set_right(&mut headers);
            let wanted =
                if code_before == Code::OutOfRange as i32 { Code::ResourceExhausted } else { code_before.into() };
            assert_eq!(code(&headers), Some(wanted));
            assert_eq!(headers[GRPC_MESSAGE], "words");
        }
    }
}
