//! The same work on queues that others use, see `benches/peers/README.md`: CPU time per operation of client and broker
//! together, against ours in the same run. They persist each job in Redis; ours keeps its queue in memory.

use std::{
    env, fs,
    io::{Error, Result},
    net::{Ipv4Addr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread::sleep,
    time::{Duration, Instant},
};

use futures::FutureExt;
use ocr_benches::{cpu_time, figure, median, remark};
use ocr_core::{
    VmId,
    queue::{Scheduler, SchedulerConfig},
};
use tokio::runtime::Builder;
use uuid::Uuid;

const VMS: usize = 100;
const PER_VM: usize = 10;
const SLOTS: usize = 64;
const OP_MS: [u64; 2] = [0, 5];
/// A peer takes minutes for what ours does in a second.
const WARM_UP: u64 = 1000;
const MEASURED: u64 = 3000;
const DEADLINE: Duration = Duration::from_secs(300);

struct Peer {
    name: &'static str,
    /// Installs it into a folder.
    install: fn(&Path, &Path) -> Result<()>,
    /// Its client.
    client: fn(&Path, &Path) -> Command,
}

const PEERS: [Peer; 3] = [
    Peer { name: "bullmq", install: install_bullmq, client: bullmq },
    Peer { name: "apalis", install: install_apalis, client: apalis },
    Peer { name: "celery", install: install_celery, client: celery },
];

fn main() {
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| here.join("../target"), PathBuf::from);
    remark("they persist each job in their broker, ours does not; CPU time of client and broker together");
    let ours = OP_MS.map(|op_ms| median((0..3).map(|_| ours_us(op_ms)).collect()));
    for (op_ms, us) in OP_MS.into_iter().zip(ours) {
        figure(&format!("queue.peers.cpu_us_per_op.ours.{op_ms}ms"), us, "us");
    }
    let mut best = f64::INFINITY;
    for Peer { name, install, client } in PEERS {
        let (source, folder) = (here.join("peers").join(name), target.join("peers").join(name));
        if let Err(error) = fs::create_dir_all(&folder).and_then(|()| install(&source, &folder)) {
            remark(format_args!("skipped {name}: {error}"));
            continue;
        }
        for (op_ms, ours_us) in OP_MS.into_iter().zip(ours) {
            match peer_us(client(&source, &folder), op_ms) {
                Ok(us) => {
                    figure(&format!("queue.peers.cpu_us_per_op.{name}.{op_ms}ms"), us, "us");
                    figure(&format!("queue.peers.{name}.{op_ms}ms"), us / ours_us, "x");
                    if op_ms == 0 {
                        best = best.min(us / ours_us);
                    }
                }
                Err(error) => remark(format_args!("skipped {name} with {op_ms} ms: {error}")),
            }
        }
    }
    if best.is_finite() {
        remark("the best of them at 0 ms, over ours");
        figure("queue.peers", best, "x");
    }
}

