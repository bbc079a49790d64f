//! The records that mean a tensor: those of PyTorch's `_rebuild_…` functions, and NumPy arrays.

use crate::DType;
use crate::arrangement::Arrangement;
use crate::dtype::TensorInfo;
use crate::formats::TensorRegion;
use crate::formats::pickle::{Id, Value};
use crate::formats::pytorch::container::{Container, Storage};
use crate::formats::pytorch::{TensorProblem, TorchProblem};
use crate::formats::window::{Failure, Window};

/// Wrappers around a tensor that are looked through.
const MAX_WRAPPERS: usize = 8;

/// A NumPy array.
pub(in crate::formats) struct Array<'a> {
    pub(in crate::formats) dtype: DType,
    pub(in crate::formats) big_endian: bool,
    pub(in crate::formats) shape: Vec<usize>,
    pub(in crate::formats) column_major: bool,
    pub(in crate::formats) payload: Payload<'a>,
}

/// The values of an array.
pub(in crate::formats) enum Payload<'a> {
    Bytes(Window<'a>),
    /// Every byte as the character of that number, in UTF-8: what protocols 1 and 2 do to byte strings.
    Latin1(Window<'a>),
    /// The same with backslashes, of protocol 0.
    Escaped,
}

/// What a record asks for.
enum Call {
    Rebuild(Rebuild),
    Parameter,
    FromType,
    Array,
    /// Something of PyTorch that gives a tensor in a way that is not supported.
    Foreign,
    Other,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Rebuild {
    /// The element type is that of the storage; version 1 and 2.
    Typed,
    /// The element type is given and the storage is bytes; version 3.
    WithDType,
}

impl<'a> Container<'a> {
    /// Whether the record at `id` is meant to be a tensor, or a NumPy array of numbers.
    pub(super) fn is_tensor(&self, id: Id) -> Result<bool, Failure> {
        let Value::Record(record) = self.graph.value(id) else { return Ok(false) };
        let Some(callable) = self.global(record.callable)? else { return Ok(false) };
        match classify(&callable) {
            Call::Other => Ok(false),
            Call::Array => Ok(self.object_array(id)?.is_none()),
            _ => Ok(true),
        }
    }

    /// Returns the tensor `name`, or none when the value is something else.
    pub(super) fn tensor(&self, name: &str, id: Id) -> Result<Option<TensorRegion>, Failure> {
        let fail = |problem| Failure::from(TorchProblem::Tensor { tensor: name.to_owned(), problem });
        let Value::Record(record) = self.graph.value(id) else { return Ok(None) };
        let (mut id, mut callable, mut arguments) = (id, record.callable, record.arguments);
        for _ in 0..MAX_WRAPPERS {
            let Some(function) = self.global(callable)? else { return Ok(None) };
            let tuple = self.graph.tuple(arguments).unwrap_or_default();
            match (classify(&function), tuple) {
                (Call::Rebuild(rebuild), _) => return self.view(name, rebuild, tuple).map(Some),
                (Call::Parameter, [data, ..]) => {
                    let Value::Record(record) = self.graph.value(*data) else {
                        return Err(fail(TensorProblem::Invalid("its data is not a tensor")));
                    };
                    (id, callable, arguments) = (*data, record.callable, record.arguments);
                }
                (Call::FromType, [function, _class, inner, ..]) => {
                    (callable, arguments) = (*function, *inner);
                }
                (Call::Array, _) => {
                    if self.object_array(id)?.is_some() {
                        return Ok(None);
                    }
                    let array = self.array(name, id)?;
                    return array.map(|array| array_region(name, array)).transpose();
                }
                (Call::Other, _) if callable == record.callable => return Ok(None),
                _ => return Err(fail(TensorProblem::Unsupported { callable: function })),
            }
        }
        Err(fail(TensorProblem::Invalid("it is wrapped too many times")))
    }

    /// Returns the only element of an array of objects, which is how `numpy.save` stores a dictionary.
    pub(super) fn object_array(&self, id: Id) -> Result<Option<Id>, Failure> {
        let Value::Record(record) = self.graph.value(id) else { return Ok(None) };
        let callable = self.global(record.callable)?;
        if !callable.is_some_and(|callable| matches!(classify(&callable), Call::Array)) {
            return Ok(None);
        }
        let Some([_version, _shape, dtype, _order, data]) =
            record.state.and_then(|state| self.graph.tuple(state))
        else {
            return Ok(None);
        };
        match self.graph.value(*data) {
            Value::List(items) if self.dtype_code(*dtype)?.is_some_and(|(code, _)| code.starts_with('O')) => {
                Ok(items.first().copied().filter(|_| items.len() == 1))
            }
            _ => Ok(None),
        }
    }

    /// Reads a NumPy array.
    pub(super) fn array(&self, name: &str, id: Id) -> Result<Option<Array<'a>>, Failure> {
        let fail = |problem| Failure::from(TorchProblem::Tensor { tensor: name.to_owned(), problem });
        let Value::Record(record) = self.graph.value(id) else { return Ok(None) };
        let Some(function) = self.global(record.callable)? else { return Ok(None) };
        if !matches!(classify(&function), Call::Array) {
            return Ok(None);
        }
        let (data, dtype, shape, column_major) = if function.ends_with("._frombuffer") {
            let Some([data, dtype, shape, order]) = self.graph.tuple(record.arguments) else {
                return Err(fail(TensorProblem::Invalid("its array is not complete")));
            };
            (*data, *dtype, *shape, self.graph.text(*order)?.as_deref() == Some("F"))
        } else {
            let state = record.state.and_then(|state| self.graph.tuple(state));
            let Some([_version, shape, dtype, column_major, data]) = state else {
                return Err(fail(TensorProblem::Invalid("its array is not complete")));
            };
            (*data, *dtype, *shape, matches!(self.graph.value(*column_major), Value::Bool(true)))
        };
        let Some((code, order)) = self.dtype_code(dtype)? else {
            return Err(fail(TensorProblem::Invalid("the element type of its array is not known")));
        };
        let Some(dtype) = dtype_of_numpy(&code) else {
            return Err(fail(TensorProblem::DType(format!("{order}{code}"))));
        };
        let Some(payload) = self.payload(data)? else {
            return Err(fail(TensorProblem::Invalid("its array has no bytes")));
        };
        let shape = self.sizes(name, shape)?;
        Ok(Some(Array { dtype, big_endian: order == ">", shape, column_major, payload }))
    }

    /// A byte string, or the call that makes one out of text.
    fn payload(&self, id: Id) -> Result<Option<Payload<'a>>, Failure> {
        if let Some(bytes) = self.graph.bytes(id) {
            return Ok(Some(Payload::Bytes(bytes)));
        }
        let Value::Record(record) = self.graph.value(id) else { return Ok(None) };
        let function = self.global(record.callable)?;
        Ok(match (function.as_deref(), self.graph.tuple(record.arguments)) {
            (Some("_codecs.encode"), Some([text, ..])) => {
                Some(self.graph.long_text(*text).map_or(Payload::Escaped, Payload::Latin1))
            }
            (Some("builtins.bytearray" | "__builtin__.bytearray"), Some([bytes, ..])) => {
                self.graph.bytes(*bytes).map(Payload::Bytes)
            }
            _ => None,
        })
    }

    /// Returns kind and size (`f4`) and the byte order of a NumPy type.
    fn dtype_code(&self, id: Id) -> Result<Option<(String, String)>, Failure> {
        let Value::Record(record) = self.graph.value(id) else { return Ok(None) };
        if self.global(record.callable)?.as_deref() != Some("numpy.dtype") {
            return Ok(None);
        }
        let Some([code, ..]) = self.graph.tuple(record.arguments) else { return Ok(None) };
        let order = match record.state.and_then(|state| self.graph.tuple(state)) {
            Some([_version, order, ..]) => self.graph.text(*order)?,
            _ => None,
        };
        Ok(self.graph.text(*code)?.map(|code| (code, order.unwrap_or_default())))
    }

    /// Reads the arguments of a `_rebuild_tensor…` function.
    fn view(&self, name: &str, rebuild: Rebuild, arguments: &[Id]) -> Result<TensorRegion, Failure> {
        let fail = |problem| Failure::from(TorchProblem::Tensor { tensor: name.to_owned(), problem });
        let [storage, offset, shape, strides, rest @ ..] = arguments else {
            return Err(fail(TensorProblem::Invalid("it has too few arguments")));
        };
        let storage = self.storage(name, *storage)?;
        let (dtype, metadata) = match rebuild {
            Rebuild::Typed => (storage.dtype, rest.get(2)),
            Rebuild::WithDType => match rest {
                [_requires_grad, _hooks, dtype, rest @ ..] => {
                    let global = self.global(*dtype)?.unwrap_or_default();
                    let dtype = dtype_of_torch(&global).ok_or_else(|| fail(TensorProblem::DType(global)))?;
                    (Some(dtype), rest.first())
                }
                _ => return Err(fail(TensorProblem::Invalid("it has too few arguments"))),
            },
        };
        let dtype = dtype.ok_or_else(|| fail(TensorProblem::Invalid("its storage has no element type")))?;
        if let Some(lazily) = metadata.map(|metadata| self.lazily(*metadata)).transpose()?.flatten() {
            return Err(fail(TensorProblem::Lazy(lazily)));
        }
        let offset = self.size(name, *offset)? as u64;
        let (shape, strides) = (self.sizes(name, *shape)?, self.sizes(name, *strides)?);
        if shape.len() != strides.len() {
            return Err(fail(TensorProblem::Invalid("its numbers of sizes and strides differ")));
        }
        let bytes = Window { file: self.graph.file(), start: storage.offset, length: storage.length };
        let info = TensorInfo { name: name.to_owned(), dtype, shape };
        region(info, Some(strides), storage.big_endian, bytes, offset).map_err(fail)
    }

    /// Finds the values behind the storage argument of a tensor.
    fn storage(&self, name: &str, id: Id) -> Result<Storage, Failure> {
        let fail = |problem| Failure::from(TorchProblem::Tensor { tensor: name.to_owned(), problem });
        let record = match self.graph.value(id) {
            Value::Persistent(reference) => self.storage_record(*reference)?,
            Value::Record(record) => {
                let function = self.global(record.callable)?.unwrap_or_default();
                if function != "torch.storage._load_from_bytes" {
                    return Err(fail(TensorProblem::Unsupported { callable: function }));
                }
                let payload = match self.graph.tuple(record.arguments) {
                    Some([bytes, ..]) => self.payload(*bytes)?,
                    _ => None,
                };
                return match payload {
                    Some(Payload::Bytes(bytes)) => {
                        self.nested_storage(bytes, |inner, root| inner.storage(name, root))
                    }
                    Some(Payload::Latin1(_) | Payload::Escaped) => Err(fail(TensorProblem::TextPayload)),
                    None => Err(fail(TensorProblem::Invalid("its storage has no bytes"))),
                };
            }
            _ => None,
        };
        let record = record.ok_or_else(|| fail(TensorProblem::Invalid("it has no storage")))?;
        let dtype =
            storage_dtype(&record.class).ok_or_else(|| fail(TensorProblem::DType(record.class.clone())))?;
        let size = dtype.map_or(1, DType::size_bytes) as u64;
        let key = record.view.as_ref().map_or(&record.key, |(key, ..)| key);
        let Some((whole, big_endian)) = self.storage_region(key)? else {
            return Err(fail(TensorProblem::NoStorage(key.clone())));
        };
        let bytes = |elements: u64| elements.saturating_mul(size);
        let part = match &record.view {
            Some((_, offset, length)) => whole.part(bytes(*offset), bytes(*length)),
            None => Some(whole).filter(|whole| whole.length == bytes(record.n_elements)),
        };
        let part = part.ok_or_else(|| {
            let (storage, expected) = (key.clone(), bytes(record.n_elements));
            fail(TensorProblem::StorageLength { storage, expected, actual: whole.length })
        })?;
        Ok(Storage { dtype, offset: part.start, length: part.length, big_endian })
    }

    /// What of `{"neg": …, "conj": …}` is set.
    fn lazily(&self, metadata: Id) -> Result<Option<&'static str>, Failure> {
        let Value::Dict(entries) = self.graph.value(metadata) else { return Ok(None) };
        for (key, value) in entries {
            self.spend(16)?;
            if matches!(self.graph.value(*value), Value::Bool(true)) {
                match self.graph.text(*key)?.as_deref() {
                    Some("neg") => return Ok(Some("negated")),
                    Some("conj") => return Ok(Some("conjugated")),
                    _ => {}
                }
            }
        }
        Ok(None)
    }

    fn size(&self, name: &str, id: Id) -> Result<usize, Failure> {
        let problem = match self.graph.value(id) {
            Value::Int(value) => match usize::try_from(*value) {
                Ok(value) => return Ok(value),
                Err(_) => TensorProblem::Negative(*value),
            },
            Value::BigInt(_) => TensorProblem::Layout("a size does not fit 64 bits".to_owned()),
            _ => TensorProblem::Invalid("a size is not a number"),
        };
        Err(TorchProblem::Tensor { tensor: name.to_owned(), problem }.into())
    }

    /// Reads a tuple, a list or a `torch.Size`.
    fn sizes(&self, name: &str, id: Id) -> Result<Vec<usize>, Failure> {
        let items = match self.graph.value(id) {
            Value::Tuple(items) => &items[..],
            Value::List(items) => items,
            Value::Record(record) if self.global(record.callable)?.as_deref() == Some("torch.Size") => {
                match self.graph.tuple(record.arguments) {
                    Some([inner]) => match self.graph.value(*inner) {
                        Value::Tuple(items) => &items[..],
                        Value::List(items) => items,
                        _ => &[],
                    },
                    _ => &[],
                }
            }
            _ => {
                let problem = TensorProblem::Invalid("its shape is not a list");
                return Err(TorchProblem::Tensor { tensor: name.to_owned(), problem }.into());
            }
        };
        self.spend(items.len())?;
        items.iter().map(|item| self.size(name, *item)).collect()
    }
}

