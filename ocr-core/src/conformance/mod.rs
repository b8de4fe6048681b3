//! The conformance suite: one table of named cases that every backend passes, or says why a case is not for it.
//!
//! Each `MUST` in a trait's documentation names its case; each case is named there. A backend's own test is three lines:
//!
//! ```
//! # #[tokio::main(flavor = "current_thread", start_paused = true)] async fn main() {
//! use std::sync::Arc;
//! use ocr_core::{conformance::{Subject, assert_all}, memory::MemoryState};
//!
//! let subject = Subject { state: Some(Arc::new(MemoryState::new())), ..Subject::new() };
//! assert_all(&subject).await;
//! # }
//! ```
//!
//! Against live infrastructure the same cases touch only what they made themselves: everything carries the subject's
//! random owner and prefix. A case cleans up after itself, also after a failure, and the run ends with a sweep:
//! what is left is deleted and reported as the failure of [`SWEEP`].
//!
//! Cases wait for states, never for a fixed time (but where time is what is tested), so slow backends need only a longer
//! [`Subject::deadline`]. A backend with fewer capabilities has those cases ignored, never passed.
//!
//! [`mutants`] is the suite's own test: backends that break one rule each, and exactly the right cases fail.

mod compute;
mod context;
mod guest;
mod image;
pub mod mutants;
mod network;
mod report;
mod signal;
mod state;

use std::{fmt, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use futures::{FutureExt, StreamExt, future::BoxFuture, stream};
use tokio::time::Instant;

use self::context::{Broken, Check, Context, Shared};
pub use self::report::{CaseReport, Outcome, Report};
use crate::{
    ComputeBackend, GuestExec, ImageBackend, ImageId, NetworkBackend, NetworkId, NetworkKind, Owner, StateStore, VmId,
    signal::{LocalSignals, Signals},
};

/// The name under which a run reports what it could not clean up. It is no case of a trait.
pub const SWEEP: &str = "leaves_nothing";

/// What is tested, and what the tests may use.
///
/// Fields left empty make the cases that need them ignored.
#[derive(Clone, Debug)]
pub struct Subject {
    /// Creates machines.
    pub compute: Option<Arc<dyn ComputeBackend>>,
    /// Creates networks.
    pub network: Option<Arc<dyn NetworkBackend>>,
    /// Keeps images.
    pub image: Option<Arc<dyn ImageBackend>>,
    /// Acts in guests.
    pub guest: Option<Arc<dyn GuestExec>>,
    /// Keeps records.
    pub state: Option<Arc<dyn StateStore>>,
    /// Carries notices.
    pub signals: Option<Arc<dyn Signals>>,
    /// The tag on everything that is made, and with `.2` added a second one. Random, at most 60 bytes.
    pub owner: Owner,
    /// The image that machines are made from.
    pub template: Option<ImageId>,
    /// An image whose machines have no guest agent.
    pub mute_template: Option<ImageId>,
    /// Networks that machines may be linked to; two show the order of NICs.
    pub links: Vec<NetworkId>,
    /// The network that is made; without one the simplest that the backend can make.
    pub network_kind: Option<NetworkKind>,
    /// Virtual cpus of each machine.
    pub cpus: u32,
    /// Memory of each machine, in bytes.
    pub ram_bytes: u64,
    /// A running Linux machine to act in; without one it is made from `template`.
    pub guest_vm: Option<VmId>,
    /// A user of the guest other than the agent's own.
    pub guest_user: Option<String>,
    /// How long any one change of state may take: a boot, a deletion, an answer.
    pub deadline: Duration,
    /// How many cases run at once. Cases that share the guest still take turns.
    pub parallel: usize,
}

impl Subject {
    /// Nothing offered yet, a random owner, one cpu, 128 MiB, a minute for everything, one case at a time.
    pub fn new() -> Self {
        let random = uuid::Uuid::new_v4().simple().to_string();
        #[expect(clippy::expect_used, reason = "the text is made of allowed characters")]
        let owner = Owner::new(format!("conform-{}", &random[..8])).expect("a plain text is an owner");
        Self {
            compute: None,
            network: None,
            image: None,
            guest: None,
            state: None,
            signals: None,
            owner,
            template: None,
            mute_template: None,
            links: Vec::new(),
            network_kind: None,
            cpus: 1,
            ram_bytes: 128 << 20,
            guest_vm: None,
            guest_user: None,
            deadline: Duration::from_secs(60),
            parallel: 1,
        }
    }

    /// Everything of a [`MemoryCloud`](crate::memory::MemoryCloud) a store in memory, and signals of this process.
    pub fn memory(cloud: &crate::memory::MemoryCloud, state: &crate::memory::MemoryState) -> Self {
        Self {
            compute: Some(Arc::new(cloud.clone())),
            network: Some(Arc::new(cloud.clone())),
            image: Some(Arc::new(cloud.clone())),
            guest: Some(Arc::new(cloud.clone())),
            state: Some(Arc::new(state.clone())),
            signals: Some(Arc::new(LocalSignals::new())),
            template: Some(crate::memory::MemoryCloud::tiny()),
            mute_template: Some(crate::memory::MemoryCloud::mute()),
            links: vec![crate::memory::MemoryCloud::default_network(), crate::memory::MemoryCloud::lab_network()],
            guest_user: Some("user".to_owned()),
            ..Self::new()
        }
    }
}

impl Default for Subject {
    fn default() -> Self {
        Self::new()
    }
}

/// The same without any capability, for what a backend must refuse then.
fn with_less(options: crate::memory::MemoryOptions) -> crate::memory::MemoryOptions {
    crate::memory::MemoryOptions {
        power: false,
        nics: false,
        make_networks: false,
        access: false,
        import: false,
        capture: false,
        export: false,
        users: false,
        streaming: false,
        ..options
    }
}

/// The trait that a case is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Trait {
    /// [`ComputeBackend`]
    Compute,
    /// [`NetworkBackend`]
    Network,
    /// [`ImageBackend`]
    Image,
    /// [`GuestExec`]
    Guest,
    /// [`StateStore`]
    State,
    /// [`Signals`]
    Signal,
}

