//! How a model is trained: a value with public fields, from code or from TOML.

use colossal_tensor::{
    Context, Device, Dtype, Error, Fp8Recipe, Mesh, Result, Role, Scope, Sharding,
};
use colossal_zero::Stage;
use serde::{Deserialize, Serialize};

/// The degrees of every parallelism, and what is traded for memory.
///
/// ```
/// use colossal_models::train::Plan;
/// let plan: Plan = toml::from_str("dp = 2\nzero = 1\nprecision = 'bf16'").unwrap();
/// assert_eq!(plan, Plan { dp: 2, zero: 1, precision: colossal_models::train::Precision::Bf16, ..Plan::default() });
/// assert_eq!(plan.ranks(), 2);
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Plan {
    /// Where tensors live: `cpu`, `cuda` (each rank of a machine on the GPU of its number, counted
    /// round), `cuda:NUMBER`, or `auto`, which is `cuda` where there is a GPU.
    pub device: String,
    /// Data parallelism: the batch is cut into so many parts.
    pub dp: usize,
    /// Tensor parallelism: heads, feed-forward width and vocabulary are cut into so many parts.
    pub tp: usize,
    /// How `tp` ranks share a product: a line, a grid, layers of grids, a cube.
    pub tensor: TensorMode,
    /// Layers of the grid of `tensor = "2.5d"`.
    pub depth: usize,
    /// How sequences are cut.
    pub sequence_parallel: SequenceMode,
    /// Ranks among which `all_to_all`, `ring_attn` and `usp` share each sequence.
    pub sp: usize,
    /// `usp`: so many of `sp` share heads in attention, the others form the ring.
    pub ulysses: usize,
    /// `ring_attn`, `usp`: a ring of rings, of which the inner ones have so many ranks.
    pub inner_ring: usize,
    /// Expert parallelism: the experts of a mixture, and the batch, are cut into so many parts.
    pub ep: usize,
    /// ZeRO: 0 replicates optimizer states and gradients over `dp`, 1 cuts the states, 2 both.
    pub zero: u8,
    /// Blocks are run again in backward instead of saved.
    pub recompute: bool,
    /// What parameters and activations are held in. Masters and gradients are f32.
    pub precision: Precision,
    /// The linear layers and experts of blocks multiply in fp8, forward and backward: `off`; `tensor`: a scale for
    /// each matrix, e4m3 and e5m2; `block`: a scale for 128 elements, or 128 x 128, e4m3. Embeddings,
    /// heads, norms, attention and routers stay in `precision`.
    pub fp8: Fp8,
    /// Gradients are accumulated over so many microbatches before each update.
    pub microbatches: usize,
    /// Gradients are reduced in buckets of so many MiB.
    pub bucket_mib: usize,
}

impl Default for Plan {
    fn default() -> Plan {
        Plan {
            device: "auto".into(),
            dp: 1,
            tp: 1,
            tensor: TensorMode::default(),
            depth: 1,
            sequence_parallel: SequenceMode::default(),
            sp: 1,
            ulysses: 1,
            inner_ring: 1,
            ep: 1,
            zero: 0,
            recompute: false,
            precision: Precision::F32,
            fp8: Fp8::default(),
            microbatches: 1,
            bucket_mib: 4,
        }
    }
}

/// What parameters and activations are held in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32-bit float.
    #[default]
    F32,
    /// bfloat16, with f32 masters.
    Bf16,
}

impl Precision {
    /// The dtype.
    pub fn dtype(self) -> Dtype {
        match self {
            Precision::F32 => Dtype::F32,
            Precision::Bf16 => Dtype::Bf16,
        }
    }
}

/// How linear layers are rounded to 8 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Fp8 {
    /// Not at all.
    #[default]
    Off,
    /// [`Fp8Recipe::Tensor`].
    Tensor,
    /// [`Fp8Recipe::Block`].
    Block,
}

impl Fp8 {
    /// As layers take it.
    pub fn recipe(self) -> Option<Fp8Recipe> {
        match self {
            Fp8::Off => None,
            Fp8::Tensor => Some(Fp8Recipe::Tensor),
            Fp8::Block => Some(Fp8Recipe::Block),
        }
    }
}

/// How sequences are cut, by the names that ColossalAI gives its modes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SequenceMode {
    /// Not at all.
    #[default]
    None,
    /// Over `tp`, outside of attention and the feed-forward layer (Megatron).
    SplitGather,
    /// As `split_gather`, with gathers and scatters in chunks that overlap the products.
    Ring,
    /// Over `sp`, everywhere; attention trades tokens for heads (DeepSpeed-Ulysses).
    AllToAll,
    /// Over `sp`, everywhere; keys and values travel round a ring, zigzag.
    RingAttn,
    /// Over `sp` by both: `ulysses` ranks share heads, `sp / ulysses` form the ring.
    Usp,
}

