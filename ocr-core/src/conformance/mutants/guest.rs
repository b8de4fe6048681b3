//! Guests acted in wrongly.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;

use super::{World, invented, mutants, swap};
use crate::{
    Command, ComputeBackend, Deletion, Error, ErrorKind, ExecOutput, ExecRequest, FencingToken, GuestExec,
    GuestExecExt, GuestInfo, OperationId, PutFile, PutFiles, RemoveFiles, Result, Retry, VmId,
    error::reason,
    memory::{AgentMode, MemoryCloud},
};

/// The same with another reason.
fn reasoned<T>(result: Result<T>, from: &str, to: Option<&'static str>) -> Result<T> {
    result.map_err(|error| {
        if error.reason() != Some(from) {
            return error;
        }
        let bare = Error::new(error.kind(), error.message());
        match to {
            Some(to) => bare.with_reason(to),
            None => bare,
        }
    })
}

/// Another error in place of "not ready"; not for the guest that all cases share, which must come up.
async fn instead<T>(w: World, vm: VmId, result: Result<T>, instead: fn(Error) -> Error) -> Result<T> {
    let shared = w.cloud().get_vm(vm).await.is_ok_and(|vm| vm.name.as_str().ends_with("-guest"));
    let wrong = |error: &Error| !shared && error.reason() == Some(reason::AGENT_NOT_READY);
    result.map_err(|error| if wrong(&error) { instead(error) } else { error })
}

async fn is_folder(cloud: &MemoryCloud, vm: VmId, path: &str) -> bool {
    cloud.shell(vm, &format!("[ -d '{path}' ]")).await.is_ok_and(|output| output.success())
}

async fn exec(w: &World, vm: VmId, request: ExecRequest) -> Result<ExecOutput> {
    w.cloud().exec(vm, &request).await
}

fn lossy(bytes: &Bytes) -> Bytes {
    String::from_utf8_lossy(bytes).into_owned().into()
}

/// Puts what came back into other words.
async fn bend(w: World, vm: VmId, request: ExecRequest, bend: fn(&mut ExecOutput)) -> Result<ExecOutput> {
    let mut output = exec(&w, vm, request).await?;
    bend(&mut output);
    Ok(output)
}

/// Puts files that were changed before.
async fn put(w: World, vm: VmId, mut request: PutFiles, change: fn(&mut PutFile)) -> Result<()> {
    request.files.iter_mut().for_each(change);
    w.cloud().put_files(vm, &request).await
}

async fn remove(w: World, vm: VmId, request: RemoveFiles) -> Result<Vec<Result<Deletion>>> {
    w.cloud().remove_files(vm, &request).await
}

/// A fence of the mutant's own, which waits for nothing.
fn own_fence(w: &World, vm: VmId, fence: &mut Option<FencingToken>) -> Result<()> {
    let Some(token) = fence.take() else { return Ok(()) };
    let mut seen = super::lock(&w.0.seen);
    let newest = seen.entry(format!("fence {vm}")).or_default();
    if token.0 < *newest {
        return Err(crate::guest::fenced(token));
    }
    *newest = token.0;
    Ok(())
}

