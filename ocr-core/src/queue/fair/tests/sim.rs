//! Hours of load on a simulated clock. The benches print what the tests check: both take this file in.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
};

use uuid::Uuid;

use super::{FairQueue, Limits, OpId, VmId};

pub(crate) const SECOND: u64 = 1_000_000;
/// A stream starves when it gets nothing for so many intervals.
const STARVING: u64 = 10;
/// Of what can be served.
pub(crate) const LOADS: [f64; 8] = [0.5, 0.8, 0.95, 1.0, 1.05, 1.5, 2.0, 3.0];

pub(crate) struct Stream {
    pub(crate) interval_us: u64,
    pub(crate) vm: u128,
    /// Start of the first re-run counted, of the last one, and how many there were.
    first_us: u64,
    pub(crate) last_us: u64,
    pub(crate) runs: u64,
    pub(crate) max_gap_us: u64,
    first_wait_us: u64,
    /// When it was opened, or the measurement began.
    since_us: u64,
}

/// A discrete-event simulation: operations take about the time that `length_us` says.
pub(crate) struct Sim {
    pub(crate) queue: FairQueue,
    pub(crate) now: u64,
    ends: BinaryHeap<Reverse<(u64, OpId, bool)>>,
    pub(crate) streams: BTreeMap<OpId, Stream>,
    /// Of each run, and its stream's interval.
    lateness_us: Vec<(u64, u64)>,
    once_since: BTreeMap<OpId, u64>,
    pub(crate) once_waits_us: Vec<u64>,
    length_us: u64,
    /// Machines from this number on hang: each of their operations takes 20 seconds and ends by its limit.
    pub(crate) hung_from: u128,
    random: u64,
}

/// What a scenario came to.
#[derive(Debug)]
#[allow(dead_code, reason = "each of the two users reads what it needs")]
pub(crate) struct Outcome {
    /// The greatest slip of a stream (the interval it got over that it wanted), over the least possible.
    pub(crate) slip_over_optimum: f64,
    /// Jain's index over the streams.
    pub(crate) jain: f64,
    /// Streams that starved at some time.
    pub(crate) starving: usize,
}

pub(crate) fn vm(number: u128) -> VmId {
    VmId::from_uuid(Uuid::from_u128(number))
}

impl Sim {
    pub(crate) fn new(max_running: usize, length_us: u64) -> Self {
        Self {
            queue: FairQueue::new(Limits { max_running, max_per_vm: 1000, max_total: 1_000_000 }, false),
            now: 0,
            ends: BinaryHeap::new(),
            streams: BTreeMap::new(),
            lateness_us: Vec::new(),
            once_since: BTreeMap::new(),
            once_waits_us: Vec::new(),
            length_us,
            hung_from: u128::MAX,
            random: 42,
        }
    }

    /// Operations take between half and one and a half of their mean length.
    fn draw_length(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.length_us / 2 + self.random % (self.length_us + 1)
    }

    pub(crate) fn stream(&mut self, number: u128, interval_us: u64) {
        let Ok(id) = self.queue.submit_every(vm(number), interval_us, self.now) else { panic!("it is full") };
        let since_us = self.now;
        let (first_us, last_us, runs, max_gap_us, first_wait_us) = (0, 0, 0, 0, 0);
        let stream = Stream { interval_us, vm: number, first_us, last_us, runs, max_gap_us, first_wait_us, since_us };
        self.streams.insert(id, stream);
    }

    pub(crate) fn once(&mut self, number: u128) {
        let Ok(id) = self.queue.submit_once(vm(number), self.now) else { panic!("it is full") };
        self.once_since.insert(id, self.now);
    }

