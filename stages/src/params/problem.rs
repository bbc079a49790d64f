//! A mistake in what the user wrote: where, what, and what was probably meant.

use super::Span;

/// One mistake. The application renders it with its file, line, column and source line.
#[derive(Clone, Debug, PartialEq)]
pub struct Problem {
    /// Stable, kebab-case: scripts and docs refer to it.
    pub code: &'static str,
    /// Lower-case fragment, names in backticks.
    pub message: String,
    pub span: Option<Span>,
    /// What to do about it.
    pub help: Option<String>,
}

impl Problem {
    pub fn new(code: &'static str, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), span: None, help: None }
    }

    #[must_use]
    pub fn at(mut self, span: Span) -> Self {
        self.span = Some(span);
        self
    }

    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }
}

/// Returns the candidate that `word` was probably meant to be, if one is near enough.
pub fn closest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let folded = word.to_lowercase().replace('_', "-");
    candidates
        .into_iter()
        .map(|candidate| {
            (strsim::jaro_winkler(&folded, &candidate.to_lowercase().replace('_', "-")), candidate)
        })
        .filter(|(likeness, _)| *likeness > 0.8)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}

/// Returns "did you mean `x`?", or the list of what there is.
pub fn did_you_mean<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str> + Clone) -> Option<String> {
    const LISTED: usize = 12;
    if let Some(best) = closest(word, candidates.clone()) {
        return Some(format!("did you mean `{best}`?"));
    }
    let mut all: Vec<String> = candidates.into_iter().map(|candidate| format!("`{candidate}`")).collect();
    if all.len() > LISTED {
        let n_more = all.len() - LISTED;
        all.truncate(LISTED);
        all.push(format!("and {n_more} more"));
    }
    (!all.is_empty()).then(|| format!("there is {}", all.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suggests_near_names_and_lists_far_ones() {
        assert_eq!(did_you_mean("methd", ["method", "scale"]).unwrap(), "did you mean `method`?");
        assert_eq!(
            did_you_mean("task_arithmetic", ["average", "task-arithmetic"]).unwrap(),
            "did you mean `task-arithmetic`?"
        );
        assert_eq!(did_you_mean("zzz", ["method", "scale"]).unwrap(), "there is `method`, `scale`");
        assert_eq!(did_you_mean("zzz", []), None);
    }
}
