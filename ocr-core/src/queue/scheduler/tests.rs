use std::{
    collections::HashMap,
    future::pending,
    pin::pin,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
};

use futures::{FutureExt, future::join_all};
use tokio::{
    sync::mpsc,
    task::{JoinHandle, yield_now},
    time::{advance, sleep},
};
use uuid::Uuid;

use super::*;

const LONG: Duration = Duration::from_secs(3600);
const SECOND: Duration = Duration::from_secs(1);

fn vm(number: u128) -> VmId {
    VmId::from_uuid(Uuid::from_u128(number))
}

fn scheduler(max_connections: usize) -> Scheduler {
    Scheduler::start(SchedulerConfig { max_connections, ..SchedulerConfig::default() })
}

fn at_once<T: Send + 'static>(scheduler: &Scheduler, vm: VmId, value: T) -> impl Future<Output = Result<T>> + Send {
    scheduler.run_once(vm, "at once", LONG, async { Ok(value) })
}

/// Lets everything run that can run, without the clock.
async fn settle() {
    for _ in 0..200 {
        yield_now().await;
    }
}

/// Workers that wait, and the next alarm.
fn idle(shared: &Shared) -> (usize, u64) {
    let state = shared.lock();
    (state.parked, state.alarm_us)
}

/// An operation that runs until it is told to end; it has begun when this returns.
async fn blocker(scheduler: &Scheduler, vm: VmId) -> (oneshot::Sender<()>, JoinHandle<Result<()>>) {
    let (release, released) = oneshot::channel();
    let (begin, begun) = oneshot::channel();
    let scheduler = scheduler.clone();
    let task = tokio::spawn(async move {
        let op = async move {
            begin.send(()).unwrap();
            let _ = released.await;
            Ok(())
        };
        scheduler.run_once(vm, "blocker", LONG, op).await
    });
    begun.await.unwrap();
    (release, task)
}

/// Sets its flag when it is dropped.
struct Dropped(Arc<AtomicBool>);

