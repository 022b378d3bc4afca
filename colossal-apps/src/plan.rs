//! `colossal plan show`: what a plan makes of a model, before anything is started.
//!
//! The model's layers run once on a pretended mesh of the plan's size: layouts are checked, and
//! bytes held and sent are accounted for, as `colossal_tensor::fake` describes. The result is a
//! table, and a picture of the mesh on demand.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use colossal_models::gpt2::Gpt2Config;
use colossal_models::llama::LlamaConfig;
use colossal_models::mixtral::MixtralConfig;
use colossal_models::train::{Batch, Plan, SequenceMode, TensorMode, lm_loss};
use colossal_models::{CausalLm, Decoder, DecoderConfig, Training, hf};
use colossal_tensor::fake::{self, Report};
use colossal_tensor::moe::Balance;
use colossal_tensor::random::Stream;
use colossal_tensor::{Placement, Region, Role, Stack};

use crate::config::Given;

/// What can be done with a plan.
#[derive(Debug, Subcommand)]
pub enum PlanCommand {
    /// Placements, bytes on a rank, and bytes sent along each axis in a step, for any number of ranks.
    #[command(after_help = "Examples:\n  colossal plan show --model llama3-70b --dp 128 --tp 8 \
        --sequence-parallel split_gather --zero 1 --precision bf16\n  \
        colossal plan show --model llama2-7b --tp 64 --tensor 2d --svg mesh.svg")]
    Show(Show),
}

/// The arguments of `plan show`.
#[derive(Debug, Args)]
pub struct Show {
    /// A Hugging Face folder or config.json, or a published size: llama2-7b, llama2-70b,
    /// llama3-8b, llama3-70b, mixtral-8x7b, gpt2-xl, gpt3-175b.
    #[arg(long, default_value = "llama2-7b")]
    model: String,
    /// A TOML file with a `[plan]`.
    #[arg(long)]
    config: Option<PathBuf>,
    /// Sequences of a step over all ranks; one for each part that the plan cuts if not given.
    #[arg(long)]
    batch: Option<usize>,
    /// Tokens of a sequence.
    #[arg(long, default_value_t = 2048)]
    seq: usize,
    /// Draw the mesh, and who holds what, into this file.
    #[arg(long)]
    svg: Option<PathBuf>,
    /// Fields of the plan, as --dp 8 --tp 4 --zero 1.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "--FIELD VALUE")]
    fields: Vec<String>,
}

/// Runs a command and returns what it says.
pub fn run(command: &PlanCommand) -> Result<String> {
    let PlanCommand::Show(show) = command;
    let mut given = Given::default();
    if let Some(path) = &show.config {
        let file = Given::file(path)?;
        given = file.table("plan").unwrap_or(file);
    }
    let plan: Plan = given.flags(&show.fields)?.read(Some(&Plan::default()))?;
    plan.validate()?;
    let config = model(&show.model)?;
    let batch = show.batch.unwrap_or(plan.batch_parts() * plan.microbatches);
    let report = check(&config, &plan, batch, show.seq)?;
    if let Some(path) = &show.svg {
        std::fs::write(path, picture(&plan)).with_context(|| path.display().to_string())?;
    }
    Ok(table(&show.model, &plan, &report, batch, show.seq))
}

/// One microbatch of training on a pretended mesh.
pub fn check(config: &DecoderConfig, plan: &Plan, batch: usize, seq: usize) -> Result<Report> {
    let parts = plan.batch_parts() * plan.microbatches;
    if batch == 0 || !batch.is_multiple_of(parts) {
        bail!("--batch {batch} is no multiple of {parts}, the parts into which the plan cuts it");
    }
    if seq > config.max_positions() {
        bail!("--seq {seq} is longer than the {} positions of the model", config.max_positions());
    }
    let rows = batch / parts;
    let batch = Batch {
        ids: vec![0; rows * seq],
        targets: vec![0; rows * seq],
        lengths: vec![seq as i32; rows],
        seq,
    };
    let training = Training {
        dropout: Stream::new(0, 0),
        first_row: 0,
        balance: Balance::new(1.0 / plan.microbatches as f32),
    };
    Ok(fake::check(&plan.axes(), plan.sharding(), plan.precision.dtype(), |params| {
        let stack = Stack::build::<Decoder>(params, config)?.recompute(plan.recompute);
        let model = CausalLm { config: config.clone(), stack, params: params.clone() };
        lm_loss(&model, &batch, Some(training), 1.0)
    })?)
}

