//! Three Executors on one Redis, and one guest that all of them act in.

use std::time::Duration;

use futures::future::join_all;
use ocr_grpc::{
    client::{ConditionServiceClient, FeatureServiceClient, InstallsClient},
    proto::Condition,
    v1,
};
use tonic::transport::Channel;

use crate::{
    redis::{self, need_redis},
    site::{BOOT, Site, Values, feature, id, timed},
    support::{SOON, Server, say, soon, until, within, write_package},
};

/// The shortest that the setting takes: what a killed Executor owns is free after it.
const LEASE: Duration = Duration::from_secs(3);
const INTERVAL: Duration = Duration::from_secs(2);

struct Executor {
    server: Server,
    channel: Channel,
}

impl Executor {
    async fn on(site: &Site, redis: &redis::Server, name: &str) -> Self {
        let (server, channel) = site.executor_on(redis, LEASE, name).await;
        Self { server, channel }
    }

    async fn install(&self, vm: &str, package: &str) -> String {
        let reply = FeatureServiceClient::new(self.channel.clone()).create(feature(vm, package)).await;
        reply.unwrap().into_inner().identifier.unwrap().value
    }

    async fn remove(&self, install: &str) {
        FeatureServiceClient::new(self.channel.clone()).delete(id(install)).await.unwrap();
    }

    async fn condition(&self, vm: &str, line: &str) -> String {
        let condition = Condition {
            name: "line".to_owned(),
            virtual_machine_id: vm.to_owned(),
            command: line.to_owned(),
            interval: INTERVAL.as_secs() as i32,
            ..Condition::default()
        };
        let made = ConditionServiceClient::new(self.channel.clone()).create(condition).await;
        made.unwrap().into_inner().identifier.unwrap().value
    }

    async fn watch(&self, condition: &str) -> Values {
        let mut conditions = ConditionServiceClient::new(self.channel.clone());
        Values(soon("stream", conditions.stream(id(condition))).await.unwrap().into_inner())
    }

    async fn installed(&self) -> usize {
        let mut installs = InstallsClient::new(self.channel.clone());
        let list = installs.list(v1::ListInstallsRequest::default());
        soon("list", list).await.unwrap().into_inner().installs.len()
    }
}

/// Takes values until the stream has given so many.
async fn take(values: &mut Values, count: usize) {
    for _ in 0..count {
        assert_eq!(values.next().await.unwrap(), 1.0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn executors_on_one_redis_share_a_guest_and_one_that_is_killed_is_replaced() {
    need_redis!();
    let Some(site) = Site::open("fleet", 1).await else { return };
    // Each action says when another one is in the guest beside it.
    let action = "mkdir /run/here || echo beside >>/run/overlaps; sleep 0.3; rmdir /run/here";
    write_package(
        &site.packages,
        "web",
        &[("web.conf", b"port = 80\n", "/etc/web/", "644")],
        &format!("type = \"feature\"\n[feature]\ntype = \"service\"\naction = {action:?}\n"),
    );
    let redis = redis::Server::start(redis::Options::durable());
    let (a, b, c) = tokio::join!(
        Executor::on(&site, &redis, "a"),
        Executor::on(&site, &redis, "b"),
        Executor::on(&site, &redis, "c")
    );
    let vm = site.create("web").await;

    // What one has made another one removes.
    let install = within(BOOT, "install", a.install(&vm, "web")).await;
    assert_eq!(site.shell_text(&vm, "cat /etc/web/web.conf").await, "port = 80");
    soon("remove", b.remove(&install)).await;
    assert!(!site.shell(&vm, "test -e /etc/web/web.conf").await.success(), "the file is still there");

    // A condition that is watched through two runs once a tick.
    let line = "echo x >>/run/ticks; echo 1";
    let condition = soon("condition", a.condition(&vm, line)).await;
    let (mut through_a, mut through_b) = (a.watch(&condition).await, b.watch(&condition).await);
    let both = async { tokio::join!(take(&mut through_a, 4), take(&mut through_b, 4)) };
    within(BOOT, "values through two", both).await;
    let runs: u32 = site.shell_text(&vm, "wc -l </run/ticks").await.parse().unwrap();
    // One stream may have begun a tick before the other, and a run may be under way.
    assert!((4..=6).contains(&runs), "{runs} runs for 4 values through each of two");

    // All of them at once, with the condition between: one operation at a time in the guest.
    let installs = [&a, &b, &c, &a, &b, &c].map(|executor| executor.install(&vm, "web"));
    let (installs, took) = timed(within(BOOT, "six installs through three", join_all(installs))).await;
    say(format!("figures: six installs of 0.3 s in one guest through three Executors took {took:.1?}"));
    assert!(!site.shell(&vm, "test -e /run/overlaps").await.success(), "two actions at once");

    // The one that is killed may own the guest, or be followed by the others: both go on.
    a.server.kill();
    let next = async {
        // What was under way when it was killed is still told.
        take(&mut through_b, 2).await;
    };
    let ((), took) = timed(within(LEASE * 4 + SOON, "values after the kill", next)).await;
    say(format!("figures: two values {took:.1?} after the kill of one of three Executors, LEASE_TTL {LEASE:?}"));
    assert_eq!(c.installed().await, installs.len() + 1, "the condition and the installs are known to who is left");

    // Redis away for longer than a session: the stream says nothing false, and goes on.
    redis.pause();
    tokio::time::sleep(LEASE * 2).await;
    redis.resume();
    within(BOOT, "values after Redis was away", take(&mut through_b, 3)).await;

    for (number, install) in installs.iter().enumerate() {
        within(SOON, "remove", [&b, &c][number % 2].remove(install)).await;
    }
    assert!(!site.shell(&vm, "test -e /etc/web/web.conf").await.success(), "the file is still there");
    site.delete(&vm).await;
    through_b.end_not_found().await;
    // The machine took its condition along, as far as the one that noticed has told the store.
    until(SOON, "nothing is installed", async || (c.installed().await == 0).then_some(())).await;
    for executor in [b, c] {
        assert!(executor.server.terminate().await.success());
    }
    site.close().await;
}
