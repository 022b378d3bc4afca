//! Convolutions by cuDNN 9, where it is there.
//!
//! Of the algorithms that the library's heuristics name the first is taken that gives the same bits every
//! time, whose scratch is not too large, and that does not round f32 on its way. Sums are f32. What there
//! is none for is left to products of patches.

use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr::null_mut;
use std::sync::{Mutex, OnceLock};

use super::device::Device;
use super::error::{Error, Result};
use super::slice::SliceMut;
use super::stream::Stream;
use crate::ConvShape;

/// Scratch of an algorithm, at most.
const ROOM: usize = 256 << 20;
/// Algorithms that are asked for.
const CANDIDATES: usize = 8;
/// What the library wants of addresses.
const ALIGNMENT: u64 = 16;

type Raw = *mut c_void;
type Ints = *const c_int;

/// Functions that make and end something.
type Make = unsafe extern "C" fn(*mut Raw) -> c_int;
type End = unsafe extern "C" fn(Raw) -> c_int;
type Set<T> = unsafe extern "C" fn(Raw, T) -> c_int;
/// `cudnnGetConvolution*Algorithm_v7`: of both operands, the convolution and the result.
type Name = unsafe extern "C" fn(Raw, Raw, Raw, Raw, Raw, c_int, *mut c_int, *mut Perf) -> c_int;
/// `cudnnConvolution*`: operands and result, each with its address; algorithm and scratch.
type Run = unsafe extern "C" fn(
    Raw,
    *const f32,
    Raw,
    u64,
    Raw,
    u64,
    Raw,
    c_int,
    u64,
    usize,
    *const f32,
    Raw,
    u64,
) -> c_int;

macro_rules! table {
    ($($symbol:ident: $t:ty,)*) => {
        #[allow(non_snake_case, reason = "fields are the symbols")]
        #[derive(Debug)]
        struct Table {
            $($symbol: $t,)*
            _library: libloading::Library,
        }

        impl Table {
            fn of(library: libloading::Library) -> Result<Table, libloading::Error> {
                // SAFETY: the types are those of the library's header, the same in all of version 9.
                unsafe {
                    Ok(Table {
                        $($symbol: *library.get(concat!(stringify!($symbol), "\0").as_bytes())?,)*
                        _library: library,
                    })
                }
            }
        }
    };
}

table! {
    cudnnGetErrorString: unsafe extern "C" fn(c_int) -> *const c_char,
    cudnnCreate: Make,
    cudnnDestroy: End,
    cudnnSetStream: Set<Raw>,
    cudnnCreateTensorDescriptor: Make,
    cudnnDestroyTensorDescriptor: End,
    cudnnSetTensorNdDescriptor: unsafe extern "C" fn(Raw, c_int, c_int, Ints, Ints) -> c_int,
    cudnnCreateFilterDescriptor: Make,
    cudnnDestroyFilterDescriptor: End,
    cudnnSetFilterNdDescriptor: unsafe extern "C" fn(Raw, c_int, c_int, c_int, Ints) -> c_int,
    cudnnCreateConvolutionDescriptor: Make,
    cudnnDestroyConvolutionDescriptor: End,
    cudnnSetConvolutionNdDescriptor:
        unsafe extern "C" fn(Raw, c_int, Ints, Ints, Ints, c_int, c_int) -> c_int,
    cudnnSetConvolutionGroupCount: Set<c_int>,
    cudnnSetConvolutionMathType: Set<c_int>,
    cudnnGetConvolutionForwardAlgorithm_v7: Name,
    cudnnGetConvolutionBackwardDataAlgorithm_v7: Name,
    cudnnGetConvolutionBackwardFilterAlgorithm_v7: Name,
    cudnnConvolutionForward: Run,
    cudnnConvolutionBackwardData: Run,
    cudnnConvolutionBackwardFilter: Run,
}

/// `cudnnConvolution*AlgoPerf_t`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
struct Perf {
    algorithm: c_int,
    status: c_int,
    time: f32,
    memory: usize,
    determinism: c_int,
    math: c_int,
    reserved: [c_int; 3],
}

