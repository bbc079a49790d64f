//! Reading Hugging Face's `preprocessor_config.json`.
//!
//! Both generations of the file are understood: `size` and `crop_size` as a number or as
//! `{"height", "width"}` / `{"shortest_edge"}`, `resample` as Pillow's number or as a name. Keys that do not
//! concern pixels are ignored; keys that do, but are not supported, are refused. `null` counts as absent.
//!
//! What a file leaves out follows its processor (`image_processor_type`, older `feature_extractor_type`).
//! Files without a known type count as CLIP's if they mention a crop or a shortest edge, and as ViT's
//! otherwise (so a bare `size` number is a square exactly where nothing would crop it to one).

use std::path::Path;

use serde_json::{Map, Value};

use super::config::{
    CLIP_MEAN, CLIP_STD, CropRounding, IMAGENET_MEAN, IMAGENET_STD, Normalize, Preprocess, Resize, Size,
};
use super::error::PreprocessError;
use super::fields::Reader;
use super::taps::Filter;

impl Preprocess {
    /// Reads a configuration file, see [`Preprocess::from_value`].
    pub fn from_file(path: &Path) -> Result<Self, PreprocessError> {
        let origin = path.display().to_string();
        let value = serde_json::from_slice(&fs_err::read(path)?)
            .map_err(|source| PreprocessError::Json { origin: origin.clone(), source })?;
        Self::from_value(&value, &origin)
    }

    /// Interprets a `preprocessor_config.json` of transformers; `origin` names it in messages.
    pub(super) fn from_hf_value(value: &Value, origin: &str) -> Result<Self, PreprocessError> {
        let reader = Reader::new(value, origin)?;
        reader.refuse_unsupported()?;
        let defaults = reader.defaults()?;
        let preprocess = Self {
            // Grey images and models of three channels need it, whatever an older file leaves out.
            convert_rgb: reader.flag("do_convert_rgb", true)?,
            resize: reader.resize(&defaults)?,
            resample: reader.resample("resample", defaults.resample)?,
            crop: reader.crop(&defaults)?,
            crop_rounding: CropRounding::Down,
            rescale: reader
                .flag("do_rescale", true)?
                .then(|| reader.number("rescale_factor", 1.0 / 255.0))
                .transpose()?,
            normalize: reader.normalize(&defaults)?,
        };
        Ok(preprocess)
    }
}

/// What a processor does where its file is silent.
struct Defaults {
    resize: Resize,
    /// Whether a bare `size` number means a square.
    square: bool,
    crop: Option<Size>,
    resample: Filter,
    mean: [f64; 3],
    std: [f64; 3],
}

