//! `ocr condition`.

use std::time::{Duration, Instant};

use futures::{StreamExt, stream::SelectAll};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use ocr_core::error::seconds;
use ocr_grpc::{
    client::{ConditionServiceClient, InstallsClient},
    proto::{Condition, Identifier},
    v1,
};
use serde_json::json;
use tonic::{Streaming, transport::Channel};

use super::{
    args::{Cli, ConditionCommand, ConditionInstall, ConditionWatch},
    client,
    install::{account, installed, source},
    output::{Failure, Output},
};

pub(crate) async fn run(cli: &Cli, command: &ConditionCommand, output: &Output) -> Result<(), Failure> {
    let channel = client::executor(cli).await?;
    match command {
        ConditionCommand::Install(args) => {
            let progress = output.progress(format!("installing a condition on {}", args.vm));
            let response = ConditionServiceClient::new(channel).create(condition(args)?).await?;
            progress.finish_and_clear();
            installed(response.into_inner(), output);
            Ok(())
        }
        ConditionCommand::Watch(args) => watch(channel, args, output).await,
        ConditionCommand::Delete { id } => {
            ConditionServiceClient::new(channel).delete(Identifier { value: id.clone() }).await?;
            output.result(format_args!("{id} is gone"), &json!({ "id": id }));
            Ok(())
        }
    }
}

fn condition(args: &ConditionInstall) -> Result<Condition, Failure> {
    let seconds = args.interval.map_or(0, |interval| interval.as_secs());
    if args.interval.is_some_and(|interval| interval.subsec_nanos() != 0) {
        return Err(Failure::new("--interval: wants whole seconds"));
    }
    let interval = i32::try_from(seconds).map_err(|_| Failure::new("--interval: is too long"))?;
    let fallback = args.package.as_deref().map_or("command", |package| package.split('@').next().unwrap_or(package));
    Ok(Condition {
        name: args.name.clone().unwrap_or_else(|| fallback.to_owned()),
        virtual_machine_id: args.vm.to_string(),
        account: Some(account(&args.account)),
        source: args.package.as_deref().map(source),
        command: args.command.clone().unwrap_or_default(),
        interval,
        environment: args.environment.clone(),
    })
}

/// What a watched condition has shown so far.
struct Watched {
    id: String,
    interval: Option<Duration>,
    first: Option<Instant>,
    last: Option<(Instant, f32)>,
    values: u64,
    lateness: Duration,
    line: ProgressBar,
}

impl Watched {
    fn take(&mut self, value: f32, now: Instant) {
        let first = *self.first.get_or_insert(now);
        // Later than the last planned moment before now: what the stream's own grid says, wire included.
        if let Some(interval) = self.interval.filter(|interval| !interval.is_zero()) {
            let since = now.duration_since(first).as_nanos();
            self.lateness = Duration::from_nanos(u64::try_from(since % interval.as_nanos()).unwrap_or(u64::MAX));
            // A value a little before its moment is early, not a whole interval late.
            if self.lateness > interval / 2 {
                self.lateness = Duration::ZERO;
            }
        }
        self.last = Some((now, value));
        self.values += 1;
        self.show();
    }

    fn show(&self) {
        let text = match self.last {
            None => format!("{}  no value yet", self.id),
            Some((at, value)) => format!(
                "{}  value {value}  {:.1} s ago  late {:.3} s  ({} values)",
                self.id,
                at.elapsed().as_secs_f64(),
                self.lateness.as_secs_f64(),
                self.values
            ),
        };
        self.line.set_message(text);
    }
}

async fn watch(channel: Channel, args: &ConditionWatch, output: &Output) -> Result<(), Failure> {
    let intervals = InstallsClient::new(channel.clone()).list(v1::ListInstallsRequest::default()).await?.into_inner();
    let lines = MultiProgress::new();
    let (mut watched, mut streams) = (Vec::new(), SelectAll::new());
    for (place, id) in args.ids.iter().enumerate() {
        let stream: Streaming<_> =
            ConditionServiceClient::new(channel.clone()).stream(Identifier { value: id.clone() }).await?.into_inner();
        streams.push(stream.map(move |item| (place, item)).boxed());
        let interval = intervals.installs.iter().find(|install| install.id == *id);
        let line = if output.is_json() { ProgressBar::hidden() } else { lines.add(ProgressBar::new_spinner()) };
        if let Ok(style) = ProgressStyle::with_template("{msg}") {
            line.set_style(style);
        }
        watched.push(Watched {
            id: id.clone(),
            interval: interval.map(|install| Duration::from_millis(install.interval_ms)),
            first: None,
            last: None,
            values: 0,
            lateness: Duration::ZERO,
            line,
        });
    }
    // Nobody looks at moving lines where there is no terminal.
    let plain = lines.is_hidden();
    let mut tick = tokio::time::interval(Duration::from_millis(200));
    loop {
        tokio::select! {
            _ = tick.tick() => watched.iter().for_each(Watched::show),
            item = streams.next() => match item {
                None => return Ok(()),
                Some((place, Err(status))) => {
                    let one = &watched[place];
                    one.line.abandon_with_message(format!("{}  ended: {}", one.id, status.message()));
                    return Err(status.into());
                }
                Some((place, Ok(item))) => {
                    let one = &mut watched[place];
                    one.take(item.command_return_value, Instant::now());
                    if output.is_json() || plain {
                        output.result(
                            format_args!("{}  {}  late {}", one.id, item.command_return_value, seconds(one.lateness)),
                            &json!({
                                "condition": one.id,
                                "value": item.command_return_value,
                                "lateness_ms": one.lateness.as_millis() as u64,
                            }),
                        );
                    }
                }
            },
        }
        if args.count.is_some_and(|count| watched.iter().all(|one| one.values >= count)) {
            return Ok(());
        }
    }
}