impl Trait {
    /// All six.
    pub const ALL: [Self; 6] = [Self::Compute, Self::Network, Self::Image, Self::Guest, Self::State, Self::Signal];
}

impl fmt::Display for Trait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Compute => "compute",
            Self::Network => "network",
            Self::Image => "image",
            Self::Guest => "guest",
            Self::State => "state",
            Self::Signal => "signal",
        })
    }
}

/// What a case needs beside its trait; without it the case is ignored, and says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Need {
    /// Machines can be made: a [`ComputeBackend`] and a template.
    Machine,
    /// [`ComputeCapabilities::power`](crate::ComputeCapabilities::power).
    Power,
    /// No power.
    NoPower,
    /// NICs, and a network to link to.
    Link,
    /// NICs.
    Nics,
    /// No NICs.
    NoNics,
    /// A network that can be made.
    MakeNetwork,
    /// A kind of network that cannot be made.
    LacksNetwork,
    /// [`NetworkCapabilities::access`](crate::NetworkCapabilities::access).
    Access,
    /// No access.
    NoAccess,
    /// [`ImageCapabilities::import`](crate::ImageCapabilities::import).
    Import,
    /// No import.
    NoImport,
    /// [`ImageCapabilities::capture`](crate::ImageCapabilities::capture).
    Capture,
    /// No capture.
    NoCapture,
    /// [`ImageCapabilities::export`](crate::ImageCapabilities::export).
    Export,
    /// No export.
    NoExport,
    /// A running guest: one given, or one that can be made.
    Guest,
    /// A template without an agent.
    MuteTemplate,
    /// [`GuestCapabilities::users`](crate::GuestCapabilities::users).
    Users,
    /// A user of the guest's, by name.
    User,
    /// No other users.
    NoUsers,
    /// [`GuestCapabilities::streaming`](crate::GuestCapabilities::streaming).
    Streaming,
    /// Outputs of 8 MiB.
    LargeOutput,
}

