//! Counter-based random numbers: a value is a function of seed, stream name and position.
//!
//! No state to save, share or advance: a parameter's initial value and a dropout mask depend on
//! the logical position in the whole tensor, never on how it is sharded. The generator mixes the
//! counter with two rounds of SplitMix64's finaliser (Steele et al., 2014).

/// One named stream of random numbers, indexed by position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream(u64);

impl Stream {
    /// The stream of a seed and a number.
    pub fn new(seed: u64, id: u64) -> Stream {
        Stream(mix(mix(seed ^ 0x9e37_79b9_7f4a_7c15).wrapping_add(id)))
    }

    /// The stream of a seed and a name.
    pub fn named(seed: u64, name: &str) -> Stream {
        // FNV-1a: stable between runs and machines, unlike the standard library's hasher.
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| {
            (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)
        });
        Stream::new(seed, hash)
    }

    /// A stream below this one.
    pub fn child(self, id: u64) -> Stream {
        Stream::new(self.0, id)
    }

    /// 64 random bits at a position.
    pub fn bits(self, index: u64) -> u64 {
        colossal_kernels::random_bits(self.0, index)
    }

    /// What kernels draw it by.
    pub(crate) fn key(self) -> u64 {
        self.0
    }

    /// Uniform in [0, 1) at a position.
    pub fn uniform(self, index: u64) -> f64 {
        (self.bits(index) >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Standard normal at a position (Box-Muller).
    pub fn normal(self, index: u64) -> f32 {
        let bits = self.bits(index);
        let u = ((bits >> 32) as f64 + 1.0) * (1.0 / 4_294_967_297.0);
        let v = (bits & 0xffff_ffff) as f64 * (1.0 / 4_294_967_296.0);
        ((-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
    }
}

fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normal_has_unit_variance_and_streams_differ() {
        let s = Stream::named(7, "w");
        let n = 100_000;
        let (mut sum, mut squares) = (0.0, 0.0);
        for i in 0..n {
            let x = f64::from(s.normal(i));
            sum += x;
            squares += x * x;
        }
        assert!((sum / n as f64).abs() < 0.01);
        assert!((squares / n as f64 - 1.0).abs() < 0.02);
        assert_ne!(s.bits(0), Stream::named(7, "v").bits(0));
        assert_ne!(s.bits(0), Stream::named(8, "w").bits(0));
    }
}
