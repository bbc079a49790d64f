//! `rtvq`: what all task vectors share is stored once, in more bits; each task vector as its difference from that, in fewer.
//!
//! β = mean_t τ_t at `base_bits`, o_t = τ_t − ref at `bits`, τ̂_t = β̂ + ô_t; ref = β̂ with error correction, so that offsets make up for what coding the base
//! lost, and ref = β without. Of checkpoints (with the base that they were tuned from on port `base`) as the authors compute it: θ̄ = mean_t θ_t,
//! β = θ̄ − θ_0, and ref = θ_0 + β̂, or θ̄. Means are sums in f32 in the order of the tasks, divided by their number.
//!
//! A stage has two parts that its members share: the mean, which is only read on the way, and the coded base, which every member's artifact refers to; it
//! is stored, and counted, once. Tensors that are kept are kept in the members.
//!
//! (Other tools call several stages of codes of one tensor RTVQ; here these are `residual_stages`.)

use super::calibrated::Rounder;
use super::scheme::{Scheme, Setting, UNSIGNED};
use super::{QuantizeStage, store};
use crate::kind::{Connection, Content, Take, Unit, per_member};
use crate::params::Problem;
use crate::{Draft, Job, JobInput, StageError, checkpoint};
use merganser_tensors::encoding::Code;
use merganser_tensors::manifest::{self, Term};
use merganser_tensors::source::read_computed_bytes;
use merganser_tensors::writer::{Block, OutputTensor, Payload};
use merganser_tensors::{DType, Manifest, Result, Scratch, TensorInfo, TensorSource};
use std::ops::Range;
use std::sync::Arc;

pub(super) struct Rtvq;

impl Scheme for Rtvq {
    fn id(&self) -> &'static str {
        "rtvq"
    }

    fn version(&self) -> u32 {
        1
    }

    fn summary(&self) -> &'static str {
        "TVQ of what task vectors share, once, and of what each adds to it"
    }

    fn formula(&self) -> &'static str {
        "β = mean(τ), o_t = τ_t − β̂ (without error correction τ_t − β), τ̂_t = β̂ + ô_t; β̂ and ô coded as asymmetric, β in base_bits, o in bits"
    }

    fn source(&self) -> &'static str {
        "Kim et al., Task Vector Quantization for Memory-Efficient Model Merging, arXiv:2503.06921, §4.3; AIM-SKKU/TVQ get_avg_model_statedict, quantize_task_vector"
    }

    fn code(&self) -> Code {
        Code::Affine
    }

    fn widths(&self) -> &'static [u8] {
        UNSIGNED
    }

    fn is_shared(&self) -> bool {
        true
    }
}

/// The part that holds the mean of all members, in f32.
pub(super) const MEAN: &str = "mean";

/// The part that holds the coded base.
const SHARED: &str = "shared";

/// What a stage of this scheme gives; mis-wirings are refused.
pub(super) fn output(inputs: &[Connection]) -> std::result::Result<Content, Problem> {
    let find = |port: &str| inputs.iter().find(|input| input.port == port);
    let Some(tensors) = find("tensors") else {
        return Err(Problem::new("missing-port", "nothing is connected"));
    };
    if tensors.members.is_none() {
        let problem = Problem::new(
            "bad-value",
            "scheme `rtvq` codes what several task vectors share, `tensors` has one",
        );
        return Err(problem.help("connect a collection, or take scheme `asymmetric`"));
    }
    match (tensors.content, find("base")) {
        (Content::TaskVectors, None) | (Content::Checkpoint, Some(_)) => Ok(Content::TaskVectors),
        (Content::TaskVectors, Some(_)) => {
            let problem =
                Problem::new("wrong-content", "task vectors are differences already, and need no `base`");
            Err(problem.help("connect `base` only where `tensors` are checkpoints"))
        }
        (Content::Checkpoint, None) => {
            let problem =
                Problem::new("missing-port", "scheme `rtvq` of checkpoints needs what they were tuned from");
            Err(problem.help("connect it to port `base`, or quantize the output of `diff`"))
        }
        (other, _) => Err(Problem::new(
            "wrong-content",
            format!("scheme `rtvq` codes task vectors, not {}", other.label()),
        )),
    }
}

