//! The conformance suite: every verb, type and operation against its definition, on any engine.
//!
//! Values are small whole numbers, so that all types are exact and all sums have one value.

use colossal_comm::{Element, Group, Message, ReduceOp};
use half::{bf16, f16};

/// A number that the suite can make and read.
pub(crate) trait Number: Element + PartialEq {
    fn of(value: i64) -> Self;
    fn value(self) -> f64;
    /// A quotient of integers is cut, one of floats is not.
    const WHOLE: bool;
}

macro_rules! numbers {
    ($($t:ty: $of:expr, $value:expr, $whole:expr;)*) => { $(
        impl Number for $t {
            fn of(value: i64) -> $t { $of(value) }
            fn value(self) -> f64 { $value(self) }
            const WHOLE: bool = $whole;
        }
    )* };
}
numbers! {
    f32: |v| v as f32, f64::from, false;
    f64: |v| v as f64, |x| x, false;
    bf16: |v| bf16::from_f32(v as f32), bf16::to_f64, false;
    f16: |v| f16::from_f32(v as f32), f16::to_f64, false;
    i8: |v| v as i8, f64::from, true;
    u8: |v| v as u8, f64::from, true;
    i32: |v| v as i32, f64::from, true;
    u32: |v| v as u32, f64::from, true;
    i64: |v| v, |x| x as f64, true;
    u64: |v| v as u64, |x| x as f64, true;
}

/// From 0 to 12, so that eight of them fit every type.
fn at(rank: usize, i: usize) -> i64 {
    ((rank * 5 + i * 7 + i / 64) % 13) as i64
}

pub(crate) fn row<T: Number>(rank: usize, range: std::ops::Range<usize>) -> Vec<T> {
    range.map(|i| T::of(at(rank, i))).collect()
}

pub(crate) fn reduced<T: Number>(op: ReduceOp, ranks: usize, i: usize) -> f64 {
    let all = (0..ranks).map(|r| at(r, i));
    let value = match op {
        ReduceOp::Sum => all.sum::<i64>() as f64,
        ReduceOp::Avg if T::WHOLE => (all.sum::<i64>() / ranks as i64) as f64,
        ReduceOp::Avg => all.sum::<i64>() as f64 / ranks as f64,
        ReduceOp::Max => all.fold(i64::MIN, i64::max) as f64,
        ReduceOp::Min => all.fold(i64::MAX, i64::min) as f64,
    };
    // Rounded as the type rounds.
    if T::WHOLE { value } else { round::<T>(value) }
}

fn round<T: Number>(value: f64) -> f64 {
    match T::NAME {
        "f32" => f64::from(value as f32),
        "bf16" => bf16::from_f32(value as f32).to_f64(),
        "f16" => f16::from_f32(value as f32).to_f64(),
        _ => value,
    }
}

pub(crate) fn values<T: Number>(x: &[T]) -> Vec<f64> {
    x.iter().map(|x| x.value()).collect()
}

/// All verbs on parts of `part` elements.
pub(crate) fn verbs<T: Number>(g: &Group, part: usize) {
    let (me, n) = (g.rank(), g.world_size());
    let len = n * part;
    let mine: Vec<T> = row(me, 0..len);
    for op in ReduceOp::ALL {
        let whole: Vec<f64> = (0..len).map(|i| reduced::<T>(op, n, i)).collect();
        let mut x = mine.clone();
        g.all_reduce(&mut x, op).unwrap();
        assert_eq!(values(&x), whole, "all_reduce {op:?} {} x {len}", T::NAME);
        let mut x = vec![T::zeroed(); part];
        g.reduce_scatter(&mine, &mut x, op).unwrap();
        assert_eq!(values(&x), whole[me * part..(me + 1) * part], "reduce_scatter {op:?}");
        let mut x = mine.clone();
        g.reduce(&mut x, op, n - 1).unwrap();
        let wanted = if me == n - 1 { whole } else { values(&mine) };
        assert_eq!(values(&x), wanted, "reduce {op:?}");
    }
    let all: Vec<T> = (0..n).flat_map(|r| row::<T>(r, 0..part)).collect();
    let mut x = vec![T::zeroed(); len];
    g.all_gather(&mine[..part], &mut x).unwrap();
    assert_eq!(x, all, "all_gather");
    let mut x = vec![T::zeroed(); len];
    g.gather(&mine[..part], &mut x, n / 2).unwrap();
    assert_eq!(x, if me == n / 2 { all } else { vec![T::zeroed(); len] }, "gather");
    let mut x = vec![T::zeroed(); part];
    g.scatter(&mine, &mut x, 0).unwrap();
    assert_eq!(x, row(0, me * part..(me + 1) * part), "scatter");
    let turned: Vec<T> = (0..n).flat_map(|r| row::<T>(r, me * part..(me + 1) * part)).collect();
    let mut x = vec![T::zeroed(); len];
    g.all_to_all(&mine, &mut x).unwrap();
    assert_eq!(x, turned, "all_to_all");
    let mut x = mine.clone();
    g.broadcast(&mut x, n - 1).unwrap();
    assert_eq!(x, row(n - 1, 0..len), "broadcast");
    let mut x = vec![T::zeroed(); len];
    g.shift(&mine, &mut x, 1).unwrap();
    assert_eq!(x, row((me + n - 1) % n, 0..len), "shift");
    g.barrier().unwrap();
    ragged::<T>(g, part);
    messages::<T>(g, part);
    in_flight::<T>(g, part);
}

