//! Every verb against its definition, and every way to fail.

use std::time::Duration;

use colossal_comm::{Codec, Config, Error, Group, Mesh, ReduceOp, Verb, on_ranks};
use half::bf16;
use proptest::prelude::*;

fn value(rank: usize, i: usize) -> f32 {
    ((rank * 31 + i * 7) % 23) as f32 - 11.0
}

fn reduced(op: ReduceOp, n: usize, i: usize) -> f32 {
    let all = (0..n).map(|r| value(r, i));
    match op {
        ReduceOp::Sum => all.sum(),
        ReduceOp::Avg => all.sum::<f32>() / n as f32,
        ReduceOp::Max => all.fold(f32::MIN, f32::max),
        ReduceOp::Min => all.fold(f32::MAX, f32::min),
    }
}

#[test]
fn every_verb_equals_its_definition() {
    // Miri, under which this is a matter of minutes, gets what takes either path.
    let (ranks, parts): (&[usize], &[usize]) =
        if cfg!(miri) { (&[2, 3], &[1, 600]) } else { (&[1, 2, 3, 4], &[0, 1, 5, 3000]) };
    for &n in ranks {
        for &part in parts {
            let len = n * part;
            on_ranks(n, |g| {
                let me = g.rank();
                let mine: Vec<f32> = (0..len).map(|i| value(me, i)).collect();
                for op in [ReduceOp::Sum, ReduceOp::Avg, ReduceOp::Max, ReduceOp::Min] {
                    let whole: Vec<f32> = (0..len).map(|i| reduced(op, n, i)).collect();
                    let mut x = mine.clone();
                    g.all_reduce(&mut x, op).unwrap();
                    assert_eq!(x, whole);
                    let mut x = vec![0.0; part];
                    g.reduce_scatter(&mine, &mut x, op).unwrap();
                    assert_eq!(x, whole[me * part..(me + 1) * part]);
                    let mut x = mine.clone();
                    g.reduce(&mut x, op, n - 1).unwrap();
                    assert_eq!(x, if me == n - 1 { whole } else { mine.clone() });
                }
                let all: Vec<f32> =
                    (0..n).flat_map(|r| (0..part).map(move |i| value(r, i))).collect();
                let mut x = vec![0.0; len];
                g.all_gather(&mine[..part], &mut x).unwrap();
                assert_eq!(x, all);
                let mut x = vec![0.0; len];
                g.gather(&mine[..part], &mut x, 0).unwrap();
                assert_eq!(x, if me == 0 { all } else { vec![0.0; len] });
                let mut x = vec![0.0; part];
                g.scatter(&mine, &mut x, 0).unwrap();
                assert!(x.iter().enumerate().all(|(i, x)| *x == value(0, me * part + i)));
                let mut x = vec![0.0; len];
                g.all_to_all(&mine, &mut x).unwrap();
                let want = (0..n).flat_map(|r| (0..part).map(move |i| value(r, me * part + i)));
                assert_eq!(x, want.collect::<Vec<_>>());
                let mut x = mine.clone();
                g.broadcast(&mut x, n - 1).unwrap();
                assert!(x.iter().enumerate().all(|(i, x)| *x == value(n - 1, i)));
                g.barrier().unwrap();
            });
        }
    }
}

#[test]
fn half_precision_is_summed_in_f32_and_integers_wrap() {
    on_ranks(3, |g| {
        let mut x = vec![bf16::from_f32(256.0 + g.rank() as f32)];
        g.all_reduce(&mut x, ReduceOp::Sum).unwrap();
        // 256 + 257 (= 256 in bf16) + 258: the sum is exact before it is rounded once.
        assert_eq!(x[0], bf16::from_f32(256.0 + 256.0 + 258.0));
        let mut x = [200u8];
        g.all_reduce(&mut x, ReduceOp::Sum).unwrap();
        assert_eq!(x[0], 88);
    });
}

