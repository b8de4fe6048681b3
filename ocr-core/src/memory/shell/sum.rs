//! `$((...))`: whole numbers, variables, `+ - * / %`, comparisons, `!`, `&&`, `||`, parentheses.

type Answer = Result<i64, &'static str>;

/// The value of an expression; `value` looks variables up.
pub(super) fn evaluate(text: &str, value: &dyn Fn(&str) -> Option<String>) -> Answer {
    let mut sum = Sum { rest: text.trim(), value, depth: 0 };
    if sum.rest.is_empty() {
        return Ok(0);
    }
    let result = sum.level(0)?;
    if sum.rest.is_empty() { Ok(result) } else { Err("syntax error") }
}

struct Sum<'a> {
    rest: &'a str,
    value: &'a dyn Fn(&str) -> Option<String>,
    depth: u32,
}

/// From the loosest to the tightest; longer signs before their beginnings.
const LEVELS: [&[&str]; 6] = [&["||"], &["&&"], &["==", "!="], &["<=", ">=", "<", ">"], &["+", "-"], &["*", "/", "%"]];

impl Sum<'_> {
    fn eat(&mut self, sign: &str) -> bool {
        match self.rest.strip_prefix(sign) {
            Some(rest) => {
                self.rest = rest.trim_start();
                true
            }
            None => false,
        }
    }

    fn level(&mut self, level: usize) -> Answer {
        let Some(signs) = LEVELS.get(level) else { return self.atom() };
        let mut left = self.level(level + 1)?;
        while let Some(sign) = signs.iter().find(|sign| self.eat(sign)) {
            let right = self.level(level + 1)?;
            left = match *sign {
                "||" => i64::from(left != 0 || right != 0),
                "&&" => i64::from(left != 0 && right != 0),
                "==" => i64::from(left == right),
                "!=" => i64::from(left != right),
                "<=" => i64::from(left <= right),
                ">=" => i64::from(left >= right),
                "<" => i64::from(left < right),
                ">" => i64::from(left > right),
                "+" => left.wrapping_add(right),
                "-" => left.wrapping_sub(right),
                "*" => left.wrapping_mul(right),
                _ if right == 0 => return Err("division by zero"),
                "/" => left.wrapping_div(right),
                _ => left.wrapping_rem(right),
            };
        }
        Ok(left)
    }

    fn atom(&mut self) -> Answer {
        self.depth += 1;
        if self.depth > 200 {
            return Err("too long");
        }
        if self.eat("(") {
            let inner = self.level(0)?;
            return if self.eat(")") { Ok(inner) } else { Err("')' is missing") };
        }
        if self.eat("-") {
            return self.atom().map(i64::wrapping_neg);
        }
        if self.eat("+") {
            return self.atom();
        }
        if !self.rest.starts_with("!=") && self.eat("!") {
            return self.atom().map(|value| i64::from(value == 0));
        }
        let end = self.rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest.trim_start();
        match word.chars().next() {
            None => Err("syntax error"),
            Some('0'..='9') => word.parse().map_err(|_| "not a whole number"),
            Some(_) => match (self.value)(word).as_deref().map(str::trim) {
                None | Some("") => Ok(0),
                Some(text) => text.parse().map_err(|_| "a variable is not a whole number"),
            },
        }
    }
}
