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
    world::{EXECUTORS, MACHINES, Outcome, Plan, Shelf, World, process},
};

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
    if env::var_os("OCR_SEED").is_some() {
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
    log();
    // Each seed has a runtime of its own with a paused clock; two run beside each other.
    let (seeds, began) = (Arc::new(std::sync::Mutex::new(seeds(60))), std::time::Instant::now());
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
