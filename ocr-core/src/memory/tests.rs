//! Behaviour beyond the traits' contract: time, steps, faults, switches and the guests' shell.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use super::*;
use crate::{
    Command, ComputeBackend, Deletion, ExecOutput, ExecRequest, GuestExec, GuestExecExt, ImageBackend, NetworkBackend,
    PowerAction, PutFile, Retry, error::reason,
};

async fn guest() -> (MemoryCloud, VmId) {
    let cloud = MemoryCloud::new();
    let vm = cloud.create_vm(&MemoryCloud::tiny_spec("web-0")).await.unwrap().id;
    (cloud, vm)
}

async fn sh(line: &str) -> ExecOutput {
    let (cloud, vm) = guest().await;
    cloud.shell(vm, line).await.unwrap()
}

/// A script and what it must write to stdout, with exit code 0.
macro_rules! scripts {
    ($($name:ident: $line:expr => $stdout:expr;)*) => {$(
        #[tokio::test]
        async fn $name() {
            let output = sh($line).await;
            let shown = format!("{:?} {:?}", output.stdout, output.stderr);
            assert_eq!((output.stdout.as_ref(), output.exit_code), ($stdout.as_bytes(), 0), "{shown}");
        }
    )*};
}

scripts! {
    words_are_joined_and_split: r#"a='x  y'; echo $a "$a" '$a' \$a "a"b'c'"# => "x y x  y $a $a abc\n";
    defaults_lengths_and_alternatives: r#"v=; echo ${v:-d} ${v-e}. ${u-f} ${v:+g}. ${v+h} ${#HOME}"# => "d . f . h 5\n";
    arguments_stay_apart: r#"sh -c 'for a in "$@"; do echo "<$a>"; done; echo $# $0' name 'a b' c"# => "<a b>\n<c>\n2 name\n";
    no_arguments_are_no_words: r#"sh -c 'set -- ; for a in "$@"; do echo "<$a>"; done; echo end'"# => "end\n";
    output_is_put_in: r#"echo "$(printf 'a\n\n')b" $(echo c; echo d)"# => "ab c d\n";
    sums: "i=3; echo $((i * (2 + 4) % 7)) $((1 < 2 && i != 3)) $((-i + 10 / 4))" => "4 0 -1\n";
    conditions: "if [ -f /no ]; then echo a; elif test 2 -gt 1 && ! false; then echo b; else echo c; fi" => "b\n";
    loops: "i=0; while [ $i -lt 3 ]; do i=$((i+1)); [ $i -eq 2 ] && continue; echo $i; done; until true; do :; done" => "1\n3\n";
    inner_loops_break_outer_ones: "for i in 1 2; do for j in a b; do echo $i$j; break 2; done; done" => "1a\n";
    cases: r#"for x in abc x.sh "*"; do case $x in a*c) echo 1;; *.sh|y) echo 2;; "*") echo 3;; *) echo 4;; esac; done"# => "1\n2\n3\n";
    pipes: "printf 'b\\na\\nb\\n' | sort -u | while read l; do echo \"<$l>\"; done | wc -l" => "2\n";
    subshells_keep_to_themselves: "a=1; (a=2; cd /etc; exit 3); echo $a $? $PWD; { a=4; }; echo $a" => "1 3 /\n4\n";
    redirections: "cd /tmp; echo a > f; echo b >> f; cat < f; ls no 2>/dev/null || echo $?; { echo e >&2; } 2>&1" => "a\nb\n2\ne\n";
    redirections_go_left_to_right: "cd /tmp; sh -c 'echo o; echo e >&2' 2>&1 >f | cat; cat f" => "e\no\n";
    here_documents: "v=1; cat <<A; cat <<'B'\nv is $v\nA\nv is $v\nB\necho end" => "v is 1\nv is $v\nend\n";
    comments_and_joined_lines: "echo a # no\n# no\necho b\\\nc" => "a\nbc\n";
    failure_ends_with_e: "sh -ec 'false || echo a; if false; then :; fi; ! true; false; echo b'; echo $?" => "a\n1\n";
    unset_fails_with_u: "sh -uc 'echo $no'; echo $?" => "2\n";
    status_is_kept: "false; echo $?; (exit 7); echo $?; true | false; echo $?; a=$(exit 3); echo $?" => "1\n7\n1\n3\n";
    scripts_run_from_files: "cd /tmp; printf '#!/bin/sh\\necho \"$0 $1\"\\nexit 4' > s; chmod +x s; ./s x; echo $?; sh s y; ./s | cat" => "./s x\n4\ns y\n./s \n";
    environment_is_given_on: "A=1; export B=2; C=3 sh -c 'echo $A,$B,$C'; echo $C.; env D=4 sh -c 'echo $D'" => ",2,3\n.\n4\n";
    printf_formats: r#"printf '%s=%03d|%-4s|%.2f|%x %%\n' a 7 b 1.5 255; printf '%s,' 1 2 3; printf '\101\n'"# => "a=007|b   |1.50|ff %\n1,2,3,A\n";
    files_move_and_copy: "cd /tmp; mkdir -p a/b; echo x > a/b/f; cp -r a c; mv a/b d; rm -r a; cat c/b/f d/f; ls; rmdir d || rm -rf d; ls" => "x\nx\nc\nd\nc\n";
    modes_show: "cd /tmp; echo x > f; chmod 640 f; chown user f; stat -c '%a %U %s' f; chmod u+x,o= f 2>/dev/null; chmod u+x f; ls -l f | head -c 10" => "640 user 2\n-rwxr-----";
    text_programs: r#"seq 1 12 | tail -n 3 | head -n 1; echo aXb | tr X- '\n_'; grep -c root /etc/passwd; basename /a/b.sh .sh; dirname /a/b"# => "10\na\nb\n1\nb\n/a\n";
    patterns_are_files: "cd /tmp; touch a.x b.x .c.x; mkdir d; touch d/e.x; echo *.x; echo .*.x /tmp/*/?.x; echo '*.x' *.y; v='*.x'; echo $v \"$v\"; rm *.x; ls -a"
        => "a.x b.x\n.c.x /tmp/d/e.x\n*.x *.y\na.x b.x *.x\n.c.x\nd\n";
    programs_are_found: "command -v cat; which nothing || echo none; [ -x /bin/sh ] && /bin/echo yes; eval 'echo $((1+1))'" => "/bin/cat\nnone\nyes\n2\n";
    unknown_programs_are_127: "nothing; echo $?; /tmp; echo $?; /etc/passwd; echo $?" => "127\n126\n126\n";
    root_is_root: "whoami; id -u; echo $HOME; id -u user" => "root\n0\n/root\n1000\n";
}

