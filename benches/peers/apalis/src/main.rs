//! apalis on Redis. A job waits for its machine's mutex; 64 run at once.

use std::{
    env,
    error::Error,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use apalis::prelude::*;
use apalis_redis::{Config, ConnectionManager, RedisStorage};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{Mutex, Notify},
    time::sleep,
};

const VMS: usize = 100;
const PER_VM: usize = 10;
const SLOTS: usize = 64;

#[derive(Clone, Debug, Deserialize, Serialize)]
struct Op {
    vm: usize,
}

#[derive(Clone)]
struct Shared {
    storage: RedisStorage<Op>,
    machines: Arc<Vec<Mutex<()>>>,
    done: Arc<AtomicU64>,
    reached: Arc<[Notify; 2]>,
    op_ms: u64,
    warm_up: u64,
    measured: u64,
}

fn number(name: &str) -> u64 {
    env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("{name} is to be a number"))
}

async fn run(op: Op, shared: Data<Shared>) -> Result<(), apalis::prelude::Error> {
    {
        let _machine = shared.machines[op.vm].lock().await;
        if shared.op_ms > 0 {
            sleep(Duration::from_millis(shared.op_ms)).await;
        }
    }
    shared.storage.clone().push(op).await.expect("Redis takes it");
    let done = shared.done.fetch_add(1, SeqCst) + 1;
    if done == shared.warm_up {
        shared.reached[0].notify_one();
    }
    if done == shared.warm_up + shared.measured {
        shared.reached[1].notify_one();
    }
    Ok(())
}

/// CPU seconds of this process and of the broker.
async fn cpu(redis: &mut ConnectionManager) -> Result<(f64, f64), Box<dyn Error>> {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    let info: String = redis::cmd("INFO").arg("cpu").query_async(redis).await?;
    let used = |name: &str| -> f64 {
        let line = info.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|value| value.trim().parse().ok()).unwrap_or(f64::NAN)
    };
    let broker = used("used_cpu_user:") + used("used_cpu_sys:");
    Ok((time.tv_sec as f64 + time.tv_nsec as f64 / 1e9, broker))
}

#[tokio::main(worker_threads = 2)]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut redis = apalis_redis::connect(env::var("REDIS_URL")?).await?;
    let config = Config::default().set_buffer_size(SLOTS).set_poll_interval(Duration::from_millis(1));
    let mut storage = RedisStorage::new_with_config(redis.clone(), config);
    let shared = Shared {
        storage: storage.clone(),
        machines: Arc::new((0..VMS).map(|_| Mutex::new(())).collect()),
        done: Arc::default(),
        reached: Arc::default(),
        op_ms: number("OP_MS"),
        warm_up: number("WARM_UP"),
        measured: number("MEASURED"),
    };
    for number in 0..VMS * PER_VM {
        storage.push(Op { vm: number % VMS }).await?;
    }
    let worker = WorkerBuilder::new("ops").data(shared.clone()).concurrency(SLOTS).backend(storage).build_fn(run);
    tokio::spawn(Monitor::new().register(worker).run());
    shared.reached[0].notified().await;
    let begun = cpu(&mut redis).await?;
    shared.reached[1].notified().await;
    let ended = cpu(&mut redis).await?;
    println!("{} {} {}", shared.measured, ended.0 - begun.0, ended.1 - begun.1);
    std::process::exit(0);
}
