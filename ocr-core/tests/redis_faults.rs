//! Redis killed, stopped, full, shut, demoted and failed over: what the store and the signals make of it.

#![cfg(feature = "redis")]
#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

#[path = "support/redis.rs"]
mod redis;

use std::{
    collections::BTreeMap,
    error::Error as _,
    io::Write,
    net::TcpListener,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::StreamExt;
use ocr_core::{
    Deletion, Error, ErrorKind, Key, Precondition, Retry, StateStore, StateStoreExt, Version,
    signal::{Notice, NoticeStream, Signals},
    state::redis::{Address, Login, Place, RedisConfig, RedisSignals, RedisStore, Tls},
};
use tokio::time::{Instant, sleep, timeout};

use self::redis::{Options, SentinelSet, Server, free_port, need_redis};

/// In every password here; it must be in no log and no error.
const CANARY: &str = "canary-5e1f";
const SOON: Duration = Duration::from_secs(30);
const DEADLINE: Duration = Duration::from_secs(1);
/// What a loaded machine may add to a deadline.
const SLACK: Duration = Duration::from_secs(5);

/// Everything that is logged, from the finest level on.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn log() -> &'static Log {
    static LOG: std::sync::OnceLock<Log> = std::sync::OnceLock::new();
    LOG.get_or_init(|| {
        let log = Log::default();
        let writer = log.clone();
        tracing_subscriber::fmt()
            .with_max_level(tracing::Level::TRACE)
            .with_writer(move || writer.clone())
            .with_ansi(false)
            .init();
        log
    })
}

fn tells_no_secret() {
    let logged = String::from_utf8_lossy(&log().0.lock().unwrap()).into_owned();
    assert!(!logged.contains(CANARY), "a password was logged");
}

fn at(port: u16) -> RedisConfig {
    log();
    RedisConfig { deadline: DEADLINE, ..RedisConfig::new(Place::Single(Address::new("127.0.0.1", port))) }
}

fn store(server: &Server) -> RedisStore {
    RedisStore::new(at(server.port)).unwrap()
}

fn key(name: &str) -> Key {
    Key::of("test", &[name]).unwrap()
}

async fn put(store: &RedisStore, name: &str, value: &'static str) -> Result<Version, Error> {
    store.put(&key(name), Bytes::from_static(value.as_bytes()), Precondition::Any, None).await
}

/// The error with all its causes, which must hold no secret.
fn whole(error: &Error) -> String {
    let mut text = format!("{error} {error:?}");
    let mut cause = error.source();
    while let Some(source) = cause {
        text += &format!(": {source} {source:?}");
        cause = source.source();
    }
    assert!(!text.contains(CANARY), "{text}");
    text
}

fn fails(result: Result<Version, Error>, kind: ErrorKind, retry: Retry, text: &str) {
    let error = result.expect_err(text);
    assert!(error.kind() == kind && error.retry() == retry && error.message().contains(text), "{}", whole(&error));
    whole(&error);
}

/// Calls until it goes well.
async fn until<T>(mut call: impl AsyncFnMut() -> Result<T, Error>) -> T {
    let end = Instant::now() + SOON;
    loop {
        match call().await {
            Ok(value) => return value,
            Err(error) => assert!(Instant::now() < end, "it never went well again: {}", whole(&error)),
        }
        sleep(Duration::from_millis(20)).await;
    }
}

async fn next(listener: &mut NoticeStream) -> Notice {
    timeout(SOON, listener.next()).await.expect("a notice").expect("a stream without end")
}