fn array_region(name: &str, array: Array<'_>) -> Result<TensorRegion, Failure> {
    let fail = |problem| Failure::from(TorchProblem::Tensor { tensor: name.to_owned(), problem });
    let Payload::Bytes(bytes) = array.payload else { return Err(fail(TensorProblem::TextPayload)) };
    let strides = array.column_major.then(|| Arrangement::column_major(&array.shape));
    let info = TensorInfo { name: name.to_owned(), dtype: array.dtype, shape: array.shape };
    region(info, strides, array.big_endian, bytes, 0).map_err(fail)
}

/// Describes elements of `bytes` from element `offset` on, after checking that they are inside.
fn region(
    info: TensorInfo,
    strides: Option<Vec<usize>>,
    big_endian: bool,
    bytes: Window<'_>,
    offset: u64,
) -> Result<TensorRegion, TensorProblem> {
    let arrangement = Arrangement::new(info.dtype, &info.shape, strides.clone(), big_endian);
    let span = match &arrangement {
        Some(arrangement) => arrangement.span(info.dtype, &info.shape).map_err(TensorProblem::Layout)?,
        None => crate::dtype::byte_size(info.dtype, &info.shape)
            .ok_or_else(|| TensorProblem::Layout(format!("the size of shape {:?} overflows", info.shape)))?,
    };
    let start = offset.checked_mul(info.dtype.size_bytes() as u64);
    // nothing is read of a tensor without elements, wherever it begins
    let start = if span == 0 { Some(0) } else { start };
    let found = start.and_then(|start| bytes.part(start, span));
    let found = found.ok_or_else(|| TensorProblem::OutsideStorage {
        shape: info.shape.clone(),
        strides: strides.unwrap_or_default(),
        offset,
        available: bytes.length,
    })?;
    Ok(TensorRegion {
        info,
        offset: found.start,
        length: span,
        arrangement,
        encoding: None,
        stored_name: None,
    })
}

