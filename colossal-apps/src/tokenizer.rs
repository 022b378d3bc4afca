//! Text to token ids and back, and conversations by a chat template.

use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use colossal_models::gguf::{Gguf, Value};
use minijinja::{Environment, context};
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::{AddedToken, Tokenizer};

use crate::dataset::Message;

/// ChatML: the template of models trained here.
const CHATML: &str = "{% for message in messages %}<|im_start|>{{ message.role }}\n\
{{ message.content }}<|im_end|>\n{% endfor %}\
{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// A tokenizer with its chat template and the token that ends a turn.
#[derive(Debug)]
pub struct ChatTokenizer {
    tokenizer: Tokenizer,
    template: String,
    end_of_turn: i32,
}

impl ChatTokenizer {
    /// Trains a byte-level BPE with ChatML's special tokens on these texts.
    pub fn train(texts: &[String], vocab_size: usize) -> Result<ChatTokenizer> {
        let mut tokenizer = Tokenizer::new(BPE::default());
        tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
        tokenizer.with_decoder(Some(ByteLevel::default()));
        let special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
        let mut trainer: TrainerWrapper = BpeTrainerBuilder::new()
            .vocab_size(vocab_size)
            .show_progress(false)
            .special_tokens(special.map(|s| AddedToken::from(s, true)).to_vec())
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .build()
            .into();
        tokenizer
            .train(&mut trainer, texts.iter().map(String::as_str))
            .map_err(|e| anyhow!("tokenizer: {e}"))?;
        ChatTokenizer::new(tokenizer, CHATML.into(), "<|im_end|>")
    }

    /// The tokenizer of a model: the one inside a GGUF file; or a folder's `tokenizer.json` and
    /// the template beside it (`chat_template.jinja`, or the one in `tokenizer_config.json`;
    /// ChatML if there is none).
    pub fn open(folder: &Path) -> Result<ChatTokenizer> {
        if folder.is_file() {
            let gguf = Gguf::open(folder)?;
            return ChatTokenizer::of_gguf(&gguf).with_context(|| folder.display().to_string());
        }
        let path = folder.join("tokenizer.json");
        let tokenizer =
            Tokenizer::from_file(&path).map_err(|e| anyhow!("{}: {e}", path.display()))?;
        let config: serde_json::Value =
            match std::fs::read_to_string(folder.join("tokenizer_config.json")) {
                Ok(text) => serde_json::from_str(&text).context("tokenizer_config.json")?,
                Err(_) => serde_json::Value::Null,
            };
        let template = match std::fs::read_to_string(folder.join("chat_template.jinja")) {
            Ok(text) => text,
            Err(_) => config["chat_template"].as_str().unwrap_or(CHATML).to_string(),
        };
        let eos = config["eos_token"].as_str().or(config["eos_token"]["content"].as_str());
        let eos = eos.unwrap_or("<|im_end|>").to_string();
        ChatTokenizer::new(tokenizer, template, &eos)
    }

    /// A byte-level BPE from the metadata of a GGUF file.
    fn of_gguf(gguf: &Gguf) -> Result<ChatTokenizer> {
        let get = |key: &str| gguf.metadata().get(&format!("tokenizer.{key}"));
        let list = |key: &str| {
            get(key).and_then(Value::list).ok_or_else(|| anyhow!("lacks tokenizer.{key}"))
        };
        let text = |key: &str| get(key).and_then(Value::text);
        let digits = match (text("ggml.model"), text("ggml.pre")) {
            (Some("gpt2"), None | Some("gpt-2" | "default")) => false,
            (Some("gpt2"), Some("smollm")) => true,
            (model, pre) => bail!(
                "its tokenizer (model {}, pre {}) is not read yet; put the model's tokenizer.json \
                 beside the weights and use that folder",
                model.unwrap_or("none"),
                pre.unwrap_or("none")
            ),
        };
        let tokens: Vec<String> = list("ggml.tokens")?
            .iter()
            .map(|t| t.text().map(str::to_string).ok_or_else(|| anyhow!("a token is no text")))
            .collect::<Result<_>>()?;
        let merges = list("ggml.merges")?
            .iter()
            .map(|m| {
                let (a, b) = m.text().and_then(|m| m.split_once(' ')).unwrap_or_default();
                (a.to_string(), b.to_string())
            })
            .collect();
        let vocab = tokens.iter().zip(0u32..).map(|(t, i)| (t.clone(), i)).collect();
        let bpe = BPE::builder()
            .vocab_and_merges::<ahash::AHashMap<_, _>>(vocab, merges)
            .build()
            .map_err(|e| anyhow!("tokenizer: {e}"))?;
        let mut tokenizer = Tokenizer::new(bpe);
        let bytes = ByteLevel::new(false, true, true);
        let mut steps: Vec<PreTokenizerWrapper> = vec![];
        if digits {
            steps.push(Digits::new(true).into());
        }
        steps.push(bytes.into());
        tokenizer.with_pre_tokenizer(Some(Sequence::new(steps)));
        tokenizer.with_decoder(Some(bytes));
        // Control tokens (3) are special; user-defined ones (4) are whole but are text.
        let kinds = list("ggml.token_type")?;
        for (kind, special) in [(3, true), (4, false)] {
            let added: Vec<AddedToken> = tokens
                .iter()
                .zip(kinds)
                .filter(|(_, k)| k.int() == Some(kind))
                .map(|(t, _)| AddedToken::from(t.clone(), special))
                .collect();
            if special {
                tokenizer.add_special_tokens(&added);
            } else {
                tokenizer.add_tokens(&added);
            }
        }
        let end = get("ggml.eos_token_id").and_then(Value::int).unwrap_or(0);
        let end = tokens.get(end as usize).ok_or_else(|| anyhow!("eos_token_id is no token"))?;
        ChatTokenizer::new(tokenizer, text("chat_template").unwrap_or(CHATML).into(), end)
    }

