//! Backends that break one rule each.
