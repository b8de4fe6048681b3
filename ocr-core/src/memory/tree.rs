//! A guest's files: folders and files with modes and owners, no links, no devices.

use std::{collections::BTreeMap, fmt, sync::Arc};

/// The user that every permission is granted to.
pub(super) const ROOT: &str = "root";
/// The most files and folders of one guest.
const MAX_NODES: usize = 100_000;

/// A file's content: shared until it is changed, and appended to without a copy of the whole.
pub(super) type Content = Arc<Vec<u8>>;

#[derive(Clone, Debug)]
pub(super) struct Tree {
    nodes: BTreeMap<String, Node>,
    /// What all files together hold.
    bytes: u64,
    limit_bytes: u64,
}

#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) mode: u32,
    pub(super) owner: String,
    /// `None` for a folder.
    pub(super) content: Option<Content>,
}

impl Node {
    pub(super) fn is_folder(&self) -> bool {
        self.content.is_none()
    }
}

/// Why a file operation failed, in the words that users know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fail {
    Missing,
    Exists,
    Folder,
    NoFolder,
    NotEmpty,
    Denied,
    Full,
}

impl fmt::Display for Fail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Missing => "No such file or directory",
            Self::Exists => "File exists",
            Self::Folder => "Is a directory",
            Self::NoFolder => "Not a directory",
            Self::NotEmpty => "Directory not empty",
            Self::Denied => "Permission denied",
            Self::Full => "No space left on device",
        })
    }
}

#[derive(Clone, Copy)]
pub(super) enum Want {
    Read = 4,
    Write = 2,
    Exec = 1,
}

type Outcome<T> = Result<T, Fail>;

impl Tree {
    pub(super) fn new(limit_bytes: u64) -> Self {
        let root = Node { mode: 0o755, owner: ROOT.to_owned(), content: None };
        Self { nodes: BTreeMap::from([("/".to_owned(), root)]), bytes: 0, limit_bytes }
    }

    pub(super) fn look(&self, path: &str) -> Option<&Node> {
        self.nodes.get(path)
    }

    /// The node, when the user may reach it and wants nothing that its mode forbids.
    pub(super) fn open(&self, who: &str, path: &str, want: Want) -> Outcome<&Node> {
        self.reach(who, path)?;
        let node = self.nodes.get(path).ok_or(Fail::Missing)?;
        if allows(node, who, want) { Ok(node) } else { Err(Fail::Denied) }
    }

    pub(super) fn read(&self, who: &str, path: &str) -> Outcome<Content> {
        self.open(who, path, Want::Read)?.content.clone().ok_or(Fail::Folder)
    }

    /// The names in a folder.
    pub(super) fn names(&self, who: &str, path: &str) -> Outcome<Vec<String>> {
        if !self.open(who, path, Want::Read)?.is_folder() {
            return Err(Fail::NoFolder);
        }
        Ok(self.below(path).filter(|rest| !rest.contains('/')).map(str::to_owned).collect())
    }

