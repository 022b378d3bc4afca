//! Text to token ids and back, and conversations by a chat template.

use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use colossal_models::gguf;
use minijinja::{Environment, context};
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};

use crate::dataset::Message;
use crate::gguf_tokenizer;

/// ChatML: the template of models trained here.
const CHATML: &str = "{% for message in messages %}<|im_start|>{{ message.role }}\n\
{{ message.content }}<|im_end|>\n{% endfor %}\
{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// A tokenizer with its chat template and the token that ends a turn.
#[derive(Debug)]
pub struct ChatTokenizer {
    tokenizer: Tokenizer,
    template: String,
    /// What templates call `bos_token`; may be empty.
    begin: String,
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
        ChatTokenizer::new(tokenizer, CHATML, None, "<|im_end|>")
    }

    /// The tokenizer of a model: the one inside a GGUF file; or a folder's `tokenizer.json` and
    /// the template beside it (`chat_template.jinja`, or the one in `tokenizer_config.json`;
    /// ChatML if there is none).
    pub fn open(folder: &Path) -> Result<ChatTokenizer> {
        if folder.is_file() {
            let metadata = gguf::metadata(folder)?;
            return gguf_tokenizer::read(&metadata).with_context(|| folder.display().to_string());
        }
        let path = folder.join("tokenizer.json");
        let tokenizer =
            Tokenizer::from_file(&path).map_err(|e| anyhow!("{}: {e}", path.display()))?;
        let config: serde_json::Value =
            match std::fs::read_to_string(folder.join("tokenizer_config.json")) {
                Ok(text) => serde_json::from_str(&text).context("tokenizer_config.json")?,
                Err(_) => serde_json::Value::Null,
            };
        // One template, or a list of named ones.
        let inside = &config["chat_template"];
        let named = |t: &&serde_json::Value| t["name"] == "default";
        let chosen = inside.as_array().and_then(|all| all.iter().find(named));
        let inside = inside.as_str().or_else(|| chosen?["template"].as_str());
        let template = match std::fs::read_to_string(folder.join("chat_template.jinja")) {
            Ok(text) => text,
            Err(_) => inside.unwrap_or(CHATML).to_string(),
        };
        let token = |key: &str| config[key].as_str().or(config[key]["content"].as_str());
        // A folder that does not say: the customary ones.
        let customary = ["<|im_end|>", "<|endoftext|>", "</s>"];
        let there = customary.into_iter().find(|t| tokenizer.token_to_id(t).is_some());
        let eos = token("eos_token").or(there).unwrap_or(customary[0]);
        ChatTokenizer::new(tokenizer, &template, token("bos_token"), eos)
    }

    /// A tokenizer, its template (ChatML if empty) and the tokens that begin a text, end a turn.
    pub(crate) fn new(
        tokenizer: Tokenizer,
        template: &str,
        begin: Option<&str>,
        end: &str,
    ) -> Result<ChatTokenizer> {
        let end_of_turn = tokenizer.token_to_id(end).ok_or_else(|| {
            anyhow!(
                "tokenizer: the end-of-turn token {end} is not in the vocabulary; name the right one \
                 as `eos_token` in tokenizer_config.json"
            )
        })? as i32;
        let template = if template.is_empty() { CHATML } else { template }.to_string();
        let begin = begin.unwrap_or_default().to_string();
        Ok(ChatTokenizer { tokenizer, template, begin, end_of_turn })
    }

    /// Writes `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`.
    pub fn save(&self, folder: &Path) -> Result<()> {
        let write = |name: &str, text: String| {
            colossal_tensor::safetensors::write_atomic(&folder.join(name), text.as_bytes())
        };
        let text = self.tokenizer.to_string(true).map_err(|e| anyhow!("tokenizer: {e}"))?;
        write("tokenizer.json", text)?;
        write("chat_template.jinja", self.template.clone())?;
        let mut config = serde_json::json!({
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.end(),
            "chat_template": self.template, "clean_up_tokenization_spaces": false,
        });
        if !self.begin.is_empty() {
            config["bos_token"] = self.begin.clone().into();
        }
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

    fn end(&self) -> String {
        self.tokenizer.id_to_token(self.end_of_turn as u32).unwrap_or_default()
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
        let (bos_token, eos_token) = (&self.begin, self.end());
        let values = context! { messages => list, add_generation_prompt, bos_token, eos_token };
        env.render_str(&without_marks(&self.template), values).context("chat template")
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

/// The template without `{% generation %}` blocks' marks: the mask is found by rendering prefixes.
fn without_marks(template: &str) -> String {
    let mut out = String::with_capacity(template.len());
    let mut rest = template;
    while let Some(start) = rest.find("{%") {
        let Some(end) = rest[start..].find("%}").map(|e| start + e + 2) else { break };
        let tag = rest[start + 2..end - 2].trim_matches(['-', '+', ' ', '\t', '\n', '\r']);
        let mark = tag == "generation" || tag == "endgeneration";
        out.push_str(&rest[..if mark { start } else { end }]);
        rest = &rest[end..];
    }
    out + rest
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
    fn templates_know_the_first_token_and_generation_blocks() {
        let mut t = small();
        t.begin = "<|endoftext|>".into();
        t.template = "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}\
                      {%- generation -%}{{ m.content }}{{ eos_token }}{% endgeneration %}\
                      {% else %}{{ m.content }}:{% endif %}{% endfor %}"
            .into();
        let (ids, mask) = t.conversation(&talk()[..2]).unwrap();
        assert_eq!(ids, t.encode("<|endoftext|>Hello?:Dear Ännä 🦀<|im_end|>").unwrap());
        assert!(!mask[0] && mask[mask.len() - 1]);
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