#[test]
fn collectives_in_flight_keep_their_order_beside_blocking_ones() {
    on_ranks(3, |g| {
        let pending: Vec<_> = (0..20)
            .map(|i| g.all_reduce_start::<f32, _>(vec![i as f32; 100], ReduceOp::Sum))
            .collect();
        let mut x = [1i64];
        g.all_reduce(&mut x, ReduceOp::Sum).unwrap();
        assert_eq!(x, [3]);
        for (i, p) in pending.into_iter().enumerate() {
            assert_eq!(p.wait().unwrap(), vec![3.0 * i as f32; 100]);
        }
        let (input, output) = (vec![1.0f32; 6], vec![0.0f32; 2]);
        let sum = g.reduce_scatter_start::<f32, _, _>(input, output, ReduceOp::Sum);
        assert_eq!(sum.wait().unwrap().1, [3.0, 3.0]);
        let all = g.all_gather_start::<i32, _, _>(vec![g.rank() as i32], vec![0; 3]);
        assert_eq!(all.wait().unwrap().1, [0, 1, 2]);
        // Leaked: it runs to its end all the same.
        std::mem::forget(g.all_reduce_start::<f32, _>(vec![0.0; 4], ReduceOp::Sum));
        let wrong = g.all_gather_start::<i32, _, _>(vec![1], vec![0; 2]).wait();
        assert!(matches!(wrong, Err(Error::Argument { .. })));
    });
}

#[test]
fn messages_arrive_in_order() {
    on_ranks(3, |g| {
        let next = (g.rank() + 1) % 3;
        let before = (g.rank() + 2) % 3;
        for i in 0..10i32 {
            // Even ranks send first: a ring of blocking sends would wait for itself.
            let mut x = [0i32; 4];
            if g.rank() % 2 == 0 {
                g.send(&[i; 4], next).unwrap();
                g.recv(&mut x, before).unwrap();
            } else {
                g.recv(&mut x, before).unwrap();
                g.send(&[i; 4], next).unwrap();
            }
            assert_eq!(x, [i; 4]);
        }
    });
}

#[test]
fn split_and_mesh_make_the_groups_they_say() {
    on_ranks(6, |g| {
        let odd = g.split(g.rank() % 2).unwrap();
        assert_eq!((odd.rank(), odd.world_size()), (g.rank() / 2, 3));
        let mesh = Mesh::new(&g, &[("dp", 3), ("tp", 2)]).unwrap();
        assert_eq!(
            (mesh.coord("dp").unwrap(), mesh.coord("tp").unwrap()),
            (g.rank() / 2, g.rank() % 2)
        );
        let mut x = [g.rank() as u32];
        mesh.group("dp").unwrap().all_reduce(&mut x, ReduceOp::Sum).unwrap();
        assert_eq!(x[0], if g.rank() % 2 == 0 { 6 } else { 9 });
        assert!(mesh.group("pp").unwrap_err().to_string().contains("[\"dp\", \"tp\"]"));
        assert!(
            Mesh::new(&g, &[("dp", 4)]).unwrap_err().to_string().contains("4 places for 6 ranks")
        );
    });
}

#[test]
fn counters_follow_the_formulas() {
    on_ranks(4, |g| {
        g.all_reduce(&mut [0.0f32; 100], ReduceOp::Sum).unwrap();
        g.reduce_scatter(&[0.0f32; 100], &mut [0.0; 25], ReduceOp::Sum).unwrap();
        g.all_gather(&[0.0f32; 25], &mut [0.0; 100]).unwrap();
        let c = g.counters();
        assert_eq!(c.bytes_of(Verb::AllReduce), 600);
        assert_eq!((c.bytes_of(Verb::ReduceScatter), c.bytes_of(Verb::AllGather)), (300, 300));
        assert_eq!((c.calls(), c.calls_of(Verb::AllGather)), (3, 1));
    });
}

/// Long enough for a busy machine: what must not run into it ends at once.
const LONG: u64 = 20_000;

fn failing(
    n: usize,
    timeout: u64,
    f: impl Fn(Group) -> Option<Error> + Sync,
) -> Vec<Option<Error>> {
    let groups = Group::threads_with(n, Config { timeout: Duration::from_millis(timeout) });
    std::thread::scope(|s| {
        let f = &f;
        let ranks: Vec<_> = groups.into_iter().map(|g| s.spawn(move || f(g))).collect();
        ranks.into_iter().map(|r| r.join().unwrap_or(None)).collect()
    })
}