fn classify(callable: &str) -> Call {
    match callable {
        "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2" => Call::Rebuild(Rebuild::Typed),
        "torch._utils._rebuild_tensor_v3" => Call::Rebuild(Rebuild::WithDType),
        "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state" => Call::Parameter,
        "torch._tensor._rebuild_from_type"
        | "torch._tensor._rebuild_from_type_v2"
        | "torch._utils._rebuild_from_type"
        | "torch._utils._rebuild_from_type_v2"
        | "torch.tensor._rebuild_from_type" => Call::FromType,
        "numpy.core.multiarray._reconstruct"
        | "numpy._core.multiarray._reconstruct"
        | "numpy.core.numeric._frombuffer"
        | "numpy._core.numeric._frombuffer" => Call::Array,
        _ if callable.starts_with("torch._utils._rebuild_")
            || callable.starts_with("torch._tensor._rebuild_")
            || callable.starts_with("torch.nested._internal") =>
        {
            Call::Foreign
        }
        _ => Call::Other,
    }
}

/// Bytes per element of a storage class, also of those that cannot be read as tensors.
pub(super) fn element_size(class: &str) -> Option<usize> {
    match class_name(class) {
        "ComplexDoubleStorage" => Some(16),
        "QInt8Storage" | "QUInt8Storage" | "QUInt4x2Storage" | "QUInt2x4Storage" => Some(1),
        "QInt32Storage" => Some(4),
        _ => storage_dtype(class).map(|dtype| dtype.map_or(1, DType::size_bytes)),
    }
}

