//! A broken cache is a miss, never a wrong answer: flipped bits, lost files, killed and simultaneous runs.

use crate::util::{Lab, Run, SMALL_UNITS};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;

/// What [`crate::util::SMALL`] gives at a scale of 0.4, computed where nothing ever went wrong.
fn undisturbed(args: &[&str]) -> BTreeMap<String, String> {
    let lab = Lab::small();
    owned(&lab.run(args))
}

fn owned(run: &Run) -> BTreeMap<String, String> {
    run.artifacts().into_iter().map(|(unit, artifact)| (unit.to_owned(), artifact.to_owned())).collect()
}

/// Flips a bit of a file and keeps its mode and times, as failing hardware does.
fn rot(path: &Path) {
    let metadata = fs_err::metadata(path).unwrap();
    fs_err::set_permissions(path, std::fs::Permissions::from_mode(0o644)).unwrap();
    let mut bytes = fs_err::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    fs_err::write(path, bytes).unwrap();
    let file = fs_err::OpenOptions::new().write(true).open(path).unwrap();
    file.file().set_modified(metadata.modified().unwrap()).unwrap();
    fs_err::set_permissions(path, metadata.permissions()).unwrap();
}

/// The digest of the only blob of a unit.
fn blob(lab: &Lab, unit: &str) -> String {
    let shown = lab.json(&["show", "pipeline.toml", unit]);
    shown[0]["output"]["files"][0]["digest"].as_str().unwrap().to_owned()
}

#[test]
fn a_flipped_byte_is_found_quarantined_and_computed_again() {
    let expected = undisturbed(&["--set", "scale=0.4"]);
    let lab = Lab::small();
    lab.run(&[]);
    let object = lab.object(&blob(&lab, "packed[digits]"));
    rot(&object);
    // Nothing reads it: nothing happens.
    lab.run(&[]).ran_exactly(&[]);
    let outcome = lab.try_run("pipeline.toml", &["--set", "scale=0.4"]);
    assert_eq!(outcome.code, 0, "{outcome}");
    outcome.tells(&["damaged", "set aside"]);
    let run = outcome.run();
    run.ran_exactly(&["packed[digits]", "merged", "scores[digits]", "scores[negative]"]);
    assert_eq!(owned(&run), expected);
    assert_eq!(lab.cached_files("quarantine-v1").len(), 1);
    lab.check_objects();
    lab.run(&["--set", "scale=0.4"]).ran_exactly(&[]);
}

#[test]
fn a_flipped_byte_in_a_description_is_found() {
    let lab = Lab::small();
    let first = lab.run(&[]);
    for unit in ["base", "deltas[negative]", "packed[digits]", "scores[digits]"] {
        rot(&lab.object(first.artifacts()[unit]));
    }
    let outcome = lab.try_run("pipeline.toml", &[]);
    assert_eq!(outcome.code, 0, "{outcome}");
    assert_eq!(outcome.run().artifacts(), first.artifacts());
    assert_eq!(outcome.run().scores, first.scores);
    lab.check_objects();
    lab.run(&[]).ran_exactly(&[]);
}

#[test]
fn damage_to_every_object_costs_time_and_nothing_else() {
    let expected = undisturbed(&["--set", "bits=3"]);
    let lab = Lab::small();
    lab.run(&["--set", "bits=3"]);
    for object in lab.cached_files("objects-v1") {
        rot(&object);
    }
    let again = lab.run(&["--set", "bits=3"]);
    assert_eq!(owned(&again), expected);
    // Blobs that nothing has read since are still damaged; what reads them finds out.
    let forced = lab.run(&["--set", "bits=3", "--force", "merged", "--force", "scores"]);
    assert_eq!(owned(&forced), expected);
}

#[test]
fn lost_objects_and_truncated_records_are_computed_again() {
    let lab = Lab::small();
    let first = lab.run(&[]);
    fs_err::remove_file(lab.object(&blob(&lab, "merged"))).unwrap();
    let run = lab.run(&[]);
    run.ran_exactly(&["merged"]);
    assert_eq!(run.artifacts(), first.artifacts());

    for record in lab.cached_files("keys-v1") {
        let bytes = fs_err::read(&record).unwrap();
        fs_err::write(&record, &bytes[..bytes.len() / 2]).unwrap();
    }
    let run = lab.run(&[]);
    run.ran_exactly(&SMALL_UNITS);
    assert_eq!(run.artifacts(), first.artifacts());
}

