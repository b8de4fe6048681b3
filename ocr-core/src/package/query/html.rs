//! Markdown to HTML that may be shown to anybody.
//!
//! GitHub's Markdown, and the HTML in it as far as it is harmless: scripts, handlers, frames, forms and foreign styles
//! go. Images of the package are put into the page; nothing is ever loaded from elsewhere.

use std::{
    borrow::Cow,
    collections::HashSet,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use ammonia::Builder;
use base64::{Engine, prelude::BASE64_STANDARD};
use pulldown_cmark::{Options, Parser};

use crate::{
    Error, ErrorKind, Result,
    error::reason,
    id::shown,
    package::{PATH_BYTES, PATH_PARTS, inside},
};

/// Reads a file of the package, by its path there.
pub(super) type ReadFile = dyn Fn(&Path) -> Result<Vec<u8>> + Send + Sync;

/// What an image may be, by the ending of its name.
const IMAGES: [(&str, &str); 8] = [
    ("png", "image/png"),
    ("jpg", "image/jpeg"),
    ("jpeg", "image/jpeg"),
    ("gif", "image/gif"),
    ("webp", "image/webp"),
    ("avif", "image/avif"),
    ("bmp", "image/bmp"),
    // In an image it runs no script and loads nothing.
    ("svg", "image/svg+xml"),
];

/// The page of a Markdown file of the package, no longer than the limit. Blocks.
pub(super) fn render(markdown: &str, file: &Path, limit_bytes: usize, read: Arc<ReadFile>) -> Result<String> {
    let options = Options::ENABLE_TABLES
        | Options::ENABLE_STRIKETHROUGH
        | Options::ENABLE_TASKLISTS
        | Options::ENABLE_FOOTNOTES
        | Options::ENABLE_GFM;
    let mut raw = String::with_capacity(markdown.len() * 3 / 2);
    pulldown_cmark::html::push_html(&mut raw, Parser::new_ext(markdown, options));

    let folder = file.parent().unwrap_or(Path::new("")).to_owned();
    let images = Arc::new(Mutex::new(Images { left_bytes: limit_bytes, fault: None }));
    let seen = Arc::clone(&images);
    let html = Builder::default()
        .add_tags(["input"])
        .add_tag_attributes("input", ["checked", "disabled"])
        .set_tag_attribute_value("input", "type", "checkbox")
        .set_tag_attribute_value("input", "disabled", "")
        .add_tag_attributes("td", ["style"])
        .add_tag_attributes("th", ["style"])
        .filter_style_properties(HashSet::from(["text-align"]))
        .add_tag_attributes("code", ["class"])
        .add_url_schemes(["data"])
        .attribute_filter(move |tag, attribute, value| match (tag, attribute) {
            ("img", "src") => {
                let mut images = seen.lock().unwrap_or_else(PoisonError::into_inner);
                images.source(value, &folder, &*read)
            }
            // The language of a block of code, for those that colour it.
            ("code", "class") => value.starts_with("language-").then_some(value.into()),
            // A link to data is a page of the author's in the reader's browser.
            _ if is_data(value) => None,
            _ => Some(value.into()),
        })
        .clean(&raw)
        .to_string();
    let fault = images.lock().unwrap_or_else(PoisonError::into_inner).fault.take();
    if let Some(fault) = fault {
        return Err(fault);
    }
    if html.len() > limit_bytes {
        return Err(too_large(limit_bytes));
    }
    Ok(html)
}

/// What the images of one page have in common.
struct Images {
    left_bytes: usize,
    /// The first thing that went wrong.
    fault: Option<Error>,
}

impl Images {
    /// What the page has as an image's source; without one the image's text is shown.
    fn source<'a>(&mut self, source: &'a str, folder: &Path, read: &ReadFile) -> Option<Cow<'a, str>> {
        if self.fault.is_some() {
            return None;
        }
        if is_data(source) {
            let whole = source.trim_start().to_ascii_lowercase();
            return whole.starts_with("data:image/").then_some(source.into());
        }
        // Somebody else's: it would tell them who reads this, and may be another tomorrow.
        if source.contains("://") || source.starts_with("//") {
            tracing::info!(image = %shown(source), "an image from outside its package is not shown");
            return None;
        }
        match self.inline(source, folder, read) {
            Ok(data) => Some(data.into()),
            Err(error) => {
                self.fault = Some(error);
                None
            }
        }
    }

    fn inline(&mut self, source: &str, folder: &Path, read: &ReadFile) -> Result<String> {
        let refuse = |fault: &str| {
            Error::invalid("image", format_args!("{} {fault}", shown(source))).with_reason(reason::PACKAGE_MANIFEST)
        };
        let bare = source.split(['?', '#']).next().unwrap_or_default();
        let path = decoded(bare).ok_or_else(|| refuse("is not UTF-8"))?;
        let ending = path.rsplit_once('.').map(|(_, ending)| ending.to_ascii_lowercase()).unwrap_or_default();
        let Some((_, kind)) = IMAGES.iter().find(|(known, _)| *known == ending) else {
            return Err(refuse("is no image: wants a name that ends in .png, .jpg, .gif, .webp, .avif, .bmp or .svg"));
        };
        let path = below(folder, &path).map_err(refuse)?;
        let bytes = read(&path)?;
        let encoded_bytes = bytes.len().div_ceil(3) * 4;
        self.left_bytes = self.left_bytes.checked_sub(encoded_bytes).ok_or_else(|| too_large(self.left_bytes))?;
        Ok(format!("data:{kind};base64,{}", BASE64_STANDARD.encode(bytes)))
    }
}

