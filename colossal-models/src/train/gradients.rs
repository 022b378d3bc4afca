//! Memory of gradients, on the device of the model.

use std::ops::Range;

use colossal_comm::ReduceOp;
use colossal_tensor::storage::{Buffer, Typed};
use colossal_tensor::{Device, Group, View, ViewMut, collectives, kernels};
use colossal_zero::{Error, HostFlight, Result, Space};

/// Gradients on this device.
#[derive(Debug)]
pub(super) struct Gradients(pub(super) Device);

/// A reduction under way.
#[derive(Debug)]
pub(super) enum Flight {
    Host(HostFlight<Typed<f32>>),
    /// Of a GPU's gradients: in the order of its stream.
    Put(Buffer, Option<Buffer>),
}

impl Space for Gradients {
    type Buffer = Buffer;
    type Part<'a> = ViewMut<'a, f32>;
    type View<'a> = View<'a, f32>;
    type Flight = Flight;

    /// What a step has of gradients at its end, the next one has of activations at its start.
    const KEEPS: bool = false;

    fn room(&self, len: usize) -> Result<Buffer> {
        Buffer::on(&self.0, len * size_of::<f32>()).map_err(failed)
    }

    fn zeros(&self, len: usize) -> Result<Buffer> {
        Buffer::zeros_on::<f32>(&self.0, len).map_err(failed)
    }

    fn part<'a>(&self, buffer: &'a mut Buffer, range: Range<usize>) -> ViewMut<'a, f32> {
        buffer.view_mut().range(range)
    }

    fn view<'a>(&self, buffer: &'a Buffer, range: Range<usize>) -> View<'a, f32> {
        buffer.view().range(range)
    }

    fn clear(&self, buffer: &mut Buffer, range: Range<usize>) -> Result<()> {
        self.part(buffer, range).zero().map_err(failed)
    }

    fn add(&self, to: &mut Buffer, from: &Buffer) -> Result<()> {
        kernels::add_assign(from.view::<f32>(), to.view_mut()).map_err(failed)
    }

    fn reduce_start(&self, group: &Group, buffer: Buffer, piece: Option<Buffer>) -> Result<Flight> {
        if self.0 == Device::Cpu {
            let piece = piece.map(Typed::new);
            return Ok(Flight::Host(HostFlight::start(group, Typed::new(buffer), piece)));
        }
        let (mut buffer, mut piece) = (buffer, piece);
        match &mut piece {
            None if group.world_size() == 1 => Ok(()),
            None => collectives::all_reduce::<f32>(group, buffer.view_mut(), ReduceOp::Sum),
            Some(piece) if group.world_size() == 1 => piece.view_mut::<f32>().copy(buffer.view()),
            Some(piece) => {
                let (from, to) = (buffer.view::<f32>(), piece.view_mut());
                collectives::reduce_scatter(group, from, to, ReduceOp::Sum)
            }
        }
        .map_err(failed)?;
        Ok(Flight::Put(buffer, piece))
    }

    fn reduce_wait(&self, flight: Flight) -> Result<(Buffer, Option<Buffer>)> {
        match flight {
            Flight::Host(flight) => {
                let (buffer, piece) = flight.wait()?;
                Ok((buffer.0, piece.map(|piece| piece.0)))
            }
            Flight::Put(buffer, piece) => Ok((buffer, piece)),
        }
    }
}

fn failed(error: colossal_tensor::Error) -> Error {
    Error::Space(error.to_string())
}
