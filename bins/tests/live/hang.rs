//! One guest's agent hangs; the others must not notice.

use std::{
    fs::File,
    io::{Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use futures::future::join_all;

use crate::{
    site::{BOOT, Site, Values},
    support::{SOON, say, until, within},
};

/// From one run of a condition to the next, in [`Site::condition`].
const INTERVAL: Duration = Duration::from_secs(1);
/// The longest that a value of the others may be away while one guest hangs.
const MAX_GAP: Duration = INTERVAL.saturating_mul(5);
/// So many values of each of the others are looked at while one guest hangs. It hangs for longer than libvirt waits for
/// an agent (5 s).
const VALUES: usize = 12;

/// The root shell on a guest's serial console: a way in that does not need the agent.
struct Console {
    file: File,
    seen: Arc<Mutex<String>>,
}

impl Console {
    fn open(path: &Path) -> Self {
        const O_NOCTTY: i32 = 0o400;
        let file = File::options().read(true).write(true).custom_flags(O_NOCTTY).open(path).unwrap();
        let (mut reader, seen) = (file.try_clone().unwrap(), Arc::new(Mutex::new(String::new())));
        let kept = seen.clone();
        // It ends with the guest.
        std::thread::spawn(move || {
            let mut bytes = [0; 1024];
            while let Ok(count @ 1..) = reader.read(&mut bytes) {
                kept.lock().unwrap().push_str(&String::from_utf8_lossy(&bytes[..count]));
            }
        });
        Self { file, seen }
    }

    /// Runs a line and waits until it has succeeded.
    async fn run(&mut self, line: &str) {
        self.seen.lock().unwrap().clear();
        // The first return begins the shell. What the console repeats of this line is not what the line prints.
        write!(self.file, "\n{line} && echo done-$((40 + 2))\n").unwrap();
        let what = format!("{line:?} on the console");
        until(SOON, &what, async || self.seen.lock().unwrap().contains("done-42").then_some(())).await;
    }
}

/// When the values of a stream came.
#[derive(Clone, Default)]
struct Times(Arc<Mutex<Vec<Instant>>>);

impl Times {
    fn of(mut values: Values) -> Self {
        let times = Self::default();
        let kept = times.clone();
        // It ends with the stream, and that with the machine.
        tokio::spawn(async move {
            while values.next().await.is_ok() {
                kept.0.lock().unwrap().push(Instant::now());
            }
        });
        times
    }

    fn since(&self, start: Instant) -> Vec<Instant> {
        self.0.lock().unwrap().iter().filter(|at| **at > start).copied().collect()
    }

    async fn more(&self, count: usize, start: Instant, deadline: Duration) {
        until(deadline, "values come", async || (self.since(start).len() >= count).then_some(())).await;
    }

    /// The longest time without a value from the start to the last one.
    fn longest_gap(&self, start: Instant) -> Duration {
        let mut last = start;
        let mut longest = Duration::ZERO;
        for at in self.since(start) {
            longest = longest.max(at - last);
            last = at;
        }
        longest
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn three_guests_keep_their_interval_while_the_agent_of_a_fourth_hangs() {
    let Some(site) = Site::open("hang", 4).await else { return };
    let begun = Instant::now();
    let vms = join_all(["one", "two", "three", "four"].map(|name| site.create(name))).await;
    say(format!("figures: four machines at once are ready after {:.1?}", begun.elapsed()));
    let mut all = Vec::new();
    for vm in &vms {
        all.push(Times::of(site.watch(&site.condition(vm, "echo 1").await).await));
    }
    let (hung, others) = all.split_first().unwrap();
    join_all(all.iter().map(|times| times.more(3, begun, SOON))).await;
    let before = Instant::now();
    join_all(all.iter().map(|times| times.more(5, before, SOON))).await;
    let usual = all.iter().map(|times| times.longest_gap(before)).max().unwrap();

    let mut console = Console::open(&site.rig.console(&vms[0]));
    console.run("kill -STOP $(pidof qemu-ga)").await;
    let stopped = Instant::now();
    join_all(others.iter().map(|times| times.more(VALUES, stopped, MAX_GAP * VALUES as u32))).await;
    let gaps: Vec<_> = others.iter().map(|times| times.longest_gap(stopped)).collect();
    say(format!(
        "figures: the longest gaps between values, at {INTERVAL:?}: {usual:.2?} usually, {gaps:.2?} beside a hung agent"
    ));
    assert!(gaps.iter().all(|gap| *gap < MAX_GAP), "{gaps:?}");
    // One value may have been on its way.
    assert!(hung.since(stopped).len() <= 1, "a stopped agent cannot give values");

    console.run("kill -CONT $(pidof qemu-ga)").await;
    let continued = Instant::now();
    hung.more(3, continued, SOON).await;
    say(format!("figures: its values are back {:.1?} after it goes on", hung.since(continued)[0] - continued));
    let after = Instant::now();
    within(BOOT, "delete", join_all(vms.iter().map(|vm| site.delete(vm)))).await;
    say(format!("figures: four machines at once are deleted in {:.1?}", after.elapsed()));
    // The conditions' records go when their runs notice that the machine is gone.
    until(SOON, "no installs", async || site.installed().await.is_empty().then_some(())).await;
    site.close().await;
}
