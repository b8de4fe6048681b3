//! The in-guest scripts, run by this machine's own shells.

use std::{
    ffi::OsString,
    io::Write,
    path::{Path, PathBuf},
    process::{Command as Process, Output, Stdio},
    sync::OnceLock,
    time::{Duration, Instant},
};

use ocr_core::{Command, ExecRequest};
use proptest::prelude::*;

use super::{
    runner::{Answer, Run, Verdict, script},
    script::{answer, compact},
};

/// A shell to run the scripts with: where its `sh` and programs are.
struct Shell {
    name: &'static str,
    path: OsString,
    _tools: Option<tempfile::TempDir>,
}

/// dash (or whatever `sh` is) with the system's programs, and busybox with its own where there is one.
fn shells() -> Vec<Shell> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut shells = vec![Shell { name: "sh", path, _tools: None }];
    let Some(busybox) = busybox() else {
        println!("ignored: there is no busybox");
        return shells;
    };
    let tools = tempfile::tempdir().unwrap();
    let list = Process::new(&busybox).arg("--list").output().unwrap();
    for applet in String::from_utf8(list.stdout).unwrap().lines() {
        std::os::unix::fs::symlink(&busybox, tools.path().join(applet)).unwrap();
    }
    shells.push(Shell { name: "busybox", path: tools.path().into(), _tools: Some(tools) });
    shells
}

/// An installed one, or the one of the live tests' guest.
fn busybox() -> Option<PathBuf> {
    static UNPACKED: OnceLock<Option<tempfile::TempDir>> = OnceLock::new();
    let path = std::env::var_os("PATH").unwrap_or_default();
    let installed = std::env::split_paths(&path).map(|folder| folder.join("busybox")).find(|file| file.exists());
    installed.or_else(|| {
        let unpacked = UNPACKED.get_or_init(|| {
            let cache = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/guest/cache");
            let files = std::fs::read_dir(cache).ok()?.map(|entry| entry.unwrap().path());
            let package = files.into_iter().find(|file| file.to_string_lossy().contains("/busybox-static_"))?;
            let folder = tempfile::tempdir().unwrap();
            let unpacked = Process::new("dpkg-deb").arg("-x").arg(package).arg(folder.path()).status().ok()?;
            unpacked.success().then_some(folder)
        });
        let folder = unpacked.as_ref()?.path();
        ["bin/busybox", "usr/bin/busybox"].iter().map(|file| folder.join(file)).find(|file| file.exists())
    })
}

impl Shell {
    fn process(&self, script: &str, arguments: &[String]) -> Process {
        let mut process = Process::new("setsid");
        process.args(["sh", "-c", script, "ocr"]).args(arguments).env("PATH", &self.path);
        process.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        process
    }

    fn run(&self, script: &str, arguments: &[String], input: &[u8]) -> Output {
        let mut child = self.process(script, arguments).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let input = input.to_vec();
        let writer = std::thread::spawn(move || {
            let _ = stdin.write_all(&input);
        });
        let output = child.wait_with_output().unwrap();
        writer.join().unwrap();
        output
    }

    fn exec(&self, folder: &Path, request: &ExecRequest) -> Output {
        let run = run(folder, request);
        self.run(script(), &run.arguments, &run.input)
    }
}

fn run(folder: &Path, request: &ExecRequest) -> Run {
    Run::new(request, folder.to_str().unwrap(), request.output_limit_bytes, false, false)
}

fn folder() -> (tempfile::TempDir, PathBuf) {
    let temp = tempfile::tempdir().unwrap();
    let folder = temp.path().join("lib/ops");
    (temp, folder)
}

fn verdict(output: &Output) -> Verdict {
    Answer::parse(&output.stdout).unwrap_or_else(|| panic!("{output:?}")).verdict
}

fn stdout(output: &Output) -> &[u8] {
    Answer::parse(&output.stdout).unwrap().stdout
}

