//! Products by cuBLASLt, each by the algorithm that was fastest here.
//!
//! A product of new sizes is timed: cuBLASLt names candidates, each runs a few times into scratch,
//! and the fastest is remembered, in memory and in a file (under the cache of kernels, by GPU and
//! version of the library), so that later runs choose the same and give the same bits.
//!
//! Matrices are row-major here and column-major there: `c = a b` is put as `cᵀ = bᵀ aᵀ`.

use std::collections::HashMap;
use std::ffi::c_void;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock};

use cudarc::cublaslt::{result as lt, sys};
use sys::cublasLtMatmulDescAttributes_t as Attribute;
use sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;

use super::device::Device;
use super::error::{Error, Result};
use super::library::found;
use super::memory::Block;
use super::module::{cache, write};
use super::stream::Stream;

/// Scratch of a stream: what NVIDIA recommends for Hopper.
const WORKSPACE: usize = 32 << 20;
/// Candidates that are timed.
const CANDIDATES: usize = 8;
/// Times that each is run, after once to warm up.
const RUNS: usize = 3;

/// An operand `[rows, cols]` whose rows lie `stride` elements apart, or, transposed, its columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Side {
    pub(super) address: u64,
    pub(super) stride: usize,
    pub(super) transposed: bool,
}

/// `c [m, n] = alpha * a b + bias`, or `c += …`: types by the names of `Float::NAME`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Product {
    pub(super) sizes: [usize; 3],
    pub(super) a: Side,
    pub(super) b: Side,
    pub(super) c: u64,
    pub(super) c_stride: usize,
    pub(super) alpha: f32,
    pub(super) accumulate: bool,
    pub(super) bias: Option<u64>,
    /// Of `a` and `b`: scales of fp8, on the device.
    pub(super) scales: Option<[u64; 2]>,
    /// Of `a` and `b`.
    pub(super) inputs: [&'static str; 2],
    pub(super) output: &'static str,
    /// How many, and how many elements lie from one to the next of `a`, `b` and `c`.
    pub(super) batch: usize,
    pub(super) strides: [usize; 3],
}

/// What an algorithm is chosen by.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key(String);

type Algorithm = [u64; 8];

/// cuBLASLt for one stream.
#[derive(Debug)]
pub(super) struct Blas {
    handle: Handle,
    workspace: Block,
    tuned: Arc<Mutex<Tuned>>,
}

#[derive(Debug)]
struct Handle(sys::cublasLtHandle_t);

// SAFETY: the library lets any thread use a handle, and ours is used under its stream's lock.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: made by `create_handle`, destroyed once.
        let _ = unsafe { lt::destroy_handle(self.0) };
    }
}

impl Blas {
    /// For this stream's device, if the library is there.
    pub(super) fn new(device: &Device) -> Result<Option<Blas>> {
        if !found().cublaslt || std::env::var_os("COLOSSAL_NO_CUBLASLT").is_some() {
            return Ok(None);
        }
        device.bind()?;
        let handle = Handle(lt::create_handle().map_err(|e| failed(device, "opening it", e))?);
        let workspace = Block::new(device, WORKSPACE)?;
        Ok(Some(Blas { handle, workspace, tuned: Tuned::of(device) }))
    }

    /// Puts the product on the stream, unless the library has no algorithm for it: then `false`.
    pub(super) fn run(&self, stream: &Stream, product: &Product) -> Result<bool> {
        let device = stream.device();
        device.bind()?;
        let failed = |e| failed(device, "a product", e);
        let call = Call::new(product).map_err(failed)?;
        let key = product.key();
        let known = self.tuned.lock().unwrap_or_else(|e| e.into_inner()).get(&key);
        let algorithm = match known {
            Some(algorithm) => algorithm,
            None => {
                let candidates = self.candidates(&call).map_err(failed)?;
                let Some(best) = self.fastest(stream, product, &call, &candidates)? else {
                    return Ok(false);
                };
                self.tuned.lock().unwrap_or_else(|e| e.into_inner()).put(key, best);
                best
            }
        };
        self.put(stream, product, &call, &algorithm, product.c).map_err(failed)?;
        Ok(true)
    }

