//! `--set name=value` on the command line.
//!
//! Each becomes a text of its own, named `--set`, so that a mistake in it is shown like one in a file. Values are TOML; a bare word
//! that is none is a string. Commas outside brackets make an axis of a sweep: `bits=2,3`; a list has its brackets: `tasks=["a","b"]`.

use super::problems::Problems;
use super::source::Files;
use super::text;
use merganser_stages::params::{Node, Problem, Span};
use std::path::Path;

/// One `--set`: a single value sets a variable, several sweep it.
#[derive(Clone, Debug)]
pub(super) struct Override {
    pub(super) name: String,
    pub(super) name_span: Span,
    /// At least one.
    pub(super) values: Vec<Node>,
}

/// Reads the overrides in order. Of two for one variable the later holds, with a warning.
pub(super) fn read(
    arguments: &[String],
    folder: &Path,
    files: &mut Files,
    problems: &mut Problems,
) -> Vec<Override> {
    let mut overrides: Vec<Override> = Vec::new();
    for argument in arguments {
        let file = files.add("--set", argument.as_str(), folder);
        let Some(read) = read_one(argument, file, problems) else { continue };
        if let Some(index) = overrides.iter().position(|earlier| earlier.name == read.name) {
            let earlier = overrides.remove(index);
            let message = format!("a later `--set {argument}` replaces this");
            let help = format!("to sweep over both, write them in one: `--set {}=a,b`", read.name);
            problems.warning(Problem::new("replaced-override", message).at(earlier.name_span).help(help));
        }
        overrides.push(read);
    }
    overrides
}

fn read_one(argument: &str, file: u32, problems: &mut Problems) -> Option<Override> {
    let span = |start: usize, end: usize| Span { file, start: start as u32, end: end as u32 };
    let example = "write `--set bits=3`, `--set bits=2,3` or `--set 'tasks=[\"a\",\"b\"]'`";
    if u32::try_from(argument.len()).is_err() {
        problems.error(Problem::new("bad-override", "a `--set` of more than 4 GiB"));
        return None;
    }
    let Some(equals) = argument.find('=') else {
        let whole = span(0, argument.len());
        problems.error(Problem::new("bad-override", "expected `name=value`").at(whole).help(example));
        return None;
    };
    let name = text::trimmed(argument, 0..equals);
    let name_span = span(name.start, name.end);
    if name.is_empty() {
        problems.error(
            Problem::new("bad-override", "the name of a variable is missing before `=`")
                .at(span(0, equals))
                .help(example),
        );
        return None;
    }
    let mut values = Vec::new();
    let mut is_sound = true;
    for range in text::split_list(argument, equals + 1..argument.len()) {
        if range.is_empty() {
            let problem = Problem::new("bad-override", "a value is missing").at(span(range.start, range.end));
            problems.error(problem.help("the empty text is `\"\"`"));
            is_sound = false;
            continue;
        }
        match text::value_or_word(argument, range, file, problems) {
            Ok(node) => values.push(node),
            Err(problem) => {
                problems.error(Problem { code: "bad-override", ..problem });
                is_sound = false;
            }
        }
    }
    is_sound.then(|| Override { name: argument[name].to_owned(), name_span, values })
}

#[cfg(test)]
mod tests {
    use super::*;
    use merganser_stages::params::NodeValue;

    fn values(argument: &str) -> Result<Vec<NodeValue>, Vec<(&'static str, u32)>> {
        let (mut files, mut problems) = (Files::default(), Problems::default());
        let read = read(&[argument.to_owned()], Path::new(""), &mut files, &mut problems);
        let errors: Vec<_> = problems
            .into_errors()
            .into_iter()
            .map(|problem| (problem.code, problem.span.unwrap().start))
            .collect();
        if !errors.is_empty() {
            return Err(errors);
        }
        Ok(read.into_iter().flat_map(|read| read.values).map(|node| node.value).collect())
    }

    fn string(text: &str) -> NodeValue {
        NodeValue::String(text.to_owned())
    }

    #[test]
    fn reads_values_words_and_axes() {
        assert_eq!(values("bits=3").unwrap(), [NodeValue::Integer(3)]);
        assert_eq!(values("bits=2, 3").unwrap(), [NodeValue::Integer(2), NodeValue::Integer(3)]);
        assert_eq!(values("mode=fast").unwrap(), [string("fast")]);
        assert_eq!(values("mode=fast,slow").unwrap(), [string("fast"), string("slow")]);
        assert_eq!(values("path=data/a=b.toml").unwrap(), [string("data/a=b.toml")]);
        assert_eq!(values("name=\"a,b\"").unwrap(), [string("a,b")]);
        assert_eq!(values("on=true").unwrap(), [NodeValue::Bool(true)]);
        let lists = values("tasks=[\"a\",\"b\"],[\"c\"]").unwrap();
        assert!(matches!(&lists[..], [NodeValue::Array(first), NodeValue::Array(_)] if first.len() == 2));
    }

    #[test]
    fn points_at_the_mistake() {
        assert_eq!(values("bits").unwrap_err(), [("bad-override", 0)]);
        assert_eq!(values("=3").unwrap_err(), [("bad-override", 0)]);
        assert_eq!(values("bits=").unwrap_err(), [("bad-override", 5)]);
        assert_eq!(values("bits=2,,3,").unwrap_err(), [("bad-override", 7), ("bad-override", 10)]);
        assert_eq!(values("tasks=[1,2").unwrap_err(), [("bad-override", 10)]);
        assert_eq!(values("x=1e999").unwrap_err(), [("bad-number", 2)]);
    }

    #[test]
    fn lets_the_later_one_hold_with_a_warning() {
        let (mut files, mut problems) = (Files::default(), Problems::default());
        let read = read(&["a=1".into(), "a=2".into()], Path::new(""), &mut files, &mut problems);
        assert_eq!(read.len(), 1);
        assert_eq!(read[0].values[0].value, NodeValue::Integer(2));
        assert_eq!(problems.into_warnings()[0].code, "replaced-override");
    }
}
