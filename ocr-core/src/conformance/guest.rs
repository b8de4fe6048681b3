//! Cases of [`GuestExec`](crate::GuestExec). The guest is Linux with a POSIX shell and the usual small programs.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use tokio::{sync::mpsc, time::Instant};

use super::context::{Broken, Check, Context, ensure, fails, shown};
use crate::{
    Command, Deletion, Error, ErrorKind, ExecOutput, ExecRequest, FencingToken, GuestExec, GuestExecExt, OperationId,
    OutputChunk, PowerAction, PutFile, PutFiles, RemoveFiles, Retry, VmId, VmSpec, VmState, error::reason,
};

/// Bytes without a pattern, the same every time.
pub(super) fn noise(bytes: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut noise = Vec::with_capacity(bytes);
    while noise.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        noise.extend_from_slice(&state.to_le_bytes());
    }
    noise.truncate(bytes);
    noise
}

/// A guest and the turn to use it.
struct Guest<'a> {
    exec: &'a dyn GuestExec,
    vm: VmId,
    deadline: Duration,
    _turn: tokio::sync::MutexGuard<'a, ()>,
}

async fn guest<'a>(c: &'a Context<'a>) -> Check<Guest<'a>> {
    let (vm, turn) = c.shared_guest().await?;
    Ok(Guest { exec: c.guest()?.as_ref(), vm, deadline: c.deadline(), _turn: turn })
}

impl Guest<'_> {
    fn request(&self, line: &str) -> ExecRequest {
        ExecRequest { deadline: self.deadline, ..ExecRequest::shell(line) }
    }

    async fn run(&self, request: &ExecRequest) -> Check<ExecOutput> {
        Ok(self.exec.exec(self.vm, request).await?)
    }

    /// What a line that must succeed writes to stdout.
    async fn sh(&self, line: &str) -> Check<String> {
        let output = self.run(&self.request(line)).await?;
        ensure!(output.success(), "{line:?} in the guest ended with {output:?}");
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    async fn put(&self, path: &str, content: impl Into<Bytes>) -> Check {
        Ok(self.exec.put_file(self.vm, &PutFile::new(path, content)).await?)
    }

    async fn get(&self, path: &str) -> Check<Bytes> {
        Ok(self.exec.get_file(self.vm, path, 4 << 20).await?)
    }

    /// Mode and owner as `ls` shows them.
    async fn mode(&self, path: &str) -> Check<(String, String)> {
        let line = self.sh(&format!("ls -ld {path}")).await?;
        let columns: Vec<_> = line.split_whitespace().collect();
        match columns.as_slice() {
            // More than ten characters: an access list's or a label's mark.
            [mode, _, owner, ..] if mode.len() >= 10 => Ok((mode[..10].to_owned(), (*owner).to_owned())),
            _ => Err(Broken(format!("ls -ld in the guest wrote {line:?}"))),
        }
    }

    async fn clean(&self, paths: &[&str]) -> Check {
        self.sh(&format!("rm -rf {}", paths.join(" "))).await.map(drop)
    }
}

fn has_reason(error: &Error, wanted: &str, what: &str) -> Check {
    ensure!(error.reason() == Some(wanted), "{what} must give the reason {wanted}, it gave {}", shown(error));
    Ok(())
}

pub(super) async fn guest_info_missing(c: &Context<'_>) -> Check {
    let error =
        fails(c.guest()?.guest_info(VmId::random()).await, &[ErrorKind::NotFound], "a machine that is not there")?;
    has_reason(&error, reason::GUEST_GONE, "a machine that is not there")
}

pub(super) async fn guest_info_stopped(c: &Context<'_>) -> Check {
    let vm = c.running("a").await?.id;
    c.compute()?.set_power(vm, PowerAction::Stop { grace: None }).await?;
    c.becomes(vm, VmState::Stopped).await?;
    let error = fails(c.guest()?.guest_info(vm).await, &[ErrorKind::Conflict], "a machine that is off")?;
    has_reason(&error, reason::GUEST_NOT_RUNNING, "a machine that is off")?;
    let error =
        fails(c.guest()?.shell(vm, "true").await, &[ErrorKind::Conflict], "a command on a machine that is off")?;
    has_reason(&error, reason::GUEST_NOT_RUNNING, "a command on a machine that is off")
}

pub(super) async fn guest_info_ready(c: &Context<'_>) -> Check {
    let guest = guest(c).await?;
    let info = guest.exec.guest_info(guest.vm).await?;
    ensure!(!info.agent_version.is_empty(), "an agent's version must be told: {info:?}");
    ensure!(info.can_exec && info.can_files, "an agent that can run commands and write files must say so: {info:?}");
    Ok(())
}

fn not_ready(error: &Error, what: &str) -> Check {
    let right = error.kind() == ErrorKind::Unavailable && error.reason() == Some(reason::AGENT_NOT_READY);
    ensure!(right, "{what} must give unavailable with {}, it gave {}", reason::AGENT_NOT_READY, shown(error));
    Ok(())
}

pub(super) async fn guest_booting(c: &Context<'_>) -> Check {
    let vm = c.running("a").await?.id;
    let end = Instant::now() + c.deadline();
    let mut pause = Duration::from_millis(20);
    while let Err(error) = c.guest()?.guest_info(vm).await {
        not_ready(&error, "a guest that boots")?;
        ensure!(error.retry() == Retry::Safe, "a guest that boots must be safe to ask again: {}", shown(&error));
        ensure!(Instant::now() < end, "the guest never became ready: {}", shown(&error));
        tokio::time::sleep(pause).await;
        pause = (pause * 3 / 2).min(Duration::from_secs(1));
    }
    Ok(())
}

