//! What an op keeps of an operand for its backward pass: the values, or how to compute them again.
//!
//! Outputs of activations and norms are cheap to compute from what their own backward keeps anyway, so a
//! product that takes one keeps the recipe: the values go when the forward pass drops them. Backward of the
//! activation makes them once more on its way, in the place of the gradient that it was given, and the
//! gradient of the product's weight waits for that. Same formula, same inputs: the same bits.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::autograd::no_grad;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// How to compute a tensor again. Shared by all who keep it; the last to go takes the values along.
pub(crate) struct Recipe {
    /// The op whose backward makes the values.
    op: u64,
    state: Mutex<State>,
}

enum State {
    /// It can be made.
    Kept(Box<dyn Fn() -> Result<Tensor> + Send>),
    /// Backward of the op is about to make it.
    Awaited,
    Made(Tensor),
}

impl Recipe {
    /// The number of the op whose backward makes the values.
    pub(crate) fn op(&self) -> u64 {
        self.op
    }

    /// Lets go of what they are made of, which the op's backward may overwrite.
    pub(crate) fn wait(&self) {
        let mut state = self.state.lock();
        if let State::Kept(_) = *state {
            *state = State::Awaited;
        }
    }

    /// Here they are.
    pub(crate) fn fill(&self, x: Tensor) {
        *self.state.lock() = State::Made(x);
    }

    fn get(&self) -> Result<Tensor> {
        let mut state = self.state.lock();
        let made = match &*state {
            State::Made(x) => return Ok(x.clone()),
            State::Kept(make) => no_grad(make)?,
            State::Awaited => {
                return Err(Error::Backward("an operand was to be made again and was not".into()));
            }
        };
        *state = State::Made(made.clone());
        Ok(made)
    }
}

/// An operand kept for backward.
pub(crate) enum Saved {
    Values(Tensor),
    Recipe(Arc<Recipe>),
}

impl Saved {
    /// The operand.
    pub(crate) fn get(&self) -> Result<Tensor> {
        match self {
            Saved::Values(x) => Ok(x.clone()),
            Saved::Recipe(recipe) => recipe.get(),
        }
    }

    /// The recipe, if there is no more.
    pub(crate) fn recipe(&self) -> Option<&Arc<Recipe>> {
        match self {
            Saved::Recipe(recipe) => Some(recipe),
            Saved::Values(_) => None,
        }
    }
}

impl Tensor {
    /// Keeps this operand for backward.
    pub(crate) fn save(&self) -> Saved {
        match self.recipe() {
            Some(recipe) if self.requires_grad() => Saved::Recipe(recipe.clone()),
            _ => Saved::Values(self.detach()),
        }
    }

