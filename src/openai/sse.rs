//! Server-sent events, read as bytes arrive: the framing of WHATWG's HTML
//! standard, section 9.2, without any I/O.
//!
//! Start at [`Framer`]. In the ordinary case (lines end with LF, the event
//! stands in one chunk) nothing is copied: a [`Frame`] is slices of the chunk.
//!
//! **Invariant:** the same bytes give the same frames, however they are cut
//! into chunks.

use bytes::{Bytes, BytesMut};

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// One event, or a block of comments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// The event as it is forwarded: its lines, each ended by LF, and a blank line.
    pub raw: Bytes,
    /// The `data` lines joined by LF; `None` without any.
    pub data: Option<Bytes>,
    /// The last `event` line.
    pub event: Option<Bytes>,
    /// Whether every line is a comment.
    pub is_comment: bool,
}

/// An event is longer than the framer may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an event is longer than {max_bytes} bytes")]
pub struct EventTooLarge {
    /// The bound.
    pub max_bytes: usize,
}

/// Cuts a stream of bytes into events: [`push`](Self::push) what arrived, then
/// call [`next`](Self::next) until it returns `None`.
///
/// Bare CR, LF and CRLF end lines in any mix. An event is there as soon as its
/// blank line is; after a CR that means at once, and an LF that follows is
/// swallowed. A byte order mark at the start is dropped, and so are blank lines
/// between events.
#[derive(Debug)]
pub struct Framer {
    max_bytes: usize,
    /// What was pushed and is not read yet.
    chunk: Bytes,
    /// The event that has begun in earlier chunks or has CRs, with LFs only.
    partial: BytesMut,
    /// Where the unfinished line begins in `partial`.
    line: usize,
    /// The last byte was a CR: an LF now belongs to it.
    after_cr: bool,
    /// Nothing has been read but, perhaps, a byte order mark.
    at_start: bool,
    /// An event was too large; there is no way to go on.
    failed: bool,
}

impl Framer {
    /// Makes a framer that holds at most `max_event_bytes` of one event.
    pub fn new(max_event_bytes: usize) -> Self {
        Self {
            max_bytes: max_event_bytes,
            chunk: Bytes::new(),
            partial: BytesMut::new(),
            line: 0,
            after_cr: false,
            at_start: true,
            failed: false,
        }
    }

    /// Adds what arrived. The bytes are shared, not copied.
    pub fn push(&mut self, chunk: &Bytes) {
        if self.chunk.is_empty() {
            self.chunk = chunk.clone();
        } else {
            // Only a caller that did not drain the framer comes here.
            let mut joined = BytesMut::with_capacity(self.chunk.len() + chunk.len());
            joined.extend_from_slice(&self.chunk);
            joined.extend_from_slice(chunk);
            self.chunk = joined.freeze();
        }
    }

