//! The layers around the backends in memory.

#![expect(clippy::unwrap_used, reason = "a helper of a test may fail it")]

use std::{
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use ocr_core::{
    Access, Command, ComputeBackend, ComputeBackendExt, DiskFormat, Error, ErrorKind, ExecRequest, GuestExec,
    GuestExecExt, ImageBackend, ImageFilter, ImageSource, ImageSpec, Key, LayerExt, Name, NetworkBackend,
    NetworkFilter, NetworkKind, NetworkSpec, OsFamily, PowerAction, Precondition, PutFile, RequestId, Result, Retry,
    StateStore, VmFilter,
    layer::{Around, Attempt, Call, Fault, FaultLayer, Layered, LimitLayer, RetryLayer, TimeoutLayer, TraceLayer},
    memory::{self, Faults, MemoryCloud, MemoryState},
};

/// What a layer saw of a call.
#[derive(Clone, Debug, PartialEq)]
struct Seen {
    operation: &'static str,
    resource: String,
    repeatable: bool,
    granted: Option<Duration>,
}

/// Notes every call and makes it.
#[derive(Clone, Debug, Default)]
struct Recorder(Arc<Mutex<Vec<Seen>>>);

impl Recorder {
    /// What was seen since the last time, which is one call.
    fn one(&self) -> Seen {
        let mut seen = self.0.lock().unwrap();
        assert_eq!(seen.len(), 1, "{seen:?}");
        seen.remove(0)
    }
}

impl Around for Recorder {
    async fn around<'a, T, F>(&'a self, call: &'a Call<'a>, attempt: F) -> Result<T>
    where
        T: Send + 'a,
        F: Fn() -> Attempt<'a, T> + Send + Sync + 'a,
    {
        let Call { operation, resource, repeatable, granted, .. } = *call;
        self.0.lock().unwrap().push(Seen { operation, resource: resource.to_string(), repeatable, granted });
        attempt().await
    }
}

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

fn image_spec(folder: &tempfile::TempDir) -> ImageSpec {
    let file = folder.path().join("disk.raw");
    std::fs::write(&file, "a disk").unwrap();
    ImageSpec {
        tags: MemoryCloud::tiny_spec("x").tags,
        name: name("small"),
        source: ImageSource::File(file),
        format: DiskFormat::Raw,
        sha256: None,
        os_family: OsFamily::Linux,
        users: vec!["root".into()],
    }
}

