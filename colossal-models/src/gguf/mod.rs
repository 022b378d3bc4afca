//! GGUF files in: header, metadata, and tensors dequantised as they are read.
//!
//! Layout (GGUF versions 2 and 3, little-endian): magic, version, counts; key/value metadata; tensor
//! descriptions with dims innermost first; aligned data. Types read: F32, F16, BF16, Q8_0, Q4_0,
//! Q4_1 (blocks of 32 values), Q6_K (blocks of 256).
//!
//! LLaMA and GPT-2 files have llama.cpp's names; LLaMA's interleave the two halves of every head of
//! q and k: [`Gguf`] gives tensors under Hugging Face names and in Hugging Face order.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use colossal_tensor::nn::RopeScaling;
use colossal_tensor::{Error, Result};

use crate::decoder::{DecoderConfig, Head};
use crate::gpt2::Gpt2Config;
use crate::hf::Weights;
use crate::llama::LlamaConfig;

mod header;

use header::{Info, Reader};
pub use header::{Metadata, Value, metadata};

/// An open GGUF file.
#[derive(Debug)]
pub struct Gguf {
    path: PathBuf,
    file: Mutex<File>,
    /// Under Hugging Face names.
    tensors: BTreeMap<String, Info>,
    config: DecoderConfig,
}

impl Gguf {
    /// Reads the header of a file.
    ///
    /// # Errors
    /// [`Error::File`] for a file that is none, is cut short, or holds a type or an architecture
    /// that is not read.
    pub fn open(path: &Path) -> Result<Gguf> {
        let fail = |reason: String| Error::File { path: path.display().to_string(), reason };
        let file = File::open(path).map_err(|e| fail(e.to_string()))?;
        let size = file.metadata().map_err(|e| fail(e.to_string()))?.len();
        let mut reader = Reader { from: BufReader::new(&file), at: 0, size };
        let (metadata, mut infos) = reader.header().map_err(fail)?;
        let alignment =
            metadata.get("general.alignment").and_then(Value::int).unwrap_or(32).max(1) as u64;
        let data = reader.at.next_multiple_of(alignment);
        for (name, info) in &mut infos {
            let (values, bytes) = info.kind.block();
            let elements = info.shape.iter().product::<usize>();
            let row = info.shape.last().copied().unwrap_or(1);
            let end = info
                .offset
                .checked_add(data)
                .and_then(|o| o.checked_add((elements / values * bytes) as u64));
            if row % values != 0 || end.is_none_or(|end| end > size) {
                return Err(fail(format!(
                    "tensor {name} reaches beyond the end; the file is cut short, fetch it again"
                )));
            }
            info.offset += data;
        }
        let mut factors = vec![];
        if let Some(info) = infos.remove("rope_freqs.weight") {
            let (values, size) = info.kind.block();
            let len = info.shape.iter().product::<usize>() / values * size;
            let bytes = read_at(&file, info.offset, len).map_err(|e| fail(e.to_string()))?;
            bytes.chunks_exact(size).for_each(|block| info.kind.read(block, &mut factors));
        }
        let config = config(&metadata, &infos, &factors).map_err(fail)?;
        let mut tensors = BTreeMap::new();
        for (name, mut info) in infos {
            let family = family(&metadata);
            let key = hf_name(family, &name)
                .ok_or_else(|| fail(format!("tensor {name} is none of a {family} model")))?;
            if let DecoderConfig::Llama(c) = &config {
                info.heads = match () {
                    () if key.contains("q_proj") => c.num_attention_heads,
                    () if key.contains("k_proj") => c.num_key_value_heads,
                    () => 0,
                };
                if info.shape.len() == 1 && info.heads > 0 && info.kind.block().0 > 1 {
                    return Err(fail(format!("tensor {name} is a bias in blocks; expected F32")));
                }
                if info.heads > 0 && !info.shape[0].is_multiple_of(2 * info.heads) {
                    return Err(fail(format!(
                        "tensor {name} has {} rows, which {} heads do not divide",
                        info.shape[0], info.heads
                    )));
                }
            }
            tensors.insert(key, info);
        }
        Ok(Gguf { path: path.into(), file: Mutex::new(file), tensors, config })
    }

    /// The model's configuration.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }
}

fn read_at(mut file: &File, at: u64, len: usize) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    file.seek(SeekFrom::Start(at))?;
    file.read_exact(&mut bytes)?;
    Ok(bytes)
}