/// The two parts, and a unit for every member.
pub(super) fn units(
    inputs: &[Connection],
    ports: &crate::kind::Ports,
    error_correction: bool,
) -> std::result::Result<Vec<Unit>, Problem> {
    let take = |port: &str| Take { port: port.to_owned(), member: None };
    let base = inputs.iter().any(|input| input.port == "base").then(|| take("base"));
    let part = |part, takes: Vec<Take>| Unit { member: None, part: Some(part), takes };
    let mut units = vec![
        part(MEAN, vec![take("tensors")]),
        part(SHARED, [take(MEAN)].into_iter().chain(base.clone()).collect()),
    ];
    for mut unit in per_member(inputs, ports)? {
        unit.takes.retain(|take| take.port == "tensors");
        unit.takes.push(take(SHARED));
        if !error_correction {
            unit.takes.push(take(MEAN));
        }
        unit.takes.extend(base.clone());
        units.push(unit);
    }
    Ok(units)
}

impl QuantizeStage {
    /// Computes a part or a member.
    pub(super) fn run_shared(&self, job: &Job<'_>) -> std::result::Result<Draft, StageError> {
        match job.unit.part {
            Some(MEAN) => self.mean(job),
            Some(_) => self.shared(job),
            None => self.member(job),
        }
    }

    /// The tensors that are coded, by position in a source.
    fn coded(&self, source: &dyn TensorSource) -> Vec<usize> {
        let is_coded = |info: &TensorInfo| {
            info.dtype.is_float()
                && self.filter.admits(&info.name)
                && self.params.setting(self.scheme, &info.name).is_some()
        };
        (0..source.tensors().len()).filter(|tensor| is_coded(&source.tensors()[*tensor])).collect()
    }

    fn mean(&self, job: &Job<'_>) -> std::result::Result<Draft, StageError> {
        let inputs: Vec<&JobInput> = job.inputs_on("tensors").collect();
        let sources =
            inputs.iter().map(|input| job.tensors(input)).collect::<std::result::Result<Vec<_>, _>>()?;
        let (first, first_name) = (&sources[0], name_of(inputs[0]));
        let coded = self.coded(&**first);
        if coded.is_empty() {
            return Err(super::nothing_selected());
        }
        let outputs: Vec<OutputTensor> = coded
            .iter()
            .map(|&tensor| {
                let info = &first.tensors()[tensor];
                OutputTensor {
                    name: info.name.clone(),
                    shape: info.shape.clone(),
                    payload: Payload::Values(DType::F32),
                }
            })
            .collect();
        // where each tensor lies in every member
        let mut places: Vec<Vec<usize>> = vec![Vec::with_capacity(sources.len()); outputs.len()];
        for (source, input) in sources.iter().zip(&inputs) {
            for (output, places) in outputs.iter().zip(&mut places) {
                let name = name_of(input);
                let found = source.index_of(&output.name).ok_or_else(|| {
                    let text = format!("tensor `{}` is in `{first_name}`, but not in `{name}`", output.name);
                    StageError::input_help(text, "scheme `rtvq` needs the same tensors in all members")
                })?;
                let shape = &source.tensors()[found].shape;
                if *shape != output.shape {
                    let text = format!(
                        "tensor `{}` has shape {:?} in `{first_name}` and {shape:?} in `{name}`",
                        output.name, output.shape
                    );
                    return Err(StageError::input(text));
                }
                places.push(found);
            }
            if self.coded(&**source).len() != coded.len() {
                let known = |tensor: &&usize| first.index_of(&source.tensors()[**tensor].name).is_some();
                let odd = self.coded(&**source);
                let odd = odd
                    .iter()
                    .find(|tensor| !known(tensor))
                    .map(|tensor| source.tensors()[*tensor].name.clone());
                let (odd, name) = (odd.unwrap_or_default(), name_of(input));
                let text = format!("tensor `{odd}` is in `{name}`, but not in `{first_name}`");
                return Err(StageError::input_help(
                    text,
                    "scheme `rtvq` needs the same tensors in all members",
                ));
            }
        }
        let count = sources.len() as f32;
        let content = job.files.manifest(&inputs[0].artifact)?.content();
        let stored = checkpoint::store(
            job,
            content,
            &outputs,
            |output, range, block, scratch| {
                let Block::Values(sum) = block else { unreachable!("only values were announced") };
                for (index, (source, &tensor)) in sources.iter().zip(&places[output]).enumerate() {
                    if index == 0 {
                        source.read_f32(tensor, range.clone(), sum, scratch)?;
                    } else {
                        source.add_scaled(tensor, range.clone(), 1.0, sum, scratch)?;
                    }
                }
                for sum in sum {
                    *sum /= count;
                }
                Ok(())
            },
            None,
        );
        // The mean shows that something is wrong; who reads the message wants to know in which member.
        stored.map_err(|error| {
            let StageError::Tensors(merganser_tensors::Error::NotFinite { tensor, element, .. }) = &error
            else {
                return error;
            };
            let culprit = sources.iter().zip(&inputs).find_map(|(source, input)| {
                let value = checkpoint::not_finite(&**source, tensor, *element)?;
                Some(format!(
                    "tensor `{tensor}` of `{}` is not finite: element {element} is {value}",
                    name_of(input)
                ))
            });
            culprit.map_or(error, StageError::input)
        })
    }

