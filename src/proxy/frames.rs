//! A look at HTTP/2 from outside: whether a client takes too long over a header,
//! keeps us busy for nothing, or was sent away by our own side.
//!
//! Pingora and the h2 crate speak the protocol; this only follows the headers
//! of the frames (RFC 9113 §4.1) on their way. **Invariant:** nothing is kept of
//! them but a few bytes and counts.

use std::time::Instant;

use super::places::{Awaits, Place};

const HEADERS: u8 = 0x1;
const DATA: u8 = 0x0;
const RST_STREAM: u8 = 0x3;
const GOAWAY: u8 = 0x7;
const WINDOW_UPDATE: u8 = 0x8;
const CONTINUATION: u8 = 0x9;
const END_HEADERS: u8 = 0x4;
const END_STREAM: u8 = 0x1;
/// `:status: 400`, as every encoder writes it (RFC 7541, appendix A).
const STATUS_400: u8 = 0x80 | 12;

/// The length of a frame's header, and of what is kept of a `GOAWAY` behind it:
/// the last stream, the error.
const HEAD: usize = 9;
const GOAWAY_KEPT: usize = 8;

/// What a connection may spend at once and per second, and what frames cost.
/// Good clients reset a stream when a user gives up, ping now and then, and
/// open windows for every few events they read: 500 resets at once and 50 a
/// second, 10,000 pings and 1,000 a second, 200,000 window updates and 20,000 a
/// second are far beyond all of them.
const PURSE: u64 = 200_000;
const INCOME_PER_SECOND: u64 = 20_000;
const RESET_COSTS: u64 = 400;
const CONTROL_COSTS: u64 = 20;

/// What is followed of one HTTP/2 connection.
#[derive(Debug)]
pub(super) struct Watch {
    incoming: Frames,
    outgoing: Frames,
    /// The number of the frame that began a header which is not complete.
    header_since: Option<u64>,
    /// Whether the frame under way ends that header.
    header_ends: bool,
    /// The stream of that header.
    header_of: u32,
    /// Whether a whole header has come.
    has_asked: bool,
    streams: Streams,
    /// What the place was told last that it waits for; `None`: a request is under
    /// way.
    awaits: Option<Awaits>,
    purse: u64,
    paid_at: Instant,
}

/// More frames that do nothing than any good client sends.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Flood;

impl Watch {
    /// Begins behind the preface.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            incoming: Frames::default(),
            outgoing: Frames::default(),
            header_since: None,
            header_ends: false,
            header_of: 0,
            has_asked: false,
            streams: Streams::default(),
            awaits: Some(Awaits::Request),
            purse: PURSE,
            paid_at: now,
        }
    }

    /// Follows what the client sent.
    ///
    /// # Errors
    /// [`Flood`]: it does nothing but keep us busy.
    pub(super) fn read(&mut self, bytes: &[u8], now: Instant) -> Result<(), Flood> {
        let mut price = 0;
        let Self {
            incoming,
            header_since,
            header_ends,
            header_of,
            has_asked,
            streams,
            ..
        } = self;
        let mut header_is_in =
            |since: &mut Option<u64>, ends: &mut bool, of: u32, streams: &mut Streams| {
                if std::mem::take(ends) {
                    *since = None;
                    *has_asked = true;
                    streams.begin(of);
                }
            };
        incoming.follow(bytes, |frame| {
            header_is_in(header_since, header_ends, *header_of, streams);
            price += match frame.kind {
                HEADERS | CONTINUATION => {
                    header_since.get_or_insert(frame.number);
                    *header_ends = frame.flags & END_HEADERS != 0;
                    *header_of = frame.stream;
                    1
                }
                RST_STREAM => {
                    streams.end(frame.stream);
                    RESET_COSTS
                }
                WINDOW_UPDATE => 1,
                DATA => 0,
                _ => CONTROL_COSTS,
            };
        });
        if incoming.inside() == Inside::None {
            header_is_in(header_since, header_ends, *header_of, streams);
        }
        let waited = now.saturating_duration_since(self.paid_at).as_millis();
        let income = u64::try_from(waited).unwrap_or(u64::MAX) / 10 * (INCOME_PER_SECOND / 100);
        if income > 0 {
            self.paid_at = now;
            self.purse = self.purse.saturating_add(income).min(PURSE);
        }
        self.purse = self.purse.checked_sub(price).ok_or(Flood)?;
        Ok(())
    }

    /// Returns what the client owes us in time, as a number that stays the same
    /// as long as it is the same thing: its first header, the rest of a header,
    /// the rest of a frame. `None` if nothing. The rest of a `DATA` frame is a
    /// body's, which has its own time.
    pub(super) fn owes(&self) -> Option<u64> {
        if !self.has_asked {
            return Some(0);
        }
        let inside = (self.incoming.inside() == Inside::Other).then_some(self.incoming.number);
        self.header_since.or(inside)
    }

    /// Follows what our side sent.
    pub(super) fn wrote(&mut self, bytes: &[u8]) -> Wrote {
        let mut wrote = Wrote::default();
        let Self {
            outgoing, streams, ..
        } = self;
        outgoing.follow(bytes, |frame| {
            if frame.kind == GOAWAY && frame.error != 0 {
                wrote.error = Some(frame.error);
            }
            wrote.refused += usize::from(frame.is_bare_400);
            let ends = match frame.kind {
                HEADERS | DATA => frame.flags & END_STREAM != 0,
                kind => kind == RST_STREAM,
            };
            if ends {
                streams.end(frame.stream);
            }
        });
        wrote
    }

    /// Notes at the connection's place whether a request is under way, or what it
    /// waits for, if that has changed.
    pub(super) fn note(&mut self, place: &Place) {
        let awaits = match self.header_since {
            _ if !self.streams.open.is_empty() => None,
            Some(_) => Some(Awaits::Header),
            None => Some(Awaits::Request),
        };
        if awaits != self.awaits {
            self.awaits = awaits;
            match awaits {
                None => place.works(),
                Some(what) => place.awaits(what, Instant::now()),
            }
        }
    }
}