pub(super) async fn guest_rebooted(c: &Context<'_>) -> Check {
    let vm = c.running("a").await?.id;
    let guest = c.guest()?;
    guest.wait_ready(vm, c.deadline(), Duration::from_secs(1)).await?;
    // Linux gives each boot an id of its own.
    let boot_id = || guest.shell(vm, "cat /proc/sys/kernel/random/boot_id");
    let before = boot_id().await?;
    ensure!(before.success() && !before.stdout.is_empty(), "the guest has no boot id: {before:?}");
    c.compute()?.set_power(vm, PowerAction::Reboot { grace: None }).await?;
    let end = Instant::now() + c.deadline();
    let mut pause = Duration::from_millis(20);
    loop {
        match boot_id().await {
            Ok(now) if now.success() && now.stdout != before.stdout => return Ok(()),
            // The backend may take its time to begin.
            Ok(_) => {}
            Err(error) => not_ready(&error, "a guest that reboots")?,
        }
        ensure!(Instant::now() < end, "the guest did not boot anew");
        tokio::time::sleep(pause).await;
        pause = (pause * 3 / 2).min(Duration::from_secs(1));
    }
}

pub(super) async fn guest_gone_everywhere(c: &Context<'_>) -> Check {
    let (guest, vm) = (c.guest()?, VmId::random());
    let calls: [(&str, crate::Result<()>); 5] = [
        ("guest_info", guest.guest_info(vm).await.map(drop)),
        ("put_files", guest.put_file(vm, &PutFile::new("/tmp/x", "x")).await),
        ("get_file", guest.get_file(vm, "/tmp/x", 1).await.map(drop)),
        ("remove_files", guest.remove_file(vm, "/tmp/x").await.map(drop)),
        ("exec", guest.exec(vm, &ExecRequest::shell("true")).await.map(drop)),
    ];
    for (what, result) in calls {
        let what = format!("{what} on a machine that is not there");
        let error = fails(result, &[ErrorKind::NotFound], &what)?;
        has_reason(&error, reason::GUEST_GONE, &what)?;
        ensure!(error.retry() == Retry::Never, "{what} must not be worth a repeat: {}", shown(&error));
    }
    Ok(())
}

pub(super) async fn guest_agent_absent(c: &Context<'_>) -> Check {
    let image = c.subject.mute_template.ok_or_else(|| Broken("no mute template".to_owned()))?;
    let vm = c.create(&VmSpec { image, ..c.spec("a")? }).await?;
    let vm = c.becomes(vm.id, VmState::Running).await?;
    ensure!(!vm.has_agent_channel, "a machine without an agent must not claim a channel for one");
    let error = fails(c.guest()?.guest_info(vm.id).await, &[ErrorKind::Unsupported], "a machine without an agent")?;
    has_reason(&error, reason::AGENT_ABSENT, "a machine without an agent")?;
    let result = c.guest()?.wait_ready(vm.id, c.deadline(), Duration::from_secs(1)).await;
    fails(result, &[ErrorKind::Unsupported], "waiting for an agent that there is none of")?;
    Ok(())
}

pub(super) async fn guest_bad_path(c: &Context<'_>) -> Check {
    let guest = guest(c).await?;
    for path in ["tmp/x", "", "/tmp/../tmp/x", "/tmp/./x", "/tmp/x/", "/tmp/x\0y"] {
        let what = format!("the path {path:?}");
        fails(guest.exec.put_file(guest.vm, &PutFile::new(path, "x")).await, &[ErrorKind::Invalid], &what)?;
        fails(guest.exec.get_file(guest.vm, path, 1).await, &[ErrorKind::Invalid], &what)?;
        fails(guest.exec.remove_file(guest.vm, path).await, &[ErrorKind::Invalid], &what)?;
    }
    Ok(())
}

pub(super) async fn guest_put_roundtrip(c: &Context<'_>) -> Check {
    let guest = guest(c).await?;
    // A blank, a quote and a dollar: names are never read by a shell.
    let path = c.path("it's a $file");
    let most = usize::try_from(guest.exec.capabilities().max_file_bytes).unwrap_or(usize::MAX);
    for size in [0, 1, 4096, 300_001, 1_500_000] {
        let content = noise(size.min(most));
        guest.put(&path, content.clone()).await?;
        let found = guest.get(&path).await?;
        ensure!(found == content, "{} bytes came back different, {} of them", content.len(), found.len());
    }
    let lines = "no end of line, \r\n, \u{e4}, \u{1f600}, and NUL \0.";
    guest.put(&path, lines).await?;
    let found = guest.get(&path).await?;
    ensure!(found == lines, "{found:?} came back instead of {lines:?}");
    guest.exec.remove_file(guest.vm, &path).await?;
    Ok(())
}

pub(super) async fn guest_put_replace(c: &Context<'_>) -> Check {
    let guest = guest(c).await?;
    let path = c.path("f");
    let (old, new) = (Bytes::from(noise(150_000)), Bytes::from(vec![b'n'; 200_000]));
    guest.put(&path, old.clone()).await?;
    ensure!(guest.get(&path).await? == old, "the file is not what was written");
    let written = AtomicBool::new(false);
    let write = async {
        let result = guest.put(&path, new.clone()).await;
        written.store(true, Ordering::Relaxed);
        result
    };
    let read = async {
        loop {
            let last = written.load(Ordering::Relaxed);
            let found = guest.get(&path).await?;
            ensure!(found == old || found == new, "a reader saw {} bytes that are neither old nor new", found.len());
            if last {
                ensure!(found == new, "the file is still the old one");
                return Ok(());
            }
            tokio::task::yield_now().await;
        }
    };
    let (write, read) = tokio::join!(write, read);
    write?;
    read?;
    let beside = guest.sh(&format!("ls -a /tmp | grep -F {} || true", c.path("f").trim_start_matches("/tmp/"))).await?;
    ensure!(beside.lines().count() == 1, "beside the file there are {beside:?}");
    guest.clean(&[&path]).await
}

