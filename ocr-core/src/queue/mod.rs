//! The queue: fair policy, and the scheduler that runs it.
pub mod scheduler;
