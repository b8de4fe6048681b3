//! A Deputy registry for tests: a real HTTP server that speaks its wire, and breaks when it is told to.

#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]

use std::{
    collections::{BTreeMap, HashMap},
    convert::Infallible,
    io::{self, Write},
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use bytes::Bytes;
use flate2::{Compression, write::GzEncoder};
use futures::{Stream, StreamExt, stream};
use http_body_util::{BodyExt, Limited, StreamBody};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Frame, Incoming},
    header,
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use semver::{Version, VersionReq};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::{
    net::TcpListener,
    sync::watch,
    task::{AbortHandle, JoinSet},
};

/// The size of a piece of a body, and of a member of the gzip, in bytes.
const PIECE_BYTES: usize = 16 << 10;
/// The largest package that is published over the wire, in bytes.
const PUBLISH_MAX_BYTES: usize = 64 << 20;

type Body = StreamBody<Pin<Box<dyn Stream<Item = Result<Frame<Bytes>, io::Error>> + Send + Sync>>>;

/// What goes wrong.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// So many of the next requests are answered with 500.
    pub errors: u32,
    /// So many of the next downloads break off ...
    pub drops: u32,
    /// ... after so many bytes of their body.
    pub drop_after_bytes: usize,
    /// Lists of versions give checksums of something else.
    pub wrong_checksum: bool,
    /// Each download gives one byte at such a pause.
    pub drip: Option<Duration>,
    /// A download has no end, and does not say how long it is.
    pub endless: bool,
    /// Downloads do not say how long they are.
    pub chunked: bool,
    /// Ranges are not looked at.
    pub no_ranges: bool,
    /// JSON ends in the middle.
    pub truncated_json: bool,
    /// Downloads say that they are larger than anybody wants.
    pub huge: bool,
    /// Reads too want the token.
    pub private: bool,
    /// Lists are cut into pages first, and other types sorted out of each page then.
    pub late_filter: bool,
    /// Every request is answered with a redirect.
    pub redirect: bool,
}

/// What was asked for.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    pub lists: u64,
    pub searches: u64,
    pub downloads: u64,
    /// Bytes of archives that were handed to connections.
    pub archive_bytes: u64,
    /// The beginning of each range that was asked for.
    pub ranges: Vec<u64>,
    /// Downloads whose body was dropped, finished or not.
    pub ended: u64,
    /// The version requirements that were asked for.
    pub requirements: Vec<String>,
}

/// One version of a package.
#[derive(Clone, Debug)]
struct Stored {
    version: Version,
    kind: String,
    yanked: bool,
    checksum: String,
    archive: Bytes,
}

#[derive(Default)]
struct State {
    packages: BTreeMap<String, Vec<Stored>>,
    faults: Faults,
    counts: Counts,
}

/// A running registry; it ends when this is dropped.
pub struct TestRegistry {
    address: SocketAddr,
    shared: Arc<Shared>,
    server: AbortHandle,
}

struct Shared {
    state: Mutex<State>,
    /// Downloads begin while this is true.
    open: watch::Sender<bool>,
}

/// The token that writes want.
pub const TOKEN: &str = "publisher-token";

impl Drop for TestRegistry {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl TestRegistry {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared { state: Mutex::default(), open: watch::Sender::new(true) });
        let served = Arc::clone(&shared);
        // It ends with this registry, and its connections with it.
        let server = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let Ok((stream, _)) = listener.accept().await else { continue };
                while connections.try_join_next().is_some() {}
                let shared = Arc::clone(&served);
                connections.spawn(async move {
                    let service = service_fn(move |request| {
                        let shared = Arc::clone(&shared);
                        async move { Ok::<_, Infallible>(shared.answer(request).await) }
                    });
                    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
                });
            }
        });
        Self { address, shared, server: server.abort_handle() }
    }

    pub fn url(&self) -> String {
        format!("http://{}/", self.address)
    }

    pub fn fault(&self, faults: Faults) {
        self.state().faults = faults;
    }

    pub fn counts(&self) -> Counts {
        self.state().counts.clone()
    }

    pub fn forget_counts(&self) {
        self.state().counts = Counts::default();
    }

    /// Holds downloads back before their answer, or lets them go.
    pub fn hold_downloads(&self, hold: bool) {
        self.shared.open.send_replace(!hold);
    }

    /// Takes an archive in as it is, past the wire. Gives its checksum.
    pub fn add(&self, name: &str, version: &str, kind: &str, archive: impl Into<Bytes>) -> String {
        let archive = archive.into();
        let checksum = checksum(&archive);
        let stored = Stored {
            version: version.parse().unwrap(),
            kind: kind.to_owned(),
            yanked: false,
            checksum: checksum.clone(),
            archive,
        };
        self.state().packages.entry(name.to_lowercase()).or_default().push(stored);
        checksum
    }

    /// Puts another archive in the place of one, and says nothing of it.
    pub fn replace(&self, name: &str, version: &str, archive: impl Into<Bytes>) {
        let mut state = self.state();
        let versions = state.packages.get_mut(name).unwrap();
        let stored = versions.iter_mut().find(|one| one.version.to_string() == version).unwrap();
        stored.archive = archive.into();
        stored.checksum = checksum(&stored.archive);
    }

    pub fn yank(&self, name: &str, version: &str) {
        let mut state = self.state();
        let versions = state.packages.get_mut(name).unwrap();
        versions.iter_mut().find(|one| one.version.to_string() == version).unwrap().yanked = true;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap()
    }
}

