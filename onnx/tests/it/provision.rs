//! Finding and installing ONNX Runtime. A script stands in for Python, so that nothing is downloaded here.

#![cfg(unix)]

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use merganser_onnx::provision::{
    Environment, Event, FoundBy, PINNED_VERSION, ProvisionError, Version, resolve,
    resolve_version_without_loading,
};

/// A machine with nothing on it but what a test puts there.
struct Machine {
    folder: tempfile::TempDir,
    events: Mutex<Vec<Event>>,
}

impl Machine {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), events: Mutex::default() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A Python without `onnxruntime` whose pip runs `install`, with the target folder in `$target`.
    fn python(&self, install: &str) -> PathBuf {
        let path = self.path("python3");
        let script = format!(
            "#!/bin/sh\nif [ \"$1\" = -c ]; then echo '{{\"folders\": []}}'; exit 0; fi\n\
             echo \"$@\" >> '{log}'\nwhile [ $# -gt 0 ]; do [ \"$1\" = --target ] && target=\"$2\"; shift; done\n{install}\n",
            log = self.path("pip.log").display(),
        );
        fs_err::write(&path, script).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    fn n_pip_calls(&self) -> usize {
        fs_err::read_to_string(self.path("pip.log")).map_or(0, |log| log.lines().count())
    }

    /// Calls with an environment that has this Python and these library folders.
    fn with<T>(
        &self,
        python: &[PathBuf],
        library_dirs: &[PathBuf],
        call: impl FnOnce(Environment) -> T,
    ) -> T {
        let on_event = |event: &Event| self.events.lock().unwrap().push(event.clone());
        call(Environment {
            ort_dylib_path: None,
            python: python.to_vec(),
            library_dirs: library_dirs.to_vec(),
            cache_dir: self.path("cache"),
            offline: false,
            on_event: &on_event,
        })
    }

    fn library(&self, path: &str) -> PathBuf {
        let path = self.path(path);
        fs_err::create_dir_all(path.parent().unwrap()).unwrap();
        fs_err::write(&path, b"not really a library").unwrap();
        path
    }
}

const WHEEL: &str = "sleep 0.3; mkdir -p \"$target/onnxruntime/capi\" && \
    echo lib > \"$target/onnxruntime/capi/libonnxruntime.so.1.31.1\" && echo x > \"$target/onnxruntime/other.py\"";

fn version(major: u32, minor: u32, patch: u32) -> Version {
    Version { major, minor, patch }
}

#[test]
fn installs_once_and_remembers() {
    let machine = Machine::new();
    let python = [PathBuf::from("no-such-python"), machine.python(WHEEL)];
    let planned = machine.with(&python, &[], |e| resolve_version_without_loading(&e)).unwrap();
    assert_eq!((planned.version, planned.present), (PINNED_VERSION, false));
    assert_eq!(machine.n_pip_calls(), 0);

    let located = machine.with(&python, &[], |e| resolve(&e)).unwrap();
    assert_eq!((located.version, located.found_by), (PINNED_VERSION, FoundBy::Installation));
    assert!(located.path.is_file() && located.path.is_absolute());
    let runtime = machine.path("cache/runtime");
    assert!(!runtime.join("staging").exists());
    assert!(!runtime.join("onnxruntime-1.31.1/onnxruntime/other.py").exists());
    let events = machine.events.lock().unwrap().clone();
    assert!(matches!(&events[..], [Event::Installing { .. }, Event::Installed { .. }]), "{events:?}");

    // From here on no Python is needed.
    let again = machine.with(&[], &[], |e| resolve(&e)).unwrap();
    assert_eq!(again, located);
    let started = Instant::now();
    let planned = machine.with(&[], &[], |e| resolve_version_without_loading(&e)).unwrap();
    assert!(started.elapsed() < Duration::from_millis(50), "one stat and a small file");
    assert_eq!((planned.version, planned.present), (PINNED_VERSION, true));
    // Without the record the installation is found again.
    fs_err::remove_file(runtime.join("resolved.json")).unwrap();
    assert_eq!(machine.with(&[], &[], |e| resolve(&e)).unwrap(), located);
    assert_eq!(machine.n_pip_calls(), 1);
}

