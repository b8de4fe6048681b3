//! SIGKILL at twenty moments: whatever was under way, the next start leaves nothing that no record owns.

use std::time::{Duration, Instant};

use tonic::{Response, Status};

use crate::{
    site::{BOOT, Site, feature, id, machine, packaged_condition, timed},
    support::{SOON, say, soon, within, write_package},
};

/// The four phases, five times each: a machine's create, an install, a condition with its stream, the machine's delete.
const ROUNDS: u32 = 5;
/// Another one is taken from OCR_SEED, to look for what this one does not find.
const SEED: u64 = 0x6f63_7232;
/// Where all assets are.
const ASSETS: &str = "/opt/kill";
const FEATURE_FILES: &str = "blob\nlast\nrun.sh";
const CONDITION_FILES: &str = "blob\nvalue";

fn packages(site: &Site) {
    // Large enough to be copied in several pieces.
    let blob = vec![b'x'; 300 << 10];
    write_package(
        &site.packages,
        "feature",
        &[
            ("run.sh", b"echo begun >/root/begun; sleep 0.3; echo done", "/opt/kill/run.sh", "755"),
            ("blob", &blob, "/opt/kill/blob", "600"),
            ("last", b"last\n", "/opt/kill/last", "644"),
        ],
        "type = \"feature\"\n[feature]\ntype = \"service\"\naction = \"/opt/kill/run.sh\"\n",
    );
    write_package(
        &site.packages,
        "condition",
        &[("blob", &blob, "/opt/kill/blob", "644"), ("value", b"1\n", "/opt/kill/value", "644")],
        "type = \"condition\"\n[condition]\naction = \"cat /opt/kill/value\"\ninterval = 1\n",
    );
}

/// A pseudo-random sequence (splitmix64): the same for the same seed, everywhere.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0 to 1.
    fn fraction(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// A moment in the round's own part of a phase. The parts grow, because most happens at the beginning: of a create
    /// nearly all, since then the guest boots.
    fn moment(&mut self, round: u32, phase: Duration, power: i32) -> Duration {
        let place = (f64::from(round) + self.fraction()) / f64::from(ROUNDS);
        phase.mul_f64(place.powi(power))
    }
}

