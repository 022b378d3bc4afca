//! What the pipeline learns from: conversations, preferences and prompts, each with a held-out part.
//!
//! Files are told apart by the keys of their first line. A file named `*.heldout.jsonl` is the
//! held-out part of its kind; a kind without one holds out the entries of about every tenth prompt,
//! the same prompts in every kind. What is missing is made of the preferences: conversations of
//! their chosen answers, prompts of their prompts.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use colossal_tensor::random::Stream;

use super::reward::TokenPair;
use super::sft::Talk;
use crate::dataset::{self, Kind, Message, Pair};
use crate::tokenizer::ChatTokenizer;

/// Entries to learn from, and entries that no step sees.
#[derive(Debug, Clone, PartialEq)]
pub struct Split<T> {
    /// To learn from.
    pub train: Vec<T>,
    /// To measure with.
    pub held: Vec<T>,
}

impl<T> Default for Split<T> {
    fn default() -> Split<T> {
        Split { train: vec![], held: vec![] }
    }
}

/// The three kinds of data.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Corpus {
    /// Conversations, for fine-tuning.
    pub talks: Split<Vec<Message>>,
    /// Pairs of answers, for the reward model.
    pub pairs: Split<Pair>,
    /// Prompts, for PPO.
    pub prompts: Split<Vec<Message>>,
}

impl Corpus {
    /// Reads files, and all `.jsonl` files of folders.
    ///
    /// # Errors
    /// A line that cannot be read; no preferences at all: the reward model has no other source.
    pub fn read(paths: &[PathBuf]) -> Result<Corpus> {
        let mut corpus = Corpus::default();
        for path in files(paths)? {
            let named = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
            let held = named.ends_with(".heldout.jsonl");
            match dataset::kind(&path)? {
                Kind::Conversations => {
                    corpus.talks.add(dataset::conversations(&path)?, held);
                }
                Kind::Preferences => corpus.pairs.add(dataset::preferences(&path)?, held),
                Kind::Prompts => corpus.prompts.add(dataset::prompts(&path)?, held),
            }
        }
        if corpus.pairs.train.is_empty() {
            let read: Vec<String> = paths.iter().map(|p| p.display().to_string()).collect();
            bail!(
                "{}: no preferences; the reward model needs lines with prompt, chosen and rejected",
                read.join(", ")
            );
        }
        corpus.pairs.hold_out(|p| &p.prompt);
        let pairs = &corpus.pairs;
        if corpus.talks.train.is_empty() {
            let good = |p: &Pair| [&p.prompt[..], &p.chosen].concat();
            corpus.talks = pairs.map(good);
        }
        if corpus.prompts.train.is_empty() {
            corpus.prompts = pairs.map(|p| p.prompt.clone());
            corpus.prompts.train.dedup();
            corpus.prompts.held.dedup();
        }
        corpus.talks.hold_out(|talk| {
            let said = talk.iter().rposition(|m| m.role == "assistant").unwrap_or(talk.len());
            &talk[..said]
        });
        corpus.prompts.hold_out(|p| p);
        Ok(corpus)
    }
}

impl<T> Split<T> {
    fn add(&mut self, entries: Vec<T>, held: bool) {
        if held { self.held.extend(entries) } else { self.train.extend(entries) }
    }

    fn map<U>(&self, f: impl Fn(&T) -> U) -> Split<U> {
        Split {
            train: self.train.iter().map(&f).collect(),
            held: self.held.iter().map(f).collect(),
        }
    }

    /// Without a held-out part, takes about a tenth out of the other, by prompt; the last entry
    /// if chance picks none.
    fn hold_out(&mut self, prompt: impl Fn(&T) -> &[Message]) {
        if !self.held.is_empty() {
            return;
        }
        let picked = |entry: &T| {
            let text: String = prompt(entry).iter().map(|m| m.content.as_str()).collect();
            Stream::named(0, &text).bits(0).is_multiple_of(10)
        };
        (self.held, self.train) = std::mem::take(&mut self.train).into_iter().partition(picked);
        if self.held.is_empty() && self.train.len() > 1 {
            self.held.extend(self.train.pop());
        }
        if self.train.is_empty() {
            std::mem::swap(&mut self.held, &mut self.train);
        }
    }
}