/// A model's sizes, by file or by name.
fn model(name: &str) -> Result<DecoderConfig> {
    let path = Path::new(name);
    if path.exists() {
        let file = if path.is_dir() { path.join("config.json") } else { path.to_path_buf() };
        return Ok(hf::read_config(&file)?);
    }
    let llama = |vocab, hidden, mlp, layers, heads, kv, positions| LlamaConfig {
        intermediate_size: mlp,
        num_key_value_heads: kv,
        max_position_embeddings: positions,
        ..LlamaConfig::sized(vocab, hidden, layers, heads)
    };
    let gpt = |width, layers, heads| Gpt2Config {
        n_positions: 2048,
        ..Gpt2Config::sized(50_257, width, layers, heads)
    };
    Ok(match name {
        "llama2-7b" => DecoderConfig::Llama(llama(32_000, 4096, 11_008, 32, 32, 32, 4096)),
        "llama2-70b" => DecoderConfig::Llama(llama(32_000, 8192, 28_672, 80, 64, 8, 4096)),
        "llama3-8b" => DecoderConfig::Llama(llama(128_256, 4096, 14_336, 32, 32, 8, 131_072)),
        "llama3-70b" => DecoderConfig::Llama(llama(128_256, 8192, 28_672, 80, 64, 8, 131_072)),
        "mixtral-8x7b" => DecoderConfig::Mixtral(MixtralConfig {
            router_aux_loss_coef: 0.02,
            ..MixtralConfig::sized(llama(32_000, 4096, 14_336, 32, 32, 8, 32_768), 8)
        }),
        "gpt2-xl" => DecoderConfig::Gpt2(gpt(1600, 48, 25)),
        "gpt3-175b" => DecoderConfig::Gpt2(gpt(12_288, 96, 96)),
        _ => bail!(
            "--model {name}: no such folder or file, and no size that is known by name (see --help)"
        ),
    })
}

fn table(name: &str, plan: &Plan, report: &Report, batch: usize, seq: usize) -> String {
    let mut out = String::new();
    let (axes, sharding) = (plan.axes(), plan.sharding());
    let shown: Vec<String> =
        axes.iter().filter(|(_, n)| *n > 1).map(|(name, n)| format!("{name} {n}")).collect();
    let _ = writeln!(
        out,
        "{name}: {:.2} B parameters on {} rank{}{}{}, {batch} sequences of {seq} tokens a step\n",
        report.global_elements as f64 / 1e9,
        plan.ranks(),
        if plan.ranks() == 1 { "" } else { "s" },
        if shown.is_empty() { "" } else { ": " },
        shown.join(" x "),
    );

    // What flows where.
    let micro = plan.microbatches;
    let _ = writeln!(out, "bytes that one rank sends in a step, {micro} microbatch(es)");
    let row = |cells: [&str; 6]| {
        let [a, b, c, d, e, f] = cells;
        format!("  {a:<11}{b:>6}  {c:<36}{d:>11}{e:>11}{f:>11}\n")
    };
    out += &row(["axis", "ranks", "what it cuts", "forward", "backward", "gradients"]);
    for (i, (axis, ranks)) in axes.iter().enumerate() {
        let (forward, backward) = report.sent(axis);
        out += &row([
            axis,
            &ranks.to_string(),
            &cuts(&sharding.roles()[i]),
            &bytes(forward * micro),
            &bytes(backward * micro),
            &bytes(report.gradient_bytes[i]),
        ]);
    }
    if !report.traffic.is_empty() {
        let _ = writeln!(out, "\nby op, one microbatch");
        for t in &report.traffic {
            let calls = format!("{} x", t.calls);
            let cells = [&t.axis[..], &calls, t.op, &bytes(t.forward), &bytes(t.backward), ""];
            out += row(cells).trim_end();
            out.push('\n');
        }
    }

    // What lies where.
    let held = report.local_elements;
    let width = plan.precision.dtype().bytes();
    let cut = |bytes: usize, on: bool| if on { bytes.div_ceil(plan.dp) } else { bytes };
    let mut optimizer = cut(8 * held, plan.zero >= 1);
    if width < 4 {
        optimizer += cut(4 * held, plan.zero >= 1);
    }
    let parts = [
        ("parameters", held * width),
        ("gradients in f32", cut(4 * held, plan.zero >= 2)),
        ("moments and masters", optimizer),
        ("activations of a microbatch", report.activation_bytes),
    ];
    let _ = writeln!(out, "\nbytes on one rank");
    for (what, n) in parts {
        let _ = writeln!(out, "  {what:<30}{:>11}", bytes(n));
    }
    let total: usize = parts.iter().map(|(_, n)| n).sum();
    let _ = writeln!(out, "  {:<30}{:>11}", "together", bytes(total));

    let axis_names: Vec<&str> = axes.iter().map(|(name, _)| *name).collect();
    let layout = |of: colossal_tensor::Layout| -> String {
        let places = axis_names.iter().enumerate().map(|(i, axis)| format!("{axis}:{}", of[i]));
        places.collect::<Vec<_>>().join("  ")
    };
    let _ = writeln!(out, "\nplacement of activations");
    for (what, of) in [
        ("batch [batch, seq]", sharding.batch()),
        ("residual stream [batch, seq, embed]", sharding.region(Region::Residual)),
        ("inside sub-layers", sharding.region(Region::TensorParallel)),
        ("heads and losses", sharding.region(Region::Whole)),
    ] {
        let _ = writeln!(out, "  {what:<38}{}", layout(of));
    }

    let _ = writeln!(out, "\nplacement of parameters");
    for ((name, whole, part, places), layers) in families(report) {
        let times = if layers > 1 { format!(" (x {layers})") } else { String::new() };
        let _ = writeln!(out, "  {:<60}{whole:>18}{part:>18}  {places}", name + &times);
    }
    out
}

