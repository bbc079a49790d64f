//! From the names of one family to those of another, tensor by tensor.

use std::collections::{BTreeMap, BTreeSet};

use blake3::Hash;

use super::error::listed;
use super::family::{Form, Stored};
use super::pattern::Pattern;
use super::{Family, Identified, KeymapError, Placement};
use crate::DType;
use crate::dtype::TensorInfo;
use crate::error::Result;
use crate::manifest::{Content, Manifest};
use crate::views::Part;

/// Tensors of one checkpoint under the names of another family.
#[derive(Clone, Debug, PartialEq)]
pub struct Mapping {
    /// Sorted by name.
    pub tensors: Vec<(TensorInfo, Vec<Part>)>,
    /// Tensors for which the other family has no name, sorted.
    pub unmapped: Vec<String>,
    /// Buffers that mean nothing to the other family, sorted.
    pub ignored: Vec<String>,
}

/// Names to map to.
#[derive(Clone)]
pub struct Target<'a> {
    pub family: &'static Family,
    pub placement: Placement,
    /// The tensors of a checkpoint that has these names, if there is one: it decides where a family has several names for the
    /// same, and which copies are written.
    pub like: Option<&'a BTreeSet<&'a str>>,
}

impl Target<'_> {
    /// The names of a family as its table has them.
    pub fn of(family: &'static Family) -> Self {
        Self { family, placement: Placement::default(), like: None }
    }
}

impl Mapping {
    /// Describes the mapped tensors as a view of the artifact that they are taken from.
    pub fn manifest(&self, content: Content, artifact: Hash) -> Result<Manifest> {
        Manifest::mapped(content, artifact, self.tensors.clone())
    }

    /// Describes the mapped tensors as a view that contains the description of what they are taken from.
    pub fn view_of(&self, operand: Manifest) -> Result<Manifest> {
        self.manifest(operand.content(), operand.view_digest())?.with_views(vec![operand])
    }
}

/// Maps tensors to the names of another family of the same model. Of task vectors, what a fused tensor lacks is zero;
/// of anything else it is refused.
pub fn map(
    tensors: &[TensorInfo],
    content: Content,
    from: &Identified,
    to: &Target<'_>,
) -> Result<Mapping, KeymapError> {
    if from.family.model != to.family.model {
        let possible = super::FAMILIES.iter().filter(|family| family.model == from.family.model);
        return Err(KeymapError::OtherModel {
            from: from.family.id.to_owned(),
            to: to.family.id.to_owned(),
            possible: possible.map(|family| family.id).collect::<Vec<_>>().join(", "),
        });
    }
    let mut found = Found::read(tensors, from)?;
    let wanted = found.wanted(to);
    let mut mapped = Vec::with_capacity(wanted.len());
    for (name, (stored, captures)) in &wanted {
        let captures: Vec<&str> = captures.iter().map(String::as_str).collect();
        mapped.push(found.build(name, stored, &captures, content, from)?);
    }
    let Found { unmapped, ignored, .. } = found;
    Ok(Mapping { tensors: mapped, unmapped: unmapped.into_iter().collect(), ignored })
}

/// What a checkpoint holds, by role.
struct Found<'a> {
    pieces: BTreeMap<String, Piece<'a>>,
    unmapped: BTreeSet<String>,
    ignored: Vec<String>,
}

/// Where a role lies: the `index`-th of `count` equal parts of a tensor.
#[derive(Clone)]
struct Piece<'a> {
    info: &'a TensorInfo,
    index: usize,
    count: usize,
    transposed: bool,
    copy: bool,
    /// Shape of the role.
    shape: Vec<usize>,
}

