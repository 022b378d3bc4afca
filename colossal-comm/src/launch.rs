//! Who started this process, and which rank it is: the environment of mpirun, srun, torchrun and
//! Kubernetes.

use crate::error::{Error, Result};
use crate::group::{Config, Group, on_ranks};

/// What started this process as one of several.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Launcher {
    /// Open MPI's `mpirun`: `OMPI_COMM_WORLD_*`.
    OpenMpi,
    /// MPICH's, Intel's or Slurm's process manager: `PMI_*` or `PMIX_RANK`.
    Pmi,
    /// Slurm's `srun`: `SLURM_PROCID`, `SLURM_STEP_NUM_TASKS`, `SLURM_LOCALID`. A batch script
    /// itself is no rank, and lacks the second.
    Slurm,
    /// `torchrun` or whatever sets its variables: `RANK`, `WORLD_SIZE`, `LOCAL_RANK`.
    Torchrun,
    /// An indexed Job or a JobSet: `JOB_COMPLETION_INDEX` and `WORLD_SIZE`.
    Kubernetes,
}

/// This process's place among those started together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Launch {
    /// What started it.
    pub launcher: Launcher,
    /// Which process it is, from 0.
    pub rank: usize,
    /// How many there are.
    pub world_size: usize,
    /// Which of the processes of its host it is.
    pub local_rank: usize,
}

