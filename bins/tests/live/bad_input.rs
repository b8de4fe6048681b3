//! What servers refuse: the right status, a message that names the field, and nothing changed.

use std::{collections::BTreeSet, io::Write, path::Path};

use ocr_grpc::proto::{Condition, DeployVirtualMachine, Feature, Inject, Source, VirtualMachine};
use tonic::{Code, Response, Status};

use crate::{
    site::{Site, feature, id, inject, machine, packaged_condition},
    support::{Asset, manifest, soon, write_package},
};

const NOBODY: &str = "00000000-0000-4000-8000-000000000000";
const ARTIFACT: &str = "type = \"feature\"\n[feature]\ntype = \"artifact\"\n";

/// A machine, and what was there before anybody asked for nonsense.
struct Scene {
    site: Site,
    vm: String,
    domains: BTreeSet<String>,
    files: String,
}

const FILES: &str = "find /opt /srv /etc -xdev ! -name mtab 2>/dev/null | sort; cat /etc/passwd";

impl Scene {
    async fn set() -> Option<Self> {
        let site = Site::open("bad", 1).await?;
        let vm = site.create("web").await;
        let domains = site.assert_all_owned().await;
        // Folders that are made for assets stay, so these are there before.
        site.shell_text(&vm, "mkdir -p /opt/fails /srv").await;
        let files = site.shell_text(&vm, FILES).await;
        Some(Self { site, vm, domains, files })
    }

    /// The call fails with the code, its message has all of this, and there is no new machine or install.
    async fn refused<T>(
        &self,
        call: impl Future<Output = Result<Response<T>, Status>>,
        code: Code,
        wanted: &[&str],
    ) -> Status {
        let Err(status) = soon("a refusal", call).await else { panic!("not refused: {wanted:?}") };
        assert_eq!(status.code(), code, "{wanted:?}: {status:?}");
        for part in wanted {
            assert!(status.message().contains(part), "{part:?} in {:?}", status.message());
        }
        assert_eq!(self.site.listed().await, self.domains, "{wanted:?}");
        assert_eq!(self.site.installed().await, [], "{wanted:?}");
        status
    }

    async fn create(&self, change: impl FnOnce(&mut VirtualMachine), code: Code, wanted: &str) {
        let mut request = machine("new");
        change(request.virtual_machine.as_mut().unwrap());
        self.refused(self.site.vms().create(request), code, &[wanted]).await;
    }

    async fn feature(&self, change: impl FnOnce(&mut Feature), code: Code, wanted: &[&str]) {
        let mut request = feature(&self.vm, "good");
        change(&mut request);
        self.refused(self.site.features().create(request), code, wanted).await;
    }

    async fn condition(&self, change: impl FnOnce(&mut Condition), wanted: &[&str]) {
        let mut request = Condition {
            name: "condition".to_owned(),
            virtual_machine_id: self.vm.clone(),
            command: "echo 1".to_owned(),
            interval: 1,
            ..Condition::default()
        };
        change(&mut request);
        self.refused(self.site.conditions().create(request), Code::InvalidArgument, wanted).await;
    }

    /// Nothing came of any of it, in the guest neither.
    async fn end(self) {
        assert_eq!(self.site.shell_text(&self.vm, FILES).await, self.files);
        assert_eq!(self.site.assert_all_owned().await, self.domains);
        self.site.delete(&self.vm).await;
        self.site.close().await;
    }
}

