//! Opcodes one by one, and what is refused.

use proptest::prelude::*;

use super::*;
use crate::formats::FormatProblem;

/// A short notation of a value, to three levels.
fn show(graph: &Graph<'_>, id: Id, depth: usize) -> String {
    if depth == 0 {
        return "…".to_owned();
    }
    let list =
        |items: &[Id]| items.iter().map(|item| show(graph, *item, depth - 1)).collect::<Vec<_>>().join(" ");
    let pairs = |pairs: &[(Id, Id)]| {
        let pair = |(key, value): &(Id, Id)| {
            format!("{}:{}", show(graph, *key, depth - 1), show(graph, *value, depth - 1))
        };
        pairs.iter().map(pair).collect::<Vec<_>>().join(" ")
    };
    match graph.value(id) {
        Value::Int(number) => number.to_string(),
        Value::BigInt(_) => String::from_utf8_lossy(&graph.big_integer(id).unwrap().unwrap()).into_owned(),
        Value::Text(_) | Value::EscapedText(_) => format!("'{}'", graph.text(id).unwrap().unwrap()),
        Value::Bytes(_) | Value::TextOrBytes(_) => {
            format!("b'{}'", String::from_utf8_lossy(&graph.bytes(id).unwrap().bytes().unwrap()))
        }
        Value::List(items) => format!("[{}]", list(items)),
        Value::Tuple(items) => format!("({})", list(items)),
        Value::Set(items) => format!("<{}>", list(items)),
        Value::Dict(items) => format!("{{{}}}", pairs(items)),
        Value::Global { .. } => graph.global(id).unwrap().unwrap(),
        Value::Persistent(id) => format!("@{}", show(graph, *id, depth - 1)),
        Value::Record(record) => {
            let mut text =
                format!("{}{}", show(graph, record.callable, 2), show(graph, record.arguments, depth - 1));
            if let Some(contents) = &record.contents {
                text += &format!("[{}]{{{}}}", list(&contents.appended), pairs(&contents.items));
            }
            if let Some(state) = record.state {
                text += &format!("|{}", show(graph, state, depth - 1));
            }
            text
        }
        other => format!("{other:?}"),
    }
}

#[track_caller]
fn check(pickle: &[u8], expected: &str) {
    let bytes = pickle.to_vec();
    let graph =
        load(Window::whole(&bytes), 0).map_err(|failure| failure.of_file(&bytes).to_string()).unwrap();
    assert_eq!(show(&graph, graph.root, 4), expected);
}

#[track_caller]
fn check_refused(pickle: &[u8], expected: &str) {
    let bytes = pickle.to_vec();
    let Err(Failure::Problem(FormatProblem::Pickle(problem))) = load(Window::whole(&bytes), 0) else {
        panic!("not refused as a pickle")
    };
    assert_eq!(problem.to_string(), expected);
}

#[test]
fn numbers_of_every_notation() {
    check(b"I-12\n.", "-12");
    check(b"I01\n.", "Bool(true)");
    check(b"I00\n.", "Bool(false)");
    check(b"L1152921504606846976L\n.", "1152921504606846976");
    check(b"L119547037146038801333356L\n.", "119547037146038801333356");
    check(b"\x80\x02J\xfe\xff\xff\xff.", "-2");
    check(b"K\xff.", "255");
    check(b"M\x01\x02.", "513");
    check(b"\x8a\x00.", "0");
    check(b"\x8a\x01\x80.", "-128");
    check(b"\x8a\x02\xff\x00.", "255");
    check(b"\x8a\x08\0\0\0\0\0\0\0\x80.", "-9223372036854775808");
    check(b"\x8b\x03\0\0\0\x01\x02\x03.", "197121");
    check(b"F1.5\n.", "Float");
    check(b"G\x3f\xf8\0\0\0\0\0\0.", "Float");
    check(b"(N\x88\x89t.", "(None Bool(true) Bool(false))");
}

#[test]
fn strings_of_every_protocol() {
    check(b"S'ab'\n.", "'ab'");
    check(b"Vab\n.", "'ab'");
    check(b"U\x02ab.", "b'ab'");
    check(b"T\x02\0\0\0ab.", "b'ab'");
    check(b"X\x02\0\0\0ab.", "'ab'");
    check(b"\x8c\x02ab.", "'ab'");
    check(b"\x8d\x02\0\0\0\0\0\0\0ab.", "'ab'");
    check(b"C\x02ab.", "b'ab'");
    check(b"B\x02\0\0\0ab.", "b'ab'");
    check(b"\x8e\x02\0\0\0\0\0\0\0ab.", "b'ab'");
    check(b"\x96\x02\0\0\0\0\0\0\0ab.", "b'ab'");
}

