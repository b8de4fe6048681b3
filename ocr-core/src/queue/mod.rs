//! The queue: one operation at a time on one machine, so many at once over all, fair to all.
//!
//! [`fair`] decides who runs next and is pure; [`scheduler`] runs it on tokio.

pub mod fair;
mod label;
mod lateness;
pub mod scheduler;
mod wheel;

pub use fair::GateEvent;
pub use scheduler::{
    GateEvents, LatenessHistogram, LatenessQuantiles, Periodic, PeriodicStatus, QueueSnapshot, RunningOp, Scheduler,
    SchedulerConfig, Tick, VmQueue,
};
