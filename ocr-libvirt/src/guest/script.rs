//! Shell scripts as they are sent to a guest, and their answers.

/// What a script answers begins with this.
const ANSWER: &[u8] = b"ocr1 ";

/// A script without its comments and indentation: it travels with every command.
pub(crate) fn compact(source: &str) -> String {
    let mut text = String::with_capacity(source.len());
    for line in source.lines().map(str::trim) {
        if !line.is_empty() && !line.starts_with('#') {
            text.push_str(line);
            text.push('\n');
        }
    }
    text
}

/// An answer: its words, and the bytes that follow its line.
pub(crate) fn answer(stdout: &[u8]) -> Option<(Vec<&str>, &[u8])> {
    let rest = stdout.strip_prefix(ANSWER)?;
    let end = rest.iter().position(|&byte| byte == b'\n')?;
    let (line, bytes) = rest.split_at(end);
    Some((std::str::from_utf8(line).ok()?.split_whitespace().collect(), bytes.get(1..).unwrap_or_default()))
}

/// A text as one word of shell, on one line: newlines are taken from the variable `ocr_nl`.
pub(crate) fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''").replace('\n', "'\"$ocr_nl\"'"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_indentation_are_left_out() {
        assert_eq!(compact("# a\nif b; then\n    # c\n    d # e\nfi\n\n"), "if b; then\nd # e\nfi\n");
    }

    #[test]
    fn answers_are_taken_apart() {
        assert_eq!(answer(b"ocr1 exit 0 all cut\nx\ny").unwrap(), (vec!["exit", "0", "all", "cut"], &b"x\ny"[..]));
        assert_eq!(answer(b"ocr1 late\n").unwrap(), (vec!["late"], &b""[..]));
        for none in [&b""[..], b"ocr1 late", b"sh: not found\n", b"ocr2 x\n"] {
            assert_eq!(answer(none), None);
        }
    }
}
