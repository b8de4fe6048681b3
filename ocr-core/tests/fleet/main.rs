//! Three executors, fifty machines, and a store in trouble: every operation is written down, and the history checked.
//!
//! - No two operations at once on one machine; never more than the limit at once over all executors.
//! - No accepted operation is lost: an install that was accepted ends installed, or with an error told to its caller, and
//!   store and guest agree with what was told.
//! - A condition that is watched through several executors runs once per tick.
//! - Streams never end, and speak again when the trouble is over.
//!
//! `OCR_SEEDS=n` says how many seeds there are; `OCR_SEED=n` runs one, and shows what came of it.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "what fails here fails the test")]

mod flaky;
#[cfg(feature = "redis")]
#[path = "../support/redis.rs"]
mod redis;
mod sim;
mod world;

use std::{env, sync::Arc, time::Duration};

use ocr_core::{memory::MemoryState, signal::LocalSignals};
use tokio::time::{Instant, sleep};

use self::{
    flaky::Path,
    sim::{Machines, Random},
    world::{EXECUTORS, MACHINES, Outcome, Plan, Shelf, World, condition, process},
};

/// One of these tests runs at a time: each keeps all cores busy, and short leases want their time.
static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// The seeds to run.
fn seeds(usual: u64) -> Vec<u64> {
    let number = |name| env::var(name).ok().map(|text| text.parse::<u64>().unwrap_or_else(|_| panic!("{name}={text}")));
    match number("OCR_SEED") {
        Some(seed) => vec![seed],
        None => (0..number("OCR_SEEDS").unwrap_or(usual)).collect(),
    }
}

/// Adds up what several runs came to, and fails when one had a fault.
fn judge(outcomes: &[(u64, Outcome)]) {
    let sum = |of: fn(&Outcome) -> usize| outcomes.iter().map(|(_, outcome)| of(outcome)).sum::<usize>();
    println!(
        "{} seeds: {} operations, {} handovers, {} cut off, {} fenced, {} sessions lost, {} installed, {} removed, {} refused",
        outcomes.len(),
        sum(|o| o.operations),
        sum(|o| o.handovers),
        sum(|o| o.cut),
        sum(|o| o.fenced),
        sum(|o| o.sessions_lost),
        sum(|o| o.installed),
        sum(|o| o.removed),
        sum(|o| o.refused),
    );
    let bad: Vec<String> = outcomes
        .iter()
        .filter(|(_, outcome)| !outcome.faults.is_empty())
        .map(|(seed, outcome)| format!("seed {seed}:\n  {}", outcome.faults.join("\n  ")))
        .collect();
    assert!(bad.is_empty(), "{} of {} seeds\n{}", bad.len(), outcomes.len(), bad.join("\n"));
}

fn log() {
    if env::var_os("OCR_SEED").is_some() || env::var_os("RUST_LOG").is_some() {
        let filter = env::var("RUST_LOG").unwrap_or_else(|_| "ocr_core=info".to_owned());
        let _ = tracing_subscriber::fmt().with_env_filter(filter).try_init();
    }
}

async fn in_memory(seed: u64) -> Outcome {
    let plan = Plan {
        lease_ttl: Duration::from_secs(3),
        length: Duration::from_secs(20),
        interval: Duration::from_secs(1),
        installs: 60,
        conditions: 24,
        longest_ms: 60,
    };
    let machines = Machines::new(MACHINES, Random::new(seed ^ 1), plan.longest_ms);
    let (store, signals, shelf) = (MemoryState::new(), LocalSignals::new(), Shelf::new());
    let paths: Vec<Path> = (0..EXECUTORS).map(|index| Path::new(&store, &signals, seed ^ (index as u64 + 7))).collect();
    let processes = (0..EXECUTORS)
        .map(|index| {
            let path = Arc::new(paths[index].clone());
            process(index, &machines, &shelf, &plan, path.clone(), path)
        })
        .collect();
    let world = World::new(processes, machines, plan, seed);
    // One in four has no trouble at all: there the rules are strict.
    let trouble = async move {
        let random = Random::new(seed ^ 99);
        let end = Instant::now() + plan.length;
        let mut outages = 0;
        if seed.is_multiple_of(4) {
            sleep(plan.length).await;
            return outages;
        }
        paths.iter().for_each(|path| path.trouble(true));
        while Instant::now() < end {
            sleep(random.millis(100, 4000)).await;
            // One of them is cut off, or all.
            let which: Vec<&Path> = if random.once_in(2) { vec![random.pick(&paths)] } else { paths.iter().collect() };
            which.iter().for_each(|path| path.stop(true));
            sleep(random.millis(50, 5000)).await;
            which.iter().for_each(|path| path.stop(false));
            outages += 1;
        }
        paths.iter().for_each(|path| path.trouble(false));
        outages
    };
    world.run(trouble).await
}

