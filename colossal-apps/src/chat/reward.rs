//! Reward models: a decoder with a score head, read at the last token of an answer.

use anyhow::Result;
use colossal_models::train::{Sequences, Trainer};
use colossal_models::{CausalLm, Tensor, Tokens, no_grad};

use super::Progress;
use super::reward_loss::reward_loss;

/// A tokenised pair: the conversation with the better and with the worse answer.
pub type TokenPair = (Vec<i32>, Vec<i32>);

/// Trains for `steps` steps of `batch` pairs (of all ranks together).
pub fn reward(
    trainer: &mut Trainer,
    data: &[TokenPair],
    batch: usize,
    steps: u64,
    progress: &mut Progress,
) -> Result<()> {
    trainer.plan.whole_sequences("reward")?;
    let order = Sequences::new(data.len(), trainer.seed());
    let (part, parts) = trainer.data_part();
    while trainer.steps() < steps {
        let picked = order.take(trainer.steps() * batch as u64, batch);
        let own: Vec<&TokenPair> = picked
            .iter()
            .skip(part * batch / parts)
            .take(batch / parts)
            .map(|i| &data[*i])
            .collect();
        let rows: Vec<&[i32]> =
            own.iter().map(|p| &p.0[..]).chain(own.iter().map(|p| &p.1[..])).collect();
        let mut correct = 0;
        let tokens = rows.iter().map(|r| r.len()).sum::<usize>() * parts;
        let report = trainer.train(tokens, tokens / (2 * batch).max(1), |model, _| {
            let (scores, seq) = token_scores(model, &rows)?;
            let last = last_scores(&scores.to_vec()?, &rows, seq);
            let (chosen, rejected) = last.split_at(own.len());
            let loss = reward_loss(chosen, rejected, 0.0, 0.01, 1.0 / batch as f32);
            correct = loss.correct;
            let mut gradient = vec![0.0; rows.len() * seq];
            let slopes = loss.chosen.iter().chain(&loss.rejected);
            for (i, (row, slope)) in rows.iter().zip(slopes).enumerate() {
                gradient[i * seq + row.len() - 1] = *slope;
            }
            Tensor::external(loss.value, &[(&scores, gradient)])
        })?;
        progress.step(
            "reward",
            report.step,
            &[
                ("loss", f64::from(report.loss)),
                ("accuracy", correct as f64 / own.len().max(1) as f64),
            ],
        );
    }
    Ok(())
}

/// The reward of each conversation under a score model.
pub fn score(model: &CausalLm, rows: &[&[i32]]) -> Result<Vec<f32>> {
    let mut all = Vec::with_capacity(rows.len());
    for rows in rows.chunks(64) {
        let (scores, seq) = no_grad(|| token_scores(model, rows))?;
        all.extend(last_scores(&scores.to_vec()?, rows, seq));
    }
    Ok(all)
}

/// The share of held-out pairs whose chosen answer has the larger reward.
pub fn accuracy(model: &CausalLm, data: &[TokenPair]) -> Result<f64> {
    let chosen = score(model, &data.iter().map(|p| &p.0[..]).collect::<Vec<_>>())?;
    let rejected = score(model, &data.iter().map(|p| &p.1[..]).collect::<Vec<_>>())?;
    let correct = chosen.iter().zip(&rejected).filter(|(c, r)| c > r).count();
    Ok(correct as f64 / data.len().max(1) as f64)
}

/// One number per token, `[rows, seq]`.
pub(crate) fn token_scores(
    model: &CausalLm,
    rows: &[&[i32]],
) -> colossal_models::Result<(Tensor, usize)> {
    let (ids, seq, lengths) = pad(rows);
    Ok((model.forward(Tokens::padded(model.scope(), &ids, seq, lengths)?)?, seq))
}

/// Rows padded on the right to the longest.
pub(crate) fn pad(rows: &[&[i32]]) -> (Vec<i32>, usize, Vec<i32>) {
    let seq = rows.iter().map(|r| r.len()).max().unwrap_or(0);
    let mut ids = Vec::with_capacity(rows.len() * seq);
    for row in rows {
        ids.extend_from_slice(row);
        ids.resize(ids.len() + seq - row.len(), 0);
    }
    (ids, seq, rows.iter().map(|r| r.len() as i32).collect())
}

fn last_scores(scores: &[f32], rows: &[&[i32]], seq: usize) -> Vec<f32> {
    rows.iter().enumerate().map(|(i, row)| scores[i * seq + row.len() - 1]).collect()
}