#[test]
fn output_and_exit_code_come_back_apart() {
    for shell in shells() {
        let (_temp, folder) = folder();
        let output = shell.exec(&folder, &ExecRequest::shell("printf 'a\\nb'; printf c >&2; exit 7"));
        assert_eq!(verdict(&output), Verdict::Exit(7), "{}", shell.name);
        assert_eq!((stdout(&output), output.stderr.as_slice()), (&b"a\nb"[..], &b"c"[..]));
    }
}

#[test]
fn a_command_that_a_signal_ended_counts_as_shells_do() {
    for shell in shells() {
        let (_temp, folder) = folder();
        for (line, code) in [("kill -9 $$", 137), ("kill -TERM $$; sleep 5", 143), ("sh -c 'kill -9 $$'", 137)] {
            let output = shell.exec(&folder, &ExecRequest::shell(line));
            assert_eq!(verdict(&output), Verdict::Exit(code), "{} {line}", shell.name);
        }
        // A program that is not there.
        assert_eq!(verdict(&shell.exec(&folder, &ExecRequest::argv(["no-such-program"]))), Verdict::Exit(127));
    }
}

#[test]
fn a_shell_line_finds_a_fresh_shell() {
    for shell in shells() {
        let (_temp, folder) = folder();
        let line = "echo \"$0 $# ${ocr_h-unset} ${ocr_nl-unset} ${base-unset} $(umask)\"\necho two";
        let output = shell.exec(&folder, &ExecRequest::shell(line));
        let text = String::from_utf8_lossy(stdout(&output)).into_owned();
        assert!(text.starts_with("sh 0 unset unset unset "), "{}: {text} {output:?}", shell.name);
        assert!(text.ends_with("22\ntwo\n"), "{}: {text}", shell.name);
    }
}

#[test]
fn stdin_arrives_and_is_not_left_in_the_folder() {
    for shell in shells() {
        let (_temp, folder) = folder();
        for size in [0, 1, 100_000] {
            let mut request = ExecRequest::argv(["cat"]);
            request.stdin = (0..size).map(|i| (i % 251) as u8).collect::<Vec<_>>().into();
            let output = shell.exec(&folder, &request);
            assert!(stdout(&output) == request.stdin, "{} {size}", shell.name);
        }
        let names: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name()).collect();
        let plain = |name: &OsString| {
            let name = name.to_string_lossy().into_owned();
            [".lock", ".out", ".err", ".end"].iter().any(|suffix| name.ends_with(suffix))
        };
        assert!(names.iter().all(plain), "{names:?}");
    }
}

#[test]
fn a_long_header_arrives() {
    for shell in shells() {
        let (_temp, folder) = folder();
        let mut request = ExecRequest::shell("printf %s \"$LONG\"; cat");
        request.environment.insert("LONG".into(), "x'y\n".repeat(5_000));
        request.stdin = "the stdin\n".into();
        let output = shell.exec(&folder, &request);
        let want = format!("{}the stdin\n", request.environment["LONG"]);
        assert!(stdout(&output) == want.as_bytes(), "{} {output:?}", shell.name);
    }
}

#[test]
fn input_that_did_not_arrive_whole_runs_nothing() {
    for shell in shells() {
        let (temp, folder) = folder();
        let mark = temp.path().join("ran");
        let mut request = ExecRequest::shell(format!("touch {}", mark.display()));
        request.stdin = "0123456789".into();
        let run = run(&folder, &request);
        for cut in [0, run.input.len() - 11, run.input.len() - 1] {
            let output = shell.run(script(), &run.arguments, &run.input[..cut]);
            assert_eq!(verdict(&output), Verdict::Garbled, "{} {cut}", shell.name);
        }
        assert!(!mark.exists());
        assert_eq!(verdict(&shell.run(script(), &run.arguments, &run.input)), Verdict::Exit(0));
        assert!(mark.exists());
    }
}