impl Reader<'_> {
    fn defaults(&self) -> Result<Defaults, PreprocessError> {
        let processor =
            self.text("image_processor_type")?.or(self.text("feature_extractor_type")?).unwrap_or("");
        let family = processor
            .trim_end_matches("Fast")
            .trim_end_matches("Pil")
            .trim_end_matches("ImageProcessor")
            .trim_end_matches("FeatureExtractor");
        Ok(match family {
            "CLIP" => clip_defaults(),
            "ViT" => vit_defaults(),
            "Siglip" | "SigLIP" => Defaults { resample: Filter::Bicubic, ..vit_defaults() },
            // `Sam2` and its video and fast relatives: squashed, ImageNet's mean and standard deviation.
            "Sam2" | "Sam2Video" => Defaults {
                resize: Resize::Exact(Size::square(1024)),
                mean: IMAGENET_MEAN,
                std: IMAGENET_STD,
                ..vit_defaults()
            },
            "DeiT" => Defaults {
                resize: Resize::Exact(Size::square(256)),
                crop: Some(Size::square(224)),
                resample: Filter::Bicubic,
                ..vit_defaults()
            },
            _ if self.looks_like_clip() => clip_defaults(),
            _ => vit_defaults(),
        })
    }

    fn looks_like_clip(&self) -> bool {
        match self.get("do_center_crop") {
            Some(Value::Bool(crop)) => *crop,
            _ => {
                self.get("crop_size").is_some()
                    || self.get("size").is_some_and(|size| size.get("shortest_edge").is_some())
            }
        }
    }

    fn resize(&self, defaults: &Defaults) -> Result<Option<Resize>, PreprocessError> {
        if !self.flag("do_resize", true)? {
            return Ok(None);
        }
        let Some(size) = self.get("size") else { return Ok(Some(defaults.resize)) };
        Ok(Some(match size {
            Value::Number(_) => {
                let side = self.side("size", size)?;
                if defaults.square { Resize::Exact(Size::square(side)) } else { Resize::ShortestEdge(side) }
            }
            Value::Object(sides) => match &present(sides)[..] {
                ["shortest_edge"] => {
                    Resize::ShortestEdge(self.side("size.shortest_edge", &sides["shortest_edge"])?)
                }
                _ => Resize::Exact(self.height_and_width("size", sides)?),
            },
            other => return Err(self.wrong("size", SIZE_FORMS, other)),
        }))
    }

    fn crop(&self, defaults: &Defaults) -> Result<Option<Size>, PreprocessError> {
        let mentioned = self.get("crop_size").is_some();
        if !self.flag("do_center_crop", mentioned || defaults.crop.is_some())? {
            return Ok(None);
        }
        Ok(Some(match self.get("crop_size") {
            None => defaults.crop.unwrap_or(Size::square(224)),
            Some(side @ Value::Number(_)) => Size::square(self.side("crop_size", side)?),
            Some(Value::Object(sides)) => self.height_and_width("crop_size", sides)?,
            Some(other) => return Err(self.wrong("crop_size", CROP_FORMS, other)),
        }))
    }

    fn normalize(&self, defaults: &Defaults) -> Result<Option<Normalize>, PreprocessError> {
        if !self.flag("do_normalize", true)? {
            return Ok(None);
        }
        self.mean_and_std(["image_mean", "image_std"], [&defaults.mean, &defaults.std]).map(Some)
    }

    /// Refuses what would change the pixels and is not done here.
    fn refuse_unsupported(&self) -> Result<(), PreprocessError> {
        const UNSUPPORTED: &[&str] = &[
            "crop_pct",
            "do_align_long_axis",
            "do_crop_margin",
            "do_flip_channel_order",
            "do_pad",
            "do_thumbnail",
            "rescale_offset",
        ];
        for field in UNSUPPORTED {
            match self.get(field) {
                None | Some(Value::Bool(false)) => {}
                Some(value) => {
                    let (origin, found) = (self.origin.to_owned(), value.to_string());
                    return Err(PreprocessError::Unsupported { origin, field, found });
                }
            }
        }
        Ok(())
    }

    fn height_and_width(&self, field: &str, sides: &Map<String, Value>) -> Result<Size, PreprocessError> {
        // `serde_json` keeps keys sorted unless a dependency asks otherwise; `present` sorts.
        if present(sides) != ["height", "width"] {
            let forms = if field == "size" { SIZE_FORMS } else { CROP_FORMS };
            return Err(self.wrong(field, forms, &Value::Object(sides.clone())));
        }
        Ok(Size {
            height: self.side(&format!("{field}.height"), &sides["height"])?,
            width: self.side(&format!("{field}.width"), &sides["width"])?,
        })
    }
}

const SIZE_FORMS: &str = r#"a number, {"height", "width"} or {"shortest_edge"}"#;
const CROP_FORMS: &str = r#"a number or {"height", "width"}"#;

/// Returns the sorted names of the entries that are not `null`.
fn present(sides: &Map<String, Value>) -> Vec<&str> {
    let mut names: Vec<&str> =
        sides.iter().filter(|(_, value)| !value.is_null()).map(|(name, _)| name.as_str()).collect();
    names.sort_unstable();
    names
}

fn clip_defaults() -> Defaults {
    Defaults {
        resize: Resize::ShortestEdge(224),
        square: false,
        crop: Some(Size::square(224)),
        resample: Filter::Bicubic,
        mean: CLIP_MEAN,
        std: CLIP_STD,
    }
}

