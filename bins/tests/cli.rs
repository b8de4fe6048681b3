//! The command line, and the servers' own: no hypervisor is needed for any of it.
#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "../../ocr-core/tests/support/redis.rs"]
mod redis;
mod support;

use std::{
    collections::BTreeMap,
    io::{Read, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use ocr_core::{Key, Precondition, StateStore, state::embedded::EmbeddedStore};
use redis::need_redis;
use serde_json::{Value, json};
use support::{EXECUTOR, MACHINER, OCR, SOON, Said, Server, command, keeper, run, say, soon, until, write_package};

/// `ocr serve --backend memory` on a free port, with three packages.
struct Serve {
    server: Server,
    state: PathBuf,
}

impl Serve {
    async fn start() -> Self {
        Self::start_on(async |_| {}).await
    }

    /// With a state file that is made ready first.
    async fn start_on(prepare: impl AsyncFnOnce(&Path)) -> Self {
        let folder = keeper().new_folder("serve");
        let packages = folder.join("packages");
        write_package(
            &packages,
            "web",
            &[("web.conf", b"port = 80\n", "/etc/web/", "644")],
            "type = \"feature\"\n[feature]\ntype = \"service\"\naction = \"echo up for $TEAM; echo hm >&2\"\n",
        );
        write_package(
            &packages,
            "news",
            &[("news.txt", b"Breaking\n", "/srv/news", "644")],
            "type = \"inject\"\n[inject]\naction = \"cat /srv/news\"\n",
        );
        write_package(
            &packages,
            "alive",
            &[("value", b"0.5\n", "/srv/value", "644")],
            "type = \"condition\"\n[condition]\naction = \"cat /srv/value\"\ninterval = 1\n",
        );
        let mut serve = command(OCR);
        serve.args([
            "serve",
            "--backend",
            "memory",
            "--listen",
            "127.0.0.1:0",
            "--metrics",
            "127.0.0.1:0",
            "--packages",
        ]);
        let state = folder.join("state.redb");
        prepare(&state).await;
        let keys = folder.join("keys");
        std::fs::write(&keys, "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff\n").unwrap();
        serve.arg(&packages).arg("--state").arg(&state).arg("--state-key-file").arg(keys);
        let server = Server::start(serve, &folder.join("log"));
        server.serving(SOON).await;
        Self { server, state }
    }

    /// What the metrics page's server answers: head and body.
    async fn http(&self, method: &str, path: &str) -> (String, String) {
        let log = self.server.log_text();
        let line = log.lines().find(|line| line.contains("metrics are at /metrics")).expect("the log says where");
        let address = line.rsplit("address=").next().unwrap().trim().to_owned();
        let request = format!("{method} {path} HTTP/1.1\r\nHost: {address}\r\n\r\n");
        let answer = tokio::task::spawn_blocking(move || {
            let mut stream = std::net::TcpStream::connect(address).unwrap();
            stream.write_all(request.as_bytes()).unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            text
        });
        let answer = soon("an answer", answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.to_owned(), body.to_owned())
    }

    async fn metrics(&self) -> Page {
        let (head, body) = self.http("GET", "/metrics").await;
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
        assert!(head.to_lowercase().contains("content-type: application/openmetrics-text"), "{head}");
        Page::parse(&body)
    }

    /// Runs `ocr` against it.
    async fn ocr(&self, arguments: &[&str]) -> Said {
        let mut ocr = command(OCR);
        ocr.envs([("OCR_MACHINER", self.server.url()), ("OCR_EXECUTOR", self.server.url())]).args(arguments);
        run(SOON, ocr).await
    }
}

async fn ocr(arguments: &[&str]) -> Said {
    let mut ocr = command(OCR);
    ocr.args(arguments);
    run(SOON, ocr).await
}

const NOBODY: &str = "00000000-0000-4000-8000-000000000000";

#[tokio::test(flavor = "multi_thread")]
async fn every_command_speaks_json_to_programs() {
    let serve = Serve::start().await;
    let create =
        ["--json", "vm", "create", "web-0", "-t", "tiny", "--ram", "64MiB", "-l", "default", "--exercise", "e"];
    let made = serve.ocr(&create).await.json();
    let vm = made["id"].as_str().unwrap();
    assert_eq!(made["name"], "web-0");
    assert!(made["seconds"].as_f64().unwrap() >= 0.0);
    assert_eq!(serve.ocr(&create).await.json()["id"], vm, "a repeat is the same machine");

    let listed = serve.ocr(&["--json", "vm", "list"]).await.json();
    assert_eq!(listed.as_array().unwrap().len(), 1);
    assert_eq!((&listed[0]["id"], &listed[0]["state"]), (&json!(vm), &json!("running")));
    assert_eq!(serve.ocr(&["--json", "vm", "list", "--exercise", "other"]).await.json(), json!([]));
    let shown = serve.ocr(&["--json", "vm", "show", vm]).await.json();
    assert_eq!(shown["ram_bytes"], 64 << 20);
    assert_eq!(shown, listed[0]);

    let feature = serve.ocr(&["--json", "feature", "install", vm, "web@^1", "-e", "TEAM=blue"]).await.json();
    assert_eq!((&feature["stdout"], &feature["stderr"]), (&json!("up for blue"), &json!("hm")));
    let inject = serve.ocr(&["--json", "inject", "install", vm, "news", "--name", "n"]).await.json();
    assert_eq!(inject["stdout"], "Breaking");
    let package = serve.ocr(&["--json", "condition", "install", vm, "alive"]).await.json();
    let line = ["--json", "condition", "install", vm, "--command", "echo $N", "--interval", "1s", "-e", "N=0.25"];
    let line = serve.ocr(&line).await.json();
    let (package, line) = (package["id"].as_str().unwrap(), line["id"].as_str().unwrap());

    let values = serve.ocr(&["--json", "condition", "watch", package, line, "--count", "2"]).await.json_lines();
    for (id, value) in [(package, 0.5), (line, 0.25)] {
        let of_it: Vec<_> = values.iter().filter(|one| one["condition"] == id).collect();
        assert!(of_it.len() >= 2, "{values:?}");
        assert!(of_it.iter().all(|one| one["value"] == value && one["lateness_ms"].is_u64()), "{of_it:?}");
    }

    for (kind, id) in [("feature", &feature["id"]), ("inject", &inject["id"]), ("condition", &json!(line))] {
        let id = id.as_str().unwrap();
        for _ in ["gone", "gone already"] {
            assert_eq!(serve.ocr(&["--json", kind, "delete", id]).await.json(), json!({ "id": id }));
        }
    }
    let clean = json!({ "ended": [], "swept": [], "forgotten": [], "failed": [] });
    assert_eq!(serve.ocr(&["--json", "reconcile"]).await.json(), clean);
    for _ in ["gone", "gone already"] {
        assert_eq!(serve.ocr(&["--json", "vm", "delete", vm]).await.json(), json!({ "id": vm }));
    }
    assert_eq!(serve.ocr(&["--json", "vm", "list"]).await.json(), json!([]));

    // The machine took its conditions along.
    let failure = serve.ocr(&["--json", "condition", "watch", package]).await.failed();
    let failure: Value = serde_json::from_str(&failure).unwrap();
    assert_eq!(failure["error"]["code"], "NotFound", "{failure}");
    assert!(serve.server.terminate().await.success());
}

/// A machine with a condition that is watched until this is dropped.
struct Watched {
    vm: String,
    condition: String,
    _stream: tonic::Streaming<ocr_grpc::proto::ConditionStreamResponse>,
}

impl Serve {
    /// Watches a condition and waits for its second value.
    async fn watched(&self) -> Watched {
        let vm = self.ocr(&["--json", "vm", "create", "web-0", "-t", "tiny"]).await.json()["id"].clone();
        let vm = vm.as_str().unwrap().to_owned();
        let made = self.ocr(&["--json", "condition", "install", &vm, "alive", "--name", "is it up"]).await.json();
        let condition = made["id"].as_str().unwrap().to_owned();
        let mut client = ocr_grpc::client::ConditionServiceClient::new(self.server.channel().await);
        let id = ocr_grpc::proto::Identifier { value: condition.clone() };
        let mut stream = client.stream(id).await.unwrap().into_inner();
        for _ in 0..2 {
            soon("a value", stream.message()).await.unwrap().unwrap();
        }
        Watched { vm, condition, _stream: stream }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_queue_is_shown_to_people_and_to_programs() {
    let serve = Serve::start().await;
    let idle = serve.ocr(&["queue", "top", "--once"]).await.fine();
    assert!(idle.starts_with("waiting 0  running 0 of 50 "), "{idle}");
    let watched = serve.watched().await;

    let shown = serve.ocr(&["--json", "queue", "top", "--once"]).await.json();
    let condition = &shown["conditions"][0];
    assert_eq!(shown["conditions_total"], 1, "{shown}");
    assert_eq!(
        (&condition["condition"], &condition["machine"], &condition["name"], &condition["value"]),
        (&json!(watched.condition), &json!(watched.vm), &json!("is it up"), &json!(0.5))
    );
    assert_eq!((&condition["interval_wanted_ms"], &condition["watchers"]), (&json!(1000), &json!(1)));
    assert!(condition["runs"].as_u64().unwrap() >= 2 && condition["lateness"]["p99_us"].is_u64(), "{shown}");
    let machine = &shown["machines"][0];
    assert_eq!((&machine["machine"], &machine["operations"]), (&json!(watched.vm), &json!(1)), "{shown}");

    let looks = ["--json", "queue", "top", "--interval", "100ms", "--count", "3", "--vm", &watched.vm];
    assert_eq!(serve.ocr(&looks).await.json_lines().len(), 3);
    let text = serve.ocr(&["queue", "top", "--interval", "100ms", "--count", "2"]).await.fine();
    assert!(!text.contains('\u{1b}'), "no terminal, no codes: {text:?}");
    assert_eq!(text.lines().filter(|line| line.starts_with(&watched.condition)).count(), 2, "{text}");
    assert_eq!(text.lines().filter(|line| line.contains("machine (1 of 1)")).count(), 2, "{text}");
    let elsewhere = serve.ocr(&["--json", "queue", "top", "--once", "--vm", NOBODY]).await.json();
    assert_eq!((&elsewhere["conditions"], &elsewhere["machines"]), (&json!([]), &json!([])));
    for arguments in [&["queue", "top", "--top", "1001"][..], &["queue", "holder", "no-uuid"]] {
        assert_eq!(serve.ocr(arguments).await.code, Some(2), "{arguments:?}");
    }
    let failure = serve.ocr(&["queue", "top", "--interval", "1ms"]).await.failed();
    assert!(failure.contains("interval_ms: wants 100 to 3600000"), "{failure}");
}

/// A metrics page, read strictly.
struct Page {
    /// Metric names and their kinds.
    kinds: BTreeMap<String, String>,
    /// Series, labels and all, and their values.
    values: BTreeMap<String, f64>,
}

impl Page {
    #[track_caller]
    fn parse(text: &str) -> Self {
        let (mut kinds, mut values) = (BTreeMap::new(), BTreeMap::new());
        let text = text.strip_suffix("# EOF\n").expect("the end is marked");
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# ") {
                let mut words = rest.splitn(3, ' ');
                let (word, name, rest) = (words.next().unwrap(), words.next().unwrap(), words.next().unwrap());
                match word {
                    "TYPE" => assert_eq!(kinds.insert(name.to_owned(), rest.to_owned()), None, "{line}"),
                    "HELP" => assert!(!rest.is_empty() && !rest.ends_with(".."), "{line}"),
                    _ => panic!("{line}"),
                }
                continue;
            }
            let (series, value) = line.rsplit_once(' ').unwrap();
            let name = series.split('{').next().unwrap();
            let of = |kind: &str, ends: &[&str]| {
                ends.iter()
                    .any(|end| name.strip_suffix(end).is_some_and(|name| kinds.get(name).is_some_and(|k| k == kind)))
            };
            let known =
                of("gauge", &[""]) || of("counter", &["_total"]) || of("histogram", &["_bucket", "_sum", "_count"]);
            assert!(known, "{line} has no type");
            assert!(series.len() == name.len() || series.ends_with('}'), "{line}");
            let value = value.parse::<f64>().unwrap_or_else(|error| panic!("{line}: {error}"));
            assert_eq!(values.insert(series.to_owned(), value), None, "{line} is there twice");
        }
        Self { kinds, values }
    }

    #[track_caller]
    fn value(&self, series: &str) -> f64 {
        *self.values.get(series).unwrap_or_else(|| panic!("{series} in {:#?}", self.values))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_server_has_the_metrics_that_the_documentation_names() {
    let serve = Serve::start().await;
    let watched = serve.watched().await;
    let odd = "a \"quoted\\\" one";
    let made = serve.ocr(&["--json", "condition", "install", &watched.vm, "alive", "--name", odd]).await.json();
    let odd_id = made["id"].as_str().unwrap().to_owned();
    let mut client = ocr_grpc::client::ConditionServiceClient::new(serve.server.channel().await);
    let mut stream = client.stream(ocr_grpc::proto::Identifier { value: odd_id.clone() }).await.unwrap().into_inner();
    for _ in 0..4 {
        soon("a value", stream.message()).await.unwrap().unwrap();
    }
    // A page serves for a second.
    let page = until(SOON, "a page with four runs", async || {
        let page = serve.metrics().await;
        let runs = page
            .values
            .iter()
            .find(|(series, _)| series.starts_with("ocr_condition_runs_total{") && series.contains(&odd_id));
        runs.is_some_and(|(_, runs)| *runs >= 4.0).then_some(page)
    })
    .await;

    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/OPERATIONS.md")).unwrap();
    let documented: BTreeMap<_, _> = text
        .lines()
        .filter_map(|line| line.strip_prefix("| `ocr_"))
        .map(|rest| {
            let mut cells = rest.split('|').map(str::trim);
            let name = cells.next().unwrap().split(['`', '{']).next().unwrap();
            (format!("ocr_{name}"), cells.next().unwrap().to_owned())
        })
        .collect();
    // In the documentation a counter has the name that one asks Prometheus for.
    let served: BTreeMap<_, _> = page
        .kinds
        .iter()
        .map(|(name, kind)| (if kind == "counter" { format!("{name}_total") } else { name.clone() }, kind.clone()))
        .collect();
    assert_eq!(served, documented);

    assert_eq!((page.value("ocr_ready"), page.value("ocr_unfinished")), (1.0, 0.0));
    assert_eq!((page.value("ocr_queue_limit"), page.value("ocr_conditions_watched")), (50.0, 2.0));
    assert_eq!((page.value("ocr_condition_streams"), page.value("ocr_streams_open")), (2.0, 2.0));
    assert!(page.value("ocr_queue_operations_total{result=\"ended\"}") >= 6.0);
    assert_eq!(page.value("ocr_queue_wait_seconds_count"), page.value("ocr_queue_started_total{run=\"first\"}"));
    assert_eq!(page.value("ocr_queue_lateness_seconds_count"), page.value("ocr_queue_started_total{run=\"again\"}"));
    assert_eq!(
        page.value("ocr_queue_lateness_seconds_bucket{le=\"+Inf\"}"),
        page.value("ocr_queue_lateness_seconds_count")
    );
    let Watched { vm, condition, .. } = &watched;
    let labels = format!("{{condition=\"{condition}\",machine=\"{vm}\",name=\"is it up\"}}");
    assert_eq!(page.value(&format!("ocr_condition_interval_wanted_seconds{labels}")), 1.0);
    assert_eq!(page.value(&format!("ocr_condition_faults{labels}")), 0.0);
    assert!(page.value(&format!("ocr_machine_busy_seconds{{machine=\"{vm}\"}}")) >= 0.0);
    let odd = r#"name="a \"quoted\\\" one""#;
    assert!(page.values.keys().any(|series| series.contains(odd)), "{:?}", page.values.keys());

    // What is gone leaves the page.
    drop(stream);
    serve.ocr(&["condition", "delete", &odd_id]).await.fine();
    until(SOON, "a page without it", async || {
        let page = serve.metrics().await;
        (!page.values.keys().any(|series| series.contains(&odd_id))).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_metrics_page_is_all_that_its_address_serves() {
    let serve = Serve::start().await;
    for (method, path, status) in
        [("GET", "/", "404"), ("GET", "/metrics/", "404"), ("POST", "/metrics", "405"), ("HEAD", "/metrics", "200")]
    {
        let (head, body) = serve.http(method, path).await;
        assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{method} {path}: {head}");
        assert_eq!(body.is_empty(), method == "HEAD", "{method} {path}: {body}");
    }
    assert!(serve.server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_put_in_order_is_logged_and_counted_and_the_server_serves() {
    let serve = Serve::start_on(async |state: &Path| {
        let store = EmbeddedStore::open(state).unwrap();
        let key = Key::new(format!("exec/install/{NOBODY}")).unwrap();
        store.put(&key, b"of another version"[..].into(), Precondition::Absent, None).await.unwrap();
    })
    .await;
    let page = serve.metrics().await;
    assert_eq!((page.value("ocr_ready"), page.value("ocr_unfinished")), (1.0, 1.0));
    let log = serve.server.log_text();
    let told: Vec<_> = log.lines().filter(|line| line.contains("cannot be put in order now")).collect();
    assert!(told.len() == 1 && told[0].contains("WARN") && told[0].contains(NOBODY), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_a_machine_is_told_while_it_has_it() {
    let serve = Serve::start().await;
    let vm = serve.ocr(&["--json", "vm", "create", "web-0", "-t", "tiny"]).await.json()["id"].clone();
    let vm = vm.as_str().unwrap();
    assert_eq!(serve.ocr(&["queue", "holder", vm]).await.fine(), "free\n");
    let slow = ["--json", "condition", "install", vm, "--command", "sleep 600", "--interval", "1s"];
    let id = serve.ocr(&slow).await.json()["id"].as_str().unwrap().to_owned();
    let mut client = ocr_grpc::client::ConditionServiceClient::new(serve.server.channel().await);
    let _stream = client.stream(ocr_grpc::proto::Identifier { value: id.clone() }).await.unwrap();
    let held = until(SOON, "the machine is held", async || {
        let held = serve.ocr(&["--json", "queue", "holder", vm]).await.json();
        (held["held"] == true).then_some(held)
    })
    .await;
    assert_eq!((&held["machine"], &held["what"]), (&json!(vm), &json!(format!("condition {id}"))));
    assert!(held["held_for_ms"].is_u64());
    let text = serve.ocr(&["queue", "holder", vm]).await.fine();
    assert!(text.starts_with(&format!("condition {id} for ")), "{text}");
    let top = serve.ocr(&["queue", "top", "--once"]).await.fine();
    assert!(top.contains(&format!("condition {id} for ")), "{top}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_live_table_gives_the_terminal_back() {
    let serve = Serve::start().await;
    let watched = serve.watched().await;
    // `script` makes a terminal. It gets a q some time after it has begun, and says last how the terminal was left.
    for end in ["q", "Q", "\u{3}"] {
        let mut script = command("script");
        let line = format!(
            "trap : INT; {OCR} --executor {} queue top --interval 100ms; echo left $?; stty -a",
            serve.server.url()
        );
        script.args(["-qec", &line, "/dev/null"]).env("TERM", "xterm").stdin(Stdio::piped());
        let mut child = match script.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn() {
            Ok(child) => child,
            Err(error) => return say(format!("ignored: script does not run here ({error})")),
        };
        let (mut keys, mut out) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let (send, seen) = std::sync::mpsc::channel();
        let reader = std::thread::spawn(move || {
            let (mut text, mut buffer) = (Vec::new(), [0; 4096]);
            while let Ok(read @ 1..) = out.read(&mut buffer) {
                text.extend_from_slice(&buffer[..read]);
                let _ = send.send(String::from_utf8_lossy(&text).into_owned());
            }
            String::from_utf8_lossy(&text).into_owned()
        });
        while !seen.recv_timeout(SOON).unwrap().contains(&watched.condition) {}
        keys.write_all(end.as_bytes()).unwrap();
        keys.flush().unwrap();
        let text = tokio::task::spawn_blocking(|| reader.join().unwrap());
        let text = soon("the table ends", text).await.unwrap();
        drop(keys);
        child.wait().unwrap();
        let (page, after) = text.split_once("\u{1b}[?1049l").expect("the page is left");
        assert!(page.contains("\u{1b}[?1049h") && page.contains("condition (1 of 1)"), "{page:?}");
        assert!(after.contains("left 0") && after.contains(" icanon") && after.contains(" echo "), "{after:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_command_speaks_to_people() {
    let serve = Serve::start().await;
    assert_eq!(serve.ocr(&["vm", "list"]).await.fine(), "no machines\n");
    let made = serve.ocr(&["vm", "create", "web-0", "-t", "tiny", "-l", "lab", "--deployment", "d"]).await.fine();
    let (vm, rest) = made.split_once(' ').unwrap();
    assert!(rest.contains("web-0 is ready after "), "{made}");

    let listed = serve.ocr(&["vm", "list"]).await.fine();
    let (head, line) = listed.split_once('\n').unwrap();
    assert!(head.starts_with("id  ") && line.starts_with(vm) && line.contains("512 MiB"), "{listed}");
    let shown = serve.ocr(&["vm", "show", vm]).await.fine();
    for line in ["deployment  d\n", "state       running\n", "memory      512 MiB\n", "agent       channel present\n"] {
        assert!(shown.contains(line), "{line:?} in {shown}");
    }
    assert!(shown.lines().any(|line| line.starts_with("nic ")), "{shown}");

    let feature = serve.ocr(&["feature", "install", vm, "web", "-e", "TEAM=red"]).await.fine();
    assert_eq!(feature.lines().skip(1).collect::<Vec<_>>(), ["  stdout: up for red", "  stderr: hm"]);
    let inject = serve.ocr(&["inject", "install", vm, "news"]).await.fine();
    let condition = serve.ocr(&["condition", "install", vm, "alive"]).await.fine();
    let condition = condition.trim();
    let values = serve.ocr(&["condition", "watch", condition, "--count", "2"]).await.fine();
    assert_eq!(values.lines().count(), 2, "{values}");
    assert!(values.lines().all(|line| line.starts_with(&format!("{condition}  0.5  late "))), "{values}");

    for (kind, id) in [("feature", &feature[..36]), ("inject", &inject[..36]), ("condition", condition)] {
        assert_eq!(serve.ocr(&[kind, "delete", id]).await.fine(), format!("{id} is gone\n"));
    }
    assert_eq!(serve.ocr(&["reconcile"]).await.fine(), "nothing to do\n");
    assert_eq!(serve.ocr(&["vm", "delete", vm]).await.fine(), format!("{vm} is gone\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_server_refuses_is_said_with_its_field() {
    let serve = Serve::start().await;
    for (arguments, wanted) in [
        (&["vm", "create", "x", "-t", "absent"][..], "absent"),
        (&["vm", "create", "x", "-t", "tiny", "-l", "absent"], "absent"),
        (&["vm", "create", "x", "-t", "tiny", "--cpu", "0"], "virtualMachine.configuration.cpu: "),
        (&["vm", "create", "", "-t", "tiny"], "virtualMachine.name: "),
        (&["vm", "show", NOBODY], "there is no such machine"),
        (&["feature", "install", NOBODY, "web"], "(NotFound)"),
        (&["feature", "install", NOBODY, "absent"], "absent"),
        (&["feature", "install", NOBODY, "web", "-e", "NO_VALUE"], "environment[0]: "),
        (&["feature", "install", NOBODY, "../web"], "source.name: "),
        (&["condition", "install", NOBODY, "--command", "echo 1", "--interval", "0s"], "interval: "),
        (&["condition", "watch", NOBODY], "(NotFound)"),
        (&["feature", "delete", "no-uuid"], "value: "),
    ] {
        let failure = serve.ocr(arguments).await.failed();
        assert!(failure.starts_with("ocr: ") && failure.contains(wanted), "{arguments:?}: {failure}");
    }
    assert_eq!(serve.ocr(&["--json", "vm", "list"]).await.json(), json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_command_line_itself_refuses_is_a_usage_error() {
    for arguments in [
        &[][..],
        &["vm", "show", "no-uuid"],
        &["vm", "create", "x"],
        &["vm", "create", "x", "-t", "t", "--ram", "much"],
        &["condition", "install", NOBODY],
        &["condition", "install", NOBODY, "package", "--command", "echo 1", "--interval", "1s"],
        &["condition", "install", NOBODY, "--command", "echo 1"],
        &["condition", "watch"],
        &["serve"],
    ] {
        let said = ocr(arguments).await;
        assert_eq!(said.code, Some(2), "{arguments:?}: {said:?}");
        assert!(said.stderr.contains("--help") || said.stderr.contains("Usage: "), "{arguments:?}: {said:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_not_there_is_said_with_its_setting() {
    // A port that was free a moment ago.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let url = format!("http://{free}");
    for (server, option, arguments) in [
        ("Machiner", "--machiner", &["vm", "list"][..]),
        ("Executor", "--executor", &["feature", "delete", NOBODY]),
        ("Executor", "--executor", &["condition", "watch", NOBODY]),
    ] {
        let failure = ocr(&[&[option, &url], arguments].concat()).await.failed();
        let wanted = format!("ocr: the {server} cannot be reached: no server answers at {url}; set its address with ");
        assert!(failure.starts_with(&wanted) && failure.contains(option), "{failure}");
        let failure = ocr(&[&["--json", option, &url], arguments].concat()).await.failed();
        let failure: Value = serde_json::from_str(&failure).unwrap();
        assert!(failure["error"]["message"].as_str().unwrap().contains(&url), "{failure}");
        let failure = ocr(&[&[option, "no url"], arguments].concat()).await.failed();
        assert!(failure.contains("wants a URL such as http://127.0.0.1:9000"), "{failure}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_file_belongs_to_one_process() {
    let serve = Serve::start().await;
    let folder = keeper().new_folder("second");
    let mut second = command(OCR);
    second.args(["serve", "--backend", "memory", "--listen", "127.0.0.1:0", "--packages"]).arg(&folder);
    second.arg("--state").arg(&serve.state);
    let failure = run(SOON, second).await.failed();
    assert!(failure.contains("state.redb"), "{failure}");
    assert_eq!(serve.ocr(&["vm", "list"]).await.fine(), "no machines\n");
}

/// An executor whose records are in that Redis.
fn executor_on(redis: &redis::Server, password: &str) -> Command {
    let mut executor = command(EXECUTOR);
    executor.envs([
        ("GLOBAL_HOST", "127.0.0.1"),
        ("GLOBAL_INSECURE", "false"),
        ("EXECUTOR_PORT", "0"),
        ("BACKEND", "libvirt"),
        ("HYPERVISOR", "test:///default"),
        ("REDIS_HOST", "127.0.0.1"),
        ("REDIS_PORT", &redis.port.to_string()),
        ("REDIS_PASSWORD", password),
        ("REDIS_TIMEOUT", "1"),
    ]);
    executor
}

#[tokio::test(flavor = "multi_thread")]
async fn an_executor_waits_for_its_redis() {
    need_redis!();
    let password = "canary-1b7e";
    let options = redis::Options { password: Some(password.to_owned()), ..redis::Options::default() };
    let mut redis = redis::Server::start(options);
    redis.kill();
    let log = keeper().new_folder("redis").join("log");
    let mut executor = executor_on(&redis, password);
    executor.stderr(std::fs::File::create(&log).unwrap()).stdout(Stdio::null());
    let mut executor = executor.spawn().unwrap();
    keeper().tell("own", executor.id());
    let says = async |text: &str| {
        until(SOON, text, async || std::fs::read_to_string(&log).unwrap().contains(text).then_some(())).await;
    };
    says("the server of the store is away; trying again").await;
    assert!(executor.try_wait().unwrap().is_none(), "it goes on");
    redis.restart();
    // What it has to say of a server that it has reached.
    says("Redis keeps no append-only file").await;
    let _ = executor.kill();
    executor.wait().unwrap();
    let said = std::fs::read_to_string(&log).unwrap();
    assert!(said.contains("REDIS_HOST") && !said.contains("canary"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_password_for_redis_ends_the_executor_with_its_setting() {
    need_redis!();
    let options = redis::Options { password: Some("right-2c".to_owned()), ..redis::Options::default() };
    let redis = redis::Server::start(options);
    let said = run(SOON, executor_on(&redis, "canary-1b7e")).await;
    assert_eq!(said.code, Some(1), "{said:?}");
    assert!(said.stderr.contains("REDIS_PASSWORD") && !said.stderr.contains("canary"), "{said:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_demo_runs_in_memory() {
    let said = ocr(&["demo", "--backend", "memory", "--json"]).await.json();
    let steps: Vec<_> = said["steps"].as_array().unwrap().iter().map(|step| step["step"].as_str().unwrap()).collect();
    assert!(steps.len() >= 12, "{steps:?}");
    assert_eq!(*steps.last().unwrap(), "nothing is left: no machine, no image, no disk");
    assert!(said["seconds"].as_f64().unwrap() > 0.0);
    let said = ocr(&["demo", "--backend", "memory"]).await.fine();
    assert!(said.lines().last().unwrap().ends_with("in all"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_memory_backend_conforms() {
    let listed = ocr(&["conform", "--backend", "memory", "--list", "--json"]).await.json();
    let report = ocr(&["conform", "--backend", "memory", "--guest-user", "user", "--json"]).await.json();
    assert_eq!((&report["failed"], report["passed"].as_u64().unwrap() > 50), (&json!(0), true), "{report}");
    let names = |cases: &Value| cases.as_array().unwrap().iter().map(|case| case["name"].clone()).collect::<Vec<_>>();
    let reported = names(&report["cases"]);
    assert!(names(&listed).iter().all(|name| reported.contains(name)), "{listed} in {report}");
    let few = ocr(&["conform", "--backend", "memory", "--filter", "vm_create_repeat"]).await.fine();
    assert!(few.contains("vm_create_repeat"), "{few}");
}

#[tokio::test(flavor = "multi_thread")]
async fn completions_and_man_pages_come_from_the_definition() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = ocr(&["completions", shell]).await.fine();
        assert!(script.contains("condition") && script.contains("reconcile"), "{shell}");
    }
    let script = ocr(&["completions", "bash"]).await.fine();
    let folder = keeper().new_folder("words");
    std::fs::write(folder.join("ocr.bash"), script).unwrap();
    match Command::new("bash").arg("-c").arg("source ocr.bash && complete -p ocr").current_dir(&folder).output() {
        Ok(output) => assert!(output.status.success(), "{output:?}"),
        Err(error) => say(format!("ignored: bash does not run here ({error}), so its script was not tried")),
    }

    let man = folder.join("new/man");
    ocr(&["man", man.to_str().unwrap()]).await.fine();
    for (page, word) in [("ocr.1", "serve"), ("ocr-vm-create.1", "template"), ("ocr-condition-watch.1", "count")] {
        let text = std::fs::read_to_string(man.join(page)).unwrap();
        assert!(text.contains(word), "{page}");
    }
    std::fs::write(folder.join("file"), "").unwrap();
    let failure = ocr(&["man", folder.join("file").to_str().unwrap()]).await.failed();
    assert!(failure.contains("file: "), "{failure}");
}

// --- the servers' settings ----------------------------------------------------------------------------------------

async fn check(server: &str, env_file: &Path) -> Said {
    let mut server = command(server);
    server.arg("--check-config").arg("--env-file").arg(env_file);
    run(SOON, server).await
}

#[tokio::test(flavor = "multi_thread")]
async fn good_settings_are_shown_without_secrets() {
    let folder = keeper().new_folder("settings");
    let file = folder.join("env");
    let text = "GLOBAL_HOST=127.0.0.1\nGLOBAL_INSECURE=False\nMachiner_PORT=0\nEXECUTOR_PORT=0\nBACKEND=libvirt\n\
        HYPERVISOR_USER=ada\nHYPERVISOR_PASSWORD=canary-1b7e\nREDIS_PASSWORD=canary-1b7e\nREDIS_HOST=r\n";
    std::fs::write(&file, text).unwrap();
    for server in [MACHINER, EXECUTOR] {
        let said = check(server, &file).await;
        assert!(!format!("{said:?}").contains("canary"), "{said:?}");
        let said = said.fine();
        for line in ["GLOBAL_HOST=127.0.0.1", "BACKEND=libvirt", "HYPERVISOR_PASSWORD=(hidden)", "OWNER=ocr"] {
            assert!(said.lines().any(|shown| shown == line), "{line} in {said}");
        }
        // Only one of them keeps its records there without being told to.
        let line = if server == EXECUTOR { "REDIS_PASSWORD=(hidden)" } else { "# REDIS_HOST is set, but " };
        assert!(said.lines().any(|shown| shown.starts_with(line)), "{line} in {said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn all_faults_of_the_settings_are_told_at_once_without_secrets() {
    let folder = keeper().new_folder("settings");
    let file = folder.join("env");
    let text = "GLOBAL_INSECURE=perhaps\nMACHINER_PORT=70000\nEXECUTOR_PORT=http\nBACKEND=vmware\n\
        HYPERVISOR_PASSWORD=canary-1b7e\nCREDENTIAL_SECRET=canary-1b7e\nSTATE_STORE=paper\nLOG_LEVEL=LOUD\n\
        HYPERVISOR_WAIT_TIMEOUT=0\nMAX_CONNECTIONS=none\nOWNER='not one word'\n";
    std::fs::write(&file, text).unwrap();
    for (server, own) in [(MACHINER, &["MACHINER_PORT"][..]), (EXECUTOR, &["EXECUTOR_PORT", "MAX_CONNECTIONS"])] {
        let said = check(server, &file).await;
        assert_eq!((said.code, said.stdout.as_str()), (Some(2), ""), "{said:?}");
        assert!(!said.stderr.contains("canary"), "{said:?}");
        let both = [
            "GLOBAL_HOST",
            "GLOBAL_INSECURE",
            "BACKEND",
            "STATE_STORE",
            "LOG_LEVEL",
            "HYPERVISOR_WAIT_TIMEOUT",
            "OWNER",
        ];
        for name in both.iter().chain(own) {
            let times = said.stderr.lines().filter(|line| line.starts_with(&format!("  {name}: "))).count();
            assert_eq!(times, 1, "{name} in {}", said.stderr);
        }
        assert_eq!(said.stderr.lines().count(), 1 + both.len() + own.len(), "{}", said.stderr);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_env_file_that_cannot_be_used_is_told_without_its_text() {
    let folder = keeper().new_folder("settings");
    let file = folder.join("env");
    std::fs::write(&file, "GLOBAL_HOST=127.0.0.1\ncanary-1b7e\n").unwrap();
    let said = check(MACHINER, &file).await;
    assert_eq!(said.code, Some(2));
    assert!(said.stderr.contains("line 2: wants NAME=value") && !said.stderr.contains("canary"), "{said:?}");
    let said = check(MACHINER, &folder.join("absent")).await;
    assert_eq!(said.code, Some(2));
    assert!(said.stderr.contains("absent"), "{said:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_environment_goes_before_the_file() {
    let folder = keeper().new_folder("settings");
    let file = folder.join("env");
    std::fs::write(&file, "GLOBAL_HOST=127.0.0.1\nGLOBAL_INSECURE=no\nEXECUTOR_PORT=1\nBACKEND=libvirt\n").unwrap();
    let mut server = command(EXECUTOR);
    server.env("EXECUTOR_PORT", "2").arg("--check-config").arg("--env-file").arg(&file);
    let said = run(SOON, server).await.fine();
    assert!(said.lines().any(|line| line == "EXECUTOR_PORT=2"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_program_tells_its_version_and_its_use() {
    for program in [MACHINER, EXECUTOR, OCR] {
        for (option, wanted) in [("--version", env!("CARGO_PKG_VERSION")), ("--help", "Usage: ")] {
            let mut command = command(program);
            command.arg(option);
            let said = run(Duration::from_secs(20), command).await.fine();
            assert!(said.contains(wanted), "{program} {option}: {said}");
        }
    }
}

#[tokio::test]
async fn a_new_key_is_one_that_a_server_takes() {
    let text = ocr(&["key"]).await.stdout;
    let json = ocr(&["--json", "key"]).await.stdout;
    let key: Value = serde_json::from_str(&json).unwrap();
    assert_ne!(text.trim(), key["key"], "two keys must not be the same");
    let file = keeper().new_folder("key").join("keys");
    std::fs::write(&file, format!("# present\n{text}\n# before\n{}\n", key["key"].as_str().unwrap())).unwrap();
    let mut executor = command(EXECUTOR);
    executor.args(["--check-config"]).envs([
        ("GLOBAL_HOST", "127.0.0.1"),
        ("GLOBAL_INSECURE", "false"),
        ("EXECUTOR_PORT", "0"),
        ("BACKEND", "libvirt"),
        ("STATE_KEY_FILE", file.to_str().unwrap()),
    ]);
    let said = run(SOON, executor).await.stdout;
    assert!(said.contains("STATE_KEY_FILE=") && !said.contains(text.trim()), "{said}");
}