/// What our side sent that somebody should know of.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Wrote {
    /// The error with which it ended the connection.
    pub(super) error: Option<u32>,
    /// How many requests Pingora refused by itself: with a status and nothing
    /// else, where an answer of ours has a body.
    pub(super) refused: usize,
}

/// The requests that are under way. Never more than our side allows (100), and a
/// few that it refuses.
#[derive(Debug, Default)]
struct Streams {
    open: Vec<u32>,
    /// The highest so far: what comes again of that is a trailer.
    last: u32,
}

impl Streams {
    /// More than these our side refuses at once.
    const MOST: usize = 256;

    fn begin(&mut self, stream: u32) {
        if stream > self.last && self.open.len() < Self::MOST {
            self.open.push(stream);
        }
        self.last = self.last.max(stream);
    }

    fn end(&mut self, stream: u32) {
        self.open.retain(|open| *open != stream);
    }
}

/// The frames of one direction.
#[derive(Debug, Default)]
struct Frames {
    /// The beginning of the current frame, as far as it has come.
    start: Vec<u8>,
    /// How much of what follows its header belongs to that.
    keep: usize,
    /// What is still to come of the frame whose beginning was told.
    left: usize,
    /// Of the frame to come or under way, from 1.
    number: u64,
    kind: u8,
}

/// The beginning of a frame.
#[derive(Debug)]
struct Frame {
    number: u64,
    kind: u8,
    flags: u8,
    stream: u32,
    /// The error of a `GOAWAY`.
    error: u32,
    /// Whether it is a whole answer that says 400 and nothing more.
    is_bare_400: bool,
}

#[derive(Debug, PartialEq, Eq)]
enum Inside {
    None,
    Data,
    Other,
}

impl Frames {
    /// Tells of every frame whose beginning is in.
    fn follow(&mut self, mut bytes: &[u8], mut seen: impl FnMut(&Frame)) {
        while !bytes.is_empty() {
            if self.left > 0 {
                let passed = self.left.min(bytes.len());
                self.left -= passed;
                bytes = bytes.split_at(passed).1;
                continue;
            }
            if self.start.is_empty() {
                self.number += 1;
            }
            let wanted = HEAD + self.keep;
            let missing = wanted.saturating_sub(self.start.len());
            let (taken, rest) = bytes.split_at(missing.min(bytes.len()));
            self.start.extend_from_slice(taken);
            bytes = rest;
            let Some((head, kept)) = self.start.split_first_chunk::<HEAD>() else {
                return;
            };
            let [high, middle, low, kind, flags, stream @ ..] = *head;
            let length = u32::from_be_bytes([0, high, middle, low]) as usize;
            self.kind = kind;
            self.keep = match kind {
                GOAWAY if length >= GOAWAY_KEPT => GOAWAY_KEPT,
                HEADERS if length == 1 => 1,
                _ => 0,
            };
            if kept.len() < self.keep {
                continue;
            }
            let error = kept
                .last_chunk::<4>()
                .map_or(0, |code| u32::from_be_bytes(*code));
            seen(&Frame {
                number: self.number,
                kind,
                flags,
                // The first bit is none of it.
                stream: u32::from_be_bytes(stream) & (u32::MAX >> 1),
                error,
                is_bare_400: kind == HEADERS
                    && flags & END_STREAM != 0
                    && kept == [STATUS_400].as_slice(),
            });
            self.left = length - kept.len();
            self.start.clear();
            self.keep = 0;
        }
    }

