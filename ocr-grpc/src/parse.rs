//! From the wire's words to the core's types: each request is parsed once, here, and trusted from there on.
//!
//! All functions are pure. Their errors are `Invalid` and name the field as the schema spells it, with its path
//! (`virtualMachine.configuration.cpu`). No error repeats a password, a key, a command or the value of a variable.

use std::{collections::BTreeMap, fmt, net::IpAddr, time::Duration};

use ocr_core::{
    DocumentId, Error, InstallId, Name, Result, Scope, VmId,
    compute::VmSpec,
    exec::{Account, ConditionRequest, InstallKind, InstallRequest, PackageRef, Probe},
    guest::{check_user_name, check_variable_name},
    id::shown,
    lifecycle::CreateRequest,
    package::PackageKind,
};
use secrecy::SecretString;

use crate::proto;

/// More virtual cpus than this are surely a mistake. The backend's own limit is checked by the core.
pub const MAX_CPUS: u32 = 1024;
/// More memory than this is surely a mistake (64 TiB), in bytes. The backend's own limit is checked by the core.
pub const MAX_RAM_BYTES: u64 = 64 << 40;
/// The longest name of a feature, inject or condition, of a template or of a link, in bytes.
pub const MAX_NAME_BYTES: usize = 255;
/// The longest name of a package, in bytes.
pub const MAX_PACKAGE_NAME_BYTES: usize = 128;
/// The longest version requirement, in bytes.
pub const MAX_REQUIREMENT_BYTES: usize = 256;
/// The most entries in an environment.
pub const MAX_ENVIRONMENT: usize = 256;
/// The longest value of a variable, in bytes.
pub const MAX_VALUE_BYTES: usize = 32 << 10;
/// The longest command of a condition, in bytes.
pub const MAX_COMMAND_BYTES: usize = 32 << 10;
/// The longest password, in bytes.
pub const MAX_PASSWORD_BYTES: usize = 1 << 10;
/// The longest private key, in bytes.
pub const MAX_PRIVATE_KEY_BYTES: usize = 64 << 10;
/// The longest interval of a condition: a week.
pub const MAX_INTERVAL: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// The label of [`CreateRequest::labels`] that keeps `metaInfo.properties.cidr`.
pub const LABEL_CIDR: &str = "cidr";
/// The label of [`CreateRequest::labels`] that keeps `metaInfo.properties.gateway`.
pub const LABEL_GATEWAY: &str = "gateway";

/// Parses `VirtualMachineService.create`.
///
/// # Errors
/// `Invalid` naming the first field at fault.
pub fn create_vm(request: proto::DeployVirtualMachine) -> Result<CreateRequest> {
    let vm = required("virtualMachine", request.virtual_machine, "the machine to make")?;
    let configuration = required("virtualMachine.configuration", vm.configuration, "the machine's cpu and ram")?;
    let name = at("virtualMachine.name", Name::new(vm.name))?;
    let cpus = configuration.cpu;
    if !(1..=MAX_CPUS).contains(&cpus) {
        return Err(Error::invalid(
            "virtualMachine.configuration.cpu",
            format_args!("wants 1 to {MAX_CPUS} virtual cpus, got {cpus}"),
        ));
    }
    let ram_bytes = configuration.ram;
    if !(VmSpec::MIN_RAM_BYTES..=MAX_RAM_BYTES).contains(&ram_bytes) {
        return Err(Error::invalid(
            "virtualMachine.configuration.ram",
            format_args!("wants {} to {MAX_RAM_BYTES} bytes of memory, got {ram_bytes}", VmSpec::MIN_RAM_BYTES),
        ));
    }
    let template = name_text("virtualMachine.templateId", vm.template_id)?;
    if vm.links.len() > VmSpec::MAX_LINKS {
        return Err(Error::invalid(
            "virtualMachine.links",
            format_args!("at most {} networks for one machine, got {}", VmSpec::MAX_LINKS, vm.links.len()),
        ));
    }
    let links = vm.links.into_iter().enumerate();
    let links = links.map(|(i, link)| name_text(&format!("virtualMachine.links[{i}]"), link)).collect::<Result<_>>()?;
    let (scope, labels) = meta_info(request.meta_info.unwrap_or_default())?;
    Ok(CreateRequest { scope, name, cpus, ram_bytes, template, links, labels })
}

