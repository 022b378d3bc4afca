//! The arguments of kernels: made ready for the host or for a GPU, wherever they lie.

use colossal_kernels::cuda::{self, Stream};

use crate::device::Device;
use crate::error::Result;
use crate::storage::Buffer;
use crate::view::{View, ViewMut};

/// An argument of a kernel.
pub(super) trait Operand: Sized {
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
pub(super) trait Lend: Sized {
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

pub(super) use {on_cuda, on_host, stream_of};

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
pub(super) enum Source<'a, T> {
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
pub(super) enum OnCuda<'a, T> {
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
pub(super) enum Target<'a, T> {
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
plain!(bool, usize, i32, u32, f32);

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
