//! What the store and the signals on Redis cost, against a bare connection of the client library that they stand on.
//!
//! One real server on loopback, one thread for the clients, 50 tasks at once, values of 512 bytes. Each pair takes turns in one
//! run. A bare call sends the very same command, a script for a script, with a deadline as ours has.
//! - *pool*: one checks a connection out of the pool for each call, as one would write it first.
//! - *set*: a plain `SET`, for what versions, preconditions and lists cost at the server.

#[path = "../../ocr-core/tests/support/redis.rs"]
mod redis;

use std::time::{Duration, Instant};

use bytes::Bytes;
use deadpool_redis::{
    Manager, Pool,
    redis::{AsyncConnectionConfig, Client, Cmd, Script, aio::MultiplexedConnection, cmd},
};
use futures::StreamExt;
use ocr_benches::{ROUNDS, cpu_time, figure, median, remark};
use ocr_core::{
    Key, Precondition, StateStore,
    signal::{Notice, Signals},
    state::redis::{Address, Place, RedisConfig, RedisStore},
};
use tokio::runtime::{Builder, Runtime};

use self::redis::{Options, Server};

const TASKS: usize = 50;
/// Calls of each task in one measurement.
const CALLS: usize = 400;
const VALUE_BYTES: usize = 512;
const NOTICES: usize = 2000;
const DEADLINE: Duration = Duration::from_secs(5);

fn main() {
    if let Some(why) = redis::missing() {
        remark(format_args!("ignored: {why}"));
        return;
    }
    let server = Server::start(Options::default());
    runtime().block_on(async {
        store(&server).await;
        signals(&server).await;
    });
    let replica = Server::replica_of(&server, Options::default());
    runtime().block_on(waiting(&server));
    drop(replica);
}

fn runtime() -> Runtime {
    match Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => panic!("no runtime: {error}"),
    }
}

/// What one way of doing it took for each call.
#[derive(Clone, Copy)]
struct Cost {
    wall_ns: f64,
    cpu_ns: f64,
}

/// All tasks at once, `CALLS` each.
async fn measure<F: Future<Output = ()> + Send + 'static>(work: impl Fn(usize) -> F) -> Cost {
    let (begun, cpu) = (Instant::now(), cpu_time());
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..TASKS {
        tasks.spawn(work(task));
    }
    tasks.join_all().await;
    let calls = (TASKS * CALLS) as f64;
    Cost { wall_ns: begun.elapsed().as_nanos() as f64 / calls, cpu_ns: (cpu_time() - cpu).as_nanos() as f64 / calls }
}

fn key(number: usize) -> Key {
    match Key::of("bench", &[&number.to_string()]) {
        Ok(key) => key,
        Err(error) => panic!("{error}"),
    }
}

fn record(number: usize) -> String {
    format!("{{ocr}}:r:{}", key(number))
}

/// The store's own script, sent by hand.
fn script_put(hash: &str, number: usize, value: &[u8]) -> Cmd {
    let mut put = cmd("EVALSHA");
    put.arg(hash).arg(4).arg(record(number)).arg("{ocr}:version").arg("{ocr}:keys").arg("{ocr}:ends");
    put.arg(i64::MAX / 1024).arg(key(number).as_str()).arg("any").arg(0).arg(value).arg("{ocr}:r:");
    put
}

async fn send(mut connection: MultiplexedConnection, command: Cmd) {
    if let Err(error) = command.exec_async(&mut connection).await {
        panic!("{error}");
    }
}

