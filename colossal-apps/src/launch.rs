//! Ranks as processes: what starts them.

use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};

/// Starts `n` processes of this binary with `command`, and waits for them.
///
/// # Errors
/// When this build cannot talk between processes, or the launcher is not installed.
pub fn processes(n: usize, hostfile: Option<&Path>, command: &[String]) -> Result<ExitCode> {
    if cfg!(not(feature = "mpi")) {
        bail!(
            "this build has ranks as threads only; for processes build with --features mpi (needs openmpi-bin, libopenmpi-dev, libclang-dev), or leave out --processes and --hostfile"
        );
    }
    let me = std::env::current_exe().context("this program has no path")?;
    let words = line(n, hostfile, std::env::var_os("SLURM_JOB_ID").is_some());
    let status = Command::new(&words[0])
        .args(&words[1..])
        .arg(me)
        .args(command)
        .status()
        .with_context(|| format!("{} is not installed", words[0]))?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The launcher and its arguments.
fn line(n: usize, hostfile: Option<&Path>, slurm: bool) -> Vec<String> {
    match hostfile {
        None if slurm => ["srun", "--mpi=pmix", "-n"].map(String::from).into_iter().collect(),
        None => ["mpirun", "-n"].map(String::from).into_iter().collect(),
        Some(hosts) => vec![
            "mpirun".into(),
            "--hostfile".into(),
            hosts.to_string_lossy().into_owned(),
            "-n".into(),
        ],
    }
    .into_iter()
    .chain([n.to_string()])
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_go_to_mpirun_and_allocations_to_srun() {
        assert_eq!(line(4, None, false), ["mpirun", "-n", "4"]);
        assert_eq!(line(4, None, true), ["srun", "--mpi=pmix", "-n", "4"]);
        let hosts = Path::new("hosts");
        assert_eq!(line(2, Some(hosts), true), ["mpirun", "--hostfile", "hosts", "-n", "2"]);
    }
}
