//! The texts that a pipeline is written in, and how mistakes in them are shown.
//!
//! The main file, every included file and every `--set` is a [`SourceFile`], so that each mistake has a line and a column.
//! Nothing is printed here and no environment is read: whether to use colour, and how wide the terminal is, is passed in.

use merganser_stages::params::{Problem, Span};
use miette::{
    Diagnostic, GraphicalReportHandler, GraphicalTheme, LabeledSpan, MietteError, MietteSpanContents,
    Severity, SourceCode, SourceSpan, SpanContents, ThemeCharacters, ThemeStyles,
};
use serde::Serialize;
use std::fmt::{self, Display, Write};
use std::path::PathBuf;

/// One text that the pipeline is written in.
#[derive(Clone, Debug)]
pub struct SourceFile {
    /// As messages name it: the path as the user gave it, or `--set`.
    pub name: String,
    pub text: String,
    /// What relative paths in it start from.
    pub folder: PathBuf,
}

/// All texts of a pipeline; [`Span::file`] is an index into them.
#[derive(Clone, Debug, Default)]
pub struct Files {
    files: Vec<SourceFile>,
}

/// How diagnostics are drawn.
#[derive(Clone, Copy, Debug)]
pub struct RenderStyle {
    pub color: bool,
    /// Box-drawing characters instead of ASCII.
    pub unicode: bool,
    /// Columns to wrap at.
    pub width: usize,
}

/// A line and a column, both counted from 1; columns are characters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Location {
    pub file: String,
    pub line: usize,
    pub column: usize,
}

/// A problem as `--json` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ProblemReport {
    pub code: String,
    pub message: String,
    pub file: Option<String>,
    pub line: Option<usize>,
    pub column: Option<usize>,
    pub help: Option<String>,
}

impl Files {
    /// Adds a text and returns its index for spans.
    pub(super) fn add(
        &mut self,
        name: impl Into<String>,
        text: impl Into<String>,
        folder: impl Into<PathBuf>,
    ) -> u32 {
        self.files.push(SourceFile { name: name.into(), text: text.into(), folder: folder.into() });
        (self.files.len() - 1) as u32
    }

    /// Returns the text that a span points into.
    pub fn get(&self, file: u32) -> Option<&SourceFile> {
        self.files.get(file as usize)
    }

    /// Returns, per file, the folder that relative paths start from.
    pub(super) fn folders(&self) -> Vec<PathBuf> {
        self.files.iter().map(|file| file.folder.clone()).collect()
    }

    /// Finds the file, line and column where a span starts.
    pub fn locate(&self, span: Span) -> Option<Location> {
        let file = self.get(span.file)?;
        let place = Place::find(&file.text, span);
        Some(Location { file: file.name.clone(), line: place.line, column: place.column })
    }

    /// Returns a problem in the form that `--json` prints.
    pub fn report(&self, problem: &Problem) -> ProblemReport {
        let location = problem.span.and_then(|span| self.locate(span));
        ProblemReport {
            code: problem.code.to_owned(),
            message: problem.message.clone(),
            line: location.as_ref().map(|location| location.line),
            column: location.as_ref().map(|location| location.column),
            file: location.map(|location| location.file),
            help: problem.help.clone(),
        }
    }

    /// Draws errors in the order of files and positions, each with its source line, and a closing count.
    pub fn render(&self, problems: &[Problem], style: RenderStyle) -> String {
        self.draw(problems, Severity::Error, style)
    }

    /// Draws warnings like [`render`](Self::render) draws errors.
    pub fn render_warnings(&self, problems: &[Problem], style: RenderStyle) -> String {
        self.draw(problems, Severity::Warning, style)
    }

    fn draw(&self, problems: &[Problem], severity: Severity, style: RenderStyle) -> String {
        if problems.is_empty() {
            return String::new();
        }
        let theme = GraphicalTheme {
            characters: if style.unicode { ThemeCharacters::unicode() } else { ThemeCharacters::ascii() },
            styles: if style.color { ThemeStyles::ansi() } else { ThemeStyles::none() },
        };
        // Wrapped here instead: the handler would break names at their hyphens.
        let handler = GraphicalReportHandler::new_themed(theme)
            .with_width(style.width)
            .with_wrap_lines(false)
            .with_links(false)
            .without_syntax_highlighting();
        let mut ordered: Vec<&Problem> = problems.iter().collect();
        ordered.sort_by_key(|problem| problem.span);
        let mut out = String::new();
        for problem in ordered {
            let drawn = Drawn::new(problem, self, severity, style.width);
            handler.render_report(&mut out, &drawn).expect("writing to a string does not fail");
            out.push('\n');
        }
        let noun = if severity == Severity::Error { "error" } else { "warning" };
        let plural = if problems.len() == 1 { "" } else { "s" };
        writeln!(out, "{} {noun}{plural}", problems.len()).expect("writing to a string does not fail");
        out
    }
}

