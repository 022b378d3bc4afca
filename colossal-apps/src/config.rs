//! The configuration of a run: defaults, a TOML file over them, flags over both.
//!
//! Every field of the file is a flag of the same dotted name: `--plan.dp 2` is `[plan] dp = 2`.
//! Dashes in names are underscores. An unknown name is an error that lists the known ones.

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde::de::DeserializeOwned;
use toml::{Table, Value};

/// The fields that a file and flags give.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Given(Table);

impl Given {
    /// Reads a TOML file.
    pub fn file(path: &Path) -> Result<Given> {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        Ok(Given(text.parse().with_context(|| path.display().to_string())?))
    }

    /// Adds flags, as `["--lr", "1e-4", "--plan.dp=2"]`.
    ///
    /// # Errors
    /// For a word that is no flag, or a flag without a value.
    pub fn flags(mut self, words: &[String]) -> Result<Given> {
        let mut words = words.iter();
        while let Some(word) = words.next() {
            let Some(name) = word.strip_prefix("--") else {
                bail!("{word}: expected a flag, as --steps 100");
            };
            let (name, value) = match name.split_once('=') {
                Some((name, value)) => (name, value),
                None => {
                    let value = words.next();
                    (name, value.with_context(|| format!("--{name}: lacks a value"))?.as_str())
                }
            };
            self.set(&name.replace('-', "_"), parse(value))?;
        }
        Ok(self)
    }

    /// Sets one field by its dotted name.
    pub fn set(&mut self, name: &str, value: impl Into<Value>) -> Result<()> {
        let mut table = &mut self.0;
        let (path, last) = name.rsplit_once('.').unwrap_or(("", name));
        for part in path.split('.').filter(|p| !p.is_empty()) {
            let inner = table.entry(part).or_insert_with(|| Table::new().into());
            table = match inner {
                Value::Table(t) => t,
                _ => bail!("--{name}: {part} is a value, it has no fields"),
            };
        }
        table.insert(last.into(), value.into());
        Ok(())
    }

    /// The fields of a table of the first level.
    pub fn table(&self, name: &str) -> Option<Given> {
        self.0.get(name)?.as_table().cloned().map(Given)
    }

    /// Is this field of the first level given?
    pub fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// The configuration: what is given, over `defaults` if there are any.
    pub fn read<T: Serialize + DeserializeOwned>(self, defaults: Option<&T>) -> Result<T> {
        let table = match defaults {
            Some(defaults) => over(Table::try_from(defaults)?, self.0),
            None => self.0,
        };
        // From text, so that a mistake is shown where it stands.
        Ok(toml::from_str(&toml::to_string(&table)?)?)
    }
}

/// A number, a bool or a list where it reads as one; else a text.
fn parse(text: &str) -> Value {
    let read: Result<Table, _> = format!("value = {text}").parse();
    read.ok().and_then(|mut t| t.remove("value")).unwrap_or_else(|| text.into())
}

fn over(mut below: Table, above: Table) -> Table {
    for (key, value) in above {
        let merged = match (below.remove(&key), value) {
            (Some(Value::Table(b)), Value::Table(a)) => over(b, a).into(),
            // `--lr 1` is a number as good as 1.0.
            (Some(Value::Float(_)), Value::Integer(a)) => Value::Float(a as f64),
            (Some(Value::Array(_)), Value::String(one)) => vec![one].into(),
            (_, a) => a,
        };
        below.insert(key, merged);
    }
    below
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chat::rlhf::RlhfConfig;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_string).collect()
    }

    #[test]
    fn flags_stand_over_the_file_and_the_file_over_defaults() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.toml");
        std::fs::write(&path, "seed = 7\nbatch = 8\n[ppo]\niterations = 3\n").unwrap();
        let given = Given::file(&path).unwrap();
        let given = given.flags(&words("--batch 4 --ppo.kl-coef=0.5 --sft-lr 1")).unwrap();
        let config: RlhfConfig = given.read(Some(&RlhfConfig::default())).unwrap();
        assert_eq!((config.seed, config.batch, config.ppo.iterations), (7, 4, 3));
        assert_eq!((config.ppo.kl_coef, config.sft_lr), (0.5, 1.0));
        assert_eq!(config.layers, RlhfConfig::default().layers);
    }

    #[test]
    fn mistakes_name_the_flag() {
        let read = |text: &str| -> Result<RlhfConfig> {
            Given::default().flags(&words(text))?.read(Some(&RlhfConfig::default()))
        };
        for (text, said) in [
            ("--plan.dpp 2", "unknown field `dpp`"),
            ("--learning-rate 1", "unknown field `learning_rate`"),
            ("steps 3", "expected a flag"),
            ("--batch", "lacks a value"),
            ("--batch many", "invalid type"),
            ("--seed.x 1", "invalid type"),
        ] {
            let e = format!("{:#}", read(text).unwrap_err());
            assert!(e.contains(said), "{text}: {e}");
        }
    }
}
