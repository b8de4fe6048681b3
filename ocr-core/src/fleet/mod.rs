//! Fleet.
mod machine;
mod quota;
