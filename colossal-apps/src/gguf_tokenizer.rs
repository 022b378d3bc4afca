//! The tokenizer inside a GGUF file, as one of the `tokenizers` crate.
//!
//! Two kinds are read. `gpt2` is byte-level BPE: tokens, merges, and the name of the pattern that
//! cuts a text into words first. `llama` is SentencePiece's BPE: tokens with scores, of which the
//! merges are made, bytes for what no token covers, and a mark in the place of spaces.

use anyhow::{Result, anyhow, bail};
use colossal_models::gguf::{Metadata, Value};
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BPE, Merges};
use tokenizers::normalizers::{Prepend, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer};

use crate::tokenizer::ChatTokenizer;

/// How LLaMA 3 cuts a text into words; Qwen 2 takes digits one by one.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// SentencePiece's stand-in for a space.
const SPACE: &str = "▁";

/// Reads it.
///
/// # Errors
/// For a kind or a pattern that is not known, or metadata that lacks a part.
pub(crate) fn read(gguf: &Metadata) -> Result<ChatTokenizer> {
    let get = |key: &str| gguf.get(&format!("tokenizer.{key}"));
    let text = |key: &str| get(key).and_then(Value::text);
    let tokens: Vec<&str> = list(gguf, "ggml.tokens")?
        .iter()
        .map(|t| t.text().ok_or_else(|| anyhow!("a token is no text")))
        .collect::<Result<_>>()?;
    let mut tokenizer = match text("ggml.model") {
        Some("gpt2") => byte_level(gguf, &tokens, text("ggml.pre").unwrap_or("default"))?,
        Some("llama") => sentence_piece(gguf, &tokens)?,
        other => bail!(
            "its tokenizer is of kind {}; gpt2 and llama are read. Put the model's \
             tokenizer.json beside the weights and use that folder",
            other.unwrap_or("none")
        ),
    };
    // Control tokens (3) are special; user-defined ones (4) are whole but are text.
    let kinds = list(gguf, "ggml.token_type")?;
    for (kind, special) in [(3, true), (4, false)] {
        let added: Vec<AddedToken> = tokens
            .iter()
            .zip(kinds)
            .filter(|(_, k)| k.int() == Some(kind))
            .map(|(t, _)| AddedToken::from(t.to_string(), special))
            .collect();
        if special {
            tokenizer.add_special_tokens(&added);
        } else {
            tokenizer.add_tokens(&added);
        }
    }
    let token = |key: &str| {
        let id = get(key).and_then(Value::int)?;
        tokens.get(usize::try_from(id).ok()?).copied()
    };
    let end = token("ggml.eos_token_id").ok_or_else(|| anyhow!("lacks a valid eos_token_id"))?;
    let template = text("chat_template").unwrap_or_default();
    ChatTokenizer::new(tokenizer, template, token("ggml.bos_token_id"), end)
}

fn list<'a>(gguf: &'a Metadata, key: &str) -> Result<&'a [Value]> {
    let found = gguf.get(&format!("tokenizer.{key}")).and_then(Value::list);
    found.ok_or_else(|| anyhow!("lacks tokenizer.{key}"))
}

fn ids(tokens: &[&str]) -> ahash::AHashMap<String, u32> {
    tokens.iter().zip(0u32..).map(|(t, i)| (t.to_string(), i)).collect()
}

fn byte_level(gguf: &Metadata, tokens: &[&str], pattern: &str) -> Result<Tokenizer> {
    let merges: Merges = list(gguf, "ggml.merges")?
        .iter()
        .map(|m| {
            let (a, b) = m.text().and_then(|m| m.split_once(' ')).unwrap_or_default();
            (a.to_string(), b.to_string())
        })
        .collect();
    let words = |pattern: &str| -> Result<PreTokenizerWrapper> {
        let split = SplitPattern::Regex(pattern.into());
        let split = Split::new(split, SplitDelimiterBehavior::Isolated, false);
        Ok(split.map_err(|e| anyhow!("tokenizer: {e}"))?.into())
    };
    let plain = ByteLevel::new(false, true, false);
    let steps: Vec<PreTokenizerWrapper> = match pattern {
        "gpt-2" | "default" => vec![ByteLevel::new(false, true, true).into()],
        "smollm" => vec![Digits::new(true).into(), ByteLevel::new(false, true, true).into()],
        "llama-bpe" | "llama3" | "llama-v3" => vec![words(LLAMA3)?, plain.into()],
        "qwen2" => vec![words(&LLAMA3.replace("{1,3}", ""))?, plain.into()],
        other => bail!(
            "its tokenizer cuts words by the pattern {other}; gpt-2, smollm, llama-bpe and qwen2 \
             are known. Put the model's tokenizer.json beside the weights and use that folder"
        ),
    };
    // LLaMA 3 takes a word that is a token whole, whatever its merges say.
    let whole = pattern.starts_with("llama");
    let bpe = BPE::builder().vocab_and_merges(ids(tokens), merges).ignore_merges(whole).build();
    let mut tokenizer = Tokenizer::new(bpe.map_err(|e| anyhow!("tokenizer: {e}"))?);
    tokenizer.with_pre_tokenizer(Some(Sequence::new(steps)));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    Ok(tokenizer)
}

