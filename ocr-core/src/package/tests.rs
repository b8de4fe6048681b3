use std::path::Component;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;

/// Paths as attackers and other people write them.
pub(super) fn paths() -> impl Strategy<Value = String> {
    let part = proptest::sample::select(vec![
        "a",
        "b",
        "package.toml",
        "src",
        ".",
        "..",
        "",
        "...",
        " ",
        "..\\..",
        "C:",
        "c:\\",
        "\\\\h",
        "~",
        "$HOME",
        "-rf",
        "ä",
        "\u{202e}",
        "\0",
        "\n",
        "%2e%2e",
        "a:b",
    ]);
    let built =
        (any::<bool>(), proptest::collection::vec(part, 0..8), any::<bool>()).prop_map(|(lead, parts, trail)| {
            format!("{}{}{}", if lead { "/" } else { "" }, parts.join("/"), if trail { "/" } else { "" })
        });
    prop_oneof![3 => built, 1 => ".{0,40}", 1 => "[./\\\\a]{0,12}"]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn a_path_stays_inside_or_is_refused(text in paths()) {
        if let Ok(path) = inside(&text, PATH_PARTS, PATH_BYTES) {
            prop_assert!(path.components().all(|part| matches!(part, Component::Normal(_))), "{text:?} -> {path:?}");
            prop_assert!(path.components().count() > 0);
            prop_assert!(!text.contains('\0'));
            // Said again it is the same place.
            prop_assert_eq!(inside(path.to_str().unwrap(), PATH_PARTS, PATH_BYTES), Ok(path));
        } else {
            prop_assert!(!text.chars().all(|c| c.is_ascii_alphanumeric()) || text.is_empty(), "{text:?}");
        }
    }
}

/// A package's files: a feature of this name and version with one asset.
pub(super) fn feature(name: &str, version: &str) -> Vec<(&'static str, String)> {
    let manifest = format!(
        "[package]\nname = \"{name}\"\nversion = \"{version}\"\ndescription = \"a test\"\nlicense = \"MIT\"\n\
         assets = [[\"src/run.sh\", \"/opt/{name}/\", \"755\"]]\n\
         [content]\ntype = \"feature\"\n[feature]\ntype = \"service\"\naction = \"/opt/{name}/run.sh\"\n"
    );
    vec![("package.toml", manifest), ("src/run.sh", format!("#!/bin/sh\necho {name} {version}\n"))]
}

