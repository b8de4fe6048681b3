//! The fences of the workspace: who may depend on whom, and what a library never does.
//!
//! `docs/ARCHITECTURE.md` says why each of them stands. A new member, or a new place for a fenced crate, is a decision:
//! it is taken by changing a table here.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::LazyLock,
};

use cargo_metadata::{CargoOpt, DependencyKind, Metadata, MetadataCommand, Package, PackageId};

/// Each member and the siblings that it may use.
const SIBLINGS: [(&str, &[&str]); 6] = [
    ("ocr-core", &[]),
    ("ocr-openstack", &["ocr-core"]),
    ("ocr-libvirt", &["ocr-core"]),
    ("ocr-grpc", &["ocr-core"]),
    ("ocr-benches", &["ocr-core", "ocr-grpc"]),
    ("ocr-bins", &["ocr-core", "ocr-openstack", "ocr-libvirt", "ocr-grpc"]),
];

/// Members that are libraries.
const LIBRARIES: [&str; 4] = ["ocr-core", "ocr-openstack", "ocr-libvirt", "ocr-grpc"];

/// Crates that belong to some members only, not even to the tests of the others. A name stands for its family too:
/// `tonic` for `tonic-health`.
const OWNED: [(&str, &[&str]); 10] = [
    ("virt", &["ocr-libvirt"]),
    ("tonic", &["ocr-grpc", "ocr-bins", "ocr-benches"]),
    ("prost", &["ocr-grpc", "ocr-bins", "ocr-benches"]),
    ("protox", &["ocr-grpc"]),
    ("clap", &["ocr-bins", "ocr-benches"]),
    ("indicatif", &["ocr-bins"]),
    ("reqwest", &["ocr-openstack"]),
    ("lapin", &[]),
    ("deadpool-redis", &["ocr-benches"]),
    ("russh", &[]),
];

/// Owned crates that a library may use beside their owners behind a feature that is off by default.
const OPTIONAL: [(&str, &str); 4] =
    [("ocr-core", "reqwest"), ("ocr-core", "lapin"), ("ocr-core", "deadpool-redis"), ("ocr-core", "russh")];

static METADATA: LazyLock<Metadata> = LazyLock::new(|| {
    // For this platform only: crates of others may not be there, and nobody wants to fetch them for a test.
    let rustc = Command::new("rustc").arg("-vV").output().expect("rustc runs");
    let version = String::from_utf8(rustc.stdout).expect("rustc writes text");
    let host = version.lines().find_map(|line| line.strip_prefix("host: ")).expect("rustc names its host");
    MetadataCommand::new()
        .manifest_path(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"))
        .features(CargoOpt::AllFeatures)
        .other_options(["--locked", "--filter-platform", host].map(String::from))
        .exec()
        .expect("cargo describes the workspace")
});

fn siblings_of(member: &str) -> Option<&'static [&'static str]> {
    SIBLINGS.iter().find(|(name, _)| *name == member).map(|(_, siblings)| *siblings)
}

