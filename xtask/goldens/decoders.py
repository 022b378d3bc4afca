"""Goldens of the decoders: tiny random models of transformers, in Hugging Face layout.

    pip install -r xtask/goldens/requirements.txt
    python xtask/goldens/decoders.py

Each folder under colossal-models/tests/goldens/ holds config.json, model.safetensors (or shards)
and golden.safetensors: ids, logits, the mean next-token loss, the gradient of every parameter, and
greedy continuations of two prompts of unequal length. Norms and biases are perturbed, for fresh
ones are trivial. Sizes are odd on purpose.
"""
import os
import torch
import transformers
from safetensors.torch import save_file
from transformers import (GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig,
                          MixtralForCausalLM)

OUT = os.path.join(os.path.dirname(__file__), "../../colossal-models/tests/goldens")
SEED = 7


def make(name, model, shard="5GB"):
    model = model.float().eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.dim() == 1:
                p.add_(0.2 * torch.randn_like(p))
            else:
                p.mul_(3.0)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    folder = os.path.join(OUT, name)
    os.makedirs(folder, exist_ok=True)
    model.save_pretrained(folder, max_shard_size=shard)
    vocab = model.config.vocab_size
    ids = torch.randint(0, vocab, (2, 7))
    out = model(ids, labels=ids)
    out.loss.backward()
    golden = {"ids": ids.int(), "logits": out.logits.detach(), "loss": out.loss.detach().reshape(1)}
    for key, p in model.named_parameters():
        golden.update(published(key, p.grad))
    for i, length in enumerate([5, 3]):
        prompt = ids[i : i + 1, :length]
        new = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)
        golden[f"greedy.{i}"] = new[0, length:].int()
    golden = {k: v.contiguous().clone() for k, v in golden.items()}
    meta = {"package": "transformers", "version": transformers.__version__, "torch": torch.__version__,
            "seed": str(SEED), "tolerance": "f32: logits 2e-5, gradients 1e-4, relative to the largest"}
    save_file(golden, os.path.join(folder, "golden.safetensors"), metadata=meta)
    for extra in ["generation_config.json"]:
        path = os.path.join(folder, extra)
        if os.path.exists(path):
            os.remove(path)


def published(key, grad):
    """Gradients under the names of files, which hold a tensor per expert."""
    if ".mlp.gate." in key:
        return {"grad." + key.replace(".mlp.gate.", ".block_sparse_moe.gate."): grad}
    if ".mlp.experts." not in key:
        return {"grad." + key: grad}
    stem, part = key.split(".mlp.experts.")
    out = {}
    for e, g in enumerate(grad):
        names = {"w1": g[: len(g) // 2], "w3": g[len(g) // 2 :]} if part == "gate_up_proj" else {"w2": g}
        for name, g in names.items():
            out[f"grad.{stem}.block_sparse_moe.experts.{e}.{name}.weight"] = g
    return out


def llama(**kw):
    return LlamaConfig(**{**dict(vocab_size=66, hidden_size=36, intermediate_size=50, num_hidden_layers=2,
                                 num_attention_heads=6, num_key_value_heads=2, head_dim=6,
                                 max_position_embeddings=64, rms_norm_eps=1e-5,
                                 attn_implementation="eager"), **kw})


torch.manual_seed(SEED)
make("llama", LlamaForCausalLM(llama()))
make("llama3", LlamaForCausalLM(llama(
    tie_word_embeddings=True, num_attention_heads=3, num_key_value_heads=3, head_dim=12, rope_parameters={
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16})), shard="20KB")
make("gpt2", GPT2LMHeadModel(GPT2Config(
    vocab_size=66, n_positions=32, n_embd=36, n_layer=2, n_head=6, resid_pdrop=0.0, embd_pdrop=0.0,
    attn_pdrop=0.0, attn_implementation="eager")))
make("mixtral", MixtralForCausalLM(MixtralConfig(
    vocab_size=66, hidden_size=36, intermediate_size=26, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=2, head_dim=6, num_local_experts=5, num_experts_per_tok=2,
    max_position_embeddings=64, rms_norm_eps=1e-5, attn_implementation="eager",
    experts_implementation="eager")))
print("wrote", sorted(os.listdir(OUT)))
