//! Every kernel, wherever its operands lie.
//!
//! The names and arguments are those of [`colossal_kernels`], with views for slices. If any operand
//! is on a GPU the CUDA twin is put on its stream, and operands on the host are copied there first;
//! a kernel without a twin runs on the host, between copies.

use colossal_kernels::cuda::{self, Stream};
use colossal_kernels::{Adafactor, AdamW, Came, Factors, Lamb, Lars, Lion, Piece, Sum};
use colossal_kernels::{AttentionShape, Float, Int8Matrix};

use crate::device::Device;
use crate::error::Result;
use crate::storage::Buffer;
use crate::view::{View, ViewMut};

/// An argument of a kernel.
trait Operand: Sized {
    /// It as the host's kernel takes it.
    type Host: Lend;
    /// It as the CUDA kernel takes it.
    type Cuda: Lend;
    /// The stream that it belongs to, if it is on a GPU.
    fn stream(&self) -> Option<&Stream> {
        None
    }
    fn on_host(self) -> Result<Self::Host>;
    fn on_cuda(self, stream: &Stream) -> Result<Self::Cuda>;
}

/// An argument made ready, with what it stands on.
trait Lend: Sized {
    type Lent<'a>
    where
        Self: 'a;
    fn lend(&mut self) -> Self::Lent<'_>;
    /// After the kernel: copies results to where they belong.
    fn finish(self) -> Result<()> {
        Ok(())
    }
}

/// Runs a kernel of the host on operands wherever they are.
macro_rules! on_host {
    (($($x:ident),*) => $call:expr) => {{
        $(let mut $x = Operand::on_host($x)?;)*
        let result = { $(let $x = $x.lend();)* $call };
        $($x.finish()?;)*
        result
    }};
}

/// Runs a CUDA kernel on a stream.
macro_rules! on_cuda {
    ($stream:ident, ($($x:ident),*) => $call:expr) => {{
        $(let mut $x = Operand::on_cuda($x, &$stream)?;)*
        { $(let $x = $x.lend();)* $call }?
    }};
}

/// The first stream among operands.
macro_rules! stream_of {
    ($($x:ident),*) => { None$(.or(Operand::stream(&$x)))*.cloned() };
}

