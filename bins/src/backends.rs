//! Which backend a program works with.

use std::sync::Arc;

use ocr_core::{
    ComputeBackend, GuestExec, ImageBackend, NetworkBackend, Owner, Result,
    credentials::CredentialSink,
    layer::{LayerExt, TraceLayer},
    memory::MemoryCloud,
};
#[cfg(feature = "ssh")]
use ocr_core::{StateStore, credentials::MemoryCredentials, ssh};

#[cfg(feature = "ssh")]
use crate::settings::SshSettings;
use crate::{
    cli::args::{BackendArgs, BackendKind},
    settings::LibvirtSettings,
};

/// The four traits of one place where machines are.
#[derive(Clone, Debug)]
pub struct Backends {
    /// Makes machines.
    pub compute: Arc<dyn ComputeBackend>,
    /// Knows networks.
    pub network: Arc<dyn NetworkBackend>,
    /// Knows templates.
    pub image: Arc<dyn ImageBackend>,
    /// Acts inside machines.
    pub guest: Arc<dyn GuestExec>,
    /// Is told accounts of requests, where guests are logged in to.
    pub credentials: Option<Arc<dyn CredentialSink>>,
    disks: Disks,
}

#[derive(Clone, Debug)]
enum Disks {
    None,
    #[cfg(feature = "libvirt")]
    Libvirt(ocr_libvirt::Libvirt),
}

impl Backends {
    /// Opens what the command line names.
    ///
    /// # Errors
    /// When the backend cannot be reached, or this program was built without it.
    pub async fn open(args: &BackendArgs) -> Result<Self> {
        match args.backend {
            BackendKind::Memory => Ok(Self::memory()),
            BackendKind::Libvirt => {
                Self::libvirt(&LibvirtSettings {
                    uri: args.uri.clone(),
                    user: None,
                    password: None,
                    domain_type: args.domain_type.clone(),
                    pool: args.pool.clone(),
                    insecure: false,
                })
                .await
            }
        }
    }

    /// A cloud in this process, with one template and two networks.
    pub fn memory() -> Self {
        Self::of(Arc::new(MemoryCloud::new()), Disks::None)
    }

    /// A hypervisor through libvirt.
    ///
    /// # Errors
    /// When libvirt cannot be reached, or its pool is not there.
    #[cfg(feature = "libvirt")]
    pub async fn libvirt(settings: &LibvirtSettings) -> Result<Self> {
        let config = ocr_libvirt::Config {
            uri: settings.address(),
            pool: settings.pool.clone(),
            domain_type: domain_type(&settings.domain_type)?,
            user: settings.user.clone(),
            password: settings.password.clone(),
            ..ocr_libvirt::Config::default()
        };
        let libvirt = ocr_libvirt::Libvirt::open(config).await?;
        Ok(Self::of(Arc::new(libvirt.clone()), Disks::Libvirt(libvirt)))
    }

    /// Says how to get a program with libvirt.
    ///
    /// # Errors
    /// Always.
    #[cfg(not(feature = "libvirt"))]
    pub async fn libvirt(_settings: &LibvirtSettings) -> Result<Self> {
        Err(ocr_core::Error::unsupported("this program was built without libvirt; build it with `--features libvirt`"))
    }

    fn of<B: ComputeBackend + NetworkBackend + ImageBackend + GuestExec>(backend: Arc<B>, disks: Disks) -> Self {
        Self {
            compute: backend.clone().layer(TraceLayer),
            network: backend.clone().layer(TraceLayer),
            image: backend.clone().layer(TraceLayer),
            guest: backend.layer(TraceLayer),
            credentials: None,
            disks,
        }
    }

    /// Acts in guests over SSH instead of through the hypervisor; host keys are pinned in the store.
    ///
    /// # Errors
    /// When the settings cannot be used.
    #[cfg(feature = "ssh")]
    pub fn over_ssh(mut self, settings: &SshSettings, store: Arc<dyn StateStore>) -> Result<Self> {
        let mut addresses = ssh::ComputeAddresses::new(self.compute.clone())
            .with_port(settings.port)
            .with_ranges(settings.ranges.clone());
        if let Some(pattern) = &settings.pattern {
            addresses = addresses.with_pattern(pattern)?;
        }
        let accounts = Arc::new(MemoryCredentials::new(settings.account.clone()));
        let keys = ssh::HostKeys::new(store);
        let guest = ssh::SshGuest::new(Arc::new(addresses), accounts.clone(), keys, &settings.config);
        self.guest = Arc::new(guest).layer(TraceLayer);
        self.credentials = Some(accounts);
        Ok(self)
    }

    /// Deletes disks of this owner's that no machine has, and image data that no record speaks of, and gives their
    /// names. There are none unless somebody took a machine away by hand or an import was cut off.
    ///
    /// # Errors
    /// Those of the backend.
    #[cfg_attr(not(feature = "libvirt"), expect(unused_variables, reason = "no other backend has disks"))]
    pub async fn sweep_disks(&self, owner: &Owner) -> Result<Vec<String>> {
        match &self.disks {
            Disks::None => Ok(Vec::new()),
            #[cfg(feature = "libvirt")]
            Disks::Libvirt(libvirt) => {
                let mut swept = libvirt.sweep_volumes(owner).await?;
                swept.extend(libvirt.sweep_images(owner).await?);
                Ok(swept)
            }
        }
    }
}

#[cfg(feature = "libvirt")]
fn domain_type(text: &str) -> Result<ocr_libvirt::config::DomainType> {
    use ocr_libvirt::config::DomainType;

    match text.to_ascii_lowercase().as_str() {
        "kvm" => Ok(DomainType::Kvm),
        "qemu" => Ok(DomainType::Qemu),
        "auto" => Ok(DomainType::Auto),
        _ => Err(ocr_core::Error::invalid(
            "DOMAIN_TYPE",
            format_args!("wants kvm, qemu or auto, got {}", ocr_core::id::shown(text)),
        )),
    }
}
