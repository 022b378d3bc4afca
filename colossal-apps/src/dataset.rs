//! JSONL files that users of other tools already have: one object a line, the form found by keys.
//!
//! | task | forms |
//! | --- | --- |
//! | demonstrations | `{"messages": [{"role", "content"}]}`, also with `from` for `role`; `{"prompt", "completion"}` |
//! | preferences | `{"prompt", "chosen", "rejected"}`, strings or message lists; `context` for `prompt` |
//! | prompts | `{"prompt"}`, a string or a message list |
//! | plain text | `{"text"}` or `{"content"}`; any other file is one document |

use std::io::{BufRead, BufReader};
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::Value;

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

impl Message {
    /// A turn.
    pub fn new(role: &str, content: &str) -> Message {
        Message { role: role.into(), content: content.into() }
    }
}

/// A prompt with a better and a worse answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair {
    /// The conversation so far.
    pub prompt: Vec<Message>,
    /// The better answer.
    pub chosen: Vec<Message>,
    /// The worse answer.
    pub rejected: Vec<Message>,
}

/// What a file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Conversations to learn from.
    Conversations,
    /// Pairs of answers.
    Preferences,
    /// Prompts to answer.
    Prompts,
}

/// What a file holds, by the keys of its first line.
pub fn kind(path: &Path) -> Result<Kind> {
    let file = std::fs::File::open(path).with_context(|| path.display().to_string())?;
    let first = BufReader::new(file).lines().map_while(|l| l.ok()).find(|l| !l.trim().is_empty());
    let value: Value = serde_json::from_str(&first.unwrap_or_default())
        .with_context(|| format!("{}: its first line is no JSON object", path.display()))?;
    let has = |key: &str| !value[key].is_null();
    let last = value["messages"].as_array().and_then(|m| m.last());
    let role = last.and_then(|m| m["role"].as_str().or(m["from"].as_str()));
    Ok(match () {
        () if has("chosen") || has("rejected") => Kind::Preferences,
        () if has("completion") || matches!(role, Some("assistant" | "gpt")) => Kind::Conversations,
        () if has("prompt") || has("messages") => Kind::Prompts,
        () => bail!(
            "{}: expected lines with messages, with prompt and completion, with prompt, chosen and \
             rejected, or with prompt",
            path.display()
        ),
    })
}

/// Conversations to learn from.
pub fn conversations(path: &Path) -> Result<Vec<Vec<Message>>> {
    lines(path, |v| {
        if !v["messages"].is_null() {
            return messages(&v["messages"], "messages");
        }
        let mut all = said(&v["prompt"], "user", "prompt")
            .map_err(|_| anyhow!("has neither messages nor prompt and completion"))?;
        all.extend(said(&v["completion"], "assistant", "completion")?);
        Ok(all)
    })
}

/// Pairs of answers.
pub fn preferences(path: &Path) -> Result<Vec<Pair>> {
    lines(path, |v| {
        let prompt = if v["prompt"].is_null() { &v["context"] } else { &v["prompt"] };
        Ok(Pair {
            prompt: said(prompt, "user", "prompt")?,
            chosen: said(&v["chosen"], "assistant", "chosen")?,
            rejected: said(&v["rejected"], "assistant", "rejected")?,
        })
    })
}

/// Prompts to answer.
pub fn prompts(path: &Path) -> Result<Vec<Vec<Message>>> {
    lines(path, |v| {
        let prompt = if v["prompt"].is_null() { &v["messages"] } else { &v["prompt"] };
        said(prompt, "user", "prompt")
    })
}

/// Documents to model: of JSONL the `text` (or `content`) of each line, of another file the whole.
pub fn texts(path: &Path) -> Result<Vec<String>> {
    if path.extension().is_some_and(|e| e == "jsonl" || e == "json") {
        return lines(path, |v| {
            let text = v["text"].as_str().or(v["content"].as_str());
            text.map(str::to_string).ok_or_else(|| anyhow!("lacks text"))
        });
    }
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    if text.trim().is_empty() {
        bail!("{}: is empty", path.display());
    }
    Ok(vec![text])
}