    fn inside(&self) -> Inside {
        match (self.left > 0, self.start.is_empty()) {
            (true, _) if self.kind == DATA => Inside::Data,
            (false, true) => Inside::None,
            _ => Inside::Other,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{super::places::Places, *};

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&length[1..], &[kind, flags, 0, 0, 0, 1], payload].concat()
    }

    fn asked() -> Watch {
        let mut watch = Watch::new(Instant::now());
        let header = frame(HEADERS, END_HEADERS, b"header");
        watch.read(&header, Instant::now()).unwrap();
        watch
    }

    #[test]
    fn a_client_owes_a_header_until_it_is_whole_however_it_is_cut() {
        let all = [
            frame(4, 0, &[]),
            frame(HEADERS, 0, b"some"),
            frame(CONTINUATION, 0, b"more"),
            frame(CONTINUATION, END_HEADERS, b"rest"),
        ]
        .concat();
        for cut in 1..all.len() {
            let mut watch = Watch::new(Instant::now());
            let (first, second) = all.split_at(cut);
            watch.read(first, Instant::now()).unwrap();
            assert_eq!(watch.owes(), Some(0), "{cut}");
            watch.read(second, Instant::now()).unwrap();
            assert_eq!(watch.owes(), None, "{cut}");
        }
    }

    #[test]
    fn a_later_header_is_owed_from_its_first_byte_to_its_last() {
        let mut watch = asked();
        let header = [
            frame(HEADERS, 0, b"some"),
            frame(CONTINUATION, END_HEADERS, b"rest"),
        ]
        .concat();
        let (last, dribble) = header.split_last().unwrap();
        let mut owed = Vec::new();
        for byte in dribble {
            watch.read(&[*byte], Instant::now()).unwrap();
            owed.push(watch.owes());
        }
        assert!(owed.iter().all(|owes| owes.is_some()), "{owed:?}");
        owed.dedup();
        assert_eq!(owed.len(), 1, "one thing, with one deadline: {owed:?}");
        watch.read(&[*last], Instant::now()).unwrap();
        assert_eq!(watch.owes(), None);
    }

    #[test]
    fn a_piece_of_data_is_not_a_header() {
        let mut watch = asked();
        let data = frame(DATA, 0, b"a piece");
        watch.read(&data[..12], Instant::now()).unwrap();
        assert_eq!(watch.owes(), None);
        watch.read(&data[12..], Instant::now()).unwrap();
        watch.read(&data[..5], Instant::now()).unwrap();
        assert!(watch.owes().is_some());
    }

    #[test]
    fn resets_and_pings_are_bounded_and_the_bound_grows_back() {
        for (kind, most) in [(RST_STREAM, 500), (6, 10_000), (4, 10_000), (2, 10_000)] {
            let start = Instant::now();
            let mut watch = Watch::new(start);
            let one = frame(kind, 0, &[0; 8]);
            assert_eq!(watch.read(&one.repeat(most), start), Ok(()), "{kind}");
            assert_eq!(watch.read(&one, start), Err(Flood), "{kind}");
            let later = start + Duration::from_secs(5);
            assert_eq!(watch.read(&one.repeat(most / 10), later), Ok(()), "{kind}");
        }
    }

    #[test]
    fn an_error_of_our_side_is_seen_however_it_is_cut() {
        let good = frame(GOAWAY, 0, &[0; 8]);
        let bad = frame(GOAWAY, 0, &[0, 0, 0, 7, 0, 0, 0, 11, b'w', b'h', b'y']);
        let all = [frame(4, 0, &[0; 6]), good, bad, frame(DATA, 0, b"x")].concat();
        for cut in 0..all.len() {
            let mut watch = Watch::new(Instant::now());
            let (first, second) = all.split_at(cut);
            let error = watch.wrote(first).error.or(watch.wrote(second).error);
            assert_eq!(error, Some(11), "{cut}");
        }
    }