    /// The coded base: of the mean, or of its difference from the checkpoint that all were tuned from.
    fn shared(&self, job: &Job<'_>) -> std::result::Result<Draft, StageError> {
        let mean = job.input(MEAN)?;
        let source = match job.optional("base") {
            None => job.tensors(mean)?,
            Some(base) => {
                let infos = floats(&*job.tensors(mean)?);
                view(
                    job,
                    infos,
                    vec![Term::new(1.0, mean.artifact), Term::new(-1.0, base.artifact)],
                    Vec::new(),
                )?
            }
        };
        let tensors: Vec<usize> = (0..source.tensors().len()).collect();
        let settings: Vec<Option<Setting>> =
            source.tensors().iter().map(|info| self.params.base_setting(self.scheme, &info.name)).collect();
        store::store(
            job,
            manifest::Content::TaskVectors,
            &*source,
            &tensors,
            &settings,
            &Rounder::default(),
            self.params.diagnostics,
        )
    }

    fn member(&self, job: &Job<'_>) -> std::result::Result<Draft, StageError> {
        let own = job.input("tensors")?;
        let shared = job.input(SHARED)?;
        let source = job.tensors(own)?;
        let coded = self.coded(&*source);
        let info = |tensor: &usize| TensorInfo { dtype: DType::F32, ..source.tensors()[*tensor].clone() };
        let infos: Vec<TensorInfo> = coded.iter().map(info).collect();
        let plus = |artifact| Term::new(1.0, artifact);
        let minus = |artifact| Term::new(-1.0, artifact);
        // the offsets, and what becomes of tensors that are not coded
        let (offsets, kept) = match (job.optional(MEAN), job.optional("base")) {
            (Some(mean), base) => {
                let terms = vec![plus(own.artifact), minus(mean.artifact)];
                (view(job, infos.clone(), terms, Vec::new())?, base)
            }
            (None, None) => {
                let terms = vec![plus(own.artifact), minus(shared.artifact)];
                (view(job, infos.clone(), terms, Vec::new())?, None)
            }
            (None, Some(base)) => {
                let terms = vec![plus(base.artifact), plus(shared.artifact)];
                let reference = Manifest::linear(manifest::Content::Checkpoint, infos.clone(), terms)?;
                let terms = vec![plus(own.artifact), minus(reference.view_digest())];
                (view(job, infos.clone(), terms, vec![reference])?, Some(base))
            }
        };
        let others: Vec<usize> = (0..source.tensors().len())
            .filter(|tensor| !coded.contains(tensor))
            .filter(|tensor| source.tensors()[*tensor].dtype.is_float())
            .filter(|tensor| self.filter.admits(&source.tensors()[*tensor].name))
            .collect();
        let kept_infos: Vec<TensorInfo> = others.iter().map(info).collect();
        let kept = match kept {
            _ if kept_infos.is_empty() => offsets.clone(),
            Some(base) => view(job, kept_infos, vec![plus(own.artifact), minus(base.artifact)], Vec::new())?,
            None => view(job, kept_infos, vec![plus(own.artifact)], Vec::new())?,
        };
        let either = Either::new([offsets, kept]);
        let tensors: Vec<usize> = (0..either.infos.len()).collect();
        let settings: Vec<Option<Setting>> = either
            .infos
            .iter()
            .zip(&either.places)
            .map(
                |(info, (part, _))| {
                    if *part == 0 { self.params.setting(self.scheme, &info.name) } else { None }
                },
            )
            .collect();
        let content = manifest::Content::TaskVectors;
        let draft = {
            let rounder = Rounder::default();
            store::store(job, content, &either, &tensors, &settings, &rounder, self.params.diagnostics)?
        };
        // what is stored, and the base on top of it
        let stored = Manifest::from_json(draft.manifest.as_bytes())?;
        let terms = vec![plus(stored.view_digest()), Term { partial: true, ..plus(shared.artifact) }];
        let sum = Manifest::linear(content, either.infos.clone(), terms)?.with_views(vec![stored])?;
        Ok(Draft { manifest: checkpoint::manifest_text(&sum), operands: vec![shared.artifact], ..draft })
    }
}