/// The owned crate that this is, or is of the family of.
fn owned(name: &str) -> Option<(&'static str, &'static [&'static str])> {
    let of_family =
        |family: &str| name.strip_prefix(family).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'));
    OWNED.into_iter().find(|(family, _)| of_family(family))
}

fn assert_none(faults: Vec<String>) {
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn members_depend_only_on_the_siblings_they_may() {
    let metadata = &*METADATA;
    let members = metadata.workspace_packages();
    let names: BTreeSet<_> = members.iter().map(|member| member.name.as_str()).collect();
    let mut faults = Vec::new();
    for member in &members {
        let Some(allowed) = siblings_of(&member.name) else {
            faults.push(format!("{} is new: say in SIBLINGS what it may use", member.name));
            continue;
        };
        for dependency in &member.dependencies {
            let name = dependency.name.as_str();
            if names.contains(name) && name != member.name.as_str() && !allowed.contains(&name) {
                faults.push(format!("{} must not depend on {name}", member.name));
            }
        }
    }
    assert_none(faults);
}

#[test]
fn fenced_crates_are_declared_only_where_they_belong() {
    let metadata = &*METADATA;
    let mut faults = Vec::new();
    for member in metadata.workspace_packages() {
        for dependency in &member.dependencies {
            let Some((family, owners)) = owned(&dependency.name) else { continue };
            let optional = dependency.optional && OPTIONAL.contains(&(member.name.as_str(), family));
            if !optional && !owners.contains(&member.name.as_str()) {
                faults.push(format!("{} must not depend on {}", member.name, dependency.name));
            }
        }
        for (feature, family) in OPTIONAL {
            let default = member.features.get("default").into_iter().flatten();
            if *member.name == feature && default.clone().any(|enabled| enabled.contains(family)) {
                faults.push(format!("{} must not have {family} in its default features", member.name));
            }
        }
    }
    assert_none(faults);
}

#[test]
fn fenced_crates_do_not_come_in_through_others() {
    let metadata = &*METADATA;
    let mut faults = Vec::new();
    for member in metadata.workspace_packages() {
        let Some(siblings) = siblings_of(&member.name) else { continue };
        for package in reached(metadata, &member.id) {
            let Some((family, owners)) = owned(&package.name) else { continue };
            let may = |name: &str| owners.contains(&name) || OPTIONAL.contains(&(name, family));
            if !may(&member.name) && !siblings.iter().any(|sibling| may(sibling)) {
                faults.push(format!("{} must not pull in {}", member.name, package.name));
            }
        }
    }
    assert_none(faults);
}

/// Everything that a member is built from, with all features on, but not what its tests need.
fn reached<'a>(metadata: &'a Metadata, from: &PackageId) -> Vec<&'a Package> {
    let resolve = metadata.resolve.as_ref().expect("metadata has the graph");
    let nodes: BTreeMap<_, _> = resolve.nodes.iter().map(|node| (&node.id, node)).collect();
    let mut seen = BTreeSet::new();
    let mut todo = vec![from];
    while let Some(id) = todo.pop() {
        for dependency in &nodes[id].deps {
            let built = dependency.dep_kinds.iter().any(|kind| kind.kind != DependencyKind::Development);
            if built && seen.insert(&dependency.pkg) {
                todo.push(&dependency.pkg);
            }
        }
    }
    seen.into_iter().map(|id| &metadata[id]).collect()
}

#[test]
fn no_dependency_wants_a_newer_rust_than_we_say() {
    let metadata = &*METADATA;
    let ours = metadata.workspace_packages();
    let floor = ours[0].rust_version.clone().expect("the workspace has a rust-version");
    let mut faults = Vec::new();
    for member in &ours {
        if member.rust_version.as_ref() != Some(&floor) {
            faults.push(format!("{} must inherit the workspace's rust-version {floor}", member.name));
        }
    }
    for package in &metadata.packages {
        if let Some(wanted) = package.rust_version.as_ref().filter(|wanted| **wanted > floor) {
            faults.push(format!("{} {} wants Rust {wanted}, we promise {floor}", package.name, package.version));
        }
    }
    assert_none(faults);
}

#[test]
fn every_member_inherits_what_the_workspace_says() {
    let metadata = &*METADATA;
    let mut faults = Vec::new();
    for member in metadata.workspace_packages() {
        let text = fs::read_to_string(&member.manifest_path).expect("a manifest can be read");
        let manifest: toml::Table = text.parse().expect("a manifest is TOML");
        let inherits = |table: &toml::Table, key: &str| {
            table.get(key).and_then(|value| value.get("workspace")).and_then(toml::Value::as_bool) == Some(true)
        };
        if !inherits(&manifest, "lints") {
            faults.push(format!("{} must have `[lints] workspace = true`", member.name));
        }
        let package = manifest["package"].as_table().expect("a package is a table");
        for key in ["version", "edition", "rust-version", "license", "authors"] {
            if !inherits(package, key) {
                faults.push(format!("{} must have `{key}.workspace = true`", member.name));
            }
        }
    }
    assert_none(faults);
}

