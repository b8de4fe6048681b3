//! `ocr queue`.

use std::{fmt::Write as _, time::Duration};

use futures::StreamExt as _;
use ocr_core::VmId;
use ocr_grpc::{
    client::QueueClient,
    v1::{
        ConditionQueue, HolderRequest, Lateness, MachineQueue, QueueSnapshot, RunningOperation, SnapshotRequest,
        WatchQueueRequest,
    },
};
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};
use tonic::transport::Channel;

use super::{
    args::{Cli, QueueCommand, QueueTop},
    client,
    output::{Failure, Output},
    screen::Screen,
};

/// Lines beside the rows: what the queue does, an empty line and a head for each table.
const OTHER_LINES: usize = 5;

pub(crate) async fn run(cli: &Cli, command: &QueueCommand, output: &Output) -> Result<(), Failure> {
    let channel = client::executor(cli).await?;
    match command {
        QueueCommand::Top(args) => top(channel, args, output).await,
        QueueCommand::Holder { vm } => holder(channel, *vm, output).await,
    }
}

async fn holder(channel: Channel, vm: VmId, output: &Output) -> Result<(), Failure> {
    let request = HolderRequest { virtual_machine_id: vm.to_string() };
    let holder = QueueClient::new(channel).holder(request).await?.into_inner();
    let value = if holder.held {
        json!({ "machine": vm.to_string(), "held": true, "what": holder.what, "held_for_ms": holder.held_for_ms })
    } else {
        json!({ "machine": vm.to_string(), "held": false })
    };
    if holder.held {
        output.result(format_args!("{} for {}", plain(&holder.what), time(holder.held_for_ms * 1000)), &value);
    } else {
        output.result(format_args!("free"), &value);
    }
    Ok(())
}

async fn top(channel: Channel, args: &QueueTop, output: &Output) -> Result<(), Failure> {
    let snapshot =
        SnapshotRequest { top: args.top, virtual_machine_id: args.vm.map(|vm| vm.to_string()).unwrap_or_default() };
    let mut client = QueueClient::new(channel);
    if args.once {
        say(&client.snapshot(snapshot).await?.into_inner(), output);
        return Ok(());
    }
    let interval_ms = u64::try_from(args.interval.as_millis()).unwrap_or(u64::MAX).max(1);
    let request = WatchQueueRequest { snapshot: Some(snapshot), interval_ms };
    let mut snapshots = client
        .watch(request)
        .await?
        .into_inner()
        .take(args.count.map_or(usize::MAX, |count| usize::try_from(count).unwrap_or(usize::MAX)));
    if output.is_json() || !Screen::is_there() {
        while let Some(snapshot) = snapshots.next().await {
            say(&snapshot?, output);
        }
        return Ok(());
    }
    let gone = |error: std::io::Error| Failure::new(format!("the terminal cannot be used: {error}"));
    let (mut interrupt, mut terminate) =
        (signal(SignalKind::interrupt()).map_err(gone)?, signal(SignalKind::terminate()).map_err(gone)?);
    let mut resized = signal(SignalKind::window_change()).map_err(gone)?;
    let mut screen = Screen::take().map_err(gone)?;
    let mut latest = QueueSnapshot::default();
    loop {
        tokio::select! {
            snapshot = snapshots.next() => match snapshot {
                None => return Ok(()),
                Some(snapshot) => latest = snapshot?,
            },
            key = screen.key() => match key {
                // Ctrl-C where it is no signal, and Ctrl-D.
                b'q' | b'Q' | 3 | 4 => return Ok(()),
                _ => continue,
            },
            _ = resized.recv() => {}
            _ = interrupt.recv() => return Ok(()),
            _ = terminate.recv() => return Ok(()),
        }
        let (_, rows) = screen.size();
        screen.show(&page(&latest, rows)).map_err(gone)?;
    }
}

fn say(snapshot: &QueueSnapshot, output: &Output) {
    output.result(format_args!("{}\n", page(snapshot, usize::MAX).join("\n")), &as_json(snapshot));
}

