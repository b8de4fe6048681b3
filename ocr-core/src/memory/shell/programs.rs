//! The programs of guests in memory. Each knows the usual options of its POSIX namesake and refuses others.

use std::io::Write;

use sha2::{Digest, Sha256};

use super::Shell;
use crate::memory::{
    guest::Power,
    tree::{Fail, Node, ROOT, Tree, Want, base, join, parent, resolve},
};

/// What a program's file in the guest begins with; its name follows.
pub(in crate::memory) const MARK: &[u8] = b"\x7fguest program ";

/// All programs. Each has a file in the guest's `/bin`.
pub(in crate::memory) const NAMES: [&str; 43] = [
    "[",
    "basename",
    "bash",
    "cat",
    "chmod",
    "chown",
    "cp",
    "dirname",
    "echo",
    "env",
    "false",
    "grep",
    "head",
    "hostname",
    "id",
    "ls",
    "mkdir",
    "mv",
    "poweroff",
    "printenv",
    "printf",
    "pwd",
    "reboot",
    "rm",
    "rmdir",
    "seq",
    "sh",
    "sha256sum",
    "sleep",
    "sort",
    "stat",
    "sync",
    "tail",
    "tee",
    "test",
    "touch",
    "tr",
    "true",
    "uname",
    "wc",
    "which",
    "whoami",
    "yes",
];

/// The most that one program writes, in bytes.
const MAX_OUTPUT_BYTES: usize = 64 << 20;

struct Run<'a> {
    shell: &'a Shell,
    arguments: &'a [String],
    out: Vec<u8>,
    err: String,
}

/// Why a program ends early: its exit code and what it says.
type Ends = (i32, String);
type Done = Result<i32, Ends>;
/// The options given, in order, each with its value or an empty text.
type Options = Vec<(char, String)>;

/// Where Linux tells one boot from the next. It lies in no guest's tree, so that guests that only read share theirs.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Runs one of [`NAMES`] that needs no waiting; gives its exit code.
pub(super) fn run(shell: &Shell, name: &str, arguments: &[String]) -> i32 {
    let mut run = Run { shell, arguments, out: Vec::new(), err: String::new() };
    let mut code = match run.program(name) {
        Ok(code) => code,
        Err((code, why)) => {
            run.err.push_str(&why);
            run.err.push('\n');
            code
        }
    };
    let said: String = run.err.lines().map(|line| format!("{name}: {line}\n")).collect();
    if !run.out.is_empty() && !shell.write(&shell.io.stdout, &run.out) {
        shell.write(&shell.io.stderr, format!("{name}: write error: {}\n", Fail::Full).as_bytes());
        code = 1;
    }
    shell.write(&shell.io.stderr, said.as_bytes());
    code
}

