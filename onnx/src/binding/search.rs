//! Puts a binding together: content, then names, then rows, then what is left.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use rayon::prelude::*;

use super::constants::{recognize, suspects};
use super::digests::{Origin, OriginTensor};
use super::names::{agreement, best_by_name};
use super::resolve::{Class, Decision, scalar_by_name};
use super::rows::{Found, RowIndex};
use super::{Binding, BoundTensor, Constant, ConstantKind, How, Source, computed};
use crate::error::GraphError;
use crate::graph::{Graph, GraphTensor, Place};
use crate::tensor::{Weights, transpose};

pub(super) fn find(graph: &Graph, weights: &dyn Weights) -> Result<Binding, GraphError> {
    let origin = Origin::read(graph, weights)?;
    let mut search = Search {
        graph,
        origin: &origin,
        bound: BTreeMap::new(),
        constants: BTreeMap::new(),
        shared: Vec::new(),
        transposed: HashMap::new(),
    };
    search.by_content();
    search.scalars();
    search.recognized();
    search.by_rows(weights)?;
    search.rest(weights)?;
    Ok(search.finish())
}

struct Search<'a> {
    graph: &'a Graph,
    origin: &'a Origin,
    /// by index of the graph tensor; a split `Identity` follows with the same index
    bound: BTreeMap<usize, Vec<BoundTensor>>,
    constants: BTreeMap<usize, Constant>,
    /// constants used at several places, and the candidates found nowhere else
    shared: Vec<(usize, Vec<String>)>,
    transposed: HashMap<usize, bool>,
}