/// Opens a sum of artifacts that is not stored.
fn view(
    job: &Job<'_>,
    infos: Vec<TensorInfo>,
    terms: Vec<Term>,
    views: Vec<Manifest>,
) -> std::result::Result<Arc<dyn TensorSource>, StageError> {
    let view = Manifest::linear(manifest::Content::TaskVectors, infos, terms)?.with_views(views)?;
    Ok(merganser_tensors::open(&view, &job.files)?)
}

fn name_of(input: &JobInput) -> &str {
    input.member.as_deref().unwrap_or_default()
}

fn floats(source: &dyn TensorSource) -> Vec<TensorInfo> {
    source.tensors().iter().map(|info| TensorInfo { dtype: DType::F32, ..info.clone() }).collect()
}

/// The tensors of two sources that have none in common.
struct Either {
    sources: [Arc<dyn TensorSource>; 2],
    infos: Vec<TensorInfo>,
    /// For each of ours, the source and the position in it.
    places: Vec<(usize, usize)>,
}

impl Either {
    /// Where both have a tensor, the first's is taken.
    fn new(sources: [Arc<dyn TensorSource>; 2]) -> Self {
        let mut all: Vec<(TensorInfo, (usize, usize))> = Vec::new();
        for (index, source) in sources.iter().enumerate() {
            for (tensor, info) in source.tensors().iter().enumerate() {
                if !all.iter().any(|(known, _)| known.name == info.name) {
                    all.push((info.clone(), (index, tensor)));
                }
            }
        }
        all.sort_by(|(left, _), (right, _)| left.name.cmp(&right.name));
        let (infos, places) = all.into_iter().unzip();
        Self { sources, infos, places }
    }
}

impl TensorSource for Either {
    fn tensors(&self) -> &[TensorInfo] {
        &self.infos
    }

    fn read_f32(
        &self,
        tensor: usize,
        range: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        let (source, tensor) = self.places[tensor];
        self.sources[source].read_f32(tensor, range, out, scratch)
    }

    fn read_bytes(
        &self,
        tensor: usize,
        range: Range<u64>,
        out: &mut [u8],
        scratch: &mut Scratch,
    ) -> Result<()> {
        read_computed_bytes(self, tensor, range, out, scratch)
    }

    fn stored_bytes(&self) -> u64 {
        0
    }

    fn check_unchanged(&self) -> Result<()> {
        self.sources.iter().try_for_each(|source| source.check_unchanged())
    }
}
