//! What a stream outlives, and what a restarted server knows.

use tonic::Code;

use crate::{
    site::{BOOT, Site, timed},
    support::{SOON, say},
};

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_outlives_a_reset_and_a_restarted_executor_streams_on_from_its_records() {
    let Some(mut site) = Site::open("reboot", 1).await else { return };
    let vm = site.create("web").await;
    // What is in /run goes with the boot, so a 0 is from the next one.
    let condition = site.condition(&vm, "[ -e /run/this-boot ] && echo 1 || echo 0").await;
    let mut values = site.watch(&condition).await;
    values.show(0.0, SOON).await;
    site.shell_text(&vm, "touch /run/this-boot").await;
    values.show(1.0, SOON).await;
    site.rig.virsh(&["reset", &vm]);
    let ((), took) = timed(values.show(0.0, BOOT)).await;
    say(format!("figures: a stream shows values again {took:.2?} after a reset of its guest"));

    let executor = site.take_executor();
    let (status, ()) = tokio::join!(executor.terminate(), async {
        let end = values.end(SOON).await;
        assert_eq!(end.code(), Code::Unavailable, "{end:?}");
    });
    assert!(status.success(), "{status}");
    site.shell_text(&vm, "touch /run/this-boot").await;
    site.start_executor().await;
    assert_eq!(site.installed().await.len(), 1);
    site.watch(&condition).await.show(1.0, SOON).await;

    // The machine does not depend on the Machiner either.
    assert!(site.take_machiner().terminate().await.success());
    let mut values = site.watch(&condition).await;
    values.show(1.0, SOON).await;
    site.start_machiner().await;
    assert!(site.assert_all_owned().await.iter().eq([&vm]), "the machine is the only one");

    site.delete(&vm).await;
    values.end_not_found().await;
    site.close().await;
}