/// Parses the id of `VirtualMachineService.delete`.
///
/// # Errors
/// `Invalid` when it is no UUID.
pub fn vm_id(request: &proto::Identifier) -> Result<VmId> {
    at("value", request.value.parse())
}

/// Parses the id of a feature, an inject or a condition.
///
/// # Errors
/// `Invalid` when it is no UUID.
pub fn install_id(request: &proto::Identifier) -> Result<InstallId> {
    at("value", request.value.parse())
}

/// Parses `FeatureService.create`.
///
/// # Errors
/// `Invalid` naming the first field at fault.
pub fn feature(request: proto::Feature) -> Result<InstallRequest> {
    if proto::FeatureType::try_from(request.feature_type).is_err() {
        return Err(Error::invalid(
            "featureType",
            format_args!("wants 0 (service), 1 (configuration) or 2 (artifact), got {}", request.feature_type),
        ));
    }
    install(
        InstallKind::Feature,
        request.name,
        &request.virtual_machine_id,
        request.source,
        request.account,
        &request.environment,
    )
}

/// Parses `InjectService.create`. Entities are Ranger's concern and are not looked at.
///
/// # Errors
/// `Invalid` naming the first field at fault.
pub fn inject(request: proto::Inject) -> Result<InstallRequest> {
    install(
        InstallKind::Inject,
        request.name,
        &request.virtual_machine_id,
        request.source,
        request.account,
        &request.environment,
    )
}

fn install(
    kind: InstallKind,
    name: String,
    vm: &str,
    source: Option<proto::Source>,
    account: Option<proto::Account>,
    environment: &[String],
) -> Result<InstallRequest> {
    Ok(InstallRequest {
        kind,
        name: name_text("name", name)?,
        vm: at("virtual_machine_id", vm.parse())?,
        package: package(required("source", source, "the package to install")?)?,
        account: parse_account(account)?,
        environment: parse_environment(environment)?,
    })
}

/// Parses `ConditionService.create`: either a package, whose manifest has the interval, or a command and an interval.
///
/// # Errors
/// `Invalid` naming the first field at fault.
pub fn condition(request: proto::Condition) -> Result<ConditionRequest> {
    let name = name_text("name", request.name)?;
    let vm = at("virtual_machine_id", request.virtual_machine_id.parse())?;
    // Some clients cannot leave a message out; one without content says nothing.
    let source = request.source.filter(|source| *source != proto::Source::default());
    let probe = match (source, request.command) {
        (Some(_), command) if !command.is_empty() => {
            return Err(Error::invalid(
                "command",
                "must be empty when there is a source; a condition runs one of the two",
            ));
        }
        (Some(source), _) => Probe::Package(package(source)?),
        (None, line) if line.trim().is_empty() => {
            return Err(Error::invalid("source", "wants a package, or a command and an interval instead"));
        }
        (None, line) => {
            at_most("command", &line, MAX_COMMAND_BYTES)?;
            no_nul("command", &line)?;
            Probe::Command { line, interval: interval(request.interval)? }
        }
    };
    let account = parse_account(request.account)?;
    let environment = parse_environment(&request.environment)?;
    Ok(ConditionRequest { name, vm, account, probe, environment })
}

fn interval(seconds: i32) -> Result<Duration> {
    let interval = u64::try_from(seconds).map(Duration::from_secs).unwrap_or_default();
    if interval.is_zero() || interval > MAX_INTERVAL {
        let max = MAX_INTERVAL.as_secs();
        return Err(Error::invalid("interval", format_args!("wants 1 to {max} seconds with a command, got {seconds}")));
    }
    Ok(interval)
}

/// Parses the package that `DeputyQueryService` is asked about.
///
/// # Errors
/// `Invalid` naming the field at fault.
pub fn source(source: proto::Source) -> Result<PackageRef> {
    package(source)
}

/// Parses the type of `DeputyQueryService.GetPackagesByType`; empty is all of them.
///
/// # Errors
/// `Invalid` when there is no such type.
pub fn package_kind(request: &proto::GetPackagesQuery) -> Result<Option<PackageKind>> {
    match request.package_type.as_str() {
        "" => Ok(None),
        text => at("package_type", text.parse()).map(Some),
    }
}

/// Parses the id of a page of `DeputyQueryService`.
///
/// # Errors
/// `Invalid` when it is no UUID.
pub fn document_id(request: &proto::Identifier) -> Result<DocumentId> {
    at("value", request.value.parse())
}