fn sentence_piece(gguf: &Metadata, tokens: &[&str]) -> Result<Tokenizer> {
    let scores: Vec<f64> =
        list(gguf, "ggml.scores")?.iter().map(|s| s.float().unwrap_or(f64::MIN)).collect();
    let vocab = ids(tokens);
    // A token is made of any two that it is the sequence of; those of high score come first.
    let mut merges: Vec<(f64, &str, &str)> = vec![];
    for (token, score) in tokens.iter().zip(&scores) {
        let first = merges.len();
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if vocab.contains_key(left) && vocab.contains_key(right) {
                merges.push((*score, left, right));
            }
        }
        merges[first..].sort_by_key(|(_, l, r)| (vocab[*l], vocab[*r]));
    }
    let lengths = |l: &str, r: &str| (l.chars().count(), r.chars().count());
    merges.sort_by(|a, b| {
        b.0.total_cmp(&a.0).then_with(|| lengths(b.1, b.2).cmp(&lengths(a.1, a.2)))
    });
    let merges: Merges =
        merges.into_iter().map(|(_, l, r)| (l.to_string(), r.to_string())).collect();
    let unknown = gguf.get("tokenizer.ggml.unknown_token_id").and_then(Value::int);
    let unknown = tokens.get(unknown.unwrap_or(0) as usize).copied().unwrap_or("<unk>");
    let bpe = BPE::builder()
        .vocab_and_merges(vocab, merges)
        .unk_token(unknown.into())
        .fuse_unk(true)
        .byte_fallback(true)
        .build()
        .map_err(|e| anyhow!("tokenizer: {e}"))?;
    let replace =
        |from: &str, to: &str| Replace::new(from, to).map_err(|e| anyhow!("tokenizer: {e}"));
    let mut tokenizer = Tokenizer::new(bpe);
    let marks = vec![Prepend::new(SPACE.into()).into(), replace(" ", SPACE)?.into()];
    tokenizer.with_normalizer(Some(Normalizers::new(marks)));
    tokenizer.with_decoder(Some(Decoders::new(vec![
        replace(SPACE, " ")?.into(),
        ByteFallback::default().into(),
        Fuse::default().into(),
        Strip::new(' ', 1, 0).into(),
    ])));
    Ok(tokenizer)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// llama.cpp's source has vocabularies with texts and the ids they must give.
    #[test]
    fn vocabularies_of_other_models_give_the_ids_of_llama_cpp() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/vocabs");
        if !folder.is_dir() {
            eprintln!("skipped: assets/vocabs is not there; copy llama.cpp's models/*.gguf* to it");
            return;
        }
        for name in ["gpt-2", "llama-bpe", "llama-spm", "qwen2"] {
            let file = format!("ggml-vocab-{name}.gguf");
            let read = |end: &str| std::fs::read_to_string(folder.join(format!("{file}{end}")));
            let (texts, wanted) = (read(".inp").unwrap(), read(".out").unwrap());
            let tokenizer = ChatTokenizer::open(&folder.join(&file)).unwrap();
            let texts = texts.split("\n__ggml_vocab_test__\n");
            for (text, wanted) in texts.zip(wanted.lines()) {
                let wanted: Vec<i32> =
                    wanted.split_whitespace().map(|id| id.parse().unwrap()).collect();
                let ids = tokenizer.encode(text).unwrap();
                assert_eq!(ids, wanted, "{name}: {text:?}");
                assert_eq!(tokenizer.decode(&ids).unwrap(), text, "{name}");
            }
        }
    }
}