    /// All paths with their nodes, folders before what is in them.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &Node)> {
        self.nodes.iter().map(|(path, node)| (path.as_str(), node))
    }

    /// Writes or appends to a file; a new one gets mode 0644 and the writer as owner.
    pub(super) fn write(&mut self, who: &str, path: &str, content: &[u8], append: bool) -> Outcome<()> {
        match self.nodes.get(path) {
            Some(_) if self.open(who, path, Want::Write)?.is_folder() => return Err(Fail::Folder),
            Some(_) => {}
            None => self.add(who, path, Node { mode: 0o644, owner: who.to_owned(), content: Some(Arc::default()) })?,
        }
        let old = if append { 0 } else { self.size(path) };
        let bytes = self.bytes - old + content.len() as u64;
        if bytes > self.limit_bytes {
            return Err(Fail::Full);
        }
        if let Some(kept) = self.nodes.get_mut(path).and_then(|node| node.content.as_mut()) {
            match append {
                true => Arc::make_mut(kept).extend_from_slice(content),
                false => *kept = Arc::new(content.to_vec()),
            }
            self.bytes = bytes;
        }
        Ok(())
    }

    /// Makes one folder.
    pub(super) fn make_folder(&mut self, who: &str, path: &str) -> Outcome<()> {
        if self.nodes.contains_key(path) {
            return Err(Fail::Exists);
        }
        self.add(who, path, Node { mode: 0o755, owner: who.to_owned(), content: None })
    }

    /// Makes a folder and those above it that are missing.
    pub(super) fn make_folders(&mut self, who: &str, path: &str) -> Outcome<()> {
        for end in path.match_indices('/').map(|(at, _)| at).skip(1).chain([path.len()]) {
            match self.nodes.get(&path[..end]) {
                Some(node) if node.is_folder() => {}
                Some(_) => return Err(Fail::NoFolder),
                None => self.make_folder(who, &path[..end])?,
            }
        }
        Ok(())
    }

    /// Removes a file, or a folder with nothing in it.
    pub(super) fn remove(&mut self, who: &str, path: &str) -> Outcome<()> {
        if !self.nodes.contains_key(path) {
            self.reach(who, path)?;
            return Err(Fail::Missing);
        }
        self.open(who, parent(path), Want::Write)?;
        if path == "/" || self.below(path).next().is_some() {
            return Err(Fail::NotEmpty);
        }
        self.bytes -= self.size(path);
        self.nodes.remove(path);
        Ok(())
    }

    /// Everything in and below a folder, deepest first, itself last.
    pub(super) fn all_below(&self, path: &str) -> Vec<String> {
        let mut all: Vec<_> = self.below(path).map(|rest| join(path, rest)).collect();
        all.reverse();
        all.push(path.to_owned());
        all
    }

    /// Moves a file or a folder onto a name that is free or a file.
    pub(super) fn rename(&mut self, who: &str, from: &str, to: &str) -> Outcome<()> {
        self.open(who, parent(from), Want::Write)?;
        self.open(who, parent(to), Want::Write)?;
        if from == to {
            return Ok(());
        }
        let node = self.nodes.get(from).ok_or(Fail::Missing)?;
        match self.nodes.get(to) {
            Some(target) if target.is_folder() => return Err(Fail::Exists),
            Some(_) if node.is_folder() => return Err(Fail::NoFolder),
            _ => {}
        }
        if from == "/" || to.starts_with(&format!("{from}/")) {
            return Err(Fail::Exists);
        }
        self.bytes -= self.size(to);
        for old in self.all_below(from).into_iter().rev() {
            if let Some(node) = self.nodes.remove(&old) {
                self.nodes.insert(format!("{to}{}", &old[from.len()..]), node);
            }
        }
        Ok(())
    }

    pub(super) fn set_mode(&mut self, who: &str, path: &str, mode: u32) -> Outcome<()> {
        let node = self.own(who, path)?;
        node.mode = mode & 0o7777;
        Ok(())
    }

    pub(super) fn set_owner(&mut self, who: &str, path: &str, owner: &str) -> Outcome<()> {
        if who != ROOT {
            return Err(Fail::Denied);
        }
        self.own(who, path)?.owner = owner.to_owned();
        Ok(())
    }

    fn own(&mut self, who: &str, path: &str) -> Outcome<&mut Node> {
        self.reach(who, path)?;
        let node = self.nodes.get_mut(path).ok_or(Fail::Missing)?;
        if who == ROOT || node.owner == who { Ok(node) } else { Err(Fail::Denied) }
    }

    fn add(&mut self, who: &str, path: &str, node: Node) -> Outcome<()> {
        if path.is_empty() {
            return Err(Fail::Missing);
        }
        if !self.open(who, parent(path), Want::Write)?.is_folder() {
            return Err(Fail::NoFolder);
        }
        if self.nodes.len() >= MAX_NODES {
            return Err(Fail::Full);
        }
        self.nodes.insert(path.to_owned(), node);
        Ok(())
    }

    /// Whether all folders above a path are folders that the user may pass.
    fn reach(&self, who: &str, path: &str) -> Outcome<()> {
        let mut above = path;
        while above != "/" {
            above = parent(above);
            match self.nodes.get(above) {
                Some(node) if !node.is_folder() => return Err(Fail::NoFolder),
                Some(node) if !allows(node, who, Want::Exec) => return Err(Fail::Denied),
                _ => {}
            }
        }
        Ok(())
    }

    fn below<'a>(&'a self, path: &str) -> impl Iterator<Item = &'a str> + use<'a> {
        let prefix = if path == "/" { "/".to_owned() } else { format!("{path}/") };
        let cut = prefix.len();
        self.nodes
            .range(prefix.clone()..)
            .take_while(move |(found, _)| found.starts_with(&prefix))
            .map(move |(found, _)| &found[cut..])
            .filter(|rest| !rest.is_empty())
    }

    fn size(&self, path: &str) -> u64 {
        self.nodes.get(path).and_then(|node| node.content.as_ref()).map_or(0, |content| content.len() as u64)
    }
}