/// A name to write, with the row of the table it comes from and what its placeholders stand for.
type Wanted = BTreeMap<String, (&'static Stored, Vec<String>)>;

impl<'a> Found<'a> {
    fn read(tensors: &'a [TensorInfo], from: &Identified) -> Result<Self, KeymapError> {
        let mut found = Self { pieces: BTreeMap::new(), unmapped: BTreeSet::new(), ignored: Vec::new() };
        for info in tensors {
            let canonical = from.placement.canonical(&info.name);
            let Some(canonical) = canonical else {
                found.unmapped.insert(info.name.clone());
                continue;
            };
            let rows = from.family.tensors.iter();
            let matched =
                rows.filter_map(|row| row.name.match_whole(&canonical).map(|captures| (row, captures)));
            let Some((row, captures)) = matched.into_iter().next() else {
                let ignored = from.family.ignored.iter().any(|name| name.match_whole(&canonical).is_some());
                if ignored {
                    found.ignored.push(info.name.clone());
                } else {
                    found.unmapped.insert(info.name.clone());
                }
                continue;
            };
            for (index, role) in row.roles.iter().enumerate() {
                found.add(role.fill(&captures), Piece::new(info, row, index)?)?;
            }
        }
        found.ignored.sort();
        Ok(found)
    }

    fn add(&mut self, role: String, piece: Piece<'a>) -> Result<(), KeymapError> {
        match self.pieces.get(&role) {
            Some(_) if piece.copy => {}
            Some(other) if !other.copy => {
                let (first, second) = (other.info.name.clone(), piece.info.name.clone());
                return Err(KeymapError::Collision { name: role, first, second });
            }
            _ => {
                self.pieces.insert(role, piece);
            }
        }
        Ok(())
    }

    /// The names that the found roles get, and, on the way, what gets none.
    fn wanted(&mut self, to: &Target<'_>) -> Wanted {
        let mut wanted = Wanted::new();
        for (role, piece) in &self.pieces {
            let mut named = Vec::new();
            let mut copies = Vec::new();
            for row in &to.family.tensors {
                let captures = row.roles.iter().find_map(|pattern: &Pattern| pattern.match_whole(role));
                let Some(captures) = captures else { continue };
                let Some(name) = to.placement.place(&row.name.fill(&captures)) else { continue };
                let captures = captures.into_iter().map(str::to_owned).collect();
                let into = if row.form == Form::Copy { &mut copies } else { &mut named };
                into.push((name, (row, captures)));
            }
            let present = |name: &String| to.like.is_none_or(|like| like.contains(name.as_str()));
            let chosen = named
                .iter()
                .position(|(name, _)| to.like.is_some() && present(name))
                .or_else(|| named.iter().position(|(_, (row, _))| row.form != Form::Alternative));
            match chosen {
                Some(chosen) => wanted.extend([named.swap_remove(chosen)]),
                None => {
                    self.unmapped.insert(piece.info.name.clone());
                }
            }
            wanted.extend(copies.into_iter().filter(|(name, _)| present(name)));
        }
        wanted
    }

    fn build(
        &self,
        name: &str,
        row: &Stored,
        captures: &[&str],
        content: Content,
        from: &Identified,
    ) -> Result<(TensorInfo, Vec<Part>), KeymapError> {
        let roles: Vec<String> = row.roles.iter().map(|role| role.fill(captures)).collect();
        let pieces: Vec<Option<&Piece<'_>>> = roles.iter().map(|role| self.pieces.get(role)).collect();
        let present: Vec<&Piece<'_>> = pieces.iter().copied().flatten().collect();
        if present.len() < pieces.len() && content != Content::TaskVectors {
            return Err(incomplete(name, &roles, &pieces, from));
        }
        let Some(first) = present.first() else {
            return Err(incomplete(name, &roles, &pieces, from));
        };
        let dtype = common_dtype(&present);
        let Some(dtype) = dtype.filter(|_| present.iter().all(|piece| piece.shape == first.shape)) else {
            let describe = |piece: &&Piece<'_>| {
                format!("`{}` ({} {:?})", piece.info.name, piece.info.dtype, piece.info.shape)
            };
            let parts = present.iter().map(describe).collect::<Vec<_>>().join(", ");
            return Err(KeymapError::PartsDiffer { tensor: name.to_owned(), parts });
        };
        let transposed = row.form == Form::Transposed;
        let mut shape = first.shape.clone();
        if transposed {
            if shape.len() != 2 {
                return Err(not_a_matrix(first.info));
            }
            shape.reverse();
        } else if pieces.len() > 1 {
            match shape.first_mut() {
                Some(rows) => *rows *= pieces.len(),
                None => return Err(no_first_axis(first.info)),
            }
        }
        let zeros = first.shape.iter().product();
        let mut parts: Vec<Part> = Vec::with_capacity(pieces.len());
        for piece in pieces {
            let part = match piece {
                Some(piece) => piece.part(transposed),
                None => Part::Zeros { elements: zeros },
            };
            append(&mut parts, part);
        }
        // What was cut apart and is whole again is the tensor itself.
        if let [Part::Rows { tensor, start: 0, end }] = &parts[..]
            && first.info.shape.first() == Some(end)
        {
            parts = vec![Part::Whole { tensor: tensor.clone() }];
        }
        Ok((TensorInfo { name: name.to_owned(), dtype, shape }, parts))
    }
}

