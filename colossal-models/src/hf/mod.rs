//! Hugging Face folders in and out: `config.json`, `model.safetensors` or its shards.
//!
//! LLaMA parameters carry the published names. GPT-2 files fuse q, k, v and store matrices as
//! `[in, out]`: [`source`] is the one map. Reading touches only the bytes of a rank's own shard.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use colossal_tensor::placement::Sharding;
use colossal_tensor::safetensors::{Archive, Entry, Owned, save as save_safetensors, write_atomic};
use colossal_tensor::{Dtype, Error, Model, Param, Params, Placement, Result, Scope, no_grad};
use serde_json::{Value, json};

use crate::decoder::{CausalLm, Decoder, DecoderConfig, Head};
use crate::gguf::Gguf;

mod config;

pub use config::{config_json, parse_config, read_config};

/// Loads a decoder from a folder, or from a GGUF file, in this dtype.
///
/// A model with a score head starts that head from fresh weights when the file has none, as a
/// reward model does that is made from a language model.
///
/// # Errors
/// [`Error::File`] naming the file and the key that is missing, left over, or of another shape.
pub fn load(path: &Path, scope: &Scope, dtype: Dtype, head: Option<Head>) -> Result<CausalLm> {
    let with_head = |config: DecoderConfig| match head {
        Some(head) => config.with_head(head),
        None => config,
    };
    if path.is_file() {
        let gguf = Gguf::open(path)?;
        let config = with_head(gguf.config().clone());
        agree(&config, &gguf)?;
        let model = CausalLm::of(Params::blank(scope, 0, dtype), &config)?;
        fill(&model, &gguf)?;
        return Ok(model);
    }
    let config = with_head(read_config(&path.join("config.json"))?);
    let archive = Archive::open(&files_of(path)?)?;
    let files = Files { archive: &archive };
    agree(&config, &files)?;
    let model = CausalLm::of(Params::blank(scope, 0, dtype), &config)?;
    fill(&model, &files)?;
    Ok(model)
}

/// A place that has tensors by Hugging Face name.
pub trait Weights {
    /// Shape of a tensor.
    fn shape(&self, name: &str) -> Option<Vec<usize>>;
    /// Elements `start..start + len` of the flattened tensor, appended as f32.
    fn read(&self, name: &str, start: usize, len: usize, out: &mut Vec<f32>) -> Result<()>;
    /// All names.
    fn names(&self) -> Vec<String>;
    /// For messages.
    fn origin(&self) -> String;
    /// Are GPT-2's matrices stored as `[in, out]`, as Hugging Face's files have them?
    fn stores_in_out(&self) -> bool {
        true
    }
}

struct Files<'a> {
    archive: &'a Archive,
}

impl Files<'_> {
    /// Hub files of GPT-2 lack the prefix that `save_pretrained` writes.
    fn find(&self, name: &str) -> Option<Entry<'_>> {
        self.archive.get(name).or_else(|| self.archive.get(name.strip_prefix("transformer.")?))
    }
}

/// The experts of a layer are one parameter here and a tensor each in a file:
/// `x.experts.w1` is `x.experts.0.w1.weight`, `x.experts.1.w1.weight`, …
fn expert_key(name: &str, expert: usize) -> Option<String> {
    let (stem, part) = name.rsplit_once(".experts.")?;
    let whole = ["w1", "w2", "w3"].contains(&part);
    whole.then(|| format!("{stem}.experts.{expert}.{part}.weight"))
}

