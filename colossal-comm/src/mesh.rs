//! Named axes over a group: a grid of ranks, the last axis fastest.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::group::Group;

/// This rank's view of a grid of ranks. Cloning is cheap.
///
/// ```
/// use colossal_comm::{Mesh, ReduceOp, on_ranks};
/// let sums = on_ranks(4, |world| {
///     let mesh = Mesh::new(&world, &[("dp", 2), ("tp", 2)]).unwrap();
///     let mut x = [world.rank() as i32];
///     mesh.group("tp").unwrap().all_reduce(&mut x, ReduceOp::Sum).unwrap();
///     x[0]
/// });
/// assert_eq!(sums, [1, 1, 5, 5]); // ranks 0, 1 and ranks 2, 3
/// ```
#[derive(Debug, Clone)]
pub struct Mesh(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    axes: Vec<(&'static str, usize)>,
    coords: Vec<usize>,
    /// One group per axis; none on a pretended mesh.
    groups: Vec<Group>,
    world: Group,
}

impl Mesh {
    /// A grid of these axes over `world`. Every rank of `world` must call it.
    ///
    /// # Errors
    /// [`Error::Argument`] when the sizes do not multiply to the number of ranks, or a name is
    /// used twice.
    #[track_caller]
    pub fn new(world: &Group, axes: &[(&'static str, usize)]) -> Result<Mesh> {
        let refuse = |reason| Err(Error::Argument { op: "mesh", reason });
        let product: usize = axes.iter().map(|(_, n)| n).product();
        if product != world.world_size() {
            return refuse(format!(
                "axes {axes:?} have {product} places for {} ranks; change a size",
                world.world_size()
            ));
        }
        for (i, (name, _)) in axes.iter().enumerate() {
            if axes[..i].iter().any(|(other, _)| other == name) {
                return refuse(format!("axis {name} is named twice"));
            }
        }
        let coords = coordinates(world.rank(), axes);
        let mut groups = Vec::with_capacity(axes.len());
        for axis in 0..axes.len() {
            // Ranks that differ along this axis only share a colour: their rank with it at 0.
            let mut base = coords.clone();
            base[axis] = 0;
            groups.push(world.split_named(index(&base, axes), axes[axis].0)?);
        }
        Ok(Mesh(Arc::new(Inner { axes: axes.to_vec(), coords, groups, world: world.clone() })))
    }

    /// One rank, no axes.
    pub fn solo() -> Mesh {
        Mesh::fake(&[])
    }

    /// A pretended grid: sizes only, for checks without ranks. [`Mesh::group`] is an error.
    pub fn fake(axes: &[(&'static str, usize)]) -> Mesh {
        let coords = vec![0; axes.len()];
        let world = Group::solo();
        Mesh(Arc::new(Inner { axes: axes.to_vec(), coords, groups: vec![], world }))
    }

    /// Names and sizes, in order.
    pub fn axes(&self) -> &[(&'static str, usize)] {
        &self.0.axes
    }

    /// All ranks.
    pub fn world(&self) -> &Group {
        &self.0.world
    }

    /// The ranks that differ from this one along `axis` only.
    ///
    /// # Errors
    /// [`Error::Argument`] for an axis that does not exist, or on a pretended mesh.
    pub fn group(&self, axis: &str) -> Result<&Group> {
        let i = self.position(axis)?;
        self.0.groups.get(i).ok_or_else(|| Error::Argument {
            op: "mesh",
            reason: format!("axis {axis} is pretended: there is nobody to talk to"),
        })
    }

    /// The grid of the named axes alone, in the order of this mesh: the ranks that share this one's
    /// coordinates on all other axes. Every rank must call it with the same axes.
    ///
    /// ```
    /// use colossal_comm::{Mesh, on_ranks};
    /// let sizes = on_ranks(8, |world| {
    ///     let mesh = Mesh::new(&world, &[("dp", 2), ("pp", 2), ("tp", 2)]).unwrap();
    ///     let replica = mesh.sub(&["pp", "tp"]).unwrap();
    ///     (mesh.coord("dp").unwrap(), replica.world().rank(), replica.world().world_size())
    /// });
    /// assert_eq!(sizes[5], (1, 1, 4));
    /// ```
    ///
    /// # Errors
    /// [`Error::Argument`] for an axis that does not exist, or on a pretended mesh.
    #[track_caller]
    pub fn sub(&self, axes: &[&str]) -> Result<Mesh> {
        let kept = axes.iter().map(|a| self.position(a)).collect::<Result<Vec<usize>>>()?;
        if let Some(first) = self.0.axes.first() {
            self.group(first.0)?;
        }
        let mut base = self.0.coords.clone();
        kept.iter().for_each(|axis| base[*axis] = 0);
        let world = self.0.world.split_named(index(&base, &self.0.axes), &axes.join("+"))?;
        let all = self.0.axes.iter().enumerate();
        let axes: Vec<_> = all.filter(|(i, _)| kept.contains(i)).map(|(_, a)| *a).collect();
        Mesh::new(&world, &axes)
    }

    /// The rank in [`Mesh::world`] with these coordinates, one for each axis.
    ///
    /// # Errors
    /// [`Error::Argument`] unless there is a place for each.
    pub fn rank_at(&self, coords: &[usize]) -> Result<usize> {
        let axes = &self.0.axes;
        if coords.len() == axes.len() && coords.iter().zip(axes).all(|(c, (_, n))| c < n) {
            return Ok(index(coords, axes));
        }
        let reason = format!("{coords:?} is no place on the axes {axes:?}");
        Err(Error::Argument { op: "mesh", reason })
    }

    /// The size of an axis.
    pub fn size(&self, axis: &str) -> Result<usize> {
        self.position(axis).map(|i| self.0.axes[i].1)
    }

    /// This rank's coordinate on an axis.
    pub fn coord(&self, axis: &str) -> Result<usize> {
        self.position(axis).map(|i| self.0.coords[i])
    }

    /// This rank's coordinate on the axis at an index; 0 beyond the last.
    pub fn coord_at(&self, index: usize) -> usize {
        self.0.coords.get(index).copied().unwrap_or(0)
    }

    fn position(&self, axis: &str) -> Result<usize> {
        self.0.axes.iter().position(|(name, _)| *name == axis).ok_or_else(|| {
            let names: Vec<_> = self.0.axes.iter().map(|(n, _)| *n).collect();
            let reason = format!("there is no axis {axis}; the mesh has {names:?}");
            Error::Argument { op: "mesh", reason }
        })
    }
}

fn coordinates(mut rank: usize, axes: &[(&'static str, usize)]) -> Vec<usize> {
    let mut coords = vec![0; axes.len()];
    for (coord, (_, size)) in coords.iter_mut().zip(axes).rev() {
        *coord = rank % size;
        rank /= size;
    }
    coords
}

fn index(coords: &[usize], axes: &[(&'static str, usize)]) -> usize {
    coords.iter().zip(axes).fold(0, |acc, (c, (_, n))| acc * n + c)
}
