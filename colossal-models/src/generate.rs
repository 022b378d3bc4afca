//! Generation with a KV cache: prompts of unequal length side by side, finished ones leave.
//!
//! A draw depends on the seed, the prompt's number and the position only, so neighbours in the
//! batch do not change a result. Order: temperature, top-k, top-p, draw (or argmax, the lowest id
//! on ties).

use colossal_kernels as kernels;
use colossal_tensor::random::Stream;
use colossal_tensor::{Error, Result, no_grad};

use crate::decode::{Decoding, Next};
use crate::decoder::CausalLm;

/// How tokens are chosen and when to stop.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// Only the `k` most likely tokens; 0 is all.
    pub top_k: usize,
    /// Only the most likely tokens that together have this probability.
    pub top_p: f32,
    /// At most so many tokens after the prompt.
    pub max_new_tokens: usize,
    /// A sequence ends with (and includes) any of these.
    pub stop: Vec<i32>,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Sampling {
        Sampling {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            max_new_tokens: 128,
            stop: vec![],
            seed: 0,
        }
    }
}

/// What was generated for one prompt.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Completion {
    /// The new tokens, the stop token included.
    pub ids: Vec<i32>,
    /// The log-probability of each under the model at the given temperature (1 when greedy).
    pub logprobs: Vec<f32>,
    /// Did it end with a stop token?
    pub stopped: bool,
}

/// Continues every prompt. `on_token(prompt, token)` is called as tokens are chosen.
///
/// # Errors
/// An empty prompt, or one that leaves no room below the model's `max_position_embeddings`.
pub fn generate(
    model: &CausalLm,
    prompts: &[Vec<i32>],
    sampling: &Sampling,
    mut on_token: impl FnMut(usize, i32),
) -> Result<Vec<Completion>> {
    let mut done = vec![Completion::default(); prompts.len()];
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
    let limit = model.config.max_positions();
    if let Some(bad) = prompts.iter().position(Vec::is_empty) {
        return Err(Error::Other(format!(
            "generate: prompt {bad} is empty; give it at least one token"
        )));
    }
    if longest >= limit {
        return Err(Error::Other(format!(
            "generate: a prompt of {longest} tokens leaves no room in the model's {limit} positions"
        )));
    }
    let new = sampling.max_new_tokens.min(limit - longest);
    if prompts.is_empty() || new == 0 {
        return Ok(done);
    }
    no_grad(|| {
        let mut decoding =
            Decoding::new(model, prompts.len(), longest + new, sampling.temperature <= 0.0);
        // Which prompt each row of the batch is.
        let mut rows: Vec<usize> = (0..prompts.len()).collect();
        let mut step: Vec<Vec<i32>> = prompts.to_vec();
        let entries = model.config.vocab_size();
        let ended = |c: &Completion| c.stopped || c.ids.len() == new;
        loop {
            let mut given = decoding.forward(&step)?;
            let stats = match &mut given {
                Next::Best(_) => vec![],
                Next::Logits(logits) => {
                    let vocab = logits.len() / rows.len();
                    // A plan may have filled up the vocabulary.
                    let fill = |row: &mut [f32]| row[entries..].fill(f32::NEG_INFINITY);
                    logits.chunks_mut(vocab).for_each(fill);
                    at_temperature(logits, vocab, sampling.temperature)
                }
            };
            let mut next = Vec::with_capacity(rows.len());
            let mut going = Vec::new();
            for (i, row) in rows.iter().enumerate() {
                let completion = &mut done[*row];
                if ended(completion) {
                    continue;
                }
                let (token, logprob) = match &given {
                    Next::Best(best) => best[i],
                    Next::Logits(logits) => {
                        let position = completion.ids.len() as u64;
                        let draw = Stream::new(sampling.seed, *row as u64).uniform(position);
                        let row = &logits[i * logits.len() / rows.len()..][..entries];
                        choose(row, stats[i], sampling, draw)
                    }
                };
                completion.ids.push(token);
                completion.logprobs.push(logprob);
                on_token(*row, token);
                completion.stopped = sampling.stop.contains(&token);
                if !ended(completion) {
                    going.push(i);
                    next.push(vec![token]);
                }
            }
            if going.is_empty() {
                return Ok::<(), Error>(());
            }
            if decoding.holds_ended() && 2 * going.len() > rows.len() {
                // What those that have ended are fed is of no interest.
                step = vec![vec![0]; rows.len()];
                going.iter().zip(next).for_each(|(i, token)| step[*i] = token);
                continue;
            }
            if going.len() < rows.len() {
                decoding.keep(&going)?;
                rows = going.iter().map(|i| rows[*i]).collect();
            }
            step = next;
        }
    })?;
    Ok(done)
}

