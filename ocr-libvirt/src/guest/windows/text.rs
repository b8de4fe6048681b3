//! Paths and quoting of Windows guests: what goes through which reader.
//!
//! Three readers stand between an argument and a program: the agent, which joins the arguments that it is given and
//! quotes those with blanks; `cmd.exe`, where it is in between; and the program, which splits its command line again as
//! `CommandLineToArgvW` does. What must reach `cmd.exe` as it is goes by an environment variable, since none of them
//! reads those: see [`super`].

use ocr_core::{Error, Result, id::shown};

/// The longest command line that `cmd.exe` takes.
pub(super) const MAX_LINE: usize = 8191;

/// Checks a path of a Windows guest: a drive, then names that Windows allows, none of them `.` or `..`, and no end in a
/// separator. Returns it with `\` throughout.
///
/// # Errors
/// `Invalid` naming the path.
pub(super) fn check_path(path: &str) -> Result<String> {
    let plain = path.replace('/', r"\");
    let mut letters = plain.chars();
    let drive = letters.next().is_some_and(|c| c.is_ascii_alphabetic()) && letters.next() == Some(':');
    let names = plain.get(2..).and_then(|rest| rest.strip_prefix('\\')).filter(|_| drive);
    // A `%` or `!` is read by nobody where it goes by a variable; these are what no name may have, or what `cmd.exe`
    // would take for more than one file.
    let fine = |name: &str| {
        !name.is_empty()
            && name.encode_utf16().count() <= 255
            && !name.contains(|c: char| c < ' ' || r#"<>:"|?*"#.contains(c))
            && !name.ends_with(['.', ' '])
    };
    match names {
        // The limit that older programs have, and those that ours call.
        Some(names) if names.split('\\').all(fine) && plain.encode_utf16().count() < 260 => Ok(plain),
        _ => Err(Error::invalid(
            "path",
            format_args!(
                "wants a drive's absolute path such as C:\\folder\\file, without '.' or '..' parts, of less than 260 \
                 characters, got {}",
                shown(path)
            ),
        )),
    }
}

/// Folder and name of a checked path.
pub(super) fn split(path: &str) -> (&str, &str) {
    let (folder, name) = path.rsplit_once('\\').unwrap_or(("", path));
    (folder, name)
}

/// A word of a command line, so that `CommandLineToArgvW` gives it back.
///
/// Backslashes are letters there unless a quote follows: then two are one, and one makes the quote a letter.
pub(super) fn quote_argument(argument: &str) -> String {
    if !argument.is_empty() && !argument.contains([' ', '\t', '\n', '\u{b}', '"']) {
        return argument.to_owned();
    }
    let mut quoted = String::with_capacity(argument.len() + 2);
    quoted.push('"');
    let mut backslashes = 0;
    for letter in argument.chars() {
        match letter {
            '\\' => backslashes += 1,
            '"' => {
                // Those before a quote twice, and one more for the quote itself.
                quoted.extend(std::iter::repeat_n('\\', backslashes + 1));
                backslashes = 0;
            }
            _ => backslashes = 0,
        }
        quoted.push(letter);
    }
    quoted.extend(std::iter::repeat_n('\\', backslashes));
    quoted.push('"');
    quoted
}

/// A whole command line for a program, with the program first. A program's name has no quotes, and is read by simpler
/// rules.
///
/// # Errors
/// `Invalid` for a name with a quote; for a batch file, whose arguments are read by `cmd.exe` whatever is done to them.
pub(super) fn command_line(argv: &[String]) -> Result<String> {
    let (program, arguments) = argv.split_first().ok_or_else(|| Error::invalid("command", "wants a program to run"))?;
    let lower = program.trim_end_matches(['.', ' ']).to_ascii_lowercase();
    if lower.ends_with(".bat") || lower.ends_with(".cmd") {
        return Err(Error::invalid("command", "wants a shell line to run a batch file: cmd.exe reads its arguments"));
    }
    if program.contains('"') {
        return Err(Error::invalid("command", "a program's name has no quotes in Windows"));
    }
    let mut line = if program.contains([' ', '\t']) { format!("\"{program}\"") } else { program.clone() };
    for argument in arguments {
        line.push(' ');
        line.push_str(&quote_argument(argument));
    }
    Ok(line)
}

/// A command line as `cmd.exe /c` has to get it to hand it on as it is.
///
/// A caret makes the letter after it a plain one. So no quote ever opens for `cmd.exe`, and every sign that it would act
/// on is plain. A `%` cannot be made plain; but a caret before the name's end makes the name another one, and a variable
/// that is not there is left as it stands, and the carets go.
pub(super) fn escape_for_cmd(line: &str) -> String {
    let mut escaped = String::with_capacity(line.len() * 2);
    for letter in line.chars() {
        if r#"()%!^"<>&|"#.contains(letter) {
            escaped.push('^');
        }
        escaped.push(letter);
    }
    escaped
}

/// Checks a line for `cmd.exe`, which ends at its first line feed.
pub(super) fn check_line(line: &str) -> Result<()> {
    if line.contains(['\r', '\n']) {
        return Err(Error::invalid("command", "wants one line in a Windows guest; cmd.exe ends at the first"));
    }
    // What else stands in that command line is short.
    if line.encode_utf16().count() > MAX_LINE - 100 {
        return Err(Error::invalid("command", format_args!("wants at most {} characters", MAX_LINE - 100)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// `CommandLineToArgvW`, for all but the program, as its documentation has it.
    fn split_arguments(line: &str) -> Vec<String> {
        let letters: Vec<char> = line.chars().collect();
        let (mut arguments, mut at) = (Vec::new(), 0);
        loop {
            while at < letters.len() && matches!(letters[at], ' ' | '\t') {
                at += 1;
            }
            if at == letters.len() {
                return arguments;
            }
            let (mut argument, mut quoted) = (String::new(), false);
            while at < letters.len() && (quoted || !matches!(letters[at], ' ' | '\t')) {
                let backslashes = letters[at..].iter().take_while(|letter| **letter == '\\').count();
                at += backslashes;
                if letters.get(at) == Some(&'"') {
                    argument.extend(std::iter::repeat_n('\\', backslashes / 2));
                    if backslashes % 2 == 1 {
                        argument.push('"');
                    } else if quoted && letters.get(at + 1) == Some(&'"') {
                        argument.push('"');
                        at += 1;
                    } else {
                        quoted = !quoted;
                    }
                    at += 1;
                } else {
                    argument.extend(std::iter::repeat_n('\\', backslashes));
                    if backslashes == 0 {
                        argument.push(letters[at]);
                        at += 1;
                    }
                }
            }
            arguments.push(argument);
        }
    }

    /// What `cmd.exe /c` makes of a line: variables, then signs and carets. `None` when it is no single plain command.
    fn read_by_cmd(line: &str, variables: &[(&str, &str)]) -> Option<String> {
        let (mut expanded, mut rest) = (String::new(), line);
        while let Some(begin) = rest.find('%') {
            expanded.push_str(&rest[..begin]);
            let after = &rest[begin + 1..];
            let found = after.find('%').and_then(|end| {
                let value = variables.iter().find(|(name, _)| name.eq_ignore_ascii_case(&after[..end]))?.1;
                Some((value, &after[end + 1..]))
            });
            match found {
                Some((value, behind)) => {
                    expanded.push_str(value);
                    rest = behind;
                }
                None => {
                    expanded.push('%');
                    rest = after;
                }
            }
        }
        expanded.push_str(rest);
        let (mut plain, mut quoted) = (String::new(), false);
        let mut letters = expanded.chars();
        while let Some(letter) = letters.next() {
            match letter {
                '"' => {
                    quoted = !quoted;
                    plain.push(letter);
                }
                '^' if !quoted => plain.push(letters.next()?),
                '&' | '|' | '<' | '>' | '(' | ')' if !quoted => return None,
                _ => plain.push(letter),
            }
        }
        Some(plain)
    }

    fn argument() -> impl Strategy<Value = String> {
        prop_oneof![r#"[ "\\a]{0,12}"#, r#"[ -~]{0,30}"#, "[^\u{0}\r\n]{0,20}", r#"[%!^&|<>()"\\ A-Z]{0,20}"#]
    }

    proptest! {
        #[test]
        fn a_program_gets_the_arguments_that_were_given(arguments in proptest::collection::vec(argument(), 0..6)) {
            let argv = [vec![r"C:\Program Files\tool.exe".to_owned()], arguments.clone()].concat();
            let line = command_line(&argv).unwrap();
            let rest = line.strip_prefix(r#""C:\Program Files\tool.exe""#).unwrap();
            prop_assert_eq!(split_arguments(rest), arguments);
        }

        #[test]
        fn cmd_hands_an_escaped_line_on_as_it_was(arguments in proptest::collection::vec(argument(), 0..6)) {
            let argv = [vec!["tool.exe".to_owned()], arguments].concat();
            let line = command_line(&argv).unwrap();
            let variables = [("PATH", "x & y"), ("A", "\""), ("AB", "|"), ("^A", ""), ("", "&")];
            // A variable whose name ends in a caret is nobody's.
            prop_assert_eq!(read_by_cmd(&escape_for_cmd(&line), &variables[..3]), Some(line));
        }

        #[test]
        fn a_checked_path_stays_checked(path in r"[A-Za-z:./\\ ~%!&^é-]{0,20}|C:(\\[a-z .%&!^]{1,8}){1,4}") {
            if let Ok(checked) = check_path(&path) {
                prop_assert_eq!(check_path(&checked).unwrap(), checked.clone());
                let (folder, name) = split(&checked);
                prop_assert_eq!(format!(r"{folder}\{name}"), checked);
            }
        }
    }

    #[test]
    fn what_windows_takes_for_something_else_is_no_path() {
        for path in [
            "",
            "C:",
            r"C:\",
            "/tmp/x",
            r"\\host\share\x",
            r"C:x",
            r"C:\..\x",
            r"C:\a\.\x",
            r"C:\a\",
            r"C:\a\\b",
            r"C:\a*",
            "C:\\a\nb",
            r"C:\a:stream",
            r#"C:\a"b"#,
            r"C:\a.",
            r"C:\a ",
            r"\\?\C:\a",
            "C:\\a\0b",
            &format!(r"C:\{}", "a".repeat(300)),
        ] {
            assert!(check_path(path).is_err(), "{path:?}");
        }
        assert_eq!(check_path("c:/Program Files/ünï & 100%.txt").unwrap(), r"c:\Program Files\ünï & 100%.txt");
    }

    #[test]
    fn arguments_are_quoted_by_the_rule() {
        for (argument, quoted) in [
            ("plain", "plain"),
            ("", "\"\""),
            ("a b", "\"a b\""),
            (r"C:\a\", r"C:\a\"),
            (r"C:\a b\", r#""C:\a b\\""#),
            (r#"say "hi""#, r#""say \"hi\"""#),
            (r#"\""#, r#""\\\"""#),
        ] {
            assert_eq!(quote_argument(argument), quoted);
        }
        assert_eq!(escape_for_cmd(r#"t "a & b" %X%"#), r#"t ^"a ^& b^" ^%X^%"#);
        assert!(command_line(&["run.BAT".to_owned()]).is_err() && command_line(&["run.cmd ".to_owned()]).is_err());
    }
}
