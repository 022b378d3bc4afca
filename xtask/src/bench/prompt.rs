//! A process that waits at a prompt: a line in, one figure out, idle between.
//!
//! It first says who it is, `{"name": …}`, then answers each line with `{"speed": x}` and, if it
//! knows, the `"floor"` speed that the machine would allow; or `{"error": "no such case"}`.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result};
use serde_json::Value;

/// A started process.
pub(crate) struct Prompt {
    /// What it calls itself: its version and settings.
    pub(crate) name: String,
    program: String,
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

/// An answer, in things per second.
pub(crate) struct Answer {
    pub(crate) speed: f64,
    pub(crate) floor: Option<f64>,
}

impl Prompt {
    /// Starts it and waits until it is ready.
    pub(crate) fn start(program: &str, args: &[&str], env: &[(&str, &str)]) -> Result<Prompt> {
        let mut child = Command::new(program)
            .args(args)
            .envs(env.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {program}"))?;
        let input = child.stdin.take().context("its input was just asked for")?;
        let output = BufReader::new(child.stdout.take().context("its output was just asked for")?);
        let program = format!("{program} {}", args.join(" "));
        let mut prompt = Prompt { name: String::new(), program, child, input, output };
        prompt.name = prompt.line()?["name"].as_str().unwrap_or("?").to_string();
        Ok(prompt)
    }

    /// Sends a line and waits for the answer; none if it knows no such case.
    pub(crate) fn ask(&mut self, line: &str) -> Result<Option<Answer>> {
        writeln!(self.input, "{line}").with_context(|| format!("{} has ended", self.program))?;
        let answer = self.line()?;
        if answer["error"].as_str().is_some_and(|error| error.starts_with("no such case")) {
            return Ok(None);
        }
        let speed = answer["speed"].as_f64();
        let speed = speed.with_context(|| format!("{}: no speed in {answer}", self.program))?;
        Ok(Some(Answer { speed, floor: answer["floor"].as_f64() }))
    }

    /// The next line that is JSON; warnings of libraries are passed over.
    fn line(&mut self) -> Result<Value> {
        loop {
            let mut line = String::new();
            if self.output.read_line(&mut line)? == 0 {
                anyhow::bail!("{} ended without an answer; see its message above", self.program);
            }
            if let Ok(value @ Value::Object(_)) = serde_json::from_str(&line) {
                return Ok(value);
            }
        }
    }
}

impl Drop for Prompt {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
