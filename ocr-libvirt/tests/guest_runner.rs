//! `runner.sh` and `files.sh` as processes, under every shell that is here.

#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "a test says what it left out, and may panic")]

mod guest_support;

use std::{
    fs,
    io::Write,
    os::unix::{
        fs::{PermissionsExt, symlink},
        process::ExitStatusExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use tempfile::TempDir;

const RUN: &str = concat!(
    include_str!("../../ocr-core/src/guest/posix/common.sh"),
    include_str!("../../ocr-core/src/guest/posix/runner.sh")
);
const FILE: &str = concat!(
    include_str!("../../ocr-core/src/guest/posix/common.sh"),
    include_str!("../../ocr-core/src/guest/posix/files.sh")
);

/// What one answer may have of each output.
const INLINE: usize = 4096;

/// A shell under test and a folder for it.
struct Guest {
    shell: PathBuf,
    path: String,
    folder: TempDir,
}

/// Runs a test under each shell that is here.
fn under_each_shell(test: impl Fn(&Guest)) {
    let busybox = guest_support::find("busybox", "busybox-static");
    for (name, found) in [
        ("dash", guest_support::in_path("dash").ok_or("no dash in PATH".to_owned())),
        ("bash", guest_support::in_path("bash").ok_or("no bash in PATH".to_owned())),
        ("busybox", busybox),
    ] {
        let program = match found {
            Ok(program) => program,
            Err(why) => {
                println!("ignored under {name}: {why}");
                continue;
            }
        };
        println!("under {name}");
        let folder = TempDir::new().unwrap();
        let bin = folder.path().join("bin");
        fs::create_dir(&bin).unwrap();
        let mut path = format!("{}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", bin.display());
        if name == "busybox" {
            // Nothing but busybox.
            let list = Command::new(&program).arg("--list").output().unwrap();
            for applet in String::from_utf8(list.stdout).unwrap().lines() {
                symlink(&program, bin.join(applet)).unwrap();
            }
            path = bin.to_str().unwrap().to_owned();
        } else {
            symlink(&program, bin.join("sh")).unwrap();
        }
        test(&Guest { shell: bin.join("sh"), path, folder });
    }
}

/// A request to run a shell line.
#[derive(Clone)]
struct Request<'a> {
    operation: &'a str,
    line: &'a str,
    stdin: Option<&'a [u8]>,
    deadline_cs: u64,
    limit: usize,
    user: &'a str,
    since_cs: u64,
    token: Option<u64>,
}

fn line<'a>(operation: &'a str, line: &'a str) -> Request<'a> {
    Request { operation, line, stdin: None, deadline_cs: 6000, limit: 100_000, user: "", since_cs: 0, token: None }
}

fn under<'a>(token: u64, operation: &'a str, text: &'a str) -> Request<'a> {
    Request { token: Some(token), ..line(operation, text) }
}

fn token_text(token: Option<u64>) -> String {
    token.map_or("-".to_owned(), |token| format!("{token:020}"))
}

/// Files in one group: folder, whether it is made, mode, owner, then names and contents.
type Group<'a> = (&'a str, &'a str, &'a str, &'a str, &'a [(&'a str, &'a [u8])]);