/// The line that a span starts on, cut to that line.
struct Place<'a> {
    line: usize,
    column: usize,
    text: &'a str,
    /// Byte range of the span within `text`.
    start: usize,
    end: usize,
}

impl<'a> Place<'a> {
    fn find(text: &'a str, span: Span) -> Self {
        let start = floor_boundary(text, span.start as usize);
        let line_start = text[..start].rfind('\n').map_or(0, |newline| newline + 1);
        let line_end = text[start..].find('\n').map_or(text.len(), |newline| start + newline);
        let line_text = text[line_start..line_end].trim_end_matches('\r');
        let start_in_line = (start - line_start).min(line_text.len());
        let end = floor_boundary(text, (span.end as usize).max(start));
        Self {
            line: text[..line_start].matches('\n').count() + 1,
            column: line_text[..start_in_line].trim_start_matches('\u{feff}').chars().count() + 1,
            text: line_text,
            start: start_in_line,
            end: (end - line_start).clamp(start_in_line, line_text.len()),
        }
    }
}

fn floor_boundary(text: &str, index: usize) -> usize {
    let mut index = index.min(text.len());
    while !text.is_char_boundary(index) {
        index -= 1;
    }
    index
}

/// A problem as the drawing handler wants it.
#[derive(Debug)]
struct Drawn {
    code: &'static str,
    message: String,
    help: Option<String>,
    severity: Severity,
    snippet: Option<Snippet>,
}

/// The one line that is shown. It is its own source code: a file's other lines never matter, and a line of a megabyte, or one
/// with control characters in it, is made presentable first.
#[derive(Debug)]
struct Snippet {
    name: String,
    line: usize,
    column: usize,
    text: String,
    start: usize,
    end: usize,
}

/// Characters of a line that are shown before and after its span.
const CONTEXT_CHARS: usize = 120;

impl Snippet {
    fn new(name: &str, place: &Place<'_>) -> Self {
        let before: Vec<char> = place.text[..place.start].chars().rev().take(CONTEXT_CHARS).collect();
        let mut text: String = before.into_iter().rev().map(presentable).collect();
        let start = text.len();
        text.extend(place.text[place.start..place.end].chars().take(CONTEXT_CHARS).map(presentable));
        let end = text.len();
        text.extend(place.text[place.end..].chars().take(CONTEXT_CHARS).map(presentable));
        if start == text.len() {
            // A place after the end of the line still needs a column to point at.
            text.push(' ');
        }
        Self { name: name.to_owned(), line: place.line, column: place.column, text, start, end }
    }
}

fn presentable(character: char) -> char {
    if character == '\t' {
        ' '
    } else if character.is_control() || character == '\u{feff}' {
        '?'
    } else {
        character
    }
}

impl SourceCode for Snippet {
    fn read_span<'a>(
        &'a self,
        _: &SourceSpan,
        _: usize,
        _: usize,
    ) -> Result<Box<dyn SpanContents<'a> + 'a>, MietteError> {
        let span = SourceSpan::from((0, self.text.len()));
        let (line, column) = (self.line - 1, self.column - 1);
        Ok(Box::new(MietteSpanContents::new_named(
            self.name.clone(),
            self.text.as_bytes(),
            span,
            line,
            column,
            1,
        )))
    }
}

impl Drawn {
    fn new(problem: &Problem, files: &Files, severity: Severity, width: usize) -> Self {
        let snippet = problem.span.and_then(|span| {
            let file = files.get(span.file)?;
            Some(Snippet::new(&file.name, &Place::find(&file.text, span)))
        });
        Self {
            code: problem.code,
            message: wrap(&problem.message, width.saturating_sub(4)),
            help: problem.help.as_deref().map(|help| wrap(help, width.saturating_sub(8))),
            severity,
            snippet,
        }
    }
}

