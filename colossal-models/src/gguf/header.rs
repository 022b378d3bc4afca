//! The header of a GGUF file: metadata and descriptions of tensors; and how values are stored.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use colossal_tensor::{Error, Result};
use half::{bf16, f16};

/// A value of the metadata.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Any integer, or a bool.
    Int(i64),
    /// Any float.
    Float(f64),
    /// A text.
    Text(String),
    /// A list.
    List(Vec<Value>),
}

impl Value {
    /// The number, if it is an integer.
    pub fn int(&self) -> Option<i64> {
        match self {
            Value::Int(x) => Some(*x),
            _ => None,
        }
    }

    /// The number, if it is one.
    pub fn float(&self) -> Option<f64> {
        match self {
            Value::Float(x) => Some(*x),
            Value::Int(x) => Some(*x as f64),
            _ => None,
        }
    }

    /// The text, if it is one.
    pub fn text(&self) -> Option<&str> {
        match self {
            Value::Text(x) => Some(x),
            _ => None,
        }
    }

    /// The list, if it is one.
    pub fn list(&self) -> Option<&[Value]> {
        match self {
            Value::List(x) => Some(x),
            _ => None,
        }
    }
}

/// Key/value pairs of a file.
pub type Metadata = BTreeMap<String, Value>;

/// Reads the metadata of any GGUF file: the tokenizer, the chat template, who made it.
///
/// # Errors
/// [`Error::File`] for a file that is none, or is cut short.
pub fn metadata(path: &Path) -> Result<Metadata> {
    let fail = |reason: String| Error::File { path: path.display().to_string(), reason };
    let file = File::open(path).map_err(|e| fail(e.to_string()))?;
    let size = file.metadata().map_err(|e| fail(e.to_string()))?.len();
    let mut reader = Reader { from: BufReader::new(&file), at: 0, size };
    Ok(reader.metadata().map_err(fail)?.0)
}

/// How the elements of a tensor are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    F32,
    F16,
    Bf16,
    Q4_0,
    Q4_1,
    Q8_0,
    Q6K,
}

impl Kind {
    fn of(id: u32) -> Option<Kind> {
        Some(match id {
            0 => Kind::F32,
            1 => Kind::F16,
            2 => Kind::Q4_0,
            3 => Kind::Q4_1,
            8 => Kind::Q8_0,
            14 => Kind::Q6K,
            30 => Kind::Bf16,
            _ => return None,
        })
    }

    /// Values and bytes of a block.
    pub(super) fn block(self) -> (usize, usize) {
        match self {
            Kind::F32 => (1, 4),
            Kind::F16 | Kind::Bf16 => (1, 2),
            Kind::Q4_0 => (32, 18),
            Kind::Q4_1 => (32, 20),
            Kind::Q8_0 => (32, 34),
            Kind::Q6K => (256, 210),
        }
    }

    /// Appends the values of one block.
    pub(super) fn read(self, b: &[u8], out: &mut Vec<f32>) {
        let half = |at: usize| f16::from_le_bytes([b[at], b[at + 1]]).to_f32();
        match self {
            Kind::F32 => out.push(f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
            Kind::F16 => out.push(half(0)),
            Kind::Bf16 => out.push(bf16::from_le_bytes([b[0], b[1]]).to_f32()),
            Kind::Q4_0 => {
                let (d, q) = (half(0), &b[2..]);
                out.extend(q.iter().map(|q| d * (f32::from(q & 15) - 8.0)));
                out.extend(q.iter().map(|q| d * (f32::from(q >> 4) - 8.0)));
            }
            Kind::Q4_1 => {
                let (d, m, q) = (half(0), half(2), &b[4..]);
                out.extend(q.iter().map(|q| d * f32::from(q & 15) + m));
                out.extend(q.iter().map(|q| d * f32::from(q >> 4) + m));
            }
            Kind::Q8_0 => {
                let d = half(0);
                out.extend(b[2..].iter().map(|q| d * f32::from(q.cast_signed())));
            }
            Kind::Q6K => {
                // 128 bytes of low nibbles, 64 of upper bit pairs, 16 signed scales, f16 scale.
                let (low, high, scales, d) = (&b[..128], &b[128..192], &b[192..208], half(208));
                for part in 0..2 {
                    for quarter in 0..4 {
                        for i in 0..32 {
                            let nibble = low[part * 64 + (quarter % 2) * 32 + i];
                            let nibble = if quarter < 2 { nibble & 15 } else { nibble >> 4 };
                            let pair = (high[part * 32 + i] >> (2 * quarter)) & 3;
                            let q = f32::from(nibble | (pair << 4)) - 32.0;
                            let scale = scales[part * 8 + quarter * 2 + i / 16].cast_signed();
                            out.push(d * f32::from(scale) * q);
                        }
                    }
                }
            }
        }
    }
}

#[derive(Debug, Clone)]
pub(super) struct Info {
    /// Outermost first.
    pub(super) shape: Vec<usize>,
    pub(super) kind: Kind,
    pub(super) offset: u64,
    /// Heads whose halves are interleaved; 0 for none.
    pub(super) heads: usize,
}

/// Metadata, and tensors under their names in the file.
pub(super) type Header = (Metadata, BTreeMap<String, Info>);

pub(super) struct Reader<'a> {
    pub(super) from: BufReader<&'a File>,
    pub(super) at: u64,
    pub(super) size: u64,
}