impl Need {
    /// Why this subject has not what is needed.
    fn missing(self, subject: &Subject) -> Option<&'static str> {
        let compute = subject.compute.as_ref().map(|compute| compute.capabilities());
        let network = subject.network.as_ref().map(|network| network.capabilities());
        let image = subject.image.as_ref().map(|image| image.capabilities());
        let guest = subject.guest.as_ref().map(|guest| guest.capabilities());
        let machine = compute.is_some() && subject.template.is_some();
        let (there, why) = match self {
            Self::Machine => (machine, "there is no template to make machines from"),
            Self::Power => (compute.is_some_and(|can| can.power), "the capability power is missing"),
            Self::NoPower => (compute.is_some_and(|can| !can.power), "the backend has the capability power"),
            Self::Link => (
                compute.is_some_and(|can| can.nics) && !subject.links.is_empty(),
                "the capability nics or a network to link to is missing",
            ),
            Self::Nics => (compute.is_some_and(|can| can.nics), "the capability nics is missing"),
            Self::NoNics => (compute.is_some_and(|can| !can.nics), "the backend has the capability nics"),
            Self::MakeNetwork => (
                network.is_some_and(|can| can.isolated || can.routed || (can.vlan && subject.network_kind.is_some())),
                "no kind of network can be made, or a VLAN's bridge is not given",
            ),
            Self::LacksNetwork => (
                network.is_some_and(|can| !(can.isolated && can.routed && can.vlan)),
                "the backend can make every kind of network",
            ),
            Self::Access => (network.is_some_and(|can| can.access), "the capability access is missing"),
            Self::NoAccess => (network.is_some_and(|can| !can.access), "the backend has the capability access"),
            Self::Import => (image.is_some_and(|can| can.import), "the capability import is missing"),
            Self::NoImport => (image.is_some_and(|can| !can.import), "the backend has the capability import"),
            Self::Capture => (image.is_some_and(|can| can.capture), "the capability capture is missing"),
            Self::NoCapture => (image.is_some_and(|can| !can.capture), "the backend has the capability capture"),
            Self::Export => (image.is_some_and(|can| can.export), "the capability export is missing"),
            Self::NoExport => (image.is_some_and(|can| !can.export), "the backend has the capability export"),
            Self::Guest => {
                (machine || subject.guest_vm.is_some(), "there is no guest, nor a template to make one from")
            }
            Self::MuteTemplate => {
                (compute.is_some() && subject.mute_template.is_some(), "there is no template without an agent")
            }
            Self::Users => (guest.is_some_and(|can| can.users), "the capability users is missing"),
            Self::User => (
                guest.is_some_and(|can| can.users) && subject.guest_user.is_some(),
                "the capability users or a user's name is missing",
            ),
            Self::NoUsers => (guest.is_some_and(|can| !can.users), "the backend has the capability users"),
            Self::Streaming => (guest.is_some_and(|can| can.streaming), "the capability streaming is missing"),
            Self::LargeOutput => {
                (guest.is_some_and(|can| can.max_output_bytes >= 8 << 20), "outputs of 8 MiB are over the capability")
            }
        };
        if there { None } else { Some(why) }
    }
}

/// One named case.
pub struct Case {
    /// Its name, as the traits' documentation has it.
    pub name: &'static str,
    /// The trait it is about.
    pub subject: Trait,
    /// What must hold, in a few words.
    pub about: &'static str,
    /// What it needs beside the trait.
    pub needs: &'static [Need],
    run: for<'a> fn(&'a Context<'a>) -> BoxFuture<'a, Check>,
}

impl Case {
    /// Why it is not for this subject.
    fn ignored(&self, subject: &Subject) -> Option<String> {
        let offered = match self.subject {
            Trait::Compute => subject.compute.is_some(),
            Trait::Network => subject.network.is_some(),
            Trait::Image => subject.image.is_some(),
            Trait::Guest => subject.guest.is_some(),
            Trait::State => subject.state.is_some(),
            Trait::Signal => subject.signals.is_some(),
        };
        if !offered {
            return Some(format!("the trait is not offered: {}", self.subject));
        }
        self.needs.iter().find_map(|need| need.missing(subject)).map(str::to_owned)
    }
}

