//! [`Manifest`]: what a `package.toml` says, checked once and typed from then on.

use std::{
    fmt,
    num::NonZeroU32,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use secrecy::{ExposeSecret, SecretString};
use semver::Version;
use toml::{Table, Value};

use super::{PATH_BYTES, PATH_PARTS, inside};
use crate::{Error, Result, id::shown};

/// What a `package.toml` says.
///
/// Keys and types may be written in the three ways that Deputy allows (`feature`, `Feature`, `FEATURE`). Keys that
/// are not known are passed over, so that a newer Deputy's packages can be read.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Manifest {
    /// ASCII letters, digits, `-` and `_`, at most 128 of them. Compared without regard to case.
    pub name: String,
    /// The package's version.
    pub version: Version,
    /// In the package's own words; may be empty.
    pub description: String,
    /// An SPDX licence expression.
    pub license: String,
    /// Who wrote it.
    pub authors: Vec<String>,
    /// How a registry sorts it.
    pub categories: Vec<String>,
    /// The files to copy into a guest, in this order.
    pub assets: Vec<Asset>,
    /// What is in it.
    pub content: Content,
}

/// What a package is for: `content.type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PackageKind {
    /// `vm`: a template of a virtual machine.
    VirtualMachine,
    /// `feature`: something to install in a guest.
    Feature,
    /// `condition`: a command whose value is watched.
    Condition,
    /// `inject`: something to do in a guest during an exercise.
    Inject,
    /// `event`: a text that participants see.
    Event,
    /// `malware`: something harmful to put in a guest.
    Malware,
    /// `exercise`: a whole scenario.
    Exercise,
    /// `banner`: a text that participants see first.
    Banner,
    /// `other`.
    Other,
}

impl PackageKind {
    /// All kinds.
    pub const ALL: [Self; 9] = [
        Self::VirtualMachine,
        Self::Feature,
        Self::Condition,
        Self::Inject,
        Self::Event,
        Self::Malware,
        Self::Exercise,
        Self::Banner,
        Self::Other,
    ];

    /// As `content.type` has it, in lower case.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::VirtualMachine => "vm",
            Self::Feature => "feature",
            Self::Condition => "condition",
            Self::Inject => "inject",
            Self::Event => "event",
            Self::Malware => "malware",
            Self::Exercise => "exercise",
            Self::Banner => "banner",
            Self::Other => "other",
        }
    }

    fn section(self) -> &'static str {
        match self {
            Self::VirtualMachine => "virtual-machine",
            other => other.as_str(),
        }
    }

    fn wants_assets(self) -> bool {
        matches!(self, Self::Feature | Self::Condition | Self::Inject | Self::Malware)
    }
}

impl fmt::Display for PackageKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for PackageKind {
    type Err = Error;

    /// Without regard to case.
    fn from_str(text: &str) -> Result<Self> {
        choice("package type", text, &Self::ALL.map(|kind| (kind.as_str(), kind)))
    }
}

/// A file to copy into a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Asset {
    /// Where it is in the package: relative, going down only.
    pub source: PathBuf,
    /// Where it goes in the guest: an absolute path of a file. Where the manifest ends in a separator, the source's
    /// own name was added.
    pub destination: String,
    /// Permission bits. Without meaning on Windows.
    pub mode: Option<u32>,
    /// Whether the destination is a Windows path (`C:\...` or `\\...`).
    pub windows: bool,
}

/// What is in a package.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Content {
    /// `[virtual-machine]`
    VirtualMachine(VirtualMachine),
    /// `[feature]`
    Feature(Feature),
    /// `[condition]`
    Condition(Condition),
    /// `[inject]`
    Inject(Inject),
    /// `[event]`
    Event(ContentFile),
    /// `[malware]`
    Malware(Malware),
    /// `[exercise]`
    Exercise(ContentFile),
    /// `[banner]`
    Banner(ContentFile),
    /// `[other]`
    Other,
}

impl Content {
    /// The kind of package that has such content.
    pub fn kind(&self) -> PackageKind {
        match self {
            Self::VirtualMachine(_) => PackageKind::VirtualMachine,
            Self::Feature(_) => PackageKind::Feature,
            Self::Condition(_) => PackageKind::Condition,
            Self::Inject(_) => PackageKind::Inject,
            Self::Event(_) => PackageKind::Event,
            Self::Malware(_) => PackageKind::Malware,
            Self::Exercise(_) => PackageKind::Exercise,
            Self::Banner(_) => PackageKind::Banner,
            Self::Other => PackageKind::Other,
        }
    }