#[tokio::test]
async fn what_the_shell_does_not_know_is_a_syntax_error() {
    for line in
        ["sleep 1 &", "f() { :; }", "echo `id`", "if true; then", "echo 'a", "echo $$", "a | ", "cat <<E", "fi", "{ :"]
    {
        let output = sh(line).await;
        assert_eq!(output.exit_code, 2, "{line}");
        assert!(!output.stderr.is_empty(), "{line}");
    }
}

#[tokio::test]
async fn users_are_bound_by_modes() {
    let (cloud, vm) = guest().await;
    let line = "cat /root/x 2>/dev/null || echo no; echo a > /etc/x 2>/dev/null || echo no; echo b > ~/f && cat ~/f; reboot || whoami";
    let request = ExecRequest { user: Some("user".into()), ..ExecRequest::shell(line) };
    assert_eq!(cloud.exec(vm, &request).await.unwrap().stdout, "no\nno\nb\nuser\n");
    assert_eq!(cloud.boots(vm), Some(1));
}

#[tokio::test(start_paused = true)]
async fn machines_and_agents_come_up_on_time() {
    let cloud = MemoryCloud::with(MemoryOptions {
        boot_time: Duration::from_secs(10),
        agent_time: Duration::from_secs(20),
        delete_time: Duration::from_secs(5),
        ..MemoryOptions::default()
    });
    let begin = Instant::now();
    let spec = MemoryCloud::tiny_spec("web-0");
    let vm = cloud.create_vm(&spec).await.unwrap().id;
    assert_eq!(cloud.get_vm(vm).await.unwrap().state, VmState::Building);
    tokio::time::sleep_until(begin + Duration::from_secs(10)).await;
    assert_eq!(cloud.get_vm(vm).await.unwrap().state, VmState::Running);
    let error = cloud.guest_info(vm).await.unwrap_err();
    assert_eq!((error.kind(), error.reason()), (ErrorKind::Unavailable, Some(reason::AGENT_NOT_READY)));
    tokio::time::sleep_until(begin + Duration::from_secs(30)).await;
    cloud.guest_info(vm).await.unwrap();

    assert_eq!(cloud.delete_vm(vm).await.unwrap(), Deletion::Deleted);
    assert_eq!(cloud.get_vm(vm).await.unwrap().state, VmState::Deleting);
    assert_eq!(cloud.guest_info(vm).await.unwrap_err().reason(), Some(reason::GUEST_GONE));
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(cloud.get_vm(vm).await.unwrap_err().kind(), ErrorKind::NotFound);
    assert_ne!(cloud.create_vm(&spec).await.unwrap().id, vm, "the request is free again");
}

