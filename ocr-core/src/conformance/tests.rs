//! The suite against itself: the traits' documentation, the memory backend, and the mutants.

use std::collections::BTreeSet;

use super::*;
use crate::{
    Deletion, Key, Precondition, Version, Versioned,
    memory::{MemoryCloud, MemoryOptions, MemoryState},
};

/// Where the traits are, each with the beginning of its cases' names.
const TRAITS: [(&str, &str); 6] = [
    ("vm_", include_str!("../compute.rs")),
    ("net_", include_str!("../network.rs")),
    ("image_", include_str!("../image.rs")),
    ("guest_", include_str!("../guest.rs")),
    ("state_", include_str!("../state.rs")),
    ("signal_", include_str!("../signal.rs")),
];

/// The documentation's points, one text each: from a `- ` to the next, or to the end of the comment.
fn points(source: &str) -> Vec<String> {
    let mut points: Vec<String> = Vec::new();
    let mut open = false;
    for line in source.lines() {
        let Some(text) = line.trim().strip_prefix("///").map(str::trim) else {
            open = false;
            continue;
        };
        if text.is_empty() {
            open = false;
        } else if let Some(begin) = text.strip_prefix("- ") {
            points.push(begin.to_owned());
            open = true;
        } else if open && let Some(last) = points.last_mut() {
            last.push(' ');
            last.push_str(text);
        } else {
            // Running text: a MUST there has a case too.
            points.push(text.to_owned());
        }
    }
    points
}

fn marks(text: &str) -> Vec<&str> {
    text.split("[case: ").skip(1).filter_map(|rest| rest.split(']').next()).collect()
}

#[test]
fn every_must_names_a_case_and_every_case_is_named_by_a_must() {
    let mut named = BTreeSet::<String>::new();
    for (begin, source) in TRAITS {
        for point in points(source) {
            // Each MUST is followed by the case that shows it.
            for after in point.split("MUST ").skip(1).filter(|_| !point.contains("Each MUST")) {
                let rest = &point[point.find(after).unwrap()..];
                assert!(!marks(rest).is_empty(), "a MUST without a case: {point}");
            }
            for mark in marks(&point) {
                assert!(point.contains("MUST "), "a case without a MUST: {point}");
                assert!(mark.starts_with(begin), "{mark} is named by another trait");
                assert!(named.insert(mark.to_owned()), "{mark} is named twice");
            }
        }
    }
    let cases: BTreeSet<_> = cases().iter().map(|case| case.name.to_owned()).collect();
    assert_eq!(cases.len(), super::cases().len(), "two cases have one name");
    assert_eq!(cases, named);
}

async fn report(options: MemoryOptions) -> Report {
    let cloud = MemoryCloud::with(options);
    run(&Subject::memory(&cloud, &MemoryState::new()), |_| true).await
}

#[tokio::test(start_paused = true)]
async fn memory_passes_every_case_with_all_capabilities_or_with_none() {
    let (all, less) = (report(MemoryOptions::default()).await, report(with_less(MemoryOptions::default())).await);
    assert_eq!((all.failed(), less.failed()), (0, 0), "{all}\n{less}");
    for (all, less) in all.cases.iter().zip(&less.cases) {
        let passed = all.outcome == Outcome::Passed || less.outcome == Outcome::Passed;
        assert!(passed, "{} never ran: {:?}, {:?}", all.name, all.outcome, less.outcome);
    }
    let ignored: Vec<_> =
        all.cases.iter().filter(|case| case.outcome != Outcome::Passed).map(|case| case.name).collect();
    assert!(ignored.iter().all(|name| name.ends_with("_unsupported")), "{ignored:?}");
}

