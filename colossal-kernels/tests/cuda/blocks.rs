//! Copies by strides, rows by index, sums of neighbours, dropout: the same bits as on the CPU.

use colossal_kernels::cuda::{self, Stream};
use colossal_kernels::{self as cpu, Float};

use crate::check::{Device, close, noise};

fn copies<T: Float>(stream: &Stream) {
    // Rows' strides there and here, sizes, and how far slices begin behind their allocation.
    let cases = [
        ([24, 8], [3, 2, 8], [16, 8], 0),
        ([24, 0], [3, 4, 24], [96, 24], 0),
        ([7, 3], [2, 2, 3], [9, 4], 0),
        ([24, 8], [3, 2, 8], [16, 8], 1),
        ([1, 1], [0, 2, 8], [1, 1], 0),
    ];
    for (from, sizes, to, skip) in cases {
        let (x, mut y) = (noise::<T>(80, 1), noise::<T>(300, 2));
        let (x2, mut y2) = (Device::new(stream, &x, skip), Device::new(stream, &y, skip));
        cpu::copy_block(&x, from, sizes, &mut y, to);
        cuda::copy_block(stream, x2.all(), from, sizes, y2.all_mut(), to).unwrap();
        close("copy_block", &y2.get(), &y, 0.0);
    }
}

fn rows_to_places<T: Float>(stream: &Stream) {
    for (width, skip) in [(8, 0), (13, 0), (600, 1)] {
        let index = [3, 0, 5];
        let (x, mut y) = (noise::<T>(3 * width, 1), noise::<T>(7 * width, 2));
        let (x2, mut y2) = (Device::new(stream, &x, skip), Device::new(stream, &y, skip));
        let at = Device::new(stream, &index, 0);
        cpu::scatter_rows(&x, &index, width, &mut y);
        cuda::scatter_rows(stream, x2.all(), at.all(), width, y2.all_mut()).unwrap();
        close("scatter_rows", &y2.get(), &y, 0.0);
        cpu::fill_columns(&mut y, width, width - 3, T::from_f32(0.25));
        cuda::fill_columns(stream, y2.all_mut(), width, width - 3, T::from_f32(0.25)).unwrap();
        close("fill_columns", &y2.get(), &y, 0.0);
    }
}

fn neighbours<T: Float>(stream: &Stream) {
    for (groups, times, width, skip) in [(0, 2, 8, 0), (5, 3, 16, 0), (4, 2, 7, 0), (3, 4, 8, 1)] {
        let (x, mut y) = (noise::<T>(groups * times * width, 1), vec![T::zeroed(); groups * width]);
        let (x2, mut y2) = (Device::new(stream, &x, skip), Device::new(stream, &y, skip));
        cpu::sum_groups(&x, times, width, &mut y);
        cuda::sum_groups(stream, x2.all(), times, width, y2.all_mut()).unwrap();
        close("sum_groups", &y2.get(), &y, 1e-6);
    }
}

fn dropouts<T: Float>(stream: &Stream) {
    for (rows, width, skip) in [(0, 8, 0), (9, 64, 0), (5, 37, 0), (40, 1000, 1)] {
        let keys: Vec<u64> = (0..rows as u64).map(|r| cpu::random_bits(7, r)).collect();
        let first: Vec<u64> = (0..rows as u64).map(|r| r * 1_000_003).collect();
        let (x, mut y) = (noise::<T>(rows * width, 1), vec![T::zeroed(); rows * width]);
        let (x2, mut y2) = (Device::new(stream, &x, skip), Device::new(stream, &y, skip));
        cpu::dropout(&x, &keys, &first, width, 0.3, &mut y);
        let (keys, first) = (Device::new(stream, &keys, 0), Device::new(stream, &first, 0));
        let (keys, first) = (keys.all(), first.all());
        cuda::dropout(stream, x2.all(), keys, first, width, 0.3, y2.all_mut()).unwrap();
        close("dropout", &y2.get(), &y, 0.0);
        let dropped = y.iter().filter(|y| y.to_f32() == 0.0).count() as f64;
        if rows == 40 {
            let share = dropped / (rows * width) as f64;
            assert!((share - 0.3).abs() < 0.01, "{share} of the elements were dropped");
        }
    }
}

mod on_each {
    crate::check::each_type! { copies rows_to_places neighbours dropouts }
}
