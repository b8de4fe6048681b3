//! How late runs were, in a few bytes.

use std::time::Duration;

use super::scheduler::{LatenessHistogram, LatenessQuantiles};

/// Counts over powers of two, from under a millisecond to over an hour.
const BUCKETS: usize = 24;
/// When so many were counted, all counts are halved: what is old fades.
const MAX_TOTAL: u16 = 4096;

/// A histogram of the latest few thousand values: 50 bytes, quantiles right to a factor of two.
#[derive(Clone, Debug, Default)]
pub(super) struct Lateness {
    counts: [u16; BUCKETS],
    total: u16,
}

/// Counts of all values since the start, in the same buckets.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Tally {
    counts: [u64; BUCKETS],
    sum: Duration,
}

impl Tally {
    pub(super) fn record(&mut self, lateness: Duration) {
        self.counts[bucket(lateness)] += 1;
        self.sum = self.sum.saturating_add(lateness);
    }

    pub(super) fn histogram(&self) -> LatenessHistogram {
        let bounds = (0..BUCKETS as u32 - 1).map(|bucket| Duration::from_millis(1 << bucket));
        let buckets = bounds.zip(self.counts).collect();
        LatenessHistogram { buckets, over: self.counts[BUCKETS - 1], sum: self.sum }
    }
}

/// Bucket 0 is under a millisecond, bucket n under 2^n ms, the last one everything else.
fn bucket(lateness: Duration) -> usize {
    let bits = u64::BITS - (lateness.as_millis() as u64).leading_zeros();
    (bits as usize).min(BUCKETS - 1)
}

impl Lateness {
    pub(super) fn record(&mut self, lateness: Duration) {
        self.counts[bucket(lateness)] += 1;
        self.total += 1;
        if self.total >= MAX_TOTAL {
            self.counts.iter_mut().for_each(|count| *count /= 2);
            self.total = self.counts.iter().sum();
        }
    }

    pub(super) fn quantiles(&self) -> Option<LatenessQuantiles> {
        (self.total > 0).then(|| LatenessQuantiles { p50: self.quantile(0.5), p99: self.quantile(0.99) })
    }

    /// Within a bucket values are taken as spread evenly.
    fn quantile(&self, quantile: f64) -> Duration {
        let mut left = f64::from(self.total) * quantile;
        for (bucket, &count) in self.counts.iter().enumerate() {
            let count = f64::from(count);
            if count > 0.0 && left <= count {
                let upper_ms = (1u64 << bucket) as f64;
                let lower_ms = if bucket == 0 { 0.0 } else { upper_ms / 2.0 };
                return Duration::from_secs_f64((lower_ms + (upper_ms - lower_ms) * left / count) / 1000.0);
            }
            left -= count;
        }
        Duration::ZERO
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn quantiles_are_right_to_a_factor_of_two(mut values_us in prop::collection::vec(0..3_600_000_000u64, 1..4000)) {
            let mut lateness = Lateness::default();
            for &us in &values_us {
                lateness.record(Duration::from_micros(us));
            }
            values_us.sort_unstable();
            for (quantile, got) in [(0.5, lateness.quantiles().unwrap().p50), (0.99, lateness.quantiles().unwrap().p99)] {
                let rank = (values_us.len() as f64 * quantile).ceil() as usize - 1;
                let exact = Duration::from_micros(values_us[rank]);
                let slack = Duration::from_millis(1);
                prop_assert!(got <= exact * 2 + slack && exact <= got * 2 + slack, "{got:?} for {exact:?}");
            }
        }
    }

    proptest! {
        #[test]
        fn every_value_is_in_the_bucket_that_its_bound_says(values_us in prop::collection::vec(0..90_000_000_000u64, 0..200)) {
            let mut tally = Tally::default();
            for &us in &values_us {
                tally.record(Duration::from_micros(us));
            }
            let histogram = tally.histogram();
            let mut least = Duration::ZERO;
            for (under, count) in &histogram.buckets {
                let inside = values_us.iter().filter(|us| (least..*under).contains(&Duration::from_micros(**us))).count();
                prop_assert_eq!(*count, inside as u64, "{:?} to {:?}", least, under);
                least = *under;
            }
            let over = values_us.iter().filter(|us| Duration::from_micros(**us) >= least).count();
            prop_assert_eq!(histogram.over, over as u64);
            prop_assert_eq!(histogram.sum, Duration::from_micros(values_us.iter().sum()));
        }
    }

    #[test]
    fn what_is_old_fades() {
        let mut lateness = Lateness::default();
        for _ in 0..100_000 {
            lateness.record(Duration::from_secs(60));
        }
        for _ in 0..100_000 {
            lateness.record(Duration::ZERO);
        }
        assert!(lateness.quantiles().unwrap().p99 < Duration::from_millis(2));
    }
}
