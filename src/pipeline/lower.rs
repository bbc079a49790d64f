//! From TOML text to a tree of [`Node`]s that remember where they were written.
//!
//! The parser recovers from mistakes, so one pass reports several. One mistake often upsets it more than once (an array that is
//! never closed swallows what follows): per line only the first complaint is kept, and none from inside what was swallowed.
//!
//! What no parameter can be is refused here: dates, integers beyond 64 bits, infinities, not-a-number.

use super::problems::Problems;
use merganser_stages::params::{Entry, Node, NodeValue, Problem, Span, Table, closest};
use std::ops::Range;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// A file's tree.
#[derive(Debug)]
pub(super) struct Lowered {
    pub(super) table: Table,
    /// False when a syntax error makes the tree unfit for further conclusions.
    pub(super) is_sound: bool,
}

/// Parses a whole file.
pub(super) fn document(text: &str, file: u32, problems: &mut Problems) -> Lowered {
    let (parsed, errors) = DeTable::parse_recoverable(text);
    let complaints = complaints(text, parsed.get_ref(), &errors);
    let mut lowering = Lowering { text, file, offset: 0, unquoted: Vec::new(), problems };
    let mut is_sound = true;
    for complaint in complaints {
        is_sound &= complaint.is_harmless;
        let span = lowering.span(complaint.range.clone());
        lowering.unquoted.push(complaint.range);
        lowering.problems.poison(Problem {
            code: complaint.code,
            message: complaint.message,
            span: Some(span),
            help: complaint.help,
        });
    }
    let table = lowering.table(parsed.get_ref());
    Lowered { table, is_sound }
}

/// Parses `text[range]` as one value.
pub(super) fn value(
    text: &str,
    range: Range<usize>,
    file: u32,
    problems: &mut Problems,
) -> Result<Node, Problem> {
    let (offset, piece) = (range.start, &text[range]);
    let mut lowering = Lowering { text, file, offset, unquoted: Vec::new(), problems };
    match DeValue::parse(piece) {
        Ok(parsed) => Ok(lowering.node(&parsed)),
        Err(error) => {
            let span = lowering.span(error.span().unwrap_or(0..piece.len()));
            Err(Problem::new("syntax", error.message()).at(span))
        }
    }
}

/// What the parser found wrong, in our words.
struct Complaint {
    code: &'static str,
    message: String,
    help: Option<String>,
    range: Range<usize>,
    /// Whether the tree can still be trusted around it.
    is_harmless: bool,
}

fn complaints(text: &str, root: &DeTable<'_>, errors: &[toml::de::Error]) -> Vec<Complaint> {
    let mut complaints: Vec<Complaint> = errors.iter().map(|error| explain(text, root, error)).collect();
    complaints.sort_by_key(|complaint| complaint.range.start);
    let mut kept: Vec<Complaint> = Vec::new();
    let mut last_line = None;
    let mut repeated_until = 0;
    for complaint in complaints {
        if complaint.code == "duplicate-key" {
            // Keys below a repeated `[header]` are not further mistakes.
            if complaint.range.start < repeated_until {
                continue;
            }
            repeated_until = end_of_repeated_table(text, complaint.range.start);
        }
        let line = text[..complaint.range.start].rfind('\n');
        if last_line == Some(line) {
            continue;
        }
        last_line = Some(line);
        let swallows_the_rest = complaint.message.contains("never closed");
        kept.push(complaint);
        if swallows_the_rest {
            break;
        }
    }
    kept
}

/// Returns where the table ends whose header is at `start`; `start` itself if that is no header.
fn end_of_repeated_table(text: &str, start: usize) -> usize {
    let line_start = text[..start].rfind('\n').map_or(0, |newline| newline + 1);
    if !text[line_start..start].trim_start().starts_with('[') {
        return start;
    }
    text[start..].find("\n[").map_or(text.len(), |newline| start + newline)
}

