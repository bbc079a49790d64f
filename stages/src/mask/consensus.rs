//! `consensus`: the entries that several tasks' masks agree on.

use super::inputs::MaskInputs;
use super::lambda::refusal;
use super::method::{Masking, Method, Need, Prepared, Voting};
use super::tall::{TallVoting, localizer};
use crate::StageError;
use crate::params::{Params, Problem, parse, to_value};
use merganser_cache::Value;
use merganser_tensors::Scratch;
use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ops::Range;

pub(super) struct Consensus;

/// λ of the masks that are made on the way, unless the masks are given.
const LAMBDA: f64 = 0.4;

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct ConsensusParams {
    /// How many masks must have an entry: 1 keeps all that matter to some task, 2 drops the selfish ones too, 0 keeps everything, more than
    /// there are masks nothing.
    #[serde(default = "two")]
    k: u64,
    /// λ of the TALL masks that are counted, unless port `masks` holds the masks (default: 0.4).
    #[serde(default)]
    lambda: Option<f64>,
}

fn two() -> u64 {
    2
}

impl Method for Consensus {
    fn id(&self) -> &'static str {
        "consensus"
    }

    fn summary(&self) -> &'static str {
        "one mask: the entries that at least k masks have"
    }

    fn formula(&self) -> &'static str {
        "mask = Σ_t mask_t ≥ k; mask_t from port `masks`, or TALL masks with λ"
    }

    fn source(&self) -> &'static str {
        "Wang et al., Localizing Task Information for Improved Model Merging and Compression, arXiv:2405.07813, eq. 6; nik-dim/tall_masks construct_consensus_mask"
    }

    fn schema(&self) -> Schema {
        schema_for!(ConsensusParams)
    }

    fn makes_one(&self) -> bool {
        true
    }

    fn parse(&self, params: &Params<'_>) -> Result<Box<dyn Masking>, Vec<Problem>> {
        let parsed: ConsensusParams = parse(params)?;
        match parsed.lambda.and_then(|lambda| refusal("lambda", lambda)) {
            Some(problem) => {
                let span = params.table.get("lambda").map_or(params.span, |entry| entry.node.span);
                Err(vec![problem.at(span)])
            }
            None => Ok(Box::new(parsed)),
        }
    }
}

impl Masking for ConsensusParams {
    fn version(&self) -> u32 {
        1
    }

    fn parameters(&self, _: Option<&str>) -> Result<Value, StageError> {
        Ok(to_value(self)?)
    }

    fn need(&self, port: &str) -> Need {
        match port {
            "masks" | "base" | "merged" => Need::Optional,
            _ => Need::No,
        }
    }

    fn check_ports(&self, connected: &dyn Fn(&str) -> bool) -> Result<(), Problem> {
        if !connected("masks") {
            if connected("base") {
                return Ok(());
            }
            let message = "method `consensus` needs port `masks`, or `base` to make TALL masks";
            return Err(Problem::new("missing-port", message));
        }
        if let Some(port) = ["base", "merged"].into_iter().find(|port| connected(port)) {
            let message = format!("port `masks` holds the masks: `{port}` is not read");
            return Err(Problem::new("unknown-port", message).help(format!("remove `{port}` from `from`")));
        }
        if self.lambda.is_some() {
            let message = "port `masks` holds the masks: `lambda` is not used";
            return Err(Problem::new("bad-value", message).help("remove `lambda`"));
        }
        Ok(())
    }

    fn votes_needed(&self) -> Option<u64> {
        Some(self.k)
    }

    fn prepare<'a>(&'a self, inputs: &'a MaskInputs<'a>) -> Result<Prepared<'a>, StageError> {
        if inputs.masks.is_empty() {
            let lambdas = vec![self.lambda.unwrap_or(LAMBDA); inputs.asked.len()];
            let voting = TallVoting::new(inputs, localizer(inputs, 1.0)?, &lambdas);
            return Ok(Prepared::new(inputs, Box::new(voting)));
        }
        let voting = Box::new(Given { inputs });
        Ok(Prepared { voting, voters: inputs.masks.len(), figures: BTreeMap::new() })
    }
}

/// Masks of another stage; one that lacks a tensor has all its entries.
struct Given<'a> {
    inputs: &'a MaskInputs<'a>,
}

impl Voting for Given<'_> {
    fn vote(
        &self,
        tensor: usize,
        range: Range<usize>,
        votes: &mut [f32],
        scratch: &mut Scratch,
    ) -> merganser_tensors::Result<()> {
        let name = &self.inputs.tensors[tensor].name;
        for mask in &self.inputs.masks {
            match mask.tensors.index_of(name) {
                Some(position) => mask.tensors.add_scaled(position, range.clone(), 1.0, votes, scratch)?,
                None => votes.iter_mut().for_each(|vote| *vote += 1.0),
            }
        }
        Ok(())
    }
}
