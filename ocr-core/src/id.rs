//! Identifiers and names: parsed once, at the edge, and trusted from there on.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{Error, Result};

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident, $field:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(Uuid);

        impl $name {
            /// Wraps a UUID that the backend gave.
            pub const fn from_uuid(uuid: Uuid) -> Self {
                Self(uuid)
            }

            /// A new random (version 4) id.
            pub fn random() -> Self {
                Self(Uuid::new_v4())
            }

            /// The UUID itself.
            pub const fn as_uuid(&self) -> &Uuid {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0.hyphenated(), f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }

        impl FromStr for $name {
            type Err = Error;

            fn from_str(text: &str) -> Result<Self> {
                Uuid::try_parse(text).map(Self).map_err(|_| {
                    Error::invalid(
                        $field,
                        format_args!("wants a UUID such as 123e4567-e89b-12d3-a456-426614174000, got {}", shown(text)),
                    )
                })
            }
        }
    };
}

uuid_id!(
    /// A virtual machine. It is the backend's own id (Nova's UUID, libvirt's domain UUID), so that a
    /// [`GuestExec`](crate::GuestExec) over libvirt serves Nova's machines too. A backend whose ids are no
    /// UUIDs derives one (version 5) and keeps the pair.
    VmId, "virtual machine id"
);
uuid_id!(
    /// A network.
    NetworkId, "network id"
);
uuid_id!(
    /// An image, of which machines are made (Ranger's word: template).
    ImageId, "image id"
);
uuid_id!(
    /// Something the executor installed on a machine: a feature, an inject or a condition.
    InstallId, "install id"
);
uuid_id!(
    /// One operation inside a guest. The guest-side runner keeps the result under this id, so that
    /// a repeated request is answered and not run again.
    OperationId, "operation id"
);
uuid_id!(
    /// One session of one executor in a [`fleet`](crate::fleet). It is never used again: who lost its session and comes
    /// back is another member.
    MemberId, "member id"
);

/// The longest text of a user's that an error repeats, in characters.
const SHOWN_CHARS: usize = 64;

/// A user's text as an error may repeat it: quoted, control characters escaped, cut.
pub fn shown(text: &str) -> String {
    match text.char_indices().nth(SHOWN_CHARS) {
        Some((cut, _)) => format!("{:?}... ({} bytes)", &text[..cut], text.len()),
        None => format!("{text:?}"),
    }
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $field:literal, max: $max:literal, $allowed:expr, $wanted:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The longest allowed, in bytes.
            pub const MAX_BYTES: usize = $max;

            /// Checks and wraps a name.
            ///
            /// # Errors
            /// [`ErrorKind::Invalid`](crate::ErrorKind::Invalid) when it is empty, too long or has a
            /// character that is not allowed; the message says which.
            pub fn new(text: impl Into<String>) -> Result<Self> {
                let text = text.into();
                check_name($field, &text, $max, $allowed, $wanted)?;
                Ok(Self(text))
            }

            /// The name's text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:?})"), self.0)
            }
        }

        impl FromStr for $name {
            type Err = Error;

            fn from_str(text: &str) -> Result<Self> {
                Self::new(text)
            }
        }

        impl TryFrom<String> for $name {
            type Error = Error;

            fn try_from(text: String) -> Result<Self> {
                Self::new(text)
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }
    };
}

fn check_name(field: &str, text: &str, max: usize, allowed: fn(char) -> bool, wanted: &str) -> Result<()> {
    if text.is_empty() {
        return Err(Error::invalid(field, format_args!("must not be empty; it wants {wanted}")));
    }
    if text.len() > max {
        return Err(Error::invalid(field, format_args!("must be at most {max} bytes long, got {} bytes", text.len())));
    }
    if let Some(bad) = text.chars().find(|&c| !allowed(c)) {
        return Err(Error::invalid(field, format_args!("must not contain {bad:?}; it wants {wanted}")));
    }
    if text.starts_with([' ', '-', '.']) || text.ends_with(' ') {
        return Err(Error::invalid(
            field,
            format_args!("must not begin with a space, '-' or '.', nor end with a space, got {}", shown(text)),
        ));
    }
    Ok(())
}

