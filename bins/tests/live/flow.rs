//! The main job from beginning to end.

use ocr_grpc::proto::DeployVirtualMachine;
use tonic::Code;

use crate::{
    site::{BOOT, Site, feature, id, inject, machine, median, packaged_condition, timed},
    support::{SOON, say, soon, within, write_package},
};

fn packages(site: &Site) {
    write_package(
        &site.packages,
        "service",
        &[("service.sh", b"#!/bin/sh\necho \"$1 for $TEAM\"\n", "/opt/live/", "750")],
        "type = \"feature\"\n[feature]\ntype = \"service\"\naction = \"/opt/live/service.sh installed\"\n\
         delete = \"rm -f /opt/live/flag\"\nrestarts = true\n",
    );
    write_package(
        &site.packages,
        "news",
        &[("news.txt", b"Breaking\n", "/opt/live/news", "644")],
        "type = \"inject\"\n[inject]\naction = \"touch /opt/live/flag && cat /opt/live/news && echo hm >&2\"\n",
    );
    write_package(
        &site.packages,
        "flag",
        &[("flag.sh", b"[ -e /opt/live/flag ] && echo 1 || echo 0\n", "/opt/live/flag.sh", "755")],
        "type = \"condition\"\n[condition]\naction = \"sh /opt/live/flag.sh\"\ninterval = 1\n",
    );
    write_package(&site.packages, "nothing", &[], "type = \"inject\"\n[inject]\naction = \"true\"\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_is_deployed_acted_in_watched_and_leaves_nothing() {
    let Some(site) = Site::open("flow", 1).await else { return };
    packages(&site);
    say(format!(
        "figures: at rest the machiner has {} KiB resident, the executor {} KiB",
        site.machiner().resident_kib(),
        site.executor().resident_kib()
    ));

    let mut request = machine("web");
    request.virtual_machine.as_mut().unwrap().links = vec!["default".to_owned(), "lab".to_owned()];
    let create = |request: DeployVirtualMachine| {
        let mut vms = site.vms();
        async move { within(BOOT, "create", vms.create(request)).await }
    };
    let (made, took) = timed(create(request.clone())).await;
    let vm = made.unwrap().into_inner().value;
    say(format!("figures: a machine is created, booted and its agent answers after {took:.2?}"));
    let (again, took) = timed(create(request.clone())).await;
    assert_eq!(again.unwrap().into_inner().value, vm, "a repeat is the same machine");
    assert!(took < SOON / 10, "a repeat has nothing to wait for, but took {took:?}");
    let mut other = request;
    other.virtual_machine.as_mut().unwrap().configuration.as_mut().unwrap().cpu = 2;
    let refused = create(other).await.unwrap_err();
    assert_eq!(refused.code(), Code::AlreadyExists, "{refused:?}");
    assert!(site.assert_all_owned().await.iter().eq([&vm]), "the machine is the only one");

    let boot = site.boot_id(&vm).await;
    let mut service = feature(&vm, "service");
    service.environment = vec!["TEAM=blue".to_owned()];
    let (installed, took) = timed(within(BOOT, "feature", site.features().create(service))).await;
    let installed = installed.unwrap().into_inner();
    say(format!("figures: a feature that restarts the guest takes {took:.2?}"));
    assert_eq!((installed.stdout.as_str(), installed.stderr.as_str()), ("installed for blue", ""));
    assert_ne!(site.boot_id(&vm).await, boot, "the feature restarts the guest");
    assert_eq!(site.shell_text(&vm, "stat -c %a /opt/live/service.sh").await, "750");

    let condition = soon("condition", site.conditions().create(packaged_condition(&vm, "flag"))).await;
    let condition = condition.unwrap().into_inner().identifier.unwrap().value;
    let mut values = site.watch(&condition).await;
    values.show(0.0, SOON).await;
    let news = soon("inject", site.injects().create(inject(&vm, "news"))).await.unwrap().into_inner();
    assert_eq!((news.stdout.as_str(), news.stderr.as_str()), ("Breaking", "hm"));
    values.show(1.0, SOON).await;

    let mut times = Vec::new();
    for _ in 0..9 {
        let (done, took) = timed(soon("inject", site.injects().create(inject(&vm, "nothing")))).await;
        times.push(took);
        soon("delete", site.injects().delete(done.unwrap().into_inner().identifier.unwrap())).await.unwrap();
    }
    say(format!("figures: an exec through the executor takes {:.0?} (p50 of {})", median(times.clone()), times.len()));

    let installs = site.installed().await;
    assert_eq!(installs.len(), 3, "{installs:?}");
    soon("delete", site.injects().delete(news.identifier.unwrap())).await.unwrap();
    assert_eq!(site.shell_text(&vm, "ls /opt/live").await, "flag\nflag.sh\nservice.sh");
    soon("delete", site.features().delete(installed.identifier.unwrap())).await.unwrap();
    // The delete action took the flag.
    values.show(0.0, SOON).await;
    assert_eq!(site.shell_text(&vm, "ls /opt/live").await, "flag.sh");

    let mut second = site.watch(&condition).await;
    second.show(0.0, SOON).await;
    say(format!(
        "figures: after its work the machiner has {} KiB resident, the executor {} KiB",
        site.machiner().resident_kib(),
        site.executor().resident_kib()
    ));
    let ((), took) = timed(site.delete(&vm)).await;
    say(format!("figures: a machine is deleted in {took:.2?}"));
    values.end_not_found().await;
    second.end_not_found().await;
    site.delete(&vm).await;
    soon("delete", site.conditions().delete(id(&condition))).await.unwrap();
    let gone = soon("stream", site.conditions().stream(id(&condition))).await.unwrap_err();
    assert_eq!(gone.code(), Code::NotFound, "{gone:?}");
    assert!(site.installed().await.is_empty());
    assert!(site.assert_all_owned().await.is_empty());
    site.close().await;
}