    /// Says that backward of this tensor's op [makes it once more](crate::autograd::Backward::remake), and that
    /// `make` does, from what backward keeps in any case, for those who cannot wait.
    pub(crate) fn remade_by(self, make: impl Fn() -> Result<Tensor> + Send + 'static) -> Tensor {
        match self.edge().op() {
            Some(op) => {
                let state = Mutex::new(State::Kept(Box::new(make)));
                self.with_recipe(Arc::new(Recipe { op, state }))
            }
            None => self,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use crate::placement::Dim;
    use crate::storage::memory_stats;
    use crate::{
        Accumulator, Deferred, Dtype, GradSink, Grads, Init, Param, Params, Result, Scope, Tensor,
    };

    /// Square ones: `x.weight`, `w.weight`, `v.weight`.
    fn weights<const N: usize>(size: usize) -> Result<[Arc<Param>; N]> {
        let p = Params::new(&Scope::solo(), 0, Dtype::F32);
        let shape = [Dim::Other(size); 2];
        let weight = |name: &&str| p.at(name).tensor("weight", &shape, Init::Normal(1.0));
        let all = ["x", "w", "v"].iter().take(N).map(weight).collect::<Result<Vec<_>>>()?;
        Ok(all.try_into().expect("at most three weights"))
    }

    /// Bytes held between forward and backward of two products that share `act(x)`, and gradients.
    fn held(act: impl Fn(&Tensor) -> Result<Tensor>) -> Result<(usize, Vec<Vec<f32>>)> {
        let [x, a, b] = weights(32)?;
        let before = memory_stats().in_use;
        let y = act(&x.tensor())?;
        let sum = (&y.linear(&a.tensor(), None)? + &y.linear(&b.tensor(), None)?)?;
        let loss = sum.sum()?;
        drop((y, sum));
        let held = memory_stats().in_use - before;
        let grads: Grads = loss.backward()?;
        let of = |p| grads.get(p).map(<[f32]>::to_vec).unwrap_or_default();
        Ok((held, vec![of(&x), of(&a), of(&b)]))
    }

    #[test]
    fn products_keep_the_recipe_of_an_activation_and_give_the_same_gradients() -> Result<()> {
        type Act = fn(&Tensor) -> Result<Tensor>;
        let cases: [(Act, usize); 4] = [
            (Tensor::gelu_tanh, 1),
            (Tensor::silu, 1),
            // Its operands are results, which backward may overwrite.
            (|x| x.scale(0.5)?.swiglu(&x.scale(2.0)?), 1),
            // An older op needs an operand after backward of the activation.
            (|x| x.scale(0.5).and_then(|h| &h.mul(&h)? + &h.gelu()?), 0),
        ];
        for (act, recipes) in cases {
            let (held_recipe, grads) = held(act)?;
            // A reshape is no recipe: the values are kept.
            let (held_values, kept) = held(|x| act(x)?.reshape(&[32, 32]))?;
            assert_eq!(held_values - held_recipe, recipes * 32 * 32 * 4);
            assert!(grads.iter().all(|g| g.iter().any(|x| *x != 0.0)));
            assert_eq!(grads, kept);
        }
        Ok(())
    }

    #[test]
    fn a_weight_whose_operand_is_made_on_the_way_is_complete_after_it_now_or_later() -> Result<()> {
        let [x, w] = weights(4)?;
        let loss = || x.tensor().gelu()?.linear(&w.tensor(), None)?.sum();
        let now = loss()?.backward()?;
        assert_eq!(now.completed(), ["w.weight", "x.weight"]);
        let (mut later, mut deferred) = (Grads::default(), Deferred::default());
        loss()?.backward_into(&mut later, Some(&mut deferred))?;
        assert_eq!(later.completed(), ["x.weight"]);
        assert!(later.get(&w).is_none() && deferred.len() == 1);
        deferred.run(&mut later)?;
        assert_eq!(later.completed(), ["x.weight", "w.weight"]);
        assert_eq!([later.get(&x), later.get(&w)], [now.get(&x), now.get(&w)]);
        Ok(())
    }

    /// Nothing may be added to what is complete.
    #[derive(Default)]
    struct Strict(Grads);

    impl GradSink for Strict {
        fn accumulate(
            &mut self,
            param: &Arc<Param>,
            add: &mut dyn FnMut(Accumulator<'_>),
        ) -> Result<()> {
            let name = param.name().to_string();
            assert!(!self.0.completed().contains(&name), "{name} is complete");
            self.0.accumulate(param, add)
        }

        fn complete(&mut self, param: &Arc<Param>) -> Result<()> {
            self.0.complete(param)
        }
    }

    #[test]
    fn a_weight_used_twice_is_complete_after_the_older_operand() -> Result<()> {
        let [x, w] = weights(4)?;
        let loss = |swap: bool, values: bool| {
            let [a, b] = [1.0, 2.0].map(|by| x.tensor().scale(by)?.gelu());
            let [a, b] = [a?, b?].map(|h| if values { h.reshape(&[4, 4]) } else { Ok(h) });
            let [a, b] = if swap { [b?, a?] } else { [a?, b?] };
            // The product that is made last takes the older operand, or the younger one.
            let [a, b] = [a, b].map(|h| h.linear(&w.tensor(), None));
            (&a? + &b?)?.sum()
        };
        for swap in [false, true] {
            let want = loss(swap, true)?.backward()?;
            let mut now = Strict::default();
            loss(swap, false)?.backward_into(&mut now, None)?;
            assert_eq!(now.0.completed(), ["w.weight", "x.weight"]);
            let (mut later, mut deferred) = (Strict::default(), Deferred::default());
            loss(swap, false)?.backward_into(&mut later, Some(&mut deferred))?;
            deferred.run(&mut later)?;
            for got in [&now.0, &later.0] {
                assert_eq!([got.get(&x), got.get(&w)], [want.get(&x), want.get(&w)]);
            }
        }
        Ok(())
    }
}
