//! Mistakes in the text, the top-level tables, variables and sweeps.

use super::{check, drawn, errors_of, load_files};

#[test]
fn reports_syntax_errors_at_their_places() {
    check(
        r"
[stage.a]
kind = load
path = [1, 2
x = 3
",
        &[],
        r#"
2:8 syntax: `load` is no value (text needs quotes: `"load"`)
3:8 syntax: this array is never closed
"#,
    );
    check(
        r"
a = 
[x
",
        &[],
        r"
1:5 syntax: a value is missing
2:3 syntax: unclosed table, expected `]`
",
    );
}

#[test]
fn reports_keys_given_twice() {
    check(
        r#"
[stage.a]
kind = "load"
path = "a"
path = "b"
[stage.a]
kind = "load"
path = "a"
"#,
        &[],
        r"
4:1 duplicate-key: `path` is given a second time
5:8 duplicate-key: `a` is given a second time
",
    );
}

#[test]
fn reports_values_that_no_parameter_can_be() {
    check(
        r#"
[vars]
n = 99999999999999999999
x = nan
day = 2024-02-30
d = 2024-02-03
[stage.a]
kind = "load"
path = "${n}${x}${d}"
"#,
        &[],
        r#"
2:5 bad-number: `99999999999999999999` does not fit in 64 bits
3:5 bad-number: `nan` is not a finite number
4:7 syntax: invalid date, expected day between 01 and 29
5:5 date: no parameter is a date (text needs quotes: `"2024-02-03"`)
"#,
    );
}

#[test]
fn reports_unknown_keys() {
    check(
        r#"
stages = 1
[pipeline]
nmae = "x"
[stage.a]
kind = "load"
path = "a"
paht = "b"
"#,
        &[],
        r"
1:1 unknown-key: unknown key `stages` (did you mean `stage`?)
3:1 unknown-key: unknown key `nmae` (did you mean `name`?)
7:1 unknown-key: unknown key `paht` (did you mean `path`?)
",
    );
}

#[test]
fn reports_wrong_types() {
    check(
        r#"
vars = 3
include = "x"
stage.a = 1
[pipeline]
name = 4
[stage.b]
kind = 3
from = 4
[stage.c]
kind = "pack"
bits = "x"
from = { tensors = 1 }
[stage.d]
kind = "pack"
bits = 2
from = "a"
"#,
        &[],
        r#"
1:8 wrong-type: `vars` must be a table, got an integer
2:11 wrong-type: `include` must be an array of paths, got a string (write `include = ["common.toml"]`)
3:11 wrong-type: stage `a` must be a table, got an integer
5:8 wrong-type: `name` must be a string, got an integer
7:8 wrong-type: `kind` must be a string, got an integer
8:8 wrong-type: `from` must name a stage or map ports to stages, got an integer
11:8 wrong-type: expected an integer from 0 to 255, got string "x"
12:20 wrong-type: port `tensors` must name a stage, got an integer
"#,
    );
}

#[test]
fn reports_bad_names() {
    check(
        r#"
[vars]
"a b" = 1
[stage."x[1]"]
kind = "load"
[stage.c]
kind = "load"
each = { "" = ["x"] }
path = "x"
"#,
        &[],
        r#"
2:1 bad-name: `a b` cannot be the name of a variable (names are made of letters, digits, `_` and `-`)
3:8 bad-name: `x[1]` cannot be the name of a stage (names are made of letters, digits, `_` and `-`)
7:10 bad-name: `` cannot be the name of a variable (write `each = { task = ["a", "b"] }`)
"#,
    );
}

#[test]
fn reports_unknown_variables() {
    check(
        r#"
[vars]
bits = 4
x = "${bitz}"
[stage.a]
kind = "load"
path = "${bit}${x}"
[sweep]
seed = [1]
"#,
        &["bitts=3"],
        r"
3:5 unknown-variable: unknown variable `bitz` (did you mean `bits`?)
6:8 unknown-variable: unknown variable `bit` (did you mean `bits`?)
8:1 unknown-variable: cannot sweep over `seed`, which is no variable (there is `bits`, `x`)
--set 1:1 unknown-variable: unknown variable `bitts` (did you mean `bits`?)
",
    );
}

#[test]
fn reports_variables_in_a_circle() {
    check(
        r#"
[vars]
a = "${b}"
b = "x${a}"
c = "${c}"
[stage.a]
kind = "load"
path = "${a}${c}"
"#,
        &[],
        r"
2:5 variable-cycle: variables use each other in a circle: `a`, `b`
4:5 variable-cycle: variable `c` uses itself
",
    );
}

#[test]
fn reports_broken_references() {
    check(
        r#"
[vars]
list = [1]
[stage.a]
kind = "load"
path = "x${list"
[stage.b]
kind = "load"
path = "${}"
[stage.c]
kind = "load"
path = "x${list}"
"#,
        &[],
        r#"
5:8 bad-reference: `${` is never closed (to write `${` itself, double the dollar: `$${`)
8:8 bad-reference: `${}` names no variable (to write `${` itself, double the dollar: `$${`)
11:8 not-text: `list` is an array and cannot be part of a text (`"${list}"` alone becomes the whole value)
"#,
    );
}

#[test]
fn reports_broken_overrides() {
    check(
        r#"
[vars]
bits = 1
[stage.a]
kind = "load"
path = "${bits}"
"#,
        &["bits", "bits=", "bits=[1", "=3"],
        r#"
5:8 wrong-type: expected a path, got an integer
--set 1:1 bad-override: expected `name=value` (write `--set bits=3`, `--set bits=2,3` or `--set 'tasks=["a","b"]'`)
--set 1:6 bad-override: a value is missing (the empty text is `""`)
--set 1:8 bad-override: unclosed array, expected `]`
--set 1:1 bad-override: the name of a variable is missing before `=` (write `--set bits=3`, `--set bits=2,3` or `--set 'tasks=["a","b"]'`)
"#,
    );
}

#[test]
fn reports_broken_sweeps() {
    check(
        r#"
[vars]
a = 1
b = 2
c = 3
d = 4
[stage.s]
kind = "load"
path = "${a}${b}${c}${d}"
[stage.n]
kind = "note"
from = "s[a=7]"
[sweep]
a = []
b = [1, 2, 1]
c = 3
d = ["${a}"]
"#,
        &[],
        r"
13:5 bad-sweep: `a` is swept over no values (leave it out, or give it values)
14:12 bad-sweep: `b` is swept over 1 twice
15:5 bad-sweep: a sweep needs an array of values, got an integer (write `c = [2, 3]`)
16:6 bad-sweep: `a` is swept or depends on what is swept, so it has no value here
",
    );
}

#[test]
fn reports_empty_pipelines() {
    check(
        r#"
[pipeline]
name = "x"
"#,
        &[],
        r"
no-stages: the pipeline has no stages (a stage is a table `[stage.NAME]`)
",
    );
}

#[test]
fn reports_everything_in_one_go() {
    check(
        r#"
[vars]
bits = 4
[stage.a]
kind = "load"
paht = "x"
[stage.b]
kind = "pack"
from = "a"
bits = 400
[stage.c]
kind = "merg"
from = { base = "a", vectors = "bb" }
[stage.d]
kind = "pack"
from = "c"
bits = "${bitz}"
scale = true
[sweep]
bitz = [1]
"#,
        &[],
        r"
4:8 missing-key: missing key `path`
5:1 unknown-key: unknown key `paht` (did you mean `path`?)
9:8 bad-value: expected an integer from 0 to 255, got integer `400`
11:8 unknown-kind: unknown kind `merg` (did you mean `merge`?)
12:32 unknown-stage: unknown stage `bb` (did you mean `b`?)
16:8 unknown-variable: unknown variable `bitz` (did you mean `bits`?)
17:9 wrong-type: expected a number, got boolean `true`
19:1 unknown-variable: cannot sweep over `bitz`, which is no variable (did you mean `bits`?)
",
    );
}

#[test]
fn reports_files_that_cannot_be_included() {
    let stage = "[stage.a]\nkind = \"load\"\npath = \"a\"\n";
    let files = [
        ("p.toml", "include = [\"comon.toml\", \"folder\"]\n"),
        ("common.toml", stage),
        ("folder/x.toml", ""),
    ];
    let failure = load_files(&files, &[]).err().unwrap();
    let drawn = drawn(&failure.files, &failure.problems);
    assert!(drawn.contains("x cannot read `comon.toml`: "), "{drawn}");
    assert!(drawn.contains("did you mean"), "{drawn}");
    assert!(drawn.contains("[p.toml:1:26]"), "{drawn}");
    assert!(
        drawn.ends_with("\n2 errors\n"),
        "a pipeline with a part missing is not looked at further: {drawn}"
    );
}

#[test]
fn reports_files_that_include_each_other() {
    let files =
        [("p.toml", "include = [\"sub/q.toml\"]\n"), ("sub/q.toml", "# first\ninclude = [\"../p.toml\"]\n")];
    let failure = load_files(&files, &[]).err().unwrap();
    let drawn = drawn(&failure.files, &failure.problems);
    assert!(failure.problems[0].message.ends_with("p.toml`"), "{drawn}");
    assert_eq!(failure.problems[0].code, "include-cycle");
    assert!(drawn.contains("[sub/q.toml:2:12]"), "{drawn}");
}

#[test]
fn draws_each_mistake_with_its_line() {
    let expected = r#"unknown-variable

  x unknown variable `bitz`
   ,-[p.toml:6:8]
 6 | bits = "${bitz}"
   :        ^^^^^^^^^
   `----
  help: did you mean `bits`?

unknown-stage

  x unknown stage `bass`
   ,-[p.toml:7:8]
 7 | from = "bass" # here
   :        ^^^^^^
   `----
  help: did you mean `base`?

bad-override

  x unclosed array, expected `]`
   ,-[--set:1:8]
 1 | bits=[2 
   :        ^
   `----

3 errors
"#;
    let text = "[vars]\nbits = 4\n[stage.packed]\nkind = \"pack\"\n# above\nbits = \"${bitz}\"\nfrom = \"bass\" # here\n[stage.base]\nkind = \"load\"\npath = \"b\"\n";
    assert_eq!(errors_of(text, &["bits=[2"]), expected);
}
