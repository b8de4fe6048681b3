//! For unit tests that look at what is logged.

use std::sync::Once;

use tracing::{Event, Metadata, Subscriber, span};

/// Call it before a subscriber of one's own is set for a thread. From then on the whole process has one that wants
/// everything and keeps nothing: without it, a line that another test's thread, where nobody listens, reaches first may be
/// switched off for all.
pub(crate) fn listen() {
    static LISTENS: Once = Once::new();
    LISTENS.call_once(|| drop(tracing::subscriber::set_global_default(Deaf)));
}

struct Deaf;

impl Subscriber for Deaf {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, _: &Event<'_>) {}

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}
