//! A call's signature as bytes: what ranks in other processes are told of it.

use std::panic::Location;

use bytemuck::{Pod, Zeroable};

use crate::call::Call;

/// What a rank tells the others before a collective.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Header {
    pub(crate) sequence: u64,
    pub(crate) code: u64,
    pub(crate) len: u64,
    pub(crate) ragged: u64,
    /// 0, or why the rank will call nothing any more.
    pub(crate) leaving: u32,
    line: u32,
    /// The end of the path of the call's file.
    file: [u8; 88],
}

/// Bytes of a header.
pub(crate) const HEADER: usize = size_of::<Header>();

impl Header {
    pub(crate) fn new(call: &Call, sequence: u64) -> Header {
        let mut file = [0u8; 88];
        let path = call.site.file().as_bytes();
        let tail = &path[path.len().saturating_sub(file.len())..];
        file[..tail.len()].copy_from_slice(tail);
        let (code, len, ragged) = (call.code(), call.len as u64, call.ragged);
        Header { sequence, code, len, ragged, leaving: 0, line: call.site.line(), file }
    }

    /// No call any more from `sequence` on, and why.
    #[cfg_attr(not(feature = "mpi"), allow(dead_code))]
    pub(crate) fn leaving(why: u32, sequence: u64) -> Header {
        Header { leaving: why, sequence, ..Zeroable::zeroed() }
    }

    /// Are both the same call?
    pub(crate) fn same(&self, other: &Header) -> bool {
        (self.code, self.len, self.ragged) == (other.code, other.len, other.ragged)
    }

    /// The call, as if it had been made here.
    pub(crate) fn call(&self) -> Option<Call> {
        Call::decode(self.code, self.len as usize, self.ragged, Location::caller())
    }

    /// As `Call` shows itself, at the other process's site.
    pub(crate) fn show(&self) -> String {
        let Some(call) = self.call() else { return "something unknown".into() };
        let text = call.to_string();
        let what = text.split(" at ").next().unwrap_or_default();
        let end = self.file.iter().position(|b| *b == 0).unwrap_or(self.file.len());
        format!("{what} at {}:{}", String::from_utf8_lossy(&self.file[..end]), self.line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::Verb;
    use crate::element::DType;

    #[test]
    fn a_header_shows_its_call_at_its_own_site() {
        let call = Call::new(Verb::AllGather, DType::Bf16, 12, Location::caller());
        let header = Header::new(&call, 3);
        let bytes = bytemuck::bytes_of(&header).to_vec();
        let back: Header = bytemuck::pod_read_unaligned(&bytes);
        assert!(back.same(&header) && back.call() == Some(call));
        assert_eq!(back.show(), call.to_string());
    }
}