impl fmt::Debug for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Case").field("name", &self.name).field("subject", &self.subject).finish_non_exhaustive()
    }
}

macro_rules! table {
    ($($subject:ident in $module:ident { $($name:ident [$($need:ident),*] $about:literal;)* })*) => {
        static CASES: &[Case] = &[$($(
            Case {
                name: stringify!($name),
                subject: Trait::$subject,
                about: $about,
                needs: &[$(Need::$need),*],
                run: |context| Box::pin($module::$name(context)),
            },
        )*)*];
    };
}

table! {
    Compute in compute {
        vm_create_visible [Machine] "a new machine is seen at once";
        vm_create_keeps_tags [Machine] "tags, name and sizes come back as given";
        vm_create_repeat [Machine] "a repeat returns the same machine";
        vm_create_race [Machine] "two at once make one machine";
        vm_create_request_reused [Machine] "a request makes no second thing";
        vm_create_name_taken [Machine] "a name is taken once per scope";
        vm_create_name_other_scope [Machine] "a name is free in another scope";
        vm_create_unknown_image [Machine] "an unknown image is named and nothing is left";
        vm_create_unknown_network [Machine, Nics] "an unknown network is named and nothing is left";
        vm_create_bad_size [Machine] "impossible sizes are refused";
        vm_create_nics [Machine, Link] "NICs are in the order of the links";
        vm_create_nics_unsupported [Machine, NoNics] "links are refused without the capability";
        vm_get_missing [] "a machine that does not exist is not found";
        vm_list_filter [Machine] "owner, scope and name narrow the list";
        vm_list_empty [] "no match is an empty list";
        vm_power_missing [Power] "no power over what does not exist";
        vm_power_repeat [Machine, Power] "starting what runs and stopping what is stopped is fine";
        vm_power_cycle [Machine, Power] "stop and start end where they should";
        vm_power_reboot [Machine, Power] "a reboot ends running";
        vm_power_reboot_stopped [Machine, Power] "a stopped machine is not rebooted";
        vm_power_unsupported [NoPower] "power is refused without the capability";
        vm_delete_gone [Machine] "a deleted machine goes";
        vm_delete_missing [Machine] "deleting what is gone is fine";
        vm_delete_race [Machine] "two deletions at once are fine";
        vm_delete_frees_name [Machine] "a deleted machine's name is free";
    }
    Network in network {
        net_create_visible [MakeNetwork] "a new network is seen at once";
        net_create_repeat [MakeNetwork] "a repeat returns the same network";
        net_create_race [MakeNetwork] "two at once make one network";
        net_create_request_reused [MakeNetwork] "a request makes no second thing";
        net_create_name_taken [MakeNetwork] "a name is taken once per scope";
        net_create_invalid [MakeNetwork] "impossible shapes are refused";
        net_create_unsupported [LacksNetwork] "kinds without the capability are refused";
        net_get_missing [] "a network that does not exist is not found";
        net_list_filter [MakeNetwork] "owner, scope and name narrow the list";
        net_delete_gone [MakeNetwork] "a deleted network is gone, deleting it again is fine";
        net_access_missing [Access] "no access to what does not exist";
        net_access_set [Access, Machine] "access is set and set again";
        net_access_unsupported [NoAccess] "access is refused without the capability";
    }
    Image in image {
        image_import_visible [Import] "an image taken in is seen as given";
        image_import_repeat [Import] "a repeat returns the same image";
        image_import_request_reused [Import] "a request makes no second thing";
        image_import_name_taken [Import] "a name is taken once per owner";
        image_import_checksum [Import] "a wrong checksum is refused and nothing is left";
        image_import_missing [Import] "a missing source is refused and nothing is left";
        image_import_unsupported [NoImport] "import is refused without the capability";
        image_find_filter [Import] "owner and name narrow the list";
        image_get_missing [] "an image that does not exist is not found";
        image_delete_gone [Import] "a deleted image is gone, deleting it again is fine";
        image_capture_visible [Capture, Machine] "a machine's image is seen as asked for";
        image_capture_missing [Capture] "what does not exist is not captured";
        image_capture_unsupported [NoCapture] "capture is refused without the capability";
        image_export_roundtrip [Import, Export] "what was taken in comes out";
        image_export_missing [Export] "what does not exist is not exported";
        image_export_unsupported [NoExport] "export is refused without the capability";
    }
    Guest in guest {
        guest_info_missing [] "a machine that does not exist is gone";
        guest_info_stopped [Machine, Power] "a machine that is off is not running";
        guest_info_ready [Guest] "an agent that answers says what it can";
        guest_booting [Machine] "a guest that boots is not ready, and nothing else";
        guest_rebooted [Machine, Power] "a reboot loses nothing but time";
        guest_gone_everywhere [] "every method tells that the machine is gone";
        guest_agent_absent [Machine, MuteTemplate] "no agent channel is an error of its own";
        guest_bad_path [Guest] "paths that climb or are not absolute are refused";
        guest_put_roundtrip [Guest] "files arrive byte for byte";
        guest_put_replace [Guest] "a file is replaced as a whole";
        guest_put_mode [Guest] "mode and owner are as asked";
        guest_put_parents [Guest] "missing folders are made when asked for";
        guest_put_no_parents [Guest] "missing folders are an error otherwise";
        guest_put_onto_folder [Guest] "a folder is not replaced by a file";
        guest_put_many [Guest] "many files arrive together";
        guest_put_names_the_file [Guest] "one bad file keeps all from being written, and is named";
        guest_put_twice [Guest] "a path that is there twice is refused";
        guest_get_missing [Guest] "a file that does not exist is not found";
        guest_get_limit [Guest] "a file over the limit is not read";
        guest_remove [Guest] "a removed file is gone, removing it again is fine";
        guest_remove_folder [Guest] "a folder is not removed";
        guest_remove_many [Guest] "each of many paths has its own outcome";
        guest_exec_output [Guest] "exit code, stdout and stderr come back byte for byte";
        guest_exec_output_limit [Guest] "long output is cut and flagged";
        guest_exec_large_output [Guest, LargeOutput] "megabytes of output come back whole";
        guest_exec_environment [Guest] "the environment reaches the command";
        guest_exec_stdin [Guest] "stdin reaches the command";
        guest_exec_shell [Guest] "a line is run by the shell";
        guest_exec_argv [Guest] "a program is run without a shell";
        guest_exec_user [Guest, User] "a command runs as the user asked for";
        guest_exec_unknown_user [Guest, Users] "an unknown user runs nothing";
        guest_exec_users_unsupported [Guest, NoUsers] "users are refused without the capability";
        guest_exec_repeat [Guest] "a repeat is answered and not run";
        guest_exec_race [Guest] "two at once run once";
        guest_exec_deadline [Guest] "a command ends at its deadline, children too";
        guest_exec_no_program [Guest] "a missing program is exit code 127";
        guest_exec_progress [Guest, Streaming] "output is sent while the command runs";
        guest_fence_refuses [Guest] "an older token is refused";
        guest_fence_files [Guest] "files and commands have one fence";
        guest_fence_reboot [Machine, Power] "a reboot forgets no token";
        guest_fence_none [Guest] "without a token nothing is refused";
        guest_fence_waits [Guest] "nothing begins before what is older has ended";
        guest_fence_wait_ends [Guest] "waiting for what is older has an end";
        guest_fence_takes_over [Guest] "a newer token gets the older run's result";
    }
    State in state {
        state_roundtrip [] "records come back as written";
        state_get_missing [] "a key never written has no record";
        state_versions_grow [] "versions grow for ever";
        state_put_absent [] "absent means absent";
        state_put_version [] "a version must match";
        state_put_race [] "of several at once one wins";
        state_ttl [] "a record lives as long as asked for";
        state_ttl_cleared [] "a later write takes the time to live away";
        state_value_too_large [] "values over the limit are refused";
        state_delete [] "a deleted record is gone, deleting it again is fine";
        state_delete_version [] "a version must match";
        state_delete_absent [] "deleting what is absent makes no sense";
        state_list_pages [] "pages give each record once, in order";
        state_list_prefix [] "a prefix matches by bytes";
        state_list_limit [] "a page has 1 to the most records";
    }
    Signal in signal {
        signal_everyone [] "all who listen hear it, the sender too";
        signal_topics [] "nobody hears another topic";
        signal_nobody [] "sending to nobody is fine";
        signal_payload [] "payloads arrive byte for byte";
        signal_payload_too_large [] "payloads over the limit are refused";
        signal_order [] "notices come in their sender's order";
        signal_from_now_on [] "what was sent before is not heard";
        signal_backlog [] "who is far behind is told of a gap";
        signal_drop [] "listeners come and go";
    }
}

