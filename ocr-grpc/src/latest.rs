//! [`Latest`]: of the values that wait for a slow reader, the newest.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use futures::Stream;

/// How many waiting values one poll passes over before it lets others run.
const MAX_SKIPPED: usize = 64;

/// Yields the newest of the values that are ready, then the end or the error. It holds one value at most.
#[derive(Debug)]
pub(crate) struct Latest<S, T, E> {
    /// `None` after the end.
    inner: Option<S>,
    /// The newest value of a poll that stopped at [`MAX_SKIPPED`].
    newest: Option<T>,
    /// An error that came right behind a value.
    error: Option<E>,
}

impl<S, T, E> Latest<S, T, E> {
    pub(crate) fn new(inner: S) -> Self {
        Self { inner: Some(inner), newest: None, error: None }
    }
}

impl<S, T, E> Stream for Latest<S, T, E>
where
    S: Stream<Item = Result<T, E>> + Unpin,
    T: Unpin,
    E: Unpin,
{
    type Item = Result<T, E>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        for _ in 0..MAX_SKIPPED {
            let Some(inner) = &mut this.inner else {
                let value = this.newest.take().map(Ok);
                return Poll::Ready(value.or_else(|| this.error.take().map(Err)));
            };
            match Pin::new(inner).poll_next(cx) {
                Poll::Ready(Some(Ok(value))) => this.newest = Some(value),
                // The source is dropped at its end, not when the reader gets there.
                Poll::Ready(Some(Err(error))) => (this.error, this.inner) = (Some(error), None),
                Poll::Ready(None) => this.inner = None,
                Poll::Pending => {
                    return this.newest.take().map_or(Poll::Pending, |value| Poll::Ready(Some(Ok(value))));
                }
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use futures::{StreamExt as _, executor::block_on, stream};
    use proptest::prelude::*;
    use tokio::sync::mpsc;

    use super::*;

    fn channel() -> (mpsc::UnboundedSender<Result<u32, &'static str>>, impl Stream<Item = Result<u32, &'static str>>) {
        let (sender, mut receiver) = mpsc::unbounded_channel();
        (sender, Latest::new(stream::poll_fn(move |cx| receiver.poll_recv(cx))))
    }

    #[test]
    fn a_slow_reader_gets_the_newest_and_then_the_error() {
        let (sender, mut values) = channel();
        for value in [1, 2, 3] {
            sender.send(Ok(value)).unwrap();
        }
        assert_eq!(block_on(values.next()), Some(Ok(3)));
        sender.send(Ok(4)).unwrap();
        sender.send(Err("gone")).unwrap();
        sender.send(Ok(5)).unwrap_or_default();
        assert_eq!(block_on(values.collect::<Vec<_>>()), [Ok(4), Err("gone")]);
    }

    #[test]
    fn the_source_is_dropped_at_once_with_the_stream_and_at_its_end() {
        let (sender, values) = channel();
        drop(values);
        assert!(sender.is_closed());

        let (sender, mut values) = channel();
        sender.send(Ok(1)).unwrap();
        sender.send(Err("gone")).unwrap();
        assert_eq!(block_on(values.next()), Some(Ok(1)));
        assert!(sender.is_closed());
    }

    proptest! {
        #[test]
        fn what_is_read_is_in_order_and_ends_with_the_newest(bursts in prop::collection::vec(1_u32..200, 0..8)) {
            let (sender, mut values) = channel();
            let mut sent = 0;
            for burst in bursts {
                for _ in 0..burst {
                    sent += 1;
                    sender.send(Ok(sent)).unwrap();
                }
                prop_assert_eq!(block_on(values.next()), Some(Ok(sent)));
            }
            drop(sender);
            prop_assert_eq!(block_on(values.next()), None);
        }
    }
}
