//! `config.json` in and out, under published names.

use std::path::Path;

use colossal_tensor::nn::RopeScaling;
use colossal_tensor::{Dtype, Error, Result};
use serde_json::{Value, json};

use crate::decoder::{DecoderConfig, Head};
use crate::gpt2::Gpt2Config;
use crate::llama::LlamaConfig;
use crate::mixtral::MixtralConfig;

/// Reads a `config.json`.
pub fn read_config(path: &Path) -> Result<DecoderConfig> {
    let fail = |reason: String| Error::File { path: path.display().to_string(), reason };
    let text = std::fs::read_to_string(path).map_err(|e| fail(e.to_string()))?;
    let value: Value = serde_json::from_str(&text).map_err(|e| fail(e.to_string()))?;
    parse_config(&value).map_err(fail)
}

/// Reads the contents of a `config.json`.
///
/// # Errors
/// A sentence that names the key and the fix.
pub fn parse_config(v: &Value) -> Result<DecoderConfig, String> {
    // Sizes whose products cannot overflow.
    let size = |key: &str| v[key].as_u64().filter(|n| *n <= 1 << 28).map(|n| n as usize);
    let number = |key: &str| -> Result<usize, String> {
        size(key).ok_or_else(|| format!("key {key} is missing or no size"))
    };
    let or = |key: &str, default: usize| size(key).unwrap_or(default);
    let float = |key: &str, default: f64| v[key].as_f64().unwrap_or(default);
    let flag = |key: &str, default: bool| v[key].as_bool().unwrap_or(default);
    let scores =
        v["architectures"][0].as_str().is_some_and(|a| a.ends_with("SequenceClassification"));
    let head = if scores { Head::Score } else { Head::Lm };
    let positive = |n: usize, key: &str| match n {
        0 => Err(format!("key {key} must be positive")),
        n => Ok(n),
    };
    match v["model_type"].as_str() {
        Some("mixtral") => {
            refuse_window(v)?;
            let mut base = v.clone();
            base["model_type"] = json!("llama");
            let DecoderConfig::Llama(base) = parse_config(&base)? else {
                return Err("is no model like LLaMA".into());
            };
            let experts = positive(number("num_local_experts")?, "num_local_experts")?;
            let top = or("num_experts_per_tok", 2);
            if !(1..=experts).contains(&top) {
                return Err(format!("num_experts_per_tok {top} must be 1 to {experts}"));
            }
            Ok(DecoderConfig::Mixtral(MixtralConfig {
                base,
                num_local_experts: experts,
                num_experts_per_tok: top,
                router_aux_loss_coef: float("router_aux_loss_coef", 0.001) as f32,
                router_z_loss_coef: float("router_z_loss_coef", 0.0) as f32,
                router_bias_update_rate: float("router_bias_update_rate", 0.0).max(0.0) as f32,
            }))
        }
        Some("llama" | "mistral") => {
            refuse_window(v)?;
            let heads = positive(number("num_attention_heads")?, "num_attention_heads")?;
            let hidden = number("hidden_size")?;
            let kv = positive(or("num_key_value_heads", heads), "num_key_value_heads")?;
            if heads % kv != 0 {
                return Err(format!(
                    "num_attention_heads {heads} is no multiple of num_key_value_heads {kv}"
                ));
            }
            // transformers 5 writes rope_parameters; older files rope_theta and rope_scaling.
            let rope = if v["rope_parameters"].is_object() {
                &v["rope_parameters"]
            } else {
                &v["rope_scaling"]
            };
            let theta =
                rope["rope_theta"].as_f64().unwrap_or_else(|| float("rope_theta", 10_000.0));
            Ok(DecoderConfig::Llama(LlamaConfig {
                vocab_size: positive(number("vocab_size")?, "vocab_size")?,
                hidden_size: hidden,
                intermediate_size: number("intermediate_size")?,
                num_hidden_layers: number("num_hidden_layers")?,
                num_attention_heads: heads,
                num_key_value_heads: kv,
                head_dim: or("head_dim", hidden / heads),
                max_position_embeddings: or("max_position_embeddings", 2048),
                rms_norm_eps: float("rms_norm_eps", 1e-6) as f32,
                rope_theta: theta,
                rope_scaling: rope_scaling(rope)?,
                tie_word_embeddings: flag("tie_word_embeddings", false),
                attention_bias: flag("attention_bias", false),
                mlp_bias: flag("mlp_bias", false),
                head,
            }))
        }
        Some("gpt2") => {
            let width = number("n_embd")?;
            let n_head = positive(number("n_head")?, "n_head")?;
            let activation = v["activation_function"].as_str().unwrap_or("gelu_new");
            if !matches!(activation, "gelu_new" | "gelu_pytorch_tanh") {
                return Err(format!("activation_function {activation} is not GPT-2's gelu_new"));
            }
            if width % n_head != 0 {
                return Err(format!("n_embd {width} is no multiple of n_head {n_head}"));
            }
            Ok(DecoderConfig::Gpt2(Gpt2Config {
                vocab_size: positive(number("vocab_size")?, "vocab_size")?,
                n_positions: or("n_positions", 1024),
                n_embd: width,
                n_layer: number("n_layer")?,
                n_head,
                n_inner: or("n_inner", 4 * width),
                layer_norm_epsilon: float("layer_norm_epsilon", 1e-5) as f32,
                resid_pdrop: float("resid_pdrop", 0.1) as f32,
                head,
            }))
        }
        Some(other) => Err(format!(
            "model_type {other} is not known; this build knows llama, mixtral and gpt2"
        )),
        None => Err("key model_type is missing; it names the architecture, as \"llama\"".into()),
    }
}