/// How long the phases take when nobody is killed.
#[derive(Debug)]
struct Phases {
    create: Duration,
    install: Duration,
    condition: Duration,
    delete: Duration,
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_killed_at_twenty_moments_leave_nothing_unowned() {
    let Some(mut site) = Site::open("kill", 1).await else { return };
    packages(&site);
    let seed = std::env::var("OCR_SEED").ok().map_or(SEED, |text| text.parse().expect("OCR_SEED wants a number"));
    let mut dice = Dice(seed);
    let begun = Instant::now();
    let phases = measure(&site).await;
    say(format!("killing with seed {seed} in {phases:.1?}"));
    for round in 0..ROUNDS {
        let mut moment = |phase: &str, of: Duration| {
            let after = dice.moment(round, of, if phase == "create" { 3 } else { 2 });
            say(format!("seed {seed}, round {round}: {phase} is cut off after {after:.1?} of {of:.1?}"));
            after
        };
        let after = moment("create", phases.create);
        cut_create(&mut site, after).await;
        let vm = site.create("web").await;
        assert!(site.assert_all_owned().await.iter().eq([&vm]), "the machine is the only one");
        let after = moment("install", phases.install);
        cut_install(&mut site, &vm, after).await;
        let after = moment("condition", phases.condition);
        cut_condition(&mut site, &vm, after).await;
        let after = moment("delete", phases.delete);
        cut_delete(&mut site, &vm, after).await;
    }
    say(format!("figures: {} kills and starts took {:.0?}", 4 * ROUNDS, begun.elapsed()));
    site.close().await;
}

async fn measure(site: &Site) -> Phases {
    let (vm, create) = timed(site.create("web")).await;
    let (installed, install) = timed(soon("feature", site.features().create(feature(&vm, "feature")))).await;
    let installed = installed.unwrap().into_inner();
    assert_eq!(files(site, &vm).await, FEATURE_FILES);
    soon("delete", site.features().delete(installed.identifier.unwrap())).await.unwrap();
    let (watched, condition) = timed(watch_two(site, &vm)).await;
    let watched = watched.unwrap();
    assert_eq!(files(site, &vm).await, CONDITION_FILES);
    soon("delete", site.conditions().delete(id(&watched))).await.unwrap();
    assert_eq!(files(site, &vm).await, "");
    let ((), delete) = timed(site.delete(&vm)).await;
    Phases { create, install, condition, delete }
}

/// The files below [`ASSETS`].
async fn files(site: &Site, vm: &str) -> String {
    find(site, vm, "-type f").await
}

/// What copies that were cut off left, files and folders; nothing, after recovery.
async fn temporaries(site: &Site, vm: &str) -> String {
    find(site, vm, "-name '.ocr-*'").await
}

async fn find(site: &Site, vm: &str, names: &str) -> String {
    let line = format!("mkdir -p {ASSETS} && cd {ASSETS} && find . -mindepth 1 {names} | sed 's|^./||' | sort");
    site.shell_text(vm, &line).await
}

/// Installs a condition and waits for two of its values.
async fn watch_two(site: &Site, vm: &str) -> Result<String, Status> {
    let made = site.conditions().create(packaged_condition(vm, "condition")).await?.into_inner();
    let condition = made.identifier.unwrap().value;
    let mut values = site.watch(&condition).await;
    for _ in 0..2 {
        values.next().await?;
    }
    Ok(condition)
}

/// A call that the kill of its server cuts off: `None` when there was no answer.
async fn answer<T>(call: impl Future<Output = Result<Response<T>, Status>>) -> Option<T> {
    within(BOOT, "the end of a call", call).await.ok().map(Response::into_inner)
}

async fn cut_create(site: &mut Site, after: Duration) {
    let mut vms = site.vms();
    let call = tokio::spawn(async move { answer(vms.create(machine("web"))).await });
    tokio::time::sleep(after).await;
    site.take_machiner().kill();
    let answered = call.await.unwrap();
    site.start_machiner().await;
    let there = site.assert_all_owned().await;
    if let Some(made) = answered {
        assert!(there.contains(&made.value), "a machine that was answered stays");
    }
}

async fn cut_delete(site: &mut Site, vm: &str, after: Duration) {
    let (mut vms, gone) = (site.vms(), id(vm));
    let call = tokio::spawn(async move { answer(vms.delete(gone)).await });
    tokio::time::sleep(after).await;
    site.take_machiner().kill();
    let answered = call.await.unwrap();
    site.start_machiner().await;
    let there = site.assert_all_owned().await;
    assert!(answered.is_none() || there.is_empty(), "a machine whose deletion was answered is gone");
    site.delete(vm).await;
    assert!(site.assert_all_owned().await.is_empty());
}

async fn cut_install(site: &mut Site, vm: &str, after: Duration) {
    let (mut features, request) = (site.features(), feature(vm, "feature"));
    let call = tokio::spawn(async move { answer(features.create(request)).await });
    tokio::time::sleep(after).await;
    site.take_executor().kill();
    let answered = call.await.unwrap().map(|made| made.identifier.unwrap().value);
    site.start_executor().await;
    let there = assert_whole_or_gone(site, vm, answered, FEATURE_FILES).await;
    for install in there {
        soon("delete", site.features().delete(id(&install))).await.unwrap();
    }
    assert_eq!(files(site, vm).await, "");
    // The machine is as good as before.
    let again = soon("feature", site.features().create(feature(vm, "feature"))).await.unwrap().into_inner();
    assert_eq!((again.stdout.as_str(), files(site, vm).await.as_str()), ("done", FEATURE_FILES));
    soon("delete", site.features().delete(again.identifier.unwrap())).await.unwrap();
    assert_eq!((files(site, vm).await, temporaries(site, vm).await), (String::new(), String::new()));
}

async fn cut_condition(site: &mut Site, vm: &str, after: Duration) {
    let watched = {
        let (mut conditions, request) = (site.conditions(), packaged_condition(vm, "condition"));
        tokio::spawn(async move {
            let made = answer(conditions.create(request)).await?.identifier.unwrap();
            // Its stream is open when the server is killed, or is being opened.
            if let Ok(values) = conditions.stream(made.clone()).await {
                let mut values = values.into_inner();
                while let Ok(Some(_)) = values.message().await {}
            }
            Some(made.value)
        })
    };
    tokio::time::sleep(after).await;
    site.take_executor().kill();
    let answered = within(SOON, "the end of a stream", watched).await.unwrap();
    site.start_executor().await;
    let there = assert_whole_or_gone(site, vm, answered, CONDITION_FILES).await;
    for condition in there {
        site.watch(&condition).await.show(1.0, SOON).await;
        soon("delete", site.conditions().delete(id(&condition))).await.unwrap();
    }
    assert_eq!(files(site, vm).await, "");
}

/// What was answered is installed; what is installed is so completely; and otherwise there is nothing.
async fn assert_whole_or_gone(site: &Site, vm: &str, answered: Option<String>, whole: &str) -> Vec<String> {
    let there: Vec<_> = site.installed().await.into_iter().map(|install| install.id).collect();
    assert!(there.len() <= 1, "{there:?}");
    assert!(answered.is_none_or(|id| there.contains(&id)), "what was answered stays: {there:?}");
    assert_eq!(files(site, vm).await, if there.is_empty() { "" } else { whole });
    assert_eq!(temporaries(site, vm).await, "");
    there
}