    #[test]
    fn a_refusal_of_pingoras_own_is_seen_however_it_is_cut() {
        let bare = END_HEADERS | END_STREAM;
        let all = [
            frame(HEADERS, bare, &[STATUS_400]),
            frame(HEADERS, END_HEADERS, &[STATUS_400]),
            frame(HEADERS, bare, &[0x88]),
            frame(HEADERS, bare, &[STATUS_400, 0x5f]),
            frame(HEADERS, bare, &[STATUS_400]),
            frame(DATA, END_STREAM, &[STATUS_400]),
        ]
        .concat();
        for cut in 0..all.len() {
            let mut watch = Watch::new(Instant::now());
            let (first, second) = all.split_at(cut);
            let refused = watch.wrote(first).refused + watch.wrote(second).refused;
            assert_eq!(refused, 2, "{cut}");
        }
    }

    #[test]
    fn a_request_is_under_way_from_its_header_to_the_end_of_its_answer() {
        let on = |stream: u8, kind, flags| {
            let mut frame = frame(kind, flags, b"x");
            frame[8] = stream;
            frame
        };
        let now = Instant::now();
        let mut watch = Watch::new(now);
        for (in_, out, open) in [
            (vec![on(1, HEADERS, END_HEADERS)], vec![], 1),
            (vec![on(1, DATA, 0), on(3, HEADERS, END_HEADERS)], vec![], 2),
            (vec![], vec![on(1, HEADERS, END_HEADERS), on(1, DATA, 0)], 2),
            (vec![on(1, HEADERS, END_HEADERS | END_STREAM)], vec![], 2),
            (vec![], vec![on(1, DATA, END_STREAM)], 1),
            (vec![], vec![on(1, RST_STREAM, 0)], 1),
            (vec![on(3, RST_STREAM, 0)], vec![], 0),
            (vec![on(1, HEADERS, END_HEADERS)], vec![], 0),
        ] {
            watch.read(&in_.concat(), now).unwrap();
            watch.wrote(&out.concat());
            assert_eq!(watch.streams.open.len(), open, "{:?}", watch.streams);
        }
        // Half a header is none, however many pieces it comes in.
        watch.read(&on(5, HEADERS, 0), now).unwrap();
        watch.read(&on(5, CONTINUATION, 0), now).unwrap();
        assert!(watch.streams.open.is_empty());
        let end = on(5, CONTINUATION, END_HEADERS);
        watch.read(&end[..9], now).unwrap();
        assert!(watch.streams.open.is_empty());
        watch.read(&end[9..], now).unwrap();
        assert_eq!(watch.streams.open, [5]);
        for stream in 2..2000 {
            watch.streams.begin(stream);
        }
        assert_eq!(watch.streams.open.len(), Streams::MOST);
    }

    #[test]
    fn half_a_header_makes_room_and_a_whole_one_does_not() {
        let now = Instant::now();
        let on = |stream: u8, kind, flags| {
            let mut frame = frame(kind, flags, b"x");
            frame[8] = stream;
            frame
        };
        let whole = on(1, HEADERS, END_HEADERS | END_STREAM);
        let (half, rest) = (on(3, HEADERS, 0), on(3, CONTINUATION, END_HEADERS));
        for (sent, makes_room) in [
            (vec![], true),
            (vec![&half], true),
            (vec![&half, &rest], false),
            (vec![&whole], false),
            // Half a header beside a request that is under way.
            (vec![&whole, &half], false),
        ] {
            let place = Places::place(now, now);
            let mut places = Places::default();
            places.add(1, &place);
            let mut watch = Watch::new(now);
            for frame in &sent {
                watch.read(frame, now).unwrap();
                watch.note(&place);
            }
            assert_eq!(places.make_room(now), makes_room, "{sent:?}");
        }
    }

    #[test]
    fn anything_at_all_can_be_followed() {
        let mut watch = Watch::new(Instant::now());
        for seed in 0..2000_u32 {
            let bytes: Vec<u8> = (0..seed % 40)
                .map(|i| {
                    u8::try_from((seed.wrapping_mul(2_654_435_761) >> (i % 24)) & 0xff).unwrap()
                })
                .collect();
            watch.wrote(&bytes);
            assert!(watch.outgoing.start.len() <= HEAD + GOAWAY_KEPT);
        }
    }
}
