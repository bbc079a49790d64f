//! Executes what has to be executed: a scheduler over the units, with a limit on how many run at once.
//!
//! One coordinator owns all state; workers compute one unit each and report back. Finished units are published at once, so nothing that
//! finished is lost whatever happens to the rest. Damage that is found in an input sends the unit that made it back to be made again.

use super::events::{Event, Reporter, Status};
use super::keys::Resolved;
use super::pace::{Pace, Stopwatch};
use super::resolver::{Lookup, Resolver};
use super::units::UnitId;
use super::workspace::cancelled;
use blake3::Hash;
use merganser_cache::{Damage, Part, StageKey, Store};
use merganser_stages::{Job, Notice, OpenFiles, StageError};
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

/// How often a unit may find its inputs damaged before the store is given up on.
const REPAIRS_PER_UNIT: usize = 3;

/// Choices of one run.
#[derive(Clone, Copy, Debug)]
pub struct RunOptions {
    /// Units at once.
    pub jobs: usize,
    /// Whether units that do not depend on a failed one still run.
    pub keep_going: bool,
}

/// How one unit ended.
#[derive(Debug)]
pub struct UnitOutcome {
    pub id: UnitId,
    pub status: Status,
    pub key: Option<StageKey>,
    pub artifact: Option<Hash>,
    pub seconds: f64,
    /// Of an evaluation that ran.
    pub pace: Option<Pace>,
    pub reason: String,
    pub error: Option<StageError>,
}

impl UnitOutcome {
    fn not_started(id: UnitId, reason: &str) -> Self {
        Self {
            id,
            status: Status::Skipped,
            key: None,
            artifact: None,
            seconds: 0.0,
            pace: None,
            reason: reason.to_owned(),
            error: None,
        }
    }
}

/// How a run ended.
#[derive(Debug)]
pub struct RunOutcome {
    /// In topological order.
    pub units: Vec<UnitOutcome>,
    pub interrupted: bool,
    /// An input was damaged again after it had been made again.
    pub unrepairable: bool,
    pub seconds: f64,
}

