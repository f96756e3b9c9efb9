//! Which day and month it is, and when they end.

use std::time::{Duration, SystemTime};

use chrono::{DateTime, Datelike, Days, Local, NaiveDate, NaiveTime, TimeZone, Utc};
use schemars::JsonSchema;
use serde::Deserialize;

/// Whose midnight a day begins at.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(inline)]
pub enum Zone {
    /// UTC's.
    #[default]
    Utc,
    /// That of the machine.
    Local,
}

/// A day and the month it is in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Today {
    zone: Zone,
    /// Such as `2026-11-21`.
    pub(super) day: String,
    /// Such as `2026-11`.
    pub(super) month: String,
    /// When the day begins, and when both end.
    begins: SystemTime,
    pub(super) day_ends: SystemTime,
    pub(super) month_ends: SystemTime,
}

impl Today {
    /// Returns the day that a moment is in.
    pub(super) fn at(now: SystemTime, zone: Zone) -> Self {
        let date = match zone {
            Zone::Utc => DateTime::<Utc>::from(now).date_naive(),
            Zone::Local => DateTime::<Local>::from(now).date_naive(),
        };
        let next = date.checked_add_days(Days::new(1)).unwrap_or(date);
        let (year, month) = match date.month() {
            12 => (date.year() + 1, 1),
            month => (date.year(), month + 1),
        };
        let next_month = NaiveDate::from_ymd_opt(year, month, 1).unwrap_or(next);
        Self {
            zone,
            day: date.format("%Y-%m-%d").to_string(),
            month: date.format("%Y-%m").to_string(),
            begins: midnight(date, zone),
            day_ends: midnight(next, zone),
            month_ends: midnight(next_month, zone),
        }
    }

    pub(super) fn zone(&self) -> Zone {
        self.zone
    }

    /// Returns whether a moment is in this day.
    pub(super) fn holds(&self, now: SystemTime, zone: Zone) -> bool {
        zone == self.zone && self.begins <= now && now < self.day_ends
    }
}

/// Returns the first moment of a day.
fn midnight(date: NaiveDate, zone: Zone) -> SystemTime {
    let naive = date.and_time(NaiveTime::MIN);
    match zone {
        Zone::Utc => naive.and_utc().into(),
        // Where clocks are put forward at midnight, the day begins at one.
        Zone::Local => (0..=3)
            .find_map(|hour| {
                let naive = naive + chrono::Duration::hours(hour);
                Local.from_local_datetime(&naive).earliest()
            })
            .map_or_else(|| naive.and_utc().into(), Into::into),
    }
}

/// Returns how long it is until then; never nothing.
pub(super) fn until(end: SystemTime, now: SystemTime) -> Duration {
    end.duration_since(now)
        .unwrap_or_default()
        .max(Duration::from_millis(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time(text: &str) -> SystemTime {
        humantime::parse_rfc3339(text).unwrap()
    }

    #[test]
    fn a_day_and_a_month_end_at_midnight() {
        for (now, day, month, day_ends, month_ends) in [
            (
                "2026-11-21T18:00:00Z",
                "2026-11-21",
                "2026-11",
                "2026-11-22T00:00:00Z",
                "2026-12-01T00:00:00Z",
            ),
            (
                "2026-12-31T23:59:59Z",
                "2026-12-31",
                "2026-12",
                "2027-01-01T00:00:00Z",
                "2027-01-01T00:00:00Z",
            ),
            (
                "2028-02-28T00:00:00Z",
                "2028-02-28",
                "2028-02",
                "2028-02-29T00:00:00Z",
                "2028-03-01T00:00:00Z",
            ),
        ] {
            let today = Today::at(time(now), Zone::Utc);
            assert_eq!((&*today.day, &*today.month), (day, month));
            assert_eq!(today.day_ends, time(day_ends));
            assert_eq!(today.month_ends, time(month_ends));
            assert!(today.holds(time(now), Zone::Utc));
            assert!(!today.holds(time(day_ends), Zone::Utc));
            assert!(!today.holds(time(now), Zone::Local));
        }
    }

    #[test]
    fn a_local_day_is_about_a_day_long() {
        let now = time("2026-11-21T18:00:00Z");
        let today = Today::at(now, Zone::Local);
        assert!(today.holds(now, Zone::Local));
        let hours = today.day_ends.duration_since(today.begins).unwrap();
        assert!((22..=26).contains(&(hours.as_secs() / 3600)));
    }
}