    pub(crate) fn run_until(&mut self, until: u64) {
        loop {
            self.queue.advance(self.now);
            while let Some(start) = self.queue.start_next(self.now) {
                let hung = *start.vm.as_uuid() >= Uuid::from_u128(self.hung_from);
                let length = if hung { 20 * SECOND } else { self.draw_length() };
                self.ends.push(Reverse((self.now + length, start.op, hung)));
                let lateness = self.now - start.planned_us;
                if let Some(since) = self.once_since.remove(&start.op) {
                    self.once_waits_us.push(self.now - since);
                } else if start.run > 0
                    && let Some(stream) = self.streams.get_mut(&start.op)
                {
                    if stream.runs == 0 {
                        stream.first_us = self.now;
                        stream.first_wait_us = self.now - stream.since_us;
                    } else {
                        stream.max_gap_us = stream.max_gap_us.max(self.now - stream.last_us);
                        if !hung {
                            self.lateness_us.push((lateness, stream.interval_us));
                        }
                    }
                    stream.runs += 1;
                    stream.last_us = self.now;
                }
            }
            let end = self.ends.peek().map_or(u64::MAX, |end| end.0.0);
            let next = end.min(self.queue.next_due_us().unwrap_or(u64::MAX)).min(until);
            self.now = next;
            while let Some(&Reverse((end, id, hung))) = self.ends.peek()
                && end <= next
            {
                self.ends.pop();
                self.queue.finish(id, next, hung);
            }
            if next == until {
                return;
            }
        }
    }

    /// Forgets what was measured so far: what follows is the steady state.
    pub(crate) fn measure_from_here(&mut self) {
        for stream in self.streams.values_mut() {
            (stream.runs, stream.max_gap_us, stream.first_wait_us, stream.since_us) = (0, 0, 0, self.now);
        }
        self.lateness_us.clear();
        self.once_waits_us.clear();
    }

    /// Slip of each stream on a healthy machine: the interval it got, in intervals it wanted.
    pub(crate) fn slips(&self) -> Vec<f64> {
        let slip = |stream: &Stream| {
            if stream.runs < 2 {
                return f64::INFINITY;
            }
            let got = (stream.last_us - stream.first_us) as f64 / (stream.runs - 1) as f64;
            got / stream.interval_us as f64
        };
        self.streams.values().filter(|stream| stream.vm < self.hung_from).map(slip).collect()
    }

    pub(crate) fn max_slip(&self) -> f64 {
        self.slips().into_iter().fold(0.0, f64::max)
    }

    pub(crate) fn jain(&self) -> f64 {
        let rates: Vec<f64> = self.slips().into_iter().map(|slip| 1.0 / slip).collect();
        let (sum, squares) = rates.iter().fold((0.0, 0.0), |(sum, squares), rate| (sum + rate, squares + rate * rate));
        sum * sum / (rates.len() as f64 * squares)
    }

    /// Streams on healthy machines that got nothing for ten intervals, at some time since the measurement began.
    fn starving(&self) -> usize {
        let starves = |stream: &&Stream| {
            let last_us = if stream.runs == 0 { stream.since_us } else { stream.last_us };
            stream.max_gap_us.max(stream.first_wait_us).max(self.now - last_us) > STARVING * stream.interval_us
        };
        self.streams.values().filter(|stream| stream.vm < self.hung_from).filter(starves).count()
    }

    fn outcome(&self, least_slip: f64) -> Outcome {
        let slip_over_optimum = self.max_slip() / least_slip;
        Outcome { slip_over_optimum, jain: self.jain(), starving: self.starving() }
    }
}

/// Intervals of 2, 10 and 60 s, a third of the load each, for so many seconds of steady state.
pub(crate) fn steady(load: f64, seconds: u64) -> Outcome {
    mixed(load, seconds).outcome(load.max(1.0))
}