impl<'a> Piece<'a> {
    fn new(info: &'a TensorInfo, row: &Stored, index: usize) -> Result<Self, KeymapError> {
        let count = row.roles.len();
        let transposed = row.form == Form::Transposed;
        let mut shape = info.shape.clone();
        if transposed {
            if shape.len() != 2 {
                return Err(not_a_matrix(info));
            }
            shape.reverse();
        } else if count > 1 {
            let rows = shape.first_mut().ok_or_else(|| no_first_axis(info))?;
            if !rows.is_multiple_of(count) {
                let expected = format!("{count} equal parts along its first axis");
                return Err(KeymapError::Shape {
                    tensor: info.name.clone(),
                    shape: info.shape.clone(),
                    expected,
                });
            }
            *rows /= count;
        }
        Ok(Self { info, index, count, transposed, copy: row.form == Form::Copy, shape })
    }

    fn part(&self, transposed: bool) -> Part {
        let tensor = self.info.name.clone();
        if self.count > 1 {
            let rows = self.shape[0];
            return Part::Rows { tensor, start: self.index * rows, end: (self.index + 1) * rows };
        }
        if self.transposed == transposed {
            Part::Whole { tensor }
        } else {
            Part::Columns { tensor, start: 0, end: self.info.shape[1] }
        }
    }
}

/// Adds a part, joining rows that continue the last ones.
fn append(parts: &mut Vec<Part>, part: Part) {
    if let (Some(Part::Rows { tensor, end, .. }), Part::Rows { tensor: next, start, end: new_end }) =
        (parts.last_mut(), &part)
        && tensor == next
        && end == start
    {
        *end = *new_end;
        return;
    }
    parts.push(part);
}

fn common_dtype(pieces: &[&Piece<'_>]) -> Option<DType> {
    let first = pieces.first()?.info.dtype;
    if pieces.iter().all(|piece| piece.info.dtype == first) {
        return Some(first);
    }
    pieces.iter().all(|piece| piece.info.dtype.is_float()).then_some(DType::F32)
}

fn incomplete(name: &str, roles: &[String], pieces: &[Option<&Piece<'_>>], from: &Identified) -> KeymapError {
    // What the checkpoint would call a role.
    let called = |role: &String| {
        let row = from.family.tensors.iter().find_map(|row| {
            let captures = row.roles.iter().find_map(|pattern| pattern.match_whole(role))?;
            from.placement.place(&row.name.fill(&captures))
        });
        row.unwrap_or_else(|| role.clone())
    };
    let missing: Vec<String> =
        roles.iter().zip(pieces).filter(|(_, piece)| piece.is_none()).map(|(role, _)| called(role)).collect();
    let needed: Vec<String> = roles.iter().map(called).collect();
    let verb = if missing.len() == 1 { "is" } else { "are" };
    KeymapError::Incomplete {
        tensor: name.to_owned(),
        needed: listed(needed.iter().map(String::as_str)),
        missing: format!("{} {verb}", listed(missing.iter().map(String::as_str))),
    }
}

fn not_a_matrix(info: &TensorInfo) -> KeymapError {
    let expected = "a matrix, as what is transposed must be".to_owned();
    KeymapError::Shape { tensor: info.name.clone(), shape: info.shape.clone(), expected }
}

fn no_first_axis(info: &TensorInfo) -> KeymapError {
    let expected = "something with a first axis, along which parts lie".to_owned();
    KeymapError::Shape { tensor: info.name.clone(), shape: info.shape.clone(), expected }
}
