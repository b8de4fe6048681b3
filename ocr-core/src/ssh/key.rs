//! Private keys as users give them.

use std::sync::Arc;

use russh::keys::{Error as KeyError, PrivateKey, decode_secret_key};
use secrecy::{ExposeSecret, SecretString};

use crate::{Error, Result};

/// The largest text that is looked at, in bytes: an RSA key of 16,384 bits has 13 KiB.
const MAX_KEY_BYTES: usize = 32 << 10;

/// Checks that a text is a private key that can be used: in OpenSSH's form, PEM (PKCS#1, PKCS#8, SEC1) or PuTTY's, and
/// without a passphrase.
///
/// # Errors
/// `Invalid`; the text repeats nothing of the key.
pub fn check_private_key(text: &SecretString) -> Result<()> {
    parse(text).map(drop)
}

pub(super) fn parse(text: &SecretString) -> Result<Arc<PrivateKey>> {
    let text = text.expose_secret();
    let invalid = |why: &str| Err(Error::invalid("private_key", why));
    if text.len() > MAX_KEY_BYTES {
        return invalid("is too long for a private key");
    }
    let encrypted = "is protected by a passphrase; give it without one (ssh-keygen -p -N '' takes it off)";
    let pem_encrypted = text.lines().any(|line| {
        line.starts_with("-----BEGIN ENCRYPTED") || (line.starts_with("Proc-Type:") && line.contains("ENCRYPTED"))
    });
    if pem_encrypted {
        return invalid(encrypted);
    }
    // Pasted keys come with blanks in front.
    let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    match decode_secret_key(&lines.join("\n"), None) {
        Ok(key) if key.is_encrypted() => invalid(encrypted),
        Ok(key) => Ok(Arc::new(key)),
        Err(KeyError::KeyIsEncrypted) => invalid(encrypted),
        // The cause may quote from the key.
        Err(_) if text.contains("PUBLIC KEY") || text.starts_with("ssh-") => invalid("is a public key"),
        Err(_) => invalid("is no private key in OpenSSH's, PEM or PuTTY form, or of a kind that is not supported"),
    }
}
