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
            ("gemm_int8", &[m, n, k]) => {
                let w = Int8Matrix::quantize(&noise::<T>(n * k, 1), n, k);
                let mut room = Room::<T>::new(stream, &[m * k, m * n])?;
                let seconds = time(stream, || {
                    let [x, y] = room.lend();
                    cuda::gemm_int8(stream, x.as_slice(), m, &w, None, y)
                })?;
                // Eight bits go at twice the speed.
                let bytes = n * k + m * (n + k) * size;
                (seconds, Work { bytes, flops: (m * n * k) as f64 })
            }
            ("gemm_fp8" | "gemm_fp8_blocks", &[m, n, k]) => {
                let format = Fp8::E4m3;
                let [rows, blocks] = match case {
                    "gemm_fp8" => [Fp8Scaling::Tensor; 2],
                    _ => [Fp8Scaling::Rows, Fp8Scaling::Blocks],
                };
                let mut room = Room::<T>::new(stream, &[m * k, n * k, m * n])?;
                let mut sides = vec![];
                for (rows, scaling) in [(m, rows), (n, blocks)] {
                    let (size, count) = (rows * fp8_pitch(k), scaling.count(rows, k));
                    let mut block = Block::new(stream.device(), size)?;
                    let mut scales = Block::new(stream.device(), 4 * count)?;
                    let [x, w, _] = room.lend();
                    let from = if sides.is_empty() { x.as_slice() } else { w.as_slice() };
                    let (to, s) = (block.slice_mut(0..size), scales.slice_mut(0..count));
                    cuda::quantize_fp8(stream, from, rows, k, false, format, scaling, to, s)?;
                    sides.push((block, scales, rows, scaling));
                }
                let mats: Vec<cuda::Fp8Mat<'_>> = sides
                    .iter()
                    .map(|(block, scales, rows, scaling)| cuda::Fp8Mat {
                        data: block.slice(0..rows * fp8_pitch(k)),
                        scales: scales.slice(0..scaling.count(*rows, k)),
                        rows: *rows,
                        cols: k,
                        format,
                        scaling: *scaling,
                    })
                    .collect();
                let seconds = time(stream, || {
                    let [_, _, y] = room.lend();
                    cuda::gemm_fp8(stream, mats[0], mats[1], None, false, y)
                })?;
                let bytes = (m + n) * k + m * n * size;
                (seconds, Work { bytes, flops: (m * n * k) as f64 })
            }
            ("paged_attention", &[batch, len, heads, kv_heads, head_dim]) => {
                let s = PagedShape { batch, heads, kv_heads, head_dim, page: 16, scale: 0.1 };
                let pages = batch * len.div_ceil(16);
                let (q, kv) = (batch * heads * head_dim, pages * 16 * kv_heads * head_dim);
                let mut room = Room::<T>::new(stream, &[q, kv, kv, q])?;
                let mut lse = Room::<f32>::new(stream, &[batch * heads])?;
                // Every sequence's pages lie far apart.
                let table: Vec<i32> = (0..pages)
                    .map(|i| (i % (pages / batch) * batch + i / (pages / batch)) as i32)
                    .collect();
                let mut there = Block::new(stream.device(), 4 * (pages + batch))?;
                stream.upload(&table, there.slice_mut(0..pages))?;
                let lens = vec![len as i32; batch];
                stream.upload(&lens, there.slice_mut(pages..pages + batch))?;
                let seconds = time(stream, || {
                    let [q, k, v, out] = room.lend();
                    let (q, k, v) = (q.as_slice(), k.as_slice(), v.as_slice());
                    let [lse] = lse.lend();
                    let (table, lens) = (there.slice(0..pages), there.slice(pages..pages + batch));
                    cuda::paged_attention(stream, &s, q, k, v, table, lens, out, lse)
                })?;
                (seconds, Work { bytes: 2 * (kv + q) * size, flops: 0.0 })
            }
            ("conv2d", &[batch, channels, out_channels, side, kernel]) => {
                let padding = [0, kernel / 2, kernel / 2];
                let s = ConvShape::conv2d(batch, channels, out_channels, [side; 2], [kernel; 2]);
                let s = ConvShape { padding, ..s };
                let places = s.out_size().iter().product::<usize>();
                let sizes = [
                    batch * channels * side * side,
                    out_channels * channels * kernel * kernel,
                    batch * out_channels * places,
                ];
                let mut room = Room::<T>::new(stream, &sizes)?;
                let seconds = time(stream, || {
                    let [x, w, y] = room.lend();
                    cuda::conv(stream, &s, x.as_slice(), w.as_slice(), y)
                })?;
                let flops = 2.0 * (sizes[2] * channels * kernel * kernel) as f64;
                (seconds, Work { bytes: sizes.iter().sum::<usize>() * size, flops })
            }
            ("embedding_backward", &[tokens, vocab, dim]) => {
                let ids: Vec<i32> = (0..tokens).map(|t| (t * t * 31 % vocab) as i32).collect();
                let mut there = Block::new(stream.device(), 4 * tokens)?;
                stream.upload(&ids, there.slice_mut(0..tokens))?;
                let mut room = Room::<T>::new(stream, &[tokens * dim])?;
                let mut table = Room::<f32>::new(stream, &[vocab * dim])?;
                let seconds = time(stream, || {
                    let ([dy], [dtable]) = (room.lend(), table.lend());
                    let (ids, dy) = (there.slice(0..tokens), dy.as_slice());
                    cuda::embedding_backward(stream, ids, dy, dim, dtable)
                })?;
                (seconds, Work { bytes: tokens * dim * (size + 8), flops: 0.0 })
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
