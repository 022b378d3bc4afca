//! Parameters in and out of safetensors files, one shard of each tensor at a time.
//!
//! Files are mapped, not read: a rank touches only the bytes of its own slices. Writes go to a
//! temporary name in the same folder, are synced, and renamed: a file is whole or absent.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::SafeTensors;
use safetensors::tensor::{Metadata, TensorView};

use crate::dtype::Dtype;
use crate::error::{Error, Result};

/// One or more mapped files with an index of names: `model.safetensors`, or the shards that
/// `model.safetensors.index.json` lists.
#[derive(Debug)]
pub struct Archive {
    files: Vec<Mapped>,
    index: BTreeMap<String, usize>,
}

#[derive(Debug)]
struct Mapped {
    path: PathBuf,
    map: Mmap,
    header: Metadata,
    data: usize,
}

/// A tensor in a file: its dtype, shape and bytes (little-endian, row-major).
#[derive(Debug, Clone, Copy)]
pub struct Entry<'a> {
    /// Its dtype.
    pub dtype: safetensors::Dtype,
    /// Its shape.
    pub shape: &'a [usize],
    /// Its bytes.
    pub bytes: &'a [u8],
}

impl Archive {
    /// Maps these files.
    ///
    /// # Errors
    /// [`Error::File`] when one is missing, truncated, or no safetensors file.
    pub fn open(paths: &[PathBuf]) -> Result<Archive> {
        let mut archive = Archive { files: vec![], index: BTreeMap::new() };
        for path in paths {
            let fail = |reason: String| Error::File { path: path.display().to_string(), reason };
            let file = File::open(path).map_err(|e| fail(e.to_string()))?;
            // SAFETY: the mapping is read-only. Should another process truncate the file while it
            // is mapped, the system ends this one; checkpoints are replaced by rename, not in place.
            let map = unsafe { Mmap::map(&file) }.map_err(|e| fail(e.to_string()))?;
            let (header_len, header) = SafeTensors::read_metadata(&map)
                .map_err(|e| fail(format!("not a whole safetensors file: {e}; fetch it again")))?;
            let at = archive.files.len();
            header.tensors().keys().for_each(|name| {
                archive.index.insert(name.clone(), at);
            });
            archive.files.push(Mapped { path: path.clone(), map, header, data: header_len + 8 });
        }
        Ok(archive)
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.index.keys().map(String::as_str)
    }

    /// The tensor of this name.
    pub fn get(&self, name: &str) -> Option<Entry<'_>> {
        let file = &self.files[*self.index.get(name)?];
        let info = file.header.info(name)?;
        let (start, end) = info.data_offsets;
        let bytes = file.map.get(file.data + start..file.data + end)?;
        Some(Entry { dtype: info.dtype, shape: &info.shape, bytes })
    }

    /// The metadata of the first file.
    pub fn metadata(&self) -> BTreeMap<String, String> {
        let first = self.files.first().and_then(|f| f.header.metadata().as_ref());
        first.map(|m| m.clone().into_iter().collect()).unwrap_or_default()
    }

    /// Where the first file is, for messages.
    pub fn path(&self) -> String {
        self.files.first().map_or_else(String::new, |f| f.path.display().to_string())
    }
}