#[test]
fn a_repeat_is_answered_and_not_run() {
    for shell in shells() {
        let (temp, folder) = folder();
        let count = temp.path().join("count");
        let request = ExecRequest::shell(format!("echo run >> {}; echo out; echo err >&2; exit 3", count.display()));
        for _ in 0..3 {
            let output = shell.exec(&folder, &request);
            assert_eq!(verdict(&output), Verdict::Exit(3), "{}", shell.name);
            assert_eq!((stdout(&output), output.stderr.as_slice()), (&b"out\n"[..], &b"err\n"[..]));
        }
        assert_eq!(std::fs::read_to_string(&count).unwrap(), "run\n");
    }
}

#[test]
fn many_at_once_run_it_once() {
    for shell in shells() {
        let (temp, folder) = folder();
        let count = temp.path().join("count");
        let request = ExecRequest::shell(format!("echo run >> {}; sleep 0.3; echo done", count.display()));
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let output = shell.exec(&folder, &request);
                    assert_eq!((verdict(&output), stdout(&output)), (Verdict::Exit(0), &b"done\n"[..]));
                });
            }
        });
        assert_eq!(std::fs::read_to_string(&count).unwrap(), "run\n", "{}", shell.name);
    }
}

#[test]
fn the_deadline_ends_the_command_with_its_children() {
    for shell in shells() {
        let (temp, folder) = folder();
        let pids = temp.path().join("pids");
        // One child listens to no signal, one is in a session of its own, one is its child.
        let line = format!(
            "echo $$ >>{0}; (trap '' TERM; echo ready >>{0}.ready; exec sleep 100) & echo $! >>{0}
             setsid sh -c 'echo $$ >>{0}; sleep 100 & echo $! >>{0}; wait' & sleep 100",
            pids.display()
        );
        let mut request = ExecRequest::shell(line);
        request.deadline = Duration::from_millis(700);
        let start = Instant::now();
        let output = shell.exec(&folder, &request);
        assert_eq!(verdict(&output), Verdict::Late, "{}", shell.name);
        assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
        let pids = std::fs::read_to_string(&pids).unwrap();
        assert_eq!(pids.lines().count(), 4, "{pids}");
        for pid in pids.lines() {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let is_gone = stat.is_empty() || stat.contains(") Z");
            assert!(is_gone, "{}: {stat}", shell.name);
        }
        // And a repeat says the same.
        assert_eq!(verdict(&shell.exec(&folder, &request)), Verdict::Late);
    }
}

#[test]
fn output_is_bounded_on_the_disk_and_keeps_its_beginning() {
    for shell in shells() {
        let (_temp, folder) = folder();
        let mut request =
            ExecRequest::shell("printf begin; while :; do echo 0123456789012345678901234567890123456789; done");
        request.deadline = Duration::from_millis(2500);
        request.output_limit_bytes = 10_000;
        let output = shell.exec(&folder, &request);
        let answer = Answer::parse(&output.stdout).unwrap();
        assert_eq!((answer.verdict, answer.cut), (Verdict::Late, [true, false]), "{}", shell.name);
        assert_eq!(answer.stdout.len(), 10_000);
        assert!(answer.stdout.starts_with(b"begin0123"));
        let kept = std::fs::metadata(folder.join(format!("{}.outk", request.operation))).unwrap().len();
        assert_eq!(kept, 10_000);
    }
}

#[test]
fn a_background_process_does_not_hold_up_the_answer() {
    for shell in shells() {
        let (_temp, folder) = folder();
        let start = Instant::now();
        let output = shell.exec(&folder, &ExecRequest::shell("sleep 30 & echo $!"));
        assert!(start.elapsed() < Duration::from_secs(20), "{}", shell.name);
        let pid = String::from_utf8_lossy(stdout(&output)).trim().to_owned();
        assert_eq!(verdict(&output), Verdict::Exit(0));
        let kill = Process::new("kill").arg(&pid).status().unwrap();
        assert!(kill.success(), "the background process was ended with its command");
    }
}