#[test]
fn two_at_once_install_once() {
    let machine = Machine::new();
    let python = [machine.python(WHEEL)];
    let results: Vec<_> = std::thread::scope(|scope| {
        let spawn = || scope.spawn(|| machine.with(&python, &[], |e| resolve(&e)).unwrap());
        let threads = [spawn(), spawn()];
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert_eq!(results[0], results[1]);
    assert_eq!(machine.n_pip_calls(), 1);
    assert!(machine.events.lock().unwrap().iter().any(|e| matches!(e, Event::Waiting { .. })));
}

#[test]
fn an_installation_that_was_killed_is_started_again() {
    let machine = Machine::new();
    machine.library("cache/runtime/staging/wheel/onnxruntime/capi/half.so");
    fs_err::create_dir_all(machine.path("cache/runtime/onnxruntime-1.31.1/onnxruntime")).unwrap();
    let python = [machine.python(WHEEL)];
    assert!(machine.with(&python, &[], |e| resolve(&e)).is_ok());
}

#[test]
fn the_systems_library_is_found_and_an_old_one_is_not_used() {
    let machine = Machine::new();
    machine.library("old/libonnxruntime.so.1.17.0");
    let good = machine.library("lib/libonnxruntime.so.1.24.2");
    machine.library("lib/libonnxruntime.so.1.23.0");
    let dirs = [machine.path("missing"), machine.path("old"), machine.path("lib")];
    let located = machine.with(&[], &dirs, |e| resolve(&e)).unwrap();
    assert_eq!((located.path, located.version, located.found_by), (good, version(1, 24, 2), FoundBy::System));
    let skipped = machine.path("old/libonnxruntime.so.1.17.0");
    let events = machine.events.lock().unwrap().clone();
    assert_eq!(events, [Event::Skipped { path: skipped, version: version(1, 17, 0) }]);
}

#[test]
fn a_python_package_comes_before_the_system() {
    let machine = Machine::new();
    let wheel = machine.library("site/onnxruntime/capi/libonnxruntime.so.1.30.0");
    machine.library("lib/libonnxruntime.so.1.31.0");
    let python = machine.path("python3");
    let script =
        format!("#!/bin/sh\necho '{{\"folders\": [\"{}\"]}}'\n", machine.path("site/onnxruntime").display());
    fs_err::write(&python, script).unwrap();
    std::fs::set_permissions(&python, std::fs::Permissions::from_mode(0o755)).unwrap();
    let located = machine.with(&[python], &[machine.path("lib")], |e| resolve(&e)).unwrap();
    assert_eq!((located.path, located.found_by), (wheel, FoundBy::PythonPackage));
}

#[test]
fn a_replaced_library_is_looked_at_again() {
    let machine = Machine::new();
    let dirs = [machine.path("lib")];
    let library = machine.library("lib/libonnxruntime.so");
    fs_err::write(&library, b"VERS_1.24.0\0").unwrap();
    assert_eq!(machine.with(&[], &dirs, |e| resolve(&e)).unwrap().version, version(1, 24, 0));
    fs_err::write(&library, b"VERS_1.25.0\0 longer").unwrap();
    let planned = machine.with(&[], &dirs, |e| resolve_version_without_loading(&e)).unwrap();
    assert_eq!(planned.version, version(1, 25, 0));
}

#[test]
fn ort_dylib_path_is_an_order() {
    let machine = Machine::new();
    machine.library("lib/libonnxruntime.so.1.31.0");
    let dirs = [machine.path("lib")];
    let resolve_path = |path: &Path| {
        machine.with(&[], &dirs, |mut e| {
            e.ort_dylib_path = Some(path.to_owned());
            resolve(&e)
        })
    };
    let own = machine.library("own/libonnxruntime.so.1.26.0");
    let located = resolve_path(&own).unwrap();
    assert_eq!((located.version, located.found_by), (version(1, 26, 0), FoundBy::OrtDylibPath));
    assert_eq!(resolve_path(own.parent().unwrap()).unwrap().path, located.path);
    // What was remembered for another value of the variable does not count.
    assert_eq!(machine.with(&[], &dirs, |e| resolve(&e)).unwrap().version, version(1, 31, 0));

    let old = machine.library("own/old/libonnxruntime.so.1.21.9");
    assert!(
        resolve_path(&old).unwrap_err().to_string().contains("version 1.21.9; at least 1.22.0 is needed")
    );
    let error = resolve_path(&machine.path("nothing.so")).unwrap_err().to_string();
    assert!(error.contains("nothing.so"), "{error}");
    let text = machine.library("own/text/readme.txt");
    assert!(matches!(resolve_path(&text), Err(ProvisionError::BadDylibPath { .. })));
}

#[test]
fn errors_say_what_to_do() {
    let machine = Machine::new();
    let python = [machine.python("echo 'ERROR: no route to host' >&2; exit 1")];
    let error = machine.with(&python, &[], |e| resolve(&e)).unwrap_err().to_string();
    assert!(error.contains("no route to host") && error.contains("by hand"), "{error}");
    assert_eq!(machine.n_pip_calls(), 1, "a failure that would repeat is not repeated");

    let error = machine.with(&python, &[], |mut e| {
        e.offline = true;
        resolve(&e)
    });
    let error = error.unwrap_err().to_string();
    assert!(error.contains("offline") && error.contains("pip install --no-deps --target"), "{error}");

    let error = machine.with(&["no-such-python".into()], &[], |e| resolve(&e)).unwrap_err().to_string();
    assert!(error.contains("no Python with pip") && error.contains("`no-such-python`"), "{error}");

    let python = [machine.python("echo '/usr/bin/python3: No module named pip' >&2; exit 1")];
    let error = machine.with(&python, &[], |e| resolve(&e)).unwrap_err();
    assert!(matches!(error, ProvisionError::NoPip { .. }), "{error}");
    assert!(!machine.path("cache/runtime/staging").exists());
}

#[test]
fn a_python_without_a_wheel_fetches_another_ones() {
    let machine = Machine::new();
    let install = format!(
        "if grep -q 'python-version 3.12' '{}'; then {WHEEL}; exit 0; fi\n\
         echo 'ERROR: No matching distribution found for onnxruntime' >&2; exit 1",
        machine.path("pip.log").display()
    );
    let python = [machine.python(&install)];
    assert!(machine.with(&python, &[], |e| resolve(&e)).is_ok());
    assert_eq!(machine.n_pip_calls(), 3);
}