pub(super) async fn guest_put_mode(c: &Context<'_>) -> Check {
    let guest = guest(c).await?;
    let path = c.path("f");
    let agent = guest.sh("id -un").await?.trim().to_owned();
    guest.put(&path, "x").await?;
    let found = guest.mode(&path).await?;
    ensure!(found == ("-rw-r--r--".to_owned(), agent.clone()), "without a mode it is {found:?}; the agent is {agent}");
    let owner = c.subject.guest_user.clone().filter(|_| guest.exec.capabilities().users);
    let file = PutFile { mode: Some(0o751), owner: owner.clone(), ..PutFile::new(&path, "x") };
    guest.exec.put_file(guest.vm, &file).await?;
    let found = guest.mode(&path).await?;
    let wanted = ("-rwxr-x--x".to_owned(), owner.unwrap_or(agent));
    ensure!(found == wanted, "mode and owner are {found:?} instead of {wanted:?}");
    guest.clean(&[&path]).await
}

pub(super) async fn guest_put_parents(c: &Context<'_>) -> Check {
    let guest = guest(c).await?;
    let (folder, path) = (c.path("d"), c.path("d/e/f"));
    let file = PutFile { make_parents: true, ..PutFile::new(&path, "x") };
    guest.exec.put_file(guest.vm, &file).await?;
    ensure!(guest.get(&path).await? == "x", "the file is not what was written");
    for folder in [&folder, &c.path("d/e")] {
        let (mode, _) = guest.mode(folder).await?;
        ensure!(mode == "drwxr-xr-x", "a folder that was made has the mode {mode}");
    }
    // Folders that are there are no trouble, and stay as they are.
    guest.sh(&format!("chmod 700 {folder}")).await?;
    guest.exec.put_file(guest.vm, &file).await?;
    let (mode, _) = guest.mode(&folder).await?;
    ensure!(mode == "drwx------", "a folder that was there has now the mode {mode}");
    guest.clean(&[&folder]).await
}

pub(super) async fn guest_put_no_parents(c: &Context<'_>) -> Check {
    let guest = guest(c).await?;
    let result = guest.exec.put_file(guest.vm, &PutFile::new(c.path("d/f"), "x")).await;
    let error = fails(result, &[ErrorKind::NotFound], "a file in a folder that is not there")?;
    ensure!(error.reason() != Some(reason::GUEST_GONE), "the machine is there: {}", shown(&error));
    let made = guest.run(&guest.request(&format!("[ -e {} ]", c.path("d")))).await?;
    ensure!(!made.success(), "the folder was made");
    Ok(())
}

pub(super) async fn guest_put_onto_folder(c: &Context<'_>) -> Check {
    let guest = guest(c).await?;
    let folder = c.path("d");
    guest.sh(&format!("mkdir {folder} && echo kept > {folder}/f")).await?;
    let result = guest.exec.put_file(guest.vm, &PutFile::new(&folder, "x")).await;
    fails(result, &[ErrorKind::Invalid, ErrorKind::Conflict], "writing onto a folder")?;
    let kept = guest.sh(&format!("ls -A {folder}; cat {folder}/f")).await?;
    ensure!(kept == "f\nkept\n", "in the folder there is now {kept:?}");
    guest.clean(&[&folder]).await
}

pub(super) async fn guest_put_many(c: &Context<'_>) -> Check {
    let guest = guest(c).await?;
    let folder = c.path("d");
    let mut files = Vec::new();
    for i in 0..24_u32 {
        let path = format!("{folder}/{}/it's a file {i}", ["a", "a/b", "c"][i as usize % 3]);
        let content = Bytes::from(numbers(i * 7));
        let mode = [None, Some(0o755), Some(0o600)][i as usize % 3];
        files.push(PutFile { mode, make_parents: true, ..PutFile::new(path, content) });
    }
    let request = PutFiles::new(files);
    // Twice: a repeat of what is there already is fine.
    for _ in 0..2 {
        guest.exec.put_files(guest.vm, &request).await?;
        for file in &request.files {
            let found = guest.get(&file.path).await?;
            ensure!(found == file.content, "{} bytes of {} came back as {found:?}", file.content.len(), file.path);
        }
        for (file, wanted) in request.files[1..3].iter().zip(["-rwxr-xr-x", "-rw-------"]) {
            let (mode, _) = guest.mode(&file.path.replace(['\'', ' '], "?")).await?;
            ensure!(mode == wanted, "{} has the mode {mode} instead of {wanted}", file.path);
        }
    }
    guest.exec.put_files(guest.vm, &PutFiles::default()).await?;
    guest.clean(&[&folder]).await
}

pub(super) async fn guest_put_names_the_file(c: &Context<'_>) -> Check {
    let guest = guest(c).await?;
    let (first, last, folder) = (c.path("first"), c.path("last"), c.path("folder"));
    guest.put(&first, "old").await?;
    guest.sh(&format!("mkdir {folder}")).await?;
    let kinds = [ErrorKind::NotFound, ErrorKind::Invalid, ErrorKind::Conflict];
    for bad in [c.path("none/lost"), folder.clone()] {
        let files = [&first, &bad, &last].map(|path| PutFile::new(path, "new"));
        let error = fails(guest.exec.put_files(guest.vm, &PutFiles::new(files.to_vec())).await, &kinds, "a bad file")?;
        ensure!(error.to_string().contains(&bad), "the error must name {bad}: {error}");
        ensure!(guest.get(&first).await? == "old", "a file before the bad one was changed");
        fails(guest.exec.get_file(guest.vm, &last, 9).await, &[ErrorKind::NotFound], "a file after the bad one")?;
    }
    guest.clean(&[&first, &folder]).await
}

