//! `adapter_config.json`: what decides the factor of each product, and what is refused because the product alone would be wrong.

use std::fmt;

use regex::{Regex, RegexBuilder};
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

use super::LoraProblem;

/// What an adapter's configuration says about it, for people.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Of modules that no pattern names.
    pub rank: u64,
    /// Of modules that no pattern names.
    pub alpha: f64,
    /// Whether the factor is `alpha / √rank` instead of `alpha / rank`.
    pub rank_stabilized: bool,
    /// Whether some modules have a rank or an alpha of their own.
    pub has_patterns: bool,
    /// Endings of the names of adapted modules, or one pattern.
    pub targets: Vec<String>,
    /// Which biases were trained: `none`, `all` or `lora_only`.
    pub bias: String,
    /// Modules that were trained as a whole.
    pub modules_to_save: Vec<String>,
    /// What it was made for.
    pub base: Option<String>,
}

/// Configurations are a few kilobytes; anything larger is something else.
pub(super) const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// The part of the configuration that matters.
#[derive(Debug, Deserialize)]
#[expect(clippy::struct_excessive_bools, reason = "the switches of the file")]
pub(super) struct Config {
    peft_type: String,
    r: u64,
    lora_alpha: f64,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    rank_pattern: Option<Ordered<u64>>,
    #[serde(default)]
    alpha_pattern: Option<Ordered<f64>>,
    #[serde(default)]
    pub(super) fan_in_fan_out: bool,
    #[serde(default)]
    use_dora: bool,
    #[serde(default)]
    use_qalora: bool,
    #[serde(default)]
    lora_bias: bool,
    #[serde(default)]
    layer_replication: Option<serde_json::Value>,
    #[serde(default)]
    alora_invocation_tokens: Option<serde_json::Value>,
    #[serde(default)]
    init_lora_weights: serde_json::Value,
    #[serde(default)]
    target_modules: Option<Names>,
    #[serde(default)]
    modules_to_save: Option<Names>,
    #[serde(default)]
    bias: Option<String>,
    #[serde(default)]
    base_model_name_or_path: Option<String>,
}

/// A list, or a single pattern.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum Names {
    List(Vec<String>),
    Pattern(String),
}

/// Entries in the order of the file: the first pattern that matches counts.
#[derive(Debug)]
struct Ordered<T>(Vec<(String, T)>);

/// A configuration whose patterns are compiled.
pub(super) struct Scaling {
    rank: u64,
    alpha: f64,
    rank_stabilized: bool,
    ranks: Vec<(Regex, u64)>,
    alphas: Vec<(Regex, f64)>,
}

impl Config {
    pub(super) fn parse(json: &[u8]) -> Result<Self, LoraProblem> {
        let config: Self =
            serde_json::from_slice(json).map_err(|problem| LoraProblem::Config(problem.to_string()))?;
        if config.peft_type != "LORA" {
            return Err(LoraProblem::OtherType(config.peft_type));
        }
        config.check_supported()?;
        Ok(config)
    }

    pub(super) fn scaling(&self) -> Result<Scaling, LoraProblem> {
        fn compiled<T: Copy>(patterns: Option<&Ordered<T>>) -> Result<Vec<(Regex, T)>, LoraProblem> {
            let entries = patterns.map(|patterns| &patterns.0[..]).unwrap_or_default();
            entries.iter().map(|(pattern, value)| Ok((module_pattern(pattern)?, *value))).collect()
        }
        Ok(Scaling {
            rank: self.r,
            alpha: self.lora_alpha,
            rank_stabilized: self.use_rslora,
            ranks: compiled(self.rank_pattern.as_ref())?,
            alphas: compiled(self.alpha_pattern.as_ref())?,
        })
    }

    pub(super) fn settings(&self) -> Settings {
        let names = |names: &Option<Names>| match names {
            None => Vec::new(),
            Some(Names::List(list)) => list.clone(),
            Some(Names::Pattern(pattern)) => vec![pattern.clone()],
        };
        Settings {
            rank: self.r,
            alpha: self.lora_alpha,
            rank_stabilized: self.use_rslora,
            has_patterns: self.rank_pattern.as_ref().is_some_and(|patterns| !patterns.0.is_empty())
                || self.alpha_pattern.as_ref().is_some_and(|patterns| !patterns.0.is_empty()),
            targets: names(&self.target_modules),
            bias: self.bias.clone().unwrap_or_else(|| "none".to_owned()),
            modules_to_save: names(&self.modules_to_save),
            base: self.base_model_name_or_path.clone().filter(|base| !base.is_empty()),
        }
    }

