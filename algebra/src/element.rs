//! The two element types of arguments.

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
}

impl Element for f32 {
    const EPSILON: f64 = f32::EPSILON as f64;

    fn widen(self) -> f64 {
        f64::from(self)
    }
}

impl Element for f64 {
    const EPSILON: f64 = f64::EPSILON;

    fn widen(self) -> f64 {
        self
    }
}
