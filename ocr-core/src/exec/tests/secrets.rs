use futures::StreamExt;

use super::{log::Log, *};

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
    // The one place: a condition's environment is needed again after a restart.
    let stored = format!("{:?}", rig.stored().await);
    assert!(stored.contains(CANARIES[2]) && !stored.contains(CANARIES[0]) && !stored.contains(CANARIES[1]));
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