#[test]
fn a_mismatch_is_an_error_on_every_rank_that_names_both() {
    let errors = failing(3, LONG, |g| {
        let len = if g.rank() == 2 { 5 } else { 4 };
        g.all_reduce(&mut vec![0.0f32; len], ReduceOp::Sum).err()
    });
    for e in errors {
        let e = e.expect("an error on every rank");
        assert!(e.is_mismatch());
        let text = e.to_string();
        assert!(
            text.contains("all_reduce(4 x f32, Sum)") && text.contains("all_reduce(5 x f32, Sum)"),
            "{text}"
        );
    }
}

#[test]
fn a_time_out_names_who_is_missing_and_what_it_did_last() {
    let errors = failing(3, 200, |g| {
        g.barrier().unwrap();
        if g.rank() == 1 {
            std::thread::sleep(Duration::from_millis(500));
            return g.barrier().err();
        }
        g.all_reduce(&mut [0i32], ReduceOp::Max).err()
    });
    for e in &errors {
        let text = e.as_ref().expect("an error on every rank").to_string();
        assert!(
            text.contains("[1]") && text.contains("all_reduce") && text.contains("barrier"),
            "{text}"
        );
    }
    assert_eq!(errors[0], errors[2]);
}

#[test]
fn a_rank_that_panics_or_leaves_ends_the_wait_of_the_others() {
    let errors = failing(3, LONG, |g| {
        assert_ne!(g.rank(), 1, "on purpose");
        g.barrier().err()
    });
    assert!(errors[0].as_ref().unwrap().to_string().contains("rank 1 is gone (it panicked)"));
    let errors =
        failing(2, LONG, |g| if g.rank() == 1 { None } else { g.recv(&mut [0u8], 1).err() });
    assert!(errors[0].as_ref().unwrap().to_string().contains("dropped its group"));
}