/// All cases, in the order in which they run.
pub fn cases() -> &'static [Case] {
    CASES
}

/// Runs the cases that the filter chooses, then the sweep.
pub async fn run(subject: &Subject, filter: impl Fn(&Case) -> bool) -> Report {
    run_observed(subject, filter, |_| {}).await
}

/// [`run`], and tells of each case when it has ended.
pub async fn run_observed(
    subject: &Subject,
    filter: impl Fn(&Case) -> bool,
    mut observe: impl FnMut(&CaseReport),
) -> Report {
    let begin = Instant::now();
    let shared = Shared::default();
    let chosen: Vec<_> = CASES.iter().enumerate().filter(|(_, case)| filter(case)).collect();
    let results = stream::iter(chosen)
        .map(|(index, case)| {
            let shared = &shared;
            // Boxed: a case's future is large, and there are many.
            Box::pin(async move { (index, run_one(subject, shared, case).await) })
        })
        .buffer_unordered(subject.parallel.max(1));
    let mut cases = Vec::new();
    let mut results = std::pin::pin!(results);
    while let Some((index, report)) = results.next().await {
        observe(&report);
        cases.push((index, report));
    }
    cases.sort_by_key(|(index, _)| *index);
    let mut cases: Vec<_> = cases.into_iter().map(|(_, report)| report).collect();
    let sweep_began = Instant::now();
    let outcome = match Box::pin(context::sweep(subject, &shared)).await {
        Ok(()) => Outcome::Passed,
        Err(Broken(why)) => Outcome::Failed(why),
    };
    let about = "the run leaves nothing behind";
    let sweep = CaseReport { name: SWEEP, subject: None, about, outcome, took: sweep_began.elapsed() };
    observe(&sweep);
    cases.push(sweep);
    Report { owner: subject.owner.to_string(), cases, took: begin.elapsed() }
}

