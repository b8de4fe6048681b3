//! Records kept wrongly.

use std::time::Duration;

use super::{World, lock, mutants};
use crate::{
    Deletion, Error, ErrorKind, Key, Precondition, Result, StateStore, Version, Versioned,
    error::reason,
    state::{MAX_PAGE, MAX_VALUE_BYTES},
};

/// A version as a store sees it that counts each record from 1 again.
fn counted(w: &World, key: &Key, version: Version) -> Version {
    Version(version.0 - lock(&w.0.versions).get(key).copied().unwrap_or(0))
}

fn uncounted(w: &World, key: &Key, only: Precondition) -> Precondition {
    match only {
        Precondition::Version(version) => {
            Precondition::Version(Version(version.0 + lock(&w.0.versions).get(key).copied().unwrap_or(0)))
        }
        only => only,
    }
}

/// The record as it was before this write, or nothing.
async fn old(w: &World, key: &Key) -> Result<Option<Version>> {
    Ok(w.state().get(key).await?.map(|record| record.version))
}

mutants! { State
    "values are cut at 64 KiB" fails [state_roundtrip] {
        put: |w, (key, mut value, only, ttl)| {
            if value.len() <= MAX_VALUE_BYTES {
                value.truncate(64 << 10);
            }
            w.state().put(&key, value, only, ttl).await
        }
    }
    "an empty value is no record" fails [state_roundtrip] {
        get: |w, key| Ok(w.state().get(&key).await?.filter(|record| !record.value.is_empty()))
    }
    "keys are cut at 256 bytes" fails [state_roundtrip] {
        get: |w, key| w.state().get(&Key::new(&key.as_str()[..key.as_str().len().min(256)])?).await,
        put: |w, (key, value, only, ttl)| {
            w.state().put(&Key::new(&key.as_str()[..key.as_str().len().min(256)])?, value, only, ttl).await
        }
    }
    "another version is read than was written" fails [
        state_roundtrip state_put_absent state_put_version state_put_race state_delete_version state_delete_absent
        state_list_pages
    ] {
        get: |w, key| {
            let record = w.state().get(&key).await?;
            Ok(record.map(|record| Versioned { version: Version(record.version.0 + 1), ..record }))
        }
    }
    "what was never written is empty" fails [
        state_get_missing state_roundtrip state_versions_grow state_put_version state_ttl state_ttl_cleared
        state_value_too_large state_delete state_delete_version
    ] {
        get: |w, key| {
            let nothing = Versioned { value: bytes::Bytes::new(), version: Version(0) };
            Ok(Some(w.state().get(&key).await?.unwrap_or(nothing)))
        }
    }
    "versions begin again after a deletion" fails [state_versions_grow] {
        get: |w, key| {
            let record = w.state().get(&key).await?;
            Ok(record.map(|record| Versioned { version: counted(&w, &key, record.version), ..record }))
        },
        put: |w, (key, value, only, ttl)| {
            let version = w.state().put(&key, value, uncounted(&w, &key, only), ttl).await?;
            Ok(counted(&w, &key, version))
        },
        delete: |w, (key, only)| {
            let before = old(&w, &key).await?;
            let deletion = w.state().delete(&key, uncounted(&w, &key, only)).await?;
            if let (Deletion::Deleted, Some(version)) = (deletion, before) {
                lock(&w.0.versions).insert(key, version.0);
            }
            Ok(deletion)
        },
        list: |w, (prefix, after, limit)| {
            let page = w.state().list(&prefix, after.as_ref(), limit).await?;
            let row = |(key, record): (Key, Versioned)| {
                let version = counted(&w, &key, record.version);
                (key, Versioned { version, ..record })
            };
            Ok(page.into_iter().map(row).collect())
        }
    }
    "absent is ignored" fails [state_put_absent state_put_race] {
        put: |w, (key, value, only, ttl)| {
            let only = if only == Precondition::Absent { Precondition::Any } else { only };
            w.state().put(&key, value, only, ttl).await
        }
    }
    "absent is a conflict" fails [state_put_absent] {
        put: |w, (key, value, only, ttl)| {
            super::swap(w.state().put(&key, value, only, ttl).await, ErrorKind::AlreadyExists, ErrorKind::Conflict)
        }
    }
    "a refused write has its effect" fails [state_put_absent state_put_version state_put_race] {
        put: |w, (key, value, only, ttl)| {
            let result = w.state().put(&key, value.clone(), only, ttl).await;
            if result.is_err() && value.len() <= MAX_VALUE_BYTES {
                w.state().put(&key, value, Precondition::Any, ttl).await?;
            }
            result
        }
    }
    "versions are ignored" fails [state_put_version state_put_race] {
        put: |w, (key, value, only, ttl)| {
            let only = if let Precondition::Version(_) = only { Precondition::Any } else { only };
            w.state().put(&key, value, only, ttl).await
        }
    }
    "a version of what is not there makes it" fails [state_put_version] {
        put: |w, (key, value, only, ttl)| match (only, old(&w, &key).await?) {
            (Precondition::Version(_), None) => w.state().put(&key, value, Precondition::Absent, ttl).await,
            _ => w.state().put(&key, value, only, ttl).await,
        }
    }
    "newer versions match older ones" fails [state_put_version] {
        put: |w, (key, value, only, ttl)| match (only, old(&w, &key).await?) {
            (Precondition::Version(wanted), Some(there)) if wanted > there => {
                w.state().put(&key, value, Precondition::Version(there), ttl).await
            }
            _ => w.state().put(&key, value, only, ttl).await,
        }
    }
    "another version has no reason" fails [state_put_version] {
        put: |w, (key, value, only, ttl)| {
            let result = w.state().put(&key, value, only, ttl).await;
            result.map_err(|error| match error.reason() {
                Some(reason::VERSION_MISMATCH) => Error::new(error.kind(), error.message()),
                _ => error,
            })
        }
    }
    "a condition is looked at first and the record written later" fails [state_put_race] {
        put: |w, (key, value, only, ttl)| {
            let there = old(&w, &key).await?;
            tokio::task::yield_now().await;
            let holds = match only {
                Precondition::Any => true,
                Precondition::Absent => there.is_none(),
                Precondition::Version(version) => there == Some(version),
            };
            w.state().put(&key, value, if holds { Precondition::Any } else { only }, ttl).await
        }
    }
    "the time to live is ignored" fails [state_versions_grow state_ttl state_ttl_cleared] {
        put: |w, (key, value, only, _)| w.state().put(&key, value, only, None).await
    }
    "records die young" fails [state_versions_grow state_ttl state_ttl_cleared] {
        put: |w, (key, value, only, ttl)| w.state().put(&key, value, only, ttl.map(|ttl| ttl / 2)).await
    }
    "times to live are whole seconds, rounded down" fails [state_versions_grow state_ttl state_ttl_cleared] {
        put: |w, (key, value, only, ttl)| {
            let ttl = ttl.map(|ttl| Duration::from_secs(ttl.as_secs()));
            w.state().put(&key, value, only, ttl).await
        }
    }
    "a record that has expired is listed" fails [state_ttl leaves_nothing] {
        put: |w, (key, value, only, ttl)| {
            let version = w.state().put(&key, value, only, ttl).await?;
            match ttl {
                Some(_) => lock(&w.0.versions).insert(key, version.0),
                None => lock(&w.0.versions).remove(&key),
            };
            Ok(version)
        },
        list: |w, (prefix, after, limit)| {
            let mut page = w.state().list(&prefix, after.as_ref(), limit).await?;
            for (key, version) in lock(&w.0.versions).iter().filter(|(key, _)| key.as_str().starts_with(&prefix)) {
                if page.iter().all(|(there, _)| there != key) {
                    page.push((key.clone(), Versioned { value: bytes::Bytes::new(), version: Version(*version) }));
                }
            }
            Ok(page)
        }
    }
    "an earlier time to live stays" fails [state_ttl_cleared] {
        put: |w, (key, value, only, ttl)| {
            let mortal = lock(&w.0.versions).contains_key(&key) && w.state().get(&key).await?.is_some();
            if ttl.is_some() {
                lock(&w.0.versions).insert(key.clone(), 0);
            }
            let ttl = if mortal { ttl.or(Some(Duration::from_millis(700))) } else { ttl };
            w.state().put(&key, value, only, ttl).await
        }
    }
    "values over the limit are cut" fails [state_value_too_large] {
        put: |w, (key, mut value, only, ttl)| {
            value.truncate(MAX_VALUE_BYTES);
            w.state().put(&key, value, only, ttl).await
        }
    }
    "a value over the limit is refused and kept" fails [state_value_too_large] {
        put: |w, (key, value, only, ttl)| {
            let result = w.state().put(&key, value, only, ttl).await;
            if result.as_ref().is_err_and(|error| error.kind() == ErrorKind::Invalid) {
                w.state().put(&key, bytes::Bytes::new(), only, ttl).await?;
            }
            result
        }
    }
    "deleting a record that is gone is an error" fails [state_ttl state_delete] {
        delete: |w, (key, only)| match w.state().delete(&key, only).await? {
            Deletion::AlreadyGone => Err(Error::not_found("no such record")),
            deleted => Ok(deleted),
        }
    }
    "delete takes a key for a beginning" fails [state_delete] {
        delete: |w, (key, only)| {
            let deletion = w.state().delete(&key, only).await?;
            for (below, _) in w.state().list(key.as_str(), None, MAX_PAGE).await? {
                w.state().delete(&below, Precondition::Any).await?;
            }
            Ok(deletion)
        }
    }
    "every deletion is called one" fails [state_ttl state_delete] {
        delete: |w, (key, only)| w.state().delete(&key, only).await.map(|_| Deletion::Deleted)
    }
    "delete ignores the version" fails [state_delete_version] {
        delete: |w, (key, only)| {
            let only = if let Precondition::Version(_) = only { Precondition::Any } else { only };
            w.state().delete(&key, only).await
        }
    }
    "deleting a version of what is gone is fine" fails [state_delete_version] {
        delete: |w, (key, only)| match (only, old(&w, &key).await?) {
            (Precondition::Version(_), None) => Ok(Deletion::AlreadyGone),
            _ => w.state().delete(&key, only).await,
        }
    }
    "deleting what must be absent deletes it" fails [state_delete_absent] {
        delete: |w, (key, only)| {
            let only = if only == Precondition::Absent { Precondition::Any } else { only };
            w.state().delete(&key, only).await
        }
    }
    "deleting what must be absent is fine where it is" fails [state_delete_absent] {
        delete: |w, (key, only)| match (only, old(&w, &key).await?) {
            (Precondition::Absent, None) => Ok(Deletion::AlreadyGone),
            _ => w.state().delete(&key, only).await,
        }
    }
    "lists are in another order" fails [state_list_pages state_list_prefix] {
        list: |w, (prefix, after, limit)| {
            let mut page = w.state().list(&prefix, after.as_ref(), limit).await?;
            page.reverse();
            Ok(page)
        }
    }
    "a page begins with the last one's end" fails [state_list_pages state_list_prefix] {
        list: |w, (prefix, after, limit)| {
            let mut page = w.state().list(&prefix, after.as_ref(), limit).await?;
            if let Some(after) = after
                && after.as_str().starts_with(&prefix)
                && let Some(record) = w.state().get(&after).await?
            {
                page.insert(0, (after, record));
                page.truncate(limit);
            }
            Ok(page)
        }
    }
    "a page has one record too many" fails [state_list_pages] {
        list: |w, (prefix, after, limit)| {
            let limit = if (1..MAX_PAGE).contains(&limit) { limit + 1 } else { limit };
            w.state().list(&prefix, after.as_ref(), limit).await
        }
    }
    "a prefix is made of whole parts" fails [state_list_prefix] {
        list: |w, (prefix, after, limit)| {
            let mut page = w.state().list(&prefix, after.as_ref(), limit).await?;
            page.retain(|(key, _)| {
                let rest = &key.as_str()[prefix.len()..];
                prefix.ends_with('/') || rest.is_empty() || rest.starts_with('/')
            });
            Ok(page)
        }
    }
    "a prefix's case is ignored" fails [state_list_prefix] {
        list: |w, (prefix, after, limit)| {
            // Only what is read in one go can be filtered here.
            if !(100..=MAX_PAGE).contains(&limit) {
                return w.state().list(&prefix, after.as_ref(), limit).await;
            }
            let folder = &prefix[..prefix.rfind('/').map_or(0, |at| at + 1)];
            let mut page = w.state().list(folder, after.as_ref(), limit).await?;
            page.retain(|(key, _)| key.as_str().to_lowercase().starts_with(&prefix.to_lowercase()));
            Ok(page)
        }
    }
    "a page's bounds are made possible" fails [state_list_limit] {
        list: |w, (prefix, after, limit)| w.state().list(&prefix, after.as_ref(), limit.clamp(1, MAX_PAGE)).await
    }
}