    /// The file that the content names besides the assets, with the name of its field.
    pub(super) fn file(&self) -> Option<(&'static str, &Path)> {
        match self {
            Self::VirtualMachine(vm) => Some(("virtual-machine.file_path", &vm.file_path)),
            Self::Event(file) => Some(("event.file_path", &file.file_path)),
            Self::Exercise(file) => Some(("exercise.file_path", &file.file_path)),
            Self::Banner(file) => Some(("banner.file_path", &file.file_path)),
            _ => None,
        }
    }
}

/// A template of a virtual machine, as an OVA file.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct VirtualMachine {
    /// The OVA file in the package.
    pub file_path: PathBuf,
    /// Such as `Debian`; free text.
    pub operating_system: Option<String>,
    /// Such as `amd64`; free text.
    pub architecture: Option<String>,
    /// Who can log in.
    pub accounts: Vec<Account>,
}

/// Somebody who can log in to a template's machines. Its secrets never show.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Account {
    /// The user's name.
    pub name: String,
    /// The user's password.
    pub password: SecretString,
    /// The user's private key for SSH.
    pub private_key: Option<SecretString>,
}

impl PartialEq for Account {
    fn eq(&self, other: &Self) -> bool {
        let key = |account: &Self| account.private_key.as_ref().map(|key| key.expose_secret().to_owned());
        self.name == other.name
            && self.password.expose_secret() == other.password.expose_secret()
            && key(self) == key(other)
    }
}

/// Something to install in a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Feature {
    /// What sort of thing.
    pub kind: FeatureKind,
    /// A shell line to run once the assets are there.
    pub action: Option<String>,
    /// Whether the guest is restarted afterwards.
    pub restarts: bool,
    /// A shell line that undoes the action.
    pub delete: Option<String>,
}

/// What sort of feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeatureKind {
    /// A program that runs.
    Service,
    /// A setting.
    Configuration,
    /// A file.
    Artifact,
}

/// A command whose value is watched.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Condition {
    /// The shell line that prints the value.
    pub action: String,
    /// How often it runs, in seconds.
    pub interval_s: NonZeroU32,
}

impl Condition {
    /// How often it runs.
    pub fn interval(&self) -> Duration {
        Duration::from_secs(self.interval_s.get().into())
    }
}

/// Something to do in a guest during an exercise.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Inject {
    /// A shell line to run once the assets are there.
    pub action: Option<String>,
    /// Whether the guest is restarted afterwards.
    pub restarts: bool,
}

/// Something harmful to put in a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Malware {
    /// A shell line to run once the assets are there.
    pub action: String,
}

/// Content that is one file: an event, an exercise, a banner.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ContentFile {
    /// The file in the package.
    pub file_path: PathBuf,
}

const NAME_MAX_BYTES: usize = 128;
const ASSETS_MAX: usize = 10_000;

impl Manifest {
    /// Reads and checks the text of a `package.toml`.
    ///
    /// # Errors
    /// `Invalid`, naming the field and what is wanted: `package.toml: assets[2]: ...`.
    pub fn parse(text: &str) -> Result<Self> {
        let table: Table = text.parse().map_err(|error: toml::de::Error| {
            let line = error.span().map_or(1, |span| 1 + text[..span.start.min(text.len())].matches('\n').count());
            Error::invalid("package.toml", format_args!("line {line}: {}", error.message()))
        })?;
        let top = Section { table: &table, path: "" };
        let package = top.needed_section("package")?;
        let kind =
            top.needed_section("content")?.choice("type", &PackageKind::ALL.map(|kind| (kind.as_str(), kind)))?;
        for other in PackageKind::ALL {
            if other != kind && top.get(other.section())?.is_some() {
                return Err(
                    top.invalid(other.section(), format_args!("must not be there, because content.type is {kind}"))
                );
            }
        }
        let section = match top.section(kind.section())? {
            Some(section) => section,
            None if kind == PackageKind::Other => Section { table: &Table::new(), path: "other" },
            None => return Err(top.invalid(kind.section(), format_args!("is missing, and content.type is {kind}"))),
        };
        Ok(Self {
            name: name(&package)?,
            version: version(&package)?,
            description: package.text("description")?.unwrap_or_default().to_owned(),
            license: license(&package)?,
            authors: package.texts("authors")?,
            categories: package.texts("categories")?,
            assets: assets(&package, &section, kind)?,
            content: content(&section, kind)?,
        })
    }

