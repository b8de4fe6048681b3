//! Programs of a guest that run on this machine too.

#![allow(dead_code, reason = "each test program uses a part")]

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

/// A program that is in `PATH`.
pub(crate) fn in_path(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
    folders.map(|folder| folder.join(name)).find(|file| file.is_file())
}

/// A program that is in `PATH` or else in the packages that the live tests' guest is built of.
pub(crate) fn find(name: &str, package: &str) -> Result<PathBuf, String> {
    if let Some(found) = in_path(name) {
        return Ok(found);
    }
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("cargo's folder has a parent").to_owned();
    let unpacked = target.join("guest-agent");
    let look = || {
        ["bin", "usr/bin", "usr/sbin"]
            .map(|folder| unpacked.join(folder).join(name))
            .into_iter()
            .find(|file| file.is_file())
    };
    static UNPACKING: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _turn = UNPACKING.lock();
    if let Some(found) = look() {
        return Ok(found);
    }
    let archive = std::fs::read_dir(target.join("guest/cache"))
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .find(|file| file.file_name().is_some_and(|file| file.to_string_lossy().starts_with(&format!("{package}_"))))
        .ok_or_else(|| format!("no {name} in PATH, and no package {package} in target/guest/cache"))?;
    // First aside: another test program may do the same now.
    std::fs::create_dir_all(&unpacked).map_err(|error| error.to_string())?;
    let aside = tempfile::tempdir_in(&unpacked).map_err(|error| error.to_string())?;
    let unpacking = Command::new("dpkg-deb").arg("-x").arg(&archive).arg(aside.path()).status();
    if !unpacking.is_ok_and(|status| status.success()) {
        return Err(format!("dpkg-deb could not unpack {}", archive.display()));
    }
    for folder in ["bin", "usr/bin", "usr/sbin"] {
        let (from, to) = (aside.path().join(folder).join(name), unpacked.join(folder).join(name));
        if from.is_file() {
            std::fs::create_dir_all(unpacked.join(folder)).map_err(|error| error.to_string())?;
            std::fs::rename(&from, &to).map_err(|error| error.to_string())?;
        }
    }
    look().ok_or_else(|| format!("package {package} has no {name}"))
}

/// Whether the tests run as root.
pub(crate) fn is_root() -> bool {
    static ROOT: OnceLock<bool> = OnceLock::new();
    *ROOT.get_or_init(|| Command::new("id").arg("-u").output().is_ok_and(|output| output.stdout == b"0\n"))
}
