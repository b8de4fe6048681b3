//! Metrics: one page for Prometheus, on a listener of its own.
//!
//! Nothing is counted here. The page is made of what the queue, the executor and the server know, when it is asked for;
//! the libraries know nothing of it. `docs/OPERATIONS.md` says what each name means, and a test holds it to that.

use std::{
    cmp::Reverse,
    convert::Infallible,
    fmt,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::Incoming,
    header::{ALLOW, CONTENT_TYPE, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use ocr_core::{
    Error, ErrorKind, Result,
    exec::{ConditionStatus, Executor},
    queue::{LatenessHistogram, LatenessQuantiles, QueueSnapshot, VmQueue},
};
use ocr_grpc::Load;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeGaugeValue, NoLabelSet, text::encode},
    metrics::{MetricType, exemplar::Exemplar},
    registry::Registry,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

/// A look at the queue holds it up, so a page serves all who ask for so long.
const SHARED_FOR: Duration = Duration::from_secs(1);
/// Connections at once; a further one is closed.
const MAX_CONNECTIONS: usize = 16;
/// How long one may take, from its first byte to the last of its answer.
const CONNECTION_DEADLINE: Duration = Duration::from_secs(10);
/// The pause after the system could not accept a connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// The longest label that is somebody's text, in bytes.
const MAX_LABEL_BYTES: usize = 128;
const TEXT: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Where the page is, and how much of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MetricsSettings {
    /// Where to listen.
    pub address: SocketAddr,
    /// How many conditions, and how many machines, have series of their own: the latest.
    pub top: usize,
}

/// Whether what earlier processes left is in order: what the last look found.
#[derive(Debug, Default)]
pub struct Order {
    ready: AtomicBool,
    unfinished: AtomicU64,
    looked: Mutex<Option<Instant>>,
}

impl Order {
    /// A look has ended, with so much that could not be done.
    pub fn looked(&self, unfinished: u64) {
        self.unfinished.store(unfinished, Ordering::Relaxed);
        *self.looked.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// The server answers.
    pub fn set_ready(&self, ready: bool) {
        self.ready.store(ready, Ordering::Relaxed);
    }
}

/// What a page is made of.
#[derive(Clone, Debug)]
pub struct Sources {
    /// The executor, where there is one.
    pub executor: Option<Executor>,
    /// What the server has to do.
    pub load: Load,
    /// How the house is.
    pub order: Arc<Order>,
}

/// The page's listener.
#[derive(Debug)]
pub struct Metrics {
    listener: TcpListener,
    address: SocketAddr,
    page: Arc<Page>,
}

struct Page {
    registry: Registry,
    latest: Mutex<Option<(Instant, Bytes)>>,
}

impl Metrics {
    /// Takes the address; port 0 takes a free one.
    ///
    /// # Errors
    /// `Unavailable` when the address cannot be had.
    pub async fn bind(settings: MetricsSettings, sources: Sources) -> Result<Self> {
        let bind = async {
            let listener = TcpListener::bind(settings.address).await?;
            let address = listener.local_addr()?;
            Ok((listener, address))
        };
        let (listener, address) = bind.await.map_err(|cause: std::io::Error| {
            let message = format!("the metrics' address {} cannot be bound", settings.address);
            Error::new(ErrorKind::Unavailable, message).during("metrics.bind").with_source(cause)
        })?;
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Looks { sources, top: settings.top }));
        Ok(Self { listener, address, page: Arc::new(Page { registry, latest: Mutex::default() }) })
    }

    /// The address; its port is the real one.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `stop`. What is being answered then is cut.
    pub async fn serve(self, stop: CancellationToken) {
        let mut connections = JoinSet::new();
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let accepted = tokio::select! {
                () = stop.cancelled() => return,
                Some(_) = connections.join_next() => continue,
                accepted = self.listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, _)) => {
                    if let Ok(place) = Arc::clone(&places).try_acquire_owned() {
                        let page = Arc::clone(&self.page);
                        connections.spawn(async move {
                            let _ = tokio::time::timeout(CONNECTION_DEADLINE, page.answer(stream)).await;
                            drop(place);
                        });
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "no connection for metrics could be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

impl Page {
    /// One connection: one question, one answer.
    async fn answer(self: Arc<Self>, stream: TcpStream) {
        let service = service_fn(move |request: Request<Incoming>| {
            let page = Arc::clone(&self);
            async move { Ok::<_, Infallible>(page.reply(&request).await) }
        });
        let mut http = http1::Builder::new();
        http.timer(TokioTimer::new()).header_read_timeout(CONNECTION_DEADLINE).keep_alive(false);
        if let Err(error) = http.serve_connection(TokioIo::new(stream), service).await {
            tracing::debug!(%error, "a connection for metrics ended");
        }
    }

    async fn reply(self: Arc<Self>, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        let plain = |status: StatusCode, text: &'static str| {
            let mut response = Response::new(Full::new(Bytes::from_static(text.as_bytes())));
            *response.status_mut() = status;
            response
        };
        if request.uri().path() != "/metrics" {
            return plain(StatusCode::NOT_FOUND, "metrics are at /metrics\n");
        }
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            let mut response = plain(StatusCode::METHOD_NOT_ALLOWED, "metrics are only read\n");
            response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            return response;
        }
        // Looking takes milliseconds where there are tens of thousands of conditions.
        match tokio::task::spawn_blocking(move || self.text()).await {
            Ok(Ok(text)) => {
                let mut response = Response::new(Full::new(text));
                response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(TEXT));
                response
            }
            _ => plain(StatusCode::INTERNAL_SERVER_ERROR, "the page cannot be written\n"),
        }
    }

    fn text(&self) -> std::result::Result<Bytes, fmt::Error> {
        // Held during the look: who comes meanwhile gets the same one.
        let mut latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, text)) = latest.as_ref()
            && at.elapsed() < SHARED_FOR
        {
            return Ok(text.clone());
        }
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        let text = Bytes::from(text);
        *latest = Some((Instant::now(), text.clone()));
        Ok(text)
    }
}

