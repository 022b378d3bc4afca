//! What an op keeps of an operand for its backward pass: the values, or how to compute them again.
//!
//! Outputs of activations and norms are cheap to compute from what their own backward keeps anyway,
//! so a product that takes one keeps the recipe: the values go when the forward pass drops them,
//! and exist once more while the products that share them run backward. Same kernel, same inputs:
//! the same bits.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::autograd::no_grad;
use crate::error::Result;
use crate::tensor::Tensor;

/// How to compute a tensor again. Shared by all who keep it; the last to go takes the values along.
pub(crate) struct Recipe {
    make: Box<dyn Fn() -> Result<Tensor> + Send + Sync>,
    made: Mutex<Option<Tensor>>,
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
            Saved::Recipe(recipe) => {
                let mut made = recipe.made.lock();
                if let Some(x) = &*made {
                    return Ok(x.clone());
                }
                let x = no_grad(|| (recipe.make)())?;
                Ok(made.insert(x).clone())
            }
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

    /// Says that `make` computes this tensor from what backward keeps in any case.
    pub(crate) fn remade_by(
        self,
        make: impl Fn() -> Result<Tensor> + Send + Sync + 'static,
    ) -> Tensor {
        match self.requires_grad() {
            true => {
                let (make, made) = (Box::new(make), Mutex::default());
                self.with_recipe(Arc::new(Recipe { make, made }))
            }
            false => self,
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::placement::Dim;
    use crate::storage::memory_stats;
    use crate::{Dtype, Grads, Init, Params, Result, Scope, Tensor};

    /// Bytes held between forward and backward of two products that share `act(x)`, and gradients.
    fn held(act: impl Fn(&Tensor) -> Result<Tensor>) -> Result<(usize, Vec<Vec<f32>>)> {
        let p = Params::new(&Scope::solo(), 0, Dtype::F32);
        let [x, a, b] = ["x", "a", "b"].map(|name| {
            let shape = [Dim::Other(32), Dim::Other(32)];
            p.at(name).tensor("weight", &shape, Init::Normal(1.0))
        });
        let (x, a, b) = (x?, a?, b?);
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
        let (held_recipe, grads) = held(Tensor::gelu_tanh)?;
        // A reshape is no recipe: the values are kept.
        let (held_values, kept) = held(|x| x.gelu_tanh()?.reshape(&[32, 32]))?;
        assert_eq!(held_values - held_recipe, 32 * 32 * 4);
        assert!(grads.iter().all(|g| g.iter().any(|x| *x != 0.0)));
        assert_eq!(grads, kept);
        Ok(())
    }
}
