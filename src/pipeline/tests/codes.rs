//! The codes of problems are stable: documented once each, and no others in use.

use std::collections::BTreeSet;

const SOURCES: [&str; 12] = [
    include_str!("../document.rs"),
    include_str!("../load.rs"),
    include_str!("../lower.rs"),
    include_str!("../order.rs"),
    include_str!("../overrides.rs"),
    include_str!("../plan.rs"),
    include_str!("../plug.rs"),
    include_str!("../reference.rs"),
    include_str!("../resolve.rs"),
    include_str!("../stage.rs"),
    include_str!("../sweep.rs"),
    include_str!("../vars.rs"),
];

/// Codes of the parameters' own problems, which come from the stages.
const OF_STAGES: [&str; 3] = ["bad-address", "bad-value", "member-mismatch"];

fn documented() -> Vec<&'static str> {
    let lines = include_str!("../mod.rs").lines();
    let row = |line: &'static str| line.strip_prefix("//! | `")?.split_once('`').map(|(code, _)| code);
    lines.filter_map(row).collect()
}

fn used() -> BTreeSet<String> {
    let mut used = BTreeSet::new();
    for source in SOURCES {
        let code = source.split("#[cfg(test)]").next().unwrap_or_default();
        let code = code.split_whitespace().collect::<Vec<_>>().join(" ").replace("( \"", "(\"");
        for opening in ["Problem::new(\"", "code: \"", "complaint(\"", "self.refuse(span, \""] {
            used.extend(
                code.split(opening).skip(1).filter_map(|rest| rest.split('"').next()).map(str::to_owned),
            );
        }
    }
    used
}

#[test]
fn documents_every_code_once() {
    let documented = documented();
    let unique: BTreeSet<&str> = documented.iter().copied().collect();
    assert_eq!(unique.len(), documented.len(), "a code is documented twice");
    let used = used();
    let in_use: BTreeSet<&str> = used.iter().map(String::as_str).chain(OF_STAGES).collect();
    assert_eq!(unique, in_use);
    for code in unique {
        assert!(code.chars().all(|character| character.is_ascii_lowercase() || character == '-'), "`{code}`");
    }
}

#[test]
fn tests_every_code() {
    let tests = [
        include_str!("mistakes_in_files.rs"),
        include_str!("mistakes_in_stages.rs"),
        include_str!("resolution.rs"),
        include_str!("robustness.rs"),
        include_str!("../overrides.rs"),
    ]
    .concat();
    let untested: Vec<&str> = documented().into_iter().filter(|code| !tests.contains(*code)).collect();
    assert_eq!(untested, Vec::<&str>::new());
}
