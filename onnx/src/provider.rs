//! What computes: the processor, or an accelerator that the installed ONNX Runtime supports.
//!
//! INVARIANT: a provider that was asked for and cannot be had is an error. ONNX Runtime would go on with the processor and say so in a log
//! that nobody reads.

use std::fmt;
use std::str::FromStr;

use ort::ep::{self, ExecutionProviderDispatch};

/// An execution provider of ONNX Runtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Provider {
    #[default]
    Cpu,
    Cuda,
    TensorRt,
    CoreMl,
    OpenVino,
}

impl Provider {
    pub const ALL: [Self; 5] = [Self::Cpu, Self::Cuda, Self::TensorRt, Self::CoreMl, Self::OpenVino];

    /// What users write.
    pub fn id(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
            Self::TensorRt => "tensorrt",
            Self::CoreMl => "coreml",
            Self::OpenVino => "openvino",
        }
    }

    /// How it computes, as far as results depend on it.
    pub fn arithmetic(self) -> &'static str {
        match self {
            Self::Cuda => "cuda in single precision",
            other => other.id(),
        }
    }

    /// The providers to register, in order; what one does not support goes to the next. The processor is always last.
    pub(crate) fn dispatch(self, device: Option<u16>) -> Vec<ExecutionProviderDispatch> {
        let device = device.map(i32::from);
        let cuda = || {
            // Without this, factors of products are rounded to 10 bits (TF32), and logits differ in the fourth digit.
            let cuda = ep::CUDA::default().with_tf32(false);
            device.map_or(cuda.clone(), |device| cuda.with_device_id(device)).build()
        };
        let chosen = match self {
            Self::Cpu => Vec::new(),
            Self::Cuda => vec![cuda()],
            Self::TensorRt => {
                let tensorrt = ep::TensorRT::default();
                let tensorrt = device.map_or(tensorrt.clone(), |device| tensorrt.with_device_id(device));
                vec![tensorrt.build(), cuda()]
            }
            Self::CoreMl => vec![ep::CoreML::default().build()],
            Self::OpenVino => vec![ep::OpenVINO::default().build()],
        };
        chosen.into_iter().map(ExecutionProviderDispatch::error_on_failure).collect()
    }
}

impl fmt::Display for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.id())
    }
}

impl FromStr for Provider {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = || Self::ALL.map(Self::id).join(", ");
        Self::ALL
            .into_iter()
            .find(|provider| provider.id() == text)
            .ok_or_else(|| format!("unknown execution provider `{text}`; there are {}", known()))
    }
}