/// Divides rows of logits by the temperature (0 counts as 1); the largest of each row, and the
/// logarithm of the sum of its exponentials.
fn at_temperature(logits: &mut [f32], vocab: usize, temperature: f32) -> Vec<(f32, f32)> {
    if temperature > 0.0 && temperature != 1.0 {
        logits.iter_mut().for_each(|l| *l /= temperature);
    }
    let rows = logits.len() / vocab.max(1);
    let (mut max, mut sum) = (vec![0.0; rows], vec![0.0; rows]);
    kernels::logits_stats(logits, vocab, &mut max, &mut sum);
    max.into_iter().zip(sum).map(|(max, sum)| (max, max + sum.ln())).collect()
}

/// Chooses a token and gives its log-probability before top-k and top-p.
fn choose(logits: &[f32], (max, lse): (f32, f32), s: &Sampling, draw: f64) -> (i32, f32) {
    let logprob = |i: usize| logits[i] - lse;
    if s.temperature <= 0.0 {
        let best = logits.iter().position(|l| *l == max).unwrap_or(0);
        return (best as i32, logprob(best));
    }
    let weight = |i: usize| f64::from(logits[i] - max).exp();
    let mut kept: Vec<usize> = (0..logits.len()).collect();
    if s.top_k > 0 || s.top_p < 1.0 {
        kept.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b)));
        if s.top_k > 0 {
            kept.truncate(s.top_k);
        }
    }
    let mut weights: Vec<f64> = kept.iter().map(|i| weight(*i)).collect();
    let mut total: f64 = weights.iter().sum();
    if s.top_p < 1.0 {
        let mut cumulative = 0.0;
        let enough = weights.iter().position(|w| {
            cumulative += w / total;
            cumulative >= f64::from(s.top_p)
        });
        weights.truncate(enough.map_or(weights.len(), |n| n + 1));
        total = weights.iter().sum();
    }
    let mut left = draw * total;
    for (i, w) in kept.iter().zip(&weights) {
        left -= w;
        if left < 0.0 {
            return (*i as i32, logprob(*i));
        }
    }
    let last = weights.len().checked_sub(1).map_or(0, |n| kept[n]);
    (last as i32, logprob(last))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(logits: &[f32], s: &Sampling, draw: f64) -> (i32, f32) {
        let mut logits = logits.to_vec();
        let vocab = logits.len();
        let stats = at_temperature(&mut logits, vocab, s.temperature);
        super::choose(&logits, stats[0], s, draw)
    }

    #[test]
    fn greedy_takes_the_lowest_id_on_ties() {
        assert_eq!(choose(&[0.0, 2.0, 2.0], &Sampling::default(), 0.9).0, 1);
    }

    #[test]
    fn draws_follow_the_distribution_and_respect_top_k_and_top_p() {
        let logits = [0.0f32, 1.0, 2.0, -1.0];
        let s = Sampling { temperature: 1.0, ..Sampling::default() };
        let stream = Stream::new(3, 0);
        let n = 40_000;
        let mut counts = [0.0; 4];
        for i in 0..n {
            counts[choose(&logits, &s, stream.uniform(i)).0 as usize] += 1.0 / n as f64;
        }
        for (i, count) in counts.iter().enumerate() {
            let p = f64::from(choose_logprob(&logits, i)).exp();
            assert!((count - p).abs() < 0.01, "{i}: {count} against {p}");
        }
        let only = |s: &Sampling| {
            (0..200)
                .map(|i| choose(&logits, s, stream.uniform(i)).0)
                .collect::<std::collections::BTreeSet<_>>()
        };
        assert_eq!(only(&Sampling { top_k: 2, ..s.clone() }), [1, 2].into());
        assert_eq!(only(&Sampling { top_p: 0.5, ..s }), [2].into());
    }

    fn choose_logprob(logits: &[f32], i: usize) -> f32 {
        let lse = logits.iter().map(|l| l.exp()).sum::<f32>().ln();
        logits[i] - lse
    }
}