impl<'a> Search<'a> {
    fn tensor(&self, idx: usize) -> &'a GraphTensor {
        &self.graph.float_tensors()[idx]
    }

    fn by_content(&mut self) {
        let (graph, origin) = (self.graph, self.origin);
        let matches: Vec<_> = graph.float_tensors().par_iter().map(|t| origin.look_up(t)).collect();
        let mut classes: BTreeMap<&[usize], Class> = BTreeMap::new();
        for (member, found) in matches.iter().enumerate().filter_map(|(i, m)| Some((i, m.as_ref()?))) {
            self.transposed.insert(member, found.transposed);
            let candidates = origin.candidates(found);
            classes
                .entry(candidates)
                .or_insert_with(|| Class {
                    members: Vec::new(),
                    candidates: candidates.iter().map(|&c| origin.tensors[c].name.as_str()).collect(),
                    uniform: origin.tensors[candidates[0]].uniform,
                })
                .members
                .push(member);
        }
        for class in classes.values() {
            let decisions = class.resolve(graph);
            let mut placed: BTreeSet<&str> = BTreeSet::new();
            for decision in &decisions {
                placed.insert(decision.source);
                placed.extend(decision.merged.iter().chain(decision.splits.iter().map(|(_, s)| s)));
            }
            let left: Vec<String> =
                class.candidates.iter().filter(|c| !placed.contains(*c)).map(|c| (*c).to_owned()).collect();
            for decision in decisions {
                if decision.shared && decision.merged.is_empty() && !left.is_empty() {
                    self.shared.push((decision.member, left.clone()));
                }
                self.decide(&decision);
            }
        }
    }

    fn decide(&mut self, decision: &Decision) {
        let tensor = self.tensor(decision.member);
        if tensor.place == Place::Function {
            // The body of a function is shared by all of its calls and has no names to inject by.
            let mut sources = vec![decision.source.to_owned()];
            sources.extend(decision.merged.iter().map(|&m| m.to_owned()));
            self.constants.insert(decision.member, constant(tensor, ConstantKind::Computed, sources));
            return;
        }
        let Some(how) = self.how(decision.member, decision.source) else {
            let mut sources = vec![decision.source.to_owned()];
            sources.extend(decision.merged.iter().map(|&m| m.to_owned()));
            self.constants.insert(decision.member, constant(tensor, ConstantKind::Computed, sources));
            return;
        };
        let mut bound = vec![BoundTensor {
            name: tensor.name.clone(),
            shape: tensor.shape.clone(),
            element: tensor.element,
            place: tensor.place,
            source: Source::Tensor { name: decision.source.to_owned(), how },
            merged: decision.merged.iter().map(|&m| m.to_owned()).collect(),
        }];
        for (output, source) in &decision.splits {
            // An exporter that merges two tensors uses both of them in the same way.
            bound.push(BoundTensor {
                name: output.clone(),
                place: Place::Identity,
                source: Source::Tensor { name: (*source).to_owned(), how },
                merged: Vec::new(),
                ..bound[0].clone()
            });
        }
        self.bound.insert(decision.member, bound);
    }

    /// Returns how a constant holds a tensor of equal content; nothing if that cannot be told: a matrix that
    /// equals its own transpose (all zeros, an identity) may be stored either way round.
    fn how(&self, member: usize, source: &str) -> Option<How> {
        let tensor = self.tensor(member);
        let idx = self.origin.index(source).expect("candidates are origin tensors");
        let shape = &self.origin.tensors[idx].shape;
        if self.transposed.get(&member) == Some(&true) {
            return Some(How::Transposed);
        }
        let as_it_is = if *shape == tensor.shape { How::SameBytes } else { How::Reshaped };
        let (&[rows, columns], &[a, b]) = (&tensor.shape[..], &shape[..]) else { return Some(as_it_is) };
        let turned = rows > 1 && columns > 1 && (a, b) == (columns, rows);
        // Exporters keep the name of a tensor that they use as it is.
        if !turned || agreement(&tensor.name, source).is_some() {
            return Some(as_it_is);
        }
        let values = tensor.values();
        if transpose(&values, rows, columns) != *values {
            Some(as_it_is)
        } else if rows == columns {
            None
        } else {
            Some(How::Transposed)
        }
    }

    fn how_scalar(&self, member: usize, source: &str) -> How {
        let same = self
            .origin
            .index(source)
            .is_some_and(|i| self.origin.tensors[i].shape == self.tensor(member).shape);
        if same { How::SameBytes } else { How::Reshaped }
    }

    fn bind_scalar(&mut self, idx: usize, name: &str, how: How) {
        let tensor = self.tensor(idx);
        let source = Source::Tensor { name: name.to_owned(), how };
        self.bound.insert(
            idx,
            vec![BoundTensor {
                name: tensor.name.clone(),
                shape: tensor.shape.clone(),
                element: tensor.element,
                place: tensor.place,
                source,
                merged: Vec::new(),
            }],
        );
    }

    /// Single values: by name, else by being too peculiar for a coincidence, else as an exponential.
    fn scalars(&mut self) {
        let scalars: Vec<(usize, f32)> = (0..self.graph.float_tensors().len())
            .filter(|&idx| self.tensor(idx).n_values() == 1 && self.tensor(idx).place != Place::Function)
            .map(|idx| (idx, self.tensor(idx).values()[0]))
            .collect();
        for &(idx, value) in &scalars {
            if let Some(name) = scalar_by_name(&self.tensor(idx).name, value, self.origin) {
                self.bind_scalar(idx, name, self.how_scalar(idx, name));
            } else if let Some(named) = self.origin.index(&self.tensor(idx).name) {
                let sources = vec![self.origin.tensors[named].name.clone()];
                self.constants.insert(idx, constant(self.tensor(idx), ConstantKind::Different, sources));
            }
        }
        let bound = self.bound_names();
        let free = || self.origin.tensors.iter().filter(|t| !bound.contains(&t.name));
        let mut n_equal: HashMap<u32, usize> = HashMap::new();
        for value in free().filter_map(|t| t.scalar) {
            *n_equal.entry(value.to_bits()).or_default() += 1;
        }
        for (tensor, value) in free().filter_map(|t| Some((t, t.scalar?))) {
            let unique = n_equal[&value.to_bits()] == 1;
            let holds = |is: &dyn Fn(f32) -> bool| -> Vec<usize> {
                scalars.iter().filter(|(i, v)| is(*v) && self.is_open(*i)).map(|(i, _)| *i).collect()
            };
            let same = holds(&|v| v.to_bits() == value.to_bits() && !is_common(value));
            let exponential =
                holds(&|v| value != 0.0 && v.is_finite() && (v - value.exp()).abs() <= 1e-6 * v.abs());
            match (same.as_slice(), exponential.as_slice()) {
                (&[idx], []) if unique && is_peculiar(value) => {
                    self.bind_scalar(idx, &tensor.name, self.how_scalar(idx, &tensor.name));
                }
                ([], &[idx]) if unique => self.bind_scalar(idx, &tensor.name, How::Exp),
                _ => {
                    for idx in same.into_iter().chain(exponential) {
                        let constant =
                            constant(self.tensor(idx), ConstantKind::Computed, vec![tensor.name.clone()]);
                        self.constants
                            .entry(idx)
                            .and_modify(|c| c.sources.push(tensor.name.clone()))
                            .or_insert(constant);
                    }
                }
            }
        }
    }

    fn recognized(&mut self) {
        let open = self.open();
        let kinds: Vec<_> = open
            .par_iter()
            .map(|&idx| {
                let (tensor, values) = (self.tensor(idx), self.tensor(idx).values());
                // A few values may be a slice of a weight, if they are not values that people write down.
                let slice = tensor.n_values() > 1 && values.iter().any(|&v| is_peculiar(v));
                recognize(&tensor.shape, &values).filter(|&kind| kind != ConstantKind::Small || !slice)
            })
            .collect();
        let bound = self.bound_names();
        for (idx, kind) in open.into_iter().zip(kinds) {
            let Some(kind) = kind else { continue };
            // A fill of one value can be computed from a weight only if that has one value as well.
            let sources = if kind == ConstantKind::Uniform {
                let uniform = self.origin.tensors.iter().filter(|t| t.uniform && t.scalar.is_none());
                let suspects = self.suspects(&bound, false);
                uniform.map(|t| t.name.clone()).filter(|n| suspects.contains(n)).collect()
            } else {
                Vec::new()
            };
            self.constants.insert(idx, constant(self.tensor(idx), kind, sources));
        }
    }

    fn by_rows(&mut self, weights: &dyn Weights) -> Result<(), GraphError> {
        let open = self.open();
        if open.is_empty() {
            return Ok(());
        }
        let tensors: Vec<&GraphTensor> = open.iter().map(|&idx| self.tensor(idx)).collect();
        let index = RowIndex::build(&tensors, self.origin, weights)?;
        for (idx, tensor) in open.into_iter().zip(tensors) {
            match index.look_up(tensor, self.origin) {
                Found::Runs { runs, transposed, merged } if tensor.place != Place::Function => {
                    let bound = BoundTensor {
                        name: tensor.name.clone(),
                        shape: tensor.shape.clone(),
                        element: tensor.element,
                        place: tensor.place,
                        source: Source::Rows { runs, transposed },
                        merged,
                    };
                    self.bound.insert(idx, vec![bound]);
                }
                Found::Runs { runs, .. } => {
                    let sources = runs.into_iter().map(|r| r.tensor).collect();
                    self.constants.insert(idx, constant(tensor, ConstantKind::Computed, sources));
                }
                Found::Ambiguous { tensors } => {
                    self.constants.insert(idx, constant(tensor, ConstantKind::Computed, tensors));
                }
                Found::Nothing => {}
            }
        }
        Ok(())
    }

    fn rest(&mut self, weights: &dyn Weights) -> Result<(), GraphError> {
        let bound = self.bound_names();
        let mut unexplained = Vec::new();
        for idx in self.open() {
            let tensor = self.tensor(idx);
            if let Some(name) = self.same_name_other_values(tensor, &bound) {
                self.constants.insert(idx, constant(tensor, ConstantKind::Different, vec![name]));
            } else if let Some(kind) = recognize(&tensor.shape, &tensor.values()) {
                self.constants.insert(idx, constant(tensor, kind, Vec::new()));
            } else if let Some(sources) = computed::sources(tensor, self.origin, weights)? {
                self.constants.insert(idx, constant(tensor, ConstantKind::Computed, sources));
            } else {
                unexplained.push(idx);
            }
        }
        // Tensors with a place of their own are under suspicion only where they are known to be used twice:
        // random matrices of position encodings.
        let matrices =
            self.origin.tensors.iter().filter(|t| {
                bound.contains(&t.name) && matches!(t.shape[..], [2, _]) && t.name.contains("pos")
            });
        let mut sources = self.suspects(&bound, false);
        sources.extend(matrices.map(|t| t.name.clone()));
        for idx in unexplained {
            self.constants
                .insert(idx, constant(self.tensor(idx), ConstantKind::Unexplained, sources.clone()));
        }
        Ok(())
    }

    fn same_name_other_values(&self, tensor: &GraphTensor, bound: &BTreeSet<String>) -> Option<String> {
        let free = |t: &&OriginTensor| !bound.contains(&t.name);
        let same_size = |t: &&OriginTensor| t.shape.iter().product::<usize>() == tensor.n_values();
        let candidates = self.origin.tensors.iter().filter(free).filter(same_size).map(|t| t.name.as_str());
        best_by_name(&tensor.name, candidates).map(str::to_owned)
    }

    /// Graph tensors of which nothing is known yet.
    fn open(&self) -> Vec<usize> {
        (0..self.graph.float_tensors().len()).filter(|&idx| self.is_open(idx)).collect()
    }

    fn is_open(&self, idx: usize) -> bool {
        !self.bound.contains_key(&idx) && !self.constants.contains_key(&idx)
    }

    fn bound_names(&self) -> BTreeSet<String> {
        let tensors = self.bound.values().flatten();
        tensors
            .flat_map(|t| t.source.tensors().into_iter().chain(t.merged.iter().map(String::as_str)))
            .map(str::to_owned)
            .collect()
    }

    fn suspects(&self, bound: &BTreeSet<String>, coarse: bool) -> Vec<String> {
        let all: Vec<&str> = self.origin.tensors.iter().map(|t| t.name.as_str()).collect();
        suspects(&all, &bound.iter().map(String::as_str).collect(), coarse)
    }

    fn finish(mut self) -> Binding {
        let bound = self.bound_names();
        let present = self.suspects(&bound, false);
        for (member, left) in std::mem::take(&mut self.shared) {
            if let Some(tensor) = self.bound.get_mut(&member).and_then(|t| t.first_mut()) {
                tensor.merged.extend(left.into_iter().filter(|name| present.contains(name)));
            }
        }
        let coarse = self.suspects(&bound, true);
        let mut constants: Vec<Constant> = self.constants.into_values().collect();
        constants.extend(self.graph.opaque_tensors().iter().map(|(name, dims)| Constant {
            name: name.clone(),
            shape: dims.iter().map(|&d| usize::try_from(d).unwrap_or(0)).collect(),
            kind: ConstantKind::Opaque,
            sources: coarse.clone(),
        }));
        for constant in &mut constants {
            constant.sources.sort_unstable();
            constant.sources.dedup();
        }
        let tensors: Vec<BoundTensor> = self.bound.into_values().flatten().collect();
        let mut used: BTreeSet<&str> = BTreeSet::new();
        for tensor in &tensors {
            used.extend(tensor.source.tensors());
            used.extend(tensor.merged.iter().map(String::as_str));
        }
        let mut named = used.clone();
        for constant in &constants {
            named.extend(constant.sources.iter().map(String::as_str));
            if matches!(constant.kind, ConstantKind::Computed | ConstantKind::Different) {
                used.extend(constant.sources.iter().map(String::as_str));
            }
        }
        let shape = |t: &OriginTensor| (t.name.clone(), t.shape.clone());
        let origin_shapes =
            self.origin.tensors.iter().filter(|t| named.contains(t.name.as_str())).map(shape).collect();
        let unused = self
            .origin
            .tensors
            .iter()
            .filter(|t| !used.contains(t.name.as_str()))
            .map(|t| t.name.clone())
            .collect();
        Binding { graph_digest: self.graph.digest(), unused, origin_shapes, constants, tensors }
    }
}

fn constant(tensor: &GraphTensor, kind: ConstantKind, sources: Vec<String>) -> Constant {
    Constant { name: tensor.name.clone(), shape: tensor.shape.clone(), kind, sources }
}

/// Values that graphs are full of, so that a scalar weight with such a value cannot be told from them.
fn is_common(value: f32) -> bool {
    [0.0, 0.5, 1.0, 2.0].contains(&value.abs())
}

/// A value that nobody writes down: it needs most of the bits of a mantissa.
fn is_peculiar(value: f32) -> bool {
    value.is_finite() && value.to_bits().trailing_zeros() < 12
}
