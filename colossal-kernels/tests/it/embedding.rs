//! Embedding and its gradient.

use colossal_kernels::*;

use crate::check::{everywhere, noise};

#[test]
fn embeddings_gather_and_scatter() {
    everywhere(|place| {
        let (dim, ids) = (130, [3, -1, 0, 3, 7, 4]);
        let table: Vec<f32> = noise(5 * dim, 1);
        let mut y: Vec<f32> = noise(ids.len() * dim, 2);
        let dy = y.clone();
        embedding(&ids, &table, dim, &mut y);
        let mut dtable = vec![1.0f32; 5 * dim];
        embedding_backward(&ids, &dy, dim, &mut dtable);
        for c in 0..dim {
            let want = [3, 9, 0, 3, 9, 4].map(|id| if id < 5 { table[id * dim + c] } else { 0.0 });
            for (i, want) in want.iter().enumerate() {
                assert_eq!(y[i * dim + c], *want, "{place}");
            }
            assert_eq!(dtable[3 * dim + c], 1.0 + dy[c] + dy[3 * dim + c], "{place}");
            assert_eq!(dtable[dim + c], 1.0, "{place}");
        }
    });
}