/// What a library never does: it is told its settings, and it answers by return values and `tracing`.
const NOT_IN_LIBRARIES: [&str; 9] =
    ["std::env", "env::", "process::exit", "process::abort", "println!", "eprintln!", "print!", "eprint!", "dbg!"];

/// Where scratch folders go is the system's word (`TMPDIR`), as everywhere; a caller can still name another folder.
const ALLOWED: &str = "tempfile::env::temp_dir";

#[test]
fn libraries_read_no_environment_print_nothing_and_never_exit() {
    let metadata = &*METADATA;
    let mut faults = Vec::new();
    for member in metadata.workspace_packages().iter().filter(|member| LIBRARIES.contains(&member.name.as_str())) {
        let folder = member.manifest_path.parent().expect("a manifest is in a folder").join("src");
        for file in rust_files(folder.as_std_path()) {
            // Test modules of their own files.
            if file.components().any(|part| part.as_os_str() == "tests") || file.ends_with("tests.rs") {
                continue;
            }
            let code = without_tests(&code_of(&fs::read_to_string(&file).expect("a source file can be read")));
            let code = code.replace(ALLOWED, "");
            for banned in NOT_IN_LIBRARIES.iter().filter(|banned| has_token(&code, banned)) {
                faults.push(format!("{} must not use {banned}", file.display()));
            }
        }
    }
    assert_none(faults);
}

