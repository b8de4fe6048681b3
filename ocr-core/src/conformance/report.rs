//! What a run found, for people and for programs.

use std::{fmt, time::Duration};

use serde::{Serialize, Serializer, ser::SerializeStruct};

use super::Trait;

/// How a case ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// What must hold held.
    Passed,
    /// It did not; the text says what was seen.
    Failed(String),
    /// It is not for this subject; the text says why.
    Ignored(String),
}

/// One case's end.
#[derive(Clone, Debug)]
pub struct CaseReport {
    /// The case's name.
    pub name: &'static str,
    /// Its trait; none for the sweep.
    pub subject: Option<Trait>,
    /// What must hold, in a few words.
    pub about: &'static str,
    /// How it ended.
    pub outcome: Outcome,
    /// How long it took.
    pub took: Duration,
}

/// A run's end. `Display` gives a table; [`Report::to_json`] the same for programs.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The tag that everything carried.
    pub owner: String,
    /// All cases that were chosen, in the table's order, and the sweep.
    pub cases: Vec<CaseReport>,
    /// How long all of it took.
    #[serde(rename = "took_ms", serialize_with = "milliseconds")]
    pub took: Duration,
}

impl Report {
    /// How many passed.
    pub fn passed(&self) -> usize {
        self.count(|outcome| *outcome == Outcome::Passed)
    }

    /// How many failed.
    pub fn failed(&self) -> usize {
        self.count(|outcome| matches!(outcome, Outcome::Failed(_)))
    }

    /// How many were ignored.
    pub fn ignored(&self) -> usize {
        self.count(|outcome| matches!(outcome, Outcome::Ignored(_)))
    }

    /// The names of those that failed, in order.
    pub fn failures(&self) -> Vec<&'static str> {
        self.cases.iter().filter(|case| matches!(case.outcome, Outcome::Failed(_))).map(|case| case.name).collect()
    }

    /// The report as JSON, with counts.
    pub fn to_json(&self) -> serde_json::Value {
        let mut json = serde_json::json!(self);
        json["passed"] = self.passed().into();
        json["failed"] = self.failed().into();
        json["ignored"] = self.ignored().into();
        json
    }

    fn count(&self, wanted: impl Fn(&Outcome) -> bool) -> usize {
        self.cases.iter().filter(|case| wanted(&case.outcome)).count()
    }
}

impl fmt::Display for CaseReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (word, why) = match &self.outcome {
            Outcome::Passed => ("passed", None),
            Outcome::Failed(why) => ("FAILED", Some(why)),
            Outcome::Ignored(why) => ("ignored", Some(why)),
        };
        write!(f, "{word:<8} {:<30} {:>8.3} s  {}", self.name, self.took.as_secs_f64(), self.about)?;
        match why {
            Some(why) => write!(f, "\n         {why}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for case in &self.cases {
            writeln!(f, "{case}")?;
        }
        write!(
            f,
            "{} passed, {} failed, {} ignored in {:.1} s (owner {})",
            self.passed(),
            self.failed(),
            self.ignored(),
            self.took.as_secs_f64(),
            self.owner
        )
    }
}

impl Serialize for CaseReport {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let (word, why) = match &self.outcome {
            Outcome::Passed => ("passed", None),
            Outcome::Failed(why) => ("failed", Some(why)),
            Outcome::Ignored(why) => ("ignored", Some(why)),
        };
        let mut row = serializer.serialize_struct("CaseReport", 6)?;
        row.serialize_field("name", self.name)?;
        row.serialize_field("trait", &self.subject)?;
        row.serialize_field("about", self.about)?;
        row.serialize_field("outcome", word)?;
        row.serialize_field("why", &why)?;
        row.serialize_field("took_ms", &milliseconds_of(self.took))?;
        row.end()
    }
}

fn milliseconds<S: Serializer>(took: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(milliseconds_of(*took))
}

fn milliseconds_of(took: Duration) -> u64 {
    u64::try_from(took.as_millis()).unwrap_or(u64::MAX)
}