fn ragged<T: Number>(g: &Group, part: usize) {
    let (me, n) = (g.rank(), g.world_size());
    // Rank 1 has nothing, others more and more.
    let counts: Vec<usize> = (0..n).map(|r| if r == 1 { 0 } else { part + r }).collect();
    let total: usize = counts.iter().sum();
    let offset: usize = counts[..me].iter().sum();
    let mut x = vec![T::zeroed(); total];
    g.all_gather_v(&row::<T>(me, 0..counts[me]), &mut x, &counts).unwrap();
    let wanted: Vec<T> = (0..n).flat_map(|r| row::<T>(r, 0..counts[r])).collect();
    assert_eq!(x, wanted, "all_gather_v");
    let mut x = vec![T::zeroed(); counts[me]];
    g.reduce_scatter_v(&row::<T>(me, 0..total), &mut x, &counts, ReduceOp::Sum).unwrap();
    let wanted: Vec<f64> =
        (0..counts[me]).map(|i| reduced::<T>(ReduceOp::Sum, n, offset + i)).collect();
    assert_eq!(values(&x), wanted, "reduce_scatter_v");
    // From a to b go `part * ((a + 2 b) % 3) + b` elements.
    let sent = |a: usize, b: usize| part * ((a + 2 * b) % 3) + b;
    let send: Vec<usize> = (0..n).map(|b| sent(me, b)).collect();
    let recv: Vec<usize> = (0..n).map(|a| sent(a, me)).collect();
    let mut x = vec![T::zeroed(); recv.iter().sum()];
    g.all_to_all_v_into(&row::<T>(me, 0..send.iter().sum()), &send, &mut x, &recv).unwrap();
    let from = |a: usize| {
        let before: usize = (0..me).map(|b| sent(a, b)).sum();
        row::<T>(a, before..before + sent(a, me))
    };
    assert_eq!(x, (0..n).flat_map(from).collect::<Vec<T>>(), "all_to_all_v");
}

fn messages<T: Number>(g: &Group, part: usize) {
    let (me, n) = (g.rank(), g.world_size());
    if n == 1 {
        return;
    }
    let (next, before) = ((me + 1) % n, (me + n - 1) % n);
    let (a, b) = (row::<T>(me, 0..part), row::<T>(me, part..2 * part + 1));
    let (mut x, mut y) = (vec![T::zeroed(); part], vec![T::zeroed(); part + 1]);
    g.batch(&mut [
        Message::Recv(&mut x, before),
        Message::Recv(&mut y, before),
        Message::Send(&a, next),
        Message::Send(&b, next),
    ])
    .unwrap();
    assert_eq!((x, y), (row(before, 0..part), row(before, part..2 * part + 1)), "batch");
    let coming = g.recv_start::<T, _>(vec![T::zeroed(); part], before);
    let going = g.send_start::<T, _>(a, next);
    assert_eq!(coming.wait().unwrap(), row(before, 0..part), "recv_start");
    going.wait().unwrap();
}

