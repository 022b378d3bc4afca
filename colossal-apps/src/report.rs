//! `report.html`: plots and answers of a run, one file that opens without a network.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use crate::chat::Point;
use crate::chat::rlhf::{Outcome, RlhfConfig};

/// The plots of a report: stage, number, title.
const PLOTS: [(&str, &str, &str); 6] = [
    ("sft", "loss", "Fine-tuning: loss"),
    ("reward", "loss", "Reward model: loss"),
    ("reward", "accuracy", "Reward model: accuracy of a batch"),
    ("ppo", "objective/scores", "PPO: reward"),
    ("ppo", "objective/kl", "PPO: divergence from the reference, nats per answer"),
    ("ppo", "completions/mean_length", "PPO: length of answers, tokens"),
];

/// The outcome as a table for the terminal, with the first answers side by side.
pub fn summary(o: &Outcome) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(text, "\nheld-out                     before     after");
    let _ = writeln!(text, "mean reward               {:>9.3} {:>9.3}", o.reward[0], o.reward[1]);
    if let Some([before, after]) = o.rule {
        let _ = writeln!(text, "score by rule (unseen)    {before:>9.3} {after:>9.3}");
    }
    let _ = writeln!(text, "reward model accuracy     {:>9.3}", o.reward_accuracy);
    let _ = writeln!(text, "divergence, nats          {:>19.3}", o.kl);
    let _ = writeln!(text, "sft loss                  {:>9.3}", o.sft_loss);
    for [prompt, before, after] in o.answers.iter().take(4) {
        let _ = writeln!(text, "\n  {prompt}\n    before: {before}\n    after:  {after}");
    }
    text
}

/// Writes `report.html` and `outcome.json` into the output folder.
pub fn write(config: &RlhfConfig, outcome: &Outcome) -> Result<PathBuf> {
    let save = |name: &str, text: &str| -> Result<PathBuf> {
        let path = config.output_dir.join(name);
        colossal_tensor::safetensors::write_atomic(&path, text.as_bytes())?;
        Ok(path)
    };
    let resolved = toml::to_string_pretty(config)?;
    let mut page = String::from(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>RLHF</title><style>\
         body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em}\
         table{border-collapse:collapse;width:100%}td,th{border-bottom:1px solid #ddd;padding:.4em;\
         text-align:left;vertical-align:top}.plots{display:grid;grid-template-columns:1fr 1fr;gap:1em}\
         svg{width:100%;height:auto}pre{background:#f6f6f6;padding:1em;overflow:auto}</style>\
         <h1>Alignment, before and after</h1>",
    );
    let verdict = if outcome.aligned() { "Alignment worked." } else { "Alignment did not work." };
    let _ = write!(
        page,
        "<p><b>{verdict}</b></p><pre>{}</pre><div class=\"plots\">",
        escape(&summary_table(outcome))
    );
    let mut series: BTreeMap<(&str, &str), Vec<(f64, f64)>> = BTreeMap::new();
    for Point { stage, step, name, value } in &outcome.points {
        series.entry((stage, name)).or_default().push((*step as f64, *value));
    }
    for (stage, name, title) in PLOTS {
        if let Some(points) = series.get(&(stage, name)) {
            page.push_str(&plot(title, points)?);
        }
    }
    page.push_str(
        "</div><h2>Answers to held-out prompts</h2><table><tr><th>prompt<th>before<th>after",
    );
    for [prompt, before, after] in &outcome.answers {
        let _ =
            write!(page, "<tr><td>{}<td>{}<td>{}", escape(prompt), escape(before), escape(after));
    }
    let _ = write!(page, "</table><h2>Configuration</h2><pre>{}</pre></html>", escape(&resolved));
    let report = save("report.html", &page)?;
    // Last: with it the run is over, and the next one begins anew.
    save("outcome.json", &serde_json::to_string_pretty(outcome)?)?;
    Ok(report)
}

fn summary_table(outcome: &Outcome) -> String {
    let alone = Outcome { answers: vec![], ..outcome.clone() };
    summary(&alone)
}

fn plot(title: &str, points: &[(f64, f64)]) -> Result<String> {
    let mut svg = String::new();
    {
        let fail = |e: &dyn std::fmt::Display| anyhow!("plot {title}: {e}");
        let area = SVGBackend::with_string(&mut svg, (480, 280)).into_drawing_area();
        area.fill(&WHITE).map_err(|e| fail(&e))?;
        let ends = |f: fn(f64, f64) -> f64, start: f64, pick: fn(&(f64, f64)) -> f64| {
            points.iter().map(pick).filter(|x| x.is_finite()).fold(start, f)
        };
        let (low, high) = (ends(f64::min, f64::MAX, |p| p.1), ends(f64::max, f64::MIN, |p| p.1));
        let margin = ((high - low) * 0.05).max(1e-3);
        let last = ends(f64::max, 1.0, |p| p.0);
        let mut chart = ChartBuilder::on(&area)
            .caption(title, ("sans-serif", 15))
            .margin(8)
            .x_label_area_size(24)
            .y_label_area_size(44)
            .build_cartesian_2d(0.0..last, low - margin..high + margin)
            .map_err(|e| fail(&e))?;
        chart.configure_mesh().light_line_style(WHITE).draw().map_err(|e| fail(&e))?;
        let line = LineSeries::new(points.iter().copied(), RGBColor(30, 90, 200).stroke_width(2));
        chart.draw_series(line).map_err(|e| fail(&e))?;
        area.present().map_err(|e| fail(&e))?;
    }
    Ok(svg)
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
