//! What acting in a guest through its agent costs, in agent commands and in time, on a real guest.
//!
//! The guest runs under software emulation, so times are ratios against the same agent, used plainly in the same run:
//! one after the other, several times, and the median.

#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "a bench prints its figures, and may panic")]

#[path = "../tests/rig/mod.rs"]
mod rig;

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use bytes::Bytes;
use ocr_core::{ExecRequest, GuestExec, GuestExecExt, PutFile, PutFiles, Result, VmId};
use ocr_libvirt::{
    Libvirt,
    guest::{AgentGuest, AgentGuestConfig, AgentLink},
};
use serde_json::{Value, json};

const ROUNDS: usize = 5;
const LIMIT: Duration = Duration::from_secs(15);

/// The way to the agent, with a count of what goes over it.
#[derive(Clone, Debug)]
struct Counted {
    libvirt: Libvirt,
    seen: Arc<Mutex<BTreeMap<String, u32>>>,
    /// Whether the first question is answered at the very moment at which the program has ended: by asking all the time.
    ideal: Arc<AtomicBool>,
}

impl Counted {
    fn new(libvirt: &Libvirt) -> Self {
        Self { libvirt: libvirt.clone(), seen: Arc::default(), ideal: Arc::default() }
    }

    /// What went over it since: programs begun, questions whether one ended, and all others.
    fn take(&self) -> [u32; 3] {
        let seen = std::mem::take(&mut *self.seen.lock().unwrap());
        let of = |name: &str| seen.get(name).copied().unwrap_or_default();
        let (begun, asked) = (of("guest-exec"), of("guest-exec-status"));
        [begun, asked, seen.values().sum::<u32>() - begun - asked]
    }

    async fn raw(&self, vm: VmId, command: Value) -> Value {
        let answer = self.libvirt.command(vm, &command.to_string(), LIMIT).await.unwrap();
        serde_json::from_str::<Value>(&answer).unwrap()["return"].take()
    }
}