/// Breaks text at spaces only.
fn wrap(text: &str, width: usize) -> String {
    let mut out = String::with_capacity(text.len());
    for (index, line) in text.lines().enumerate() {
        if index > 0 {
            out.push('\n');
        }
        let mut column = 0;
        for word in line.split(' ') {
            let length = word.chars().count();
            if column > 0 {
                let fits = column + 1 + length <= width.max(20);
                out.push(if fits { ' ' } else { '\n' });
                column = if fits { column + 1 } else { 0 };
            }
            out.extend(word.chars().map(presentable));
            column += length;
        }
    }
    out
}

impl Display for Drawn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Drawn {}

impl Diagnostic for Drawn {
    fn code<'a>(&'a self) -> Option<Box<dyn Display + 'a>> {
        Some(Box::new(self.code))
    }

    fn severity(&self) -> Option<Severity> {
        Some(self.severity)
    }

    fn help<'a>(&'a self) -> Option<Box<dyn Display + 'a>> {
        self.help.as_ref().map(|help| Box::new(help) as Box<dyn Display>)
    }

    fn source_code(&self) -> Option<&dyn SourceCode> {
        self.snippet.as_ref().map(|snippet| snippet as &dyn SourceCode)
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        let snippet = self.snippet.as_ref()?;
        Some(Box::new(std::iter::once(LabeledSpan::underline((snippet.start, snippet.end - snippet.start)))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: RenderStyle = RenderStyle { color: false, unicode: false, width: 80 };

    fn files(text: &str) -> Files {
        let mut files = Files::default();
        files.add("p.toml", text, "");
        files
    }

    fn at(start: u32, end: u32) -> Problem {
        Problem::new("unknown-key", "unknown key `b`").at(Span { file: 0, start, end })
    }

    #[test]
    fn shows_place_line_code_and_help() {
        let drawn = files("a = 1\nb = 2\n").render(&[at(6, 7).help("did you mean `a`?")], PLAIN);
        let expected = "unknown-key\n\n  x unknown key `b`\n   ,-[p.toml:2:1]\n 2 | b = 2\n   : ^\n   `----\n  help: did you mean `a`?\n\n1 error\n";
        assert_eq!(drawn, expected);
    }

    #[test]
    fn counts_columns_in_characters() {
        let files = files("\u{feff}ü = \"é\" # x\r\ny");
        assert_eq!(files.locate(Span { file: 0, start: 8, end: 9 }).unwrap().column, 5);
        assert_eq!(
            files.locate(Span { file: 0, start: 18, end: 19 }).unwrap(),
            Location { file: "p.toml".into(), line: 2, column: 1 }
        );
    }

    #[test]
    fn draws_any_place_of_any_text() {
        for text in ["", "\n", "a", "a\n\n", "\u{feff}", "é\r\nx\ty\u{1b}[31m", &"long ".repeat(1000)] {
            let files = files(text);
            for start in 0..12 {
                for end in [start, start + 1, start + 900, 0] {
                    let drawn = files.render(&[at(start, end)], RenderStyle { width: 1, ..PLAIN });
                    assert!(drawn.contains("p.toml:"), "{text:?} {start}..{end}: {drawn}");
                    assert!(
                        !drawn.contains('\u{1b}'),
                        "a file must not send escape sequences to the terminal"
                    );
                    assert!(drawn.lines().all(|line| line.len() < 400));
                }
            }
        }
    }

    #[test]
    fn survives_a_span_of_no_file() {
        let drawn = files("").render(&[Problem::new("x", "y").at(Span { file: 9, start: 0, end: 1 })], PLAIN);
        assert_eq!(drawn, "x\n\n  x y\n\n1 error\n");
    }

    #[test]
    fn wraps_at_spaces_and_never_within_names() {
        assert_eq!(
            wrap("there is `task-arithmetic`, `svd-hybrid`", 20),
            "there is\n`task-arithmetic`,\n`svd-hybrid`"
        );
    }

    #[test]
    fn gives_the_same_in_json() {
        let report = files("a = 1\nb = 2\n").report(&at(6, 7));
        let json = serde_json::to_value(report).unwrap();
        assert_eq!(
            json,
            serde_json::json!({"code": "unknown-key", "message": "unknown key `b`", "file": "p.toml", "line": 2, "column": 1, "help": null})
        );
    }
}
