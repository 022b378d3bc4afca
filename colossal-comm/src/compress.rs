//! Collectives that send fewer bytes: f32 values travel as bf16, fp8 or int8.
//!
//! fp8 and int8 carry one f32 scale for every block of 128 values (the OCP formats e4m3 and e5m2
//! of arXiv 2209.05433; block scales as in arXiv 2310.18313). Sums are taken in f32, in rank
//! order; what goes out is rounded once when it is sent and once when the sum is sent back, and
//! every rank decodes the same bytes: the same bits everywhere. A block that holds an infinity or
//! a NaN arrives as NaN, so that overflow is seen.

use std::panic::Location;

use half::bf16;

use crate::call::{Call, Verb};
use crate::element::{DType, ReduceOp};
use crate::engine::Parts;
use crate::error::{Error, Result};
use crate::group::{Group, run};

/// Values that share a scale.
const BLOCK: usize = 128;

/// How f32 values travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Codec {
    /// 2 bytes a value.
    Bf16,
    /// 1 byte a value and a scale per block: 4 bits of exponent, 3 of mantissa. For activations.
    Fp8E4m3,
    /// 1 byte a value and a scale per block: 5 bits of exponent, 2 of mantissa. For gradients.
    Fp8E5m2,
    /// 1 byte a value and a scale per block, equal steps.
    Int8,
}

impl Codec {
    /// All of them.
    pub const ALL: [Codec; 4] = [Codec::Bf16, Codec::Fp8E4m3, Codec::Fp8E5m2, Codec::Int8];

    /// Bytes that `len` values travel in.
    pub fn bytes(self, len: usize) -> usize {
        match self {
            Codec::Bf16 => 2 * len,
            _ => len + 4 * len.div_ceil(BLOCK),
        }
    }

    /// `(a, b)`: a value x comes back within a |x| + b m, where m is the largest magnitude of its
    /// block (whose largest must be a normal f32, and the scale too).
    pub fn error(self) -> (f64, f64) {
        // A quotient by the scale and a product with it round in f32 as well.
        let float = 4.0 * f64::from(f32::EPSILON);
        match self {
            Codec::Bf16 => (1.0 / 256.0, 0.0),
            Codec::Fp8E4m3 => (1.0 / 16.0 + float, 1.0 / 1024.0 / 448.0),
            Codec::Fp8E5m2 => (1.0 / 8.0 + float, 1.0 / 131_072.0 / 57_344.0),
            Codec::Int8 => (float, 0.5 / 127.0),
        }
    }

    /// Writes `values` as [`Codec::bytes`] bytes.
    pub fn encode(self, values: &[f32], bytes: &mut [u8]) {
        if self == Codec::Bf16 {
            for (x, to) in values.iter().zip(bytes.chunks_exact_mut(2)) {
                to.copy_from_slice(&bf16::from_f32(*x).to_le_bytes());
            }
            return;
        }
        for (block, to) in values.chunks(BLOCK).zip(bytes.chunks_mut(BLOCK + 4)) {
            let largest = block.iter().fold(0.0f32, |m, x| m.max(x.abs()));
            let finite = block.iter().all(|x| x.is_finite());
            let scale = if finite { largest / self.largest() } else { f32::NAN };
            // Where all is zero, or too small for a scale, zeros travel.
            let inverse = if scale.is_normal() { 1.0 / scale } else { 0.0 };
            let (head, codes) = to.split_at_mut(4);
            head.copy_from_slice(&scale.to_le_bytes());
            let pairs = block.iter().zip(codes);
            match self {
                Codec::Fp8E4m3 => pairs.for_each(|(x, c)| *c = to_fp8::<3, 7, 0x7e>(x * inverse)),
                Codec::Fp8E5m2 => pairs.for_each(|(x, c)| *c = to_fp8::<2, 15, 0x7b>(x * inverse)),
                _ => pairs.for_each(|(x, c)| *c = (x * inverse).round() as i8 as u8),
            }
        }
    }