pub(super) async fn guest_put_twice(c: &Context<'_>) -> Check {
    let guest = guest(c).await?;
    let path = c.path("f");
    let request = PutFiles::new(vec![PutFile::new(&path, "one"), PutFile::new(&path, "two")]);
    fails(guest.exec.put_files(guest.vm, &request).await, &[ErrorKind::Invalid], "a path that is there twice")?;
    fails(guest.exec.get_file(guest.vm, &path, 9).await, &[ErrorKind::NotFound], "the file that was refused")?;
    Ok(())
}

pub(super) async fn guest_get_missing(c: &Context<'_>) -> Check {
    let guest = guest(c).await?;
    for path in [c.path("none"), c.path("none/f")] {
        let result = guest.exec.get_file(guest.vm, &path, 1).await;
        let error = fails(result, &[ErrorKind::NotFound], "a file that is not there")?;
        ensure!(error.reason() != Some(reason::GUEST_GONE), "the machine is there: {}", shown(&error));
    }
    Ok(())
}

pub(super) async fn guest_get_limit(c: &Context<'_>) -> Check {
    let guest = guest(c).await?;
    let path = c.path("f");
    guest.put(&path, vec![b'x'; 1017]).await?;
    let whole = guest.exec.get_file(guest.vm, &path, 1017).await?;
    ensure!(whole.len() == 1017, "a file as large as the limit came back with {} bytes", whole.len());
    let error =
        fails(guest.exec.get_file(guest.vm, &path, 1016).await, &[ErrorKind::Exhausted], "a file over the limit")?;
    ensure!(error.to_string().contains("1016"), "the error must name the limit, 1016: {error}");
    guest.clean(&[&path]).await
}

pub(super) async fn guest_remove(c: &Context<'_>) -> Check {
    let guest = guest(c).await?;
    let (path, beside) = (c.path("f"), c.path("f.2"));
    guest.put(&path, "x").await?;
    guest.put(&beside, "x").await?;
    let deletion = guest.exec.remove_file(guest.vm, &path).await?;
    ensure!(deletion == Deletion::Deleted, "removing a file gave {deletion:?}");
    fails(guest.exec.get_file(guest.vm, &path, 1).await, &[ErrorKind::NotFound], "a removed file")?;
    guest.get(&beside).await?;
    for path in [&path, &c.path("none/f")] {
        let deletion = guest.exec.remove_file(guest.vm, path).await?;
        ensure!(deletion == Deletion::AlreadyGone, "removing what is not there gave {deletion:?}");
    }
    guest.clean(&[&beside]).await
}

pub(super) async fn guest_remove_folder(c: &Context<'_>) -> Check {
    let guest = guest(c).await?;
    let folder = c.path("d");
    guest.sh(&format!("mkdir {folder}")).await?;
    let result = guest.exec.remove_file(guest.vm, &folder).await;
    fails(result, &[ErrorKind::Invalid, ErrorKind::Conflict], "removing a folder")?;
    let (mode, _) = guest.mode(&folder).await?;
    ensure!(mode.starts_with('d'), "it is no folder any more: {mode}");
    guest.clean(&[&folder]).await
}

pub(super) async fn guest_remove_many(c: &Context<'_>) -> Check {
    let guest = guest(c).await?;
    let (first, folder, last) = (c.path("first"), c.path("d"), c.path("it's last"));
    guest.put(&first, "x").await?;
    guest.put(&last, "x").await?;
    guest.sh(&format!("mkdir {folder}")).await?;
    let request = RemoveFiles::new([&first, &folder, &c.path("none"), &last]);
    let outcomes = guest.exec.remove_files(guest.vm, &request).await?;
    let [one, refused, none, two] = <[crate::Result<Deletion>; 4]>::try_from(outcomes)
        .map_err(|outcomes| Broken(format!("four paths gave {} outcomes", outcomes.len())))?;
    ensure!((one?, two?) == (Deletion::Deleted, Deletion::Deleted), "the files around a folder were not removed");
    ensure!(none? == Deletion::AlreadyGone, "what is not there was removed");
    fails(refused, &[ErrorKind::Invalid, ErrorKind::Conflict], "removing a folder among files")?;
    for path in [&first, &last] {
        fails(guest.exec.get_file(guest.vm, path, 1).await, &[ErrorKind::NotFound], "a removed file")?;
    }
    let outcomes = guest.exec.remove_files(guest.vm, &RemoveFiles::default()).await?;
    ensure!(outcomes.is_empty(), "no paths gave {} outcomes", outcomes.len());
    guest.clean(&[&folder]).await
}

pub(super) async fn guest_exec_output(c: &Context<'_>) -> Check {
    let guest = guest(c).await?;
    let output = guest.run(&guest.request(r"printf 'out\000\377\r\n'; printf 'err\376' >&2; exit 7")).await?;
    ensure!(output.exit_code == 7, "exit code {} instead of 7", output.exit_code);
    ensure!(output.stdout[..] == *b"out\0\xff\r\n", "stdout was {:?}", output.stdout);
    ensure!(output.stderr[..] == *b"err\xfe", "stderr was {:?}", output.stderr);
    ensure!(!output.stdout_truncated && !output.stderr_truncated, "short output was flagged as cut");
    let output = guest.run(&guest.request("true")).await?;
    ensure!(output.success() && output.stdout.is_empty() && output.stderr.is_empty(), "true ended with {output:?}");
    Ok(())
}

