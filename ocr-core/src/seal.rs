//! [`Sealer`]: what must be kept secret in a store, and with which keys.
//!
//! XChaCha20-Poly1305 with a random nonce for each seal, whose 192 bits make a repeat impossible in practice. A seal is
//! bound to the place it was made for, so that who can write the store cannot put one record's secret into another.

use std::fmt;

use base64::{
    Engine,
    engine::general_purpose::{STANDARD, STANDARD_NO_PAD},
};
use chacha20poly1305::{
    AeadCore, KeyInit, XChaCha20Poly1305, XNonce,
    aead::{Aead, OsRng, Payload},
};
use secrecy::{ExposeSecret, SecretBox, SecretString};
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use crate::{Error, ErrorKind, Result, error::reason};

/// How long a key is, in bytes.
pub const KEY_BYTES: usize = 32;
/// The most keys of one [`Sealer`].
pub const MAX_KEYS: usize = 16;
/// The form of a seal that this version writes: `ocrs1.KEY_ID.BASE64`.
const FORM: &str = "ocrs1";
const NONCE_BYTES: usize = 24;

/// A key of 256 bits. Neither `Debug` nor anything else shows it.
pub struct SealKey {
    key: SecretBox<[u8; KEY_BYTES]>,
    id: String,
}

impl SealKey {
    /// Reads a key: 64 hexadecimal digits, or 32 bytes in base64.
    ///
    /// # Errors
    /// `Invalid`, which does not repeat the text.
    pub fn parse(text: &SecretString) -> Result<Self> {
        let text = text.expose_secret().trim();
        let bytes = match text.len() {
            64 => from_hex(text),
            43 | 44 => STANDARD_NO_PAD.decode(text.trim_end_matches('=')).ok().map(Zeroizing::new),
            _ => None,
        };
        let bytes = bytes.filter(|bytes| bytes.len() == KEY_BYTES);
        let Some(bytes) = bytes else {
            return Err(Error::invalid("key", "wants 32 bytes, as 64 hexadecimal digits or in base64"));
        };
        if bytes.iter().all(|byte| *byte == bytes[0]) {
            return Err(Error::invalid("key", "wants random bytes, got the same one 32 times"));
        }
        Ok(Self::from_bytes(&bytes))
    }

    /// A new random key.
    pub fn generate() -> Self {
        let key = Zeroizing::new(XChaCha20Poly1305::generate_key(&mut OsRng).to_vec());
        Self::from_bytes(&key)
    }

    /// The key's text, for the settings.
    pub fn reveal(&self) -> SecretString {
        STANDARD.encode(self.key.expose_secret()).into()
    }

    /// Tells keys apart: the first 8 hexadecimal digits of the key's SHA-256. It is no secret.
    pub fn id(&self) -> &str {
        &self.id
    }

    fn from_bytes(bytes: &[u8]) -> Self {
        let mut key = Box::new([0; KEY_BYTES]);
        key.copy_from_slice(&bytes[..KEY_BYTES]);
        let digest = Sha256::digest(key.as_slice());
        let id = digest[..4].iter().map(|byte| format!("{byte:02x}")).collect();
        Self { key: SecretBox::new(key), id }
    }

    fn cipher(&self) -> XChaCha20Poly1305 {
        XChaCha20Poly1305::new(self.key.expose_secret().into())
    }
}

impl fmt::Debug for SealKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SealKey").field("id", &self.id).finish_non_exhaustive()
    }
}

fn from_hex(text: &str) -> Option<Zeroizing<Vec<u8>>> {
    let mut bytes = Zeroizing::new(Vec::with_capacity(text.len() / 2));
    for pair in text.as_bytes().chunks(2) {
        let pair = std::str::from_utf8(pair).ok().filter(|pair| !pair.starts_with('+'))?;
        bytes.push(u8::from_str_radix(pair, 16).ok()?);
    }
    Some(bytes)
}

