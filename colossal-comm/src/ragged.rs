//! Verbs whose parts have any lengths: `_v` as in MPI.

use std::panic::Location;

use crate::call::{Call, Verb};
use crate::element::{Element, ReduceOp};
use crate::engine::Parts;
use crate::error::{Error, Result};
use crate::group::{Group, run};
use crate::in_flight::Pending;

impl Group {
    /// As [`Group::all_gather`], where rank r gives `counts[r]` elements. `counts` is the same on
    /// every rank.
    ///
    /// # Errors
    /// [`Error::Argument`] unless `input` has this rank's count and `output` the sum.
    #[track_caller]
    pub fn all_gather_v<T: Element>(
        &self,
        input: &[T],
        output: &mut [T],
        counts: &[usize],
    ) -> Result<()> {
        let call = self.all_gather_v_call::<T>(input.len(), output.len(), counts)?;
        let parts = Parts::Ragged(counts);
        run(&*self.0.engine, &call, input, output, parts, parts)
    }

    /// As [`Group::reduce_scatter`], where rank r receives `counts[r]` elements. `counts` is the
    /// same on every rank.
    ///
    /// # Errors
    /// [`Error::Argument`] unless `output` has this rank's count and `input` the sum.
    #[track_caller]
    pub fn reduce_scatter_v<T: Element>(
        &self,
        input: &[T],
        output: &mut [T],
        counts: &[usize],
        op: ReduceOp,
    ) -> Result<()> {
        let call = self.reduce_scatter_v_call::<T>(input.len(), output.len(), counts, op)?;
        let parts = Parts::Ragged(counts);
        run(&*self.0.engine, &call, input, output, parts, parts)
    }

    /// As [`Group::all_to_all_v_into`], for whom does not know what comes: it returns that, in rank
    /// order, and how many elements from whom. Costs an all-gather of the counts more.
    ///
    /// # Errors
    /// [`Error::Argument`] unless there is one count per rank and they add up to `input`.
    #[track_caller]
    pub fn all_to_all_v<T: Element>(
        &self,
        input: &[T],
        counts: &[usize],
    ) -> Result<(Vec<T>, Vec<usize>)> {
        let (rank, n) = (self.rank(), self.world_size());
        if counts.len() != n || counts.iter().sum::<usize>() != input.len() {
            let reason = format!(
                "counts {counts:?} must be {n} numbers that add up to the {} elements of input",
                input.len()
            );
            return Err(Error::Argument { op: "all_to_all_v", reason });
        }
        let mine: Vec<u64> = counts.iter().map(|c| *c as u64).collect();
        let mut all = vec![0u64; n * n];
        self.all_gather(&mine, &mut all)?;
        let from: Vec<usize> = (0..n).map(|peer| all[peer * n + rank] as usize).collect();
        let mut output = vec![T::zeroed(); from.iter().sum()];
        self.all_to_all_v_into(input, counts, &mut output, &from)?;
        Ok((output, from))
    }

    /// As [`Group::all_to_all`], where this rank sends `send[r]` elements to rank r and receives
    /// `recv[r]` from it.
    ///
    /// # Errors
    /// [`Error::Argument`] unless `input` and `output` have the sums of `send` and `recv`;
    /// [`Error::Mismatch`] on every rank when one sends what its peer does not expect.
    #[track_caller]
    pub fn all_to_all_v_into<T: Element>(
        &self,
        input: &[T],
        send: &[usize],
        output: &mut [T],
        recv: &[usize],
    ) -> Result<()> {
        let call = self.all_to_all_v_call::<T>(input.len(), send, output.len(), recv)?;
        run(&*self.0.engine, &call, input, output, Parts::Ragged(send), Parts::Ragged(recv))
    }

    /// [`Group::all_gather_v`] in flight: both buffers come back.
    #[track_caller]
    pub fn all_gather_v_start<T, B, C>(
        &self,
        input: B,
        mut output: C,
        counts: Vec<usize>,
    ) -> Pending<(B, C)>
    where
        T: Element,
        B: AsRef<[T]> + Send + 'static,
        C: AsMut<[T]> + Send + 'static,
    {
        let sizes = (input.as_ref().len(), output.as_mut().len());
        let call = self.all_gather_v_call::<T>(sizes.0, sizes.1, &counts);
        self.start_v(call, input, output, counts, None)
    }