impl Weights for Gguf {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.tensors.get(name).map(|t| t.shape.clone())
    }

    fn read(&self, name: &str, start: usize, len: usize, out: &mut Vec<f32>) -> Result<()> {
        let fail = |reason: String| Error::File { path: self.origin(), reason };
        let info = self.tensors.get(name).ok_or_else(|| fail(format!("no tensor {name}")))?;
        // A bias of q or k is a column: its elements are what rows are to a matrix.
        let width = match (info.shape.len(), info.heads) {
            (1, 1..) => 1,
            _ => info.shape.last().copied().unwrap_or(1).max(1),
        };
        let (values, size) = info.kind.block();
        // Whole rows; with heads, the whole heads that they lie in.
        let rows = info.shape.iter().product::<usize>() / width;
        let head = rows.checked_div(info.heads).unwrap_or(1);
        let wanted = start / width..(start + len).div_ceil(width);
        let read = wanted.start / head * head..wanted.end.next_multiple_of(head).min(rows);
        let row_bytes = width / values * size;
        let at = info.offset + (read.start * row_bytes) as u64;
        let file = self.file.lock().map_err(|e| fail(e.to_string()))?;
        let bytes = read_at(&file, at, read.len() * row_bytes).map_err(|e| fail(e.to_string()))?;
        drop(file);
        out.reserve(len);
        let mut row = Vec::with_capacity(width);
        for i in wanted {
            let stored = if info.heads > 0 { interleaved(i, head) } else { i } - read.start;
            let stored = &bytes[stored * row_bytes..(stored + 1) * row_bytes];
            row.clear();
            stored.chunks_exact(size).for_each(|block| info.kind.read(block, &mut row));
            let from = start.max(i * width) - i * width;
            let to = (start + len).min((i + 1) * width) - i * width;
            out.extend_from_slice(&row[from..to]);
        }
        Ok(())
    }

    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn origin(&self) -> String {
        self.path.display().to_string()
    }

    /// llama.cpp's converter turns GPT-2's `[in, out]` matrices round.
    fn stores_in_out(&self) -> bool {
        false
    }
}

/// Where a GGUF file keeps row `row` of q or k: Hugging Face pairs `j` with `j + size / 2`,
/// llama.cpp stores the two side by side.
fn interleaved(row: usize, head: usize) -> usize {
    let (h, r) = (row / head, row % head);
    let (side, j) = (r / (head / 2), r % (head / 2));
    h * head + 2 * j + side
}

/// Our families: llama.cpp's word for each, and Hugging Face's names for its tensors.
const FAMILIES: [(&str, &[(&str, &str)]); 2] = [
    (
        "llama",
        &[
            ("token_embd", "model.embed_tokens"),
            ("output_norm", "model.norm"),
            ("output", "lm_head"),
            ("blk", "model.layers"),
            ("attn_norm", "input_layernorm"),
            ("ffn_norm", "post_attention_layernorm"),
            ("attn_q", "self_attn.q_proj"),
            ("attn_k", "self_attn.k_proj"),
            ("attn_v", "self_attn.v_proj"),
            ("attn_output", "self_attn.o_proj"),
            ("ffn_gate", "mlp.gate_proj"),
            ("ffn_up", "mlp.up_proj"),
            ("ffn_down", "mlp.down_proj"),
        ],
    ),
    (
        "gpt2",
        &[
            ("token_embd", "transformer.wte"),
            ("position_embd", "transformer.wpe"),
            ("output_norm", "transformer.ln_f"),
            ("output", "lm_head"),
            ("blk", "transformer.h"),
            ("attn_norm", "ln_1"),
            ("attn_qkv", "attn.c_attn"),
            ("attn_output", "attn.c_proj"),
            ("ffn_norm", "ln_2"),
            ("ffn_up", "mlp.c_fc"),
            ("ffn_down", "mlp.c_proj"),
        ],
    ),
];

fn hf_name(family: &str, name: &str) -> Option<String> {
    let (_, parts) = FAMILIES.iter().find(|(f, _)| *f == family)?;
    let part = |p: &str| parts.iter().find(|(ours, _)| *ours == p).map(|(_, theirs)| *theirs);
    let (stem, kind) = name.rsplit_once('.')?;
    let Some(block) = stem.strip_prefix("blk.") else {
        return Some(format!("{}.{kind}", part(stem)?));
    };
    let (block, inner) = block.split_once('.')?;
    Some(format!("{}.{block}.{}.{kind}", part("blk")?, part(inner)?))
}

fn family(metadata: &Metadata) -> &str {
    metadata.get("general.architecture").and_then(Value::text).unwrap_or("none")
}