#[tokio::test(start_paused = true)]
async fn single_steps_complete_the_oldest_work_first() {
    let cloud = MemoryCloud::with(MemoryOptions { single_steps: true, ..MemoryOptions::default() });
    let one = cloud.create_vm(&MemoryCloud::tiny_spec("one")).await.unwrap().id;
    let two = cloud.create_vm(&MemoryCloud::tiny_spec("two")).await.unwrap().id;
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert_eq!(cloud.get_vm(one).await.unwrap().state, VmState::Building);
    assert_eq!(cloud.step(), Some(Step::Running(one)));
    assert_eq!(cloud.step(), Some(Step::Running(two)));
    assert_eq!(cloud.step(), Some(Step::AgentReady(one)));
    cloud.delete_vm(two).await.unwrap();
    assert_eq!(cloud.step(), Some(Step::Gone(two)));
    assert_eq!(cloud.step(), None);
    assert!(cloud.guest_info(one).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn faults_hit_the_call_they_are_planned_for() {
    let (cloud, _) = guest().await;
    let spec = MemoryCloud::tiny_spec("web-1");
    cloud.fault("compute.create_vm", 2, Fault::Before(Error::unavailable("no")));
    cloud.fault("compute.create_vm", 3, Fault::After(Error::timed_out("lost")));
    cloud.fault("compute.get_vm", 1, Fault::Hang);
    let first = cloud.create_vm(&MemoryCloud::tiny_spec("web-2")).await.unwrap();
    let refused = cloud.create_vm(&spec).await.unwrap_err();
    assert_eq!(refused.to_string(), "compute.create_vm: no");
    assert_eq!(cloud.list_vms(&Default::default()).await.unwrap().len(), 2);
    assert_eq!(cloud.create_vm(&spec).await.unwrap_err().kind(), ErrorKind::TimedOut);
    assert_eq!(cloud.list_vms(&Default::default()).await.unwrap().len(), 3, "the lost call had its effect");
    assert!(cloud.create_vm(&spec).await.is_ok(), "a repeat finds it");
    assert!(tokio::time::timeout(Duration::from_secs(9), cloud.get_vm(first.id)).await.is_err());
    assert!(cloud.get_vm(first.id).await.is_ok());
    assert_eq!((cloud.faults().waiting(), cloud.faults().calls("compute.create_vm")), (0, 5));
}

#[test]
#[should_panic(expected = "no operation is named")]
fn a_fault_on_nothing_is_a_mistake() {
    Faults::default().inject("compute.creat_vm", 1, Fault::Hang);
}

#[tokio::test]
async fn a_guests_states_are_different_errors() {
    let (cloud, vm) = guest().await;
    cloud.guest_info(vm).await.unwrap();
    let expected = [
        (AgentMode::Stopped, ErrorKind::Unavailable, reason::AGENT_NOT_READY),
        (AgentMode::Absent, ErrorKind::Unsupported, reason::AGENT_ABSENT),
        (AgentMode::Disabled { exec: true, files: false }, ErrorKind::Unsupported, reason::AGENT_COMMAND_DISABLED),
    ];
    for (mode, kind, reason) in expected {
        assert!(cloud.set_agent(vm, mode));
        let error = cloud.shell(vm, "true").await.unwrap_err();
        assert_eq!((error.kind(), error.reason()), (kind, Some(reason)));
    }
    assert!(cloud.get_file(vm, "/etc/passwd", 999).await.is_ok());
    assert!(!cloud.guest_info(vm).await.unwrap().can_exec);
    cloud.set_agent(vm, AgentMode::Answers);
    cloud.pause_vm(vm, true);
    assert_eq!(cloud.shell(vm, "true").await.unwrap_err().reason(), Some(reason::GUEST_NOT_RUNNING));
    cloud.vanish_vm(vm);
    assert_eq!(cloud.shell(vm, "true").await.unwrap_err().reason(), Some(reason::GUEST_GONE));
}

#[tokio::test(start_paused = true)]
async fn a_restart_loses_what_runs_and_a_repeat_does_not_run_it_again() {
    let (cloud, vm) = guest().await;
    let request = ExecRequest::shell("echo x >> /tmp/f; sleep 60; echo y >> /tmp/f");
    let (first, _) = tokio::join!(cloud.exec(vm, &request), async {
        tokio::time::sleep(Duration::from_secs(30)).await;
        assert!(cloud.reboot_guest(vm));
    });
    let error = first.unwrap_err();
    assert_eq!((error.reason(), error.retry()), (Some(reason::AGENT_NOT_READY), Retry::Ambiguous));
    let error = cloud.exec(vm, &request).await.unwrap_err();
    assert_eq!((error.kind(), error.retry()), (ErrorKind::Conflict, Retry::Never));
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(cloud.guest_file(vm, "/tmp/f").unwrap(), b"x\n");
    assert_eq!((cloud.boots(vm), cloud.commands(vm)), (Some(2), Some(1)));
}

#[tokio::test(start_paused = true)]
async fn a_dropped_call_runs_on_and_is_found_again() {
    let (cloud, vm) = guest().await;
    let request = ExecRequest::shell("sleep 60; echo done");
    assert!(tokio::time::timeout(Duration::from_secs(1), cloud.exec(vm, &request)).await.is_err());
    assert_eq!(cloud.exec(vm, &request).await.unwrap().stdout, "done\n");
    assert_eq!(cloud.commands(vm), Some(1));
}

#[tokio::test(start_paused = true)]
async fn endless_commands_end_at_their_deadline() {
    let (cloud, vm) = guest().await;
    for line in ["while true; do :; done", "sleep 9999", "while :; do sleep 1; echo x >> /tmp/f; done"] {
        let request = ExecRequest { deadline: Duration::from_secs(5), ..ExecRequest::shell(line) };
        assert_eq!(cloud.exec(vm, &request).await.unwrap_err().kind(), ErrorKind::TimedOut, "{line}");
    }
    let written = cloud.guest_file(vm, "/tmp/f").unwrap();
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(cloud.guest_file(vm, "/tmp/f").unwrap(), written);
}

#[tokio::test(start_paused = true)]
async fn a_reboot_from_inside_comes_after_the_result() {
    let (cloud, vm) = guest().await;
    let output = cloud.shell(vm, "echo before; reboot; echo after").await.unwrap();
    assert_eq!(output.stdout, "before\nafter\n");
    assert_eq!(cloud.boots(vm), Some(2));
    cloud.wait_ready(vm, Duration::from_secs(1), Duration::from_millis(10)).await.unwrap();
    cloud.shell(vm, "poweroff").await.unwrap();
    assert_eq!(cloud.get_vm(vm).await.unwrap().state, VmState::Stopped);
    cloud.set_power(vm, PowerAction::Start).await.unwrap();
    assert_eq!(cloud.shell(vm, "true").await.unwrap().exit_code, 0);
    assert_eq!(cloud.boots(vm), Some(3));
}

#[test]
fn a_command_that_breaks_is_lost_and_keeps_nobody_waiting() {
    // Without a clock the command's task panics.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
    let error = runtime.block_on(async {
        let (cloud, vm) = guest().await;
        cloud.shell(vm, "sleep 1").await.unwrap_err()
    });
    assert_eq!((error.kind(), error.retry()), (ErrorKind::Unavailable, Retry::Ambiguous));
}

#[tokio::test]
async fn a_cloud_that_is_dropped_takes_its_commands_along() {
    let (cloud, vm) = guest().await;
    let request = ExecRequest::shell("sleep 3600");
    let call = {
        let cloud = cloud.clone();
        tokio::spawn(async move { cloud.exec(vm, &request).await })
    };
    while cloud.commands(vm) != Some(1) {
        tokio::task::yield_now().await;
    }
    call.abort();
    let _ended = call.await;
    let inner = Arc::downgrade(&cloud.inner);
    drop(cloud);
    assert!(inner.upgrade().is_none());
}

#[tokio::test]
async fn limits_are_exhausted() {
    let cloud = MemoryCloud::with(MemoryOptions { max_vms: 1, disk_bytes: 10_000, ..MemoryOptions::default() });
    let vm = cloud.create_vm(&MemoryCloud::tiny_spec("one")).await.unwrap().id;
    let error = cloud.create_vm(&MemoryCloud::tiny_spec("two")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exhausted);
    let error = cloud.put_file(vm, &PutFile::new("/tmp/f", vec![0; 20_000])).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exhausted);
    assert_eq!(cloud.guest_file(vm, "/tmp/f"), None, "all or nothing");
    let output = cloud.shell(vm, "seq 1 5000 > /tmp/f").await.unwrap();
    assert_eq!(output.exit_code, 1);
    assert!(output.stderr.ends_with(b"No space left on device\n"));
}

#[tokio::test]
async fn results_are_kept_for_repeats_up_to_a_bound() {
    let (cloud, vm) = guest().await;
    let first = ExecRequest::argv(["true"]);
    cloud.exec(vm, &first).await.unwrap();
    for _ in 0..999 {
        cloud.exec(vm, &ExecRequest::argv(["true"])).await.unwrap();
    }
    cloud.exec(vm, &first).await.unwrap();
    assert_eq!(cloud.commands(vm), Some(1000), "the first was answered");
    cloud.exec(vm, &ExecRequest::argv(["true"])).await.unwrap();
    cloud.exec(vm, &first).await.unwrap();
    assert_eq!(cloud.commands(vm), Some(1002), "the first was forgotten and ran again");
}

#[tokio::test]
async fn a_captured_machine_gives_machines_with_its_files() {
    let (cloud, vm) = guest().await;
    cloud.write_guest_file(vm, "/srv/data/x", b"kept").unwrap();
    let spec = MemoryCloud::tiny_spec("copy");
    let image = cloud.capture_vm(vm, &Name::new("golden").unwrap(), &spec.tags).await.unwrap();
    let copy = cloud.create_vm(&VmSpec { image: image.id, ..spec }).await.unwrap();
    assert_eq!(cloud.guest_file(copy.id, "/srv/data/x").unwrap(), b"kept");
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("golden.tar");
    let size = cloud.export_image(image.id, &to).await.unwrap();
    assert_eq!(std::fs::metadata(&to).unwrap().len(), size);
    let mut archive = tar::Archive::new(std::fs::File::open(&to).unwrap());
    assert!(archive.entries().unwrap().any(|entry| entry.unwrap().path().unwrap().ends_with("srv/data/x")));
}

#[tokio::test]
async fn networks_in_use_stay() {
    let (cloud, vm) = guest().await;
    let nic = cloud.get_vm(vm).await.unwrap().nics.remove(0);
    assert_eq!(nic.addresses, ["192.0.2.10".parse::<std::net::IpAddr>().unwrap()]);
    let error = cloud.delete_network(MemoryCloud::default_network()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict);
    cloud.delete_vm(vm).await.unwrap();
    assert_eq!(cloud.delete_network(MemoryCloud::default_network()).await.unwrap(), Deletion::Deleted);
}

#[tokio::test]
async fn a_seed_gives_the_same_ids() {
    let make = || async {
        let cloud = MemoryCloud::with(MemoryOptions { seed: Some(7), ..MemoryOptions::default() });
        cloud.create_vm(&MemoryCloud::tiny_spec("web-0")).await.unwrap().id
    };
    assert_eq!(make().await, make().await);
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(32))]

    #[test]
    fn any_text_in_quotes_stays_as_it_is(text in "[^\0]{0,40}") {
        let quoted = text.replace('\'', "'\\''");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let output = runtime.block_on(sh(&format!("v='{quoted}'; printf '%s|' \"$v\" '{quoted}'")));
        proptest::prop_assert_eq!(output.stdout, format!("{text}|{text}|"));
    }
}

#[tokio::test]
async fn environment_and_argv_are_taken_as_they_are() {
    let (cloud, vm) = guest().await;
    let mut request = ExecRequest::argv(["printenv", "A B", "X"]);
    request.environment = BTreeMap::from([("X".to_owned(), "a b\n$Y 'z'".to_owned())]);
    assert_eq!(cloud.exec(vm, &request).await.unwrap().stdout, "a b\n$Y 'z'\n");
    request = ExecRequest::new(Command::Argv(vec!["echo".into(), "$X; *".into(), "".into(), "z".into()]));
    assert_eq!(cloud.exec(vm, &request).await.unwrap().stdout, "$X; *  z\n");
}

#[tokio::test]
async fn each_boot_has_an_id_of_its_own() {
    let (cloud, vm) = guest().await;
    let boot_id = async || cloud.shell(vm, "cat /proc/sys/kernel/random/boot_id").await.unwrap().stdout;
    let before = boot_id().await;
    assert_eq!((before.len(), boot_id().await), (37, before.clone()));
    assert!(cloud.reboot_guest(vm));
    assert_ne!(boot_id().await, before);
}