fn too_large(limit_bytes: usize) -> Error {
    Error::new(ErrorKind::Exhausted, format!("the page with its images is larger than {limit_bytes} bytes"))
        .with_reason(reason::PACKAGE_TOO_LARGE)
}

fn is_data(value: &str) -> bool {
    // Browsers pass over control characters at the beginning of an address and inside its scheme.
    let mut scheme = value.chars().filter(|c| !c.is_control() && *c != ' ').take(5);
    "data:".chars().all(|wanted| scheme.next().is_some_and(|c| c.to_ascii_lowercase() == wanted))
}

/// A path that a file in `folder` gives, as a path of the package. It may climb, but not out.
fn below(folder: &Path, path: &str) -> Result<PathBuf, &'static str> {
    let folder = folder.to_str().ok_or("lies in a folder that is not UTF-8")?;
    if path.starts_with('/') {
        return Err("is an absolute path");
    }
    let mut parts: Vec<&str> = folder.split('/').filter(|part| !part.is_empty()).collect();
    for part in path.split('/') {
        match part {
            "." | "" => {}
            ".." if parts.pop().is_none() => return Err("climbs out of the package with .."),
            ".." => {}
            part => parts.push(part),
        }
    }
    inside(&parts.join("/"), PATH_PARTS, PATH_BYTES)
}

