//! All files of kernels under all definitions that launchers ask for: what is built beforehand.

use super::{
    Source, activation, attention, cast, cross_entropy, elementwise, embedding, norm, optimizer,
    reduce, rope, rows, softmax,
};

/// A file of kernels, and what it is compiled under.
#[derive(Debug, Clone)]
pub struct Build {
    /// The file.
    pub source: &'static Source,
    /// The definitions.
    pub defines: Vec<(&'static str, &'static str)>,
}

const TYPES: [&str; 3] = ["float", "bf16", "f16"];

/// Every build there is.
pub fn catalog() -> Vec<Build> {
    let of_each_type = [
        &elementwise::ELEMENTWISE,
        &activation::ACTIVATION,
        &norm::NORM,
        &softmax::SOFTMAX,
        &cross_entropy::CROSS_ENTROPY,
        &rope::ROPE,
        &embedding::EMBEDDING,
        &reduce::REDUCE,
        &rows::ROWS,
        &optimizer::OPTIMIZER,
    ];
    let mut builds = vec![];
    for source in of_each_type {
        builds.extend(TYPES.map(|t| Build { source, defines: vec![("TYPE", t)] }));
    }
    for (_, size) in attention::SIZES {
        let source = &attention::ATTENTION;
        builds.extend(TYPES.map(|t| Build { source, defines: vec![("TYPE", t), ("D", size)] }));
    }
    for from in TYPES {
        let source = &cast::CAST;
        builds.extend(TYPES.map(|to| Build { source, defines: vec![("FROM", from), ("TO", to)] }));
    }
    builds
}

/// Is it listed?
pub(super) fn lists(source: &'static Source, defines: &[(&str, &str)]) -> bool {
    catalog().iter().any(|b| std::ptr::eq(b.source, source) && b.defines == defines)
}
