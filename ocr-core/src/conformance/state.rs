//! Cases of [`StateStore`](crate::StateStore).

use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::context::{Broken, Check, Context, ensure, fails};
use crate::{
    Deletion, ErrorKind, Key, Precondition, StateStore, Version,
    error::reason,
    state::{MAX_PAGE, MAX_VALUE_BYTES},
};

/// A time to live that is long for a store and short for who waits.
const TTL: Duration = Duration::from_millis(800);

async fn value(state: &dyn StateStore, key: &Key) -> Check<Option<Bytes>> {
    Ok(state.get(key).await?.map(|record| record.value))
}

async fn holds(state: &dyn StateStore, key: &Key, wanted: &str, version: Version) -> Check {
    match state.get(key).await? {
        Some(record) if record.value == wanted && record.version == version => Ok(()),
        other => Err(Broken(format!("the record must still be {wanted:?} in version {}, it is {other:?}", version.0))),
    }
}

/// Waits until a record is gone; it must not be before `begin` and its time to live.
async fn expires(c: &Context<'_>, key: &Key, begin: Instant) -> Check {
    let end = begin + TTL + c.deadline();
    while value(c.state()?.as_ref(), key).await?.is_some() {
        ensure!(Instant::now() < end, "a record is still there long after its time to live");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // The time was taken after the answer, so a store that counts rightly is never accused.
    let lived = begin.elapsed();
    ensure!(lived >= TTL, "a record with {TTL:?} to live was gone after {lived:?}");
    Ok(())
}

pub(super) async fn state_roundtrip(c: &Context<'_>) -> Check {
    let state = c.state()?;
    let key = c.key("a")?;
    let all_bytes: Vec<u8> = (0..=255).collect();
    let largest = super::guest::noise(MAX_VALUE_BYTES);
    for wanted in [Vec::new(), b"x".to_vec(), all_bytes, largest] {
        let wanted = Bytes::from(wanted);
        let version = state.put(&key, wanted.clone(), Precondition::Any, None).await?;
        let Some(record) = state.get(&key).await? else { return Err(Broken("what was written is not there".into())) };
        ensure!(
            record.value == wanted,
            "{} bytes came back instead of the {} written",
            record.value.len(),
            wanted.len()
        );
        ensure!(record.version == version, "{:?} came back instead of {version:?}", record.version);
    }
    // A long key, and keys that differ in one byte only.
    let long = c.key(&format!("{}-b", "k".repeat(400)))?;
    let beside = c.key(&format!("{}-c", "k".repeat(400)))?;
    state.put(&long, Bytes::from_static(b"b"), Precondition::Any, None).await?;
    ensure!(value(state.as_ref(), &beside).await?.is_none(), "one key's record is seen under another");
    ensure!(value(state.as_ref(), &long).await?.is_some(), "a long key's record is not there");
    Ok(())
}

pub(super) async fn state_get_missing(c: &Context<'_>) -> Check {
    let record = c.state()?.get(&c.key("never")?).await?;
    ensure!(record.is_none(), "a key never written has {record:?}");
    Ok(())
}

pub(super) async fn state_versions_grow(c: &Context<'_>) -> Check {
    let state = c.state()?;
    let key = c.key("a")?;
    let put = |ttl| state.put(&key, Bytes::from_static(b"x"), Precondition::Any, ttl);
    let first = put(None).await?;
    let second = put(None).await?;
    ensure!(second > first, "a second write gave {second:?} after {first:?}");
    state.delete(&key, Precondition::Any).await?;
    let begin = Instant::now();
    let third = put(Some(TTL)).await?;
    ensure!(third > second, "a write after a deletion gave {third:?} after {second:?}");
    expires(c, &key, begin).await?;
    let fourth = state.put(&key, Bytes::from_static(b"x"), Precondition::Absent, None).await?;
    ensure!(fourth > third, "a write after an expiry gave {fourth:?} after {third:?}");
    Ok(())
}

pub(super) async fn state_put_absent(c: &Context<'_>) -> Check {
    let state = c.state()?;
    let key = c.key("a")?;
    let version = state.put(&key, Bytes::from_static(b"one"), Precondition::Absent, None).await?;
    let result = state.put(&key, Bytes::from_static(b"two"), Precondition::Absent, None).await;
    fails(result, &[ErrorKind::AlreadyExists], "writing what must be absent and is there")?;
    holds(state.as_ref(), &key, "one", version).await?;
    state.delete(&key, Precondition::Any).await?;
    state.put(&key, Bytes::from_static(b"three"), Precondition::Absent, None).await?;
    Ok(())
}

pub(super) async fn state_put_version(c: &Context<'_>) -> Check {
    let state = c.state()?;
    let key = c.key("a")?;
    let put = |text: &'static str, version| {
        state.put(&key, Bytes::from_static(text.as_bytes()), Precondition::Version(version), None)
    };
    let error = fails(put("x", Version(1)).await, &[ErrorKind::Conflict], "a version of what is not there")?;
    ensure!(error.reason() == Some(reason::VERSION_MISMATCH), "reason {:?}", error.reason());
    ensure!(state.get(&key).await?.is_none(), "a refused write made a record");
    let one = state.put(&key, Bytes::from_static(b"one"), Precondition::Any, None).await?;
    let two = put("two", one).await?;
    for wrong in [one, Version(two.0 + 1)] {
        let error = fails(put("x", wrong).await, &[ErrorKind::Conflict], "another version")?;
        ensure!(error.reason() == Some(reason::VERSION_MISMATCH), "reason {:?}", error.reason());
    }
    holds(state.as_ref(), &key, "two", two).await
}

