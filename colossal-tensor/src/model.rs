//! Models as lists of layers, so that a pipeline stage is a range and builds only its own.

use std::fmt::Debug;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::params::Params;
use crate::recompute::recompute;
use crate::tensor::Tensor;

/// What flows from one layer to the next, in an order that the model fixes: a decoder passes one
/// tensor, an encoder-decoder its state and the memory it attends to, diffusion its state and the
/// conditioning, Evoformer `(msa, pair)`, a U-Net a stack that grows and shrinks with the skips.
/// What does not change from layer to layer (ids, positions, lengths, a cache) is the input `I`.
#[derive(Debug, Clone)]
pub struct Flow(Vec<Tensor>);

impl Flow {
    /// These tensors.
    pub fn new(tensors: Vec<Tensor>) -> Flow {
        Flow(tensors)
    }

    /// All tensors, in order.
    pub fn tensors(&self) -> &[Tensor] {
        &self.0
    }

    /// The only tensor.
    ///
    /// # Errors
    /// When there is another number of them.
    pub fn one(&self) -> Result<&Tensor> {
        match &self.0[..] {
            [x] => Ok(x),
            all => Err(Error::Other(format!("this layer takes one tensor, not {}", all.len()))),
        }
    }
}

impl From<Tensor> for Flow {
    fn from(x: Tensor) -> Flow {
        Flow(vec![x])
    }
}

/// One layer of a model that is fed an input `I`.
pub trait Layer<I>: Debug + Send + Sync {
    /// The layer's output. The first layer of a model ignores `flow`.
    fn forward(&self, input: &I, flow: &Flow) -> Result<Flow>;

    /// What the layer changes by itself after an optimizer's step, by no gradient: a router's
    /// correction bias. Every rank calls it.
    fn after_step(&self) -> Result<()> {
        Ok(())
    }
}

/// A model: a list of layers that can be built one by one.
pub trait Model {
    /// What `config.json` says.
    type Config: Clone + Debug + Send + Sync + 'static;
    /// What every layer is given beside the flow.
    type Input: Send + Sync + 'static;

    /// The number of layers, the embedding and the head included.
    fn depth(config: &Self::Config) -> usize;

    /// Builds layer `i`.
    fn layer(p: &Params, config: &Self::Config, i: usize) -> Result<Arc<dyn Layer<Self::Input>>>;
}

/// A range of a model's layers, built.
#[derive(Debug)]
pub struct Stack<I> {
    layers: Vec<Arc<dyn Layer<I>>>,
    /// Layers that are run again in backward instead of saved.
    recompute: bool,
}

impl<I: Send + Sync + 'static> Stack<I> {
    /// Builds all layers of `M`.
    pub fn build<M: Model<Input = I>>(p: &Params, config: &M::Config) -> Result<Stack<I>> {
        Stack::range::<M>(p, config, 0..M::depth(config))
    }

    /// Builds some layers of `M`.
    pub fn range<M: Model<Input = I>>(
        p: &Params,
        config: &M::Config,
        range: std::ops::Range<usize>,
    ) -> Result<Stack<I>> {
        let layers = range.map(|i| M::layer(p, config, i)).collect::<Result<_>>()?;
        Ok(Stack { layers, recompute: false })
    }

    /// The same layers, with the inner ones recomputed in backward (or not).
    pub fn recompute(mut self, on: bool) -> Stack<I> {
        self.recompute = on;
        self
    }

    /// Number of layers.
    pub fn len(&self) -> usize {
        self.layers.len()
    }

    /// Has it no layer?
    pub fn is_empty(&self) -> bool {
        self.layers.is_empty()
    }

    /// Tells all layers that the optimizer has made a step.
    pub fn after_step(&self) -> Result<()> {
        self.layers.iter().try_for_each(|layer| layer.after_step())
    }

    /// Runs all layers.
    pub fn forward(&self, input: &Arc<I>) -> Result<Tensor> {
        let mut flow = Flow(vec![]);
        for (i, layer) in self.layers.iter().enumerate() {
            // The first and last layer are the embedding and the head: cheap to run, dear to repeat.
            let inner = i > 0 && i + 1 < self.layers.len();
            flow = match &flow.0[..] {
                [x] if self.recompute && inner => {
                    let (layer, input) = (layer.clone(), input.clone());
                    recompute(x, move |x| {
                        Ok(layer.forward(&input, &Flow(vec![x.clone()]))?.one()?.clone())
                    })?
                    .into()
                }
                _ => layer.forward(input, &flow)?,
            };
        }
        flow.one().cloned()
    }
}
