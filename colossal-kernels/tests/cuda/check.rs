//! Where the suite runs, how operands get there, and how close results must be.

use bytemuck::Pod;
use colossal_kernels::Float;
use colossal_kernels::cuda::{Block, Slice, SliceMut, Stream, devices};

/// Held by tests that count what blocks of the last device hold.
pub(crate) static LAST_DEVICE: std::sync::Mutex<()> = std::sync::Mutex::new(());

/// A stream of the first device, if there is one.
pub(crate) fn stream() -> Option<Stream> {
    match devices().map(|d| d.len()) {
        Ok(1..) => Some(Stream::new(0).expect("a stream")),
        other => {
            let required = std::env::var("COLOSSAL_CUDA").is_ok_and(|v| v == "required");
            assert!(!required, "COLOSSAL_CUDA=required, but devices() gives {other:?}");
            println!("no CUDA: nothing was run ({other:?})");
            None
        }
    }
}

/// A stream of the first device with Hopper's instructions, if there is one.
pub(crate) fn hopper() -> Option<Stream> {
    let all = stream().and_then(|_| devices().ok())?;
    let found = all.iter().find(|d| d.capability().0 == 9)?;
    Some(Stream::on(found).expect("a stream"))
}

/// Runs a test of each float type.
macro_rules! each_type {
    ($($name:ident)*) => { $(
        #[test]
        fn $name() {
            if let Some(stream) = crate::check::stream() {
                super::$name::<f32>(&stream);
                super::$name::<half::bf16>(&stream);
                super::$name::<half::f16>(&stream);
            }
        }
    )* };
}
pub(crate) use each_type;

/// Elements on the device, `skip` elements behind the start of an allocation that ends with them.
pub(crate) struct Device<T> {
    stream: Stream,
    block: Block,
    skip: usize,
    len: usize,
    element: std::marker::PhantomData<T>,
}

impl<T: Pod> Device<T> {
    pub(crate) fn new(stream: &Stream, values: &[T], skip: usize) -> Device<T> {
        let bytes = (skip + values.len()) * size_of::<T>();
        let block = Block::new(stream.device(), bytes).expect("room");
        let (stream, len, element) = (stream.clone(), values.len(), std::marker::PhantomData);
        let mut device = Device { stream: stream.clone(), block, skip, len, element };
        stream.upload(values, device.all_mut()).expect("a copy");
        device
    }

    pub(crate) fn all(&self) -> Slice<'_, T> {
        self.block.slice(self.skip..self.skip + self.len)
    }

    pub(crate) fn all_mut(&mut self) -> SliceMut<'_, T> {
        self.block.slice_mut(self.skip..self.skip + self.len)
    }

    pub(crate) fn get(&self) -> Vec<T> {
        let mut values = vec![T::zeroed(); self.len];
        self.stream.download(self.all(), &mut values).expect("a copy");
        values
    }
}

/// Reproducible numbers in `-1 .. 1`, as `T` holds them.
pub(crate) fn noise<T: Float>(n: usize, seed: u64) -> Vec<T> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        T::from_f32((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0)
    };
    (0..n).map(|_| next()).collect()
}

/// What rounding a result to `T` costs, twice: both twins round.
pub(crate) fn rounding<T: Float>() -> f32 {
    match T::NAME {
        "bf16" => 8.0e-3,
        "f16" => 1.0e-3,
        _ => 0.0,
    }
}

/// `|got - want| <= (tolerance + rounding) (1 + |want|)`.
pub(crate) fn close<T: Float>(what: &str, got: &[T], want: &[T], tolerance: f32) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let (g, w) = (g.to_f32(), w.to_f32());
        assert!(
            (g - w).abs() <= (tolerance + rounding::<T>()) * (1.0 + w.abs()) || g == w,
            "{what} of {}: element {i} of {} is {g}, not {w}",
            T::NAME,
            got.len()
        );
    }
}
