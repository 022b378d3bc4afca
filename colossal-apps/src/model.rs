//! Looking at a checkpoint: its sizes, its logits, its gradients.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, Result, bail};
use colossal_models::train::{Batch, lm_loss};
use colossal_models::{Device, Dtype, Scope, Tensor, Tokens, hf};
use colossal_tensor::no_grad;
use colossal_tensor::safetensors::{Owned, save};

/// What to compute, on which checkpoint.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// A Hugging Face folder.
    pub model: &'a Path,
    /// JSON: a list of equally long lists of token ids.
    pub ids: &'a Path,
    /// Also the loss and every gradient.
    pub loss: bool,
    /// Where: `auto`, `cpu`, `cuda` or `cuda:NUMBER`.
    pub device: &'a str,
}

/// Family, sizes and the ten largest parameters, as text.
pub fn info(folder: &Path) -> Result<String> {
    let model = hf::load(folder, &Scope::solo(), Dtype::Bf16, None)?;
    let mut params = model.params.all();
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{:#?}", model.config);
    let _ = writeln!(text, "parameters {} in {} tensors", model.elements(), params.len());
    params.sort_by_key(|p| std::cmp::Reverse(p.len()));
    for p in params.iter().take(10) {
        let _ = writeln!(text, "  {:<52} {:?}", p.name(), p.global_shape());
    }
    Ok(text)
}

/// Writes `logits [batch, seq, vocab]` (and `loss`, `grad.<name>`) in f32.
///
/// # Errors
/// When the ids are no list of equally long lists, or do not fit the model.
pub fn logits(request: &Request<'_>, out: &Path) -> Result<()> {
    let shown = request.ids.display();
    let text = std::fs::read_to_string(request.ids).with_context(|| shown.to_string())?;
    let rows: Vec<Vec<i32>> = serde_json::from_str(&text)
        .with_context(|| format!("{shown}: not a list of lists of token ids, as [[1, 2, 3]]"))?;
    let seq = rows.first().map_or(0, Vec::len);
    if seq == 0 || rows.iter().any(|r| r.len() != seq) {
        bail!("{shown}: rows must have one length of at least 1; pad or cut them");
    }
    let model = {
        let device = Device::named(request.device, 0)?;
        hf::load(request.model, &Scope::solo().on(&device), Dtype::F32, None)?
    };
    let ids: Vec<i32> = rows.concat();
    let mut tensors = BTreeMap::new();
    let y = no_grad(|| model.forward(Tokens::new(model.scope(), &ids, seq)?))?;
    tensors.insert("logits".to_string(), Owned::from_f32(&y.to_vec()?, y.shape(), Dtype::F32)?);
    if request.loss {
        let all = vec![true; seq];
        let sequences: Vec<(&[i32], &[bool])> = rows.iter().map(|r| (&r[..], &all[..])).collect();
        let batch = Batch::new(&sequences, 0)?;
        let loss = lm_loss(&model, &batch, None, 1.0 / batch.learnt() as f32)?;
        tensors.insert("loss".into(), Owned::from_f32(&[loss.item()?], &[1], Dtype::F32)?);
        let grads = loss.backward()?;
        let gathered = hf::gather(
            &model,
            |p| {
                let zeros = vec![0.0; p.len()];
                let grad = grads.get(p).unwrap_or(&zeros);
                Tensor::from_slice(p.scope(), grad, p.shape(), p.layout())
            },
            Dtype::F32,
        )?;
        tensors.extend(gathered.into_iter().map(|(name, t)| (format!("grad.{name}"), t)));
    }
    save(out, &tensors, &BTreeMap::new())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use colossal_tensor::safetensors::Archive;

    use super::*;

    fn golden() -> PathBuf {
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../colossal-models/tests/goldens/llama")
    }

    #[test]
    fn logits_loss_and_gradients_are_written_under_published_names() {
        let dir = tempfile::tempdir().unwrap();
        let reference = Archive::open(&[golden().join("golden.safetensors")]).unwrap();
        let ids = reference.get("ids").unwrap().to_ints().unwrap();
        let (path, out) = (dir.path().join("ids.json"), dir.path().join("out.safetensors"));
        std::fs::write(&path, format!("[{:?}, {:?}]", &ids[..7], &ids[7..])).unwrap();
        logits(&Request { model: &golden(), ids: &path, loss: true, device: "cpu" }, &out).unwrap();
        let ours = Archive::open(&[out]).unwrap();
        for name in
            reference.names().filter(|n| *n == "logits" || *n == "loss" || n.starts_with("grad."))
        {
            let (a, b) = (ours.get(name).unwrap(), reference.get(name).unwrap());
            assert_eq!(a.shape, b.shape, "{name}");
            let (a, b) = (a.to_vec().unwrap(), b.to_vec().unwrap());
            let largest = b.iter().fold(0.0f32, |m, x| m.max(x.abs()));
            assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() <= 1e-4 * largest), "{name}");
        }
    }

    #[test]
    fn bad_ids_are_refused_with_the_file_and_the_fix() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ids.json");
        for (text, words) in
            [("{", "list of lists"), ("[[1],[2,3]]", "one length"), ("[[99]]", "tokenizer")]
        {
            std::fs::write(&path, text).unwrap();
            let request = Request { model: &golden(), ids: &path, loss: false, device: "cpu" };
            let error = format!("{:#}", logits(&request, &dir.path().join("out")).unwrap_err());
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn info_names_the_sizes() {
        let text = info(&golden()).unwrap();
        assert!(text.contains("num_key_value_heads: 2") && text.contains("parameters"), "{text}");
    }
}