impl Shared {
    async fn answer(self: Arc<Self>, request: Request<Incoming>) -> Response<Body> {
        let faults = {
            let mut state = self.state.lock().unwrap();
            if state.faults.errors > 0 {
                state.faults.errors -= 1;
                return text(StatusCode::INTERNAL_SERVER_ERROR, "as the test wants it");
            }
            state.faults.clone()
        };
        if faults.redirect {
            let mut response = text(StatusCode::FOUND, "");
            response.headers_mut().insert(header::LOCATION, "/elsewhere".parse().unwrap());
            return response;
        }
        let authorized = request.headers().get(header::AUTHORIZATION);
        let authorized = authorized.is_some_and(|value| value.to_str().ok() == Some(&format!("Bearer {TOKEN}")));
        if (request.method() != Method::GET || faults.private) && !authorized {
            return text(StatusCode::UNAUTHORIZED, "Unauthorized");
        }
        let path = request.uri().path().trim_matches('/').to_owned();
        let parts: Vec<&str> = path.split('/').collect();
        let query = query(request.uri().query().unwrap_or_default());
        match (request.method().clone(), parts.as_slice()) {
            (Method::GET, ["status"]) => text(StatusCode::OK, "OK"),
            (Method::GET, ["version"]) => text(StatusCode::OK, "test"),
            (Method::GET, ["api", "v1", "package"]) => self.search(&query),
            (Method::POST, ["api", "v1", "package"]) => self.publish(request).await,
            (Method::GET, ["api", "v1", "package", name]) => self.versions(name, &query),
            (Method::GET, ["api", "v1", "package", name, version]) => match self.find(name, version) {
                Some(stored) => json_answer(&faults, &describe(&stored, &faults)),
                None => text(StatusCode::NOT_FOUND, "Not found"),
            },
            (Method::GET, ["api", "v1", "package", name, version, "download"]) => {
                self.download(name, version, &request).await
            }
            (Method::GET, ["api", "v1", "package", name, version, "path", file @ ..]) => {
                match self.find(name, version).and_then(|stored| file_of(&stored.archive, &file.join("/"))) {
                    Some(content) => whole(StatusCode::OK, "application/octet-stream", content.into()),
                    None => text(StatusCode::NOT_FOUND, "Not found"),
                }
            }
            (Method::PUT, ["api", "v1", "package", name, version, "yank", yank @ ("true" | "false")]) => {
                let mut state = self.state.lock().unwrap();
                let mut versions = state.packages.get_mut(&name.to_lowercase()).into_iter().flatten();
                match versions.find(|one| one.version.to_string() == *version) {
                    Some(one) => {
                        one.yanked = *yank == "true";
                        json_answer(&Faults::default(), &describe(one, &Faults::default()))
                    }
                    None => text(StatusCode::NOT_FOUND, "Not found"),
                }
            }
            _ => text(StatusCode::NOT_FOUND, "Not found"),
        }
    }

    fn find(&self, name: &str, version: &str) -> Option<Stored> {
        let state = self.state.lock().unwrap();
        state.packages.get(&name.to_lowercase())?.iter().find(|one| one.version.to_string() == version).cloned()
    }

