//! All files of kernels under the definitions that launchers ask for: what is built beforehand.

use super::{
    Source, activation, attention, blocks, cast, conv, cross_entropy, decode, elementwise,
    embedding, factored, fp8, gemm, hopper, int8, layerwise, norm, optimizer, partial_softmax,
    ranks, reduce, rope, rows, softmax, wide_norm,
};

/// A file of kernels, and what it is compiled under.
#[derive(Debug, Clone)]
pub struct Build {
    /// The file.
    pub source: &'static Source,
    /// The definitions.
    pub defines: Vec<(&'static str, &'static str)>,
}

impl Build {
    /// Has this architecture the instructions that it takes?
    pub fn is_for(&self, arch: &str) -> bool {
        let hopper = [&hopper::HOPPER, &hopper::HOPPER_BACKWARD];
        arch == "sm_90a" || !hopper.iter().any(|source| std::ptr::eq(self.source, *source))
    }
}

const TYPES: [&str; 3] = ["float", "bf16", "f16"];

/// Every build that common models need.
pub fn catalog() -> Vec<Build> {
    let of_each_type = [
        &elementwise::ELEMENTWISE,
        &activation::ACTIVATION,
        &norm::NORM,
        &softmax::SOFTMAX,
        &wide_norm::WIDE_NORM,
        &cross_entropy::CROSS_ENTROPY,
        &partial_softmax::PARTIAL_SOFTMAX,
        &rope::ROPE,
        &embedding::EMBEDDING,
        &reduce::REDUCE,
        &rows::ROWS,
        &blocks::BLOCKS,
        &optimizer::OPTIMIZER,
        &int8::INT8,
        &fp8::FP8,
        &conv::CONV,
    ];
    let mut builds = vec![];
    for source in of_each_type {
        builds.extend(TYPES.map(|t| Build { source, defines: vec![("TYPE", t)] }));
    }
    for source in [&attention::ATTENTION, &decode::DECODE] {
        for (_, size) in attention::SIZES {
            builds.extend(TYPES.map(|t| Build { source, defines: vec![("TYPE", t), ("D", size)] }));
        }
    }
    for source in [&hopper::HOPPER, &hopper::HOPPER_BACKWARD] {
        for (_, size) in hopper::SIZES {
            let of = |t| Build { source, defines: vec![("TYPE", t), ("D", size)] };
            builds.extend(["bf16", "f16"].map(of));
        }
    }
    for source in [&layerwise::LAYERWISE, &factored::FACTORED] {
        builds.push(Build { source, defines: vec![("TYPE", "float")] });
    }
    for (ty, _) in ranks::TYPES {
        builds.push(Build { source: &ranks::RANKS, defines: vec![("TYPE", ty)] });
    }
    for from in TYPES {
        let source = &cast::CAST;
        builds.extend(TYPES.map(|to| Build { source, defines: vec![("FROM", from), ("TO", to)] }));
    }
    let products =
        [("float", "float"), ("bf16", "bf16"), ("bf16", "float"), ("f16", "f16"), ("f16", "float")];
    for (input, output) in products {
        builds.extend([128, 64].map(|tile| Build {
            source: &gemm::GEMM,
            defines: gemm::defines(input, output, tile).into(),
        }));
    }
    builds
}

/// Is it listed? Under other values of its definitions it is compiled when it is met; a source
/// without any is a caller's own.
pub(super) fn lists(source: &'static Source, defines: &[(&str, &str)]) -> bool {
    let names = |b: &Build| b.defines.iter().map(|d| d.0).eq(defines.iter().map(|d| d.0));
    defines.is_empty() || catalog().iter().any(|b| std::ptr::eq(b.source, source) && names(b))
}