impl Run<'_> {
    fn program(&mut self, name: &str) -> Done {
        match name {
            "true" | "sync" => Ok(0),
            "false" => Ok(1),
            "echo" => self.echo(),
            "printf" => self.printf(),
            "pwd" => self.say(&self.shell.folder.clone()),
            "whoami" => self.say(&self.shell.user.clone()),
            "hostname" => {
                let name = self.shell.process.machine_name();
                self.say(&name)
            }
            "uname" => self.uname(),
            "id" => self.id(),
            "printenv" => self.printenv(),
            "cat" => self.cat(),
            "head" => self.head_or_tail(true),
            "tail" => self.head_or_tail(false),
            "wc" => self.wc(),
            "sort" => self.sort(),
            "tr" => self.tr(),
            "grep" => self.grep(),
            "seq" => self.seq(),
            "yes" => Err((1, "would never end here".to_owned())),
            "tee" => self.tee(),
            "sha256sum" => self.sha256sum(),
            "ls" => self.ls(),
            "stat" => self.stat(),
            "mkdir" => self.mkdir(),
            "rmdir" => self.rmdir(),
            "rm" => self.rm(),
            "mv" => self.mv(),
            "cp" => self.cp(),
            "touch" => self.touch(),
            "chmod" => self.chmod(),
            "chown" => self.chown(),
            "basename" | "dirname" => self.name_part(name == "basename"),
            "which" => self.which(),
            "test" => test(self, self.arguments),
            "[" => match self.arguments.split_last() {
                Some((last, arguments)) if last == "]" => test(self, arguments),
                _ => Err((2, "missing ]".to_owned())),
            },
            "reboot" => self.power(Power::Reboot),
            "poweroff" => self.power(Power::Off),
            _ => Err((127, "not found".to_owned())),
        }
    }

    fn say(&mut self, line: &str) -> Done {
        self.out.extend_from_slice(line.as_bytes());
        self.out.push(b'\n');
        Ok(0)
    }

    fn path(&self, name: &str) -> String {
        resolve(&self.shell.folder, name)
    }

    fn look<R>(&self, f: impl FnOnce(&Tree, &str) -> Result<R, Fail>) -> Result<R, Fail> {
        self.shell.process.look(|tree| f(tree, &self.shell.user)).unwrap_or(Err(Fail::Missing))
    }

    fn change<R>(&self, f: impl FnOnce(&mut Tree, &str) -> Result<R, Fail>) -> Result<R, Fail> {
        self.shell.process.change(|tree| f(tree, &self.shell.user)).unwrap_or(Err(Fail::Missing))
    }

    /// Splits options of single letters from operands; letters in `with_value` take the next text.
    fn options(&self, known: &str, with_value: &str) -> Result<(Options, Vec<String>), Ends> {
        let mut options = Vec::new();
        let mut operands = Vec::new();
        let mut arguments = self.arguments.iter();
        while let Some(argument) = arguments.next() {
            if argument == "--" {
                operands.extend(arguments.by_ref().cloned());
                break;
            }
            let Some(flags) = argument.strip_prefix('-').filter(|flags| !flags.is_empty()) else {
                operands.push(argument.clone());
                continue;
            };
            let mut chars = flags.chars();
            while let Some(flag) = chars.next() {
                if with_value.contains(flag) {
                    let rest: String = chars.by_ref().collect();
                    let value = if rest.is_empty() { arguments.next().cloned() } else { Some(rest) };
                    options.push((flag, value.ok_or((2, format!("-{flag} wants a value")))?));
                } else if known.contains(flag) {
                    options.push((flag, String::new()));
                } else {
                    return Err((2, format!("-{flag} is not supported here")));
                }
            }
        }
        Ok((options, operands))
    }

    fn echo(&mut self) -> Done {
        let (mut newline, mut escapes) = (true, false);
        let mut rest = self.arguments;
        while let Some((first, after)) = rest.split_first()
            && matches!(first.as_str(), "-n" | "-e" | "-ne" | "-en")
        {
            newline &= !first.contains('n');
            escapes |= first.contains('e');
            rest = after;
        }
        let text = rest.join(" ");
        match escapes {
            true => unescape(&text, &mut self.out),
            false => self.out.extend_from_slice(text.as_bytes()),
        }
        if newline {
            self.out.push(b'\n');
        }
        Ok(0)
    }

    fn printf(&mut self) -> Done {
        let Some((format, arguments)) = self.arguments.split_first() else { return Err((2, "wants a format".into())) };
        let mut arguments = arguments.iter();
        loop {
            let before = arguments.len();
            let mut plain = String::new();
            let mut chars = format.chars().peekable();
            while let Some(c) = chars.next() {
                if c != '%' {
                    plain.push(c);
                    // An escape stays in one piece with what it escapes.
                    if c == '\\' {
                        plain.extend(chars.next());
                    }
                    continue;
                }
                unescape(&plain, &mut self.out);
                plain.clear();
                let mut spec = String::new();
                while let Some(c) = chars.next_if(|c| c.is_ascii_digit() || matches!(c, '-' | '.' | '+')) {
                    spec.push(c);
                }
                let kind = chars.next().ok_or((2, "a % ends the format".to_owned()))?;
                if kind == '%' {
                    self.out.push(b'%');
                    continue;
                }
                let argument = arguments.next().map_or("", String::as_str);
                let piece = conversion(&spec, kind, argument)?;
                self.out.extend_from_slice(&piece);
            }
            unescape(&plain, &mut self.out);
            if arguments.len() == 0 || arguments.len() == before {
                return Ok(0);
            }
        }
    }

    fn uname(&mut self) -> Done {
        let (options, _) = self.options("asnrm", "")?;
        let name = self.shell.process.machine_name();
        let mut words = Vec::new();
        let flags: String = options.iter().map(|(flag, _)| *flag).collect();
        let flags = match flags.as_str() {
            "" => "s",
            "a" => "snrm",
            flags => flags,
        };
        for flag in flags.chars() {
            words.push(match flag {
                'n' => name.as_str(),
                'r' => "1.0-memory",
                'm' => "memory",
                _ => "Linux",
            });
        }
        self.say(&words.join(" "))
    }

    fn id(&mut self) -> Done {
        let (options, operands) = self.options("ungG", "")?;
        let user = operands.first().unwrap_or(&self.shell.user).clone();
        let number = self.shell.process.user_number(&user).ok_or((1, format!("'{user}': no such user")))?;
        let flags: String = options.iter().map(|(flag, _)| *flag).collect();
        match flags.as_str() {
            "" => self.say(&format!("uid={number}({user}) gid={number}({user}) groups={number}({user})")),
            "u" | "g" | "G" => self.say(&number.to_string()),
            _ => self.say(&user),
        }
    }

    fn printenv(&mut self) -> Done {
        let exported: Vec<_> = self.shell.variables.iter().filter(|(_, variable)| variable.exported).collect();
        if self.arguments.is_empty() {
            for (name, variable) in exported {
                self.out.extend_from_slice(format!("{name}={}\n", variable.value).as_bytes());
            }
            return Ok(0);
        }
        let mut code = 0;
        for wanted in self.arguments {
            match exported.iter().find(|(name, _)| *name == wanted) {
                Some((_, variable)) => self.out.extend_from_slice(format!("{}\n", variable.value).as_bytes()),
                None => code = 1,
            }
        }
        Ok(code)
    }

    /// What the named files, or stdin, hold one after another; a file that cannot be read is named and left out.
    fn inputs(&mut self, names: &[String]) -> (Vec<u8>, i32) {
        if names.is_empty() {
            return (self.shell.io.stdin.all().to_vec(), 0);
        }
        let mut all = Vec::new();
        let mut code = 0;
        for name in names {
            if name == "-" {
                all.extend_from_slice(&self.shell.io.stdin.all());
                continue;
            }
            let path = self.path(name);
            if path == "/dev/null" {
                continue;
            }
            if path == BOOT_ID {
                all.extend_from_slice(format!("{}\n", self.shell.process.boot_id()).as_bytes());
                continue;
            }
            match self.look(|tree, user| tree.read(user, &path)) {
                Ok(content) => all.extend_from_slice(&content),
                Err(fail) => {
                    self.err.push_str(&format!("{name}: {fail}\n"));
                    code = 1;
                }
            }
        }
        (all, code)
    }

    fn cat(&mut self) -> Done {
        let (_, names) = self.options("u", "")?;
        let (all, code) = self.inputs(&names);
        self.out = all;
        Ok(code)
    }

    fn head_or_tail(&mut self, head: bool) -> Done {
        let (options, names) = self.options("", "nc")?;
        let (unit, count) = options.last().map_or(('n', "10"), |(flag, value)| (*flag, value.as_str()));
        let from_start = count.starts_with('+') && !head;
        let count: usize =
            count.trim_start_matches(['-', '+']).parse().map_err(|_| (1, format!("{count}: not a number")))?;
        // An endless device is the one input that is cut while it is read.
        if head && unit == 'c' && names.iter().any(|name| name == "/dev/zero") {
            self.out = vec![0; count.min(MAX_OUTPUT_BYTES)];
            return Ok(0);
        }
        let (all, code) = self.inputs(&names);
        let pieces: Vec<&[u8]> =
            if unit == 'c' { all.chunks(1).collect() } else { all.split_inclusive(|byte| *byte == b'\n').collect() };
        let chosen = match (head, from_start) {
            (true, _) => &pieces[..count.min(pieces.len())],
            (false, true) => &pieces[count.saturating_sub(1).min(pieces.len())..],
            (false, false) => &pieces[pieces.len() - count.min(pieces.len())..],
        };
        self.out = chosen.concat();
        Ok(code)
    }

    fn wc(&mut self) -> Done {
        let (options, names) = self.options("lwc", "")?;
        let (all, code) = self.inputs(&names);
        let lines = all.iter().filter(|byte| **byte == b'\n').count();
        let words = all.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty()).count();
        let wants = |flag| options.is_empty() || options.iter().any(|(given, _)| *given == flag);
        let mut columns: Vec<String> = [('l', lines), ('w', words), ('c', all.len())]
            .into_iter()
            .filter(|(flag, _)| wants(*flag))
            .map(|(_, count)| count.to_string())
            .collect();
        columns.extend(names.first().filter(|_| names.len() == 1).cloned());
        self.say(&columns.join(" "))?;
        Ok(code)
    }

    fn sort(&mut self) -> Done {
        let (options, names) = self.options("rnu", "")?;
        let has = |flag| options.iter().any(|(given, _)| *given == flag);
        let (all, code) = self.inputs(&names);
        let text = String::from_utf8_lossy(&all).into_owned();
        let mut lines: Vec<&str> = text.lines().collect();
        lines.sort_unstable();
        if has('n') {
            lines.sort_by_key(|line| line.trim().parse::<i64>().unwrap_or(0));
        }
        if has('u') {
            lines.dedup();
        }
        if has('r') {
            lines.reverse();
        }
        for line in lines {
            self.say(line)?;
        }
        Ok(code)
    }

    fn tr(&mut self) -> Done {
        let (options, sets) = self.options("d", "")?;
        let (all, _) = self.inputs(&[]);
        let set = |index: usize| {
            let mut raw = Vec::new();
            unescape(sets.get(index).map_or("", String::as_str), &mut raw);
            let mut chars: Vec<u8> = Vec::new();
            let mut at = 0;
            while at < raw.len() {
                if at + 2 < raw.len() && raw[at + 1] == b'-' {
                    chars.extend(raw[at]..=raw[at + 2]);
                    at += 3;
                } else {
                    chars.push(raw[at]);
                    at += 1;
                }
            }
            chars
        };
        let (from, to) = (set(0), set(1));
        if !options.is_empty() {
            self.out = all.into_iter().filter(|byte| !from.contains(byte)).collect();
            return Ok(0);
        }
        let Some(last) = to.last() else { return Err((1, "wants two sets".to_owned())) };
        self.out = all
            .into_iter()
            .map(|byte| match from.iter().position(|c| *c == byte) {
                Some(index) => *to.get(index).unwrap_or(last),
                None => byte,
            })
            .collect();
        Ok(0)
    }

    /// Fixed texts only, with `^` and `$` at the ends.
    fn grep(&mut self) -> Done {
        let (options, mut names) = self.options("qcvixFE", "e")?;
        let has = |flag| options.iter().any(|(given, _)| *given == flag);
        let pattern = match options.iter().find(|(flag, _)| *flag == 'e') {
            Some((_, pattern)) => pattern.clone(),
            None if names.is_empty() => return Err((2, "wants a pattern".to_owned())),
            None => names.remove(0),
        };
        let (mut begins, mut ends, mut text) = (has('x'), has('x'), pattern.as_str());
        if !has('F') {
            if let Some(rest) = text.strip_prefix('^') {
                (begins, text) = (true, rest);
            }
            if let Some(rest) = text.strip_suffix('$') {
                (ends, text) = (true, rest);
            }
            if text.contains(['.', '*', '[', ']', '\\', '^', '$', '+', '?', '(', '|']) {
                return Err((2, format!("{pattern}: only fixed texts with ^ and $ at the ends are supported here")));
            }
        }
        let fold = |text: &str| if has('i') { text.to_lowercase() } else { text.to_owned() };
        let text = fold(text);
        let (all, code) = self.inputs(&names);
        let all = String::from_utf8_lossy(&all).into_owned();
        let hits: Vec<&str> = all
            .lines()
            .filter(|line| {
                let line = fold(line);
                let hit = match (begins, ends) {
                    (true, true) => line == text,
                    (true, false) => line.starts_with(&text),
                    (false, true) => line.ends_with(&text),
                    (false, false) => line.contains(&text),
                };
                hit != has('v')
            })
            .collect();
        if has('c') {
            self.say(&hits.len().to_string())?;
        } else if !has('q') {
            for hit in &hits {
                self.say(hit)?;
            }
        }
        Ok(if code != 0 { 2 } else { i32::from(hits.is_empty()) })
    }

    fn seq(&mut self) -> Done {
        let mut numbers = Vec::new();
        for argument in self.arguments {
            numbers.push(argument.parse::<i64>().map_err(|_| (1, format!("{argument}: not a whole number")))?);
        }
        let (first, step, last) = match numbers.as_slice() {
            [last] => (1, 1, *last),
            [first, last] => (*first, 1, *last),
            [first, step, last] if *step != 0 => (*first, *step, *last),
            _ => return Err((1, "wants one to three numbers, and a step that is not 0".to_owned())),
        };
        let mut next = Some(first);
        while let Some(number) = next.filter(|number| if step > 0 { *number <= last } else { *number >= last }) {
            // Straight into the output: long sequences are common in tests.
            let _never_fails = writeln!(self.out, "{number}");
            if self.out.len() > MAX_OUTPUT_BYTES {
                return Err((1, "writes too much for a guest in memory".to_owned()));
            }
            next = number.checked_add(step);
        }
        Ok(0)
    }

    fn tee(&mut self) -> Done {
        let (options, names) = self.options("a", "")?;
        let (all, _) = self.inputs(&[]);
        for name in &names {
            let path = self.path(name);
            self.on(name, self.change(|tree, user| tree.write(user, &path, &all, !options.is_empty())))?;
        }
        self.out = all;
        Ok(0)
    }

    fn sha256sum(&mut self) -> Done {
        let (_, names) = self.options("", "")?;
        let names = if names.is_empty() { vec!["-".to_owned()] } else { names };
        let mut code = 0;
        for name in &names {
            let (all, failed) = self.inputs(std::slice::from_ref(name));
            code |= failed;
            if failed == 0 {
                let digest: String = Sha256::digest(&all).iter().map(|byte| format!("{byte:02x}")).collect();
                self.say(&format!("{digest}  {name}"))?;
            }
        }
        Ok(code)
    }

    fn ls(&mut self) -> Done {
        let (options, mut names) = self.options("ladA1n", "")?;
        let has = |flag| options.iter().any(|(given, _)| *given == flag);
        if names.is_empty() {
            names.push(".".to_owned());
        }
        let mut code = 0;
        for name in &names {
            let path = self.path(name);
            let listed = self.look(|tree, user| {
                let node = reachable(tree, user, &path)?;
                if !node.is_folder() || has('d') {
                    return Ok(vec![(name.clone(), node.clone())]);
                }
                let mut entries = Vec::new();
                for entry in tree.names(user, &path)? {
                    if let Some(node) = tree.look(&join(&path, &entry)).filter(|_| has('a') || !entry.starts_with('.'))
                    {
                        entries.push((entry, node.clone()));
                    }
                }
                Ok(entries)
            });
            match listed {
                Err(fail) => {
                    self.err.push_str(&format!("{name}: {fail}\n"));
                    code = 2;
                }
                Ok(entries) => {
                    for (entry, node) in entries {
                        let line = if has('l') || has('n') { long(&node, &entry) } else { entry };
                        self.say(&line)?;
                    }
                }
            }
        }
        Ok(code)
    }

    fn stat(&mut self) -> Done {
        let (options, names) = self.options("", "c")?;
        let Some((_, format)) = options.first() else { return Err((1, "only stat -c FORMAT is supported".into())) };
        for name in &names {
            let path = self.path(name);
            let node = self.on(name, self.look(|tree, user| reachable(tree, user, &path).cloned()))?;
            let mut text = String::new();
            let mut chars = format.chars();
            while let Some(c) = chars.next() {
                if c != '%' {
                    text.push(c);
                    continue;
                }
                match chars.next() {
                    Some('a') => text.push_str(&format!("{:o}", node.mode)),
                    Some('U' | 'G') => text.push_str(&node.owner),
                    Some('s') => text.push_str(&size(&node).to_string()),
                    Some('n') => text.push_str(name),
                    Some('F') => text.push_str(if node.is_folder() { "directory" } else { "regular file" }),
                    _ => return Err((1, "only %a %U %G %s %n and %F are supported".to_owned())),
                }
            }
            self.say(&text)?;
        }
        Ok(0)
    }

    fn on<T>(&self, name: &str, result: Result<T, Fail>) -> Result<T, Ends> {
        result.map_err(|fail| (1, format!("{name}: {fail}")))
    }

    fn mkdir(&mut self) -> Done {
        let (options, names) = self.options("p", "m")?;
        let has = |flag| options.iter().any(|(given, _)| *given == flag);
        let mode = match options.iter().find(|(flag, _)| *flag == 'm') {
            Some((_, text)) => Some(mode_of(text, 0)?),
            None => None,
        };
        for name in &names {
            let path = self.path(name);
            let made = self.change(|tree, user| {
                if has('p') { tree.make_folders(user, &path) } else { tree.make_folder(user, &path) }?;
                mode.map_or(Ok(()), |mode| tree.set_mode(user, &path, mode))
            });
            self.on(name, made)?;
        }
        Ok(0)
    }

    fn rmdir(&mut self) -> Done {
        for name in self.arguments {
            let path = self.path(name);
            let removed = self.change(|tree, user| match tree.look(&path).is_some_and(|node| !node.is_folder()) {
                true => Err(Fail::NoFolder),
                false => tree.remove(user, &path),
            });
            self.on(name, removed)?;
        }
        Ok(0)
    }

    fn rm(&mut self) -> Done {
        let (options, names) = self.options("rRf", "")?;
        let has = |flags: &str| options.iter().any(|(given, _)| flags.contains(*given));
        for name in &names {
            let path = self.path(name);
            let removed = self.change(|tree, user| match tree.look(&path) {
                Some(node) if node.is_folder() && !has("rR") => Err(Fail::Folder),
                Some(_) if path == "/" => Err(Fail::Denied),
                _ => tree.all_below(&path).iter().try_for_each(|path| tree.remove(user, path)),
            });
            match removed {
                Err(Fail::Missing) if has("f") => {}
                removed => self.on(name, removed)?,
            }
        }
        Ok(0)
    }

    /// From where to where, for `mv` and `cp`: into the last operand when it is a folder.
    fn pairs(&self, operands: &[String]) -> Result<Vec<(String, String, String)>, Ends> {
        let Some((last, sources)) = operands.split_last().filter(|(_, sources)| !sources.is_empty()) else {
            return Err((1, "wants a source and a target".to_owned()));
        };
        let target = self.path(last);
        let folder = self.look(|tree, _| Ok(tree.look(&target).is_some_and(Node::is_folder))) == Ok(true);
        if sources.len() > 1 && !folder {
            return Err((1, format!("{last}: {}", Fail::NoFolder)));
        }
        Ok(sources
            .iter()
            .map(|source| {
                let from = self.path(source);
                let to = if folder { join(&target, base(&from)) } else { target.clone() };
                (source.clone(), from, to)
            })
            .collect())
    }

    fn mv(&mut self) -> Done {
        let (_, operands) = self.options("f", "")?;
        for (name, from, to) in self.pairs(&operands)? {
            self.on(&name, self.change(|tree, user| tree.rename(user, &from, &to)))?;
        }
        Ok(0)
    }

    fn cp(&mut self) -> Done {
        let (options, operands) = self.options("rRapf", "")?;
        let has = |flags: &str| options.iter().any(|(given, _)| flags.contains(*given));
        for (name, from, to) in self.pairs(&operands)? {
            let copied = self.change(|tree, user| {
                if tree.look(&from).is_some_and(Node::is_folder) && !has("rRa") {
                    return Err(Fail::Folder);
                }
                if to == from || to.starts_with(&format!("{from}/")) {
                    return Err(Fail::Exists);
                }
                for path in tree.all_below(&from).iter().rev() {
                    let target = format!("{to}{}", &path[from.len()..]);
                    let node = tree.open(user, path, Want::Read)?.clone();
                    match &node.content {
                        Some(content) => tree.write(user, &target, content, false)?,
                        None => tree.make_folders(user, &target)?,
                    }
                    tree.set_mode(user, &target, node.mode)?;
                }
                Ok(())
            });
            self.on(&name, copied)?;
        }
        Ok(0)
    }

    fn touch(&mut self) -> Done {
        for name in self.arguments {
            let path = self.path(name);
            let touched = self.change(|tree, user| match tree.look(&path) {
                Some(_) => reachable(tree, user, &path).map(drop),
                None => tree.write(user, &path, b"", true),
            });
            self.on(name, touched)?;
        }
        Ok(0)
    }

    fn chmod(&mut self) -> Done {
        let (first, names) = self.arguments.split_first().ok_or((1, "wants a mode".to_owned()))?;
        for name in names {
            let path = self.path(name);
            let old = self.on(name, self.look(|tree, user| reachable(tree, user, &path).map(|node| node.mode)))?;
            let mode = mode_of(first, old)?;
            self.on(name, self.change(|tree, user| tree.set_mode(user, &path, mode)))?;
        }
        Ok(0)
    }

    fn chown(&mut self) -> Done {
        let (first, names) = self.arguments.split_first().ok_or((1, "wants an owner".to_owned()))?;
        let owner = first.split(':').next().unwrap_or_default();
        if self.shell.process.user_number(owner).is_none() {
            return Err((1, format!("unknown user {owner}")));
        }
        for name in names {
            let path = self.path(name);
            self.on(name, self.change(|tree, user| tree.set_owner(user, &path, owner)))?;
        }
        Ok(0)
    }

    fn name_part(&mut self, last: bool) -> Done {
        let text = self.arguments.first().ok_or((1, "wants a path".to_owned()))?;
        let text = if text.len() > 1 { text.trim_end_matches('/') } else { text };
        let part = match (last, text.contains('/')) {
            (true, _) => base(text),
            (false, true) => parent(text),
            (false, false) => ".",
        };
        let suffix = self.arguments.get(1).filter(|_| last).map_or("", String::as_str);
        let part = part.strip_suffix(suffix).filter(|stem| !stem.is_empty()).unwrap_or(part).to_owned();
        self.say(&part)
    }

    fn which(&mut self) -> Done {
        let mut code = 0;
        for name in self.arguments {
            match self.shell.find(name) {
                super::Found::Failed { .. } => code = 1,
                super::Found::Script { path, .. } => {
                    self.say(&path)?;
                }
                super::Found::Program(name) => {
                    self.say(&format!("/bin/{name}"))?;
                }
            }
        }
        Ok(code)
    }

    fn power(&mut self, power: Power) -> Done {
        if self.shell.user != ROOT {
            return Err((1, "Operation not permitted".to_owned()));
        }
        self.shell.process.ask_power(power);
        Ok(0)
    }
}