fn package(source: proto::Source) -> Result<PackageRef> {
    let proto::Source { name, version } = source;
    filled("source.name", &name, MAX_PACKAGE_NAME_BYTES)?;
    // The registry's rule. It also keeps names from being paths.
    if let Some(bad) = name.chars().find(|&c| !(c.is_ascii_alphanumeric() || matches!(c, '-' | '_'))) {
        return Err(Error::invalid(
            "source.name",
            format_args!("wants ASCII letters, digits, - and _, must not contain {bad:?}"),
        ));
    }
    at_most("source.version", &version, MAX_REQUIREMENT_BYTES)?;
    no_control("source.version", &version)?;
    Ok(PackageRef { name, version })
}

/// No account at all is the guest agent's own, like an empty one.
fn parse_account(account: Option<proto::Account>) -> Result<Account> {
    let proto::Account { username, password, private_key } = account.unwrap_or_default();
    if !username.is_empty() {
        at("account.username", check_user_name(&username))?;
    }
    at_most("account.password", &password, MAX_PASSWORD_BYTES)?;
    no_nul("account.password", &password)?;
    at_most("account.private_key", &private_key, MAX_PRIVATE_KEY_BYTES)?;
    no_nul("account.private_key", &private_key)?;
    Ok(Account { username, password: SecretString::from(password), private_key: SecretString::from(private_key) })
}

/// `NAME=value` each; the last of a name wins.
fn parse_environment(entries: &[String]) -> Result<BTreeMap<String, String>> {
    if entries.len() > MAX_ENVIRONMENT {
        return Err(Error::invalid(
            "environment",
            format_args!("at most {MAX_ENVIRONMENT} variables, got {}", entries.len()),
        ));
    }
    let mut environment = BTreeMap::new();
    for (i, entry) in entries.iter().enumerate() {
        let field = format!("environment[{i}]");
        // The entry is not repeated: it may be a value whose name went astray.
        let (name, value) =
            entry.split_once('=').ok_or_else(|| Error::invalid(&field, "wants NAME=value, got no '='"))?;
        at(&field, check_variable_name(name))?;
        at_most(&field, value, MAX_VALUE_BYTES)?;
        no_nul(&field, value)?;
        environment.insert(name.to_owned(), value.to_owned());
    }
    Ok(environment)
}

/// Parses a machine's id in a field of `ocr.v1`.
pub(crate) fn vm_id_in(field: &str, text: &str) -> Result<VmId> {
    at(field, text.parse())
}

/// Parses the exercise and deployment in two fields.
pub(crate) fn scope_in(fields: [&str; 2], exercise: String, deployment: String) -> Result<Scope> {
    // One at a time, so that the field at fault is named as the schema has it.
    at(fields[0], Scope::new(exercise.as_str(), ""))?;
    at(fields[1], Scope::new(exercise, deployment))
}

fn meta_info(info: proto::MetaInfo) -> Result<(Scope, BTreeMap<String, String>)> {
    let fields = ["metaInfo.exerciseName", "metaInfo.deploymentName"];
    let scope = scope_in(fields, info.exercise_name, info.deployment_name)?;
    let proto::Properties { cidr, gateway } = info.properties.unwrap_or_default();
    let mut labels = BTreeMap::new();
    if !cidr.is_empty() {
        labels.insert(LABEL_CIDR.to_owned(), parse_cidr(&cidr)?);
    }
    if !gateway.is_empty() {
        let address = gateway.parse::<IpAddr>().map_err(|_| {
            let wanted = format_args!("wants an address such as 10.0.0.1, got {}", shown(&gateway)).to_string();
            Error::invalid("metaInfo.properties.gateway", wanted)
        })?;
        labels.insert(LABEL_GATEWAY.to_owned(), address.to_string());
    }
    Ok((scope, labels))
}

/// `address` or `address/prefix`, in its usual spelling.
fn parse_cidr(text: &str) -> Result<String> {
    let parse = || {
        let Some((address, prefix)) = text.split_once('/') else {
            return text.parse::<IpAddr>().ok().map(|address| address.to_string());
        };
        let address = address.parse::<IpAddr>().ok()?;
        let max = if address.is_ipv4() { 32 } else { 128 };
        let plain = !prefix.is_empty() && prefix.bytes().all(|b| b.is_ascii_digit());
        let prefix = prefix.parse::<u8>().ok().filter(|&prefix| plain && prefix <= max)?;
        Some(format!("{address}/{prefix}"))
    };
    parse().ok_or_else(|| {
        let wanted = format_args!("wants an address such as 10.0.0.5 or 10.0.0.5/24, got {}", shown(text)).to_string();
        Error::invalid("metaInfo.properties.cidr", wanted)
    })
}

