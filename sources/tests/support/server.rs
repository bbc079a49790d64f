//! Servers for tests: threads that speak HTTP on this machine, a hub with a place where its large files are stored, and a memory of what
//! was asked. No framework: what is sent is what stands here, also when it is wrong on purpose.

#![allow(dead_code, reason = "used by the tests of two crates, neither of which needs all of it")]
#![allow(clippy::unwrap_used, reason = "a test that cannot set up its server fails")]

use ring::digest::{Context, SHA1_FOR_LEGACY_USE_ONLY, SHA256, digest};
use std::collections::{BTreeMap, VecDeque};
use std::fmt::Display;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

/// What was asked. Names of headers are in lower case.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) method: String,
    /// With the query.
    pub(crate) path: String,
    pub(crate) headers: BTreeMap<String, String>,
}

impl Request {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }
}

/// What is answered.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    /// The connection is closed after so many bytes of the body.
    pub(crate) cut: Option<usize>,
}

impl Answer {
    pub(crate) fn status(status: u16) -> Self {
        Self { status, headers: Vec::new(), body: Vec::new(), cut: None }
    }

    pub(crate) fn ok(body: impl Into<Vec<u8>>) -> Self {
        Self { body: body.into(), ..Self::status(200) }
    }

    #[must_use]
    pub(crate) fn with(mut self, name: &str, value: impl Display) -> Self {
        self.headers.push((name.to_owned(), value.to_string()));
        self
    }
}

/// A content as a server that knows ranges sends it.
pub(crate) fn content(request: &Request, body: &[u8], etag: &str) -> Answer {
    let start = request
        .header("range")
        .and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok())
        .filter(|_| request.header("if-range").is_none_or(|version| version == etag));
    let answer = match start {
        Some(start) if start >= body.len() => {
            Answer::status(416).with("Content-Range", format!("bytes */{}", body.len()))
        }
        Some(start) => Answer { status: 206, ..Answer::ok(&body[start..]) }
            .with("Content-Range", format!("bytes {start}-{}/{}", body.len() - 1, body.len())),
        None => Answer::ok(body),
    };
    answer
        .with("ETag", etag)
        .with("Accept-Ranges", "bytes")
        .with("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
}

/// A server that runs until it is dropped.
pub(crate) struct Server {
    address: SocketAddr,
    log: Arc<Mutex<Vec<Request>>>,
    first: Arc<Mutex<VecDeque<Answer>>>,
    cuts: Arc<Mutex<VecDeque<usize>>>,
}

impl Server {
    pub(crate) fn start(handler: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = Self { address, log: Arc::default(), first: Arc::default(), cuts: Arc::default() };
        let (log, first, cuts) =
            (Arc::clone(&server.log), Arc::clone(&server.first), Arc::clone(&server.cuts));
        let handler = Arc::new(handler);
        // The thread ends with the process: a test has few servers.
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (log, first, cuts) = (Arc::clone(&log), Arc::clone(&first), Arc::clone(&cuts));
                let handler = Arc::clone(&handler);
                std::thread::spawn(move || {
                    let Some(request) = read(&stream) else { return };
                    log.lock().unwrap().push(request.clone());
                    let canned = first.lock().unwrap().pop_front();
                    let mut answer = canned.unwrap_or_else(|| handler(&request));
                    if request.method == "GET" && answer.status < 300 {
                        answer.cut = cuts.lock().unwrap().pop_front().or(answer.cut);
                    }
                    write(&stream, &request, &answer);
                });
            }
        });
        server
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// What was asked so far.
    pub(crate) fn asked(&self) -> Vec<Request> {
        self.log.lock().unwrap().clone()
    }

    /// How often a method was used.
    pub(crate) fn count(&self, method: &str) -> usize {
        self.asked().iter().filter(|request| request.method == method).count()
    }

    pub(crate) fn forget(&self) {
        self.log.lock().unwrap().clear();
    }

    /// Answers the next request like this, whatever it is.
    pub(crate) fn next(&self, answer: Answer) {
        self.first.lock().unwrap().push_back(answer);
    }

    /// Closes the connection of the next download after so many bytes.
    pub(crate) fn cut_next(&self, bytes: usize) {
        self.cuts.lock().unwrap().push_back(bytes);
    }
}

fn read(stream: &TcpStream) -> Option<Request> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut words = line.split_whitespace();
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let length = headers.get("content-length").and_then(|text| text.parse().ok()).unwrap_or(0);
    std::io::copy(&mut reader.take(length), &mut std::io::sink()).ok()?;
    Some(Request { method, path, headers })
}

fn write(mut stream: &TcpStream, request: &Request, answer: &Answer) {
    let mut head = format!("HTTP/1.1 {} x\r\nConnection: close\r\n", answer.status);
    if !answer.headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        && answer.status != 304
    {
        head += &format!("Content-Length: {}\r\n", answer.body.len());
    }
    for (name, value) in &answer.headers {
        head += &format!("{name}: {value}\r\n");
    }
    // The client may have gone away, which some tests want.
    let _ = stream.write_all((head + "\r\n").as_bytes());
    if request.method != "HEAD" {
        let end = answer.cut.unwrap_or(answer.body.len()).min(answer.body.len());
        let _ = stream.write_all(&answer.body[..end]);
    }
    let _ = stream.flush();
    let _ = stream.shutdown(Shutdown::Write);
}

/// A repository: branches, and commits with their files.
#[derive(Clone, Debug, Default)]
pub(crate) struct Repo {
    pub(crate) branches: BTreeMap<String, String>,
    pub(crate) commits: BTreeMap<String, BTreeMap<String, Vec<u8>>>,
    /// Needs this token.
    pub(crate) token: Option<String>,
    /// Needs a licence to be accepted.
    pub(crate) gated: bool,
}

