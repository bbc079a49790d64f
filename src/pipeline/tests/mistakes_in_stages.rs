//! Mistakes in stages and in how they are wired.

use super::check;

#[test]
fn reports_values_that_a_kind_refuses() {
    check(
        r#"
[stage.a]
kind = "load"
path = "a"
[stage.b]
kind = "load"
path = "b"
[stage.d]
kind = "diff"
from = { base = "a", tuned = "b" }
[stage.m]
kind = "merge"
from = { base = "a", vectors = "d" }
method = "task_arithmetic"
[stage.n]
kind = "note"
from = "a"
refuse = true
"#,
        &[],
        r"
13:10 bad-value: unknown value `task_arithmetic` (did you mean `task-arithmetic`?)
16:8 bad-value: this stage refuses its inputs
",
    );
}

#[test]
fn reports_missing_keys() {
    check(
        r#"
[stage.a]
[stage.b]
kind = "load"
"#,
        &[],
        r"
1:8 missing-key: stage `a` has no `kind` (the kinds are `load`, `diff`, `pack`, `merge`, `scores`, `combine`, `note`, `broken`)
3:8 missing-key: missing key `path`
",
    );
}

#[test]
fn reports_broken_each() {
    check(
        r#"
[vars]
task = "x"
[stage.s0]
kind = "load"
path = "p"
each = "x"
[stage.s1]
kind = "load"
path = "p"
each = {}
[stage.s2]
kind = "load"
path = "p"
each = { a = ["x"], b = ["y"] }
[stage.s3]
kind = "load"
path = "p"
each = { t = [] }
[stage.s4]
kind = "load"
path = "p"
each = { t = "x" }
[stage.s5]
kind = "load"
path = "p"
each = { t = ["x", "x", 1.5] }
[stage.s6]
kind = "load"
path = "p"
each = { task = ["x"] }
[stage.z]
kind = "load"
path = "${task}"
"#,
        &[],
        r#"
6:8 bad-each: `each` must be a table, got a string (write `each = { task = ["a", "b"] }`)
10:8 bad-each: `each` must bind one name, got 0 (write `each = { task = ["a", "b"] }`)
14:8 bad-each: `each` must bind one name, got 2 (write `each = { task = ["a", "b"] }`)
18:14 bad-each: `each` has no members
22:14 bad-each: `each` needs an array of names, got a string
26:20 bad-each: member `x` is listed twice
26:25 bad-each: a member's name must be a string, got a float
30:10 shadowed-variable: `each` binds `task`, which is a variable already (give one of them another name)
"#,
    );
    check(
        r#"
[stage.a]
kind = "load"
path = "a"
[stage.s]
kind = "scores"
each = { t = ["x", "y"] }
from = "a"
datasets = ["m", "n"]
"#,
        &[],
        r"
7:8 each-units: `each` needs a stage that produces one artifact per member (each member would produce 2: m, n)
",
    );
    check(
        r#"
[stage.a]
kind = "load"
path = "a"
[stage.b]
kind = "load"
path = "b"
[stage.d]
kind = "diff"
from = { base = "a", tuned = "b" }
[stage.s]
kind = "pack"
each = { which = ["a", "d"] }
from = "${which}"
bits = 3
"#,
        &[],
        r"
13:8 bad-each: member `d` gives task vectors, the first member gives a checkpoint
",
    );
}

#[test]
fn reports_unknown_kinds() {
    check(
        r#"
[stage.a]
kind = "laod"
"#,
        &[],
        r"
2:8 unknown-kind: unknown kind `laod` (did you mean `load`?)
",
    );
    check(
        r#"
[stage.a]
kind = "zzz"
"#,
        &[],
        r"
2:8 unknown-kind: unknown kind `zzz` (there is `load`, `diff`, `pack`, `merge`, `scores`, `combine`, `note`, `broken`)
",
    );
}

#[test]
fn reports_unknown_stages() {
    check(
        r#"
[stage.a]
kind = "load"
path = "a"
[stage.p]
kind = "pack"
from = "aa"
bits = 2
[stage.q]
kind = "pack"
from = "a[x"
bits = 2
"#,
        &[],
        r"
6:8 unknown-stage: unknown stage `aa` (did you mean `a`?)
10:8 bad-stage-name: `a[x` does not end with `]` (write `stage`, `stage[bits=3]` or `stage[member]`)
",
    );
}

#[test]
fn reports_unknown_instances() {
    check(
        r#"
[vars]
bits = 2
[stage.a]
kind = "load"
path = "a"
[stage.p]
kind = "pack"
from = "a"
bits = "${bits}"
[stage.q]
kind = "note"
from = "p[bits=5]"
[stage.r]
kind = "note"
from = "a[bits=2]"
"#,
        &["bits=2,3"],
        r"
12:8 unknown-instance: `p` has no instance with `bits=5` (there is `p[bits=2]`, `p[bits=3]`)
15:8 unknown-instance: `a` does not depend on `bits` (there is `a`)
",
    );
}

