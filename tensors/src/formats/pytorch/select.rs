//! Which tensors of a file make up the checkpoint.
//!
//! A file is a state dict, a module, a single tensor, a list of tensors, or a dictionary around one of these. In a dictionary, the
//! entry to read is the one that was asked for; else the only one of [`KNOWN_KEYS`] that holds tensors; else the dictionary itself if
//! it holds tensors; else its only entry that does. Two candidates are an error, not a choice. What is left out is noted.

use crate::formats::TensorRegion;
use crate::formats::names::Note;
use crate::formats::pickle::{Id, MAX_NAME_BYTES, PickleProblem, Record, Value};
use crate::formats::pytorch::container::Container;
use crate::formats::pytorch::tensor::Array;
use crate::formats::pytorch::{TensorProblem, TorchProblem};
use crate::formats::window::Failure;

/// Under which training scripts keep their model.
const KNOWN_KEYS: [&str; 3] = ["state_dict", "model_state_dict", "model"];

/// What a tensor that is a file of its own is called.
const SINGLE: &str = "tensor";

/// Dictionaries around dictionaries.
const MAX_DEPTH: usize = 8;

/// What was found in a file.
#[derive(Default)]
pub(super) struct Found {
    pub(super) tensors: Vec<TensorRegion>,
    pub(super) notes: Vec<Note>,
    /// Whether the tensors lay under a key or in a module.
    pub(super) wrapped: bool,
}

/// Finds the tensors under `key`, or of the file.
pub(super) fn tensors(container: &Container<'_>, key: Option<&str>) -> Result<Found, Failure> {
    let mut found = Found::default();
    let mut id = container.unwrap(container.graph.root)?;
    let mut path = String::new();
    if let Some(key) = key {
        id = container.descend(id, key)?;
        found.enter(&mut path, key);
    }
    for _ in 0..MAX_DEPTH {
        id = container.unwrap(id)?;
        if container.is_tensor(id)? {
            found.tensors.extend(container.tensor(SINGLE, id)?);
            return Ok(found);
        }
        if let Some(module) = container.module(id)? {
            found.notes.push(Note::Module { class: container.class(id)? });
            found.wrapped = true;
            container.walk(module, &mut found.tensors)?;
            return if found.tensors.is_empty() { Err(container.no_tensors(id)?) } else { Ok(found) };
        }
        let Some(entries) = container.entries(id)? else { return Err(container.no_tensors(id)?) };
        match container.choose(&entries)? {
            Choice::Entry(position) => {
                container.note_left_out(&entries, |i| i == position, &mut found.notes)?;
                let (name, value) = &entries[position];
                found.enter(&mut path, name);
                id = *value;
            }
            Choice::All => {
                let mut taken = vec![false; entries.len()];
                for (taken, (name, value)) in taken.iter_mut().zip(&entries) {
                    if let Some(tensor) = container.tensor(name, *value)? {
                        found.tensors.push(tensor);
                        *taken = true;
                    }
                }
                container.note_left_out(&entries, |i| taken[i], &mut found.notes)?;
                return Ok(found);
            }
            Choice::None => return Err(container.no_tensors(id)?),
        }
    }
    Err(TorchProblem::TooDeep(MAX_DEPTH).into())
}

/// One entry of a file of masks.
pub(in crate::formats) enum MaskEntry<'a> {
    Array(Array<'a>),
    Tensor(TensorRegion),
}

/// Returns the arrays of a dictionary, by its keys.
pub(in crate::formats) fn mask_entries<'a>(
    container: &Container<'a>,
) -> Result<Vec<(String, MaskEntry<'a>)>, Failure> {
    let root = container.unwrap(container.graph.root)?;
    let Some(entries) = container.entries(root)? else { return Err(container.no_tensors(root)?) };
    let mut masks = Vec::with_capacity(entries.len());
    for (name, id) in entries {
        let entry = match container.array(&name, id)? {
            Some(array) => MaskEntry::Array(array),
            None => MaskEntry::Tensor(container.required_tensor(&name, id)?),
        };
        masks.push((name, entry));
    }
    Ok(masks)
}