/// Ours: CPU microseconds per operation.
fn ours_us(op_ms: u64) -> f64 {
    let measured: u64 = if op_ms == 0 { 400_000 } else { 20_000 };
    let runtime = match Builder::new_current_thread().enable_time().build() {
        Ok(runtime) => runtime,
        Err(error) => panic!("no runtime: {error}"),
    };
    runtime.block_on(async {
        let scheduler = Scheduler::start(SchedulerConfig { max_connections: SLOTS, ..SchedulerConfig::default() });
        let done = Arc::new(AtomicU64::new(0));
        for number in 0..VMS * PER_VM {
            let (scheduler, done) = (scheduler.clone(), Arc::clone(&done));
            let vm = VmId::from_uuid(Uuid::from_u128((number % VMS) as u128));
            tokio::spawn(async move {
                let op = || async move {
                    match op_ms {
                        0 => tokio::task::yield_now().await,
                        _ => tokio::time::sleep(Duration::from_millis(op_ms)).await,
                    }
                    Ok(())
                };
                while scheduler.run_once(vm, "op", DEADLINE, op().boxed()).await.is_ok() {
                    done.fetch_add(1, Relaxed);
                }
            });
        }
        let wait_for = async |count: u64| {
            while done.load(Relaxed) < count {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            (cpu_time(), done.load(Relaxed))
        };
        let begun = wait_for(WARM_UP).await;
        let ended = wait_for(WARM_UP + measured).await;
        scheduler.shutdown(Duration::from_secs(1)).await;
        (ended.0 - begun.0).as_nanos() as f64 / 1000.0 / (ended.1 - begun.1) as f64
    })
}

/// A peer's client on a Redis of its own: CPU microseconds per operation.
fn peer_us(mut client: Command, op_ms: u64) -> Result<f64> {
    let redis = Redis::start()?;
    client.env("REDIS_URL", format!("redis://127.0.0.1:{}/0", redis.port)).env("OP_MS", op_ms.to_string());
    client.env("WARM_UP", WARM_UP.to_string()).env("MEASURED", MEASURED.to_string());
    let output = output(client)?;
    let numbers: Vec<f64> = output.split_whitespace().filter_map(|number| number.parse().ok()).collect();
    let [ops, client_s, broker_s] = numbers[..] else { return Err(Error::other("its client printed no figures")) };
    Ok((client_s + broker_s) * 1e6 / ops)
}

/// A Redis in a temporary folder, on a port that was free. It ends with this.
struct Redis {
    server: Child,
    folder: PathBuf,
    port: u16,
}

impl Redis {
    fn start() -> Result<Self> {
        let folder = env::temp_dir().join(format!("ocr-peers-{}", Uuid::new_v4()));
        fs::create_dir(&folder)?;
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
        let mut server = Command::new("redis-server");
        server.args(["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--port", &port.to_string(), "--dir"]);
        server.arg(&folder).stdout(Stdio::null()).stderr(Stdio::null());
        let server = server.spawn().map_err(|error| Error::other(format!("redis-server: {error}")))?;
        let mut redis = Self { server, folder, port };
        let begun = Instant::now();
        while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
            if redis.server.try_wait()?.is_some() || begun.elapsed() > Duration::from_secs(30) {
                return Err(Error::other("redis-server does not answer"));
            }
            sleep(Duration::from_millis(20));
        }
        Ok(redis)
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn install_bullmq(source: &Path, folder: &Path) -> Result<()> {
    for file in ["package.json", "bench.mjs"] {
        fs::copy(source.join(file), folder.join(file))?;
    }
    let mut npm = Command::new("npm");
    npm.args(["install", "--no-package-lock", "--no-audit", "--no-fund", "--ignore-scripts"]).current_dir(folder);
    output(npm).map(drop)
}

fn bullmq(_: &Path, folder: &Path) -> Command {
    let mut node = Command::new("node");
    node.arg(folder.join("bench.mjs"));
    node
}

fn install_apalis(source: &Path, folder: &Path) -> Result<()> {
    let mut cargo = Command::new("cargo");
    cargo
        .args(["build", "--release", "--manifest-path"])
        .arg(source.join("Cargo.toml"))
        .arg("--target-dir")
        .arg(folder);
    output(cargo).map(drop)
}

fn apalis(_: &Path, folder: &Path) -> Command {
    Command::new(folder.join("release/ocr-bench-apalis"))
}

fn install_celery(source: &Path, folder: &Path) -> Result<()> {
    let mut venv = Command::new("python3");
    venv.args(["-m", "venv"]).arg(folder);
    output(venv)?;
    let mut pip = Command::new(folder.join("bin/pip"));
    pip.args(["install", "--quiet", "--disable-pip-version-check", "-r"]).arg(source.join("requirements.txt"));
    output(pip).map(drop)
}

fn celery(source: &Path, folder: &Path) -> Command {
    let mut python = Command::new(folder.join("bin/python"));
    python.arg(source.join("bench.py")).env("PYTHONDONTWRITEBYTECODE", "1");
    python
}

/// What a program prints. Its failure says what it said.
fn output(mut command: Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let fault = |error: &dyn std::fmt::Display| Error::other(format!("{program}: {error}"));
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().map_err(|error| fault(&error))?;
    let begun = Instant::now();
    while child.try_wait()?.is_none() {
        if begun.elapsed() > 2 * DEADLINE {
            child.kill()?;
            child.wait()?;
            return Err(fault(&"it took too long"));
        }
        sleep(Duration::from_millis(50));
    }
    let output = child.wait_with_output()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(fault(&said.lines().last().unwrap_or("it failed")));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
