//! Reading the configurations of timm (`config.json` with `pretrained_cfg`) and open_clip (`open_clip_config.json` with `preprocess_cfg`).
//!
//! Both build their evaluation transform from torchvision's `Resize`, `CenterCrop`, `ToTensor` and `Normalize` on PIL images:
//!
//! - timm resizes the shorter side (`crop_mode = "center"`) or both sides (`"squash"`) to `floor(input / crop_pct)` and crops to the input;
//! - open_clip resizes the shorter side (`resize_mode = "shortest"`) to the input and crops, or squashes (`"squash"`).
//!
//! Modes that pad (`"border"`, `"longest"`) are refused. Sources: timm 1.0, `data/transforms_factory.py` and `data/config.py`; open_clip 3.3,
//! `transform.py` (described, not copied).

use serde_json::Value;

use super::config::{
    CLIP_MEAN, CLIP_STD, CropRounding, IMAGENET_MEAN, IMAGENET_STD, Preprocess, Resize, Size,
};
use super::error::PreprocessError;
use super::fields::Reader;
use super::taps::Filter;

/// timm's `DEFAULT_CROP_PCT`.
const CROP_PCT: f64 = 0.875;

impl Preprocess {
    /// Interprets a `preprocessor_config.json` (transformers), `config.json` (timm) or `open_clip_config.json`, or the same keys as a table; `origin`
    /// names it in messages.
    pub fn from_value(value: &Value, origin: &str) -> Result<Self, PreprocessError> {
        let part = |name: &str| value.get(name).filter(|part| !part.is_null());
        if let Some(config) = part("pretrained_cfg") {
            return timm(&Reader::new(config, origin)?);
        }
        if part("input_size").is_some() {
            return timm(&Reader::new(value, origin)?);
        }
        if let Some(config) = part("preprocess_cfg") {
            let side = value.pointer("/model_cfg/vision_cfg/image_size");
            return open_clip(&Reader::new(config, origin)?, side);
        }
        Self::from_hf_value(value, origin)
    }
}

fn timm(reader: &Reader<'_>) -> Result<Preprocess, PreprocessError> {
    let size = match reader.get("input_size") {
        Some(Value::Array(sizes)) if sizes.len() == 3 => Size {
            height: reader.side("input_size", &sizes[1])?,
            width: reader.side("input_size", &sizes[2])?,
        },
        found => {
            return Err(reader.wrong(
                "input_size",
                "[channels, height, width]",
                found.unwrap_or(&Value::Null),
            ));
        }
    };
    let crop_pct = reader.number("crop_pct", CROP_PCT)?;
    let scaled = |side: usize| (side as f64 / crop_pct).floor();
    if !(crop_pct > 0.0 && scaled(size.height.max(size.width)) <= f64::from(1 << 14)) {
        let found = reader.get("crop_pct").unwrap_or(&Value::Null);
        return Err(reader.wrong("crop_pct", "a share of the image", found));
    }
    let scaled = Size { height: scaled(size.height) as usize, width: scaled(size.width) as usize };
    let resize = match reader.text("crop_mode")?.unwrap_or("center") {
        "squash" => Resize::Exact(scaled),
        "center" if scaled.height == scaled.width => Resize::ShortestEdge(scaled.height),
        mode => return Err(unsupported(reader, "crop_mode", mode)),
    };
    torchvision(
        reader,
        resize,
        Some(size),
        reader.mean_and_std(["mean", "std"], [&IMAGENET_MEAN, &IMAGENET_STD])?,
    )
}

fn open_clip(reader: &Reader<'_>, side: Option<&Value>) -> Result<Preprocess, PreprocessError> {
    let size = match reader.get("size").or(side) {
        Some(Value::Array(sides)) if sides.len() == 2 => {
            Size { height: reader.side("size", &sides[0])?, width: reader.side("size", &sides[1])? }
        }
        Some(side) => Size::square(reader.side("size", side)?),
        None => return Err(reader.wrong("size", "a number or [height, width]", &Value::Null)),
    };
    let (resize, crop) = match reader.text("resize_mode")?.unwrap_or("shortest") {
        "squash" => (Resize::Exact(size), None),
        "shortest" if size.height == size.width => (Resize::ShortestEdge(size.height), Some(size)),
        mode => return Err(unsupported(reader, "resize_mode", mode)),
    };
    torchvision(reader, resize, crop, reader.mean_and_std(["mean", "std"], [&CLIP_MEAN, &CLIP_STD])?)
}