    /// Hands each value of the encoding to `take`, with its index.
    pub fn decode(self, bytes: &[u8], mut take: impl FnMut(usize, f32)) {
        if self == Codec::Bf16 {
            for (i, two) in bytes.chunks_exact(2).enumerate() {
                take(i, bf16::from_le_bytes([two[0], two[1]]).to_f32());
            }
            return;
        }
        for (b, block) in bytes.chunks(BLOCK + 4).enumerate() {
            let Some((head, codes)) = block.split_first_chunk::<4>() else { continue };
            let scale = f32::from_le_bytes(*head);
            for (i, code) in codes.iter().enumerate() {
                let value = match self {
                    Codec::Fp8E4m3 => E4M3[usize::from(*code)],
                    Codec::Fp8E5m2 => E5M2[usize::from(*code)],
                    _ => f32::from(*code as i8),
                };
                take(b * BLOCK + i, value * scale);
            }
        }
    }

    /// The largest value of the format.
    fn largest(self) -> f32 {
        match self {
            Codec::Fp8E4m3 => 448.0,
            Codec::Fp8E5m2 => 57_344.0,
            _ => 127.0,
        }
    }
}

/// To the nearest value with `M` bits of mantissa and this bias, ties to even, at most the value
/// of the code `TOP`. The input is finite.
#[inline]
fn to_fp8<const M: u32, const BIAS: i32, const TOP: u8>(x: f32) -> u8 {
    let sign = (x.to_bits() >> 24) as u8 & 0x80;
    let bits = x.to_bits() & 0x7fff_ffff;
    let shift = 23 - M;
    let smallest_normal = ((127 + 1 - BIAS) as u32) << 23;
    let code = if bits >= smallest_normal {
        let rounded = (bits + (1 << (shift - 1)) - 1 + (bits >> shift & 1)) >> shift;
        rounded - (((127 - BIAS) as u32) << M)
    } else {
        // In steps of the smallest value: 2^(1 - BIAS - M).
        let steps = f32::from_bits((127 + BIAS as u32 - 1 + M) << 23);
        (x.abs() * steps).round_ties_even() as u32
    };
    sign | code.min(u32::from(TOP)) as u8
}

const E4M3: [f32; 256] = fp8_values(3, 7);
const E5M2: [f32; 256] = fp8_values(2, 15);

/// The value of every code, by doubling and halving, which are exact.
const fn fp8_values(mantissa: u32, bias: i32) -> [f32; 256] {
    let mut table = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        let (low, high) = (code & ((1 << mantissa) - 1), (code & 0x7f) >> mantissa);
        let (mut value, mut power) = match high {
            0 => (low as f32, 1 - bias - mantissa as i32),
            e => ((low + (1 << mantissa)) as f32, e as i32 - bias - mantissa as i32),
        };
        while power > 0 {
            value *= 2.0;
            power -= 1;
        }
        while power < 0 {
            value *= 0.5;
            power += 1;
        }
        table[code] = if code & 0x80 != 0 { -value } else { value };
        code += 1;
    }
    table
}