fn numbers(last: u32) -> String {
    (1..=last).map(|number| format!("{number}\n")).collect()
}

pub(super) async fn guest_exec_output_limit(c: &Context<'_>) -> Check {
    let guest = guest(c).await?;
    let whole = numbers(2000);
    let mut request = guest.request("seq 1 2000; seq 1 2000 >&2; exit 3");
    request.output_limit_bytes = 1000;
    let output = guest.run(&request).await?;
    ensure!(output.exit_code == 3, "exit code {} instead of 3", output.exit_code);
    for (what, found, cut) in
        [("stdout", &output.stdout, output.stdout_truncated), ("stderr", &output.stderr, output.stderr_truncated)]
    {
        ensure!(found[..] == whole.as_bytes()[..1000], "{what} must be its first 1000 bytes, it has {}", found.len());
        ensure!(cut, "{what} was cut and not flagged");
    }
    request = guest.request("seq 1 2000; echo short >&2");
    request.output_limit_bytes = whole.len() as u64;
    let output = guest.run(&request).await?;
    ensure!(output.stdout == whole && !output.stdout_truncated, "stdout as long as the limit must not be cut");
    ensure!(output.stderr == "short\n" && !output.stderr_truncated, "short stderr must not be cut");
    Ok(())
}

pub(super) async fn guest_exec_large_output(c: &Context<'_>) -> Check {
    let guest = guest(c).await?;
    // Ten bytes a line: more than the 3 MiB that an agent's one message can hold.
    let out: String = (100_000_000..=100_360_000).map(|number| format!("{number}\n")).collect();
    let err = numbers(30_000);
    let output = guest.run(&guest.request("seq 100000000 100360000; seq 1 30000 >&2")).await?;
    ensure!(output.success(), "exit code {}", output.exit_code);
    ensure!(output.stdout == out, "{} bytes of stdout instead of {}, or others", output.stdout.len(), out.len());
    ensure!(output.stderr == err, "{} bytes of stderr instead of {}, or others", output.stderr.len(), err.len());
    ensure!(!output.stdout_truncated && !output.stderr_truncated, "whole output was flagged as cut");
    Ok(())
}

