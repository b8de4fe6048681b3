//! The guest agent's commands as types, and the one way to send one.

use std::time::Duration;

use base64::{Engine, engine::general_purpose::STANDARD};
use ocr_core::{Error, ErrorKind, Result, VmId, error::reason};
use serde::{Deserialize, Deserializer, Serialize, de::DeserializeOwned};
use tokio::time::Instant;

use crate::{
    backend::{Inner, vm_resource},
    door::{Call, Effect, Lane, Trouble},
    error::{Failure, Meaning},
};

/// The most bytes of content in one message to an agent. libvirt loses its place in messages beyond what a socket
/// takes at once (219,264 bytes where this was measured), so this stays far below.
pub(crate) const MAX_CONTENT_BYTES: usize = 48 << 10;
/// The longest message that is sent: the content in base64, and arguments.
const MAX_MESSAGE_BYTES: usize = 160 << 10;
/// The most bytes of a file in one answer. libvirt passes on 4 MiB of text; the agent is deaf while it encodes.
pub(crate) const READ_BYTES: u64 = 512 << 10;
/// libvirt's own limit for the handshake that precedes every command.
const HANDSHAKE: Duration = Duration::from_secs(5);

/// A command of the agent's protocol.
pub(crate) trait AgentCommand: Serialize + Sync {
    /// The protocol's name for it.
    const NAME: &'static str;
    /// Whether repeating it is harmless.
    const EFFECT: Effect;
    /// Its answer.
    type Reply: DeserializeOwned + Send + 'static;
}

