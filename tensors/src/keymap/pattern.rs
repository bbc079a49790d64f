//! Patterns of tensor names: dot-separated segments, of which `{n}` stands for a number and `{p}` for `weight` or `bias`.

/// A parsed pattern.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pattern {
    segments: Vec<Segment>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Segment {
    Literal(String),
    Number,
    Parameter,
}

/// What the placeholders of a pattern stood for, in order.
pub(crate) type Captures<'a> = Vec<&'a str>;

impl Pattern {
    pub(crate) fn new(text: &str) -> Self {
        let segments = text.split('.').map(|segment| match segment {
            "{n}" => Segment::Number,
            "{p}" => Segment::Parameter,
            literal => Segment::Literal(literal.to_owned()),
        });
        Self { segments: segments.collect() }
    }

    /// Matches the last segments of a name; returns what comes before them (empty, or ending in a dot).
    pub(crate) fn match_end<'a>(&self, name: &'a str) -> Option<(&'a str, Captures<'a>)> {
        let mut rest = Some(name);
        let mut captures = Vec::new();
        for segment in self.segments.iter().rev() {
            let (before, last) = match rest?.rsplit_once('.') {
                Some((before, last)) => (Some(before), last),
                None => (None, rest?),
            };
            if !segment.matches(last) {
                return None;
            }
            if !matches!(segment, Segment::Literal(_)) {
                captures.push(last);
            }
            rest = before;
        }
        captures.reverse();
        let prefix = rest.map_or(0, |rest| rest.len() + 1);
        Some((&name[..prefix], captures))
    }

    /// The last two segments of the names that it matches, when they can be listed.
    pub(crate) fn ends(&self) -> Option<Vec<[&str; 2]>> {
        let [.., second, last] = &self.segments[..] else { return None };
        let (second, last) = (second.choices()?, last.choices()?);
        Some(second.iter().flat_map(|second| last.iter().map(move |last| [*second, *last])).collect())
    }

    /// Matches a whole name.
    pub(crate) fn match_whole<'a>(&self, name: &'a str) -> Option<Captures<'a>> {
        self.match_end(name).filter(|(before, _)| before.is_empty()).map(|(_, captures)| captures)
    }

    /// Writes the name in which the placeholders stand for `captures`.
    pub(crate) fn fill(&self, captures: &[&str]) -> String {
        let mut captures = captures.iter();
        let filled: Vec<&str> = self
            .segments
            .iter()
            .map(|segment| match segment {
                Segment::Literal(literal) => literal.as_str(),
                // INVARIANT: patterns of one entry have the same placeholders; a test of the tables holds them to it.
                Segment::Number | Segment::Parameter => captures.next().copied().unwrap_or_default(),
            })
            .collect();
        filled.join(".")
    }

    /// The pattern without a leading `root` (which ends in a dot).
    pub(crate) fn without_root(&self, root: &str) -> Option<Self> {
        let root: Vec<&str> = root.trim_end_matches('.').split('.').collect();
        let begins = self.segments.len() > root.len()
            && self.segments.iter().zip(&root).all(|(segment, root)| segment.matches_literally(root));
        begins.then(|| Self { segments: self.segments[root.len()..].to_vec() })
    }

    /// The placeholders in order, for checks of the tables.
    #[cfg(test)]
    pub(crate) fn placeholders(&self) -> String {
        let kind = |segment: &Segment| match segment {
            Segment::Literal(_) => None,
            Segment::Number => Some('n'),
            Segment::Parameter => Some('p'),
        };
        self.segments.iter().filter_map(kind).collect()
    }
}

impl Segment {
    fn matches(&self, text: &str) -> bool {
        match self {
            Self::Literal(literal) => literal == text,
            Self::Number => !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()),
            Self::Parameter => text == "weight" || text == "bias",
        }
    }

    /// All texts that it matches, unless there are too many to list.
    fn choices(&self) -> Option<Vec<&str>> {
        match self {
            Self::Literal(literal) => Some(vec![literal]),
            Self::Number => None,
            Self::Parameter => Some(vec!["weight", "bias"]),
        }
    }

    fn matches_literally(&self, text: &str) -> bool {
        matches!(self, Self::Literal(literal) if literal == text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_ends_of_names_and_fills_in_what_it_found() {
        let pattern = Pattern::new("blocks.{n}.attn.{p}");
        assert_eq!(pattern.match_end("blocks.12.attn.bias"), Some(("", vec!["12", "bias"])));
        assert_eq!(pattern.match_end("a.b.blocks.0.attn.weight"), Some(("a.b.", vec!["0", "weight"])));
        for other in [
            "xblocks.1.attn.bias",
            "blocks.x.attn.bias",
            "blocks.1.attn.scale",
            "attn.bias",
            "",
            "blocks..attn.bias",
        ] {
            assert_eq!(pattern.match_end(other), None, "{other}");
        }
        assert_eq!(pattern.match_whole("a.blocks.0.attn.weight"), None);
        assert_eq!(pattern.fill(&["12", "bias"]), "blocks.12.attn.bias");
    }

    #[test]
    fn ends_are_listed_where_there_are_few() {
        let ends = |pattern: &str| Pattern::new(pattern).ends().map(|ends| ends.len());
        assert_eq!(Pattern::new("a.b.c").ends(), Some(vec![["b", "c"]]));
        assert_eq!(Pattern::new("b.{p}").ends(), Some(vec![["b", "weight"], ["b", "bias"]]));
        assert_eq!((ends("a"), ends("a.{n}"), ends("{n}.{p}")), (None, None, None));
    }

    #[test]
    fn roots_are_whole_segments() {
        let pattern = Pattern::new("visual.ln_pre.{p}");
        assert_eq!(pattern.without_root("visual."), Some(Pattern::new("ln_pre.{p}")));
        assert_eq!(pattern.without_root("vis."), None);
        assert_eq!(Pattern::new("visual").without_root("visual."), None);
    }
}
