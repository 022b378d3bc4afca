//! The forward pass of generation: prompts at first, then a token of each sequence at a time.
//!
//! On a GPU a step's ids, positions and lengths lie there, so the step is recorded when it comes for
//! the second time, and from then on it is one launch (CUDA graphs). Lengths are taken in buckets: a
//! longer one, or a smaller batch, is recorded anew. What needs the host in the midst of a step (the
//! routers of a mixture of experts, parameters that lie there) cannot be recorded and is launched
//! kernel by kernel; so is all, under `COLOSSAL_NO_GRAPHS`. Ranks in parallel, and the CPU, read
//! these numbers on the host.

use std::sync::{Arc, Mutex, MutexGuard};

use colossal_tensor::{
    Added, AttentionMask, Best, Error, KvCache, Numbers, Recorded, Region, Result, Tensor,
};

use crate::decoder::{CausalLm, Tokens};

/// What the last token of each sequence gave.
#[derive(Debug)]
pub(crate) enum Next {
    /// Logits, row after row.
    Logits(Vec<f32>),
    /// The most likely token, and its log-probability.
    Best(Vec<(i32, f32)>),
}

/// The same, where it was computed.
#[derive(Debug)]
enum Output {
    Logits(Tensor),
    Best(Best),
}

impl Output {
    fn read(&self) -> Result<Next> {
        match self {
            Output::Logits(logits) => Ok(Next::Logits(logits.to_vec()?)),
            Output::Best(best) => Ok(Next::Best(best.read()?)),
        }
    }
}

/// Sequences that are being generated.
#[derive(Debug)]
pub(crate) struct Decoding<'m> {
    model: &'m CausalLm,
    /// Dropped before the cache that its graph writes to.
    step: Option<Step>,
    cache: Arc<Mutex<KvCache>>,
    /// Can steps be recorded?
    records: bool,
    /// Of a step on a GPU: is the most likely token all that is asked for?
    greedy: bool,
}

/// A step of a batch while its longest sequence is of some bucket.
#[derive(Debug)]
struct Step {
    recorded: Option<Recorded<Output>>,
    numbers: Numbers,
    tokens: Arc<Tokens>,
    bucket: usize,
    /// Was it done once, launched kernel by kernel?
    warm: bool,
}

