//! From a script's text to its commands.

/// How deep commands may be nested.
const MAX_DEPTH: usize = 40;

/// Commands one after another.
pub(super) type List = Vec<Chain>;

/// Pipelines joined by `&&` and `||`.
#[derive(Clone, Debug)]
pub(super) struct Chain {
    pub(super) first: Pipeline,
    pub(super) rest: Vec<(Join, Pipeline)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Join {
    And,
    Or,
}

#[derive(Clone, Debug)]
pub(super) struct Pipeline {
    pub(super) negated: bool,
    pub(super) commands: Vec<Command>,
}

#[derive(Clone, Debug)]
pub(super) struct Command {
    pub(super) what: What,
    pub(super) redirections: Vec<Redirection>,
}

#[derive(Clone, Debug)]
pub(super) enum What {
    Simple { assignments: Vec<(String, Word)>, words: Vec<Word> },
    If { arms: Vec<(List, List)>, otherwise: Option<List> },
    Loop { until: bool, condition: List, body: List },
    For { name: String, words: Option<Vec<Word>>, body: List },
    Case { word: Word, arms: Vec<(Vec<Word>, List)> },
    Group(List),
    Subshell(List),
}

#[derive(Clone, Debug)]
pub(super) enum Redirection {
    /// `< file`
    In(Word),
    /// A here-document's text.
    Here(Word),
    /// `n> file`, `n>> file`
    Out { from: u8, append: bool, to: Word },
    /// `n>&m`
    Copy { from: u8, to: u8 },
}

#[derive(Clone, Debug, Default)]
pub(super) struct Word(pub(super) Vec<Part>);

#[derive(Clone, Debug)]
pub(super) enum Part {
    /// Text outside quotes.
    Plain(String),
    /// Text in quotes or behind a backslash.
    Quoted(String),
    /// `$name` or `${name...}`; quoted ones are not split.
    Variable { name: String, change: Option<(Change, Word)>, quoted: bool },
    /// `$(...)`
    Output { script: List, quoted: bool },
    /// `$((...))`
    Sum { text: Word, quoted: bool },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// `-`, and `:-` when empty counts as unset.
    Default { or_empty: bool },
    /// `+`, and `:+`.
    Alternative { or_empty: bool },
    /// `${#name}`
    Length,
}

type Parsed<T> = Result<T, String>;

pub(super) fn parse(text: &str) -> Parsed<List> {
    let mut parser = Parser { chars: text.chars().collect(), at: 0, depth: 0, heres: Vec::new() };
    let list = parser.list(&[])?;
    match parser.peek() {
        None => Ok(list),
        Some(c) => Err(format!("unexpected {c:?}")),
    }
}

struct Parser {
    chars: Vec<char>,
    at: usize,
    depth: usize,
    /// Here-documents whose text begins after the line: the end word, and whether the text is taken as it is.
    heres: Vec<(String, bool, Option<Word>)>,
}

const RESERVED: [&str; 15] =
    ["if", "then", "elif", "else", "fi", "while", "until", "do", "done", "for", "in", "case", "esac", "{", "}"];

impl Parser {
    fn peek(&self) -> Option<char> {
        self.chars.get(self.at).copied()
    }

    fn ahead(&self, text: &str) -> bool {
        text.chars().enumerate().all(|(i, c)| self.chars.get(self.at + i) == Some(&c))
    }

    fn eat(&mut self, text: &str) -> bool {
        let there = self.ahead(text);
        if there {
            self.at += text.chars().count();
        }
        there
    }

    /// Blanks, joined lines and comments, but no line ends.
    fn blanks(&mut self) {
        loop {
            if self.peek() == Some(' ') || self.peek() == Some('\t') {
                self.at += 1;
            } else if self.ahead("\\\n") {
                self.at += 2;
            } else if self.peek() == Some('#') {
                while self.peek().is_some_and(|c| c != '\n') {
                    self.at += 1;
                }
            } else {
                return;
            }
        }
    }

    fn lines(&mut self) -> Parsed<()> {
        loop {
            self.blanks();
            if self.peek() != Some('\n') {
                return Ok(());
            }
            self.newline()?;
        }
    }

