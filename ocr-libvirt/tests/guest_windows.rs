//! Windows guests, by exchanges with their agent.
//!
//! No Windows was at hand: the exchanges in `windows/` were written from the protocol of the QEMU guest agent and from
//! how `cmd.exe` is documented. They hold what is sent to the letter; that Windows answers so, they do not prove.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use ocr_core::{
    Deletion, ErrorKind, ExecRequest, FencingToken, GuestExec, GuestExecExt, OsFamily, PutFile, PutFiles, RemoveFiles,
    Result, Retry, VmId, error::reason,
};
use ocr_libvirt::guest::{AgentGuest, AgentGuestConfig, AgentLink};
use serde::Deserialize;
use serde_json::Value;

/// What is sent, and what the agent answers.
#[derive(Debug, Deserialize)]
struct Exchange {
    send: Value,
    answer: Value,
    /// Whether it may come once, often, or not at all.
    #[serde(default)]
    any_number: bool,
}

/// Answers by a file of exchanges, in their order, and fails on any other request.
#[derive(Clone, Debug)]
struct Replay(Arc<Mutex<Vec<Exchange>>>);

impl Replay {
    fn of(name: &str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/windows").join(name).with_extension("json");
        let mut exchanges: Vec<Exchange> = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        exchanges.reverse();
        Self(Arc::new(Mutex::new(exchanges)))
    }

    fn guest(&self) -> AgentGuest<Self> {
        AgentGuest::with_config(self.clone(), AgentGuestConfig::default()).unwrap()
    }

    fn assert_over(&self) {
        let left = self.0.lock().unwrap();
        assert!(left.is_empty(), "{} requests did not come, first {:?}", left.len(), left.last());
    }
}

#[async_trait]
impl AgentLink for Replay {
    async fn command(&self, _: VmId, command: &str, _: Duration) -> Result<String> {
        let mut sent: Value = serde_json::from_str(command).unwrap();
        mask(&mut sent);
        let mut left = self.0.lock().unwrap();
        loop {
            let next = left.last().unwrap_or_else(|| panic!("nothing more was expected than {sent:#}"));
            if next.send == sent {
                let answer = next.answer.to_string();
                if !next.any_number {
                    left.pop();
                }
                return Ok(answer);
            }
            assert!(next.any_number, "expected {:#}, got {sent:#}", next.send);
            left.pop();
        }
    }
}

/// Writes `ID` for an id that is made up anew each time.
fn mask(value: &mut Value) {
    match value {
        Value::String(text) => {
            while let Some(at) = text.find(".ocr-").map(|at| at + 5).filter(|at| !text[*at..].starts_with("ID")) {
                text.replace_range(at..at + 36, "ID");
            }
        }
        Value::Array(values) => values.iter_mut().for_each(mask),
        Value::Object(values) => values.values_mut().for_each(mask),
        _ => {}
    }
}

fn request(request: ExecRequest) -> ExecRequest {
    let operation: ocr_core::OperationId = "11111111-1111-4111-8111-111111111111".parse().unwrap();
    ExecRequest { operation, output_limit_bytes: 1000, ..request }
}

#[tokio::test]
async fn it_is_known_by_what_the_agent_says() {
    let replay = Replay::of("info");
    let info = replay.guest().guest_info(VmId::random()).await.unwrap();
    assert_eq!((info.os_family, info.os_name.as_str()), (OsFamily::Windows, "Windows Server 2022 Standard"));
    assert!(info.can_exec && info.can_files);
    replay.assert_over();
}

#[tokio::test]
async fn a_shell_line_reaches_cmd_as_it_is_with_the_environment_laid_over_the_guests() {
    let replay = Replay::of("shell");
    let line = r#""C:\Program Files\tool.exe" "a b" & echo %NAME%^! > C:\log.txt"#;
    let request = ExecRequest {
        environment: [("Name".to_owned(), "it's 100% \"fine\" & good".to_owned())].into(),
        stdin: Bytes::from_static(b"input\0"),
        ..request(ExecRequest::shell(line))
    };
    let output = replay.guest().exec(VmId::random(), &request).await.unwrap();
    assert_eq!((output.exit_code, &output.stdout[..], &output.stderr[..]), (3, &b"out\r\n\xff"[..], &b"err\r\n"[..]));
    replay.assert_over();
}

#[tokio::test]
async fn a_programs_arguments_pass_cmd_unread() {
    let replay = Replay::of("argv");
    let argv = [r"C:\Program Files\tool.exe", "a b", "%PATH%", "say \"hi\" & "];
    let output = replay.guest().exec(VmId::random(), &request(ExecRequest::argv(argv))).await.unwrap();
    assert_eq!(output.exit_code, -1_073_741_510);
    replay.assert_over();
}

#[tokio::test]
async fn a_repeat_tells_the_first_result() {
    let replay = Replay::of("repeat");
    let output = replay.guest().exec(VmId::random(), &request(ExecRequest::shell("ver"))).await.unwrap();
    assert!(output.success() && output.stdout == "Microsoft Windows\r\n");
    replay.assert_over();
}

