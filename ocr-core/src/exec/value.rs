//! What a condition's stdout means: one finite number, or a fault with a text for people.

use crate::id::shown;

/// The longest text that can be a value. Longer ones are output of something else.
const MAX_BYTES: usize = 64;

/// Reads the value that a condition wrote: one finite decimal number, with any white space around it.
///
/// Everything else is a fault: `0,5`, more than one word, `nan`, `inf`, and numbers that the wire's 32-bit float cannot
/// hold. A value that is not 1 never becomes 1 by rounding, because exactly 1 means "met".
pub(super) fn parse_value(stdout: &[u8]) -> Result<f32, String> {
    let text = String::from_utf8_lossy(stdout);
    let text = text.trim();
    if text.is_empty() {
        return Err("wrote nothing to stdout; wants one number".to_owned());
    }
    let wanted = || format!("wrote {}; wants one finite number such as 0.5", shown(text));
    if text.len() > MAX_BYTES {
        return Err(wanted());
    }
    let value: f32 = text.parse().map_err(|_| wanted())?;
    if !value.is_finite() {
        return Err(wanted());
    }
    let exact: f64 = text.parse().map_err(|_| wanted())?;
    let value = match value {
        1.0 if exact < 1.0 => 1.0_f32.next_down(),
        1.0 if exact > 1.0 => 1.0_f32.next_up(),
        value => value,
    };
    // No sign on zero: nobody downstream shall have to wonder about -0.
    Ok(if value == 0.0 { 0.0 } else { value })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_number_with_white_space_around_it_is_a_value() {
        for (text, want) in [
            ("1", 1.0),
            ("0\n", 0.0),
            (" \t0.25\r\n", 0.25),
            ("+1", 1.0),
            ("-0", 0.0),
            ("1e-1", 0.1),
            (".5", 0.5),
            ("-1", -1.0),
            ("2", 2.0),
            ("1.0000", 1.0),
            ("1.", 1.0),
        ] {
            assert_eq!(parse_value(text.as_bytes()), Ok(want), "{text:?}");
        }
    }

    #[test]
    fn anything_else_is_a_fault_that_repeats_what_was_written() {
        for text in [
            "", " \n", "0,5", "yes", "NaN", "nan", "-NAN", "inf", "-inf", "Infinity", "1e39", "-1e39", "1e400", "0 1",
            "1\n1", "0x1", "1_0", "1 %", "١",
        ] {
            assert!(parse_value(text.as_bytes()).is_err(), "{text:?}");
        }
        assert!(parse_value(b"0,5").unwrap_err().contains("\"0,5\""));
        assert!(parse_value(b"\xff\xfe1").is_err());
        assert!(parse_value(&b"1".repeat(1000)).unwrap_err().len() < 300);
    }

    #[test]
    fn nothing_but_one_is_one() {
        assert!(parse_value(b"0.99999999999").unwrap() < 1.0);
        assert!(parse_value(b"1.00000000001").unwrap() > 1.0);
        assert_eq!(parse_value(b"1.0"), Ok(1.0));
    }

    proptest! {
        #[test]
        fn whatever_is_written_a_value_is_finite(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            if let Ok(value) = parse_value(&bytes) {
                prop_assert!(value.is_finite());
            }
        }

        #[test]
        fn whatever_looks_like_a_number_gives_a_finite_value_or_a_fault(text in "[ \n]{0,2}[-+]?([0-9]{0,42}[.,]?[0-9]{0,5}([eE][-+]?[0-9]{1,4})?|(?i:nan|inf|infinity))[ \n]{0,2}") {
            if let Ok(value) = parse_value(text.as_bytes()) {
                prop_assert!(value.is_finite());
                let exact: f64 = text.trim().parse().unwrap();
                prop_assert_eq!(value == 1.0, exact == 1.0);
                prop_assert_eq!(value > 1.0, exact > 1.0);
            }
        }

        #[test]
        fn every_finite_float_comes_back(value in any::<f32>().prop_filter("finite", |v| v.is_finite())) {
            prop_assert_eq!(parse_value(format!("{value}\n").as_bytes()).ok(), (format!("{value}").len() <= MAX_BYTES).then_some(value));
        }
    }
}
