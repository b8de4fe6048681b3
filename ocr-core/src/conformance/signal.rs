//! Cases of [`Signals`](crate::signal::Signals).

use bytes::Bytes;
use futures::{FutureExt, StreamExt};

use super::context::{Broken, Check, Context, ensure, fails};
use crate::{
    ErrorKind,
    signal::{BACKLOG, MAX_NOTICE_BYTES, Notice, NoticeStream},
};

/// The next notice, which must come.
async fn next(c: &Context<'_>, listener: &mut NoticeStream) -> Check<Notice> {
    match tokio::time::timeout(c.deadline(), listener.next()).await {
        Ok(Some(notice)) => Ok(notice),
        Ok(None) => Err(Broken("a listener's stream ended".to_owned())),
        Err(_) => Err(Broken("a notice that was sent is not heard".to_owned())),
    }
}

async fn hears(c: &Context<'_>, listener: &mut NoticeStream, wanted: &'static str) -> Check {
    let heard = next(c, listener).await?;
    ensure!(heard == Notice::Payload(Bytes::from(wanted)), "{heard:?} is heard instead of {wanted:?}");
    Ok(())
}

fn hears_no_more(listener: &mut NoticeStream) -> Check {
    match listener.next().now_or_never() {
        None => Ok(()),
        Some(heard) => Err(Broken(format!("{heard:?} is heard, which was not sent there"))),
    }
}

pub(super) async fn signal_everyone(c: &Context<'_>) -> Check {
    let signals = c.signals()?;
    let topic = c.key("a")?;
    let mut listeners = [signals.listen(&topic).await?, signals.listen(&topic).await?, signals.listen(&topic).await?];
    signals.send(&topic, Bytes::from_static(b"all")).await?;
    for listener in &mut listeners {
        hears(c, listener, "all").await?;
        hears_no_more(listener)?;
    }
    Ok(())
}

pub(super) async fn signal_topics(c: &Context<'_>) -> Check {
    let signals = c.signals()?;
    let topics = [c.key("a")?, c.key("a.b")?, c.key("a/b")?, c.key("A")?];
    let mut listeners = Vec::new();
    for topic in &topics {
        listeners.push(signals.listen(topic).await?);
    }
    let payloads = ["of a", "of a.b", "of a/b", "of A"];
    for (topic, payload) in topics.iter().zip(payloads) {
        signals.send(topic, Bytes::from(payload)).await?;
    }
    for (listener, payload) in listeners.iter_mut().zip(payloads) {
        hears(c, listener, payload).await?;
    }
    listeners.iter_mut().try_for_each(hears_no_more)
}

pub(super) async fn signal_nobody(c: &Context<'_>) -> Check {
    let signals = c.signals()?;
    signals.send(&c.key("never")?, Bytes::from_static(b"x")).await?;
    let topic = c.key("left")?;
    drop(signals.listen(&topic).await?);
    signals.send(&topic, Bytes::from_static(b"x")).await?;
    Ok(())
}

pub(super) async fn signal_payload(c: &Context<'_>) -> Check {
    let signals = c.signals()?;
    let topic = c.key("a")?;
    let mut listener = signals.listen(&topic).await?;
    let all_bytes: Vec<u8> = (0..=255).collect();
    for wanted in [Vec::new(), all_bytes, super::guest::noise(MAX_NOTICE_BYTES)] {
        signals.send(&topic, Bytes::from(wanted.clone())).await?;
        match next(c, &mut listener).await? {
            Notice::Payload(heard) if heard == wanted => {}
            Notice::Payload(heard) => {
                return Err(Broken(format!("{} bytes arrived instead of the {} sent", heard.len(), wanted.len())));
            }
            Notice::Gap => return Err(Broken("a gap is heard where nothing is missing".to_owned())),
        }
    }
    Ok(())
}

pub(super) async fn signal_payload_too_large(c: &Context<'_>) -> Check {
    let large = Bytes::from(vec![0; MAX_NOTICE_BYTES + 1]);
    fails(c.signals()?.send(&c.key("a")?, large).await, &[ErrorKind::Invalid], "a payload over the limit")?;
    Ok(())
}

pub(super) async fn signal_order(c: &Context<'_>) -> Check {
    let signals = c.signals()?;
    let topic = c.key("a")?;
    let mut listener = signals.listen(&topic).await?;
    for number in 0..100 {
        signals.send(&topic, Bytes::from(number.to_string())).await?;
    }
    for number in 0..100 {
        let heard = next(c, &mut listener).await?;
        let wanted = Notice::Payload(Bytes::from(number.to_string()));
        ensure!(heard == wanted, "{heard:?} is heard instead of {wanted:?}");
    }
    hears_no_more(&mut listener)
}

pub(super) async fn signal_from_now_on(c: &Context<'_>) -> Check {
    let signals = c.signals()?;
    let topic = c.key("a")?;
    let mut early = signals.listen(&topic).await?;
    signals.send(&topic, Bytes::from_static(b"before")).await?;
    hears(c, &mut early, "before").await?;
    let mut late = signals.listen(&topic).await?;
    signals.send(&topic, Bytes::from_static(b"after")).await?;
    hears(c, &mut late, "after").await?;
    hears(c, &mut early, "after").await?;
    hears_no_more(&mut late)
}

pub(super) async fn signal_backlog(c: &Context<'_>) -> Check {
    let signals = c.signals()?;
    let topic = c.key("a")?;
    let (mut slow, mut fast) = (signals.listen(&topic).await?, signals.listen(&topic).await?);
    let last = BACKLOG + 10;
    for number in 0..=last {
        signals.send(&topic, Bytes::from(number.to_string())).await?;
        let heard = next(c, &mut fast).await?;
        let wanted = Notice::Payload(Bytes::from(number.to_string()));
        ensure!(heard == wanted, "who keeps up hears {heard:?} instead of {wanted:?}");
    }
    let mut gaps = 0;
    let mut wanted = None;
    loop {
        match next(c, &mut slow).await? {
            Notice::Gap => gaps += 1,
            Notice::Payload(payload) => {
                let number = std::str::from_utf8(&payload).ok().and_then(|text| text.parse::<usize>().ok());
                ensure!(gaps == 1, "after {gaps} gaps {number:?} is heard");
                ensure!(
                    number.is_some() && (wanted.is_none() || number == wanted),
                    "{number:?} is heard, not {wanted:?}"
                );
                if number == Some(last) {
                    return hears_no_more(&mut slow);
                }
                wanted = number.map(|number| number + 1);
            }
        }
    }
}

pub(super) async fn signal_drop(c: &Context<'_>) -> Check {
    let signals = c.signals()?;
    let topic = c.key("a")?;
    let mut stays = signals.listen(&topic).await?;
    let leaves = signals.listen(&topic).await?;
    drop(leaves);
    signals.send(&topic, Bytes::from_static(b"one")).await?;
    hears(c, &mut stays, "one").await?;
    drop(stays);
    let mut again = signals.listen(&topic).await?;
    signals.send(&topic, Bytes::from_static(b"two")).await?;
    hears(c, &mut again, "two").await?;
    hears_no_more(&mut again)
}