#[test]
fn the_result_survives_the_death_of_the_agent() {
    for shell in shells() {
        let (temp, folder) = folder();
        let gate = temp.path().join("gate");
        let request = ExecRequest::shell(format!(
            "touch {0}.begun; until [ -e {0} ]; do sleep 0.05; done; echo survived",
            gate.display()
        ));
        let sent = run(&folder, &request);
        let mut agent = shell.process(script(), &sent.arguments).spawn().unwrap();
        agent.stdin.take().unwrap().write_all(&sent.input).unwrap();
        until(|| gate.with_extension("begun").exists());
        // What the agent's death does to the runner: its pipes are closed.
        drop((agent.stdout.take(), agent.stderr.take()));
        let attached = std::thread::scope(|scope| {
            let attached = scope.spawn(|| shell.exec(&folder, &request));
            std::fs::write(&gate, "").unwrap();
            attached.join().unwrap()
        });
        assert_eq!((verdict(&attached), stdout(&attached)), (Verdict::Exit(0), &b"survived\n"[..]), "{}", shell.name);
        agent.wait().unwrap();
    }
}

#[test]
fn a_run_of_another_boot_or_without_an_end_is_never_run_again() {
    for shell in shells() {
        let (temp, folder) = folder();
        let mark = temp.path().join("ran");
        let request = ExecRequest::shell(format!("touch {}", mark.display()));
        std::fs::create_dir_all(&folder).unwrap();
        let lock = folder.join(format!("{}.lock", request.operation));
        std::fs::write(&lock, "00000000-0000-0000-0000-000000000000 1 1\n").unwrap();
        assert_eq!(verdict(&shell.exec(&folder, &request)), Verdict::Rebooted, "{}", shell.name);
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
        std::fs::write(&lock, format!("{} 1 1\n", boot.trim())).unwrap();
        assert_eq!(verdict(&shell.exec(&folder, &request)), Verdict::Lost, "{}", shell.name);
        assert!(!mark.exists());
    }
}

#[test]
fn a_runner_that_was_killed_is_known_and_its_command_not_repeated() {
    for shell in shells() {
        let (temp, folder) = folder();
        let mark = temp.path().join("runs");
        let request = ExecRequest::shell(format!("echo run >>{}; sleep 100", mark.display()));
        let sent = run(&folder, &request);
        let mut runner = shell.process(script(), &sent.arguments).spawn().unwrap();
        runner.stdin.take().unwrap().write_all(&sent.input).unwrap();
        until(|| mark.exists());
        // The whole session, as an init that goes down does it; the runner itself hears only the last signal.
        let group = format!("-{}", runner.id());
        for signal in ["-TERM", "-KILL"] {
            let _ = Process::new("kill").args([signal, "--", &group]).status().unwrap();
        }
        runner.wait().unwrap();
        assert_eq!(verdict(&shell.exec(&folder, &request)), Verdict::Lost, "{}", shell.name);
        assert_eq!(std::fs::read_to_string(&mark).unwrap(), "run\n");
    }
}

#[test]
fn the_results_are_for_the_agents_user_alone() {
    use std::os::unix::fs::PermissionsExt;
    for shell in shells() {
        let (_temp, folder) = folder();
        shell.exec(&folder, &ExecRequest::shell("echo secret"));
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&folder), 0o700, "{}", shell.name);
        assert_eq!(mode(folder.parent().unwrap()), 0o755);
        for entry in std::fs::read_dir(&folder).unwrap() {
            assert_eq!(mode(&entry.unwrap().path()) & 0o077, 0);
        }
    }
}