    fn versions(&self, name: &str, query: &HashMap<String, String>) -> Response<Body> {
        let mut state = self.state.lock().unwrap();
        state.counts.lists += 1;
        let requirement = query.get("version_requirement");
        state.counts.requirements.extend(requirement.cloned());
        let requirement = match requirement.map(|text| VersionReq::parse(text)) {
            Some(Err(_)) => return text(StatusCode::BAD_REQUEST, "bad requirement"),
            Some(Ok(requirement)) => Some(requirement),
            None => None,
        };
        // The real one takes names in any case, and yanked versions only without a requirement.
        let versions = state.packages.get(&name.to_lowercase()).into_iter().flatten();
        let wanted = |one: &&Stored| {
            requirement.as_ref().is_none_or(|requirement| !one.yanked && requirement.matches(&one.version))
        };
        let listed: Vec<Value> = versions.filter(wanted).map(|one| describe(one, &state.faults)).collect();
        json_answer(&state.faults, &json!(listed))
    }

    fn search(&self, query: &HashMap<String, String>) -> Response<Body> {
        let mut state = self.state.lock().unwrap();
        state.counts.searches += 1;
        let number = |name: &str, default: usize| query.get(name).map_or(default, |text| text.parse().unwrap());
        let (page, limit) = (number("page", 1), number("limit", 20));
        let of_type =
            |versions: &[Stored]| query.get("type").is_none_or(|kind| versions[0].kind.eq_ignore_ascii_case(kind));
        let late = state.faults.late_filter;
        let matches: Vec<(&[Stored], Value)> = state
            .packages
            .iter()
            .filter(|(name, versions)| {
                query.get("search_term").is_none_or(|term| name.contains(term.as_str())) && (late || of_type(versions))
            })
            .map(|(name, versions)| {
                let described: Vec<Value> = versions.iter().map(|one| describe(one, &state.faults)).collect();
                let package = json!({
                    "id": "b6e5a9a0-4f3c-4b57-9d3a-0d4f3f0a8a11",
                    "name": name,
                    "packageType": versions[0].kind,
                    "createdAt": "+262142-12-31T23:59:59",
                    "updatedAt": "+262142-12-31T23:59:59",
                    "versions": described,
                });
                (versions.as_slice(), package)
            })
            .collect();
        let pages = matches.len().div_ceil(limit);
        let page = matches.iter().skip((page - 1) * limit).take(limit);
        let packages: Vec<&Value> = page.filter(|(versions, _)| of_type(versions)).map(|(_, one)| one).collect();
        json_answer(
            &state.faults,
            &json!({ "packages": packages, "totalPages": pages, "totalPackages": matches.len() }),
        )
    }