/// The page: a line on the queue, then machines, then conditions. A third of the rows is for machines, where conditions
/// need the rest.
fn page(snapshot: &QueueSnapshot, rows: usize) -> Vec<String> {
    let rows = rows.saturating_sub(OTHER_LINES);
    let (machines, conditions) = (snapshot.machines.len(), snapshot.conditions.len());
    let for_machines = machines.min((rows / 3).max(rows.saturating_sub(conditions)));
    let for_conditions = conditions.min(rows - for_machines);
    let mut lines = vec![summary(snapshot)];
    lines.push(String::new());
    lines.push(format!(
        "{:<36}  {:>6}  {:>8}  {:>8}  {:<9}  busy with",
        format!("machine ({for_machines} of {})", snapshot.machines_total),
        "waits",
        "late p50",
        "late p99",
        ""
    ));
    lines.extend(snapshot.machines.iter().take(for_machines).map(machine_line));
    lines.push(String::new());
    lines.push(format!(
        "{:<36}  {:>8}  {:>8}  {:>8}  {:>8}  {:>8}  {:>7}  {:>7}  {:>8}  {:>8}  {:<36}  name, fault",
        format!("condition ({for_conditions} of {})", snapshot.conditions_total),
        "late now",
        "late p50",
        "late p99",
        "wants",
        "gets",
        "skipped",
        "streams",
        "value",
        "ago",
        "machine",
    ));
    lines.extend(snapshot.conditions.iter().take(for_conditions).map(condition_line));
    lines
}

fn summary(snapshot: &QueueSnapshot) -> String {
    let (p50, p99) = quantiles(snapshot.lateness.as_ref());
    let mut line = format!(
        "waiting {}  running {} of {}  late p50 {p50} p99 {p99}  streams {}",
        snapshot.depth, snapshot.running_total, snapshot.limit, snapshot.streams_total
    );
    if let Some(counters) = &snapshot.counters {
        let started = counters.started_first + counters.started_again;
        let _ = write!(line, "  started {started}  skipped {}", counters.skipped);
        if counters.hung + counters.refused > 0 {
            let _ = write!(line, "  hung {}  refused {}", counters.hung, counters.refused);
        }
    }
    line
}

fn machine_line(machine: &MachineQueue) -> String {
    let (p50, p99) = quantiles(machine.lateness.as_ref());
    let state = match (machine.open, machine.on_probation) {
        (false, _) => "elsewhere",
        (true, true) => "probation",
        (true, false) => "",
    };
    let busy = machine.holder.as_ref().map_or_else(
        || "-".to_owned(),
        |holder| format!("{} for {}", plain(&holder.what), time(holder.running_for_ms.saturating_mul(1000))),
    );
    format!("{:<36}  {:>6}  {p50:>8}  {p99:>8}  {state:<9}  {busy}", plain(&machine.virtual_machine_id), machine.depth)
}

fn condition_line(condition: &ConditionQueue) -> String {
    let (p50, p99) = quantiles(condition.lateness.as_ref());
    let ms = |ms: u64| if ms == 0 { "-".to_owned() } else { time(ms.saturating_mul(1000)) };
    let (value, ago) = match condition.value {
        None => ("-".to_owned(), "-".to_owned()),
        Some(value) => (format!("{value}"), time(condition.value_age_ms.saturating_mul(1000))),
    };
    let fault = match condition.consecutive_faults {
        0 => String::new(),
        times => format!("; {times} times no value: {}", plain(&condition.fault)),
    };
    format!(
        "{:<36}  {:>8}  {p50:>8}  {p99:>8}  {:>8}  {:>8}  {:>7}  {:>7}  {value:>8.8}  {ago:>8}  {:<36}  {}{fault}",
        plain(&condition.id),
        time(condition.late_now_us),
        ms(condition.interval_wanted_ms),
        ms(condition.interval_got_ms),
        condition.skipped,
        condition.watchers,
        plain(&condition.virtual_machine_id),
        plain(&condition.name),
    )
}

fn quantiles(lateness: Option<&Lateness>) -> (String, String) {
    lateness.map_or_else(|| ("-".to_owned(), "-".to_owned()), |late| (time(late.p50_us), time(late.p99_us)))
}

/// A time in at most 8 characters.
fn time(us: u64) -> String {
    let time = Duration::from_micros(us);
    match time.as_secs() {
        0 if us < 10_000 => format!("{:.1} ms", us as f64 / 1000.0),
        0 => format!("{} ms", time.as_millis()),
        seconds @ 1..100 => format!("{seconds}.{} s", time.subsec_millis() / 100),
        seconds @ 100..6000 => format!("{} min", seconds / 60),
        seconds @ 6000..360_000 => format!("{} h", seconds / 3600),
        seconds => format!("{} d", seconds / 86_400),
    }
}