const CROSS_CORRELATION: c_int = 1;
const NCHW: c_int = 0;
const FLOAT: c_int = 0;
const DETERMINISTIC: c_int = 1;
/// f32 as it is; others may use tensor cores.
const FMA_MATH: c_int = 3;
const TENSOR_OP_MATH: c_int = 1;

fn data_type(name: &str) -> c_int {
    match name {
        "f16" => 2,
        "bf16" => 9,
        _ => FLOAT,
    }
}

fn not_supported(status: c_int) -> bool {
    (3000..4000).contains(&status)
}

/// The library, loaded when it is first asked for.
fn table() -> Option<&'static Table> {
    static TABLE: OnceLock<Option<Table>> = OnceLock::new();
    let open = || {
        // SAFETY: loading it runs its initialisers and nothing else.
        let library = unsafe { libloading::Library::new("libcudnn.so.9") }.ok()?;
        Table::of(library).ok()
    };
    TABLE.get_or_init(open).as_ref()
}

/// Is it there?
pub(super) fn is_there() -> bool {
    table().is_some()
}

/// What a convolution is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Pass {
    /// y of x and the weights.
    Forward,
    /// dx of the weights and dy.
    Input,
    /// dweight of x and dy.
    Weight,
}

/// A pass with its elements' type and the addresses of x, the weights and y, or of their gradients.
#[derive(Debug, Clone, Copy)]
pub(super) struct Convolution<'a> {
    pub(super) shape: &'a ConvShape,
    pub(super) pass: Pass,
    pub(super) element: &'static str,
    pub(super) addresses: [u64; 3],
    pub(super) accumulate: bool,
}

type Key = (ConvShape, Pass, &'static str);

/// cuDNN for one stream.
#[derive(Debug)]
pub(super) struct Dnn {
    table: &'static Table,
    handle: Raw,
    /// What was found to work; nothing: a product of patches.
    chosen: Mutex<HashMap<Key, Option<Perf>>>,
}

// SAFETY: the library lets any thread use a handle, and ours is used under the lock of `chosen`.
unsafe impl Send for Dnn {}
// SAFETY: as above.
unsafe impl Sync for Dnn {}

impl Drop for Dnn {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once.
        let _ = unsafe { (self.table.cudnnDestroy)(self.handle) };
    }
}

impl Dnn {
    /// For this stream, if the library is there.
    pub(super) fn new(stream: &Stream) -> Result<Option<Dnn>> {
        if !super::found().cudnn || std::env::var_os("COLOSSAL_NO_CUDNN").is_some() {
            return Ok(None);
        }
        let Some(table) = table() else { return Ok(None) };
        let device = stream.device();
        device.bind()?;
        let mut handle = null_mut();
        // SAFETY: it writes a handle there.
        let code = unsafe { (table.cudnnCreate)(&mut handle) };
        checked(table, device, "opening it (COLOSSAL_NO_CUDNN=1 does without)", code)?;
        let dnn = Dnn { table, handle, chosen: Mutex::default() };
        // SAFETY: the stream lives as long as who owns this.
        let code = unsafe { (table.cudnnSetStream)(handle, stream.raw().cu_stream().cast()) };
        checked(table, device, "a stream", code)?;
        Ok(Some(dnn))
    }

    /// Puts it on the stream, unless the library has no algorithm for it: then `false`.
    pub(super) fn run(&self, stream: &Stream, c: &Convolution<'_>) -> Result<bool> {
        let empty = c.shape.batch * c.shape.channels * c.shape.out_channels == 0;
        if empty || c.addresses.iter().any(|a| a % ALIGNMENT != 0) {
            return Ok(false);
        }
        let device = stream.device();
        device.bind()?;
        let mut chosen = self.chosen.lock().unwrap_or_else(|e| e.into_inner());
        let key = (*c.shape, c.pass, c.element);
        let known = chosen.get(&key).copied();
        if matches!(known, Some(None)) {
            return Ok(false);
        }
        let Some(call) = Call::new(self.table, device, c)? else { return Ok(false) };
        let candidates = match known {
            Some(perf) => perf.into_iter().collect(),
            None => self.candidates(device, c, &call)?,
        };
        for perf in candidates {
            if self.put(stream, c, &call, &perf)? {
                chosen.insert(key, Some(perf));
                return Ok(true);
            }
        }
        chosen.insert(key, None);
        Ok(false)
    }

