//! Texts as CLIP's text tower takes them: token ids of one length, by the tokenizer's own file.

use crate::job::JobSource;
use crate::{Job, StageError};
use blake3::Hash;
use serde_json::{Value as Json, json};
use tokenizers::Tokenizer;

/// What a text tower takes when neither its export nor the parameters say so.
const CONTEXT: usize = 77;

/// The parameter under which a job finds the files.
pub(super) const SOURCE: &str = "text.tokenizer";

/// The files that a tokenizer may be kept in.
pub(super) const TOKENIZER: &str = "tokenizer.json";
pub(super) const VOCABULARY: &str = "vocab.json";
pub(super) const MERGES: &str = "merges.txt";

pub(super) struct Tokens {
    tokenizer: Tokenizer,
    /// The token that ends every text; also what texts are filled up with, which a causal tower never looks at.
    end: i64,
    digest: Hash,
}

impl Tokens {
    /// Reads `tokenizer.json`, or CLIP's `vocab.json` and `merges.txt`.
    pub(super) fn read(job: &Job<'_>) -> Result<Self, StageError> {
        let files: Vec<&JobSource> = job.sources_of(SOURCE).collect();
        let unreadable = |file: &JobSource, error: &dyn std::fmt::Display| {
            StageError::input(format!("`{}` is not a tokenizer: {error}", file.path.display()))
        };
        let (tokenizer, first) = match files.as_slice() {
            [file] => {
                let bytes = job.read(file)?;
                (Tokenizer::from_bytes(bytes).map_err(|error| unreadable(file, &error))?, file)
            }
            [vocabulary, merges] => {
                let described = clip(job, vocabulary, merges)?;
                let bytes = serde_json::to_vec(&described).map_err(|error| unreadable(vocabulary, &error))?;
                (Tokenizer::from_bytes(bytes).map_err(|error| unreadable(merges, &error))?, vocabulary)
            }
            _ => return Err(StageError::Internal("no tokenizer was resolved".to_owned())),
        };
        let mut hasher = blake3::Hasher::new();
        for file in &files {
            hasher.update(file.source.digest.as_bytes());
        }
        Self::new(tokenizer, hasher.finalize()).map_err(|error| unreadable(first, &error))
    }

    fn new(mut tokenizer: Tokenizer, digest: Hash) -> Result<Self, String> {
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|error| error.to_string())?;
        let empty = tokenizer.encode("", true).map_err(|error| error.to_string())?;
        let end = empty.get_ids().last().copied();
        let end = end.ok_or("it adds no token that ends a text, as CLIP's does")?;
        Ok(Self { tokenizer, end: i64::from(end), digest })
    }

    /// Of the files.
    pub(super) fn digest(&self) -> Hash {
        self.digest
    }

    /// Token ids of all texts, all of one length: `fixed`, or that of the longest text up to the context. Longer texts are cut, and end as
    /// others do; returns how many.
    pub(super) fn encode(
        &self,
        texts: &[String],
        fixed: Option<usize>,
        context: Option<u32>,
    ) -> Result<(Vec<Vec<i64>>, usize), StageError> {
        let most = fixed.or(context.map(|n| n as usize)).unwrap_or(CONTEXT).max(2);
        let mut cut = 0;
        let mut rows = Vec::with_capacity(texts.len());
        for text in texts {
            let encoded = self.tokenizer.encode(text.as_str(), true);
            let encoded = encoded
                .map_err(|error| StageError::input(format!("text `{text}` cannot be tokenized: {error}")))?;
            let mut ids: Vec<i64> = encoded.get_ids().iter().map(|id| i64::from(*id)).collect();
            if ids.len() > most {
                cut += 1;
                ids.truncate(most - 1);
                ids.push(self.end);
            }
            rows.push(ids);
        }
        let length = fixed.unwrap_or_else(|| rows.iter().map(Vec::len).max().unwrap_or(0));
        for ids in &mut rows {
            ids.resize(length, self.end);
        }
        Ok((rows, cut))
    }

    /// The tokens of a filled-up text that are its own.
    pub(super) fn length(&self, ids: &[i64]) -> usize {
        // The first token begins the text; some tokenizers begin and end it alike.
        let end = ids.iter().skip(1).position(|id| *id == self.end);
        end.map_or(ids.len(), |position| position + 2)
    }
}

/// CLIP's tokenizer as `tokenizer.json` describes it (openai/CLIP, clip/simple_tokenizer.py; transformers, `CLIPConverter`): lower case,
/// byte-level BPE with words that end in `</w>`, between `<|startoftext|>` and `<|endoftext|>`.
fn clip(job: &Job<'_>, vocabulary: &JobSource, merges: &JobSource) -> Result<Json, StageError> {
    let wrong =
        |file: &JobSource, what: String| StageError::input(format!("`{}`: {what}", file.path.display()));
    let vocab: Json = serde_json::from_slice(&job.read(vocabulary)?)
        .map_err(|error| wrong(vocabulary, format!("not valid JSON: {error}")))?;
    let text = String::from_utf8(job.read(merges)?).map_err(|error| wrong(merges, error.to_string()))?;
    let pairs: Vec<&str> =
        text.lines().filter(|line| !line.starts_with("#version") && !line.trim().is_empty()).collect();
    let (begin, end) = ("<|startoftext|>", "<|endoftext|>");
    let id = |token: &str| {
        vocab
            .get(token)
            .and_then(Json::as_u64)
            .ok_or_else(|| wrong(vocabulary, format!("it has no `{token}`")))
    };
    let (begin_id, end_id) = (id(begin)?, id(end)?);
    let special = |token: &str, id: u64| json!({ "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true });
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [special(begin, begin_id), special(end, end_id)],
        "normalizer": { "type": "Sequence", "normalizers": [
            { "type": "NFC" },
            { "type": "Replace", "pattern": { "Regex": "\\s+" }, "content": " " },
            { "type": "Lowercase" }
        ] },
        "pre_tokenizer": { "type": "Sequence", "pretokenizers": [
            {
                "type": "Split",
                "pattern": { "Regex": "'s|'t|'re|'ve|'m|'ll|'d|[\\p{L}]+|[\\p{N}]|[^\\s\\p{L}\\p{N}]+" },
                "behavior": "Removed",
                "invert": true
            },
            { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true }
        ] },
        "post_processor": {
            "type": "RobertaProcessing",
            "sep": [end, end_id],
            "cls": [begin, begin_id],
            "trim_offsets": false,
            "add_prefix_space": false
        },
        "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": end,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>",
            "fuse_unk": false,
            "byte_fallback": false,
            "vocab": vocab,
            "merges": pairs
        }
    }))
}
