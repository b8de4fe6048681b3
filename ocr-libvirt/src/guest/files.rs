//! Files into the guest and out of it.

use bytes::{Bytes, BytesMut};
use ocr_core::{Deletion, Error, ErrorKind, OperationId, PutFile, Result, VmId, guest::check_guest_path, id::shown};
use sha2::{Digest, Sha256};
use tokio::time::Instant;

use super::{
    Again, AgentGuest, AgentLink, Job, MAX_FILE_BYTES, MAX_PAUSE,
    agent::Agent,
    check_argument, check_user,
    runner::{FILE, INLINE_BYTES, unknown_user},
};

/// The most that goes into the guest in one message, in bytes. libvirt loses count of a message that does not fit into
/// its socket's buffer (some 200 KB on usual settings) and the channel is then broken for a while.
const PIECE_BYTES: usize = 48 << 10;

/// The most that is read in one message: below libvirt's 4 MiB, and small enough that others have their turn.
const READ_BYTES: usize = 512 << 10;

/// How often a content is sent that arrives damaged.
const MAX_TRIES: u32 = 3;

impl<L: AgentLink> AgentGuest<L> {
    /// Brings what is too big for one message into the guest, into a file for root alone; the runner removes it.
    /// Nothing and `None` when it is small.
    pub(super) async fn stage(&self, vm: VmId, content: &[u8], until: Instant) -> Result<Option<String>> {
        if content.len() <= PIECE_BYTES {
            return Ok(None);
        }
        let mut again = Again::default();
        loop {
            let name = OperationId::random().to_string();
            let arguments = |_| vec!["stage".to_owned(), self.config.base.clone(), name.clone()];
            let reply = self.runner(&mut Job::new(vm, FILE, until), arguments, &[]).await?;
            match reply.state() {
                "ok" => {}
                "fail" => return Err(reply.failure()),
                _ => return Err(reply.senseless()),
            }
            let path = format!("{}/in/{name}", self.config.base);
            match write(&self.agent, vm, &path, content).await {
                Ok(()) => return Ok(Some(path)),
                Err(error) if again.may(&error, until) => {
                    // What is left of it is swept by its age.
                    tracing::debug!(%vm, %error, "lost an open file in the guest, writing again");
                    tokio::time::sleep(MAX_PAUSE).await;
                }
                Err(error) => {
                    let _ = self.remove_inner(vm, &path).await;
                    return Err(error);
                }
            }
        }
    }

    pub(super) async fn put_inner(&self, vm: VmId, file: &PutFile) -> Result<()> {
        check_guest_path(&file.path)?;
        check_argument("path", &file.path)?;
        if let Some(owner) = &file.owner {
            check_user(owner, "owner")?;
        }
        let mode = file.mode.unwrap_or(0o644);
        if mode > 0o7777 {
            return Err(Error::invalid("mode", format_args!("wants permission bits up to 7777, got {mode:o}")));
        }
        if file.content.len() as u64 > MAX_FILE_BYTES {
            return Err(Error::invalid("content", format_args!("must not be over {MAX_FILE_BYTES} bytes")));
        }
        let until = Instant::now() + self.transfer_limit(file.content.len() as u64);
        let digest = Sha256::digest(&file.content);
        let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        let id = OperationId::random().to_string();
        let mut tries = 0;
        let reply = loop {
            let staged = self.stage(vm, &file.content, until).await?;
            let arguments = |_| {
                vec![
                    "put".to_owned(),
                    self.config.base.clone(),
                    file.path.clone(),
                    staged.clone().unwrap_or_default(),
                    digest.clone(),
                    format!("{mode:o}"),
                    file.owner.clone().unwrap_or_default(),
                    u8::from(file.make_parents).to_string(),
                    id.clone(),
                ]
            };
            let content: &[u8] = if staged.is_some() { &[] } else { &file.content };
            let reply = self.runner(&mut Job::new(vm, FILE, until), arguments, content).await?;
            tries += 1;
            if reply.state() != "again" || tries == MAX_TRIES || Instant::now() >= until {
                break reply;
            }
        };
        match reply.state() {
            "ok" => Ok(()),
            "folder" => Err(Error::invalid("path", format_args!("{} is a folder in the guest", shown(&file.path)))),
            "noparent" => Err(Error::not_found(format!("the guest has no folder for {}", shown(&file.path)))),
            "noowner" => Err(unknown_user("owner", file.owner.as_deref().unwrap_or_default())),
            "again" => Err(Error::unavailable("the content that reached the guest has another digest")),
            "fail" => Err(reply.failure()),
            _ => Err(reply.senseless()),
        }
    }