impl SequenceMode {
    /// Its name in a TOML file.
    pub fn name(self) -> &'static str {
        match self {
            SequenceMode::None => "none",
            SequenceMode::SplitGather => "split_gather",
            SequenceMode::Ring => "ring",
            SequenceMode::AllToAll => "all_to_all",
            SequenceMode::RingAttn => "ring_attn",
            SequenceMode::Usp => "usp",
        }
    }
}

/// How tensor-parallel ranks share a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum TensorMode {
    /// A line (Megatron).
    #[default]
    #[serde(rename = "1d")]
    OneD,
    /// A q×q grid (SUMMA, Optimus).
    #[serde(rename = "2d")]
    TwoD,
    /// `depth` layers of a q×q grid (Tesseract).
    #[serde(rename = "2.5d")]
    TwoAndAHalfD,
    /// A q×q×q cube.
    #[serde(rename = "3d")]
    ThreeD,
}

impl Plan {
    /// Ranks that it takes.
    pub fn ranks(&self) -> usize {
        self.dp * self.ep * self.sp * self.tp
    }

    /// Parts into which it cuts a batch, before microbatches.
    pub fn batch_parts(&self) -> usize {
        let cut = |role: &Role| role.batch == colossal_tensor::Placement::Shard(0);
        self.rows().iter().filter(|(_, _, role)| cut(role)).map(|(_, n, _)| n).product()
    }

    /// Ranks that hold the same part of a batch.
    pub fn copies(&self) -> usize {
        self.ranks() / self.batch_parts()
    }

    /// For losses that are computed outside of the graph, token by token: are a rank's sequences
    /// whole, and its own, wherever they are read?
    ///
    /// # Errors
    /// A sentence that names `what` needs them, and the plans that keep them.
    pub fn whole_sequences(&self, what: &str) -> Result<()> {
        if self.sp == 1 && self.tensor != TensorMode::ThreeD {
            return Ok(());
        }
        Err(Error::Other(format!(
            "plan: {what} reads every token of a sequence on one rank; sp and tensor = \"3d\" move \
             them elsewhere. Use dp, tp, or sequence_parallel = \"split_gather\""
        )))
    }

    /// The mesh and the map of this plan over `world`.
    ///
    /// # Errors
    /// A sentence that names the field and what would fit.
    pub fn scope(&self, world: &colossal_tensor::Group) -> Result<Scope> {
        self.validate()?;
        if self.ranks() != world.world_size() {
            let degrees = [("dp", self.dp), ("ep", self.ep), ("sp", self.sp), ("tp", self.tp)];
            let degrees: Vec<String> = degrees
                .iter()
                .filter(|(name, n)| *n > 1 || matches!(*name, "dp" | "tp"))
                .map(|(name, n)| format!("{name} {n}"))
                .collect();
            return Err(Error::Other(format!(
                "plan: {} takes {} ranks, but {} run; start as many or change a degree",
                degrees.join(" x "),
                self.ranks(),
                world.world_size()
            )));
        }
        let mesh = Mesh::new(world, &self.axes()).map_err(|e| Error::Comm(e.to_string()))?;
        let device = Device::named(&self.device, local_rank(world.rank()))?;
        Ok(Scope::new(mesh, self.sharding()).on(&device))
    }

    /// The axes of its mesh: `dp` outermost, so that ranks of one `tp` group are neighbours.
    pub fn axes(&self) -> Vec<(&'static str, usize)> {
        self.rows().into_iter().map(|(name, size, _)| (name, size)).collect()
    }

    /// The map from names to placements.
    pub fn sharding(&self) -> Sharding {
        Sharding::new(self.rows().into_iter().map(|(_, _, role)| role).collect())
    }

    /// The table that is this plan: each axis of the mesh with its role. Axes of one rank are
    /// left out, but for `dp` and `tp`.
    fn rows(&self) -> Vec<(&'static str, usize, Role)> {
        let mut rows = vec![("dp", self.dp, Role::data())];
        if self.ep > 1 {
            rows.push(("ep", self.ep, Role::expert()));
        }
        let ring = Role::context(Context::Ring { zigzag: true });
        let (heads, around) = match self.sequence_parallel {
            SequenceMode::AllToAll => (self.sp, 1),
            SequenceMode::RingAttn => (1, self.sp),
            SequenceMode::Usp => (self.ulysses, self.sp / self.ulysses),
            _ => (1, 1),
        };
        let context = [
            ("ring", around / self.inner_ring, ring.clone()),
            ("ring_inner", self.inner_ring, ring),
            ("ulysses", heads, Role::context(Context::Ulysses)),
        ];
        rows.extend(context.into_iter().filter(|(_, n, _)| *n > 1));
        match self.tensor {
            TensorMode::OneD => rows.push((
                "tp",
                self.tp,
                match self.sequence_parallel {
                    SequenceMode::SplitGather => Role::tensor(true),
                    SequenceMode::Ring => Role::tensor_overlapped(),
                    _ => Role::tensor(false),
                },
            )),
            TensorMode::TwoD | TensorMode::TwoAndAHalfD => {
                let side = self.side();
                let [row, col] = Role::summa();
                if self.depth > 1 {
                    rows.push(("depth", self.depth, Role::data()));
                }
                rows.extend([("row", side, row), ("col", side, col)]);
            }
            TensorMode::ThreeD => {
                let [row, col, depth] = Role::cube();
                let side = self.side();
                rows.extend([("row", side, row), ("col", side, col), ("depth", side, depth)]);
            }
        }
        rows
    }