fn explain(text: &str, root: &DeTable<'_>, error: &toml::de::Error) -> Complaint {
    let range = error.span().unwrap_or_default();
    let range = clamp(text, range);
    let written = text[range.clone()].trim();
    let message = error.message();
    let complaint = |code, message: String, help, is_harmless| Complaint {
        code,
        message,
        help,
        range: range.clone(),
        is_harmless,
    };
    if message == "duplicate key" {
        return complaint("duplicate-key", format!("`{written}` is given a second time"), None, true);
    }
    if message.starts_with("cannot extend value") {
        return complaint(
            "duplicate-key",
            format!("`{written}` already has a value that is no table"),
            None,
            true,
        );
    }
    let is_unclosed = message.starts_with("unclosed array") || message.starts_with("unclosed inline table");
    if let Some(opening) = opening_of(root, range.start).filter(|_| is_unclosed) {
        let what = if message.contains("array") { "array" } else { "table" };
        let complaint = complaint("syntax", format!("this {what} is never closed"), None, false);
        return Complaint { range: opening..opening + 1, ..complaint };
    }
    if message.starts_with("string values must be quoted") || message.starts_with("invalid boolean") {
        if written.is_empty() {
            return complaint("syntax", "a value is missing".to_owned(), None, false);
        }
        let help = match closest(written, ["true", "false"]) {
            Some(boolean) => format!("did you mean `{boolean}`?"),
            None => format!("text needs quotes: `\"{written}\"`"),
        };
        return complaint("syntax", format!("`{written}` is no value"), Some(help), true);
    }
    if written.is_empty() && message.starts_with("invalid literal string") {
        return complaint("syntax", "a value is missing".to_owned(), None, false);
    }
    complaint("syntax", message.to_owned(), None, false)
}

/// Finds where the innermost array or inline table starts that ends at `end`.
fn opening_of(table: &DeTable<'_>, end: usize) -> Option<usize> {
    fn search(value: &Spanned<DeValue<'_>>, end: usize) -> Option<usize> {
        let span = value.span();
        let inner = match value.get_ref() {
            DeValue::Array(items) => items.iter().filter_map(|item| search(item, end)).max(),
            DeValue::Table(table) => opening_of(table, end),
            _ => return None,
        };
        inner.or((span.end == end && span.end > span.start).then_some(span.start))
    }
    table.values().filter_map(|value| search(value, end)).max()
}

fn clamp(text: &str, range: Range<usize>) -> Range<usize> {
    let mut start = range.start.min(text.len());
    while !text.is_char_boundary(start) {
        start -= 1;
    }
    let mut end = range.end.clamp(start, text.len());
    while !text.is_char_boundary(end) {
        end += 1;
    }
    start..end
}

struct Lowering<'a> {
    text: &'a str,
    file: u32,
    /// Where the parsed piece starts in `text`.
    offset: usize,
    /// Values that were meant as text but lack their quotes.
    unquoted: Vec<Range<usize>>,
    problems: &'a mut Problems,
}

