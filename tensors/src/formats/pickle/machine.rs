//! The stack machine. What it builds and what it refuses follows Python's own, except that nothing is imported or called.

use std::collections::HashMap;

use crate::formats::pickle::cursor::{Cursor, Span};
use crate::formats::pickle::opcodes as op;
use crate::formats::pickle::value::{Contents, Graph, Id, Record, Value};
use crate::formats::pickle::{MAX_VALUES, PickleProblem};
use crate::formats::window::{Failure, Window};

/// The latest protocol.
const LATEST_PROTOCOL: u8 = 5;

/// Reads the pickle that begins at `start`.
pub(in crate::formats) fn load(window: Window<'_>, start: u64) -> Result<Graph<'_>, Failure> {
    let mut machine = Machine {
        window,
        cursor: Cursor::new(window, start),
        opcode_at: start,
        values: Vec::new(),
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
    };
    for value in [Value::None, Value::Bool(false), Value::Bool(true), Value::Tuple(Box::new([]))] {
        machine.values.push(value);
    }
    loop {
        machine.opcode_at = machine.cursor.position();
        let opcode = machine.cursor.byte()?;
        if opcode == op::STOP {
            let root = machine.pop()?;
            let Machine { window, cursor, values, .. } = machine;
            return Ok(Graph { window, values, root, end: cursor.position() });
        }
        machine.step(opcode)?;
    }
}

// Values that need to be there only once.
const NONE: Id = Id(0);
const FALSE: Id = Id(1);
const TRUE: Id = Id(2);
const EMPTY_TUPLE: Id = Id(3);

struct Machine<'a> {
    window: Window<'a>,
    cursor: Cursor<'a>,
    /// Where the current instruction begins.
    opcode_at: u64,
    values: Vec<Value>,
    stack: Vec<Id>,
    /// Heights of the stack at which a mark lies.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

impl Machine<'_> {
    fn step(&mut self, opcode: u8) -> Result<(), Failure> {
        match opcode {
            op::PROTO => {
                let protocol = self.cursor.byte()?;
                if protocol > LATEST_PROTOCOL {
                    return Err(PickleProblem::UnknownProtocol(protocol).into());
                }
                Ok(())
            }
            op::FRAME => self.cursor.array::<8>().map(|_| ()),

            op::MARK => self.mark(),
            op::POP => match self.marks.last() {
                Some(mark) if *mark == self.stack.len() => {
                    self.marks.pop();
                    Ok(())
                }
                _ => self.pop().map(|_| ()),
            },
            op::POP_MARK => self.pop_mark().map(|_| ()),
            op::DUP => {
                let top = self.top()?;
                self.push_id(top)
            }

            op::NONE => self.push_id(NONE),
            op::NEWTRUE => self.push_id(TRUE),
            op::NEWFALSE => self.push_id(FALSE),
            op::INT => self.decimal_int(),
            op::LONG => self.decimal_long(),
            op::BININT => {
                let bytes = self.cursor.array()?;
                self.push(Value::Int(i32::from_le_bytes(bytes).into()))
            }
            op::BININT1 => {
                let byte = self.cursor.byte()?;
                self.push(Value::Int(byte.into()))
            }
            op::BININT2 => {
                let bytes = self.cursor.array()?;
                self.push(Value::Int(u16::from_le_bytes(bytes).into()))
            }
            op::LONG1 => {
                let length = self.length1()?;
                self.binary_long(length)
            }
            op::LONG4 => {
                let length = self.length4()?;
                self.binary_long(length)
            }
            op::FLOAT => self.decimal_float(),
            op::BINFLOAT => {
                self.cursor.array::<8>()?;
                self.push(Value::Float)
            }

            op::STRING => self.quoted_string(),
            op::UNICODE => {
                let span = self.cursor.line()?;
                self.push(Value::EscapedText(span))
            }
            op::SHORT_BINSTRING => self.string(Self::length1, Value::TextOrBytes),
            op::BINSTRING => self.string(Self::length4, Value::TextOrBytes),
            op::SHORT_BINUNICODE => self.string(Self::length1, Value::Text),
            op::BINUNICODE => self.string(Self::length4, Value::Text),
            op::BINUNICODE8 => self.string(Self::length8, Value::Text),
            op::SHORT_BINBYTES => self.string(Self::length1, Value::Bytes),
            op::BINBYTES => self.string(Self::length4, Value::Bytes),
            op::BINBYTES8 | op::BYTEARRAY8 => self.string(Self::length8, Value::Bytes),
            op::NEXT_BUFFER => self.push(Value::External),
            op::READONLY_BUFFER => self.top().map(|_| ()),

            op::EMPTY_LIST => self.push(Value::List(Vec::new())),
            op::EMPTY_DICT => self.push(Value::Dict(Vec::new())),
            op::EMPTY_SET => self.push(Value::Set(Vec::new())),
            op::EMPTY_TUPLE => self.push_id(EMPTY_TUPLE),
            op::TUPLE1 => self.tuple(1),
            op::TUPLE2 => self.tuple(2),
            op::TUPLE3 => self.tuple(3),
            op::TUPLE => {
                let items = self.pop_mark()?;
                self.push(Value::Tuple(items.into()))
            }
            op::LIST => {
                let items = self.pop_mark()?;
                self.push(Value::List(items))
            }
            op::FROZENSET => {
                let items = self.pop_mark()?;
                self.push(Value::Set(items))
            }
            op::DICT => {
                let items = self.pop_mark()?;
                let pairs = self.pairs(&items)?;
                self.push(Value::Dict(pairs))
            }
            op::APPEND => {
                let item = self.pop()?;
                self.append(&[item])
            }
            op::APPENDS | op::ADDITEMS => {
                let items = self.pop_mark()?;
                self.append(&items)
            }
            op::SETITEM => {
                let value = self.pop()?;
                let key = self.pop()?;
                self.set_items(&[(key, value)])
            }
            op::SETITEMS => {
                let items = self.pop_mark()?;
                let pairs = self.pairs(&items)?;
                self.set_items(&pairs)
            }

            op::PUT => {
                let index = self.decimal_index()?;
                self.put(index)
            }
            op::BINPUT => {
                let index = self.cursor.byte()?;
                self.put(index.into())
            }
            op::LONG_BINPUT => {
                let index = u32::from_le_bytes(self.cursor.array()?);
                self.put(index)
            }
            op::MEMOIZE => self.put(self.memo.len() as u32),
            op::GET => {
                let index = self.decimal_index()?;
                self.get(index)
            }
            op::BINGET => {
                let index = self.cursor.byte()?;
                self.get(index.into())
            }
            op::LONG_BINGET => {
                let index = u32::from_le_bytes(self.cursor.array()?);
                self.get(index)
            }

            op::GLOBAL => {
                let global = self.global_lines()?;
                self.push_id(global)
            }
            op::STACK_GLOBAL => {
                let name = self.pop()?;
                let module = self.pop()?;
                self.push(Value::Global { module, name })
            }
            op::EXT1 => self.external::<1>(),
            op::EXT2 => self.external::<2>(),
            op::EXT4 => self.external::<4>(),
            op::REDUCE | op::NEWOBJ => {
                let arguments = self.pop()?;
                let callable = self.pop()?;
                self.record(callable, arguments)
            }
            op::NEWOBJ_EX => {
                let _keywords = self.pop()?;
                let arguments = self.pop()?;
                let callable = self.pop()?;
                self.record(callable, arguments)
            }
            op::INST => {
                let callable = self.global_lines()?;
                let items = self.pop_mark()?;
                let arguments = self.add(Value::Tuple(items.into()))?;
                self.record(callable, arguments)
            }
            op::OBJ => {
                let mut items = self.pop_mark()?;
                if items.is_empty() {
                    return Err(self.invalid("makes an object of no class"));
                }
                let callable = items.remove(0);
                let arguments = self.add(Value::Tuple(items.into()))?;
                self.record(callable, arguments)
            }
            op::BUILD => {
                let state = self.pop()?;
                let object = self.top()?;
                if let Value::Record(record) = &mut self.values[object.0 as usize] {
                    record.state = Some(state);
                }
                Ok(())
            }
            op::PERSID => {
                let span = self.cursor.line()?;
                let id = self.add(Value::EscapedText(span))?;
                self.push(Value::Persistent(id))
            }
            op::BINPERSID => {
                let id = self.pop()?;
                self.push(Value::Persistent(id))
            }
            _ => Err(PickleProblem::UnknownOpcode { opcode, at: self.opcode_at }.into()),
        }
    }

    fn invalid(&self, what: &'static str) -> Failure {
        PickleProblem::Invalid { at: self.opcode_at, what }.into()
    }

    fn add(&mut self, value: Value) -> Result<Id, Failure> {
        if self.values.len() >= MAX_VALUES {
            return Err(PickleProblem::TooLarge.into());
        }
        self.values.push(value);
        Ok(Id((self.values.len() - 1) as u32))
    }

    fn push(&mut self, value: Value) -> Result<(), Failure> {
        let id = self.add(value)?;
        self.push_id(id)
    }

    fn push_id(&mut self, id: Id) -> Result<(), Failure> {
        if self.stack.len() >= MAX_VALUES {
            return Err(PickleProblem::TooLarge.into());
        }
        self.stack.push(id);
        Ok(())
    }

    /// The stack above the last mark is what instructions see.
    fn floor(&self) -> usize {
        self.marks.last().copied().unwrap_or(0)
    }

    fn top(&self) -> Result<Id, Failure> {
        let visible = &self.stack[self.floor()..];
        visible.last().copied().ok_or_else(|| self.invalid("needs more values than there are"))
    }

    fn pop(&mut self) -> Result<Id, Failure> {
        let top = self.top()?;
        self.stack.pop();
        Ok(top)
    }

    fn mark(&mut self) -> Result<(), Failure> {
        if self.marks.len() >= MAX_VALUES {
            return Err(PickleProblem::TooLarge.into());
        }
        self.marks.push(self.stack.len());
        Ok(())
    }

    fn pop_mark(&mut self) -> Result<Vec<Id>, Failure> {
        let mark = self.marks.pop().ok_or_else(|| self.invalid("needs a mark"))?;
        Ok(self.stack.drain(mark..).collect())
    }

    fn tuple(&mut self, n: usize) -> Result<(), Failure> {
        let mut items = vec![NONE; n];
        for item in items.iter_mut().rev() {
            *item = self.pop()?;
        }
        self.push(Value::Tuple(items.into()))
    }

    fn pairs(&self, items: &[Id]) -> Result<Vec<(Id, Id)>, Failure> {
        let (pairs, rest) = items.as_chunks::<2>();
        if !rest.is_empty() {
            return Err(self.invalid("sets a key without a value"));
        }
        Ok(pairs.iter().map(|[key, value]| (*key, *value)).collect())
    }

    fn append(&mut self, items: &[Id]) -> Result<(), Failure> {
        let target = self.top()?;
        match &mut self.values[target.0 as usize] {
            Value::List(list) | Value::Set(list) => list.extend(items),
            Value::Record(record) => contents(record).appended.extend(items),
            _ => return Err(self.invalid("appends to something that is not a list")),
        }
        Ok(())
    }

    fn set_items(&mut self, items: &[(Id, Id)]) -> Result<(), Failure> {
        let target = self.top()?;
        match &mut self.values[target.0 as usize] {
            Value::Dict(dict) => dict.extend(items),
            Value::Record(record) => contents(record).items.extend(items),
            _ => return Err(self.invalid("sets items of something that is not a dictionary")),
        }
        Ok(())
    }

    fn put(&mut self, index: u32) -> Result<(), Failure> {
        let top = self.top()?;
        if self.memo.len() >= MAX_VALUES {
            return Err(PickleProblem::TooLarge.into());
        }
        self.memo.insert(index, top);
        Ok(())
    }

    fn get(&mut self, index: u32) -> Result<(), Failure> {
        let id = self.memo.get(&index).copied().ok_or_else(|| self.invalid("recalls what was not kept"))?;
        self.push_id(id)
    }

    fn record(&mut self, callable: Id, arguments: Id) -> Result<(), Failure> {
        self.push(Value::Record(Record { callable, arguments, state: None, contents: None }))
    }

    fn external<const N: usize>(&mut self) -> Result<(), Failure> {
        self.cursor.array::<N>()?;
        self.push(Value::External)
    }

    fn global_lines(&mut self) -> Result<Id, Failure> {
        let module = self.cursor.line()?;
        let name = self.cursor.line()?;
        let module = self.add(Value::EscapedText(module))?;
        let name = self.add(Value::EscapedText(name))?;
        self.add(Value::Global { module, name })
    }

    fn length1(&mut self) -> Result<u64, Failure> {
        Ok(self.cursor.byte()?.into())
    }

    fn length4(&mut self) -> Result<u64, Failure> {
        Ok(u32::from_le_bytes(self.cursor.array()?).into())
    }

    fn length8(&mut self) -> Result<u64, Failure> {
        Ok(u64::from_le_bytes(self.cursor.array()?))
    }

    fn string(
        &mut self,
        length: fn(&mut Self) -> Result<u64, Failure>,
        value: fn(Span) -> Value,
    ) -> Result<(), Failure> {
        let length = length(self)?;
        let span = self.cursor.skip(length)?;
        self.push(value(span))
    }

    fn quoted_string(&mut self) -> Result<(), Failure> {
        let line = self.cursor.line()?;
        if line.length < 2 {
            return Err(self.invalid("has a string without quotes"));
        }
        // whether the quotes match matters to nobody
        self.push(Value::EscapedText(Span { offset: line.offset + 1, length: line.length - 2 }))
    }

    /// The text of a number.
    fn digits(&mut self) -> Result<(Span, String), Failure> {
        let line = self.cursor.line()?;
        let shown = self.window.part(line.offset, line.length.min(64));
        let bytes = shown.ok_or_else(|| self.cursor.truncated())?.bytes()?;
        Ok((line, String::from_utf8_lossy(&bytes).trim().to_owned()))
    }

    fn decimal_int(&mut self) -> Result<(), Failure> {
        match self.digits()? {
            (_, digits) if digits == "00" => self.push_id(FALSE),
            (_, digits) if digits == "01" => self.push_id(TRUE),
            (span, digits) => self.whole_number(span, &digits),
        }
    }

    fn decimal_long(&mut self) -> Result<(), Failure> {
        let (mut span, digits) = self.digits()?;
        let digits = digits.strip_suffix('L').inspect(|_| span.length -= 1).unwrap_or(&digits);
        self.whole_number(span, digits)
    }

    fn whole_number(&mut self, span: Span, digits: &str) -> Result<(), Failure> {
        if let Ok(value) = digits.parse() {
            return self.push(Value::Int(value));
        }
        let unsigned = digits.strip_prefix('-').unwrap_or(digits);
        if unsigned.is_empty() || !unsigned.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(self.invalid("has a number that is none"));
        }
        self.push(Value::BigInt(span))
    }

    fn decimal_float(&mut self) -> Result<(), Failure> {
        let (_, digits) = self.digits()?;
        digits.parse::<f64>().map_err(|_| self.invalid("has a number that is none"))?;
        self.push(Value::Float)
    }

    fn decimal_index(&mut self) -> Result<u32, Failure> {
        let (_, digits) = self.digits()?;
        digits.parse().map_err(|_| self.invalid("has a number that is none"))
    }

    fn binary_long(&mut self, length: u64) -> Result<(), Failure> {
        if length > 8 {
            let span = self.cursor.skip(length)?;
            return self.push(Value::BigInt(span));
        }
        // sign-extended two's complement
        let mut bytes = [0; 8];
        for byte in &mut bytes[..length as usize] {
            *byte = self.cursor.byte()?;
        }
        let unused = 64 - 8 * length as u32;
        let value = if length == 0 { 0 } else { i64::from_le_bytes(bytes) << unused >> unused };
        self.push(Value::Int(value))
    }
}

fn contents(record: &mut Record) -> &mut Contents {
    record.contents.get_or_insert_default()
}

#[cfg(test)]
mod tests;