fn files(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut all = vec![];
    for path in paths {
        if !path.is_dir() {
            all.push(path.clone());
            continue;
        }
        let mut inside: Vec<PathBuf> = std::fs::read_dir(path)
            .with_context(|| path.display().to_string())?
            .flatten()
            .map(|e| e.path())
            .filter(|p| p.extension().is_some_and(|e| e == "jsonl"))
            .collect();
        if inside.is_empty() {
            bail!("{}: holds no .jsonl file", path.display());
        }
        inside.sort();
        all.extend(inside);
    }
    Ok(all)
}

/// Conversations as ids, those of at most `max` tokens.
pub fn talks(t: &ChatTokenizer, all: &[Vec<Message>], max: usize) -> Result<Vec<Talk>> {
    let ids = all.iter().map(|m| t.conversation(m));
    fitting("conversations", ids, max, |talk: &Talk| match talk.1.iter().any(|l| *l) {
        true => talk.0.len(),
        false => usize::MAX,
    })
}

/// Pairs as ids, those whose answers take at most `max` tokens with their prompt.
pub fn pairs(t: &ChatTokenizer, all: &[Pair], max: usize) -> Result<Vec<TokenPair>> {
    let ids = all
        .iter()
        .map(|p| Ok((t.answered(&p.prompt, &p.chosen)?, t.answered(&p.prompt, &p.rejected)?)));
    fitting("pairs", ids, max, |(a, b): &TokenPair| a.len().max(b.len()))
}

/// Prompts as ids, those that leave room for `room` tokens below `max`.
pub fn prompts(
    t: &ChatTokenizer,
    all: &[Vec<Message>],
    room: usize,
    max: usize,
) -> Result<Vec<Vec<i32>>> {
    let ids = all.iter().map(|m| t.prompt(m));
    fitting("prompts", ids, max, |p: &Vec<i32>| p.len() + room)
}

/// What fits; says how many do not, and fails when none does.
fn fitting<T>(
    what: &str,
    all: impl ExactSizeIterator<Item = Result<T>>,
    max: usize,
    len: impl Fn(&T) -> usize,
) -> Result<Vec<T>> {
    let count = all.len();
    let mut kept = Vec::with_capacity(count);
    for (i, entry) in all.enumerate() {
        let entry = entry.with_context(|| format!("entry {} of the {what}", i + 1))?;
        if len(&entry) <= max {
            kept.push(entry);
        }
    }
    match count - kept.len() {
        0 => {}
        left if left == count => {
            bail!("all {count} {what} are longer than max_length {max}: raise it")
        }
        left => eprintln!("{left} of {count} {what} are longer than max_length {max}: left out"),
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_file_of_preferences_is_enough_and_no_prompt_is_on_both_sides() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mine.jsonl");
        let line = |i: usize| {
            format!(r#"{{"prompt":"Question {}","chosen":"Yes {i}.","rejected":"No."}}"#, i / 2)
        };
        let text: Vec<String> = (0..200).map(line).collect();
        std::fs::write(&path, text.join("\n")).unwrap();
        let corpus = Corpus::read(std::slice::from_ref(&path)).unwrap();
        let held = corpus.pairs.held.len();
        assert!((4..60).contains(&held) && corpus.pairs.train.len() == 200 - held, "{held}");
        assert_eq!(corpus.talks.train.len(), corpus.pairs.train.len());
        for prompt in &corpus.prompts.held {
            assert!(!corpus.prompts.train.contains(prompt));
            assert!(corpus.talks.train.iter().all(|t| t[0] != prompt[0]));
        }
        // A folder is all its files.
        let whole = Corpus::read(&[dir.path().into()]).unwrap();
        assert_eq!(whole, corpus);
        let only = dir.path().join("talks.jsonl");
        std::fs::write(&only, r#"{"prompt":"a","completion":"b"}"#).unwrap();
        let e = Corpus::read(&[only]).unwrap_err().to_string();
        assert!(e.contains("talks.jsonl") && e.contains("chosen and rejected"), "{e}");
    }

    #[test]
    fn the_data_of_the_repository_keeps_its_own_held_out_parts() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../data/rlhf");
        let corpus = Corpus::read(&[folder]).unwrap();
        let sizes = |a: usize, b: usize| (a, b);
        assert_eq!(sizes(corpus.talks.train.len(), corpus.talks.held.len()), (600, 40));
        assert_eq!(sizes(corpus.pairs.train.len(), corpus.pairs.held.len()), (500, 80));
        assert_eq!(sizes(corpus.prompts.train.len(), corpus.prompts.held.len()), (240, 48));
    }
}