    /// The side of the grid or cube.
    fn side(&self) -> usize {
        let power = if self.tensor == TensorMode::ThreeD { 3 } else { 2 };
        let area = self.tp / self.depth.max(1);
        (1..=area).find(|q| q.pow(power) >= area).unwrap_or(1)
    }

    /// The ZeRO stage.
    pub fn stage(&self) -> Stage {
        match self.zero {
            0 => Stage::Zero,
            1 => Stage::One,
            _ => Stage::Two,
        }
    }

    /// Are the fields in range and do they go together?
    pub fn validate(&self) -> Result<()> {
        let refuse = |text: String| Err(Error::Other(format!("plan: {text}")));
        for (name, value) in [
            ("dp", self.dp),
            ("tp", self.tp),
            ("sp", self.sp),
            ("ep", self.ep),
            ("depth", self.depth),
            ("ulysses", self.ulysses),
            ("inner_ring", self.inner_ring),
            ("microbatches", self.microbatches),
            ("bucket_mib", self.bucket_mib),
        ] {
            if value == 0 {
                return refuse(format!("{name} must be at least 1"));
            }
        }
        if self.zero > 2 {
            return refuse(format!("zero = {} is not built yet; use 0, 1 or 2", self.zero));
        }
        self.validate_sequence()?;
        let side = self.side();
        let (fits, shape) = match self.tensor {
            TensorMode::OneD => (true, ""),
            TensorMode::TwoD => (side * side == self.tp, "a square, as 4 or 9"),
            TensorMode::TwoAndAHalfD => {
                (side * side * self.depth == self.tp, "depth times a square, as 8 with depth 2")
            }
            TensorMode::ThreeD => (side.pow(3) == self.tp, "a cube, as 8 or 27"),
        };
        if !fits {
            return refuse(format!("tp = {} must be {shape}, for this tensor mode", self.tp));
        }
        if self.depth > 1 && self.tensor != TensorMode::TwoAndAHalfD {
            return refuse(format!(
                "depth = {} belongs to tensor = \"2.5d\"; set that or leave depth out",
                self.depth
            ));
        }
        let overlapped = self.sequence_parallel == SequenceMode::Ring;
        if self.fp8 != Fp8::Off && (self.tensor != TensorMode::OneD || overlapped) {
            return refuse(
                "fp8 multiplies what a rank holds; products of tensor = \"2d\", \"2.5d\", \"3d\" and \
                 sequence_parallel = \"ring\" send parts round. Use tensor = \"1d\" with \
                 \"split_gather\", or leave out fp8"
                    .into(),
            );
        }
        Ok(())
    }

    /// A mode is never changed silently for another: what it cannot do is refused.
    fn validate_sequence(&self) -> Result<()> {
        use SequenceMode::{AllToAll, None, Ring, RingAttn, SplitGather, Usp};
        let refuse = |text: String| Err(Error::Other(format!("plan: {text}")));
        let mode = self.sequence_parallel;
        let name = format!("sequence_parallel = {:?}", mode.name());
        match mode {
            SplitGather | Ring if self.tp == 1 || self.tensor != TensorMode::OneD => {
                return refuse(format!(
                    "{name} cuts tokens over a 1d tp, which is 1 or a grid; raise tp or turn it off"
                ));
            }
            AllToAll | RingAttn | Usp if self.tensor != TensorMode::OneD => {
                return refuse(format!("{name} goes with tensor = \"1d\" only"));
            }
            None | SplitGather | Ring if self.sp > 1 => {
                return refuse(format!(
                    "sp = {} needs a mode that cuts sequences over it: sequence_parallel = \
                     \"all_to_all\", \"ring_attn\" or \"usp\"",
                    self.sp
                ));
            }
            AllToAll | RingAttn | Usp if self.sp == 1 => {
                return refuse(format!("{name} cuts tokens over sp, which is 1; raise sp"));
            }
            _ => {}
        }
        let rings = match mode {
            RingAttn => self.sp,
            Usp => self.sp / self.ulysses,
            _ => 1,
        };
        if self.ulysses > 1 && (mode != Usp || !self.sp.is_multiple_of(self.ulysses)) {
            return refuse(format!(
                "ulysses = {} must divide sp = {} and needs sequence_parallel = \"usp\"",
                self.ulysses, self.sp
            ));
        }
        if !rings.is_multiple_of(self.inner_ring) {
            return refuse(format!(
                "inner_ring = {} must divide the {rings} ranks of the ring",
                self.inner_ring
            ));
        }
        Ok(())
    }
}

/// The number of this rank among those of its machine, as launchers say it.
fn local_rank(rank: usize) -> usize {
    ["LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"]
        .iter()
        .find_map(|name| std::env::var(name).ok()?.parse().ok())
        .unwrap_or(rank)
}