/// The same: the 99th percentile of lateness over what is allowed, twice the length of an operation or a hundredth of
/// the interval.
pub(crate) fn lateness(load: f64, seconds: u64) -> f64 {
    let sim = mixed(load, seconds);
    let allowed_us = |interval_us: u64| (2 * sim.length_us).max(interval_us / 100);
    let late = |&(late_us, interval_us): &(u64, u64)| late_us as f64 / allowed_us(interval_us) as f64;
    let mut late: Vec<f64> = sim.lateness_us.iter().map(late).collect();
    late.sort_by(f64::total_cmp);
    late[(late.len() - 1) * 99 / 100]
}

fn mixed(load: f64, seconds: u64) -> Sim {
    let (slots, length_us) = (12, SECOND / 10);
    let mut sim = Sim::new(slots, length_us);
    for (kind, interval_us) in [2 * SECOND, 10 * SECOND, 60 * SECOND].into_iter().enumerate() {
        let count = (load * slots as f64 * interval_us as f64 / length_us as f64 / 3.0).round() as u128;
        for number in 0..count {
            sim.stream((number * 3 + kind as u128) % 197, interval_us);
        }
    }
    // Until the burst of first runs is made good.
    sim.run_until(1200 * SECOND);
    sim.measure_from_here();
    sim.run_until((1200 + seconds) * SECOND);
    sim
}

/// 6 slots, operations of 0.2 s and an interval of 30 s: 900 streams are just what can be served. After half an hour
/// there come as many again.
pub(crate) fn late_join() -> Outcome {
    let mut sim = Sim::new(6, SECOND / 5);
    let join = |sim: &mut Sim| (0..900).for_each(|number| sim.stream(number % 90, 30 * SECOND));
    join(&mut sim);
    sim.run_until(1800 * SECOND);
    sim.measure_from_here();
    join(&mut sim);
    sim.run_until(3600 * SECOND);
    let starving = sim.starving();
    sim.measure_from_here();
    sim.run_until(5400 * SECOND);
    Outcome { starving, ..sim.outcome(2.0) }
}

/// Load 1.2, and a third of the streams is opened anew each minute, for half an hour. Of those that stay.
pub(crate) fn churn() -> Outcome {
    let mut sim = Sim::new(6, SECOND / 5);
    for number in 0..1080 {
        sim.stream(number % 90, 30 * SECOND);
    }
    sim.run_until(600 * SECOND);
    sim.measure_from_here();
    for minute in 11..=40 {
        sim.run_until(minute * 60 * SECOND);
        let again: Vec<_> = sim.streams.iter().filter(|(_, stream)| stream.vm < 30).map(|(id, _)| *id).collect();
        for id in again {
            if let Some(stream) = sim.streams.remove(&id) {
                sim.queue.cancel(id);
                sim.stream(stream.vm, stream.interval_us);
            }
        }
    }
    sim.streams.retain(|_, stream| stream.vm >= 30);
    sim.outcome(1.2)
}

/// One-shots alone are 1.2 times what can be served, for half an hour; 300 streams want a quarter besides.
pub(crate) fn flood() -> Outcome {
    let mut sim = Sim::new(8, SECOND / 5);
    for number in 0..300 {
        sim.stream(number % 60, 30 * SECOND);
    }
    sim.run_until(120 * SECOND);
    sim.measure_from_here();
    for number in 0..48 * 1800 {
        sim.run_until(120 * SECOND + number as u64 * SECOND / 48);
        // On the streams' machines and on as many others.
        sim.once(number % 120);
    }
    // One slot of eight: five runs a second, against ten wanted.
    sim.outcome(2.0)
}

/// Load 0.8, and five of a hundred machines hang. Of the healthy ones.
pub(crate) fn hung() -> Outcome {
    let mut sim = Sim::new(24, SECOND / 5);
    sim.hung_from = 190;
    for number in 0..2880 {
        sim.stream(number % 200, 30 * SECOND);
    }
    sim.run_until(300 * SECOND);
    sim.measure_from_here();
    sim.run_until(2100 * SECOND);
    assert!(sim.queue.counters().hung > 120, "the hung ones are still tried");
    sim.outcome(1.0)
}
