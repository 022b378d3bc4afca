//! CUDA kernels at a prompt, for `cargo xtask gpu`: each line names a case, as
//! `attention_forward bf16 1 8192 32 8 128`; the answer is its calls per second (median over rounds of
//! calls between two events) and what the GPU would allow: a copy of the bytes that must move, or
//! the multiply-adds at the speed of a large product. Both are measured here first.
#![forbid(unsafe_code)]

use colossal_kernels::cuda::{self, Block, Result, Slice, SliceMut, Stream};
use colossal_kernels::*;
use half::bf16;

fn main() -> Result<()> {
    let stream = Stream::new(0)?;
    let bench = Bench { copy: copy_speed(&stream)?, peak: peak(&stream)?, stream };
    println!("{{\"name\": \"colossal-kernels on {}\"}}", bench.stream.device().name());
    for line in std::io::stdin().lines().map_while(std::result::Result::ok) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let n: Vec<usize> = words.iter().skip(2).filter_map(|w| w.parse().ok()).collect();
        let answer = match words.get(1).copied() {
            Some("f32") => bench.answer::<f32>(words[0], &n),
            Some("bf16") => bench.answer::<bf16>(words[0], &n),
            _ => Ok(None),
        };
        match answer {
            Ok(Some((seconds, floor))) => {
                println!("{{\"speed\": {}, \"floor\": {}}}", 1.0 / seconds, 1.0 / floor);
            }
            Ok(None) => println!("{{\"error\": \"no such case: {}\"}}", line.replace('"', "'")),
            Err(e) => println!("{{\"error\": \"{}\"}}", e.to_string().replace('"', "'")),
        }
    }
    Ok(())
}

struct Bench {
    stream: Stream,
    /// Bytes read and written per second by a copy.
    copy: f64,
    /// Multiply-adds, counted twice, per second of a large product in bf16.
    peak: f64,
}

/// What a call must do at least.
#[derive(Default)]
struct Work {
    bytes: usize,
    flops: f64,
}

/// Seconds of a call: the median of rounds of a few.
fn time(stream: &Stream, mut call: impl FnMut() -> Result<()>) -> Result<f64> {
    for _ in 0..3 {
        call()?;
    }
    let mut rounds = vec![];
    for _ in 0..20 {
        let start = stream.record_timed()?;
        for _ in 0..5 {
            call()?;
        }
        rounds.push(start.until(&stream.record_timed()?)?);
    }
    rounds.sort_by(f32::total_cmp);
    Ok(f64::from(rounds[10]) / 5e3)
}

fn copy_speed(stream: &Stream) -> Result<f64> {
    const BYTES: usize = 512 << 20;
    let (from, mut to) = (Block::new(stream.device(), BYTES)?, Block::new(stream.device(), BYTES)?);
    let seconds = time(stream, || stream.copy::<u8>(from.slice(0..BYTES), to.slice_mut(0..BYTES)))?;
    Ok(2.0 * BYTES as f64 / seconds)
}

fn peak(stream: &Stream) -> Result<f64> {
    const N: usize = 8192;
    let mut room = Room::<bf16>::new(stream, &[N * N, N * N, N * N])?;
    let seconds = time(stream, || {
        let [a, b, c] = room.lend();
        product(stream, [N, N, N], a.as_slice(), b.as_slice(), None, c)
    })?;
    Ok(2.0 * (N as f64).powi(3) / seconds)
}

/// Operands of one type, filled with noise.
struct Room<T> {
    blocks: Vec<(Block, usize)>,
    element: std::marker::PhantomData<T>,
}

impl<T: Float> Room<T> {
    fn new(stream: &Stream, sizes: &[usize]) -> Result<Room<T>> {
        let mut blocks = vec![];
        for (i, n) in sizes.iter().enumerate() {
            let mut block = Block::new(stream.device(), n * size_of::<T>())?;
            stream.upload(&noise::<T>(*n, i as u32), block.slice_mut(0..*n))?;
            blocks.push((block, *n));
        }
        Ok(Room { blocks, element: std::marker::PhantomData })
    }

    fn lend<const N: usize>(&mut self) -> [SliceMut<'_, T>; N] {
        let mut blocks = self.blocks.iter_mut();
        std::array::from_fn(|_| {
            let (block, n) = blocks.next().expect("a case asks for what it made");
            block.slice_mut(0..*n)
        })
    }
}

fn noise<T: Float>(n: usize, seed: u32) -> Vec<T> {
    let mut state = seed | 1;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        T::from_f32(state as f32 / 2f32.powi(31) - 1.0)
    };
    (0..n).map(|_| next()).collect()
}

/// `c [m, n] = a [m, k] bᵀ + bias` with `b [n, k]`.
fn product<T: Float>(
    stream: &Stream,
    [m, n, k]: [usize; 3],
    a: Slice<'_, T>,
    b: Slice<'_, T>,
    bias: Option<Slice<'_, T>>,
    c: SliceMut<'_, T>,
) -> Result<()> {
    let (a, b) = (cuda::Mat::new(a, m, k), cuda::Mat::new(b, n, k).t());
    let epilogue = cuda::Epilogue { bias, ..cuda::Epilogue::default() };
    cuda::gemm(stream, a, b, cuda::MatMut::new(c, m, n), &epilogue)
}

impl Bench {
    /// Seconds of a call, and the least that it could take.
    fn answer<T: Float>(&self, case: &str, n: &[usize]) -> Result<Option<(f64, f64)>> {
        let Some((seconds, work)) = self.case::<T>(case, n)? else { return Ok(None) };
        let floor = (work.bytes as f64 / self.copy).max(work.flops / self.peak);
        Ok(Some((seconds, floor)))
    }

