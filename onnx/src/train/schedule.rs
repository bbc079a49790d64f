//! How the learning rate changes over a run.

use serde::{Deserialize, Serialize};

/// A learning rate that rises linearly, then stays or falls.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Schedule {
    /// the highest rate
    pub rate: f32,
    /// steps over which the rate rises; the first has `rate / warm_up`, the last `rate`
    pub warm_up: u64,
    /// steps of the whole run
    pub total: u64,
    pub decay: Decay,
}

/// What happens after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Decay {
    Constant,
    /// half a cosine, from the full rate down to zero at the end (Loshchilov and Hutter 2017, without restarts)
    Cosine,
}

impl Schedule {
    /// Returns the rate of a step; steps count from 0. Beyond the end it is what it was at the end.
    pub fn rate(&self, step: u64) -> f32 {
        let rate = f64::from(self.rate);
        if step < self.warm_up {
            return (rate * (step + 1) as f64 / self.warm_up as f64) as f32;
        }
        match self.decay {
            Decay::Constant => self.rate,
            Decay::Cosine => {
                let length = self.total.saturating_sub(self.warm_up).max(1);
                let progress = ((step - self.warm_up) as f64 / length as f64).min(1.0);
                (rate * 0.5 * (1.0 + (std::f64::consts::PI * progress).cos())) as f32
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_rises_and_falls() {
        let schedule = Schedule { rate: 0.8, warm_up: 4, total: 12, decay: Decay::Cosine };
        let rates: Vec<f32> = (0..14).map(|step| schedule.rate(step)).collect();
        let expected = [0.2, 0.4, 0.6, 0.8, 0.8];
        assert!(rates.iter().zip(expected).all(|(r, e)| (r - e).abs() < 1e-6), "{rates:?}");
        assert!(rates[4..13].windows(2).all(|pair| pair[0] > pair[1]));
        assert!((rates[8] - 0.4).abs() < 1e-6, "half of it in the middle");
        assert_eq!(rates[12..], [0.0, 0.0]);
    }

    #[test]
    fn edges() {
        let schedule = |warm_up, total, decay| Schedule { rate: 0.5, warm_up, total, decay };
        assert!((schedule(0, 0, Decay::Constant).rate(7) - 0.5).abs() < f32::EPSILON);
        assert!((schedule(0, 10, Decay::Cosine).rate(0) - 0.5).abs() < f32::EPSILON);
        // all warm-up
        assert!((schedule(10, 10, Decay::Cosine).rate(9) - 0.5).abs() < f32::EPSILON);
        assert_eq!(schedule(3, 2, Decay::Cosine).rate(u64::MAX), 0.0);
    }
}