fn allows(node: &Node, who: &str, want: Want) -> bool {
    if who == ROOT {
        // Root runs a file only when somebody may.
        return !matches!(want, Want::Exec) || node.is_folder() || node.mode & 0o111 != 0;
    }
    let bits = if node.owner == who { node.mode >> 6 } else { node.mode };
    bits & want as u32 != 0
}

/// The folder that a path is in; `/` is in itself.
pub(super) fn parent(path: &str) -> &str {
    match path.rfind('/') {
        None | Some(0) => "/",
        Some(at) => &path[..at],
    }
}

pub(super) fn base(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

pub(super) fn join(folder: &str, name: &str) -> String {
    if folder == "/" { format!("/{name}") } else { format!("{folder}/{name}") }
}

/// A path as the tree knows it: absolute, without `.`, `..` and doubled slashes. The empty path stays empty and is that of
/// nothing.
pub(super) fn resolve(folder: &str, path: &str) -> String {
    if path.is_empty() {
        return String::new();
    }
    let from = if path.starts_with('/') { "" } else { folder };
    let mut parts: Vec<&str> = Vec::new();
    for part in from.split('/').chain(path.split('/')) {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_resolved_without_climbing_out() {
        assert_eq!(resolve("/a/b", "../c/./d//e"), "/a/c/d/e");
        assert_eq!(resolve("/a", "/../../x"), "/x");
        assert_eq!(resolve("/", "."), "/");
    }

    #[test]
    fn a_move_takes_what_is_in_the_folder_along() {
        let mut tree = Tree::new(1 << 20);
        tree.make_folders(ROOT, "/a/b").unwrap();
        tree.write(ROOT, "/a/b/f", b"x", false).unwrap();
        tree.write(ROOT, "/ab", b"beside", false).unwrap();
        tree.rename(ROOT, "/a", "/z").unwrap();
        assert_eq!(*tree.read(ROOT, "/z/b/f").unwrap(), b"x");
        assert_eq!(tree.read(ROOT, "/a/b/f").unwrap_err(), Fail::Missing);
        assert_eq!(*tree.read(ROOT, "/ab").unwrap(), b"beside");
    }

    #[test]
    fn modes_bind_everybody_but_root() {
        let mut tree = Tree::new(1 << 20);
        tree.make_folder(ROOT, "/s").unwrap();
        tree.write(ROOT, "/s/f", b"x", false).unwrap();
        assert!(tree.read("user", "/s/f").is_ok());
        assert_eq!(tree.write("user", "/s/f", b"y", false), Err(Fail::Denied));
        assert_eq!(tree.write("user", "/s/g", b"y", false), Err(Fail::Denied));
        tree.set_mode(ROOT, "/s", 0o700).unwrap();
        assert_eq!(tree.read("user", "/s/f").unwrap_err(), Fail::Denied);
        assert!(tree.read(ROOT, "/s/f").is_ok());
    }

    #[test]
    fn a_full_disk_refuses_and_keeps_the_old_content() {
        let mut tree = Tree::new(8);
        tree.write(ROOT, "/f", b"12345", false).unwrap();
        assert_eq!(tree.write(ROOT, "/f", b"6789", true), Err(Fail::Full));
        assert_eq!(*tree.read(ROOT, "/f").unwrap(), b"12345");
        tree.write(ROOT, "/f", b"12345678", false).unwrap();
        tree.remove(ROOT, "/f").unwrap();
        tree.write(ROOT, "/g", b"12345678", false).unwrap();
    }
}