#[test]
fn a_damaged_stat_cache_only_costs_hashing() {
    let lab = Lab::small();
    let first = lab.run(&[]);
    let files = lab.cached_files("stat-v1");
    assert!(!files.is_empty());
    for (n, damage) in [b"".as_slice(), b"MGSTAT1\n\xff\xff\xff\xff", b"rubbish"].into_iter().enumerate() {
        for file in &files {
            fs_err::write(file, damage).unwrap();
        }
        let run = lab.run(&[]);
        assert_eq!(run.ran().len(), 0, "damage {n}");
        assert_eq!(run.artifacts(), first.artifacts());
    }
    for file in &files {
        rot(file);
    }
    lab.run(&[]).ran_exactly(&[]);
}

#[test]
fn two_runs_at_once_share_the_work() {
    let lab = Lab::small();
    let start = || {
        let args = ["run", "pipeline.toml", "--json", "--jobs", "2"];
        lab.command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let both = [start(), start()];
    let outcomes = both.map(|child| crate::util::Outcome::from(child.wait_with_output().unwrap()));
    for outcome in &outcomes {
        assert_eq!(outcome.code, 0, "{outcome}");
    }
    let [one, two] = outcomes.map(|outcome| outcome.run());
    for unit in SMALL_UNITS {
        let mut statuses = [one.units[unit].status.as_str(), two.units[unit].status.as_str()];
        statuses.sort_unstable();
        assert_eq!(statuses, ["cached", "ran"], "{unit} must be executed once");
    }
    assert_eq!(one.artifacts(), two.artifacts());
    assert_eq!(one.scores, two.scores);
    lab.check_objects();
}

#[test]
fn a_killed_run_is_completed_by_the_next() {
    let args = ["--set", "bits=2,3,4,5,6,7", "--set", "limit=600"];
    let expected = undisturbed(&args);
    let lab = Lab::small();
    for line in [
        "ran     packed[bits=3,digits]",
        "ran     merged[bits=2]",
        "ran     scores[bits=2,digits]",
        "start   scores[bits=5,",
    ] {
        let mut child = lab
            .command(["run", "pipeline.toml"].iter().chain(&args))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let seen = BufReader::new(child.stderr.take().unwrap())
            .lines()
            .map(Result::unwrap)
            .any(|text| text.starts_with(line));
        child.kill().unwrap();
        let status = child.wait().unwrap();
        assert!(!seen || status.code().is_none(), "the run ended before it could be killed");
        lab.check_objects();
    }
    let run = lab.run(&args);
    assert!(run.with("cached").len() > run.with("ran").len(), "{:?}", run.units);
    assert_eq!(owned(&run), expected);
    assert_eq!(lab.cached_files("staging-v1"), Vec::<std::path::PathBuf>::new(), "leftovers");
}

#[test]
fn a_view_of_a_replaced_file_is_not_served_stale() {
    let expected = {
        let lab = Lab::small();
        crate::util::copy(&lab.path("data/ft_parity.safetensors"), &lab.path("data/ft_digits.safetensors"));
        owned(&lab.run(&[]))
    };
    // Renamed over it, and written into it in place, each time with size and time of last change as they were.
    for in_place in [false, true] {
        let lab = Lab::small();
        let first = owned(&lab.run(&[]));
        let digits = lab.path("data/ft_digits.safetensors");
        let before = fs_err::metadata(&digits).unwrap();
        let original = fs_err::read(&digits).unwrap();
        let replacement = fs_err::read(lab.path("data/ft_parity.safetensors")).unwrap();
        let set = |bytes: &[u8]| {
            let target = if in_place { digits.clone() } else { lab.path("data/new") };
            fs_err::write(&target, bytes).unwrap();
            let file = fs_err::OpenOptions::new().write(true).open(&target).unwrap();
            file.file().set_modified(before.modified().unwrap()).unwrap();
            fs_err::rename(&target, &digits).unwrap();
        };
        set(&replacement);
        assert_eq!(fs_err::metadata(&digits).unwrap().len(), before.len());
        let run = lab.run(&[]);
        assert_eq!(owned(&run), expected, "in place: {in_place}");
        assert!(run.ran().contains("tuned[digits]"));
        // The old file again: all of it is known.
        set(&original);
        let back = lab.run(&[]);
        back.ran_exactly(&[]);
        assert_eq!(owned(&back), first);
    }
}

#[test]
fn a_file_that_was_never_here_is_a_user_error_that_names_it() {
    let lab = Lab::small();
    fs_err::remove_file(lab.path("data/ft_digits.safetensors")).unwrap();
    let outcome = lab.try_run("pipeline.toml", &[]);
    assert_eq!(outcome.code, 2, "{outcome}");
    outcome.tells(&["no such file", "ft_digits.safetensors"]);
}
