//! Files: small ones in one command, large ones in pieces, both through a temporary file beside the target.

use std::sync::OnceLock;

use bytes::Bytes;
use ocr_core::{
    Deletion, Error, ErrorKind, PutFile, Result, Retry, guest::check_guest_path, guest::check_user_name, id::shown,
};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::{
    agent::{Agent, MAX_CONTENT_BYTES},
    exec::ScriptReply,
    runner::INLINE_BYTES,
    script::compact,
};

const USUAL_MODE: u32 = 0o644;
/// Permissions to read and write, which a umask can give; others need a chmod.
const PLAIN_BITS: u32 = 0o666;

macro_rules! script {
    ($file:literal) => {{
        static SCRIPT: OnceLock<String> = OnceLock::new();
        SCRIPT.get_or_init(|| compact(include_str!($file))).as_str()
    }};
}

/// [`ocr_core::GuestExec::put_file`].
pub(crate) async fn put(agent: Agent<'_>, file: &PutFile, max_bytes: u64) -> Result<()> {
    check_guest_path(&file.path)?;
    if let Some(owner) = &file.owner {
        check_user_name(owner)?;
    }
    let mode = file.mode.unwrap_or(USUAL_MODE);
    if mode > 0o7777 {
        return Err(Error::invalid("mode", format_args!("wants permission bits up to 7777 octal, got {mode:o}")));
    }
    if file.content.len() as u64 > max_bytes {
        return Err(Error::new(
            ErrorKind::Exhausted,
            format!("{} is {} bytes, at most {max_bytes} can be copied", shown(&file.path), file.content.len()),
        ));
    }
    let is_small = file.content.len() <= MAX_CONTENT_BYTES;
    let put = Put::new(file, mode);
    if is_small {
        return put.step(agent, "whole", file.content.to_vec()).await;
    }
    put.step(agent, "begin", Vec::new()).await?;
    let written = agent.write_file(&put.temp, &file.content).await;
    // Also when it was not all written: then the digest is wrong, and the guest removes the temporary file.
    let ended = put.step(agent, "end", Vec::new()).await;
    Ok(written?).and(ended)
}

struct Put<'a> {
    file: &'a PutFile,
    mode: u32,
    temp: String,
    sum: String,
}

impl<'a> Put<'a> {
    fn new(file: &'a PutFile, mode: u32) -> Self {
        let folder = file.path.rsplit_once('/').map_or("", |(folder, _)| folder);
        let mark: String = Sha256::digest(file.path.as_bytes()).iter().take(4).map(|b| format!("{b:02x}")).collect();
        let fresh = Uuid::new_v4().simple().to_string();
        Self {
            file,
            mode,
            temp: format!("{folder}/.ocr-{mark}-{}", &fresh[..8]),
            sum: Sha256::digest(&file.content).iter().map(|byte| format!("{byte:02x}")).collect(),
        }
    }

    async fn step(&self, agent: Agent<'_>, phase: &str, input: Vec<u8>) -> Result<()> {
        let is_plain = self.mode & !PLAIN_BITS == 0 && phase == "whole";
        let mask = if is_plain { PLAIN_BITS & !self.mode } else { 0o077 };
        let arguments = [
            phase.to_owned(),
            self.file.path.clone(),
            self.temp.clone(),
            format!("{mask:03o}"),
            if is_plain { String::new() } else { format!("{:o}", self.mode) },
            self.file.owner.clone().unwrap_or_default(),
            if self.file.make_parents { "1" } else { "0" }.to_owned(),
            self.sum.clone(),
        ];
        let reply = agent.script(script!("put.sh"), &arguments, input).await?;
        self.read(reply)
    }

    fn read(&self, reply: ScriptReply) -> Result<()> {
        let path = shown(&self.file.path);
        let ScriptReply { word, complaint, .. } = reply;
        Err(match word.as_str() {
            "done" => return Ok(()),
            "folder" => Error::new(ErrorKind::Conflict, format!("{path} is a folder in the guest")),
            "noparent" => Error::not_found(format!("the folder of {path} does not exist in the guest")),
            "nouser" => {
                let owner = self.file.owner.as_deref().unwrap_or_default();
                Error::invalid("owner", format_args!("the guest has no account {}", shown(owner)))
            }
            "digest" => {
                Error::unavailable(format!("{path} did not arrive whole; nothing was changed")).with_retry(Retry::Safe)
            }
            _ if complaint.contains("No space left") => {
                Error::new(ErrorKind::Exhausted, format!("the guest's disk is full; {path} is as it was"))
            }
            "mkdir" | "write" | "chown" | "chmod" | "rename" => {
                Error::new(ErrorKind::Conflict, format!("{path} cannot be written in the guest: {complaint}"))
            }
            other => Error::internal(format!("the guest answers {} to a copy: {complaint}", shown(other))),
        })
    }
}

/// [`ocr_core::GuestExec::get_file`].
pub(crate) async fn get(agent: Agent<'_>, path: &str, limit_bytes: u64) -> Result<Bytes> {
    check_guest_path(path)?;
    let first_bytes = limit_bytes.min(INLINE_BYTES);
    let arguments = [path.to_owned(), (first_bytes + 1).to_string()];
    let reply = agent.script(script!("get.sh"), &arguments, Vec::new()).await?;
    let mut content = match reply.word.as_str() {
        "file" => reply.bytes,
        "missing" => return Err(Error::not_found(format!("the guest has no file {}", shown(path)))),
        "folder" => return Err(Error::invalid("path", format_args!("{} is a folder in the guest", shown(path)))),
        "special" => return Err(Error::invalid("path", format_args!("{} is no plain file in the guest", shown(path)))),
        other => {
            return Err(Error::new(
                ErrorKind::Conflict,
                format!("{} cannot be read in the guest ({other}): {}", shown(path), reply.complaint),
            ));
        }
    };
    if content.len() as u64 > first_bytes && first_bytes < limit_bytes {
        let have = content.len() as u64;
        content.extend(agent.read_file(path, have, limit_bytes - have).await?);
    }
    if content.len() as u64 > limit_bytes {
        let why = format!("{} is larger than the limit of {limit_bytes} bytes", shown(path));
        return Err(Error::new(ErrorKind::Exhausted, why));
    }
    Ok(content.into())
}

/// [`ocr_core::GuestExec::remove_file`].
pub(crate) async fn remove(agent: Agent<'_>, path: &str) -> Result<Deletion> {
    check_guest_path(path)?;
    let reply = agent.script(script!("remove.sh"), &[path.to_owned()], Vec::new()).await?;
    match reply.word.as_str() {
        "done" => Ok(Deletion::Deleted),
        "missing" => Ok(Deletion::AlreadyGone),
        "folder" => Err(Error::invalid("path", format_args!("{} is a folder in the guest", shown(path)))),
        _ => Err(Error::new(
            ErrorKind::Conflict,
            format!("{} cannot be removed in the guest: {}", shown(path), reply.complaint),
        )),
    }
}
