//! Ranks as processes, end to end: a training run on threads, on processes of this host, and on
//! two hosts, which must end with the same bits.
//!
//! The hosts are network namespaces, joined by a cable of the kernel's; `mpirun` starts its daemon
//! in each by an agent that enters the namespace, as `ssh` enters a host.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::{cargo, exists, run};

/// Open MPI in a container: one user, and no reading of another process's memory.
const ENV: [(&str, &str); 3] = [
    ("OMPI_ALLOW_RUN_AS_ROOT", "1"),
    ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"),
    ("OMPI_MCA_btl_vader_single_copy_mechanism", "none"),
];

/// Builds the binary with MPI and compares the runs.
pub(crate) fn processes() -> Result<()> {
    if !exists("mpicc", "--version") {
        println!("MPI is not installed: apt-get install openmpi-bin libopenmpi-dev libclang-dev");
        return Ok(());
    }
    run(&cargo(), &["build", "-p", "colossal-apps", "--features", "mpi"], &[])?;
    let target = std::env::var("CARGO_TARGET_DIR").unwrap_or_else(|_| "target".into());
    let target = std::env::current_dir()?.join(target);
    let folder = target.join("processes");
    // What a run before this one left: it would be gone on with.
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder)?;
    write_job(&folder)?;
    let binary = target.join("debug/colossal").to_string_lossy().into_owned();
    let job = Job { folder: &folder, binary: &binary };
    let threads = job.run(&[], &["-n", "2"], "threads")?;
    ensure!(
        threads == job.run(&[], &["-n", "2", "--processes"], "processes")?,
        "processes differ from threads"
    );
    println!("two processes end with the bits of two threads");
    job.fails()?;
    let Some(hosts) = Hosts::new(&folder)? else {
        println!("no leave to make network namespaces (they take root): two hosts were not tried");
        return Ok(());
    };
    let list = hosts.list.to_string_lossy().into_owned();
    let over = job.run(&hosts.enter(), &["-n", "2", "--hostfile", &list], "two_hosts")?;
    ensure!(threads == over, "two hosts differ from threads");
    println!("two hosts end with the bits of two threads");
    Ok(())
}

struct Job<'a> {
    folder: &'a Path,
    binary: &'a str,
}

impl Job<'_> {
    fn command(&self, prefix: &[String], ranks: &[&str], output: &str, data: &str) -> Command {
        let path = |name: &str| self.folder.join(name).to_string_lossy().into_owned();
        let mut words: Vec<String> = prefix.to_vec();
        words.extend([self.binary, "run"].map(String::from));
        words.extend(ranks.iter().map(ToString::to_string));
        words.extend(
            "train pretrain --steps 10 --batch 8 --max-length 32 --lr 1e-3"
                .split(' ')
                .map(String::from),
        );
        for (flag, name) in [("--model", "config.json"), ("--data", data), ("--output-dir", output)]
        {
            words.extend([flag.to_string(), path(name)]);
        }
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).envs(ENV);
        if !prefix.is_empty() {
            command.env("OMPI_MCA_plm_rsh_agent", self.folder.join("agent.sh"));
        }
        command
    }

    /// A run; the bytes of its model.
    fn run(&self, prefix: &[String], ranks: &[&str], output: &str) -> Result<Vec<u8>> {
        let out = self.command(prefix, ranks, output, "ids.bin").output()?;
        if !out.status.success() {
            let (said, wrong) =
                (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
            bail!("the run on {output}: {}\n{said}{wrong}", out.status);
        }
        let model = self.folder.join(output).join("model.safetensors");
        std::fs::read(&model).with_context(|| model.display().to_string())
    }

    /// A run that fails on its ranks ends, and says which failed.
    fn fails(&self) -> Result<()> {
        let out = self.command(&[], &["-n", "2", "--processes"], "none", "missing.bin").output()?;
        let text = String::from_utf8_lossy(&out.stderr);
        ensure!(
            !out.status.success() && text.contains("error: rank "),
            "a run without data: {text}"
        );
        println!("a run without data fails and names a rank");
        Ok(())
    }
}

/// A small model without weights, and tokens that it can learn.
fn write_job(folder: &Path) -> Result<()> {
    let model = serde_json::json!({
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 256,
        "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 256,
        "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new",
    });
    std::fs::write(folder.join("config.json"), model.to_string())?;
    let ids: Vec<u8> =
        (0..20_000u32).flat_map(|i| ((i * i / 7 % 200) as u16).to_le_bytes()).collect();
    Ok(std::fs::write(folder.join("ids.bin"), ids)?)
}

/// Two network namespaces with a cable between them; taken down when dropped.
struct Hosts {
    names: [String; 2],
    list: PathBuf,
    agent: PathBuf,
}

impl Hosts {
    /// None where they are not permitted.
    fn new(folder: &Path) -> Result<Option<Hosts>> {
        let id = std::process::id() % 10_000;
        let names = [1, 2].map(|i| format!("cl{id}x{i}"));
        let hosts = Hosts { names, list: folder.join("hosts"), agent: folder.join("agent.sh") };
        let [a, b] = &hosts.names;
        let lines = [
            format!("netns add {a}"),
            format!("netns add {b}"),
            format!("link add {a} netns {a} type veth peer name {b} netns {b}"),
            format!("-n {a} addr add 10.77.0.1/24 dev {a}"),
            format!("-n {b} addr add 10.77.0.2/24 dev {b}"),
            format!("-n {a} link set {a} up"),
            format!("-n {b} link set {b} up"),
            format!("-n {a} link set lo up"),
            format!("-n {b} link set lo up"),
        ];
        for line in &lines {
            let out = Command::new("ip").args(line.split(' ')).output();
            if !out.is_ok_and(|o| o.status.success()) {
                return Ok(None);
            }
        }
        std::fs::write(&hosts.list, "10.77.0.1 slots=1\n10.77.0.2 slots=1\n")?;
        let script = format!(
            "#!/bin/sh\n# HOST COMMAND: in the host's namespaces, under its name.\nhost=cl{id}x${{1##*.}}\nshift\nexec ip netns exec $host unshare --uts sh -c \"hostname $host; $*\"\n"
        );
        std::fs::write(&hosts.agent, script)?;
        run("chmod", &["+x", &hosts.agent.to_string_lossy()], &[])?;
        Ok(Some(hosts))
    }

    /// What goes before a command that runs on the first host.
    fn enter(&self) -> Vec<String> {
        let host = &self.names[0];
        ["ip", "netns", "exec", host].map(String::from).to_vec()
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for name in &self.names {
            // One that was never made.
            let _ = Command::new("ip").args(["netns", "del", name]).output();
        }
    }
}
