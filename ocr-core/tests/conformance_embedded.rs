//! The conformance suite over the embedded store.

#![cfg(all(feature = "conformance", feature = "embedded"))]

use std::sync::Arc;

use ocr_core::{
    conformance::{Subject, assert_all},
    state::embedded::EmbeddedStore,
};

#[tokio::test(flavor = "multi_thread")]
async fn the_embedded_store_conforms() {
    let folder = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::open(folder.path().join("state.redb")).unwrap();
    assert_all(&Subject { state: Some(Arc::new(store)), ..Subject::new() }).await;
}