    /// A line's end, and the here-documents that begin there.
    fn newline(&mut self) -> Parsed<()> {
        self.at += 1;
        for index in 0..self.heres.len() {
            let (end, raw, word) = &self.heres[index];
            if word.is_some() {
                continue;
            }
            let (end, raw) = (end.clone(), *raw);
            let mut text = String::new();
            loop {
                if self.peek().is_none() {
                    return Err(format!("here-document without its end {end:?}"));
                }
                let mut line = String::new();
                while let Some(c) = self.peek() {
                    self.at += 1;
                    if c == '\n' {
                        break;
                    }
                    line.push(c);
                }
                if line == end {
                    break;
                }
                text.push_str(&line);
                text.push('\n');
            }
            let word = if raw {
                Word(vec![Part::Quoted(text)])
            } else {
                let mut inner = Parser { chars: text.chars().collect(), at: 0, depth: self.depth, heres: Vec::new() };
                let mut parts = Vec::new();
                inner.double_quoted(&mut parts, None)?;
                Word(parts)
            };
            self.heres[index].2 = Some(word);
        }
        Ok(())
    }

    /// The bare word ahead, if the next word is one of letters alone (or a brace).
    fn keyword(&self) -> Option<&'static str> {
        RESERVED.into_iter().find(|word| {
            self.ahead(word)
                && self.chars.get(self.at + word.len()).is_none_or(|c| c.is_whitespace() || ";&|()<>".contains(*c))
        })
    }

    fn expect(&mut self, word: &str) -> Parsed<()> {
        self.lines()?;
        if self.keyword() == Some(word) {
            self.at += word.len();
            return Ok(());
        }
        Err(match self.peek() {
            Some(c) => format!("expected {word:?} before {c:?}"),
            None => format!("expected {word:?} before the end"),
        })
    }

