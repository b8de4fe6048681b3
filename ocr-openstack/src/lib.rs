//! OpenStack as backends of [`ocr_core`].
//!
//! What is here: the settings ([`Config`]), the token and the catalogue ([`Identity`]), and the one mapping from
//! OpenStack's answers to [`ocr_core::Error`]. Nova, Neutron and Glance are not here yet.
//!
//! The library reads no environment; settings come through a look-up:
//!
//! ```
//! # use std::collections::HashMap;
//! use ocr_openstack::{Config, Identity, Interface};
//!
//! # fn settings() -> HashMap<&'static str, &'static str> {
//! #     HashMap::from([
//! #         ("AUTH_URL", "https://cloud.example:5000"),
//! #         ("CREDENTIAL_ID", "demo"),
//! #         ("CREDENTIAL_SECRET", "not told"),
//! #         ("DOMAIN", "Default"),
//! #         ("PROJECT", "range"),
//! #         ("REGION", "RegionOne"),
//! #         ("GATEWAY_NETWORK", "public"),
//! #     ])
//! # }
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let settings = settings();
//! let config = Config::from_lookup(|name| settings.get(name).map(ToString::to_string))?;
//! let identity = Identity::new(&config)?;
//! let nova = identity.session().await?.endpoint("compute", Interface::Public)?;
//! # Ok(())
//! # }
//! ```

mod config;
mod error;
mod http;
mod identity;

pub use config::{Config, ConfigFault, ConfigFaults, Credential};
pub use identity::{Identity, Interface, Session};
pub use ocr_core::http::Certificates;