    /// Refuses variants in which the difference from the base is not `scale · B·A`.
    fn check_supported(&self) -> Result<(), LoraProblem> {
        let present = |value: Option<&serde_json::Value>| value.is_some_and(|value| !value.is_null());
        let unsupported = |what: &'static str, why: &'static str| Err(LoraProblem::Unsupported { what, why });
        if self.use_dora {
            return unsupported(
                "use_dora",
                "DoRA rescales the whole weight, which is not a sum with the base",
            );
        }
        if self.use_qalora {
            return unsupported("use_qalora", "its inputs are pooled");
        }
        if self.lora_bias {
            return unsupported("lora_bias", "the bias of `lora_B` is a change of another tensor");
        }
        if present(self.layer_replication.as_ref()) {
            return unsupported("layer_replication", "its layers are not those of the base");
        }
        if present(self.alora_invocation_tokens.as_ref()) {
            return unsupported("alora_invocation_tokens", "it acts on some tokens only");
        }
        // These rewrite the base when training starts; what is saved is relative to the rewritten base.
        let init = self.init_lora_weights.as_str().unwrap_or_default();
        if ["pissa", "olora", "corda", "loftq", "lora_ga"].iter().any(|name| init.starts_with(name)) {
            return Err(LoraProblem::ChangedBase(init.to_owned()));
        }
        Ok(())
    }
}

impl Scaling {
    /// Returns rank and factor of a module.
    pub(super) fn of(&self, module: &str) -> (u64, f64) {
        fn first<T: Copy>(patterns: &[(Regex, T)], module: &str) -> Option<T> {
            patterns.iter().find(|(pattern, _)| pattern.is_match(module)).map(|(_, value)| *value)
        }
        let rank = first(&self.ranks, module).unwrap_or(self.rank);
        let alpha = first(&self.alphas, module).unwrap_or(self.alpha);
        let divisor = if self.rank_stabilized { (rank as f64).sqrt() } else { rank as f64 };
        (rank, alpha / divisor)
    }
}

/// A pattern of PEFT: a regular expression that fits the end of a module's name, from a dot on.
fn module_pattern(pattern: &str) -> Result<Regex, LoraProblem> {
    RegexBuilder::new(&format!(r"\A(?:.*\.)?(?:{pattern})\z"))
        .size_limit(1 << 20)
        .build()
        .map_err(|problem| LoraProblem::Pattern { pattern: pattern.to_owned(), reason: problem.to_string() })
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Ordered<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Entries<T> {
            type Value = Ordered<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of patterns")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Ordered<T>, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Ordered(entries))
            }
        }
        deserializer.deserialize_map(Entries(std::marker::PhantomData))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(extra: &str) -> Result<Config, LoraProblem> {
        Config::parse(format!(r#"{{"peft_type":"LORA","r":4,"lora_alpha":8{extra}}}"#).as_bytes())
    }

    #[test]
    fn factors_follow_alpha_rank_and_patterns() {
        let of = |extra: &str, module: &str| config(extra).unwrap().scaling().unwrap().of(module);
        assert_eq!(of("", "a.q"), (4, 2.0));
        assert_eq!(of(r#","use_rslora":true"#, "a.q"), (4, 4.0));
        let patterns = r#","rank_pattern":{"b.q":2,"q":16,"z":1},"alpha_pattern":{"^a\\.[qk]":32}"#;
        assert_eq!(of(patterns, "a.b.q"), (2, 4.0));
        assert_eq!(of(patterns, "ab.q"), (16, 0.5), "patterns begin after a dot");
        assert_eq!(of(patterns, "a.q"), (16, 2.0));
        assert_eq!(of(patterns, "b.a.q"), (16, 0.5), "`^` is the beginning of the whole name");
        assert_eq!(of(patterns, "a.v"), (4, 2.0));
        let alphas = r#","alpha_pattern":{"a\\.[qk]":32},"rank_pattern":null"#;
        assert_eq!(of(alphas, "a.q"), (4, 8.0));
        assert_eq!(of(alphas, "x.a.k"), (4, 8.0));
    }

    #[test]
    fn what_is_not_a_plain_product_is_refused_by_name() {
        let refused = |extra: &str| config(extra).err().unwrap().to_string();
        for name in ["use_dora", "use_qalora", "lora_bias"] {
            let message = refused(&format!(r#","{name}":true"#));
            assert!(message.starts_with(&format!("`{name}` is not supported: ")), "{message}");
        }
        assert!(refused(r#","layer_replication":[[0,4]]"#).contains("layer_replication"));
        assert!(refused(r#","init_lora_weights":"pissa_niter_16""#).contains("pissa_niter_16"));
        config(r#","init_lora_weights":"gaussian","layer_replication":null,"anything":{}"#).unwrap();
        config(r#","init_lora_weights":true"#).unwrap();
        let message = Config::parse(br#"{"peft_type":"LOHA","r":4,"alpha":8}"#).err().unwrap().to_string();
        assert!(message.contains("missing field `lora_alpha`"), "{message}");
        let message =
            Config::parse(br#"{"peft_type":"ADALORA","r":4,"lora_alpha":8}"#).err().unwrap().to_string();
        assert!(message.contains("`ADALORA`"), "{message}");
        let message = config(r#","rank_pattern":{"(?=a)":2}"#).unwrap().scaling().err().unwrap().to_string();
        assert!(message.contains("`(?=a)`"), "{message}");
    }
}
