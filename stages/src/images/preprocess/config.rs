//! What preprocessing does, in resolved form: no defaults left open, so that it can be part of a key.

use serde::Serialize;

use super::taps::Filter;

/// What preprocessing does. A step that is `None` is left out.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Preprocess {
    /// Turns grey into RGB; otherwise images keep their channels.
    pub convert_rgb: bool,
    pub resize: Option<Resize>,
    /// Filter of the resize.
    pub resample: Filter,
    /// Centre crop; what lies outside the image is black (0 before rescaling).
    pub crop: Option<Size>,
    /// Where a crop goes that cannot be in the middle.
    pub crop_rounding: CropRounding,
    /// Factor from bytes to floats, usually 1/255.
    pub rescale: Option<f64>,
    pub normalize: Option<Normalize>,
}

/// Where a centre crop goes if an odd number of pixels is left over, and likewise the padding if they are missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CropRounding {
    /// Up and left, as transformers does; padding down and right.
    Down,
    /// To the even number, as torchvision's `CenterCrop` does (and with it timm, open_clip and OpenAI's CLIP); padding up and left.
    HalfEven,
}

/// Mean and standard deviation of ImageNet's training images.
pub(super) const IMAGENET_MEAN: [f64; 3] = [0.485, 0.456, 0.406];
pub(super) const IMAGENET_STD: [f64; 3] = [0.229, 0.224, 0.225];

/// Those of CLIP's training images.
pub(super) const CLIP_MEAN: [f64; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
pub(super) const CLIP_STD: [f64; 3] = [0.268_629_54, 0.261_302_58, 0.275_777_11];

/// Height and width in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Size {
    pub height: usize,
    pub width: usize,
}

/// The size to resize to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Resize {
    /// Exactly this size, whatever the aspect ratio.
    Exact(Size),
    /// The shorter side gets this length, the longer one follows the aspect ratio (rounded down).
    ShortestEdge(usize),
}

/// `(value - mean) / std` per channel.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Normalize {
    /// One value for all channels, or one per channel.
    pub mean: Vec<f64>,
    /// As `mean`; never zero.
    pub std: Vec<f64>,
}

impl Preprocess {
    /// Returns what transformers does for OpenAI's CLIP models at `size` × `size` pixels.
    pub fn clip(size: usize) -> Self {
        Self {
            convert_rgb: true,
            resize: Some(Resize::ShortestEdge(size)),
            resample: Filter::Bicubic,
            crop: Some(Size::square(size)),
            crop_rounding: CropRounding::Down,
            rescale: Some(1.0 / 255.0),
            normalize: Some(Normalize { mean: CLIP_MEAN.to_vec(), std: CLIP_STD.to_vec() }),
        }
    }

    /// Returns the size of every output, if it does not depend on the image.
    pub fn output_size(&self) -> Option<Size> {
        self.crop.or(match self.resize {
            Some(Resize::Exact(size)) => Some(size),
            _ => None,
        })
    }
}

impl Size {
    pub const fn square(side: usize) -> Self {
        Self { height: side, width: side }
    }
}

impl Resize {
    /// Returns the size that an image of `source` size gets.
    pub fn target(self, source: Size) -> Size {
        match self {
            Self::Exact(size) => size,
            Self::ShortestEdge(edge) => {
                let (short, long) = (source.height.min(source.width), source.height.max(source.width));
                let long = (edge as u128 * long as u128 / short as u128) as usize;
                if source.width <= source.height {
                    Size { height: long, width: edge }
                } else {
                    Size { height: edge, width: long }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shortest_edge_keeps_the_aspect_ratio_and_rounds_down() {
        let target = |height, width| Resize::ShortestEdge(224).target(Size { height, width });
        assert_eq!(target(375, 500), Size { height: 224, width: 298 });
        assert_eq!(target(500, 375), Size { height: 298, width: 224 });
        assert_eq!(target(28, 28), Size::square(224));
        assert_eq!(target(1, 3), Size { height: 224, width: 672 });
    }

    #[test]
    fn the_output_size_is_known_with_a_crop_or_an_exact_resize() {
        assert_eq!(Preprocess::clip(32).output_size(), Some(Size::square(32)));
        let exact =
            Preprocess { crop: None, resize: Some(Resize::Exact(Size::square(8))), ..Preprocess::clip(32) };
        assert_eq!(exact.output_size(), Some(Size::square(8)));
        assert_eq!(Preprocess { crop: None, ..Preprocess::clip(32) }.output_size(), None);
    }

    #[test]
    fn serializes_every_decision() {
        assert_eq!(
            serde_json::to_string(&Preprocess::clip(224)).unwrap(),
            r#"{"convert_rgb":true,"resize":{"shortest_edge":224},"resample":"bicubic","crop":{"height":224,"width":224},"crop_rounding":"down","rescale":0.00392156862745098,"normalize":{"mean":[0.48145466,0.4578275,0.40821073],"std":[0.26862954,0.26130258,0.27577711]}}"#
        );
    }
}
