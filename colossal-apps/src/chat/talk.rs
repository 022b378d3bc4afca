//! A conversation in the terminal, the answer shown as it comes.

use std::io::{BufRead, IsTerminal, Write};
use std::path::Path;

use anyhow::{Context, Result, bail};
use colossal_models::generate::{Sampling, generate};
use colossal_models::{CausalLm, Device, Dtype, Head, Scope, hf};

use crate::dataset::Message;
use crate::tokenizer::ChatTokenizer;

/// A model one can talk to.
#[derive(Debug)]
pub struct Chat {
    model: CausalLm,
    tokenizer: ChatTokenizer,
    sampling: Sampling,
    said: Vec<Message>,
}

impl Chat {
    /// Opens a Hugging Face folder or a GGUF file on `device`; `system` comes before the first turn.
    pub fn open(
        path: &Path,
        device: &Device,
        dtype: Dtype,
        system: Option<&str>,
        sampling: Sampling,
    ) -> Result<Chat> {
        let tokenizer = ChatTokenizer::open(path)?;
        let model = hf::load(path, &Scope::solo().on(device), dtype, None)?;
        if model.config.head() != Head::Lm {
            bail!("{}: has a score head and cannot speak; use a language model", path.display());
        }
        let sampling = Sampling { stop: vec![tokenizer.end_of_turn()], ..sampling };
        let said = system.iter().map(|s| Message::new("system", s)).collect();
        Ok(Chat { model, tokenizer, sampling, said })
    }

    /// The same with linear layers in int8.
    pub fn quantize_int8(self) -> Result<Chat> {
        Ok(Chat { model: self.model.quantize_int8()?, ..self })
    }

    /// Answers, writing the words to `out` as they are chosen. The oldest turns are forgotten
    /// when the conversation fills the model's positions.
    pub fn answer(&mut self, text: &str, out: &mut impl Write) -> Result<String> {
        self.said.push(Message::new("user", text));
        let limit = self.model.config.max_positions();
        let prompt = loop {
            let ids = self.tokenizer.prompt(&self.said)?;
            if ids.len() < limit {
                break ids;
            }
            let first = usize::from(self.said[0].role == "system");
            if self.said.len() - first < 3 {
                self.said.pop();
                bail!("this takes {} tokens; the model has room for {limit}", ids.len());
            }
            self.said.drain(first..first + 2);
        };
        let mut ids = vec![];
        let mut shown = 0;
        let mut broken = Ok(());
        generate(&self.model, &[prompt], &self.sampling, |_, token| {
            ids.push(token);
            let Ok(text) = self.tokenizer.decode(&ids) else { return };
            // A character of several bytes is shown when it is whole.
            let whole = text.trim_end_matches('\u{fffd}');
            if let Some(new) = whole.get(shown..).filter(|new| !new.is_empty()) {
                let written = write!(out, "{new}").and_then(|()| out.flush());
                if broken.is_ok() {
                    broken = written;
                }
                shown = whole.len();
            }
        })?;
        broken.context("the terminal is gone")?;
        let text = self.tokenizer.decode(&ids)?;
        self.said.push(Message::new("assistant", &text));
        Ok(text)
    }

    /// Talks until the input ends. A line is a turn; `/reset` forgets, `/exit` leaves.
    pub fn talk(&mut self, input: impl BufRead, out: &mut impl Write) -> Result<()> {
        let people = std::io::stdin().is_terminal();
        if people {
            eprintln!("One line is one turn. /reset forgets the conversation, /exit leaves.");
        }
        let ask = || {
            if people {
                eprint!("\n> ");
            }
        };
        ask();
        for line in input.lines() {
            match line?.trim() {
                "" => {}
                "/exit" => break,
                "/reset" => self.said.retain(|m| m.role == "system"),
                text => {
                    if let Err(error) = self.answer(text, out) {
                        eprintln!("{error:#}");
                    }
                    writeln!(out)?;
                }
            }
            ask();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use colossal_models::DecoderConfig;
    use colossal_models::llama::LlamaConfig;

    use super::*;

    #[test]
    fn it_answers_streams_forgets_and_says_when_a_turn_is_too_long() {
        let dir = tempfile::tempdir().unwrap();
        let tokenizer = ChatTokenizer::train(&["hello there".to_string()], 300).unwrap();
        tokenizer.save(dir.path()).unwrap();
        let config = DecoderConfig::Llama(LlamaConfig {
            max_position_embeddings: 96,
            ..LlamaConfig::sized(tokenizer.vocab_size(), 16, 1, 2)
        });
        let model = CausalLm::new(&Scope::solo(), &config, 1, Dtype::F32).unwrap();
        hf::save(&model, dir.path(), usize::MAX).unwrap();
        let sampling = Sampling { max_new_tokens: 8, ..Sampling::default() };
        let mut chat =
            Chat::open(dir.path(), &Device::Cpu, Dtype::F32, Some("be"), sampling).unwrap();
        let mut out = vec![];
        let text = chat.answer("hello", &mut out).unwrap();
        assert!(text.starts_with(String::from_utf8(out).unwrap().as_str()));
        for _ in 0..6 {
            chat.answer("hello there", &mut vec![]).unwrap();
        }
        assert!(chat.said.len() < 14 && chat.said[0].role == "system", "{:?}", chat.said);
        let e = chat.answer(&"long ".repeat(100), &mut vec![]).unwrap_err().to_string();
        assert!(e.contains("room for 96"), "{e}");
        chat.talk("hello\n/reset\n/exit\nno".as_bytes(), &mut vec![]).unwrap();
        assert_eq!(chat.said.len(), 1);
    }
}