    fn candidates(&self, device: &Device, c: &Convolution<'_>, call: &Call) -> Result<Vec<Perf>> {
        let t = self.table;
        let name = match c.pass {
            Pass::Forward => t.cudnnGetConvolutionForwardAlgorithm_v7,
            Pass::Input => t.cudnnGetConvolutionBackwardDataAlgorithm_v7,
            Pass::Weight => t.cudnnGetConvolutionBackwardFilterAlgorithm_v7,
        };
        let (mut perfs, mut count) = ([Perf::default(); CANDIDATES], 0);
        let [a, b, to] = c.pass.order(call.sides);
        let room = CANDIDATES as c_int;
        // SAFETY: descriptors are alive; it writes `count` results into room for as many.
        let code = unsafe {
            name(self.handle, a, b, call.convolution, to, room, &mut count, perfs.as_mut_ptr())
        };
        if not_supported(code) {
            return Ok(vec![]);
        }
        checked(t, device, "the algorithms of a convolution", code)?;
        let exact = |p: &&Perf| c.element != "f32" || [0, FMA_MATH].contains(&p.math);
        let works = |p: &&Perf| p.status == 0 && p.determinism == DETERMINISTIC && p.memory <= ROOM;
        Ok(perfs[..count as usize].iter().filter(works).filter(exact).copied().collect())
    }

    fn put(&self, stream: &Stream, c: &Convolution<'_>, call: &Call, perf: &Perf) -> Result<bool> {
        let (t, device) = (self.table, stream.device());
        let run = match c.pass {
            Pass::Forward => t.cudnnConvolutionForward,
            Pass::Input => t.cudnnConvolutionBackwardData,
            Pass::Weight => t.cudnnConvolutionBackwardFilter,
        };
        let math = if c.element == "f32" { FMA_MATH } else { perf.math };
        // SAFETY: the descriptor is alive.
        let code = unsafe { (t.cudnnSetConvolutionMathType)(call.convolution, math) };
        checked(t, device, "a kind of products", code)?;
        let ([a, b, to], addresses) = (c.pass.order(call.sides), c.pass.order(c.addresses));
        let (alpha, beta) = (1.0, if c.accumulate { 1.0 } else { 0.0 });
        stream.with_scratch(perf.memory, |scratch: SliceMut<'_, u8>| {
            // SAFETY: descriptors say what lies at the addresses, which whoever made `c` holds until the
            // stream has passed; the scratch is as long as the algorithm asks.
            let code = unsafe {
                run(
                    self.handle,
                    &alpha,
                    a,
                    addresses[0],
                    b,
                    addresses[1],
                    call.convolution,
                    perf.algorithm,
                    scratch.address(),
                    perf.memory,
                    &beta,
                    to,
                    addresses[2],
                )
            };
            match not_supported(code) {
                true => Ok(false),
                false => checked(t, device, "a convolution", code).map(|()| true),
            }
        })
    }
}

impl Pass {
    /// Operands and result, out of what belongs to x, the weights and y.
    fn order<T>(self, [x, w, y]: [T; 3]) -> [T; 3] {
        match self {
            Pass::Forward => [x, w, y],
            Pass::Input => [w, y, x],
            Pass::Weight => [x, y, w],
        }
    }
}

/// Descriptors of a convolution.
struct Call {
    table: &'static Table,
    /// Of x, the weights and y.
    sides: [Raw; 3],
    convolution: Raw,
}

