use proptest::prelude::*;

use super::*;
use crate::ErrorKind;

const CONDITION: &str = r#"
[package]
name = "check"
description = "watches a port"
version = "1.2.3"
license = "Apache-2.0"
readme = "README.md"
assets = [["src/check.sh", "/opt/", "755"]]
[content]
type = "condition"
[condition]
action = "/opt/check.sh"
interval = 30
"#;

fn changed(from: &str, to: &str) -> String {
    assert!(CONDITION.contains(from), "{from:?}");
    CONDITION.replace(from, to)
}

#[test]
fn every_kind_of_package_is_read() {
    let head = |kind: &str| {
        format!(
            "[package]\nname = \"p\"\nversion = \"1.0.0\"\nlicense = \"MIT\"\nassets = []\n[content]\ntype = \"{kind}\"\n"
        )
    };
    for (kind, section, wanted) in [
        ("vm", "[virtual-machine]\ntype = \"OVA\"\nfile_path = \"a.ova\"", PackageKind::VirtualMachine),
        ("feature", "[feature]\ntype = \"Artifact\"", PackageKind::Feature),
        ("condition", "[condition]\naction = \"true\"\ninterval = 1", PackageKind::Condition),
        ("inject", "[inject]", PackageKind::Inject),
        ("event", "[event]\nfile_path = \"a.md\"", PackageKind::Event),
        ("malware", "[malware]\naction = \"true\"", PackageKind::Malware),
        ("exercise", "[exercise]\nfile_path = \"a.yml\"", PackageKind::Exercise),
        ("banner", "[banner]\nfile_path = \"a.md\"", PackageKind::Banner),
        ("other", "[other]", PackageKind::Other),
        ("other", "", PackageKind::Other),
    ] {
        let capital = kind[..1].to_uppercase() + &kind[1..];
        for spelling in [kind.to_owned(), capital, kind.to_uppercase()] {
            let manifest = Manifest::parse(&(head(&spelling) + section)).unwrap();
            assert_eq!((manifest.kind(), manifest.content.kind()), (wanted, wanted), "{spelling}");
        }
    }
}

#[test]
fn a_feature_has_all_its_fields() {
    let text = changed("condition", "feature")
        .replace("interval = 30", "Type = \"SERVICE\"\nrestarts = true\ndelete = \"rm -f /opt/check.sh\"");
    let manifest = Manifest::parse(&text).unwrap();
    assert_eq!(manifest.version, Version::new(1, 2, 3));
    assert_eq!(
        manifest.content,
        Content::Feature(Feature {
            kind: FeatureKind::Service,
            action: Some("/opt/check.sh".to_owned()),
            restarts: true,
            delete: Some("rm -f /opt/check.sh".to_owned()),
        })
    );
}

#[test]
fn an_empty_action_is_none_where_it_may_be_missing() {
    let text = changed("condition", "inject").replace("\"/opt/check.sh\"", "\" \"");
    let manifest = Manifest::parse(&text).unwrap();
    assert_eq!(manifest.content, Content::Inject(Inject { action: None, restarts: false }));
}

#[test]
fn assets_of_older_packages_are_found_in_their_section() {
    let list = "assets = [[\"src/check.sh\", \"/opt/\", \"755\"]]\n";
    let older = changed(list, "") + list;
    assert_eq!(Manifest::parse(&older).unwrap().assets, Manifest::parse(CONDITION).unwrap().assets);
}

#[test]
fn secrets_of_accounts_never_show() {
    let text = "[package]\nname = \"p\"\nversion = \"1.0.0\"\nlicense = \"MIT\"\n[content]\ntype = \"vm\"\n\
        [virtual-machine]\ntype = \"OVA\"\nfile_path = \"a.ova\"\n\
        accounts = [{ name = \"root\", password = \"canary-1\", private_key = \"canary-2\" }]";
    let manifest = Manifest::parse(text).unwrap();
    let Content::VirtualMachine(vm) = &manifest.content else { panic!("{manifest:?}") };
    assert_eq!(vm.accounts[0].password.expose_secret(), "canary-1");
    assert_eq!(vm.accounts[0].private_key.as_ref().unwrap().expose_secret(), "canary-2");
    assert!(!format!("{manifest:?}").contains("canary"));
    for broken in [text.replace("\"canary-2\"", "[\"canary-2\"]"), text.replace("canary-1\"", "canary-1")] {
        let error = Manifest::parse(&broken).unwrap_err();
        assert!(!format!("{error:?}").contains("canary"), "{error:?}");
    }
}