/// An archive of a few KiB that unpacks to 64 MiB.
fn write_bomb(path: &Path) {
    const ZEROS: usize = 64 << 20;
    let assets: &[Asset<'_>] = &[("zeros", b"", "/opt/zeros", "644")];
    let mut tar = tar::Builder::new(Vec::new());
    let mut add = |name: &str, bytes: &[u8], size: usize| {
        let mut header = tar::Header::new_ustar();
        header.set_path(name).unwrap();
        header.set_size(size as u64);
        header.set_mode(0o644);
        header.set_cksum();
        tar.append(&header, bytes).unwrap();
    };
    let text = manifest("bomb", assets, ARTIFACT);
    add("package.toml", text.as_bytes(), text.len());
    add("zeros", b"", ZEROS);
    let head = tar.into_inner().unwrap();
    let squeeze = |bytes: &[u8]| {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        gzip.write_all(bytes).unwrap();
        gzip.finish().unwrap()
    };
    // One gzip member after another is a gzip file. The builder has ended its archive; the end is not part of the head.
    let mut archive = squeeze(&head[..head.len() - 1024]);
    let mebibyte = squeeze(&vec![0; 1 << 20]);
    (0..ZEROS >> 20).for_each(|_| archive.extend_from_slice(&mebibyte));
    archive.extend(squeeze(&[0; 1024]));
    assert!(archive.len() < 1 << 20);
    std::fs::write(path, archive).unwrap();
}

fn packages(folder: &Path) {
    write_package(folder, "good", &[("file", b"x", "/opt/good", "644")], ARTIFACT);
    write_package(folder, "climbs-here", &[("../good/file", b"x", "/opt/file", "644")], ARTIFACT);
    write_package(folder, "climbs-there", &[("file", b"x", "/opt/../etc/passwd", "644")], ARTIFACT);
    write_package(folder, "links-out", &[("file", b"x", "/opt/file", "644")], ARTIFACT);
    std::fs::remove_file(folder.join("links-out/file")).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", folder.join("links-out/file")).unwrap();
    write_bomb(&folder.join("bomb.package"));
    write_package(
        folder,
        "fails",
        &[("one", b"1", "/opt/fails/one", "644"), ("two", b"2", "/srv/fails-two", "600")],
        "type = \"feature\"\n[feature]\ntype = \"service\"\n\
         action = \"cat /opt/fails/one; echo said; echo complained >&2; exit 7\"\n",
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn nonsense_is_refused_by_its_field_and_changes_nothing() {
    let Some(scene) = Scene::set().await else { return };
    packages(&scene.site.packages);
    machines(&scene).await;
    features_and_injects(&scene).await;
    conditions(&scene).await;
    bad_packages(&scene).await;
    failing_action(&scene).await;
    scene.end().await;
}

async fn machines(scene: &Scene) {
    use Code::{InvalidArgument, NotFound};

    let long = "n".repeat(256);
    let vms = || scene.site.vms();
    scene.refused(vms().create(DeployVirtualMachine::default()), InvalidArgument, &["virtualMachine: "]).await;
    scene.create(|vm| vm.name.clear(), InvalidArgument, "virtualMachine.name: ").await;
    scene.create(|vm| vm.name.clone_from(&long), InvalidArgument, "virtualMachine.name: ").await;
    scene.create(|vm| vm.name = "a\u{7}b".to_owned(), InvalidArgument, "virtualMachine.name: ").await;
    scene.create(|vm| vm.configuration = None, InvalidArgument, "virtualMachine.configuration: ").await;
    for cpu in [0, 1025, u32::MAX] {
        let wanted = "virtualMachine.configuration.cpu: ";
        scene.create(|vm| vm.configuration.as_mut().unwrap().cpu = cpu, InvalidArgument, wanted).await;
    }
    // Fine for the wire, too much for this hypervisor.
    scene.create(|vm| vm.configuration.as_mut().unwrap().cpu = 1024, InvalidArgument, "cpu").await;
    for ram in [0, 1, u64::MAX] {
        let wanted = "virtualMachine.configuration.ram: ";
        scene.create(|vm| vm.configuration.as_mut().unwrap().ram = ram, InvalidArgument, wanted).await;
    }
    scene.create(|vm| vm.configuration.as_mut().unwrap().ram = 63 << 40, InvalidArgument, "ram").await;
    scene.create(|vm| vm.template_id.clear(), InvalidArgument, "virtualMachine.templateId: ").await;
    scene.create(|vm| vm.template_id = "absent".to_owned(), NotFound, "\"absent\"").await;
    scene.create(|vm| vm.template_id = NOBODY.to_owned(), NotFound, NOBODY).await;
    scene.create(|vm| vm.links = vec!["lab".to_owned(), "absent".to_owned()], NotFound, "\"absent\"").await;
    scene.create(|vm| vm.links = vec![String::new()], InvalidArgument, "virtualMachine.links[0]: ").await;
    scene.create(|vm| vm.links = vec!["lab".to_owned(); 33], InvalidArgument, "virtualMachine.links: ").await;
    let mut request = machine("new");
    request.meta_info.as_mut().unwrap().exercise_name = long;
    scene.refused(vms().create(request), InvalidArgument, &["metaInfo.exerciseName: "]).await;
    for none in ["", "web", "123"] {
        scene.refused(vms().delete(id(none)), InvalidArgument, &["value: wants a UUID"]).await;
    }
    let mut huge = machine("new");
    huge.virtual_machine.as_mut().unwrap().template_id = "x".repeat(5 << 20);
    scene.refused(vms().create(huge), Code::ResourceExhausted, &["4194304"]).await;
}

async fn features_and_injects(scene: &Scene) {
    use Code::{InvalidArgument, NotFound};

    scene.feature(|one| one.name.clear(), InvalidArgument, &["name: "]).await;
    scene.feature(|one| one.name = "n".repeat(256), InvalidArgument, &["name: "]).await;
    scene.feature(|one| one.virtual_machine_id.clear(), InvalidArgument, &["virtual_machine_id: wants a UUID"]).await;
    scene.feature(|one| one.virtual_machine_id = NOBODY.to_owned(), NotFound, &[NOBODY]).await;
    scene.feature(|one| one.feature_type = 7, InvalidArgument, &["featureType: "]).await;
    scene.feature(|one| one.source = None, InvalidArgument, &["source: "]).await;
    let named = |name: &str, version: &str| Some(Source { name: name.to_owned(), version: version.to_owned() });
    scene.feature(|one| one.source = named("../good", "*"), InvalidArgument, &["source.name: "]).await;
    scene.feature(|one| one.source = named("good", "newest"), InvalidArgument, &["source.version: "]).await;
    scene.feature(|one| one.source = named("good", "^2"), NotFound, &["good", "1.0.0"]).await;
    scene.feature(|one| one.source = named("absent", "*"), NotFound, &["absent"]).await;
    let variables = |entries: &[&str]| entries.iter().map(|&entry| entry.to_owned()).collect::<Vec<_>>();
    let secret = "hunter2";
    for entry in [secret, "1X=1", "=1"] {
        scene.feature(|one| one.environment = variables(&["A=1", entry]), InvalidArgument, &["environment[1]: "]).await;
    }
    let mut request = feature(&scene.vm, "good");
    request.environment = variables(&[secret]);
    let status = scene.refused(scene.site.features().create(request), InvalidArgument, &["environment[0]: "]).await;
    assert!(!format!("{status:?}").contains(secret), "{status:?}");
    scene
        .feature(
            |one| one.environment = vec![format!("A={}", "x".repeat(5 << 20))],
            Code::ResourceExhausted,
            &["4194304"],
        )
        .await;

    let nameless = Inject { name: String::new(), ..inject(&scene.vm, "good") };
    scene.refused(scene.site.injects().create(nameless), InvalidArgument, &["name: "]).await;
    // A package of another kind.
    scene.refused(scene.site.injects().create(inject(&scene.vm, "good")), InvalidArgument, &["feature"]).await;
    for none in ["", "web"] {
        scene.refused(scene.site.features().delete(id(none)), InvalidArgument, &["value: wants a UUID"]).await;
        scene.refused(scene.site.injects().delete(id(none)), InvalidArgument, &["value: wants a UUID"]).await;
    }
}

async fn conditions(scene: &Scene) {
    scene.condition(|one| one.name.clear(), &["name: "]).await;
    scene.condition(|one| one.virtual_machine_id = "web".to_owned(), &["virtual_machine_id: wants a UUID"]).await;
    for interval in [0, -1, i32::MIN, i32::MAX] {
        scene.condition(|one| one.interval = interval, &["interval: ", &interval.to_string()]).await;
    }
    let both = |one: &mut Condition| one.source = packaged_condition(&scene.vm, "good").source;
    scene.condition(both, &["command: ", "source"]).await;
    scene.condition(|one| one.command.clear(), &["source: ", "command"]).await;
    scene.condition(|one| one.command = "x".repeat(33 << 10), &["command: "]).await;
    scene.condition(|one| one.environment = vec!["A".to_owned()], &["environment[0]: "]).await;
    let of_feature = packaged_condition(&scene.vm, "good");
    scene.refused(scene.site.conditions().create(of_feature), Code::InvalidArgument, &["feature"]).await;
    for none in ["", "web"] {
        let stream = || scene.site.conditions();
        scene.refused(stream().stream(id(none)), Code::InvalidArgument, &["value: wants a UUID"]).await;
        scene.refused(stream().delete(id(none)), Code::InvalidArgument, &["value: wants a UUID"]).await;
    }
    scene.refused(scene.site.conditions().stream(id(NOBODY)), Code::NotFound, &[NOBODY]).await;
}

async fn bad_packages(scene: &Scene) {
    use Code::InvalidArgument;

    for (package, wanted) in [
        ("climbs-here", &["assets[0]", "../good/file"][..]),
        ("climbs-there", &["assets[0]", "/opt/../etc/passwd"]),
        ("links-out", &["assets[0]"]),
        ("bomb", &["200 times its size"]),
    ] {
        scene.refused(scene.site.features().create(feature(&scene.vm, package)), InvalidArgument, wanted).await;
    }
}

async fn failing_action(scene: &Scene) {
    let wanted = ["fails 1.0.0", "exit code 7", "1said", "complained"];
    let request = feature(&scene.vm, "fails");
    scene.refused(scene.site.features().create(request), Code::FailedPrecondition, &wanted).await;
    assert_eq!(scene.site.shell_text(&scene.vm, "ls /opt/fails /srv").await, "/opt/fails:\n\n/srv:");
}
