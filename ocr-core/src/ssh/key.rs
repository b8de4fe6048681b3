//! Private keys as users give them.

use std::sync::Arc;

use russh::keys::{Error as KeyError, PrivateKey, decode_secret_key};
use secrecy::{ExposeSecret, SecretString};
use sha2::{Digest, Sha256};

use crate::{Error, Result, credentials::Credentials};

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

/// Tells other credentials from the same ones, and nothing else: it is kept in memory, and not shown.
pub(super) fn digest(credentials: &Credentials) -> [u8; 32] {
    fn secret(text: &Option<SecretString>) -> Option<&str> {
        text.as_ref().map(ExposeSecret::expose_secret)
    }
    let Credentials { user, password, private_key } = credentials;
    let mut hash = Sha256::new();
    for part in [Some(user.as_str()), secret(password), secret(private_key)] {
        hash.update([u8::from(part.is_some())]);
        hash.update(part.unwrap_or_default().len().to_le_bytes());
        hash.update(part.unwrap_or_default());
    }
    hash.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_credentials_have_another_digest() {
        let with = |password: &str, key: &str| {
            digest(&Credentials::of("u").with_password(password.to_owned()).with_private_key(key.to_owned()))
        };
        assert_eq!(with("a", "b"), with("a", "b"));
        assert_ne!(with("a", "b"), with("ab", ""));
        assert_ne!(with("a", ""), with("", "a"));
    }
}