    /// Returns the next event that is complete; `None` until more is pushed.
    ///
    /// # Errors
    /// [`EventTooLarge`], once; then the framer is at its end.
    #[expect(
        clippy::should_implement_trait,
        reason = "it goes on after a None, which iterators rarely do"
    )]
    pub fn next(&mut self) -> Option<Result<Frame, EventTooLarge>> {
        if self.failed {
            return None;
        }
        loop {
            self.skip_blank();
            if self.chunk.is_empty() {
                return None;
            }
            let raw = match self.whole_event() {
                Some(raw) => raw,
                None => match self.gathered_event() {
                    Ok(raw) => raw?,
                    Err(error) => {
                        self.failed = true;
                        return Some(Err(error));
                    }
                },
            };
            let raw = self.without_mark(raw);
            // A byte order mark may have been all there was.
            if !raw.is_empty() {
                return Some(Ok(Frame::read(raw)));
            }
        }
    }

    /// Says whether an event has begun and is not complete. A stream that ends
    /// so was cut off.
    pub fn has_partial(&self) -> bool {
        !self.partial.is_empty() || !self.chunk.is_empty()
    }

    /// Returns what stands there unfinished when the stream has ended, as if a
    /// blank line had come. By the standard such an event is dropped; some
    /// servers end with a `data: [DONE]` without its blank line, though, and
    /// that is all this should be used for.
    pub fn take_tail(&mut self) -> Option<Frame> {
        if self.failed || self.partial.is_empty() {
            return None;
        }
        if self.partial.len() > self.line {
            self.partial.extend_from_slice(b"\n");
        }
        self.partial.extend_from_slice(b"\n");
        self.line = 0;
        let raw = self.partial.split().freeze();
        let raw = self.without_mark(raw);
        (!raw.is_empty()).then(|| Frame::read(raw))
    }

    /// Drops the LF of a CRLF, and blank lines where no event has begun.
    fn skip_blank(&mut self) {
        if self.after_cr
            && let Some(&first) = self.chunk.first()
        {
            self.after_cr = false;
            if first == b'\n' {
                self.drop_front(1);
            }
        }
        if !self.partial.is_empty() {
            return;
        }
        let blank = self
            .chunk
            .iter()
            .take_while(|&&byte| byte == b'\n' || byte == b'\r')
            .count();
        if blank > 0 {
            self.after_cr = self.chunk.get(blank - 1) == Some(&b'\r');
            self.at_start = false;
            self.drop_front(blank);
        }
    }

    /// Takes an event off the chunk if it stands there whole, without any CR.
    fn whole_event(&mut self) -> Option<Bytes> {
        if !self.partial.is_empty() {
            return None;
        }
        let mut line = 0;
        loop {
            let rest = self.chunk.get(line..)?;
            let end = line + memchr::memchr2(b'\n', b'\r', rest)?;
            if self.chunk.get(end) == Some(&b'\r') {
                return None;
            }
            if end == line {
                if end >= self.max_bytes {
                    return None; // the other way knows what to say
                }
                return Some(self.chunk.split_to(end + 1));
            }
            line = end + 1;
        }
    }

    /// Moves the chunk to `partial`, line by line, up to the end of an event.
    fn gathered_event(&mut self) -> Result<Option<Bytes>, EventTooLarge> {
        loop {
            let end = memchr::memchr2(b'\n', b'\r', &self.chunk);
            let taken = end.unwrap_or(self.chunk.len());
            if self.partial.len() + taken >= self.max_bytes {
                return Err(EventTooLarge {
                    max_bytes: self.max_bytes,
                });
            }
            self.partial
                .extend_from_slice(self.chunk.get(..taken).unwrap_or_default());
            let Some(end) = end else {
                self.chunk = Bytes::new();
                return Ok(None);
            };
            let is_cr = self.chunk.get(end) == Some(&b'\r');
            self.drop_front(end + 1);
            self.after_cr = is_cr;
            let is_blank = self.partial.len() == self.line;
            self.partial.extend_from_slice(b"\n");
            if is_blank {
                self.line = 0;
                return Ok(Some(self.partial.split().freeze()));
            }
            self.line = self.partial.len();
            let Some(&first) = self.chunk.first() else {
                return Ok(None);
            };
            if std::mem::take(&mut self.after_cr) && first == b'\n' {
                self.drop_front(1);
            }
        }
    }

    fn without_mark(&mut self, mut raw: Bytes) -> Bytes {
        if std::mem::take(&mut self.at_start) && raw.starts_with(BYTE_ORDER_MARK) {
            raw = raw.split_off(BYTE_ORDER_MARK.len());
            let blank = raw.iter().take_while(|&&byte| byte == b'\n').count();
            raw = raw.split_off(blank);
        }
        raw
    }

    fn drop_front(&mut self, count: usize) {
        let count = count.min(self.chunk.len());
        bytes::Buf::advance(&mut self.chunk, count);
    }
}

impl Frame {
    /// Makes an event of nothing but data, which has no line end in it.
    pub fn of_data(data: &[u8]) -> Self {
        const NAME: &[u8] = b"data: ";
        let raw = Bytes::from([NAME, data, b"\n\n"].concat());
        Self {
            data: Some(raw.slice(NAME.len()..raw.len() - 2)),
            event: None,
            is_comment: false,
            raw,
        }
    }

    /// Makes the event that ends a stream of chat or text completions.
    pub fn done() -> Self {
        Self::of_data(b"[DONE]")
    }

    /// Returns the event with other data, as [`with_data`](Self::with_data).
    #[must_use]
    pub fn replaced(&self, data: &[u8]) -> Self {
        Self::read(self.with_data(data))
    }