/// Runs all needed units of `resolver`.
pub fn run(resolver: &Resolver<'_>, options: RunOptions, reporter: &dyn Reporter) -> RunOutcome {
    let started = Instant::now();
    let n_needed = resolver.needed.iter().filter(|needed| **needed).count();
    reporter.event(&Event::RunStarted { pipeline: resolver.units.pipeline.name.clone(), units: n_needed });
    let (sender, receiver) = mpsc::channel();
    let mut coordinator = Coordinator {
        resolver,
        options,
        reporter,
        states: resolver
            .needed
            .iter()
            .map(|needed| if *needed { State::Waiting } else { State::NotNeeded })
            .collect(),
        artifacts: HashMap::new(),
        forced: resolver.forced.clone(),
        queue: VecDeque::new(),
        n_running: 0,
        repairs: HashMap::new(),
        stopping: false,
        unrepairable: false,
    };
    std::thread::scope(|scope| {
        loop {
            coordinator.stopping |= cancelled();
            coordinator.advance();
            while !coordinator.stopping && coordinator.n_running < options.jobs {
                let Some(queued) = coordinator.queue.pop_front() else { break };
                coordinator.n_running += 1;
                coordinator.states[queued.id] =
                    State::Running { reason: queued.reason.clone(), key: queued.key };
                let sender = sender.clone();
                scope.spawn(move || {
                    let message = Message::Finished {
                        id: queued.id,
                        result: execute(resolver, &queued, options, &sender),
                    };
                    // The coordinator only stops listening once nothing runs.
                    let _ = sender.send(message);
                });
            }
            for text in resolver.workspace.take_messages() {
                reporter.event(&Event::Info { message: text });
            }
            if coordinator.n_running == 0 {
                break;
            }
            match receiver.recv_timeout(Duration::from_millis(100)) {
                Ok(message) => coordinator.receive(message),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
    });
    for text in resolver.workspace.take_messages() {
        reporter.event(&Event::Info { message: text });
    }
    coordinator.finish(started.elapsed().as_secs_f64())
}

enum State {
    NotNeeded,
    Waiting,
    Queued,
    Running { reason: String, key: StageKey },
    Ended(UnitOutcome),
}

struct Queued {
    id: UnitId,
    key: StageKey,
    resolved: Box<Resolved>,
    reason: String,
    forced: bool,
}

enum Message {
    Event(Event),
    Finished { id: UnitId, result: Result<Executed, StageError> },
}

struct Executed {
    artifact: Hash,
    seconds: f64,
    pace: Option<Pace>,
    /// Another process computed it while this one waited.
    by_another: bool,
}

struct Coordinator<'a> {
    resolver: &'a Resolver<'a>,
    options: RunOptions,
    reporter: &'a dyn Reporter,
    states: Vec<State>,
    artifacts: HashMap<UnitId, Hash>,
    forced: Vec<bool>,
    queue: VecDeque<Queued>,
    n_running: usize,
    repairs: HashMap<UnitId, usize>,
    stopping: bool,
    unrepairable: bool,
}

impl Coordinator<'_> {
    /// Looks up every unit whose inputs are known, until nothing changes: hits end at once, misses are queued.
    fn advance(&mut self) {
        for id in 0..self.states.len() {
            if self.stopping || !matches!(self.states[id], State::Waiting) {
                continue;
            }
            let inputs = &self.resolver.units.entries[id].inputs;
            if inputs.iter().any(|input| self.gave_up(input.from)) {
                self.end(id, Status::Skipped, None, "an input failed".to_owned(), 0.0, None);
                continue;
            }
            if !inputs.iter().all(|input| self.artifacts.contains_key(&input.from)) {
                continue;
            }
            match self.resolver.lookup(id, &self.artifacts, self.forced[id]) {
                Ok(Lookup::Hit { key, artifact }) => {
                    self.artifacts.insert(id, artifact);
                    self.end(id, Status::Cached, Some(key), String::new(), 0.0, None);
                }
                Ok(Lookup::Miss { key, resolved, reason }) => {
                    self.states[id] = State::Queued;
                    self.queue.push_back(Queued { id, key, resolved, reason, forced: self.forced[id] });
                }
                Err(error) => self.fail(id, None, String::new(), error),
            }
        }
    }

    fn gave_up(&self, id: UnitId) -> bool {
        matches!(&self.states[id], State::Ended(outcome) if matches!(outcome.status, Status::Failed | Status::Skipped))
    }

    fn receive(&mut self, message: Message) {
        let (id, result) = match message {
            Message::Event(event) => return self.reporter.event(&event),
            Message::Finished { id, result } => (id, result),
        };
        self.n_running -= 1;
        let State::Running { reason, key } = std::mem::replace(&mut self.states[id], State::Waiting) else {
            unreachable!("only a running unit finishes")
        };
        match result {
            Ok(executed) => {
                self.artifacts.insert(id, executed.artifact);
                self.forced[id] = false;
                let (status, reason) = if executed.by_another {
                    (Status::Cached, "computed by another run".to_owned())
                } else {
                    (Status::Ran, reason)
                };
                self.end(id, status, Some(key), reason, executed.seconds, None);
                if let State::Ended(outcome) = &mut self.states[id] {
                    outcome.pace = executed.pace;
                }
            }
            Err(StageError::DamagedInputs { artifacts }) => self.repair(id, &artifacts),
            Err(StageError::Cancelled) => {
                self.stopping = true;
                self.end(id, Status::Skipped, Some(key), "interrupted".to_owned(), 0.0, None);
            }
            Err(error) => self.fail(id, Some(key), reason, error),
        }
    }

    /// Sends the makers of damaged artifacts back to work; this unit waits for them.
    fn repair(&mut self, id: UnitId, damaged: &[Hash]) {
        let attempts = self.repairs.entry(id).or_default();
        *attempts += 1;
        if *attempts > REPAIRS_PER_UNIT {
            self.unrepairable = true;
            return self.fail(
                id,
                None,
                String::new(),
                StageError::DamagedInputs { artifacts: damaged.to_vec() },
            );
        }
        let makers: Vec<UnitId> = self
            .artifacts
            .iter()
            .filter(|(_, artifact)| damaged.contains(artifact))
            .map(|(maker, _)| *maker)
            .collect();
        for maker in makers {
            self.artifacts.remove(&maker);
            self.states[maker] = State::Waiting;
        }
    }

    fn fail(&mut self, id: UnitId, key: Option<StageKey>, reason: String, error: StageError) {
        self.stopping |= !self.options.keep_going;
        self.end(id, Status::Failed, key, reason, 0.0, Some(error));
    }

    fn end(
        &mut self,
        id: UnitId,
        status: Status,
        key: Option<StageKey>,
        reason: String,
        seconds: f64,
        error: Option<StageError>,
    ) {
        let entry = &self.resolver.units.entries[id];
        let detail = error.as_ref().map_or_else(
            || reason.clone(),
            |error| match error.help() {
                Some(help) => format!("{}\n        help: {help}", error.with_causes()),
                None => error.with_causes(),
            },
        );
        self.reporter.event(&Event::UnitFinished { id, name: entry.name.clone(), status, seconds, detail });
        let artifact = self.artifacts.get(&id).copied();
        self.states[id] =
            State::Ended(UnitOutcome { id, status, key, artifact, seconds, pace: None, reason, error });
    }

    fn finish(mut self, seconds: f64) -> RunOutcome {
        let interrupted = cancelled();
        for id in 0..self.states.len() {
            if matches!(self.states[id], State::Waiting | State::Queued) {
                // Never started, so there is no event: the count in the summary says enough.
                let reason = if interrupted { "interrupted" } else { "an earlier stage failed" };
                self.states[id] = State::Ended(UnitOutcome::not_started(id, reason));
            }
        }
        let units: Vec<UnitOutcome> = self
            .states
            .into_iter()
            .filter_map(|state| match state {
                State::Ended(outcome) => Some(outcome),
                _ => None,
            })
            .collect();
        let count = |status| units.iter().filter(|unit| unit.status == status).count();
        if interrupted {
            self.reporter.event(&Event::Interrupted);
        }
        self.reporter.event(&Event::RunFinished {
            ran: count(Status::Ran),
            cached: count(Status::Cached),
            failed: count(Status::Failed),
            skipped: count(Status::Skipped),
            seconds,
        });
        RunOutcome { units, interrupted, unrepairable: self.unrepairable, seconds }
    }
}