fn torchvision(
    reader: &Reader<'_>,
    resize: Resize,
    crop: Option<Size>,
    normalize: super::config::Normalize,
) -> Result<Preprocess, PreprocessError> {
    Ok(Preprocess {
        convert_rgb: true,
        resize: Some(resize),
        resample: reader.resample("interpolation", Filter::Bicubic)?,
        crop,
        crop_rounding: CropRounding::HalfEven,
        rescale: Some(1.0 / 255.0),
        normalize: Some(normalize),
    })
}

fn unsupported(reader: &Reader<'_>, field: &'static str, found: &str) -> PreprocessError {
    PreprocessError::Unsupported { origin: reader.origin.to_owned(), field, found: format!("\"{found}\"") }
}

#[cfg(test)]
mod tests {
    use super::super::super::test_support::pattern_image;
    use super::super::pipeline::Preprocessor;
    use super::*;
    use serde_json::json;

    fn read(value: &Value) -> Preprocess {
        Preprocess::from_value(value, "config.json").unwrap()
    }

    fn error(value: &Value) -> String {
        Preprocess::from_value(value, "config.json").unwrap_err().to_string()
    }

    #[test]
    fn timm_resizes_by_the_share_that_is_cropped() {
        let deit = read(&json!({"architecture": "deit_tiny_patch16_224", "pretrained_cfg": {
            "input_size": [3, 224, 224], "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center",
            "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "fixed_input_size": true}}));
        assert_eq!(deit.resize, Some(Resize::ShortestEdge(248)));
        assert_eq!((deit.crop, deit.crop_rounding), (Some(Size::square(224)), CropRounding::HalfEven));
        let bare = read(&json!({"input_size": [3, 384, 384], "crop_pct": 1.0, "crop_mode": "squash",
            "interpolation": "bilinear"}));
        assert_eq!(bare.resize, Some(Resize::Exact(Size::square(384))));
        assert_eq!((bare.resample, bare.normalize.unwrap().mean), (Filter::Bilinear, IMAGENET_MEAN.to_vec()));
        assert_eq!(read(&json!({"input_size": [3, 224, 224]})).resize, Some(Resize::ShortestEdge(256)));
    }

    #[test]
    fn open_clip_crops_or_squashes() {
        let clip = read(&json!({"model_cfg": {"vision_cfg": {"image_size": 224}}, "preprocess_cfg": {
            "mean": CLIP_MEAN, "std": CLIP_STD}}));
        let expected = Preprocess { crop_rounding: CropRounding::HalfEven, ..Preprocess::clip(224) };
        assert_eq!(clip, expected);
        let squash = read(&json!({"preprocess_cfg": {"size": [384, 256], "resize_mode": "squash",
            "interpolation": "bicubic"}}));
        assert_eq!(squash.resize, Some(Resize::Exact(Size { height: 384, width: 256 })));
        assert_eq!(squash.crop, None);
    }

    #[test]
    fn what_would_pad_or_is_no_size_is_refused() {
        assert_eq!(
            error(&json!({"input_size": [3, 224, 224], "crop_mode": "border"})),
            "`config.json`: `crop_mode` = \"border\" is not supported; it would change the pixels"
        );
        assert_eq!(
            error(&json!({"pretrained_cfg": {"input_size": 224}})),
            "`config.json`: `input_size` must be [channels, height, width], found 224"
        );
        assert!(
            error(&json!({"input_size": [3, 8, 8], "crop_pct": 0})).contains("`crop_pct` must be a share")
        );
        assert!(
            error(&json!({"input_size": [3, 8, 8], "interpolation": "random"})).contains("`interpolation`")
        );
        let longest = json!({"preprocess_cfg": {"size": 224, "resize_mode": "longest"}});
        assert!(error(&longest).contains("`resize_mode` = \"longest\" is not supported"));
        assert!(error(&json!({"preprocess_cfg": {}})).contains("`size` must be a number or [height, width]"));
    }

    #[test]
    fn floats_equal_those_of_timm_and_open_clip() {
        let golden: Value = serde_json::from_str(include_str!("testdata/torch.json")).unwrap();
        let cases = golden["cases"].as_array().unwrap();
        assert!(cases.len() >= 20);
        for case in cases {
            let number = |name: &str| case[name].as_u64().unwrap() as usize;
            let image = pattern_image(number("height"), number("width"), number("channels"));
            let input = Preprocessor::new(read(&case["config"])).unwrap().input(&image).unwrap();
            let mut crc = flate2::Crc::new();
            input.iter().for_each(|value| crc.update(&value.to_le_bytes()));
            assert_eq!(u64::from(crc.sum()), case["crc32"].as_u64().unwrap(), "{case}");
        }
    }
}