impl Weights for Files<'_> {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        let Some(first) = expert_key(name, 0) else {
            return self.find(name).map(|e| e.shape.to_vec());
        };
        let one = self.find(&first)?.shape.to_vec();
        let has = |e: usize| {
            let found = expert_key(name, e).and_then(|key| self.find(&key));
            found.is_some_and(|entry| entry.shape == one)
        };
        let experts = (0..).take_while(|e| has(*e)).count();
        Some([&[experts], &one[..]].concat())
    }

    fn read(&self, name: &str, start: usize, len: usize, out: &mut Vec<f32>) -> Result<()> {
        if let Some(entry) = expert_key(name, 0).and_then(|key| self.find(&key)) {
            // A run may go over several experts.
            let each: usize = entry.shape.iter().product();
            let (mut at, end) = (start, start + len);
            while at < end {
                let part = (each - at % each).min(end - at);
                if let Some(key) = expert_key(name, at / each) {
                    self.read(&key, at % each, part, out)?;
                }
                at += part;
            }
            return Ok(());
        }
        match self.find(name) {
            Some(entry) => entry.to_f32(start, len, out),
            None => Err(Error::File { path: self.origin(), reason: format!("no tensor {name}") }),
        }
    }

    fn names(&self) -> Vec<String> {
        let whole = |name: &str| -> String {
            let expert = name.rsplit_once(".experts.").and_then(|(stem, rest)| {
                let (_, part) = rest.strip_suffix(".weight")?.split_once('.')?;
                Some(format!("{stem}.experts.{part}"))
            });
            expert.unwrap_or_else(|| name.to_string())
        };
        self.archive.names().map(whole).collect()
    }

    fn origin(&self) -> String {
        self.archive.path()
    }
}

/// Compares the shapes that a configuration asks for with those of a file, layer by layer, before
/// any memory is taken for them.
fn agree(config: &DecoderConfig, weights: &impl Weights) -> Result<()> {
    let params = Params::blank(&Scope::fake(&[], Sharding::default()), 0, Dtype::F32);
    for layer in 0..Decoder::depth(config) {
        let seen = params.all().len();
        Decoder::layer(&params, config, layer)?;
        for param in &params.all()[seen..] {
            found(param, config, weights)?;
        }
    }
    Ok(())
}

/// Where a parameter lies in a file, and its shape there; `None` for a new head.
fn found(
    param: &Param,
    config: &DecoderConfig,
    weights: &impl Weights,
) -> Result<Option<(Source, Vec<usize>)>> {
    let mut source = source(param.name(), config);
    source.transposed &= weights.stores_in_out();
    let fail = |reason: String| Err(Error::File { path: weights.origin(), reason });
    let Some(shape) = weights.shape(&source.key) else {
        if source.key == "score.weight" {
            return Ok(None);
        }
        return fail(format!(
            "tensor {} is missing; the file does not hold this model (it has {})",
            source.key,
            weights.names().into_iter().take(4).collect::<Vec<_>>().join(", ")
        ));
    };
    let wanted = source.shape(&param.global_shape());
    if shape != wanted {
        return fail(format!(
            "tensor {} has shape {shape:?}, config.json asks for {wanted:?}",
            source.key
        ));
    }
    Ok(Some((source, wanted)))
}

/// Sets every parameter of `model` from `weights`.
pub fn fill(model: &CausalLm, weights: &impl Weights) -> Result<()> {
    let mut used = BTreeSet::new();
    for param in model.params.all() {
        let Some((source, wanted)) = found(&param, &model.config, weights)? else {
            param.draw(0)?;
            continue;
        };
        let values = source.read(&param, &wanted, weights)?;
        param.set(&values)?;
        used.insert(source.key);
    }
    let known = |name: &str| {
        let bare = name.strip_prefix("transformer.").unwrap_or(name);
        used.contains(name)
            || used.contains(&format!("transformer.{name}"))
            // Buffers of old files, and the head of a tied or scoring model.
            || bare.ends_with(".attn.bias")
            || bare.ends_with(".attn.masked_bias")
            || bare.ends_with("rotary_emb.inv_freq")
            || bare == "lm_head.weight"
            || bare == "score.weight"
    };
    match weights.names().into_iter().find(|name| !known(name)) {
        None => Ok(()),
        Some(extra) => Err(Error::File {
            path: weights.origin(),
            reason: format!("tensor {extra} is of no use to this model; is config.json its own?"),
        }),
    }
}

/// Where a parameter lies in a published file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// The name in the file.
    pub key: String,
    /// Stored as `[in, out]`.
    transposed: bool,
    /// One of three equal parts of a fused tensor: columns if `transposed`, else rows.
    third: Option<usize>,
}