#[async_trait]
impl AgentLink for Counted {
    async fn command(&self, vm: VmId, command: &str, limit: Duration) -> Result<String> {
        let message: Value = serde_json::from_str(command).unwrap();
        let name = message["execute"].as_str().unwrap().to_owned();
        *self.seen.lock().unwrap().entry(name.clone()).or_default() += 1;
        loop {
            let answer = self.libvirt.command(vm, command, limit).await?;
            let ended = !answer.contains(r#""exited":false"#);
            if ended || name != "guest-exec-status" || !self.ideal.load(Ordering::Relaxed) {
                return Ok(answer);
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

fn guest(link: &Counted) -> AgentGuest<Counted> {
    AgentGuest::with_config(link.clone(), AgentGuestConfig::default()).unwrap()
}

/// Bytes that cannot be packed; others for each seed.
fn noise(bytes: usize, seed: u64) -> Bytes {
    let mut state = 0x9e37_79b9_7f4a_7c15 ^ (seed << 17 | 1);
    let mut noise = Vec::with_capacity(bytes + 8);
    while noise.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        noise.extend_from_slice(&u64::to_le_bytes(state));
    }
    noise.truncate(bytes);
    noise.into()
}

/// Text as logs and scripts are: words that come again, numbers that do not.
fn text(bytes: usize, seed: u64) -> Bytes {
    let words = ["service", "started", "the", "connection", "from", "user", "failed", "for", "request", "error:", "in"];
    let mut text = String::with_capacity(bytes + 80);
    let mut numbers = noise(bytes, seed).to_vec().into_iter();
    while text.len() < bytes {
        let mut next = || usize::from(numbers.next().unwrap_or_default());
        let number = next() << 8 | next();
        let line: Vec<_> = (0..7).map(|_| words[next() % words.len()]).collect();
        text.push_str(&format!("2026-11-21 {number} {}\n", line.join(" ")));
    }
    text.truncate(bytes);
    text.into()
}

fn package(files: usize, of: impl Fn(usize) -> Bytes) -> PutFiles {
    let file = |i: usize| PutFile {
        mode: Some(if i.is_multiple_of(4) { 0o755 } else { 0o644 }),
        make_parents: true,
        ..PutFile::new(format!("/opt/bench/{}/file-{i}", i % 3), of(i))
    };
    PutFiles::new((0..files).map(file).collect())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn figure(name: &str, value: f64, unit: &str) {
    println!("figure guest.{name} {value:.3} {unit}");
}

async fn seconds<T>(work: impl Future<Output = T>) -> f64 {
    let begin = Instant::now();
    work.await;
    begin.elapsed().as_secs_f64()
}

/// Files by the plainest loop there is: open, writes of 64 KiB, close.
async fn raw_push(link: &Counted, vm: VmId, content: &Bytes) {
    let open = json!({ "execute": "guest-file-open", "arguments": { "path": "/root/raw", "mode": "w" } });
    let handle = link.raw(vm, open).await;
    for piece in content.chunks(64 << 10) {
        let arguments = json!({ "handle": handle, "buf-b64": BASE64.encode(piece) });
        let written = link.raw(vm, json!({ "execute": "guest-file-write", "arguments": arguments })).await;
        assert_eq!(written["count"], piece.len());
    }
    link.raw(vm, json!({ "execute": "guest-file-close", "arguments": { "handle": handle } })).await;
}

async fn commands(link: &Counted, vm: VmId) {
    let guest = guest(link);
    guest.put_file(vm, &PutFile::new("/tmp/first", "x")).await.unwrap();
    for (name, files, bytes, rounds) in [("", 100, 600, ROUNDS), ("_300_files", 300, 100, 1), ("_large", 20, 20_000, 3)]
    {
        let (mut fresh, mut again) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
        for round in 0..rounds {
            // What is large cannot be packed either.
            let of = |i: usize| match bytes > 10_000 {
                true => noise(bytes, (round * 1000 + i) as u64),
                false => text(bytes, (round * 1000 + i) as u64),
            };
            let package = package(files, of);
            for counts in [&mut fresh, &mut again] {
                link.take();
                guest.put_files(vm, &package).await.unwrap();
                let [begun, asked, others] = link.take();
                counts[0].push(f64::from(begun + others));
                counts[1].push(f64::from(asked));
            }
        }
        let [fresh, again] = [fresh, again].map(|counts| counts.map(median));
        figure(&format!("commands_per_package{name}"), fresh[0], "commands");
        figure(&format!("commands_per_package{name}_with_polls"), fresh[0] + fresh[1], "commands");
        figure(&format!("commands_unchanged{name}"), again[0], "commands");
        figure(&format!("commands_unchanged{name}_with_polls"), again[0] + again[1], "commands");
    }
}

async fn push(link: &Counted, vm: VmId) {
    let guest = guest(link);
    let bytes = 4 << 20;
    for (name, of) in [("push_ratio", noise as fn(usize, u64) -> Bytes), ("push_text_ratio", text)] {
        let (mut ratios, mut rates) = (Vec::new(), Vec::new());
        for round in 0..=ROUNDS as u64 {
            let content = of(bytes, round);
            let raw = seconds(raw_push(link, vm, &content)).await;
            let file = PutFile::new("/root/ours", content);
            let ours = seconds(async { guest.put_file(vm, &file).await.unwrap() }).await;
            // Each comes to where there is none yet, as it does for the plain loop.
            guest.remove_file(vm, "/root/ours").await.unwrap();
            // The first is to warm up.
            if round > 0 {
                ratios.push(raw / ours);
                rates.push(bytes as f64 / ours / f64::from(1 << 20));
            }
        }
        figure(name, median(ratios), "x");
        figure(&format!("{name}_rate"), median(rates), "MiB/s");
    }
}

async fn polls(libvirt: &Libvirt, vm: VmId) {
    let (link, ideal) = (Counted::new(libvirt), Counted::new(libvirt));
    ideal.ideal.store(true, Ordering::Relaxed);
    let (ours, theirs) = (guest(&link), guest(&ideal));
    let (mut all_polls, mut all_added) = (Vec::new(), Vec::new());
    for line in ["true", "sleep 0.3", "sleep 1"] {
        let run = async |guest: &AgentGuest<Counted>| {
            assert!(guest.exec(vm, &ExecRequest::shell(line)).await.unwrap().success());
        };
        let (mut polls, mut ratios) = (Vec::new(), Vec::new());
        for round in 0..30 {
            link.take();
            let took = seconds(run(&ours)).await;
            let [_, asked, _] = link.take();
            let floor = seconds(run(&theirs)).await;
            // The first teach it how long such a command takes.
            if round >= 10 {
                polls.push(f64::from(asked));
                ratios.push(took / floor);
            }
        }
        let mean = polls.iter().sum::<f64>() / polls.len() as f64;
        println!("{line:?}: {mean:.2} polls, {:+.1} % delay", (median(ratios.clone()) - 1.0) * 100.0);
        all_polls.push(mean);
        all_added.push(median(ratios) - 1.0);
    }
    figure("polls_per_exec", all_polls.into_iter().fold(0.0, f64::max), "polls");
    figure("added_delay", all_added.into_iter().fold(0.0, f64::max) * 100.0, "%");
}

#[tokio::main]
async fn main() {
    let Some(rig) = rig::rig() else { return };
    let libvirt = rig.open().await;
    let vm = rig::guest(&libvirt, "bench").await.id;
    let link = Counted::new(&libvirt);
    polls(&libvirt, vm).await;
    push(&link, vm).await;
    commands(&link, vm).await;
}
