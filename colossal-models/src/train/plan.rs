//! How a model is trained: a value with public fields, from code or from TOML.

use colossal_tensor::{Dtype, Error, Mesh, Result, Role, Scope, Sharding};
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
    /// Data parallelism: the batch is cut into so many parts.
    pub dp: usize,
    /// Tensor parallelism: heads, feed-forward width and vocabulary are cut into so many parts.
    pub tp: usize,
    /// Megatron's sequence parallelism on the `tp` axis: tokens of the residual stream are cut.
    pub sequence_parallel: bool,
    /// ZeRO: 0 replicates optimizer states and gradients over `dp`, 1 cuts the states, 2 both.
    pub zero: u8,
    /// Blocks are run again in backward instead of saved.
    pub recompute: bool,
    /// What parameters and activations are held in. Masters and gradients are f32.
    pub precision: Precision,
    /// Gradients are accumulated over so many microbatches before each update.
    pub microbatches: usize,
    /// Gradients are reduced in buckets of so many MiB.
    pub bucket_mib: usize,
}

impl Default for Plan {
    fn default() -> Plan {
        Plan {
            dp: 1,
            tp: 1,
            sequence_parallel: false,
            zero: 0,
            recompute: false,
            precision: Precision::F32,
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

impl Plan {
    /// Ranks that it takes.
    pub fn ranks(&self) -> usize {
        self.dp * self.tp
    }

    /// The mesh and the map of this plan over `world`.
    ///
    /// # Errors
    /// A sentence that names the field and what would fit.
    pub fn scope(&self, world: &colossal_tensor::Group) -> Result<Scope> {
        self.validate()?;
        if self.ranks() != world.world_size() {
            return Err(Error::Other(format!(
                "plan: dp {} x tp {} takes {} ranks, but {} run; start as many or change a degree",
                self.dp,
                self.tp,
                self.ranks(),
                world.world_size()
            )));
        }
        let mesh = Mesh::new(world, &self.axes()).map_err(|e| Error::Comm(e.to_string()))?;
        Ok(Scope::new(mesh, self.sharding()))
    }

    /// The axes of its mesh: `dp` outermost, so that ranks of one `tp` group are neighbours.
    pub fn axes(&self) -> [(&'static str, usize); 2] {
        [("dp", self.dp), ("tp", self.tp)]
    }

    /// The map from names to placements.
    pub fn sharding(&self) -> Sharding {
        Sharding::new(vec![Role::data(), Role::tensor(self.sequence_parallel)])
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
        if self.sequence_parallel && self.tp == 1 {
            return refuse(
                "sequence_parallel cuts tokens over tp, which is 1; raise tp or turn it off".into(),
            );
        }
        Ok(())
    }
}