impl Call {
    /// Nothing for sizes beyond 32 bits.
    fn new(table: &'static Table, device: &Device, c: &Convolution<'_>) -> Result<Option<Call>> {
        let s = c.shape;
        // Of two dims the first of three is left out.
        let from = usize::from(s.size[0] == 1 && s.kernel[0] == 1 && s.padding[0] == 0);
        let dims = |first: [usize; 2], rest: [usize; 3]| -> Option<Vec<c_int>> {
            let all = first.into_iter().chain(rest[from..].iter().copied());
            let dims: Option<Vec<_>> = all.map(|n| c_int::try_from(n).ok()).collect();
            let elements = dims.iter().flatten().try_fold(1, |n: c_int, d| n.checked_mul(*d));
            elements.and(dims)
        };
        let (Some(x), Some(w), Some(y)) = (
            dims([s.batch, s.channels], s.size),
            dims([s.out_channels, s.channels / s.groups], s.kernel),
            dims([s.batch, s.out_channels], s.out_size()),
        ) else {
            return Ok(None);
        };
        let apart = [s.padding, s.stride, s.dilation].map(|a| a.map(|n| n as c_int));
        let (rank, ty) = (x.len() as c_int, data_type(c.element));
        let mut call = Call { table, sides: [null_mut(); 3], convolution: null_mut() };
        let [own_x, own_w, own_y] = &mut call.sides;
        let (x_steps, y_steps) = (steps(&x), steps(&y));
        let math = if c.element == "f32" { FMA_MATH } else { TENSOR_OP_MATH };
        let t = table;
        // SAFETY: each descriptor is made before it is set, to arrays of `rank` numbers, two fewer for the
        // convolution; the library keeps copies.
        let codes = unsafe {
            let [padding, stride, dilation] = apart.each_ref().map(|a| a[from..].as_ptr());
            [
                (t.cudnnCreateTensorDescriptor)(own_x),
                (t.cudnnCreateFilterDescriptor)(own_w),
                (t.cudnnCreateTensorDescriptor)(own_y),
                (t.cudnnCreateConvolutionDescriptor)(&mut call.convolution),
                (t.cudnnSetTensorNdDescriptor)(*own_x, ty, rank, x.as_ptr(), x_steps.as_ptr()),
                (t.cudnnSetFilterNdDescriptor)(*own_w, ty, NCHW, rank, w.as_ptr()),
                (t.cudnnSetTensorNdDescriptor)(*own_y, ty, rank, y.as_ptr(), y_steps.as_ptr()),
                (t.cudnnSetConvolutionNdDescriptor)(
                    call.convolution,
                    rank - 2,
                    padding,
                    stride,
                    dilation,
                    CROSS_CORRELATION,
                    FLOAT,
                ),
                (t.cudnnSetConvolutionGroupCount)(call.convolution, s.groups as c_int),
                (t.cudnnSetConvolutionMathType)(call.convolution, math),
            ]
        };
        codes.into_iter().try_for_each(|code| checked(t, device, "the sizes", code))?;
        Ok(Some(call))
    }
}

/// Elements from one to the next of each dim of a dense tensor.
fn steps(dims: &[c_int]) -> Vec<c_int> {
    (0..dims.len()).map(|i| dims[i + 1..].iter().product()).collect()
}

impl Drop for Call {
    fn drop(&mut self) {
        let t = self.table;
        let [x, w, y] = self.sides;
        for (end, raw) in [
            (t.cudnnDestroyTensorDescriptor, x),
            (t.cudnnDestroyFilterDescriptor, w),
            (t.cudnnDestroyTensorDescriptor, y),
            (t.cudnnDestroyConvolutionDescriptor, self.convolution),
        ] {
            if !raw.is_null() {
                // SAFETY: made by `new`, destroyed once.
                let _ = unsafe { end(raw) };
            }
        }
    }
}

fn checked(table: &Table, device: &Device, what: &str, code: c_int) -> Result<()> {
    if code == 0 {
        return Ok(());
    }
    // SAFETY: it returns a text that stays, for any number.
    let text = unsafe { CStr::from_ptr((table.cudnnGetErrorString)(code)) };
    Err(Error::Library {
        library: "cuDNN",
        what: what.into(),
        ordinal: device.ordinal(),
        reason: format!("{} ({code})", text.to_string_lossy()),
    })
}
