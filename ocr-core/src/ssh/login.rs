//! Which account acts, and what it is in the guest.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::time::Instant;

use super::{
    SshConfig,
    address::Addresses,
    pool::{Pool, Used},
    run::{self, Ended, Order},
    session::{Session, denied},
};
use crate::{
    Error, Result, Retry, VmId,
    credentials::{CredentialSource, Credentials},
    guest::check_guest_path,
    id::shown,
};

/// How long the first look at an account may take.
const LOOK_LIMIT: Duration = Duration::from_secs(30);

/// The most that it may write, in bytes: shells greet, and systems have long names.
const LOOK_BYTES: usize = 256 << 10;

/// Comes before what is read of an answer: shells of some accounts greet on stdout.
const MARK: &str = "ocr-ssh-login";

/// Run once for each connection.
const LOOK: &str = r#"printf '%s\n' ocr-ssh-login "$(id -u)" "$(id -un)" "$HOME"; cat /etc/os-release 2>/dev/null"#;

/// The folder of root's runs.
const ROOT_BASE: &str = "/var/lib/ocr";

/// The folder of another account's runs, in its home.
const HOME_BASE: &str = ".ocr";

/// What was learnt of an account at its first use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Login {
    pub(super) is_root: bool,
    /// Its name as the guest has it.
    pub(super) user: String,
    /// The folder that belongs to the runner there.
    pub(super) base: String,
    pub(super) os_name: String,
}

impl Login {
    fn of(ended: &Ended, session: &Session) -> Result<Self> {
        let text = String::from_utf8_lossy(&ended.stdout);
        let mut lines = text.lines().skip_while(|line| *line != MARK).skip(1);
        let (Some(uid), Some(user), Some(home)) = (lines.next(), lines.next(), lines.next()) else {
            let said = String::from_utf8_lossy(&ended.stderr);
            return Err(Error::unsupported(format!(
                "{} has no POSIX shell that could be used: {}",
                session.name,
                shown(said.trim())
            )));
        };
        let is_root = uid == "0";
        let base = if is_root { ROOT_BASE.to_owned() } else { format!("{}/{HOME_BASE}", home.trim_end_matches('/')) };
        check_guest_path(&base).map_err(|_| {
            Error::unsupported(format!("the account {} has no home folder to keep runs in: {}", user, shown(home)))
        })?;
        let os_name = lines.find_map(|line| line.strip_prefix("PRETTY_NAME="));
        let os_name = os_name.unwrap_or_default().trim_matches(['"', '\'']).to_owned();
        Ok(Self { is_root, user: user.to_owned(), base, os_name })
    }
}

/// A connection, and as whom it acts there.
#[derive(Debug)]
pub(super) struct Acting {
    pub(super) session: Used,
    pub(super) login: Login,
    /// The user to become.
    pub(super) su: Option<String>,
    with_sudo: bool,
}

/// Logs in.
#[derive(Debug)]
pub(super) struct Accounts {
    pub(super) pool: Arc<Pool>,
    addresses: Arc<dyn Addresses>,
    source: Arc<dyn CredentialSource>,
    sudo: bool,
    users: bool,
}

impl Accounts {
    pub(super) fn new(
        pool: Arc<Pool>,
        addresses: Arc<dyn Addresses>,
        source: Arc<dyn CredentialSource>,
        config: &SshConfig,
    ) -> Self {
        Self { pool, addresses, source, sudo: config.sudo, users: config.users }
    }

    /// A connection that acts as this user, or as the account that the machine is managed by.
    ///
    /// Root becomes any user. Without root a user wants credentials of its own.
    pub(super) async fn acting(&self, vm: VmId, user: Option<&str>, field: &str) -> Result<Acting> {
        if user.is_some() && !self.users {
            return Err(Error::unsupported("commands run as the account that logs in; leave the user empty"));
        }
        let main = self.source.credentials(vm, None).await?;
        if let Some(main) = main.as_ref().filter(|main| main.has_secret()) {
            // Without a home of its own a user's credentials may be the only ones, and so the main ones.
            let acting = self.login(vm, main, self.sudo).await?;
            match user {
                None => return Ok(acting),
                Some(user) if user == acting.login.user => return Ok(acting),
                Some(user) if acting.login.is_root => return Ok(Acting { su: Some(user.to_owned()), ..acting }),
                Some(_) => {}
            }
        }
        let own = match user {
            Some(user) => self.source.credentials(vm, Some(user)).await?.filter(Credentials::has_secret),
            None => None,
        };
        match (own, user) {
            (Some(own), _) => self.login(vm, &own, false).await,
            (None, user) => {
                // A machine that is gone, or off, is to be told first.
                self.addresses.locate(vm).await?;
                Err(match user {
                    Some(user) => Error::invalid(
                        field,
                        format_args!(
                            "there are no credentials for the account {} of this machine, and nobody there that may \
                             become it",
                            shown(user)
                        ),
                    ),
                    None => denied("there are no credentials to log in to this machine with".to_owned()),
                })
            }
        }
    }