    pub(super) async fn get_inner(&self, vm: VmId, path: &str, limit_bytes: u64) -> Result<Bytes> {
        check_guest_path(path)?;
        check_argument("path", path)?;
        let limit_bytes = limit_bytes.min(MAX_FILE_BYTES);
        let until = Instant::now() + self.transfer_limit(limit_bytes);
        let arguments = |_| {
            vec![
                "get".to_owned(),
                self.config.base.clone(),
                path.to_owned(),
                limit_bytes.to_string(),
                INLINE_BYTES.to_string(),
            ]
        };
        let reply = self.runner(&mut Job::new(vm, FILE, until), arguments, &[]).await?;
        match reply.state() {
            "file" if reply.body.len() as u64 == reply.number(0)? => Ok(reply.body),
            "file" => Err(Error::unavailable("the file became shorter while it was read")),
            // By one handle, so what comes is one file, whichever has the name by now.
            "large" => {
                let content = self.read_from(vm, path, 0, limit_bytes as usize + 1, until).await?;
                if content.len() as u64 > limit_bytes { Err(over(path, limit_bytes)) } else { Ok(content) }
            }
            "over" => Err(over(path, limit_bytes)),
            "missing" => Err(Error::not_found(format!("the guest has no file {}", shown(path)))),
            "folder" => Err(Error::invalid("path", format_args!("{} is a folder in the guest", shown(path)))),
            "special" => Err(Error::invalid("path", format_args!("{} is no regular file in the guest", shown(path)))),
            "fail" => Err(reply.failure()),
            _ => Err(reply.senseless()),
        }
    }

    pub(super) async fn remove_inner(&self, vm: VmId, path: &str) -> Result<Deletion> {
        check_guest_path(path)?;
        check_argument("path", path)?;
        let until = Instant::now() + self.transfer_limit(0);
        let arguments = |_| vec!["remove".to_owned(), self.config.base.clone(), path.to_owned()];
        let reply = self.runner(&mut Job::new(vm, FILE, until), arguments, &[]).await?;
        match reply.state() {
            "ok" => Ok(Deletion::Deleted),
            "missing" => Ok(Deletion::AlreadyGone),
            "folder" => Err(Error::invalid("path", format_args!("{} is a folder in the guest", shown(path)))),
            "fail" => Err(reply.failure()),
            _ => Err(reply.senseless()),
        }
    }
}

/// Writes a file that is there, from its beginning.
async fn write<L: AgentLink>(agent: &Agent<L>, vm: VmId, path: &str, content: &[u8]) -> Result<()> {
    let handle = agent.open(vm, path, "r+").await?;
    let result = async {
        let mut rest = content;
        while !rest.is_empty() {
            let count = agent.write(vm, handle, &rest[..rest.len().min(PIECE_BYTES)]).await?;
            rest = &rest[count..];
        }
        Ok(())
    };
    let result = result.await;
    // The agent buffers: an error may show only here.
    let closed = agent.close(vm, handle).await;
    result.and(closed)
}

fn over(path: &str, limit_bytes: u64) -> Error {
    Error::new(ErrorKind::Exhausted, format!("{} is larger than the limit of {limit_bytes} bytes", shown(path)))
}

/// Reads at most `count` bytes from `offset` on; less when the file ends before.
pub(super) async fn read<L: AgentLink>(
    agent: &Agent<L>,
    vm: VmId,
    path: &str,
    offset: u64,
    count: usize,
) -> Result<Bytes> {
    let handle = agent.open(vm, path, "r").await?;
    let result = async {
        if offset > 0 {
            agent.seek(vm, handle, offset).await?;
        }
        let mut content = BytesMut::new();
        while content.len() < count {
            let (bytes, eof) = agent.read(vm, handle, READ_BYTES.min(count - content.len())).await?;
            content.extend_from_slice(&bytes);
            if eof {
                break;
            }
        }
        Ok(content.freeze())
    };
    let result = result.await;
    let _ = agent.close(vm, handle).await;
    result
}
