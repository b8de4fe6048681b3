use super::*;
use crate::ErrorKind;

fn long_environment() -> BTreeMap<String, String> {
    BTreeMap::from([("A".to_owned(), "x".repeat(40_000))])
}

#[tokio::test(start_paused = true)]
async fn a_bad_install_is_refused_naming_the_field_and_changes_nothing() {
    let rig = Rig::new().await;
    rig.shelf.put(feature("web").asset("/srv/a", 0o644, "a"));
    let good = || request(InstallKind::Feature, rig.vm, "web");
    let with = |name: &str, value: &str| BTreeMap::from([(name.to_owned(), value.to_owned())]);
    let cases = [
        ("kind", InstallRequest { kind: InstallKind::Condition, ..good() }),
        ("name", InstallRequest { name: String::new(), ..good() }),
        ("name", InstallRequest { name: "x".repeat(256), ..good() }),
        ("name", InstallRequest { name: "a\nb".to_owned(), ..good() }),
        ("username", InstallRequest { account: account("a:b"), ..good() }),
        ("environment", InstallRequest { environment: with("", "x"), ..good() }),
        ("environment", InstallRequest { environment: with("1A", "x"), ..good() }),
        ("environment", InstallRequest { environment: with("A B", "x"), ..good() }),
        ("environment", InstallRequest { environment: with("A", "x\0y"), ..good() }),
        ("environment", InstallRequest { environment: long_environment(), ..good() }),
        (
            "environment",
            InstallRequest { environment: (0..257).map(|n| (format!("A{n}"), String::new())).collect(), ..good() },
        ),
    ];
    for (field, request) in cases {
        let error = rig.executor.install(request).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{field}: {error}");
        assert!(error.message().starts_with(field), "{field}: {error}");
    }
    assert_eq!((rig.stored().await, rig.faults().calls("guest.guest_info")), (vec![], 0));
}

#[tokio::test(start_paused = true)]
async fn a_bad_condition_is_refused_naming_the_field_and_changes_nothing() {
    let rig = Rig::new().await;
    rig.shelf.put(condition("eager", "echo 1", Duration::ZERO).asset("/srv/a", 0o644, "a"));
    rig.shelf.put(feature("web").asset("/srv/a", 0o644, "a"));
    let good = || command(rig.vm, "echo 1", seconds(1));
    let package = |name: &str| Probe::Package(PackageRef { name: name.to_owned(), version: String::new() });
    let line = |line: &str| Probe::Command { line: line.to_owned(), interval: seconds(1) };
    let interval = |interval| Probe::Command { line: "echo 1".to_owned(), interval };
    let cases = [
        ("name", ConditionRequest { name: String::new(), ..good() }),
        ("username", ConditionRequest { account: account("-x"), ..good() }),
        ("environment", ConditionRequest { environment: long_environment(), ..good() }),
        ("command", ConditionRequest { probe: line(""), ..good() }),
        ("command", ConditionRequest { probe: line(" \n"), ..good() }),
        ("command", ConditionRequest { probe: line("echo \0"), ..good() }),
        ("command", ConditionRequest { probe: line(&"x".repeat(40_000)), ..good() }),
        ("interval", ConditionRequest { probe: interval(Duration::ZERO), ..good() }),
        ("interval", ConditionRequest { probe: interval(Duration::from_nanos(1)), ..good() }),
        ("interval", ConditionRequest { probe: interval(Duration::MAX), ..good() }),
        ("interval", ConditionRequest { probe: package("eager"), ..good() }),
        ("source", ConditionRequest { probe: package("web"), ..good() }),
    ];
    for (field, request) in cases {
        let error = rig.executor.create_condition(request).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{field}: {error}");
        assert!(error.message().contains(field), "{field}: {error}");
    }
    assert_eq!((rig.stored().await, rig.faults().calls("guest.guest_info")), (vec![], 0));
}