fn vit_defaults() -> Defaults {
    Defaults {
        resize: Resize::Exact(Size::square(224)),
        square: true,
        crop: None,
        resample: Filter::Bilinear,
        mean: [0.5; 3],
        std: [0.5; 3],
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(value: &Value) -> Preprocess {
        Preprocess::from_hf_value(value, "p.json").unwrap()
    }

    fn error(value: &Value) -> String {
        Preprocess::from_hf_value(value, "p.json").unwrap_err().to_string()
    }

    #[test]
    fn both_generations_of_clip_files_mean_the_same() {
        let old = json!({
            "crop_size": 224, "do_center_crop": true, "do_normalize": true, "do_resize": true,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": [0.481_454_66, 0.457_827_5, 0.408_210_73],
            "image_std": [0.268_629_54, 0.261_302_58, 0.275_777_11],
            "resample": 3, "size": 224,
        });
        let new = json!({
            "crop_size": {"height": 224, "width": 224}, "do_center_crop": true, "do_convert_rgb": true,
            "do_normalize": true, "do_rescale": true, "do_resize": true,
            "image_mean": [0.481_454_66, 0.457_827_5, 0.408_210_73], "image_processor_type": "CLIPImageProcessor",
            "image_std": [0.268_629_54, 0.261_302_58, 0.275_777_11],
            "resample": "bicubic", "rescale_factor": 1.0 / 255.0,
            "size": {"shortest_edge": 224, "height": null, "width": null}, "data_format": "channels_first",
        });
        assert_eq!(read(&old), Preprocess::clip(224));
        assert_eq!(read(&new), Preprocess::clip(224));
        assert_eq!(read(&json!({"image_processor_type": "CLIPImageProcessorFast"})), Preprocess::clip(224));
    }

    #[test]
    fn files_without_a_type_follow_what_they_mention() {
        let vit = read(&json!({"do_normalize": true, "do_resize": true, "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5], "size": 384}));
        assert_eq!(vit.resize, Some(Resize::Exact(Size::square(384))));
        assert_eq!((vit.crop, vit.resample), (None, Filter::Bilinear));
        let clip = read(&json!({"size": 64, "crop_size": 64}));
        assert_eq!(clip.resize, Some(Resize::ShortestEdge(64)));
        assert_eq!((clip.crop, clip.resample), (Some(Size::square(64)), Filter::Bicubic));
        let squash =
            read(&json!({"size": {"height": 32, "width": 48}, "do_center_crop": false, "resample": 0}));
        assert_eq!(squash.resize, Some(Resize::Exact(Size { height: 32, width: 48 })));
        assert_eq!((squash.crop, squash.resample), (None, Filter::Nearest));
    }

    #[test]
    fn processors_have_their_own_defaults() {
        let deit = read(&json!({"image_processor_type": "DeiTImageProcessor"}));
        assert_eq!(deit.resize, Some(Resize::Exact(Size::square(256))));
        assert_eq!((deit.crop, deit.resample), (Some(Size::square(224)), Filter::Bicubic));
        let siglip = read(
            &json!({"image_processor_type": "SiglipImageProcessor", "size": {"height": 256, "width": 256}}),
        );
        assert_eq!((siglip.crop, siglip.resample), (None, Filter::Bicubic));
        let sam = read(
            &json!({"image_processor_type": "Sam2ImageProcessorFast", "processor_class": "Sam2Processor",
            "mask_size": {"height": 256, "width": 256}}),
        );
        assert_eq!((sam.resize, sam.crop), (Some(Resize::Exact(Size::square(1024))), None));
        assert_eq!((sam.resample, sam.normalize.unwrap().std), (Filter::Bilinear, IMAGENET_STD.to_vec()));
        let vit = read(&json!({"feature_extractor_type": "ViTFeatureExtractor", "size": 224}));
        assert_eq!(vit.resize, Some(Resize::Exact(Size::square(224))));
        assert_eq!(vit.normalize.unwrap().mean, [0.5; 3]);
    }

    #[test]
    fn steps_can_be_switched_off() {
        let none = read(&json!({"do_resize": false, "do_center_crop": false, "do_rescale": false,
            "do_normalize": false, "do_convert_rgb": false}));
        assert_eq!((none.resize, none.crop, none.rescale, none.normalize), (None, None, None, None));
        assert!(!none.convert_rgb);
    }

    #[test]
    fn wrong_types_name_file_and_field() {
        assert_eq!(error(&json!([])), "`p.json`: `(the whole file)` must be an object, found []");
        assert_eq!(
            error(&json!({"do_resize": "yes"})),
            "`p.json`: `do_resize` must be true or false, found \"yes\""
        );
        assert_eq!(
            error(&json!({"size": [224]})),
            r#"`p.json`: `size` must be a number, {"height", "width"} or {"shortest_edge"}, found [224]"#
        );
        assert_eq!(
            error(&json!({"size": {"height": 224, "width": "224"}})),
            "`p.json`: `size.width` must be a whole number from 1 to 16384, found \"224\""
        );
        assert!(error(&json!({"size": 0})).contains("`size` must be a whole number"));
        assert!(error(&json!({"size": {"longest_edge": 5}})).contains(r#"found {"longest_edge":5}"#));
        assert!(
            error(&json!({"crop_size": true}))
                .contains(r#"`crop_size` must be a number or {"height", "width"}"#)
        );
        assert!(error(&json!({"resample": 6})).contains("`resample` must be a number from 0 to 5 or one of"));
        assert!(error(&json!({"image_mean": [1, 2]})).contains("`image_mean` must be a number or a list"));
        assert!(error(&json!({"image_std": [1, 0, 1]})).contains("`image_std` must be different from zero"));
        assert!(error(&json!({"rescale_factor": "1/255"})).contains("`rescale_factor` must be a number"));
        assert_eq!(
            error(&json!({"do_pad": true})),
            "`p.json`: `do_pad` = true is not supported; it would change the pixels"
        );
    }

    #[test]
    fn files_that_are_missing_or_no_json_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("preprocessor_config.json");
        assert!(Preprocess::from_file(&path).unwrap_err().to_string().contains("preprocessor_config.json"));
        fs_err::write(&path, "{").unwrap();
        assert!(Preprocess::from_file(&path).unwrap_err().to_string().ends_with("is not valid JSON"));
        fs_err::write(&path, r#"{"size": 32, "crop_size": 32}"#).unwrap();
        assert_eq!(Preprocess::from_file(&path).unwrap(), Preprocess::clip(32));
    }
}
