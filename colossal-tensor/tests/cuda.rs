//! Collectives on device buffers of ranks that are threads, on one GPU and on several, against
//! the same on the host: the same bits. On a GPU where there is one, else on the stand-in driver
//! (`cargo xtask stand-in`); without a driver nothing is run, unless `COLOSSAL_CUDA=required`.

use std::time::Duration;

use colossal_comm::{
    Config, DeviceMessage, DeviceSlice, DeviceSliceMut, Element, Error, Group, OnStream, ReduceOp,
    on_ranks,
};
use colossal_kernels::cuda::{Stream, devices};
use colossal_tensor::storage::{Buffer, memory_stats_of};
use colossal_tensor::{
    Device, Layout, Numbers, Recorded, Scope, Tensor, View, collectives, no_grad,
};
use half::bf16;

fn gpus() -> usize {
    let found = devices().map(|d| d.len());
    let required = std::env::var("COLOSSAL_CUDA").is_ok_and(|v| v == "required");
    assert!(!required || found.is_ok(), "COLOSSAL_CUDA=required, but {found:?}");
    found.unwrap_or(0)
}

/// A rank's device, and its group on it.
struct Rank {
    group: Group,
    stream: Stream,
}

impl Rank {
    fn new(group: &Group, gpus: usize) -> Rank {
        let stream = Stream::new(group.rank() % gpus).unwrap();
        let rank = Rank { group: group.clone(), stream };
        // Makes the runtime known.
        let mut one = rank.buffer(&[0.0f32]);
        collectives::all_reduce::<f32>(&rank.group, one.view_mut(), ReduceOp::Sum).unwrap();
        rank
    }

    fn on(&self) -> OnStream<'_> {
        // SAFETY: the stream is this rank's, and lives as long as it.
        unsafe { self.group.on(self.stream.raw().cu_stream().cast()) }.unwrap()
    }

    fn buffer<T: Element>(&self, values: &[T]) -> Buffer {
        Buffer::copy_of(&Device::Cuda(self.stream.clone()), View::Cpu(values)).unwrap()
    }
}

fn sent<T: Element>(buffer: &Buffer) -> DeviceSlice<'_, T> {
    match buffer.view::<T>() {
        // SAFETY: kept until its values have been read.
        View::Cuda(_, x) => unsafe { DeviceSlice::from_raw(x.address(), x.len()) },
        View::Cpu(_) => unreachable!("it was made on a GPU"),
    }
}

fn received<T: Element>(buffer: &mut Buffer) -> DeviceSliceMut<'_, T> {
    match buffer.view::<T>() {
        // SAFETY: as above, and borrowed by nobody else.
        View::Cuda(_, x) => unsafe { DeviceSliceMut::from_raw(x.address(), x.len()) },
        View::Cpu(_) => unreachable!("it was made on a GPU"),
    }
}

fn values<T: Element>(rank: usize, len: usize, of: impl Fn(f32) -> T) -> Vec<T> {
    (0..len).map(|i| of(((rank * 31 + i * 7) % 23) as f32 / 4.0 - 2.0)).collect()
}

fn read<T: Element>(buffer: &Buffer, len: usize) -> Vec<T> {
    let mut out = vec![T::zeroed(); len];
    buffer.view::<T>().read(&mut out).unwrap();
    out
}