fn in_flight<T: Number>(g: &Group, part: usize) {
    let (me, n) = (g.rank(), g.world_size());
    let len = n * part;
    let mine: Vec<T> = row(me, 0..len);
    let zeros = |len| vec![T::zeroed(); len];
    let sum = g.all_reduce_start::<T, _>(mine.clone(), ReduceOp::Sum);
    let pieces = g.reduce_scatter_start::<T, _, _>(mine.clone(), zeros(part), ReduceOp::Max);
    let all = g.all_gather_start::<T, _, _>(mine[..part].to_vec(), zeros(len));
    let turned = g.all_to_all_start::<T, _, _>(mine.clone(), zeros(len));
    let root = g.broadcast_start::<T, _>(mine.clone(), 0);
    let least = g.reduce_start::<T, _>(mine.clone(), ReduceOp::Min, 0);
    let gathered = g.gather_start::<T, _, _>(mine[..part].to_vec(), zeros(len), 0);
    let scattered = g.scatter_start::<T, _, _>(mine.clone(), zeros(part), n - 1);
    let shifted = g.shift_start::<T, _, _>(mine.clone(), zeros(len), n - 1);
    let counts = vec![part; n];
    let ragged =
        g.all_to_all_v_start::<T, _, _>(mine.clone(), counts.clone(), zeros(len), counts.clone());
    let both = g.all_gather_v_start::<T, _, _>(mine[..part].to_vec(), zeros(len), counts.clone());
    let one = g.reduce_scatter_v_start::<T, _, _>(mine.clone(), zeros(part), counts, ReduceOp::Max);
    // A blocking call in between does not wait for them.
    g.barrier().unwrap();
    let want = |op, range: std::ops::Range<usize>| -> Vec<f64> {
        range.map(|i| reduced::<T>(op, n, i)).collect()
    };
    let block = me * part..(me + 1) * part;
    assert_eq!(values(&sum.wait().unwrap()), want(ReduceOp::Sum, 0..len));
    assert_eq!(values(&pieces.wait().unwrap().1), want(ReduceOp::Max, block.clone()));
    let wanted: Vec<T> = (0..n).flat_map(|r| row::<T>(r, 0..part)).collect();
    assert_eq!(all.wait().unwrap().1, wanted);
    let across: Vec<T> = (0..n).flat_map(|r| row::<T>(r, block.clone())).collect();
    assert_eq!(turned.wait().unwrap().1, across);
    assert_eq!(root.wait().unwrap(), row(0, 0..len));
    let least = values(&least.wait().unwrap());
    assert_eq!(least, if me == 0 { want(ReduceOp::Min, 0..len) } else { values(&mine) });
    let gathered = gathered.wait().unwrap().1;
    assert_eq!(gathered, if me == 0 { wanted.clone() } else { zeros(len) });
    assert_eq!(scattered.wait().unwrap().1, row(n - 1, block.clone()));
    assert_eq!(shifted.wait().unwrap().1, row((me + 1) % n, 0..len));
    assert_eq!(ragged.wait().unwrap().1, across);
    assert_eq!(both.wait().unwrap().1, wanted);
    assert_eq!(values(&one.wait().unwrap().1), want(ReduceOp::Max, block));
}

/// The whole suite on one group, or a short one where each call is slow. Sizes stand around every switch of algorithm and chunk of the
/// engines.
pub(crate) fn conformance(g: &Group, short: bool) {
    let parts: &[usize] = if short { &[63] } else { &[0, 1, 63, 300] };
    for part in parts.iter().copied() {
        verbs::<f32>(g, part);
        verbs::<f64>(g, part);
        verbs::<bf16>(g, part);
        verbs::<f16>(g, part);
        verbs::<i8>(g, part);
        verbs::<u8>(g, part);
        verbs::<i32>(g, part);
        verbs::<u32>(g, part);
        verbs::<i64>(g, part);
        verbs::<u64>(g, part);
    }
    let n = g.world_size();
    for bytes in [4096 / n, 4096 / n + 4, 65536 / n, (65536 + 256) / n, 200_000] {
        verbs::<f32>(g, bytes / 4);
        verbs::<bf16>(g, bytes / 2);
    }
    same_bits_everywhere(g);
    groups(g);
}

/// Sums that depend on their order are the same on all ranks, and again.
fn same_bits_everywhere(g: &Group) {
    for len in [100, 70_001] {
        let x: Vec<f32> = (0..len).map(|i| 1.0 / (1 + g.rank() * 7 + i % 97) as f32).collect();
        let (mut a, mut b) = (x.clone(), x);
        g.all_reduce(&mut a, ReduceOp::Sum).unwrap();
        g.all_reduce(&mut b, ReduceOp::Sum).unwrap();
        assert_eq!(a, b, "from run to run");
        let bits: Vec<u32> = a.iter().map(|x| x.to_bits()).collect();
        let mut all = vec![0u32; len * g.world_size()];
        g.all_gather(&bits, &mut all).unwrap();
        assert!(all.chunks(len).all(|other| other == bits), "on all ranks");
    }
}

fn groups(g: &Group) {
    let (me, n) = (g.rank(), g.world_size());
    let half = g.split(me % 2).unwrap();
    assert_eq!((half.rank(), half.world_size()), (me / 2, (n + 1 - me % 2) / 2));
    let mut x = [me as i64];
    half.all_reduce(&mut x, ReduceOp::Sum).unwrap();
    assert_eq!(x[0], (0..n).filter(|r| r % 2 == me % 2).sum::<usize>() as i64);
    verbs::<f32>(&half, 17);
}