    fn new(tokenizer: Tokenizer, template: String, end: &str) -> Result<ChatTokenizer> {
        let end_of_turn = tokenizer.token_to_id(end).ok_or_else(|| {
            anyhow!("tokenizer: the end-of-turn token {end} is not in the vocabulary")
        })?;
        Ok(ChatTokenizer { tokenizer, template, end_of_turn: end_of_turn as i32 })
    }

    /// Writes `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`.
    pub fn save(&self, folder: &Path) -> Result<()> {
        let write = |name: &str, text: String| {
            colossal_tensor::safetensors::write_atomic(&folder.join(name), text.as_bytes())
        };
        let text = self.tokenizer.to_string(true).map_err(|e| anyhow!("tokenizer: {e}"))?;
        write("tokenizer.json", text)?;
        write("chat_template.jinja", self.template.clone())?;
        let eos = self.tokenizer.id_to_token(self.end_of_turn as u32).unwrap_or_default();
        let config = serde_json::json!({
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos,
            "chat_template": self.template, "clean_up_tokenization_spaces": false,
        });
        write("tokenizer_config.json", serde_json::to_string_pretty(&config)?)?;
        Ok(())
    }

    /// Entries of the vocabulary.
    pub fn vocab_size(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    /// The token that ends a turn.
    pub fn end_of_turn(&self) -> i32 {
        self.end_of_turn
    }

    /// Ids of a text, in which special tokens are recognised.
    pub fn encode(&self, text: &str) -> Result<Vec<i32>> {
        let encoding = self.tokenizer.encode(text, false).map_err(|e| anyhow!("tokenizer: {e}"))?;
        Ok(encoding.get_ids().iter().map(|id| *id as i32).collect())
    }

    /// The text of ids, without special tokens.
    pub fn decode(&self, ids: &[i32]) -> Result<String> {
        let ids: Vec<u32> = ids.iter().map(|id| *id as u32).collect();
        self.tokenizer.decode(&ids, true).map_err(|e| anyhow!("tokenizer: {e}"))
    }

    /// The conversation as the template writes it.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let mut env = Environment::new();
        env.set_trim_blocks(true);
        env.set_lstrip_blocks(true);
        env.set_keep_trailing_newline(true);
        env.add_function("raise_exception", |text: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, text))
        });
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        let list: Vec<_> =
            messages.iter().map(|m| context! { role => m.role, content => m.content }).collect();
        env.render_str(&self.template, context! { messages => list, add_generation_prompt })
            .context("chat template")
    }

    /// Ids of a prompt, ready for an answer.
    pub fn prompt(&self, messages: &[Message]) -> Result<Vec<i32>> {
        self.encode(&self.render(messages, true)?)
    }

    /// Ids of a prompt and its answer, up to the end of the answer's turn: where its reward is read.
    pub fn answered(&self, prompt: &[Message], answer: &[Message]) -> Result<Vec<i32>> {
        let (mut ids, learnt) = self.conversation(&[prompt, answer].concat())?;
        ids.truncate(learnt.iter().rposition(|l| *l).map_or(ids.len(), |i| i + 1));
        Ok(ids)
    }

    /// Ids of a whole conversation, and which of them the assistant says: its words and the token
    /// that ends its turn.
    ///
    /// # Errors
    /// When the template rewrites earlier turns, or a turn of the assistant does not end with the
    /// end-of-turn token: training would then teach it never to stop.
    pub fn conversation(&self, messages: &[Message]) -> Result<(Vec<i32>, Vec<bool>)> {
        let (mut text, mut ids, mut mask) = (String::new(), vec![], vec![]);
        let mut add = |piece: &str, learnt: bool| -> Result<()> {
            let new = self.encode(piece)?;
            let end = match new.iter().rposition(|id| *id == self.end_of_turn) {
                _ if !learnt => 0,
                Some(end) => end + 1,
                None => bail!(
                    "chat template: the assistant's turn {piece:?} lacks the end-of-turn token; \
                     a model trained on it would never stop. Set eos_token to the one it ends with"
                ),
            };
            mask.extend((0..new.len()).map(|i| i < end));
            ids.extend(new);
            Ok(())
        };
        for (i, message) in messages.iter().enumerate() {
            if message.role != "assistant" {
                continue;
            }
            for (upto, generation, learnt) in [(i, true, false), (i + 1, false, true)] {
                let whole = self.render(&messages[..upto], generation)?;
                let piece = whole.strip_prefix(text.as_str()).ok_or_else(|| {
                    anyhow!(
                        "chat template: it rewrites earlier turns, so turns cannot be told apart"
                    )
                })?;
                add(piece, learnt)?;
                text = whole;
            }
        }
        Ok((ids, mask))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn small() -> ChatTokenizer {
        let texts: Vec<String> =
            (0..20).map(|i| format!("Dear Anna, see you on day {i}.")).collect();
        ChatTokenizer::train(&texts, 300).unwrap()
    }

    fn talk() -> Vec<Message> {
        vec![
            Message::new("user", "Hello?"),
            Message::new("assistant", "Dear Ännä 🦀"),
            Message::new("user", "Bye"),
            Message::new("assistant", "See you."),
        ]
    }

    #[test]
    fn text_round_trips_and_so_does_the_folder() {
        let t = small();
        let text = "Dear Ännä, 🦀 \n tabs\t.";
        assert_eq!(t.decode(&t.encode(text).unwrap()).unwrap(), text);
        let dir = tempfile::tempdir().unwrap();
        t.save(dir.path()).unwrap();
        let again = ChatTokenizer::open(dir.path()).unwrap();
        assert_eq!(again.encode(text).unwrap(), t.encode(text).unwrap());
        assert_eq!(again.conversation(&talk()).unwrap(), t.conversation(&talk()).unwrap());
    }

    #[test]
    fn the_assistant_learns_its_words_and_the_end_of_its_turn() {
        let t = small();
        let (ids, mask) = t.conversation(&talk()).unwrap();
        let said: Vec<i32> = ids.iter().zip(&mask).filter(|(_, m)| **m).map(|(i, _)| *i).collect();
        let mut wanted = t.encode("Dear Ännä 🦀<|im_end|>").unwrap();
        wanted.extend(t.encode("See you.<|im_end|>").unwrap());
        assert_eq!(said, wanted);
        // The prompt is the beginning of the conversation.
        let prompt = t.prompt(&talk()[..1]).unwrap();
        assert_eq!(prompt, ids[..prompt.len()]);
    }

    #[test]
    fn a_real_tokenizer_and_template_give_the_ids_of_transformers() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let path = root.join("assets/smollm2/model.gguf");
        if !path.is_file() {
            eprintln!("skipped: {} is not there; `cargo xtask assets` fetches it", path.display());
            return;
        }
        let t = ChatTokenizer::open(&path).unwrap();
        let golden = root.join("colossal-models/tests/goldens/smollm2.json");
        let golden: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(golden).unwrap()).unwrap();
        for row in golden["rows"].as_array().unwrap() {
            let prompt = row["prompt"].as_str().unwrap();
            let ids = serde_json::to_value(t.prompt(&[Message::new("user", prompt)]).unwrap());
            assert_eq!(ids.unwrap(), row["ids"], "{prompt}");
            assert_eq!(t.decode(&t.encode(prompt).unwrap()).unwrap(), prompt);
        }
        // What it saves, a folder's reader reads.
        let dir = tempfile::tempdir().unwrap();
        t.save(dir.path()).unwrap();
        let again = ChatTokenizer::open(dir.path()).unwrap();
        assert_eq!(again.prompt(&talk()).unwrap(), t.prompt(&talk()).unwrap());
    }

    #[test]
    fn a_template_without_an_end_is_refused() {
        let mut t = small();
        t.template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}\
                      {% if add_generation_prompt %}assistant: {% endif %}"
            .into();
        let e = t.conversation(&talk()).unwrap_err().to_string();
        assert!(e.contains("never stop"), "{e}");
    }
}
