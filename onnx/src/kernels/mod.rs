//! Ops of our own in graphs of gradients, computed here and called by ONNX Runtime.
//!
//! A gradient written in ONNX's ops passes over memory once per op: twenty times for a GELU, ten for a layer normalization. Each op here passes
//! once. Products are here because ONNX Runtime's are slow where no factor is constant, and because the order in which they add depends on the
//! number of threads.
//!
//! An op works on the session's threads, in parts; what it gives is the same to the bit whatever their number: parts are cut by shape alone, or
//! where a cut changes no sum. They are computed on the CPU, and read memory of no other device: sessions with them are sessions of the CPU.
//!
//! A new op is a file with an [`Op`], and a line in [`OPS`].

#![expect(
    clippy::inline_always,
    reason = "a loop is compiled for an instruction set only if all of it is inlined there"
)]

mod gelu;
mod layer_norm;
mod math;
mod product;
mod softmax;
mod sum;
mod view;

use std::sync::{Mutex, PoisonError};

use ort::Result;
use ort::operator::{
    BoxedKernel, ComputeContext, Kernel, KernelContext, Operator, OperatorDomain, OperatorInput,
    OperatorOutput,
};
use ort::value::{Shape, TensorElementType, ValueRef};

pub(crate) use self::view::View;

/// The domain of these ops in graphs.
pub(crate) const DOMAIN: &str = "merganser.kernels";

static OPS: &[&Op] = &[
    &gelu::GELU,
    &gelu::GELU_GRAD,
    &gelu::QUICK_GELU,
    &gelu::QUICK_GELU_GRAD,
    &layer_norm::GRAD,
    &product::PRODUCT,
    &softmax::GRAD,
    &sum::COLUMNS,
];

/// How many elements a part has about: enough to be worth a thread's while, few enough to stay in its cache.
const PART: usize = 1 << 14;

/// An op on tensors of `f32`.
struct Op {
    name: &'static str,
    inputs: usize,
    /// Those at the end that a node need not have.
    optional_inputs: usize,
    /// Those after the first need not be asked for.
    outputs: usize,
    /// Reads the attributes of a node. The number is that of the session's threads.
    kernel: fn(&KernelContext<'_>, usize) -> BoxedKernel<'static>,
}

struct Registered {
    op: &'static Op,
    threads: usize,
}

impl Operator for Registered {
    type Kernel<'attr> = BoxedKernel<'attr>;

    fn name(&self) -> &str {
        self.op.name
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        let required = (0..self.op.inputs).map(|_| OperatorInput::required(TensorElementType::Float32));
        let optional =
            (0..self.op.optional_inputs).map(|_| OperatorInput::optional(TensorElementType::Float32));
        required.chain(optional)
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        (0..self.op.outputs).map(|i| match i {
            0 => OperatorOutput::required(TensorElementType::Float32),
            _ => OperatorOutput::optional(TensorElementType::Float32),
        })
    }

    fn create_kernel<'attr>(&self, context: &KernelContext<'attr>) -> Result<Self::Kernel<'attr>> {
        Ok((self.op.kernel)(context, self.threads))
    }
}

/// Returns the ops, for one session of so many threads.
pub(crate) fn domain(threads: usize) -> Result<OperatorDomain> {
    OPS.iter().try_fold(OperatorDomain::new(DOMAIN)?, |domain, op| domain.add(Registered { op, threads }))
}

/// The inputs of a node.
struct Inputs<'c> {
    values: Vec<Option<ValueRef<'c>>>,
}

impl<'c> Inputs<'c> {
    fn new(context: &'c ComputeContext) -> Result<Self> {
        Ok(Self { values: (0..context.num_inputs()?).map(|i| context.input(i)).collect::<Result<_>>()? })
    }

    fn get(&self, i: usize) -> Result<(&Shape, &[f32])> {
        let value = self.values.get(i).and_then(Option::as_ref);
        value.ok_or_else(|| ort::Error::new(format!("input {i} is missing")))?.try_extract_tensor::<f32>()
    }

    fn optional(&self, i: usize) -> Result<Option<&[f32]>> {
        let value = self.values.get(i).and_then(Option::as_ref);
        value.map(|value| Ok(value.try_extract_tensor::<f32>()?.1)).transpose()
    }
}

/// Checks what the graph guarantees, so that no slice is cut outside its bounds.
fn expect(holds: bool, what: &str) -> Result<()> {
    if holds { Ok(()) } else { Err(ort::Error::new(what)) }
}

/// Does the work on all items, on the session's threads.
fn each<T: Send>(context: &ComputeContext, items: Vec<T>, work: impl Fn(T) + Sync + Send) -> Result<()> {
    if items.len() == 1 {
        items.into_iter().for_each(work);
        return Ok(());
    }
    let items: Vec<Mutex<Option<T>>> = items.into_iter().map(|item| Mutex::new(Some(item))).collect();
    context.par_for(items.len(), 0, |i| {
        if let Some(item) = items[i].lock().unwrap_or_else(PoisonError::into_inner).take() {
            work(item);
        }
    })
}

/// Applies `work` to inputs that all have the shape of the output, part by part.
fn elementwise<const N: usize>(
    context: &ComputeContext,
    work: impl Fn([&[f32]; N], &mut [f32]) + Sync + Send,
) -> Result<()> {
    let inputs = Inputs::new(context)?;
    let (shape, first) = inputs.get(0)?;
    let mut slices = [first; N];
    for (i, slice) in slices.iter_mut().enumerate() {
        *slice = inputs.get(i)?.1;
        expect(slice.len() == first.len(), "the inputs have different shapes")?;
    }
    let Some(mut output) = context.output(0, shape.clone())? else { return Ok(()) };
    let (_, output) = output.try_extract_tensor_mut::<f32>()?;
    let parts = output.chunks_mut(PART).enumerate().collect();
    each(context, parts, |(i, output)| {
        let from = i * PART;
        work(slices.map(|slice| &slice[from..from + output.len()]), output);
    })
}

fn boxed(compute: impl FnMut(&ComputeContext) -> Result<()> + Send + 'static) -> BoxedKernel<'static> {
    Box::new(compute) as Box<dyn Kernel>
}