/// Letters of any script: exercises are named in their people's language.
fn plain(c: char) -> bool {
    c.is_alphanumeric() || matches!(c, '-' | '_' | '.' | ':' | ' ' | '@' | '+')
}

fn token(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | ':')
}

name!(
    /// The name of a machine, network or image as users know it. Unique per owner and [`Scope`].
    Name, "name", max: 80, plain,
    "letters, digits, spaces and - _ . : @ +"
);
name!(
    /// Who created an object: one installation of this software. It is kept on every object it makes
    /// (Nova metadata, libvirt metadata XML, image properties), and nothing without it is ever touched.
    Owner, "owner", max: 64, token,
    "ASCII letters, digits and - _ . :"
);
name!(
    /// Names one create request. It is kept on the object itself, so that a repeat finds it.
    RequestId, "request id", max: 128, token,
    "ASCII letters, digits and - _ . :"
);

impl RequestId {
    /// A new random request id.
    pub fn random() -> Self {
        Self(Uuid::new_v4().hyphenated().to_string())
    }
}

/// The exercise and the deployment that an object belongs to. Both may be empty.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Scope {
    /// The exercise, at most [`Scope::MAX_BYTES`] bytes.
    pub exercise: String,
    /// The deployment, at most [`Scope::MAX_BYTES`] bytes.
    pub deployment: String,
}

impl Scope {
    /// The longest name of an exercise or deployment, in bytes. (Ranger itself allows 20 characters.)
    pub const MAX_BYTES: usize = 64;

    /// Checks and makes a scope; empty texts are allowed.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`](crate::ErrorKind::Invalid) naming the field.
    pub fn new(exercise: impl Into<String>, deployment: impl Into<String>) -> Result<Self> {
        let scope = Self { exercise: exercise.into(), deployment: deployment.into() };
        for (field, text) in [("exercise name", &scope.exercise), ("deployment name", &scope.deployment)] {
            if !text.is_empty() {
                check_name(field, text, Self::MAX_BYTES, plain, "letters, digits, spaces and - _ . : @ +")?;
            }
        }
        Ok(scope)
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.exercise, self.deployment)
    }
}

/// What every object we make carries, on the object itself.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Tags {
    /// Who made it.
    pub owner: Owner,
    /// The request that made it.
    pub request: RequestId,
    /// The exercise and deployment it belongs to.
    pub scope: Scope,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ErrorKind;

    #[test]
    fn a_bad_id_is_named_and_repeated_safely() {
        let error = "not\na uuid".parse::<VmId>().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.to_string().contains(r#""not\na uuid""#), "{error}");
    }

    #[test]
    fn a_long_text_is_cut() {
        assert!(shown(&"ä".repeat(10_000)).len() < 200);
    }

    #[test]
    fn names_have_bounds() {
        assert!(Name::new("web-0").is_ok());
        assert!(Name::new("").unwrap_err().to_string().contains("must not be empty"));
        assert!(Name::new("a".repeat(81)).unwrap_err().to_string().contains("at most 80 bytes"));
        assert!(Name::new("Küberõppus 2").is_ok());
        for bad in ["a/b", "a\0b", "../x", "-rf", ".hidden", " a", "a ", "a<b", "a\u{202e}b", "a\nb", "a\u{a0}b"] {
            assert_eq!(Name::new(bad).unwrap_err().kind(), ErrorKind::Invalid, "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn a_name_survives_serde(text in "[a-zõA-Z0-9_:@+][a-zäA-Z0-9_.:@+-]{0,39}") {
            let name = Name::new(text).unwrap();
            let json = serde_json::to_string(&name).unwrap();
            prop_assert_eq!(serde_json::from_str::<Name>(&json).unwrap(), name);
        }

        #[test]
        fn a_stored_name_is_checked_again(text in any::<String>()) {
            let json = serde_json::to_string(&text).unwrap();
            prop_assert_eq!(serde_json::from_str::<Name>(&json).is_ok(), Name::new(text).is_ok());
        }
    }
}
