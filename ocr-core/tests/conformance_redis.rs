//! The conformance suite over Redis: one server, with TLS and an ACL user, behind Sentinels, and a cluster.

#![cfg(all(feature = "conformance", feature = "redis"))]
#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

#[path = "support/redis.rs"]
mod redis;

use std::{sync::Arc, time::Duration};

use ocr_core::{
    conformance::{Subject, assert_all},
    state::redis::{Address, Login, Place, RedisConfig, RedisStore, Tls},
};

use self::redis::{Cluster, Options, SentinelSet, Server, need_redis};

async fn conforms(config: RedisConfig) {
    let store = RedisStore::new(config).unwrap();
    store.check().await.unwrap();
    let subject = Subject {
        signals: Some(Arc::new(store.signals())),
        state: Some(Arc::new(store)),
        deadline: Duration::from_secs(10),
        parallel: 8,
        ..Subject::new()
    };
    assert_all(&subject).await;
}

fn single(server: &Server) -> RedisConfig {
    RedisConfig::new(Place::Single(Address::new("127.0.0.1", server.port)))
}

#[tokio::test(flavor = "multi_thread")]
async fn one_server_conforms() {
    need_redis!();
    let server = Server::start(Options::durable());
    conforms(single(&server)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_that_wait_for_a_replica_conform() {
    need_redis!();
    let master = Server::start(Options::default());
    let _replica = Server::replica_of(&master, Options::default());
    conforms(RedisConfig { wait_replicas: 1, ..single(&master) }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_encrypted_server_with_users_conforms() {
    need_redis!();
    // As docs/CONFIGURATION.md has it.
    let user = "user ocr on >secret-c4f1 resetchannels &{ocr}:* ~{ocr}:* +@read +@write +@scripting +@pubsub \
                +@connection +time +role +info +wait +publish -@dangerous +role +info";
    let options = Options { tls: true, password: Some("other-88d0".to_owned()), ..Options::default() };
    let server = Server::start(options.line(user));
    let login = Login { user: Some("ocr".to_owned()), password: Some("secret-c4f1".into()) };
    let tls = Tls { authorities_pem: Some(server.authority_pem()), insecure: false };
    conforms(RedisConfig { login, tls: Some(tls), ..single(&server) }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_set_behind_sentinels_conforms() {
    need_redis!();
    let set = SentinelSet::start(&Options { password: Some("secret-9a0b".to_owned()), ..Options::default() });
    let login = Login { user: None, password: Some("secret-9a0b".into()) };
    let sentinels = set.sentinels.iter().map(|sentinel| Address::new("127.0.0.1", sentinel.port)).collect();
    let place = Place::Sentinel { sentinels, master: "ocr".to_owned(), login: login.clone() };
    conforms(RedisConfig { login, wait_replicas: 1, ..RedisConfig::new(place) }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_conforms() {
    need_redis!();
    let cluster = Cluster::start();
    // Wherever the slot of the prefix is, one node leads there.
    for (node, prefix) in cluster.nodes.iter().zip(["a", "b", "ocr"]) {
        let place = Place::Cluster(vec![Address::new("127.0.0.1", node.port)]);
        conforms(RedisConfig { prefix: prefix.to_owned(), ..RedisConfig::new(place) }).await;
    }
}