#[test]
fn another_user_gets_the_environment_and_an_unknown_one_gets_nothing() {
    if !std::fs::read_to_string("/proc/self/status").unwrap().contains("Uid:\t0\t") {
        println!("ignored: only root can become another user");
        return;
    }
    for shell in shells() {
        let (_temp, folder) = folder();
        let mut request = ExecRequest::shell("id -un; printf %s \"$SECRET\"; cat; exit 5");
        request.user = Some("nobody".into());
        request.environment.insert("SECRET".into(), "it's\n\"$HOME\"".into());
        request.stdin = "stdin".into();
        let output = shell.exec(&folder, &request);
        assert_eq!(verdict(&output), Verdict::Exit(5), "{} {output:?}", shell.name);
        assert_eq!(String::from_utf8_lossy(stdout(&output)), "nobody\nit's\n\"$HOME\"stdin");
        let mut request = ExecRequest::shell("id");
        request.user = Some("no-such-user".into());
        assert_eq!(verdict(&shell.exec(&folder, &request)), Verdict::NoUser);
        assert!(!folder.join(format!("{}.lock", request.operation)).exists());
    }
}

#[test]
fn secrets_are_not_seen_in_the_process_list() {
    for shell in shells() {
        let (temp, folder) = folder();
        let mark = temp.path().join("begun");
        let mut request = ExecRequest::shell(format!(": hunter2; touch {}; sleep 100", mark.display()));
        request.environment.insert("PASSWORD".into(), "hunter2".into());
        request.deadline = Duration::from_millis(1500);
        let output = std::thread::scope(|scope| {
            let running = scope.spawn(|| shell.exec(&folder, &request));
            until(|| mark.exists());
            let me = std::process::id().to_string();
            for entry in std::fs::read_dir("/proc").unwrap() {
                let path = entry.unwrap().path();
                let words = std::fs::read(path.join("cmdline")).unwrap_or_default();
                let is_me = path.ends_with(&me);
                assert!(is_me || !String::from_utf8_lossy(&words).contains("hunter2"), "{}", path.display());
            }
            running.join().unwrap()
        });
        assert_eq!(verdict(&output), Verdict::Late, "{}", shell.name);
    }
}

#[test]
fn old_results_are_forgotten() {
    for shell in shells() {
        let (_temp, folder) = folder();
        std::fs::create_dir_all(&folder).unwrap();
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
        for n in 0..230 {
            let file = |suffix: &str| folder.join(format!("old-{n:03}.{suffix}"));
            std::fs::write(file("lock"), format!("{} 1 1\n", boot.trim())).unwrap();
            std::fs::write(file("end"), "exit 0\n").unwrap();
            std::fs::write(file("out"), "x").unwrap();
            std::fs::write(file("err"), "").unwrap();
            let old = std::time::SystemTime::now() - Duration::from_secs(10_000 - n);
            for suffix in ["lock", "end", "out", "err"] {
                std::fs::File::options().write(true).open(file(suffix)).unwrap().set_modified(old).unwrap();
            }
        }
        let request = ExecRequest::shell("echo new");
        let run = Run::new(&request, folder.to_str().unwrap(), 100, false, true);
        let output = shell.run(script(), &run.arguments, &run.input);
        assert_eq!(verdict(&output), Verdict::Exit(0), "{}", shell.name);
        let locks = || {
            let names = std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
            names.filter(|name| name.ends_with(".lock")).count()
        };
        until(|| locks() == 200);
        assert!(!folder.join("old-000.out").exists() && folder.join("old-229.out").exists());
        assert_eq!(verdict(&shell.exec(&folder, &request)), Verdict::Exit(0));
    }
}

#[test]
fn scripts_are_well_formed_when_compact() {
    for source in [include_str!("run.sh"), include_str!("put.sh"), include_str!("get.sh"), include_str!("remove.sh")] {
        let output = Process::new("sh").args(["-n", "-c", &compact(source)]).output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    }
}