/// Nobody can make a file again that the user removed.
fn refuse_gone(store: &Store, damages: &[Damage]) -> Result<(), StageError> {
    let places = damages.iter().filter_map(|damage| match &damage.part {
        Part::Source { digest } => store.gone(digest).into_iter().next(),
        _ => None,
    });
    let gone: BTreeSet<String> = places.map(|path| format!("`{}`", path.display())).collect();
    if gone.is_empty() {
        return Ok(());
    }
    let (are, them) = if gone.len() == 1 { ("is", "it") } else { ("are", "them") };
    let gone = gone.into_iter().collect::<Vec<_>>().join(", ");
    Err(StageError::input_help(
        format!("{gone} {are} gone, and this stage has to read {them}"),
        format!(
            "put {them} back; or build on what was stored of {them}, such as `svd` with `store = \"basis\"`"
        ),
    ))
}

/// Computes one unit and publishes its artifact, alone among all processes that want the same key.
fn execute(
    resolver: &Resolver<'_>,
    queued: &Queued,
    options: RunOptions,
    sender: &mpsc::Sender<Message>,
) -> Result<Executed, StageError> {
    let store = &resolver.workspace.store;
    let entry = &resolver.units.entries[queued.id];
    let tell = |event| {
        // The coordinator only stops listening once nothing runs.
        let _ = sender.send(Message::Event(event));
    };
    let mut damages = Vec::new();
    for input in &queued.resolved.inputs {
        damages.extend(store.verify_artifact(&input.artifact).err().unwrap_or_default());
    }
    refuse_gone(store, &damages)?;
    let damaged: Vec<Hash> = damages.into_iter().map(|damage| damage.artifact).collect();
    if !damaged.is_empty() {
        return Err(StageError::DamagedInputs { artifacts: damaged });
    }
    let _lock = store.lock_key(
        &queued.key,
        &mut |waiting| {
            tell(Event::Waiting { id: queued.id, name: entry.name.clone(), holder: waiting.holder });
        },
        &cancelled,
    )?;
    if !queued.forced
        && let Ok(hit) = store.lookup(&queued.key)
    {
        let artifact = hit.artifact_digest;
        return Ok(Executed { artifact, seconds: 0.0, pace: None, by_another: true });
    }
    tell(Event::UnitStarted { id: queued.id, name: entry.name.clone(), reason: queued.reason.clone() });
    let started = Instant::now();
    let staging = store.staging()?;
    let shared_sender = std::sync::Mutex::new(sender.clone());
    let stopwatch = Stopwatch::default();
    let notify = |notice| {
        let event = match notice {
            Notice::Progress(progress) => {
                stopwatch.note(&progress, Instant::now());
                Event::Progress { id: queued.id, progress }
            }
            Notice::Warning(text) => Event::Warning { message: format!("{}: {text}", entry.name) },
            Notice::Info(message) => Event::Info { message },
        };
        let sender = shared_sender.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let _ = sender.send(Message::Event(event));
    };
    let job = Job {
        unit: entry.unit.clone(),
        inputs: queued.resolved.inputs.clone(),
        sources: queued.resolved.sources.clone(),
        preimage: &queued.resolved.preimage,
        services: &resolver.workspace.services,
        threads: (resolver.workspace.threads / options.jobs).max(1),
        staging: &staging,
        notify: &notify,
        clock: &|| started.elapsed(),
        cancelled: &cancelled,
        files: OpenFiles::new(store),
        forced: queued.forced,
    };
    let artifact = resolver.units.stage(queued.id).run(&job)?;
    job.files.check_unchanged()?;
    let published = store.publish(&queued.resolved.preimage, &artifact, started.elapsed())?;
    let seconds = started.elapsed().as_secs_f64();
    Ok(Executed { artifact: published.artifact, seconds, pace: stopwatch.pace(), by_another: false })
}