    /// What kind of package it is.
    pub fn kind(&self) -> PackageKind {
        self.content.kind()
    }

    /// The name in a text that may be no good manifest otherwise.
    pub(super) fn name_in(text: &str) -> Option<String> {
        let table: Table = text.parse().ok()?;
        let package = Section { table: &table, path: "" }.section("package").ok()??;
        Some(package.text("name").ok()??.to_owned())
    }
}

fn name(package: &Section<'_>) -> Result<String> {
    let name = package.needed_text("name")?;
    check_name(name).map_err(|wanted| package.invalid("name", wanted))?;
    Ok(name.to_owned())
}

/// The rule for names of packages, for manifests and for who asks by name.
pub(super) fn check_name(name: &str) -> Result<(), String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if name.is_empty() || name.len() > NAME_MAX_BYTES || !name.chars().all(allowed) {
        return Err(format!("wants 1 to {NAME_MAX_BYTES} ASCII letters, digits, - and _, got {}", shown(name)));
    }
    Ok(())
}

fn version(package: &Section<'_>) -> Result<Version> {
    let text = package.needed_text("version")?;
    Version::parse(text).map_err(|error| {
        package.invalid("version", format_args!("wants a semantic version such as 1.2.3, got {}: {error}", shown(text)))
    })
}

/// Only the form is checked; which licences there are is SPDX's own long list.
fn license(package: &Section<'_>) -> Result<String> {
    let text = package.needed_text("license")?;
    let bare = text.replace(['(', ')'], " ");
    let good = |(index, word): (usize, &str)| match index % 2 {
        0 => word.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '+' | ':')),
        _ => matches!(word, "AND" | "OR" | "WITH"),
    };
    let words = bare.split_whitespace();
    if words.clone().count() % 2 == 0 || !words.enumerate().all(good) {
        return Err(package.invalid("license", format_args!("wants an SPDX licence such as MIT, got {}", shown(text))));
    }
    Ok(text.to_owned())
}

/// Older packages keep their assets in the section of their content.
fn assets(package: &Section<'_>, content: &Section<'_>, kind: PackageKind) -> Result<Vec<Asset>> {
    let Some(list) = package.get("assets")?.or(content.get("assets")?) else {
        if kind.wants_assets() {
            return Err(field_error("assets", format_args!("wants a list, maybe empty, in [package] of a {kind}")));
        }
        return Ok(Vec::new());
    };
    let wanted = "wants a list of [source, destination] or [source, destination, mode]";
    let list = list.as_array().ok_or_else(|| field_error("assets", wanted))?;
    if list.len() > ASSETS_MAX {
        return Err(field_error("assets", format_args!("wants at most {ASSETS_MAX}, got {}", list.len())));
    }
    list.iter()
        .enumerate()
        .map(|(index, entry)| {
            let field = format!("assets[{index}]");
            let wanted = "wants [source, destination] or [source, destination, mode], each a text in quotes";
            let texts: Option<Vec<&str>> = entry.as_array().and_then(|entry| entry.iter().map(Value::as_str).collect());
            let (source, destination, mode) = match texts.as_deref() {
                Some(&[source, destination]) => (source, destination, None),
                Some(&[source, destination, mode]) => (source, destination, Some(mode)),
                _ => return Err(field_error(&field, wanted)),
            };
            asset(source, destination, mode).map_err(|fault| field_error(&field, fault))
        })
        .collect()
}

fn asset(source: &str, destination: &str, mode: Option<&str>) -> Result<Asset, String> {
    let path = package_file(source)?;
    // The rule of packages lets only text through.
    let own_name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let (destination, windows) = guest_path(destination, own_name)?;
    let mode = mode.map(octal).transpose()?;
    Ok(Asset { source: path, destination, mode, windows })
}

fn package_file(text: &str) -> Result<PathBuf, String> {
    let fault = match inside(text, PATH_PARTS, PATH_BYTES) {
        Ok(_) if text.ends_with('/') => "is a folder",
        Ok(path) => return Ok(path),
        Err(fault) => fault,
    };
    Err(format!("wants a file inside the package, but {} {fault}", shown(text)))
}

fn octal(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if matches!(text.len(), 3 | 4) && text.bytes().all(|byte| byte.is_ascii_digit()) => Ok(mode),
        _ => Err(format!("wants a mode of 3 or 4 octal digits such as \"755\", got {}", shown(text))),
    }
}

