//! The settings of Redis.

use ocr_core::{
    Owner,
    state::redis::{Address, Login, Place, RedisConfig, RedisStore, Tls},
};
use secrecy::SecretString;

use super::{Reader, Server, Store};

const PORT: u16 = 6379;
const SENTINEL_PORT: u16 = 26379;

/// Those that say which servers to ask; one of them must be given.
const PLACES: [&str; 3] = ["REDIS_HOST", "REDIS_SENTINELS", "REDIS_CLUSTER"];

impl Reader<'_> {
    /// Whether the executor keeps its records in Redis because it is told where that is.
    pub(super) fn redis_by_default(&self) -> bool {
        // Two Machiners on one store are not safe yet, so for that one it must be said.
        self.server == Server::Executor && PLACES.iter().any(|name| self.is_given(name))
    }

    /// Warns of what is set and has no effect because records are kept elsewhere.
    pub(super) fn warn_of_unused_redis(&mut self) {
        for name in PLACES.into_iter().filter(|name| self.is_given(name)).collect::<Vec<_>>() {
            self.warnings.push(format!("{name} is set, but records are kept elsewhere; STATE_STORE=redis uses it"));
        }
    }

    pub(super) fn redis(&mut self, owner: Option<&Owner>, insecure: bool) -> Store {
        let place = self.redis_place();
        let login = self.redis_login("REDIS_USER", "REDIS_PASSWORD");
        let db = u32::try_from(self.number("REDIS_DB", 0, 1_000_000)).unwrap_or(0);
        let tls = self.redis_tls(insecure);
        let owner = owner.map(Owner::as_str).unwrap_or_default();
        let prefix = self.text("REDIS_PREFIX").replace("OWNER", owner);
        let wait_replicas = u32::try_from(self.number("REDIS_WAIT_REPLICAS", 0, 100)).unwrap_or(0);
        let deadline = self.seconds("REDIS_TIMEOUT", 1, 300);
        self.shows("REDIS_PREFIX", &prefix);
        let Some(place) = place else { return Store::Memory };
        let config = RedisConfig { place, login, db, tls, prefix, wait_replicas, deadline };
        // It connects to nothing; what it finds wrong names the variable.
        if let Err(error) = RedisStore::new(config.clone()) {
            self.faults.push(format!("REDIS: {}", error.message()));
        }
        Store::Redis(Box::new(config))
    }

    fn redis_place(&mut self) -> Option<Place> {
        let given: Vec<_> = PLACES.into_iter().filter(|name| self.is_given(name)).collect();
        let [name] = given[..] else {
            let which = if given.is_empty() { "none".to_owned() } else { given.join(", ") };
            self.faults.push(format!("REDIS_HOST: STATE_STORE=redis wants one of {}, got {which}", PLACES.join(", ")));
            return None;
        };
        match name {
            "REDIS_HOST" => {
                let port = self.parsed::<u16>("REDIS_PORT")?;
                let address = Address::parse(&self.text("REDIS_HOST"), port);
                address.map_err(|why| self.faults.push(format!("REDIS_HOST: {why}"))).ok().map(Place::Single)
            }
            "REDIS_SENTINELS" => {
                let sentinels = self.addresses("REDIS_SENTINELS", SENTINEL_PORT);
                let master = self.text("REDIS_SENTINEL_MASTER");
                let login = self.redis_login("REDIS_SENTINEL_USER", "REDIS_SENTINEL_PASSWORD");
                Some(Place::Sentinel { sentinels, master, login })
            }
            _ => Some(Place::Cluster(self.addresses("REDIS_CLUSTER", PORT))),
        }
    }

    fn addresses(&mut self, name: &'static str, port: u16) -> Vec<Address> {
        let text = self.text(name);
        let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
        parts
            .filter_map(|part| match Address::parse(part, port) {
                Ok(address) => Some(address),
                Err(why) => {
                    self.faults.push(format!("{name}: {why}"));
                    None
                }
            })
            .collect()
    }

    fn redis_login(&mut self, user: &'static str, password: &'static str) -> Login {
        let login = Login { user: self.maybe(user), password: self.maybe(password).map(SecretString::from) };
        if login.user.is_some() && login.password.is_none() {
            self.faults.push(format!("{password}: is not set, and {user} wants one"));
        }
        login
    }

    fn redis_tls(&mut self, insecure: bool) -> Option<Tls> {
        let wanted = self.boolean("REDIS_TLS");
        let file = self.maybe("REDIS_CA_FILE");
        if !wanted {
            if file.is_some() {
                self.faults.push("REDIS_CA_FILE: is set, but REDIS_TLS is not true".to_owned());
            }
            return None;
        }
        let authorities_pem = file.and_then(|path| match std::fs::read(&path) {
            Ok(pem) => Some(pem),
            Err(error) => {
                self.faults.push(format!("REDIS_CA_FILE: {path}: {error}"));
                None
            }
        });
        Some(Tls { authorities_pem, insecure })
    }

    fn shows(&mut self, name: &'static str, value: &str) {
        if let Some((_, shown)) = self.effective.iter_mut().find(|(shown, _)| *shown == name) {
            value.clone_into(shown);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, time::Duration};

    use super::{super::Settings, *};

    /// What the time-out is when nothing is said.
    const TIMEOUT: Duration = Duration::from_secs(5);

    const GOOD: [(&str, &str); 4] =
        [("GLOBAL_HOST", "127.0.0.1"), ("GLOBAL_INSECURE", "False"), ("EXECUTOR_PORT", "0"), ("BACKEND", "libvirt")];

    fn read(server: Server, given: &[(&str, &str)]) -> Result<Settings, String> {
        let values: BTreeMap<_, _> = GOOD
            .iter()
            .chain(&[("MACHINER_PORT", "0")])
            .chain(given)
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        Settings::read(server, &values).map_err(|faults| faults.to_string())
    }

    fn config(given: &[(&str, &str)]) -> RedisConfig {
        match read(Server::Executor, given).unwrap().store {
            Store::Redis(config) => *config,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_executor_keeps_its_records_in_redis_when_it_is_told_where_that_is() {
        let found = config(&[("REDIS_HOST", "redis.example"), ("REDIS_PASSWORD", "canary-7f3a")]);
        let Place::Single(address) = &found.place else { panic!("{found:?}") };
        assert_eq!(address.to_string(), "redis.example:6379");
        assert_eq!((found.prefix.as_str(), found.deadline, found.wait_replicas), ("ocr-executor", TIMEOUT, 0));
        assert!(found.tls.is_none() && found.login.user.is_none() && found.login.password.is_some());
        let settings = read(Server::Executor, &[("REDIS_HOST", "r"), ("STATE_STORE", "embedded")]).unwrap();
        assert!(matches!(settings.store, Store::Embedded(_)));
        assert!(settings.warnings.iter().any(|warning| warning.starts_with("REDIS_HOST is set, but")));
        let machiner = read(Server::Machiner, &[("REDIS_HOST", "r")]).unwrap();
        assert!(
            matches!(machiner.store, Store::Embedded(_)) && machiner.warnings.len() == 1,
            "{:?}",
            machiner.warnings
        );
        let machiner = read(Server::Machiner, &[("REDIS_HOST", "r"), ("STATE_STORE", "redis")]).unwrap();
        assert!(matches!(machiner.store, Store::Redis(_)));
    }

    #[test]
    fn sentinels_clusters_and_prefixes_are_read() {
        let found = config(&[
            ("REDIS_SENTINELS", "a, b:1,[::1]:2"),
            ("REDIS_SENTINEL_MASTER", "ocr"),
            ("REDIS_SENTINEL_PASSWORD", "canary-7f3a"),
            ("OWNER", "north"),
            ("REDIS_WAIT_REPLICAS", "1"),
            ("REDIS_USER", "ocr"),
            ("REDIS_PASSWORD", "canary-7f3a"),
            ("REDIS_DB", "3"),
        ]);
        let Place::Sentinel { sentinels, master, login } = &found.place else { panic!("{found:?}") };
        let sentinels: Vec<_> = sentinels.iter().map(ToString::to_string).collect();
        assert_eq!((sentinels.join(" ").as_str(), master.as_str()), ("a:26379 b:1 [::1]:2", "ocr"));
        assert!(login.password.is_some() && found.db == 3 && found.wait_replicas == 1);
        assert_eq!(found.prefix, "north-executor");
        let found = config(&[("REDIS_CLUSTER", "a:1,b:2"), ("REDIS_PREFIX", "mine")]);
        assert!(matches!(&found.place, Place::Cluster(nodes) if nodes.len() == 2) && found.prefix == "mine");
    }

    #[test]
    fn what_cannot_be_used_is_told_with_its_name_and_without_secrets() {
        for (given, wanted) in [
            (&[("STATE_STORE", "redis")][..], "REDIS_HOST: STATE_STORE=redis wants one of"),
            (&[("REDIS_HOST", "a"), ("REDIS_CLUSTER", "b")], "got REDIS_HOST, REDIS_CLUSTER"),
            (&[("REDIS_HOST", "redis://:canary-7f3a@h")], "REDIS_HOST: wants host:port"),
            (&[("REDIS_HOST", "a"), ("REDIS_PORT", "many")], "REDIS_PORT: "),
            (&[("REDIS_HOST", "a"), ("REDIS_USER", "u")], "REDIS_PASSWORD: is not set"),
            (&[("REDIS_HOST", "a"), ("REDIS_TLS", "perhaps")], "REDIS_TLS: wants true or false"),
            (&[("REDIS_HOST", "a"), ("REDIS_CA_FILE", "/nonexistent")], "REDIS_CA_FILE: is set, but"),
            (
                &[("REDIS_HOST", "a"), ("REDIS_TLS", "1"), ("REDIS_CA_FILE", "/nonexistent")],
                "REDIS_CA_FILE: /nonexistent",
            ),
            (&[("REDIS_HOST", "a"), ("REDIS_PREFIX", "{x}")], "REDIS_PREFIX"),
            (&[("REDIS_HOST", "a"), ("REDIS_TIMEOUT", "0")], "REDIS_TIMEOUT: "),
            (&[("REDIS_CLUSTER", "a"), ("REDIS_DB", "1")], "REDIS_DB"),
            (&[("REDIS_SENTINELS", "a")], "REDIS_SENTINEL_MASTER"),
            (&[("REDIS_SENTINELS", "a:b"), ("REDIS_SENTINEL_MASTER", "m")], "REDIS_SENTINELS: wants host:port"),
        ] {
            let faults = read(Server::Executor, given).map(|_| ()).unwrap_err();
            assert!(faults.contains(wanted) && !faults.contains("canary"), "{wanted} in {faults}");
        }
    }

    #[test]
    fn secrets_are_in_no_output() {
        let given = [
            ("REDIS_SENTINELS", "a"),
            ("REDIS_SENTINEL_MASTER", "m"),
            ("REDIS_SENTINEL_PASSWORD", "canary-7f3a"),
            ("REDIS_PASSWORD", "canary-7f3a"),
        ];
        let settings = read(Server::Executor, &given).unwrap();
        let shown: Vec<_> = settings.effective().collect();
        assert!(
            shown.contains(&("REDIS_PASSWORD", "(hidden)")) && shown.contains(&("REDIS_SENTINEL_PASSWORD", "(hidden)"))
        );
        assert!(!format!("{settings:?}{shown:?}").contains("canary-7f3a"));
    }
}