#[tokio::test]
async fn an_agent_that_restarted_is_asked_for_the_result_and_nothing_runs_again() {
    let replay = Replay::of("restart");
    let output = replay.guest().exec(VmId::random(), &request(ExecRequest::shell("slow"))).await.unwrap();
    assert_eq!(output.stdout, "done");
    replay.assert_over();
}

#[tokio::test]
async fn past_its_deadline_a_command_is_ended_with_its_children_and_a_repeat_says_so() {
    let replay = Replay::of("deadline");
    let (guest, vm) = (replay.guest(), VmId::random());
    let request = ExecRequest { deadline: Duration::from_millis(100), ..request(ExecRequest::shell("pause")) };
    for _ in 0..2 {
        let error = guest.exec(vm, &request).await.unwrap_err();
        assert_eq!((error.kind(), error.retry()), (ErrorKind::TimedOut, Retry::Never), "{error}");
    }
    replay.assert_over();
}

#[tokio::test]
async fn files_are_put_read_and_removed() {
    let replay = Replay::of("files");
    let (guest, vm) = (replay.guest(), VmId::random());
    let path = "C:/Program Files/ünï & 100%.txt";
    let file = PutFile { mode: Some(0o755), make_parents: true, ..PutFile::new(path, "content\r\n") };
    guest.put_file(vm, &file).await.unwrap();
    assert_eq!(guest.get_file(vm, path, 100).await.unwrap(), "content\r\n");
    let error = guest.get_file(vm, r"C:\none", 100).await.unwrap_err();
    assert_eq!((error.kind(), error.reason()), (ErrorKind::NotFound, None));
    let request = RemoveFiles::new([path, r"C:\none", r"C:\Windows", r"C:\open"]);
    let outcomes = guest.remove_files(vm, &request).await.unwrap();
    let kinds: Vec<_> = outcomes.into_iter().map(|outcome| outcome.map_err(|error| error.kind())).collect();
    let wanted = [Ok(Deletion::Deleted), Ok(Deletion::AlreadyGone), Err(ErrorKind::Invalid), Err(ErrorKind::Denied)];
    assert_eq!(kinds, wanted);
    replay.assert_over();
}

#[tokio::test]
async fn a_file_that_cannot_be_put_leaves_nothing() {
    let replay = Replay::of("refused_files");
    let (guest, vm) = (replay.guest(), VmId::random());
    for (path, kind) in [
        (r"C:\a\folder", ErrorKind::Invalid),
        (r"C:\none\f", ErrorKind::NotFound),
        // It arrived damaged.
        (r"C:\a\f", ErrorKind::Unavailable),
    ] {
        let error = guest.put_file(vm, &PutFile::new(path, "content\r\n")).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(&path.replace('\\', r"\\")) || error.to_string().contains(path), "{error}");
    }
    // Old programs write the digest's bytes apart.
    guest.put_file(vm, &PutFile::new(r"C:\a\f", "content\r\n")).await.unwrap();
    replay.assert_over();
}

#[tokio::test]
async fn an_older_token_is_refused() {
    let replay = Replay::of("fence");
    let (guest, vm) = (replay.guest(), VmId::random());
    let under = |token| ExecRequest { fence: Some(FencingToken(token)), ..request(ExecRequest::shell("ver")) };
    guest.exec(vm, &under(7)).await.unwrap();
    let none = |token| PutFiles { files: vec![], fence: Some(FencingToken(token)) };
    guest.put_files(vm, &none(7)).await.unwrap();
    guest.put_files(vm, &none(8)).await.unwrap();
    let error = guest.exec(vm, &under(7)).await.unwrap_err();
    assert_eq!((error.kind(), error.reason()), (ErrorKind::Conflict, Some(reason::FENCED)));
    replay.assert_over();
}

#[tokio::test]
async fn what_windows_guests_cannot_do_is_said_at_once() {
    let replay = Replay::of("info");
    let (guest, vm) = (replay.guest(), VmId::random());
    guest.guest_info(vm).await.unwrap();
    let user = ExecRequest { user: Some("alice".to_owned()), ..ExecRequest::shell("ver") };
    let kind = |result: Result<()>| result.unwrap_err().kind();
    assert_eq!(kind(guest.exec(vm, &user).await.map(drop)), ErrorKind::Unsupported);
    let owner = PutFile { owner: Some("alice".to_owned()), ..PutFile::new(r"C:\f", "") };
    assert_eq!(kind(guest.put_file(vm, &owner).await), ErrorKind::Unsupported);
    let stdin = ExecRequest { stdin: vec![0; 100_000].into(), ..ExecRequest::shell("more") };
    assert_eq!(kind(guest.exec(vm, &stdin).await.map(drop)), ErrorKind::Unsupported);
    assert_eq!(kind(guest.exec(vm, &ExecRequest::shell("a\nb")).await.map(drop)), ErrorKind::Invalid);
    assert_eq!(kind(guest.put_file(vm, &PutFile::new("/tmp/f", "")).await), ErrorKind::Invalid);
    let twice = PutFiles::new(vec![PutFile::new(r"C:\f", ""), PutFile::new("c:/F", "")]);
    assert_eq!(kind(guest.put_files(vm, &twice).await), ErrorKind::Invalid);
    replay.assert_over();
}