/// Reads every line; an error names the file and the line.
fn lines<T>(path: &Path, read: impl Fn(&Value) -> Result<T>) -> Result<Vec<T>> {
    let shown = path.display();
    let file = std::fs::File::open(path).with_context(|| shown.to_string())?;
    let mut out = Vec::new();
    for (number, line) in BufReader::new(file).lines().enumerate() {
        let at = || format!("{shown}:{}", number + 1);
        let line = line.with_context(at)?;
        if line.trim().is_empty() {
            continue;
        }
        let value: Value = serde_json::from_str(&line)
            .map_err(|e| anyhow!("is no JSON object: {e}"))
            .with_context(at)?;
        out.push(read(&value).with_context(at)?);
    }
    if out.is_empty() {
        bail!("{shown}: has no line; expected one JSON object a line");
    }
    Ok(out)
}

fn said(v: &Value, role: &str, key: &str) -> Result<Vec<Message>> {
    match v {
        Value::String(text) => Ok(vec![Message::new(role, text)]),
        Value::Object(_) => messages(&Value::Array(vec![v.clone()]), key),
        _ => messages(v, key),
    }
}

fn messages(v: &Value, key: &str) -> Result<Vec<Message>> {
    let list = v
        .as_array()
        .filter(|l| !l.is_empty())
        .ok_or_else(|| anyhow!("lacks {key}: a text, or a list of {{\"role\", \"content\"}}"))?;
    list.iter()
        .map(|m| {
            let role = m["role"].as_str().or(m["from"].as_str());
            let role = role.ok_or_else(|| anyhow!("a message of {key} lacks role"))?;
            let content =
                m["content"].as_str().ok_or_else(|| anyhow!("a message of {key} lacks content"))?;
            let role = match role {
                "human" => "user",
                "gpt" => "assistant",
                "system" | "user" | "assistant" => role,
                other => bail!("role {other} in {key} is none of system, user, assistant"),
            };
            Ok(Message::new(role, content))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        file
    }

    #[test]
    fn forms_of_other_tools_are_read() {
        let f = file(concat!(
            r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}"#,
            "\n\n",
            r#"{"messages":[{"from":"human","content":"a"},{"from":"gpt","content":"b"}]}"#,
            "\n",
            r#"{"prompt":"a","completion":"b"}"#,
        ));
        let all = conversations(f.path()).unwrap();
        let wanted = vec![Message::new("user", "a"), Message::new("assistant", "b")];
        assert_eq!(all, vec![wanted; 3]);
        let f = file(r#"{"context":[{"role":"user","content":"q"}],"chosen":"y","rejected":"n"}"#);
        assert_eq!(preferences(f.path()).unwrap()[0].rejected[0].content, "n");
    }

    #[test]
    fn errors_name_the_line_and_the_key() {
        let good = r#"{"prompt":"a","chosen":"b","rejected":"c"}"#;
        for (bad, words) in [
            ("{", "no JSON"),
            (r#"{"prompt":"a","chosen":"b"}"#, "lacks rejected"),
            (r#"{"prompt":[{"role":"cat","content":""}],"chosen":"b","rejected":"c"}"#, "role cat"),
            (r#"{"prompt":[{"role":"user"}],"chosen":"b","rejected":"c"}"#, "lacks content"),
        ] {
            let f = file(&format!("{good}\n{bad}\n"));
            let e = format!("{:#}", preferences(f.path()).unwrap_err());
            assert!(e.contains(":2") && e.contains(words), "{e}");
        }
        assert!(prompts(file("").path()).unwrap_err().to_string().contains("no line"));
    }

    #[test]
    fn the_data_of_the_default_run_is_whole_and_its_held_out_prompts_are_new() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../data/rlhf");
        let seen: Vec<_> = conversations(&folder.join("sft.jsonl")).unwrap();
        let held = prompts(&folder.join("prompts.heldout.jsonl")).unwrap();
        assert!(seen.len() >= 300 && held.len() >= 40);
        let pairs = preferences(&folder.join("preferences.jsonl")).unwrap();
        for prompt in &held {
            assert!(seen.iter().all(|c| c[0] != prompt[0]));
            assert!(pairs.iter().all(|p| p.prompt[0] != prompt[0]));
        }
    }
}
