//! Rows of a table, and gradients scattered back.

use crate::float::Float;
use crate::profile::{self, Work};
use crate::threads::{Parts, parallel_for};

/// `y[i] = table[ids[i]]`; ids outside the table give zeros (another rank holds that row).
pub fn embedding<T: Float>(ids: &[i32], table: &[T], dim: usize, y: &mut [T]) {
    let _span = profile::moves::<T>("embedding", y.len(), 2);
    assert_eq!(y.len(), ids.len() * dim, "embedding: y must have one row per id");
    let entries = table.len().checked_div(dim).unwrap_or(0);
    let parts = Parts::new(y);
    parallel_for(ids.len(), (16384 / dim.max(1)).max(1), |r| {
        for i in r {
            // SAFETY: each row belongs to one piece.
            let row = unsafe { parts.range(i * dim..(i + 1) * dim) };
            match usize::try_from(ids[i]) {
                Ok(id) if id < entries => row.copy_from_slice(&table[id * dim..(id + 1) * dim]),
                _ => row.fill(T::zeroed()),
            }
        }
    });
}

/// `dtable[ids[i]] += dy[i]`; ids outside the table are skipped. Threads split the columns, so
/// repeated ids need no locks and are added in order.
pub fn embedding_backward<T: Float>(ids: &[i32], dy: &[T], dim: usize, dtable: &mut [f32]) {
    let _span = profile::span::<T>("embedding_backward", [ids.len(), dim, 0], || Work {
        flops: 0,
        bytes: (dy.len() * (size_of::<T>() + 8)) as u64,
    });
    assert_eq!(dy.len(), ids.len() * dim, "embedding_backward: dy must have one row per id");
    let entries = dtable.len().checked_div(dim).unwrap_or(0);
    let parts = Parts::new(dtable);
    parallel_for(dim, 64, |columns| {
        for (i, id) in ids.iter().enumerate() {
            let Ok(id) = usize::try_from(*id) else { continue };
            if id >= entries {
                continue;
            }
            // SAFETY: pieces write different columns.
            let to = unsafe { parts.range(id * dim + columns.start..id * dim + columns.end) };
            let from = &dy[i * dim + columns.start..i * dim + columns.end];
            to.iter_mut().zip(from).for_each(|(t, f)| *t += f.to_f32());
        }
    });
}