/// What is sent for files: the whole, and how much of it is shell text.
fn stream(groups: &[Group<'_>]) -> (Vec<u8>, usize) {
    let (mut text, mut sizes, mut contents) = (String::new(), String::new(), Vec::new());
    for (folder, parents, mode, owner, files) in groups {
        text.push_str(&format!("g '{folder}' {parents} {mode} '{owner}'"));
        for (name, content) in *files {
            text.push_str(&format!(" './{name}'"));
            sizes.push_str(&format!("{} ", content.len()));
            contents.extend_from_slice(content);
        }
        text.push('\n');
    }
    let text = format!("sizes='{sizes}'\n{text}true");
    ([text.as_bytes(), &contents].concat(), text.len())
}

/// What the runner answered.
#[derive(Debug, PartialEq)]
struct Answer {
    words: String,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

impl Answer {
    fn of(output: Output) -> Self {
        let end =
            output.stdout.iter().position(|byte| *byte == b'\n').unwrap_or_else(|| panic!("no answer: {output:?}"));
        let words = String::from_utf8(output.stdout[..end].to_vec()).unwrap();
        let words = words.strip_prefix("ocr1 ").unwrap_or_else(|| panic!("{words}")).to_owned();
        Self { words, stdout: output.stdout[end + 1..].to_vec(), stderr: output.stderr }
    }

    fn out(&self) -> &str {
        std::str::from_utf8(&self.stdout).unwrap()
    }

    fn err(&self) -> &str {
        std::str::from_utf8(&self.stderr).unwrap()
    }
}

impl Guest {
    fn base(&self) -> PathBuf {
        self.folder.path().join("a base")
    }

    fn of_operation(&self, operation: &str, file: &str) -> PathBuf {
        self.base().join(format!("ops/{operation}.{file}"))
    }

    fn start(&self, script: &str, arguments: &[String], input: &[u8]) -> Child {
        let mut child = self.spawn(script, arguments);
        // Who only repeats does not listen.
        let _ = child.stdin.take().unwrap().write_all(input);
        child
    }

    fn spawn(&self, script: &str, arguments: &[String]) -> Child {
        // The guest's shell is the one under test.
        let script = script.replace("/bin/sh", self.shell.to_str().unwrap());
        Command::new(&self.shell)
            .args(["-c", &script, "ocr-run"])
            .args(arguments)
            .env_clear()
            .env("PATH", &self.path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    fn ask(&self, request: &Request<'_>) -> Child {
        let text = format!("set --;exec 4>&-;{}", request.line);
        let input = match request.stdin {
            None => format!("{text}#ocr").into_bytes(),
            Some(stdin) => [text.as_bytes(), stdin].concat(),
        };
        self.ask_with(request, text.len(), text.len() + request.stdin.map_or(0, <[u8]>::len), "", &input)
    }

    fn ask_with(&self, request: &Request<'_>, head: usize, total: usize, staged: &str, input: &[u8]) -> Child {
        let arguments = [
            self.base().to_str().unwrap().to_owned(),
            request.operation.to_owned(),
            request.deadline_cs.to_string(),
            request.limit.to_string(),
            INLINE.to_string(),
            head.to_string(),
            total.to_string(),
            staged.to_owned(),
            request.user.to_owned(),
            request.since_cs.to_string(),
            token_text(request.token),
        ];
        self.start(RUN, &arguments, input)
    }

    fn run(&self, request: &Request<'_>) -> Answer {
        Answer::of(self.ask(request).wait_with_output().unwrap())
    }

    fn sh(&self, operation: &str, text: &str) -> Answer {
        self.run(&line(operation, text))
    }

    fn start_file(&self, arguments: &[&str], input: &[u8]) -> Child {
        let base = self.base().to_str().unwrap().to_owned();
        let mut all = vec![arguments[0].to_owned(), base];
        all.extend(arguments[1..].iter().map(|argument| (*argument).to_owned()));
        self.start(FILE, &all, input)
    }

    fn file(&self, arguments: &[&str], input: &[u8]) -> Answer {
        Answer::of(self.start_file(arguments, input).wait_with_output().unwrap())
    }

    fn put(&self, path: &str, content: &[u8], mode: &str, owner: &str, parents: &str) -> Answer {
        let (folder, name) = path.rsplit_once('/').unwrap();
        self.put_groups(None, &[(folder, parents, mode, owner, &[(name, content)])])
    }

    fn put_groups(&self, token: Option<u64>, groups: &[Group<'_>]) -> Answer {
        let (input, head) = stream(groups);
        self.put_stream(token, "", &digest(&input), head, "0", &input)
    }

    fn put_stream(
        &self,
        token: Option<u64>,
        staged: &str,
        sum: &str,
        head: usize,
        packed: &str,
        input: &[u8],
    ) -> Answer {
        let (token, head) = (token_text(token), head.to_string());
        self.file(&["put", "id", &token, "500", staged, sum, &head, packed], input)
    }

    /// The letters for these paths.
    fn remove(&self, token: Option<u64>, paths: &[&str]) -> String {
        let words: String = paths.iter().map(|path| format!(" '{path}'")).collect();
        let text = if paths.is_empty() { "true\n#ocr".to_owned() } else { format!("g{words}\ntrue\n#ocr") };
        let words = self.file(&["remove", "id", &token_text(token), "500"], text.as_bytes()).words;
        words.strip_prefix("removed ").unwrap_or(&words).trim_end().to_owned()
    }

    /// What is in BASE/act: work that goes on, or was left.
    fn at_work(&self) -> usize {
        fs::read_dir(self.base().join("act")).map_or(0, Iterator::count)
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    fn names(&self, folder: &str) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(self.path(folder))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

fn digest(content: &[u8]) -> String {
    use sha2::{Digest, Sha256};
    Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn wait_until(what: &str, reached: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !reached() {
        assert!(Instant::now() < end, "{what} did not come to pass");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn is_alive(pid: &str) -> bool {
    let status = fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
    status.rsplit(") ").next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with('Z'))
}

#[test]
fn exit_code_and_both_outputs_come_back_apart() {
    under_each_shell(|guest| {
        let answer = guest.sh("a", "printf 'out\\000\\377'; printf err >&2; exit 3");
        assert_eq!(answer, Answer { words: "done 3 0 0".into(), stdout: b"out\0\xff".into(), stderr: b"err".into() });
        assert_eq!(guest.sh("b", "true").words, "done 0 0 0");
    });
}

#[test]
fn a_command_ended_by_a_signal_gives_128_and_its_number() {
    under_each_shell(|guest| {
        for (signal, code) in [("INT", 130), ("KILL", 137), ("PIPE", 141), ("TERM", 143)] {
            let answer = guest.sh(signal, &format!("kill -{signal} $$"));
            assert_eq!((answer.words, answer.stderr), (format!("done {code} 0 0"), vec![]));
        }
    });
}

#[test]
fn a_missing_program_gives_127() {
    under_each_shell(|guest| {
        for (operation, text) in [("line", "no-such-program"), ("argv", "exec 'no-such-program' 'a'")] {
            let answer = guest.sh(operation, text);
            assert_eq!(answer.words, "done 127 0 0");
            assert!(answer.err().contains("no-such-program"), "{answer:?}");
        }
        let own = guest.path("not executable");
        fs::write(&own, "").unwrap();
        assert_eq!(guest.sh("own", &format!("exec '{own}'")).words, "done 126 0 0");
    });
}

#[test]
fn the_command_sees_nothing_of_the_runner() {
    under_each_shell(|guest| {
        let answer = guest.sh("a", "echo \"$0 $# $(umask) $(pwd) ${base-} ${d-} ${user-}\"; ls /proc/self/fd");
        // 3 is how `ls` looks; 10 and more are the shell's own, or what this test inherited.
        let (first, fds) = answer.out().split_once('\n').unwrap();
        assert_eq!(first.trim_end(), "sh 0 0022 /");
        let low: Vec<_> = fds.split_whitespace().filter(|fd| fd.len() == 1).collect();
        assert_eq!(low, ["0", "1", "2", "3"], "{answer:?}");
        assert!(!fs::read_dir(guest.base().join("ops")).unwrap().any(|entry| {
            let entry = entry.unwrap();
            entry.file_name().to_str().unwrap().ends_with(".cmd") && entry.metadata().unwrap().len() > 0
        }));
    });
}

#[test]
fn what_it_keeps_is_for_root_alone() {
    under_each_shell(|guest| {
        guest.sh("a", "true");
        for folder in [guest.base(), guest.base().join("ops")] {
            assert_eq!(fs::metadata(&folder).unwrap().permissions().mode() & 0o777, 0o700);
        }
        for entry in fs::read_dir(guest.base().join("ops")).unwrap() {
            let entry = entry.unwrap();
            assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{:?}", entry.path());
        }
    });
}

#[test]
fn stdin_reaches_the_command_byte_for_byte() {
    under_each_shell(|guest| {
        let stdin: Vec<u8> = (0..20_000_u32).map(|i| ((i * i) >> 3) as u8).collect();
        let request = Request { stdin: Some(&stdin), ..line("a", "cat; echo; true") };
        let answer = guest.run(&Request { limit: 1 << 20, ..request });
        assert_eq!(answer.words, "done 0 0 0");
        // More than one answer may have; the host reads the rest from the file.
        assert_eq!(answer.stdout, [&stdin[..INLINE + 1]].concat());
        assert_eq!(fs::read(guest.of_operation("a", "out")).unwrap(), [&stdin[..], b"\n"].concat());
        assert_eq!(fs::read(guest.of_operation("a", "stdin")).unwrap(), b"");
        assert_eq!(guest.sh("none", "cat | wc -c").out().trim(), "0");
    });
}

#[test]
fn a_staged_request_is_run_and_removed() {
    under_each_shell(|guest| {
        assert!(guest.file(&["stage"], b"").words.starts_with("differ"));
        let staged = guest.base().join("in/x");
        let (text, stdin) = (format!("cat; echo {}", "y".repeat(3000)), b"to stdin ".as_slice());
        fs::write(&staged, [text.as_bytes(), stdin].concat()).unwrap();
        let ask = || {
            let total = text.len() + stdin.len();
            let child = guest.ask_with(&line("a", ""), text.len(), total, staged.to_str().unwrap(), b"");
            Answer::of(child.wait_with_output().unwrap())
        };
        let first = ask();
        assert_eq!(first.out(), format!("to stdin {}\n", "y".repeat(3000)));
        assert!(!staged.exists());
        assert_eq!(ask(), first, "a repeat needs no input");
    });
}

#[test]
fn half_a_request_is_not_run() {
    under_each_shell(|guest| {
        let ran = guest.path("ran");
        let text = format!("touch '{ran}'");
        // The agent died while it handed the input over.
        let cut = guest.ask_with(&line("a", ""), text.len(), text.len(), "", text.as_bytes());
        assert_eq!(Answer::of(cut.wait_with_output().unwrap()).words, "again");
        let cut = guest.ask_with(&line("a", ""), text.len(), text.len() + 9, "", format!("{text}stdin").as_bytes());
        assert_eq!(Answer::of(cut.wait_with_output().unwrap()).words, "again");
        let absent = guest.ask_with(&line("a", ""), text.len(), text.len(), &guest.path("none"), b"");
        assert_eq!(Answer::of(absent.wait_with_output().unwrap()).words, "again");
        assert!(!Path::new(&ran).exists());
        // Whole at last, it runs.
        assert_eq!(guest.sh("a", &text).words, "done 0 0 0");
        assert!(Path::new(&ran).exists());
    });
}

#[test]
fn a_repeat_tells_the_first_result() {
    under_each_shell(|guest| {
        let count = guest.path("count");
        let text = format!("echo x >>'{count}'; echo told; echo also >&2; exit 5");
        let first = guest.sh("a", &text);
        assert_eq!(guest.sh("a", &text), first);
        assert_eq!(guest.sh("a", "echo something else"), first);
        assert_eq!(fs::read_to_string(count).unwrap(), "x\n");
    });
}

#[test]
fn of_many_at_once_one_runs_and_all_tell_its_result() {
    under_each_shell(|guest| {
        let count = guest.path("count");
        let text = format!("echo x >>'{count}'; sleep 0.3; echo $$");
        let children: Vec<_> = (0..6).map(|_| guest.ask(&line("a", &text))).collect();
        let answers: Vec<_> = children.into_iter().map(|child| Answer::of(child.wait_with_output().unwrap())).collect();
        assert!(answers.iter().all(|answer| *answer == answers[0] && answer.words == "done 0 0 0"), "{answers:?}");
        assert_eq!(fs::read_to_string(count).unwrap(), "x\n");
    });
}

#[test]
fn at_its_deadline_a_command_is_ended_with_its_children() {
    under_each_shell(|guest| {
        let pids = guest.path("pids");
        // Children that ignore TERM, that have a session of their own, or both.
        let text = format!(
            "echo $$ >>'{pids}'; trap '' TERM; sleep 60 & echo $! >>'{pids}'; \
             setsid sh -c 'echo $$ >>\"{pids}\"; sleep 61' & (trap - TERM; sleep 62) & echo $! >>'{pids}'; echo begun; wait; sleep 63"
        );
        let began = Instant::now();
        let request = Request { deadline_cs: 150, ..line("a", &text) };
        let answer = guest.run(&request);
        assert!(answer.words.starts_with("late "), "{answer:?}");
        assert!(began.elapsed() >= Duration::from_millis(1500), "{:?}", began.elapsed());
        assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
        let pids = fs::read_to_string(pids).unwrap();
        assert_eq!(pids.lines().count(), 4, "{pids}");
        wait_until("the end of all", || !pids.lines().any(is_alive));
        assert_eq!(guest.run(&request), answer, "a repeat tells the same");
    });
}

#[test]
fn a_command_that_removes_our_folder_has_a_deadline_too() {
    under_each_shell(|guest| {
        let text = format!(
            "rm -r '{}'; trap '' TERM; echo $$ >'{}'; sleep 60; sleep 61",
            guest.base().display(),
            guest.path("pid")
        );
        let answer = guest.run(&Request { deadline_cs: 100, ..line("a", &text) });
        assert!(answer.words.starts_with("late "), "{answer:?}");
        let pid = fs::read_to_string(guest.path("pid")).unwrap();
        wait_until("the end of it", || !is_alive(&pid));
    });
}

#[test]
fn what_a_command_leaves_in_the_background_is_not_waited_for_and_goes_on() {
    under_each_shell(|guest| {
        let began = Instant::now();
        let answer = guest.sh("a", "sleep 30 & echo $!");
        assert!(began.elapsed() < Duration::from_secs(10));
        let pid = answer.out().trim().to_owned();
        assert!(is_alive(&pid));
        Command::new("kill").arg(&pid).status().unwrap();
    });
}

#[test]
fn output_over_the_limit_is_cut_while_it_comes() {
    under_each_shell(|guest| {
        let request = Request {
            limit: 1000,
            ..line("a", "i=0; while [ $i -lt 3000 ]; do i=$((i+1)); echo $i; done; echo e >&2")
        };
        let answer = guest.run(&request);
        assert_eq!(answer.words, "done 0 1 0");
        let whole: String = (1..=3000).map(|i| format!("{i}\n")).collect();
        assert_eq!(answer.out(), &whole[..1000]);
        assert_eq!(answer.err(), "e\n");

        // Much of it, for longer than the watch waits: the disk never holds it all.
        let file = guest.of_operation("b", "out");
        let writer = "yes 0123456789abcdef | head -c 300000000; yes 0123456789abcdef | head -c 1000; sleep 2.5; echo after; exit 4";
        let child = guest.ask(&Request { limit: 5000, ..line("b", writer) });
        wait_until("cutting", || guest.of_operation("b", "out.kept").exists());
        wait_until("emptying", || fs::metadata(&file).is_ok_and(|data| data.len() < 5000));
        let answer = Answer::of(child.wait_with_output().unwrap());
        assert_eq!(answer.words, "done 4 1 0");
        assert_eq!(answer.stdout.len(), INLINE + 1);
        let kept = fs::read_to_string(file).unwrap();
        assert_eq!(kept, "0123456789abcdef\n".repeat(300)[..5000]);

        let answer = guest.run(&Request { limit: 0, ..line("c", "echo some") });
        assert_eq!((answer.words.as_str(), answer.out()), ("done 0 1 0", ""));
    });
}

#[test]
fn a_runner_that_was_killed_is_not_waited_for_nor_run_again() {
    under_each_shell(|guest| {
        let count = guest.path("count");
        let text = format!("echo x >>'{count}'; sleep 60");
        let request = Request { deadline_cs: 100, ..line("a", &text) };
        let mut child = guest.ask(&request);
        wait_until("the command", || Path::new(&count).exists());
        let waiting = guest.ask(&request);
        child.kill().unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(9));
        assert_eq!(Answer::of(waiting.wait_with_output().unwrap()).words, "died");
        assert_eq!(guest.run(&request).words, "died");
        // The watch outlives the runner, and the command its deadline not.
        let session = fs::read_to_string(guest.of_operation("a", "pids")).unwrap();
        wait_until("the end of the command", || !is_alive(&session));
        assert_eq!(fs::read_to_string(count).unwrap(), "x\n");
    });
}

#[test]
fn signals_to_the_runners_group_do_not_pass_for_the_commands_end() {
    under_each_shell(|guest| {
        let begun = guest.path("begun");
        let child = guest.ask(&line("a", &format!("touch '{begun}'; sleep 1; echo done")));
        wait_until("the command", || Path::new(&begun).exists());
        for signal in ["-HUP", "-INT"] {
            Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
        }
        assert_eq!(Answer::of(child.wait_with_output().unwrap()).out(), "done\n");
        // Whoever ends it, as a guest does that goes down, ends the command too: what that makes of it is no result.
        let text = format!("touch '{begun}2'; sleep 1; echo done");
        let child = guest.ask(&line("down", &text));
        wait_until("the command", || Path::new(&format!("{begun}2")).exists());
        Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
        assert_eq!(Answer::of(child.wait_with_output().unwrap()).words, "died");
        assert_eq!(guest.sh("down", &text).words, "died");
        // Those that a command sends to its own group are its own.
        assert_eq!(guest.sh("b", "kill -TERM 0").words, "done 143 0 0");
    });
}

#[test]
fn a_runner_whose_listener_died_keeps_the_result() {
    under_each_shell(|guest| {
        let text = "sleep 0.3; echo kept; kill -KILL $$";
        let mut child = guest.ask(&line("a", text));
        drop((child.stdout.take(), child.stderr.take()));
        child.wait().unwrap();
        let answer = guest.sh("a", text);
        assert_eq!((answer.words.as_str(), answer.out()), ("done 137 0 0", "kept\n"));
    });
}

#[test]
fn a_reboot_in_the_middle_is_told_and_nothing_is_run_again() {
    under_each_shell(|guest| {
        let count = guest.path("count");
        let text = format!("echo x >>'{count}'");
        guest.sh("a", &text);
        // As it would be found after a reboot: begun in another boot, no result.
        fs::remove_file(guest.of_operation("a", "result")).unwrap();
        let run = guest.of_operation("a", "run");
        let old = fs::read_to_string(&run).unwrap();
        let words: Vec<_> = old.split_whitespace().collect();
        let other = format!("{} {} 00000000-0000-4000-8000-000000000000 {}\n", words[0], words[1], words[3]);
        fs::write(&run, other).unwrap();
        assert_eq!(guest.sh("a", &text).words, "rebooted");
        assert_eq!(fs::read_to_string(&count).unwrap(), "x\n");
        // The reboot took the trace with it, but the host knows that it asked before this boot.
        assert_eq!(guest.run(&Request { since_cs: 1 << 50, ..line("b", &text) }).words, "rebooted");
        assert_eq!(fs::read_to_string(&count).unwrap(), "x\n");
        // A result that a crash cut short is none.
        fs::write(guest.of_operation("a", "result"), "done 0 0").unwrap();
        assert_eq!(guest.sh("a", &text).words, "rebooted");
    });
}

#[test]
fn old_results_go_and_new_ones_stay() {
    under_each_shell(|guest| {
        guest.sh("first", "true");
        let ops = guest.base().join("ops");
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
        for i in 0..150 {
            for (file, text) in
                [("run", format!("1 1 {boot}")), ("result", "done 0 0 0 0 7 .\n".to_owned()), ("out", "x".to_owned())]
            {
                let path = ops.join(format!("old{i}.{file}"));
                fs::write(&path, text).unwrap();
            }
        }
        // One that runs for long.
        let begun = guest.path("begun");
        let child = guest.ask(&line("running", &format!("touch '{begun}'; sleep 2; echo ran")));
        wait_until("the command", || Path::new(&begun).exists());
        guest.sh("last", "echo last");
        let runs = || {
            fs::read_dir(&ops)
                .unwrap()
                .filter(|entry| entry.as_ref().unwrap().path().extension().is_some_and(|e| e == "run"))
                .count()
        };
        wait_until("pruning", || runs() <= 65);
        assert_eq!(guest.sh("last", "echo other").out(), "last\n");
        assert_eq!(guest.sh("first", "echo other").words, "done 0 0 0");
        assert_eq!(Answer::of(child.wait_with_output().unwrap()).out(), "ran\n");

        // Big outputs: few are kept.
        for i in 0..8 {
            guest.sh(&format!("big{i}"), "yes | head -c 5000");
        }
        let there = |operation: &str| guest.of_operation(operation, "out").exists();
        let big = || (0..8).filter(|i| guest.of_operation(&format!("big{i}"), "out").exists()).count();
        wait_until("pruning of big ones", || big() <= 5);
        assert!(there("big7"));
        for operation in ["huge1", "huge2", "huge3"] {
            let request = Request { limit: 1 << 30, ..line(operation, "head -c 20000000 /dev/zero; exit 6") };
            assert_eq!(guest.run(&request).words, "done 6 0 0");
        }
        wait_until("pruning of huge ones", || !there("huge1") && !there("huge2"));
        assert!(there("huge3"));
    });
}

#[test]
fn a_user_has_its_own_environment_and_files() {
    if !guest_support::is_root() {
        println!("ignored: only root can become another user");
        return;
    }
    under_each_shell(|guest| {
        let text = "id -un; echo $HOME:$USER:$LOGNAME:$A; cat; echo e >&2; echo reopened >/dev/stderr; exit 7";
        let line = Request { user: "nobody", ..line("a", "export A='quoted '\\''x'\\''';") };
        let both = format!("{}{text}", line.line);
        let answer = guest.run(&Request { line: &both, stdin: Some(b"in\n"), ..line });
        assert_eq!(answer.words, "done 7 0 0", "{answer:?}");
        let home = fs::read_to_string("/etc/passwd").unwrap();
        let home = home.lines().find(|line| line.starts_with("nobody:")).unwrap().split(':').nth(5).unwrap().to_owned();
        assert_eq!(answer.out(), format!("nobody\n{home}:nobody:nobody:quoted 'x'\nin\n"));
        assert!(answer.err().ends_with("reopened\n"), "{answer:?}");
    });
}

#[test]
fn an_unknown_user_runs_nothing() {
    under_each_shell(|guest| {
        let ran = guest.path("ran");
        let text = format!("touch '{ran}'");
        let request = Request { user: "no-such-user", ..line("a", &text) };
        assert_eq!(guest.run(&request).words, "nouser");
        assert!(!Path::new(&ran).exists());
        assert_eq!(guest.sh("a", "true").words, "done 0 0 0", "the name of the operation is still free");
    });
}

#[test]
fn a_user_past_its_deadline_is_ended_too() {
    if !guest_support::is_root() {
        println!("ignored: only root can become another user");
        return;
    }
    under_each_shell(|guest| {
        let request =
            Request { user: "nobody", deadline_cs: 100, ..line("a", "trap '' TERM; echo $$; sleep 60; sleep 61") };
        let answer = guest.run(&request);
        assert!(answer.words.starts_with("late "), "{answer:?}");
        wait_until("the end of it", || !is_alive(answer.out()));
    });
}

#[test]
fn a_base_that_cannot_be_made_is_told() {
    under_each_shell(|guest| {
        fs::write(guest.base(), "a file").unwrap();
        let answer = guest.sh("a", "true");
        assert!(answer.words.starts_with("fail "), "{answer:?}");
    });
}

#[test]
fn a_file_is_put_whole_with_its_mode() {
    under_each_shell(|guest| {
        let path = guest.path("f");
        for (content, mode) in [(b"one".as_slice(), 0o644), (b"", 0o755), (b"\0\xff\n\n", 0o4700)] {
            assert_eq!(guest.put(&path, content, &format!("{mode:o}"), "", "0").words, "ok");
            assert_eq!(fs::read(&path).unwrap(), content);
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, mode);
        }
        assert_eq!(guest.names("."), ["a base", "bin", "f"]);
    });
}

#[test]
fn a_put_that_fails_leaves_what_was_there_and_nothing_else() {
    under_each_shell(|guest| {
        let path = guest.path("f");
        let folder = guest.path("");
        let folder = folder.trim_end_matches('/');
        fs::write(&path, "old").unwrap();
        let group = |name: &'static str, mode, owner, content: &'static [u8]| {
            stream(&[(folder, "0", mode, owner, &[(name, content)])])
        };
        let (input, head) = group("f", "644", "", b"new");
        let sum = digest(&input);
        // Damaged on the way, or cut.
        assert_eq!(guest.put_stream(None, "", &digest(b"other"), head, "0", &input).words, "again");
        assert_eq!(guest.put_stream(None, "", &sum, head, "0", &input[..input.len() - 1]).words, "again");
        assert_eq!(guest.put(&path, b"new", "644", "no-such-user", "0").words, "noowner 0");
        assert!(guest.put(&path, b"new", "rubbish", "", "0").words.starts_with("failed 0 "));
        assert_eq!(guest.put_stream(None, &guest.path("none"), &sum, head, "0", b"").words, "again");
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(guest.names("."), ["a base", "bin", "f"]);
        // With a staged content, that goes too.
        assert!(guest.file(&["stage"], b"").words.starts_with("differ"));
        let staged = guest.base().join("in/x");
        let text = staged.to_str().unwrap();
        fs::write(&staged, "new").unwrap();
        assert_eq!(guest.put_stream(None, text, &sum, head, "0", b"").words, "again");
        assert!(!staged.exists());
        fs::write(&staged, &input).unwrap();
        assert_eq!(guest.put_stream(None, text, &sum, head, "0", b"").words, "ok");
        assert!(!staged.exists());
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(guest.names("."), ["a base", "bin", "f"]);
        assert_eq!(guest.at_work(), 0);
    });
}

#[test]
fn many_files_come_in_one_stream_and_none_is_changed_before_all_are_there() {
    under_each_shell(|guest| {
        let root = guest.path("");
        let root = root.trim_end_matches('/');
        let (deep, odd) = (format!("{root}/deep/er"), format!("{root}/odd"));
        fs::create_dir(&odd).unwrap();
        let big: Vec<u8> = (0..(3 << 20) + 17_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 11) as u8).collect();
        let names = ["-n", " a b ", "*", "line\nfeed", "\\", ".hidden", "ünï"];
        let odd_files: Vec<_> = names.iter().map(|name| (*name, name.as_bytes())).collect();
        let groups: [Group<'_>; 3] = [
            (&deep, "1", "755", "", &[("big", &big), ("empty", b""), ("last", b"no end")]),
            (&odd, "0", "600", "", &odd_files),
            (root, "0", "644", "", &[("f", b"f\n\n")]),
        ];
        for packed in [false, true] {
            let (input, head) = stream(&groups);
            let (sum, flag) = (digest(&input), if packed { "1" } else { "0" });
            let input = if packed { gzip(&input) } else { input };
            assert_eq!(guest.put_stream(None, "", &sum, head, flag, &input).words, "ok", "packed: {packed}");
            for (folder, _, mode, _, files) in &groups {
                for (name, content) in *files {
                    let path = format!("{folder}/{name}");
                    assert!(fs::read(&path).unwrap() == *content, "{path:?}");
                    let bits = fs::metadata(&path).unwrap().permissions().mode() & 0o7777;
                    assert_eq!(format!("{bits:o}"), *mode, "{path:?}");
                }
            }
            assert_eq!(guest.names("."), ["a base", "bin", "deep", "f", "odd"]);
            assert_eq!(guest.names("odd").len(), names.len());
            fs::remove_dir_all(format!("{root}/deep")).unwrap();
        }
        // The last of them cannot be.
        let taken: [Group<'_>; 2] = [
            (&odd, "0", "600", "", &[("-n", b"changed"), ("*", b"changed")]),
            (root, "0", "644", "", &[("new", b""), ("odd", b"")]),
        ];
        assert_eq!(guest.put_groups(None, &taken).words, "folder 3");
        let lost = format!("{root}/none");
        let lost: [Group<'_>; 2] = [taken[0], (&lost, "0", "644", "", &[("f", b"")])];
        assert_eq!(guest.put_groups(None, &lost).words, "noparent 2");
        assert_eq!(fs::read(format!("{odd}/-n")).unwrap(), b"-n");
        assert_eq!(guest.names("."), ["a base", "bin", "f", "odd"]);
        assert_eq!(guest.at_work(), 0);
    });
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    use flate2::{Compression, write::GzEncoder};
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn what_is_there_already_is_known_by_content_mode_and_owner() {
    under_each_shell(|guest| {
        let paths = [guest.path("a"), guest.path("with blank")];
        for path in &paths {
            assert_eq!(guest.put(path, b"content", "755", "", "0").words, "ok");
        }
        let check = |mode: &str, content: &[u8]| {
            let text = format!("same {mode} '' '{}' '{}'\ntrue", paths[0], paths[1]);
            let list = format!("{}  {}\n{}  {}\n", digest(b"content"), paths[0], digest(content), paths[1]);
            let all = format!("{text}{list}");
            let (head, bytes) = (text.len().to_string(), all.len().to_string());
            guest.file(&["check", "id", "-", "500", &head, &bytes], all.as_bytes()).words
        };
        let differs = |words: String| assert!(words.starts_with("differ"), "{words}");
        assert_eq!(check("755", b"content"), "same");
        differs(check("755", b"other"));
        differs(check("700", b"content"));
        fs::remove_file(&paths[0]).unwrap();
        differs(check("755", b"content"));
        symlink(&paths[1], &paths[0]).unwrap();
        differs(check("755", b"content"));
        assert!(guest.base().join("in").is_dir(), "it is ready for what is to be sent");
        // Half a list is no list.
        assert_eq!(guest.file(&["check", "id", "-", "500", "4", "500"], b"true").words, "again");
        assert_eq!(guest.at_work(), 0);
    });
}

#[test]
fn what_a_killed_put_left_goes_with_the_next_work_whatever_its_paths() {
    under_each_shell(|guest| {
        let folder = guest.path("d's");
        fs::create_dir(&folder).unwrap();
        let quoted = folder.replace('\'', "'\\''");
        let (input, head) = stream(&[(&quoted, "0", "644", "", &[("f", b"new"), ("g", b"new")])]);
        let base = guest.base().to_str().unwrap().to_owned();
        let arguments = ["put", &base, "id", "-", "500", "", &digest(&input), &head.to_string(), "0"];
        // Its input does not end.
        let mut child = guest.spawn(FILE, &arguments.map(str::to_owned));
        let name = format!("id.{}", child.id());
        let of_put = |end: &str| guest.base().join(format!("act/{name}.{end}"));
        wait_until("the put", || of_put("all").exists());
        // Whoever comes now waits, and gives up when it takes too long.
        assert_eq!(guest.file(&["remove", "id", "-", "50"], b"true\n#ocr").words, "busy");
        child.kill().unwrap();
        child.wait().unwrap();
        // As it would be in the middle of it.
        fs::write(of_put("head"), &input[..head]).unwrap();
        let temporary = format!("{folder}/.ocr-{name}-1");
        fs::create_dir(&temporary).unwrap();
        fs::write(format!("{temporary}/f"), "ne").unwrap();
        assert_eq!(guest.remove(None, &[]), "");
        assert_eq!((fs::read_dir(&folder).unwrap().count(), guest.at_work()), (0, 0));
        // What is not whole itself names nothing that can be removed.
        fs::write(of_put("run"), "1 1 another-boot - 5\n").unwrap();
        fs::write(of_put("head"), &input[..head / 2]).unwrap();
        assert_eq!(guest.remove(None, &[]), "");
        assert_eq!(guest.at_work(), 0);
    });
}

#[test]
fn an_older_token_is_refused_and_changes_nothing() {
    under_each_shell(|guest| {
        let ran = guest.path("ran");
        let root = guest.path("");
        let root = root.trim_end_matches('/');
        let put = |token| guest.put_groups(Some(token), &[(root, "0", "644", "", &[("f", b"x")])]).words;
        assert_eq!(guest.run(&under(7, "a", "echo seven")).out(), "seven\n");
        assert_eq!(guest.run(&under(1_700_000_000_000_000, "b", "true")).words, "done 0 0 0");
        let text = format!("touch '{ran}'");
        for token in [0, 7, 8, 1_699_999_999_999_999] {
            assert_eq!(guest.run(&under(token, "c", &text)).words, "fenced", "{token}");
            assert_eq!(put(token), "fenced");
            assert_eq!(guest.remove(Some(token), &[&guest.path("bin/sh")]), "fenced");
        }
        assert_eq!(guest.run(&under(7, "a", "echo seven")).words, "fenced", "a repeat");
        assert!(!Path::new(&ran).exists() && !Path::new(&guest.path("f")).exists() && guest.shell.exists());
        // The same is no older one, and none at all is not compared.
        assert_eq!(put(1_700_000_000_000_000), "ok");
        assert_eq!(guest.sh("d", "true").words, "done 0 0 0");
        assert_eq!(guest.remove(Some(9_223_372_036_854_775_807), &[&guest.path("f")]), "k");
        assert_eq!(guest.run(&under(1_700_000_000_000_000, "e", &text)).words, "fenced");
        assert_eq!(fs::read_dir(guest.base().join("fence")).unwrap().count(), 1, "one token is kept");
        assert_eq!(guest.at_work(), 0);
    });
}

#[test]
fn of_many_tokens_at_once_the_newest_stays() {
    under_each_shell(|guest| {
        let children: Vec<_> =
            (1..=24_u64).map(|i| guest.ask(&under(i * 5 % 24 + 1, &format!("o{i}"), "true"))).collect();
        for child in children {
            let words = Answer::of(child.wait_with_output().unwrap()).words;
            assert!(words == "done 0 0 0" || words == "fenced", "{words}");
        }
        assert_eq!(guest.run(&under(23, "late", "true")).words, "fenced");
        assert_eq!(guest.run(&under(24, "newest", "true")).words, "done 0 0 0");
    });
}

#[test]
fn a_newer_token_waits_for_what_runs_under_an_older_one() {
    under_each_shell(|guest| {
        let log = guest.path("log");
        let begun =
            |n: usize| wait_until("the command", || fs::read_to_string(&log).is_ok_and(|t| t.lines().count() >= n));
        let text = format!("echo a >>'{log}'; sleep 1; echo b >>'{log}'");
        let older = guest.ask(&under(1, "older", &text));
        begun(1);
        // Without a token nothing is waited for.
        assert_eq!(guest.sh("none", &format!("cat '{log}'")).out(), "a\n");
        let newer = guest.run(&under(2, "newer", &format!("cat '{log}'")));
        assert_eq!(newer.out(), "a\nb\n");
        assert_eq!(Answer::of(older.wait_with_output().unwrap()).words, "done 0 0 0");

        // The same operation under a newer token is the same run.
        fs::remove_file(&log).unwrap();
        let older = guest.ask(&under(2, "same", &text));
        begun(1);
        let newer = guest.run(&under(3, "same", &text));
        assert_eq!(newer, Answer::of(older.wait_with_output().unwrap()));
        assert_eq!(fs::read_to_string(&log).unwrap(), "a\nb\n");

        // Past its own deadline it gives up, and leaves no trace.
        fs::remove_file(&log).unwrap();
        let older = guest.ask(&under(3, "long", &format!("echo a >>'{log}'; sleep 3")));
        begun(1);
        let hasty = Request { deadline_cs: 50, ..under(4, "hasty", "echo ran") };
        assert_eq!(guest.run(&hasty).words, "busy");
        assert_eq!(guest.file(&["remove", "id", &token_text(Some(4)), "50"], b"true\n#ocr").words, "busy");
        assert!(!guest.of_operation("hasty", "run").exists());
        assert_eq!(Answer::of(older.wait_with_output().unwrap()).words, "done 0 0 0");
        assert_eq!(guest.run(&hasty).out(), "ran\n");
    });
}

#[test]
fn one_that_waits_is_refused_when_a_newer_token_comes() {
    under_each_shell(|guest| {
        let log = guest.path("log");
        let oldest = guest.ask(&under(1, "oldest", &format!("echo oldest >>'{log}'; sleep 1; echo end >>'{log}'")));
        wait_until("the command", || Path::new(&log).exists());
        let middle = guest.ask(&under(2, "middle", &format!("echo middle >>'{log}'")));
        wait_until("its turn", || guest.of_operation("middle", "run").exists());
        let newest = guest.run(&under(3, "newest", &format!("echo newest >>'{log}'")));
        assert_eq!(newest.words, "done 0 0 0");
        assert_eq!(Answer::of(middle.wait_with_output().unwrap()).words, "fenced");
        assert_eq!(Answer::of(oldest.wait_with_output().unwrap()).words, "done 0 0 0");
        assert_eq!(fs::read_to_string(&log).unwrap(), "oldest\nend\nnewest\n");
    });
}

#[test]
fn a_command_whose_runner_was_killed_is_waited_for_and_not_for_longer() {
    under_each_shell(|guest| {
        let log = guest.path("log");
        let mut child = guest.ask(&under(1, "a", &format!("echo a >>'{log}'; sleep 2; echo b >>'{log}'")));
        wait_until("the command", || Path::new(&log).exists());
        child.kill().unwrap();
        child.wait().unwrap();
        let began = Instant::now();
        assert_eq!(guest.run(&under(2, "b", &format!("cat '{log}'"))).out(), "a\nb\n");
        assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
        // Nor for one that a reboot ended.
        let run = guest.of_operation("a", "run");
        let old = fs::read_to_string(&run).unwrap();
        let words: Vec<_> = old.split_whitespace().collect();
        fs::write(&run, format!("{} {} 00000000-0000-4000-8000-000000000000 {}\n", words[0], words[1], words[3]))
            .unwrap();
        assert_eq!(guest.run(&under(3, "c", "true")).words, "done 0 0 0");
    });
}

#[test]
fn folders_are_made_only_when_asked_for_and_never_replaced() {
    under_each_shell(|guest| {
        let path = guest.path("new/folder with blanks/f");
        assert_eq!(guest.put(&path, b"x", "644", "", "0").words, "noparent 0");
        assert_eq!(guest.put(&path, b"x", "644", "", "1").words, "ok");
        assert_eq!(fs::metadata(guest.path("new")).unwrap().permissions().mode() & 0o777, 0o755);
        assert_eq!(guest.put(&guest.path("new"), b"x", "644", "", "1").words, "folder 0");
        symlink(guest.path("new"), guest.path("link")).unwrap();
        assert_eq!(guest.put(&guest.path("link"), b"x", "644", "", "1").words, "folder 0");
        assert!(
            guest.put(&guest.path("new/folder with blanks/f/g"), b"x", "644", "", "1").words.starts_with("failed 0 ")
        );
        assert_eq!(guest.names("new"), ["folder with blanks"]);
    });
}

#[test]
fn getting_and_removing_tell_what_is_there() {
    under_each_shell(|guest| {
        let path = guest.path("f");
        fs::write(&path, b"\0content\n").unwrap();
        let get = |path: &str, limit: &str| guest.file(&["get", path, limit, "100"], b"");
        assert_eq!(get(&path, "9"), Answer { words: "file 9".into(), stdout: b"\0content\n".into(), stderr: vec![] });
        assert_eq!(get(&path, "8").words, "over 9");
        assert_eq!(get(&guest.path("none"), "8").words, "missing");
        assert_eq!(get(&guest.path("bin"), "8").words, "folder");
        assert_eq!(get("/dev/zero", "8").words, "special");
        fs::write(guest.path("big"), vec![b'x'; 101]).unwrap();
        assert_eq!(get(&guest.path("big"), "1000").words, "large");

        let (bin, none) = (guest.path("bin"), guest.path("none"));
        symlink("nowhere", guest.path("dangling")).unwrap();
        symlink(&bin, guest.path("link")).unwrap();
        let (dangling, link) = (guest.path("dangling"), guest.path("link"));
        assert_eq!(guest.remove(None, &[&path, &bin, &none, &dangling, &link]), "kfmkk");
        assert_eq!(guest.remove(None, &[&path]), "m");
        assert!(Path::new(&bin).is_dir() && fs::symlink_metadata(link).is_err());
        assert_eq!(guest.file(&["remove", "id", "-", "500"], b"g '/tmp'").words, "again", "half a request");
    });
}
