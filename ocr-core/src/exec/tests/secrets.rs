use futures::StreamExt;

use super::{log::Log, *};
use crate::error::reason;

/// Every secret that goes in. None may be seen anywhere but where it is said.
const CANARIES: [&str; 3] = ["canary-password", "canary-private-key", "canary-environment"];

#[tokio::test(start_paused = true)]
async fn no_secret_is_stored_shown_logged_or_told() {
    let (log, _guard) = Log::start();
    let rig = Rig::new().await;
    rig.shelf
        .put(feature("web").asset("/srv/web/a", 0o644, "a").action("test -n \"$TOKEN\"").delete("true").restarts());
    rig.shelf.put(feature("bad").asset("/srv/bad/a", 0o644, "a").action("echo no >&2; exit 1"));
    let environment = BTreeMap::from([("TOKEN".to_owned(), CANARIES[2].to_owned())]);
    let request = |package| InstallRequest {
        account: account("user"),
        environment: environment.clone(),
        ..request(InstallKind::Feature, rig.vm, package)
    };
    let mut shown = vec![format!("{:?}", request("web")), format!("{:?}", rig.executor)];

    let id = rig.executor.install(request("web")).await.unwrap().id;
    shown.push(format!("{:?}", rig.stored().await));
    let error = rig.executor.install(request("bad")).await.unwrap_err();
    shown.push(format!("{error} {error:?}"));
    rig.faults().inject("guest.exec", 1, Fault::Before(Error::internal("broken")));
    let error = rig.executor.install(request("web")).await.unwrap_err();
    shown.push(format!("{error} {error:?}"));
    rig.executor.remove(InstallKind::Feature, id).await.unwrap();

    let request = ConditionRequest { account: account("user"), ..command(rig.vm, "echo 1", seconds(1)) };
    let with = ConditionRequest { environment, ..request.clone() };
    shown.push(format!("{with:?}"));
    let id = rig.executor.create_condition(request).await.unwrap().id;
    shown.push(format!("{:?}", rig.stored().await));
    let with_id = rig.executor.create_condition(with).await.unwrap().id;
    shown.push(format!("{:?}", rig.stored().await));
    for id in [id, with_id] {
        let mut stream = rig.executor.watch(id).await.unwrap();
        shown.push(format!("{:?}", stream.next().await));
        rig.cloud.set_agent(rig.vm, AgentMode::Stopped);
        tokio::time::sleep(seconds(30)).await;
        shown.push(format!("{:?}", rig.executor.conditions()));
        rig.cloud.set_agent(rig.vm, AgentMode::Answers);
    }
    shown.push(format!("{:?}", rig.executor.list(None).await.unwrap()));
    shown.push(format!("{:?}", rig.executor.recover().await.unwrap()));
    shown.push(format!("{:?}", rig.scheduler.snapshot()));
    assert!(log.lines().len() > 4, "nothing was logged, so nothing is proved: {:#?}", log.lines());
    shown.extend(log.lines());
    for text in shown {
        for canary in CANARIES {
            assert!(!text.contains(canary), "{canary} in {text}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn no_password_or_key_reaches_the_guest() {
    let rig = Rig::new().await;
    rig.shelf
        .put(feature("web").asset("/srv/web/a", 0o644, "a").action("env > /tmp/env; echo \"$@\" > /tmp/arguments"));
    rig.install(InstallKind::Feature, "web").await.unwrap();
    let seen = rig.file("/tmp/env").unwrap() + &rig.file("/tmp/arguments").unwrap();
    assert!(seen.contains("PATH=") && !seen.contains("canary"), "{seen}");
}

fn with_level(vm: VmId) -> ConditionRequest {
    ConditionRequest {
        environment: BTreeMap::from([("LEVEL".to_owned(), "0.75".to_owned())]),
        ..command(vm, "echo $LEVEL", seconds(10))
    }
}

async fn watch_error(rig: &Rig, id: InstallId) -> Error {
    rig.executor.watch(id).await.expect_err("an error")
}

#[tokio::test(start_paused = true)]
async fn without_a_key_an_environment_is_refused_and_nothing_is_stored() {
    let mut rig = Rig::new().await;
    rig.restart_with(SecretStorage::Refuse);
    let error = rig.executor.create_condition(with_level(rig.vm)).await.unwrap_err();
    assert_eq!((error.kind(), error.reason()), (ErrorKind::Conflict, Some(reason::SEALED)));
    assert!(error.message().contains("STATE_KEY"), "{error}");
    assert_eq!(rig.stored().await, []);
    rig.executor.create_condition(command(rig.vm, "echo 1", seconds(10))).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_environment_in_memory_lasts_as_long_as_the_process_and_never_reaches_the_store() {
    let mut rig = Rig::new().await;
    rig.restart_with(SecretStorage::Memory);
    let id = rig.executor.create_condition(with_level(rig.vm)).await.unwrap().id;
    assert_eq!(rig.executor.watch(id).await.unwrap().next().await.unwrap().unwrap().value, 0.75);
    assert!(!format!("{:?}", rig.stored().await).contains("0.75"));

    rig.restart_with(SecretStorage::Memory);
    let error = watch_error(&rig, id).await;
    assert_eq!(error.reason(), Some(reason::SEALED));
    assert!(error.message().contains("make the condition again"), "{error}");
    rig.executor.remove(InstallKind::Condition, id).await.unwrap();
    assert_eq!(rig.stored().await, []);
}

#[tokio::test(start_paused = true)]
async fn with_another_key_a_condition_says_so_keeps_its_seal_and_can_be_removed() {
    let other = || SecretStorage::Sealed(Arc::new(Sealer::new(vec![SealKey::generate()]).unwrap()));
    let mut rig = Rig::new().await;
    rig.shelf.put(condition("load", "echo $LEVEL", seconds(10)).asset("/srv/load", 0o755, "a"));
    let package = Probe::Package(PackageRef { name: "load".to_owned(), version: "*".to_owned() });
    let request = ConditionRequest { probe: package, ..with_level(rig.vm) };
    let [id, removed] =
        [rig.executor.create_condition(request.clone()).await, rig.executor.create_condition(request).await]
            .map(|made| made.unwrap().id);
    for secrets in [other(), SecretStorage::Memory, SecretStorage::Refuse] {
        rig.restart_with(secrets);
        assert_eq!(watch_error(&rig, id).await.reason(), Some(reason::SEALED));
        // Its stage changes and with it its record, but the seal stays.
        rig.cloud.set_agent(rig.vm, AgentMode::Stopped);
        rig.executor.remove(InstallKind::Condition, removed).await.unwrap_err();
        rig.cloud.set_agent(rig.vm, AgentMode::Answers);
    }
    rig.executor.remove(InstallKind::Condition, removed).await.unwrap();
    rig.restart();
    assert_eq!(rig.executor.watch(id).await.unwrap().next().await.unwrap().unwrap().value, 0.75);
}
