//! [`PosixGuest`] over the simplest link there is: this machine's own shell. It acts on this machine, so it keeps to a
//! folder of its own and the suite to its names in `/tmp`.

#![cfg(feature = "conformance")]
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    io::{Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::process::ExitStatusExt as _,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use ocr_core::{
    Error, ErrorKind, ExecRequest, GuestExec, GuestExecExt, GuestInfo, OsFamily, PutFile, PutFiles, RemoveFiles,
    Result, Retry, VmId,
    conformance::{Subject, assert_all},
    error::reason,
    guest::posix::{PosixConfig, PosixExit, PosixGuest, PosixLimits, PosixLink, PosixRun},
};
use tempfile::TempDir;
use tokio::time::Instant;

/// This machine, under the name of a virtual one.
#[derive(Debug)]
struct Here {
    vm: VmId,
    limits: PosixLimits,
    runs: AtomicUsize,
    writes: AtomicUsize,
}

impl Here {
    fn new(stdin_bytes: usize, compress: bool) -> Self {
        let limits = PosixLimits { stdin_bytes, reply_bytes: 1 << 20, compress };
        Self { vm: VmId::random(), limits, runs: AtomicUsize::default(), writes: AtomicUsize::default() }
    }

    fn check(&self, vm: VmId) -> Result<()> {
        if vm == self.vm {
            return Ok(());
        }
        Err(Error::not_found("no such machine").with_reason(reason::GUEST_GONE))
    }
}

fn run_here(script: &str, name: &str, arguments: &[String], stdin: &[u8]) -> std::io::Result<PosixExit> {
    let mut child = Command::new("/bin/sh")
        .args(["-c", script, name])
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut input = child.stdin.take().unwrap();
    let output = std::thread::scope(|scope| {
        // Who only repeats does not listen.
        scope.spawn(move || {
            let _deaf = input.write_all(stdin);
        });
        child.wait_with_output()
    })?;
    let how = match (output.status.code(), output.status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, signal) => format!("signal {}", signal.unwrap_or_default()),
    };
    Ok(PosixExit { how, stdout: output.stdout.into(), stderr: output.stderr.into() })
}

#[async_trait]
impl PosixLink for Here {
    fn limits(&self) -> PosixLimits {
        self.limits
    }

    async fn guest_info(&self, vm: VmId) -> Result<GuestInfo> {
        self.check(vm)?;
        Ok(GuestInfo {
            agent_version: "1".to_owned(),
            can_exec: true,
            can_files: true,
            os_family: OsFamily::Linux,
            os_name: "this machine".to_owned(),
        })
    }

    async fn run(&self, vm: VmId, run: &PosixRun<'_>) -> Result<PosixExit> {
        self.check(vm)?;
        self.runs.fetch_add(1, Ordering::Relaxed);
        let (script, name, arguments, stdin) =
            (run.script.to_owned(), run.name, run.arguments.to_vec(), run.stdin.to_vec());
        let ended = tokio::task::spawn_blocking(move || run_here(&script, name, &arguments, &stdin));
        match tokio::time::timeout_at(run.until, ended).await {
            Ok(exit) => Ok(exit.unwrap().unwrap()),
            Err(_) => Err(Error::timed_out("it runs still")),
        }
    }

    async fn write(&self, vm: VmId, path: &str, parts: &[Bytes], _until: Instant) -> Result<()> {
        self.check(vm)?;
        self.writes.fetch_add(1, Ordering::Relaxed);
        std::fs::write(path, parts.concat()).map_err(|cause| match cause.kind() {
            std::io::ErrorKind::NotFound => Error::not_found("no folder"),
            _ => Error::internal("not written").with_source(cause),
        })
    }

    async fn read(&self, vm: VmId, path: &str, offset: u64, count: usize, _until: Instant) -> Result<Bytes> {
        self.check(vm)?;
        let read = || {
            let mut file = std::fs::File::open(path)?;
            file.seek(SeekFrom::Start(offset))?;
            let mut bytes = Vec::new();
            file.take(count as u64).read_to_end(&mut bytes)?;
            Ok::<_, std::io::Error>(bytes.into())
        };
        read().map_err(|cause| Error::internal("not read").with_source(cause))
    }
}

fn guest(link: Here) -> (Arc<PosixGuest<Here>>, TempDir) {
    let folder = TempDir::new().unwrap();
    let base = folder.path().join("base").to_str().unwrap().to_owned();
    let config = PosixConfig { base, ..PosixConfig::default() };
    (Arc::new(PosixGuest::new(link, config).unwrap()), folder)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_conforms_whatever_fits_into_one_message() {
    for (stdin_bytes, compress) in [(1 << 30, false), (1000, true)] {
        let (guest, _folder) = guest(Here::new(stdin_bytes, compress));
        let vm = guest.link().vm;
        let subject = Subject { guest: Some(guest.clone()), guest_vm: Some(vm), ..Subject::new() };
        assert_all(&subject).await;
        assert_eq!(guest.link().writes.load(Ordering::Relaxed) == 0, stdin_bytes == 1 << 30);
    }
}

#[tokio::test]
async fn many_files_cost_as_many_runs_as_one() {
    let (guest, folder) = guest(Here::new(96 << 10, true));
    let (vm, root) = (guest.link().vm, folder.path().to_str().unwrap().to_owned());
    let files = |bytes: usize| {
        let path = |i: usize| format!("{root}/{}/f{i}", i % 7);
        let file = |i| PutFile { make_parents: true, ..PutFile::new(path(i), vec![b'a' + (i % 26) as u8; bytes]) };
        PutFiles::new((0..300).map(file).collect())
    };
    let runs = || guest.link().runs.swap(0, Ordering::Relaxed);
    let writes = || guest.link().writes.swap(0, Ordering::Relaxed);
    guest.put_files(vm, &files(200)).await.unwrap();
    assert_eq!((runs(), writes()), (1, 0));
    // Larger than one message, even packed: is it there already, and here it is.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    let noise: Vec<u8> = (0..400_000).map(|_| next()).collect();
    let mut large = files(100);
    large.files.push(PutFile::new(format!("{root}/noise"), noise));
    guest.put_files(vm, &large).await.unwrap();
    assert!(runs() <= 3 && writes() <= 2, "the first of them makes the folder");
    guest.put_files(vm, &large).await.unwrap();
    assert_eq!((runs(), writes()), (1, 0), "nothing has changed");
    large.files[9].content = Bytes::from_static(b"changed");
    guest.put_files(vm, &large).await.unwrap();
    assert_eq!((runs(), writes()), (2, 1));
    assert_eq!(guest.get_file(vm, &large.files[9].path, 100).await.unwrap(), "changed");
    runs();
    let paths = large.files.iter().map(|file| file.path.clone());
    let outcomes = guest.remove_files(vm, &RemoveFiles::new(paths)).await.unwrap();
    assert!(outcomes.iter().all(Result::is_ok));
    assert_eq!(runs(), 1);
}

#[tokio::test]
async fn a_token_that_no_shell_can_count_is_refused() {
    let (guest, _folder) = guest(Here::new(1 << 20, false));
    let fence = Some(ocr_core::FencingToken(u64::MAX));
    let request = ExecRequest { fence, deadline: Duration::from_secs(10), ..ExecRequest::shell("true") };
    let error = guest.exec(guest.link().vm, &request).await.unwrap_err();
    assert_eq!((error.kind(), error.retry()), (ErrorKind::Invalid, Retry::Never));
    assert_eq!(guest.link().runs.load(Ordering::Relaxed), 0);
    assert!(guest.shell(guest.link().vm, "true").await.unwrap().success());
}