impl Entry<'_> {
    /// Elements `start..start + len` of the flattened tensor, as f32.
    ///
    /// # Errors
    /// [`Error::File`] for a type that is not a float or integer we read.
    pub fn to_f32(&self, start: usize, len: usize, out: &mut Vec<f32>) -> Result<()> {
        fn each<const N: usize>(
            bytes: &[u8],
            start: usize,
            len: usize,
            out: &mut Vec<f32>,
            f: impl Fn([u8; N]) -> f32,
        ) -> Option<()> {
            let bytes = bytes.get(start * N..(start + len) * N)?;
            out.extend(bytes.as_chunks::<N>().0.iter().map(|b| f(*b)));
            Some(())
        }
        use safetensors::Dtype as D;
        match self.dtype {
            D::F32 => each(self.bytes, start, len, out, f32::from_le_bytes),
            D::F64 => each(self.bytes, start, len, out, |b| f64::from_le_bytes(b) as f32),
            D::F16 => each(self.bytes, start, len, out, |b| f16::from_le_bytes(b).to_f32()),
            D::BF16 => each(self.bytes, start, len, out, |b| bf16::from_le_bytes(b).to_f32()),
            D::I32 => each(self.bytes, start, len, out, |b| i32::from_le_bytes(b) as f32),
            D::I64 => each(self.bytes, start, len, out, |b| i64::from_le_bytes(b) as f32),
            other => {
                return Err(Error::File {
                    path: "safetensors".into(),
                    reason: format!("dtype {other:?} is not read yet; convert it to f32 or bf16"),
                });
            }
        }
        .ok_or_else(|| Error::File {
            path: "safetensors".into(),
            reason: "a tensor is shorter than its header says".into(),
        })
    }

    /// The whole tensor as f32.
    pub fn to_vec(&self) -> Result<Vec<f32>> {
        let len = self.shape.iter().product();
        let mut out = Vec::with_capacity(len);
        self.to_f32(0, len, &mut out)?;
        Ok(out)
    }

    /// The whole tensor as integers.
    pub fn to_ints(&self) -> Result<Vec<i64>> {
        use safetensors::Dtype as D;
        match self.dtype {
            D::I64 => {
                Ok(self.bytes.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b)).collect())
            }
            D::I32 => Ok(self
                .bytes
                .as_chunks::<4>()
                .0
                .iter()
                .map(|b| i64::from(i32::from_le_bytes(*b)))
                .collect()),
            other => Err(Error::File {
                path: "safetensors".into(),
                reason: format!("dtype {other:?} does not hold integers"),
            }),
        }
    }
}

/// A tensor to be written.
#[derive(Debug, Clone)]
pub struct Owned {
    /// Its dtype.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its bytes, little-endian and row-major.
    pub bytes: Arc<Vec<u8>>,
}

impl Owned {
    /// These values in this dtype.
    pub fn from_f32(values: &[f32], shape: &[usize], dtype: Dtype) -> Result<Owned> {
        let mut bytes = vec![0; values.len() * dtype.bytes()];
        crate::dtype::float!("save", dtype, T => {
            for (out, v) in bytes.chunks_exact_mut(size_of::<T>()).zip(values) {
                use colossal_kernels::Float;
                out.copy_from_slice(bytemuck::bytes_of(&<T as Float>::from_f32(*v)));
            }
            Ok(())
        })?;
        Ok(Owned { dtype, shape: shape.to_vec(), bytes: Arc::new(bytes) })
    }

    /// These ids.
    pub fn from_i32(values: &[i32], shape: &[usize]) -> Owned {
        let bytes = Arc::new(bytemuck::cast_slice(values).to_vec());
        Owned { dtype: Dtype::I32, shape: shape.to_vec(), bytes }
    }
}

/// Writes tensors (sorted by name) with metadata, atomically.
///
/// # Errors
/// [`Error::File`] when the disk refuses; an older file of that name is then untouched.
pub fn save(
    path: &Path,
    tensors: &BTreeMap<String, Owned>,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let fail = |reason: String| Error::File { path: path.display().to_string(), reason };
    let views: Vec<(&String, TensorView<'_>)> = tensors
        .iter()
        .map(|(name, t)| {
            let dtype = match t.dtype {
                Dtype::F32 => safetensors::Dtype::F32,
                Dtype::Bf16 => safetensors::Dtype::BF16,
                Dtype::F16 => safetensors::Dtype::F16,
                Dtype::I32 => safetensors::Dtype::I32,
                Dtype::I64 => safetensors::Dtype::I64,
                Dtype::U8 => safetensors::Dtype::U8,
            };
            TensorView::new(dtype, t.shape.clone(), &t.bytes).map(|v| (name, v))
        })
        .collect::<Result<_, _>>()
        .map_err(|e| fail(e.to_string()))?;
    let metadata = (!metadata.is_empty()).then(|| metadata.clone().into_iter().collect());
    let bytes = safetensors::serialize(views, metadata).map_err(|e| fail(e.to_string()))?;
    write_atomic(path, &bytes)
}

/// Writes a file so that it is whole or absent: temporary name, sync, rename.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let fail =
        |e: std::io::Error| Error::File { path: path.display().to_string(), reason: e.to_string() };
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder).map_err(fail)?;
    let mut draft = tempfile::Builder::new();
    // As any new file: what the umask leaves, so that others of a group may read a checkpoint.
    #[cfg(unix)]
    draft.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = draft.tempfile_in(folder).map_err(fail)?;
    file.write_all(bytes).map_err(fail)?;
    file.as_file().sync_all().map_err(fail)?;
    file.persist(path).map_err(|e| fail(e.error))?;
    Ok(())
}