    fn candidates(&self, call: &Call) -> Result<Vec<Algorithm>, lt::CublasError> {
        let preference = lt::create_matmul_pref()?;
        let mut found = Vec::<sys::cublasLtMatmulHeuristicResult_t>::with_capacity(CANDIDATES);
        let mut count = 0;
        let size = self.workspace.capacity();
        // SAFETY: descriptors are alive; the library writes `count` whole results into room for
        // as many, of which only those are read.
        unsafe {
            let limit = (&raw const size).cast();
            let which = CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
            lt::set_matmul_pref_attribute(preference, which, limit, size_of::<usize>())?;
            let code = sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle.0,
                call.description,
                call.layouts[0],
                call.layouts[1],
                call.layouts[2],
                call.layouts[2],
                preference,
                CANDIDATES as i32,
                found.as_mut_ptr(),
                &mut count,
            );
            let _ = lt::destroy_matmul_pref(preference);
            if code == sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED {
                return Ok(vec![]);
            }
            code.result()?;
            found.set_len(count as usize);
        }
        let works = |r: &&sys::cublasLtMatmulHeuristicResult_t| {
            r.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS && r.workspaceSize <= WORKSPACE
        };
        Ok(found.iter().filter(works).map(|r| r.algo.data).collect())
    }

    /// The fastest candidate, each run into scratch.
    fn fastest(
        &self,
        stream: &Stream,
        product: &Product,
        call: &Call,
        candidates: &[Algorithm],
    ) -> Result<Option<Algorithm>> {
        let [first, _, ..] = candidates else { return Ok(candidates.first().copied()) };
        let [m, n, _] = product.sizes;
        let last =
            (product.batch - 1) * product.strides[2] + m.saturating_sub(1) * product.c_stride;
        let bytes = (last + n) * size_of_type(product.output);
        let mut scratch = match Block::new(stream.device(), bytes) {
            Ok(scratch) => scratch,
            // A choice that nobody measured would stay.
            Err(error) if error.is_capture() => return Err(error),
            // Without room for scratch the library's own favourite has to do.
            Err(_) => return Ok(Some(*first)),
        };
        let mut scratch = scratch.slice_mut::<u8>(0..bytes);
        stream.zero(scratch.reborrow())?;
        let mut best: Option<(f32, Algorithm)> = None;
        for algorithm in candidates {
            let run = || self.put(stream, product, call, algorithm, scratch.address());
            if run().is_err() {
                continue;
            }
            let start = stream.record_timed()?;
            if (0..RUNS).any(|_| run().is_err()) {
                continue;
            }
            let time = start.until(&stream.record_timed()?)?;
            if best.is_none_or(|(least, _)| time < least) {
                best = Some((time, *algorithm));
            }
        }
        Ok(best.map(|(_, algorithm)| algorithm))
    }

    fn put(
        &self,
        stream: &Stream,
        product: &Product,
        call: &Call,
        algorithm: &Algorithm,
        c: u64,
    ) -> Result<(), lt::CublasError> {
        let (alpha, beta) = (product.alpha, if product.accumulate { 1.0f32 } else { 0.0 });
        let algorithm = sys::cublasLtMatmulAlgo_t { data: *algorithm };
        let workspace = self.workspace.slice::<u8>(0..WORKSPACE).address();
        let stream = stream.raw().cu_stream();
        // SAFETY: layouts describe the operands, which whoever made `product` holds until the
        // stream has passed; the workspace is of this stream alone.
        unsafe {
            sys::cublasLtMatmul(
                self.handle.0,
                call.description,
                (&raw const alpha).cast(),
                product.b.address as *const c_void,
                call.layouts[0],
                product.a.address as *const c_void,
                call.layouts[1],
                (&raw const beta).cast(),
                c as *const c_void,
                call.layouts[2],
                c as *mut c_void,
                call.layouts[2],
                &raw const algorithm,
                workspace as *mut c_void,
                WORKSPACE,
                stream.cast(),
            )
            .result()
        }
    }
}

impl Product {
    fn key(&self) -> Key {
        let [m, n, k] = self.sizes;
        let side = |s: &Side| format!("{}{}", if s.transposed { "t" } else { "n" }, s.stride);
        let addresses = [self.a.address, self.b.address, self.c, self.bias.unwrap_or(0)];
        // Algorithms differ in the alignment that they need.
        let align = addresses.iter().map(|a| a.trailing_zeros().min(8)).min().unwrap_or(0);
        Key(format!(
            "{m}x{n}x{k} {} {} {} {}>{} {}{} {}*{:?} {align}",
            side(&self.a),
            side(&self.b),
            self.c_stride,
            self.inputs.join("*"),
            self.output,
            if self.accumulate { "+" } else { "=" },
            if self.bias.is_some() { "b" } else { "" },
            self.batch,
            if self.batch > 1 { self.strides } else { [0; 3] },
        ))
    }
}

/// Descriptors of a product.
struct Call {
    description: sys::cublasLtMatmulDesc_t,
    /// Of `bᵀ`, `aᵀ` and `cᵀ`.
    layouts: [sys::cublasLtMatrixLayout_t; 3],
}

