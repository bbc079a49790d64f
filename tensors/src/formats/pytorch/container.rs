//! Where a PyTorch file keeps its pickle and its storages.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;

use crate::DType;
use crate::formats::pickle::{self, Graph, Id, Value};
use crate::formats::pytorch::TorchProblem;
use crate::formats::window::{Failure, Window};
use crate::formats::zip::{self, Directory};

/// The number with which files before PyTorch 1.6 begin, as protocol 2 writes it and as older ones do.
const MAGIC: [u8; 10] = [0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];
const MAGIC_DIGITS: &[u8] = b"119547037146038801333356";

/// Version of that format.
const LEGACY_PROTOCOL: i64 = 1001;

/// Pickles in pickles.
const MAX_DEPTH: usize = 3;

/// Bounds the work that following references may cause: entries looked at, and bytes of names.
const BUDGET: usize = 1 << 25;

/// A pickle and the storages it refers to.
pub(in crate::formats) struct Container<'a> {
    pub(in crate::formats) graph: Graph<'a>,
    storages: Storages<'a>,
    depth: usize,
    budget: Cell<usize>,
    /// Names of classes and functions.
    globals: RefCell<HashMap<Id, Option<String>>>,
    /// Storages inside byte strings, by where these begin.
    nested: RefCell<HashMap<u64, Storage>>,
}