impl Group {
    /// [`Group::all_reduce`] of f32 that sends fewer bytes; `Sum` or `Avg`.
    ///
    /// With the codec's error (a, b), element i comes back within the sum over ranks r of
    /// a |x_r| + b m_r, plus a |s| + b m of the sum s that this gives (divided by the ranks for
    /// `Avg`), m being the largest of a block of 128.
    ///
    /// ```
    /// use colossal_comm::{Codec, ReduceOp, Verb, on_ranks};
    /// on_ranks(2, |g| {
    ///     let mut gradient = vec![0.5f32; 4096];
    ///     g.all_reduce_compressed(&mut gradient, ReduceOp::Sum, Codec::Fp8E5m2).unwrap();
    ///     assert_eq!(gradient[0], 1.0);
    ///     // 4 bytes a value would be 16384.
    ///     assert_eq!(g.counters().bytes_of(Verb::AllReduce), 4096 + 4096 / 32);
    /// });
    /// ```
    ///
    /// # Errors
    /// [`Error::Argument`] for other operations.
    #[track_caller]
    pub fn all_reduce_compressed(&self, buf: &mut [f32], op: ReduceOp, codec: Codec) -> Result<()> {
        averages("all_reduce_compressed", op)?;
        let n = self.world_size();
        if n == 1 {
            self.count(Verb::AllReduce, 0);
            return Ok(());
        }
        // Slices begin at a block.
        let cut = |r: usize| if r == n { buf.len() } else { buf.len() * r / n / BLOCK * BLOCK };
        let lens: Vec<usize> = (0..n).map(|r| cut(r + 1) - cut(r)).collect();
        let sizes: Vec<usize> = lens.iter().map(|len| codec.bytes(*len)).collect();
        let site = Location::caller();
        let sum = self.sum_of_slices(buf, &lens, op, codec, site)?;
        let mine = sizes[self.rank()];
        let total: usize = sizes.iter().sum();
        self.count(Verb::AllReduce, total - mine + mine * (n - 1));
        let (mut out, mut all) = (vec![0u8; mine], vec![0u8; total]);
        codec.encode(&sum, &mut out);
        let call = Call::new(Verb::AllGather, DType::U8, total, site).ragged(&sizes);
        let parts = Parts::Ragged(&sizes);
        run(&*self.0.engine, &call, &out, &mut all, parts, parts)?;
        let (mut at, mut from) = (0, 0);
        for (len, size) in lens.iter().zip(&sizes) {
            let to = &mut buf[at..at + len];
            codec.decode(&all[from..from + size], |i, x| to[i] = x);
            (at, from) = (at + len, from + size);
        }
        Ok(())
    }

    /// [`Group::reduce_scatter`] of f32 that sends fewer bytes; `Sum` or `Avg`. The error is that
    /// of [`Group::all_reduce_compressed`] without the last term.
    ///
    /// # Errors
    /// [`Error::Argument`] for other operations, or lengths that do not fit.
    #[track_caller]
    pub fn reduce_scatter_compressed(
        &self,
        input: &[f32],
        output: &mut [f32],
        op: ReduceOp,
        codec: Codec,
    ) -> Result<()> {
        averages("reduce_scatter_compressed", op)?;
        let (n, part) = (self.world_size(), output.len());
        self.times("reduce_scatter_compressed", ("input", input.len()), ("output", part))?;
        self.count(Verb::ReduceScatter, codec.bytes(part) * (n - 1));
        let sum = self.sum_of_slices(input, &vec![part; n], op, codec, Location::caller())?;
        output.copy_from_slice(&sum);
        Ok(())
    }

    /// [`Group::all_to_all`] of f32 that sends fewer bytes; each value within the codec's error.
    ///
    /// # Errors
    /// [`Error::Argument`] unless both have one length that divides by `world_size`.
    #[track_caller]
    pub fn all_to_all_compressed(
        &self,
        input: &[f32],
        output: &mut [f32],
        codec: Codec,
    ) -> Result<()> {
        let n = self.world_size();
        let part = input.len() / n;
        self.times("all_to_all_compressed", ("input", input.len()), ("a part", part))?;
        self.times("all_to_all_compressed", ("output", output.len()), ("a part", part))?;
        self.count(Verb::AllToAll, codec.bytes(part) * (n - 1));
        let got = self.exchange(input, &vec![part; n], codec, Location::caller())?;
        for (to, from) in output.chunks_mut(part.max(1)).zip(got.chunks(codec.bytes(part).max(1))) {
            codec.decode(from, |i, x| to[i] = x);
        }
        Ok(())
    }

    /// Sends slice r to rank r; what comes, encoded, in rank order.
    fn exchange(
        &self,
        input: &[f32],
        lens: &[usize],
        codec: Codec,
        site: &'static Location<'static>,
    ) -> Result<Vec<u8>> {
        let sizes: Vec<usize> = lens.iter().map(|len| codec.bytes(*len)).collect();
        let mut out = vec![0u8; sizes.iter().sum()];
        let (mut at, mut to) = (0, 0);
        for (len, size) in lens.iter().zip(&sizes) {
            codec.encode(&input[at..at + len], &mut out[to..to + size]);
            (at, to) = (at + len, to + size);
        }
        let mine = vec![sizes[self.rank()]; self.world_size()];
        let mut got = vec![0u8; mine.iter().sum()];
        let call = Call::new(Verb::AllToAll, DType::U8, 0, site);
        let call = if mine.len() == 1 { Call { len: out.len(), ..call } } else { call.ragged(&[]) };
        run(&*self.0.engine, &call, &out, &mut got, Parts::Ragged(&sizes), Parts::Ragged(&mine))?;
        Ok(got)
    }