fn verbs<T: Element + PartialEq>(group: &Group, gpus: usize, of: impl Fn(f32) -> T + Copy) {
    let (n, me) = (group.world_size(), group.rank());
    let rank = Rank::new(group, gpus);
    let on = rank.on();
    for len in [1, 5, 1000] {
        let own = values(me, len, of);
        let all = values(me, n * len, of);
        for op in [ReduceOp::Sum, ReduceOp::Avg, ReduceOp::Max, ReduceOp::Min] {
            let (mut host, mut there) = (own.clone(), rank.buffer(&own));
            group.all_reduce(&mut host, op).unwrap();
            on.all_reduce(&mut received::<T>(&mut there), op).unwrap();
            assert!(read::<T>(&there, len) == host, "all_reduce {op:?} of {len}");

            let (mut host, mut there) = (vec![of(0.0); len], rank.buffer(&own));
            group.reduce_scatter(&all, &mut host, op).unwrap();
            let input = rank.buffer(&all);
            on.reduce_scatter(sent::<T>(&input), &mut received(&mut there), op).unwrap();
            assert!(read::<T>(&there, len) == host, "reduce_scatter {op:?} of {len}");

            let (mut host, mut there) = (own.clone(), rank.buffer(&own));
            group.reduce(&mut host, op, n - 1).unwrap();
            on.reduce(&mut received::<T>(&mut there), op, n - 1).unwrap();
            assert!(me != n - 1 || read::<T>(&there, len) == host, "reduce {op:?} of {len}");
        }
        let gathered = |name: &str, there: &Buffer, host: &[T]| {
            assert!(read::<T>(there, host.len()) == host, "{name} of {len}");
        };
        let input = rank.buffer(&own);
        let (mut host, mut there) = (all.clone(), rank.buffer(&all));
        group.all_gather(&own, &mut host).unwrap();
        on.all_gather(sent::<T>(&input), &mut received(&mut there)).unwrap();
        gathered("all_gather", &there, &host);

        let whole = rank.buffer(&all);
        group.all_to_all(&all, &mut host).unwrap();
        on.all_to_all(sent::<T>(&whole), &mut received(&mut there)).unwrap();
        gathered("all_to_all", &there, &host);

        let (mut host, mut there) = (own.clone(), rank.buffer(&own));
        group.broadcast(&mut host, n - 1).unwrap();
        on.broadcast(&mut received::<T>(&mut there), n - 1).unwrap();
        gathered("broadcast", &there, &host);

        group.scatter(&all, &mut host, 0).unwrap();
        on.scatter(sent::<T>(&whole), &mut received(&mut there), 0).unwrap();
        gathered("scatter", &there, &host);

        group.shift(&own, &mut host, 1).unwrap();
        on.shift(sent::<T>(&input), &mut received(&mut there), 1).unwrap();
        gathered("shift", &there, &host);

        let counts: Vec<usize> = (0..n).map(|r| len + r).collect();
        let mine = values(me, counts[me], of);
        let input = rank.buffer(&mine);
        let mut host = vec![of(0.0); counts.iter().sum()];
        let mut there = rank.buffer(&host);
        group.all_gather_v(&mine, &mut host, &counts).unwrap();
        on.all_gather_v(sent::<T>(&input), &mut received(&mut there), &counts).unwrap();
        gathered("all_gather_v", &there, &host);

        if n > 1 {
            let (to, from) = ((me + 1) % n, (me + n - 1) % n);
            let input = rank.buffer(&own);
            let mut there = rank.buffer(&vec![of(0.0); len]);
            let messages = &mut [
                DeviceMessage::Recv(received::<T>(&mut there), from),
                DeviceMessage::Send(sent::<T>(&input), to),
            ];
            on.batch(messages).unwrap();
            gathered("batch", &there, &values(from, len, of));
        }
    }
    on.wait().unwrap();
}

#[test]
fn every_verb_gives_the_bits_of_the_host() {
    let found = gpus();
    if found == 0 {
        return println!("no CUDA: nothing was run");
    }
    for gpus in [1, found] {
        for n in 1..=4 {
            on_ranks(n, |group| verbs::<f32>(&group, gpus, |x| x));
        }
        on_ranks(3, |group| verbs::<bf16>(&group, gpus, bf16::from_f32));
        on_ranks(3, |group| verbs::<i64>(&group, gpus, |x| x as i64));
    }
}

#[test]
fn a_mismatch_is_an_error_on_every_rank() {
    if gpus() == 0 {
        return println!("no CUDA: nothing was run");
    }
    let errors = on_ranks(3, |group| {
        let rank = Rank::new(&group, 1);
        let len = if group.rank() == 1 { 5 } else { 4 };
        let mut x = rank.buffer(&vec![1.0f32; len]);
        rank.on().all_reduce(&mut received::<f32>(&mut x), ReduceOp::Sum).unwrap_err()
    });
    for error in errors {
        let text = error.to_string();
        assert!(matches!(error, Error::Mismatch { .. }), "{text}");
        assert!(text.contains("4 x f32") && text.contains("5 x f32"), "{text}");
    }
}