/// Parameters, those of equal layers as one: name, whole shape, part, placement; and how many.
fn families(report: &Report) -> Vec<((String, String, String, String), usize)> {
    let mut order = vec![];
    let mut count = BTreeMap::new();
    for p in &report.params {
        let number = |part: &str| part.parse::<usize>().map_or(part.to_string(), |_| "*".into());
        let name = p.name.split('.').map(number).collect::<Vec<_>>().join(".");
        let (whole, part) = (format!("{:?}", p.global_shape), format!("{:?}", p.shape));
        let key = (name, whole, part, p.layout.join("  "));
        let seen = count.entry(key.clone()).or_insert(0);
        if *seen == 0 {
            order.push(key);
        }
        *seen += 1;
    }
    order
        .into_iter()
        .map(|key| {
            let n = count[&key];
            (key, n)
        })
        .collect()
}

/// What a role cuts, in words.
fn cuts(role: &Role) -> String {
    use colossal_tensor::Cut::{CubeCol, CubeDepth, CubeRow, GridCol, GridRow, Named, Nothing};
    let mut what = vec![];
    match role.batch {
        Placement::Shard(0) => what.push("batch"),
        Placement::Shard(1) => what.push("tokens"),
        _ => {}
    }
    match &role.cut {
        Nothing => {}
        Named(names) if names.len() == 1 => what.push("experts"),
        Named(_) => what.push("heads, mlp, vocab"),
        GridRow => what.push("input dims, vocab, experts"),
        GridCol => what.push("output dims, width"),
        CubeRow => what.push("heads, mlp, vocab, experts"),
        CubeCol => what.push("width"),
        CubeDepth => what.push("weights again"),
    }
    if role.residual == Placement::Shard(1) && role.batch != Placement::Shard(1) {
        what.push("residual tokens");
    }
    what.join(", ")
}

fn bytes(n: usize) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let (mut value, mut unit) = (n as f64, 0);
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    match unit {
        0 if n == 0 => "-".into(),
        0 => format!("{n} B"),
        _ => format!("{value:.1} {}", UNITS[unit]),
    }
}

/// Ranks that a picture shows at most: the first of a larger mesh.
const SHOWN: usize = 4096;