pub(super) async fn state_put_race(c: &Context<'_>) -> Check {
    let key = c.key("a")?;
    let mut only = Precondition::Absent;
    for round in 0..3 {
        let mut calls = tokio::task::JoinSet::new();
        for writer in 0..8 {
            let (state, key) = (c.state()?.clone(), key.clone());
            let value = format!("{round}.{writer}");
            calls.spawn(async move { (state.put(&key, value.clone().into(), only, None).await, value) });
        }
        let mut winners = Vec::new();
        for (result, value) in calls.join_all().await {
            match result {
                Ok(version) => winners.push((version, value)),
                Err(error) if matches!(error.kind(), ErrorKind::AlreadyExists | ErrorKind::Conflict) => {}
                Err(error) => return Err(error.into()),
            }
        }
        ensure!(winners.len() == 1, "of eight writers with {only:?} {} won", winners.len());
        let (version, value) = &winners[0];
        holds(c.state()?.as_ref(), &key, value, *version).await?;
        only = Precondition::Version(*version);
    }
    Ok(())
}

pub(super) async fn state_ttl(c: &Context<'_>) -> Check {
    let state = c.state()?;
    let key = c.key("a")?;
    let begin = Instant::now();
    state.put(&key, Bytes::from_static(b"x"), Precondition::Any, Some(TTL)).await?;
    expires(c, &key, begin).await?;
    let listed = state.list(key.as_str(), None, 10).await?;
    ensure!(listed.is_empty(), "a record that has expired is listed");
    let deletion = state.delete(&key, Precondition::Any).await?;
    ensure!(deletion == Deletion::AlreadyGone, "deleting a record that has expired gave {deletion:?}");
    Ok(())
}

pub(super) async fn state_ttl_cleared(c: &Context<'_>) -> Check {
    let state = c.state()?;
    let (key, witness) = (c.key("a")?, c.key("b")?);
    state.put(&key, Bytes::from_static(b"x"), Precondition::Any, Some(TTL)).await?;
    state.put(&key, Bytes::from_static(b"y"), Precondition::Any, None).await?;
    // The witness is written later and expires: so the first time to live is over too.
    let begin = Instant::now();
    state.put(&witness, Bytes::from_static(b"x"), Precondition::Any, Some(TTL)).await?;
    expires(c, &witness, begin).await?;
    let left = value(state.as_ref(), &key).await?;
    ensure!(left.as_deref() == Some(b"y"), "a write without a time to live left {left:?}");
    Ok(())
}

pub(super) async fn state_value_too_large(c: &Context<'_>) -> Check {
    let state = c.state()?;
    let key = c.key("a")?;
    let large = Bytes::from(vec![0; MAX_VALUE_BYTES + 1]);
    fails(state.put(&key, large, Precondition::Any, None).await, &[ErrorKind::Invalid], "a value over the limit")?;
    ensure!(state.get(&key).await?.is_none(), "a refused write made a record");
    Ok(())
}

pub(super) async fn state_delete(c: &Context<'_>) -> Check {
    let state = c.state()?;
    let (key, beside) = (c.key("a")?, c.key("a.b")?);
    for key in [&key, &beside] {
        state.put(key, Bytes::from_static(b"x"), Precondition::Any, None).await?;
    }
    let deletion = state.delete(&key, Precondition::Any).await?;
    ensure!(deletion == Deletion::Deleted, "deleting a record gave {deletion:?}");
    ensure!(state.get(&key).await?.is_none(), "a deleted record is still there");
    ensure!(state.get(&beside).await?.is_some(), "the record beside it is gone too");
    let deletion = state.delete(&key, Precondition::Any).await?;
    ensure!(deletion == Deletion::AlreadyGone, "deleting it again gave {deletion:?}");
    Ok(())
}