/// Seals with its first key and opens with any: that is how a key is changed without losing what is stored.
///
/// ```
/// use ocr_core::seal::{SealKey, Sealer};
///
/// # fn main() -> ocr_core::Result<()> {
/// let sealer = Sealer::new(vec![SealKey::generate()])?;
/// let sealed = sealer.seal("exec/install/1", b"hunter2");
/// assert!(!sealed.contains("hunter2"));
/// assert_eq!(&*sealer.open("exec/install/1", &sealed)?, b"hunter2");
/// assert!(sealer.open("exec/install/2", &sealed).is_err());
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Sealer {
    keys: Vec<SealKey>,
}

impl Sealer {
    /// With these keys, the present one first.
    ///
    /// # Errors
    /// `Invalid` for none, or more than [`MAX_KEYS`].
    pub fn new(keys: Vec<SealKey>) -> Result<Self> {
        if keys.is_empty() || keys.len() > MAX_KEYS {
            return Err(Error::invalid("keys", format_args!("wants 1 to {MAX_KEYS}, got {}", keys.len())));
        }
        Ok(Self { keys })
    }

    /// Reads a key file: a key a line, the present one first; empty lines and those that begin with `#` do not count.
    ///
    /// # Errors
    /// `Invalid` naming the line.
    pub fn parse(text: &SecretString) -> Result<Self> {
        let lines = (1..).zip(text.expose_secret().lines());
        let keys = lines.filter(|(_, line)| !line.trim().is_empty() && !line.trim_start().starts_with('#'));
        let keys =
            keys.map(|(number, line)| SealKey::parse(&line.into()).map_err(|error| error.on(format!("line {number}"))));
        Self::new(keys.collect::<Result<_>>()?)
    }

    /// The keys' ids, the present one first.
    pub fn key_ids(&self) -> impl Iterator<Item = &str> {
        self.keys.iter().map(SealKey::id)
    }

    /// Seals a secret for one place, such as a record's key.
    pub fn seal(&self, place: &str, secret: &[u8]) -> String {
        let nonce = XChaCha20Poly1305::generate_nonce(&mut OsRng);
        let payload = Payload { msg: secret, aad: place.as_bytes() };
        // It fails for what is longer than 256 GiB, which no record is.
        let sealed = self.keys[0].cipher().encrypt(&nonce, payload).unwrap_or_default();
        let mut bytes = nonce.to_vec();
        bytes.extend(sealed);
        format!("{FORM}.{}.{}", self.keys[0].id, STANDARD_NO_PAD.encode(bytes))
    }

