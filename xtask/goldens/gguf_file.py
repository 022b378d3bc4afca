"""Goldens of GGUF: a tiny file with tensors of every type that is read, and the real model's words.

    pip install -r xtask/goldens/requirements.txt
    cargo xtask assets
    python xtask/goldens/gguf_file.py

tests/goldens/gguf/ holds tiny.gguf (written and quantised by the gguf package), and golden.safetensors
with the ids and logits of transformers' LLaMA on the same values, dequantised by that package; likewise
gpt2 and llama3 (stretched frequencies), each a .gguf with its .safetensors.
tests/goldens/smollm2.json holds, for 24 prompts, the ids of transformers' tokenizer under the file's
chat template and the tokens that transformers' greedy generation appends.
"""
import json
import os

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as Q
from safetensors.torch import save_file
from transformers import (AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig,
                          LlamaForCausalLM)

HERE = os.path.dirname(os.path.abspath(__file__))
OUT = os.path.join(HERE, "../../colossal-models/tests/goldens")
SEED = 11
LAYERS, HEADS, KV, HIDDEN, MLP, VOCAB = 2, 4, 2, 64, 256, 70


def tiny():
    torch.manual_seed(SEED)
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=LAYERS,
                         num_attention_heads=HEADS, num_key_value_heads=KV, max_position_embeddings=64,
                         rms_norm_eps=1e-5, tie_word_embeddings=False, attn_implementation="eager")
    model = LlamaForCausalLM(config).float().eval()
    folder = os.path.join(OUT, "gguf")
    os.makedirs(folder, exist_ok=True)
    writer = gguf.GGUFWriter(os.path.join(folder, "tiny.gguf"), "llama")
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_context_length(64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    kinds = {"self_attn.q_proj": Q.Q4_0, "self_attn.k_proj": Q.Q8_0, "self_attn.v_proj": Q.Q4_1,
             "self_attn.o_proj": Q.F16, "mlp.gate_proj": Q.BF16, "mlp.up_proj": Q.Q8_0, "mlp.down_proj": Q.Q6_K,
             "embed_tokens": Q.Q4_1, "lm_head": Q.F32}
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    rng = np.random.default_rng(SEED)
    with torch.no_grad():
        for key, p in model.named_parameters():
            value = (p * 3.0 if p.dim() > 1 else p + 0.2 * torch.randn_like(p)).numpy().astype(np.float32)
            stem = key.removeprefix("model.").removesuffix(".weight")
            if stem.startswith("layers."):
                _, block, part = stem.split(".", 2)
                name = f"blk.{block}.{names[part]}.weight"
            else:
                part = stem
                name = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[stem] + ".weight"
            heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KV}.get(part)
            if heads:
                # llama.cpp's order: the halves of a head side by side.
                rows = value.shape[0]
                value = value.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(rows, -1)
            kind = kinds.get(part, Q.F32)
            if kind == Q.Q6_K:
                # The package does not quantise to this type: random blocks with a small scale.
                blocks = rng.integers(0, 256, (value.shape[0], value.shape[1] // 256, 210), dtype=np.uint8)
                scale = np.full(blocks.shape[:2], 2e-5, np.float16).view(np.uint8).reshape(*blocks.shape[:2], 2)
                blocks[..., 208:] = scale
                stored = blocks.reshape(value.shape[0], -1)
            else:
                stored = gguf.quants.quantize(value, kind)
            back = gguf.quants.dequantize(stored, kind).reshape(value.shape) if kind != Q.F32 else value
            if heads:
                rows = back.shape[0]
                back = back.reshape(heads, rows // heads // 2, 2, -1).swapaxes(1, 2).reshape(rows, -1)
            p.copy_(torch.from_numpy(np.ascontiguousarray(back, dtype=np.float32)))
            writer.add_tensor(name, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ids = torch.randint(0, VOCAB, (2, 9))
    golden = {"ids": ids.int(), "logits": model(ids).logits.detach().contiguous()}
    meta = {"package": "transformers, gguf", "version": transformers.__version__, "seed": str(SEED),
            "tolerance": "f32: 2e-5 relative to the largest"}
    save_file(golden, os.path.join(folder, "golden.safetensors"), metadata=meta)


def other(name, family, model, names, kinds, heads, add):
    """A tiny model of another kind as name.gguf, with ids and logits in name.safetensors."""
    writer = gguf.GGUFWriter(os.path.join(OUT, "gguf", name + ".gguf"), family)
    add(writer)
    with torch.no_grad():
        for key, p in model.named_parameters():
            value = p * 3.0 if p.dim() > 1 else p + 0.2 * torch.randn_like(p)
            part = next(part for part in sorted(names, key=len, reverse=True) if part in key)
            conv = family == "gpt2" and part in ("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj") and p.dim() > 1
            if conv:
                value = value.T
            value = value.contiguous().numpy().astype(np.float32)
            rotated = heads.get(part)
            if rotated:
                rows = value.shape[0]
                stored = value.reshape(rotated, 2, rows // rotated // 2, -1).swapaxes(1, 2).reshape(rows, -1)
            else:
                stored = value
            kind = kinds.get(part, Q.F32) if p.dim() > 1 else Q.F32
            data = gguf.quants.quantize(np.ascontiguousarray(stored), kind) if kind != Q.F32 else stored
            if kind != Q.F32:
                value = gguf.quants.dequantize(data, kind).reshape(value.shape)
            p.copy_(torch.from_numpy(np.ascontiguousarray(value.T if conv else value)))
            digits = [d for d in key.split(".") if d.isdigit()]
            stem = f"blk.{digits[0]}." if digits else ""
            writer.add_tensor(stem + names[part] + "." + key.rsplit(".", 1)[1], data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ids = torch.randint(0, VOCAB, (2, 9))
    golden = {"ids": ids.int(), "logits": model(ids).logits.detach().contiguous()}
    meta = {"package": "transformers, gguf", "version": transformers.__version__, "seed": str(SEED),
            "tolerance": "f32: 2e-5 relative to the largest"}
    save_file(golden, os.path.join(OUT, "gguf", name + ".safetensors"), metadata=meta)


def gpt2():
    torch.manual_seed(SEED)
    config = GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=64, n_layer=2, n_head=4,
                        attn_implementation="eager")

    def add(writer):
        writer.add_block_count(2)
        writer.add_embedding_length(64)
        writer.add_feed_forward_length(256)
        writer.add_head_count(4)
        writer.add_context_length(32)
        writer.add_layer_norm_eps(1e-5)

    names = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "ln_1": "attn_norm",
             "ln_2": "ffn_norm", "c_attn": "attn_qkv", "attn.c_proj": "attn_output", "c_fc": "ffn_up",
             "mlp.c_proj": "ffn_down"}
    other("gpt2", "gpt2", GPT2LMHeadModel(config).float().eval(), names,
          {"c_attn": Q.Q8_0, "c_fc": Q.F16, "mlp.c_proj": Q.Q4_0}, {}, add)


def llama3():
    """LLaMA 3.1's stretched frequencies, of which GGUF keeps the divisors."""
    torch.manual_seed(SEED)
    scaling = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=131072,
                         rms_norm_eps=1e-5, tie_word_embeddings=True, rope_parameters=scaling,
                         attn_implementation="eager")
    model = LlamaForCausalLM(config).float().eval()

    def add(writer):
        writer.add_block_count(1)
        writer.add_embedding_length(64)
        writer.add_feed_forward_length(96)
        writer.add_head_count(2)
        writer.add_head_count_kv(1)
        writer.add_context_length(131072)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(500000.0)
        writer.add_rope_dimension_count(32)
        plain = 1.0 / 500000.0 ** (torch.arange(0, 32, 2).double() / 32)
        factors = (plain / model.model.rotary_emb.inv_freq.double()).float().numpy()
        writer.add_tensor("rope_freqs.weight", factors, raw_dtype=Q.F32)

    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
             "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down", "input_layernorm": "attn_norm",
             "post_attention_layernorm": "ffn_norm", "embed_tokens": "token_embd", "model.norm": "output_norm"}
    other("llama3", "llama", model, names, {}, {"q_proj": 2, "k_proj": 1}, add)


PROMPTS = ["What is the capital of France?", "Write a short poem about rain.", "Name three colours.",
           "How do I boil an egg?", "Explain gravity to a child.", "What is 7 plus 5?", "Give me a pizza recipe.",
           "Who wrote Hamlet?", "Translate 'good morning' into Spanish.", "List the planets.",
           "Why is the sky blue?", "Tell me a joke.", "What does a compiler do?", "Write a haiku about winter.",
           "Suggest a name for a cat.", "What is photosynthesis?", "In what year did 1984 appear?",
           "Summarise Cinderella in one sentence.", "What's the plural of 'mouse'?", "Count from 1 to 10.",
           "Write a Python function that adds two numbers.", "Café, naïve, 東京: what do these words mean?",
           "How far is the Moon?", "Is a tomato a fruit?"]
NEW = 24


def real():
    folder = os.path.join(HERE, "../../assets/smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32).eval()
    rows = []
    for prompt in PROMPTS:
        text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False,
                                             add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
        with torch.no_grad():
            top = model(new).logits[0, ids.shape[1] - 1 : -1].topk(2).values
        rows.append({"prompt": prompt, "ids": ids[0].tolist(), "greedy": new[0, ids.shape[1] :].tolist(),
                     "margin": round(float((top[:, 0] - top[:, 1]).min()), 5)})
    with open(os.path.join(OUT, "smollm2.json"), "w") as f:
        json.dump({"transformers": transformers.__version__, "max_new_tokens": NEW, "rows": rows}, f, indent=0,
                  ensure_ascii=False)


tiny()
gpt2()
llama3()
real()
