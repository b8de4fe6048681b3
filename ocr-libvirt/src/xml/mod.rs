//! libvirt's XML as typed structs: written and read by a serializer, never by pasting strings.
//!
//! What is written and what is read are different structs. The written ones say everything that this software
//! decides; the read ones take the few things that it wants to know out of XML that anybody may have made.

pub mod domain;
pub mod network;
pub mod volume;

use ocr_core::{Error, Result};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// An element without content, such as `<acpi/>`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Empty {}

/// An element that is a number with a unit, such as `<memory unit='KiB'>1024</memory>`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quantity {
    /// The unit; bytes for volumes and KiB for domains where there is none.
    #[serde(rename = "@unit", skip_serializing_if = "Option::is_none")]
    pub unit: Option<String>,
    /// How many of them.
    #[serde(rename = "$text")]
    pub value: u64,
}

impl Quantity {
    /// A size in KiB, libvirt's own unit of memory.
    pub fn kib(value: u64) -> Self {
        Self { unit: Some("KiB".to_owned()), value }
    }

    /// A size in bytes.
    pub fn bytes(value: u64) -> Self {
        Self { unit: Some("bytes".to_owned()), value }
    }

    /// The size in bytes; `None` for a unit that libvirt does not write or a size beyond all bounds.
    pub fn in_bytes(&self, default: &str) -> Option<u64> {
        let factor: u64 = match self.unit.as_deref().unwrap_or(default) {
            "b" | "bytes" => 1,
            "k" | "KiB" => 1 << 10,
            "M" | "MiB" => 1 << 20,
            "G" | "GiB" => 1 << 30,
            "T" | "TiB" => 1 << 40,
            _ => return None,
        };
        self.value.checked_mul(factor)
    }
}

/// Writes a struct as an XML document.
pub(crate) fn write<T: Serialize>(value: &T) -> Result<String> {
    let mut text = String::new();
    let mut serializer = quick_xml::se::Serializer::new(&mut text);
    serializer.indent(' ', 2);
    value
        .serialize(serializer)
        .map_err(|error| Error::internal("libvirt's XML could not be written").with_source(error))?;
    Ok(text)
}

/// Reads a struct out of libvirt's XML.
pub(crate) fn read<T: DeserializeOwned>(xml: &str) -> Result<T> {
    quick_xml::de::from_str(xml).map_err(|error| Error::internal("libvirt's XML could not be read").with_source(error))
}

/// Whether XML 1.0 can carry every character of a text unchanged.
pub(crate) fn is_carried(text: &str) -> bool {
    text.chars().all(|c| !matches!(c, '\0'..='\u{1f}' | '\u{fffe}' | '\u{ffff}'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(rename = "thing")]
    struct Thing {
        #[serde(rename = "@mark")]
        mark: String,
        text: String,
    }

    proptest! {
        #[test]
        fn any_text_that_xml_carries_comes_back(
            mark in "[^\u{0}-\u{1f}\u{7f}-\u{9f}\u{fffe}\u{ffff}]{0,40}",
            text in "[^\u{0}-\u{1f}\u{7f}-\u{9f}\u{fffe}\u{ffff}]{0,40}"
        ) {
            prop_assert!(is_carried(&text));
            let thing = Thing { mark, text };
            let xml = write(&thing).unwrap();
            prop_assert_eq!(read::<Thing>(&xml).unwrap(), thing, "{}", xml);
        }
    }

    #[test]
    fn units_are_understood() {
        assert_eq!(Quantity::kib(2).in_bytes("KiB"), Some(2048));
        assert_eq!(Quantity { unit: None, value: 3 }.in_bytes("KiB"), Some(3072));
        assert_eq!(Quantity { unit: None, value: 3 }.in_bytes("bytes"), Some(3));
        assert_eq!(Quantity { unit: Some("furlong".into()), value: 3 }.in_bytes("bytes"), None);
        assert_eq!(Quantity { unit: Some("TiB".into()), value: u64::MAX }.in_bytes("bytes"), None);
    }
}
