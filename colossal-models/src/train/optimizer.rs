//! Optimizers: what they are told, and what a step of one parameter's piece does.

use std::ops::Range;

use colossal_kernels as kernels;
use colossal_tensor::kernels::{adafactor, adamw, adamw_masters, came, cast, lamb, lars, lion};
use colossal_tensor::storage::Buffer;
use colossal_tensor::{Result, View, ViewMut};
use serde::{Deserialize, Serialize};

use super::LrSchedule;

/// AdamW (Loshchilov & Hutter, 2019): decay is decoupled from the gradient, and applies to
/// matrices only; biases and norm weights are not decayed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct AdamW {
    /// The learning rate by step.
    pub lr: LrSchedule,
    /// Decay rates of the two moments.
    pub betas: (f32, f32),
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decoupled weight decay of matrices.
    pub weight_decay: f32,
    /// Gradients are scaled down to this global norm; 0 turns clipping off.
    pub clip: f32,
}

impl Default for AdamW {
    fn default() -> AdamW {
        AdamW {
            lr: LrSchedule::constant(3e-4),
            betas: (0.9, 0.999),
            eps: 1e-8,
            weight_decay: 0.0,
            clip: 1.0,
        }
    }
}

/// Any optimizer: a rule, and what all rules are told.
///
/// ```
/// use colossal_models::train::{AdamW, Optimizer, Rule};
/// let lion = Optimizer { rule: Rule::LION, ..AdamW::default().into() };
/// assert_eq!(lion.rule.name(), "lion");
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Optimizer {
    /// What a step does.
    pub rule: Rule,
    /// The learning rate by step.
    pub lr: LrSchedule,
    /// Weight decay of matrices.
    pub weight_decay: f32,
    /// Gradients are scaled down to this global norm; 0 turns clipping off.
    pub clip: f32,
}

impl From<AdamW> for Optimizer {
    fn from(o: AdamW) -> Optimizer {
        Optimizer {
            rule: Rule::AdamW { betas: o.betas, eps: o.eps },
            lr: o.lr,
            weight_decay: o.weight_decay,
            clip: o.clip,
        }
    }
}

impl From<AdamW> for Rule {
    fn from(o: AdamW) -> Rule {
        Optimizer::from(o).rule
    }
}

/// The step of an optimizer, with its own hyper-parameters; the constants are as published.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rule {
    /// Two moments of each element.
    AdamW {
        /// Decay rates of the moments.
        betas: (f32, f32),
        /// Added to the root of the second moment.
        eps: f32,
    },
    /// The sign of a momentum: one state; a learning rate of a third to a tenth of AdamW's.
    Lion {
        /// Weight of the momentum in the direction, decay rate of the momentum.
        betas: (f32, f32),
    },
    /// Adam's direction scaled to each parameter's norm, for large batches.
    Lamb {
        /// Decay rates of the moments.
        betas: (f32, f32),
        /// Added to the root of the second moment.
        eps: f32,
    },
    /// Momentum of gradients scaled to each parameter's norm, for large batches.
    Lars {
        /// Decay rate of the momentum.
        momentum: f32,
        /// Factor of the ratio of norms.
        trust: f32,
    },
    /// Second moments by row and column, no first moment: next to no state.
    Adafactor {
        /// The second moment decays at step `t` by `1 - t^-decay_rate`.
        decay_rate: f32,
        /// The learning rate is relative to the parameter's root mean square.
        scale_parameter: bool,
    },
    /// Adafactor with a momentum that is trusted by how steady it is: one state.
    Came {
        /// Decay rates of the momentum, the second moment and the disagreement of the two.
        betas: (f64, f64, f64),
    },
}

impl Rule {
    /// AdamW's defaults in PyTorch.
    pub const ADAMW: Rule = Rule::AdamW { betas: (0.9, 0.999), eps: 1e-8 };
    /// Lion (Chen et al., 2023).
    pub const LION: Rule = Rule::Lion { betas: (0.9, 0.99) };
    /// LAMB (You et al., 2020).
    pub const LAMB: Rule = Rule::Lamb { betas: (0.9, 0.999), eps: 1e-6 };
    /// LARS (You et al., 2017).
    pub const LARS: Rule = Rule::Lars { momentum: 0.9, trust: 0.001 };
    /// Adafactor (Shazeer & Stern, 2018) with an absolute learning rate.
    pub const ADAFACTOR: Rule = Rule::Adafactor { decay_rate: 0.8, scale_parameter: false };
    /// CAME (Luo et al., 2023).
    pub const CAME: Rule = Rule::Came { betas: (0.9, 0.999, 0.9999) };
    /// All of them.
    pub const ALL: [Rule; 6] =
        [Rule::ADAMW, Rule::LION, Rule::LAMB, Rule::LARS, Rule::ADAFACTOR, Rule::CAME];

    /// Its name in configurations and checkpoints.
    pub fn name(&self) -> &'static str {
        match self {
            Rule::AdamW { .. } => "adamw",
            Rule::Lion { .. } => "lion",
            Rule::Lamb { .. } => "lamb",
            Rule::Lars { .. } => "lars",
            Rule::Adafactor { .. } => "adafactor",
            Rule::Came { .. } => "came",
        }
    }

    /// The rule of that name, as published.
    pub fn named(name: &str) -> Option<Rule> {
        Rule::ALL.into_iter().find(|rule| rule.name() == name)
    }

    /// Does each element have a first moment?
    pub(super) fn first_moment(&self) -> bool {
        !matches!(self, Rule::Adafactor { .. })
    }

    /// Does each element have a second moment?
    pub(super) fn second_moment(&self) -> bool {
        matches!(self, Rule::AdamW { .. } | Rule::Lamb { .. })
    }

    /// How many factored statistics each parameter has.
    pub(super) fn factored(&self) -> usize {
        match self {
            Rule::Adafactor { .. } => 1,
            Rule::Came { .. } => 2,
            _ => 0,
        }
    }

    /// Does a step need sums over the whole parameter, so that all its holders take part?
    pub(super) fn sums(&self) -> bool {
        !matches!(self, Rule::AdamW { .. } | Rule::Lion { .. })
    }
}