pub(super) async fn guest_exec_environment(c: &Context<'_>) -> Check {
    let guest = guest(c).await?;
    let odd = "it's a \"test\" of $HOME; `x` \\ \u{e4}\nand = a line";
    let environment = BTreeMap::from([
        ("CONFORM_ODD".to_owned(), odd.to_owned()),
        ("CONFORM_EMPTY".to_owned(), String::new()),
        ("HOME".to_owned(), "/somewhere".to_owned()),
    ]);
    let line = r#"printf '%s|%s|%s|' "$CONFORM_ODD" "${CONFORM_EMPTY-unset}" "$HOME"; [ -n "$PATH" ] && printf path"#;
    let output = guest.run(&ExecRequest { environment, ..guest.request(line) }).await?;
    let wanted = format!("{odd}||/somewhere|path");
    ensure!(output.stdout == wanted, "the command saw {:?} instead of {wanted:?}", output.stdout);
    let left = guest.sh(r#"printf '%s' "${CONFORM_ODD-unset}""#).await?;
    ensure!(left == "unset", "the next command still sees {left:?}");
    Ok(())
}

pub(super) async fn guest_exec_stdin(c: &Context<'_>) -> Check {
    let guest = guest(c).await?;
    for stdin in [b"line\n\0\xff no end".to_vec(), noise(100_000)] {
        let stdin = Bytes::from(stdin);
        let output = guest.run(&ExecRequest { stdin: stdin.clone(), ..guest.request("cat") }).await?;
        ensure!(output.stdout == stdin, "{} bytes of stdin came out as {}", stdin.len(), output.stdout.len());
    }
    let output = guest.run(&guest.request("cat; echo end")).await?;
    ensure!(output.stdout == "end\n", "without stdin the command must see its end, it wrote {:?}", output.stdout);
    Ok(())
}

pub(super) async fn guest_exec_shell(c: &Context<'_>) -> Check {
    let guest = guest(c).await?;
    let line = "a=1\nif [ $a -eq 1 ]; then echo \"a is $a\" | cat; fi # a comment\necho $((a + 1)); false || echo \"it's fine\"";
    let found = guest.sh(line).await?;
    ensure!(found == "a is 1\n2\nit's fine\n", "the shell wrote {found:?}");
    Ok(())
}

pub(super) async fn guest_exec_argv(c: &Context<'_>) -> Check {
    let guest = guest(c).await?;
    let argv = ["printf", "<%s>", "$HOME", "a b", "*", "", "'\"", "; exit 3", "\u{e4}\n"];
    let output = guest.run(&ExecRequest { deadline: c.deadline(), ..ExecRequest::argv(argv) }).await?;
    let wanted = "<$HOME><a b><*><><'\"><; exit 3><\u{e4}\n>";
    ensure!(output.success() && output.stdout == wanted, "the arguments arrived as {output:?}");
    Ok(())
}

pub(super) async fn guest_exec_user(c: &Context<'_>) -> Check {
    let guest = guest(c).await?;
    let user = c.subject.guest_user.clone().unwrap_or_default();
    let request = ExecRequest { user: Some(user.clone()), ..guest.request("id -un; echo $((1 + 1)); cat; exit 4") };
    let output = guest.run(&ExecRequest { stdin: Bytes::from_static(b"in"), ..request }).await?;
    ensure!(output.stdout == format!("{user}\n2\nin"), "as {user} the command wrote {:?}", output.stdout);
    ensure!(output.exit_code == 4, "exit code {} instead of 4", output.exit_code);
    let agent = guest.sh("id -un").await?;
    ensure!(agent.trim() != user, "the next command still runs as {user}");
    Ok(())
}

pub(super) async fn guest_exec_unknown_user(c: &Context<'_>) -> Check {
    let guest = guest(c).await?;
    let path = c.path("f");
    let request = ExecRequest { user: Some("no-such-user".to_owned()), ..guest.request(&format!("echo x > {path}")) };
    fails(guest.exec.exec(guest.vm, &request).await, &[ErrorKind::Invalid], "a user that the guest does not have")?;
    let ran = guest.run(&guest.request(&format!("[ -e {path} ]"))).await?;
    ensure!(!ran.success(), "the command ran");
    Ok(())
}

pub(super) async fn guest_exec_users_unsupported(c: &Context<'_>) -> Check {
    let guest = guest(c).await?;
    let user = c.subject.guest_user.clone().unwrap_or_else(|| "root".to_owned());
    let request = ExecRequest { user: Some(user), ..guest.request("true") };
    fails(guest.exec.exec(guest.vm, &request).await, &[ErrorKind::Unsupported], "a user without the capability")?;
    Ok(())
}

pub(super) async fn guest_exec_repeat(c: &Context<'_>) -> Check {
    let guest = guest(c).await?;
    let path = c.path("f");
    let request = guest.request(&format!("echo x >> {path}; wc -l < {path}; echo e >&2; exit 5"));
    let first = guest.run(&request).await?;
    ensure!(first.exit_code == 5, "exit code {} instead of 5", first.exit_code);
    let again = guest.run(&request).await?;
    ensure!(again == first, "a repeat gave {again:?} after {first:?}");
    let other = ExecRequest { operation: OperationId::random(), ..request.clone() };
    guest.run(&other).await?;
    let again = guest.run(&request).await?;
    ensure!(again == first, "a repeat after another command gave {again:?} after {first:?}");
    let lines = guest.sh(&format!("cat {path}")).await?;
    ensure!(lines == "x\nx\n", "two operations ran {} times", lines.lines().count());
    guest.clean(&[&path]).await
}

pub(super) async fn guest_exec_race(c: &Context<'_>) -> Check {
    let guest = guest(c).await?;
    let path = c.path("f");
    let request = guest.request(&format!("echo x >> {path}; sleep 1; cat {path}"));
    let (one, two) = tokio::join!(guest.run(&request), guest.run(&request));
    let (one, two) = (one?, two?);
    ensure!(one == two, "two at once gave {one:?} and {two:?}");
    let lines = guest.sh(&format!("cat {path}")).await?;
    ensure!(lines == "x\n", "two at once ran {} times", lines.lines().count());
    guest.clean(&[&path]).await
}

pub(super) async fn guest_exec_deadline(c: &Context<'_>) -> Check {
    let guest = guest(c).await?;
    let path = c.path("f");
    // A child that shows by a growing file that it lives.
    let line = format!("sh -c 'while true; do echo x >> {path}; sleep 1; done'; true");
    let request = ExecRequest { deadline: Duration::from_secs(3), ..guest.request(&line) };
    let begin = Instant::now();
    let result = tokio::time::timeout(c.deadline() + request.deadline, guest.exec.exec(guest.vm, &request)).await;
    let result = result.map_err(|_| Broken("a command past its deadline never returned".to_owned()))?;
    fails(result, &[ErrorKind::TimedOut], "a command past its deadline")?;
    let took = begin.elapsed();
    ensure!(took >= Duration::from_secs(3), "it was ended after {took:?}, before its deadline");
    let sizes = guest.sh(&format!("wc -c < {path}; sleep 3; wc -c < {path}")).await?;
    let sizes: Vec<_> = sizes.split_whitespace().collect();
    ensure!(sizes.len() == 2 && sizes[0] == sizes[1], "a child still runs: its file grew from {sizes:?}");
    guest.clean(&[&path]).await
}

pub(super) async fn guest_exec_no_program(c: &Context<'_>) -> Check {
    let guest = guest(c).await?;
    for command in [
        Command::Argv(vec!["/no/such/program".to_owned()]),
        Command::Argv(vec!["no-such-program".to_owned(), "x".to_owned()]),
        Command::Shell("no-such-program x".to_owned()),
    ] {
        let what = format!("{command:?}");
        let output = guest.run(&ExecRequest { command, ..guest.request("true") }).await?;
        ensure!(output.exit_code == 127, "{what} ended with {output:?}");
    }
    Ok(())
}

pub(super) async fn guest_exec_progress(c: &Context<'_>) -> Check {
    let guest = guest(c).await?;
    let (progress, mut chunks) = mpsc::channel(64);
    let request = ExecRequest { progress: Some(progress), ..guest.request("echo one; echo e >&2; sleep 5; echo two") };
    let run = guest.exec.exec(guest.vm, &request);
    let mut run = std::pin::pin!(run);
    let mut seen = (Vec::new(), Vec::new());
    let mut first = None;
    let output = loop {
        tokio::select! {
            biased;
            Some(chunk) = chunks.recv() => {
                match chunk {
                    OutputChunk::Stdout(bytes) => seen.0.extend_from_slice(&bytes),
                    OutputChunk::Stderr(bytes) => seen.1.extend_from_slice(&bytes),
                }
                first.get_or_insert_with(Instant::now);
            }
            result = &mut run => break result?,
        }
    };
    // Between the first output and the end the command sleeps; half of that is for slow polls.
    let ahead = first.map(|first| first.elapsed()).unwrap_or_default();
    ensure!(ahead >= Duration::from_millis(2500), "the first output was sent only {ahead:?} before the command's end");
    while let Ok(chunk) = chunks.try_recv() {
        match chunk {
            OutputChunk::Stdout(bytes) => seen.0.extend_from_slice(&bytes),
            OutputChunk::Stderr(bytes) => seen.1.extend_from_slice(&bytes),
        }
    }
    ensure!(output.stdout == seen.0 && output.stdout == "one\ntwo\n", "stdout {:?}, sent {:?}", output.stdout, seen.0);
    ensure!(output.stderr == seen.1, "stderr {:?}, sent {:?}", output.stderr, seen.1);
    // A receiver that is gone, or full, loses progress and nothing else.
    let (gone, receiver) = mpsc::channel(1);
    drop(receiver);
    let (full, _kept) = mpsc::channel(1);
    for progress in [gone, full] {
        let request = ExecRequest { progress: Some(progress), ..guest.request("seq 1 20000") };
        let output = guest.run(&request).await?;
        ensure!(output.stdout == numbers(20_000), "{} bytes of output are left", output.stdout.len());
    }
    Ok(())
}

/// Ten tokens in a row, newer than any of an earlier case or run.
fn tokens() -> [FencingToken; 10] {
    static LAST: AtomicU64 = AtomicU64::new(0);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64);
    let last = LAST.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |last| Some(now.max(last + 10)));
    let first = now.max(last.unwrap_or_default() + 10);
    std::array::from_fn(|i| FencingToken(first + i as u64))
}