#[test]
fn a_wrong_length_of_ones_own_leaves_the_group_usable() {
    on_ranks(2, |g| {
        let e = g.all_gather(&[1u8; 3], &mut [0; 5]).unwrap_err();
        assert!(e.to_string().contains("must have 6"), "{e}");
        g.barrier().unwrap();
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn all_reduce_equals_reduce_scatter_then_all_gather(n in 1usize..5, part in 0usize..5000) {
        on_ranks(n, |g| {
            let x: Vec<f32> = (0..n * part).map(|i| value(g.rank(), i) / 3.0).collect();
            let (mut a, mut piece, mut b) = (x.clone(), vec![0.0; part], vec![0.0; n * part]);
            g.all_reduce(&mut a, ReduceOp::Sum).unwrap();
            g.reduce_scatter(&x, &mut piece, ReduceOp::Sum).unwrap();
            g.all_gather(&piece, &mut b).unwrap();
            assert_eq!(a, b);
        });
    }
}

#[test]
fn shifts_go_round_the_ring_and_uneven_parts_find_their_rank() {
    on_ranks(4, |g| {
        let me = g.rank();
        for by in 0..9 {
            let mut got = [0i64; 3];
            g.shift(&[me as i64; 3], &mut got, by).unwrap();
            assert_eq!(got, [((me + 40 - by) % 4) as i64; 3]);
            let (_, got) = g.shift_start::<i64, _, _>(vec![me as i64], vec![0], by).wait().unwrap();
            assert_eq!(got, [((me + 40 - by) % 4) as i64]);
        }
        // Rank r sends s copies of (10 r + s) to rank s; rank 0 receives nothing.
        let counts = [0, 1, 2, 3];
        let input: Vec<i32> = (0..4).flat_map(|s| vec![(10 * me + s) as i32; s]).collect();
        let before = g.counters().bytes_of(Verb::AllToAll);
        let (got, from) = g.all_to_all_v(&input, &counts).unwrap();
        let wanted: Vec<i32> = (0..4).flat_map(|r| vec![(10 * r + me) as i32; me]).collect();
        assert_eq!((got, from), (wanted, vec![me; 4]));
        assert_eq!(g.counters().bytes_of(Verb::AllToAll) - before, 4 * (6 - me as u64));
        let text = g.all_to_all_v(&input, &[1, 2]).unwrap_err().to_string();
        assert!(text.contains("add up to"), "{text}");
        let buf = g.broadcast_start::<i32, _>(vec![me as i32; 2], 3).wait().unwrap();
        assert_eq!(buf, [3, 3]);
    });
}

#[test]
fn compressed_forms_stay_within_their_error_and_send_fewer_bytes() {
    let n = 3;
    let len = 3 * 512;
    let x =
        |r: usize, i: usize| (value(r, i) + 0.37) * if i.is_multiple_of(50) { 100.0 } else { 1.0 };
    for codec in Codec::ALL {
        let (a, b) = codec.error();
        let results = on_ranks(n, |g| {
            let me = g.rank();
            let mine: Vec<f32> = (0..len).map(|i| x(me, i)).collect();
            // No block of a slice holds more than 1200.
            let off = |i: usize| {
                let sent: f64 = (0..n).map(|r| a * f64::from(x(r, i).abs()) + b * 1200.0).sum();
                let sum: f64 = (0..n).map(|r| f64::from(x(r, i))).sum();
                (sum, sent, sent + a * (sum.abs() + sent) + b * 3600.0)
            };
            let mut y = mine.clone();
            g.all_reduce_compressed(&mut y, ReduceOp::Sum, codec).unwrap();
            for (i, y) in y.iter().enumerate() {
                let (sum, _, bound) = off(i);
                assert!((f64::from(*y) - sum).abs() <= bound, "{codec:?} {i}: {y} for {sum}");
            }
            let mut part = vec![0.0; len / n];
            g.reduce_scatter_compressed(&mine, &mut part, ReduceOp::Avg, codec).unwrap();
            for (i, y) in part.iter().enumerate() {
                let (sum, bound, _) = off(me * len / n + i);
                let bound = bound / n as f64 + 1e-6 * sum.abs();
                assert!((f64::from(*y) - sum / n as f64).abs() <= bound, "{codec:?} {i}");
            }
            let mut turned = vec![0.0; len];
            g.all_to_all_compressed(&mine, &mut turned, codec).unwrap();
            for (i, y) in turned.iter().enumerate() {
                let wanted = f64::from(x(i / 512, me * 512 + i % 512));
                assert!((f64::from(*y) - wanted).abs() <= a * wanted.abs() + b * 1200.0);
            }
            let c = g.counters();
            let plain = 4 * len as u64 * 2 / 3;
            let fewer = if codec == Codec::Bf16 { 1.99 } else { 3.5 };
            for (verb, plain) in [
                (Verb::AllReduce, 2 * plain),
                (Verb::ReduceScatter, plain),
                (Verb::AllToAll, plain),
            ] {
                assert!(c.bytes_of(verb) as f64 * fewer < plain as f64, "{codec:?} {verb:?}");
            }
            assert!(g.all_reduce_compressed(&mut y, ReduceOp::Max, codec).is_err());
            y
        });
        assert!(results.iter().all(|y| *y == results[0]), "the same bits everywhere");
    }
}

#[test]
fn coalesced_forms_equal_one_by_one() {
    on_ranks(3, |g| {
        let lens = [5usize, 0, 40_000, 7, 300];
        let make = |n: usize| -> Vec<Vec<f32>> {
            lens.iter().map(|len| (0..n * len).map(|i| value(g.rank(), i)).collect()).collect()
        };
        let (mut a, mut b) = (make(1), make(1));
        let mut views: Vec<&mut [f32]> = a.iter_mut().map(|x| &mut x[..]).collect();
        g.all_reduce_coalesced(&mut views, ReduceOp::Sum).unwrap();
        b.iter_mut().for_each(|x| g.all_reduce(x, ReduceOp::Sum).unwrap());
        assert_eq!(a, b);
        let (parts, wholes) = (make(1), make(3));
        let (short, long): (Vec<&[f32]>, Vec<&[f32]>) =
            (parts.iter().map(|x| &x[..]).collect(), wholes.iter().map(|x| &x[..]).collect());
        let (mut a, mut b) = (make(3), make(3));
        let mut views: Vec<&mut [f32]> = a.iter_mut().map(|x| &mut x[..]).collect();
        g.all_gather_coalesced(&short, &mut views).unwrap();
        b.iter_mut().zip(&parts).for_each(|(to, x)| g.all_gather(x, to).unwrap());
        assert_eq!(a, b);
        let (mut a, mut b) = (make(1), make(1));
        let mut views: Vec<&mut [f32]> = a.iter_mut().map(|x| &mut x[..]).collect();
        g.reduce_scatter_coalesced(&long, &mut views, ReduceOp::Max).unwrap();
        let op = ReduceOp::Max;
        b.iter_mut().zip(&wholes).for_each(|(to, x)| g.reduce_scatter(x, to, op).unwrap());
        assert_eq!(a, b);
    });
}

#[test]
fn ranks_share_a_large_payload() {
    on_ranks(2, |g| {
        let me = g.rank();
        let mut x: Vec<f32> = (0..2000).map(|i| value(me, i)).collect();
        g.all_reduce(&mut x, ReduceOp::Sum).unwrap();
        assert!(x.iter().enumerate().all(|(i, x)| *x == reduced(ReduceOp::Sum, 2, i)));
        let mut all = vec![0.0; 4000];
        g.all_gather(&x, &mut all).unwrap();
        assert!(all[..2000] == x && all[2000..] == x);
        g.broadcast(&mut all, 1).unwrap();
    });
}

/// parallelism.md's volumes, elements of the full buffer n, summed over the ranks.
#[test]
fn counters_equal_the_formulas_for_every_verb() {
    for n in 1..=4u64 {
        let part = 300u64;
        let (len, all) = ((n * part) as usize, n * part * 4);
        let counted = on_ranks(n as usize, |g| {
            let (mut full, mut other) = (vec![1.0f32; len], vec![0.0f32; len]);
            let mut piece = vec![0.0f32; part as usize];
            let counts = vec![part as usize; n as usize];
            let sum = ReduceOp::Sum;
            g.all_reduce(&mut full, sum).unwrap();
            g.reduce_scatter(&full, &mut piece, sum).unwrap();
            g.reduce_scatter_v(&full, &mut piece, &counts, sum).unwrap();
            g.all_gather(&piece, &mut other).unwrap();
            g.all_gather_v(&piece, &mut other, &counts).unwrap();
            g.all_to_all(&full, &mut other).unwrap();
            g.all_to_all_v_into(&full, &counts, &mut other, &counts).unwrap();
            g.broadcast(&mut full, 0).unwrap();
            g.reduce(&mut full, sum, 0).unwrap();
            g.gather(&piece, &mut other, 0).unwrap();
            g.scatter(&full, &mut piece, 0).unwrap();
            g.shift(&full, &mut other, 1).unwrap();
            g.barrier().unwrap();
            match g.rank() as u64 {
                0 if n > 1 => g.send(&full, 1).unwrap(),
                1 => g.recv(&mut full, 0).unwrap(),
                _ => {}
            }
            g.counters()
        });
        let sent = |verb| counted.iter().map(|c| c.bytes_of(verb)).sum::<u64>();
        let alone = |bytes| if n == 1 { 0 } else { bytes };
        for (verb, wanted) in [
            (Verb::AllReduce, 2 * all * (n - 1)),
            (Verb::ReduceScatter, 2 * all * (n - 1)),
            (Verb::AllGather, 2 * all * (n - 1)),
            (Verb::AllToAll, 2 * all * (n - 1)),
            (Verb::Broadcast, alone(all)),
            (Verb::Reduce, all * (n - 1)),
            (Verb::Gather, part * 4 * (n - 1)),
            (Verb::Scatter, part * 4 * (n - 1)),
            (Verb::Shift, alone(all * n)),
            (Verb::Send, alone(all)),
            (Verb::Recv, 0),
            (Verb::Barrier, 0),
        ] {
            assert_eq!(sent(verb), wanted, "{verb:?} on {n} ranks");
        }
        let calls = |verb| counted[0].calls_of(verb);
        assert_eq!((calls(Verb::AllReduce), calls(Verb::AllGather)), (1, 2));
    }
}