pub(super) fn write_folder(folder: &Path, files: &[(&str, String)]) {
    for (path, content) in files {
        let path = folder.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
}

#[tokio::test]
async fn a_folder_opens_and_gives_its_assets() {
    let folder = TempDir::new().unwrap();
    write_folder(folder.path(), &feature("web", "1.0.0"));
    let package = Package::open_folder(folder.path()).await.unwrap();
    assert_eq!((package.to_string().as_str(), package.kind()), ("package web 1.0.0", PackageKind::Feature));
    let asset = &package.assets()[0];
    assert_eq!((asset.destination.as_str(), asset.mode), ("/opt/web/run.sh", Some(0o755)));
    assert_eq!(package.asset_bytes(asset).await.unwrap(), "#!/bin/sh\necho web 1.0.0\n");
    drop(package);
    assert!(folder.path().join("package.toml").exists(), "a folder stays its owner's");
}

#[tokio::test]
async fn the_digest_of_a_folder_is_that_of_the_files_it_names() {
    let folder = TempDir::new().unwrap();
    write_folder(folder.path(), &feature("web", "1.0.0"));
    let digest = || async { Package::open_folder(folder.path()).await.unwrap().digest().to_owned() };
    let first = digest().await;
    fs::write(folder.path().join("notes.txt"), "not named").unwrap();
    assert_eq!(digest().await, first);
    fs::write(folder.path().join("src/run.sh"), "other").unwrap();
    let second = digest().await;
    assert_ne!(second, first);
    let manifest = fs::read_to_string(folder.path().join("package.toml")).unwrap();
    fs::write(folder.path().join("package.toml"), manifest + "# other\n").unwrap();
    assert_ne!(digest().await, second);
}

#[tokio::test]
async fn a_missing_asset_is_named() {
    let folder = TempDir::new().unwrap();
    write_folder(folder.path(), &feature("web", "1.0.0")[..1]);
    let error = Package::open_folder(folder.path()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert_eq!(error.message(), r#"package.toml: assets[0]: "src/run.sh" is not in the package"#);
}

#[cfg(unix)]
#[tokio::test]
async fn a_link_may_stay_in_the_package_but_not_leave_it() {
    use std::os::unix::fs::symlink;
    let folder = TempDir::new().unwrap();
    let secret = TempDir::new().unwrap();
    fs::write(secret.path().join("secret"), "secret").unwrap();
    write_folder(folder.path(), &feature("web", "1.0.0"));
    let script = folder.path().join("src/run.sh");
    let outcome = |target: PathBuf| {
        let (folder, script) = (folder.path(), &script);
        async move {
            fs::remove_file(script).unwrap();
            symlink(target, script).unwrap();
            Package::open_folder(folder).await
        }
    };
    fs::write(folder.path().join("real"), "in the package").unwrap();
    let package = outcome("../real".into()).await.unwrap();
    assert_eq!(package.asset_bytes(&package.assets()[0]).await.unwrap(), "in the package");
    for target in [secret.path().join("secret"), "/etc/passwd".into(), "../../../../../../etc/passwd".into()] {
        let error = outcome(target).await.unwrap_err();
        assert!(error.message().contains("leaves the package through a link"), "{error}");
    }
    // A link that is bent after the check is caught by the one that reads.
    fs::remove_file(&script).unwrap();
    symlink(secret.path().join("secret"), &script).unwrap();
    assert_eq!(package.asset_bytes(&package.assets()[0]).await.unwrap_err().kind(), ErrorKind::Invalid);
}

#[cfg(unix)]
#[tokio::test]
async fn what_is_no_file_is_refused_before_it_is_opened() {
    let folder = TempDir::new().unwrap();
    write_folder(folder.path(), &feature("web", "1.0.0"));
    let script = folder.path().join("src/run.sh");
    fs::remove_file(&script).unwrap();
    fs::create_dir(&script).unwrap();
    let error = Package::open_folder(folder.path()).await.unwrap_err();
    assert!(error.message().contains("wants a file"), "{error}");
    fs::remove_dir(&script).unwrap();
    // Whoever opened this pipe would wait for ever.
    assert!(std::process::Command::new("mkfifo").arg(&script).status().unwrap().success());
    let error = Package::open_folder(folder.path()).await.unwrap_err();
    assert!(error.message().contains("wants a file"), "{error}");
}

#[tokio::test]
async fn a_manifest_too_large_or_not_text_is_refused() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("package.toml");
    fs::write(&path, vec![b' '; (1 << 20) + 1]).unwrap();
    let error = Package::open_folder(folder.path()).await.unwrap_err();
    assert_eq!(error.message(), "package.toml: wants at most 1048576 bytes");
    fs::write(&path, b"\xff\xfe").unwrap();
    let error = Package::open_folder(folder.path()).await.unwrap_err();
    assert_eq!(error.message(), "package.toml: wants text in UTF-8");
    fs::remove_file(&path).unwrap();
    assert_eq!(Package::open_folder(folder.path()).await.unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn the_newest_that_meets_the_requirement_is_taken() {
    let versions: Vec<Version> =
        ["0.9.0", "1.0.0", "1.2.0", "1.10.0", "2.0.0-rc.1", "2.0.0-rc.2"].map(|v| v.parse().unwrap()).into();
    for (requirement, wanted) in [
        ("", Some("1.10.0")),
        ("*", Some("1.10.0")),
        ("  ", Some("1.10.0")),
        ("1", Some("1.10.0")),
        ("1.2", Some("1.10.0")),
        ("~1.2", Some("1.2.0")),
        ("=1.0.0", Some("1.0.0")),
        ("^0.9", Some("0.9.0")),
        (">=1, <1.10", Some("1.2.0")),
        (">=2.0.0-rc.1", Some("2.0.0-rc.2")),
        ("2", None),
        (">3", None),
    ] {
        let found = Requirement::parse(requirement).unwrap().newest(&versions, |version| version);
        assert_eq!(found.map(ToString::to_string).as_deref(), wanted, "{requirement:?}");
    }
    // Where there is nothing else, any version means a pre-release too.
    let found = Requirement::parse("*").unwrap().newest(&versions[4..], |version| version);
    assert_eq!(found, Some(&versions[5]));
    let error = Requirement::parse("one").map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.message().starts_with("source.version: wants a version requirement"), "{error}");
}
