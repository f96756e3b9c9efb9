//! The events of a stream, kept until its end in little memory.
//!
//! One event differs from the one before it in a word: kept is the word, and how
//! much of the other is before and behind it. A stream of 200 bytes an event
//! takes about 15.

/// What is taken at first, in bytes: a short stream needs no more.
const FIRST: usize = 1024;
/// What the three numbers of an event take at most, in bytes.
const NUMBERS: usize = 30;

/// The data of a stream's events, in order.
#[derive(Clone, Debug, Default)]
pub struct EventLog {
    /// For each event: how many bytes of the one before begin it and end it, the
    /// length of what stands in between, and that.
    packed: Vec<u8>,
    last: Vec<u8>,
}

impl EventLog {
    /// Adds the data of an event.
    pub fn push(&mut self, data: &[u8]) {
        if self.packed.capacity() == 0 {
            self.packed.reserve(FIRST.max(data.len() + NUMBERS));
        }
        let before = common(&self.last, data);
        let (old, new) = (self.last.get(before..), data.get(before..));
        let (old, new) = (old.unwrap_or_default(), new.unwrap_or_default());
        let behind = common_end(old, new);
        let middle = new.get(..new.len() - behind).unwrap_or_default();
        put_number(&mut self.packed, before);
        put_number(&mut self.packed, behind);
        put_number(&mut self.packed, middle.len());
        self.packed.extend_from_slice(middle);
        self.last.clear();
        self.last.extend_from_slice(data);
    }

    /// Returns whether there is none.
    pub fn is_empty(&self) -> bool {
        self.packed.is_empty()
    }

    /// Returns how many bytes of memory it takes.
    pub fn bytes(&self) -> usize {
        self.packed.capacity() + self.last.capacity()
    }

    /// Returns how many bytes it may take at most with another event.
    pub fn bytes_with(&self, data: &[u8]) -> usize {
        let needed = self.packed.len() + data.len() + NUMBERS;
        // As `Vec` grows.
        let packed = match self.packed.capacity() {
            enough if enough >= needed => enough,
            less => needed.max(less * 2).max(FIRST),
        };
        packed + self.last.capacity().max(data.len() * 2)
    }

    /// Shows every event's data.
    pub fn each(&self, mut show: impl FnMut(&[u8])) {
        let mut rest = self.packed.as_slice();
        let (mut last, mut next) = (Vec::new(), Vec::new());
        while !rest.is_empty() {
            let Some(event) = take_event(&mut rest) else {
                return;
            };
            next.clear();
            next.extend_from_slice(last.get(..event.before).unwrap_or_default());
            next.extend_from_slice(event.middle);
            let end = last.len().saturating_sub(event.behind);
            next.extend_from_slice(last.get(end..).unwrap_or_default());
            show(&next);
            std::mem::swap(&mut last, &mut next);
        }
    }
}

/// An event as it is packed.
struct Packed<'a> {
    before: usize,
    behind: usize,
    middle: &'a [u8],
}

fn take_event<'a>(rest: &mut &'a [u8]) -> Option<Packed<'a>> {
    let before = take_number(rest)?;
    let behind = take_number(rest)?;
    let length = take_number(rest)?;
    let (middle, later) = rest.split_at_checked(length)?;
    *rest = later;
    Some(Packed {
        before,
        behind,
        middle,
    })
}

/// Writes a number seven bits at a time, the lowest first.
fn put_number(out: &mut Vec<u8>, mut number: usize) {
    while number >= 0x80 {
        out.push(0x80 | (number & 0x7f).to_le_bytes()[0]);
        number >>= 7;
    }
    out.push(number.to_le_bytes()[0]);
}

fn take_number(rest: &mut &[u8]) -> Option<usize> {
    let mut number = 0_usize;
    let mut shift = 0;
    loop {
        let (&byte, later) = rest.split_first()?;
        *rest = later;
        number |= usize::from(byte & 0x7f).checked_shl(shift)?;
        if byte & 0x80 == 0 {
            return Some(number);
        }
        shift += 7;
    }
}

/// Returns how many bytes two texts begin with alike.
fn common(a: &[u8], b: &[u8]) -> usize {
    let words = a.chunks_exact(8).zip(b.chunks_exact(8));
    let whole = words.take_while(|(a, b)| a == b).count() * 8;
    let (a, b) = (a.get(whole..), b.get(whole..));
    let bytes = a.unwrap_or_default().iter().zip(b.unwrap_or_default());
    whole + bytes.take_while(|(a, b)| a == b).count()
}

/// Returns how many bytes two texts end with alike.
fn common_end(a: &[u8], b: &[u8]) -> usize {
    let words = a.rchunks_exact(8).zip(b.rchunks_exact(8));
    let whole = words.take_while(|(a, b)| a == b).count() * 8;
    let (a, b) = (a.get(..a.len() - whole), b.get(..b.len() - whole));
    let (a, b) = (a.unwrap_or_default(), b.unwrap_or_default());
    let bytes = a.iter().rev().zip(b.iter().rev());
    whole + bytes.take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(log: &EventLog) -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        log.each(|data| all.push(data.to_vec()));
        all
    }

    #[test]
    fn what_was_put_in_comes_out() {
        let events: [&[u8]; 9] = [
            b"{\"a\":\"one\"}",
            b"{\"a\":\"two\"}",
            b"{\"a\":\"two\"}",
            b"",
            b"aaaa",
            b"aaaaaaaaaaaaaaaaaaaaaaaa",
            b"aaaaaaa",
            b"x",
            &[b'y'; 1000],
        ];
        let mut log = EventLog::default();
        assert!(log.is_empty() && all(&log).is_empty());
        for event in events {
            let most = log.bytes_with(event);
            log.push(event);
            assert!(log.bytes() <= most, "{} {most}", log.bytes());
        }
        assert_eq!(all(&log), events);
    }

    #[test]
    fn a_stream_takes_little_more_than_its_words() {
        let mut log = EventLog::default();
        for number in 0..1000 {
            log.push(
                format!(
                    "{{\"id\":\"chatcmpl-0123456789\",\"object\":\"chat.completion.chunk\",\
                     \"created\":1700000000,\"model\":\"demo\",\"choices\":[{{\"index\":0,\
                     \"delta\":{{\"content\":\" {number}\"}},\"finish_reason\":null}}]}}"
                )
                .as_bytes(),
            );
        }
        assert_eq!(all(&log).len(), 1000);
        assert!(log.packed.len() < 10_000, "{}", log.packed.len());
    }
}
