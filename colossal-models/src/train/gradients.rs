//! Memory of gradients, on the device of the model.

use std::ops::Range;

use colossal_tensor::storage::{Buffer, Typed};
use colossal_tensor::{Device, Group, View, ViewMut, kernels};
use colossal_zero::{Error, HostFlight, Result, Space};

/// Gradients on this device.
#[derive(Debug)]
pub(super) struct Gradients(pub(super) Device);

/// A reduction under way.
#[derive(Debug)]
pub(super) enum Flight {
    Host(HostFlight<Typed<f32>>),
    /// Of a GPU's gradients, through the host.
    Staged {
        flight: HostFlight<Typed<f32>>,
        buffer: Buffer,
        piece: Option<Buffer>,
    },
    /// One rank has nothing to wait for.
    Done(Buffer, Option<Buffer>),
}

impl Space for Gradients {
    type Buffer = Buffer;
    type Part<'a> = ViewMut<'a, f32>;
    type View<'a> = View<'a, f32>;
    type Flight = Flight;

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
        let start = |buffer, piece: Option<Buffer>| {
            HostFlight::start(group, Typed::new(buffer), piece.map(Typed::new))
        };
        if self.0 == Device::Cpu {
            return Ok(Flight::Host(start(buffer, piece)));
        }
        if group.world_size() == 1 {
            return match piece {
                None => Ok(Flight::Done(buffer, None)),
                Some(mut piece) => {
                    piece.view_mut::<f32>().copy(buffer.view()).map_err(failed)?;
                    Ok(Flight::Done(buffer, Some(piece)))
                }
            };
        }
        let copy = Buffer::copy_of(&Device::Cpu, buffer.view::<f32>()).map_err(failed)?;
        let room = piece.as_ref().map(|piece| Buffer::with_bytes(piece.bytes()));
        Ok(Flight::Staged { flight: start(copy, room), buffer, piece })
    }

    fn reduce_wait(&self, flight: Flight) -> Result<(Buffer, Option<Buffer>)> {
        match flight {
            Flight::Host(flight) => {
                let (buffer, piece) = flight.wait()?;
                Ok((buffer.0, piece.map(|piece| piece.0)))
            }
            Flight::Staged { flight, mut buffer, mut piece } => {
                let (sum, part) = flight.wait()?;
                match (&mut piece, part) {
                    (Some(piece), Some(part)) => piece.view_mut::<f32>().copy(part.0.view()),
                    _ => buffer.view_mut::<f32>().copy(sum.0.view()),
                }
                .map_err(failed)?;
                Ok((buffer, piece))
            }
            Flight::Done(buffer, piece) => Ok((buffer, piece)),
        }
    }
}

fn failed(error: colossal_tensor::Error) -> Error {
    Error::Space(error.to_string())
}
