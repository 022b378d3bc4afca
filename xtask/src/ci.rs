//! What must hold before a change lands, cheapest first.

use anyhow::Result;

use crate::{cargo, exists, kernels, processes, run, stand_in, tidy};

const CRATES: [&str; 8] = [
    "colossal-comm",
    "colossal-kernels",
    "colossal-pipeline",
    "colossal-memory",
    "colossal-zero",
    "colossal-tensor",
    "colossal-models",
    "colossal-apps",
];

/// Unit, integration and doc tests of the whole workspace.
pub(crate) fn test() -> Result<()> {
    if exists("cargo-nextest", "--version") {
        run(&cargo(), &["nextest", "run", "--workspace", "--no-fail-fast"], &[])?;
    } else {
        println!("cargo-nextest is not installed: tests run under cargo test.");
        println!("For a shorter run: cargo install cargo-nextest --locked");
        run(&cargo(), &["test", "--workspace", "--lib", "--bins", "--tests"], &[])?;
    }
    run(&cargo(), &["test", "--workspace", "--doc"], &[])
}

/// A test program of a package, and the names of tests in it; none for all.
pub(crate) type Suite<'a> = (&'a str, &'a str, &'a [&'a str]);

/// Runs some tests of the workspace. A single package would be built with other features of what
/// it stands on: anew, for minutes.
pub(crate) fn suites(suites: &[Suite<'_>], env: &[(&str, &str)]) -> Result<()> {
    if !exists("cargo-nextest", "--version") {
        for (package, program, names) in suites {
            let test = ["test", "-p", package, "--test", program, "--"];
            run(&cargo(), &[&test[..], names].concat(), env)?;
        }
        return Ok(());
    }
    let any = |names: &[&str]| match names {
        [] => "all()".into(),
        _ => names.iter().map(|n| format!("test({n})")).collect::<Vec<_>>().join(" + "),
    };
    let of = |(package, program, names): &Suite<'_>| {
        format!("(binary_id({package}::{program}) & ({}))", any(names))
    };
    let which = suites.iter().map(of).collect::<Vec<_>>().join(" + ");
    run(&cargo(), &["nextest", "run", "--workspace", "-E", &which], env)
}

/// The engine over the other MPI. Its binding is built for one of them: before and after, anew.
fn mpich(cargo: &str, mpi: &[&str]) -> Result<()> {
    if !exists("mpicc.mpich", "--version") {
        println!("\nMPICH is not installed: the MPI engine was not checked on it. To check it:");
        println!("apt-get install mpich libmpich-dev");
        return Ok(());
    }
    let anew = ["clean", "-p", "mpi-sys"];
    run(cargo, &anew, &[])?;
    // Its launcher ends a job as soon as one process ends badly, unless told to leave it be.
    let launcher = ("COLOSSAL_MPIRUN", "mpirun.mpich -disable-auto-cleanup");
    let test = [&["test"], mpi, &["--test", "mpi"]].concat();
    run(cargo, &test, &[("MPICC", "mpicc.mpich"), launcher])?;
    run(cargo, &anew, &[])
}

/// The kernels on aarch64, where the compiler's plain code is their NEON path.
fn elsewhere(cargo: &str) -> Result<()> {
    const TARGET: &str = "aarch64-unknown-linux-gnu";
    let sysroot = crate::bench::output("rustc", &["--print", "sysroot"])?;
    if !std::path::Path::new(&sysroot).join("lib/rustlib").join(TARGET).join("lib").exists() {
        println!("\nthe target {TARGET} is not installed: the kernels were not checked for it.");
        println!("To check them: rustup target add {TARGET}");
        return Ok(());
    }
    let lint = ["clippy", "-p", "colossal-kernels", "--target", TARGET, "--", "-D", "warnings"];
    run(cargo, &lint, &[])
}

/// Everything.
pub(crate) fn ci(tested: bool) -> Result<()> {
    let cargo = cargo();
    run(&cargo, &["fmt", "--all", "--check"], &[])?;
    tidy::tidy()?;
    run(&cargo, &["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"], &[])?;
    if !tested {
        test()?;
    }
    // The kernels' own suite takes every path; here models are held to their references on each.
    for isa in ["portable", "avx2", "avx512"] {
        let models = ("colossal-models", "it", &["goldens", "int8", "optimizers"][..]);
        suites(&[models], &[("COLOSSAL_ISA", isa)])?;
    }
    elsewhere(&cargo)?;
    // CUDA without a GPU: kernels are built, and run on the CPU.
    kernels::kernels(&kernels::Args::ci())?;
    stand_in::stand_in()?;
    for name in CRATES {
        run(&cargo, &["check", "-p", name], &[])?;
        run(&cargo, &["check", "-p", name, "--no-default-features"], &[])?;
    }
    run(&cargo, &["doc", "--workspace", "--no-deps"], &[("RUSTDOCFLAGS", "-D warnings")])?;
    run(&cargo, &["build", "--workspace", "--examples"], &[])?;
    if exists("mpicc", "--version") {
        let mpi = ["-p", "colossal-comm", "--features", "mpi"];
        let clippy = [&["clippy"], &mpi[..], &["--all-targets", "--", "-D", "warnings"]].concat();
        run(&cargo, &clippy, &[])?;
        run(&cargo, &[&["test"], &mpi[..], &["--test", "mpi"]].concat(), &[])?;
        processes::processes()?;
        mpich(&cargo, &mpi)?;
    } else {
        println!("\nMPI is not installed: its engine was not checked. To check it:");
        println!("apt-get install openmpi-bin libopenmpi-dev libclang-dev");
    }
    // Model-checked collectives: another configuration of the crate, in a folder of its own.
    run(
        &cargo,
        &[
            "test",
            "-p",
            "colossal-comm",
            "--lib",
            "--release",
            "--target-dir",
            "target/loom",
            "loom",
        ],
        &[("RUSTFLAGS", "--cfg loom")],
    )?;
    if exists("cargo-deny", "--version") {
        run("cargo-deny", &["check", "bans", "licenses", "sources"], &[])?;
    } else {
        println!("\ncargo-deny is not installed: licences and sources were not checked.");
        println!("To check them: cargo install cargo-deny --locked");
    }
    // The main job, whose exit code says whether alignment worked.
    let main_job = ["run", "--release", "--", "rlhf", "--output-dir", "target/rlhf"];
    run(&cargo, &main_job, &[])?;
    println!("\nall checks passed");
    Ok(())
}