#[test]
fn what_is_wrong_is_named() {
    let asset = "[\"src/check.sh\", \"/opt/\", \"755\"]";
    let two = |second: &str| changed(asset, &format!("{asset}, {second}"));
    for (text, wanted) in [
        ("[package".to_owned(), "package.toml: line 1: "),
        (changed("interval = 30", "interval = = 30"), "package.toml: line 13: "),
        (String::new(), "package.toml: package: the section [package] is missing"),
        ("package = 1".to_owned(), "package.toml: package: wants to be a section [package]"),
        (changed("[content]\ntype = \"condition\"", ""), "package.toml: content: the section [content] is missing"),
        (
            changed("\"check\"", "\"a b\""),
            "package.toml: package.name: wants 1 to 128 ASCII letters, digits, - and _, got \"a b\"",
        ),
        (changed("\"check\"", "\"../x\""), "package.toml: package.name: wants 1 to 128"),
        (changed("\"check\"", "\"\""), "package.toml: package.name: must not be empty"),
        (changed("\"check\"", "7"), "package.toml: package.name: wants a text in quotes, got a number"),
        (changed("name = \"check\"\n", ""), "package.toml: package.name: is missing"),
        (changed("name = ", "Name = \"x\"\nname = "), "package.toml: package.name: is there in two spellings"),
        (changed("1.2.3", "1.2"), "package.toml: package.version: wants a semantic version such as 1.2.3, got \"1.2\""),
        (changed("Apache-2.0", "Very bad licence"), "package.toml: package.license: wants an SPDX licence such as MIT"),
        (changed("Apache-2.0", "()"), "package.toml: package.license: wants an SPDX licence"),
        (
            changed("\"condition\"", "\"wish\""),
            "package.toml: content.type: wants vm, feature, condition, inject, event, malware, exercise, banner, other, got \"wish\"",
        ),
        (
            changed("\"condition\"", "\"inject\""),
            "package.toml: condition: must not be there, because content.type is inject",
        ),
        (
            changed("[condition]", "[inject]\n[condition]"),
            "package.toml: inject: must not be there, because content.type is condition",
        ),
        (changed("[condition]", "[nothing]"), "package.toml: condition: is missing, and content.type is condition"),
        (changed("interval = 30", ""), "package.toml: condition.interval: is missing"),
        (
            changed("= 30", "= 0"),
            "package.toml: condition.interval: wants a whole number of seconds from 1 to 4294967295, got 0",
        ),
        (
            changed("= 30", "= -1"),
            "package.toml: condition.interval: wants a whole number of seconds from 1 to 4294967295, got -1",
        ),
        (changed("= 30", "= 4294967296"), "package.toml: condition.interval: wants a whole number"),
        (
            changed("= 30", "= 1.5"),
            "package.toml: condition.interval: wants a whole number of seconds from 1 to 4294967295, got a number",
        ),
        (
            changed("= 30", "= \"30\""),
            "package.toml: condition.interval: wants a whole number of seconds from 1 to 4294967295, got a text",
        ),
        (changed("\"/opt/check.sh\"", "\"\""), "package.toml: condition.action: must not be empty"),
        (
            changed("\"/opt/check.sh\"", "\"a\\u0000b\""),
            "package.toml: condition.action: must not contain a NUL character",
        ),
        (
            changed("assets = ", "ASSET = "),
            "package.toml: assets: wants a list, maybe empty, in [package] of a condition",
        ),
        (changed(&format!("[{asset}]"), "7"), "package.toml: assets: wants a list of [source, destination] or"),
        (two("[\"src/a\"]"), "package.toml: assets[1]: wants [source, destination] or [source, destination, mode]"),
        (two("[\"src/a\", \"/a\", \"644\", \"x\"]"), "package.toml: assets[1]: wants [source"),
        (
            two("[\"src/a\", \"/a\", 644]"),
            "package.toml: assets[1]: wants [source, destination] or [source, destination, mode], each a text in quotes",
        ),
        (
            two("[\"src/a\", \"/a\", \"+644\"]"),
            "package.toml: assets[1]: wants a mode of 3 or 4 octal digits such as \"755\", got \"+644\"",
        ),
        (two("[\"src/a\", \"/a\", \"64\"]"), "package.toml: assets[1]: wants a mode"),
        (two("[\"src/a\", \"/a\", \"00644\"]"), "package.toml: assets[1]: wants a mode"),
        (two("[\"src/a\", \"/a\", \"888\"]"), "package.toml: assets[1]: wants a mode"),
        (
            two("[\"../a\", \"/a\"]"),
            "package.toml: assets[1]: wants a file inside the package, but \"../a\" climbs out with ..",
        ),
        (
            two("[\"/etc/passwd\", \"/a\"]"),
            "package.toml: assets[1]: wants a file inside the package, but \"/etc/passwd\" is an absolute path",
        ),
        (
            two("[\"src/\", \"/a\"]"),
            "package.toml: assets[1]: wants a file inside the package, but \"src/\" is a folder",
        ),
        (two("[\"\", \"/a\"]"), "package.toml: assets[1]: wants a file inside the package, but \"\" names no file"),
        (two("['src\\a', \"/a\"]"), "package.toml: assets[1]: wants a file inside the package"),
        (
            two("[\"src/a\", \"etc/a\"]"),
            "package.toml: assets[1]: wants an absolute path in the guest, but \"etc/a\" is not absolute",
        ),
        (two("[\"src/a\", \"\"]"), "package.toml: assets[1]: wants an absolute path in the guest"),
        (two("[\"src/a\", \"C:a\"]"), "package.toml: assets[1]: wants an absolute path in the guest"),
        (
            two("[\"src/a\", \"/a/../b\"]"),
            "package.toml: assets[1]: wants an absolute path in the guest, but \"/a/../b\" has . or .. in it",
        ),
        (two("[\"src/a\", 'C:\\a\\..\\b']"), "package.toml: assets[1]: wants an absolute path in the guest"),
        (
            two("[\"src/a\", '/a\\b']"),
            "package.toml: assets[1]: wants an absolute path in the guest, but \"/a\\\\b\" mixes \\ into a Linux path",
        ),
        (two("[\"src/a\", \"/a\\n\"]"), "package.toml: assets[1]: wants an absolute path in the guest"),
        (changed("condition", "feature"), "package.toml: feature.type: is missing"),
        (
            changed("condition", "feature") + "type = \"thing\"",
            "package.toml: feature.type: wants service, configuration, artifact, got \"thing\"",
        ),
        (
            changed("condition", "feature") + "type = \"service\"\nrestarts = 1",
            "package.toml: feature.restarts: wants true or false, got a number",
        ),
        (changed("condition", "event"), "package.toml: event.file_path: is missing"),
        (
            changed("condition", "event") + "file_path = \"../../x\"",
            "package.toml: event.file_path: wants a file inside the package",
        ),
        (
            changed("condition", "virtual-machine").replace("\"virtual-machine\"", "\"vm\"") + "type = \"iso\"",
            "package.toml: virtual-machine.type: wants ova, got \"iso\"",
        ),
        (
            changed("condition", "virtual-machine").replace("\"virtual-machine\"", "\"vm\"")
                + "type = \"ova\"\nfile_path = \"a\"\naccounts = [{ name = \"a\" }]",
            "package.toml: virtual-machine.accounts[0].password: is missing",
        ),
    ] {
        let error = Manifest::parse(&text).expect_err(wanted);
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.message().starts_with(wanted), "{}\n     wanted: {wanted}", error.message());
    }
}