    /// Reads the lines of an event; `raw` ends with a blank line and has no CR.
    fn read(raw: Bytes) -> Self {
        let mut data: Option<Bytes> = None;
        let mut joined: Option<BytesMut> = None;
        let mut event = None;
        let mut is_comment = true;
        let mut start = 0;
        while let Some(length) = raw
            .get(start..)
            .and_then(|rest| memchr::memchr(b'\n', rest))
        {
            let line = raw.get(start..start + length).unwrap_or_default();
            let value_at = |name: usize| {
                let gap = usize::from(line.get(name) == Some(&b':'));
                let space = usize::from(gap == 1 && line.get(name + 1) == Some(&b' '));
                start + name + gap + space
            };
            let end = start + length;
            if is_field(line, b"data") {
                let value = raw.slice(value_at(4)..end);
                match (&mut joined, &data) {
                    (Some(joined), _) => {
                        joined.extend_from_slice(b"\n");
                        joined.extend_from_slice(&value);
                    }
                    (None, Some(first)) => {
                        let mut both = BytesMut::from(first.as_ref());
                        both.extend_from_slice(b"\n");
                        both.extend_from_slice(&value);
                        joined = Some(both);
                    }
                    (None, None) => data = Some(value),
                }
            } else if is_field(line, b"event") {
                event = Some(raw.slice(value_at(5)..end));
            }
            if !line.is_empty() && line.first() != Some(&b':') {
                is_comment = false;
            }
            start = end + 1;
        }
        Self {
            data: joined.map(BytesMut::freeze).or(data),
            event,
            is_comment,
            raw,
        }
    }

    /// Returns the event with other data, and its other lines as they are.
    pub fn with_data(&self, data: &[u8]) -> Bytes {
        let mut out = Vec::with_capacity(self.raw.len() + data.len() + 16);
        for line in self.raw.split(|&byte| byte == b'\n') {
            if !line.is_empty() && !is_field(line, b"data") {
                out.extend_from_slice(line);
                out.push(b'\n');
            }
        }
        for line in data.split(|&byte| byte == b'\n') {
            out.extend_from_slice(b"data: ");
            out.extend_from_slice(line);
            out.push(b'\n');
        }
        out.push(b'\n');
        out.into()
    }
}