    /// Runs a program, over another connection when the first has gone stale.
    ///
    /// # Errors
    /// Those of [`Accounts::acting`] and [`run::run`].
    pub(super) async fn run(
        &self,
        vm: VmId,
        as_whom: (Option<&str>, &str),
        argv: &[String],
        stdin: &[Bytes],
        limit_bytes: usize,
        until: Instant,
    ) -> Result<(Acting, Ended)> {
        let mut again = true;
        loop {
            let acting = self.acting(vm, as_whom.0, as_whom.1).await?;
            match acting.run(argv, stdin, limit_bytes, until).await {
                Err(error) if again && error.retry() == Retry::Safe => again = false,
                ended => return Ok((acting, ended?)),
            }
        }
    }

    async fn login(&self, vm: VmId, credentials: &Credentials, with_sudo: bool) -> Result<Acting> {
        let session = self.pool.session(vm, credentials).await?;
        let look = async {
            let until = Instant::now() + LOOK_LIMIT;
            let argv = ["/bin/sh".to_owned(), "-c".to_owned(), LOOK.to_owned()];
            let order = Order { line: line(&argv, with_sudo), stdin: &[], limit_bytes: LOOK_BYTES, until };
            let ended = run::run(&session, &order).await.map_err(|error| error.with_retry(Retry::Safe))?;
            check_sudo(&ended, with_sudo, &session)?;
            Login::of(&ended, &session)
        };
        let login = session.account.get_or_try_init(|| Box::pin(look)).await?.clone();
        Ok(Acting { session, login, su: None, with_sudo })
    }
}

/// Tells sudo's refusals from what the program says.
fn check_sudo(ended: &Ended, with_sudo: bool, session: &Session) -> Result<()> {
    let said = String::from_utf8_lossy(&ended.stderr);
    if with_sudo && ended.stdout.is_empty() && ended.exit != Ok(0) && said.contains("sudo") {
        return Err(denied(format!("{} may not use sudo without a password: {}", session.name, shown(said.trim()))));
    }
    Ok(())
}

impl Acting {
    /// Runs a program of the guest with these arguments.
    ///
    /// # Errors
    /// Those of [`run::run`].
    pub(super) async fn run(
        &self,
        argv: &[String],
        stdin: &[Bytes],
        limit_bytes: usize,
        until: Instant,
    ) -> Result<Ended> {
        let order = Order { line: line(argv, self.with_sudo), stdin, limit_bytes, until };
        run::run(&self.session, &order).await
    }
}

/// A line for a login shell: sh and its kin, and fish.
fn line(argv: &[String], with_sudo: bool) -> String {
    let mut line = "exec".to_owned();
    let sudo = if with_sudo { ["sudo", "-n", "--"].as_slice() } else { &[] };
    for word in sudo.iter().copied().chain(argv.iter().map(String::as_str)) {
        line.push(' ');
        quote(&mut line, word);
    }
    line
}

/// Adds a text as one word. A backslash goes into double quotes: between single ones fish reads it, and sh does not.
fn quote(line: &mut String, word: &str) {
    line.push('\'');
    for c in word.chars() {
        match c {
            '\'' => line.push_str(r#"'"'"'"#),
            '\\' => line.push_str(r#"'"\\"'"#),
            c => line.push(c),
        }
    }
    line.push('\'');
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_line_gives_every_shell_the_same_words() {
        let words = ["printf", "%s\\n", "", "it's", r"a\b\\c\'", "$HOME `x` \"y\" !z", "two\nlines", "*"];
        let argv = words.map(str::to_owned);
        let wanted = words[2..].iter().map(|word| format!("{word}\n")).collect::<String>();
        let mut tried = 0;
        for shell in ["sh", "bash", "dash", "zsh", "fish", "mksh"] {
            let Ok(output) = Command::new(shell).arg("-c").arg(line(&argv, false)).output() else { continue };
            assert_eq!(String::from_utf8_lossy(&output.stdout), wanted, "{shell}");
            tried += 1;
        }
        assert!(tried > 0, "no shell at all");
    }

    #[test]
    fn sudo_goes_in_front() {
        assert_eq!(line(&["id".to_owned()], true), "exec 'sudo' '-n' '--' 'id'");
    }
}
