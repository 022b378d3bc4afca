//! Ranks as processes: what starts them.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use colossal_comm::Launch;

/// How long the other ranks may take once one has failed.
const GRACE: Duration = Duration::from_secs(10);

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
    let mut launcher = Command::new(&words[0]);
    launcher.args(&words[1..]).arg(me).args(command);
    let good =
        watched(launcher, GRACE).with_context(|| format!("{} is not installed", words[0]))?;
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What a process says that fails: the launcher reads it.
pub fn failure(error: &anyhow::Error) -> String {
    match Launch::from_env() {
        Ok(Some(Launch { rank, world_size, .. })) if world_size > 1 => {
            format!("error: rank {rank} of {world_size}: {error:#}")
        }
        _ => format!("error: {error:#}"),
    }
}

/// The rank that says in this line that it has failed.
fn failed_rank(line: &str) -> Option<usize> {
    line.strip_prefix("error: rank ")?.split_once(" of ")?.0.parse().ok()
}

/// Runs a launcher of ranks to its end; did it end well? A rank that fails makes the others fail or
/// leave, but Open MPI's mpirun may go on waiting for what is gone: `grace` after the first
/// failure it is ended.
fn watched(mut launcher: Command, grace: Duration) -> std::io::Result<bool> {
    let mut job = launcher.stderr(Stdio::piped()).spawn()?;
    let (say, heard) = mpsc::channel();
    let reader = job.stderr.take().map(|stderr| {
        std::thread::spawn(move || {
            let mut lines = BufReader::new(stderr);
            let mut line = vec![];
            while lines.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
                let text = String::from_utf8_lossy(&line);
                eprint!("{text}");
                // Nobody listens any more once the job is over.
                failed_rank(&text).map(|rank| say.send(rank));
                line.clear();
            }
        })
    });
    let mut first: Option<(usize, Instant)> = None;
    loop {
        if let Some(status) = job.try_wait()? {
            // Its last words.
            reader.map(|thread| thread.join());
            return Ok(status.success());
        }
        if let Ok(rank) = heard.try_recv() {
            first.get_or_insert((rank, Instant::now()));
        }
        if let Some((rank, at)) = first
            && at.elapsed() >= grace
        {
            eprintln!(
                "error: rank {rank} failed first; the rest had not ended {grace:?} later and was ended"
            );
            end(&mut job)?;
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Asks a launcher to end its ranks, and ends it if it does not.
fn end(job: &mut Child) -> std::io::Result<()> {
    // Without the program `kill` it is ended at once, and its ranks with the loss of it.
    let _ = Command::new("kill").args(["-TERM", &job.id().to_string()]).status();
    let asked = Instant::now();
    while job.try_wait()?.is_none() {
        if asked.elapsed() > Duration::from_secs(3) {
            job.kill()?;
            job.wait()?;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
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
    fn a_launcher_that_waits_for_ever_is_ended_after_the_first_failure() {
        let shell = |script: &str, grace| {
            let mut launcher = Command::new("sh");
            launcher.args(["-c", script]);
            let begun = Instant::now();
            let good = watched(launcher, Duration::from_millis(grace)).unwrap();
            (good, begun.elapsed())
        };
        assert!(shell("true", 1).0);
        assert!(!shell("exit 3", 1).0);
        let (good, took) = shell("echo 'error: rank 1 of 3: boom' >&2; exec sleep 60", 200);
        assert!(!good && took < Duration::from_secs(30), "{took:?}");
        // One that does not listen.
        let deaf = "trap '' TERM; echo 'error: rank 0 of 3: boom' >&2; while :; do sleep 0.1; done";
        let (good, took) = shell(deaf, 200);
        assert!(!good && took < Duration::from_secs(30), "{took:?}");
        assert_eq!(failed_rank("error: rank 12 of 16: no"), Some(12));
        assert_eq!(failed_rank("error: rank and file"), None);
    }

    #[test]
    fn hosts_go_to_mpirun_and_allocations_to_srun() {
        assert_eq!(line(4, None, false), ["mpirun", "-n", "4"]);
        assert_eq!(line(4, None, true), ["srun", "--mpi=pmix", "-n", "4"]);
        let hosts = Path::new("hosts");
        assert_eq!(line(2, Some(hosts), true), ["mpirun", "--hostfile", "hosts", "-n", "2"]);
    }
}