#[test]
fn who_is_late_is_named() {
    if gpus() == 0 {
        return println!("no CUDA: nothing was run");
    }
    let config = Config { timeout: Duration::from_millis(200) };
    let ranks = Group::threads_with(2, config);
    let mut ranks = ranks.into_iter();
    let (first, second) = (ranks.next().unwrap(), ranks.next().unwrap());
    std::thread::scope(|scope| {
        let late = scope.spawn(move || {
            let rank = Rank::new(&second, 1);
            std::thread::sleep(Duration::from_millis(600));
            drop(rank);
        });
        let rank = Rank::new(&first, 1);
        let mut x = rank.buffer(&[1.0f32; 4]);
        let error = rank.on().all_reduce(&mut received::<f32>(&mut x), ReduceOp::Sum).unwrap_err();
        let text = error.to_string();
        assert!(
            matches!(error, Error::Timeout { ref missing, .. } if missing[..] == [1]),
            "{text}"
        );
        late.join().unwrap();
    });
}

#[test]
fn a_thread_gives_back_what_it_kept_for_streams_that_are_gone() {
    let Some(last) = gpus().checked_sub(1) else {
        return println!("no CUDA: nothing was run");
    };
    const BYTES: usize = 48 << 20;
    let name = format!("cuda:{last}");
    let make = || Device::named(&name, 0).unwrap();
    let reserved = |device: &Device| device.stream().map_or(0, |s| s.device().reserved());
    let alive = make();
    let kept = Buffer::on(&alive, BYTES).unwrap();
    let before = reserved(&alive);
    for _ in 0..8 {
        // Its buffer is kept for its next step, and it has none.
        drop(Buffer::on(&make(), BYTES).unwrap());
    }
    // Of a stream that is still used memory is kept.
    drop(kept);
    let device = make();
    let after = reserved(&device);
    // Others may use the device meanwhile, for tests of less than that.
    assert!((before..before + BYTES).contains(&after), "{after} bytes, {before} before");
}

/// A graph goes on to read and write where its work did: nobody else gets that memory meanwhile.
#[test]
fn what_is_recorded_keeps_its_memory() {
    if gpus() == 0 {
        return println!("no CUDA: nothing was run");
    }
    let device = Device::named("cuda", 2).unwrap();
    let scope = Scope::solo().on(&device);
    let floats = |x: f32| Tensor::from_slice(&scope, &[x; 1000], &[1000], Layout::default());
    let held = || {
        let stats = memory_stats_of(&device);
        (stats.in_use, device.stream().unwrap().device().reserved())
    };
    let mut seen = vec![];
    for _ in 0..3 {
        let numbers = Numbers::new(&scope, 4, &[6]).unwrap();
        let ids = numbers.row(0, &[4]).unwrap();
        let table = Tensor::from_slice(
            &scope,
            &(0..6000).map(|i| (i / 1000) as f32).collect::<Vec<_>>(),
            &[6, 1000],
            Layout::default(),
        )
        .unwrap();
        let one = floats(1.0).unwrap();
        // Twice as much, plus one; what lies in between comes and goes.
        let work = || {
            let rows = Tensor::embedding(&table, &ids)?;
            (&rows + &rows)?.add_bias(&one)
        };
        let recorded = no_grad(|| {
            work().unwrap();
            Recorded::new(&scope, work).unwrap()
        });
        // The graph alone has these now.
        drop((table, one));
        let others: Vec<Tensor> = (0..40).map(|i| floats(100.0 + i as f32).unwrap()).collect();
        for ids in [[5, 0, 3, 1], [2, 2, 4, 0]] {
            numbers.set(&ids).unwrap();
            let rows = recorded.launch().unwrap().to_vec().unwrap();
            for (row, id) in rows.chunks(1000).zip(ids) {
                assert!(row.iter().all(|x| *x == 2.0 * id as f32 + 1.0), "{}", row[0]);
            }
        }
        for (i, other) in others.iter().enumerate() {
            let values = other.to_vec().unwrap();
            assert!(values.iter().all(|x| *x == 100.0 + i as f32), "a graph wrote to {i}");
        }
        drop((recorded, others));
        assert!(numbers.set(&[0, 1, 2, 6]).unwrap_err().to_string().contains("outside 0..6"));
        drop((numbers, ids));
        seen.push(held());
    }
    assert!(seen[1..].iter().all(|s| *s == seen[1]) && seen[0].0 == seen[1].0, "{seen:?}");
}