/// An absolute path in a guest, and whether the guest must be Windows.
fn guest_path(text: &str, own_name: &str) -> Result<(String, bool), String> {
    let bytes = text.as_bytes();
    let drive = matches!(bytes, [letter, b':', b'\\' | b'/', ..] if letter.is_ascii_alphabetic());
    let windows = drive || text.starts_with("\\\\");
    let fault = if !windows && !text.starts_with('/') {
        Some("is not absolute")
    } else if text.len() > PATH_BYTES {
        Some("is too long")
    } else if text.chars().any(char::is_control) {
        Some("has a control character")
    } else if !windows && text.contains('\\') {
        Some("mixes \\ into a Linux path")
    } else if text.split(|c| c == '/' || (windows && c == '\\')).any(|part| matches!(part, "." | "..")) {
        Some("has . or .. in it")
    } else {
        None
    };
    if let Some(fault) = fault {
        return Err(format!("wants an absolute path in the guest, but {} {fault}", shown(text)));
    }
    let is_folder = text.ends_with('/') || (windows && text.ends_with('\\'));
    Ok((if is_folder { format!("{text}{own_name}") } else { text.to_owned() }, windows))
}

fn content(section: &Section<'_>, kind: PackageKind) -> Result<Content> {
    let file = || Ok::<_, Error>(ContentFile { file_path: section.needed_file("file_path")? });
    Ok(match kind {
        PackageKind::VirtualMachine => Content::VirtualMachine(virtual_machine(section)?),
        PackageKind::Feature => Content::Feature(Feature {
            kind: section.choice(
                "type",
                &[
                    ("service", FeatureKind::Service),
                    ("configuration", FeatureKind::Configuration),
                    ("artifact", FeatureKind::Artifact),
                ],
            )?,
            action: section.line("action")?,
            restarts: section.flag("restarts")?,
            delete: section.line("delete")?,
        }),
        PackageKind::Condition => Content::Condition(Condition {
            action: section.needed_line("action")?,
            interval_s: section.seconds("interval")?,
        }),
        PackageKind::Inject => {
            Content::Inject(Inject { action: section.line("action")?, restarts: section.flag("restarts")? })
        }
        PackageKind::Event => Content::Event(file()?),
        PackageKind::Malware => Content::Malware(Malware { action: section.needed_line("action")? }),
        PackageKind::Exercise => Content::Exercise(file()?),
        PackageKind::Banner => Content::Banner(file()?),
        PackageKind::Other => Content::Other,
    })
}

fn virtual_machine(section: &Section<'_>) -> Result<VirtualMachine> {
    section.choice("type", &[("ova", ())])?;
    let wanted = "wants a list of { name, password, private_key? }";
    let accounts = match section.get("accounts")? {
        None => &[],
        Some(list) => list.as_array().ok_or_else(|| section.invalid("accounts", wanted))?.as_slice(),
    };
    let accounts = accounts.iter().enumerate().map(|(index, account)| {
        let path = format!("virtual-machine.accounts[{index}]");
        let account = account.as_table().ok_or_else(|| field_error(&path, wanted))?;
        let account = Section { table: account, path: &path };
        Ok(Account {
            name: account.needed_text("name")?.to_owned(),
            password: account.needed_secret("password")?,
            private_key: account.secret("private_key")?,
        })
    });
    Ok(VirtualMachine {
        file_path: section.needed_file("file_path")?,
        operating_system: section.text("operating_system")?.map(str::to_owned),
        architecture: section.text("architecture")?.map(str::to_owned),
        accounts: accounts.collect::<Result<_>>()?,
    })
}

/// A table, and the way to it for messages.
struct Section<'a> {
    table: &'a Table,
    path: &'a str,
}