#[test]
fn in_memory_no_history_breaks_a_promise() {
    let _alone = ALONE.blocking_lock();
    log();
    // Each seed has a runtime of its own with a paused clock; two run beside each other.
    let (seeds, began) = (Arc::new(std::sync::Mutex::new(seeds(150))), std::time::Instant::now());
    let worker = || {
        let seeds = Arc::clone(&seeds);
        std::thread::spawn(move || {
            let mut outcomes = Vec::new();
            loop {
                let Some(seed) = seeds.lock().unwrap().pop() else { return outcomes };
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
                outcomes.push((seed, runtime.unwrap().block_on(in_memory(seed))));
            }
        })
    };
    let workers: Vec<_> = (0..2).map(|_| worker()).collect();
    let outcomes: Vec<_> = workers.into_iter().flat_map(|worker| worker.join().unwrap()).collect();
    println!("{:?}", began.elapsed());
    judge(&outcomes);
}

/// On a real server that is killed and started again, and stopped in its steps.
#[cfg(feature = "redis")]
mod on_redis {
    use std::{collections::BTreeMap, sync::Mutex};

    use futures::{StreamExt, stream};
    use ocr_core::{
        fleet::Membership,
        state::redis::{Address, Place, RedisConfig, RedisStore},
    };
    use tokio::task::spawn_blocking;

    use super::*;
    use crate::redis::{Options, Server, need_redis};

    /// So many seeds run beside each other: most of the time each waits.
    const AT_ONCE: usize = 8;

    fn store(server: &Server) -> RedisStore {
        let place = Place::Single(Address::new("127.0.0.1", server.port));
        RedisStore::new(RedisConfig { deadline: Duration::from_millis(300), ..RedisConfig::new(place) }).unwrap()
    }

    async fn run(seed: u64) -> Outcome {
        let plan = Plan {
            lease_ttl: Duration::from_secs(1),
            length: Duration::from_millis(2500),
            interval: Duration::from_millis(300),
            installs: 50,
            conditions: 20,
            longest_ms: 15,
        };
        let machines = Machines::new(MACHINES, Random::new(seed ^ 1), plan.longest_ms);
        let (server, shelf) = (Server::start(Options::durable()), Shelf::new());
        let processes = (0..EXECUTORS)
            .map(|index| {
                // Connections of its own, as a process has.
                let store = store(&server);
                let signals = Arc::new(store.signals());
                process(index, &machines, &shelf, &plan, Arc::new(store), signals)
            })
            .collect();
        let world = World::new(processes, machines, plan, seed);
        let server = Arc::new(Mutex::new(server));
        let kept = server.clone();
        let trouble = async move {
            let random = Random::new(seed ^ 99);
            let end = Instant::now() + plan.length;
            let mut outages = 0;
            if seed.is_multiple_of(4) {
                sleep(plan.length).await;
                return outages;
            }
            while Instant::now() < end {
                sleep(random.millis(50, 800)).await;
                if random.once_in(2) {
                    server.lock().unwrap().pause();
                    sleep(random.millis(20, 1500)).await;
                    server.lock().unwrap().resume();
                } else {
                    server.lock().unwrap().kill();
                    sleep(random.millis(0, 1000)).await;
                    let server = server.clone();
                    spawn_blocking(move || server.lock().unwrap().restart()).await.unwrap();
                }
                outages += 1;
            }
            outages
        };
        let outcome = world.run(trouble).await;
        drop(kept);
        outcome
    }