async fn run_one(subject: &Subject, shared: &Shared, case: &'static Case) -> CaseReport {
    let begin = Instant::now();
    let outcome = match case.ignored(subject) {
        Some(why) => Outcome::Ignored(why),
        None => {
            let context = Context::new(subject, shared, case);
            // Some cases wait for several changes of state, none for more than five.
            let limit = subject.deadline * 6;
            let ran = AssertUnwindSafe(tokio::time::timeout(limit, (case.run)(&context))).catch_unwind().await;
            let outcome = match ran {
                Ok(Ok(Ok(()))) => Outcome::Passed,
                Ok(Ok(Err(Broken(why)))) => Outcome::Failed(why),
                Ok(Err(_)) => Outcome::Failed(format!("no end after {}", crate::error::seconds(limit))),
                Err(_) => Outcome::Failed("panicked; the panic's own message is on stderr".to_owned()),
            };
            // What cannot be cleaned up now is seen, and told, by the sweep.
            let _left = Box::pin(context.clean_up()).await;
            outcome
        }
    };
    CaseReport { name: case.name, subject: Some(case.subject), about: case.about, outcome, took: begin.elapsed() }
}

/// Runs all cases and the sweep.
///
/// # Panics
/// With the whole table when a case failed, or when all were ignored: then nothing was tested.
pub async fn assert_all(subject: &Subject) {
    let report = run(subject, |_| true).await;
    assert!(report.failed() == 0, "{report}");
    assert!(report.cases.iter().any(|case| case.name != SWEEP && case.outcome == Outcome::Passed), "{report}");
}

#[cfg(test)]
mod tests;
