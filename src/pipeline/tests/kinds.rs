//! Stage kinds small enough to see through.

use merganser_cache::Value;
use merganser_stages::params::{FilePath, Params, Problem, parse};
use merganser_stages::{
    Arity, Connection, Content, Draft, Job, MethodDoc, Port, Ports, Stage, StageError, StageKind, Take, Unit,
};
use serde::{Deserialize, Serialize};

pub(super) static KINDS: [&dyn StageKind; 8] =
    [&Load, &Diff, &Pack, &Merge, &Scores, &Combine, &Note, &Broken];

const fn port(name: &'static str, accepts: &'static [Content], arity: Arity, required: bool) -> Port {
    Port { name, doc: "", accepts, arity, required }
}

const CHECKPOINT: &[Content] = &[Content::Checkpoint];
const VECTORS: &[Content] = &[Content::TaskVectors];
const TENSORS: &[Content] = &[Content::Checkpoint, Content::TaskVectors];

/// What a fake stage does with its inputs.
#[derive(Clone, Copy)]
enum Behaviour {
    Gives(Content),
    /// Gives what its first input is.
    Passes,
    /// Gives one artifact per data set.
    PerDataset,
    Refuses,
    /// Breaks the contract: takes from a port that it does not have.
    TakesFromNowhere,
}

/// A parsed stage; its parameters can be looked at.
struct Fake {
    behaviour: Behaviour,
    datasets: Vec<String>,
    parameters: serde_json::Value,
}

impl Stage for Fake {
    fn version(&self) -> u32 {
        1
    }

    fn output(&self, inputs: &[Connection]) -> Result<Content, Problem> {
        match self.behaviour {
            Behaviour::Gives(content) => Ok(content),
            Behaviour::TakesFromNowhere => Ok(Content::Files),
            Behaviour::Passes => Ok(inputs.first().map_or(Content::Files, |input| input.content)),
            Behaviour::PerDataset => Ok(Content::Scores),
            Behaviour::Refuses => Err(Problem::new("bad-value", "this stage refuses its inputs")),
        }
    }

    fn units(&self, inputs: &[Connection], ports: &Ports) -> Result<Vec<Unit>, Problem> {
        if matches!(self.behaviour, Behaviour::TakesFromNowhere) {
            let takes = vec![Take { port: "nowhere".to_owned(), member: None }];
            return Ok(vec![Unit { member: None, part: None, takes }]);
        }
        let is_collection = inputs.iter().any(|input| input.port == "model" && input.members.is_some());
        if !matches!(self.behaviour, Behaviour::PerDataset) || is_collection {
            return merganser_stages::kind::per_member(inputs, ports);
        }
        let takes: Vec<Take> =
            inputs.iter().map(|input| Take { port: input.port.clone(), member: None }).collect();
        Ok(self
            .datasets
            .iter()
            .map(|name| Unit { member: Some(name.clone()), part: None, takes: takes.clone() })
            .collect())
    }

    fn parameters(&self, _: &Unit) -> Result<Value, StageError> {
        Ok(Value::Text(self.parameters.to_string()))
    }

    fn run(&self, _: &Job<'_>) -> Result<Draft, StageError> {
        Err(StageError::Internal("a stage of these tests does not run".to_owned()))
    }
}

macro_rules! fake_kind {
    ($kind:ident, $id:literal, $ports:expr, $parse:expr) => {
        struct $kind;

        impl StageKind for $kind {
            fn id(&self) -> &'static str {
                $id
            }

            fn summary(&self) -> &'static str {
                ""
            }

            fn ports(&self) -> Ports {
                const PORTS: Ports = $ports;
                PORTS
            }

            fn methods(&self) -> Vec<MethodDoc> {
                Vec::new()
            }

            fn parse(&self, params: Params<'_>) -> Result<Box<dyn Stage>, Vec<Problem>> {
                let make: fn(&Params<'_>) -> Result<Fake, Vec<Problem>> = $parse;
                Ok(Box::new(make(&params)?))
            }
        }
    };
}

fn fake<P: for<'de> Deserialize<'de> + Serialize>(
    params: &Params<'_>,
    behaviour: Behaviour,
) -> Result<(Fake, P), Vec<Problem>> {
    let parsed: P = parse(params)?;
    let parameters = serde_json::to_value(&parsed).expect("parameters of these tests are JSON");
    Ok((Fake { behaviour, datasets: Vec::new(), parameters }, parsed))
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct LoadParams {
    #[serde(serialize_with = "resolved")]
    path: FilePath,
    only: Option<Vec<String>>,
}

fn resolved<S: serde::Serializer>(path: &FilePath, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&super::show(&path.path))
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct PackParams {
    bits: u8,
    scale: Option<f64>,
    scheme: Option<String>,
    rules: Option<Vec<PackRule>>,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct PackRule {
    r#match: String,
    bits: u8,
}

#[derive(Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Method {
    Average,
    TaskArithmetic,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct MergeParams {
    method: Method,
    scale: Option<f64>,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct ScoresParams {
    datasets: Vec<String>,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct NoParams {}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct NoteParams {
    text: Option<String>,
    refuse: Option<bool>,
}

fake_kind!(Load, "load", Ports::NONE, |params| {
    Ok(fake::<LoadParams>(params, Behaviour::Gives(Content::Checkpoint))?.0)
});

fake_kind!(
    Diff,
    "diff",
    Ports {
        named: &[
            port("base", CHECKPOINT, Arity::PerMember, true),
            port("tuned", CHECKPOINT, Arity::PerMember, true)
        ],
        open: None
    },
    |params| Ok(fake::<NoParams>(params, Behaviour::Gives(Content::TaskVectors))?.0)
);

fake_kind!(
    Pack,
    "pack",
    Ports { named: &[port("tensors", TENSORS, Arity::PerMember, true)], open: None },
    |params| Ok(fake::<PackParams>(params, Behaviour::Passes)?.0)
);

fake_kind!(
    Merge,
    "merge",
    Ports {
        named: &[
            port("base", CHECKPOINT, Arity::PerMember, true),
            port("vectors", VECTORS, Arity::All, true)
        ],
        open: None
    },
    |params| Ok(fake::<MergeParams>(params, Behaviour::Gives(Content::Checkpoint))?.0)
);

fake_kind!(
    Scores,
    "scores",
    Ports {
        named: &[
            port("model", CHECKPOINT, Arity::PerMember, true),
            port("baseline", CHECKPOINT, Arity::All, false)
        ],
        open: None
    },
    |params| {
        let (fake, parsed) = fake::<ScoresParams>(params, Behaviour::PerDataset)?;
        Ok(Fake { datasets: parsed.datasets, ..fake })
    }
);

const TERM: Port = port("term", VECTORS, Arity::PerMember, false);

fake_kind!(Combine, "combine", Ports { named: &[], open: Some(&TERM) }, |params| {
    Ok(fake::<NoParams>(params, Behaviour::Gives(Content::TaskVectors))?.0)
});

fake_kind!(
    Note,
    "note",
    Ports {
        named: &[port(
            "about",
            &[Content::Checkpoint, Content::TaskVectors, Content::Scores],
            Arity::All,
            false
        )],
        open: None
    },
    |params| {
        let (fake, parsed) = fake::<NoteParams>(params, Behaviour::Gives(Content::Files))?;
        let behaviour = if parsed.refuse == Some(true) { Behaviour::Refuses } else { fake.behaviour };
        Ok(Fake { behaviour, ..fake })
    }
);

fake_kind!(Broken, "broken", Ports::NONE, |params| Ok(fake::<NoParams>(
    params,
    Behaviour::TakesFromNowhere
)?
.0));