impl Reader<'_> {
    /// The metadata, and the number of tensors that follow it.
    fn metadata(&mut self) -> Result<(Metadata, usize), String> {
        if &self.bytes::<4>()? != b"GGUF" {
            return Err("is no GGUF file: it does not begin with GGUF".into());
        }
        let version = self.u32()?;
        if !(2..=3).contains(&version) {
            return Err(format!("GGUF version {version} is not read; versions 2 and 3 are"));
        }
        let (tensors, pairs) = (self.count()?, self.count()?);
        let mut metadata = BTreeMap::new();
        for _ in 0..pairs {
            let key = self.text()?;
            let kind = self.u32()?;
            metadata.insert(key, self.value(kind, 0)?);
        }
        Ok((metadata, tensors))
    }

    pub(super) fn header(&mut self) -> Result<Header, String> {
        let (metadata, tensors) = self.metadata()?;
        let mut infos = BTreeMap::new();
        for _ in 0..tensors {
            let name = self.text()?;
            let dims = self.u32()?;
            if !(1..=4).contains(&dims) {
                return Err(format!("tensor {name} has {dims} dims; 1 to 4 are possible"));
            }
            let mut shape = Vec::new();
            for _ in 0..dims {
                shape.push(self.u64()? as usize);
            }
            shape.reverse();
            let elements = shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
            if elements.is_none_or(|n| n == 0 || n as u64 / 8 > self.size) {
                return Err(format!(
                    "tensor {name} has shape {shape:?}, more than the file holds: it is cut short"
                ));
            }
            let id = self.u32()?;
            let kind = Kind::of(id).ok_or_else(|| {
                format!(
                    "tensor {name} is stored as ggml type {id}, which is not read; F32, F16, BF16, \
                     Q8_0, Q4_0, Q4_1 and Q6_K are: convert the file with llama-quantize"
                )
            })?;
            infos.insert(name, Info { shape, kind, offset: self.u64()?, heads: 0 });
        }
        Ok((metadata, infos))
    }

    fn value(&mut self, kind: u32, depth: usize) -> Result<Value, String> {
        Ok(match kind {
            0 | 7 => Value::Int(self.bytes::<1>()?[0].into()),
            1 => Value::Int(self.bytes::<1>()?[0].cast_signed().into()),
            2 => Value::Int(u16::from_le_bytes(self.bytes()?).into()),
            3 => Value::Int(i16::from_le_bytes(self.bytes()?).into()),
            4 => Value::Int(self.u32()?.into()),
            5 => Value::Int(i32::from_le_bytes(self.bytes()?).into()),
            6 => Value::Float(f32::from_le_bytes(self.bytes()?).into()),
            8 => Value::Text(self.text()?),
            9 if depth < 4 => {
                let (kind, len) = (self.u32()?, self.count()?);
                let mut list = Vec::new();
                for _ in 0..len {
                    list.push(self.value(kind, depth + 1)?);
                }
                Value::List(list)
            }
            10 | 11 => Value::Int(i64::from_le_bytes(self.bytes()?)),
            12 => Value::Float(f64::from_le_bytes(self.bytes()?)),
            other => return Err(format!("metadata of type {other} is not known")),
        })
    }

    fn text(&mut self) -> Result<String, String> {
        let len = self.count()?;
        let mut bytes = vec![0; len];
        self.from.read_exact(&mut bytes).map_err(|e| short(&e))?;
        self.at += len as u64;
        String::from_utf8(bytes).map_err(|_| "holds a text that is not UTF-8".into())
    }

    /// A number of things that follow, each of at least a byte.
    fn count(&mut self) -> Result<usize, String> {
        let n = self.u64()?;
        if n > self.size - self.at.min(self.size) {
            return Err(format!("announces {n} entries, more than it has bytes: it is damaged"));
        }
        Ok(n as usize)
    }

    fn u32(&mut self) -> Result<u32, String> {
        self.bytes().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, String> {
        self.bytes().map(u64::from_le_bytes)
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut bytes = [0; N];
        self.from.read_exact(&mut bytes).map_err(|e| short(&e))?;
        self.at += N as u64;
        Ok(bytes)
    }
}

fn short(e: &std::io::Error) -> String {
    format!("is cut short ({e}); fetch it again")
}
