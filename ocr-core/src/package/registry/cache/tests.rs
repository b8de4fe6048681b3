use std::time::{Duration, Instant};

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::package::tests::{feature, write_folder};

const LIMIT_BYTES: u64 = 1000;

#[derive(Clone, Debug)]
enum Op {
    /// Takes an archive in, if it is not there.
    Store {
        nth: usize,
        bytes: u64,
    },
    Hold {
        nth: usize,
    },
    /// Lets go of what was held first.
    Release,
    Forget {
        nth: usize,
    },
    Keep {
        nth: usize,
        bytes: u64,
    },
    /// A download that comes to nothing.
    Abandon {
        bytes: u64,
    },
    Restart,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let (nth, bytes) = (0..6_usize, 1..600_u64);
    let op = prop_oneof![
        4 => (nth.clone(), bytes.clone()).prop_map(|(nth, bytes)| Op::Store { nth, bytes }),
        2 => nth.clone().prop_map(|nth| Op::Hold { nth }),
        3 => Just(Op::Release),
        1 => nth.clone().prop_map(|nth| Op::Forget { nth }),
        2 => (nth, bytes.clone()).prop_map(|(nth, bytes)| Op::Keep { nth, bytes }),
        1 => bytes.prop_map(|bytes| Op::Abandon { bytes }),
        1 => Just(Op::Restart),
    ];
    proptest::collection::vec(op, 1..40)
}

fn checksum(nth: usize) -> String {
    format!("{nth:064x}")
}

/// What is on disk: checksum and bytes.
fn on_disk(folder: &Path) -> HashMap<String, u64> {
    let entries = fs::read_dir(folder.join("archives")).unwrap().map(Result::unwrap);
    entries
        .map(|entry| {
            let stem = entry.path().file_stem().unwrap().to_str().unwrap().to_owned();
            (stem, entry.metadata().unwrap().len())
        })
        .collect()
}

/// Opens a cache that was just dropped. A program that another test starts has a copy of its lock for a moment: from the
/// fork until the exec.
fn open_again(folder: &Path) -> Cache {
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        match Cache::open(folder, LIMIT_BYTES) {
            Err(error) if error.kind() == ErrorKind::Conflict && Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(1));
            }
            opened => return opened.unwrap(),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn the_bound_holds_and_the_books_are_right_whatever_happens(ops in ops()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (folder, package) = (TempDir::new().unwrap(), TempDir::new().unwrap());
            write_folder(package.path(), &feature("web", "1.0.0"));
            let package = Arc::new(Package::open_folder(package.path()).await.unwrap());
            let mut cache = Arc::new(Cache::open(folder.path(), LIMIT_BYTES).unwrap());
            let mut held: VecDeque<Held> = VecDeque::new();
            for op in ops {
                match op {
                    Op::Store { nth, bytes } => {
                        let checksum = checksum(nth);
                        if let Some(known) = cache.hold(&checksum) {
                            held.push_back(known);
                            continue;
                        }
                        let mut room = cache.reserve();
                        let in_use = {
                            let state = cache.state();
                            state.archives.values().filter(|one| one.users > 0).map(|one| one.bytes).sum::<u64>()
                        };
                        let fits = in_use + bytes <= LIMIT_BYTES;
                        let grown = room.grow_to(bytes).await;
                        prop_assert_eq!(grown.is_ok(), fits, "{:?}", grown);
                        if fits {
                            let (mut file, path) = part(cache.work()).unwrap().into_parts();
                            io::Write::write_all(&mut file, &vec![0; usize::try_from(bytes).unwrap()]).unwrap();
                            held.push_back(cache.store(&checksum, path, room).await.unwrap());
                        }
                    }
                    Op::Hold { nth } => held.extend(cache.hold(&checksum(nth))),
                    Op::Release => drop(held.pop_front()),
                    Op::Forget { nth } => {
                        // As the flight does it: the only user.
                        if held.iter().all(|held| held.checksum != checksum(nth)) && let Some(known) = cache.hold(&checksum(nth)) {
                            cache.forget(known);
                            prop_assert!(cache.hold(&checksum(nth)).is_none());
                        }
                    }
                    Op::Keep { nth, bytes } => cache.keep(&checksum(nth), &package, bytes),
                    Op::Abandon { bytes } => drop(cache.reserve().grow_to(bytes).await),
                    Op::Restart => {
                        held.clear();
                        let before = on_disk(folder.path());
                        drop(cache);
                        cache = Arc::new(open_again(folder.path()));
                        prop_assert_eq!(on_disk(folder.path()), before, "a restart removes nothing that fits");
                    }
                }
                let state = cache.state();
                prop_assert!(state.bytes() <= LIMIT_BYTES);
                prop_assert_eq!(state.reserved_bytes, 0);
                let known: HashMap<String, u64> =
                    state.archives.iter().map(|(checksum, archive)| (checksum.clone(), archive.bytes)).collect();
                prop_assert_eq!(&known, &on_disk(folder.path()));
                prop_assert_eq!(state.archived_bytes, known.values().sum::<u64>());
                prop_assert_eq!(state.kept_bytes, state.kept.iter().map(|kept| kept.bytes).sum::<u64>());
                prop_assert!(state.kept.len() <= KEPT_MAX);
                for held in &held {
                    prop_assert!(known.contains_key(&held.checksum), "what is in use was removed");
                }
                let users: usize = state.archives.values().map(|archive| archive.users).sum();
                prop_assert_eq!(users, held.len());
            }
            Ok(())
        })?;
    }
}