#[test]
fn reports_unknown_members() {
    check(
        r#"
[stage.t]
kind = "load"
each = { task = ["x", "y"] }
path = "${task}"
[stage.a]
kind = "load"
path = "a"
[stage.p]
kind = "note"
from = "t[z]"
[stage.q]
kind = "note"
from = "a[x]"
[stage.r]
kind = "note"
from = "t[tsk=x]"
[stage.s]
kind = "pack"
each = { task = ["x", "z"] }
from = "t"
bits = 2
[stage.u]
kind = "diff"
from = { base = "t", tuned = "v" }
[stage.v]
kind = "load"
each = { task = ["x", "z"] }
path = "${task}"
"#,
        &[],
        r"
10:8 unknown-member: `t` has no member `z` (there is `x`, `y`)
13:8 unknown-member: `a` is no collection and has no member `x`
16:8 unknown-member: `t` has nothing called `tsk` to choose by (for the member, write `t[x]`)
20:8 unknown-member: `t` has no member `z` for that member of `each` (it has `x`, `y`)
24:8 member-mismatch: port `tuned` has no member `y` (`base` has x, y; `tuned` has x, z)
",
    );
}

#[test]
fn reports_wrong_ports() {
    check(
        r#"
[stage.a]
kind = "load"
path = "a"
[stage.b]
kind = "load"
path = "b"
[stage.d]
kind = "diff"
from = { base = "a", tuned = "b" }
[stage.m]
kind = "merge"
from = "a"
method = "average"
[stage.n]
kind = "merge"
from = { base = "a", vector = "d" }
method = "average"
[stage.o]
kind = "merge"
from = { base = "a" }
method = "average"
[stage.p]
kind = "pack"
bits = 2
[stage.q]
kind = "load"
from = "a"
path = "x"
"#,
        &[],
        r#"
12:8 ambiguous-from: `merge` has several ports, `from` must say which (write `from = { base = "STAGE", vectors = "STAGE" }`)
16:22 unknown-port: `merge` has no port `vector` (did you mean `vectors`?)
20:8 missing-port: stage `o` needs something on port `vectors` (write `from = { base = "STAGE", vectors = "STAGE" }`)
23:8 missing-port: stage `p` needs something on port `tensors` (write `from = "STAGE"` for `tensors`)
27:1 no-ports: `load` takes no inputs
"#,
    );
}

#[test]
fn reports_wrong_content() {
    check(
        r#"
[stage.a]
kind = "load"
path = "a"
[stage.b]
kind = "load"
path = "b"
[stage.d]
kind = "diff"
from = { base = "a", tuned = "b" }
[stage.m]
kind = "merge"
from = { base = "d", vectors = "a" }
method = "average"
[stage.n]
kind = "note"
from = "m"
[stage.o]
kind = "pack"
from = "p"
bits = 2
[stage.p]
kind = "note"
"#,
        &[],
        r"
12:17 wrong-content: port `base` of `m` takes a checkpoint, `d` gives task vectors
12:32 wrong-content: port `vectors` of `m` takes task vectors, `a` gives a checkpoint
19:8 wrong-content: port `tensors` of `o` takes a checkpoint or task vectors, `p` gives files
",
    );
}

#[test]
fn reports_circles() {
    check(
        r#"
[stage.a]
kind = "load"
path = "a"
[stage.x]
kind = "pack"
from = "z"
bits = 2
[stage.y]
kind = "pack"
from = "x"
bits = 2
[stage.z]
kind = "pack"
from = "y"
bits = 2
[stage.s]
kind = "pack"
from = "s"
bits = 2
[stage.after]
kind = "pack"
from = "z"
bits = "no"
"#,
        &[],
        r#"
6:8 cycle: stages need each other in a circle: `x` needs `z` needs `y` needs `x`
18:8 self-reference: stage `s` takes its own output
23:8 wrong-type: expected an integer from 0 to 255, got string "no"
"#,
    );
}

#[test]
fn reports_kinds_that_break_their_contract() {
    check(
        r#"
[stage.a]
kind = "broken"
"#,
        &[],
        r"
2:8 broken-kind: a unit takes from port `nowhere`, which is not connected
",
    );
}

#[test]
fn reports_addresses_that_cannot_be_meant() {
    check(
        r#"
[stage.a]
kind = "load"
path = "bad://x"
[stage.b]
kind = "load"
path = "far://x"
"#,
        &[],
        r"
3:8 bad-address: `bad://x` is no address
",
    );
}
