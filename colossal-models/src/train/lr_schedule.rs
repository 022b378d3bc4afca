//! The learning rate by step: a linear warm-up, then a decay.

use serde::{Deserialize, Serialize};

/// What follows the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Decay {
    /// Stays at the peak.
    Constant,
    /// Falls in a straight line.
    Linear,
    /// Falls along half a cosine (Loshchilov & Hutter, 2017).
    #[default]
    Cosine,
}

/// Peak, shape and length of the learning rate.
///
/// ```
/// use colossal_models::train::{Decay, LrSchedule};
/// let s = LrSchedule { peak: 1.0, warmup: 2, total: 10, decay: Decay::Linear, floor: 0.0 };
/// assert_eq!([s.at(0), s.at(1), s.at(2), s.at(6), s.at(10)], [0.5, 1.0, 1.0, 0.5, 0.0]);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LrSchedule {
    /// The highest rate.
    pub peak: f32,
    /// Steps until it is reached.
    pub warmup: u64,
    /// Steps until the floor is reached.
    pub total: u64,
    /// The way down.
    pub decay: Decay,
    /// The lowest rate, as a share of the peak.
    pub floor: f32,
}

impl LrSchedule {
    /// Always this rate.
    pub fn constant(lr: f32) -> LrSchedule {
        LrSchedule { peak: lr, warmup: 0, total: 0, decay: Decay::Constant, floor: 0.0 }
    }

    /// The rate of step `step`, counted from 0.
    pub fn at(&self, step: u64) -> f32 {
        if step < self.warmup {
            return self.peak * (step + 1) as f32 / self.warmup as f32;
        }
        let span = self.total.saturating_sub(self.warmup).max(1) as f32;
        let done = ((step - self.warmup) as f32 / span).min(1.0);
        let left = match self.decay {
            Decay::Constant => 1.0,
            Decay::Linear => 1.0 - done,
            Decay::Cosine => 0.5 * (1.0 + (std::f32::consts::PI * done).cos()),
        };
        self.peak * (self.floor + (1.0 - self.floor) * left)
    }
}