impl<'m> Decoding<'m> {
    /// Of so many sequences, of at most `capacity` tokens each.
    pub(crate) fn new(
        model: &'m CausalLm,
        batch: usize,
        capacity: usize,
        greedy: bool,
    ) -> Decoding<'m> {
        let cache = Arc::new(Mutex::new(KvCache::new(model.config.blocks(), batch, capacity)));
        let records = on_one_gpu(model) && std::env::var_os("COLOSSAL_NO_GRAPHS").is_none();
        Decoding { model, step: None, cache, records, greedy }
    }

    /// Feeds new tokens to every sequence; what each one's last gave.
    pub(crate) fn forward(&mut self, new: &[Vec<i32>]) -> Result<Next> {
        let added: Vec<i32> = new.iter().map(|n| n.len() as i32).collect();
        let next = match added.iter().all(|n| *n == 1) && on_one_gpu(self.model) {
            true => self.step(&new.concat())?,
            false => self.tokens(new, &added)?,
        };
        cache(&self.cache)?.advance(&added);
        Ok(next)
    }

    /// Should sequences that have ended stay in the batch while they are less than half of it? They
    /// cost little there, and a batch of another size must be recorded anew.
    pub(crate) fn holds_ended(&self) -> bool {
        self.records
    }

    /// Keeps only the sequences at `rows`, in that order.
    pub(crate) fn keep(&mut self, rows: &[usize]) -> Result<()> {
        self.step = None;
        cache(&self.cache)?.keep(rows)
    }

    /// Any number of tokens of each sequence.
    fn tokens(&self, new: &[Vec<i32>], added: &[i32]) -> Result<Next> {
        let longest = new.iter().map(Vec::len).max().unwrap_or(0);
        let mut ids = vec![0; new.len() * longest];
        let mut positions = vec![0; ids.len()];
        let lengths = cache(&self.cache)?.lengths().to_vec();
        for (b, tokens) in new.iter().enumerate() {
            ids[b * longest..b * longest + tokens.len()].copy_from_slice(tokens);
            for i in 0..tokens.len() {
                positions[b * longest + i] = lengths[b] + i as i32;
            }
        }
        let ids = self.model.scope().batch(&ids, &[new.len(), longest])?;
        let positions = ids.same_place(&positions)?;
        let mut tokens = self.of(ids, positions, Added::First(added.to_vec()));
        tokens.head_at = Some(new.iter().map(|n| n.len() - 1).collect());
        output(self.model, &Arc::new(tokens), false)?.read()
    }

    /// One token of each sequence, on a GPU.
    fn step(&mut self, new: &[i32]) -> Result<Next> {
        let (lengths, capacity) = {
            let cache = cache(&self.cache)?;
            (cache.lengths().to_vec(), cache.capacity())
        };
        let longest = lengths.iter().max().map_or(0, |l| *l as usize) + 1;
        if self.step.as_ref().is_none_or(|step| longest > step.bucket) {
            // The memory of the last one serves the next.
            self.step = None;
            self.step = Some(self.step_of(lengths.len(), bucket(longest).min(capacity))?);
        }
        let Some(step) = &mut self.step else { unreachable!("made above") };
        let lens = lengths.iter().map(|l| l + 1);
        let places = lengths.iter().enumerate().map(|(b, l)| (b * capacity) as i32 + l);
        let numbers = new.iter().chain(&lengths).copied().chain(lens).chain(places);
        step.numbers.set(&numbers.collect::<Vec<_>>())?;
        let (model, tokens, greedy) = (self.model, &step.tokens, self.greedy);
        if step.recorded.is_none() && step.warm && self.records {
            match Recorded::new(model.scope(), || output(model, tokens, greedy)) {
                Ok(recorded) => step.recorded = Some(recorded),
                Err(Error::Cuda(error)) if error.is_capture() => self.records = false,
                Err(error) => return Err(error),
            }
        }
        step.warm = true;
        match &step.recorded {
            Some(recorded) => recorded.launch()?.read(),
            None => output(model, tokens, greedy)?.read(),
        }
    }

    fn step_of(&self, batch: usize, bucket: usize) -> Result<Step> {
        let capacity = cache(&self.cache)?.capacity();
        let below = [self.model.config.vocab_size(), bucket, bucket + 1, batch * capacity];
        let numbers = Numbers::new(self.model.scope(), batch, &below)?;
        let row = |i| numbers.row(i, &[batch, 1]);
        let added = Added::One { lengths: row(2)?, places: row(3)? };
        let tokens = Arc::new(self.of(row(0)?, row(1)?, added));
        Ok(Step { recorded: None, numbers, tokens, bucket, warm: false })
    }

    fn of(&self, ids: Tensor, positions: Tensor, added: Added) -> Tokens {
        Tokens {
            ids,
            positions,
            mask: AttentionMask::causal(),
            cache: Some((self.cache.clone(), added)),
            head_at: None,
            goal: None,
            real: None,
            training: None,
        }
    }
}

fn on_one_gpu(model: &CausalLm) -> bool {
    let scope = model.scope();
    scope.device().stream().is_some() && scope.mesh().axes().iter().all(|(_, ranks)| *ranks == 1)
}

fn output(model: &CausalLm, tokens: &Arc<Tokens>, greedy: bool) -> Result<Output> {
    let logits = model.stack.forward(tokens)?.redistribute(Region::Whole)?;
    // A plan may have filled up the vocabulary.
    match greedy && logits.last_dim() == model.config.vocab_size() {
        true => Ok(Output::Best(logits.best()?)),
        false => Ok(Output::Logits(logits)),
    }
}

fn cache(cache: &Mutex<KvCache>) -> Result<MutexGuard<'_, KvCache>> {
    cache.lock().map_err(|_| Error::Other("generate: a layer panicked with the cache".into()))
}

/// The most tokens that a step of this many is recorded for: steps of a quarter, from 128 on.
fn bucket(tokens: usize) -> usize {
    tokens.next_multiple_of((tokens.next_power_of_two() / 4).max(128))
}

#[cfg(test)]
mod tests {
    #[test]
    fn buckets_grow_with_their_tokens() {
        let of = [1, 128, 129, 512, 513, 700, 1025, 4097].map(super::bucket);
        assert_eq!(of, [128, 128, 256, 512, 768, 768, 1536, 6144]);
    }
}
