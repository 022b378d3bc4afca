//! What linters cannot check: the crate graph, module docs, where unsafe may stand.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use cargo_metadata::{DependencyKind, MetadataCommand};

/// Who may use whom, of our own crates. Absences are the architecture.
const GRAPH: [(&str, &[&str]); 9] = [
    ("colossal-comm", &[]),
    ("colossal-kernels", &[]),
    ("colossal-pipeline", &[]),
    ("colossal-memory", &[]),
    ("colossal-zero", &["colossal-comm"]),
    ("colossal-tensor", &["colossal-comm", "colossal-kernels"]),
    (
        "colossal-models",
        &[
            "colossal-comm",
            "colossal-kernels",
            "colossal-tensor",
            "colossal-zero",
            "colossal-pipeline",
            "colossal-memory",
        ],
    ),
    (
        "colossal-apps",
        &[
            "colossal-comm",
            "colossal-kernels",
            "colossal-tensor",
            "colossal-zero",
            "colossal-pipeline",
            "colossal-memory",
            "colossal-models",
        ],
    ),
    ("xtask", &[]),
];

/// Crates that may hold unsafe code: shared memory, SIMD, buffers.
const UNSAFE: [&str; 3] = ["colossal-comm", "colossal-kernels", "colossal-tensor"];

/// Runs all checks and lists every offence.
pub(crate) fn tidy() -> Result<()> {
    let mut wrong = Vec::new();
    graph(&mut wrong)?;
    files(&mut wrong)?;
    for line in &wrong {
        eprintln!("tidy: {line}");
    }
    if !wrong.is_empty() {
        bail!("tidy found {} offences", wrong.len());
    }
    println!("tidy: the graph, the docs and the unsafe code are as they should be");
    Ok(())
}

fn graph(wrong: &mut Vec<String>) -> Result<()> {
    let metadata = MetadataCommand::new().no_deps().exec().context("cargo metadata")?;
    let members: BTreeSet<String> =
        metadata.workspace_packages().iter().map(|p| p.name.to_string()).collect();
    let wanted: BTreeSet<String> = GRAPH.iter().map(|(name, _)| name.to_string()).collect();
    if members != wanted {
        wrong.push(format!("members are {members:?}, the design names {wanted:?}"));
    }
    for package in metadata.workspace_packages() {
        let allowed =
            GRAPH.iter().find(|(name, _)| *name == package.name.as_str()).map(|(_, a)| *a);
        for dependency in &package.dependencies {
            let ours = members.contains(&dependency.name);
            let allowed = allowed.is_some_and(|a| a.contains(&dependency.name.as_str()));
            if ours && !allowed && dependency.kind == DependencyKind::Normal {
                wrong.push(format!("{} must not depend on {}", package.name, dependency.name));
            }
        }
        if !package.manifest_path.with_file_name("README.md").exists() {
            wrong.push(format!("{} has no README.md", package.name));
        }
    }
    Ok(())
}

fn files(wrong: &mut Vec<String>) -> Result<()> {
    for (name, _) in GRAPH {
        let mut stack = vec![PathBuf::from(name)];
        while let Some(path) = stack.pop() {
            if path.is_dir() {
                if path.file_name().is_some_and(|n| n != "target" && n != "goldens") {
                    for entry in std::fs::read_dir(&path)? {
                        stack.push(entry?.path());
                    }
                }
            } else if path.extension().is_some_and(|e| e == "rs") {
                file(name, &path, wrong)?;
            }
        }
    }
    Ok(())
}

fn file(name: &str, path: &Path, wrong: &mut Vec<String>) -> Result<()> {
    let text = std::fs::read_to_string(path)?;
    let shown = path.display();
    let first = text.lines().next().unwrap_or_default();
    if !(first.starts_with("//!") || first.starts_with("#![doc")) {
        wrong.push(format!("{shown}: begins without a module doc (//!)"));
    }
    for (number, line) in text.lines().enumerate() {
        if line.ends_with([' ', '\t']) {
            wrong.push(format!("{shown}:{}: trailing white space", number + 1));
        }
    }
    if path.ends_with("src/lib.rs") || path.ends_with("src/main.rs") {
        let forbids = text.contains("#![forbid(unsafe_code)]");
        // A peer is called as its authors ask.
        let peer = path.starts_with("xtask/peers");
        if !UNSAFE.contains(&name) && !peer && !forbids {
            wrong.push(format!("{shown}: lacks #![forbid(unsafe_code)]"));
        }
    }
    Ok(())
}