async fn store(server: &Server) {
    let address = Address::new("127.0.0.1", server.port);
    let store = match RedisStore::new(RedisConfig::new(Place::Single(address))) {
        Ok(store) => store,
        Err(error) => panic!("{error}"),
    };
    let url = format!("redis://127.0.0.1:{}", server.port);
    let client = Client::open(url.as_str()).expect("a client");
    let config = AsyncConnectionConfig::new().set_response_timeout(Some(DEADLINE));
    let mut bare = client.get_multiplexed_async_connection_with_config(&config).await.expect("a connection");
    let pool = Pool::builder(Manager::new(url.as_str()).expect("a manager")).max_size(TASKS).build().expect("a pool");
    let script = Script::new(include_str!("../../ocr-core/src/state/redis/put.lua"));
    script.load_async(&mut bare).await.expect("the script is good");
    let value = Bytes::from(vec![b'v'; VALUE_BYTES]);
    for task in 0..TASKS {
        store.put(&key(task), value.clone(), Precondition::Any, None).await.expect("a write");
    }

    let mut costs: [Vec<Cost>; 6] = Default::default();
    for round in 0..=ROUNDS {
        let bare_get = measure(|task| {
            let bare = bare.clone();
            async move {
                for _ in 0..CALLS {
                    let mut get = cmd("GET");
                    get.arg(record(task));
                    send(bare.clone(), get).await;
                }
            }
        });
        let bare_get = bare_get.await;
        let store_get = measure(|task| {
            let store = store.clone();
            async move {
                for _ in 0..CALLS {
                    assert!(store.get(&key(task)).await.is_ok_and(|record| record.is_some()));
                }
            }
        });
        let store_get = store_get.await;
        let bare_put = measure(|task| {
            let (bare, hash, value) = (bare.clone(), script.get_hash().to_owned(), value.clone());
            async move {
                for _ in 0..CALLS {
                    send(bare.clone(), script_put(&hash, task, &value)).await;
                }
            }
        });
        let bare_put = bare_put.await;
        let store_put = measure(|task| {
            let (store, value) = (store.clone(), value.clone());
            async move {
                for _ in 0..CALLS {
                    assert!(store.put(&key(task), value.clone(), Precondition::Any, None).await.is_ok());
                }
            }
        });
        let store_put = store_put.await;
        let pool_get = measure(|task| {
            let pool = pool.clone();
            async move {
                for _ in 0..CALLS {
                    let mut connection = pool.get().await.expect("a connection");
                    let mut get = cmd("GET");
                    get.arg(record(task));
                    get.exec_async(&mut connection).await.expect("a record");
                }
            }
        });
        let pool_get = pool_get.await;
        let bare_set = measure(|task| {
            let (bare, value) = (bare.clone(), value.clone());
            async move {
                for _ in 0..CALLS {
                    let mut set = cmd("SET");
                    set.arg(format!("plain:{task}")).arg(value.as_ref());
                    send(bare.clone(), set).await;
                }
            }
        });
        let bare_set = bare_set.await;
        // The first round warms up.
        if round > 0 {
            for (costs, cost) in costs.iter_mut().zip([bare_get, store_get, bare_put, store_put, pool_get, bare_set]) {
                costs.push(cost);
            }
        }
    }
    let [bare_get, store_get, bare_put, store_put, pool_get, bare_set] = costs;
    let ratio = |one: &[Cost], other: &[Cost], of: fn(&Cost) -> f64| {
        median(one.iter().zip(other).map(|(one, other)| of(one) / of(other)).collect())
    };
    let wall: fn(&Cost) -> f64 = |cost| cost.wall_ns;
    let cpu: fn(&Cost) -> f64 = |cost| cost.cpu_ns;
    let (get, put) = (ratio(&bare_get, &store_get, wall), ratio(&bare_put, &store_put, wall));
    remark("calls per second over those of a bare connection; the smaller of reads and writes counts");
    figure("redis.store_ratio", get.min(put), "ratio");
    figure("redis.store_ratio.get", get, "ratio");
    figure("redis.store_ratio.put", put, "ratio");
    figure("redis.store_cpu_ratio.get", ratio(&bare_get, &store_get, cpu), "ratio");
    figure("redis.store_cpu_ratio.put", ratio(&bare_put, &store_put, cpu), "ratio");
    figure("redis.pool_ratio.get", ratio(&bare_get, &pool_get, wall), "ratio");
    figure("redis.put_over_set", ratio(&bare_set, &store_put, wall), "ratio");
    let per_second = |costs: &[Cost]| 1e9 / median(costs.iter().map(wall).collect());
    let stats = server.info("commandstats");
    let script_us = stats.lines().find_map(|line| line.strip_prefix("cmdstat_evalsha:")?.split(',').nth(2));
    if let Some(us) = script_us.and_then(|field| field.strip_prefix("usec_per_call=")?.parse().ok()) {
        figure("redis.put_server_us", us, "us");
    }
    figure("redis.store_gets", per_second(&store_get), "1/s");
    figure("redis.store_puts", per_second(&store_put), "1/s");
}

async fn signals(server: &Server) {
    let address = Address::new("127.0.0.1", server.port);
    let config = RedisConfig::new(Place::Single(address));
    let signals = RedisStore::new(config).expect("a good configuration").signals();
    let topic = key(0);
    let mut listener = signals.listen(&topic).await.expect("a listener");
    let mut took_us = Vec::new();
    for _ in 0..NOTICES {
        let begun = Instant::now();
        signals.send(&topic, Bytes::from_static(b"x")).await.expect("sent");
        assert!(matches!(listener.next().await, Some(Notice::Payload(_))));
        took_us.push(begun.elapsed().as_nanos() as f64 / 1e3);
    }
    took_us.sort_by(f64::total_cmp);
    figure("redis.signal_p50", took_us[NOTICES / 2], "us");
    figure("redis.signal_p99", took_us[NOTICES * 99 / 100], "us");
}

/// Writes that a replica has confirmed: many at once share what waiting costs.
async fn waiting(server: &Server) {
    let config =
        RedisConfig { wait_replicas: 1, ..RedisConfig::new(Place::Single(Address::new("127.0.0.1", server.port))) };
    let store = RedisStore::new(config).expect("a good configuration");
    let value = Bytes::from(vec![b'v'; VALUE_BYTES]);
    let mut alone_ns = Vec::new();
    let mut together_ns = Vec::new();
    for _ in 0..ROUNDS {
        let begun = Instant::now();
        for _ in 0..CALLS {
            store.put(&key(0), value.clone(), Precondition::Any, None).await.expect("a write");
        }
        alone_ns.push(begun.elapsed().as_nanos() as f64 / CALLS as f64);
        let together = measure(|task| {
            let (store, value) = (store.clone(), value.clone());
            async move {
                for _ in 0..CALLS {
                    assert!(store.put(&key(task), value.clone(), Precondition::Any, None).await.is_ok());
                }
            }
        });
        together_ns.push(together.await.wall_ns);
    }
    let (alone, together) = (median(alone_ns), median(together_ns));
    figure("redis.waiting_put_us", alone / 1e3, "us");
    figure("redis.waiting_batch_gain", alone / together, "ratio");
}