/// A window that hides keys within the model's positions changes what it computes.
fn refuse_window(v: &Value) -> Result<(), String> {
    let positions = v["max_position_embeddings"].as_u64().unwrap_or(2048);
    match v["sliding_window"].as_u64().filter(|w| *w < positions) {
        None => Ok(()),
        Some(window) => Err(format!(
            "sliding_window {window} is not built; lower max_position_embeddings to it, or use a \
             model without one"
        )),
    }
}

fn rope_scaling(v: &Value) -> Result<RopeScaling, String> {
    let need = |key: &str| v[key].as_f64().ok_or_else(|| format!("rope scaling lacks {key}"));
    match v["rope_type"].as_str().or(v["type"].as_str()) {
        None | Some("default") => Ok(RopeScaling::None),
        Some("linear") => Ok(RopeScaling::Linear { factor: need("factor")? }),
        Some("llama3") => Ok(RopeScaling::Llama3 {
            factor: need("factor")?,
            low: need("low_freq_factor")?,
            high: need("high_freq_factor")?,
            original: need("original_max_position_embeddings")?,
        }),
        Some(other) => {
            Err(format!("rope_type {other} is not known; known are default, linear, llama3"))
        }
    }
}

/// The `config.json` of a model.
pub fn config_json(config: &DecoderConfig, dtype: Dtype) -> Value {
    let torch_dtype = match dtype {
        Dtype::Bf16 => "bfloat16",
        Dtype::F16 => "float16",
        _ => "float32",
    };
    match config {
        DecoderConfig::Mixtral(c) => {
            let mut v = config_json(&DecoderConfig::Llama(c.base.clone()), dtype);
            let class = match c.base.head {
                Head::Lm => "MixtralForCausalLM",
                Head::Score => "MixtralForSequenceClassification",
            };
            v["architectures"] = json!([class]);
            v["model_type"] = json!("mixtral");
            v["num_local_experts"] = json!(c.num_local_experts);
            v["num_experts_per_tok"] = json!(c.num_experts_per_tok);
            v["router_aux_loss_coef"] = json!(f64::from(c.router_aux_loss_coef));
            v["sliding_window"] = Value::Null;
            // Ours; absent where published files have none.
            if c.router_z_loss_coef != 0.0 {
                v["router_z_loss_coef"] = json!(f64::from(c.router_z_loss_coef));
            }
            if c.router_bias_update_rate != 0.0 {
                v["router_bias_update_rate"] = json!(f64::from(c.router_bias_update_rate));
            }
            v
        }
        DecoderConfig::Llama(c) => {
            let scaling = match c.rope_scaling {
                RopeScaling::None => Value::Null,
                RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
                RopeScaling::Llama3 { factor, low, high, original } => json!({
                    "rope_type": "llama3", "factor": factor, "low_freq_factor": low,
                    "high_freq_factor": high, "original_max_position_embeddings": original as u64,
                }),
            };
            let class = match c.head {
                Head::Lm => "LlamaForCausalLM",
                Head::Score => "LlamaForSequenceClassification",
            };
            let mut v = json!({
                "architectures": [class], "model_type": "llama", "vocab_size": c.vocab_size,
                "hidden_size": c.hidden_size, "intermediate_size": c.intermediate_size,
                "num_hidden_layers": c.num_hidden_layers, "num_attention_heads": c.num_attention_heads,
                "num_key_value_heads": c.num_key_value_heads, "head_dim": c.head_dim,
                "max_position_embeddings": c.max_position_embeddings, "hidden_act": "silu",
                "rms_norm_eps": f64::from(c.rms_norm_eps), "rope_theta": c.rope_theta,
                "rope_scaling": scaling, "tie_word_embeddings": c.tie_word_embeddings,
                "attention_bias": c.attention_bias, "mlp_bias": c.mlp_bias, "torch_dtype": torch_dtype,
            });
            if c.head == Head::Score {
                v["num_labels"] = json!(1);
            }
            v
        }
        DecoderConfig::Gpt2(c) => {
            let class = match c.head {
                Head::Lm => "GPT2LMHeadModel",
                Head::Score => "GPT2ForSequenceClassification",
            };
            let p = f64::from(c.resid_pdrop);
            let mut v = json!({
                "architectures": [class], "model_type": "gpt2", "vocab_size": c.vocab_size,
                "n_positions": c.n_positions, "n_embd": c.n_embd, "n_layer": c.n_layer,
                "n_head": c.n_head, "n_inner": c.n_inner, "activation_function": "gelu_new",
                "layer_norm_epsilon": f64::from(c.layer_norm_epsilon), "resid_pdrop": p,
                "embd_pdrop": p, "attn_pdrop": 0.0, "torch_dtype": torch_dtype,
            });
            if c.head == Head::Score {
                v["num_labels"] = json!(1);
            }
            v
        }
    }
}
