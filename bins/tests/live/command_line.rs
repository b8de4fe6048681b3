//! `ocr` against the real servers.

use std::time::Duration;

use serde_json::{Value, json};

use crate::{
    rig::TEMPLATE,
    site::{BOOT, Site},
    support::{OCR, SOON, Said, command, run, write_package},
};

async fn ocr(site: &Site, deadline: Duration, arguments: &[&str]) -> Said {
    let mut ocr = command(OCR);
    ocr.envs([("OCR_MACHINER", site.machiner().url()), ("OCR_EXECUTOR", site.executor().url())]).args(arguments);
    run(deadline, ocr).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_does_the_whole_job() {
    let Some(site) = Site::open("ocr", 1).await else { return };
    write_package(
        &site.packages,
        "motd",
        &[("motd", b"Welcome\n", "/etc/motd.d/", "644")],
        "type = \"feature\"\n[feature]\ntype = \"configuration\"\naction = \"cat /etc/motd.d/motd; echo $TEAM\"\n",
    );
    let create = ["--json", "vm", "create", "web", "-t", TEMPLATE, "--ram", "128MiB", "-l", "lab", "--exercise", "e"];
    let made = ocr(&site, BOOT, &create).await.json();
    let vm = made["id"].as_str().unwrap();
    let listed = ocr(&site, SOON, &["--json", "vm", "list"]).await.json();
    assert_eq!(listed.as_array().unwrap().len(), 1);
    let shown = ocr(&site, SOON, &["--json", "vm", "show", vm]).await.json();
    assert_eq!((&shown, &shown["id"]), (&listed[0], &json!(vm)));
    assert_eq!((&shown["state"], &shown["ram_bytes"]), (&json!("running"), &json!(128 << 20)));
    let mac = shown["nics"][0]["mac"].as_str().unwrap();
    assert!(site.rig.virsh(&["domiflist", vm]).contains(mac), "{shown}");

    let feature = ocr(&site, SOON, &["--json", "feature", "install", vm, "motd@1", "-e", "TEAM=blue"]).await.json();
    assert_eq!(feature["stdout"], "Welcome\nblue");
    let line = ["--json", "condition", "install", vm, "--command", "cat /root/score", "--interval", "1s"];
    let condition = ocr(&site, SOON, &line).await.json();
    let condition = condition["id"].as_str().unwrap();
    site.shell_text(vm, "echo 0.25 >/root/score").await;
    let values = ocr(&site, SOON, &["--json", "condition", "watch", condition, "--count", "2"]).await.json_lines();
    assert_eq!(values.len(), 2, "{values:?}");
    for value in values {
        assert_eq!((&value["condition"], &value["value"]), (&json!(condition), &json!(0.25)));
        assert!(value["lateness_ms"].is_u64(), "{value}");
    }
    let feature = feature["id"].as_str().unwrap();
    assert_eq!(ocr(&site, SOON, &["--json", "feature", "delete", feature]).await.json(), json!({ "id": feature }));
    assert_eq!(site.shell_text(vm, "ls /etc/motd.d").await, "");

    assert_eq!(ocr(&site, SOON, &["--json", "vm", "delete", vm]).await.json(), json!({ "id": vm }));
    assert_eq!(ocr(&site, SOON, &["--json", "vm", "list"]).await.json(), json!([]));
    let failure = ocr(&site, SOON, &["--json", "condition", "watch", condition]).await.failed();
    let failure: Value = serde_json::from_str(&failure).unwrap();
    assert_eq!(failure["error"]["code"], "NotFound", "{failure}");
    site.close().await;
}
