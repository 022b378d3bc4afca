//! A model's shapes and layouts checked on a pretended mesh of any size: no memory, no messages.
//!
//! Every op applies its rule, checks its shapes, and enters what it would hold and send in an
//! account; nothing is computed. The account's bytes are those that the counters of a real run
//! show, and tests hold it to that.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use parking_lot::Mutex;

use crate::autograd::is_grad_enabled;
use crate::dtype::Dtype;
use crate::error::Result;
use crate::params::Params;
use crate::placement::{Placement, Sharding};
use crate::tensor::{Scope, Tensor};

/// What one rank of the pretended mesh would hold and send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Each parameter, in order of construction.
    pub params: Vec<Held>,
    /// Parameter elements on one rank.
    pub local_elements: usize,
    /// Parameter elements of the whole model.
    pub global_elements: usize,
    /// Bytes of activations that backward needs, when forward has ended.
    pub activation_bytes: usize,
    /// The most bytes of activations at once in forward.
    pub peak_activation_bytes: usize,
    /// What forward and backward send, by op and axis. Experts are taken as evenly used.
    pub traffic: Vec<Traffic>,
    /// Bytes sent along each axis to sum gradients in f32 (or to cut and gather them, under ZeRO).
    pub gradient_bytes: Vec<usize>,
}

impl Report {
    /// Bytes sent along an axis in forward and in backward, gradients of parameters apart.
    pub fn sent(&self, axis: &str) -> (usize, usize) {
        let along = self.traffic.iter().filter(|t| t.axis == axis);
        along.fold((0, 0), |(f, b), t| (f + t.forward, b + t.backward))
    }
}

/// One rank's part of a parameter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// Its name.
    pub name: String,
    /// The shape of the whole.
    pub global_shape: Vec<usize>,
    /// The shape of the part.
    pub shape: Vec<usize>,
    /// Its placement along each axis, as `tp:Shard(0)`.
    pub layout: Vec<String>,
}

/// What an op sends along an axis.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Traffic {
    /// The op.
    pub op: &'static str,
    /// The axis of the mesh.
    pub axis: String,
    /// How often.
    pub calls: usize,
    /// Bytes of one rank in forward.
    pub forward: usize,
    /// Bytes of one rank in backward.
    pub backward: usize,
}

/// Runs `forward` once on a pretended mesh with these axes: every rule is applied, every shape
/// checked, nothing computed.
///
/// # Errors
/// What the run would have met: a forgotten `redistribute`, a dim that does not divide.
pub fn check(
    axes: &[(&'static str, usize)],
    sharding: Sharding,
    dtype: Dtype,
    forward: impl FnOnce(&Params) -> Result<Tensor>,
) -> Result<Report> {
    let scope = Scope::fake(axes, sharding);
    let params = Params::new(&scope, 0, dtype);
    let result = forward(&params)?;
    let account = scope.account().cloned().unwrap_or_default();
    let activation_bytes = account.live.load(Ordering::Relaxed);
    drop(result);
    let all = params.all();
    let count = |shape: &[usize]| shape.iter().product::<usize>();
    let mut gradient_bytes = vec![0; axes.len()];
    for param in all.iter().filter(|p| p.is_trainable()) {
        for axis in scope.wide_axes() {
            if param.layout()[axis] == Placement::Replicate {
                let ranks = axes[axis].1;
                gradient_bytes[axis] += 2 * (4 * count(param.shape()) * (ranks - 1) / ranks);
            }
        }
    }
    let traffic = std::mem::take(&mut *account.traffic.lock());
    let traffic = traffic.into_iter().map(|((op, axis), (calls, forward, backward))| Traffic {
        op,
        axis: scope.axis(axis).0,
        calls,
        forward,
        backward,
    });
    Ok(Report {
        local_elements: all.iter().map(|p| count(p.shape())).sum(),
        global_elements: all.iter().map(|p| count(&p.global_shape())).sum(),
        activation_bytes,
        peak_activation_bytes: account.peak.load(Ordering::Relaxed),
        traffic: traffic.collect(),
        gradient_bytes,
        params: all
            .iter()
            .map(|p| Held {
                name: p.name().to_string(),
                global_shape: p.global_shape(),
                shape: p.shape().to_vec(),
                layout: (0..axes.len())
                    .map(|a| format!("{}:{}", axes[a].0, p.layout()[a]))
                    .collect(),
            })
            .collect(),
    })
}

/// Calls, forward bytes, backward bytes, of an op along an axis.
type Sent = BTreeMap<(&'static str, usize), (usize, usize, usize)>;

/// What a pretended mesh has seen.
#[derive(Debug, Default)]
pub(crate) struct Account {
    live: AtomicUsize,
    peak: AtomicUsize,
    traffic: Mutex<Sent>,
    /// A layer is being run for what it will do in backward.
    again: AtomicBool,
}

impl Account {
    pub(crate) fn sends(&self, op: &'static str, axis: usize, forward: usize, backward: usize) {
        let backward = if is_grad_enabled() { backward } else { 0 };
        let (forward, backward) = match self.again.load(Ordering::Relaxed) {
            true => (0, forward + backward),
            false => (forward, backward),
        };
        let mut traffic = self.traffic.lock();
        let sent = traffic.entry((op, axis)).or_default();
        *sent = (sent.0 + 1, sent.1 + forward, sent.2 + backward);
    }

    pub(crate) fn again(&self, on: bool) {
        self.again.store(on, Ordering::Relaxed);
    }
}

/// The bytes of a pretended tensor: live as long as any view of it is.
#[derive(Debug)]
pub(crate) struct Pretended(Arc<Account>, usize);

impl Pretended {
    pub(crate) fn new(scope: &Scope, bytes: usize) -> Arc<Pretended> {
        let account = scope.account().cloned().unwrap_or_default();
        let live = account.live.fetch_add(bytes, Ordering::Relaxed) + bytes;
        account.peak.fetch_max(live, Ordering::Relaxed);
        Arc::new(Pretended(account, bytes))
    }
}

impl Drop for Pretended {
    fn drop(&mut self) {
        self.0.live.fetch_sub(self.1, Ordering::Relaxed);
    }
}