fn reachable<'a>(tree: &'a Tree, user: &str, path: &str) -> Result<&'a Node, Fail> {
    if path != "/" {
        tree.open(user, parent(path), Want::Exec)?;
    }
    tree.look(path).ok_or(Fail::Missing)
}

fn size(node: &Node) -> usize {
    node.content.as_ref().map_or(4096, |content| content.len())
}

/// A line of `ls -l`, without a date: files here have none.
fn long(node: &Node, name: &str) -> String {
    let mut mode = String::from(if node.is_folder() { "d" } else { "-" });
    for shift in [6, 3, 0] {
        for (bit, letter) in [(4, 'r'), (2, 'w'), (1, 'x')] {
            mode.push(if node.mode >> shift & bit != 0 { letter } else { '-' });
        }
    }
    format!("{mode} 1 {owner} {owner} {size} Jan 1 00:00 {name}", owner = node.owner, size = size(node))
}

/// An octal mode, or `+x` and its like, laid over the old one.
fn mode_of(text: &str, old: u32) -> Result<u32, Ends> {
    if let Ok(mode) = u32::from_str_radix(text, 8) {
        return Ok(mode);
    }
    let wrong = || (1, format!("{text}: not a mode"));
    let sign = text.find(['+', '-', '=']).ok_or_else(wrong)?;
    let who = if sign == 0 { "a" } else { &text[..sign] };
    let mut mask = 0;
    for c in who.chars() {
        mask |= match c {
            'u' => 0o700,
            'g' => 0o070,
            'o' => 0o007,
            'a' => 0o777,
            _ => return Err(wrong()),
        };
    }
    let mut bits = 0;
    for c in text[sign + 1..].chars() {
        bits |= match c {
            'r' => 0o444,
            'w' => 0o222,
            'x' => 0o111,
            _ => return Err(wrong()),
        };
    }
    Ok(match &text[sign..=sign] {
        "+" => old | (bits & mask),
        "-" => old & !(bits & mask),
        _ => (old & !mask) | (bits & mask),
    })
}

