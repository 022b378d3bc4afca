"""llama.cpp (llama-cpp-python) decoding at a prompt: each line is answered with tokens per second.

The model is a Hugging Face folder, written as GGUF in the type asked for (f32, bf16, q8_0) beside
it. A prompt of 64 tokens in every sequence of the batch, untimed; then 128 greedy tokens. The
cache is llama.cpp's default, f16.
"""
import argparse
import ctypes
import json
import os
import time

import gguf
import llama_cpp as L
import numpy as np
from safetensors import safe_open

ap = argparse.ArgumentParser()
ap.add_argument("--model", required=True)
ap.add_argument("--type", required=True)
ap.add_argument("--batch", type=int, default=1)
ap.add_argument("--threads", type=int, default=2)
args = ap.parse_args()
PROMPT, NEW, VOCAB = 64, 128, 32000
PARTS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
         "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
         "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}


def write(folder, out, kind):
    c = json.load(open(f"{folder}/config.json"))
    w = gguf.GGUFWriter(out, "llama")
    w.add_context_length(c["max_position_embeddings"])
    w.add_embedding_length(c["hidden_size"])
    w.add_block_count(c["num_hidden_layers"])
    w.add_feed_forward_length(c["intermediate_size"])
    w.add_head_count(c["num_attention_heads"])
    w.add_head_count_kv(c["num_key_value_heads"])
    w.add_rope_dimension_count(c["hidden_size"] // c["num_attention_heads"])
    w.add_layer_norm_rms_eps(c["rms_norm_eps"])
    w.add_vocab_size(c["vocab_size"])
    w.add_tokenizer_model("no_vocab")
    quantised = gguf.GGMLQuantizationType[kind.upper()]
    with safe_open(f"{folder}/model.safetensors", "np") as f:
        for key in f.keys():
            x = f.get_tensor(key).astype(np.float32)
            if key == "lm_head.weight":
                continue
            if key == "model.embed_tokens.weight":
                name = "token_embd.weight"
            elif key == "model.norm.weight":
                name = "output_norm.weight"
            else:
                _, _, i, part = key.removesuffix(".weight").split(".", 3)
                name = f"blk.{i}.{PARTS[part]}.weight"
                if part.endswith(("q_proj", "k_proj")):  # half-split to interleaved rotary
                    h = c["num_attention_heads" if "q_proj" in part else "num_key_value_heads"]
                    x = x.reshape(h, 2, x.shape[0] // h // 2, x.shape[1]).swapaxes(1, 2).reshape(x.shape)
            x = np.ascontiguousarray(x)
            if x.ndim == 1 or kind == "f32":
                w.add_tensor(name, x)
            else:
                w.add_tensor(name, gguf.quants.quantize(x, quantised), raw_dtype=quantised)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


path = f"{args.model}/{args.type}.gguf"
if not os.path.exists(path):
    write(args.model, path + ".partial", args.type)
    os.rename(path + ".partial", path)


@L.llama_log_callback
def silent(level, text, user):
    pass


L.llama_log_set(silent, ctypes.c_void_p(0))
L.llama_backend_init()
model = L.llama_model_load_from_file(path.encode(), L.llama_model_default_params())
assert model, path
params = L.llama_context_default_params()
params.n_ctx = args.batch * 256
params.n_batch = params.n_ubatch = max(512, args.batch)
params.n_seq_max = args.batch
params.n_threads = params.n_threads_batch = args.threads
context = L.llama_init_from_model(model, params)
assert context, "no context"
batch = L.llama_batch_init(params.n_batch, 0, 1)


def decode(tokens, position, last):
    """tokens: (sequence, token) pairs at one position; logits of all if `last`."""
    batch.n_tokens = len(tokens)
    for i, (sequence, token) in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
        batch.seq_id[i][0], batch.logits[i] = sequence, last
    assert L.llama_decode(context, batch) == 0


def run():
    L.llama_memory_clear(L.llama_get_memory(context), True)
    for i in range(PROMPT):
        decode([(b, (b * 7919 + i * 104729) % VOCAB) for b in range(args.batch)], i, i + 1 == PROMPT)
    new = []
    start = None
    for i in range(NEW):
        # Greedy, in numpy: about 10 microseconds a sequence.
        logits = [np.ctypeslib.as_array(L.llama_get_logits_ith(context, b), (VOCAB,)) for b in range(args.batch)]
        tokens = [int(x.argmax()) for x in logits]
        new.append(tokens[0])
        if i == 0:
            start = time.perf_counter()
        if i + 1 < NEW:
            decode(list(enumerate(tokens)), PROMPT + i, True)
    return args.batch * (NEW - 1) / (time.perf_counter() - start), new


run()
version = __import__("importlib.metadata").metadata.version("llama-cpp-python")
print(json.dumps({"name": f"llama.cpp ({version}), {args.type}"}), flush=True)
for line in iter(input, None):
    speed, new = run()
    print(json.dumps({"speed": speed, "ids": new[:8]}), flush=True)
