//! No text makes the reader panic, hang or exhaust memory.

use super::*;
use proptest::prelude::*;

const TEXT: &str = "include = []\n[vars]\nbits = 4\ntasks = [\"a\", \"b\"]\nx = \"${bits}-\"\n\
[stage.base]\nkind = \"load\"\npath = \"base\"\n[stage.tuned]\nkind = \"load\"\neach = { task = \"${tasks}\" }\npath = \"${task}${x}\"\n\
[stage.d]\nkind = \"diff\"\nfrom = { base = \"base\", tuned = \"tuned\" }\n\
[stage.p]\nkind = \"pack\"\nfrom = \"d[task=a]\"\nbits = \"${bits}\"\n[stage.q]\nkind = \"note\"\nfrom = \"p[bits=2]\"\n\
[stage.c.from]\none = \"d\"\ntwo = \"d\"\n[stage.c]\nkind = \"combine\"\n[sweep]\nbits = [2, 3]\n";

fn survives(text: &str, overrides: &[&str]) {
    match load_text(text, overrides) {
        Ok(pipeline) => {
            for instance in &pipeline.instances {
                assert_eq!(pipeline.select(&instance.label).unwrap().instances.len(), 1);
            }
        }
        Err(failure) => {
            assert!(!failure.problems.is_empty());
            let drawn = failure.files.render(&failure.problems, PLAIN);
            assert!(drawn.ends_with(" errors\n") || drawn.ends_with("1 error\n"));
            for problem in &failure.problems {
                let report = failure.files.report(problem);
                assert_eq!(report.line.is_some(), problem.span.is_some());
            }
        }
    }
}

#[test]
fn survives_every_prefix() {
    for end in 0..TEXT.len() {
        survives(&TEXT[..end], &[]);
    }
}

#[test]
fn survives_the_loss_of_any_line() {
    let lines: Vec<&str> = TEXT.lines().collect();
    for lost in 0..lines.len() {
        let rest: Vec<&str> =
            lines.iter().enumerate().filter(|(index, _)| *index != lost).map(|(_, line)| *line).collect();
        survives(&rest.join("\n"), &[]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn survives_mutations(edits in prop::collection::vec((0..TEXT.len(), 0..12usize, "[\\[\\]{}=\"'$,.#a-c0-9 \n-]{0,6}"), 1..4)) {
        let mut text = TEXT.to_owned();
        for (at, removed, inserted) in edits {
            let at = at.min(text.len());
            let end = (at + removed).min(text.len());
            text.replace_range(at..end, &inserted);
        }
        survives(&text, &[]);
    }

    #[test]
    fn survives_swapped_words(swaps in prop::collection::vec((0..90usize, 0..90usize), 1..5)) {
        let mut words: Vec<&str> = TEXT.split_inclusive([' ', '\n', '.', '[', ']']).collect();
        for (left, right) in swaps {
            let n_words = words.len();
            words.swap(left % n_words, right % n_words);
        }
        survives(&words.concat(), &[]);
    }

    #[test]
    fn survives_any_override(name in "bits|tasks|x|\\PC{0,4}", value in "\\PC{0,12}") {
        survives(TEXT, &[&format!("{name}={value}"), &value]);
    }
}

#[test]
fn refuses_files_that_are_no_text() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("p.toml");
    std::fs::write(&path, [b'a', 0xff, 0xfe]).unwrap();
    let failure = load(&path, &[], &kinds::KINDS, None).err().unwrap();
    assert!(
        failure.problems[0].message.ends_with("it is not UTF-8 (byte 1)"),
        "{}",
        failure.problems[0].message
    );
    let failure = load(folder.path(), &[], &kinds::KINDS, None).err().unwrap();
    assert_eq!(failure.problems[0].code, "unreadable-file");
}

#[test]
fn bounds_the_instances_of_a_sweep() {
    let values: Vec<String> = (0..101).map(|value| value.to_string()).collect();
    let axis = values.join(",");
    let text = "[vars]\na = 1\nb = 1\n[stage.s]\nkind = \"load\"\npath = \"${a}${b}\"\n";
    let failure = load_text(text, &[&format!("a={axis}"), &format!("b={axis}")]).err().unwrap();
    assert_eq!(failure.problems.iter().map(|problem| problem.code).collect::<Vec<_>>(), ["too-large"]);
}

#[test]
fn bounds_the_instances_that_joins_make() {
    let values: Vec<String> = (0..101).map(|value| value.to_string()).collect();
    let axis = values.join(",");
    let text = "[vars]\na = 1\nb = 1\n[stage.s]\nkind = \"load\"\npath = \"${a}-\"\n[stage.t]\nkind = \"load\"\npath = \"${b}-\"\n\
                [stage.d]\nkind = \"diff\"\nfrom = { base = \"s\", tuned = \"t\" }\n";
    let failure = load_text(text, &[&format!("a={axis}"), &format!("b={axis}")]).err().unwrap();
    assert_eq!(failure.problems.iter().map(|problem| problem.code).collect::<Vec<_>>(), ["too-large"]);
}

/// Ordering and describing circles must not recurse per stage, nor take time that grows with the square of their number.
#[test]
fn survives_long_chains() {
    let link = |index: usize, from: usize| {
        format!("[stage.s{index}]\nkind = \"pack\"\nbits = 2\nfrom = \"s{from}\"\n")
    };
    let start = String::from("[stage.s0]\nkind = \"load\"\npath = \"a\"\n");
    let chain = (1..5_000).fold(start, |text, index| text + &link(index, index - 1));
    assert_eq!(errors_of(&chain, &[]), "no errors");
    let circle = (0..5_000).fold(String::new(), |text, index| text + &link(index, (index + 1) % 5_000));
    let found = errors_of(&circle, &[]);
    assert!(found.contains("`s0` needs `s1` needs") && found.len() < 1_000, "{found}");
}