/// The map from our names to those of published files.
pub fn source(name: &str, config: &DecoderConfig) -> Source {
    let plain = |key: &str| Source { key: key.into(), transposed: false, third: None };
    if !matches!(config, DecoderConfig::Gpt2(_)) {
        return plain(name);
    }
    for (i, part) in ["q", "k", "v"].iter().enumerate() {
        for kind in ["weight", "bias"] {
            if let Some(stem) = name.strip_suffix(&format!("attn.{part}.{kind}")) {
                return Source {
                    key: format!("{stem}attn.c_attn.{kind}"),
                    transposed: kind == "weight",
                    third: Some(i),
                };
            }
        }
    }
    let conv = ["c_proj.weight", "c_fc.weight"].iter().any(|end| name.ends_with(end));
    Source { transposed: conv, ..plain(name) }
}

impl Source {
    /// The shape in the file of a parameter of this whole shape.
    fn shape(&self, whole: &[usize]) -> Vec<usize> {
        let mut shape = whole.to_vec();
        if self.transposed {
            shape.reverse();
        }
        if self.third.is_some() {
            let fused = if self.transposed { shape.len() - 1 } else { 0 };
            shape[fused] *= 3;
        }
        shape
    }

    fn read(&self, param: &Param, stored: &[usize], weights: &impl Weights) -> Result<Vec<f32>> {
        let mut out = Vec::with_capacity(param.len());
        if !self.transposed {
            // A fused tensor is three of these end to end.
            let skip = self.third.map_or(0, |i| i * stored.iter().product::<usize>() / 3);
            let mut result = Ok(());
            param.for_each_run(|start, len| {
                if result.is_ok() {
                    result = weights.read(&self.key, skip + start, len, &mut out);
                }
            });
            return result.map(|()| out);
        }
        // `[in, columns]` to rows `out` of `[out, in]`, of which we want our ranges.
        let ranges = param.local_ranges();
        let columns = stored[1];
        let skip = self.third.map_or(0, |i| i * columns / 3);
        let mut whole = Vec::with_capacity(stored[0] * columns);
        weights.read(&self.key, 0, stored[0] * columns, &mut whole)?;
        for row in ranges[0].clone() {
            out.extend(ranges[1].clone().map(|column| whole[column * columns + skip + row]));
        }
        Ok(out)
    }
}

/// All parameters gathered whole, under the names and in the layout of published files.
/// Every rank must call it; the values are complete on every rank.
pub fn gather(
    model: &CausalLm,
    values: impl Fn(&std::sync::Arc<Param>) -> Result<colossal_tensor::Tensor>,
    dtype: Dtype,
) -> Result<BTreeMap<String, Owned>> {
    let mut whole = BTreeMap::new();
    for param in model.params.all() {
        let t = values(&param)?;
        let mut layout = t.layout();
        for axis in 0..model.scope().mesh().axes().len() {
            if matches!(layout[axis], Placement::Shard(_) | Placement::Partial) {
                layout[axis] = Placement::Invariant;
            }
        }
        let t = no_grad(|| t.to_layout(layout))?;
        let (shape, mut values) = (param.global_shape(), t.to_vec()?);
        // What fills up a vocabulary is no part of the model.
        values.truncate(shape.iter().product());
        // A router's bias stays in f32, as in DeepSeek-V3's files.
        let narrow = param.dtype() != Dtype::F32 || model.params.dtype() == Dtype::F32;
        let dtype = if narrow { dtype } else { Dtype::F32 };
        whole.insert(param.name().to_string(), (shape, values, dtype));
    }
    let mut files = BTreeMap::new();
    for (name, (shape, values, dtype)) in &whole {
        let dtype = *dtype;
        let source = source(name, &model.config);
        let (stored, values) = match source.third {
            Some(0) => {
                let parts: Vec<&Vec<f32>> = ["q", "k", "v"]
                    .iter()
                    .map(|part| {
                        let (stem, kind) = name.rsplit_once(".q.").expect("the first third is q");
                        &whole[&format!("{stem}.{part}.{kind}")].1
                    })
                    .collect();
                (source.shape(shape), fuse(&parts, shape, source.transposed))
            }
            Some(_) => continue,
            None if source.transposed => {
                (source.shape(shape), transpose(values, shape[0], shape[1]))
            }
            None => (shape.clone(), values.clone()),
        };
        if expert_key(&source.key, 0).is_some() {
            let each = values.len() / stored[0].max(1);
            for (e, values) in values.chunks(each.max(1)).enumerate() {
                if let Some(key) = expert_key(&source.key, e) {
                    files.insert(key, Owned::from_f32(values, &stored[1..], dtype)?);
                }
            }
            continue;
        }
        files.insert(source.key, Owned::from_f32(&values, &stored, dtype)?);
    }
    Ok(files)
}

