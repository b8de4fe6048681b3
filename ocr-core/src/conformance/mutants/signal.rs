//! Notices carried wrongly.

use bytes::Bytes;
use futures::{FutureExt, StreamExt, future, stream};

use super::{lock, mutants};
use crate::{
    Error, Key, Result,
    signal::{MAX_NOTICE_BYTES, Notice, NoticeStream, Signals},
};

/// A topic that all topics end up in.
fn common() -> Result<Key> {
    Key::new("common")
}

mutants! { Signal
    "only the first listener hears" fails [signal_everyone signal_from_now_on signal_backlog signal_drop] {
        listen: |w, topic| {
            let heard = w.signals().listen(&topic).await?;
            if w.times(&topic) > 1 {
                return Ok(stream::pending().boxed());
            }
            Ok(heard)
        }
    }
    "all topics are one" fails [signal_topics] {
        send: |w, (_, payload)| w.signals().send(&common()?, payload).await,
        listen: |w, _| w.signals().listen(&common()?).await
    }
    "topics are taken for patterns of letters of any case" fails [signal_topics] {
        send: |w, (topic, payload)| w.signals().send(&Key::new(topic.as_str().to_lowercase())?, payload).await,
        listen: |w, topic| w.signals().listen(&Key::new(topic.as_str().to_lowercase())?).await
    }
    "sending to nobody fails" fails [signal_nobody] {
        send: |w, (topic, payload)| {
            if w.times(format_args!("listens {topic}")) == 1 && payload == "x" {
                return Err(Error::not_found("nobody listens"));
            }
            w.signals().send(&topic, payload).await
        }
    }
    "payloads are cut at 32 KiB" fails [signal_payload] {
        send: |w, (topic, mut payload)| {
            if payload.len() <= MAX_NOTICE_BYTES {
                payload.truncate(32 << 10);
            }
            w.signals().send(&topic, payload).await
        }
    }
    "an empty payload is not sent" fails [signal_payload] {
        send: |w, (topic, payload)| match payload.is_empty() {
            true => Ok(()),
            false => w.signals().send(&topic, payload).await,
        }
    }
    "payloads are text" fails [signal_payload] {
        send: |w, (topic, payload)| match payload.len() {
            0..=MAX_NOTICE_BYTES => {
                w.signals().send(&topic, Bytes::from(String::from_utf8_lossy(&payload).into_owned())).await
            }
            _ => w.signals().send(&topic, payload).await,
        }
    }
    "a payload that is too large is cut" fails [signal_payload_too_large] {
        send: |w, (topic, mut payload)| {
            payload.truncate(MAX_NOTICE_BYTES);
            w.signals().send(&topic, payload).await
        }
    }
    "what waits is heard from the newest on" fails [signal_order signal_backlog] {
        listen: |w, topic| {
            let heard = w.signals().listen(&topic).await?;
            Ok(heard.ready_chunks(64).flat_map(|chunk| stream::iter(chunk.into_iter().rev())).boxed())
        }
    }
    "what is like the last one is not heard" fails [signal_order signal_backlog] {
        listen: |w, topic| {
            let mut last = None;
            let heard = w.signals().listen(&topic).await?;
            let heard = heard.filter(move |notice| {
                let length = if let Notice::Payload(payload) = notice { payload.len() } else { 0 };
                let new = length == 0 || length > 2 || last.replace(length) != Some(length);
                future::ready(new)
            });
            Ok(heard.boxed())
        }
    }
    "who comes later hears the last notice" fails [signal_from_now_on signal_drop] {
        send: |w, (topic, payload)| {
            lock(&w.0.notices).insert(topic.clone(), payload.clone());
            w.signals().send(&topic, payload).await
        },
        listen: |w, topic| {
            let last = lock(&w.0.notices).get(&topic).cloned();
            let heard = w.signals().listen(&topic).await?;
            Ok(stream::iter(last.map(Notice::Payload)).chain(heard).boxed())
        }
    }
    "who is far behind is not told" fails [signal_backlog] {
        listen: |w, topic| {
            let heard = w.signals().listen(&topic).await?;
            Ok(heard.filter(|notice| future::ready(*notice != Notice::Gap)).boxed())
        }
    }
    "who is far behind hears no more" fails [signal_backlog] {
        listen: |w, topic| {
            let heard = w.signals().listen(&topic).await?;
            let until = heard.take_while(|notice| future::ready(*notice != Notice::Gap));
            Ok(until.chain(stream::once(future::ready(Notice::Gap))).chain(stream::pending()).boxed())
        }
    }
    "the backlog is endless" fails [signal_backlog] {
        listen: |w, topic| {
            let (keep, kept) = futures::channel::mpsc::unbounded();
            let heard = w.signals().listen(&topic).await?;
            tokio::spawn(heard.map(Ok).forward(keep).map(drop));
            Ok(kept.chain(stream::pending()).boxed())
        }
    }
    "who leaves takes the topic along" fails [signal_drop] {
        listen: |w, topic| {
            let heard = w.signals().listen(&topic).await?;
            let leaving = Leaving(w.clone(), topic);
            let heard: NoticeStream = heard.map(move |notice| { let _ = &leaving; notice }).boxed();
            Ok(heard)
        },
        send: |w, (topic, payload)| {
            let gone = lock(&w.0.notices).contains_key(&topic);
            if gone {
                return Ok(());
            }
            w.signals().send(&topic, payload).await
        }
    }
    "a stream ends after its first notice" fails [signal_everyone signal_topics signal_payload signal_order signal_from_now_on signal_backlog signal_drop] {
        listen: |w, topic| Ok(w.signals().listen(&topic).await?.take(1).boxed())
    }
}

/// Takes note when a listener is dropped.
struct Leaving(super::World, Key);

impl Drop for Leaving {
    fn drop(&mut self) {
        lock(&self.0.0.notices).insert(self.1.clone(), Bytes::new());
    }
}