#[tokio::test(start_paused = true)]
async fn every_method_arrives_with_its_arguments_and_is_seen_as_one_call() {
    let folder = tempfile::tempdir().unwrap();
    let (cloud, store, recorder) = (MemoryCloud::new(), MemoryState::new(), Recorder::default());
    let layered = Arc::new(cloud.clone()).layer(recorder.clone());
    let state = Arc::new(store).layer(recorder.clone());
    let mut operations = Vec::new();
    let mut seen = |resource: &str| {
        let seen = recorder.one();
        operations.push(seen.operation);
        assert_eq!(seen.resource, resource);
        (seen.repeatable, seen.granted)
    };
    let usual = (true, None);
    let grace = Some(Duration::from_secs(3));

    let spec = MemoryCloud::tiny_spec("web-0");
    let vm = layered.create_vm(&spec).await.unwrap();
    assert_eq!(seen("vm web-0"), usual);
    let (id, on_vm) = (vm.id, format!("vm {}", vm.id));
    assert_eq!(layered.get_vm(id).await.unwrap(), cloud.get_vm(id).await.unwrap());
    assert_eq!(seen(&on_vm), usual);
    let nobodys = VmFilter { name: Some(name("web-1")), ..VmFilter::default() };
    assert_eq!(layered.list_vms(&nobodys).await.unwrap(), []);
    assert_eq!(seen("vms"), usual);
    for (action, wanted) in [
        (PowerAction::Reboot { grace }, (false, grace)),
        (PowerAction::Stop { grace: None }, (true, None)),
        (PowerAction::Stop { grace }, (true, grace)),
        (PowerAction::Start, (true, None)),
    ] {
        layered.set_power(id, action).await.unwrap();
        let seen = recorder.one();
        assert_eq!(
            seen,
            Seen { operation: "compute.set_power", resource: on_vm.clone(), repeatable: wanted.0, granted: wanted.1 }
        );
    }
    layered.wait_ready(id, Duration::from_secs(60), Duration::from_secs(1)).await.unwrap();
    recorder.0.lock().unwrap().clear();

    let file = PutFile::new("/tmp/a", "hello");
    layered.put_file(id, &file).await.unwrap();
    assert_eq!(seen(&on_vm), usual);
    assert_eq!(layered.get_file(id, "/tmp/a", 5).await.unwrap(), "hello");
    assert_eq!(seen(&on_vm), usual);
    assert_eq!(layered.get_file(id, "/tmp/a", 4).await.unwrap_err().kind(), ErrorKind::Exhausted);
    recorder.one();
    let request = ExecRequest::shell("cat /tmp/a");
    assert_eq!(layered.exec(id, &request).await.unwrap().stdout, "hello");
    assert_eq!(seen(&on_vm), (true, Some(request.deadline)));
    assert_eq!(layered.remove_file(id, "/tmp/a").await.unwrap(), ocr_core::Deletion::Deleted);
    assert_eq!(seen(&on_vm), usual);
    layered.guest_info(id).await.unwrap();
    assert_eq!(seen(&on_vm), usual);

    let network_spec = NetworkSpec { tags: spec.tags.clone(), name: name("blue"), kind: NetworkKind::Isolated };
    let network = layered.create_network(&network_spec).await.unwrap();
    assert_eq!(seen("network blue"), usual);
    assert_eq!(layered.get_network(network.id).await.unwrap(), network);
    assert_eq!(seen(&format!("network {}", network.id)), usual);
    let blue = NetworkFilter { name: Some(name("blue")), ..NetworkFilter::default() };
    assert_eq!(layered.list_networks(&blue).await.unwrap(), std::slice::from_ref(&network));
    assert_eq!(seen("networks"), usual);
    layered.delete_network(network.id).await.unwrap();
    assert_eq!(seen(&format!("network {}", network.id)), usual);
    layered.set_access(id, &Access::Closed).await.unwrap();
    assert_eq!(seen(&on_vm), usual);

    let image = layered.import_image(&image_spec(&folder)).await.unwrap();
    assert_eq!(seen("image small"), usual);
    let on_image = format!("image {}", image.id);
    assert_eq!(layered.get_image(image.id).await.unwrap().name, name("small"));
    assert_eq!(seen(&on_image), usual);
    let small = ImageFilter { name: Some(name("small")), ..ImageFilter::default() };
    assert_eq!(layered.find_images(&small).await.unwrap().len(), 1);
    assert_eq!(seen("images"), usual);
    let to = folder.path().join("exported");
    layered.export_image(image.id, &to).await.unwrap();
    assert_eq!(seen(&on_image), usual);
    assert_eq!(std::fs::read(&to).unwrap(), b"a disk");
    let tags = ocr_core::Tags { request: RequestId::random(), ..spec.tags };
    assert_eq!(layered.capture_vm(id, &name("captured"), &tags).await.unwrap().name, name("captured"));
    assert_eq!(seen(&on_vm), usual);
    layered.delete_image(image.id).await.unwrap();
    assert_eq!(seen(&on_image), usual);
    layered.delete_vm(id).await.unwrap();
    assert_eq!(seen(&on_vm), usual);

    let key = Key::new("a/b").unwrap();
    let version = state.put(&key, Bytes::from("one"), Precondition::Absent, None).await.unwrap();
    assert_eq!(seen("record a/b"), (false, None));
    let only = Precondition::Version(version);
    let version = state.put(&key, Bytes::from("two"), only, grace).await.unwrap();
    assert!(!recorder.one().repeatable);
    state.put(&key, Bytes::from("three"), Precondition::Any, None).await.unwrap();
    assert!(recorder.one().repeatable);
    assert_eq!(state.get(&key).await.unwrap().unwrap().value, "three");
    assert_eq!(seen("record a/b"), usual);
    assert_eq!(state.list("a/", None, 10).await.unwrap().len(), 1);
    assert_eq!(seen("records \"a/\""), usual);
    let wrong = state.delete(&key, Precondition::Version(version)).await.unwrap_err();
    assert_eq!((wrong.kind(), recorder.one().repeatable), (ErrorKind::Conflict, false));
    state.delete(&key, Precondition::Any).await.unwrap();
    assert_eq!(seen("record a/b"), usual);

    operations.push("compute.set_power");
    operations.sort_unstable();
    let mut all = Faults::OPERATIONS;
    all.sort_unstable();
    assert_eq!(operations, all);
}

#[tokio::test]
async fn capabilities_pass_straight_through() {
    let cloud = MemoryCloud::new();
    let layered = Arc::new(cloud.clone()).layer(FaultLayer::new().often("", 1.0, 0, Fault::LoseAnswer));
    assert_eq!(ComputeBackend::capabilities(&*layered), ComputeBackend::capabilities(&cloud));
    assert_eq!(NetworkBackend::capabilities(&*layered), NetworkBackend::capabilities(&cloud));
    assert_eq!(ImageBackend::capabilities(&*layered), ImageBackend::capabilities(&cloud));
    assert_eq!(GuestExec::capabilities(&*layered), GuestExec::capabilities(&cloud));
}