impl fmt::Debug for Page {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Page").finish_non_exhaustive()
    }
}

/// Writes what is seen of the sources at that moment.
#[derive(Debug)]
struct Looks {
    sources: Sources,
    top: usize,
}

impl Collector for Looks {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut write = Write { encoder };
        let Sources { executor, load, order } = &self.sources;
        write.server(load, order)?;
        if let Some(executor) = executor {
            let mut queue = executor.queue();
            let mut conditions = executor.conditions();
            write.queue(&queue, &conditions)?;
            conditions.sort_by_cached_key(|status| (Reverse(status.late_now()), status.id));
            conditions.truncate(self.top);
            write.conditions(&conditions)?;
            queue.vms.sort_by_key(|vm| (Reverse(vm.lateness.map(|late| late.p99)), Reverse(vm.queued), vm.vm));
            queue.vms.truncate(self.top);
            write.machines(&queue.vms)?;
        }
        Ok(())
    }
}

struct Write<'a> {
    encoder: DescriptorEncoder<'a>,
}

/// A series' label names and values.
type Labels<'a, const N: usize> = [(&'static str, &'a str); N];

impl Write<'_> {
    fn gauge(&mut self, name: &str, help: &str, value: impl EncodeGaugeValue) -> fmt::Result {
        self.encoder.encode_descriptor(name, help, None, MetricType::Gauge)?.encode_gauge(&value)
    }

    fn gauges<'a, const N: usize, V: EncodeGaugeValue>(
        &mut self,
        name: &str,
        help: &str,
        series: impl IntoIterator<Item = (Labels<'a, N>, V)>,
    ) -> fmt::Result {
        let mut series = series.into_iter().peekable();
        if series.peek().is_none() {
            return Ok(());
        }
        let mut metric = self.encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (labels, value) in series {
            metric.encode_family(&labels)?.encode_gauge(&value)?;
        }
        Ok(())
    }

    fn counters<'a, const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        series: impl IntoIterator<Item = (Labels<'a, N>, u64)>,
    ) -> fmt::Result {
        let mut series = series.into_iter().peekable();
        if series.peek().is_none() {
            return Ok(());
        }
        let mut metric = self.encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (labels, value) in series {
            metric.encode_family(&labels)?.encode_counter(&value, None::<&Exemplar<NoLabelSet, u64>>)?;
        }
        Ok(())
    }

    fn histogram(&mut self, name: &str, help: &str, histogram: &LatenessHistogram) -> fmt::Result {
        let mut buckets: Vec<_> =
            histogram.buckets.iter().map(|(under, count)| (under.as_secs_f64(), *count)).collect();
        buckets.push((f64::INFINITY, histogram.over));
        let count = buckets.iter().map(|(_, count)| count).sum();
        let mut metric = self.encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
        metric.encode_histogram::<NoLabelSet>(histogram.sum.as_secs_f64(), count, &buckets, None)
    }

    fn server(&mut self, load: &Load, order: &Order) -> fmt::Result {
        let version = [([("version", env!("CARGO_PKG_VERSION"))], 1u64)];
        self.gauges("ocr_build", "1, with the version", version)?;
        let ready = u64::from(order.ready.load(Ordering::Relaxed));
        self.gauge("ocr_ready", "1 once what an earlier process left was looked at: health says SERVING", ready)?;
        let unfinished = order.unfinished.load(Ordering::Relaxed);
        self.gauge(
            "ocr_unfinished",
            "what the latest look could not put in order; the log says what, and the next look tries again",
            unfinished,
        )?;
        let looked = *order.looked.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(looked) = looked {
            let age = looked.elapsed().as_secs_f64();
            self.gauge("ocr_order_age_seconds", "how long ago the latest look for unfinished work ended", age)?;
        }
        self.gauge("ocr_calls_open", "gRPC calls that are open, streams included", load.calls())?;
        self.gauge(
            "ocr_streams_open",
            "calls without an end of their own: condition streams, and watches of health and of the queue",
            load.streams(),
        )
    }

    fn queue(&mut self, queue: &QueueSnapshot, conditions: &[ConditionStatus]) -> fmt::Result {
        let counters = &queue.counters;
        self.gauge("ocr_queue_limit", "how many operations may run at once", queue.max_connections)?;
        self.gauge("ocr_queue_running", "operations that run", counters.running)?;
        self.gauge("ocr_queue_depth", "operations that are ready and wait for a slot or their machine", queue.depth)?;
        self.gauge("ocr_queue_machines", "machines with operations, or on probation", queue.vms.len())?;
        self.gauge("ocr_queue_machines_on_probation", "machines whose last operation hung", counters.on_probation)?;
        self.counters(
            "ocr_queue_operations",
            "operations by what became of them: ended, hung (past their limit), cancelled, refused (the queue was full)",
            [
                ([("result", "ended")], counters.finished.saturating_sub(counters.hung)),
                ([("result", "hung")], counters.hung),
                ([("result", "cancelled")], counters.cancelled),
                ([("result", "refused")], counters.refused),
            ],
        )?;
        self.counters(
            "ocr_queue_started",
            "runs that began: first (one-shots, and first runs of conditions) and again",
            [([("run", "first")], counters.started_first), ([("run", "again")], counters.started_again)],
        )?;
        self.counters(
            "ocr_queue_skipped",
            "ticks of conditions that passed while they waited or ran",
            [([], counters.skipped_ticks)],
        )?;
        self.histogram(
            "ocr_queue_lateness_seconds",
            "how much later than planned conditions ran, but for their first runs",
            &queue.lateness_since_start,
        )?;
        self.histogram(
            "ocr_queue_wait_seconds",
            "how long one-shots and first runs of conditions waited",
            &queue.waits_since_start,
        )?;
        self.gauge("ocr_conditions_watched", "conditions that are watched", conditions.len())?;
        let faulty = conditions.iter().filter(|status| status.consecutive_faults > 0).count();
        self.gauge("ocr_conditions_faulty", "of these, how many gave no value at their latest run", faulty)?;
        let watchers: usize = conditions.iter().map(|status| status.watchers).sum();
        self.gauge("ocr_condition_streams", "streams of conditions", watchers)?;
        let latest = conditions.iter().map(ConditionStatus::late_now).max().unwrap_or_default();
        self.gauge("ocr_conditions_late_seconds", "how late the latest condition is now", latest.as_secs_f64())
    }

    fn conditions(&mut self, conditions: &[ConditionStatus]) -> fmt::Result {
        let names: Vec<_> = conditions
            .iter()
            .map(|status| (status.id.to_string(), status.vm.to_string(), label(&status.name)))
            .collect();
        let labels = |place: usize| {
            let (id, vm, name) = &names[place];
            [("condition", id.as_str()), ("machine", vm.as_str()), ("name", name.as_str())]
        };
        let all = || conditions.iter().enumerate();
        self.gauges(
            "ocr_condition_interval_wanted_seconds",
            "from one planned run to the next",
            all().map(|(place, status)| (labels(place), status.interval.as_secs_f64())),
        )?;
        self.gauges(
            "ocr_condition_interval_got_seconds",
            "from one run to the next, as it was of late",
            all().filter_map(|(place, status)| Some((labels(place), status.interval_got?.as_secs_f64()))),
        )?;
        self.gauges(
            "ocr_condition_late_seconds",
            "how late it is now: the p99 of its lateness, or by how much its next value is overdue",
            all().map(|(place, status)| (labels(place), status.late_now().as_secs_f64())),
        )?;
        let late = |quantile: fn(LatenessQuantiles) -> Duration| {
            move |status: &ConditionStatus| status.lateness_quantiles.map(quantile)
        };
        for (name, help, late) in [
            ("ocr_condition_lateness_p50_seconds", "median of its lateness", late(|late| late.p50)),
            ("ocr_condition_lateness_p99_seconds", "99th percentile of its lateness", late(|late| late.p99)),
        ] {
            let series = all().filter_map(|(place, status)| Some((labels(place), late(status)?.as_secs_f64())));
            self.gauges(name, help, series)?;
        }
        self.gauges(
            "ocr_condition_value_age_seconds",
            "how old its latest value is",
            all().filter_map(|(place, status)| Some((labels(place), status.last_value_age?.as_secs_f64()))),
        )?;
        self.gauges(
            "ocr_condition_faults",
            "how many of its runs in a row gave no value",
            all().map(|(place, status)| (labels(place), status.consecutive_faults)),
        )?;
        self.counters("ocr_condition_runs", "its runs", all().map(|(place, status)| (labels(place), status.runs)))?;
        self.counters(
            "ocr_condition_skipped",
            "its ticks that passed while it waited or ran",
            all().map(|(place, status)| (labels(place), status.skipped)),
        )
    }

    fn machines(&mut self, machines: &[VmQueue]) -> fmt::Result {
        let names: Vec<_> = machines.iter().map(|machine| machine.vm.to_string()).collect();
        let labels = |place: usize| [("machine", names[place].as_str())];
        let all = || machines.iter().enumerate();
        self.gauges(
            "ocr_machine_queue_depth",
            "its operations that are ready and wait",
            all().map(|(place, machine)| (labels(place), machine.queued)),
        )?;
        self.gauges(
            "ocr_machine_busy_seconds",
            "how long what runs there has run; 0 when nothing does",
            all().map(|(place, machine)| {
                let busy = machine.holder.as_ref().map_or(Duration::ZERO, |holder| holder.running_for);
                (labels(place), busy.as_secs_f64())
            }),
        )?;
        self.gauges(
            "ocr_machine_on_probation",
            "1 when its last operation hung",
            all().map(|(place, machine)| (labels(place), u64::from(machine.on_probation))),
        )?;
        let late =
            |quantile: fn(LatenessQuantiles) -> Duration| move |machine: &VmQueue| machine.lateness.map(quantile);
        for (name, help, late) in [
            ("ocr_machine_lateness_p50_seconds", "median lateness of its conditions", late(|late| late.p50)),
            ("ocr_machine_lateness_p99_seconds", "99th percentile of the same", late(|late| late.p99)),
        ] {
            let series = all().filter_map(|(place, machine)| Some((labels(place), late(machine)?.as_secs_f64())));
            self.gauges(name, help, series)?;
        }
        Ok(())
    }
}

/// Somebody's text as a label: short, and without what would break a line.
fn label(text: &str) -> String {
    let mut short: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    while short.len() > MAX_LABEL_BYTES {
        short.pop();
    }
    short
}
