//! Memory in which gradients are summed and sent: the host's, or another that a caller brings.

use std::fmt::Debug;
use std::ops::Range;

use colossal_comm::{Group, Pending, ReduceOp};

use crate::error::Result;

/// Runs of f32 somewhere, and how they are reduced over a group.
pub trait Space: Debug {
    /// An owned run.
    type Buffer: Debug;
    /// A part of one, lent for writing.
    type Part<'a>;
    /// A part of one, lent for reading.
    type View<'a>;
    /// A reduction under way, which owns its buffers.
    type Flight: Debug;

    /// Should runs be kept for the next step? Not if this memory keeps what is dropped, for
    /// whoever asks next.
    const KEEPS: bool = true;

    /// A run of so many zeros.
    fn zeros(&self, len: usize) -> Result<Self::Buffer>;

    /// A run of so many old values, which will be overwritten.
    fn room(&self, len: usize) -> Result<Self::Buffer> {
        self.zeros(len)
    }

    /// Lends a part for writing.
    fn part<'a>(&self, buffer: &'a mut Self::Buffer, range: Range<usize>) -> Self::Part<'a>;

    /// Lends a part for reading.
    fn view<'a>(&self, buffer: &'a Self::Buffer, range: Range<usize>) -> Self::View<'a>;

    /// Sets a part to zero.
    fn clear(&self, buffer: &mut Self::Buffer, range: Range<usize>) -> Result<()>;

    /// `to += from`, of equal lengths.
    fn add(&self, to: &mut Self::Buffer, from: &Self::Buffer) -> Result<()>;

    /// Starts summing `buffer` over the group: in place, or, with room for a piece, so that each
    /// rank gets its own piece there.
    fn reduce_start(
        &self,
        group: &Group,
        buffer: Self::Buffer,
        piece: Option<Self::Buffer>,
    ) -> Result<Self::Flight>;

    /// Waits for it: the buffer, and the piece if there was room for one.
    fn reduce_wait(&self, flight: Self::Flight) -> Result<(Self::Buffer, Option<Self::Buffer>)>;
}

/// The host's memory.
#[derive(Debug, Clone, Copy, Default)]
pub struct Host;

/// A reduction of the host's memory.
#[derive(Debug)]
pub enum HostFlight<B: Send + 'static> {
    /// In place.
    Whole(Pending<B>),
    /// Into a piece.
    Scattered(Pending<(B, B)>),
}

impl<B: AsRef<[f32]> + AsMut<[f32]> + Send + 'static> HostFlight<B> {
    /// Starts it, as [`Space::reduce_start`] says.
    pub fn start(group: &Group, buffer: B, piece: Option<B>) -> HostFlight<B> {
        let op = ReduceOp::Sum;
        match piece {
            None => HostFlight::Whole(group.all_reduce_start::<f32, _>(buffer, op)),
            Some(piece) => {
                let pending = group.reduce_scatter_start::<f32, _, _>(buffer, piece, op);
                HostFlight::Scattered(pending)
            }
        }
    }

    /// Waits for it.
    pub fn wait(self) -> Result<(B, Option<B>)> {
        Ok(match self {
            HostFlight::Whole(pending) => (pending.wait()?, None),
            HostFlight::Scattered(pending) => {
                let (buffer, piece) = pending.wait()?;
                (buffer, Some(piece))
            }
        })
    }
}

impl Space for Host {
    type Buffer = Vec<f32>;
    type Part<'a> = &'a mut [f32];
    type View<'a> = &'a [f32];
    type Flight = HostFlight<Vec<f32>>;

    fn zeros(&self, len: usize) -> Result<Vec<f32>> {
        Ok(vec![0.0; len])
    }

    fn part<'a>(&self, buffer: &'a mut Vec<f32>, range: Range<usize>) -> &'a mut [f32] {
        &mut buffer[range]
    }

    fn view<'a>(&self, buffer: &'a Vec<f32>, range: Range<usize>) -> &'a [f32] {
        &buffer[range]
    }

    fn clear(&self, buffer: &mut Vec<f32>, range: Range<usize>) -> Result<()> {
        buffer[range].fill(0.0);
        Ok(())
    }

    fn add(&self, to: &mut Vec<f32>, from: &Vec<f32>) -> Result<()> {
        to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
        Ok(())
    }

    fn reduce_start(
        &self,
        group: &Group,
        buffer: Vec<f32>,
        piece: Option<Vec<f32>>,
    ) -> Result<HostFlight<Vec<f32>>> {
        Ok(HostFlight::start(group, buffer, piece))
    }

    fn reduce_wait(&self, flight: HostFlight<Vec<f32>>) -> Result<(Vec<f32>, Option<Vec<f32>>)> {
        flight.wait()
    }
}