    fn case<T: Float>(&self, case: &str, n: &[usize]) -> Result<Option<(f64, Work)>> {
        let stream = &self.stream;
        let size = size_of::<T>();
        Ok(Some(match (case, n) {
            ("gemm" | "gemm_bias", &[m, n, k]) => {
                let mut room = Room::<T>::new(stream, &[m * k, n * k, n, m * n])?;
                let seconds = time(stream, || {
                    let [a, b, bias, c] = room.lend();
                    let bias = (case == "gemm_bias").then(|| bias.as_slice());
                    product(stream, [m, n, k], a.as_slice(), b.as_slice(), bias, c)
                })?;
                let bytes = (m * k + n * k + m * n) * size;
                (seconds, Work { bytes, flops: 2.0 * (m * n * k) as f64 })
            }
            ("attention_forward" | "attention_backward", &[batch, len, heads, kv_heads, d]) => {
                let s = AttentionShape::new(batch, len, len, heads, kv_heads, d);
                let (q, kv) = (batch * len * heads * d, batch * len * kv_heads * d);
                let mut room = Room::<T>::new(stream, &[q, kv, kv, q, q, q, kv, kv])?;
                let mut lse = Room::<f32>::new(stream, &[batch * heads * len])?;
                let mut forward = || {
                    let [q, k, v, out] = room.lend();
                    let (q, k, v) = (q.as_slice(), k.as_slice(), v.as_slice());
                    let [lse] = lse.lend();
                    cuda::flash_attention(stream, &s, q, k, v, out, lse)
                };
                let forward_time = time(stream, &mut forward)?;
                let flops = 2.0 * (batch * heads * d) as f64 * (len as f64).powi(2);
                if case == "attention_forward" {
                    return Ok(Some((forward_time, Work { bytes: 2 * (q + kv) * size, flops })));
                }
                let seconds = time(stream, || {
                    let [q, k, v, out, dout, dq, dk, dv] = room.lend();
                    let (q, k, v) = (q.as_slice(), k.as_slice(), v.as_slice());
                    let (out, dout) = (out.as_slice(), dout.as_slice());
                    let [lse] = lse.lend();
                    let lse = lse.as_slice();
                    cuda::flash_attention_backward(stream, &s, q, k, v, out, lse, dout, dq, dk, dv)
                })?;
                (seconds, Work { bytes: 4 * (q + kv) * size, flops: 2.5 * flops })
            }
            ("rms_norm", &[rows, dim]) => {
                let mut room = Room::<T>::new(stream, &[rows * dim, dim, rows * dim])?;
                let mut rstd = Room::<f32>::new(stream, &[rows])?;
                let seconds = time(stream, || {
                    let [x, w, y] = room.lend();
                    let [rstd] = rstd.lend();
                    cuda::rms_norm(stream, x.as_slice(), w.as_slice(), 1e-5, y, rstd)
                })?;
                (seconds, Work { bytes: 2 * rows * dim * size, flops: 0.0 })
            }
            ("layer_norm", &[rows, dim]) => {
                let mut room = Room::<T>::new(stream, &[rows * dim, dim, dim, rows * dim])?;
                let mut stats = Room::<f32>::new(stream, &[rows, rows])?;
                let seconds = time(stream, || {
                    let [x, w, b, y] = room.lend();
                    let [mean, rstd] = stats.lend();
                    let (x, w, b) = (x.as_slice(), w.as_slice(), b.as_slice());
                    cuda::layer_norm(stream, x, w, b, 1e-5, y, mean, rstd)
                })?;
                (seconds, Work { bytes: 2 * rows * dim * size, flops: 0.0 })
            }
            ("swiglu", &[rows, dim]) => {
                let mut room = Room::<T>::new(stream, &[rows * dim; 3])?;
                let seconds = time(stream, || {
                    let [gate, up, y] = room.lend();
                    cuda::swiglu(stream, gate.as_slice(), up.as_slice(), y)
                })?;
                (seconds, Work { bytes: 3 * rows * dim * size, flops: 0.0 })
            }
            ("cross_entropy", &[rows, vocab]) => {
                let mut room = Room::<T>::new(stream, &[rows * vocab])?;
                let mut stats = Room::<f32>::new(stream, &[rows, rows])?;
                let targets: Vec<i32> = (0..rows).map(|r| (r * 37 % vocab) as i32).collect();
                let mut there = Block::new(stream.device(), 4 * rows)?;
                stream.upload(&targets, there.slice_mut(0..rows))?;
                let seconds = time(stream, || {
                    let [logits] = room.lend();
                    let [loss, lse] = stats.lend();
                    let targets = there.slice(0..rows);
                    cuda::cross_entropy(stream, logits.as_slice(), targets, vocab, -100, loss, lse)
                })?;
                (seconds, Work { bytes: rows * vocab * size, flops: 0.0 })
            }
            ("adamw", &[n]) => {
                let mut room = Room::<f32>::new(stream, &[n; 4])?;
                let (beta1, beta2) = (0.9, 0.999);
                let rule = AdamW { lr: 1e-3, beta1, beta2, eps: 1e-8, weight_decay: 0.01 };
                let seconds = time(stream, || {
                    let [p, g, m, v] = room.lend();
                    cuda::adamw(stream, &rule, 9, p, g.as_slice(), m, v, 1.0)
                })?;
                (seconds, Work { bytes: 7 * 4 * n, flops: 0.0 })
            }
            _ => return Ok(None),
        }))
    }
}