    async fn download(self: &Arc<Self>, name: &str, version: &str, request: &Request<Incoming>) -> Response<Body> {
        let Some(stored) = self.find(name, version) else { return text(StatusCode::NOT_FOUND, "Not found") };
        let etag = format!("\"{}\"", &stored.checksum[..16]);
        let asked = |name| request.headers().get(name).and_then(|value| value.to_str().ok());
        let range = asked(header::RANGE).and_then(|text| text.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
        let (faults, dropped) = {
            let mut state = self.state.lock().unwrap();
            state.counts.downloads += 1;
            state.counts.ranges.extend(range.map(|start: usize| start as u64));
            let dropped = state.faults.drops > 0;
            state.faults.drops = state.faults.drops.saturating_sub(1);
            (state.faults.clone(), dropped)
        };
        let ended = Ended(Arc::clone(self));
        let mut open = self.open.subscribe();
        let _ = open.wait_for(|open| *open).await;
        let range = range.filter(|_| !faults.no_ranges && asked(header::IF_RANGE).is_none_or(|known| known == etag));
        let start = range.unwrap_or(0);
        if start > 0 && start >= stored.archive.len() {
            return text(StatusCode::RANGE_NOT_SATISFIABLE, "");
        }
        let rest = stored.archive.slice(start..);
        let mut builder = Response::builder()
            .status(if range.is_some() { StatusCode::PARTIAL_CONTENT } else { StatusCode::OK })
            .header(header::ETAG, &etag)
            .header(header::ACCEPT_RANGES, "bytes");
        if range.is_some() {
            let whole = stored.archive.len();
            builder = builder.header(header::CONTENT_RANGE, format!("bytes {start}-{}/{whole}", whole - 1));
        }
        if faults.huge {
            builder = builder.header(header::CONTENT_LENGTH, 1_u64 << 40);
        } else if !faults.endless && !faults.chunked {
            builder = builder.header(header::CONTENT_LENGTH, rest.len());
        }
        let piece_bytes = if faults.drip.is_some() { 1 } else { PIECE_BYTES };
        let mut pieces: Vec<Result<Bytes, io::Error>> = Vec::new();
        let end = if dropped { faults.drop_after_bytes.min(rest.len()) } else { rest.len() };
        for from in (0..end).step_by(piece_bytes) {
            pieces.push(Ok(rest.slice(from..end.min(from + piece_bytes))));
        }
        if dropped {
            pieces.push(Err(io::Error::other("broken off as the test wants it")));
        }
        let shared = Arc::clone(self);
        let counted = move |piece: Result<Bytes, io::Error>| {
            let _ = &ended;
            if let Ok(piece) = &piece {
                shared.state.lock().unwrap().counts.archive_bytes += piece.len() as u64;
            }
            piece.map(Frame::data)
        };
        let body: Pin<Box<dyn Stream<Item = _> + Send + Sync>> = if faults.endless || faults.huge {
            Box::pin(stream::repeat_with(|| Ok(Bytes::from_static(&[7; PIECE_BYTES]))).map(counted))
        } else if let Some(pause) = faults.drip {
            let dripping = stream::iter(pieces).then(move |piece| async move {
                tokio::time::sleep(pause).await;
                piece
            });
            Box::pin(dripping.map(counted))
        } else if dropped {
            // A body that pauses is flushed; without that the break would swallow what came before it.
            let yielding = stream::iter(pieces).then(|piece| async move {
                if piece.is_err() {
                    tokio::task::yield_now().await;
                }
                piece
            });
            Box::pin(yielding.map(counted))
        } else {
            Box::pin(stream::iter(pieces).map(counted))
        };
        builder.body(StreamBody::new(body)).unwrap()
    }

    /// `u32` length, metadata as JSON, `u64` length, archive; both lengths little-endian.
    async fn publish(&self, request: Request<Incoming>) -> Response<Body> {
        let Ok(body) = Limited::new(request.into_body(), PUBLISH_MAX_BYTES).collect().await else {
            return text(StatusCode::PAYLOAD_TOO_LARGE, "too large");
        };
        let body = body.to_bytes();
        let Some((metadata, archive)) = unframe(&body) else { return text(StatusCode::BAD_REQUEST, "bad frame") };
        let Ok(metadata) = serde_json::from_slice::<Value>(metadata) else {
            return text(StatusCode::BAD_REQUEST, "bad metadata");
        };
        let field = |name: &str| metadata[name].as_str().unwrap_or_default().to_owned();
        let Ok(version) = Version::parse(&field("version")) else {
            return text(StatusCode::BAD_REQUEST, "bad version");
        };
        if field("checksum") != checksum(archive) {
            return text(StatusCode::BAD_REQUEST, "bad checksum");
        }
        let mut state = self.state.lock().unwrap();
        let versions = state.packages.entry(field("name").to_lowercase()).or_default();
        if versions.iter().any(|one| one.version >= version) {
            return text(StatusCode::CONFLICT, "a newer version is there");
        }
        let stored = Stored {
            version,
            kind: field("package_type"),
            yanked: false,
            checksum: field("checksum"),
            archive: Bytes::copy_from_slice(archive),
        };
        let described = describe(&stored, &Faults::default());
        versions.push(stored);
        json_answer(&Faults::default(), &described)
    }
}

/// Counts a download whose body is over.
struct Ended(Arc<Shared>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.state.lock().unwrap().counts.ended += 1;
    }
}

fn describe(stored: &Stored, faults: &Faults) -> Value {
    json!({
        "id": "0b6e5a9a-4f3c-4b57-9d3a-0d4f3f0a8a12",
        "packageId": "b6e5a9a0-4f3c-4b57-9d3a-0d4f3f0a8a11",
        "version": stored.version.to_string(),
        "description": "of a test",
        "license": "MIT",
        "isYanked": stored.yanked,
        "readmeHtml": "",
        "packageSize": stored.archive.len(),
        "checksum": if faults.wrong_checksum { checksum(b"something else") } else { stored.checksum.clone() },
        "createdAt": "+262142-12-31T23:59:59",
        "updatedAt": "+262142-12-31T23:59:59",
    })
}