    fn list(&mut self, ends: &[&str]) -> Parsed<List> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err("commands are nested too deep".to_owned());
        }
        let mut list = List::new();
        loop {
            self.lines()?;
            let done = match self.peek() {
                None | Some(')') => true,
                Some(';') if self.ahead(";;") => true,
                _ => self.keyword().is_some_and(|word| ends.contains(&word)),
            };
            if done {
                break;
            }
            list.push(self.chain()?);
            self.blanks();
            match self.peek() {
                Some(';') if !self.ahead(";;") => self.at += 1,
                Some('&') => return Err("background jobs (&) are not supported".to_owned()),
                Some('\n') => self.newline()?,
                _ => {}
            }
        }
        self.depth -= 1;
        self.fill_heres(&mut list)?;
        Ok(list)
    }

    /// A list that must have a command.
    fn body(&mut self, ends: &[&str]) -> Parsed<List> {
        let list = self.list(ends)?;
        if list.is_empty() { Err(format!("a command is missing before {ends:?}")) } else { Ok(list) }
    }

    fn chain(&mut self) -> Parsed<Chain> {
        let first = self.pipeline()?;
        let mut rest = Vec::new();
        loop {
            self.blanks();
            let join = if self.eat("&&") {
                Join::And
            } else if self.eat("||") {
                Join::Or
            } else {
                return Ok(Chain { first, rest });
            };
            self.lines()?;
            rest.push((join, self.pipeline()?));
        }
    }

    fn pipeline(&mut self) -> Parsed<Pipeline> {
        let mut negated = false;
        self.blanks();
        while self.peek() == Some('!') && self.chars.get(self.at + 1).is_some_and(|c| c.is_whitespace()) {
            self.at += 1;
            negated = !negated;
            self.blanks();
        }
        let mut commands = vec![self.command()?];
        loop {
            self.blanks();
            if self.ahead("||") || !self.eat("|") {
                return Ok(Pipeline { negated, commands });
            }
            self.lines()?;
            commands.push(self.command()?);
        }
    }

    fn command(&mut self) -> Parsed<Command> {
        self.blanks();
        let what = match self.keyword() {
            Some("if") => self.if_command()?,
            Some(word @ ("while" | "until")) => {
                self.at += word.len();
                let condition = self.body(&["do"])?;
                What::Loop { until: word == "until", condition, body: self.do_group()? }
            }
            Some("for") => self.for_command()?,
            Some("case") => self.case_command()?,
            Some("{") => {
                self.at += 1;
                let list = self.body(&["}"])?;
                self.expect("}")?;
                What::Group(list)
            }
            Some(word) => return Err(format!("unexpected {word:?}")),
            None if self.eat("(") => {
                let list = self.body(&[])?;
                if !self.eat(")") {
                    return Err("expected ')'".to_owned());
                }
                What::Subshell(list)
            }
            None => return self.simple(),
        };
        let mut redirections = Vec::new();
        loop {
            self.blanks();
            match self.redirection()? {
                Some(redirection) => redirections.push(redirection),
                None => return Ok(Command { what, redirections }),
            }
        }
    }

    fn do_group(&mut self) -> Parsed<List> {
        self.expect("do")?;
        let body = self.body(&["done"])?;
        self.expect("done")?;
        Ok(body)
    }

    fn if_command(&mut self) -> Parsed<What> {
        self.expect("if")?;
        let mut arms = Vec::new();
        let mut otherwise = None;
        loop {
            let condition = self.body(&["then"])?;
            self.expect("then")?;
            arms.push((condition, self.body(&["elif", "else", "fi"])?));
            self.lines()?;
            match self.keyword() {
                Some("elif") => self.at += 4,
                Some("else") => {
                    self.at += 4;
                    otherwise = Some(self.body(&["fi"])?);
                    self.expect("fi")?;
                    break;
                }
                _ => {
                    self.expect("fi")?;
                    break;
                }
            }
        }
        Ok(What::If { arms, otherwise })
    }

    fn for_command(&mut self) -> Parsed<What> {
        self.expect("for")?;
        self.blanks();
        let name = self.name();
        if name.is_empty() {
            return Err("for wants a variable's name".to_owned());
        }
        self.lines()?;
        let mut words = None;
        if self.keyword() == Some("in") {
            self.at += 2;
            let mut given = Vec::new();
            loop {
                self.blanks();
                match self.word()? {
                    Some(word) => given.push(word),
                    None => break,
                }
            }
            words = Some(given);
        }
        self.eat(";");
        Ok(What::For { name, words, body: self.do_group()? })
    }

    fn case_command(&mut self) -> Parsed<What> {
        self.expect("case")?;
        self.blanks();
        let word = self.word()?.ok_or("case wants a word")?;
        self.expect("in")?;
        let mut arms = Vec::new();
        loop {
            self.lines()?;
            if self.keyword() == Some("esac") {
                self.at += 4;
                return Ok(What::Case { word, arms });
            }
            self.eat("(");
            let mut patterns = Vec::new();
            loop {
                self.blanks();
                patterns.push(self.word()?.ok_or("case wants a pattern")?);
                self.blanks();
                if self.eat(")") {
                    break;
                }
                if !self.eat("|") {
                    return Err("expected ')' after a pattern".to_owned());
                }
            }
            arms.push((patterns, self.list(&["esac"])?));
            self.lines()?;
            if !self.eat(";;") && self.keyword() != Some("esac") {
                return Err("expected ';;' or 'esac'".to_owned());
            }
        }
    }

    fn simple(&mut self) -> Parsed<Command> {
        let mut assignments = Vec::new();
        let mut words = Vec::new();
        let mut redirections = Vec::new();
        loop {
            self.blanks();
            if let Some(redirection) = self.redirection()? {
                redirections.push(redirection);
                continue;
            }
            let begin = self.at;
            if words.is_empty() {
                let name = self.name();
                if !name.is_empty() && self.eat("=") {
                    assignments.push((name, self.word()?.unwrap_or_default()));
                    continue;
                }
                self.at = begin;
            }
            match self.word()? {
                Some(word) => words.push(word),
                None if words.is_empty() && assignments.is_empty() && redirections.is_empty() => {
                    return Err(match self.peek() {
                        Some(c) => format!("unexpected {c:?}"),
                        None => "unexpected end".to_owned(),
                    });
                }
                None => {
                    if self.peek() == Some('(') {
                        return Err("functions are not supported".to_owned());
                    }
                    return Ok(Command { what: What::Simple { assignments, words }, redirections });
                }
            }
        }
    }

    fn redirection(&mut self) -> Parsed<Option<Redirection>> {
        let begin = self.at;
        let digit = self.peek().and_then(|c| c.to_digit(10));
        if digit.is_some() {
            self.at += 1;
        }
        let from = |usual: u8| digit.map_or(usual, |d| d as u8);
        let redirection = if self.eat("<<") {
            self.blanks();
            let end = self.word()?.ok_or("<< wants an end word")?;
            let raw = end.0.iter().any(|part| matches!(part, Part::Quoted(_)));
            let mut text = String::new();
            for part in &end.0 {
                match part {
                    Part::Plain(piece) | Part::Quoted(piece) => text.push_str(piece),
                    _ => return Err("<< wants a plain end word".to_owned()),
                }
            }
            let index = self.heres.len();
            self.heres.push((text, raw, None));
            // The text comes only after this line; `fill_heres` puts it in.
            Redirection::Here(Word(vec![Part::Plain(index.to_string())]))
        } else if self.eat("<") {
            self.blanks();
            Redirection::In(self.word()?.ok_or("< wants a file")?)
        } else if self.eat(">&") {
            let to = self.peek().and_then(|c| c.to_digit(10)).filter(|d| (1..=2).contains(d));
            let to = to.ok_or(">& wants 1 or 2")?;
            self.at += 1;
            Redirection::Copy { from: from(1), to: to as u8 }
        } else if self.eat(">") {
            let append = self.eat(">");
            self.blanks();
            Redirection::Out { from: from(1), append, to: self.word()?.ok_or("> wants a file")? }
        } else {
            self.at = begin;
            return Ok(None);
        };
        match redirection {
            Redirection::Out { from, .. } | Redirection::Copy { from, .. } if !(1..=2).contains(&from) => {
                Err(format!("only 1 and 2 can be redirected, not {from}"))
            }
            redirection => Ok(Some(redirection)),
        }
    }

    /// Puts the texts of here-documents in, once the lines after their commands were read.
    fn fill_heres(&mut self, list: &mut List) -> Parsed<()> {
        if self.depth > 0 || self.heres.is_empty() {
            return Ok(());
        }
        if let Some((end, ..)) = self.heres.iter().find(|(.., word)| word.is_none()) {
            return Err(format!("here-document without its end {end:?}"));
        }
        fill_list(list, &self.heres);
        Ok(())
    }

    fn name(&mut self) -> String {
        let begin = self.at;
        while let Some(c) = self.peek() {
            if c == '_' || c.is_ascii_alphabetic() || (self.at > begin && c.is_ascii_digit()) {
                self.at += 1;
            } else {
                break;
            }
        }
        self.chars[begin..self.at].iter().collect()
    }

    fn word(&mut self) -> Parsed<Option<Word>> {
        let mut parts = Vec::new();
        while let Some(c) = self.peek() {
            match c {
                ' ' | '\t' | '\n' | ';' | '&' | '|' | '<' | '>' | '(' | ')' => break,
                '\'' => {
                    self.at += 1;
                    let mut text = String::new();
                    loop {
                        match self.peek() {
                            None => return Err("a quote ' is not closed".to_owned()),
                            Some('\'') => break,
                            Some(c) => text.push(c),
                        }
                        self.at += 1;
                    }
                    self.at += 1;
                    parts.push(Part::Quoted(text));
                }
                '"' => {
                    self.at += 1;
                    // An empty pair is a word too.
                    parts.push(Part::Quoted(String::new()));
                    self.double_quoted(&mut parts, Some('"'))?;
                }
                '\\' => {
                    self.at += 1;
                    match self.peek() {
                        Some('\n') => self.at += 1,
                        Some(c) => {
                            self.at += 1;
                            parts.push(Part::Quoted(c.to_string()));
                        }
                        None => parts.push(Part::Quoted("\\".to_owned())),
                    }
                }
                '$' => {
                    let part = self.dollar(false)?;
                    parts.push(part);
                }
                '`' => return Err("backquotes are not supported; use $(...)".to_owned()),
                c => {
                    self.at += 1;
                    match parts.last_mut() {
                        Some(Part::Plain(text)) => text.push(c),
                        _ => parts.push(Part::Plain(c.to_string())),
                    }
                }
            }
        }
        Ok(if parts.is_empty() { None } else { Some(Word(parts)) })
    }

    /// The inside of double quotes, up to and with the end; without one, up to the end of the text.
    fn double_quoted(&mut self, parts: &mut Vec<Part>, end: Option<char>) -> Parsed<()> {
        loop {
            let Some(c) = self.peek() else {
                return if end.is_some() { Err("a quote \" is not closed".to_owned()) } else { Ok(()) };
            };
            if Some(c) == end {
                self.at += 1;
                return Ok(());
            }
            match c {
                '\\' => {
                    self.at += 1;
                    match self.peek() {
                        Some('\n') => self.at += 1,
                        Some(c) if matches!(c, '$' | '`' | '\\') || Some(c) == end => {
                            self.at += 1;
                            quoted(parts, c);
                        }
                        _ => quoted(parts, '\\'),
                    }
                }
                '$' => {
                    let part = self.dollar(true)?;
                    parts.push(part);
                }
                '`' => return Err("backquotes are not supported; use $(...)".to_owned()),
                c => {
                    self.at += 1;
                    quoted(parts, c);
                }
            }
        }
    }

    fn dollar(&mut self, quoted: bool) -> Parsed<Part> {
        self.at += 1;
        if self.eat("((") {
            let begin = self.at;
            let mut open = 0usize;
            loop {
                match self.peek() {
                    None => return Err("$(( is not closed".to_owned()),
                    Some('(') => open += 1,
                    Some(')') if open == 0 && self.ahead("))") => break,
                    Some(')') => open = open.saturating_sub(1),
                    Some(_) => {}
                }
                self.at += 1;
            }
            let chars = self.chars[begin..self.at].to_vec();
            self.at += 2;
            if self.depth >= MAX_DEPTH {
                return Err("sums are nested too deep".to_owned());
            }
            let mut inner = Self { chars, at: 0, depth: self.depth + 1, heres: Vec::new() };
            let mut parts = Vec::new();
            inner.double_quoted(&mut parts, None)?;
            return Ok(Part::Sum { text: Word(parts), quoted });
        }
        if self.eat("(") {
            let heres = self.heres.len();
            let script = self.list(&[])?;
            if !self.eat(")") {
                return Err("$( is not closed".to_owned());
            }
            if self.heres.len() > heres {
                return Err("here-documents inside $(...) are not supported".to_owned());
            }
            return Ok(Part::Output { script, quoted });
        }
        if self.eat("{") {
            return self.braced(quoted);
        }
        let name = match self.peek() {
            Some(c) if c.is_ascii_digit() || matches!(c, '?' | '#' | '@' | '*') => {
                self.at += 1;
                c.to_string()
            }
            Some('$' | '!' | '-') => return Err("$$, $! and $- are not supported".to_owned()),
            _ => self.name(),
        };
        if name.is_empty() {
            return Ok(if quoted { Part::Quoted("$".to_owned()) } else { Part::Plain("$".to_owned()) });
        }
        Ok(Part::Variable { name, change: None, quoted })
    }

    fn braced(&mut self, quoted: bool) -> Parsed<Part> {
        let length = self.peek() == Some('#') && self.chars.get(self.at + 1) != Some(&'}');
        if length {
            self.at += 1;
        }
        let mut name = self.name();
        if name.is_empty() {
            while self.peek().is_some_and(|c| c.is_ascii_digit() || matches!(c, '?' | '#' | '@' | '*')) {
                name.extend(self.peek());
                self.at += 1;
            }
        }
        if name.is_empty() {
            return Err("${ wants a variable's name".to_owned());
        }
        let mut change = length.then(|| (Change::Length, Word::default()));
        if !self.ahead("}") && !length {
            let or_empty = self.eat(":");
            let kind = if self.eat("-") {
                Change::Default { or_empty }
            } else if self.eat("+") {
                Change::Alternative { or_empty }
            } else {
                return Err(format!("${{{name}...}}: only :- - :+ + and # are supported"));
            };
            self.depth += 1;
            if self.depth > MAX_DEPTH {
                return Err("values are nested too deep".to_owned());
            }
            let mut parts = Vec::new();
            self.double_quoted(&mut parts, Some('}'))?;
            self.depth -= 1;
            change = Some((kind, Word(parts)));
        } else if !self.eat("}") {
            return Err("${ is not closed".to_owned());
        }
        Ok(Part::Variable { name, change, quoted })
    }
}