impl Call {
    fn new(p: &Product) -> Result<Call, lt::CublasError> {
        let [m, n, k] = p.sizes.map(|x| x as u64);
        let scale = sys::cudaDataType_t::CUDA_R_32F;
        let description =
            lt::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, scale)?;
        let mut call = Call { description, layouts: [std::ptr::null_mut(); 3] };
        call.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &i32::from(p.b.transposed))?;
        call.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSB, &i32::from(p.a.transposed))?;
        if let Some(bias) = p.bias {
            let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
            call.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
            call.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias)?;
        }
        if let Some([a, b]) = p.scales {
            call.set(Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &b)?;
            call.set(Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &a)?;
        }
        // What lies there in rows of `stride` is a column-major matrix of as many rows.
        let stored = |s: &Side, rows, cols| if s.transposed { (rows, cols) } else { (cols, rows) };
        let ((b_rows, b_cols), (a_rows, a_cols)) = (stored(&p.b, k, n), stored(&p.a, m, k));
        let ([a, b], output) = (p.inputs.map(data_type), data_type(p.output));
        for (i, (ty, rows, cols, stride)) in [
            (b, b_rows, b_cols, p.b.stride),
            (a, a_rows, a_cols, p.a.stride),
            (output, n, m, p.c_stride),
        ]
        .into_iter()
        .enumerate()
        {
            // A matrix of one column has no stride to speak of, but must name one that fits.
            let stride = (stride as u64).max(rows).max(1) as i64;
            call.layouts[i] = lt::create_matrix_layout(ty, rows, cols, stride)?;
            if p.batch > 1 {
                let step = [p.strides[1], p.strides[0], p.strides[2]][i] as i64;
                call.batched(i, p.batch as i32, step)?;
            }
        }
        Ok(call)
    }

    fn set<T>(&self, attribute: Attribute, value: &T) -> Result<(), lt::CublasError> {
        // SAFETY: the attribute's type is that of the value, of which the library keeps a copy.
        unsafe {
            let value = std::ptr::from_ref(value).cast();
            lt::set_matmul_desc_attribute(self.description, attribute, value, size_of::<T>())
        }
    }

    fn batched(&self, i: usize, count: i32, step: i64) -> Result<(), lt::CublasError> {
        use sys::cublasLtMatrixLayoutAttribute_t::{
            CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
        };
        let (layout, count, step) = (self.layouts[i], &raw const count, &raw const step);
        // SAFETY: as in `set`.
        unsafe {
            let batch = CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT;
            lt::set_matrix_layout_attribute(layout, batch, count.cast(), 4)?;
            let offset = CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET;
            lt::set_matrix_layout_attribute(layout, offset, step.cast(), 8)
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once; what was not made is null.
        unsafe {
            for layout in self.layouts.iter().filter(|l| !l.is_null()) {
                let _ = lt::destroy_matrix_layout(*layout);
            }
            let _ = lt::destroy_matmul_desc(self.description);
        }
    }
}

fn data_type(name: &str) -> sys::cudaDataType_t {
    match name {
        "bf16" => sys::cudaDataType_t::CUDA_R_16BF,
        "f16" => sys::cudaDataType_t::CUDA_R_16F,
        "e4m3" => sys::cudaDataType_t::CUDA_R_8F_E4M3,
        "e5m2" => sys::cudaDataType_t::CUDA_R_8F_E5M2,
        _ => sys::cudaDataType_t::CUDA_R_32F,
    }
}

fn size_of_type(name: &str) -> usize {
    if name == "f32" { 4 } else { 2 }
}

fn failed(device: &Device, what: &str, error: lt::CublasError) -> Error {
    Error::Library {
        library: "cuBLASLt",
        what: what.into(),
        ordinal: device.ordinal(),
        reason: format!("{:?}", error.0),
    }
}

/// Algorithms chosen on one kind of GPU.
#[derive(Debug, Default)]
struct Tuned {
    file: Option<PathBuf>,
    chosen: HashMap<Key, Algorithm>,
}

impl Tuned {
    /// What is known for devices of this name, read once.
    fn of(device: &Device) -> Arc<Mutex<Tuned>> {
        static ALL: OnceLock<Mutex<HashMap<String, Arc<Mutex<Tuned>>>>> = OnceLock::new();
        // SAFETY: the library is there.
        let version = unsafe { sys::cublasLtGetVersion() };
        let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
        let name: String = device.name().chars().map(plain).collect();
        let name = format!("{name}-cublaslt-{version}.txt");
        let mut all = ALL.get_or_init(Mutex::default).lock().unwrap_or_else(|e| e.into_inner());
        all.entry(name).or_insert_with_key(|name| Arc::new(Mutex::new(Tuned::read(name)))).clone()
    }

    fn read(name: &str) -> Tuned {
        let file = found().nvrtc.and_then(cache).map(|folder| folder.join(name));
        let text = file.as_ref().and_then(|f| std::fs::read_to_string(f).ok()).unwrap_or_default();
        let line = |line: &str| {
            let (key, words) = line.split_once('\t')?;
            let words = words.split(' ').map(|w| u64::from_str_radix(w, 16).ok());
            let words: Option<Vec<u64>> = words.collect();
            Some((Key(key.into()), words?.try_into().ok()?))
        };
        Tuned { file, chosen: text.lines().filter_map(line).collect() }
    }

    fn get(&self, key: &Key) -> Option<Algorithm> {
        self.chosen.get(key).copied()
    }

    fn put(&mut self, key: Key, algorithm: Algorithm) {
        self.chosen.insert(key, algorithm);
        let Some(file) = &self.file else { return };
        let mut lines: Vec<String> = self
            .chosen
            .iter()
            .map(|(Key(key), words)| {
                let words: Vec<String> = words.iter().map(|w| format!("{w:x}")).collect();
                format!("{key}\t{}\n", words.join(" "))
            })
            .collect();
        lines.sort();
        // Not kept is no error: the next run measures again.
        let _ = write(file, lines.concat().as_bytes());
    }
}
