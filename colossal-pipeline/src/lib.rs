#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod action;
mod error;
mod executor;
mod gpipe;
mod one_f_one_b;
mod schedule;
mod simulate;

pub use action::Action;
pub use error::{Error, Result};
pub use executor::{Executor, run};
pub use gpipe::gpipe;
pub use one_f_one_b::one_f_one_b;
pub use schedule::Schedule;
pub use simulate::{Cost, Timeline};