fn quoted(parts: &mut Vec<Part>, c: char) {
    match parts.last_mut() {
        Some(Part::Quoted(text)) => text.push(c),
        _ => parts.push(Part::Quoted(c.to_string())),
    }
}

type Heres = [(String, bool, Option<Word>)];

fn fill_list(list: &mut List, heres: &Heres) {
    for chain in list {
        for pipeline in std::iter::once(&mut chain.first).chain(chain.rest.iter_mut().map(|(_, pipeline)| pipeline)) {
            pipeline.commands.iter_mut().for_each(|command| fill_command(command, heres));
        }
    }
}

fn fill_command(command: &mut Command, heres: &Heres) {
    for redirection in &mut command.redirections {
        if let Redirection::Here(word) = redirection
            && let [Part::Plain(index)] = word.0.as_slice()
            && let Some((.., Some(text))) = index.parse().ok().and_then(|index: usize| heres.get(index))
        {
            *word = text.clone();
        }
    }
    match &mut command.what {
        What::Simple { .. } => {}
        What::If { arms, otherwise } => {
            for (condition, body) in arms {
                fill_list(condition, heres);
                fill_list(body, heres);
            }
            otherwise.iter_mut().for_each(|list| fill_list(list, heres));
        }
        What::Loop { condition, body, .. } => {
            fill_list(condition, heres);
            fill_list(body, heres);
        }
        What::Case { arms, .. } => arms.iter_mut().for_each(|(_, body)| fill_list(body, heres)),
        What::For { body, .. } | What::Group(body) | What::Subshell(body) => fill_list(body, heres),
    }
}