/// A listener that has missed something hears of it, and then goes on. Sends until it is heard.
async fn hears_a_gap_and_goes_on(signals: &RedisSignals, listener: &mut NoticeStream, topic: &Key) {
    let heard = async {
        while next(listener).await != Notice::Gap {}
        signals.send(topic, Bytes::from_static(b"after")).await.unwrap();
        while next(listener).await != Notice::Payload(Bytes::from_static(b"after")) {}
    };
    timeout(SOON, heard).await.expect("the listener goes on");
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_and_started_again_it_has_every_write_that_was_answered() {
    need_redis!();
    let mut server = Server::start(Options::durable());
    let store = store(&server);
    let (signals, topic) = (store.signals(), key("topic"));
    let mut listener = signals.listen(&topic).await.unwrap();
    let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(BTreeMap::new())));
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..8 {
        let (store, stop, answered) = (store.clone(), stop.clone(), answered.clone());
        writers.spawn(async move {
            let mut number = 0;
            while !stop.load(SeqCst) {
                let name = format!("{writer}.{number}");
                if let Ok(version) = store.put(&key(&name), name.clone().into(), Precondition::Absent, None).await {
                    answered.lock().unwrap().insert(name, version);
                }
                number += 1;
            }
        });
    }
    for round in 1..=3 {
        until(async || (answered.lock().unwrap().len() > 200 * round).then_some(()).ok_or(Error::internal("few")))
            .await;
        server.kill();
        server.restart();
    }
    stop.store(true, SeqCst);
    writers.join_all().await;
    let answered = std::mem::take(&mut *answered.lock().unwrap());
    for (name, version) in &answered {
        let record = until(async || store.get(&key(name)).await).await;
        let record = record.unwrap_or_else(|| panic!("{name} was answered and is lost"));
        assert_eq!((record.value.as_ref(), record.version), (name.as_bytes(), *version));
    }
    let highest = answered.values().max().unwrap();
    assert!(put(&store, "last", "x").await.unwrap() > *highest);
    hears_a_gap_and_goes_on(&signals, &mut listener, &topic).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn versions_rise_even_when_redis_comes_back_empty() {
    need_redis!();
    let mut server = Server::start(Options::default());
    let store = store(&server);
    let before = put(&store, "a", "x").await.unwrap();
    let mut lease = store.acquire_lease("a", "me", Duration::from_secs(60)).await.unwrap();
    server.kill();
    server.restart();
    assert_eq!(until(async || store.get(&key("a")).await).await, None, "nothing was kept");
    let after = put(&store, "a", "x").await.unwrap();
    assert!(after > before, "{after:?} after {before:?}");
    let lost = store.renew_lease(&mut lease).await.unwrap_err();
    assert_eq!(lost.reason(), Some(ocr_core::error::reason::LEASE_LOST));
    let next = store.acquire_lease("a", "you", Duration::from_secs(60)).await.unwrap();
    assert!(next.token() > lease.token());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_whose_caller_has_given_up_is_not_done_later() {
    need_redis!();
    let server = Server::start(Options::default());
    let store = store(&server);
    let (signals, topic) = (store.signals(), key("topic"));
    let mut listener = signals.listen(&topic).await.unwrap();
    let scripts_run = || {
        let stats = server.info("commandstats");
        let line = stats.lines().find(|line| line.starts_with("cmdstat_evalsha:")).unwrap().to_owned();
        line.split("calls=").nth(1).unwrap().split(',').next().unwrap().parse::<u64>().unwrap()
    };
    put(&store, "a", "early").await.unwrap();
    let before = scripts_run();
    server.pause();
    let begin = Instant::now();
    let a = key("a");
    let (late, read) = tokio::join!(put(&store, "late", "x"), store.get(&a));
    let took = begin.elapsed();
    fails(late, ErrorKind::TimedOut, Retry::Ambiguous, "the write may have been done");
    assert_eq!(read.unwrap_err().retry(), Retry::Safe, "a read changes nothing");
    assert!(took >= DEADLINE && took < DEADLINE + SLACK, "{took:?}");
    // The next one does not get as far as a command.
    let error = put(&store, "a", "later").await.unwrap_err();
    assert_eq!(error.retry(), Retry::Safe, "{}", whole(&error));
    // Longer than the signals need to see it.
    sleep(Duration::from_secs(4)).await;
    server.resume();
    server.wait_until("has run the late script", |_| scripts_run() > before);
    assert_eq!(until(async || store.get(&key("late")).await).await, None, "the late write was done");
    until(async || put(&store, "a", "after").await).await;
    assert_eq!(store.get(&key("a")).await.unwrap().unwrap().value, "after");
    hears_a_gap_and_goes_on(&signals, &mut listener, &topic).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_short_outage_is_waited_out_and_in_a_long_one_calls_fail_at_once() {
    need_redis!();
    let mut server = Server::start(Options::durable());
    let config = RedisConfig { deadline: SLACK, ..at(server.port) };
    let store = RedisStore::new(config).unwrap();
    put(&store, "a", "x").await.unwrap();
    server.kill();
    let waits = tokio::spawn({
        let store = store.clone();
        async move { store.get(&key("a")).await }
    });
    server.restart();
    assert_eq!(waits.await.unwrap().unwrap().unwrap().value, "x");
    server.kill();
    for _ in 0..2 {
        let error = store.get(&key("a")).await.unwrap_err();
        assert!(error.kind() == ErrorKind::Unavailable && error.retry() == Retry::Safe, "{}", whole(&error));
        assert!(error.message().contains("REDIS_HOST"), "{error}");
    }
    let begin = Instant::now();
    let a = key("a");
    let calls = (0..100).map(|_| store.get(&a));
    assert!(futures::future::join_all(calls).await.iter().all(Result::is_err));
    assert!(begin.elapsed() < SLACK, "{:?} for 100 calls", begin.elapsed());
    server.restart();
    assert_eq!(until(async || store.get(&key("a")).await).await.unwrap().value, "x");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_redis_refuses_writes_says_what_to_do_and_goes_on_when_there_is_room() {
    need_redis!();
    let server = Server::start(Options::default().line("maxmemory 8mb"));
    let store = store(&server);
    let large = Bytes::from(vec![7; 1 << 20]);
    let (mut written, mut refused) = (0, None);
    while refused.is_none() && written < 20 {
        match store.put(&key(&written.to_string()), large.clone(), Precondition::Any, None).await {
            Ok(_) => written += 1,
            Err(error) => refused = Some(error),
        }
    }
    fails(Err(refused.unwrap()), ErrorKind::Exhausted, Retry::Safe, "raise its maxmemory");
    for number in 0..written {
        assert_eq!(store.get(&key(&number.to_string())).await.unwrap().unwrap().value, large);
        assert_eq!(store.delete(&key(&number.to_string()), Precondition::Any).await.unwrap(), Deletion::Deleted);
    }
    put(&store, "a", "x").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_redis_refuses_is_said_with_its_setting_and_without_secrets() {
    need_redis!();
    let folder = Options::default().line("dbfilename taken").line("save 3600 1");
    let server = Server::start(folder);
    let store = store(&server);
    put(&store, "a", "x").await.unwrap();
    let set = |name: &str, value: &str| assert_eq!(server.command(&["CONFIG", "SET", name, value]).trim(), "+OK");

    assert_eq!(server.command(&["SCRIPT", "FLUSH"]).trim(), "+OK");
    put(&store, "a", "x").await.expect("scripts are loaded again");

    set("min-replicas-to-write", "1");
    fails(put(&store, "a", "y").await, ErrorKind::Unavailable, Retry::Safe, "min-replicas-to-write");
    set("min-replicas-to-write", "0");

    // A folder that stands where the snapshot should.
    std::fs::create_dir_all(server.folder().join("taken/x")).unwrap();
    server.command(&["BGSAVE"]);
    server.wait_until("cannot save", |server| server.info("persistence").contains("rdb_last_bgsave_status:err"));
    fails(put(&store, "a", "y").await, ErrorKind::Unavailable, Retry::Safe, "cannot save them");
    set("stop-writes-on-bgsave-error", "no");
    assert_eq!(store.get(&key("a")).await.unwrap().unwrap().value, "x", "a refused write was done");

    let waits = RedisStore::new(RedisConfig { wait_replicas: 1, ..at(server.port) }).unwrap();
    fails(put(&waits, "a", "y").await, ErrorKind::Unavailable, Retry::Ambiguous, "REDIS_WAIT_REPLICAS");
    let refused = waits.put(&key("a"), Bytes::new(), Precondition::Absent, None).await;
    fails(refused, ErrorKind::Unavailable, Retry::Safe, "the write was not done");
    assert!(waits.check().await.unwrap().iter().any(|warning| warning.contains("REDIS_WAIT_REPLICAS")));

    let other = RedisStore::new(RedisConfig { db: 99, ..at(server.port) }).unwrap();
    fails(put(&other, "a", "y").await, ErrorKind::Invalid, Retry::Never, "REDIS_DB");
    let other =
        RedisStore::new(RedisConfig { place: Place::Cluster(vec![Address::new("127.0.0.1", server.port)]), ..at(1) });
    fails(put(&other.unwrap(), "a", "y").await, ErrorKind::Invalid, Retry::Never, "REDIS_CLUSTER");

    server.command(&["DEL", "{ocr}:r:test/a"]);
    server.command(&["LPUSH", "{ocr}:r:test/a", "x"]);
    let only = Precondition::Version(Version(1));
    fails(store.put(&key("a"), Bytes::new(), only, None).await, ErrorKind::Internal, Retry::Never, "REDIS_PREFIX");
    server.command(&["DEL", "{ocr}:r:test/a"]);
    put(&store, "a", "x").await.unwrap();
    tells_no_secret();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_password_is_said_at_once_and_a_corrected_one_works_by_itself() {
    need_redis!();
    let server = Server::start(Options { password: Some("another".to_owned()), ..Options::default() });
    let login = Login { user: None, password: Some(CANARY.into()) };
    // Longer than anything here takes, since nothing is waited for.
    let deadline = SLACK * 2;
    let store = RedisStore::new(RedisConfig { login, deadline, ..at(server.port) }).unwrap();
    let begin = Instant::now();
    for _ in 0..2 {
        fails(put(&store, "a", "x").await, ErrorKind::Denied, Retry::Never, "REDIS_PASSWORD");
    }
    assert!(begin.elapsed() < SLACK);
    assert_eq!(store.check().await.unwrap_err().kind(), ErrorKind::Denied);
    let without = RedisStore::new(at(server.port)).unwrap();
    fails(put(&without, "a", "x").await, ErrorKind::Denied, Retry::Never, "REDIS_PASSWORD");
    let begin = Instant::now();
    let error = store.signals().listen(&key("topic")).await.map(drop).unwrap_err();
    assert!(begin.elapsed() < SLACK);
    assert!(error.kind() == ErrorKind::Denied && whole(&error).contains("REDIS_PASSWORD"), "{error}");
    server.command(&["ACL", "SETUSER", "default", &format!(">{CANARY}")]);
    until(async || put(&store, "a", "x").await).await;
    // A user that may not do what is needed.
    server.command(&["ACL", "SETUSER", "weak", "on", &format!(">{CANARY}"), "~*", "+@all", "-evalsha"]);
    let login = Login { user: Some("weak".to_owned()), password: Some(CANARY.into()) };
    let weak = RedisStore::new(RedisConfig { login, ..at(server.port) }).unwrap();
    fails(put(&weak, "a", "x").await, ErrorKind::Denied, Retry::Never, "REDIS_USER");
    assert!(!format!("{store:?} {weak:?} {:?}", store.signals()).contains(CANARY));
    tells_no_secret();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_encryption_is_said() {
    need_redis!();
    let plain = Server::start(Options::default());
    let server = Server::start(Options { tls: true, ..Options::default() });
    let stranger = Server::start(Options { tls: true, ..Options::default() });
    let tls = |authority: &Server, insecure| Tls { authorities_pem: Some(authority.authority_pem()), insecure };
    let over = |port, tls| RedisStore::new(RedisConfig { tls, ..at(port) }).unwrap();
    put(&over(server.port, Some(tls(&server, false))), "a", "x").await.unwrap();
    put(&over(server.port, Some(tls(&stranger, true))), "a", "x").await.expect("GLOBAL_INSECURE");
    let untrusted = put(&over(server.port, Some(tls(&stranger, false))), "a", "x").await;
    fails(untrusted, ErrorKind::Unavailable, Retry::Never, "REDIS_CA_FILE");
    let system = Tls::default();
    fails(put(&over(server.port, Some(system)), "a", "x").await, ErrorKind::Unavailable, Retry::Never, "REDIS_CA_FILE");
    // A server without encryption waits for the end of what it takes for a line.
    let not_spoken = put(&over(plain.port, Some(tls(&server, false))), "a", "x").await;
    fails(not_spoken, ErrorKind::Unavailable, Retry::Safe, "REDIS_TLS");
    fails(put(&over(server.port, None), "a", "x").await, ErrorKind::Unavailable, Retry::Safe, "REDIS_TLS");
    let broken = Tls { authorities_pem: Some(b"no certificate".to_vec()), insecure: false };
    let error = RedisStore::new(RedisConfig { tls: Some(broken), ..at(1) }).unwrap_err();
    assert!(error.kind() == ErrorKind::Invalid && error.message().contains("REDIS_CA_FILE"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_there_and_nobody_who_answers_end_within_the_deadline() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    for (port, text) in
        [(free_port(), "nothing listens"), (listener.local_addr().unwrap().port(), "not answer in time")]
    {
        let store = RedisStore::new(at(port)).unwrap();
        for _ in 0..3 {
            let begin = Instant::now();
            let error = put(&store, "a", "x").await.unwrap_err();
            assert!(begin.elapsed() < DEADLINE + SLACK, "{:?}", begin.elapsed());
            assert!(error.retry() == Retry::Safe && error.message().contains(text), "{}", whole(&error));
        }
        let error = store.signals().listen(&key("topic")).await.map(drop).unwrap_err();
        assert_eq!(error.retry(), Retry::Safe, "{}", whole(&error));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_demoted_server_takes_no_writes_and_a_promoted_one_does() {
    need_redis!();
    let (master, server) = (Server::start(Options::default()), Server::start(Options::default()));
    let store = store(&server);
    put(&store, "a", "x").await.unwrap();
    let port = master.port.to_string();
    server.command(&["REPLICAOF", "127.0.0.1", &port]);
    fails(put(&store, "a", "y").await, ErrorKind::Unavailable, Retry::Safe, "is a replica");
    // One that connects anew is told too.
    let other = self::store(&server);
    fails(put(&other, "a", "y").await, ErrorKind::Unavailable, Retry::Safe, "is a replica");
    server.command(&["REPLICAOF", "NO", "ONE"]);
    until(async || put(&store, "a", "z").await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_of_ended_records_are_forgotten_by_writes_and_by_lists() {
    need_redis!();
    let server = Server::start(Options::default());
    let store = store(&server);
    let short = Some(Duration::from_millis(50));
    for number in 0..50 {
        store.put(&key(&format!("s{number}")), Bytes::new(), Precondition::Any, short).await.unwrap();
    }
    put(&store, "stays", "x").await.unwrap();
    let known = || server.command(&["ZCARD", "{ocr}:keys"]).trim().to_owned();
    assert_eq!(known(), ":51");
    server.wait_until("has ended them", |server| server.command(&["EXISTS", "{ocr}:r:test/s49"]).trim() == ":0");
    assert_eq!(store.list("", None, 100).await.unwrap().len(), 1);
    assert_eq!((known().as_str(), server.command(&["ZCARD", "{ocr}:ends"]).trim()), (":1", ":0"));
    // Without any list: each later write with a time to live forgets some that ended a while ago.
    for number in 0..20 {
        store.put(&key(&format!("t{number}")), Bytes::new(), Precondition::Any, short).await.unwrap();
    }
    sleep(Duration::from_millis(2200)).await;
    for _ in 0..10 {
        store.put(&key("again"), Bytes::new(), Precondition::Any, Some(SOON)).await.unwrap();
    }
    assert_eq!(known(), ":2", "the one that stays and the one that was written again");
}

#[tokio::test(flavor = "multi_thread")]
async fn listeners_come_and_go_on_one_connection_and_silence_is_no_gap() {
    need_redis!();
    let server = Server::start(Options::default());
    let signals = RedisSignals::new(at(server.port)).unwrap();
    let quiet = key("quiet");
    let mut listener = signals.listen(&quiet).await.unwrap();
    let count = |what: &str| {
        let info = server.command(&["INFO", "all"]);
        let line = info.lines().find_map(|line| line.strip_prefix(what)?.strip_prefix(':')).unwrap().to_owned();
        line.trim().parse::<u64>().unwrap()
    };
    let listeners = async |topics: std::ops::Range<u32>| {
        let listens = topics.map(|number| {
            let signals = signals.clone();
            async move { signals.listen(&key(&number.to_string())).await.unwrap() }
        });
        futures::future::join_all(listens).await
    };
    let many = listeners(0..600).await;
    assert_eq!(
        (count("pubsub_channels"), count("connected_clients")),
        (601, 3),
        "ours, theirs for all, and for commands"
    );
    drop(many);
    server.wait_until("has forgotten the topics", |_| count("pubsub_channels") == 1);
    let again = listeners(300..900).await;
    signals.send(&key("899"), Bytes::from_static(b"x")).await.unwrap();
    assert_eq!(next(&mut again.into_iter().last().unwrap()).await, Notice::Payload(Bytes::from_static(b"x")));
    // Longer than the connection may be silent.
    let heard = timeout(Duration::from_secs(5), listener.next()).await;
    assert!(heard.is_err(), "{heard:?} is heard where nothing was sent or missed");
    signals.send(&quiet, Bytes::from_static(b"x")).await.unwrap();
    assert_eq!(next(&mut listener).await, Notice::Payload(Bytes::from_static(b"x")));
    assert_eq!(count("connected_clients"), 3);
}

/// Two who want one lease again and again; each tells of the times during which it believed to hold it.
async fn contend(
    store: RedisStore,
    me: &'static str,
    stop: Arc<AtomicBool>,
    count: Arc<AtomicUsize>,
) -> Vec<(u64, Instant, Instant)> {
    const TTL: Duration = Duration::from_secs(2);
    let mut held = Vec::new();
    while !stop.load(SeqCst) {
        let Ok(mut lease) = store.acquire_lease("machine", me, TTL).await else {
            sleep(Duration::from_millis(20)).await;
            continue;
        };
        let (token, begin) = (lease.token().0, Instant::now());
        for _ in 0..5 {
            sleep(Duration::from_millis(30)).await;
            // Who cannot renew goes on until the lease ends by its own clock.
            let _ = store.renew_lease(&mut lease).await;
        }
        let end = Instant::now().min(lease.ends());
        held.push((token, begin, end));
        count.fetch_add(1, SeqCst);
        let _ = store.release_lease(lease).await;
        // So that the other one has its turn.
        sleep(Duration::from_millis(20)).await;
    }
    held
}

/// Writes through a failover; what was answered must be there after it, and leases must have had one holder at a time.
async fn survives(set: &mut SentinelSet, fail: impl FnOnce(&mut Server), recover: impl FnOnce(&mut Server)) {
    let store = RedisStore::new(store_config(set)).unwrap();
    let (signals, topic) = (store.signals(), key("topic"));
    let mut listener = signals.listen(&topic).await.unwrap();
    let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(BTreeMap::new())));
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..4 {
        let (store, stop, answered) = (store.clone(), stop.clone(), answered.clone());
        writers.spawn(async move {
            let mut number = 0_u32;
            while !stop.load(SeqCst) {
                let name = format!("{writer}.{number}");
                match store.put(&key(&name), name.clone().into(), Precondition::Absent, None).await {
                    Ok(version) => drop(answered.lock().unwrap().insert(name, version)),
                    Err(error) => drop(whole(&error)),
                }
                number += 1;
            }
        });
    }
    let leases = Arc::new(AtomicUsize::new(0));
    // Of its own store each, as of two processes.
    let holders = ["one", "two"].map(|me| {
        let store = RedisStore::new(store_config(set)).unwrap();
        tokio::spawn(contend(store, me, stop.clone(), leases.clone()))
    });
    let many = async |writes: usize, taken: usize| {
        let enough = || answered.lock().unwrap().len() > writes && leases.load(SeqCst) > taken;
        until(async || enough().then_some(()).ok_or(Error::internal("few"))).await;
    };
    many(100, 4).await;
    let old = set.master();
    let new = 1 - old;
    fail(&mut set.servers[old]);
    set.wait_for_master(new);
    let highest = *answered.lock().unwrap().values().max().unwrap();
    let before = (answered.lock().unwrap().len(), leases.load(SeqCst));
    recover(&mut set.servers[old]);
    // Writes go on when the new master has a replica again.
    many(before.0 + 100, before.1 + 4).await;
    stop.store(true, SeqCst);
    writers.join_all().await;
    assert_eq!(set.master(), new);
    let answered = std::mem::take(&mut *answered.lock().unwrap());
    for (name, version) in &answered {
        let record = until(async || store.get(&key(name)).await).await;
        let record = record.unwrap_or_else(|| panic!("{name} was answered and is lost"));
        assert_eq!((record.value.as_ref(), record.version), (name.as_bytes(), *version));
    }
    assert!(until(async || put(&store, "last", "x").await).await > highest);
    let mut held = Vec::new();
    for holder in holders {
        held.extend(holder.await.unwrap());
    }
    held.sort();
    for pair in held.windows(2) {
        let [(token, _, end), (next_token, begin, _)] = pair else { unreachable!("windows of two") };
        assert!(token < next_token, "one token for two holders");
        assert!(end <= begin, "two held it at once: tokens {token} and {next_token}");
    }
    hears_a_gap_and_goes_on(&signals, &mut listener, &topic).await;
    tells_no_secret();
}

fn store_config(set: &SentinelSet) -> RedisConfig {
    let login = Login { user: None, password: Some(CANARY.into()) };
    let sentinels = set.sentinels.iter().map(|sentinel| Address::new("127.0.0.1", sentinel.port)).collect();
    let place = Place::Sentinel { sentinels, master: "ocr".to_owned(), login: login.clone() };
    RedisConfig { place, login, wait_replicas: 1, ..at(1) }
}

fn sentinel_options() -> Options {
    Options { password: Some(CANARY.to_owned()), ..Options::durable() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_master_that_is_killed_loses_no_answered_write() {
    need_redis!();
    let mut set = SentinelSet::start(&sentinel_options());
    survives(&mut set, Server::kill, Server::restart).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_master_that_stands_still_and_comes_back_loses_no_answered_write() {
    need_redis!();
    let mut set = SentinelSet::start(&sentinel_options());
    survives(&mut set, |server| server.pause(), |server| server.resume()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sentinels_that_know_no_such_master_or_want_a_password_are_said() {
    need_redis!();
    let master = Server::start(Options::default());
    let options = Options { password: Some(CANARY.to_owned()), ..Options::default() };
    let sentinel = Server::sentinel_of(&master, 1, options);
    let gone = Address::new("127.0.0.1", free_port());
    let of = |name: &str, password: Option<&str>| {
        let sentinels = vec![gone.clone(), Address::new("127.0.0.1", sentinel.port)];
        let login = Login { user: None, password: password.map(Into::into) };
        let place = Place::Sentinel { sentinels, master: name.to_owned(), login };
        RedisStore::new(RedisConfig { place, ..at(1) }).unwrap()
    };
    // One Sentinel that is away is passed over.
    put(&of("ocr", Some(CANARY)), "a", "x").await.unwrap();
    fails(
        put(&of("other", Some(CANARY)), "a", "x").await,
        ErrorKind::Unavailable,
        Retry::Never,
        "REDIS_SENTINEL_MASTER",
    );
    fails(put(&of("ocr", None), "a", "x").await, ErrorKind::Denied, Retry::Never, "REDIS_SENTINEL_PASSWORD");
    fails(put(&of("ocr", Some("wrong")), "a", "x").await, ErrorKind::Denied, Retry::Never, "REDIS_SENTINEL_PASSWORD");
    tells_no_secret();
}
