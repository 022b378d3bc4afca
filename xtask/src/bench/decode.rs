//! Generation of a 110 M model beside llama.cpp, in tokens per second of decoding.
//!
//! The peer reads the same weights; its int8 is Q8_0, blocks of 32 with a scale each. The floor is
//! the bytes of weights and cache over the bandwidth at which memory is read.

use anyhow::Result;
use serde_json::Value;

use super::{Args, Peer, Prompt, build, header, start, turns};
use crate::run;

const FOLDER: &str = "target/bench/decode";

pub(super) fn decode(args: &Args) -> Result<Vec<Value>> {
    let ours = build("colossal-models", "decode_bench")?;
    if !std::path::Path::new(FOLDER).join("model.safetensors").exists() {
        run(&ours, &["save", FOLDER], &[])?;
    }
    header("decoding 109.5 M parameters, tokens/s");
    let threads = args.threads.to_string();
    let mut rows = Vec::new();
    for (dtype, theirs) in [("f32", "f32"), ("bf16", "bf16"), ("int8", "q8_0")] {
        for batch in ["1", "8"] {
            let what = format!("decode {dtype}, batch {batch}, {threads} threads");
            if !what.contains(&args.only) {
                continue;
            }
            let flags = ["--model", FOLDER, "--type", theirs, "--batch", batch];
            let flags = [&flags[..], &["--threads", &threads]].concat();
            let mut ours = Prompt::start(&ours, &[&threads, dtype, batch], &[])?;
            let peers = [Peer::new("greedy, f16 cache", &flags, false)];
            let mut peers = start(args, "xtask/peers/decode_llama_cpp.py", &peers)?;
            rows.extend(turns(args, &what, "decode", &mut ours, &mut peers, "tokens/s")?);
        }
    }
    Ok(rows)
}