impl Repo {
    /// A repository with one commit on `main`.
    pub(crate) fn of(files: &[(&str, &[u8])]) -> Self {
        let mut repo = Self::default();
        repo.push("main", files);
        repo
    }

    /// A new commit of a branch; returns its name.
    pub(crate) fn push(&mut self, branch: &str, files: &[(&str, &[u8])]) -> String {
        let files: BTreeMap<String, Vec<u8>> =
            files.iter().map(|(name, content)| ((*name).to_owned(), content.to_vec())).collect();
        let commit = git_id(format!("{branch} {} {files:?}", self.commits.len()).as_bytes());
        self.commits.insert(commit.clone(), files);
        self.branches.insert(branch.to_owned(), commit.clone());
        commit
    }
}

/// A hub, and the place where it stores what is larger than [`LARGE`].
pub(crate) struct Hub {
    #[expect(clippy::struct_field_names, reason = "the hub itself, beside its storage")]
    pub(crate) hub: Server,
    pub(crate) storage: Server,
    repos: Arc<Mutex<BTreeMap<String, Repo>>>,
}

/// Files of at least so many bytes are not stored in the repository itself.
pub(crate) const LARGE: usize = 1000;

impl Hub {
    pub(crate) fn start(repos: &[(&str, Repo)]) -> Self {
        let repos: BTreeMap<String, Repo> =
            repos.iter().map(|(name, repo)| ((*name).to_owned(), repo.clone())).collect();
        let repos = Arc::new(Mutex::new(repos));
        let stored = Arc::clone(&repos);
        let storage = Server::start(move |request| {
            let wanted = request.path.split('?').next().unwrap().trim_start_matches("/stored/").to_owned();
            let repos = stored.lock().unwrap();
            let mut contents =
                repos.values().flat_map(|repo| repo.commits.values()).flat_map(BTreeMap::values);
            match contents.find(|body| sha256(body) == wanted) {
                // Storage has tags of its own.
                Some(body) => content(request, body, "\"tag-of-the-storage\""),
                None => Answer::status(404),
            }
        });
        let (known, elsewhere) = (Arc::clone(&repos), storage.url("/stored/"));
        let hub = Server::start(move |request| resolve(request, &known.lock().unwrap(), &elsewhere));
        Self { hub, storage, repos }
    }

    pub(crate) fn endpoint(&self) -> String {
        self.hub.url("")
    }

    /// Changes a repository.
    pub(crate) fn edit<T>(&self, repo: &str, change: impl FnOnce(&mut Repo) -> T) -> T {
        change(self.repos.lock().unwrap().get_mut(repo).unwrap())
    }

    /// Requests to both servers.
    pub(crate) fn n_asked(&self) -> usize {
        self.hub.asked().len() + self.storage.asked().len()
    }

    pub(crate) fn forget(&self) {
        self.hub.forget();
        self.storage.forget();
    }
}

fn resolve(request: &Request, repos: &BTreeMap<String, Repo>, storage: &str) -> Answer {
    let error = |status: u16, code: &str| Answer::status(status).with("X-Error-Code", code);
    let Some((repo_name, rest)) = request.path.trim_start_matches('/').split_once("/resolve/") else {
        return Answer::status(400);
    };
    let (revision, name) = rest.split_once('/').unwrap();
    let revision = revision.replace("%2F", "/");
    if let Some(name) = repo_name.strip_prefix("old/") {
        return Answer::status(307).with("Location", format!("/org/{name}/resolve/{rest}"));
    }
    // As the hub does: who may not know a repository is not told that it exists.
    let Some(repo) = repos.get(repo_name) else { return error(401, "RepoNotFound") };
    if repo.gated {
        return error(403, "GatedRepo");
    }
    let authorization = repo.token.as_ref().map(|token| format!("Bearer {token}"));
    if authorization.is_some() && request.header("authorization") != authorization.as_deref() {
        return error(401, "RepoNotFound");
    }
    let commit = repo.branches.get(&revision).cloned().unwrap_or(revision);
    let Some(files) = repo.commits.get(&commit) else { return error(404, "RevisionNotFound") };
    let Some(body) = files.get(name) else {
        return error(404, "EntryNotFound").with("X-Repo-Commit", &commit);
    };
    if body.len() < LARGE {
        return content(request, body, &format!("\"{}\"", git_id(body))).with("X-Repo-Commit", &commit);
    }
    let digest = sha256(body);
    Answer { status: 302, ..Answer::ok("Found. Redirecting") }
        .with("Location", format!("{storage}{digest}?Signature=secret"))
        .with("X-Repo-Commit", &commit)
        .with("X-Linked-Etag", format!("\"{digest}\""))
        .with("X-Linked-Size", body.len())
        .with("ETag", "\"something-else\"")
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    hex(digest(&SHA256, bytes).as_ref())
}

pub(crate) fn git_id(bytes: &[u8]) -> String {
    let mut context = Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
    context.update(format!("blob {}\0", bytes.len()).as_bytes());
    context.update(bytes);
    hex(context.finish().as_ref())
}

fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .flat_map(|byte| [byte >> 4, byte & 15])
        .filter_map(|digit| char::from_digit(digit.into(), 16))
        .collect()
}

/// Bytes that are different everywhere, so that a part in the wrong place shows.
pub(crate) fn bytes(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let step = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 24) as u8
    };
    (0..length).map(step).collect()
}