/// A machine's whole life, with one effect that must happen once.
async fn life<A: Around + Clone>(cloud: &MemoryCloud, around: A) -> Result<()> {
    let layered = Arc::new(cloud.clone()).layer(around.clone()).layer(RetryLayer::default());
    let state = Arc::new(MemoryState::new()).layer(around).layer(RetryLayer::default());
    let mut spec = MemoryCloud::tiny_spec("web-0");
    let kind = NetworkKind::Isolated;
    let network = layered.create_network(&NetworkSpec { tags: spec.tags.clone(), name: name("blue"), kind }).await?;
    spec.links = vec![network.id];
    let vm = layered.create_vm(&spec).await?;
    state.put(&Key::new("vm/web-0").unwrap(), Bytes::from("made"), Precondition::Any, None).await?;
    layered.wait_ready(vm.id, Duration::from_secs(60), Duration::from_secs(1)).await?;
    layered.put_file(vm.id, &PutFile::new("/tmp/log", "begin\n")).await?;
    layered.exec(vm.id, &ExecRequest::shell("echo once >> /tmp/log")).await?;
    let log = layered.get_file(vm.id, "/tmp/log", 100).await?;
    assert_eq!(log, "begin\nonce\n");
    assert_eq!(layered.list_vms(&VmFilter::owned_by(&spec.tags.owner)).await?.len(), 1);
    layered.set_power(vm.id, PowerAction::Stop { grace: None }).await?;
    layered.delete_vm(vm.id).await?;
    layered.poll_vm(vm.id, Duration::from_secs(60), |seen| seen.is_none()).await?;
    layered.delete_network(network.id).await?;
    assert_eq!(state.get(&Key::new("vm/web-0").unwrap()).await?.unwrap().value, "made");
    state.delete(&Key::new("vm/web-0").unwrap(), Precondition::Any).await?;
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn whichever_call_fails_once_the_flow_succeeds_and_nothing_happens_twice() {
    let counted = FaultLayer::new();
    life(&MemoryCloud::new(), counted.clone()).await.unwrap();
    assert!(counted.calls() >= 14, "{counted:?}");
    for fault in [Fault::Refuse(ErrorKind::Unavailable), Fault::Refuse(ErrorKind::TimedOut), Fault::LoseAnswer] {
        for nth in 1..=counted.calls() {
            let (cloud, faults) = (MemoryCloud::new(), FaultLayer::new().at(nth, fault));
            let result = life(&cloud, faults.clone()).await;
            result.unwrap_or_else(|error| panic!("{fault:?} at call {nth}: {error}"));
            assert_eq!(faults.injected(), 1);
            let left = cloud.list_vms(&VmFilter::default()).await.unwrap();
            assert_eq!(left, [], "{fault:?} at call {nth}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_flow_gets_through_a_bad_day() {
    for seed in 0..50 {
        let faults = FaultLayer::new().often("", 0.15, seed, Fault::Refuse(ErrorKind::Unavailable)).often(
            "",
            0.1,
            seed + 1000,
            Fault::Delay(Duration::from_secs(2)),
        );
        let retry = RetryLayer { max_attempts: 50, budget: Duration::from_secs(600), ..RetryLayer::default() };
        life(&MemoryCloud::new(), Stack(faults, retry)).await.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    }
}

/// Two layers as one: the first inside the second.
#[derive(Clone, Debug)]
struct Stack<A, B>(A, B);

impl<A: Around, B: Around> Around for Stack<A, B> {
    async fn around<'a, T, F>(&'a self, call: &'a Call<'a>, attempt: F) -> Result<T>
    where
        T: Send + 'a,
        F: Fn() -> Attempt<'a, T> + Send + Sync + 'a,
    {
        let attempt = Arc::new(attempt);
        let inner = move || -> Attempt<'a, T> {
            let attempt = attempt.clone();
            Box::pin(self.0.around(call, move || attempt()))
        };
        self.1.around(call, inner).await
    }
}

#[tokio::test(start_paused = true)]
async fn a_create_that_hangs_after_its_effect_gives_the_one_machine() {
    let cloud = MemoryCloud::new();
    cloud.fault("compute.create_vm", 1, memory::Fault::HangAfter);
    let layered = Arc::new(cloud.clone()).layer(TimeoutLayer::default()).layer(RetryLayer::default());
    let spec = MemoryCloud::tiny_spec("web-0");
    let began = tokio::time::Instant::now();
    let vm = layered.create_vm(&spec).await.unwrap();
    assert!(vm.is_made_by(&spec.tags.request));
    assert!((60..61).contains(&began.elapsed().as_secs()), "{:?}", began.elapsed());
    assert_eq!(cloud.list_vms(&VmFilter::default()).await.unwrap(), [vm]);
}

#[tokio::test(start_paused = true)]
async fn a_command_has_its_own_deadline_and_is_run_once_when_its_answer_is_lost() {
    let cloud = MemoryCloud::new();
    let vm = cloud.create_vm(&MemoryCloud::tiny_spec("web-0")).await.unwrap().id;
    let limit = TimeoutLayer::new(Duration::from_secs(1));
    let layered = Arc::new(cloud.clone()).layer(limit).layer(RetryLayer::default());
    layered.wait_ready(vm, Duration::from_secs(60), Duration::from_secs(1)).await.unwrap();
    let request = ExecRequest { deadline: Duration::from_secs(120), ..ExecRequest::shell("sleep 100; echo done") };
    assert_eq!(layered.exec(vm, &request).await.unwrap().stdout, "done\n");

    cloud.fault(
        "guest.exec",
        1,
        memory::Fault::After(Error::unavailable("connection lost").with_retry(Retry::Ambiguous)),
    );
    let request = ExecRequest::shell("echo once >> /tmp/log; cat /tmp/log");
    assert_eq!(layered.exec(vm, &request).await.unwrap().stdout, "once\n");

    let request = ExecRequest { deadline: Duration::from_secs(2), ..ExecRequest::shell("sleep 100") };
    let began = tokio::time::Instant::now();
    assert_eq!(layered.exec(vm, &request).await.unwrap_err().kind(), ErrorKind::TimedOut);
    assert!(began.elapsed() <= Duration::from_secs(3), "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_conditional_write_is_never_repeated_after_a_lost_answer() {
    let key = Key::new("a").unwrap();
    for (only, made) in [(Precondition::Absent, 1), (Precondition::Any, 2)] {
        let faults = FaultLayer::new().at(1, Fault::LoseAnswer);
        let state = Arc::new(MemoryState::new()).layer(faults.clone()).layer(RetryLayer::default());
        let result = state.put(&key, Bytes::from("mine"), only, None).await;
        assert_eq!((faults.calls_of("state.put"), result.is_ok()), (made, only == Precondition::Any), "{only:?}");
        assert_eq!(state.get(&key).await.unwrap().unwrap().value, "mine");
    }
}

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test(start_paused = true)]
async fn contents_and_secrets_never_reach_the_log() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_ansi(false)
        .with_span_events(tracing_subscriber::fmt::format::FmtSpan::FULL)
        .with_writer(move || writer.clone())
        .finish();
    let _guard = tracing::subscriber::set_default(subscriber);

    let faults = || FaultLayer::new().often("", 0.3, 7, Fault::LoseAnswer);
    let around = |faults: FaultLayer| Stack(Stack(faults, RetryLayer::default()), TraceLayer);
    let layered = Arc::new(MemoryCloud::new()).layer(around(faults()));
    let state = Arc::new(MemoryState::new()).layer(around(faults()));
    let vm = layered.create_vm(&MemoryCloud::tiny_spec("web-0")).await.unwrap().id;
    layered.wait_ready(vm, Duration::from_secs(60), Duration::from_secs(1)).await.unwrap();
    layered.put_file(vm, &PutFile::new("/tmp/a", "canary")).await.unwrap();
    let mut request = ExecRequest::new(Command::Shell("echo canary $WORD; cat".into()));
    request.environment.insert("WORD".into(), "canary".into());
    request.stdin = Bytes::from("canary");
    assert_eq!(layered.exec(vm, &request).await.unwrap().stdout, "canary canary\ncanary");
    assert!(layered.get_file(vm, "/tmp/a", 3).await.is_err());
    let key = Key::new("a").unwrap();
    state.put(&key, Bytes::from("canary"), Precondition::Any, None).await.unwrap();
    state.get(&key).await.unwrap();

    let log = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    for part in ["guest.exec", "state.put", "outcome=\"exhausted\"", "will be repeated"] {
        assert!(log.contains(part), "{part} is not in the log");
    }
    assert!(!log.contains("canary"), "{log}");
}

#[tokio::test(start_paused = true)]
async fn all_layers_together_are_a_backend_like_any_other() {
    let layered: Arc<dyn ComputeBackend> = Arc::new(MemoryCloud::new())
        .layer(FaultLayer::new())
        .layer(TimeoutLayer::default())
        .layer(LimitLayer::new(2, Duration::from_secs(60)))
        .layer(RetryLayer::default())
        .layer(Some(TraceLayer));
    let layered: Arc<dyn ComputeBackend> = Arc::new(Layered::new(None::<TraceLayer>, layered));
    let vm = layered.create_vm(&MemoryCloud::tiny_spec("web-0")).await.unwrap();
    assert_eq!(layered.find_vm(vm.id).await.unwrap().unwrap().id, vm.id);
}

/// The whole suite through the layers: a layered backend is a backend.
#[cfg(feature = "conformance")]
mod conformance {
    use ocr_core::conformance::{Report, Subject, run};
    use tokio::sync::OnceCell;

    use super::*;

    fn counts(report: &Report) -> (usize, usize, usize) {
        (report.passed(), report.failed(), report.ignored())
    }

    /// How many cases the bare memory passes, fails and leaves out.
    async fn bare() -> (usize, usize, usize) {
        static BARE: OnceCell<(usize, usize, usize)> = OnceCell::const_new();
        let (cloud, state) = (MemoryCloud::new(), MemoryState::new());
        *BARE.get_or_init(|| async { counts(&run(&Subject::memory(&cloud, &state), |_| true).await) }).await
    }

    /// Runs the suite over the memory with layers around it, and holds that as many cases pass as without.
    async fn assert_conforms<A: Around + Clone>(around: A) {
        let (cloud, state) = (Arc::new(MemoryCloud::new()), Arc::new(MemoryState::new()));
        let subject = Subject {
            compute: Some(cloud.clone().layer(around.clone())),
            network: Some(cloud.clone().layer(around.clone())),
            image: Some(cloud.clone().layer(around.clone())),
            guest: Some(cloud.clone().layer(around.clone())),
            state: Some(state.clone().layer(around)),
            ..Subject::memory(&cloud, &state)
        };
        let layered = run(&subject, |_| true).await;
        assert_eq!(counts(&layered), bare().await, "{layered}");
        assert!(layered.failures().is_empty() && layered.passed() > 60, "{layered}");
    }

    #[tokio::test(start_paused = true)]
    async fn every_case_passes_through_retry() {
        assert_conforms(RetryLayer::default()).await;
    }

    #[tokio::test(start_paused = true)]
    async fn every_case_passes_through_timeout() {
        assert_conforms(TimeoutLayer::default()).await;
    }

    #[tokio::test(start_paused = true)]
    async fn every_case_passes_through_limit() {
        // A case makes several calls at once, some of which wait for others: one place would not do.
        assert_conforms(LimitLayer::new(4, Duration::from_secs(600))).await;
    }

    #[tokio::test(start_paused = true)]
    async fn every_case_passes_through_trace() {
        let subscriber = tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).with_writer(io::sink).finish();
        let _guard = tracing::subscriber::set_default(subscriber);
        assert_conforms(TraceLayer).await;
    }

    #[tokio::test(start_paused = true)]
    async fn every_case_passes_through_an_empty_plan_of_faults() {
        let faults = FaultLayer::new();
        assert_conforms(faults.clone()).await;
        assert!(faults.calls() > 200 && faults.injected() == 0, "{faults:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn every_case_passes_through_all_layers_together() {
        let inner = Stack(FaultLayer::new(), TimeoutLayer::default());
        let outer = Stack(LimitLayer::new(4, Duration::from_secs(600)), Stack(RetryLayer::default(), TraceLayer));
        assert_conforms(Stack(inner, outer)).await;
    }

    #[tokio::test(start_paused = true)]
    async fn every_case_passes_when_a_quarter_of_all_calls_is_refused_and_repeated() {
        for seed in 0..3 {
            let faults = FaultLayer::new().often("", 0.25, seed, Fault::Refuse(ErrorKind::Unavailable));
            let first_pause = Duration::from_millis(1);
            let retry = RetryLayer { max_attempts: 40, first_pause, max_pause: first_pause, ..RetryLayer::default() };
            assert_conforms(Stack(faults.clone(), retry)).await;
            assert!(faults.injected() > 50, "{faults:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn faults_without_retry_fail_cases() {
        // Else the test above would prove nothing.
        let (cloud, state) = (Arc::new(MemoryCloud::new()), MemoryState::new());
        let faults = FaultLayer::new().often("compute.", 0.25, 1, Fault::Refuse(ErrorKind::Unavailable));
        let subject = Subject { compute: Some(cloud.clone().layer(faults)), ..Subject::memory(&cloud, &state) };
        assert!(run(&subject, |case| case.name.starts_with("vm_")).await.failed() > 5);
    }
}
