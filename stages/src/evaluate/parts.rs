//! Parts of an evaluation that outlive a kill: ranges of images, each with a key of its own.

use crate::{Job, Notice};
use merganser_cache::{Preimage, Value};
use std::ops::Range;

/// Cuts `n` images into parts of about `most` at multiples of the batch, so that a part is inferred in the batches of the whole.
pub(super) fn cut(n: usize, batch: usize, most: usize) -> Vec<Range<usize>> {
    let length = (most / batch).max(1) * batch;
    if n <= length {
        return std::iter::once(0..n).collect();
    }
    (0..n).step_by(length).map(|start| start..(start + length).min(n)).collect()
}

/// What a part is a function of, where the whole is one of `whole`.
pub(super) fn preimage(whole: &Preimage, images: &Range<usize>) -> Preimage {
    let operation = match &whole.operation {
        Value::Map(fields) => {
            let mut fields = fields.clone();
            let range = format!("images {}..{}", images.start, images.end);
            fields.insert("part".to_owned(), Value::Text(range));
            Value::Map(fields)
        }
        other => {
            Value::List(vec![other.clone(), Value::Int(images.start as i64), Value::Int(images.end as i64)])
        }
    };
    Preimage { operation, inputs: whole.inputs.clone() }
}

/// Tells that so many images need not be inferred again.
pub(super) fn tell_of_earlier_work(job: &Job<'_>, task: &str, done: usize, n: usize) {
    if done > 0 {
        (job.notify)(Notice::Info(format!("`{task}`: going on after {done} of {n} images")));
    }
}
