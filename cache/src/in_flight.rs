//! Work that several threads may want at the same moment, done by one of them.
//!
//! Eight stages that start together and read the same base model should hash it once. The second thread waits for
//! the first, except when it is a rayon worker: a worker that blocks may be the one that the first depends on, so
//! it goes ahead and does the work twice. Doing it twice is only ever a waste, never wrong.

use std::collections::HashSet;
use std::hash::Hash;
use std::sync::{Condvar, Mutex, PoisonError};

/// The set of things being worked on.
#[derive(Debug)]
pub(crate) struct InFlight<K> {
    active: Mutex<HashSet<K>>,
    finished: Condvar,
}

/// Marks one thing as being worked on until dropped.
pub(crate) struct InFlightGuard<'a, K: Eq + Hash + Clone> {
    set: &'a InFlight<K>,
    /// `None` for a rayon worker that did not wait for the one before it.
    key: Option<K>,
}

impl<K: Eq + Hash + Clone> InFlight<K> {
    pub(crate) fn new() -> Self {
        Self { active: Mutex::new(HashSet::new()), finished: Condvar::new() }
    }

    /// Waits for whoever works on `key`, then claims it. The caller checks afterwards whether work is left.
    pub(crate) fn enter(&self, key: &K) -> InFlightGuard<'_, K> {
        let mut active = self.active.lock().unwrap_or_else(PoisonError::into_inner);
        while !active.insert(key.clone()) {
            if rayon::current_thread_index().is_some() {
                return InFlightGuard { set: self, key: None };
            }
            active = self.finished.wait(active).unwrap_or_else(PoisonError::into_inner);
        }
        InFlightGuard { set: self, key: Some(key.clone()) }
    }
}

impl<K: Eq + Hash + Clone> Drop for InFlightGuard<'_, K> {
    fn drop(&mut self) {
        if let Some(key) = &self.key {
            self.set.active.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
            self.set.finished.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn plain_threads_take_turns() {
        let set = InFlight::new();
        let inside = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let _guard = set.enter(&1);
                    assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                    std::thread::sleep(std::time::Duration::from_millis(2));
                    inside.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
    }

    #[test]
    fn rayon_workers_never_wait() {
        let set = InFlight::new();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        pool.install(|| {
            let _first = set.enter(&1);
            let _second = set.enter(&1);
        });
        drop(set.enter(&1));
    }
}