#[test]
fn files_are_put_got_and_removed() {
    use std::os::unix::fs::PermissionsExt;
    let put = compact(include_str!("put.sh"));
    let get = compact(include_str!("get.sh"));
    let remove = compact(include_str!("remove.sh"));
    const SUM: &str = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"; // hello
    for shell in shells() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("a b/c'*");
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        let hidden = |name: &str| text(&path.parent().unwrap().join(name));
        let call = |phase: &str, mode: (&str, &str), parents: &str, sum: &str, input: &[u8]| {
            let (mask, mode) = mode;
            let temp = hidden(".ocr-11111111-22222222");
            let arguments = [phase, path.to_str().unwrap(), &temp, mask, mode, "", parents, sum].map(str::to_owned);
            let output = shell.run(&put, &arguments, input);
            answer(&output.stdout).unwrap_or_else(|| panic!("{output:?}")).0.join(" ")
        };
        assert_eq!(call("whole", ("022", ""), "0", SUM, b"hello"), "noparent", "{}", shell.name);
        assert_eq!(call("whole", ("022", ""), "1", SUM, b"hello"), "done");
        let mode = || std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777;
        assert_eq!((std::fs::read(&path).unwrap(), mode()), (b"hello".to_vec(), 0o644));
        assert_eq!(call("whole", ("077", "4755"), "0", SUM, b"hello"), "done");
        assert_eq!(mode(), 0o4755);
        assert_eq!(call("whole", ("022", ""), "0", SUM, b"HELLO"), "digest");
        assert_eq!(std::fs::read(&path).unwrap(), b"hello");
        // What a cut-off copy left is cleared by the next one.
        std::fs::write(hidden(".ocr-11111111-00000000"), "stale").unwrap();
        assert_eq!(call("begin", ("077", ""), "0", SUM, b""), "done");
        std::fs::write(hidden(".ocr-11111111-22222222"), "hello").unwrap();
        assert_eq!(call("end", ("077", "600"), "0", SUM, b""), "done");
        assert_eq!((std::fs::read_dir(path.parent().unwrap()).unwrap().count(), mode()), (1, 0o600));

        let got = |path: &Path, most: &str| {
            let output = shell.run(&get, &[text(path), most.to_owned()], b"");
            let (words, bytes) = answer(&output.stdout).unwrap();
            (words.join(" "), bytes.to_vec())
        };
        assert_eq!(got(&path, "100"), ("file".to_owned(), b"hello".to_vec()));
        assert_eq!(got(&path, "2"), ("file".to_owned(), b"he".to_vec()));
        assert_eq!(got(temp.path(), "2").0, "folder");
        assert_eq!(got(&temp.path().join("none"), "2").0, "missing");
        assert_eq!(got(Path::new("/dev/null"), "2").0, "special");

        let removed = |path: &Path| {
            let output = shell.run(&remove, &[text(path)], b"");
            answer(&output.stdout).unwrap().0.join(" ")
        };
        assert_eq!([removed(&path), removed(&path), removed(temp.path())], ["done", "missing", "folder"]);
        // Onto a folder nothing is put.
        std::fs::create_dir(&path).unwrap();
        assert_eq!(call("whole", ("022", ""), "0", SUM, b"hello"), "folder");
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }
}

fn until(mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < end, "waited too long");
        std::thread::sleep(Duration::from_millis(10));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn every_text_survives_the_shells(
        words in proptest::collection::vec("[^\u{0}]{0,20}", 1..4),
        value in "[^\u{0}]{0,40}",
    ) {
        for shell in shells() {
            let (_temp, folder) = folder();
            let mut argv = vec!["printf".to_owned(), "%s\\0".to_owned()];
            argv.extend(words.clone());
            let mut request = ExecRequest::new(Command::Argv(argv));
            request.environment.insert("VALUE".into(), value.clone());
            let output = shell.exec(&folder, &request);
            let want: String = words.iter().map(|word| format!("{word}\0")).collect();
            prop_assert_eq!(String::from_utf8_lossy(stdout(&output)), want, "{} {:?}", shell.name, output);
            let mut request = ExecRequest::shell("printf %s \"$VALUE\"");
            request.environment.insert("VALUE".into(), value.clone());
            let output = shell.exec(&folder, &request);
            prop_assert_eq!(String::from_utf8_lossy(stdout(&output)), value.as_str(), "{}", shell.name);
        }
    }
}