    fn sum_of_slices(
        &self,
        input: &[f32],
        lens: &[usize],
        op: ReduceOp,
        codec: Codec,
        site: &'static Location<'static>,
    ) -> Result<Vec<f32>> {
        let len = lens[self.rank()];
        let got = self.exchange(input, lens, codec, site)?;
        let mut sum = vec![0.0f32; len];
        for from in got.chunks(codec.bytes(len).max(1)) {
            codec.decode(from, |i, x| sum[i] += x);
        }
        if op == ReduceOp::Avg {
            sum.iter_mut().for_each(|x| *x /= self.world_size() as f32);
        }
        Ok(sum)
    }
}

fn averages(op: &'static str, reduce: ReduceOp) -> Result<()> {
    if matches!(reduce, ReduceOp::Sum | ReduceOp::Avg) {
        return Ok(());
    }
    let reason = format!("{reduce:?} of rounded values is not defined; use Sum or Avg");
    Err(Error::Argument { op, reason })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_fp8_code_comes_back() {
        for code in 0..=255u8 {
            if code & 0x7f < 0x7f {
                assert_eq!(to_fp8::<3, 7, 0x7e>(E4M3[usize::from(code)]), code);
            }
            if code & 0x7f < 0x7c {
                assert_eq!(to_fp8::<2, 15, 0x7b>(E5M2[usize::from(code)]), code);
            }
        }
        assert_eq!((E4M3[0x7e], E5M2[0x7b]), (448.0, 57_344.0));
        assert_eq!((E4M3[1], E5M2[1]), (2f32.powi(-9), 2f32.powi(-16)));
        // Ties go to even: between 16 (code 0x58) and 18 (0x59), and between 18 and 20 (0x5a).
        assert_eq!((to_fp8::<3, 7, 0x7e>(17.0), to_fp8::<3, 7, 0x7e>(19.0)), (0x58, 0x5a));
        assert_eq!(to_fp8::<3, 7, 0x7e>(1e9), 0x7e);
    }

    #[test]
    fn what_is_not_finite_arrives_as_nan() {
        for codec in Codec::ALL {
            let mut bytes = vec![0; codec.bytes(200)];
            let mut values = vec![1.0f32; 200];
            values[150] = f32::INFINITY;
            codec.encode(&values, &mut bytes);
            let mut back = vec![0.0; 200];
            codec.decode(&bytes, |i, x| back[i] = x);
            assert_eq!(back[0], 1.0);
            assert!(!back[150].is_finite());
        }
    }

    proptest! {
        #[test]
        fn values_come_back_within_the_stated_error(
            values in proptest::collection::vec(-1e6f32..1e6, 0..400),
            small in -20i32..20,
        ) {
            let values: Vec<f32> = values.iter().map(|x| x * 2f32.powi(small)).collect();
            for codec in Codec::ALL {
                let mut bytes = vec![0; codec.bytes(values.len())];
                codec.encode(&values, &mut bytes);
                let (a, b) = codec.error();
                let mut seen = 0;
                codec.decode(&bytes, |i, back| {
                    let block = &values[i / BLOCK * BLOCK..(i / BLOCK * BLOCK + BLOCK).min(values.len())];
                    let largest = block.iter().fold(0.0, |m: f64, x| m.max(f64::from(x.abs())));
                    let x = f64::from(values[i]);
                    let off = (f64::from(back) - x).abs();
                    assert!(off <= a * x.abs() + b * largest, "{codec:?}: {x} came back as {back}");
                    seen += 1;
                });
                prop_assert_eq!(seen, values.len());
            }
        }
    }
}
