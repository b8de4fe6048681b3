//! The settings, checked as a whole.

use std::fmt;

use ocr_core::http::Certificates;
use reqwest::Url;
use secrecy::SecretString;

/// How to reach a cloud, and as whom. Its `Debug` hides the secret.
#[derive(Clone, Debug)]
pub struct Config {
    /// Keystone, with `/v3` at the end (`AUTH_URL`).
    pub auth_url: Url,
    /// Who we are (`CREDENTIAL_ID`, `CREDENTIAL_SECRET`, `DOMAIN`, `PROJECT`).
    pub credential: Credential,
    /// The region whose endpoints are used (`REGION`).
    pub region: String,
    /// Name or id of the network that leads out of the cloud (`GATEWAY_NETWORK`).
    pub gateway_network: String,
    /// Which certificates of the cloud are believed (`GLOBAL_INSECURE`, `OCR_CA_FILE`).
    pub certificates: Certificates,
}

/// Who we are at Keystone.
#[derive(Clone, Debug)]
pub enum Credential {
    /// An application credential, which belongs to one project already.
    Application {
        /// Its id.
        id: String,
        /// Its secret.
        secret: SecretString,
    },
    /// A user's name and password, for one project.
    Password {
        /// The user's name.
        user: String,
        /// The user's password.
        secret: SecretString,
        /// The name of the domain of both user and project.
        domain: String,
        /// The project's name.
        project: String,
    },
}

/// One setting that cannot stay as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigFault {
    /// The setting's name.
    pub setting: &'static str,
    /// What is wanted. It never repeats a secret.
    pub problem: String,
}

impl fmt::Display for ConfigFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.setting, self.problem)
    }
}

/// All settings that cannot stay as they are, one a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigFaults(pub Vec<ConfigFault>);

impl fmt::Display for ConfigFaults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (nth, fault) in self.0.iter().enumerate() {
            write!(f, "{}{fault}", if nth == 0 { "" } else { "\n" })?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigFaults {}

impl Config {
    /// Reads and checks all settings; `lookup` gives a setting's text by its name. Empty counts as not given.
    ///
    /// | setting | | |
    /// |---|---|---|
    /// | `AUTH_URL` | wanted | Keystone's address, with or without `/v3` |
    /// | `CREDENTIAL_ID` | wanted | a user's name, or the id of an application credential |
    /// | `CREDENTIAL_SECRET` | wanted | the password, or the credential's secret |
    /// | `OCR_CREDENTIAL_KIND` | | `password` or `application`; by default 32 hexadecimal digits are the id of an application credential and all else is a user's name |
    /// | `DOMAIN`, `PROJECT` | wanted with a password | names; an application credential has its own |
    /// | `REGION` | wanted | the region whose endpoints are used |
    /// | `GATEWAY_NETWORK` | wanted | name or id of the network that leads out |
    /// | `GLOBAL_INSECURE` | `false` | `true` believes every certificate of the cloud |
    /// | `OCR_CA_FILE` | | PEM file of further authorities; not read when nothing is checked |
    ///
    /// # Errors
    /// All faults at once.
    pub fn from_lookup(lookup: impl Fn(&str) -> Option<String>) -> Result<Self, ConfigFaults> {
        let mut read = Reader { lookup, faults: Vec::new() };
        let auth_url = read.wanted("AUTH_URL").and_then(|text| read.check("AUTH_URL", auth_url(&text)));
        let credential = read.credential();
        let region = read.wanted("REGION");
        let gateway_network = read.wanted("GATEWAY_NETWORK");
        let insecure = read.optional("GLOBAL_INSECURE").map(|text| read.check("GLOBAL_INSECURE", boolean(&text)));
        let certificates = match (insecure.flatten(), read.optional("OCR_CA_FILE")) {
            (Some(true), _) => Certificates::Unchecked,
            (_, Some(file)) => Certificates::SystemAnd(file.into()),
            (_, None) => Certificates::System,
        };
        match (auth_url, credential, region, gateway_network) {
            (Some(auth_url), Some(credential), Some(region), Some(gateway_network)) if read.faults.is_empty() => {
                Ok(Self { auth_url, credential, region, gateway_network, certificates })
            }
            _ => Err(ConfigFaults(read.faults)),
        }
    }
}

struct Reader<L> {
    lookup: L,
    faults: Vec<ConfigFault>,
}

impl<L: Fn(&str) -> Option<String>> Reader<L> {
    fn optional(&mut self, setting: &'static str) -> Option<String> {
        let text = (self.lookup)(setting)?.trim().to_owned();
        if text.contains(char::is_control) || text.len() > 4096 {
            self.fault(setting, "wants one line of at most 4096 bytes");
            return None;
        }
        (!text.is_empty()).then_some(text)
    }

