//! Guests: [`GuestExec`] over the QEMU guest agent.

#[cfg(feature = "libvirt")]
mod agent;
#[cfg(feature = "libvirt")]
mod exec;
#[cfg(feature = "libvirt")]
mod files;
mod runner;
mod script;
#[cfg(test)]
mod tests;

#[cfg(feature = "libvirt")]
mod backend {
    use async_trait::async_trait;
    use bytes::Bytes;
    use ocr_core::{
        Deletion, ErrorKind, ExecOutput, ExecRequest, GuestCapabilities, GuestExec, GuestInfo, OsFamily, PutFile,
        Result, VmId,
    };

    use super::agent::{Agent, Info, OsInfo, OsInfoReply};
    use crate::{Libvirt, backend::vm_resource};

    const CAPABILITIES: GuestCapabilities = GuestCapabilities {
        max_file_bytes: 256 << 20,
        max_output_bytes: ExecRequest::OUTPUT_LIMIT_BYTES,
        users: true,
        streaming: true,
    };

    /// Serves every machine of the hypervisor, also those that other software made.
    #[async_trait]
    impl GuestExec for Libvirt {
        fn capabilities(&self) -> GuestCapabilities {
            CAPABILITIES
        }

        async fn guest_info(&self, vm: VmId) -> Result<GuestInfo> {
            let agent = self.agent(vm);
            let named = |error: ocr_core::Error| error.during("guest.guest_info").on(vm_resource(vm));
            let info = agent.send(&Info {}).await.map_err(|refused| named(refused.error))?;
            let os = match agent.send(&OsInfo {}).await {
                Ok(os) => os,
                // Forbidden, or a system without the file that it reads.
                Err(refused) if matches!(refused.error.kind(), ErrorKind::Unsupported | ErrorKind::Internal) => {
                    OsInfoReply::default()
                }
                Err(refused) => return Err(named(refused.error)),
            };
            Ok(GuestInfo {
                can_exec: info.allows(&["guest-exec", "guest-exec-status"]),
                can_files: info.allows(&[
                    "guest-file-open",
                    "guest-file-close",
                    "guest-file-read",
                    "guest-file-write",
                    "guest-file-seek",
                ]),
                agent_version: info.version,
                os_family: if os.id == "mswindows" { OsFamily::Windows } else { OsFamily::Linux },
                os_name: if os.pretty_name.is_empty() { os.name } else { os.pretty_name },
            })
        }

        async fn put_file(&self, vm: VmId, file: &PutFile) -> Result<()> {
            let put = super::files::put(self.agent(vm), file, CAPABILITIES.max_file_bytes).await;
            put.map_err(|error| error.during("guest.put_file").on(vm_resource(vm)))
        }

        async fn get_file(&self, vm: VmId, path: &str, limit_bytes: u64) -> Result<Bytes> {
            let got = super::files::get(self.agent(vm), path, limit_bytes.min(CAPABILITIES.max_file_bytes)).await;
            got.map_err(|error| error.during("guest.get_file").on(vm_resource(vm)))
        }

        async fn remove_file(&self, vm: VmId, path: &str) -> Result<Deletion> {
            let removed = super::files::remove(self.agent(vm), path).await;
            removed.map_err(|error| error.during("guest.remove_file").on(vm_resource(vm)))
        }

        async fn exec(&self, vm: VmId, request: &ExecRequest) -> Result<ExecOutput> {
            let ran = super::exec::exec(self.agent(vm), request, CAPABILITIES.max_output_bytes).await;
            ran.map_err(|error| error.during("guest.exec").on(vm_resource(vm)))
        }
    }

    impl Libvirt {
        fn agent(&self, vm: VmId) -> Agent<'_> {
            Agent { inner: &self.inner, vm }
        }
    }
}