impl Lowering<'_> {
    fn span(&self, range: Range<usize>) -> Span {
        Span {
            file: self.file,
            start: (self.offset + range.start) as u32,
            end: (self.offset + range.end) as u32,
        }
    }

    fn table(&mut self, table: &DeTable<'_>) -> Table {
        let mut entries: Vec<_> = table.iter().collect();
        // The parser sorts keys by name; everything here wants the order of the file.
        entries.sort_by_key(|(key, _)| key.span().start);
        entries
            .into_iter()
            .map(|(key, value)| {
                let entry = Entry { key_span: self.span(key.span()), node: self.node(value) };
                (key.get_ref().clone().into_owned(), entry)
            })
            .collect()
    }

    fn node(&mut self, value: &Spanned<DeValue<'_>>) -> Node {
        let range = value.span();
        let span = self.span(range.clone());
        let written = || self.text.get(span.start as usize..span.end as usize).unwrap_or_default();
        let value = match value.get_ref() {
            _ if !range.is_empty() && self.unquoted.contains(&range) => {
                NodeValue::String(written().to_owned())
            }
            DeValue::String(text) => NodeValue::String(text.clone().into_owned()),
            DeValue::Boolean(value) => NodeValue::Bool(*value),
            DeValue::Integer(integer) => {
                let value = i64::from_str_radix(integer.as_str(), integer.radix());
                if value.is_err() {
                    let message = format!("`{}` does not fit in 64 bits", written());
                    self.refuse(span, "bad-number", message, None);
                }
                NodeValue::Integer(value.unwrap_or_default())
            }
            DeValue::Float(float) => match float.as_str().parse::<f64>() {
                Ok(value) if value.is_finite() => NodeValue::Float(value),
                _ => {
                    let message = format!("`{}` is not a finite number", written());
                    self.refuse(span, "bad-number", message, None);
                    NodeValue::Float(0.0)
                }
            },
            DeValue::Datetime(_) => {
                let text = written().to_owned();
                let help = format!("text needs quotes: `\"{text}\"`");
                self.refuse(span, "date", "no parameter is a date".to_owned(), Some(help));
                NodeValue::String(text)
            }
            DeValue::Array(items) => NodeValue::Array(items.iter().map(|item| self.node(item)).collect()),
            DeValue::Table(table) => NodeValue::Table(self.table(table)),
        };
        Node { span, value }
    }

    fn refuse(&mut self, span: Span, code: &'static str, message: String, help: Option<String>) {
        self.problems.poison(Problem { code, message, span: Some(span), help });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lowered(text: &str) -> (Lowered, Vec<Problem>) {
        let mut problems = Problems::default();
        let lowered = document(text, 0, &mut problems);
        (lowered, problems.into_errors())
    }

    /// The codes, the text they point to, and whether the tree could be trusted.
    fn mistakes(text: &str) -> (Vec<(&'static str, String, &str)>, bool) {
        let (lowered, problems) = lowered(text);
        let seen = problems
            .into_iter()
            .map(|problem| {
                let span = problem.span.unwrap();
                (problem.code, problem.message, &text[span.start as usize..span.end as usize])
            })
            .collect();
        (seen, lowered.is_sound)
    }

    #[test]
    fn keeps_the_order_of_the_file_and_every_span() {
        let text = "z = 1\na.b = [true, 0x1F]\n[m]\nq = { x = 1.5 }\n[[r]]\nk = 'v'\n[[r]]\n";
        let (lowered, problems) = lowered(text);
        assert_eq!(problems, []);
        assert_eq!(lowered.table.keys().collect::<Vec<_>>(), ["z", "a", "m", "r"]);
        let b = &lowered.table["a"].node.as_table().unwrap()["b"];
        let at = |span: Span| &text[span.start as usize..span.end as usize];
        assert_eq!((at(b.key_span), at(b.node.span)), ("b", "[true, 0x1F]"));
        let NodeValue::Array(items) = &b.node.value else { panic!("b is an array") };
        assert_eq!((&items[1].value, at(items[1].span)), (&NodeValue::Integer(31), "0x1F"));
        assert_eq!(at(lowered.table["m"].node.span), "[m]");
        let NodeValue::Array(tables) = &lowered.table["r"].node.value else { panic!("r is an array") };
        assert_eq!(tables.len(), 2);
    }

    #[test]
    fn reports_several_syntax_errors_at_their_places() {
        let (seen, is_sound) = mistakes("a = \nb = 'x' y\n[t\nc = 1\n");
        assert!(!is_sound);
        let places: Vec<_> = seen.iter().map(|(code, message, _)| (*code, message.as_str())).collect();
        assert_eq!(
            places,
            [
                ("syntax", "a value is missing"),
                ("syntax", "unexpected key or value, expected newline, `#`"),
                ("syntax", "unclosed table, expected `]`"),
            ]
        );
    }

    #[test]
    fn blames_an_unclosed_array_on_its_bracket_alone() {
        let (seen, _) = mistakes("x = tru\na = [1, 2\nb = 3\nc = 4\n");
        let places: Vec<_> = seen.iter().map(|(_, message, at)| (message.as_str(), *at)).collect();
        assert_eq!(places, [("`tru` is no value", "tru"), ("this array is never closed", "[")]);
    }

    #[test]
    fn reads_on_after_missing_quotes_and_duplicates() {
        let (lowered, problems) = lowered("mode = tall\nname = two words\nname = 'x'\n");
        assert!(lowered.is_sound);
        assert_eq!(lowered.table["mode"].node.as_str(), Some("tall"));
        let seen: Vec<_> = problems.iter().map(|problem| (problem.code, problem.help.as_deref())).collect();
        assert_eq!(
            seen,
            [
                ("syntax", Some("text needs quotes: `\"tall\"`")),
                ("syntax", Some("text needs quotes: `\"two words\"`")),
                ("duplicate-key", None)
            ]
        );
    }

    #[test]
    fn refuses_what_no_parameter_can_be() {
        let (seen, is_sound) = mistakes(
            "a = 9223372036854775808\nb = -inf\nc = nan\nd = 1e400\ne = 2020-01-01\nf = 9223372036854775807\n",
        );
        assert!(is_sound);
        let codes: Vec<_> = seen.iter().map(|(code, _, at)| (*code, *at)).collect();
        assert_eq!(
            codes,
            [
                ("bad-number", "9223372036854775808"),
                ("bad-number", "-inf"),
                ("bad-number", "nan"),
                ("bad-number", "1e400"),
                ("date", "2020-01-01")
            ]
        );
    }

    #[test]
    fn stands_deep_nesting() {
        let text = format!("a = {}{}", "[".repeat(5000), "]".repeat(5000));
        assert!(!lowered(&text).0.is_sound);
    }
}
