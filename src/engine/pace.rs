//! How fast images were evaluated. It belongs to a run: no artifact and no key knows it.

use merganser_stages::{Progress, ProgressUnit};
use serde::{Deserialize, Serialize};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Images and the time that they took, loading of the model not counted.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pace {
    pub images: u64,
    pub seconds: f64,
}

/// Measures a pace from the progress that a unit tells.
#[derive(Debug, Default)]
pub struct Stopwatch(Mutex<Option<Noted>>);

#[derive(Clone, Copy, Debug)]
struct Noted {
    first: (Instant, u64),
    last: (Instant, u64),
}

impl Stopwatch {
    /// Notes how far a unit was at a time.
    pub fn note(&self, progress: &Progress, now: Instant) {
        if progress.unit != ProgressUnit::Images {
            return;
        }
        let mut noted = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let here = (now, progress.done);
        match &mut *noted {
            None => *noted = Some(Noted { first: here, last: here }),
            // A count that starts again belongs to another model, such as a baseline; the first is what the unit is about.
            Some(noted) if noted.last.1 < progress.total && progress.done > noted.last.1 => noted.last = here,
            Some(_) => {}
        }
    }

    /// The pace between the first and the last that was noted.
    pub fn pace(&self) -> Option<Pace> {
        let noted = (*self.0.lock().unwrap_or_else(PoisonError::into_inner))?;
        let images = noted.last.1 - noted.first.1;
        let seconds = noted.last.0.duration_since(noted.first.0).as_secs_f64();
        (images > 0 && seconds > 0.0).then_some(Pace { images, seconds })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn images(done: u64) -> Progress {
        Progress { done, total: 100, unit: ProgressUnit::Images, figures: [None; 2] }
    }

    #[test]
    fn counts_images_from_the_first_to_the_last_note() {
        let (watch, start) = (Stopwatch::default(), Instant::now());
        assert_eq!(watch.pace(), None);
        watch.note(&images(0), start);
        assert_eq!(watch.pace(), None);
        let bytes = Progress { unit: ProgressUnit::Bytes, ..images(7) };
        watch.note(&bytes, start);
        watch.note(&images(40), start + Duration::from_secs(1));
        watch.note(&images(100), start + Duration::from_secs(4));
        assert_eq!(watch.pace(), Some(Pace { images: 100, seconds: 4.0 }));
    }

    #[test]
    fn leaves_out_models_that_are_evaluated_after_the_first() {
        let (watch, start) = (Stopwatch::default(), Instant::now());
        for (done, seconds) in [(0, 0), (100, 4), (0, 10), (100, 11)] {
            watch.note(&images(done), start + Duration::from_secs(seconds));
        }
        assert_eq!(watch.pace(), Some(Pace { images: 100, seconds: 4.0 }));
    }
}