    /// Opens what was sealed for this place.
    ///
    /// # Errors
    /// `Conflict` with reason `SEALED` when the key is not one of these; `Internal` when it was changed, cut, or sealed
    /// for another place.
    pub fn open(&self, place: &str, sealed: &str) -> Result<Zeroizing<Vec<u8>>> {
        let broken = || Error::internal("a sealed secret was changed in the store, or belongs elsewhere").on(place);
        let (form, rest) = sealed.split_once('.').ok_or_else(broken)?;
        if form != FORM {
            return Err(Error::internal("a secret was sealed by another version of this software").on(place));
        }
        let (id, text) = rest.split_once('.').ok_or_else(broken)?;
        let Some(key) = self.keys.iter().find(|key| key.id == id) else {
            let known = self.key_ids().collect::<Vec<_>>().join(", ");
            return Err(Error::new(
                ErrorKind::Conflict,
                format!("sealed with key {}, which is none of the given ones ({known})", crate::id::shown(id)),
            )
            .with_reason(reason::SEALED)
            .on(place));
        };
        let bytes = STANDARD_NO_PAD.decode(text).map_err(|_| broken())?;
        let (nonce, body) = bytes.split_at_checked(NONCE_BYTES).ok_or_else(broken)?;
        let payload = Payload { msg: body, aad: place.as_bytes() };
        let opened = key.cipher().decrypt(XNonce::from_slice(nonce), payload).map_err(|_| broken())?;
        Ok(Zeroizing::new(opened))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sealer() -> Sealer {
        Sealer::new(vec![SealKey::generate()]).unwrap()
    }

    proptest! {
        #[test]
        fn what_was_sealed_opens_at_its_place_and_nowhere_else(
            secret in proptest::collection::vec(any::<u8>(), 0..300), place in ".{0,20}", other in ".{0,20}",
        ) {
            let sealer = sealer();
            let sealed = sealer.seal(&place, &secret);
            prop_assert_eq!(&*sealer.open(&place, &sealed).unwrap(), &secret);
            prop_assert_eq!(sealer.open(&other, &sealed).is_ok(), place == other);
        }

        #[test]
        fn a_seal_that_was_changed_anywhere_does_not_open(secret in ".{1,40}", at in any::<proptest::sample::Index>(), to in "[A-Za-z0-9+/.]") {
            let sealer = sealer();
            let mut sealed = sealer.seal("here", secret.as_bytes());
            let at = at.index(sealed.len());
            prop_assume!(sealed[at..=at] != to);
            sealed.replace_range(at..=at, &to);
            // The last letter of base64 carries bits that mean nothing; its decoder refuses those.
            prop_assert!(sealer.open("here", &sealed).is_err(), "{sealed}");
        }

        #[test]
        fn no_text_makes_opening_or_parsing_panic(text in "\\PC{0,120}") {
            let _ = sealer().open("here", &text);
            let _ = sealer().open("here", &format!("{FORM}.{text}"));
            let _ = Sealer::parse(&text.into());
        }
    }

    #[test]
    fn two_seals_of_the_same_secret_are_not_the_same() {
        let sealer = sealer();
        assert_ne!(sealer.seal("here", b"secret"), sealer.seal("here", b"secret"));
    }

    #[test]
    fn a_key_is_changed_by_putting_a_new_one_first() {
        let (old, new) = (SealKey::generate().reveal(), SealKey::generate().reveal());
        let before = Sealer::parse(&old).unwrap();
        let sealed = before.seal("here", b"secret");
        let text = format!("# since May\n{}\n\n{}\n", new.expose_secret(), old.expose_secret());
        let after = Sealer::parse(&text.into()).unwrap();
        assert_eq!(&*after.open("here", &sealed).unwrap(), b"secret");
        let resealed = after.seal("here", b"secret");
        let error = before.open("here", &resealed).unwrap_err();
        assert_eq!((error.kind(), error.reason()), (ErrorKind::Conflict, Some(reason::SEALED)));
        assert!(error.message().contains(after.key_ids().next().unwrap()), "{error}");
    }

    #[test]
    fn keys_are_read_as_hexadecimal_digits_and_as_base64() {
        let key = SealKey::generate();
        let hex: String = key.key.expose_secret().iter().map(|byte| format!("{byte:02X}")).collect();
        for text in [hex, key.reveal().expose_secret().to_owned()] {
            assert_eq!(SealKey::parse(&format!(" {text}\n").into()).unwrap().id(), key.id());
        }
    }

    #[test]
    fn what_is_no_key_is_refused_and_not_repeated() {
        let plus = format!("+1{}", "a".repeat(62));
        for bad in ["", "password", &"0".repeat(64), &"g".repeat(64), &plus, &"A".repeat(44), &"ab".repeat(33)] {
            let error = SealKey::parse(&bad.into()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{bad}");
            assert!(bad.is_empty() || !error.to_string().contains(bad), "{error}");
        }
        let second = format!("{}\ncanary-canary\n", SealKey::generate().reveal().expose_secret());
        let error = Sealer::parse(&second.into()).unwrap_err().to_string();
        assert!(error.contains("line 2") && !error.contains("canary"), "{error}");
        assert!(Sealer::parse(&"# nothing\n".into()).is_err());
    }

    #[test]
    fn neither_keys_nor_sealers_show_the_key() {
        let key = SealKey::generate();
        let secret = key.reveal();
        let shown = format!("{key:?} {:?}", Sealer::new(vec![SealKey::parse(&secret).unwrap()]).unwrap());
        assert!(!shown.contains(secret.expose_secret()), "{shown}");
    }
}