/// The mesh as SVG: a cell a rank, in blocks of its innermost axes; equal colours hold equal
/// parts of the weights, shades tell parts of the data. Pointing at a cell says what it holds.
pub fn picture(plan: &Plan) -> String {
    let axes: Vec<(&str, usize)> = plan.axes().into_iter().filter(|(_, n)| *n > 1).collect();
    let all = plan.axes();
    let roles = plan.sharding().roles().to_vec();
    let ranks = plan.ranks();
    // Two innermost axes are the rows and columns of a block, the others number the blocks.
    let size = |from_end: usize| axes.len().checked_sub(from_end).map_or(1, |i| axes[i].1);
    let (columns, rows) = (size(1), size(2));
    // A long axis is folded instead.
    let rows = if rows > 64.max(4 * columns) { 1 } else { rows };
    let blocks = ranks / (columns * rows);
    let shown = (SHOWN / (columns * rows)).clamp(1, blocks);
    let across = (shown as f64 * rows as f64 / columns as f64).sqrt().ceil().max(1.0) as usize;
    let across = across.min(shown);
    let cell = match columns * rows * shown {
        0..=64 => 56,
        65..=512 => 28,
        _ => 10,
    };
    let (gap, top) = (12, 64);
    let (bw, bh) = (columns * cell + gap, rows * cell + gap);
    let (width, height) =
        ((across * bw + 2 * gap).max(560), top + shown.div_ceil(across) * bh + 2 * gap);
    let mut svg = String::new();
    let _ = writeln!(
        svg,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"11\">"
    );
    let _ = writeln!(svg, "<rect width=\"100%\" height=\"100%\" fill=\"white\"/>");
    let names: Vec<String> = axes.iter().map(|(a, n)| format!("{a} {n}")).collect();
    let _ = writeln!(
        svg,
        "<text x=\"{gap}\" y=\"20\" font-size=\"15\">{ranks} ranks: {}</text>",
        if names.is_empty() { "one device".to_string() } else { names.join(" x ") }
    );
    let note = if shown < blocks {
        format!(", the first {} shown", shown * rows * columns)
    } else {
        String::new()
    };
    let _ = writeln!(svg, "<text x=\"{gap}\" y=\"38\">{}{note}</text>", words(plan));
    let _ = writeln!(
        svg,
        "<text x=\"{gap}\" y=\"54\" fill=\"#555\">one colour: the same part of the weights; one \
         shade: the same part of the data</text>"
    );
    for rank in 0..shown * rows * columns {
        let mut coords = vec![0; all.len()];
        let mut rest = rank;
        for (coord, (_, n)) in coords.iter_mut().zip(&all).rev() {
            (*coord, rest) = (rest % n, rest / n);
        }
        let (block, inner) = (rank / (rows * columns), rank % (rows * columns));
        let x = gap + block % across * bw + inner % columns * cell;
        let y = top + block / across * bh + inner / columns * cell;
        let (mut weights, mut data) = ((0, 1), (0, 1));
        let mut holds = vec![];
        for (i, (axis, n)) in all.iter().enumerate().filter(|(_, (_, n))| *n > 1) {
            let part = |(at, of): (usize, usize)| (at * n + coords[i], of * n);
            let role = &roles[i];
            if role.cut != colossal_tensor::Cut::Nothing {
                weights = part(weights);
            }
            if matches!(role.batch, Placement::Shard(_)) {
                data = part(data);
            }
            holds.push(format!("{axis} {}: {} {}/{n}", coords[i], cuts(role), coords[i] + 1));
        }
        let shade = data.0 as f64 / data.1 as f64;
        let fill = colour(weights, shade);
        let _ = writeln!(
            svg,
            "<rect x=\"{x}\" y=\"{y}\" width=\"{w}\" height=\"{w}\" fill=\"{fill}\">\
             <title>rank {rank}\n{}</title></rect>",
            holds.join("\n"),
            w = cell - 2
        );
        if cell > 20 {
            let _ = writeln!(
                svg,
                "<text x=\"{}\" y=\"{}\" pointer-events=\"none\">{rank}</text>",
                x + 4,
                y + 14
            );
        }
        if cell > 50 {
            let wide = axes.iter().filter_map(|(axis, _)| all.iter().position(|(a, _)| a == axis));
            for (line, i) in wide.take(4).enumerate() {
                let _ = writeln!(
                    svg,
                    "<text x=\"{}\" y=\"{}\" font-size=\"9\" fill=\"#333\" pointer-events=\"none\">{} {}</text>",
                    x + 4,
                    y + 25 + 9 * line,
                    all[i].0,
                    coords[i]
                );
            }
        }
    }
    svg + "</svg>\n"
}

/// One hue a part of the weights, neighbours far apart; darker from part to part of the data.
fn colour((part, parts): (usize, usize), shade: f64) -> String {
    const GOLDEN: f64 = 0.618_033_988_75;
    let hue = if parts == 1 { 0.58 } else { (part as f64 * GOLDEN).fract() };
    let light = 0.86 - 0.3 * shade;
    let chroma = 0.65 * (1.0 - (2.0 * light - 1.0).abs());
    // Red, green and blue lie a third of the circle apart.
    let channel = |at: f64| {
        let far = ((hue - at).rem_euclid(1.0) - 0.5).abs();
        let level = (6.0 * far - 1.0).clamp(0.0, 1.0);
        (255.0 * (light + chroma * (level - 0.5))).round() as u8
    };
    format!("#{:02x}{:02x}{:02x}", channel(0.0), channel(1.0 / 3.0), channel(2.0 / 3.0))
}