/// State of the elements of one of this rank's pieces of the flat vector.
#[derive(Debug)]
pub(super) struct State {
    pub(super) range: Range<usize>,
    pub(super) m: Option<Buffer>,
    pub(super) v: Option<Buffer>,
    /// f32 masters, when parameters are held in less.
    pub(super) master: Option<Buffer>,
}

/// The same of a part of the piece, as slices; empty where there is none.
pub(super) struct Elements<'a> {
    m: ViewMut<'a, f32>,
    v: ViewMut<'a, f32>,
    /// f32 masters; without them, parameters are f32 themselves.
    master: Option<ViewMut<'a, f32>>,
}

impl State {
    pub(super) fn of(&mut self, own: &Range<usize>) -> Elements<'_> {
        fn part<'a>(
            buffer: &'a mut Option<Buffer>,
            own: &Range<usize>,
        ) -> Option<ViewMut<'a, f32>> {
            Some(buffer.as_mut()?.view_mut().range(own.clone()))
        }
        let none = || ViewMut::Cpu(&mut []);
        Elements {
            m: part(&mut self.m, own).unwrap_or_else(none),
            v: part(&mut self.v, own).unwrap_or_else(none),
            master: part(&mut self.master, own),
        }
    }
}

/// Factored statistics of one parameter, the same on all ranks that hold parts of it.
#[derive(Debug)]
pub(super) struct Factored {
    /// What this rank updates of it.
    piece: kernels::Piece,
    /// As many as [`Rule::factored`].
    pub(super) statistics: Vec<kernels::Factors>,
}

impl Factored {
    pub(super) fn new(rule: &Rule, piece: kernels::Piece) -> Factored {
        let statistics = (0..rule.factored()).map(|_| piece.factors()).collect();
        Factored { piece, statistics }
    }
}

/// One update, with all that its pieces have in common.
#[derive(Debug, Clone, Copy)]
pub(super) struct Update {
    pub(super) rule: Rule,
    /// Counted from 1.
    pub(super) step: u32,
    pub(super) lr: f32,
    pub(super) weight_decay: f32,
    /// Factor of the gradients.
    pub(super) scale: f32,
}

/// This rank's piece of one parameter.
pub(super) struct Held<'a, T> {
    pub(super) params: ViewMut<'a, T>,
    pub(super) grads: View<'a, f32>,
    pub(super) state: Elements<'a>,
    pub(super) factored: Option<&'a mut Factored>,
}

impl Update {
    /// Updates a piece; `sum` adds up over all holders of the parameter.
    pub(super) fn piece<T: kernels::Float>(
        &self,
        held: Held<'_, T>,
        sum: kernels::Sum<'_>,
    ) -> Result<()> {
        let Held { params, grads, state: Elements { m, v, master }, factored } = held;
        let (lr, weight_decay, scale) = (self.lr, self.weight_decay, self.scale);
        let (mut params_f32, params) = match (self.rule, master) {
            // Copies are written in the same pass.
            (Rule::AdamW { betas: (beta1, beta2), eps }, Some(master)) => {
                let rule = kernels::AdamW { lr, beta1, beta2, eps, weight_decay };
                return adamw_masters(&rule, self.step, scale, master, params, grads, m, v);
            }
            (_, Some(master)) => (master, Some(params)),
            (_, None) => (params.cast(), None),
        };
        let all = params_f32.reborrow();
        match self.rule {
            Rule::AdamW { betas: (beta1, beta2), eps } => {
                let rule = kernels::AdamW { lr, beta1, beta2, eps, weight_decay };
                adamw(&rule, self.step, all, grads, m, v, scale)?;
            }
            Rule::Lion { betas: (beta1, beta2) } => {
                let rule = kernels::Lion { lr, beta1, beta2, weight_decay };
                lion(&rule, all, grads, m, scale)?;
            }
            Rule::Lamb { betas: (beta1, beta2), eps } => {
                let rule = kernels::Lamb { lr, beta1, beta2, eps, weight_decay };
                lamb(&rule, self.step, all, grads, m, v, scale, sum)?;
            }
            Rule::Lars { momentum, trust } => {
                let rule = kernels::Lars { lr, momentum, trust, eps: 1e-8, weight_decay };
                lars(&rule, all, grads, m, scale, sum)?;
            }
            Rule::Adafactor { decay_rate, scale_parameter } => {
                let eps = (1e-30, 1e-3);
                let rule = kernels::Adafactor {
                    lr,
                    decay_rate,
                    eps,
                    clip: 1.0,
                    weight_decay,
                    scale_parameter,
                };
                if let Some(Factored { piece, statistics }) = factored
                    && let [second] = &mut statistics[..]
                {
                    adafactor(&rule, self.step, piece, all, grads, second, scale, sum)?;
                }
            }
            Rule::Came { betas } => {
                let eps = (1e-30, 1e-16);
                let rule = kernels::Came { lr, betas, eps, clip: 1.0, weight_decay };
                if let Some(Factored { piece, statistics }) = factored
                    && let [second, disagreement] = &mut statistics[..]
                {
                    let states = [second, disagreement];
                    came(&rule, piece, all, grads, m, states, scale, sum)?;
                }
            }
        }
        match params {
            Some(params) => cast(params_f32.as_view(), params),
            None => Ok(()),
        }
    }
}
