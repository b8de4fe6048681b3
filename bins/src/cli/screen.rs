//! [`Screen`]: the terminal as one page that is written again and again, and is given back as it was.
//!
//! A few escape codes that every terminal knows, and the line discipline through the system's own calls, are all that
//! one table needs.

use std::{
    io::{self, IsTerminal, Read, Write},
    thread,
};

use rustix::termios::{LocalModes, OptionalActions, SpecialCodeIndex, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::sync::mpsc;

/// Another page, without a cursor.
const ENTER: &str = "\x1b[?1049h\x1b[?25l";
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";
const HOME: &str = "\x1b[H";
const CLEAR_LINE: &str = "\x1b[K";
const CLEAR_BELOW: &str = "\x1b[J";

/// A terminal's size where it does not say.
const USUAL_SIZE: (usize, usize) = (80, 24);

/// The terminal, until this is dropped.
pub(crate) struct Screen {
    before: Option<Termios>,
    keys: mpsc::Receiver<u8>,
}

impl Screen {
    /// Whether there is a terminal to look at.
    pub(crate) fn is_there() -> bool {
        io::stdout().is_terminal()
    }

    /// Takes the terminal. Keys come one by one where stdin is a terminal too; Ctrl-C stays a signal.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn take() -> io::Result<Self> {
        let before = tcgetattr(io::stdin()).ok();
        if let Some(before) = &before {
            let mut raw = before.clone();
            raw.local_modes.remove(LocalModes::ICANON | LocalModes::ECHO);
            // Stopped, it would leave the shell on this page.
            raw.special_codes[SpecialCodeIndex::VSUSP] = 0;
            tcsetattr(io::stdin(), OptionalActions::Now, &raw)?;
        }
        let (send, keys) = mpsc::channel(8);
        if before.is_some() {
            // It blocks in its read and ends with the process, or when nobody listens any more.
            thread::spawn(move || {
                for key in io::stdin().lock().bytes() {
                    let Ok(key) = key else { return };
                    if send.blocking_send(key).is_err() {
                        return;
                    }
                }
            });
        }
        let screen = Self { before, keys };
        let mut out = io::stdout().lock();
        out.write_all(ENTER.as_bytes())?;
        out.flush()?;
        Ok(screen)
    }

    /// Columns and rows.
    pub(crate) fn size(&self) -> (usize, usize) {
        match tcgetwinsize(io::stdout()) {
            Ok(size) if size.ws_col > 0 && size.ws_row > 0 => (size.ws_col.into(), size.ws_row.into()),
            _ => USUAL_SIZE,
        }
    }

    /// Writes the page: as many lines, and as much of each, as there is room for.
    ///
    /// # Errors
    /// When the terminal is gone.
    pub(crate) fn show(&self, lines: &[String]) -> io::Result<()> {
        let (columns, rows) = self.size();
        let mut page = HOME.to_owned();
        for (row, line) in lines.iter().take(rows).enumerate() {
            if row > 0 {
                page.push_str("\r\n");
            }
            page.extend(line.chars().take(columns));
            page.push_str(CLEAR_LINE);
        }
        page.push_str(CLEAR_BELOW);
        let mut out = io::stdout().lock();
        out.write_all(page.as_bytes())?;
        out.flush()
    }

    /// The next key; never where there is no keyboard.
    pub(crate) async fn key(&mut self) -> u8 {
        match self.keys.recv().await {
            Some(key) => key,
            None => std::future::pending().await,
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let mut out = io::stdout().lock();
        // A terminal that is gone needs nothing back.
        let _ = out.write_all(LEAVE.as_bytes()).and_then(|()| out.flush());
        if let Some(before) = &self.before {
            let _ = tcsetattr(io::stdin(), OptionalActions::Now, before);
        }
    }
}
