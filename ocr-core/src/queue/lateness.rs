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
    sum_us: u64,
}

impl Tally {
    pub(super) fn record(&mut self, late_us: u64) {
        self.counts[bucket(late_us)] += 1;
        self.sum_us = self.sum_us.saturating_add(late_us);
    }

    pub(super) fn histogram(&self) -> LatenessHistogram {
        let bounds = (0..BUCKETS as u32 - 1).map(|bucket| Duration::from_millis(1 << bucket));
        let buckets = bounds.zip(self.counts).collect();
        LatenessHistogram { buckets, over: self.counts[BUCKETS - 1], sum: Duration::from_micros(self.sum_us) }
    }
}

/// Bucket 0 is under a millisecond, bucket n under 2^n ms, the last one everything else.
fn bucket(late_us: u64) -> usize {
    let bits = u64::BITS - (late_us / 1000).leading_zeros();
    (bits as usize).min(BUCKETS - 1)
}

impl Lateness {
    pub(super) fn record(&mut self, late_us: u64) {
        self.counts[bucket(late_us)] += 1;
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

/// Median and 99th percentile of one operation's lateness, followed in four bytes: each value moves them a bit towards
/// it, on a logarithmic scale, the 99th percentile 99 times further up than down. They follow what is new within some
/// hundred values, and are then right to a factor of about two.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Trend {
    /// 0 is no value yet.
    p50: u16,
    p99: u16,
}

impl Trend {
    /// An octave.
    const OCTAVE: u16 = 1024;

    pub(super) fn record(&mut self, late_us: u64) {
        // One more, since 0 is none and has no logarithm; the least that is told apart is a millisecond.
        let value_us = late_us + 1000;
        let octave = value_us.ilog2();
        let part = (value_us << (63 - octave)) << 1 >> 54;
        let value = octave as u16 * Self::OCTAVE + part as u16;
        if self.p50 == 0 {
            (self.p50, self.p99) = (value, value);
        }
        self.p50 = step(self.p50, value, Self::OCTAVE / 8, Self::OCTAVE / 8);
        self.p99 = step(self.p99, value, Self::OCTAVE / 2, Self::OCTAVE / 198);
    }

    pub(super) fn quantiles(&self) -> Option<LatenessQuantiles> {
        let time = |value: u16| {
            let us = (f64::from(value) / f64::from(Self::OCTAVE)).exp2() - 1000.0;
            Duration::from_micros(us.max(0.0) as u64)
        };
        (self.p50 > 0).then(|| LatenessQuantiles { p50: time(self.p50), p99: time(self.p99.max(self.p50)) })
    }
}

/// Never past the value itself.
fn step(from: u16, towards: u16, up: u16, down: u16) -> u16 {
    if from < towards { (from + up).min(towards) } else { from.saturating_sub(down).max(towards) }
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
                lateness.record(us);
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
                tally.record(us);
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
    fn a_trend_finds_both_quantiles_and_follows_what_is_new() {
        let mut trend = Trend::default();
        assert!(trend.quantiles().is_none());
        let mut random = 42u64;
        for (least_us, most_us) in [(0, 100_000), (10_000_000, 30_000_000), (0, 2000)] {
            for _ in 0..4000 {
                random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                trend.record(least_us + (random >> 33) % (most_us - least_us));
            }
            let LatenessQuantiles { p50, p99 } = trend.quantiles().unwrap();
            let near = |got: Duration, exact_us: u64| {
                let (got_us, slack_us) = (got.as_micros() as u64, 1000);
                got_us <= 2 * exact_us + slack_us && exact_us <= 2 * got_us + slack_us
            };
            assert!(near(p50, (least_us + most_us) / 2), "{p50:?} of {least_us}..{most_us}");
            assert!(near(p99, most_us), "{p99:?} of {least_us}..{most_us}");
        }
    }

    #[test]
    fn what_is_old_fades() {
        let mut lateness = Lateness::default();
        for _ in 0..100_000 {
            lateness.record(60_000_000);
        }
        for _ in 0..100_000 {
            lateness.record(0);
        }
        assert!(lateness.quantiles().unwrap().p99 < Duration::from_millis(2));
    }
}