impl<'a> Section<'a> {
    /// The value of a key in any of its three spellings.
    fn get(&self, key: &str) -> Result<Option<&'a Value>> {
        let capital = key[..1].to_ascii_uppercase() + &key[1..];
        let spellings = [key.to_owned(), capital, key.to_ascii_uppercase()];
        let mut found = spellings.iter().filter_map(|spelling| self.table.get(spelling));
        match (found.next(), found.next()) {
            (_, Some(_)) => Err(self.invalid(key, "is there in two spellings")),
            (value, None) => Ok(value),
        }
    }

    fn invalid(&self, key: &str, wanted: impl fmt::Display) -> Error {
        match self.path {
            "" => field_error(key, wanted),
            path => field_error(&format!("{path}.{key}"), wanted),
        }
    }

    fn section(&self, key: &'a str) -> Result<Option<Section<'a>>> {
        match self.get(key)? {
            None => Ok(None),
            Some(Value::Table(table)) => Ok(Some(Section { table, path: key })),
            Some(_) => Err(self.invalid(key, format_args!("wants to be a section [{key}]"))),
        }
    }

    fn needed_section(&self, key: &'a str) -> Result<Section<'a>> {
        self.section(key)?.ok_or_else(|| self.invalid(key, format_args!("the section [{key}] is missing")))
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>> {
        match self.get(key)? {
            None => Ok(None),
            Some(Value::String(text)) if text.contains('\0') => {
                Err(self.invalid(key, "must not contain a NUL character"))
            }
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.invalid(key, format_args!("wants a text in quotes, got {}", a_type(other)))),
        }
    }

    fn needed_text(&self, key: &str) -> Result<&'a str> {
        match self.text(key)? {
            Some(text) if !text.trim().is_empty() => Ok(text),
            Some(_) => Err(self.invalid(key, "must not be empty")),
            None => Err(self.invalid(key, "is missing")),
        }
    }

    fn texts(&self, key: &str) -> Result<Vec<String>> {
        let Some(value) = self.get(key)? else { return Ok(Vec::new()) };
        let texts =
            value.as_array().and_then(|list| list.iter().map(|text| text.as_str().map(str::to_owned)).collect());
        texts.ok_or_else(|| self.invalid(key, "wants a list of texts"))
    }

    /// A shell line; an empty one is none.
    fn line(&self, key: &str) -> Result<Option<String>> {
        Ok(self.text(key)?.filter(|line| !line.trim().is_empty()).map(str::to_owned))
    }

    fn needed_line(&self, key: &str) -> Result<String> {
        Ok(self.needed_text(key)?.to_owned())
    }

    fn flag(&self, key: &str) -> Result<bool> {
        match self.get(key)? {
            None => Ok(false),
            Some(Value::Boolean(flag)) => Ok(*flag),
            Some(other) => Err(self.invalid(key, format_args!("wants true or false, got {}", a_type(other)))),
        }
    }

    fn seconds(&self, key: &str) -> Result<NonZeroU32> {
        let value = self.get(key)?.ok_or_else(|| self.invalid(key, "is missing"))?;
        let seconds = value.as_integer().and_then(|seconds| u32::try_from(seconds).ok()).and_then(NonZeroU32::new);
        seconds.ok_or_else(|| {
            let got = value.as_integer().map_or_else(|| a_type(value).to_owned(), |number| number.to_string());
            self.invalid(key, format_args!("wants a whole number of seconds from 1 to {}, got {got}", u32::MAX))
        })
    }

    fn choice<T: Copy>(&self, key: &str, choices: &[(&str, T)]) -> Result<T> {
        let field = match self.path {
            "" => format!("package.toml: {key}"),
            path => format!("package.toml: {path}.{key}"),
        };
        choice(&field, self.needed_text(key)?, choices)
    }

    fn needed_file(&self, key: &str) -> Result<PathBuf> {
        package_file(self.needed_text(key)?).map_err(|fault| self.invalid(key, fault))
    }

    fn secret(&self, key: &str) -> Result<Option<SecretString>> {
        Ok(self.text(key)?.filter(|secret| !secret.is_empty()).map(SecretString::from))
    }

    fn needed_secret(&self, key: &str) -> Result<SecretString> {
        self.text(key)?.map(SecretString::from).ok_or_else(|| self.invalid(key, "is missing"))
    }
}

fn field_error(field: &str, wanted: impl fmt::Display) -> Error {
    Error::invalid(&format!("package.toml: {field}"), wanted)
}

fn choice<T: Copy>(field: &str, text: &str, choices: &[(&str, T)]) -> Result<T> {
    let found = choices.iter().find(|(name, _)| name.eq_ignore_ascii_case(text));
    found.map(|&(_, value)| value).ok_or_else(|| {
        let names: Vec<&str> = choices.iter().map(|&(name, _)| name).collect();
        Error::invalid(field, format_args!("wants {}, got {}", names.join(", "), shown(text)))
    })
}

fn a_type(value: &Value) -> &'static str {
    match value {
        Value::String(_) => "a text",
        Value::Integer(_) | Value::Float(_) => "a number",
        Value::Boolean(_) => "true or false",
        Value::Datetime(_) => "a date",
        Value::Array(_) => "a list",
        Value::Table(_) => "a section",
    }
}

#[cfg(test)]
mod tests;