/// Kernels with a CUDA twin.
macro_rules! twins {
    ($($(#[$doc:meta])* $name:ident($($x:ident: $t:ty),* $(,)?);)*) => { $(
        $(#[$doc])*
        #[doc = concat!("[`colossal_kernels::", stringify!($name), "`]")]
        pub fn $name<T: Float>($($x: $t),*) -> Result<()> {
            match stream_of!($($x),*) {
                Some(stream) => on_cuda!(stream, ($($x),*) => cuda::$name(&stream, $($x),*)),
                None => on_host!(($($x),*) => colossal_kernels::$name($($x),*)),
            }
            Ok(())
        }
    )* };
}

twins! {
    add(a: View<'_, T>, b: View<'_, T>, y: ViewMut<'_, T>);
    mul(a: View<'_, T>, b: View<'_, T>, y: ViewMut<'_, T>);
    scale(x: View<'_, T>, s: f32, y: ViewMut<'_, T>);
    add_assign(x: View<'_, T>, y: ViewMut<'_, T>);
    add_into(x: View<'_, T>, y: ViewMut<'_, f32>);
    add_bias(x: View<'_, T>, bias: View<'_, T>, y: ViewMut<'_, T>);
    silu(x: View<'_, T>, y: ViewMut<'_, T>);
    silu_backward(dy: View<'_, T>, x: View<'_, T>, dx: ViewMut<'_, T>);
    gelu(x: View<'_, T>, y: ViewMut<'_, T>);
    gelu_backward(dy: View<'_, T>, x: View<'_, T>, dx: ViewMut<'_, T>);
    gelu_tanh(x: View<'_, T>, y: ViewMut<'_, T>);
    gelu_tanh_backward(dy: View<'_, T>, x: View<'_, T>, dx: ViewMut<'_, T>);
    relu(x: View<'_, T>, y: ViewMut<'_, T>);
    relu_backward(dy: View<'_, T>, x: View<'_, T>, dx: ViewMut<'_, T>);
    swiglu(gate: View<'_, T>, up: View<'_, T>, y: ViewMut<'_, T>);
    swiglu_backward(
        dy: View<'_, T>, gate: View<'_, T>, up: View<'_, T>,
        dgate: ViewMut<'_, T>, dup: ViewMut<'_, T>,
    );
    rms_norm(
        x: View<'_, T>, weight: View<'_, T>, eps: f32, y: ViewMut<'_, T>, rstd: ViewMut<'_, f32>,
    );
    rms_norm_backward(
        dy: View<'_, T>, x: View<'_, T>, weight: View<'_, T>, rstd: View<'_, f32>,
        dx: ViewMut<'_, T>, dweight: ViewMut<'_, f32>,
    );
    layer_norm(
        x: View<'_, T>, weight: View<'_, T>, bias: View<'_, T>, eps: f32,
        y: ViewMut<'_, T>, mean: ViewMut<'_, f32>, rstd: ViewMut<'_, f32>,
    );
    layer_norm_backward(
        dy: View<'_, T>, x: View<'_, T>, weight: View<'_, T>, mean: View<'_, f32>,
        rstd: View<'_, f32>, dx: ViewMut<'_, T>, dweight: ViewMut<'_, f32>,
        dbias: ViewMut<'_, f32>,
    );
    softmax(x: View<'_, T>, dim: usize, y: ViewMut<'_, T>);
    softmax_backward(dy: View<'_, T>, y: View<'_, T>, dim: usize, dx: ViewMut<'_, T>);
    sum_rows(x: View<'_, T>, dim: usize, out: ViewMut<'_, f32>);
    embedding(ids: View<'_, i32>, table: View<'_, T>, dim: usize, y: ViewMut<'_, T>);
    embedding_backward(
        ids: View<'_, i32>, dy: View<'_, T>, dim: usize, dtable: ViewMut<'_, f32>,
    );
    rope(
        x: View<'_, T>, positions: View<'_, i32>, cos: View<'_, f32>, sin: View<'_, f32>,
        heads: usize, head_dim: usize, y: ViewMut<'_, T>,
    );
    rope_backward(
        dy: View<'_, T>, positions: View<'_, i32>, cos: View<'_, f32>, sin: View<'_, f32>,
        heads: usize, head_dim: usize, dx: ViewMut<'_, T>,
    );
    cross_entropy(
        logits: View<'_, T>, targets: View<'_, i32>, vocab: usize, ignore: i32,
        loss: ViewMut<'_, f32>, lse: ViewMut<'_, f32>,
    );
    cross_entropy_backward(
        dloss: View<'_, f32>, targets: View<'_, i32>, vocab: usize, ignore: i32,
        lse: View<'_, f32>, logits_to_grad: ViewMut<'_, T>,
    );
    combine_rows(
        at: View<'_, i32>, weights: View<'_, f32>, k: usize, rows: View<'_, T>, width: usize,
        y: ViewMut<'_, T>,
    );
    combine_rows_backward(
        at: View<'_, i32>, weights: View<'_, f32>, k: usize, rows: View<'_, T>, width: usize,
        dy: View<'_, T>, drows: ViewMut<'_, T>, dweights: ViewMut<'_, f32>,
    );
    scatter_rows(x: View<'_, T>, index: View<'_, i32>, width: usize, y: ViewMut<'_, T>);
    sum_groups(x: View<'_, T>, times: usize, width: usize, y: ViewMut<'_, T>);
    dropout(
        x: View<'_, T>, keys: View<'_, u64>, first: View<'_, u64>, width: usize, p: f32,
        y: ViewMut<'_, T>,
    );
    logits_stats(
        logits: View<'_, T>, vocab: usize, max: ViewMut<'_, f32>, sum: ViewMut<'_, f32>,
    );
}

/// A strided matrix, as [`colossal_kernels::Mat`].
#[derive(Debug, Clone, Copy)]
pub struct Mat<'a, T> {
    /// The elements.
    pub data: View<'a, T>,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Distance between rows.
    pub row_stride: usize,
    /// Distance between columns.
    pub col_stride: usize,
}

impl<'a, T> Mat<'a, T> {
    /// A dense row-major matrix.
    pub fn new(data: View<'a, T>, rows: usize, cols: usize) -> Mat<'a, T> {
        Mat { data, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// Its transpose, without moving anything.
    pub fn t(self) -> Mat<'a, T> {
        let Mat { data, rows, cols, row_stride, col_stride } = self;
        Mat { data, rows: cols, cols: rows, row_stride: col_stride, col_stride: row_stride }
    }
}

/// `c [rows, cols] = act(alpha * a b + bias)`, or `+=`: [`colossal_kernels::gemm`]. `c` is dense.
pub fn gemm<T: Float, O: Float>(
    a: Mat<'_, T>,
    b: Mat<'_, T>,
    c: ViewMut<'_, O>,
    bias: Option<View<'_, T>>,
    accumulate: bool,
) -> Result<()> {
    let (x, y) = (a.data, b.data);
    let (rows, cols) = (a.rows, b.cols);
    macro_rules! product {
        ($module:ident, $x:ident, $y:ident, $c:ident, $bias:ident $(, $stream:expr)?) => {{
            let [a, b] = [(a, $x), (b, $y)].map(|(m, data)| $module::Mat {
                data,
                rows: m.rows,
                cols: m.cols,
                row_stride: m.row_stride,
                col_stride: m.col_stride,
            });
            let e = $module::Epilogue { bias: $bias, accumulate, ..Default::default() };
            $module::gemm($($stream,)? a, b, $module::MatMut::new($c, rows, cols), &e)
        }};
    }
    match stream_of!(x, y, c, bias) {
        Some(stream) => {
            on_cuda!(stream, (x, y, c, bias) => product!(cuda, x, y, c, bias, &stream))
        }
        None => on_host!((x, y, c, bias) => product!(colossal_kernels, x, y, c, bias)),
    }
    Ok(())
}

/// A matrix within an operand of [`gemm_grouped`]: where it begins, and how it lies.
#[derive(Debug, Clone, Copy)]
pub struct Part {
    at: usize,
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl Part {
    /// A dense row-major matrix that begins at an element.
    pub fn new(at: usize, rows: usize, cols: usize) -> Part {
        Part { at, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// Its transpose, without moving anything.
    pub fn t(self) -> Part {
        let Part { at, rows, cols, row_stride, col_stride } = self;
        Part { at, rows: cols, cols: rows, row_stride: col_stride, col_stride: row_stride }
    }
}

/// [`colossal_kernels::gemm_grouped`], products of parts `(a, b, where the result begins)` of `x`
/// and `w`.
pub fn gemm_grouped<T: Float, O: Float>(
    x: View<'_, T>,
    w: View<'_, T>,
    parts: &[(Part, Part, usize)],
    y: ViewMut<'_, O>,
    accumulate: bool,
) -> Result<()> {
    macro_rules! products {
        ($module:ident, $x:ident, $w:ident, |$data:ident: $ty:ty, $from:ident| $tail:expr) => {{
            let product = |(a, b, at): &(Part, Part, usize)| {
                let [a, b] = [($x, a), ($w, b)].map(|($data, p): ($ty, &Part)| {
                    let $from = p.at;
                    $module::Mat {
                        data: $tail,
                        rows: p.rows,
                        cols: p.cols,
                        row_stride: p.row_stride,
                        col_stride: p.col_stride,
                    }
                });
                $module::Product { a, b, at: *at }
            };
            parts.iter().map(product).collect::<Vec<_>>()
        }};
    }
    match stream_of!(x, w, y) {
        Some(stream) => on_cuda!(stream, (x, w, y) => {
            let e = cuda::Epilogue { accumulate, ..Default::default() };
            let list = products!(cuda, x, w, |data: cuda::Slice<'_, T>, from| data.range(from..data.len()));
            cuda::gemm_grouped(&stream, &list, y, &e)
        }),
        None => on_host!((x, w, y) => {
            let e = colossal_kernels::Epilogue { accumulate, ..Default::default() };
            let list = products!(colossal_kernels, x, w, |data: &[T], from| &data[from..]);
            colossal_kernels::gemm_grouped(&list, y, &e);
        }),
    }
    Ok(())
}

/// [`colossal_kernels::copy_block`]
pub fn copy_block<T: bytemuck::Pod + Send + Sync>(
    x: View<'_, T>,
    from: [usize; 2],
    sizes: [usize; 3],
    y: ViewMut<'_, T>,
    to: [usize; 2],
) -> Result<()> {
    match stream_of!(x, y) {
        Some(stream) => {
            on_cuda!(stream, (x, y) => cuda::copy_block(&stream, x, from, sizes, y, to))
        }
        None => on_host!((x, y) => colossal_kernels::copy_block(x, from, sizes, y, to)),
    }
    Ok(())
}

/// [`colossal_kernels::flash_attention`]
pub fn flash_attention<T: Float>(
    shape: &AttentionShape<'_>,
    q: View<'_, T>,
    k: View<'_, T>,
    v: View<'_, T>,
    out: ViewMut<'_, T>,
    lse: ViewMut<'_, f32>,
) -> Result<()> {
    match stream_of!(q, k, v, out, lse) {
        Some(stream) => on_cuda!(stream, (q, k, v, out, lse) => {
            cuda::flash_attention(&stream, shape, q, k, v, out, lse)
        }),
        None => on_host!((q, k, v, out, lse) => {
            colossal_kernels::flash_attention(shape, q, k, v, out, lse);
        }),
    }
    Ok(())
}

/// [`colossal_kernels::flash_attention_backward`]
pub fn flash_attention_backward<T: Float>(
    shape: &AttentionShape<'_>,
    q: View<'_, T>,
    k: View<'_, T>,
    v: View<'_, T>,
    out: View<'_, T>,
    lse: View<'_, f32>,
    dout: View<'_, T>,
    dq: ViewMut<'_, T>,
    dk: ViewMut<'_, T>,
    dv: ViewMut<'_, T>,
) -> Result<()> {
    match stream_of!(q, k, v, out, lse, dout, dq, dk, dv) {
        Some(stream) => on_cuda!(stream, (q, k, v, out, lse, dout, dq, dk, dv) => {
            cuda::flash_attention_backward(
                &stream, shape, q, k, v, out, lse, dout, dq, dk, dv,
            )
        }),
        None => on_host!((q, k, v, out, lse, dout, dq, dk, dv) => {
            colossal_kernels::flash_attention_backward(
                shape, q, k, v, out, lse, dout, dq, dk, dv,
            );
        }),
    }
    Ok(())
}

/// [`colossal_kernels::gemm_int8`]
pub fn gemm_int8<T: Float>(
    x: View<'_, T>,
    m: usize,
    w: &Int8Matrix,
    bias: Option<View<'_, T>>,
    y: ViewMut<'_, T>,
) -> Result<()> {
    match stream_of!(x, y, bias) {
        Some(stream) => {
            on_cuda!(stream, (x, bias, y) => cuda::gemm_int8(&stream, x, m, w, bias, y))
        }
        None => on_host!((x, bias, y) => colossal_kernels::gemm_int8(x, m, w, bias, y)),
    }
    Ok(())
}

/// [`colossal_kernels::cast`]
pub fn cast<A: Float, B: Float>(x: View<'_, A>, y: ViewMut<'_, B>) -> Result<()> {
    match stream_of!(x, y) {
        Some(stream) => on_cuda!(stream, (x, y) => cuda::cast(&stream, x, y)),
        None => on_host!((x, y) => colossal_kernels::cast(x, y)),
    }
    Ok(())
}

/// [`colossal_kernels::sum`], into one element.
pub fn sum<T: Float>(x: View<'_, T>, y: ViewMut<'_, f32>) -> Result<()> {
    match stream_of!(x, y) {
        Some(stream) => on_cuda!(stream, (x, y) => cuda::sum(&stream, x, y)),
        None => on_host!((x, y) => y[0] = colossal_kernels::sum(x)),
    }
    Ok(())
}

/// Sums of squares of many vectors, read together at the end: a GPU is waited for once.
#[derive(Debug)]
pub struct SquareSums {
    known: Vec<f64>,
    /// Room for as many on a GPU.
    there: Option<Buffer>,
    count: usize,
}

impl SquareSums {
    /// Room for `most` vectors on `device`.
    pub fn new(device: &Device, most: usize) -> Result<SquareSums> {
        let there = match device {
            Device::Cpu => None,
            Device::Cuda(_) => Some(Buffer::on(device, most * size_of::<f64>())?),
        };
        Ok(SquareSums { known: vec![], there, count: 0 })
    }

    /// Takes one more.
    pub fn add(&mut self, x: View<'_, f32>) -> Result<()> {
        match (x, &mut self.there) {
            (View::Cuda(stream, x), Some(there)) => {
                let slot = there.view_mut::<f64>().range(self.count..self.count + 1);
                let mut slot = slot.on_cuda(stream)?;
                cuda::sum_of_squares(stream, x, slot.lend())?;
            }
            (x, _) => self.known.push(on_host!((x) => colossal_kernels::sum_of_squares(x))),
        }
        self.count += 1;
        Ok(())
    }

    /// All of them, in the order in which they were added.
    pub fn finish(self) -> Result<Vec<f64>> {
        let Some(there) = self.there else { return Ok(self.known) };
        let mut sums = vec![0.0; self.count];
        there.view::<f64>().range(0..self.count).read(&mut sums)?;
        Ok(sums)
    }
}

/// [`colossal_kernels::fill`]
pub fn fill<T: Float>(y: ViewMut<'_, T>, value: T) -> Result<()> {
    match stream_of!(y) {
        Some(stream) => on_cuda!(stream, (y) => cuda::fill(&stream, y, value)),
        None => on_host!((y) => colossal_kernels::fill(y, value)),
    }
    Ok(())
}

/// [`colossal_kernels::fill_columns`]
pub fn fill_columns<T: Float>(
    y: ViewMut<'_, T>,
    width: usize,
    from: usize,
    value: T,
) -> Result<()> {
    match stream_of!(y) {
        Some(stream) => on_cuda!(stream, (y) => cuda::fill_columns(&stream, y, width, from, value)),
        None => on_host!((y) => colossal_kernels::fill_columns(y, width, from, value)),
    }
    Ok(())
}

/// [`AdamW::step_grad_scale`]
pub fn adamw(
    rule: &AdamW,
    t: u32,
    params: ViewMut<'_, f32>,
    grads: View<'_, f32>,
    m: ViewMut<'_, f32>,
    v: ViewMut<'_, f32>,
    grad_scale: f32,
) -> Result<()> {
    match stream_of!(params, grads, m, v) {
        Some(stream) => on_cuda!(stream, (params, grads, m, v) => {
            cuda::adamw(&stream, rule, t, params, grads, m, v, grad_scale)
        }),
        None => {
            on_host!((params, grads, m, v) => rule.step_grad_scale(t, params, grads, m, v, grad_scale))
        }
    }
    Ok(())
}

/// [`AdamW::step_masters`]
pub fn adamw_masters<T: Float>(
    rule: &AdamW,
    t: u32,
    grad_scale: f32,
    master: ViewMut<'_, f32>,
    params: ViewMut<'_, T>,
    grads: View<'_, f32>,
    m: ViewMut<'_, f32>,
    v: ViewMut<'_, f32>,
) -> Result<()> {
    match stream_of!(master, params, grads, m, v) {
        Some(stream) => on_cuda!(stream, (master, params, grads, m, v) => {
            cuda::adamw_masters(&stream, rule, t, grad_scale, master, params, grads, m, v)
        }),
        None => {
            on_host!((master, params, grads, m, v) => rule.step_masters(t, grad_scale, master, params, grads, m, v))
        }
    }
    Ok(())
}

/// [`Lion::step`]
pub fn lion(
    rule: &Lion,
    params: ViewMut<'_, f32>,
    grads: View<'_, f32>,
    m: ViewMut<'_, f32>,
    grad_scale: f32,
) -> Result<()> {
    match stream_of!(params, grads, m) {
        Some(stream) => {
            on_cuda!(stream, (params, grads, m) => cuda::lion(&stream, rule, params, grads, m, grad_scale))
        }
        None => on_host!((params, grads, m) => rule.step(params, grads, m, grad_scale)),
    }
    Ok(())
}

/// [`Lamb::step`]
pub fn lamb(
    rule: &Lamb,
    t: u32,
    params: ViewMut<'_, f32>,
    grads: View<'_, f32>,
    m: ViewMut<'_, f32>,
    v: ViewMut<'_, f32>,
    grad_scale: f32,
    sum: Sum<'_>,
) -> Result<()> {
    match stream_of!(params, grads, m, v) {
        Some(stream) => on_cuda!(stream, (params, grads, m, v) => {
            cuda::lamb(&stream, rule, t, params, grads, m, v, grad_scale, sum)
        }),
        None => {
            on_host!((params, grads, m, v) => rule.step(t, params, grads, m, v, grad_scale, sum))
        }
    }
    Ok(())
}

/// [`Lars::step`]
pub fn lars(
    rule: &Lars,
    params: ViewMut<'_, f32>,
    grads: View<'_, f32>,
    m: ViewMut<'_, f32>,
    grad_scale: f32,
    sum: Sum<'_>,
) -> Result<()> {
    match stream_of!(params, grads, m) {
        Some(stream) => on_cuda!(stream, (params, grads, m) => {
            cuda::lars(&stream, rule, params, grads, m, grad_scale, sum)
        }),
        None => on_host!((params, grads, m) => rule.step(params, grads, m, grad_scale, sum)),
    }
    Ok(())
}

/// [`Adafactor::step`]
pub fn adafactor(
    rule: &Adafactor,
    t: u32,
    piece: &Piece,
    params: ViewMut<'_, f32>,
    grads: View<'_, f32>,
    state: &mut Factors,
    grad_scale: f32,
    sum: Sum<'_>,
) -> Result<()> {
    match stream_of!(params, grads) {
        Some(stream) => on_cuda!(stream, (params, grads) => {
            cuda::adafactor(&stream, rule, t, piece, params, grads, state, grad_scale, sum)
        }),
        None => {
            on_host!((params, grads) => rule.step(t, piece, params, grads, state, grad_scale, sum))
        }
    }
    Ok(())
}

/// [`Came::step`]
pub fn came(
    rule: &Came,
    piece: &Piece,
    params: ViewMut<'_, f32>,
    grads: View<'_, f32>,
    m: ViewMut<'_, f32>,
    states: [&mut Factors; 2],
    grad_scale: f32,
    sum: Sum<'_>,
) -> Result<()> {
    match stream_of!(params, grads, m) {
        Some(stream) => on_cuda!(stream, (params, grads, m) => {
            cuda::came(&stream, rule, piece, params, grads, m, states, grad_scale, sum)
        }),
        None => {
            on_host!((params, grads, m) => rule.step(piece, params, grads, m, states, grad_scale, sum))
        }
    }
    Ok(())
}

impl<'a, T: bytemuck::Pod> Operand for View<'a, T> {
    type Host = Source<'a, T>;
    type Cuda = OnCuda<'a, T>;

    fn stream(&self) -> Option<&Stream> {
        match self {
            View::Cpu(_) => None,
            View::Cuda(stream, _) => Some(stream),
        }
    }

    fn on_host(self) -> Result<Source<'a, T>> {
        Ok(match self {
            View::Cpu(x) => Source::Lent(x),
            elsewhere => Source::Copied(Buffer::copy_of(&Device::Cpu, elsewhere)?),
        })
    }

    fn on_cuda(self, stream: &Stream) -> Result<OnCuda<'a, T>> {
        Ok(match self {
            View::Cuda(_, x) => OnCuda::Lent(x),
            here => OnCuda::Copied(Buffer::copy_of(&Device::Cuda(stream.clone()), here)?),
        })
    }
}

/// Elements to be read on the host.
enum Source<'a, T> {
    Lent(&'a [T]),
    Copied(Buffer),
}

impl<T: bytemuck::Pod> Lend for Source<'_, T> {
    type Lent<'b>
        = &'b [T]
    where
        Self: 'b;

    fn lend(&mut self) -> &[T] {
        match self {
            Source::Lent(x) => x,
            Source::Copied(buffer) => buffer.as_slice(),
        }
    }
}

/// Elements to be read on a GPU.
enum OnCuda<'a, T> {
    Lent(cuda::Slice<'a, T>),
    Copied(Buffer),
}

impl<T: bytemuck::Pod> Lend for OnCuda<'_, T> {
    type Lent<'b>
        = cuda::Slice<'b, T>
    where
        Self: 'b;

    fn lend(&mut self) -> cuda::Slice<'_, T> {
        match self {
            OnCuda::Lent(x) => *x,
            OnCuda::Copied(buffer) => match buffer.view() {
                View::Cuda(_, x) => x,
                View::Cpu(_) => unreachable!("it was copied to a GPU"),
            },
        }
    }
}

impl<'a, T: bytemuck::Pod> Operand for ViewMut<'a, T> {
    type Host = Target<'a, T>;
    type Cuda = cuda::SliceMut<'a, T>;

    fn stream(&self) -> Option<&Stream> {
        match self {
            ViewMut::Cpu(_) => None,
            ViewMut::Cuda(stream, _) => Some(stream),
        }
    }

    fn on_host(self) -> Result<Target<'a, T>> {
        Ok(match self {
            ViewMut::Cpu(x) => Target::Lent(x),
            elsewhere => {
                // Kernels may add to what is there.
                let copy = Buffer::copy_of(&Device::Cpu, elsewhere.as_view())?;
                Target::Copied(copy, elsewhere)
            }
        })
    }

    fn on_cuda(self, stream: &Stream) -> Result<cuda::SliceMut<'a, T>> {
        match self {
            ViewMut::Cuda(_, x) => Ok(x),
            ViewMut::Cpu(_) => Err(crate::Error::Device {
                op: "kernel",
                left: Device::Cuda(stream.clone()).to_string(),
                right: "cpu (a result)".into(),
            }),
        }
    }
}

/// Elements to be written on the host.
enum Target<'a, T> {
    Lent(&'a mut [T]),
    Copied(Buffer, ViewMut<'a, T>),
}

impl<T: bytemuck::Pod> Lend for Target<'_, T> {
    type Lent<'b>
        = &'b mut [T]
    where
        Self: 'b;

    fn lend(&mut self) -> &mut [T] {
        match self {
            Target::Lent(x) => x,
            Target::Copied(buffer, _) => buffer.as_mut_slice(),
        }
    }

    fn finish(self) -> Result<()> {
        match self {
            Target::Lent(_) => Ok(()),
            Target::Copied(buffer, to) => to.write(buffer.as_slice()),
        }
    }
}

impl<T> Lend for cuda::SliceMut<'_, T> {
    type Lent<'b>
        = cuda::SliceMut<'b, T>
    where
        Self: 'b;

    fn lend(&mut self) -> cuda::SliceMut<'_, T> {
        self.reborrow()
    }
}

macro_rules! plain {
    ($($t:ty),*) => { $(
        impl Operand for $t {
            type Host = $t;
            type Cuda = $t;
            fn on_host(self) -> Result<$t> {
                Ok(self)
            }
            fn on_cuda(self, _: &Stream) -> Result<$t> {
                Ok(self)
            }
        }
        impl Lend for $t {
            type Lent<'b> = $t;
            fn lend(&mut self) -> $t {
                *self
            }
        }
    )* };
}
plain!(usize, i32, u32, f32);

impl<O: Operand> Operand for Option<O> {
    type Host = Option<O::Host>;
    type Cuda = Option<O::Cuda>;

    fn stream(&self) -> Option<&Stream> {
        self.as_ref().and_then(|x| x.stream())
    }

    fn on_host(self) -> Result<Option<O::Host>> {
        self.map(Operand::on_host).transpose()
    }

    fn on_cuda(self, stream: &Stream) -> Result<Option<O::Cuda>> {
        self.map(|x| x.on_cuda(stream)).transpose()
    }
}

impl<L: Lend> Lend for Option<L> {
    type Lent<'b>
        = Option<L::Lent<'b>>
    where
        Self: 'b;

    fn lend(&mut self) -> Option<L::Lent<'_>> {
        self.as_mut().map(Lend::lend)
    }

    fn finish(self) -> Result<()> {
        self.map_or(Ok(()), Lend::finish)
    }
}