impl Drop for Dropped {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

#[tokio::test]
async fn a_one_shot_gives_its_result() {
    let scheduler = scheduler(1);
    assert_eq!(at_once(&scheduler, vm(1), 7).await.unwrap(), 7);
    let failed = scheduler.run_once(vm(1), "fails", LONG, async { Err::<(), _>(Error::not_found("no such file")) });
    assert_eq!(failed.await.unwrap_err().kind(), ErrorKind::NotFound);
    let snapshot = scheduler.snapshot();
    assert!(snapshot.running.is_empty() && snapshot.vms.is_empty(), "nothing is left: {snapshot:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_machine_is_never_shared_and_the_cap_is_never_passed() {
    let scheduler = scheduler(7);
    let busy: Arc<Vec<AtomicBool>> = Arc::new((0..20).map(|_| AtomicBool::new(false)).collect());
    let running = Arc::new(AtomicUsize::new(0));
    let peak = Arc::new(AtomicUsize::new(0));
    let peaked = Arc::clone(&peak);
    let op = move |number: usize, steps: usize| {
        let (busy, running, peak) = (Arc::clone(&busy), Arc::clone(&running), Arc::clone(&peak));
        async move {
            assert!(!busy[number].swap(true, SeqCst), "two operations on one machine");
            let now = running.fetch_add(1, SeqCst) + 1;
            peak.fetch_max(now, SeqCst);
            assert!(now <= 7, "{now} operations at once");
            for _ in 0..steps {
                yield_now().await;
            }
            running.fetch_sub(1, SeqCst);
            busy[number].store(false, SeqCst);
            Ok(())
        }
    };
    let (count, mut counted) = mpsc::unbounded_channel();
    let streams: Vec<Periodic> = (0..60)
        .map(|number| {
            let (op, count) = (op.clone(), count.clone());
            let run = move |_| {
                let _ = count.send(number);
                op(number % 20, number % 5).boxed()
            };
            scheduler.every(vm(number as u128 % 20), "stream", MIN_INTERVAL, LONG, run).unwrap()
        })
        .collect();
    let ops = (0..4000).map(|number| {
        let (scheduler, op) = (scheduler.clone(), op(number % 20, number % 7));
        tokio::spawn(async move {
            let run = scheduler.run_once(vm(number as u128 % 20), "one-shot", LONG, op);
            // Some callers lose patience: at once, after a while, or only when it has begun.
            match number % 11 {
                0 => drop(run),
                1 | 2 => {
                    let mut run = pin!(run);
                    for _ in 0..number % 97 {
                        if (&mut run).now_or_never().is_some() {
                            break;
                        }
                        yield_now().await;
                    }
                }
                _ => run.await.unwrap(),
            }
        })
    });
    for op in join_all(ops).await {
        op.unwrap();
    }
    let mut seen = HashMap::new();
    while seen.len() < 60 || seen.values().any(|runs| *runs < 3) {
        *seen.entry(counted.recv().await.unwrap()).or_insert(0) += 1;
    }
    drop(streams);
    scheduler.shutdown(LONG).await;
    let counters = scheduler.snapshot().counters;
    assert_eq!((counters.ready, counters.waiting, counters.running), (0, 0, 0));
    assert_eq!(peaked.load(SeqCst), 7, "the slots were used");
    assert_eq!(counters.peak_running, 7);
}

#[tokio::test]
async fn a_caller_that_goes_frees_its_place_at_once() {
    let scheduler = scheduler(2);
    let (release, blocker) = blocker(&scheduler, vm(1)).await;
    let dropped = Arc::new(AtomicBool::new(false));
    let guard = Dropped(Arc::clone(&dropped));
    let mut queued = Box::pin(scheduler.run_once(vm(1), "queued", LONG, async move {
        drop(guard);
        Ok(())
    }));
    assert!(futures::poll!(&mut queued).is_pending());
    assert_eq!(scheduler.snapshot().depth, 1);
    drop(queued);
    assert!(dropped.load(SeqCst), "what it held is dropped too");
    assert_eq!(scheduler.snapshot().depth, 0);
    assert_eq!(scheduler.snapshot().vms[0].operations, 1);
    release.send(()).unwrap();
    blocker.await.unwrap().unwrap();
}

#[tokio::test]
async fn what_runs_is_finished_though_its_caller_is_gone() {
    let scheduler = scheduler(2);
    let (release, released) = oneshot::channel::<()>();
    let (end, ended) = oneshot::channel();
    let (begin, begun) = oneshot::channel();
    let caller = tokio::spawn({
        let scheduler = scheduler.clone();
        async move {
            let op = async move {
                begin.send(()).unwrap();
                released.await.unwrap();
                end.send(()).unwrap();
                Ok(())
            };
            scheduler.run_once(vm(1), "torn?", LONG, op).await
        }
    });
    begun.await.unwrap();
    caller.abort();
    assert!(caller.await.unwrap_err().is_cancelled());
    assert_eq!(scheduler.snapshot().running.len(), 1);
    release.send(()).unwrap();
    ended.await.unwrap();
    at_once(&scheduler, vm(1), ()).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_one_shot_past_its_limit_is_dropped_and_its_machine_is_on_probation() {
    let scheduler = scheduler(1);
    let begun = Instant::now();
    let hangs = scheduler.run_once(vm(1), "hangs", 5 * SECOND, pending::<Result<()>>());
    let error = hangs.await.unwrap_err();
    assert_eq!((error.kind(), error.retry()), (ErrorKind::TimedOut, Retry::Ambiguous));
    assert!(error.to_string().contains("hangs on virtual machine 00000000"), "{error}");
    assert!((5 * SECOND..6 * SECOND).contains(&begun.elapsed()));
    assert!(scheduler.snapshot().vms[0].on_probation);
    at_once(&scheduler, vm(1), ()).await.unwrap();
    assert!(scheduler.snapshot().vms.is_empty());
    let says_so = scheduler.run_once(vm(1), "says so", LONG, async { Err::<(), _>(Error::timed_out("no answer")) });
    assert_eq!(says_so.await.unwrap_err().message(), "no answer");
    assert!(scheduler.snapshot().vms[0].on_probation);
}

#[tokio::test(start_paused = true)]
async fn every_run_past_its_limit_is_dropped_whatever_else_runs() {
    let scheduler = scheduler(4);
    let hangs = |number: u128, limit: u32| {
        let scheduler = scheduler.clone();
        async move {
            let begun = Instant::now();
            let hangs = scheduler.run_once(vm(number), "hangs", limit * SECOND, pending::<Result<()>>());
            assert_eq!(hangs.await.unwrap_err().kind(), ErrorKind::TimedOut);
            assert_eq!(begun.elapsed().as_secs(), u64::from(limit));
        }
    };
    let (_release, _blocker) = blocker(&scheduler, vm(9)).await;
    let _periodic = scheduler.every(vm(8), "condition", 7 * SECOND, LONG, |_| async { Ok(()) }.boxed()).unwrap();
    for _ in 0..5 {
        // The later one has to be over first. One slot is for machines that hung.
        hangs(1, 30).await;
        at_once(&scheduler, vm(1), ()).await.unwrap();
        tokio::join!(hangs(1, 20), hangs(2, 5));
        at_once(&scheduler, vm(1), ()).await.unwrap();
        at_once(&scheduler, vm(2), ()).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn each_run_has_its_own_limit() {
    let scheduler = scheduler(1);
    // One worker, one timer: a limit neither lasts over into the next run nor cuts it short.
    for (limit, length) in [(60, 50), (5, 4), (60, 50), (5, 60), (100, 99), (3, 4)] {
        let op = async move {
            sleep(length * SECOND).await;
            Ok(())
        };
        let result = scheduler.run_once(vm(1), "sleeps", limit * SECOND, op).await;
        assert_eq!(result.is_ok(), length < limit, "limit {limit} s, length {length} s");
    }
}

#[tokio::test]
async fn a_panic_ends_neither_worker_nor_machine() {
    let scheduler = scheduler(1);
    for _ in 0..3 {
        let panics: BoxFuture<'static, Result<()>> = async { panic!("by design") }.boxed();
        let error = scheduler.run_once(vm(1), "panics", LONG, panics).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Internal);
        assert!(!error.to_string().contains("by design"), "the text of a panic is for the log: {error}");
        assert_eq!(at_once(&scheduler, vm(1), 7).await.unwrap(), 7);
    }
    struct PanicsWhenDropped;
    impl Drop for PanicsWhenDropped {
        fn drop(&mut self) {
            panic!("by design, when dropped");
        }
    }
    let guard = PanicsWhenDropped;
    let op = async move {
        let _guard = guard;
        yield_now().await;
        Ok(())
    };
    assert_eq!(scheduler.run_once(vm(1), "panics", LONG, op).await.unwrap_err().kind(), ErrorKind::Internal);
    assert_eq!(at_once(&scheduler, vm(1), 7).await.unwrap(), 7);
}

#[tokio::test(start_paused = true)]
async fn a_periodic_operation_keeps_its_grid() {
    let scheduler = scheduler(1);
    let (tell, mut told) = mpsc::unbounded_channel();
    let epoch = Instant::now();
    let run = move |tick: Tick| {
        tell.send((epoch.elapsed(), tick)).unwrap();
        // The fifth run takes two and a half intervals.
        sleep(if tick.run == 4 { 25 * SECOND } else { SECOND }).map(Ok).boxed()
    };
    let _periodic = scheduler.every(vm(1), "condition", 10 * SECOND, LONG, run).unwrap();
    let mut runs = Vec::new();
    for _ in 0..8 {
        runs.push(told.recv().await.unwrap());
    }
    assert_eq!(runs[0].0, Duration::ZERO);
    let first = runs[1].0;
    assert!((SECOND..=11 * SECOND).contains(&first), "{first:?}");
    let begun: Vec<u64> = runs[1..].iter().map(|(at, _)| (*at - first).as_millis() as u64).collect();
    // Due at 40 and 50 while it ran until 55: one run then, a tick skipped, and the grid stays.
    assert_eq!(begun, [0, 10_000, 20_000, 30_000, 55_000, 60_000, 70_000]);
    let skipped: Vec<u64> = runs.iter().map(|(_, tick)| tick.skipped).collect();
    assert_eq!(skipped, [0, 0, 0, 0, 0, 1, 0, 0]);
    let late: Vec<u64> = runs.iter().map(|(_, tick)| tick.lateness.as_secs()).collect();
    assert_eq!(late, [0, 0, 0, 0, 0, 5, 0, 0]);
    assert_eq!(runs.iter().map(|(_, tick)| tick.run).collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5, 6, 7]);
}

#[tokio::test(start_paused = true)]
async fn many_periodic_operations_all_get_their_interval() {
    let scheduler = scheduler(8);
    let run = |_| sleep(Duration::from_millis(100)).map(Ok).boxed();
    let streams: Vec<Periodic> = (0..200)
        .map(|number| scheduler.every(vm(number % 50), format!("{number}"), 5 * SECOND, LONG, run).unwrap())
        .collect();
    sleep(600 * SECOND).await;
    let snapshot = scheduler.snapshot();
    assert_eq!((snapshot.periodics.len(), snapshot.vms.len()), (200, 50));
    for stream in &streams {
        let status = stream.status().unwrap();
        assert!((119..=121).contains(&status.runs), "{status:?}");
        let got = status.interval_got.unwrap();
        assert!(got > Duration::from_millis(4900) && got < Duration::from_millis(5100), "{status:?}");
    }
    for vm in &snapshot.vms {
        assert!(vm.lateness.unwrap().p99 < Duration::from_millis(150), "{vm:?}");
    }
    let lateness = snapshot.lateness.unwrap();
    assert!(lateness.p99 < Duration::from_millis(150), "{lateness:?}");
    assert_eq!(snapshot.counters.skipped_ticks, 0);
}

#[tokio::test(start_paused = true)]
async fn what_is_due_together_begins_together() {
    let scheduler = scheduler(10);
    let run = |tick: Tick| if tick.run == 0 { async { Ok(()) }.boxed() } else { pending().boxed() };
    let _streams: Vec<Periodic> =
        (0..12).map(|number| scheduler.every(vm(number), "condition", 10 * SECOND, LONG, run).unwrap()).collect();
    settle().await;
    assert_eq!(scheduler.snapshot().counters.waiting, 12);
    // The clock jumps past all ticks at once: one alarm, ten runs.
    advance(20 * SECOND).await;
    settle().await;
    assert_eq!(scheduler.snapshot().running.len(), 10);
}

#[tokio::test(start_paused = true)]
async fn dropping_the_handle_ends_a_periodic_operation() {
    let scheduler = scheduler(1);
    let runs = Arc::new(AtomicUsize::new(0));
    let dropped = Arc::new(AtomicBool::new(false));
    let periodic = |length: Duration| {
        let (runs, guard) = (Arc::clone(&runs), Dropped(Arc::clone(&dropped)));
        let run = move |_| {
            let _ = &guard;
            runs.fetch_add(1, SeqCst);
            sleep(length).map(Ok).boxed()
        };
        scheduler.every(vm(1), "condition", 10 * SECOND, LONG, run).unwrap()
    };
    // While its first run is queued.
    let (release, blocker) = blocker(&scheduler, vm(2)).await;
    drop(periodic(SECOND));
    assert!(dropped.swap(false, SeqCst));
    release.send(()).unwrap();
    blocker.await.unwrap().unwrap();
    // While it waits for its tick.
    let waits = periodic(SECOND);
    sleep(25 * SECOND).await;
    let count = runs.load(SeqCst);
    assert!(count >= 2);
    drop(waits);
    assert!(dropped.swap(false, SeqCst));
    sleep(60 * SECOND).await;
    assert_eq!(runs.load(SeqCst), count);
    // While it runs: that run is finished.
    let running = periodic(60 * SECOND);
    sleep(SECOND).await;
    drop(running);
    assert_eq!(scheduler.snapshot().running.len(), 1);
    assert!(!dropped.load(SeqCst));
    sleep(60 * SECOND).await;
    assert!(dropped.load(SeqCst));
    assert_eq!(runs.load(SeqCst), count + 1);
    assert!(scheduler.snapshot().vms.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_periodic_operation_outlives_its_faults() {
    let scheduler = scheduler(1);
    let (tell, mut told) = mpsc::unbounded_channel();
    let run = move |tick: Tick| {
        tell.send(tick.run).unwrap();
        match tick.run {
            0 => panic!("by design, before the run"),
            1 => async { panic!("by design, in the run") }.boxed(),
            2 => async { Err(Error::not_found("gone")) }.boxed(),
            3 => async { Err(Error::timed_out("no answer")) }.boxed(),
            4 => async { Ok(()) }.boxed(),
            _ => pending().boxed(),
        }
    };
    let _periodic = scheduler.every(vm(1), "condition", 10 * SECOND, 3 * SECOND, run).unwrap();
    let mut probation = Vec::new();
    for expected in 0..7 {
        assert_eq!(told.recv().await, Some(expected));
        settle().await;
        probation.push(scheduler.snapshot().counters.on_probation);
    }
    assert_eq!(probation, [0, 0, 0, 1, 0, 0, 1], "after the run that said so, and after the one that was dropped");
}

#[tokio::test]
async fn an_interval_has_bounds() {
    let scheduler = scheduler(1);
    for interval in [Duration::ZERO, Duration::from_micros(999), MAX_INTERVAL + SECOND, Duration::MAX] {
        let error = scheduler.every(vm(1), "condition", interval, LONG, |_| async { Ok(()) }.boxed()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.message().starts_with("interval: "), "{error}");
    }
    assert!(scheduler.snapshot().vms.is_empty());
}

#[tokio::test]
async fn a_full_queue_says_so() {
    let config = SchedulerConfig { max_connections: 1, max_queued_per_vm: 2, ..SchedulerConfig::default() };
    let scheduler = Scheduler::start(config);
    let (_release, _blocker) = blocker(&scheduler, vm(1)).await;
    let mut queued: Vec<_> = (0..2).map(|_| Box::pin(at_once(&scheduler, vm(1), ()))).collect();
    for one in &mut queued {
        assert!(futures::poll!(one).is_pending());
    }
    let error = at_once(&scheduler, vm(1), ()).await.unwrap_err();
    assert_eq!((error.kind(), error.reason()), (ErrorKind::Exhausted, Some(reason::QUEUE_FULL)));
    let error = scheduler.every(vm(1), "condition", SECOND, LONG, |_| async { Ok(()) }.boxed()).unwrap_err();
    assert_eq!(error.reason(), Some(reason::QUEUE_FULL));
    queued.pop();
    assert!(futures::poll!(Box::pin(at_once(&scheduler, vm(1), ()))).is_pending(), "there is a place again");
}

#[tokio::test(start_paused = true)]
async fn shutdown_refuses_what_waits_and_finishes_what_runs() {
    let scheduler = scheduler(2);
    let sleeps = scheduler.run_once(vm(1), "ends in time", LONG, sleep(5 * SECOND).map(Ok));
    let hangs = scheduler.run_once(vm(2), "does not", LONG, pending::<Result<()>>());
    let queued = at_once(&scheduler, vm(1), ());
    let _periodic = scheduler.every(vm(3), "condition", SECOND, LONG, |_| async { Ok(()) }.boxed()).unwrap();
    let begun = Instant::now();
    let shutdown = async {
        settle().await;
        scheduler.shutdown(20 * SECOND).await;
        begun.elapsed()
    };
    let queued = async {
        let result = queued.await;
        (result, begun.elapsed())
    };
    let (sleeps, hangs, (queued, refused), over) = tokio::join!(sleeps, hangs, queued, shutdown);
    sleeps.unwrap();
    let hangs = hangs.unwrap_err();
    assert_eq!((hangs.kind(), hangs.retry()), (ErrorKind::Unavailable, Retry::Ambiguous));
    let queued = queued.unwrap_err();
    assert_eq!((queued.kind(), queued.retry()), (ErrorKind::Unavailable, Retry::Safe));
    assert_eq!(refused, Duration::ZERO, "what waits is refused at once");
    assert_eq!(over.as_secs(), 20);
    let snapshot = scheduler.snapshot();
    assert!(snapshot.running.is_empty() && snapshot.vms.is_empty() && snapshot.periodics.is_empty(), "{snapshot:?}");
    assert_eq!(at_once(&scheduler, vm(1), ()).await.unwrap_err().kind(), ErrorKind::Unavailable);
    let refused = scheduler.every(vm(3), "condition", SECOND, LONG, |_| async { Ok(()) }.boxed());
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Unavailable);
    scheduler.shutdown(20 * SECOND).await;
}

#[tokio::test(start_paused = true)]
async fn shutdown_returns_when_all_is_over() {
    let scheduler = scheduler(50);
    let slow = tokio::spawn({
        let scheduler = scheduler.clone();
        async move { scheduler.run_once(vm(1), "slow", LONG, sleep(5 * SECOND).map(Ok)).await }
    });
    settle().await;
    let begun = Instant::now();
    scheduler.shutdown(LONG).await;
    assert_eq!(begun.elapsed().as_secs(), 5);
    slow.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_workers_end_with_the_last_handle() {
    let scheduler = scheduler(50);
    let shared = Arc::clone(&scheduler.owner.shared);
    let periodic = scheduler.clone().every(vm(1), "condition", SECOND, LONG, |_| async { Ok(()) }.boxed()).unwrap();
    drop(scheduler);
    sleep(10 * SECOND).await;
    assert!(periodic.status().unwrap().runs > 5, "a handle keeps the scheduler");
    drop(periodic);
    shared.tracker.close();
    shared.tracker.wait().await;
    assert_eq!(Arc::strong_count(&shared), 1);
}

#[tokio::test(start_paused = true)]
async fn who_waits_is_not_polled() {
    let scheduler = scheduler(50);
    let shared = Arc::clone(&scheduler.owner.shared);
    settle().await;
    assert_eq!(idle(&shared), (50, NEVER_US), "an idle scheduler has no timer");
    let _periodic = scheduler.every(vm(1), "condition", 60 * SECOND, LONG, |_| async { Ok(()) }.boxed()).unwrap();
    settle().await;
    let due_us = shared.lock().queue.next_due_us().unwrap();
    assert_eq!(idle(&shared), (50, due_us), "one task sleeps, until the tick");
    assert_eq!(shared.wakeups.available_permits(), 0);
    advance(Duration::from_micros(due_us - 2000)).await;
    settle().await;
    assert_eq!(idle(&shared), (50, due_us));
    let at = Instant::now();
    sleep(SECOND).await;
    assert!(at.elapsed() < 2 * SECOND && shared.lock().alarm_us > due_us);
}

#[tokio::test]
async fn operations_that_never_wait_let_other_tasks_run() {
    let scheduler = scheduler(1);
    let count = Arc::new(AtomicUsize::new(0));
    let mut queued: Vec<_> = (0..1000)
        .map(|_| {
            let count = Arc::clone(&count);
            Box::pin(scheduler.run_once(vm(1), "never waits", LONG, async move {
                count.fetch_add(1, SeqCst);
                Ok(())
            }))
        })
        .collect();
    for one in &mut queued {
        assert!(futures::poll!(one).is_pending());
    }
    yield_now().await;
    assert!((1..1000).contains(&count.load(SeqCst)), "{count:?} ran in one go");
    for result in join_all(queued).await {
        result.unwrap();
    }
}

#[tokio::test]
async fn an_operation_may_use_its_own_scheduler() {
    let scheduler = scheduler(2);
    let inner = scheduler.clone();
    let op = async move {
        let _periodic = inner.every(vm(1), "condition", SECOND, LONG, |_| async { Ok(()) }.boxed())?;
        at_once(&inner, vm(2), inner.snapshot().running.len()).await
    };
    assert_eq!(scheduler.run_once(vm(1), "nested", LONG, op).await.unwrap(), 1);
    // The last handle goes inside a worker, when it drops the operation.
    let inner = scheduler.clone();
    let (begin, begun) = oneshot::channel();
    let (release, released) = oneshot::channel::<()>();
    let mut run = Box::pin(scheduler.run_once(vm(1), "keeps the last handle", LONG, async move {
        begin.send(inner.snapshot().running.len()).unwrap();
        let _ = released.await;
        drop(inner);
        Ok(())
    }));
    assert!(futures::poll!(&mut run).is_pending());
    assert_eq!(begun.await.unwrap(), 1);
    drop(run);
    let shared = Arc::clone(&scheduler.owner.shared);
    drop(scheduler);
    release.send(()).unwrap();
    shared.tracker.close();
    shared.tracker.wait().await;
}

#[test]
fn without_a_runtime_nothing_is_taken() {
    let scheduler = scheduler(2);
    let refused = scheduler.every(vm(1), "condition", SECOND, LONG, |_| async { Ok(()) }.boxed());
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Unavailable);
    let refused = at_once(&scheduler, vm(1), ()).now_or_never().unwrap();
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Unavailable);
    scheduler.shutdown(LONG).now_or_never().unwrap();
}

#[test]
fn callers_are_told_when_the_runtime_goes() {
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (gone, stays) = (runtime(), runtime());
    let scheduler = gone.block_on(async { scheduler(1) });
    let mut runs = Box::pin(scheduler.run_once(vm(1), "runs", LONG, pending::<Result<()>>()));
    let mut waits = Box::pin(at_once(&scheduler, vm(1), ()));
    gone.block_on(async {
        assert!(futures::poll!(&mut runs).is_pending());
        assert!(futures::poll!(&mut waits).is_pending());
        settle().await;
    });
    drop(gone);
    stays.block_on(async {
        assert_eq!(runs.await.unwrap_err().retry(), Retry::Ambiguous);
        assert_eq!(waits.await.unwrap_err().retry(), Retry::Safe);
        assert_eq!(at_once(&scheduler, vm(1), ()).await.unwrap_err().kind(), ErrorKind::Unavailable);
    });
    assert!(scheduler.snapshot().running.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_shows_what_runs_and_what_waits() {
    let scheduler = scheduler(1);
    let (release, blocker) = blocker(&scheduler, vm(1)).await;
    let mut queued = Box::pin(at_once(&scheduler, vm(1), ()));
    assert!(futures::poll!(&mut queued).is_pending());
    let _periodic = scheduler.every(vm(2), "condition", 5 * SECOND, LONG, |_| async { Ok(()) }.boxed()).unwrap();
    advance(3 * SECOND).await;
    let snapshot = scheduler.snapshot();
    assert_eq!((snapshot.depth, snapshot.max_connections), (2, 1));
    let running = RunningOp { vm: vm(1), what: "blocker".into(), running_for: 3 * SECOND };
    assert_eq!(snapshot.running, [running]);
    let holder = snapshot.running.first().cloned();
    let (open, on_probation, lateness) = (true, false, None);
    let load = VmQueue { vm: vm(1), queued: 1, operations: 2, holder: holder.clone(), open, on_probation, lateness };
    assert_eq!(snapshot.vms, [load.clone(), VmQueue { vm: vm(2), operations: 1, holder: None, ..load }]);
    assert_eq!((scheduler.holder(vm(1)), scheduler.holder(vm(2)), scheduler.holder(vm(3))), (holder, None, None));
    assert_eq!((snapshot.periodics[0].what.as_str(), snapshot.periodics[0].runs), ("condition", 0));
    assert_eq!(snapshot.periodics[0].interval_wanted, 5 * SECOND);
    release.send(()).unwrap();
    blocker.await.unwrap().unwrap();
    queued.await.unwrap();
}

// --- gates, and a limit that changes ----------------------------------------------------------------------------

fn gated(max_connections: usize) -> Scheduler {
    Scheduler::start(SchedulerConfig { max_connections, gated: true, ..SchedulerConfig::default() })
}

#[tokio::test(start_paused = true)]
async fn behind_a_closed_gate_work_waits_without_a_slot_and_without_polling() {
    let scheduler = gated(1);
    let shared = Arc::clone(&scheduler.owner.shared);
    let runs = Arc::new(AtomicUsize::new(0));
    let run = {
        let runs = Arc::clone(&runs);
        move |_| {
            runs.fetch_add(1, SeqCst);
            async { Ok(()) }.boxed()
        }
    };
    let _periodic = scheduler.every(vm(1), "condition", 10 * SECOND, LONG, run).unwrap();
    let mut waits = Box::pin(at_once(&scheduler, vm(1), 7));
    assert!(futures::poll!(&mut waits).is_pending());
    settle().await;
    assert_eq!((runs.load(SeqCst), idle(&shared)), (0, (1, NEVER_US)));
    scheduler.open(vm(2));
    assert_eq!(at_once(&scheduler, vm(2), 8).await.unwrap(), 8, "the only slot is free");
    scheduler.open(vm(1));
    assert_eq!(waits.await.unwrap(), 7);
    settle().await;
    assert_eq!(runs.load(SeqCst), 1);
    // Its second run comes due behind the gate: one alarm, and then none.
    scheduler.close(vm(1)).now_or_never().expect("nothing runs there");
    sleep(60 * SECOND).await;
    assert_eq!((runs.load(SeqCst), idle(&shared)), (1, (1, NEVER_US)));
    let vm1 = scheduler.snapshot().vms.remove(0);
    assert_eq!((vm1.queued, vm1.operations, vm1.open), (1, 1, false));
}

#[tokio::test(start_paused = true)]
async fn ticks_behind_a_closed_gate_are_skipped_and_not_stacked() {
    let scheduler = scheduler(4);
    let (tell, mut told) = mpsc::unbounded_channel();
    let run = move |tick: Tick| {
        tell.send((Instant::now(), tick)).unwrap();
        async { Ok(()) }.boxed()
    };
    let _periodic = scheduler.every(vm(1), "condition", 10 * SECOND, LONG, run).unwrap();
    told.recv().await.unwrap();
    let (grid, _) = told.recv().await.unwrap();
    settle().await;
    scheduler.close(vm(1)).await;
    sleep(55 * SECOND).await;
    scheduler.open(vm(1));
    // Due after 10, 20, 30, 40 and 50 s: one run, for the last of them, and then the grid.
    let (at, tick) = told.recv().await.unwrap();
    assert_eq!((at - grid).as_secs(), 55);
    assert_eq!((tick.run, tick.skipped, tick.lateness.as_secs()), (2, 4, 5));
    let (at, tick) = told.recv().await.unwrap();
    assert_eq!(((at - grid).as_secs(), tick.skipped, tick.lateness.as_millis()), (60, 0, 0));
}

#[tokio::test]
async fn closing_lets_what_runs_finish_and_says_when() {
    let scheduler = scheduler(4);
    let (release, blocker) = blocker(&scheduler, vm(1)).await;
    let mut closed = Box::pin(scheduler.close(vm(1)));
    drop(scheduler.close(vm(1)));
    let mut queued = Box::pin(at_once(&scheduler, vm(1), ()));
    assert!(futures::poll!(&mut queued).is_pending());
    settle().await;
    assert!(futures::poll!(&mut closed).is_pending());
    assert_eq!(scheduler.holder(vm(1)).unwrap().what, "blocker");
    at_once(&scheduler, vm(2), ()).await.unwrap();
    release.send(()).unwrap();
    blocker.await.unwrap().unwrap();
    closed.await;
    settle().await;
    assert!(futures::poll!(&mut queued).is_pending());
    scheduler.open(vm(1));
    queued.await.unwrap();
    assert!(scheduler.owner.shared.lock().vm_drains.is_empty());
}

#[tokio::test]
async fn all_gates_close_at_once_those_to_come_too() {
    let scheduler = scheduler(4);
    let (release, blocker) = blocker(&scheduler, vm(1)).await;
    let mut closed = Box::pin(scheduler.close_all());
    let mut queued = Box::pin(at_once(&scheduler, vm(2), ()));
    assert!(futures::poll!(&mut queued).is_pending());
    settle().await;
    assert!(futures::poll!(&mut queued).is_pending() && futures::poll!(&mut closed).is_pending());
    release.send(()).unwrap();
    closed.await;
    blocker.await.unwrap().unwrap();
    scheduler.open(vm(2));
    queued.await.unwrap();
}

#[tokio::test]
async fn a_gates_keeper_hears_who_is_wanted_and_who_is_idle() {
    let scheduler = gated(4);
    let early = scheduler.clone();
    let early = tokio::spawn(async move { at_once(&early, vm(1), ()).await });
    settle().await;
    let mut events = scheduler.gate_events();
    assert_eq!(events.recv().await, Some(GateEvent::Wanted(vm(1))), "it was so before somebody listened");
    assert_eq!(events.recv().now_or_never(), None, "told once");
    scheduler.open(vm(1));
    early.await.unwrap().unwrap();
    assert_eq!(events.recv().await, Some(GateEvent::Idle(vm(1))));
    // A hundred machines come and go while nobody reads: nothing is so any more, and nothing is left.
    for number in 2..102 {
        assert!(futures::poll!(Box::pin(at_once(&scheduler, vm(number), ()))).is_pending());
    }
    assert_eq!(events.recv().now_or_never(), None);
    // Who was told as wanted is told as idle when its caller has gone.
    let mut impatient = Box::pin(at_once(&scheduler, vm(2), ()));
    assert!(futures::poll!(&mut impatient).is_pending());
    assert_eq!(events.recv().await, Some(GateEvent::Wanted(vm(2))));
    drop(impatient);
    assert_eq!(events.recv().await, Some(GateEvent::Idle(vm(2))));
    // Closing a machine where work waits says that it is wanted still.
    let (release, blocker) = blocker(&scheduler, vm(1)).await;
    let mut queued = Box::pin(at_once(&scheduler, vm(1), ()));
    assert!(futures::poll!(&mut queued).is_pending());
    let closed = scheduler.close(vm(1));
    assert_eq!(events.recv().await, Some(GateEvent::Wanted(vm(1))));
    release.send(()).unwrap();
    closed.await;
    blocker.await.unwrap().unwrap();
    // The next who listens is told what is so.
    let mut next = scheduler.gate_events();
    assert_eq!(events.recv().await, None);
    assert_eq!(next.recv().await, Some(GateEvent::Wanted(vm(1))));
    let waits = tokio::spawn(async move { next.recv().await });
    settle().await;
    scheduler.shutdown(LONG).await;
    assert_eq!(waits.await.unwrap(), None);
}

#[tokio::test]
async fn a_listener_is_woken_by_a_tick_and_by_a_one_shot() {
    tokio::time::pause();
    let scheduler = gated(4);
    scheduler.open(vm(1));
    let mut events = scheduler.gate_events();
    assert_eq!(events.recv().await, Some(GateEvent::Idle(vm(1))), "opened, and there is nothing to do");
    let _periodic = scheduler.every(vm(1), "condition", 10 * SECOND, LONG, |_| async { Ok(()) }.boxed()).unwrap();
    settle().await;
    scheduler.close(vm(1)).await;
    let begun = Instant::now();
    assert_eq!(events.recv().await, Some(GateEvent::Wanted(vm(1))));
    assert!(begun.elapsed() <= 11 * SECOND && !begun.elapsed().is_zero());
    let woken = tokio::spawn(async move { events.recv().await });
    settle().await;
    let mut queued = Box::pin(at_once(&scheduler, vm(2), ()));
    assert!(futures::poll!(&mut queued).is_pending());
    assert_eq!(woken.await.unwrap(), Some(GateEvent::Wanted(vm(2))));
}

#[tokio::test]
async fn the_limit_may_change_at_any_time() {
    let scheduler = scheduler(2);
    let (release, first) = blocker(&scheduler, vm(1)).await;
    let (release_too, second) = blocker(&scheduler, vm(2)).await;
    let mut lowered = Box::pin(scheduler.resize(1));
    let mut stopped = Box::pin(scheduler.resize(0));
    let mut queued = Box::pin(at_once(&scheduler, vm(3), ()));
    assert!(futures::poll!(&mut queued).is_pending());
    assert!(futures::poll!(&mut lowered).is_pending());
    release.send(()).unwrap();
    first.await.unwrap().unwrap();
    lowered.await;
    settle().await;
    assert!(futures::poll!(&mut stopped).is_pending());
    release_too.send(()).unwrap();
    second.await.unwrap().unwrap();
    stopped.await;
    settle().await;
    assert!(futures::poll!(&mut queued).is_pending(), "nothing runs with 0");
    assert_eq!(scheduler.snapshot().max_connections, 0);
    scheduler.resize(5).now_or_never().expect("nothing has to end for more");
    queued.await.unwrap();
    let mut blockers = Vec::new();
    for number in 0..5 {
        blockers.push(blocker(&scheduler, vm(number)).await);
    }
    assert_eq!(scheduler.snapshot().running.len(), 5);
}

#[tokio::test]
async fn a_scheduler_may_start_without_a_slot() {
    let scheduler = scheduler(0);
    let mut queued = Box::pin(at_once(&scheduler, vm(1), ()));
    assert!(futures::poll!(&mut queued).is_pending());
    settle().await;
    assert!(futures::poll!(&mut queued).is_pending());
    scheduler.resize(1).await;
    queued.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_operation_that_ran_elsewhere_carries_on_from_there() {
    let scheduler = Scheduler::start(SchedulerConfig::default());
    let (vm, interval) = (VmId::random(), Duration::from_secs(10));
    // So that the clock has a past.
    sleep(Duration::from_secs(60)).await;
    for (last_run, wanted) in [(4, vec![6, 16, 26]), (10, vec![0, 10, 20]), (33, vec![0, 7, 17, 27])] {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let start = Instant::now();
        let next = start - Duration::from_secs(last_run) + interval;
        let periodic = {
            let seen = Arc::clone(&seen);
            scheduler.every_from(Some(next), vm, "resumed", interval, interval, move |_| {
                seen.lock().unwrap().push(start.elapsed().as_secs());
                async { Ok(()) }.boxed()
            })
        };
        sleep(Duration::from_millis(27_500)).await;
        drop(periodic.unwrap());
        assert_eq!(*seen.lock().unwrap(), wanted, "last run {last_run} s ago");
    }
}
