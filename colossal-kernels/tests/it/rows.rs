//! Weighted sums of rows.

use colossal_kernels::*;

use crate::check::{close, everywhere, noise, wide};

#[test]
fn rows_are_combined_and_their_gradients_go_back() {
    everywhere(|place| {
        let (tokens, k, width) = (37, 3, 21);
        // Places in any order; every seventh choice has none.
        let order = |i: usize| (i * 5 + 2) % (tokens * k);
        let at: Vec<i32> =
            (0..tokens * k).map(|i| if i % 7 == 3 { -1 } else { order(i) as i32 }).collect();
        let (w, rows, dy): (Vec<f32>, Vec<f32>, Vec<f32>) =
            (noise(tokens * k, 1), noise(tokens * k * width, 2), noise(tokens * width, 3));
        let mut y = vec![f32::NAN; tokens * width];
        combine_rows(&at, &w, k, &rows, width, &mut y);
        let (mut drows, mut dw) = (vec![0.5; rows.len()], vec![f32::NAN; w.len()]);
        combine_rows_backward(&at, &w, k, &rows, width, &dy, &mut drows, &mut dw);
        let (w, rows, dy) = (wide(&w), wide(&rows), wide(&dy));
        let mut expected = vec![0.0; tokens * width];
        let (mut back, mut dots) = (vec![0.5; rows.len()], vec![0.0; w.len()]);
        for (i, at) in at.iter().enumerate().filter(|(_, at)| **at >= 0) {
            for c in 0..width {
                let (row, token) = (*at as usize * width + c, i / k * width + c);
                expected[token] += w[i] * rows[row];
                back[row] = w[i] * dy[token];
                dots[i] += dy[token] * rows[row];
            }
        }
        close(place, &y, &expected, 1e-5);
        close(place, &drows, &back, 1e-5);
        close(place, &dw, &dots, 1e-5);
    });
}
