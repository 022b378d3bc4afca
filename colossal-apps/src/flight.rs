//! What the ranks of a failed group called last, from the file that was kept of it.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// Calls that are shown.
const SHOWN: usize = 12;

/// Reads a flight recorder's file and shows it: who is behind, and the last calls side by side.
///
/// # Errors
/// When the file cannot be read, or is no such file.
pub fn show(path: &Path) -> Result<String> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let report: Value = serde_json::from_str(&text)
        .with_context(|| format!("{} is no flight recorder's file", path.display()))?;
    render(&report).with_context(|| format!("{} is no flight recorder's file", path.display()))
}

fn render(report: &Value) -> Result<String> {
    let Some(ranks) = report["ranks"].as_array() else { bail!("it has no list `ranks`") };
    let mut out = String::new();
    // Writing to a String cannot fail.
    let group = report["group"].as_str().unwrap_or("?");
    let _ = writeln!(out, "group {group}, {} ranks", report["world_size"]);
    if let Some(error) = report["error"].as_str() {
        let _ = writeln!(out, "failed: {error}");
    }
    let furthest = ranks.iter().filter_map(|r| r["begun"].as_u64()).max().unwrap_or(0);
    let mut calls: BTreeMap<u64, Vec<(u64, String)>> = BTreeMap::new();
    for rank in ranks {
        let (number, begun) =
            (rank["rank"].as_u64().unwrap_or(0), rank["begun"].as_u64().unwrap_or(0));
        if begun < furthest {
            let _ =
                writeln!(out, "rank {number} is behind: {begun} calls begun, others {furthest}");
        }
        if let Some(message) = rank["waits_in"].as_str() {
            let _ = writeln!(out, "rank {number} waits in {message}");
        }
        for call in rank["calls"].as_array().into_iter().flatten() {
            let line = format!("{}, {}", signature(call), call["state"].as_str().unwrap_or(""));
            calls.entry(call["sequence"].as_u64().unwrap_or(0)).or_default().push((number, line));
        }
    }
    let skip = calls.len().saturating_sub(SHOWN);
    for (sequence, rows) in calls.iter().skip(skip) {
        let first = &rows[0].1;
        if rows.len() == ranks.len() && rows.iter().all(|(_, line)| line == first) {
            let _ = writeln!(out, "call {sequence:>5}  all ranks  {first}");
            continue;
        }
        for (rank, line) in rows {
            let _ = writeln!(out, "call {sequence:>5}  rank {rank:<4}  {line}");
        }
    }
    for rank in ranks {
        let messages = rank["messages"].as_array().map_or(&[][..], |m| m);
        for message in &messages[messages.len().saturating_sub(SHOWN)..] {
            let _ = writeln!(out, "message     rank {:<4}  {}", rank["rank"], signature(message));
        }
    }
    Ok(out)
}

/// `all_reduce(4 x f32, Sum) at src/main.rs:12`
fn signature(call: &Value) -> String {
    let word = |name: &str| call[name].as_str().unwrap_or("");
    let mut line = format!("{}({} x {}", word("verb"), call["len"], word("dtype"));
    let root = match word("verb") {
        "send" => "to ",
        "recv" => "from ",
        _ => "root ",
    };
    for (name, value) in [("", &call["op"]), (root, &call["root"])] {
        match value {
            Value::String(value) => line += &format!(", {name}{value}"),
            Value::Number(value) => line += &format!(", {name}{value}"),
            _ => {}
        }
    }
    line + &format!(") at {}", word("site"))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use colossal_comm::{Config, Group, ReduceOp};

    #[test]
    fn it_shows_who_is_behind_and_where_calls_part() {
        let groups = Group::threads_with(2, Config { timeout: Duration::from_millis(100) });
        let reports: Vec<_> = std::thread::scope(|s| {
            let ranks = groups.into_iter().map(|g| {
                s.spawn(move || {
                    g.barrier().unwrap();
                    if g.rank() == 0 {
                        g.all_reduce(&mut [1.0f32; 8], ReduceOp::Sum).unwrap_err();
                    } else {
                        std::thread::sleep(Duration::from_millis(300));
                    }
                    g.flight_report()
                })
            });
            ranks.collect::<Vec<_>>().into_iter().map(|r| r.join().unwrap()).collect()
        });
        let text = super::render(&reports[0][0]).unwrap();
        assert!(text.contains("rank 1 is behind: 1 calls begun, others 2"), "{text}");
        assert!(text.contains("all ranks  barrier("), "{text}");
        assert!(text.contains("rank 0     all_reduce(8 x f32, Sum) at"), "{text}");
        let e = super::render(&serde_json::json!({"a": 1})).unwrap_err();
        assert!(e.to_string().contains("ranks"));
    }
}