    /// How often each command was called so far, those that scripts call too.
    fn commands(server: &Server) -> BTreeMap<String, u64> {
        let stats = server.info("commandstats");
        let calls = |line: &str| {
            let (name, rest) = line.strip_prefix("cmdstat_")?.split_once(':')?;
            Some((name.to_owned(), rest.strip_prefix("calls=")?.split(',').next()?.parse().ok()?))
        };
        stats.lines().filter_map(calls).filter(|(name, _): &(String, u64)| name != "info").collect()
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_tick_costs_no_command() {
        need_redis!();
        let _alone = ALONE.lock().await;
        log();
        let plan = Plan {
            lease_ttl: Duration::from_secs(3),
            length: Duration::from_secs(6),
            interval: Duration::from_millis(100),
            installs: 0,
            conditions: 0,
            longest_ms: 2,
        };
        let machines = Machines::new(MACHINES, Random::new(1), plan.longest_ms);
        let (server, shelf) = (Server::start(Options::durable()), Shelf::new());
        let processes: Vec<_> = (0..EXECUTORS)
            .map(|index| {
                let store = store(&server);
                let signals = Arc::new(store.signals());
                process(index, &machines, &shelf, &plan, Arc::new(store), signals)
            })
            .collect();
        // Each machine is watched through one of them.
        let mut streams = Vec::new();
        let window = async |server: &Server| {
            let (before, runs) = (commands(server), machines.history().len() as u64);
            sleep(plan.length).await;
            let after = commands(server);
            let spent: u64 = after.iter().map(|(name, calls)| calls - before.get(name).unwrap_or(&0)).sum();
            (spent, machines.history().len() as u64 - runs)
        };
        for process in &processes {
            let mut membership = process.fleet.membership();
            membership.wait_for(|now| matches!(now, Membership::Member(_))).await.unwrap();
        }
        sleep(plan.lease_ttl).await;
        let (idle, _) = window(&server).await;
        for (index, vm) in machines.vms.iter().enumerate() {
            let executor = &processes[index % EXECUTORS].executor;
            let request = condition(*vm, "condition;", plan.interval);
            let id = executor.create_condition(request).await.unwrap().id;
            streams.push(executor.watch(id).await.unwrap());
        }
        for stream in &mut streams {
            stream.next().await.unwrap().unwrap();
        }
        // The shares follow the work, and then stand still.
        sleep(plan.lease_ttl * 2).await;
        let (busy, ticks) = window(&server).await;
        // A window may hold one renewal of each member more than another; a renewal is a script of ten commands.
        let renewals = 11 * EXECUTORS as u64;
        let per_tick = busy.saturating_sub(idle + renewals) as f64 / ticks as f64;
        println!("figure redis.commands_per_tick {per_tick} commands ({ticks} ticks: {busy} commands, {idle} without)");
        assert!(ticks > 1000 && per_tick == 0.0, "{busy} commands in {ticks} ticks, {idle} when idle");
        for process in &processes {
            process.executor.shutdown(Duration::from_secs(5)).await;
            process.fleet.leave(Duration::from_secs(5)).await;
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn no_history_breaks_a_promise() {
        need_redis!();
        let _alone = ALONE.lock().await;
        log();
        let began = Instant::now();
        let runs = stream::iter(seeds(100)).map(|seed| tokio::spawn(async move { (seed, run(seed).await) }));
        let outcomes: Vec<_> = runs.buffer_unordered(AT_ONCE).map(|outcome| outcome.unwrap()).collect().await;
        println!("{:?}", began.elapsed());
        judge(&outcomes);
    }
}
