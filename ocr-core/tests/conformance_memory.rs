//! What a user of the library sees: the suite over the memory backend, through the public interface alone.
#![cfg(feature = "conformance")]

use std::sync::Arc;

use ocr_core::{
    ComputeBackend, Error, GuestExecExt,
    conformance::{Outcome, SWEEP, Subject, Trait, assert_all, cases, run, run_observed},
    memory::{Fault, MemoryCloud, MemoryState},
};

#[tokio::test(start_paused = true)]
async fn memory_conforms() {
    let (cloud, state) = (MemoryCloud::new(), MemoryState::new());
    assert_all(&Subject::memory(&cloud, &state)).await;
}

#[tokio::test(start_paused = true)]
async fn a_run_tells_of_each_case_as_it_ends() {
    let subject = Subject::memory(&MemoryCloud::new(), &MemoryState::new());
    let mut seen = Vec::new();
    let report = run_observed(&subject, |case| case.subject == Trait::State, |case| seen.push(case.name)).await;
    let wanted: Vec<_> = cases().iter().filter(|case| case.subject == Trait::State).map(|case| case.name).collect();
    assert_eq!(seen.split_last(), Some((&SWEEP, wanted.as_slice())));
    assert_eq!((report.cases.len(), report.failed()), (seen.len(), 0), "{report}");
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_is_lent_is_given_back_clean() {
    let cloud = MemoryCloud::new();
    let vm = cloud.create_vm(&MemoryCloud::tiny_spec("lent")).await.unwrap().id;
    // The first case that leaves a file behind because its own removal fails.
    cloud.fault("guest.remove_files", 1, Fault::Before(Error::unavailable("not now")));
    let guest = Arc::new(cloud.clone());
    let subject = Subject { guest: Some(guest), guest_vm: Some(vm), ..Subject::new() };
    let report = run(&subject, |case| case.name == "guest_put_roundtrip").await;
    assert_eq!(report.failures(), ["guest_put_roundtrip"], "{report}");
    let left = cloud.shell(vm, "ls -A /tmp").await.unwrap();
    assert_eq!(left.stdout, "", "the sweep removed what the case left");
    let report = run(&subject, |case| case.subject == Trait::Guest).await;
    assert_eq!(report.failed(), 0, "{report}");
    assert!(cloud.get_vm(vm).await.is_ok(), "the machine stays");
}

#[tokio::test(start_paused = true)]
async fn a_trait_that_is_not_offered_is_ignored_and_not_passed() {
    let cloud = MemoryCloud::new();
    let subject = Subject { guest: None, ..Subject::memory(&cloud, &MemoryState::new()) };
    let report = run(&subject, |_| true).await;
    for case in report.cases.iter().filter(|case| case.subject == Some(Trait::Guest)) {
        assert_eq!(case.outcome, Outcome::Ignored("the trait is not offered: guest".to_owned()), "{}", case.name);
    }
    assert_eq!(report.failed(), 0, "{report}");
}