/// Says whether a line is the named field, with or without a value.
fn is_field(line: &[u8], name: &[u8]) -> bool {
    line.strip_prefix(name)
        .is_some_and(|rest| matches!(rest.first(), None | Some(b':')))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(framer: &mut Framer) -> Vec<Frame> {
        std::iter::from_fn(|| framer.next())
            .map(|frame| frame.unwrap())
            .collect()
    }

    fn frames(chunks: &[&[u8]]) -> Vec<Frame> {
        let mut framer = Framer::new(64 * 1024);
        let mut frames = Vec::new();
        for chunk in chunks {
            framer.push(&Bytes::copy_from_slice(chunk));
            frames.extend(drain(&mut framer));
        }
        frames
    }

    fn data(stream: &[u8]) -> Vec<Option<String>> {
        frames(&[stream])
            .into_iter()
            .map(|frame| {
                frame
                    .data
                    .map(|data| String::from_utf8(data.to_vec()).unwrap())
            })
            .collect()
    }

    fn some(text: &str) -> Option<String> {
        Some(text.to_owned())
    }

    /// A stream of about 2 KiB with everything in it that streams have.
    fn sample() -> String {
        let mut text = String::from("\u{feff}: first a comment\n\n");
        text.push_str(
            "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n",
        );
        text.push_str("event: message\nid: 7\ndata:no space\n\n\n\n");
        text.push_str("data\n\ndata:\ndata: \ndata:  two spaces\n\n");
        text.push_str(": ping\n\nretry: 10\n\nid: alone\n\nevent: nothing\n\n");
        text.push_str("unknown: field\ndatax: 1\ndata: after\n\n");
        for i in 0..22 {
            text.push_str(&format!(
                "data: {{\"id\":{i},\"choices\":[{{\"delta\":{{\"content\":\"zażółć 😀 \\n\"}}}}]}}\n\n"
            ));
        }
        text.push_str("event: error\ndata: {\ndata: \"error\":1}\n: in the middle\n\n");
        text.push_str("data: [DONE]\n\n");
        text
    }

    #[test]
    fn the_sample_reads_as_the_standard_says() {
        let sample = sample();
        assert!(
            sample.len() > 1700 && sample.len() < 2400,
            "{}",
            sample.len()
        );
        let frames = frames(&[sample.as_bytes()]);
        assert_eq!(frames.len(), 10 + 22 + 2);
        assert!(frames[0].is_comment && frames[0].raw == ": first a comment\n\n");
        assert_eq!(frames[2].event.as_deref(), Some(&b"message"[..]));
        assert_eq!(frames[2].data.as_deref(), Some(&b"no space"[..]));
        assert_eq!(frames[2].raw, "event: message\nid: 7\ndata:no space\n\n");
        assert_eq!(frames[3].data.as_deref(), Some(&b""[..]));
        assert_eq!(frames[4].data.as_deref(), Some(&b"\n\n two spaces"[..]));
        assert!(frames[5].is_comment);
        assert!(!frames[6].is_comment && frames[6].data.is_none());
        let error = &frames[frames.len() - 2];
        assert_eq!(error.data.as_deref(), Some(&b"{\n\"error\":1}"[..]));
        assert_eq!(error.event.as_deref(), Some(&b"error"[..]));
        assert_eq!(frames.last().unwrap().data.as_deref(), Some(&b"[DONE]"[..]));
        let joined: Vec<u8> = frames.iter().flat_map(|frame| frame.raw.to_vec()).collect();
        assert_eq!(
            String::from_utf8(joined).unwrap(),
            sample
                .trim_start_matches('\u{feff}')
                .replace("\n\n\n\n", "\n\n")
        );
    }

    #[test]
    fn every_split_of_every_newline_gives_the_same_events() {
        let sample = sample();
        let expected = frames(&[sample.as_bytes()]);
        for newline in ["\n", "\r", "\r\n"] {
            let stream = sample.replace('\n', newline).into_bytes();
            for split in 0..=stream.len() {
                let (a, b) = stream.split_at(split);
                assert_eq!(frames(&[a, b]), expected, "{newline:?} at {split}");
            }
            let bytes: Vec<&[u8]> = stream.chunks(1).collect();
            assert_eq!(frames(&bytes), expected, "{newline:?} byte by byte");
            for size in 2..40 {
                let chunks: Vec<&[u8]> = stream.chunks(size).collect();
                assert_eq!(frames(&chunks), expected, "{newline:?} by {size}");
            }
        }
    }

    #[test]
    fn newlines_may_change_within_one_stream() {
        let mut dice = super::super::testing::Dice(3);
        let sample = sample();
        let expected = frames(&[sample.as_bytes()]);
        for _ in 0..300 {
            let mut stream = Vec::new();
            for line in sample.split_inclusive('\n') {
                stream.extend_from_slice(line.trim_end_matches('\n').as_bytes());
                // A bare LF behind a bare CR would be one newline.
                let after_cr = stream.last() == Some(&b'\r');
                let newline = *dice.pick(&["\n", "\r", "\r\n"]);
                stream.extend_from_slice(if after_cr {
                    b"\r\n"
                } else {
                    newline.as_bytes()
                });
            }
            let size = 1 + dice.below(60);
            let chunks: Vec<&[u8]> = stream.chunks(size).collect();
            assert_eq!(frames(&chunks), expected);
        }
    }

    #[test]
    fn an_event_is_there_as_soon_as_its_blank_line_is() {
        for (stream, complete_at) in [
            (&b"data: x\n\n"[..], 9),
            (b"data: x\r\r", 9),
            (b"data: x\r\r\n", 9),
            (b"data: x\r\n\r\n", 10),
            (b"data: x\n\r\n", 9),
            (b"data: x\r\n\n", 10),
        ] {
            let mut framer = Framer::new(100);
            let mut seen = 0;
            for (i, byte) in stream.iter().enumerate() {
                framer.push(&Bytes::copy_from_slice(&[*byte]));
                if let Some(frame) = framer.next() {
                    assert_eq!(frame.unwrap().raw, "data: x\n\n");
                    assert_eq!(i + 1, complete_at, "{stream:?}");
                    seen += 1;
                }
            }
            assert_eq!(seen, 1, "{stream:?}");
            assert!(!framer.has_partial(), "{stream:?}");
        }
    }

    #[test]
    fn an_event_that_stands_in_one_chunk_is_not_copied() {
        let chunk = Bytes::from_static(b"data: one\n\nevent: e\ndata: two\n\n");
        let mut framer = Framer::new(1000);
        framer.push(&chunk);
        let first = framer.next().unwrap().unwrap();
        let second = framer.next().unwrap().unwrap();
        assert_eq!(framer.next(), None);
        let offset = |bytes: &Bytes| bytes.as_ptr() as usize - chunk.as_ptr() as usize;
        assert_eq!(offset(&first.raw), 0);
        assert_eq!(offset(first.data.as_ref().unwrap()), 6);
        assert_eq!(offset(&second.raw), 11);
        assert_eq!(offset(second.data.as_ref().unwrap()), 26);
        assert_eq!(offset(second.event.as_ref().unwrap()), 18);
    }

    #[test]
    fn only_a_mark_at_the_very_start_is_dropped() {
        assert_eq!(
            data("\u{feff}data: a\n\ndata: b\n\n".as_bytes()),
            [some("a"), some("b")]
        );
        assert_eq!(data("\n\u{feff}data: a\n\n".as_bytes()), [None]);
        assert_eq!(
            data("data: a\n\n\u{feff}data: b\n\n".as_bytes()),
            [some("a"), None]
        );
        for blank in ["\n", "\n\n", "\r\n\r\n"] {
            let stream = format!("\u{feff}{blank}data: a\n\n");
            assert_eq!(data(stream.as_bytes()), [some("a")]);
        }
    }

    #[test]
    fn a_stream_that_was_cut_has_a_partial() {
        let mut framer = Framer::new(100);
        assert!(!framer.has_partial());
        framer.push(&Bytes::from_static(b"data: x\n\ndata: y\n"));
        assert_eq!(drain(&mut framer).len(), 1);
        assert!(framer.has_partial());
        framer.push(&Bytes::from_static(b"\n"));
        assert_eq!(drain(&mut framer).len(), 1);
        assert!(!framer.has_partial());
    }

    #[test]
    fn the_tail_of_a_stream_can_be_taken_without_its_blank_line() {
        for tail in ["data: [DONE]", "data: [DONE]\n", "data: [DONE]\r"] {
            let mut framer = Framer::new(100);
            framer.push(&Bytes::from(format!("data: x\n\n{tail}")));
            assert_eq!(drain(&mut framer).len(), 1);
            let frame = framer.take_tail().unwrap();
            assert_eq!(frame.raw, "data: [DONE]\n\n");
            assert_eq!(frame.data.as_deref(), Some(&b"[DONE]"[..]));
            assert_eq!(framer.take_tail(), None);
            assert!(!framer.has_partial());
        }
    }

    #[test]
    fn an_event_that_is_too_large_ends_the_stream_at_any_split() {
        let max = 20;
        let fits = b"data: 0123456789ab\n\n";
        assert_eq!(fits.len(), max);
        let stream = [&fits[..], b"data: 0123456789abc\n\n", b"data: x\n\n"].concat();
        for size in 1..=stream.len() {
            let mut framer = Framer::new(max);
            let mut results = Vec::new();
            for chunk in stream.chunks(size) {
                framer.push(&Bytes::copy_from_slice(chunk));
                while let Some(result) = framer.next() {
                    results.push(result);
                }
            }
            assert_eq!(results.len(), 2, "{size}");
            assert_eq!(results[0].as_ref().unwrap().raw, &fits[..]);
            assert_eq!(results[1], Err(EventTooLarge { max_bytes: max }));
        }
    }

    #[test]
    fn many_short_lines_are_too_large_together() {
        let mut framer = Framer::new(1000);
        for _ in 0..200 {
            framer.push(&Bytes::from_static(b"data: x\n"));
            if let Some(result) = framer.next() {
                assert_eq!(result, Err(EventTooLarge { max_bytes: 1000 }));
                assert_eq!(framer.next(), None);
                return;
            }
        }
        panic!("never too large");
    }

    #[test]
    fn chunks_that_were_not_drained_are_joined() {
        let mut framer = Framer::new(1000);
        for piece in ["data: a\n", "\ndata", ": b\n\n"] {
            framer.push(&Bytes::from_static(piece.as_bytes()));
        }
        assert_eq!(drain(&mut framer).len(), 2);
    }

    #[test]
    fn other_data_keeps_the_other_lines() {
        let frame = &frames(&[b": c\nevent: e\ndata: old\nid: 1\n\n"])[0];
        assert_eq!(
            frame.with_data(b"new\nlines"),
            ": c\nevent: e\nid: 1\ndata: new\ndata: lines\n\n"
        );
    }
}