impl Found {
    fn enter(&mut self, path: &mut String, key: &str) {
        if !path.is_empty() {
            path.push('.');
        }
        path.push_str(key);
        self.wrapped = true;
        let key = path.clone();
        match self.notes.iter_mut().find(|note| matches!(note, Note::Key { .. })) {
            Some(note) => *note = Note::Key { key },
            None => self.notes.insert(0, Note::Key { key }),
        }
    }
}

/// What of a dictionary is read.
enum Choice {
    Entry(usize),
    All,
    None,
}

/// The parts of a module's state that hold tensors.
#[derive(Clone, Copy)]
struct Module {
    parameters: Id,
    buffers: Option<Id>,
    children: Id,
    non_persistent: Option<Id>,
}

impl Container<'_> {
    fn choose(&self, entries: &[(String, Id)]) -> Result<Choice, Failure> {
        let mut holders = Vec::new();
        let mut direct = false;
        for (position, (_, id)) in entries.iter().enumerate() {
            let id = self.unwrap(*id)?;
            if self.is_tensor(id)? {
                direct = true;
            } else if self.holds_tensors(id, MAX_DEPTH / 2)? {
                holders.push(position);
            }
        }
        let known: Vec<usize> =
            holders.iter().copied().filter(|i| KNOWN_KEYS.contains(&entries[*i].0.as_str())).collect();
        let ambiguous = |positions: &[usize]| {
            let names = positions.iter().take(10).map(|i| entries[*i].0.clone()).collect();
            Err(TorchProblem::Ambiguous(names).into())
        };
        match (&known[..], direct, &holders[..]) {
            ([position], _, _) | ([], false, [position]) => Ok(Choice::Entry(*position)),
            ([_, _, ..], _, _) => ambiguous(&known),
            ([], true, _) => Ok(Choice::All),
            ([], false, []) => Ok(Choice::None),
            ([], false, _) => ambiguous(&holders),
        }
    }

    /// Whether a value is a module, or a dictionary with tensors in it or under a known key.
    fn holds_tensors(&self, id: Id, depth: usize) -> Result<bool, Failure> {
        if self.module(id)?.is_some() {
            return Ok(true);
        }
        let Some(pairs) = self.pairs(id)? else { return Ok(false) };
        for (key, value) in pairs {
            self.spend(16)?;
            let value = self.unwrap(value)?;
            if self.is_tensor(value)? {
                return Ok(true);
            }
            if depth > 0
                && self.key_name(key)?.is_some_and(|key| KNOWN_KEYS.contains(&key.as_str()))
                && self.holds_tensors(value, depth - 1)?
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Follows a key, which may be a path: `a.b` is the entry `a.b`, or `b` in `a`.
    fn descend(&self, start: Id, key: &str) -> Result<Id, Failure> {
        let (mut id, mut rest) = (start, key);
        loop {
            id = self.unwrap(id)?;
            let entries = match self.module(id)? {
                Some(module) => self.entries(module.children)?,
                None => self.entries(id)?,
            };
            let entries = entries.unwrap_or_default();
            let ends = std::iter::once(rest.len()).chain(rest.rmatch_indices('.').map(|(at, _)| at));
            let step = ends.into_iter().find_map(|end| {
                let found = entries.iter().find(|(name, _)| *name == rest[..end]);
                found.map(|(_, value)| (*value, &rest[end..]))
            });
            let Some((value, remaining)) = step else {
                let entries = entries.into_iter().take(20).map(|(name, _)| name).collect();
                return Err(TorchProblem::NoSuchKey { key: key.to_owned(), entries }.into());
            };
            (id, rest) = (value, remaining.strip_prefix('.').unwrap_or_default());
            if rest.is_empty() {
                return Ok(id);
            }
        }
    }

    /// Says what of a dictionary was not taken, unless there is nothing to miss.
    fn note_left_out(
        &self,
        entries: &[(String, Id)],
        taken: impl Fn(usize) -> bool,
        notes: &mut Vec<Note>,
    ) -> Result<(), Failure> {
        let mut others = entries.iter().enumerate().filter(|(i, _)| !taken(*i)).map(|(_, entry)| entry);
        if let Some((example, id)) = others.next() {
            let (entries, what) = (1 + others.count(), self.content(*id)?);
            notes.push(Note::LeftOut { entries, example: example.clone(), what });
        }
        Ok(())
    }

    /// Collects what `state_dict()` returns.
    fn walk(&self, root: Module, tensors: &mut Vec<TensorRegion>) -> Result<(), Failure> {
        let mut rest = vec![(String::new(), root)];
        while let Some((prefix, module)) = rest.pop() {
            let left_out = match module.non_persistent {
                Some(set) => self.names_in_set(set)?,
                None => Vec::new(),
            };
            let buffers = module.buffers.map(|buffers| self.entries(buffers)).transpose()?.flatten();
            let buffers =
                buffers.unwrap_or_default().into_iter().filter(|(name, _)| !left_out.contains(name));
            let parameters = self.entries(module.parameters)?.unwrap_or_default();
            for (name, id) in parameters.into_iter().chain(buffers) {
                let name = self.join(&prefix, &name)?;
                if matches!(self.graph.value(id), Value::None) {
                    continue;
                }
                tensors.push(self.required_tensor(&name, id)?);
            }
            for (name, id) in self.entries(module.children)?.unwrap_or_default() {
                let name = self.join(&prefix, &name)?;
                if matches!(self.graph.value(id), Value::None) {
                    continue;
                }
                let Some(child) = self.module(id)? else {
                    let content = self.content(id)?;
                    return Err(TorchProblem::OpaqueModule { module: name, content }.into());
                };
                rest.push((format!("{name}."), child));
            }
        }
        Ok(())
    }

    /// A value that must be a tensor.
    fn required_tensor(&self, name: &str, id: Id) -> Result<TensorRegion, Failure> {
        if let Some(tensor) = self.tensor(name, id)? {
            return Ok(tensor);
        }
        let problem = TensorProblem::NotATensor(self.content(id)?);
        Err(TorchProblem::Tensor { tensor: name.to_owned(), problem }.into())
    }

    fn join(&self, prefix: &str, name: &str) -> Result<String, Failure> {
        let length = prefix.len() + name.len();
        self.spend(16 + length)?;
        if length as u64 > MAX_NAME_BYTES {
            return Err(PickleProblem::NameTooLong(length as u64).into());
        }
        Ok(format!("{prefix}{name}"))
    }

    /// Recognizes a module by its state.
    fn module(&self, id: Id) -> Result<Option<Module>, Failure> {
        let Value::Record(Record { state: Some(state), .. }) = self.graph.value(id) else { return Ok(None) };
        // classes with slots have a pair of dictionaries
        let state = match self.graph.tuple(*state) {
            Some([state, _slots]) => *state,
            _ => *state,
        };
        let Value::Dict(fields) = self.graph.value(state) else { return Ok(None) };
        let [mut parameters, mut buffers, mut children, mut non_persistent] = [None; 4];
        for (key, value) in fields {
            self.spend(16)?;
            let field = match self.key_name(*key)?.as_deref() {
                Some("_parameters") => &mut parameters,
                Some("_buffers") => &mut buffers,
                Some("_modules") => &mut children,
                Some("_non_persistent_buffers_set") => &mut non_persistent,
                _ => continue,
            };
            *field = Some(*value);
        }
        let (Some(parameters), Some(children)) = (parameters, children) else { return Ok(None) };
        Ok(Some(Module { parameters, buffers, children, non_persistent }))
    }

    fn names_in_set(&self, id: Id) -> Result<Vec<String>, Failure> {
        let items = match self.graph.value(id) {
            Value::Set(items) => items,
            // protocols before 4 call `set([…])`
            Value::Record(record) => match self.graph.tuple(record.arguments) {
                Some([list]) => match self.graph.value(*list) {
                    Value::List(items) => items,
                    _ => return Ok(Vec::new()),
                },
                _ => return Ok(Vec::new()),
            },
            _ => return Ok(Vec::new()),
        };
        let mut names = Vec::new();
        for item in items {
            self.spend(16)?;
            names.extend(self.key_name(*item)?);
        }
        Ok(names)
    }

    /// Looks into an array of one object.
    fn unwrap(&self, id: Id) -> Result<Id, Failure> {
        Ok(self.object_array(id)?.unwrap_or(id))
    }

    /// Keys and values of a dictionary or something like one; positions and items of a list.
    fn pairs(&self, id: Id) -> Result<Option<Vec<(Id, Id)>>, Failure> {
        let pairs = match self.graph.value(id) {
            Value::Dict(pairs) => pairs.clone(),
            Value::Record(record) => match &record.contents {
                Some(contents) if !contents.items.is_empty() => contents.items.clone(),
                _ => {
                    let class = self.global(record.callable)?.unwrap_or_default();
                    if !matches!(class.rsplit('.').next(), Some("OrderedDict" | "dict" | "defaultdict")) {
                        return Ok(None);
                    }
                    self.given_pairs(record)
                }
            },
            _ => return Ok(None),
        };
        self.spend(pairs.len())?;
        Ok(Some(pairs))
    }

    /// Python 2 writes an `OrderedDict` as a call with a list of pairs.
    fn given_pairs(&self, record: &Record) -> Vec<(Id, Id)> {
        let Some([list]) = self.graph.tuple(record.arguments) else { return Vec::new() };
        let Value::List(items) = self.graph.value(*list) else { return Vec::new() };
        let pair = |id: &Id| match self.graph.value(*id) {
            Value::List(pair) => pair.as_slice().try_into().ok(),
            Value::Tuple(pair) => pair[..].try_into().ok(),
            _ => None,
        };
        items.iter().filter_map(pair).map(|[key, value]: [Id; 2]| (key, value)).collect()
    }

    /// [`Self::pairs`] with names for keys. Entries whose keys are neither text nor numbers are not mentioned.
    fn entries(&self, id: Id) -> Result<Option<Vec<(String, Id)>>, Failure> {
        if let Value::List(items) = self.graph.value(id) {
            self.spend(16 * items.len())?;
            return Ok(Some(items.iter().enumerate().map(|(i, item)| (i.to_string(), *item)).collect()));
        }
        if let Some(items) = self.graph.tuple(id) {
            self.spend(16 * items.len())?;
            return Ok(Some(items.iter().enumerate().map(|(i, item)| (i.to_string(), *item)).collect()));
        }
        let Some(pairs) = self.pairs(id)? else { return Ok(None) };
        let mut entries = Vec::with_capacity(pairs.len());
        for (key, value) in pairs {
            if let Some(name) = self.key_name(key)? {
                self.spend(16 + name.len())?;
                entries.push((name, value));
            }
        }
        Ok(Some(entries))
    }

    fn key_name(&self, key: Id) -> Result<Option<String>, Failure> {
        match self.graph.value(key) {
            Value::Int(number) => Ok(Some(number.to_string())),
            _ => self.graph.text(key),
        }
    }

    fn class(&self, id: Id) -> Result<String, Failure> {
        let Value::Record(record) = self.graph.value(id) else { return Ok(String::new()) };
        let callable = self.global(record.callable)?;
        // protocols before 2 call a function with the class
        if callable.as_deref().is_some_and(|callable| {
            callable.ends_with("copyreg._reconstructor") || callable.ends_with("copy_reg._reconstructor")
        }) && let Some([class, ..]) = self.graph.tuple(record.arguments)
        {
            return Ok(self.global(*class)?.unwrap_or_default());
        }
        Ok(callable.unwrap_or_default())
    }

    fn no_tensors(&self, id: Id) -> Result<Failure, Failure> {
        Ok(TorchProblem::NoTensors { content: self.content(id)? }.into())
    }

    /// What a value is, for messages.
    fn content(&self, id: Id) -> Result<String, Failure> {
        Ok(match self.graph.value(id) {
            Value::None => "`None`".to_owned(),
            Value::Bool(_) => "a boolean".to_owned(),
            Value::Int(_) | Value::Float | Value::BigInt(_) => "a number".to_owned(),
            Value::Text(_) | Value::EscapedText(_) | Value::TextOrBytes(_) => "text".to_owned(),
            Value::Bytes(_) => "a byte string".to_owned(),
            Value::List(_) => "a list".to_owned(),
            Value::Tuple(_) => "a tuple".to_owned(),
            Value::Set(_) => "a set".to_owned(),
            Value::Dict(_) => "a dictionary".to_owned(),
            Value::Global { .. } => format!("the name `{}`", self.global(id)?.unwrap_or_default()),
            Value::Record(_) => format!("a record of `{}`", self.class(id)?),
            Value::Persistent(_) | Value::External => "a reference to something outside".to_owned(),
        })
    }
}
