//! What is kept of a run: `bench/runs/<date>-<machine>.json`, and a page with the history.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::{Value, json};

const RUNS: &str = "bench/runs";

/// Adds the rows to the file of this day and machine, in which a row replaces its older self,
/// and writes `bench/index.html` anew.
pub(super) fn keep(rows: &[Value]) -> Result<()> {
    let date = output("date", &["+%Y-%m-%d"])?;
    let commit = output("git", &["describe", "--always", "--dirty"]).unwrap_or_default();
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = cpu.lines().find_map(|l| l.strip_prefix(name)).unwrap_or(": unknown");
        line.trim_start_matches([' ', '\t', ':']).to_string()
    };
    let cores = std::thread::available_parallelism().map_or(0, |n| n.get());
    let (model, family) = (field("model name"), field("cpu family"));
    // Processors of one family may differ in what decides most of the figures.
    let flags = field("flags");
    let has = |flag: &&str| flags.split(' ').any(|f| f == *flag);
    let vectors = ["avx512_bf16", "avx512f", "avx2"].into_iter().find(has).unwrap_or("plain");
    let model_name = model.to_lowercase().replace(' ', "-");
    let machine = format!("{model_name}-f{family}-{vectors}-{cores}c");
    let path = format!("{RUNS}/{date}-{machine}.json");
    std::fs::create_dir_all(RUNS)?;
    let mut all: Vec<Value> = match std::fs::read_to_string(&path) {
        Ok(text) => {
            let run: Value = serde_json::from_str(&text).with_context(|| path.clone())?;
            run["rows"].as_array().cloned().unwrap_or_default()
        }
        Err(_) => vec![],
    };
    let same = |a: &Value, b: &Value| a["what"] == b["what"] && a["peer_is"] == b["peer_is"];
    all.retain(|old| !rows.iter().any(|new| same(old, new)));
    all.extend(rows.iter().cloned().map(|mut row| {
        row["commit"] = json!(commit);
        row
    }));
    let run = json!({
        "date": date,
        "cpu": format!("{model} with {vectors}"),
        "cpu_family": family,
        "cores": cores,
        "rows": all,
    });
    std::fs::write(&path, serde_json::to_string_pretty(&run)? + "\n")?;
    std::fs::write("bench/index.html", page()?)?;
    println!("\nkept in {path}; the history is bench/index.html");
    Ok(())
}

/// Writes the rows of another machine, a GPU's, to a file of its own in `folder`.
pub(crate) fn keep_of(folder: &Path, machine: &str, rows: &[Value]) -> Result<()> {
    let date = output("date", &["+%Y-%m-%d"])?;
    std::fs::create_dir_all(folder)?;
    let path = folder.join(format!("{date}-{machine}.json"));
    let run = json!({"date": date, "cpu": machine, "cpu_family": "", "cores": 1, "rows": rows});
    std::fs::write(&path, serde_json::to_string_pretty(&run)? + "\n")?;
    println!("\nkept in {}: it belongs under {RUNS}", path.display());
    Ok(())
}

/// All runs: a table each, and how each ratio went over the runs.
fn page() -> Result<String> {
    let mut paths: Vec<_> = std::fs::read_dir(RUNS)?.filter_map(|e| Some(e.ok()?.path())).collect();
    paths.retain(|p| p.extension().is_some_and(|e| e == "json"));
    paths.sort();
    let mut history: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    let mut tables = Vec::new();
    for path in &paths {
        let run: Value = serde_json::from_str(&std::fs::read_to_string(path)?)
            .with_context(|| path.display().to_string())?;
        let text = |v: &Value| v.as_str().unwrap_or("").replace('<', "&lt;");
        let mut table = format!(
            "<h2>{}, {}, {} cores</h2>\n<table><tr><th>what<th>ours<th>peer<th><th>ratio<th>floor<th>share<th>ratio over time\n",
            text(&run["date"]),
            text(&run["cpu"]),
            run["cores"]
        );
        for row in run["rows"].as_array().into_iter().flatten() {
            let key = format!("{} {}", text(&row["what"]), text(&row["peer_is"]));
            let ratios = history.entry(key).or_default();
            ratios.extend(row["ratio"].as_f64());
            let number = |name: &str| row[name].as_f64().map_or("".into(), |x| format!("{x:.0}"));
            let _ = writeln!(
                table,
                "<tr><td>{}<td>{} {}<td>{}<td>{}<td>{}<td>{}<td>{}<td>{}",
                text(&row["what"]),
                number("ours"),
                text(&row["unit"]),
                number("peer"),
                text(&row["peer_is"]),
                row["ratio"].as_f64().map_or(String::new(), |r| format!("<b>{r:.2}</b>")),
                number("floor"),
                row["share"].as_f64().map_or(String::new(), |s| format!("{:.0} %", 100.0 * s)),
                line(ratios)
            );
        }
        table.push_str("</table>\n");
        tables.push(table);
    }
    tables.reverse();
    Ok(format!(
        "<!doctype html><meta charset=utf-8><title>Colossal: measured</title>\n\
         <style>body{{font:15px sans-serif;margin:2em}}td,th{{padding:2px 10px;text-align:left}}</style>\n\
         <h1>Measured</h1>\n<p>Ours and the peer in turns on the same machine, medians; share is ours over the floor.\n{}",
        tables.concat()
    ))
}

/// Ratios so far as a small line; one is the grey level.
fn line(ratios: &[f64]) -> String {
    let top = ratios.iter().copied().fold(2.0, f64::max);
    let y = |r: f64| 20.0 - 20.0 * r / top;
    let points: Vec<String> =
        ratios.iter().enumerate().map(|(i, r)| format!("{},{:.1}", 4 + 12 * i, y(*r))).collect();
    format!(
        "<svg width={w} height=22><path d='M0 {one:.1}H{w}' stroke=silver /><polyline points='{p}' fill=none stroke=black /><circle r=2 cx={x} cy={last:.1} /></svg>",
        w = 12 * ratios.len() + 8,
        one = y(1.0),
        p = points.join(" "),
        x = 4 + 12 * ratios.len().saturating_sub(1),
        last = ratios.last().map_or(20.0, |r| y(*r)),
    )
}

pub(crate) fn output(program: &str, args: &[&str]) -> Result<String> {
    let out = Command::new(program)
        .args(args)
        .output()
        .with_context(|| format!("cannot run {program}"))?;
    Ok(String::from_utf8_lossy(&out.stdout).trim().to_string())
}