/// Returns the element type of a storage class; none inside for bytes without a type.
#[expect(clippy::option_option, reason = "unknown and untyped are different")]
fn storage_dtype(class: &str) -> Option<Option<DType>> {
    Some(Some(match class_name(class) {
        "DoubleStorage" => DType::F64,
        "FloatStorage" => DType::F32,
        "HalfStorage" => DType::F16,
        "BFloat16Storage" => DType::BF16,
        "LongStorage" => DType::I64,
        "IntStorage" => DType::I32,
        "ShortStorage" => DType::I16,
        "CharStorage" => DType::I8,
        "ByteStorage" => DType::U8,
        "BoolStorage" => DType::BOOL,
        "ComplexFloatStorage" => DType::C64,
        "UntypedStorage" => return Some(None),
        _ => return None,
    }))
}

fn class_name(class: &str) -> &str {
    class.strip_prefix("torch.").and_then(|rest| rest.rsplit('.').next()).unwrap_or_default()
}

fn dtype_of_torch(global: &str) -> Option<DType> {
    Some(match global.strip_prefix("torch.")? {
        "float64" | "double" => DType::F64,
        "float32" | "float" => DType::F32,
        "float16" | "half" => DType::F16,
        "bfloat16" => DType::BF16,
        "float8_e4m3fn" => DType::F8_E4M3,
        "float8_e5m2" => DType::F8_E5M2,
        "float8_e4m3fnuz" => DType::F8_E4M3FNUZ,
        "float8_e5m2fnuz" => DType::F8_E5M2FNUZ,
        "float8_e8m0fnu" => DType::F8_E8M0,
        "int64" | "long" => DType::I64,
        "int32" | "int" => DType::I32,
        "int16" | "short" => DType::I16,
        "int8" => DType::I8,
        "uint64" => DType::U64,
        "uint32" => DType::U32,
        "uint16" => DType::U16,
        "uint8" => DType::U8,
        "bool" => DType::BOOL,
        "complex64" => DType::C64,
        _ => return None,
    })
}

/// Returns the type that NumPy calls `code`, which is a kind and a size in bytes such as `f4`.
pub(in crate::formats) fn dtype_of_numpy(code: &str) -> Option<DType> {
    Some(match code {
        "b1" | "?" => DType::BOOL,
        "u1" => DType::U8,
        "u2" => DType::U16,
        "u4" => DType::U32,
        "u8" => DType::U64,
        "i1" => DType::I8,
        "i2" => DType::I16,
        "i4" => DType::I32,
        "i8" => DType::I64,
        "f2" => DType::F16,
        "f4" => DType::F32,
        "f8" => DType::F64,
        "c8" => DType::C64,
        _ => return None,
    })
}