enum Storages<'a> {
    /// Members of an archive.
    Zip { archive: Window<'a>, directory: Directory, prefix: String, big_endian: bool },
    /// Regions behind the pickle, by key.
    Legacy { window: Window<'a>, regions: HashMap<String, (u64, u64)> },
    /// A bare pickle.
    None,
}

/// Where values lie in the file.
#[derive(Clone, Debug)]
pub(super) struct Storage {
    /// Absent when the storage is only bytes.
    pub(super) dtype: Option<DType>,
    pub(super) offset: u64,
    pub(super) length: u64,
    pub(super) big_endian: bool,
}

/// A reference to a storage, as pickled.
pub(super) struct StorageRecord {
    pub(super) class: String,
    pub(super) key: String,
    /// Number of elements.
    pub(super) n_elements: u64,
    /// Key, offset and length in elements of a part of another storage.
    pub(super) view: Option<(String, u64, u64)>,
}

impl<'a> Container<'a> {
    pub(in crate::formats) fn open(window: Window<'a>) -> Result<Self, Failure> {
        Self::open_nested(window, 0)
    }

    /// Reads a bare pickle that begins at `start`.
    pub(in crate::formats) fn open_pickle(window: Window<'a>, start: u64) -> Result<Self, Failure> {
        Ok(Self::new(pickle::load(window, start)?, Storages::None, 0))
    }

    fn new(graph: Graph<'a>, storages: Storages<'a>, depth: usize) -> Self {
        let (globals, nested) = (RefCell::default(), RefCell::default());
        Self { graph, storages, depth, budget: Cell::new(BUDGET), globals, nested }
    }

    fn open_nested(window: Window<'a>, depth: usize) -> Result<Self, Failure> {
        if depth > MAX_DEPTH {
            return Err(TorchProblem::TooDeep(MAX_DEPTH).into());
        }
        let mut start = [0; 4];
        if window.length >= 4 {
            window.read(&mut start, 0)?;
        }
        if start == zip::SIGNATURE {
            return Self::open_zip(window, depth);
        }
        let graph = pickle::load(window, 0)?;
        let magic = graph.big_integer(graph.root)?;
        if magic.is_some_and(|bytes| bytes == MAGIC || bytes == MAGIC_DIGITS) {
            return Self::open_legacy(window, graph.end, depth);
        }
        Ok(Self::new(graph, Storages::None, depth))
    }

    fn open_zip(archive: Window<'a>, depth: usize) -> Result<Self, Failure> {
        let directory = Directory::read(archive)?;
        let mut pickles: Vec<&str> = directory.names().filter(|name| is_root_pickle(name)).collect();
        pickles.sort_unstable();
        let prefix = match &pickles[..] {
            [] => return Err(TorchProblem::NoPickle.into()),
            [pickle] => pickle.trim_end_matches("data.pkl").to_owned(),
            [one, other, ..] => {
                return Err(TorchProblem::SeveralPickles((*one).to_owned(), (*other).to_owned()).into());
            }
        };
        if directory.member(archive, &format!("{prefix}constants.pkl"))?.is_some() {
            return Err(TorchProblem::TorchScript.into());
        }
        let big_endian = match directory.member(archive, &format!("{prefix}byteorder"))? {
            None => false,
            Some(marker) => match &marker.part(0, marker.length.min(16)).unwrap_or(marker).bytes()?[..] {
                b"little" => false,
                b"big" => true,
                other => {
                    return Err(TorchProblem::ByteOrder(String::from_utf8_lossy(other).into_owned()).into());
                }
            },
        };
        let pickle =
            directory.member(archive, &format!("{prefix}data.pkl"))?.ok_or(TorchProblem::NoPickle)?;
        let graph = pickle::load(pickle, 0)?;
        Ok(Self::new(graph, Storages::Zip { archive, directory, prefix, big_endian }, depth))
    }

    /// Files before 1.6: after the magic number a version, a description of the machine, the object, the keys of the
    /// storages, and for each of these its length and its elements, which are little-endian on every machine.
    fn open_legacy(window: Window<'a>, start: u64, depth: usize) -> Result<Self, Failure> {
        let version = pickle::load(window, start)?;
        if !matches!(version.value(version.root), Value::Int(LEGACY_PROTOCOL)) {
            return Err(TorchProblem::Legacy("its version is not 1001").into());
        }
        let system = pickle::load(window, version.end)?;
        let graph = pickle::load(window, system.end)?;
        let keys = pickle::load(window, graph.end)?;
        let Value::List(key_ids) = keys.value(keys.root) else {
            return Err(TorchProblem::Legacy("the keys of its storages are missing").into());
        };

        let container = Self::new(graph, Storages::None, depth);
        let mut element_sizes = HashMap::new();
        for value in container.graph.values() {
            let Value::Persistent(id) = value else { continue };
            let Some(record) = container.storage_record(*id)? else { continue };
            let size = super::tensor::element_size(&record.class);
            let size = size.ok_or(TorchProblem::Legacy("a storage has an unknown element type"))?;
            let key = record.view.map_or(record.key, |(key, ..)| key);
            element_sizes.insert(key, size as u64);
        }
        let mut position = keys.end;
        let mut regions = HashMap::with_capacity(key_ids.len());
        for key in key_ids {
            let key = keys.text(*key)?.ok_or(TorchProblem::Legacy("the key of a storage is not text"))?;
            let mut length = [0; 8];
            window.read(&mut length, position)?;
            let size = element_sizes.get(&key).ok_or(TorchProblem::Legacy("a storage belongs to nothing"))?;
            let length = u64::from_le_bytes(length).checked_mul(*size);
            let region = length.and_then(|length| window.part(position + 8, length));
            let region = region.ok_or(TorchProblem::Legacy("a storage is longer than the file"))?;
            regions.insert(key, (position + 8, region.length));
            position += 8 + region.length;
        }
        Ok(Self { storages: Storages::Legacy { window, regions }, ..container })
    }

    /// Pays for some work.
    pub(super) fn spend(&self, cost: usize) -> Result<(), TorchProblem> {
        let left = self.budget.get().checked_sub(cost).ok_or(TorchProblem::TooLarge)?;
        self.budget.set(left);
        Ok(())
    }

    /// Returns `module.name` of a class or function.
    pub(super) fn global(&self, id: Id) -> Result<Option<String>, Failure> {
        if let Some(known) = self.globals.borrow().get(&id) {
            self.spend(1)?;
            return Ok(known.clone());
        }
        let name = match self.graph.value(id) {
            // files before 1.6 refer to a module's class as `("module", class, file, source)`
            Value::Persistent(reference) => match self.graph.tuple(*reference) {
                Some([tag, class, ..]) if self.graph.text(*tag)?.as_deref() == Some("module") => {
                    self.graph.global(*class)?
                }
                _ => None,
            },
            _ => self.graph.global(id)?,
        };
        self.spend(16 + name.as_ref().map_or(0, String::len))?;
        self.globals.borrow_mut().insert(id, name.clone());
        Ok(name)
    }

    /// Reads `("storage", class, key, device, number of elements[, view])`.
    pub(super) fn storage_record(&self, id: Id) -> Result<Option<StorageRecord>, Failure> {
        let Some([tag, class, key, _device, n_elements, rest @ ..]) = self.graph.tuple(id) else {
            return Ok(None);
        };
        if self.graph.text(*tag)?.as_deref() != Some("storage") {
            return Ok(None);
        }
        let view = match rest.first().map(|view| (*view, self.graph.tuple(*view))) {
            Some((_, Some([key, offset, length]))) => {
                match (self.graph.text(*key)?, self.count(*offset), self.count(*length)) {
                    (Some(key), Some(offset), Some(length)) => Some((key, offset, length)),
                    _ => return Ok(None),
                }
            }
            _ => None,
        };
        let (class, key) = (self.global(*class)?, self.graph.text(*key)?);
        Ok(match (class, key, self.count(*n_elements)) {
            (Some(class), Some(key), Some(n_elements)) => {
                Some(StorageRecord { class, key, n_elements, view })
            }
            _ => None,
        })
    }

    /// Returns where the storage `key` lies, and whether it is big-endian.
    pub(super) fn storage_region(&self, key: &str) -> Result<Option<(Window<'a>, bool)>, Failure> {
        match &self.storages {
            Storages::Zip { archive, directory, prefix, big_endian } => {
                let member = directory.member(*archive, &format!("{prefix}data/{key}"))?;
                Ok(member.map(|member| (member, *big_endian)))
            }
            Storages::Legacy { window, regions } => {
                let region = regions.get(key).and_then(|(offset, length)| window.part(*offset, *length));
                Ok(region.map(|region| (region, false)))
            }
            Storages::None => Ok(None),
        }
    }

    /// Reads the PyTorch file inside a byte string, which holds one storage, with `read`.
    pub(super) fn nested_storage(
        &self,
        bytes: Window<'a>,
        read: impl FnOnce(&Container<'a>, Id) -> Result<Storage, Failure>,
    ) -> Result<Storage, Failure> {
        if let Some(known) = self.nested.borrow().get(&bytes.start) {
            return Ok(known.clone());
        }
        let inner = Self::open_nested(bytes, self.depth + 1)?;
        let storage = read(&inner, inner.graph.root)?;
        self.nested.borrow_mut().insert(bytes.start, storage.clone());
        Ok(storage)
    }

    fn count(&self, id: Id) -> Option<u64> {
        match self.graph.value(id) {
            Value::Int(value) => u64::try_from(*value).ok(),
            _ => None,
        }
    }
}

/// `data.pkl` in the archive's one folder, whatever that is called.
fn is_root_pickle(name: &str) -> bool {
    name.strip_suffix("/data.pkl").is_some_and(|folder| !folder.is_empty() && !folder.contains('/'))
}