#[test]
fn only_the_libvirt_crate_has_unsafe_code_and_says_why() {
    let metadata = &*METADATA;
    let mut faults = Vec::new();
    for member in metadata.workspace_packages() {
        let folder = member.manifest_path.parent().expect("a manifest is in a folder");
        for file in rust_files(folder.as_std_path()) {
            let code = code_of(&fs::read_to_string(&file).expect("a source file can be read"));
            let excused = *member.name == "ocr-libvirt" && code.contains("expect(unsafe_code");
            if has_token(&code, "unsafe") && !excused {
                faults.push(format!("{} must not have unsafe code", file.display()));
            }
            if has_token(&code, "allow(unsafe_code") {
                faults.push(format!("{}: `expect(unsafe_code, reason = ...)`, not `allow`", file.display()));
            }
        }
    }
    assert_none(faults);
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut todo = vec![folder.to_owned()];
    while let Some(folder) = todo.pop() {
        for entry in fs::read_dir(&folder).expect("a source folder can be read") {
            let path = entry.expect("a source folder can be read").path();
            if path.is_dir() && !path.ends_with("target") {
                todo.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    found
}

/// Rust source without comments, without the contents of strings and characters, and without white space but
/// between words.
fn code_of(source: &str) -> String {
    let mut code = String::new();
    let mut rest = source;
    while let Some(c) = rest.chars().next() {
        let raw = rest.trim_start_matches(['b', 'c']).strip_prefix('r').map(|text| {
            let hashes = text.len() - text.trim_start_matches('#').len();
            (hashes, &text[hashes..])
        });
        let skipped = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            block_comment(rest)
        } else if let (false, Some((hashes, text))) = (ends_with_word(&code), raw)
            && text.starts_with('"')
        {
            let end = format!("\"{}", "#".repeat(hashes));
            let begin = rest.len() - text.len() + 1;
            begin + rest[begin..].find(&end).map_or(rest.len() - begin, |at| at + end.len())
        } else if c == '"' {
            quoted(rest, '"')
        } else if c == '\'' && is_character(rest) {
            quoted(rest, '\'')
        } else {
            rest = &rest[c.len_utf8()..];
            if !c.is_whitespace() {
                code.push(c);
            } else if ends_with_word(&code) && rest.starts_with(is_word) {
                code.push(' ');
            }
            continue;
        };
        rest = &rest[skipped..];
    }
    code
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn ends_with_word(code: &str) -> bool {
    code.ends_with(is_word)
}

/// Tells `'a'` from the lifetime `'a`.
fn is_character(text: &str) -> bool {
    let mut chars = text.chars().skip(1);
    match chars.next() {
        Some('\\') => true,
        Some(_) => chars.next() == Some('\''),
        None => false,
    }
}

fn quoted(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            _ if c == quote => return at + 1,
            _ => {}
        }
    }
    text.len()
}

fn block_comment(text: &str) -> usize {
    let mut depth = 0;
    let mut at = 0;
    while at < text.len() {
        if text[at..].starts_with("/*") {
            depth += 1;
            at += 2;
        } else if text[at..].starts_with("*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += text[at..].chars().next().map_or(1, char::len_utf8);
        }
    }
    text.len()
}

/// Code without the items that only tests have.
fn without_tests(code: &str) -> String {
    let mut kept = String::new();
    let mut rest = code;
    while let Some((before, after)) = rest.split_once("#[cfg(test)]") {
        kept.push_str(before);
        let mut depth = 0;
        let end = after.char_indices().find_map(|(at, c)| {
            match c {
                '{' | '(' | '[' => depth += 1,
                '}' | ')' | ']' => depth -= 1,
                _ => {}
            }
            (depth == 0 && matches!(c, '}' | ';')).then_some(at + 1)
        });
        rest = &after[end.unwrap_or(after.len())..];
    }
    kept + rest
}

/// Whether the token occurs, and not as the end of a longer word or path.
fn has_token(code: &str, token: &str) -> bool {
    code.match_indices(token).any(|(at, _)| {
        let longer_before = code[..at].ends_with(is_word);
        let longer_after = token.ends_with(is_word) && code[at + token.len()..].starts_with(is_word);
        !longer_before && !longer_after
    })
}

#[test]
fn the_scan_sees_code_and_nothing_else() {
    let banned = |source: &str| NOT_IN_LIBRARIES.iter().any(|token| has_token(&without_tests(&code_of(source)), token));
    for bad in [
        "fn f() { std :: env\n::var(\"A\"); }",
        "use std::{env, fmt};\nfn f() { env::args(); }",
        "/* a /* b */ c */ println!(\"x\")",
        "let a = '\"'; println!()",
        "let a = r#\"\" // \"#; std::process::exit(1)",
        "fn f<'a>(x: &'a str) { dbg!(x) }",
        "#[cfg(test)] use a::{b};\nfn f() { print!() }",
        "#[cfg(test)] mod tests { fn g() { if a {} } }\nfn f() { eprintln!() }",
        "let for_r = \"a\"; process::exit(1); let b = \"c\";",
    ] {
        assert!(banned(bad), "not seen: {bad} ({})", code_of(bad));
    }
    for fine in [
        "// println!(\"x\")",
        "/// std::env is not for us\nfn f() {}",
        "let a = \"std::env \\\" println!()\";",
        "let a = r##\"std::env \"# println!()\"##; let b = br\"dbg!()\";",
        "let a = 'x'; my_env::var(); env!(\"CARGO_PKG_NAME\"); my_println!();",
        "#[cfg(test)]\nmod tests { fn g() { std::env::temp_dir(); } }",
        "#[cfg(test)]\nmod tests;\nfn f() {}",
        "#[cfg(test)]\nfn f(a: [u8; 2]) { println!() }",
        "#![forbid(unsafe_code)]",
    ] {
        assert!(!banned(fine), "seen: {fine} ({})", code_of(fine));
    }
    assert!(has_token(&code_of("unsafe { f() }"), "unsafe"));
    assert!(!has_token(&code_of("#![deny(unsafe_code)]"), "unsafe"));
}
