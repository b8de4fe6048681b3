//! Texts that many operations share, each kept once.

use std::{collections::HashMap, num::NonZeroU32, sync::Arc};

/// A text that is kept.
#[derive(Debug)]
pub(super) struct Label(NonZeroU32);

/// Those that are in use.
#[derive(Debug, Default)]
pub(super) struct Labels {
    by_text: HashMap<Arc<str>, u32>,
    texts: Vec<(Arc<str>, u32)>,
    free: Vec<u32>,
}

impl Labels {
    pub(super) fn keep(&mut self, text: &str) -> Label {
        let index = match self.by_text.get(text) {
            Some(&index) => index,
            None => {
                let text: Arc<str> = text.into();
                let index = match self.free.pop() {
                    Some(index) => {
                        self.texts[index as usize] = (Arc::clone(&text), 0);
                        index
                    }
                    None => {
                        self.texts.push((Arc::clone(&text), 0));
                        (self.texts.len() - 1) as u32
                    }
                };
                self.by_text.insert(text, index);
                index
            }
        };
        self.texts[index as usize].1 += 1;
        Label(NonZeroU32::MIN.saturating_add(index))
    }

    pub(super) fn text(&self, label: &Label) -> &str {
        &self.texts[label.index()].0
    }

    pub(super) fn drop(&mut self, label: Label) {
        let (text, users) = &mut self.texts[label.index()];
        *users -= 1;
        if *users == 0 {
            self.by_text.remove(text);
            *text = "".into();
            self.free.push(label.index() as u32);
        }
    }
}

impl Label {
    fn index(&self) -> usize {
        self.0.get() as usize - 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_kept_once_and_while_it_is_used() {
        let mut labels = Labels::default();
        let (one, other, again) = (labels.keep("one"), labels.keep("other"), labels.keep("one"));
        assert_eq!((labels.texts.len(), labels.text(&one), labels.text(&again)), (2, "one", "one"));
        labels.drop(one);
        assert_eq!((labels.text(&again), labels.text(&other)), ("one", "other"));
        labels.drop(again);
        let third = labels.keep("third");
        assert_eq!((labels.texts.len(), labels.by_text.len(), labels.text(&third)), (2, 2, "third"));
    }
}
