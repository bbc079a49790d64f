//! Python pickles, read as data.
//!
//! A pickle is a program for a stack machine that may import and call anything. This reader has no import and no call: the opcodes
//! that ask for one (`Value::Record`) leave a note of what was asked for, and the interpreter of a format decides
//! which of these notes it understands. Everything else stays an opaque record. All opcodes of the protocols 0 to 5 are known.
//!
//! Strings and byte strings are not copied but remembered as places in the file, so that tensors inside a pickle can be
//! read where they are. Memory is bounded by [`MAX_VALUES`], whatever the pickle says, and there is no recursion.
//!
//! * `opcodes`: their names
//! * `cursor`: reading the file forwards
//! * `value`: what a pickle is made of
//! * `machine`: the stack machine

mod cursor;
mod machine;
mod opcodes;
mod value;

pub(super) use machine::load;
pub(super) use value::{Graph, Id, Record, Value};

/// Values that a pickle may have, and entries of its stack, marks and memo. A training checkpoint of a large model has less
/// than 100 000.
pub const MAX_VALUES: usize = 1 << 20;

/// Longest text that is read as a name.
pub const MAX_NAME_BYTES: u64 = 4096;

/// What is wrong with a pickle.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PickleProblem {
    #[error("the pickle is truncated: it ends at byte {0}")]
    Truncated(u64),
    #[error("the pickle has the unknown opcode 0x{opcode:02x} at byte {at}")]
    UnknownOpcode { opcode: u8, at: u64 },
    #[error("the pickle has protocol {0}, the latest that is known is 5")]
    UnknownProtocol(u8),
    #[error("the pickle is not valid: the instruction at byte {at} {what}")]
    Invalid { at: u64, what: &'static str },
    #[error("the pickle has more than {MAX_VALUES} values")]
    TooLarge,
    #[error("the pickle uses a name of {0} bytes, the limit is {MAX_NAME_BYTES}")]
    NameTooLong(u64),
    #[error("the pickle uses a name that is not plain text")]
    NotText,
}