fn query(text: &str) -> HashMap<String, String> {
    let pairs = text.split('&').filter_map(|pair| pair.split_once('='));
    pairs.map(|(name, value)| (name.to_owned(), percent_decoded(value))).collect()
}

fn percent_decoded(text: &str) -> String {
    let mut bytes = text.bytes();
    let mut decoded = Vec::new();
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'+' => b' ',
            b'%' => {
                let digits = [bytes.next().unwrap(), bytes.next().unwrap()];
                u8::from_str_radix(std::str::from_utf8(&digits).unwrap(), 16).unwrap()
            }
            byte => byte,
        });
    }
    String::from_utf8(decoded).unwrap()
}

fn whole(status: StatusCode, kind: &str, bytes: Bytes) -> Response<Body> {
    let response = Response::builder().status(status).header(header::CONTENT_TYPE, kind);
    let response = response.header(header::CONTENT_LENGTH, bytes.len());
    let body: Pin<Box<dyn Stream<Item = _> + Send + Sync>> = Box::pin(stream::iter([Ok(Frame::data(bytes))]));
    response.body(StreamBody::new(body)).unwrap()
}

fn text(status: StatusCode, text: &'static str) -> Response<Body> {
    whole(status, "text/plain", Bytes::from_static(text.as_bytes()))
}

fn json_answer(faults: &Faults, value: &Value) -> Response<Body> {
    let mut body = serde_json::to_vec(value).unwrap();
    if faults.truncated_json {
        body.truncate(body.len() / 2);
    }
    whole(StatusCode::OK, "application/json", body.into())
}

fn unframe(body: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = body.split_first_chunk::<4>()?;
    let (metadata, rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
    let (length, archive) = rest.split_first_chunk::<8>()?;
    (u64::from_le_bytes(*length) == archive.len() as u64).then_some((metadata, archive))
}

/// The body of a publish.
pub fn frame(metadata: &Value, archive: &[u8]) -> Vec<u8> {
    let metadata = serde_json::to_vec(metadata).unwrap();
    let lengths = ((metadata.len() as u32).to_le_bytes(), (archive.len() as u64).to_le_bytes());
    [&lengths.0[..], &metadata, &lengths.1, archive].concat()
}

/// Lower hex SHA-256.
pub fn checksum(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Files as Deputy packs them: tar in gzip of many members, hardly compressed.
pub fn pack(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (path, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, path, *content).unwrap();
    }
    members(&tar.into_inner().unwrap())
}

/// A gzip of many members.
pub fn members(bytes: &[u8]) -> Vec<u8> {
    let mut packed = Vec::new();
    for piece in bytes.chunks(PIECE_BYTES) {
        let mut encoder = GzEncoder::new(&mut packed, Compression::none());
        encoder.write_all(piece).unwrap();
        encoder.finish().unwrap();
    }
    packed
}

/// A `package.toml`; `content` is what comes after `type = ...` of `[content]`.
pub fn manifest(name: &str, version: &str, assets: &str, kind: &str, content: &str) -> String {
    format!(
        "[package]\nname = \"{name}\"\nversion = \"{version}\"\ndescription = \"a test\"\nlicense = \"MIT\"\n\
         assets = [{assets}]\n[content]\ntype = \"{kind}\"\n{content}"
    )
}

/// A feature with one asset, whose content this is.
pub fn feature(name: &str, version: &str, content: &[u8]) -> Vec<u8> {
    let manifest = manifest(
        name,
        version,
        &format!("[\"src/run.sh\", \"/opt/{name}/run.sh\", \"755\"]"),
        "feature",
        &format!("[feature]\ntype = \"service\"\naction = \"/opt/{name}/run.sh\"\n"),
    );
    pack(&[("package.toml", manifest.as_bytes()), ("src/run.sh", content)])
}

fn file_of(archive: &[u8], wanted: &str) -> Option<Vec<u8>> {
    let mut tar = tar::Archive::new(flate2::read::MultiGzDecoder::new(archive));
    for entry in tar.entries().ok()? {
        let mut entry = entry.ok()?;
        if entry.path().ok()?.to_str() == Some(wanted) {
            let mut content = Vec::new();
            io::Read::read_to_end(&mut entry, &mut content).ok()?;
            return Some(content);
        }
    }
    None
}