pub(super) async fn state_delete_version(c: &Context<'_>) -> Check {
    let state = c.state()?;
    let key = c.key("a")?;
    let one = state.put(&key, Bytes::from_static(b"one"), Precondition::Any, None).await?;
    let two = state.put(&key, Bytes::from_static(b"two"), Precondition::Any, None).await?;
    let result = state.delete(&key, Precondition::Version(one)).await;
    fails(result, &[ErrorKind::Conflict], "deleting another version")?;
    holds(state.as_ref(), &key, "two", two).await?;
    state.delete(&key, Precondition::Version(two)).await?;
    ensure!(state.get(&key).await?.is_none(), "a deleted record is still there");
    let result = state.delete(&key, Precondition::Version(two)).await;
    fails(result, &[ErrorKind::Conflict], "deleting a version of what is gone")?;
    Ok(())
}

pub(super) async fn state_delete_absent(c: &Context<'_>) -> Check {
    let state = c.state()?;
    let key = c.key("a")?;
    let version = state.put(&key, Bytes::from_static(b"one"), Precondition::Any, None).await?;
    for key in [&key, &c.key("never")?] {
        fails(state.delete(key, Precondition::Absent).await, &[ErrorKind::Invalid], "deleting what must be absent")?;
    }
    holds(state.as_ref(), &key, "one", version).await
}

pub(super) async fn state_list_pages(c: &Context<'_>) -> Check {
    let state = c.state()?;
    let mut wanted = Vec::new();
    // Written out of order; `/` and `:` lie on either side of the digits.
    for suffix in ["p/9", "p/10", "p/a/b", "p/a", "p/B", "p/1", "p/a:", "p/a.b", "p/2"] {
        let key = c.key(suffix)?;
        state.put(&key, Bytes::from(suffix), Precondition::Any, None).await?;
        wanted.push((key, suffix));
    }
    wanted.sort();
    let prefix = c.key("p")?.to_string() + "/";
    for limit in [1, 2, 9, MAX_PAGE] {
        let mut found = Vec::new();
        let mut after: Option<Key> = None;
        loop {
            let page = state.list(&prefix, after.as_ref(), limit).await?;
            ensure!(page.len() <= limit, "a page of at most {limit} has {} records", page.len());
            ensure!(found.len() <= wanted.len(), "there is no end of pages of {limit}");
            let Some((last, _)) = page.last() else { break };
            after = Some(last.clone());
            found.extend(page);
        }
        let keys: Vec<_> = found.iter().map(|(key, record)| (key.clone(), record.value.clone())).collect();
        let right: Vec<_> = wanted.iter().map(|(key, text)| (key.clone(), Bytes::from(*text))).collect();
        ensure!(keys == right, "pages of {limit} give {keys:?} instead of {right:?}");
        for (key, record) in found {
            let seen = state.get(&key).await?.map(|record| record.version);
            ensure!(seen == Some(record.version), "list says {:?} of {key}, get {seen:?}", record.version);
        }
    }
    Ok(())
}

pub(super) async fn state_list_prefix(c: &Context<'_>) -> Check {
    let state = c.state()?;
    for suffix in ["a/b", "a/bc", "a/b/c", "a/c", "a/B", "a", "b"] {
        state.put(&c.key(suffix)?, Bytes::new(), Precondition::Any, None).await?;
    }
    let base = c.key("x")?.to_string();
    let base = base.trim_end_matches('x');
    let rows: [(&str, &[&str]); 5] = [
        ("a/b", &["a/b", "a/b/c", "a/bc"]),
        ("a/b/", &["a/b/c"]),
        ("a", &["a", "a/B", "a/b", "a/b/c", "a/bc", "a/c"]),
        ("c", &[]),
        ("", &["a", "a/B", "a/b", "a/b/c", "a/bc", "a/c", "b"]),
    ];
    for (prefix, wanted) in rows {
        let page = state.list(&format!("{base}{prefix}"), None, 100).await?;
        let found: Vec<_> = page.iter().map(|(key, _)| key.as_str().strip_prefix(base).unwrap_or("?")).collect();
        ensure!(found == wanted, "the prefix {prefix:?} gives {found:?} instead of {wanted:?}");
    }
    // `after` may lie before, inside and behind the prefix.
    for (after, wanted) in [("a", 3), ("a/b", 2), ("a/bd", 0), ("b", 0)] {
        let page = state.list(&format!("{base}a/b"), Some(&c.key(after)?), 100).await?;
        ensure!(page.len() == wanted, "after {after:?} come {} records instead of {wanted}", page.len());
    }
    Ok(())
}

pub(super) async fn state_list_limit(c: &Context<'_>) -> Check {
    let prefix = c.key("a")?.to_string();
    for limit in [0, MAX_PAGE + 1] {
        let result = c.state()?.list(&prefix, None, limit).await;
        fails(result, &[ErrorKind::Invalid], &format!("a page of at most {limit}"))?;
    }
    Ok(())
}