/// Without the `%` escapes of an address.
fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let escaped = match (byte, after) {
            (b'%', [high, low, ..]) => {
                let digit = |byte: u8| char::from(byte).to_digit(16);
                digit(*high).zip(digit(*low)).and_then(|(high, low)| u8::try_from(high * 16 + low).ok())
            }
            _ => None,
        };
        bytes.push(escaped.unwrap_or(byte));
        rest = if escaped.is_some() { &after[2..] } else { after };
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn page(markdown: &str) -> Result<String> {
        let read = |path: &Path| match path.to_str() {
            Some("docs/map.png" | "logo.svg" | "docs/a b.png") => Ok(b"image".to_vec()),
            _ => Err(Error::invalid("image", format_args!("{} is not in the package", path.display()))),
        };
        render(markdown, Path::new("docs/event.md"), 10_000, Arc::new(read))
    }

    #[test]
    fn githubs_markdown_is_understood() {
        let html = page(
            "# Alert\n\nA ~~small~~ **big** one, see [it](https://h/x).[^1]\n\n| a | b |\n|---|:-:|\n| 1 | 2 |\n\n\
             - [x] seen\n- [ ] done\n\n```sh\necho a < b\n```\n\n[^1]: A note.\n",
        )
        .unwrap();
        for wanted in [
            "<h1>Alert</h1>",
            "<del>small</del> <strong>big</strong>",
            r#"<a href="https://h/x" rel="noopener noreferrer">it</a>"#,
            "<th>a</th>",
            "text-align",
            r#"type="checkbox""#,
            r#"<code class="language-sh">echo a &lt; b"#,
            "A note.",
        ] {
            assert!(html.contains(wanted), "{wanted} is not in {html}");
        }
        assert_eq!(html.matches("disabled").count(), 2, "{html}");
    }

    #[test]
    fn html_is_kept_as_far_as_it_is_harmless() {
        let html = page(
            "<details><summary>More</summary>\n\ntext<br>\n\n</details>\n<script>alert(1)</script>\n\
             <b onclick=\"alert(1)\" style=\"position: fixed\">b</b>\n<iframe src=\"https://h/\"></iframe>\n\
             <form action=\"https://h/\"><input type=\"text\" name=\"password\"></form>\n\n\
             [a](javascript:alert(1)) [b](data:text/html,x) <a href=\"DATA:text/html,x\">c</a>\n\
             <img src=\"x\tjavascript:alert(1).png\" onerror=\"alert(1)\">",
        )
        .unwrap();
        assert!(html.contains("<details><summary>More</summary>") && html.contains("<br>"), "{html}");
        for bad in ["script", "alert", "onclick", "style", "iframe", "form", "password", "text\"", "data:", "DATA:"] {
            assert!(!html.contains(bad), "{bad} is in {html}");
        }
    }

    #[test]
    fn images_come_from_the_package_and_from_nowhere_else() {
        let html = page("![Map](map.png) <img src=\"../logo.svg\" width=\"9\" alt=\"L\"> ![b](<a b.png>)").unwrap();
        assert!(html.contains(r#"src="data:image/png;base64,aW1hZ2U=""#), "{html}");
        assert!(html.contains(r#"src="data:image/svg+xml;base64,aW1hZ2U=""#) && html.contains("width"), "{html}");
        assert_eq!(html.matches("aW1hZ2U=").count(), 3);

        let html = page("![Map](https://h/map.png) ![x](//h/x.png) <img src=\"http://h/y.png\" alt=\"y\">").unwrap();
        assert!(!html.contains("src") && html.contains(r#"alt="Map""#), "{html}");
        let html = page("![own](data:image/png;base64,aW1hZ2U=) ![odd](data:text/html,x)").unwrap();
        assert!(html.contains("data:image/png;base64,aW1hZ2U=") && !html.contains("text/html"), "{html}");

        for (markdown, text) in [
            ("![x](none.png)", "docs/none.png is not in the package"),
            ("![x](../../etc/x.png)", "climbs out of the package"),
            ("![x](%2e%2e/%2e%2e/x.png)", "climbs out of the package"),
            ("![x](/etc/x.png)", "is an absolute path"),
            ("![x](c:x.png)", ""),
            ("![x](map.txt)", "is no image"),
            ("![x](/etc/passwd)", "is no image"),
        ] {
            match page(markdown) {
                Ok(html) => assert!(text.is_empty() && !html.contains("src"), "{markdown}: {html}"),
                Err(error) => assert!(error.message().contains(text), "{markdown}: {error}"),
            }
        }
    }

    #[test]
    fn a_page_has_a_bound() {
        let read = |_: &Path| Ok(vec![0; 4000]);
        let page = |count: usize| render(&"![x](x.png)\n".repeat(count), Path::new("a.md"), 10_000, Arc::new(read));
        assert!(page(1).is_ok());
        let error = page(2).unwrap_err();
        assert_eq!((error.kind(), error.reason()), (ErrorKind::Exhausted, Some(reason::PACKAGE_TOO_LARGE)));
        assert!(render(&"a".repeat(20_000), Path::new("a.md"), 10_000, Arc::new(read)).is_err());
    }

    proptest! {
        #[test]
        fn whatever_is_written_no_page_has_a_script_or_loads_anything(
            parts in prop::collection::vec(prop::sample::select(vec![
                "<script>", "</script>", "<img src=", "<a href=", "javascript:", "data:text/html,", "\"", "'", ">", "<",
                "onerror=alert(1)", "![", "](", ")", "[", "https://h/x.png", "map.png", "`", "\n", "\n\n", " ", "&#106;",
                "<svg>", "<style>", "<!--", "-->", "<math>", "<iframe srcdoc=", "<table>", "<td>", "x", "\t", "&quot;",
            ]), 0..24),
        ) {
            if let Ok(html) = page(&parts.concat()) {
                let tags: Vec<&str> = html.split('<').skip(1).map(|tag| tag.split('>').next().unwrap()).collect();
                for tag in tags {
                    let name = tag.split_whitespace().next().unwrap_or_default();
                    prop_assert!(!["script", "iframe", "svg", "style", "math"].contains(&name), "{html}");
                    prop_assert!(!tag.contains(" onerror="), "{html}");
                    for (attribute, _) in tag.match_indices(" src=\"") {
                        prop_assert!(tag[attribute..].starts_with(" src=\"data:image/"), "{html}");
                    }
                    for (attribute, _) in tag.match_indices(" href=\"") {
                        let value = &tag[attribute + 7..].to_ascii_lowercase();
                        prop_assert!(!value.starts_with("javascript:") && !value.starts_with("data:"), "{html}");
                    }
                }
            }
        }
    }
}