fn transpose(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|c| (0..rows).map(move |r| values[r * columns + c])).collect()
}

fn fuse(parts: &[&Vec<f32>], shape: &[usize], transposed: bool) -> Vec<f32> {
    if !transposed {
        return parts.iter().flat_map(|p| p.iter().copied()).collect();
    }
    let (out, input) = (shape[0], shape[1]);
    (0..input)
        .flat_map(|i| parts.iter().flat_map(move |p| (0..out).map(move |o| p[o * input + i])))
        .collect()
}

/// Writes `config.json` and the weights so that transformers loads the folder. Every rank calls
/// it; rank 0 writes. Weights over `shard_bytes` are split and indexed.
pub fn save(model: &CausalLm, folder: &Path, shard_bytes: usize) -> Result<()> {
    let dtype = model.params.dtype();
    let tensors = gather(model, |p| Ok(p.tensor().detach()), dtype)?;
    if model.scope().mesh().world().rank() != 0 {
        return Ok(());
    }
    let config = serde_json::to_vec_pretty(&config_json(&model.config, dtype))
        .map_err(|e| Error::Other(e.to_string()))?;
    write_weights(folder, tensors, shard_bytes)?;
    // Last: a folder that has it is whole.
    write_atomic(&folder.join("config.json"), &config)
}

fn write_weights(
    folder: &Path,
    tensors: BTreeMap<String, Owned>,
    shard_bytes: usize,
) -> Result<()> {
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    let total: usize = tensors.values().map(|t| t.bytes.len()).sum();
    // An older file of the other form would be read in its place.
    let (single, index_path) =
        (folder.join("model.safetensors"), folder.join("model.safetensors.index.json"));
    if total <= shard_bytes {
        save_safetensors(&single, &tensors, &metadata)?;
        return forget(&index_path);
    }
    let mut shards: Vec<BTreeMap<String, Owned>> = vec![BTreeMap::new()];
    let mut size = 0;
    for (name, tensor) in tensors {
        if size > 0 && size + tensor.bytes.len() > shard_bytes {
            shards.push(BTreeMap::new());
            size = 0;
        }
        size += tensor.bytes.len();
        shards.last_mut().expect("never empty").insert(name, tensor);
    }
    let mut map = serde_json::Map::new();
    for (i, shard) in shards.iter().enumerate() {
        let file = format!("model-{:05}-of-{:05}.safetensors", i + 1, shards.len());
        save_safetensors(&folder.join(&file), shard, &metadata)?;
        shard.keys().for_each(|name| {
            map.insert(name.clone(), Value::String(file.clone()));
        });
    }
    let index = json!({"metadata": {"total_size": total}, "weight_map": map});
    let index = serde_json::to_vec_pretty(&index).map_err(|e| Error::Other(e.to_string()))?;
    write_atomic(&index_path, &index)?;
    forget(&single)
}

fn forget(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::File { path: path.display().to_string(), reason: e.to_string() })
        }
        _ => Ok(()),
    }
}

/// The weight files of a folder.
fn files_of(folder: &Path) -> Result<Vec<PathBuf>> {
    let single = folder.join("model.safetensors");
    if single.is_file() {
        return Ok(vec![single]);
    }
    let index = folder.join("model.safetensors.index.json");
    let fail = |reason: String| Error::File { path: index.display().to_string(), reason };
    if !index.is_file() {
        return Err(Error::File {
            path: folder.display().to_string(),
            reason: "has neither model.safetensors nor model.safetensors.index.json".into(),
        });
    }
    let text = std::fs::read_to_string(&index).map_err(|e| fail(e.to_string()))?;
    let value: Value = serde_json::from_str(&text).map_err(|e| fail(e.to_string()))?;
    let map = value["weight_map"].as_object().ok_or_else(|| fail("has no weight_map".into()))?;
    let names: BTreeSet<&str> = map.values().filter_map(Value::as_str).collect();
    Ok(names.into_iter().map(|name| folder.join(name)).collect())
}