/// Names and faults are other people's text: on a terminal it must not steer anything.
fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

fn as_json(snapshot: &QueueSnapshot) -> Value {
    let late = |lateness: &Option<Lateness>| {
        lateness.as_ref().map(|late| json!({ "p50_us": late.p50_us, "p99_us": late.p99_us }))
    };
    let running = |running: &RunningOperation| json!({ "machine": running.virtual_machine_id, "what": running.what, "running_for_ms": running.running_for_ms });
    let counters = snapshot.counters.unwrap_or_default();
    json!({
        "depth": snapshot.depth,
        "limit": snapshot.limit,
        "running_total": snapshot.running_total,
        "machines_total": snapshot.machines_total,
        "conditions_total": snapshot.conditions_total,
        "streams_total": snapshot.streams_total,
        "lateness": late(&snapshot.lateness),
        "counters": {
            "submitted": counters.submitted,
            "refused": counters.refused,
            "started_first": counters.started_first,
            "started_again": counters.started_again,
            "finished": counters.finished,
            "hung": counters.hung,
            "cancelled": counters.cancelled,
            "skipped": counters.skipped,
        },
        "running": snapshot.running.iter().map(running).collect::<Vec<_>>(),
        "machines": snapshot.machines.iter().map(|machine| json!({
            "machine": machine.virtual_machine_id,
            "depth": machine.depth,
            "operations": machine.operations,
            "holder": machine.holder.as_ref().map(running),
            "on_probation": machine.on_probation,
            "open": machine.open,
            "lateness": late(&machine.lateness),
        })).collect::<Vec<_>>(),
        "conditions": snapshot.conditions.iter().map(|condition| json!({
            "condition": condition.id,
            "name": condition.name,
            "machine": condition.virtual_machine_id,
            "interval_wanted_ms": condition.interval_wanted_ms,
            "interval_got_ms": condition.interval_got_ms,
            "runs": condition.runs,
            "skipped": condition.skipped,
            "lateness": late(&condition.lateness),
            "late_now_us": condition.late_now_us,
            "watchers": condition.watchers,
            "value": condition.value,
            "value_age_ms": condition.value.map(|_| condition.value_age_ms),
            "fault": condition.fault,
            "consecutive_faults": condition.consecutive_faults,
        })).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(machines: usize, conditions: usize) -> QueueSnapshot {
        QueueSnapshot {
            machines: vec![MachineQueue { virtual_machine_id: "m".to_owned(), ..Default::default() }; machines],
            conditions: vec![ConditionQueue { id: "c".to_owned(), ..Default::default() }; conditions],
            machines_total: machines as u64,
            conditions_total: conditions as u64,
            ..Default::default()
        }
    }

    #[test]
    fn a_page_fits_on_its_screen_and_both_tables_have_room() {
        for (machines, conditions) in [(0, 0), (1, 1), (100, 0), (0, 100), (100, 100), (3, 100), (100, 3)] {
            for rows in 0..60 {
                let lines = page(&snapshot(machines, conditions), rows);
                assert!(lines.len() <= rows.max(OTHER_LINES), "{machines} {conditions} {rows}: {}", lines.len());
                if rows >= 20 {
                    let shown = |id: &str| lines.iter().filter(|line| line.starts_with(&format!("{id} "))).count();
                    assert!(shown("m") >= machines.min(5) && shown("c") >= conditions.min(5), "{lines:#?}");
                }
            }
        }
        assert_eq!(page(&snapshot(100, 100), usize::MAX).len(), OTHER_LINES + 200);
    }

    #[test]
    fn other_peoples_text_steers_no_terminal() {
        let condition = ConditionQueue {
            name: "\x1b[2Jname".to_owned(),
            fault: "a\nb\x07".to_owned(),
            consecutive_faults: 2,
            ..Default::default()
        };
        let line = condition_line(&condition);
        assert!(!line.chars().any(char::is_control), "{line:?}");
        assert!(line.contains("2 times no value: a b"), "{line}");
    }

    #[test]
    fn times_are_short() {
        for (us, text) in [
            (0, "0.0 ms"),
            (1_500, "1.5 ms"),
            (250_000, "250 ms"),
            (12_345_678, "12.3 s"),
            (600_000_000, "10 min"),
            (90_000_000_000, "25 h"),
        ] {
            assert_eq!(time(us), text);
        }
        assert!((0..64).all(|bit| bit > 50 || time(1 << bit).len() <= 8));
    }
}