mutants! { Guest
    "a machine that is gone has no reason" fails [guest_info_missing guest_gone_everywhere] {
        guest_info: |w, vm| reasoned(w.cloud().guest_info(vm).await, reason::GUEST_GONE, None)
    }
    "a guest that boots is not running" fails [guest_booting guest_rebooted guest_fence_reboot] {
        guest_info: |w, vm| {
            let result = w.cloud().guest_info(vm).await;
            instead(w, vm, result, |error| {
                Error::new(ErrorKind::Conflict, error.message()).with_reason(reason::GUEST_NOT_RUNNING)
            }).await
        }
    }
    "a guest that boots cannot be asked again" fails [guest_booting] {
        guest_info: |w, vm| {
            let result = w.cloud().guest_info(vm).await;
            instead(w, vm, result, |error| error.with_retry(Retry::Ambiguous)).await
        }
    }
    "a guest that reboots has no agent" fails [guest_rebooted guest_fence_reboot] {
        exec: |w, (vm, request)| {
            let result = w.cloud().exec(vm, &request).await;
            instead(w, vm, result, |error| {
                Error::new(ErrorKind::Unsupported, error.message()).with_reason(reason::AGENT_ABSENT)
            }).await
        }
    }
    "a machine that is gone may come again" fails [guest_gone_everywhere] {
        exec: |w, (vm, request)| {
            let result = w.cloud().exec(vm, &request).await;
            result.map_err(|error| match error.kind() {
                ErrorKind::NotFound => Error::unavailable("no such machine").with_reason(reason::GUEST_GONE),
                _ => error,
            })
        }
    }
    "removing from a machine that is gone is fine" fails [guest_gone_everywhere] {
        remove_files: |w, (vm, request)| match invented(vm.as_uuid()) {
            true => Ok(request.paths.iter().map(|_| Ok(Deletion::AlreadyGone)).collect()),
            false => remove(w, vm, request).await,
        }
    }
    "a machine that is off is only not ready" fails [guest_info_stopped] {
        guest_info: |w, vm| {
            let result = w.cloud().guest_info(vm).await;
            result.map_err(|error| match error.reason() {
                Some(reason::GUEST_NOT_RUNNING) => {
                    Error::unavailable("no answer").with_reason(reason::AGENT_NOT_READY)
                }
                _ => error,
            })
        }
    }
    "an agent does not tell what it can" fails [guest_info_ready] {
        guest_info: |w, vm| Ok(GuestInfo { can_exec: false, can_files: false, ..w.cloud().guest_info(vm).await? })
    }
    "an agent that is absent is only not ready" fails [guest_agent_absent] {
        guest_info: |w, vm| {
            let result = w.cloud().guest_info(vm).await;
            result.map_err(|error| match error.reason() {
                Some(reason::AGENT_ABSENT) => Error::unavailable("no answer").with_reason(reason::AGENT_NOT_READY),
                _ => error,
            })
        }
    }
    "a machine without an agent has one" fails [guest_agent_absent] {
        guest_info: |w, vm| {
            let result = w.cloud().guest_info(vm).await;
            if result.as_ref().is_err_and(|error| error.reason() == Some(reason::AGENT_ABSENT)) {
                w.cloud().set_agent(vm, AgentMode::Answers);
                return w.cloud().guest_info(vm).await;
            }
            result
        }
    }
    "paths are resolved instead of refused" fails [guest_bad_path] {
        put_files: |w, (vm, request)| put(w, vm, request, |file| {
            file.path = file.path.replace("/../tmp", "").replace("/.", "");
        }).await
    }
    "a bad path is not found" fails [guest_bad_path] {
        get_file: |w, (vm, path, limit_bytes)| {
            swap(w.cloud().get_file(vm, &path, limit_bytes).await, ErrorKind::Invalid, ErrorKind::NotFound)
        }
    }
    "files are cut at 256 KiB" fails [guest_put_roundtrip] {
        put_files: |w, (vm, request)| put(w, vm, request, |file| file.content.truncate(256 << 10)).await
    }
    "files are taken for text" fails [guest_put_roundtrip guest_put_replace] {
        put_files: |w, (vm, request)| put(w, vm, request, |file| file.content = lossy(&file.content)).await
    }
    "line ends are changed" fails [guest_put_roundtrip] {
        get_file: |w, (vm, path, limit_bytes)| {
            let content = w.cloud().get_file(vm, &path, limit_bytes).await?;
            match std::str::from_utf8(&content) {
                Ok(text) => Ok(text.replace("\r\n", "\n").into()),
                Err(_) => Ok(content),
            }
        }
    }
    "a shell reads a file's name" fails [guest_put_roundtrip] {
        put_files: |w, (vm, request)| {
            put(w, vm, request, |file| file.path = file.path.replace("$file", "")).await
        }
    }
    "a file is written in place, piece by piece" fails [guest_put_replace] {
        put_files: |w, (vm, request)| {
            let halve = |file: &mut PutFile| file.content.truncate(file.content.len() / 2);
            put(w.clone(), vm, request.clone(), halve).await?;
            tokio::task::yield_now().await;
            w.cloud().put_files(vm, &request).await
        }
    }
    "the temporary file is left beside" fails [guest_put_replace] {
        put_files: |w, (vm, request)| {
            let result = w.cloud().put_files(vm, &request).await;
            let _left = put(w, vm, request, |file| {
                file.path.push_str(".tmp");
                file.make_parents = false;
            }).await;
            result
        }
    }
    "a second write is passed over" fails [guest_put_replace] {
        put_files: |w, (vm, request)| {
            let path = request.files.first().map(|file| file.path.clone()).unwrap_or_default();
            match w.cloud().get_file(vm, &path, u64::MAX).await {
                Ok(old) if old.len() == 150_000 => Ok(()),
                _ => w.cloud().put_files(vm, &request).await,
            }
        }
    }
    "the mode is ignored" fails [guest_put_mode guest_put_many] {
        put_files: |w, (vm, request)| put(w, vm, request, |file| file.mode = None).await
    }
    "the owner is ignored" fails [guest_put_mode] {
        put_files: |w, (vm, request)| put(w, vm, request, |file| file.owner = None).await
    }
    "without a mode only the owner may read" fails [guest_put_mode] {
        put_files: |w, (vm, request)| put(w, vm, request, |file| file.mode = file.mode.or(Some(0o600))).await
    }
    "folders are never made" fails [guest_put_parents guest_put_many] {
        put_files: |w, (vm, request)| put(w, vm, request, |file| file.make_parents = false).await
    }
    "folders that are made are closed" fails [guest_put_parents] {
        put_files: |w, (vm, request)| {
            w.cloud().put_files(vm, &request).await?;
            for file in request.files.iter().filter(|file| file.make_parents && !file.path.contains('\'')) {
                w.cloud().shell(vm, &format!("chmod 700 $(dirname '{}')", file.path)).await?;
            }
            Ok(())
        }
    }
    "folders that are there are changed" fails [guest_put_parents] {
        put_files: |w, (vm, request)| {
            w.cloud().put_files(vm, &request).await?;
            for file in request.files.iter().filter(|file| file.make_parents && !file.path.contains('\'')) {
                w.cloud().shell(vm, &format!("chmod 755 $(dirname $(dirname '{}'))", file.path)).await?;
            }
            Ok(())
        }
    }
    "folders are made unasked" fails [guest_put_no_parents guest_put_names_the_file] {
        put_files: |w, (vm, request)| put(w, vm, request, |file| file.make_parents = true).await
    }
    "a missing folder is taken for a missing machine" fails [guest_put_no_parents] {
        put_files: |w, (vm, request)| {
            let result = w.cloud().put_files(vm, &request).await;
            result.map_err(|error| match error.kind() {
                ErrorKind::NotFound => error.with_reason(reason::GUEST_GONE),
                _ => error,
            })
        }
    }
    "a folder is replaced by a file" fails [guest_put_onto_folder guest_put_names_the_file] {
        put_files: |w, (vm, request)| {
            for file in &request.files {
                let path = file.path.replace('$', "\\$");
                w.cloud().shell(vm, &format!("[ -d \"{path}\" ] && rm -r \"{path}\"")).await?;
            }
            w.cloud().put_files(vm, &request).await
        }
    }
    "a file for a folder goes into it" fails [guest_put_onto_folder guest_put_names_the_file] {
        put_files: |w, (vm, mut request)| {
            for file in request.files.iter_mut().filter(|file| !file.path.contains(['\'', '\0'])) {
                if is_folder(w.cloud(), vm, &file.path).await {
                    file.path.push_str("/file");
                }
            }
            w.cloud().put_files(vm, &request).await
        }
    }
    "a file that is not there is empty" fails [guest_get_missing guest_remove guest_put_names_the_file guest_put_twice guest_remove_many] {
        get_file: |w, (vm, path, limit_bytes)| match w.cloud().get_file(vm, &path, limit_bytes).await {
            Err(error) if error.kind() == ErrorKind::NotFound && !invented(vm.as_uuid()) => Ok(Bytes::new()),
            result => result,
        }
    }
    "a missing file is taken for a missing machine" fails [guest_get_missing] {
        get_file: |w, (vm, path, limit_bytes)| {
            let result = w.cloud().get_file(vm, &path, limit_bytes).await;
            result.map_err(|error| match error.kind() {
                ErrorKind::NotFound => error.with_reason(reason::GUEST_GONE),
                _ => error,
            })
        }
    }
    "a file over the limit is cut" fails [guest_get_limit] {
        get_file: |w, (vm, path, limit_bytes)| {
            let mut content = w.cloud().get_file(vm, &path, u64::MAX).await?;
            content.truncate(usize::try_from(limit_bytes).unwrap_or(usize::MAX));
            Ok(content)
        }
    }
    "a file as large as the limit is too large" fails [guest_get_limit] {
        get_file: |w, (vm, path, limit_bytes)| w.cloud().get_file(vm, &path, limit_bytes - 1).await
    }
    "the limit is not named" fails [guest_get_limit] {
        get_file: |w, (vm, path, limit_bytes)| {
            let result = w.cloud().get_file(vm, &path, limit_bytes).await;
            result.map_err(|error| match error.kind() {
                ErrorKind::Exhausted => Error::new(ErrorKind::Exhausted, "too large"),
                _ => error,
            })
        }
    }
    "remove does nothing" fails [guest_remove guest_remove_many guest_fence_files] {
        remove_files: |w, (vm, request)| {
            let outcomes = remove(w.clone(), vm, request.clone()).await?;
            for (path, outcome) in request.paths.iter().zip(&outcomes) {
                if matches!(outcome, Ok(Deletion::Deleted)) {
                    w.cloud().write_guest_file(vm, path, b"")?;
                }
            }
            Ok(outcomes)
        }
    }
    "removing what is not there is an error" fails [guest_remove guest_remove_many] {
        remove_files: |w, (vm, request)| {
            let mut outcomes = remove(w, vm, request).await?;
            for outcome in &mut outcomes {
                if matches!(outcome, Ok(Deletion::AlreadyGone)) {
                    *outcome = Err(Error::not_found("no such file"));
                }
            }
            Ok(outcomes)
        }
    }
    "remove takes a name for a beginning" fails [guest_remove] {
        remove_files: |w, (vm, request)| {
            let outcomes = remove(w.clone(), vm, request.clone()).await?;
            for path in request.paths {
                w.cloud().remove_file(vm, &format!("{path}.2")).await?;
            }
            Ok(outcomes)
        }
    }
    "folders are removed too" fails [guest_remove_folder guest_remove_many] {
        remove_files: |w, (vm, request)| {
            let mut outcomes = remove(w.clone(), vm, request.clone()).await?;
            for (path, outcome) in request.paths.iter().zip(&mut outcomes) {
                if outcome.as_ref().is_err_and(|error| error.kind() == ErrorKind::Conflict) {
                    w.cloud().shell(vm, &format!("rm -r '{path}'")).await?;
                    *outcome = Ok(Deletion::Deleted);
                }
            }
            Ok(outcomes)
        }
    }
    "stderr is mixed into stdout" fails [
        guest_exec_output guest_exec_output_limit guest_exec_large_output guest_exec_progress
    ] {
        exec: |w, (vm, request)| bend(w, vm, request, |output| {
            output.stdout = [output.stdout.as_ref(), output.stderr.as_ref()].concat().into();
            output.stderr = Bytes::new();
        }).await
    }
    "stderr is lost" fails [
        guest_exec_output guest_exec_output_limit guest_exec_large_output guest_exec_progress
    ] {
        exec: |w, (vm, request)| bend(w, vm, request, |output| output.stderr = Bytes::new()).await
    }
    "output is taken for text" fails [guest_exec_output guest_exec_stdin] {
        exec: |w, (vm, request)| bend(w, vm, request, |output| {
            output.stdout = lossy(&output.stdout);
            output.stderr = lossy(&output.stderr);
        }).await
    }
    "a failed command is an error" fails [
        guest_put_no_parents guest_exec_output guest_exec_output_limit guest_exec_user guest_exec_unknown_user
        guest_exec_repeat guest_exec_no_program
    ] {
        exec: |w, (vm, request)| {
            let output = exec(&w, vm, request).await?;
            if output.success() {
                return Ok(output);
            }
            Err(Error::new(ErrorKind::Conflict, "the command failed").with_reason(reason::COMMAND_FAILED))
        }
    }
    "every failure is exit code 1" fails [
        guest_exec_output guest_exec_output_limit guest_exec_user guest_exec_repeat guest_exec_no_program
    ] {
        exec: |w, (vm, request)| bend(w, vm, request, |output| output.exit_code = output.exit_code.min(1)).await
    }
    "the output limit is ignored" fails [guest_exec_output_limit] {
        exec: |w, (vm, request)| exec(&w, vm, ExecRequest { output_limit_bytes: u64::MAX, ..request }).await
    }
    "cut output is not flagged" fails [guest_exec_output_limit] {
        exec: |w, (vm, request)| bend(w, vm, request, |output| {
            (output.stdout_truncated, output.stderr_truncated) = (false, false);
        }).await
    }
    "output as long as the limit is flagged" fails [guest_exec_output_limit] {
        exec: |w, (vm, request)| {
            let limit = request.output_limit_bytes;
            let mut output = exec(&w, vm, request).await?;
            output.stdout_truncated |= output.stdout.len() as u64 == limit;
            Ok(output)
        }
    }
    "the end of long output is kept, not the beginning" fails [guest_exec_output_limit] {
        exec: |w, (vm, request)| {
            let limit = usize::try_from(request.output_limit_bytes).unwrap_or(usize::MAX);
            let mut output = exec(&w, vm, ExecRequest { output_limit_bytes: u64::MAX, ..request }).await?;
            output.stdout_truncated = output.stdout.len() > limit;
            output.stderr_truncated = output.stderr.len() > limit;
            output.stdout = output.stdout.slice(output.stdout.len().saturating_sub(limit)..);
            output.stderr = output.stderr.slice(output.stderr.len().saturating_sub(limit)..);
            Ok(output)
        }
    }
    "output over 3 MiB is lost" fails [guest_exec_large_output] {
        exec: |w, (vm, request)| {
            let output = exec(&w, vm, request).await?;
            match output.stdout.len() > 3 << 20 {
                true => Err(Error::unavailable("the message is too large")),
                false => Ok(output),
            }
        }
    }
    "the environment is ignored" fails [guest_exec_environment] {
        exec: |w, (vm, request)| exec(&w, vm, ExecRequest { environment: Default::default(), ..request }).await
    }
    "the environment is cut at line ends" fails [guest_exec_environment] {
        exec: |w, (vm, mut request)| {
            for value in request.environment.values_mut() {
                *value = value.lines().next().unwrap_or_default().to_owned();
            }
            exec(&w, vm, request).await
        }
    }
    "empty variables are left out" fails [guest_exec_environment] {
        exec: |w, (vm, mut request)| {
            request.environment.retain(|_, value| !value.is_empty());
            exec(&w, vm, request).await
        }
    }
    "the environment takes the guest's place" fails [guest_exec_environment] {
        exec: |w, (vm, mut request)| {
            if !request.environment.is_empty() {
                request.environment.insert("PATH".to_owned(), String::new());
                if let Command::Shell(line) = &mut request.command {
                    *line = line.replace("printf", "/bin/printf").replace("[ -n", "/bin/test -n").replace(" ]", "");
                }
            }
            exec(&w, vm, request).await
        }
    }
    "stdin is ignored" fails [guest_exec_stdin guest_exec_user] {
        exec: |w, (vm, request)| exec(&w, vm, ExecRequest { stdin: Bytes::new(), ..request }).await
    }
    "stdin ends at the first NUL" fails [guest_exec_stdin] {
        exec: |w, (vm, mut request)| {
            let end = request.stdin.iter().position(|byte| *byte == 0).unwrap_or(request.stdin.len());
            request.stdin.truncate(end);
            exec(&w, vm, request).await
        }
    }
    "stdin is cut at 64 KiB" fails [guest_exec_stdin] {
        exec: |w, (vm, mut request)| {
            request.stdin.truncate(64 << 10);
            exec(&w, vm, request).await
        }
    }
    "only a line's first command is run" fails [guest_exec_shell] {
        exec: |w, (vm, mut request)| {
            if let Command::Shell(line) = &mut request.command
                && let Some(end) = line.rfind("\necho")
            {
                line.truncate(end);
            }
            exec(&w, vm, request).await
        }
    }
    "arguments are joined and read by a shell" fails [guest_exec_argv] {
        exec: |w, (vm, mut request)| {
            if let Command::Argv(argv) = &request.command {
                request.command = Command::Shell(argv.join(" "));
            }
            exec(&w, vm, request).await
        }
    }
    "empty arguments are left out" fails [guest_exec_argv] {
        exec: |w, (vm, mut request)| {
            if let Command::Argv(argv) = &mut request.command {
                argv.retain(|argument| !argument.is_empty());
            }
            exec(&w, vm, request).await
        }
    }
    "the user is ignored" fails [guest_exec_user guest_exec_unknown_user] {
        exec: |w, (vm, request)| exec(&w, vm, ExecRequest { user: None, ..request }).await
    }
    "an unknown user is refused after the fact" fails [guest_exec_unknown_user] {
        exec: |w, (vm, request)| {
            let result = w.cloud().exec(vm, &request).await;
            if result.as_ref().is_err_and(|error| error.kind() == ErrorKind::Invalid) {
                exec(&w, vm, ExecRequest { user: None, ..request }).await?;
            }
            result
        }
    }
    "an unknown user is not found" fails [guest_exec_unknown_user] {
        exec: |w, (vm, request)| swap(w.cloud().exec(vm, &request).await, ErrorKind::Invalid, ErrorKind::NotFound)
    }
    "users without the capability are ignored" (less) fails [guest_exec_users_unsupported] {
        exec: |w, (vm, request)| exec(&w, vm, ExecRequest { user: None, ..request }).await
    }
    "a repeat runs again" fails [guest_exec_repeat guest_exec_race guest_fence_takes_over] {
        exec: |w, (vm, request)| exec(&w, vm, ExecRequest { operation: OperationId::random(), ..request }).await
    }
    "a repeat is refused" fails [guest_exec_repeat guest_exec_race guest_fence_refuses guest_fence_takes_over guest_fence_wait_ends] {
        exec: |w, (vm, request)| match w.times(request.operation) {
            1 => exec(&w, vm, request).await,
            _ => Err(Error::new(ErrorKind::AlreadyExists, "it ran")),
        }
    }
    "only the last result is kept" fails [guest_exec_repeat guest_fence_takes_over] {
        exec: |w, (vm, mut request)| {
            // The count of other operations so far is part of the id.
            let first = w.times(request.operation) == 1;
            let round = if first { w.times("operations") } else { w.times("operations") - 1 };
            if !first {
                super::lock(&w.0.seen).insert("operations".to_owned(), round);
            }
            let began = w.times(format!("{} {round}", request.operation));
            if !first && began == 1 {
                request.operation = OperationId::random();
            }
            exec(&w, vm, request).await
        }
    }
    "two at once run twice" fails [guest_exec_race guest_fence_takes_over] {
        exec: |w, (vm, mut request)| {
            let running = format!("running {}", request.operation);
            if w.times(&running) > 1 {
                request.operation = OperationId::random();
            }
            let result = exec(&w, vm, request).await;
            super::lock(&w.0.seen).remove(&running);
            result
        }
    }
    "a deadline is not kept" fails [guest_exec_deadline guest_fence_wait_ends] {
        exec: |w, (vm, request)| {
            let request = ExecRequest { deadline: Duration::from_secs(3600), ..request };
            exec(&w, vm, request).await
        }
    }
    "a deadline is kept here, not in the guest" fails [guest_exec_deadline guest_fence_wait_ends] {
        exec: |w, (vm, request)| {
            let deadline = request.deadline;
            let request = Arc::new(ExecRequest { deadline: Duration::from_secs(3600), ..request });
            match tokio::time::timeout(deadline, w.cloud().exec(vm, &request)).await {
                Ok(result) => result,
                Err(_) => Err(Error::timed_out("too long")),
            }
        }
    }
    "a command ends before its deadline" fails [guest_exec_deadline guest_fence_wait_ends] {
        exec: |w, (vm, request)| exec(&w, vm, ExecRequest { deadline: request.deadline / 10, ..request }).await
    }
    "a command past its deadline is exit code 137" fails [guest_exec_deadline guest_fence_wait_ends] {
        exec: |w, (vm, request)| match w.cloud().exec(vm, &request).await {
            Err(error) if error.kind() == ErrorKind::TimedOut => Ok(ExecOutput {
                exit_code: 137,
                stdout: Bytes::new(),
                stderr: Bytes::new(),
                stdout_truncated: false,
                stderr_truncated: false,
            }),
            result => result,
        }
    }
    "a missing program is an error" fails [guest_exec_no_program] {
        exec: |w, (vm, request)| {
            let argv = matches!(request.command, Command::Argv(_));
            let output = exec(&w, vm, request).await?;
            match argv && output.exit_code == 127 {
                true => Err(Error::not_found("no such program")),
                false => Ok(output),
            }
        }
    }
    "nothing is sent while a command runs" fails [guest_exec_progress] {
        exec: |w, (vm, request)| exec(&w, vm, ExecRequest { progress: None, ..request }).await
    }
    "output is sent when all is over" fails [guest_exec_progress] {
        exec: |w, (vm, request)| {
            let output = exec(&w, vm, ExecRequest { progress: None, ..request.clone() }).await?;
            if let Some(progress) = request.progress {
                for chunk in [
                    crate::OutputChunk::Stdout(output.stdout.clone()),
                    crate::OutputChunk::Stderr(output.stderr.clone()),
                ] {
                    let _full = progress.try_send(chunk);
                }
            }
            Ok(output)
        }
    }
    "a receiver that is gone ends the command" fails [guest_exec_progress] {
        exec: |w, (vm, request)| match &request.progress {
            Some(progress) if progress.is_closed() => Err(Error::internal("nobody listens")),
            _ => exec(&w, vm, request).await,
        }
    }
    "files are written one after the other" fails [guest_put_names_the_file guest_put_twice] {
        put_files: |w, (vm, request)| {
            for file in request.files {
                w.cloud().put_files(vm, &PutFiles { files: vec![file], fence: request.fence }).await?;
            }
            Ok(())
        }
    }
    "only the first file is written" fails [guest_put_many guest_put_names_the_file guest_put_twice] {
        put_files: |w, (vm, mut request)| {
            request.files.truncate(1);
            w.cloud().put_files(vm, &request).await
        }
    }
    "the file is not named" fails [guest_put_names_the_file] {
        put_files: |w, (vm, request)| {
            let result = w.cloud().put_files(vm, &request).await;
            result.map_err(|error| {
                let bare = Error::new(error.kind(), "one of the files").with_retry(error.retry());
                match error.reason() {
                    Some(reason) => bare.with_reason(reason),
                    None => bare,
                }
            })
        }
    }
    "of a path that is there twice the last counts" fails [guest_put_twice] {
        put_files: |w, (vm, request)| {
            let mut files: Vec<PutFile> = Vec::new();
            for file in request.files {
                files.retain(|earlier| earlier.path != file.path);
                files.push(file);
            }
            w.cloud().put_files(vm, &PutFiles { files, fence: request.fence }).await
        }
    }
    "removing ends at the first folder" fails [guest_remove_many] {
        remove_files: |w, (vm, request)| {
            let mut outcomes = Vec::new();
            for path in &request.paths {
                let one = RemoveFiles { paths: vec![path.clone()], fence: request.fence };
                outcomes.extend(remove(w.clone(), vm, one).await?);
                if outcomes.last().is_some_and(Result::is_err) {
                    break;
                }
            }
            if request.paths.is_empty() { remove(w, vm, request).await } else { Ok(outcomes) }
        }
    }
    "fences are ignored" fails [
        guest_fence_refuses guest_fence_files guest_fence_reboot guest_fence_waits guest_fence_wait_ends
    ] {
        exec: |w, (vm, request)| exec(&w, vm, ExecRequest { fence: None, ..request }).await,
        put_files: |w, (vm, request)| w.cloud().put_files(vm, &PutFiles { fence: None, ..request }).await,
        remove_files: |w, (vm, request)| remove(w, vm, RemoveFiles { fence: None, ..request }).await,
    }
    "files have no fence" fails [guest_fence_files guest_fence_waits] {
        put_files: |w, (vm, request)| w.cloud().put_files(vm, &PutFiles { fence: None, ..request }).await,
        remove_files: |w, (vm, request)| remove(w, vm, RemoveFiles { fence: None, ..request }).await,
    }
    "removals have no fence" fails [guest_fence_files] {
        remove_files: |w, (vm, request)| remove(w, vm, RemoveFiles { fence: None, ..request }).await,
    }
    "an older token is a conflict like others" fails [guest_fence_refuses guest_fence_files guest_fence_reboot] {
        exec: |w, (vm, request)| reasoned(exec(&w, vm, request).await, reason::FENCED, None),
        put_files: |w, (vm, request)| reasoned(w.cloud().put_files(vm, &request).await, reason::FENCED, None),
        remove_files: |w, (vm, request)| reasoned(remove(w, vm, request).await, reason::FENCED, None),
    }
    "a repeat under an older token is answered" fails [guest_fence_refuses] {
        exec: |w, (vm, request)| {
            let again = w.times(request.operation) > 1;
            let result = exec(&w, vm, request.clone()).await;
            match result {
                Err(error) if again && error.reason() == Some(reason::FENCED) => {
                    exec(&w, vm, ExecRequest { fence: None, ..request }).await
                }
                result => result,
            }
        }
    }
    "the newest token is refused as an older one is" fails [
        guest_fence_refuses guest_fence_none guest_fence_wait_ends
    ] {
        exec: |w, (vm, request)| match request.fence {
            Some(token) if w.times(format!("{vm} {}", token.0)) > 1 => Err(crate::guest::fenced(token)),
            _ => exec(&w, vm, request).await,
        }
    }
    "a reboot forgets the token" fails [guest_fence_reboot] {
        exec: |w, (vm, mut request)| {
            if request.fence.is_some() {
                let boot_id = w.cloud().shell(vm, "cat /proc/sys/kernel/random/boot_id").await?.stdout;
                if w.times(format!("{vm} {boot_id:?}")) == 1 {
                    request.fence = None;
                }
            }
            exec(&w, vm, request).await
        }
    }
    "without a token a request is the oldest" fails [guest_fence_none] {
        exec: |w, (vm, request)| match &request.command {
            Command::Shell(line) if request.fence.is_none() && line.contains("unfenced") => {
                Err(crate::guest::fenced(FencingToken(0)))
            }
            _ => exec(&w, vm, request).await,
        }
    }
    "what is older is not waited for" fails [guest_fence_waits guest_fence_wait_ends] {
        exec: |w, (vm, mut request)| {
            own_fence(&w, vm, &mut request.fence)?;
            exec(&w, vm, request).await
        },
        put_files: |w, (vm, mut request)| {
            own_fence(&w, vm, &mut request.fence)?;
            w.cloud().put_files(vm, &request).await
        },
        remove_files: |w, (vm, mut request)| {
            own_fence(&w, vm, &mut request.fence)?;
            remove(w, vm, request).await
        },
    }
    "waiting for what is older has no end" fails [guest_fence_wait_ends] {
        exec: |w, (vm, request)| loop {
            match exec(&w, vm, request.clone()).await {
                Err(error) if error.kind() == ErrorKind::TimedOut && error.retry() == Retry::Safe => {}
                result => return result,
            }
        }
    }
    "having waited in vain may have had an effect" fails [guest_fence_wait_ends] {
        exec: |w, (vm, request)| {
            let result = exec(&w, vm, request).await;
            result.map_err(|error| match (error.kind(), error.retry()) {
                (ErrorKind::TimedOut, Retry::Safe) => error.with_retry(Retry::Ambiguous),
                _ => error,
            })
        }
    }
    "a newer token runs the operation again" fails [guest_fence_takes_over] {
        exec: |w, (vm, mut request)| {
            if let Some(token) = request.fence {
                let first = *super::lock(&w.0.seen).entry(format!("first {}", request.operation)).or_insert(token.0);
                if first != token.0 {
                    request.operation = OperationId::random();
                }
            }
            exec(&w, vm, request).await
        }
    }
}
