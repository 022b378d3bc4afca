//! What a run tells while it goes on: a bar on the screen (where there is none, a line now and
//! then), a line a step in `metrics.jsonl`.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value, json};

/// One number of one step.
#[derive(Debug, Clone, PartialEq)]
pub struct Point {
    /// Which stage of the run.
    pub stage: String,
    /// Which step of it.
    pub step: u64,
    /// What.
    pub name: String,
    /// How much.
    pub value: f64,
}

/// The bar, the log and the numbers so far. Ranks other than the first are silent.
#[derive(Debug)]
pub struct Progress {
    log: Option<File>,
    bar: ProgressBar,
    every: u64,
    /// All numbers so far.
    pub points: Vec<Point>,
}

impl Progress {
    /// A progress that logs to `folder/metrics.jsonl` if `show`, and is silent otherwise.
    ///
    /// `resumed` runs add to the log, and know the numbers it has, instead of beginning a new one.
    pub fn open(folder: &Path, show: bool, resumed: bool) -> Result<Progress> {
        let mut progress =
            Progress { log: None, bar: ProgressBar::hidden(), every: 1, points: vec![] };
        if !show {
            return Ok(progress);
        }
        std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        let path = folder.join("metrics.jsonl");
        if resumed && let Ok(text) = std::fs::read_to_string(&path) {
            progress.points = text.lines().flat_map(points).collect();
        }
        let mut options = File::options();
        options.create(true).write(true).append(resumed).truncate(!resumed);
        progress.log = Some(options.open(&path).with_context(|| path.display().to_string())?);
        Ok(progress)
    }

    /// A stage of `steps` steps begins.
    pub fn stage(&mut self, name: &str, steps: u64) {
        self.bar.finish();
        if self.log.is_some() {
            self.bar = ProgressBar::new(steps);
            let style = "{prefix:>8} [{bar:30}] {pos}/{len} {msg} {eta} left";
            if let Ok(style) = ProgressStyle::with_template(style) {
                self.bar.set_style(style);
            }
            self.bar.set_prefix(name.to_string());
            // Never less than ten lines a stage, never more than a line a step.
            self.every = (steps / 10).max(1);
        }
    }

    /// The numbers of a step.
    pub fn step(&mut self, stage: &str, step: u64, numbers: &[(&str, f64)]) {
        let Some(log) = &mut self.log else { return };
        let mut line = Map::new();
        line.insert("stage".into(), json!(stage));
        line.insert("step".into(), json!(step));
        for (name, value) in numbers {
            line.insert((*name).into(), json!(value));
            let point = Point { stage: stage.into(), step, name: (*name).into(), value: *value };
            self.points.push(point);
        }
        // A full disk must not end a run that can still save its model elsewhere.
        let _ = writeln!(log, "{}", Value::Object(line));
        self.bar.set_position(step);
        let shown: Vec<String> =
            numbers.iter().take(3).map(|(n, v)| format!("{} {}", short(n), legible(*v))).collect();
        if self.bar.is_hidden() && step.is_multiple_of(self.every) {
            let all = self.bar.length().unwrap_or(step);
            eprintln!("{stage:>8} {step}/{all}  {}", shown.join("  "));
        }
        self.bar.set_message(shown.join("  "));
    }

    /// The newest value of a number.
    pub fn last(&self, name: &str) -> Option<f64> {
        self.points.iter().rev().find(|p| p.name == name).map(|p| p.value)
    }

    /// The current stage is over.
    pub fn finish(&mut self) {
        self.bar.finish();
    }
}

/// The numbers of a line of the log; a line that was cut off has none.
fn points(line: &str) -> Vec<Point> {
    let Ok(Value::Object(line)) = serde_json::from_str(line) else { return vec![] };
    let stage = line.get("stage").and_then(Value::as_str).unwrap_or_default();
    let step = line.get("step").and_then(Value::as_u64).unwrap_or_default();
    line.iter()
        .filter(|(name, _)| *name != "stage" && *name != "step")
        .filter_map(|(name, value)| {
            let (stage, name) = (stage.to_string(), name.clone());
            Some(Point { stage, step, name, value: value.as_f64()? })
        })
        .collect()
}

fn legible(value: f64) -> String {
    if value != 0.0 && value.abs() < 1e-3 { format!("{value:.1e}") } else { format!("{value:.3}") }
}

fn short(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}