fn is_fenced(error: &Error, what: &str) -> Check {
    ensure!(error.kind() == ErrorKind::Conflict, "{what} must be refused with conflict, it gave {}", shown(error));
    ensure!(error.retry() == Retry::Never, "{what} must not be worth a repeat: {}", shown(error));
    has_reason(error, reason::FENCED, what)
}

impl Guest<'_> {
    fn under(&self, token: FencingToken, line: &str) -> ExecRequest {
        ExecRequest { fence: Some(token), ..self.request(line) }
    }

    async fn refuses(&self, request: &ExecRequest, what: &str) -> Check {
        match self.exec.exec(self.vm, request).await {
            Ok(output) => Err(Broken(format!("{what} must be refused, it gave {output:?}"))),
            Err(error) => is_fenced(&error, what),
        }
    }

    async fn is_there(&self, path: &str) -> Check<bool> {
        Ok(!self.sh(&format!("if [ -e {path} ]; then echo there; fi")).await?.is_empty())
    }

    async fn until_there(&self, path: &str) -> Check {
        let end = Instant::now() + self.deadline;
        while !self.is_there(path).await? {
            ensure!(Instant::now() < end, "{path} never came");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }
}

pub(super) async fn guest_fence_refuses(c: &Context<'_>) -> Check {
    let guest = guest(c).await?;
    let [old, new, newer, ..] = tokens();
    let path = c.path("f");
    let ran = guest.under(old, "echo ran");
    ensure!(guest.run(&ran).await?.stdout == "ran\n", "a command under a first token did not run");
    guest.run(&guest.under(new, "true")).await?;
    guest.refuses(&guest.under(old, &format!("echo x > {path}")), "a command under an older token").await?;
    guest.refuses(&ran, "a repeat under an older token").await?;
    // What was refused has not become the newest; the same token is no older one.
    ensure!(guest.run(&guest.under(new, "echo same")).await?.stdout == "same\n", "the newest token was refused");
    guest.run(&guest.under(newer, "true")).await?;
    guest.refuses(&guest.under(new, &format!("echo x > {path}")), "a command under what was the newest token").await?;
    ensure!(!guest.is_there(&path).await?, "a refused command ran");
    Ok(())
}

pub(super) async fn guest_fence_files(c: &Context<'_>) -> Check {
    let guest = guest(c).await?;
    let [old, new, newer, ..] = tokens();
    let path = c.path("f");
    let put = |token, content: &'static str| {
        let request = PutFiles { files: vec![PutFile::new(&path, content)], fence: Some(token) };
        async { guest.exec.put_files(guest.vm, &{ request }).await }
    };
    let remove = |token| {
        let request = RemoveFiles { paths: vec![path.clone()], fence: Some(token) };
        async { guest.exec.remove_files(guest.vm, &{ request }).await }
    };
    put(old, "old").await?;
    put(new, "new").await?;
    let error = fails(put(old, "older").await, &[ErrorKind::Conflict], "a file under an older token")?;
    is_fenced(&error, "a file under an older token")?;
    let error = fails(remove(old).await, &[ErrorKind::Conflict], "a removal under an older token")?;
    is_fenced(&error, "a removal under an older token")?;
    guest.refuses(&guest.under(old, "true"), "a command under an older token than a file's").await?;
    ensure!(guest.get(&path).await? == "new", "a refused request changed the file");
    remove(newer).await?;
    let error = fails(put(new, "new").await, &[ErrorKind::Conflict], "a file under an older token than a removal's")?;
    is_fenced(&error, "a file under an older token than a removal's")?;
    ensure!(!guest.is_there(&path).await?, "a refused file was written");
    Ok(())
}

pub(super) async fn guest_fence_reboot(c: &Context<'_>) -> Check {
    let vm = c.running("a").await?.id;
    let guest = c.guest()?;
    let [old, new, ..] = tokens();
    guest.wait_ready(vm, c.deadline(), Duration::from_secs(1)).await?;
    let under = |fence| ExecRequest {
        fence,
        deadline: c.deadline(),
        ..ExecRequest::shell("cat /proc/sys/kernel/random/boot_id")
    };
    let before = guest.exec(vm, &under(Some(new))).await?;
    // In good order, so that the disk has what was written.
    c.compute()?.set_power(vm, PowerAction::Reboot { grace: Some(c.deadline()) }).await?;
    let end = Instant::now() + c.deadline();
    let mut pause = Duration::from_millis(20);
    loop {
        match guest.exec(vm, &under(None)).await {
            Ok(now) if now.success() && now.stdout != before.stdout => break,
            Ok(_) => {}
            Err(error) => not_ready(&error, "a guest that reboots")?,
        }
        ensure!(Instant::now() < end, "the guest did not boot anew");
        tokio::time::sleep(pause).await;
        pause = (pause * 3 / 2).min(Duration::from_secs(1));
    }
    match guest.exec(vm, &under(Some(old))).await {
        Ok(_) => Err(Broken("an older token must be refused after a reboot too".to_owned())),
        Err(error) => is_fenced(&error, "an older token after a reboot"),
    }
}