fn required<T>(field: &str, value: Option<T>, what: &str) -> Result<T> {
    value.ok_or_else(|| Error::invalid(field, format_args!("is missing; it wants {what}")))
}

/// The core's error, with the field as the schema spells it.
fn at<T>(field: &str, result: Result<T>) -> Result<T> {
    result.map_err(|error| {
        let message = error.message();
        Error::invalid(field, message.split_once(": ").map_or(message, |(_, wanted)| wanted))
    })
}

/// A name that the core looks up or keeps for people: any text of sensible length without control characters.
fn name_text(field: &str, text: String) -> Result<String> {
    filled(field, &text, MAX_NAME_BYTES)?;
    no_control(field, &text)?;
    Ok(text)
}

fn filled(field: &str, text: &str, max_bytes: usize) -> Result<()> {
    if text.trim().is_empty() {
        return Err(Error::invalid(field, "must not be empty"));
    }
    at_most(field, text, max_bytes)
}

fn at_most(field: &str, text: &str, max_bytes: usize) -> Result<()> {
    refuse_if(text.len() > max_bytes, field, format_args!("must be at most {max_bytes} bytes long, got {}", text.len()))
}

fn no_control(field: &str, text: &str) -> Result<()> {
    refuse_if(text.contains(char::is_control), field, format_args!("must not contain control characters"))
}

fn no_nul(field: &str, text: &str) -> Result<()> {
    refuse_if(text.contains('\0'), field, format_args!("must not contain a NUL byte"))
}