    fn wanted(&mut self, setting: &'static str) -> Option<String> {
        let faults = self.faults.len();
        let text = self.optional(setting);
        if text.is_none() && self.faults.len() == faults {
            self.fault(setting, "is wanted and not set");
        }
        text
    }

    fn check<T>(&mut self, setting: &'static str, checked: Result<T, String>) -> Option<T> {
        checked.map_err(|problem| self.fault(setting, problem)).ok()
    }

    fn fault(&mut self, setting: &'static str, problem: impl Into<String>) {
        self.faults.push(ConfigFault { setting, problem: problem.into() });
    }

    fn credential(&mut self) -> Option<Credential> {
        let id = self.wanted("CREDENTIAL_ID");
        // As it is: a secret may begin or end with a space.
        let secret = (self.lookup)("CREDENTIAL_SECRET").filter(|text| !text.is_empty()).map(SecretString::from);
        if secret.is_none() {
            self.fault("CREDENTIAL_SECRET", "is wanted and not set");
        }
        let application = match self.optional("OCR_CREDENTIAL_KIND").as_deref() {
            Some("application") => true,
            Some("password") => false,
            Some(other) => {
                self.fault("OCR_CREDENTIAL_KIND", format!("wants `password` or `application`, got {other:?}"));
                return None;
            }
            None => id.as_deref().is_some_and(|id| id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit())),
        };
        if application {
            return Some(Credential::Application { id: id?, secret: secret? });
        }
        let (domain, project) = (self.wanted("DOMAIN"), self.wanted("PROJECT"));
        Some(Credential::Password { user: id?, secret: secret?, domain: domain?, project: project? })
    }
}

fn auth_url(text: &str) -> Result<Url, String> {
    let mut url = Url::parse(text)
        .map_err(|error| format!("wants an address such as https://cloud.example:5000/v3 ({error})"))?;
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
        return Err("wants an http or https address".into());
    }
    // Not repeated in the message: what stands there may be a password.
    if !url.username().is_empty() || url.password().is_some() || url.query().is_some() || url.fragment().is_some() {
        return Err("wants an address without user, query and fragment".into());
    }
    let path = url.path().trim_end_matches('/').to_owned();
    match path.rsplit('/').next() {
        Some("v3") => url.set_path(&path),
        Some("v2.0") => return Err("is of the Identity API 2.0, which is no more; wants version 3".into()),
        _ if path.contains("/v3/") => return Err("wants nothing after /v3".into()),
        _ => url.set_path(&format!("{path}/v3")),
    }
    Ok(url)
}

fn boolean(text: &str) -> Result<bool, String> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "yes" | "1" => Ok(true),
        "false" | "no" | "0" => Ok(false),
        _ => Err(format!("wants true or false, got {text:?}")),
    }
}

#[cfg(test)]
mod tests {
    use secrecy::ExposeSecret;

    use super::*;

    const COMPLETE: [(&str, &str); 8] = [
        ("AUTH_URL", "https://cloud.example:5000/v3"),
        ("CREDENTIAL_ID", "demo"),
        ("CREDENTIAL_SECRET", " canary "),
        ("DOMAIN", "Default"),
        ("PROJECT", "range"),
        ("REGION", "RegionOne"),
        ("GATEWAY_NETWORK", "public"),
        ("GLOBAL_INSECURE", "False"),
    ];

    fn read(changes: &[(&str, &str)]) -> Result<Config, ConfigFaults> {
        Config::from_lookup(|name| {
            let found = changes.iter().chain(&COMPLETE).find(|(known, _)| *known == name);
            found.map(|(_, text)| text.to_string())
        })
    }