macro_rules! command {
    ($(#[$doc:meta])* $name:ident, $wire:literal, $effect:ident -> $reply:ty { $($field:ident: $kind:ty),* }) => {
        $(#[$doc])*
        #[derive(Debug, Serialize)]
        #[serde(rename_all = "kebab-case")]
        pub(crate) struct $name { $(pub(crate) $field: $kind),* }

        impl AgentCommand for $name {
            const NAME: &'static str = $wire;
            const EFFECT: Effect = Effect::$effect;
            type Reply = $reply;
        }
    };
}

command!(Info, "guest-info", None -> InfoReply {});
command!(OsInfo, "guest-get-osinfo", None -> OsInfoReply {});
command!(Exec, "guest-exec", Some -> ExecReply {
    path: &'static str, arg: Vec<String>, input_data: Encoded, capture_output: bool
});
command!(
    /// Not harmless to repeat: a result is given away once.
    ExecStatus, "guest-exec-status", Some -> StatusReply { pid: i64 }
);
command!(FileOpen, "guest-file-open", Some -> i64 { path: String, mode: &'static str });
command!(FileWrite, "guest-file-write", Some -> WriteReply { handle: i64, buf_b64: Encoded });
command!(FileRead, "guest-file-read", Some -> ReadReply { handle: i64, count: u64 });
command!(FileSeek, "guest-file-seek", Some -> serde::de::IgnoredAny { handle: i64, offset: u64, whence: &'static str });
command!(FileClose, "guest-file-close", Some -> serde::de::IgnoredAny { handle: i64 });

/// Bytes that travel as base64.
#[derive(Debug, Default)]
pub(crate) struct Encoded(pub(crate) Vec<u8>);

impl Serialize for Encoded {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Encoded {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        STANDARD.decode(text.as_bytes()).map(Self).map_err(serde::de::Error::custom)
    }
}

#[derive(Debug, Deserialize)]
pub(crate) struct InfoReply {
    pub(crate) version: String,
    #[serde(default)]
    supported_commands: Vec<Supported>,
}

impl InfoReply {
    /// Whether the agent has all these commands and its configuration allows them.
    pub(crate) fn allows(&self, names: &[&str]) -> bool {
        names.iter().all(|name| self.supported_commands.iter().any(|known| known.name == *name && known.enabled))
    }
}

#[derive(Debug, Deserialize)]
struct Supported {
    name: String,
    enabled: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub(crate) struct OsInfoReply {
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) pretty_name: String,
}

#[derive(Debug, Deserialize)]
pub(crate) struct ExecReply {
    pub(crate) pid: i64,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct StatusReply {
    pub(crate) exited: bool,
    pub(crate) exitcode: Option<i32>,
    #[serde(default)]
    pub(crate) out_data: Encoded,
    #[serde(default)]
    pub(crate) err_data: Encoded,
}

#[derive(Debug, Deserialize)]
pub(crate) struct WriteReply {
    pub(crate) count: usize,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct ReadReply {
    pub(crate) buf_b64: Encoded,
    pub(crate) eof: bool,
}

#[derive(Serialize)]
struct Envelope<'a, C> {
    execute: &'static str,
    arguments: &'a C,
}

#[derive(Deserialize)]
struct Returned<T> {
    #[serde(rename = "return")]
    value: T,
}

/// One guest's agent.
#[derive(Clone, Copy)]
pub(crate) struct Agent<'a> {
    pub(crate) inner: &'a Inner,
    pub(crate) vm: VmId,
}

/// How a command failed: the error for the caller, and what libvirt said.
#[derive(Debug)]
pub(crate) struct Refused {
    pub(crate) error: Error,
    pub(crate) failure: Option<Failure>,
}

impl From<Refused> for Error {
    fn from(refused: Refused) -> Self {
        refused.error
    }
}

impl From<Error> for Refused {
    fn from(error: Error) -> Self {
        Self { error, failure: None }
    }
}

impl Agent<'_> {
    /// Sends a command and waits for its answer. Commands for one guest go one after the other.
    pub(crate) async fn send<C: AgentCommand>(&self, command: &C) -> Result<C::Reply, Refused> {
        let json = serde_json::to_string(&Envelope { execute: C::NAME, arguments: command })
            .map_err(|error| Error::internal("an agent command cannot be written").with_source(error))?;
        if json.len() > MAX_MESSAGE_BYTES {
            return Err(Error::invalid(
                "command",
                format_args!(
                    "is {} bytes as a message to the guest agent, at most {MAX_MESSAGE_BYTES} fit",
                    json.len()
                ),
            )
            .into());
        }
        let patience = self.inner.config.agent_deadline;
        let timeout_s = i32::try_from(patience.as_secs()).unwrap_or(i32::MAX);
        let deadline = patience + HANDSHAKE;
        let machine = self.inner.machine(self.vm);
        let turn = machine.agent(Instant::now() + deadline).await?;
        let call = Call {
            operation: C::NAME,
            lane: if machine.is_suspect() { Lane::Suspect } else { Lane::Agent },
            effect: C::EFFECT,
            deadline,
        };
        let uuid = *self.vm.as_uuid();
        let answered = self.inner.door.call(call, move |connect| {
            // Held until libvirt lets go, even when nobody waits any more: the agent is busy for as long.
            let _turn = &turn;
            Ok(connect.lookup_domain_by_uuid(uuid)?.qemu_agent_command(&json, timeout_s, 0)?)
        });
        let reply = match answered.await {
            Ok(reply) => reply,
            Err(trouble) => {
                let refused = self.refused(trouble);
                let is_silent =
                    refused.failure.as_ref().is_none_or(|failure| failure.meaning() == Meaning::AgentSilent);
                machine.set_suspect(is_silent && refused.error.reason() == Some(reason::AGENT_NOT_READY));
                return Err(refused);
            }
        };
        machine.set_suspect(false);
        let returned: Returned<C::Reply> = serde_json::from_str(&reply).map_err(|error| {
            Error::internal(format!("the guest agent's answer to {} makes no sense", C::NAME)).with_source(error)
        })?;
        Ok(returned.value)
    }

    fn refused(&self, trouble: Trouble) -> Refused {
        let failure = match &trouble {
            Trouble::Libvirt(failure) => Some(failure.clone()),
            Trouble::Ours(_) => None,
        };
        let error = trouble.into_agent_error();
        // Past our own deadline it is all the same to the caller: the agent does not answer now.
        let error = if error.kind() == ErrorKind::TimedOut {
            let retry = error.retry();
            Error::unavailable("the guest agent does not answer")
                .with_reason(reason::AGENT_NOT_READY)
                .with_retry(retry)
                .with_source(error)
        } else {
            error
        };
        Refused { error: error.on(vm_resource(self.vm)), failure }
    }

    /// Reads a file from `offset` to its end, at most `limit_bytes` and one: that one tells that there is more.
    pub(crate) async fn read_file(&self, path: &str, offset: u64, limit_bytes: u64) -> Result<Vec<u8>, Refused> {
        let handle = self.send(&FileOpen { path: path.to_owned(), mode: "r" }).await?;
        let read = async {
            if offset > 0 {
                self.send(&FileSeek { handle, offset, whence: "set" }).await?;
            }
            let mut content = Vec::new();
            loop {
                let left = (limit_bytes + 1).saturating_sub(content.len() as u64);
                if left == 0 {
                    return Ok(content);
                }
                let reply = self.send(&FileRead { handle, count: left.min(READ_BYTES) }).await?;
                let is_end = reply.eof || reply.buf_b64.0.is_empty();
                content.extend(reply.buf_b64.0);
                if is_end {
                    return Ok(content);
                }
            }
        };
        let read: Result<_, Refused> = read.await;
        self.close(handle).await;
        read
    }

    /// Writes a file that exists; its mode stays.
    pub(crate) async fn write_file(&self, path: &str, content: &[u8]) -> Result<(), Refused> {
        let handle = self.send(&FileOpen { path: path.to_owned(), mode: "w" }).await?;
        let write = async {
            let mut rest = content;
            while !rest.is_empty() {
                let chunk = rest.get(..rest.len().min(MAX_CONTENT_BYTES)).unwrap_or_default();
                let reply = self.send(&FileWrite { handle, buf_b64: Encoded(chunk.to_vec()) }).await?;
                if reply.count == 0 {
                    return Err(Error::new(ErrorKind::Exhausted, "the guest takes no more of the file").into());
                }
                // The agent may write less than it was given.
                rest = rest.get(reply.count.min(chunk.len())..).unwrap_or_default();
            }
            Ok(())
        };
        let written: Result<(), Refused> = write.await;
        let closed = self.send(&FileClose { handle }).await;
        // What the agent still had in its buffer is written now, or not.
        written.and(closed.map(drop))
    }

    pub(crate) async fn close(&self, handle: i64) {
        if let Err(refused) = self.send(&FileClose { handle }).await {
            // Handles die with the agent.
            tracing::debug!(vm = %self.vm, error = %refused.error, "a file stays open in the guest");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_written_as_the_protocol_has_them() {
        let written = |command: &dyn erased::Written| command.written();
        assert_eq!(written(&Info {}), r#"{"execute":"guest-info","arguments":{}}"#);
        let exec =
            Exec { path: "setsid", arg: vec!["sh".into()], input_data: Encoded(b"hi".to_vec()), capture_output: true };
        assert_eq!(
            written(&exec),
            r#"{"execute":"guest-exec","arguments":{"path":"setsid","arg":["sh"],"input-data":"aGk=","capture-output":true}}"#
        );
        let write = FileWrite { handle: 7, buf_b64: Encoded(vec![0, 255]) };
        assert_eq!(written(&write), r#"{"execute":"guest-file-write","arguments":{"handle":7,"buf-b64":"AP8="}}"#);
    }

    mod erased {
        use super::*;

        pub(super) trait Written {
            fn written(&self) -> String;
        }

        impl<C: AgentCommand> Written for C {
            fn written(&self) -> String {
                serde_json::to_string(&Envelope { execute: C::NAME, arguments: self }).unwrap()
            }
        }
    }

    #[test]
    fn answers_are_read() {
        let status: Returned<StatusReply> =
            serde_json::from_str(r#"{"return":{"exitcode":3,"out-data":"aGk=","exited":true,"out-truncated":false}}"#)
                .unwrap();
        assert_eq!((status.value.exitcode, status.value.out_data.0.as_slice()), (Some(3), &b"hi"[..]));
        assert!(status.value.err_data.0.is_empty());
        let info: Returned<InfoReply> = serde_json::from_str(
            r#"{"return":{"version":"7.2.22","supported_commands":[
                {"enabled":true,"name":"guest-exec","success-response":true},
                {"enabled":false,"name":"guest-file-open","success-response":true}]}}"#,
        )
        .unwrap();
        assert!(info.value.allows(&["guest-exec"]));
        assert!(!info.value.allows(&["guest-exec", "guest-file-open"]));
        assert!(!info.value.allows(&["guest-unknown"]));
        assert!(serde_json::from_str::<Returned<StatusReply>>(r#"{"return":{"exited":true,"out-data":"%"}}"#).is_err());
    }

    #[test]
    fn the_largest_content_fits_into_a_message() {
        let script = super::super::runner::script().len();
        assert!(MAX_CONTENT_BYTES * 4 / 3 + 2 * script + 4096 < MAX_MESSAGE_BYTES);
    }
}
