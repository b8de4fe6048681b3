//! XML as a small tree, written and read by quick-xml: text is escaped on the way out, never pasted.

use ocr_core::{Error, Result};
use quick_xml::{
    Reader, Writer,
    events::{BytesEnd, BytesStart, BytesText, Event},
};

/// How deep a document may be. libvirt's own are below 10.
const MAX_DEPTH: usize = 64;

/// An element with its attributes, text and children.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Element {
    /// The name as it is written, prefix included.
    pub(crate) name: String,
    attributes: Vec<(String, String)>,
    text: String,
    pub(crate) children: Vec<Element>,
}

impl Element {
    pub(crate) fn new(name: &str) -> Self {
        Self { name: name.to_owned(), ..Self::default() }
    }

    pub(crate) fn attribute(mut self, name: &str, value: impl Into<String>) -> Self {
        self.attributes.push((name.to_owned(), value.into()));
        self
    }

    pub(crate) fn text(mut self, text: impl Into<String>) -> Self {
        self.text = text.into();
        self
    }

    pub(crate) fn child(mut self, child: Element) -> Self {
        self.children.push(child);
        self
    }

    pub(crate) fn children(mut self, children: impl IntoIterator<Item = Element>) -> Self {
        self.children.extend(children);
        self
    }

    /// A child with only a text.
    pub(crate) fn leaf(self, name: &str, text: impl Into<String>) -> Self {
        self.child(Element::new(name).text(text))
    }

    /// The first child of this name, without regard to prefixes.
    pub(crate) fn get(&self, name: &str) -> Option<&Element> {
        self.children.iter().find(|child| child.local_name() == name)
    }

    /// All children of this name, without regard to prefixes.
    pub(crate) fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Element> {
        self.children.iter().filter(move |child| child.local_name() == name)
    }

    /// The child at the end of a path.
    pub(crate) fn at(&self, path: &[&str]) -> Option<&Element> {
        path.iter().try_fold(self, |element, name| element.get(name))
    }

    pub(crate) fn value(&self) -> &str {
        &self.text
    }

    pub(crate) fn get_attribute(&self, name: &str) -> Option<&str> {
        self.attributes.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    fn local_name(&self) -> &str {
        self.name.rsplit(':').next().unwrap_or(&self.name)
    }

    /// The document, without a declaration: libvirt wants none.
    pub(crate) fn to_xml(&self) -> Result<String> {
        let mut writer = Writer::new_with_indent(Vec::new(), b' ', 2);
        self.write(&mut writer).map_err(|error| Error::internal("XML cannot be written").with_source(error))?;
        String::from_utf8(writer.into_inner())
            .map_err(|error| Error::internal("XML is not UTF-8").with_source(error))
    }

    fn write(&self, writer: &mut Writer<Vec<u8>>) -> std::io::Result<()> {
        let mut start = BytesStart::new(self.name.as_str());
        for (name, value) in &self.attributes {
            start.push_attribute((name.as_str(), value.as_str()));
        }
        if self.children.is_empty() && self.text.is_empty() {
            return writer.write_event(Event::Empty(start));
        }
        writer.write_event(Event::Start(start))?;
        if !self.text.is_empty() {
            writer.write_event(Event::Text(BytesText::new(&self.text)))?;
        }
        for child in &self.children {
            child.write(writer)?;
        }
        writer.write_event(Event::End(BytesEnd::new(self.name.as_str())))
    }

    /// Reads a document.
    pub(crate) fn parse(xml: &str) -> Result<Self> {
        let broken = |why: &str| Error::internal(format!("libvirt gave XML that cannot be read: {why}"));
        let mut reader = Reader::from_str(xml);
        let mut open: Vec<Element> = Vec::new();
        loop {
            let event = reader.read_event().map_err(|error| broken("malformed").with_source(error))?;
            let done = match event {
                Event::Start(start) => {
                    if open.len() >= MAX_DEPTH {
                        return Err(broken("too deep"));
                    }
                    open.push(begin(&start)?);
                    None
                }
                Event::Empty(start) => Some(begin(&start)?),
                Event::End(_) => open.pop(),
                Event::Text(text) => {
                    if let Some(element) = open.last_mut() {
                        element.text += &text;
                    }
                    None
                }
                Event::GeneralRef(reference) => {
                    if let Some(element) = open.last_mut() {
                        let reference = format!("&{};", &*reference);
                        element.text += &quick_xml::escape::unescape(&reference)
                            .map_err(|error| broken("unknown reference").with_source(error))?;
                    }
                    None
                }
                Event::CData(data) => {
                    if let Some(element) = open.last_mut() {
                        element.text += &data;
                    }
                    None
                }
                Event::Eof => return Err(broken("it ends too early")),
                _ => None,
            };
            if let Some(mut element) = done {
                // White space between children is layout, not text.
                if !element.children.is_empty() {
                    element.text.clear();
                }
                match open.last_mut() {
                    Some(parent) => parent.children.push(element),
                    None => return Ok(element),
                }
            }
        }
    }
}

fn begin(start: &BytesStart<'_>) -> Result<Element> {
    let broken = |error: quick_xml::Error| Error::internal("libvirt gave XML that cannot be read").with_source(error);
    let mut element = Element::new(start.name().as_ref());
    for attribute in start.attributes() {
        let attribute = attribute.map_err(|error| broken(error.into()))?;
        let value = quick_xml::escape::unescape(&attribute.value).map_err(|error| broken(error.into()))?;
        element.attributes.push((attribute.key.as_ref().to_owned(), value.into_owned()));
    }
    Ok(element)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_text_comes_back_and_stays_text(text in "[\\x20-\\x7e\\u{a0}-\\u{2000}]{0,40}", value in "[\\x20-\\x7e]{0,40}") {
            let element = Element::new("a").child(Element::new("b").attribute("c", value.clone()).text(text.clone()));
            let back = Element::parse(&element.to_xml().unwrap()).unwrap();
            prop_assert_eq!(back.children.len(), 1);
            let b = back.get("b").unwrap();
            prop_assert_eq!(b.value(), text);
            prop_assert_eq!(b.get_attribute("c"), Some(value.as_str()));
            prop_assert!(b.children.is_empty());
        }

        #[test]
        fn reading_anything_never_panics(text in any::<String>()) {
            let _ = Element::parse(&text);
        }
    }

    #[test]
    fn a_document_that_is_too_deep_is_refused() {
        let deep = "<a>".repeat(100_000);
        assert!(Element::parse(&deep).is_err());
    }
}
