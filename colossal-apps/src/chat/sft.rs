//! Supervised fine-tuning: the assistant's words of each conversation, and where it stops.

use anyhow::{Result, bail};
use colossal_models::train::{Batch, Sequences, Trainer, lm_loss};
use colossal_tensor::no_grad;

use super::Progress;

/// A tokenised conversation: ids, and which of them are learnt.
pub type Talk = (Vec<i32>, Vec<bool>);

/// Trains for `steps` steps of `batch` conversations (of all ranks together).
pub fn sft(
    trainer: &mut Trainer,
    data: &[Talk],
    batch: usize,
    steps: u64,
    progress: &mut Progress,
) -> Result<()> {
    if data.is_empty() {
        bail!("sft: no conversation is left; are all longer than the model's context?");
    }
    let order = Sequences::new(data.len(), trainer.seed());
    while trainer.steps() < steps {
        let picked = order.take(trainer.steps() * batch as u64, batch);
        let report = trainer.step(&together(data, &picked)?)?;
        progress.step(
            "sft",
            report.step,
            &[
                ("loss", f64::from(report.loss)),
                ("lr", f64::from(report.lr)),
                ("grad_norm", f64::from(report.grad_norm)),
                ("tokens_per_second", report.tokens_per_second),
            ],
        );
    }
    Ok(())
}

/// These conversations as one batch.
pub(crate) fn together(data: &[Talk], picked: &[usize]) -> Result<Batch> {
    let rows: Vec<(&[i32], &[bool])> =
        picked.iter().map(|i| (&data[*i].0[..], &data[*i].1[..])).collect();
    Ok(Batch::new(&rows, 0)?)
}

/// Mean loss per learnt token on held-out conversations, on one rank.
pub fn evaluate(trainer: &Trainer, data: &[Talk]) -> Result<f64> {
    let (mut sum, mut count) = (0.0, 0);
    for chunk in (0..data.len()).collect::<Vec<_>>().chunks(32) {
        let batch = together(data, chunk)?;
        count += batch.learnt();
        sum += f64::from(no_grad(|| lm_loss(&trainer.model, &batch, None, 1.0))?.item()?);
    }
    Ok(sum / count.max(1) as f64)
}