    /// [`Group::reduce_scatter_v`] in flight: both buffers come back.
    #[track_caller]
    pub fn reduce_scatter_v_start<T, B, C>(
        &self,
        input: B,
        mut output: C,
        counts: Vec<usize>,
        op: ReduceOp,
    ) -> Pending<(B, C)>
    where
        T: Element,
        B: AsRef<[T]> + Send + 'static,
        C: AsMut<[T]> + Send + 'static,
    {
        let sizes = (input.as_ref().len(), output.as_mut().len());
        let call = self.reduce_scatter_v_call::<T>(sizes.0, sizes.1, &counts, op);
        self.start_v(call, input, output, counts, None)
    }

    /// [`Group::all_to_all_v_into`] in flight: both buffers come back.
    #[track_caller]
    pub fn all_to_all_v_start<T, B, C>(
        &self,
        input: B,
        send: Vec<usize>,
        mut output: C,
        recv: Vec<usize>,
    ) -> Pending<(B, C)>
    where
        T: Element,
        B: AsRef<[T]> + Send + 'static,
        C: AsMut<[T]> + Send + 'static,
    {
        let sizes = (input.as_ref().len(), output.as_mut().len());
        let call = self.all_to_all_v_call::<T>(sizes.0, &send, sizes.1, &recv);
        self.start_v(call, input, output, recv, Some(send))
    }

    fn start_v<T, B, C>(
        &self,
        call: Result<Call>,
        input: B,
        mut output: C,
        recv: Vec<usize>,
        send: Option<Vec<usize>>,
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
            let send = Parts::Ragged(send.as_deref().unwrap_or(&recv));
            run(engine, &call, input.as_ref(), output.as_mut(), send, Parts::Ragged(&recv))?;
            Ok((input, output))
        })
    }

    #[track_caller]
    pub(crate) fn all_gather_v_call<T: Element>(
        &self,
        input: usize,
        output: usize,
        counts: &[usize],
    ) -> Result<Call> {
        let total = self.counted("all_gather_v", counts)?;
        let mine = counts[self.rank()];
        self.has_len("all_gather_v", "input", input, mine)?;
        self.has_len("all_gather_v", "output", output, total)?;
        self.count(Verb::AllGather, size_of::<T>() * mine * (self.world_size() - 1));
        Ok(Call::new(Verb::AllGather, T::TYPE, total, Location::caller()).ragged(counts))
    }

    #[track_caller]
    pub(crate) fn reduce_scatter_v_call<T: Element>(
        &self,
        input: usize,
        output: usize,
        counts: &[usize],
        op: ReduceOp,
    ) -> Result<Call> {
        let total = self.counted("reduce_scatter_v", counts)?;
        let mine = counts[self.rank()];
        self.has_len("reduce_scatter_v", "output", output, mine)?;
        self.has_len("reduce_scatter_v", "input", input, total)?;
        self.count(Verb::ReduceScatter, size_of::<T>() * (total - mine));
        let call = Call::new(Verb::ReduceScatter, T::TYPE, total, Location::caller());
        Ok(call.op(op).ragged(counts))
    }

    #[track_caller]
    pub(crate) fn all_to_all_v_call<T: Element>(
        &self,
        input: usize,
        send: &[usize],
        output: usize,
        recv: &[usize],
    ) -> Result<Call> {
        let op = "all_to_all_v_into";
        let (sends, receives) = (self.counted(op, send)?, self.counted(op, recv)?);
        self.has_len(op, "input", input, sends)?;
        self.has_len(op, "output", output, receives)?;
        self.has_len(op, "this rank's own part", recv[self.rank()], send[self.rank()])?;
        self.count(Verb::AllToAll, size_of::<T>() * (sends - send[self.rank()]));
        // The lengths differ from rank to rank: the engine compares each pair.
        let call = Call::new(Verb::AllToAll, T::TYPE, 0, Location::caller());
        Ok(if self.world_size() == 1 { Call { len: input, ..call } } else { call.ragged(&[]) })
    }

    /// The sum of the counts, of which there must be one for each rank.
    fn counted(&self, op: &'static str, counts: &[usize]) -> Result<usize> {
        self.has_len(op, "the list of counts", counts.len(), self.world_size())?;
        counts.iter().try_fold(0usize, |sum, c| sum.checked_add(*c)).ok_or_else(|| {
            Error::Argument { op, reason: "the counts add up to more than memory".into() }
        })
    }

    fn has_len(&self, op: &'static str, what: &str, len: usize, wanted: usize) -> Result<()> {
        if len == wanted {
            return Ok(());
        }
        let reason = format!("{what} has {len} elements; rank {} needs {wanted}", self.rank());
        Err(Error::Argument { op, reason })
    }
}