/// For each launcher: rank, number of ranks, rank on the host. The first that is complete counts.
const TABLE: [(Launcher, &str, &str, &str); 5] = [
    (
        Launcher::OpenMpi,
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
    ),
    (Launcher::Pmi, "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    (Launcher::Torchrun, "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    (Launcher::Slurm, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    (Launcher::Kubernetes, "JOB_COMPLETION_INDEX", "WORLD_SIZE", "LOCAL_RANK"),
];

impl Launch {
    /// Reads the environment; none when nothing started this process as one of several.
    ///
    /// # Errors
    /// [`Error::Argument`] for a variable that is no number, or a rank beyond the number of ranks.
    pub fn from_env() -> Result<Option<Launch>> {
        Launch::read(|name| std::env::var(name).ok())
    }

    fn read(get: impl Fn(&str) -> Option<String>) -> Result<Option<Launch>> {
        let number = |name: &str| match get(name) {
            None => Ok(None),
            Some(text) => text.trim().parse::<usize>().map(Some).map_err(|_| Error::Argument {
                op: "from_env",
                reason: format!("{name} is {text:?}; it must be a number"),
            }),
        };
        for (launcher, rank, size, local) in TABLE {
            let (Some(r), Some(world_size)) = (number(rank)?, number(size)?) else { continue };
            if r >= world_size {
                let reason =
                    format!("{rank} is {r} and {size} is {world_size}; ranks count from 0");
                return Err(Error::Argument { op: "from_env", reason });
            }
            let local_rank = number(local)?.unwrap_or(0);
            return Ok(Some(Launch { launcher, rank: r, world_size, local_rank }));
        }
        Ok(None)
    }
}

impl Group {
    /// The group of all processes that were started together, or a group of one when this
    /// process was started alone. Call it once; clones are the same rank.
    ///
    /// Processes talk over MPI (feature `mpi`), so they are started by `mpirun` or `srun`. Ranks
    /// inside one process need none of it: see [`crate::on_ranks`].
    ///
    /// # Errors
    /// [`Error::Engine`] when there are several processes and no engine for them.
    pub fn from_env() -> Result<Group> {
        Group::from_env_with(Config::default())
    }

    /// As [`Group::from_env`], with another time-out.
    pub fn from_env_with(config: Config) -> Result<Group> {
        match Launch::from_env()? {
            None => Ok(Group::solo()),
            Some(launch) if launch.world_size == 1 => Ok(Group::solo()),
            Some(launch) => processes(launch, config),
        }
    }
}

/// Where rank 0 hands out what ranks need to find each other. `torchrun`'s agent may hold
/// `MASTER_PORT` itself, so ours is the one after it.
pub(crate) fn store_address() -> Result<String> {
    let get = |name: &str| std::env::var(name).ok();
    if let Some(address) = get("COLOSSAL_STORE") {
        return Ok(address);
    }
    let (host, port) = (get("MASTER_ADDR"), get("MASTER_PORT"));
    let port = port.and_then(|p| p.trim().parse::<u16>().ok()?.checked_add(1));
    match (host, port) {
        (Some(host), Some(port)) => Ok(format!("{host}:{port}")),
        _ => Err(Error::Argument {
            op: "from_env",
            reason: "nothing says where rank 0 is: set COLOSSAL_STORE=host:port, or MASTER_ADDR and MASTER_PORT as torchrun does".into(),
        }),
    }
}

/// Runs `f` on `n` ranks: on threads of this process, as [`on_ranks`], or, when a launcher started
/// `n` processes, as the one rank that this process is, whose result is then the only one.
///
/// # Errors
/// [`Error::Argument`] when the launcher started another number of processes, and those of
/// [`Group::from_env`].
pub fn launched<R: Send>(n: usize, f: impl Fn(Group) -> R + Sync) -> Result<Vec<R>> {
    launched_by(n, Group::from_env, f)
}

/// As [`launched`], where `world` makes the group of processes: [`Group::nccl_from_env`] for those
/// that have a GPU each.
///
/// # Errors
/// Those of [`launched`] and of `world`.
pub fn launched_by<R: Send>(
    n: usize,
    world: impl Fn() -> Result<Group>,
    f: impl Fn(Group) -> R + Sync,
) -> Result<Vec<R>> {
    match Launch::from_env()? {
        Some(launch) if launch.world_size > 1 => {
            if launch.world_size != n {
                let reason = format!(
                    "{n} ranks are wanted and {:?} started {} processes; start {n}",
                    launch.launcher, launch.world_size
                );
                return Err(Error::Argument { op: "launched", reason });
            }
            Ok(vec![f(world()?)])
        }
        _ => Ok(on_ranks(n, f)),
    }
}

#[cfg(feature = "mpi")]
fn processes(launch: Launch, config: Config) -> Result<Group> {
    let (rank, size, engines) = crate::mpi::Mpi::world(config)?;
    if size != launch.world_size {
        let reason = format!(
            "{:?} says {} ranks and MPI {size}; start the program by mpirun, or by srun --mpi=pmix, of the MPI it was built with",
            launch.launcher, launch.world_size
        );
        return Err(Error::Engine { op: "from_env".into(), reason });
    }
    Ok(Group::of(rank, size, engines))
}

#[cfg(not(feature = "mpi"))]
fn processes(launch: Launch, _: Config) -> Result<Group> {
    let reason = format!(
        "this is process {} of {} ({:?}), and this build knows no way between processes: build with --features mpi and start it by mpirun or srun, or start one process and give it ranks as threads",
        launch.rank, launch.world_size, launch.launcher
    );
    Err(Error::Engine { op: "from_env".into(), reason })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Option<Launch>> {
        Launch::read(|name| {
            variables.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_string())
        })
    }

    #[test]
    fn each_launcher_is_known_by_its_variables() {
        for (launcher, rank, size, local) in TABLE {
            let got = read(&[(rank, "3"), (size, "8"), (local, "1")]).unwrap().unwrap();
            assert_eq!(got, Launch { launcher, rank: 3, world_size: 8, local_rank: 1 });
        }
        assert_eq!(read(&[]).unwrap(), None);
        // mpirun inside a Slurm job: the inner one counts.
        let both = [
            ("SLURM_PROCID", "0"),
            ("SLURM_STEP_NUM_TASKS", "1"),
            ("OMPI_COMM_WORLD_RANK", "1"),
            ("OMPI_COMM_WORLD_SIZE", "2"),
        ];
        assert_eq!(read(&both).unwrap().unwrap().world_size, 2);
    }

    #[test]
    fn nonsense_is_named() {
        let text = read(&[("RANK", "x"), ("WORLD_SIZE", "2")]).unwrap_err().to_string();
        assert!(text.contains("RANK is \"x\""), "{text}");
        let text = read(&[("RANK", "2"), ("WORLD_SIZE", "2")]).unwrap_err().to_string();
        assert!(text.contains("count from 0"), "{text}");
    }
}