#[test]
fn destinations_of_both_worlds_are_told_apart() {
    for (text, wanted, windows) in [
        ("/opt/x", "/opt/x", false),
        ("/opt/", "/opt/run.sh", false),
        ("/", "/run.sh", false),
        (r"C:\x\y.sh", r"C:\x\y.sh", true),
        (r"C:\x\", r"C:\x\run.sh", true),
        ("c:/x/", "c:/x/run.sh", true),
        (r"\\host\share\", r"\\host\share\run.sh", true),
    ] {
        let asset = asset("./src//run.sh", text, None).unwrap();
        assert_eq!((asset.destination.as_str(), asset.windows), (wanted, windows));
        assert_eq!(asset.source, Path::new("src/run.sh"));
    }
}

#[test]
fn kinds_are_read_back_as_written() {
    for kind in PackageKind::ALL {
        assert_eq!(kind.as_str().parse::<PackageKind>().unwrap(), kind);
        assert_eq!(kind.to_string().to_uppercase().parse::<PackageKind>().unwrap(), kind);
    }
    assert_eq!("".parse::<PackageKind>().unwrap_err().kind(), ErrorKind::Invalid);
}

/// Writes a manifest in the way of Deputy.
fn render(manifest: &Manifest) -> String {
    let text = |text: &str| Value::String(text.to_owned());
    let texts = |list: &[String]| Value::Array(list.iter().map(|entry| text(entry)).collect());
    let mut package = Table::new();
    package.insert("name".into(), text(&manifest.name));
    package.insert("version".into(), text(&manifest.version.to_string()));
    package.insert("description".into(), text(&manifest.description));
    package.insert("license".into(), text(&manifest.license));
    package.insert("authors".into(), texts(&manifest.authors));
    package.insert("categories".into(), texts(&manifest.categories));
    let assets = manifest.assets.iter().map(|asset| {
        let mode = asset.mode.map(|mode| text(&format!("{mode:03o}")));
        let pair = [text(asset.source.to_str().unwrap()), text(&asset.destination)];
        Value::Array(pair.into_iter().chain(mode).collect())
    });
    package.insert("assets".into(), Value::Array(assets.collect()));

    let mut section = Table::new();
    let mut set = |key: &str, value: Value| section.insert(key.to_owned(), value);
    let file = |file: &ContentFile| text(file.file_path.to_str().unwrap());
    match &manifest.content {
        Content::VirtualMachine(vm) => {
            set("type", text("OVA"));
            set("file_path", text(vm.file_path.to_str().unwrap()));
            vm.operating_system.iter().for_each(|system| drop(set("operating_system", text(system))));
            vm.architecture.iter().for_each(|architecture| drop(set("architecture", text(architecture))));
            let accounts = vm.accounts.iter().map(|account| {
                let mut table = Table::new();
                table.insert("name".into(), text(&account.name));
                table.insert("password".into(), text(account.password.expose_secret()));
                if let Some(key) = &account.private_key {
                    table.insert("private_key".into(), text(key.expose_secret()));
                }
                Value::Table(table)
            });
            set("accounts", Value::Array(accounts.collect()));
        }
        Content::Feature(feature) => {
            set("type", text(&format!("{:?}", feature.kind)));
            feature.action.iter().for_each(|action| drop(set("action", text(action))));
            feature.delete.iter().for_each(|delete| drop(set("delete", text(delete))));
            set("restarts", Value::Boolean(feature.restarts));
        }
        Content::Condition(condition) => {
            set("action", text(&condition.action));
            set("interval", Value::Integer(condition.interval_s.get().into()));
        }
        Content::Inject(inject) => {
            inject.action.iter().for_each(|action| drop(set("action", text(action))));
            set("restarts", Value::Boolean(inject.restarts));
        }
        Content::Malware(malware) => drop(set("action", text(&malware.action))),
        Content::Event(event) => drop(set("file_path", file(event))),
        Content::Exercise(exercise) => drop(set("file_path", file(exercise))),
        Content::Banner(banner) => drop(set("file_path", file(banner))),
        Content::Other => {}
    }
    let mut table = Table::new();
    table.insert("package".into(), Value::Table(package));
    let content = [("type".to_owned(), text(manifest.kind().as_str()))];
    table.insert("content".into(), Value::Table(content.into_iter().collect()));
    table.insert(manifest.kind().section().into(), Value::Table(section));
    table.to_string()
}

fn files() -> impl Strategy<Value = PathBuf> {
    proptest::collection::vec("[a-zA-Z0-9_äß$'\"-][a-zA-Z0-9_.]{0,5}( [a-z]{1,3})?", 1..5)
        .prop_map(|parts| parts.iter().collect())
}

fn lines() -> impl Strategy<Value = String> {
    "[^\0]{0,20}[a-z][^\0]{0,20}"
}

fn manifests() -> impl Strategy<Value = Manifest> {
    let option = proptest::option::of::<BoxedStrategy<String>>;
    let accounts = ("[a-z]{1,8}", "[^\0]{0,12}", option("[^\0]{1,40}".boxed())).prop_map(|(name, password, key)| {
        Account { name, password: password.into(), private_key: key.map(SecretString::from) }
    });
    let kinds = proptest::sample::select(vec![FeatureKind::Service, FeatureKind::Configuration, FeatureKind::Artifact]);
    let content_files = || files().prop_map(|file_path| ContentFile { file_path });
    let content = prop_oneof![
        (files(), option(lines().boxed()), option(lines().boxed()), proptest::collection::vec(accounts, 0..3))
            .prop_map(|(file_path, operating_system, architecture, accounts)| {
                Content::VirtualMachine(VirtualMachine { file_path, operating_system, architecture, accounts })
            }),
        (kinds, option(lines().boxed()), any::<bool>(), option(lines().boxed()))
            .prop_map(|(kind, action, restarts, delete)| Content::Feature(Feature { kind, action, restarts, delete })),
        (lines(), 1..=u32::MAX).prop_map(|(action, seconds)| {
            Content::Condition(Condition { action, interval_s: NonZeroU32::new(seconds).unwrap() })
        }),
        (option(lines().boxed()), any::<bool>())
            .prop_map(|(action, restarts)| Content::Inject(Inject { action, restarts })),
        lines().prop_map(|action| Content::Malware(Malware { action })),
        content_files().prop_map(Content::Event),
        content_files().prop_map(Content::Exercise),
        content_files().prop_map(Content::Banner),
        Just(Content::Other),
    ];
    let linux = files().prop_map(|path| (format!("/{}", path.to_str().unwrap()), false));
    let windows = files().prop_map(|path| (format!("C:\\{}", path.to_str().unwrap().replace('/', "\\")), true));
    let assets = (files(), prop_oneof![linux, windows], proptest::option::of(0u32..=0o7777))
        .prop_map(|(source, (destination, windows), mode)| Asset { source, destination, mode, windows });
    let texts = || proptest::collection::vec(".{0,10}", 0..3);
    (
        "[a-zA-Z0-9_-]{1,128}",
        (any::<u32>(), any::<u32>(), any::<u32>()).prop_map(|(a, b, c)| Version::new(a.into(), b.into(), c.into())),
        "[^\0]{0,40}",
        proptest::sample::select(vec!["MIT", "MIT OR Apache-2.0", "(MIT AND BSD-3-Clause) OR GPL-2.0+"]),
        (texts(), texts()),
        proptest::collection::vec(assets, 0..4),
        content,
    )
        .prop_map(|(name, version, description, license, (authors, categories), assets, content)| Manifest {
            name,
            version,
            description,
            license: license.to_owned(),
            authors,
            categories,
            assets,
            content,
        })
}

proptest! {
    #[test]
    fn a_manifest_is_read_as_it_was_written(manifest in manifests()) {
        let text = render(&manifest);
        prop_assert_eq!(Manifest::parse(&text).unwrap(), manifest);
    }

    #[test]
    fn no_text_makes_it_panic(text in ".{0,200}", cut in any::<proptest::sample::Index>(), junk in "[\\[\\]=\"a\n.]{0,5}") {
        let _ = Manifest::parse(&text);
        let at = cut.index(CONDITION.len());
        let _ = Manifest::parse(&format!("{}{junk}{}", &CONDITION[..at], &CONDITION[at..]));
    }
}