pub(super) async fn guest_fence_none(c: &Context<'_>) -> Check {
    let guest = guest(c).await?;
    let [token, ..] = tokens();
    let path = c.path("f");
    guest.run(&guest.under(token, "true")).await?;
    ensure!(guest.sh("echo unfenced").await? == "unfenced\n", "a command without a token was not run");
    guest.put(&path, "x").await?;
    ensure!(guest.exec.remove_file(guest.vm, &path).await? == Deletion::Deleted, "the file was not removed");
    // Nor is anything waited for.
    let begun = c.path("begun");
    let long = guest.under(token, &format!("echo x > {begun}; sleep 2; rm {begun}"));
    let long = guest.run(&long);
    let meanwhile = async {
        guest.until_there(&begun).await?;
        ensure!(guest.is_there(&begun).await?, "a request without a token waited for a command under one");
        Ok(())
    };
    let (long, meanwhile) = tokio::join!(long, meanwhile);
    long?;
    meanwhile
}

pub(super) async fn guest_fence_waits(c: &Context<'_>) -> Check {
    let guest = guest(c).await?;
    let [first, second, third, fourth, ..] = tokens();
    let (path, begun, put) = (c.path("f"), c.path("begun"), c.path("put"));
    let older = guest.under(first, &format!("echo a >> {path}; sleep 1; echo b >> {path}"));
    let newer = guest.under(second, &format!("cat {path}"));
    let (older, newer) = tokio::join!(guest.run(&older), async {
        guest.until_there(&path).await?;
        guest.run(&newer).await
    });
    ensure!(older?.success(), "the command under the older token did not end well");
    let newer = newer?;
    ensure!(newer.stdout == "a\nb\n", "a command under a newer token saw an older one's work half done: {newer:?}");
    // Files do the same.
    let older = guest.under(third, &format!("echo x > {begun}; sleep 1; [ ! -e {put} ] && cat {path}"));
    let files = PutFiles { files: vec![PutFile::new(&put, "x")], fence: Some(fourth) };
    let (older, newer) = tokio::join!(guest.run(&older), async {
        guest.until_there(&begun).await?;
        Check::Ok(guest.exec.put_files(guest.vm, &files).await?)
    });
    newer?;
    let older = older?;
    ensure!(older.stdout == "a\nb\n", "a file under a newer token came while an older command ran: {older:?}");
    guest.clean(&[&path, &begun, &put]).await
}

pub(super) async fn guest_fence_wait_ends(c: &Context<'_>) -> Check {
    let guest = guest(c).await?;
    let [first, second, ..] = tokens();
    let (begun, path) = (c.path("begun"), c.path("f"));
    let older = guest.under(first, &format!("echo x > {begun}; sleep 6; echo end"));
    let newer = guest.under(second, &format!("echo x >> {path}"));
    let hasty = ExecRequest { deadline: Duration::from_secs(1), ..newer.clone() };
    let (older, result) = tokio::join!(guest.run(&older), async {
        guest.until_there(&begun).await?;
        let begin = Instant::now();
        let result = guest.exec.exec(guest.vm, &hasty).await;
        let error = fails(result, &[ErrorKind::TimedOut], "waiting for an older command past the deadline")?;
        ensure!(error.retry() == Retry::Safe, "what did nothing is safe to repeat: {}", shown(&error));
        ensure!(begin.elapsed() >= Duration::from_secs(1), "it gave up after {:?}", begin.elapsed());
        ensure!(!guest.is_there(&path).await?, "what gave up waiting was run");
        // The same again, and more patient: it runs once.
        guest.run(&newer).await
    });
    ensure!(older?.stdout == "end\n", "the command under the older token was disturbed");
    ensure!(result?.success(), "the command under the newer token did not end well");
    let lines = guest.sh(&format!("cat {path}")).await?;
    ensure!(lines == "x\n", "it ran {} times", lines.lines().count());
    guest.clean(&[&begun, &path]).await
}

pub(super) async fn guest_fence_takes_over(c: &Context<'_>) -> Check {
    let guest = guest(c).await?;
    let [first, second, third, ..] = tokens();
    let path = c.path("f");
    let older = guest.under(first, &format!("echo x >> {path}; sleep 1; echo y"));
    let newer = ExecRequest { fence: Some(second), ..older.clone() };
    let last = ExecRequest { fence: Some(third), ..older.clone() };
    let (one, two) = tokio::join!(guest.run(&older), async {
        guest.until_there(&path).await?;
        guest.run(&newer).await
    });
    let (one, two) = (one?, two?);
    ensure!(one.stdout == "y\n", "the command under the older token gave {one:?}");
    ensure!(two == one, "a repeat under a newer token gave {two:?} instead of {one:?}");
    let three = guest.run(&last).await?;
    ensure!(three == one, "a later repeat under a newer token gave {three:?} instead of {one:?}");
    let lines = guest.sh(&format!("cat {path}")).await?;
    ensure!(lines == "x\n", "it ran {} times", lines.lines().count());
    guest.clean(&[&path]).await
}
