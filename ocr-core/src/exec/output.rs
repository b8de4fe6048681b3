//! Cuts a command's output to what a reply or an error can carry: head and tail stay, the cut is told.

/// How much of stdout and of stderr an error repeats, in bytes each. An error travels in a gRPC header, percent-encoded
/// (three bytes for one at worst), and common clients take 16 KiB of headers.
const ERROR_BYTES: usize = 1536;

/// Output as a reply carries it: text, no trailing white space, at most `limit_bytes` with the note about the cut.
///
/// `truncated` says that the guest wrote more than was kept.
pub(super) fn cut(output: &[u8], truncated: bool, limit_bytes: usize) -> String {
    let text = String::from_utf8_lossy(output);
    let text = text.trim_end();
    if text.len() <= limit_bytes && !truncated {
        return text.to_owned();
    }
    // The note's length is taken with the whole length in it: it only gets shorter.
    let note = |bytes: usize| match (bytes, truncated) {
        (0, _) => "\n[cut: what came later]\n".to_owned(),
        (_, true) => format!("\n[cut: {bytes} bytes and what came later]\n"),
        (_, false) => format!("\n[cut: {bytes} bytes]\n"),
    };
    let room = limit_bytes.saturating_sub(note(text.len()).len());
    if room == 0 {
        return text[..boundary_before(text, limit_bytes)].to_owned();
    }
    if truncated && text.len() <= room {
        return format!("{text}{}", note(0));
    }
    // The end of an output says more about a failure than its beginning.
    let head = &text[..boundary_before(text, room / 3)];
    let tail = &text[boundary_after(text, text.len() - (room - room / 3))..];
    format!("{head}{}{tail}", note(text.len() - head.len() - tail.len()))
}

/// Output as an error repeats it: cut short, control characters but line ends and tabs made visible.
pub(super) fn cut_for_error(output: &[u8], truncated: bool) -> String {
    cut(output, truncated, ERROR_BYTES)
        .chars()
        .map(|c| if c.is_control() && !matches!(c, '\n' | '\t') { '?' } else { c })
        .collect()
}

fn boundary_before(text: &str, mut at: usize) -> usize {
    at = at.min(text.len());
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}

fn boundary_after(text: &str, mut at: usize) -> usize {
    while !text.is_char_boundary(at) {
        at += 1;
    }
    at
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn short_output_stays_as_it_is_but_for_its_trailing_white_space() {
        assert_eq!(cut(b" done \r\n\n", false, 100), " done");
        assert_eq!(cut(b"", false, 0), "");
    }

    #[test]
    fn long_output_keeps_its_head_and_its_tail_and_says_how_much_is_gone() {
        let text = format!("first{}last", "x".repeat(10_000));
        let cut = cut(text.as_bytes(), false, 200);
        assert!(cut.starts_with("first") && cut.ends_with("last"), "{cut}");
        let kept: usize = cut.lines().filter(|line| !line.starts_with("[cut")).map(str::len).sum();
        assert!(cut.contains(&format!("[cut: {} bytes]", text.len() - kept)), "{cut}");
    }

    #[test]
    fn output_that_the_guest_cut_says_so() {
        assert_eq!(cut(b"abc", true, 100), "abc\n[cut: what came later]\n");
    }

    #[test]
    fn an_error_shows_no_escape_sequences() {
        assert_eq!(cut_for_error(b"\x1b[31mred\x00\tx\ny", false), "?[31mred?\tx\ny");
    }

    proptest! {
        #[test]
        fn the_limit_holds_for_any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..600), truncated: bool, limit in 0_usize..400) {
            let text = cut(&bytes, truncated, limit);
            prop_assert!(text.len() <= limit);
            if limit >= 100 {
                prop_assert_eq!(text.contains("[cut: "), truncated || String::from_utf8_lossy(&bytes).trim_end().len() > limit);
            }
        }
    }
}
