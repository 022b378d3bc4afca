//! Running one rank's part of a schedule.

use crate::action::Action;

/// What knows how to run an action: receive what it needs, compute, send what others need.
pub trait Executor {
    /// What can go wrong.
    type Error;

    /// Runs one action.
    fn execute(&mut self, action: Action) -> Result<(), Self::Error>;
}

/// Runs a rank's actions in order; stops at the first failure.
pub fn run<E: Executor>(actions: &[Action], executor: &mut E) -> Result<(), E::Error> {
    actions.iter().try_for_each(|action| executor.execute(*action))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::one_f_one_b;

    /// Two stages that square, on two ranks in one thread: gradients equal `d/dx x^4`.
    struct Squares {
        inputs: [Vec<f64>; 2],
        gradients: Vec<f64>,
    }

    impl Executor for Squares {
        type Error = ();
        fn execute(&mut self, action: Action) -> Result<(), ()> {
            let (stage, m) = (action.stage(), action.microbatch());
            match action {
                Action::Forward { .. } => {
                    let y = self.inputs[stage][m].powi(2);
                    if stage == 0 {
                        self.inputs[1][m] = y;
                    }
                }
                Action::Backward { .. } => {
                    let g = if stage == 1 { 1.0 } else { self.gradients[m] };
                    self.gradients[m] = g * 2.0 * self.inputs[stage][m];
                }
            }
            Ok(())
        }
    }

    #[test]
    fn an_executed_schedule_equals_serial() {
        let x = vec![0.5, 1.5, -2.0];
        let mut executor = Squares { inputs: [x.clone(), vec![0.0; 3]], gradients: vec![0.0; 3] };
        // The ranks' lists merged into one order that respects the needs.
        let mut merged = Vec::new();
        one_f_one_b(2, 3).in_order(|_, action| merged.push(action)).unwrap();
        run(&merged, &mut executor).unwrap();
        let wanted: Vec<f64> = x.iter().map(|x| 4.0 * x.powi(3)).collect();
        assert_eq!(executor.gradients, wanted);
    }
}