/// Backslash escapes as `printf` and `echo -e` know them.
fn unescape(text: &str, out: &mut Vec<u8>) {
    let bytes = text.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        if bytes[at] != b'\\' || at + 1 == bytes.len() {
            out.push(bytes[at]);
            at += 1;
            continue;
        }
        at += 1;
        let c = bytes[at];
        at += 1;
        match c {
            b'n' => out.push(b'\n'),
            b't' => out.push(b'\t'),
            b'r' => out.push(b'\r'),
            b'a' => out.push(7),
            b'b' => out.push(8),
            b'f' => out.push(12),
            b'v' => out.push(11),
            b'\\' => out.push(b'\\'),
            b'0'..=b'7' => {
                let mut value = u32::from(c - b'0');
                let mut digits = 1;
                while digits < 3 && at < bytes.len() && (b'0'..=b'7').contains(&bytes[at]) {
                    value = value * 8 + u32::from(bytes[at] - b'0');
                    at += 1;
                    digits += 1;
                }
                out.push((value & 0xff) as u8);
            }
            other => out.extend_from_slice(&[b'\\', other]),
        }
    }
}

fn conversion(spec: &str, kind: char, argument: &str) -> Result<Vec<u8>, Ends> {
    let left = spec.contains('-');
    let spec = spec.trim_start_matches(['-', '+']);
    let zeros = spec.starts_with('0');
    let (width, precision) = spec.split_once('.').map_or((spec, None), |(width, precision)| (width, Some(precision)));
    let width = width.parse::<usize>().unwrap_or(0).min(4096);
    let precision = precision.map(|text| text.parse::<usize>().unwrap_or(0).min(4096));
    let whole = || argument.trim().parse::<i64>().map_err(|_| (1, format!("{argument}: not a number")));
    let whole = || if argument.is_empty() { Ok(0) } else { whole() };
    let mut piece: Vec<u8> = match kind {
        's' => argument.chars().take(precision.unwrap_or(usize::MAX)).collect::<String>().into(),
        'b' => {
            let mut piece = Vec::new();
            unescape(argument, &mut piece);
            piece
        }
        'c' => argument.chars().take(1).collect::<String>().into(),
        'd' | 'i' | 'u' => whole()?.to_string().into(),
        'x' => format!("{:x}", whole()?).into(),
        'o' => format!("{:o}", whole()?).into(),
        'f' => {
            let number = if argument.is_empty() { Ok(0.0) } else { argument.trim().parse::<f64>() };
            let number = number.map_err(|_| (1, format!("{argument}: not a number")))?;
            format!("{number:.*}", precision.unwrap_or(6)).into()
        }
        _ => return Err((2, format!("%{kind} is not supported here"))),
    };
    if piece.len() < width {
        let gap = width - piece.len();
        match (left, zeros && kind != 's') {
            (true, _) => piece.resize(width, b' '),
            (false, true) => {
                let sign = usize::from(piece.starts_with(b"-"));
                piece.splice(sign..sign, vec![b'0'; gap]);
            }
            (false, false) => {
                piece.splice(0..0, vec![b' '; gap]);
            }
        }
    }
    Ok(piece)
}

