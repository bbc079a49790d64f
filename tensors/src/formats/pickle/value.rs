//! What a pickle is made of: values that refer to each other by number. They may refer to themselves: whoever follows references
//! bounds how far.

use crate::formats::pickle::cursor::Span;
use crate::formats::pickle::{MAX_NAME_BYTES, PickleProblem};
use crate::formats::window::{Failure, Window};
use crate::read_at::ReadAt;

/// Position of a value in its [`Graph`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(in crate::formats) struct Id(pub(super) u32);

/// A pickle as data.
pub(in crate::formats) struct Graph<'a> {
    pub(super) window: Window<'a>,
    pub(super) values: Vec<Value>,
    /// What the pickle is.
    pub(in crate::formats) root: Id,
    /// Where in its window it ends.
    pub(in crate::formats) end: u64,
}

#[derive(Debug)]
pub(in crate::formats) enum Value {
    None,
    Bool(bool),
    Int(i64),
    /// Its value matters to nobody.
    Float,
    /// A number of more than 64 bits, as digits or as little-endian bytes.
    BigInt(Span),
    Text(Span),
    /// Text in a notation with backslashes.
    EscapedText(Span),
    Bytes(Span),
    /// A string of Python 2, which is text or bytes.
    TextOrBytes(Span),
    List(Vec<Id>),
    Tuple(Box<[Id]>),
    Set(Vec<Id>),
    /// Keys and values in the order of insertion.
    Dict(Vec<(Id, Id)>),
    /// A class or function: the texts of its module and its name.
    Global {
        module: Id,
        name: Id,
    },
    /// An object or the result of a call, neither of which was made.
    Record(Record),
    /// A reference to something outside the pickle.
    Persistent(Id),
    /// A class or function by its number in a registry of the program that wrote the pickle, or a buffer outside the pickle.
    External,
}

/// What a pickle asked for.
#[derive(Debug)]
pub(in crate::formats) struct Record {
    /// What would have been called.
    pub(in crate::formats) callable: Id,
    /// A tuple, if the pickle is well-formed.
    pub(in crate::formats) arguments: Id,
    /// What the object's state would have been set to.
    pub(in crate::formats) state: Option<Id>,
    /// What would have been appended or set in it.
    pub(in crate::formats) contents: Option<Box<Contents>>,
}

#[derive(Debug, Default)]
pub(in crate::formats) struct Contents {
    pub(in crate::formats) appended: Vec<Id>,
    pub(in crate::formats) items: Vec<(Id, Id)>,
}

impl<'a> Graph<'a> {
    pub(in crate::formats) fn file(&self) -> &'a dyn ReadAt {
        self.window.file
    }

    pub(in crate::formats) fn value(&self, id: Id) -> &Value {
        &self.values[id.0 as usize]
    }

    pub(in crate::formats) fn values(&self) -> impl Iterator<Item = &Value> {
        self.values.iter()
    }

    /// Returns a short text, if the value is one.
    pub(in crate::formats) fn text(&self, id: Id) -> Result<Option<String>, Failure> {
        let (span, escaped) = match self.value(id) {
            Value::Text(span) | Value::TextOrBytes(span) => (*span, false),
            Value::EscapedText(span) => (*span, true),
            _ => return Ok(None),
        };
        if span.length > MAX_NAME_BYTES {
            return Err(PickleProblem::NameTooLong(span.length).into());
        }
        let text = String::from_utf8(self.bytes_at(span)?.bytes()?).map_err(|_| PickleProblem::NotText)?;
        if escaped && text.contains('\\') {
            return Err(PickleProblem::NotText.into());
        }
        Ok(Some(text))
    }

    /// Returns where the bytes of a byte string lie, if the value is one.
    pub(in crate::formats) fn bytes(&self, id: Id) -> Option<Window<'a>> {
        match self.value(id) {
            Value::Bytes(span) | Value::TextOrBytes(span) => self.bytes_at(*span).ok(),
            _ => None,
        }
    }

    /// Returns where the UTF-8 of a text lies, however long it is.
    pub(in crate::formats) fn long_text(&self, id: Id) -> Option<Window<'a>> {
        match self.value(id) {
            Value::Text(span) => self.bytes_at(*span).ok(),
            _ => None,
        }
    }

    /// Returns the digits or bytes of a number of more than 64 bits.
    pub(in crate::formats) fn big_integer(&self, id: Id) -> Result<Option<Vec<u8>>, Failure> {
        match self.value(id) {
            Value::BigInt(span) if span.length <= MAX_NAME_BYTES => Ok(Some(self.bytes_at(*span)?.bytes()?)),
            _ => Ok(None),
        }
    }

    /// Returns `module.name` of a class or function.
    pub(in crate::formats) fn global(&self, id: Id) -> Result<Option<String>, Failure> {
        let Value::Global { module, name } = self.value(id) else { return Ok(None) };
        match (self.text(*module)?, self.text(*name)?) {
            (Some(module), Some(name)) => Ok(Some(format!("{module}.{name}"))),
            _ => Ok(None),
        }
    }

    pub(in crate::formats) fn tuple(&self, id: Id) -> Option<&[Id]> {
        match self.value(id) {
            Value::Tuple(items) => Some(items),
            _ => None,
        }
    }

    fn bytes_at(&self, span: Span) -> Result<Window<'a>, PickleProblem> {
        self.window.part(span.offset, span.length).ok_or(PickleProblem::Truncated(self.window.length))
    }
}