fn config(
    metadata: &Metadata,
    tensors: &BTreeMap<String, Info>,
    rope_factors: &[f32],
) -> Result<DecoderConfig, String> {
    let family = family(metadata);
    if !FAMILIES.iter().any(|(f, _)| *f == family) {
        let known = FAMILIES.map(|(f, _)| f).join(" and ");
        return Err(format!(
            "general.architecture {family} is not read from GGUF; {known} are. Use the model's \
             Hugging Face folder"
        ));
    }
    let get = |key: &str| metadata.get(&format!("{family}.{key}"));
    let number = |key: &str| {
        get(key)
            .and_then(Value::int)
            .filter(|n| (1..=1 << 28).contains(n))
            .map(|n| n as usize)
            .ok_or_else(|| format!("{family}.{key} is missing or no size"))
    };
    let float = |key: &str, default: f64| get(key).and_then(Value::float).unwrap_or(default);
    let (hidden, heads) = (number("embedding_length")?, number("attention.head_count")?);
    let vocab = tensors.get("token_embd.weight").ok_or("token_embd.weight is missing")?.shape[0];
    if family == "gpt2" {
        return Ok(DecoderConfig::Gpt2(Gpt2Config {
            vocab_size: vocab,
            n_positions: number("context_length")?,
            n_embd: hidden,
            n_layer: number("block_count")?,
            n_head: heads,
            n_inner: number("feed_forward_length").unwrap_or(4 * hidden),
            layer_norm_epsilon: float("attention.layer_norm_epsilon", 1e-5) as f32,
            resid_pdrop: 0.0,
            head: Head::Lm,
        }));
    }
    let kv = get("attention.head_count_kv").and_then(Value::int).unwrap_or(heads as i64);
    if kv <= 0 || !heads.is_multiple_of(kv as usize) {
        return Err(format!("{heads} heads are no multiple of {kv} key/value heads"));
    }
    let head_dim = number("rope.dimension_count").unwrap_or(hidden / heads);
    let rope_theta = float("rope.freq_base", 10_000.0);
    let rope_scaling = match get("rope.scaling.type").and_then(Value::text) {
        _ if !rope_factors.is_empty() => llama3(rope_factors, head_dim, rope_theta)?,
        None | Some("none") => RopeScaling::None,
        Some("linear") => RopeScaling::Linear { factor: float("rope.scaling.factor", 1.0) },
        Some(other) => return Err(format!("llama.rope.scaling.type {other} is not read")),
    };
    Ok(DecoderConfig::Llama(LlamaConfig {
        vocab_size: vocab,
        hidden_size: hidden,
        intermediate_size: number("feed_forward_length")?,
        num_hidden_layers: number("block_count")?,
        num_attention_heads: heads,
        num_key_value_heads: kv as usize,
        head_dim,
        max_position_embeddings: number("context_length")?,
        rms_norm_eps: float("attention.layer_norm_rms_epsilon", 1e-5) as f32,
        rope_theta,
        rope_scaling,
        tie_word_embeddings: !tensors.contains_key("output.weight"),
        attention_bias: tensors.contains_key("blk.0.attn_q.bias"),
        mlp_bias: tensors.contains_key("blk.0.ffn_up.bias"),
        head: Head::Lm,
    }))
}

/// LLaMA 3.1's scaling from what GGUF keeps of it: what each frequency is divided by. All
/// published models of the family ramp between the same two wavelengths; a file whose factors do
/// not is refused.
fn llama3(factors: &[f32], head_dim: usize, theta: f64) -> Result<RopeScaling, String> {
    let factor = factors.iter().copied().fold(1.0f32, f32::max);
    let scaling =
        RopeScaling::Llama3 { factor: factor.into(), low: 1.0, high: 4.0, original: 8192.0 };
    let same = factors.len() == head_dim / 2
        && factors.iter().enumerate().all(|(i, f)| {
            let frequency = theta.powf(-2.0 * i as f64 / head_dim as f64);
            let divided = frequency / scaling.apply(frequency);
            (divided - f64::from(*f)).abs() <= 1e-4 * divided
        });
    match same {
        true => Ok(scaling),
        false => Err("rope_freqs.weight stretches frequencies unlike LLaMA 3.1 (low 1, high 4, \
                      original 8192); use the model's Hugging Face folder"
            .into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_of_a_head_are_told_apart() {
        // Two heads of four rows: llama.cpp stores 0 2 1 3 of Hugging Face's order.
        let stored: Vec<usize> = (0..8).map(|r| interleaved(r, 4)).collect();
        assert_eq!(stored, [0, 2, 1, 3, 4, 6, 5, 7]);
    }

    #[test]
    fn damaged_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.gguf");
        let mut header = b"GGUF".to_vec();
        header.extend(3u32.to_le_bytes());
        let mut many = header.clone();
        many.extend([255; 16]);
        for (bytes, words) in [
            (b"nope".to_vec(), "no GGUF"),
            (b"GGUF\x09\0\0\0".to_vec(), "version 9"),
            (header, "cut short"),
            (many, "damaged"),
        ] {
            std::fs::write(&path, bytes).unwrap();
            let e = Gguf::open(&path).unwrap_err().to_string();
            assert!(e.contains(words) && e.contains("x.gguf"), "{e}");
        }
    }
}