#[test]
fn containers_marks_and_the_memo() {
    check(b"(K\x01K\x02l.", "[1 2]");
    check(b"(K\x01K\x02d.", "{1:2}");
    check(b"]K\x01a(K\x02K\x03e.", "[1 2 3]");
    check(b"}K\x01K\x02s(K\x03K\x04u.", "{1:2 3:4}");
    check(b"\x8f(K\x01\x90.", "<1>");
    check(b"(K\x01\x91.", "<1>");
    check(b"K\x01K\x02K\x03\x87.", "(1 2 3)");
    check(b"K\x01p7\nq\x08r\x09\0\0\0\x94(g7\nh\x08j\x09\0\0\0l.", "[1 1 1]");
    check(b"K\x01K\x02K\x0300.", "1");
    check(b"K\x01(K\x021.", "1");
    check(b"K\x012\x86.", "(1 1)");
    check(b"]q\x00h\x00a.", "[[[[…]]]]");
}

#[test]
fn calls_and_objects_become_records() {
    check(b"cos\nsystem\n(X\x02\0\0\0lstR.", "os.system('ls')");
    check(b"\x8c\x02os\x8c\x06system\x93\x8c\x02ls\x85R.", "os.system('ls')");
    check(b"cm\nC\n)\x81}K\x01K\x02sb.", "m.C()|{1:2}");
    check(b"cm\nC\n)}\x92.", "m.C()");
    check(b"(K\x01im\nC\n.", "m.C(1)");
    check(b"(cm\nC\nK\x01o.", "m.C(1)");
    check(b"cm\nC\n)R(K\x01K\x02uK\x03a.", "m.C()[3]{1:2}");
    check(b"Pabc\n.", "@'abc'");
    check(b"K\x01Q.", "@1");
    check(b"\x82\x01.", "External");
    check(b"\x97\x98.", "External");
}

#[test]
fn what_is_not_a_pickle_is_refused_with_its_place() {
    check_refused(b"", "the pickle is truncated: it ends at byte 0");
    check_refused(b"K", "the pickle is truncated: it ends at byte 1");
    check_refused(b"\x8e\xff\xff\xff\xff\xff\xff\xff\xff", "the pickle is truncated: it ends at byte 9");
    check_refused(b"Vabc", "the pickle is truncated: it ends at byte 4");
    check_refused(b"K\x01\xff", "the pickle has the unknown opcode 0xff at byte 2");
    check_refused(b"\x80\x06.", "the pickle has protocol 6, the latest that is known is 5");
    check_refused(
        b"K\x01(.",
        "the pickle is not valid: the instruction at byte 3 needs more values than there are",
    );
    check_refused(b"t", "the pickle is not valid: the instruction at byte 0 needs a mark");
    check_refused(b"h\x05.", "the pickle is not valid: the instruction at byte 0 recalls what was not kept");
    check_refused(
        b"(K\x01d.",
        "the pickle is not valid: the instruction at byte 3 sets a key without a value",
    );
    check_refused(
        b"K\x01K\x02a.",
        "the pickle is not valid: the instruction at byte 4 appends to something that is not a list",
    );
    check_refused(b"Iabc\n.", "the pickle is not valid: the instruction at byte 0 has a number that is none");
    let many = vec![b'('; MAX_VALUES + 2];
    check_refused(&many, "the pickle has more than 1048576 values");
    check_refused(&vec![b']'; MAX_VALUES + 2], "the pickle has more than 1048576 values");
    check_refused(&vec![b'N'; MAX_VALUES + 2], "the pickle has more than 1048576 values");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn arbitrary_instructions_never_panic(bytes in prop::collection::vec(
        prop_oneof![
            prop::sample::select(b"(.0123FIJKLMNPQRSTUVXabcd}eghijl]opqrst)uG\x80\x81\x85\x86\x87\x88\x8a\x8c\x8f\x90\x91\x93\x94\n1".to_vec()),
            any::<u8>(),
        ],
        0..80,
    )) {
        if let Ok(graph) = load(Window::whole(&bytes), 0) {
            prop_assert!(graph.end <= bytes.len() as u64);
        }
    }
}