    fn faulty(changes: &[(&str, &str)]) -> Vec<&'static str> {
        read(changes).unwrap_err().0.iter().map(|fault| fault.setting).collect()
    }

    #[test]
    fn a_name_and_a_password_are_read_as_they_are() {
        let config = read(&[]).unwrap();
        let Credential::Password { user, secret, domain, project } = &config.credential else { panic!("{config:?}") };
        assert_eq!((user.as_str(), domain.as_str(), project.as_str()), ("demo", "Default", "range"));
        assert_eq!(secret.expose_secret(), " canary ");
        assert_eq!((config.region.as_str(), config.gateway_network.as_str()), ("RegionOne", "public"));
        assert_eq!(config.certificates, Certificates::System);
    }

    #[test]
    fn an_application_credential_is_known_by_its_id_or_by_word() {
        let id = "ca20d06770314c518f00b33f2d003834";
        for changes in [
            &[("CREDENTIAL_ID", id), ("DOMAIN", ""), ("PROJECT", "")][..],
            &[("OCR_CREDENTIAL_KIND", "application"), ("DOMAIN", "")],
        ] {
            assert!(matches!(read(changes).unwrap().credential, Credential::Application { .. }), "{changes:?}");
        }
        let config = read(&[("CREDENTIAL_ID", id), ("OCR_CREDENTIAL_KIND", "password")]).unwrap();
        assert!(matches!(config.credential, Credential::Password { user, .. } if user == id));
        assert_eq!(faulty(&[("OCR_CREDENTIAL_KIND", "token")]), ["OCR_CREDENTIAL_KIND"]);
    }

    #[test]
    fn all_faults_come_at_once() {
        let ConfigFaults(faults) = Config::from_lookup(|_| None).unwrap_err();
        let named: Vec<_> = faults.iter().map(|fault| fault.setting).collect();
        assert_eq!(
            named,
            ["AUTH_URL", "CREDENTIAL_ID", "CREDENTIAL_SECRET", "DOMAIN", "PROJECT", "REGION", "GATEWAY_NETWORK"]
        );
        assert_eq!(
            faulty(&[("AUTH_URL", "cloud"), ("GLOBAL_INSECURE", "maybe"), ("REGION", "a\nb"), ("PROJECT", "  ")]),
            ["AUTH_URL", "PROJECT", "REGION", "GLOBAL_INSECURE"]
        );
    }

    #[test]
    fn an_address_gets_its_version_once() {
        for (given, wanted) in [
            ("https://c:5000", "https://c:5000/v3"),
            ("https://c:5000/", "https://c:5000/v3"),
            ("https://c:5000/v3", "https://c:5000/v3"),
            ("https://c:5000/v3/", "https://c:5000/v3"),
            ("http://c/identity", "http://c/identity/v3"),
            ("http://c/identity/v3//", "http://c/identity/v3"),
        ] {
            let url = auth_url(given).unwrap();
            assert_eq!(url.as_str(), wanted);
            assert_eq!(auth_url(url.as_str()).unwrap(), url);
        }
    }

    #[test]
    fn a_bad_address_is_refused_and_a_password_in_it_is_not_repeated() {
        for bad in ["", "c", "ftp://c", "https://", "http://c/v2.0", "http://c/v3/auth/tokens", "http://c?a=b"] {
            assert!(auth_url(bad).is_err(), "{bad}");
        }
        let problem = auth_url("https://me:canary@c:5000").unwrap_err();
        assert!(!problem.contains("canary"), "{problem}");
    }

    #[test]
    fn certificates_are_checked_unless_told_otherwise() {
        for (insecure, file, wanted) in [
            ("", "", Certificates::System),
            ("no", "/ca.pem", Certificates::SystemAnd("/ca.pem".into())),
            ("TRUE", "", Certificates::Unchecked),
            ("1", "/ca.pem", Certificates::Unchecked),
        ] {
            let config = read(&[("GLOBAL_INSECURE", insecure), ("OCR_CA_FILE", file)]).unwrap();
            assert_eq!(config.certificates, wanted);
        }
    }

    #[test]
    fn the_secret_is_in_no_debug_text() {
        for changes in [&[][..], &[("OCR_CREDENTIAL_KIND", "application")]] {
            let shown = format!("{:#?}", read(changes).unwrap());
            assert!(shown.contains("REDACTED") && !shown.contains("canary"), "{shown}");
        }
    }
}
