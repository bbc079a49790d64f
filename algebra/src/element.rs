//! The two element types of arguments.

use std::borrow::Cow;

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
}

/// f32 or f64.
pub trait Element: sealed::Sealed + Copy + Send + Sync + 'static {
    /// Distance between 1 and the next value, the unit of default cut-offs.
    const EPSILON: f64;

    fn widen(self) -> f64;

    /// All of them as f64, which f64 already are.
    fn widen_all(values: &[Self]) -> Cow<'_, [f64]>;
}

impl Element for f32 {
    const EPSILON: f64 = f32::EPSILON as f64;

    fn widen(self) -> f64 {
        f64::from(self)
    }

    fn widen_all(values: &[Self]) -> Cow<'_, [f64]> {
        values.iter().map(|value| f64::from(*value)).collect()
    }
}

impl Element for f64 {
    const EPSILON: f64 = f64::EPSILON;

    fn widen(self) -> f64 {
        self
    }

    fn widen_all(values: &[Self]) -> Cow<'_, [f64]> {
        values.into()
    }
}