/// `test`: `!`, `-a`, `-o` and the usual tests, without parentheses.
fn test(run: &Run<'_>, arguments: &[String]) -> Done {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    Ok(i32::from(!truth(run, &words)?))
}

fn truth(run: &Run<'_>, words: &[&str]) -> Result<bool, Ends> {
    let whole = |text: &str| text.trim().parse::<i64>().map_err(|_| (2, format!("{text}: not a whole number")));
    // Two or three words are a test even when one of them looks like -a or -o.
    match words {
        [] => return Ok(false),
        [word] => return Ok(!word.is_empty()),
        ["!", word] => return Ok(word.is_empty()),
        [test, word] if test.starts_with('-') => return one(run, test, word),
        [left, test, right] => match *test {
            "=" | "==" => return Ok(left == right),
            "!=" => return Ok(left != right),
            "-eq" => return Ok(whole(left)? == whole(right)?),
            "-ne" => return Ok(whole(left)? != whole(right)?),
            "-lt" => return Ok(whole(left)? < whole(right)?),
            "-le" => return Ok(whole(left)? <= whole(right)?),
            "-gt" => return Ok(whole(left)? > whole(right)?),
            "-ge" => return Ok(whole(left)? >= whole(right)?),
            _ => {}
        },
        _ => {}
    }
    if let Some(at) = words.iter().position(|word| *word == "-o") {
        return Ok(truth(run, &words[..at])? | truth(run, &words[at + 1..])?);
    }
    if let Some(at) = words.iter().position(|word| *word == "-a") {
        return Ok(truth(run, &words[..at])? & truth(run, &words[at + 1..])?);
    }
    match words.split_first() {
        Some((&"!", rest)) => Ok(!truth(run, rest)?),
        _ => Err((2, format!("{}: not a test", words.join(" ")))),
    }
}

fn one(run: &Run<'_>, test: &str, word: &str) -> Result<bool, Ends> {
    let path = run.path(word);
    let node = || run.look(|tree, user| reachable(tree, user, &path).cloned()).ok();
    let may = |want| run.look(|tree, user| tree.open(user, &path, want).map(drop)).is_ok();
    Ok(match test {
        "-n" => !word.is_empty(),
        "-z" => word.is_empty(),
        "-e" => node().is_some(),
        "-f" => node().is_some_and(|node| !node.is_folder()),
        "-d" => node().is_some_and(|node| node.is_folder()),
        "-s" => node().is_some_and(|node| size(&node) > 0),
        "-r" => may(Want::Read),
        "-w" => may(Want::Write),
        "-x" => may(Want::Exec),
        "-L" | "-h" => false,
        "-t" => false,
        _ => return Err((2, format!("{test}: not a test"))),
    })
}