#[tokio::test(start_paused = true)]
async fn memory_passes_when_everything_takes_time() {
    let options = MemoryOptions {
        boot_time: Duration::from_secs(7),
        agent_time: Duration::from_secs(9),
        delete_time: Duration::from_secs(5),
        ..MemoryOptions::default()
    };
    let report = report(options).await;
    assert_eq!(report.failed(), 0, "{report}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_passes_with_cases_at_once_in_real_time() {
    let cloud = MemoryCloud::new();
    assert_all(&Subject { parallel: 16, ..Subject::memory(&cloud, &MemoryState::new()) }).await;
}

#[tokio::test(start_paused = true)]
async fn a_case_that_hangs_fails_alone() {
    let cloud = MemoryCloud::new();
    cloud.fault("compute.get_vm", 1, crate::memory::Fault::Hang);
    let subject = Subject::memory(&cloud, &MemoryState::new());
    let report = run(&subject, |case| case.subject == Trait::Compute).await;
    assert_eq!(report.failures(), ["vm_create_visible"], "{report}");
    assert!(report.to_string().contains("no end after 360 s"), "{report}");
}

/// A store that panics when it is read.
#[derive(Debug)]
struct Panics(MemoryState);

#[async_trait::async_trait]
impl StateStore for Panics {
    async fn get(&self, _: &Key) -> crate::Result<Option<Versioned>> {
        panic!("on purpose")
    }

    async fn put(
        &self,
        key: &Key,
        value: bytes::Bytes,
        only: Precondition,
        ttl: Option<Duration>,
    ) -> crate::Result<Version> {
        self.0.put(key, value, only, ttl).await
    }

    async fn delete(&self, key: &Key, only: Precondition) -> crate::Result<Deletion> {
        self.0.delete(key, only).await
    }

    async fn list(&self, prefix: &str, after: Option<&Key>, limit: usize) -> crate::Result<Vec<(Key, Versioned)>> {
        self.0.list(prefix, after, limit).await
    }
}

#[tokio::test(start_paused = true)]
async fn a_case_that_panics_fails_alone_and_is_cleaned_up() {
    let store = MemoryState::new();
    let subject = Subject { state: Some(Arc::new(Panics(store.clone()))), ..Subject::new() };
    let report = run(&subject, |case| ["state_delete", "state_list_prefix"].contains(&case.name)).await;
    assert_eq!(report.failures(), ["state_delete"], "{report}");
    assert!(report.to_string().contains("panicked"), "{report}");
    assert!(store.list("", None, 10).await.unwrap().is_empty());
}

#[tokio::test(start_paused = true)]
async fn what_is_left_is_told_and_deleted() {
    let cloud = MemoryCloud::new();
    // The first case cannot delete its machine, the sweep can.
    cloud.fault("compute.delete_vm", 1, crate::memory::Fault::Before(crate::Error::unavailable("not now")));
    let subject = Subject { deadline: Duration::from_secs(1), ..Subject::memory(&cloud, &MemoryState::new()) };
    let report = run(&subject, |case| case.name == "vm_create_visible").await;
    assert_eq!(report.failures(), [SWEEP], "{report}");
    assert!(cloud.list_vms(&crate::VmFilter::default()).await.unwrap().is_empty());
}

#[tokio::test]
async fn nothing_offered_is_nothing_passed() {
    let report = run(&Subject::new(), |_| true).await;
    assert_eq!((report.passed(), report.failed(), report.ignored()), (1, 0, cases().len()));
    let panic = AssertUnwindSafe(assert_all(&Subject::new())).catch_unwind().await;
    assert!(panic.is_err(), "a test of nothing passed");
}

#[tokio::test]
async fn a_report_is_a_table_and_json() {
    let cloud = MemoryCloud::new();
    cloud.fault("compute.get_vm", 1, crate::memory::Fault::Before(crate::Error::internal("broken")));
    let subject = Subject { image: None, ..Subject::memory(&cloud, &MemoryState::new()) };
    let names = ["vm_get_missing", "vm_list_empty", "image_get_missing"];
    let report = run(&subject, |case| names.contains(&case.name)).await;
    let text = report.to_string();
    for wanted in [
        "FAILED   vm_get_missing",
        "passed   vm_list_empty",
        "ignored  image_get_missing",
        "2 passed, 1 failed, 1 ignored",
    ] {
        assert!(text.contains(wanted), "{wanted:?} is not in\n{text}");
    }
    let json = report.to_json();
    assert_eq!(
        (json["passed"].as_u64(), json["failed"].as_u64(), json["ignored"].as_u64()),
        (Some(2), Some(1), Some(1))
    );
    assert_eq!(json["cases"][0]["name"], "vm_get_missing");
    assert_eq!(json["cases"][0]["trait"], "compute");
    assert_eq!(json["cases"][0]["outcome"], "failed");
    assert!(json["cases"][0]["why"].as_str().unwrap().contains("broken"));
}

/// Runs the mutants of one trait; each must fail exactly the cases it names.
async fn mutants_of(subject: Trait) {
    let mut wrong = Vec::new();
    for mutant in mutants::all().filter(|mutant| mutant.subject == subject) {
        // Machines are under everything; what a mutant of another trait breaks stays there.
        let under = |case: &Case| subject == Trait::Compute && case.needs.contains(&Need::Machine);
        let report = run(&mutant.subject(), |case| case.subject == subject || under(case)).await;
        let (found, wanted): (BTreeSet<_>, BTreeSet<_>) =
            (report.failures().into_iter().collect(), mutant.must_fail.iter().copied().collect());
        if found != wanted || wanted.is_empty() {
            let failed = |case: &&CaseReport| matches!(case.outcome, Outcome::Failed(_));
            let shown: Vec<_> = report.cases.iter().filter(failed).map(|case| format!("\n    {case}")).collect();
            wrong.push(format!("{:?} must fail {wanted:?}, it fails {found:?}{}", mutant.name, shown.concat()));
        }
    }
    assert!(wrong.is_empty(), "{} mutants:\n{}", wrong.len(), wrong.join("\n"));
}

#[tokio::test(start_paused = true)]
async fn mutants_of_compute_fail_the_right_cases() {
    mutants_of(Trait::Compute).await;
}

#[tokio::test(start_paused = true)]
async fn mutants_of_network_fail_the_right_cases() {
    mutants_of(Trait::Network).await;
}

#[tokio::test(start_paused = true)]
async fn mutants_of_image_fail_the_right_cases() {
    mutants_of(Trait::Image).await;
}

#[tokio::test(start_paused = true)]
async fn mutants_of_guest_fail_the_right_cases() {
    mutants_of(Trait::Guest).await;
}

#[tokio::test(start_paused = true)]
async fn mutants_of_state_fail_the_right_cases() {
    mutants_of(Trait::State).await;
}

#[tokio::test(start_paused = true)]
async fn mutants_of_signals_fail_the_right_cases() {
    mutants_of(Trait::Signal).await;
}

#[test]
fn every_case_has_a_mutant_that_fails_it() {
    let caught: BTreeSet<_> = mutants::all().flat_map(|mutant| mutant.must_fail).copied().collect();
    for case in cases() {
        assert!(caught.contains(case.name), "no mutant fails {}", case.name);
    }
    assert!(caught.contains(SWEEP));
    let names: BTreeSet<_> = mutants::all().map(|mutant| mutant.name).collect();
    assert_eq!(names.len(), mutants::all().count(), "two mutants have one name");
    println!("{} cases, {} mutants", cases().len(), names.len());
    assert!(names.len() >= 60, "{} mutants", names.len());
}