fn refuse_if(bad: bool, field: &str, wanted: fmt::Arguments<'_>) -> Result<()> {
    if bad { Err(Error::invalid(field, wanted)) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use ocr_core::ErrorKind;
    use proptest::prelude::*;
    use secrecy::ExposeSecret as _;

    use super::*;

    const UUID: &str = "6f1c9f0e-3d0b-4d3c-9f6e-0a7b5c2d1e4f";
    const CANARY: &str = "s3cr3t-canary";

    fn deploy() -> proto::DeployVirtualMachine {
        proto::DeployVirtualMachine {
            virtual_machine: Some(proto::VirtualMachine {
                name: "web-0".into(),
                configuration: Some(proto::Configuration { cpu: 2, ram: 2 << 30 }),
                template_id: UUID.into(),
                links: vec!["lan".into(), UUID.into()],
            }),
            meta_info: Some(proto::MetaInfo {
                exercise_name: "spring".into(),
                deployment_name: "blue 1".into(),
                properties: Some(proto::Properties { cidr: "10.0.0.5/24".into(), gateway: "10.0.0.1".into() }),
            }),
        }
    }

    fn account() -> Option<proto::Account> {
        Some(proto::Account { username: "admin".into(), password: CANARY.into(), private_key: CANARY.into() })
    }

    fn source() -> Option<proto::Source> {
        Some(proto::Source { name: "nginx".into(), version: "^1.2".into() })
    }

    fn a_feature() -> proto::Feature {
        proto::Feature {
            name: "web server".into(),
            virtual_machine_id: UUID.into(),
            feature_type: 1,
            source: source(),
            account: account(),
            environment: vec!["A=1".into(), "B=x=y".into(), "A=2".into(), "EMPTY=".into()],
        }
    }

    fn by_command() -> proto::Condition {
        proto::Condition {
            name: "up".into(),
            virtual_machine_id: UUID.into(),
            account: account(),
            command: "echo 1".into(),
            interval: 5,
            ..Default::default()
        }
    }

    fn by_package() -> proto::Condition {
        proto::Condition { source: source(), command: String::new(), interval: 0, ..by_command() }
    }

    /// The field and the text of the refusal.
    fn refusal<T: fmt::Debug>(result: Result<T>) -> (String, String) {
        let error = result.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        assert!(!error.to_string().contains(CANARY), "{error}");
        let (field, wanted) = error.message().split_once(": ").expect("a field");
        (field.to_owned(), wanted.to_owned())
    }

    #[test]
    fn a_machine_is_read_whole() {
        let labels = [("cidr", "10.0.0.5/24"), ("gateway", "10.0.0.1")];
        assert_eq!(
            create_vm(deploy()).unwrap(),
            CreateRequest {
                scope: Scope::new("spring", "blue 1").unwrap(),
                name: Name::new("web-0").unwrap(),
                cpus: 2,
                ram_bytes: 2 << 30,
                template: UUID.into(),
                links: vec!["lan".into(), UUID.into()],
                labels: labels.map(|(k, v)| (k.to_owned(), v.to_owned())).into(),
            }
        );
    }

    #[test]
    fn what_older_clients_leave_out_of_a_machine_may_be_missing() {
        let mut request = deploy();
        request.meta_info.as_mut().unwrap().properties = None;
        request.virtual_machine.as_mut().unwrap().links.clear();
        assert!(create_vm(request.clone()).unwrap().labels.is_empty());
        request.meta_info = None;
        assert_eq!(create_vm(request).unwrap().scope, Scope::default());
    }

    #[test]
    fn each_fault_of_a_machine_names_its_field() {
        type Spoil = fn(&mut proto::DeployVirtualMachine);
        fn vm(request: &mut proto::DeployVirtualMachine) -> &mut proto::VirtualMachine {
            request.virtual_machine.as_mut().unwrap()
        }
        fn size(request: &mut proto::DeployVirtualMachine) -> &mut proto::Configuration {
            vm(request).configuration.as_mut().unwrap()
        }
        fn info(request: &mut proto::DeployVirtualMachine) -> &mut proto::MetaInfo {
            request.meta_info.as_mut().unwrap()
        }
        fn properties(request: &mut proto::DeployVirtualMachine) -> &mut proto::Properties {
            info(request).properties.as_mut().unwrap()
        }
        let faults: &[(&str, &str, Spoil)] = &[
            ("virtualMachine", "is missing", |r| r.virtual_machine = None),
            ("virtualMachine.configuration", "is missing", |r| vm(r).configuration = None),
            ("virtualMachine.name", "must not be empty", |r| vm(r).name.clear()),
            ("virtualMachine.name", "at most 80 bytes", |r| vm(r).name = "x".repeat(81)),
            ("virtualMachine.name", "must not contain '/'", |r| vm(r).name = "../etc".replace('.', "a")),
            ("virtualMachine.configuration.cpu", "got 0", |r| size(r).cpu = 0),
            ("virtualMachine.configuration.cpu", "got 4294967295", |r| size(r).cpu = u32::MAX),
            ("virtualMachine.configuration.ram", "got 0", |r| size(r).ram = 0),
            ("virtualMachine.configuration.ram", "bytes of memory, got 2048", |r| size(r).ram = 2048),
            ("virtualMachine.configuration.ram", "got 18446744073709551615", |r| size(r).ram = u64::MAX),
            ("virtualMachine.templateId", "must not be empty", |r| vm(r).template_id.clear()),
            ("virtualMachine.templateId", "must not be empty", |r| vm(r).template_id = " ".into()),
            ("virtualMachine.templateId", "at most 255 bytes", |r| vm(r).template_id = "x".repeat(256)),
            ("virtualMachine.templateId", "control characters", |r| vm(r).template_id = "a\0b".into()),
            ("virtualMachine.links", "at most 32", |r| vm(r).links = vec!["lan".into(); 33]),
            ("virtualMachine.links[1]", "must not be empty", |r| vm(r).links[1].clear()),
            ("metaInfo.exerciseName", "at most 64 bytes", |r| info(r).exercise_name = "x".repeat(65)),
            ("metaInfo.exerciseName", "must not contain", |r| info(r).exercise_name = "a/b".into()),
            ("metaInfo.deploymentName", "at most 64 bytes", |r| info(r).deployment_name = "x".repeat(65)),
            ("metaInfo.properties.cidr", "wants an address", |r| properties(r).cidr = "10.0.0.5/33".into()),
            ("metaInfo.properties.cidr", "wants an address", |r| properties(r).cidr = "10.0.0.5/+1".into()),
            ("metaInfo.properties.cidr", "wants an address", |r| properties(r).cidr = "everything".into()),
            ("metaInfo.properties.gateway", "wants an address", |r| properties(r).gateway = "10.0.0.1/24".into()),
        ];
        for (field, wanted, spoil) in faults {
            let mut request = deploy();
            spoil(&mut request);
            let (got_field, got_wanted) = refusal(create_vm(request));
            assert_eq!(got_field, *field);
            assert!(got_wanted.contains(wanted), "{field}: {got_wanted}");
        }
    }

    #[test]
    fn a_feature_is_read_whole_and_the_last_of_a_variable_wins() {
        let request = feature(a_feature()).unwrap();
        assert_eq!(request.kind, InstallKind::Feature);
        assert_eq!(request.vm.to_string(), UUID);
        assert_eq!(request.package, PackageRef { name: "nginx".into(), version: "^1.2".into() });
        assert_eq!(request.account.username, "admin");
        assert_eq!(request.account.password.expose_secret(), CANARY);
        let environment = [("A", "2"), ("B", "x=y"), ("EMPTY", "")];
        assert_eq!(request.environment, environment.map(|(k, v)| (k.to_owned(), v.to_owned())).into());
    }

    #[test]
    fn an_inject_is_read_as_an_inject() {
        let request = proto::Inject {
            name: "attack".into(),
            virtual_machine_id: UUID.into(),
            source: source(),
            account: None,
            to_entities: vec!["blue".into()],
            environment: vec![],
        };
        let request = inject(request).unwrap();
        assert_eq!((request.kind, request.account.username.as_str()), (InstallKind::Inject, ""));
    }

    #[test]
    fn each_fault_of_a_feature_names_its_field() {
        type Spoil = fn(&mut proto::Feature);
        fn account(request: &mut proto::Feature) -> &mut proto::Account {
            request.account.as_mut().unwrap()
        }
        fn source(request: &mut proto::Feature) -> &mut proto::Source {
            request.source.as_mut().unwrap()
        }
        let faults: &[(&str, &str, Spoil)] = &[
            ("name", "must not be empty", |r| r.name.clear()),
            ("name", "at most 255 bytes", |r| r.name = "x".repeat(256)),
            ("name", "control characters", |r| r.name = "a\nb".into()),
            ("virtual_machine_id", "wants a UUID", |r| r.virtual_machine_id.clear()),
            ("virtual_machine_id", "wants a UUID", |r| r.virtual_machine_id = "vm-7".into()),
            ("featureType", "got 7", |r| r.feature_type = 7),
            ("featureType", "got -1", |r| r.feature_type = -1),
            ("source", "is missing", |r| r.source = None),
            ("source.name", "must not be empty", |r| source(r).name.clear()),
            ("source.name", "at most 128 bytes", |r| source(r).name = "x".repeat(129)),
            ("source.name", "must not contain '/'", |r| source(r).name = "a/b".into()),
            ("source.name", "must not contain '.'", |r| source(r).name = "..".into()),
            ("source.version", "at most 256 bytes", |r| source(r).version = "1".repeat(257)),
            ("source.version", "control characters", |r| source(r).version = "1\n".into()),
            ("account.username", "wants the name", |r| account(r).username = "-rf".into()),
            ("account.username", "wants the name", |r| account(r).username = "a:b".into()),
            ("account.password", "at most", |r| account(r).password = CANARY.repeat(1000)),
            ("account.password", "NUL", |r| account(r).password = format!("{CANARY}\0")),
            ("account.private_key", "at most", |r| account(r).private_key = CANARY.repeat(10_000)),
            ("environment[0]", "wants NAME=value", |r| r.environment = vec![CANARY.into()]),
            ("environment[1]", "letters, digits", |r| r.environment[1] = format!("1A={CANARY}")),
            ("environment[1]", "letters, digits", |r| r.environment[1] = format!("={CANARY}")),
            ("environment[3]", "letters, digits", |r| r.environment[3] = format!("A B={CANARY}")),
            ("environment[0]", "at most", |r| r.environment[0] = format!("A={}", CANARY.repeat(10_000))),
            ("environment[0]", "NUL", |r| r.environment[0] = format!("A={CANARY}\0")),
            ("environment", "at most 256", |r| r.environment = vec!["A=1".into(); 257]),
        ];
        for (field, wanted, spoil) in faults {
            let mut request = a_feature();
            spoil(&mut request);
            let (got_field, got_wanted) = refusal(feature(request));
            assert_eq!(got_field, *field, "{got_wanted}");
            assert!(got_wanted.contains(wanted), "{field}: {got_wanted}");
        }
    }

    #[test]
    fn a_condition_runs_a_package_or_a_command() {
        let Probe::Command { line, interval } = condition(by_command()).unwrap().probe else { panic!("no command") };
        assert_eq!((line.as_str(), interval), ("echo 1", Duration::from_secs(5)));
        let Probe::Package(package) = condition(by_package()).unwrap().probe else { panic!("no package") };
        assert_eq!(package.name, "nginx");
    }

    #[test]
    fn a_packages_own_interval_counts_whatever_the_request_says() {
        for interval in [0, -1, 7, i32::MAX] {
            assert!(condition(proto::Condition { interval, ..by_package() }).is_ok());
        }
    }

    #[test]
    fn an_empty_source_is_no_source() {
        let request = proto::Condition { source: Some(proto::Source::default()), ..by_command() };
        assert!(matches!(condition(request).unwrap().probe, Probe::Command { .. }));
    }

    #[test]
    fn each_fault_of_a_condition_names_its_field() {
        type Spoil = fn(&mut proto::Condition);
        let faults: &[(&str, &str, Spoil)] = &[
            ("name", "must not be empty", |r| r.name.clear()),
            ("virtual_machine_id", "wants a UUID", |r| r.virtual_machine_id = "x".into()),
            ("command", "must be empty when there is a source", |r| r.source = source()),
            ("source", "wants a package, or a command", |r| r.command.clear()),
            ("source", "wants a package, or a command", |r| r.command = " \n".into()),
            ("command", "at most", |r| r.command = CANARY.repeat(10_000)),
            ("command", "NUL", |r| r.command = format!("echo {CANARY}\0")),
            ("interval", "got 0", |r| r.interval = 0),
            ("interval", "got -5", |r| r.interval = -5),
            ("interval", "1 to 604800 seconds", |r| r.interval = i32::MAX),
            ("environment[0]", "wants NAME=value", |r| r.environment = vec![CANARY.into()]),
        ];
        for (field, wanted, spoil) in faults {
            let mut request = by_command();
            spoil(&mut request);
            let (got_field, got_wanted) = refusal(condition(request));
            assert_eq!(got_field, *field, "{got_wanted}");
            assert!(got_wanted.contains(wanted), "{field}: {got_wanted}");
        }
    }

    #[test]
    fn an_id_that_is_no_uuid_is_refused() {
        let (field, wanted) = refusal(vm_id(&proto::Identifier { value: "web-0".into() }));
        assert_eq!(field, "value");
        assert!(wanted.contains("wants a UUID") && wanted.contains("\"web-0\""), "{wanted}");
        assert!(install_id(&proto::Identifier { value: String::new() }).is_err());
        assert_eq!(install_id(&proto::Identifier { value: UUID.into() }).unwrap().to_string(), UUID);
    }

    proptest! {
        #[test]
        fn an_environment_is_kept_as_given(
            wanted in prop::collection::btree_map("[A-Za-z_][A-Za-z0-9_]{0,9}", "[^\\x00]{0,40}", 0..20)
        ) {
            let entries = wanted.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>();
            prop_assert_eq!(parse_environment(&entries).unwrap(), wanted);
        }

        #[test]
        fn whatever_comes_in_an_environment_only_good_names_come_out(entries in prop::collection::vec(any::<String>(), 0..5)) {
            if let Ok(environment) = parse_environment(&entries) {
                for (name, value) in environment {
                    prop_assert!(check_variable_name(&name).is_ok());
                    let entry = format!("{name}={value}");
                    prop_assert!(entries.contains(&entry));
                }
            }
        }

        #[test]
        fn an_address_survives_its_usual_spelling(address in any::<std::net::Ipv6Addr>(), prefix in 0_u8..=128) {
            let text = format!("{address}/{prefix}");
            prop_assert_eq!(parse_cidr(&text).unwrap(), text);
        }

        #[test]
        fn no_secret_is_in_any_refusal(
            name in any::<String>(), vm in any::<String>(), source in any::<String>(), command in any::<bool>(),
            entry in any::<String>(), interval in any::<i32>(), user in any::<String>(),
        ) {
            let request = proto::Condition {
                name,
                virtual_machine_id: vm,
                account: Some(proto::Account { username: user, password: format!("\0{CANARY}"), private_key: CANARY.into() }),
                source: Some(proto::Source { name: source, version: String::new() }),
                command: if command { CANARY.into() } else { String::new() },
                interval,
                environment: vec![format!("{entry}={CANARY}"), CANARY.into()],
            };
            let error = condition(request).unwrap_err();
            let shown = format!("{error:?}");
            prop_assert!(!shown.contains(CANARY));
        }
    }
}