/// The plan in a line.
fn words(plan: &Plan) -> String {
    let mut words = vec![];
    match plan.tensor {
        TensorMode::OneD => {}
        TensorMode::TwoD => words.push("2D tensor parallelism (SUMMA)".to_string()),
        TensorMode::TwoAndAHalfD => words.push("2.5D tensor parallelism (Tesseract)".into()),
        TensorMode::ThreeD => words.push("3D tensor parallelism".into()),
    }
    match plan.sequence_parallel {
        SequenceMode::None => {}
        mode => words.push(format!("sequences by {}", mode.name())),
    }
    if plan.zero > 0 {
        words.push(format!("ZeRO {} over dp", plan.zero));
    }
    words.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn show(text: &str) -> Result<String> {
        let fields = text.split_whitespace().map(str::to_string).collect();
        let model = "llama2-7b".to_string();
        let show = Show { model, config: None, batch: None, seq: 2048, svg: None, fields };
        run(&PlanCommand::Show(show))
    }

    #[test]
    fn a_step_of_megatron_sends_what_the_formula_says() {
        let config = model("llama2-7b").unwrap();
        let plan = Plan { tp: 8, ..Plan::default() };
        let report = check(&config, &plan, 1, 2048).unwrap();
        // Two all-reduces of batch x seq x hidden a layer and one for the embedding; and
        // three numbers a token for the loss.
        let all_reduce = |n: usize| 2 * (n * 4 * 7 / 8);
        let forward = 65 * all_reduce(2048 * 4096) + 3 * all_reduce(2048);
        // Two a layer and one for the head.
        assert_eq!(report.sent("tp"), (forward, 65 * all_reduce(2048 * 4096)));
        let text = show("--tp 8").unwrap();
        assert!(text.contains("6.74 B parameters on 8 ranks: tp 8"), "{text}");
        assert!(text.contains("model.layers.*.mlp.down_proj.weight (x 32)"), "{text}");
        assert!(text.contains("[4096, 1376]"), "{text}");
    }

    #[test]
    fn the_table_in_the_docs_is_what_is_computed() {
        let config = model("llama2-70b").unwrap();
        let mut rows = String::new();
        for fields in [
            "--tp 64",
            "--tp 64 --sequence-parallel split_gather",
            "--tp 64 --tensor 2d",
            "--tp 64 --tensor 2.5d --depth 4",
            "--tp 64 --tensor 3d",
            "--dp 16 --tp 4 --sequence-parallel split_gather",
        ] {
            let words: Vec<String> = fields.split_whitespace().map(str::to_string).collect();
            let given = Given::default().flags(&words).unwrap();
            let plan: Plan = given.read(Some(&Plan::default())).unwrap();
            let plan = Plan { precision: colossal_models::train::Precision::Bf16, ..plan };
            let report = check(&config, &plan, 16, 2048).unwrap();
            let sent = report.traffic.iter();
            let (forward, backward) =
                sent.fold((0, 0), |(f, b), t| (f + t.forward, b + t.backward));
            let _ = writeln!(
                rows,
                "| `{fields}` | {} | {} | {} | {} | {} |",
                bytes(forward),
                bytes(backward),
                bytes(report.gradient_bytes.iter().sum()),
                bytes(2 * report.local_elements),
                bytes(report.activation_bytes),
            );
        }
        let docs = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/parallelism.md");
        let docs = std::fs::read_to_string(docs).unwrap();
        let table = docs.split("<!-- table").nth(1).unwrap().split("<!-- end").next().unwrap();
        let written: String =
            table.lines().skip(3).filter(|l| !l.is_empty()).map(|l| format!("{l}\n")).collect();
        assert_eq!(written, rows, "docs/parallelism.md; computed:\n{rows}");
    }

    #[test]
    fn thousands_of_ranks_are_shown_and_drawn() {
        for fields in [
            "--dp 128 --tp 8 --sequence-parallel split_gather --zero 2 --precision bf16",
            "--dp 4 --tp 1024 --tensor 2d",
            "--dp 8 --tp 512 --tensor 3d",
            "--tp 8 --sp 256 --sequence-parallel usp --ulysses 4 --dp 2",
        ] {
            let text = show(fields).unwrap();
            assert!(text.contains("together"), "{fields}: {text}");
            let plan: Plan = Given::default()
                .flags(&fields.split_whitespace().map(str::to_string).collect::<Vec<_>>())
                .unwrap()
                .read(Some(&Plan::default()))
                .unwrap();
            let svg = picture(&plan);
            assert_eq!(svg.matches("<title>").count(), plan.ranks().min(SHOWN), "{fields}");
            assert!(svg.ends_with("</svg>\n"));
        }
        let text = format!("{:#}", show("--tp 7").unwrap_err());
        assert!(text.contains("does not divide by the 7 ranks"), "{text}");
        let text = format!("{:#}", show("--tq 7").unwrap_err());
        assert!(text.contains("tq") && text.contains("sequence_parallel"), "{text}");
    }
}
