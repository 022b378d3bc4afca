//! Verbs in flight: `_start` takes the buffers, [`Pending::wait`] gives them back.

use crate::call::Call;
use crate::element::{Element, ReduceOp};
use crate::engine::Parts;
use crate::error::Result;
use crate::group::{Group, run, run_in_place};
use crate::in_flight::Pending;

impl Group {
    /// [`Group::all_reduce`] in flight: the buffer comes back from [`Pending::wait`].
    #[track_caller]
    pub fn all_reduce_start<T, B>(&self, mut buf: B, op: ReduceOp) -> Pending<B>
    where
        T: Element,
        B: AsMut<[T]> + Send + 'static,
    {
        let call = Ok(self.all_reduce_call::<T>(buf.as_mut().len(), op));
        self.start_in_place(call, buf)
    }

    /// [`Group::reduce_scatter`] in flight: both buffers come back.
    #[track_caller]
    pub fn reduce_scatter_start<T, B, C>(
        &self,
        input: B,
        mut output: C,
        op: ReduceOp,
    ) -> Pending<(B, C)>
    where
        T: Element,
        B: AsRef<[T]> + Send + 'static,
        C: AsMut<[T]> + Send + 'static,
    {
        let part = output.as_mut().len();
        let call = self.reduce_scatter_call::<T>(input.as_ref().len(), part, op);
        self.start(call, input, output, part)
    }

    /// [`Group::all_gather`] in flight: both buffers come back.
    #[track_caller]
    pub fn all_gather_start<T, B, C>(&self, input: B, mut output: C) -> Pending<(B, C)>
    where
        T: Element,
        B: AsRef<[T]> + Send + 'static,
        C: AsMut<[T]> + Send + 'static,
    {
        let part = input.as_ref().len();
        let call = self.all_gather_call::<T>(part, output.as_mut().len());
        self.start(call, input, output, part)
    }

    /// [`Group::all_to_all`] in flight: both buffers come back.
    #[track_caller]
    pub fn all_to_all_start<T, B, C>(&self, input: B, mut output: C) -> Pending<(B, C)>
    where
        T: Element,
        B: AsRef<[T]> + Send + 'static,
        C: AsMut<[T]> + Send + 'static,
    {
        let len = input.as_ref().len();
        let call = self.all_to_all_call::<T>(len, output.as_mut().len());
        self.start(call, input, output, len / self.world_size())
    }

    /// [`Group::broadcast`] in flight.
    #[track_caller]
    pub fn broadcast_start<T, B>(&self, mut buf: B, root: usize) -> Pending<B>
    where
        T: Element,
        B: AsMut<[T]> + Send + 'static,
    {
        let call = self.broadcast_call::<T>(buf.as_mut().len(), root);
        self.start_in_place(call, buf)
    }

    /// [`Group::reduce`] in flight.
    #[track_caller]
    pub fn reduce_start<T, B>(&self, mut buf: B, op: ReduceOp, root: usize) -> Pending<B>
    where
        T: Element,
        B: AsMut<[T]> + Send + 'static,
    {
        let call = self.reduce_call::<T>(buf.as_mut().len(), op, root);
        self.start_in_place(call, buf)
    }

    /// [`Group::gather`] in flight: both buffers come back.
    #[track_caller]
    pub fn gather_start<T, B, C>(&self, input: B, mut output: C, root: usize) -> Pending<(B, C)>
    where
        T: Element,
        B: AsRef<[T]> + Send + 'static,
        C: AsMut<[T]> + Send + 'static,
    {
        let part = input.as_ref().len();
        let call = self.gather_call::<T>(part, output.as_mut().len(), root);
        self.start(call, input, output, part)
    }

    /// [`Group::scatter`] in flight: both buffers come back.
    #[track_caller]
    pub fn scatter_start<T, B, C>(&self, input: B, mut output: C, root: usize) -> Pending<(B, C)>
    where
        T: Element,
        B: AsRef<[T]> + Send + 'static,
        C: AsMut<[T]> + Send + 'static,
    {
        let part = output.as_mut().len();
        let call = self.scatter_call::<T>(input.as_ref().len(), part, root);
        self.start(call, input, output, part)
    }

    /// [`Group::shift`] in flight: both buffers come back.
    #[track_caller]
    pub fn shift_start<T, B, C>(&self, input: B, mut output: C, by: usize) -> Pending<(B, C)>
    where
        T: Element,
        B: AsRef<[T]> + Send + 'static,
        C: AsMut<[T]> + Send + 'static,
    {
        let call = self.shift_call::<T>(input.as_ref().len(), output.as_mut().len(), by);
        self.start(call, input, output, 0)
    }

    fn start<T, B, C>(
        &self,
        call: Result<Call>,
        input: B,
        mut output: C,
        part: usize,
    ) -> Pending<(B, C)>
    where
        T: Element,
        B: AsRef<[T]> + Send + 'static,
        C: AsMut<[T]> + Send + 'static,
    {
        let call = match call {
            Ok(call) => call,
            Err(e) => return Pending::failed(e),
        };
        self.0.flight.start(move |engine| {
            let parts = Parts::Even(part);
            run(engine, &call, input.as_ref(), output.as_mut(), parts, parts)?;
            Ok((input, output))
        })
    }

    fn start_in_place<T, B>(&self, call: Result<Call>, mut buf: B) -> Pending<B>
    where
        T: Element,
        B: AsMut<[T]> + Send + 'static,
    {
        let call = match call {
            Ok(call) => call,
            Err(e) => return Pending::failed(e),
        };
        self.0.flight.start(move |engine| {
            run_in_place(engine, &call, buf.as_mut())?;
            Ok(buf)
        })
    }
}
