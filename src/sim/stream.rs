//! Streaming an answer event by event: when each is due, what dialect of the
//! event stream it is in, and how a stream goes wrong.
//!
//! Start at [`events`].

use std::{io, time::Duration};

use tokio::time::{Instant, sleep_until};

use super::{
    answers::Answer,
    faults::{Fault, Newline},
    gzip::Gzip,
    wire::{Body, Framing, HeadParts, Manner, Out, Pace, SNOWMAN, Stop, for_ever, head},
};

/// Unpaced events are written together up to this size.
const GROUP_BYTES: usize = 16 << 10;

/// Streams an answer.
pub(crate) async fn events(
    out: &mut Out<'_>,
    parts: &HeadParts<'_>,
    answer: &Answer,
    manner: Manner<'_>,
) -> Result<(), Stop> {
    let fault = manner.fault;
    let framing = if fault.http10 {
        Framing::Close
    } else {
        Framing::Chunked
    };
    head(out, parts, framing, None, manner).await?;
    let mut sink = Body {
        out,
        fault,
        framing,
        gzip: fault.gzip.then(Gzip::default),
    };
    if let Some(pause) = fault.only_comments {
        let (newline, mut comment) = (newline(fault), b": keep-alive".to_vec());
        if answer.shape.is_native() {
            comment.clear(); // there are none between lines
        }
        comment.extend([newline, newline].concat());
        return for_ever(&mut sink, &comment, pause).await;
    }
    if fault.empty_stream {
        return Ok(sink.end().await?);
    }
    let mut writer = Events {
        group: Vec::new(),
        in_group: 0,
        scratch: Vec::new(),
        answer,
        fault,
    };
    if fault.bom {
        writer.group.extend_from_slice(b"\xef\xbb\xbf");
    }
    let clock = Clock::start(manner.pace, fault.gap);
    for event in 0..=answer.events() {
        let at = |n: Option<u64>| n.is_some_and(|n| n == event as u64);
        if at(fault.stall_at) {
            writer.flush(&mut sink).await?;
            sink.out.flush().await?;
            return std::future::pending().await;
        }
        if at(fault.die_at) {
            writer.flush(&mut sink).await?;
            return Err(writer.die(&mut sink, event).await?);
        }
        if at(fault.error_at) {
            clock_wait(&clock, answer, event, &mut writer, &mut sink).await?;
            writer.push_error();
            writer.end(&mut sink, fault.error_then_done).await?;
            return Ok(());
        }
        if event == answer.events() {
            break;
        }
        clock_wait(&clock, answer, event, &mut writer, &mut sink).await?;
        writer.push(event);
        if writer.is_full() {
            writer.flush(&mut sink).await?;
            sink.out.flush().await?;
        }
    }
    writer.end(&mut sink, !fault.no_done).await?;
    Ok(())
}

/// Waits until an event is due; what is ready goes out before.
async fn clock_wait(
    clock: &Clock,
    answer: &Answer,
    event: usize,
    writer: &mut Events<'_>,
    sink: &mut Body<'_, '_>,
) -> Result<(), Stop> {
    let Some(due) = clock.due(event, answer.tokens_until(event)) else {
        return Ok(());
    };
    if writer.fault.per_write.is_none() {
        writer.flush(sink).await?;
    }
    sink.out.flush().await?;
    sleep_until(due).await;
    Ok(())
}

/// When events are due.
struct Clock {
    start: Instant,
    pace: Pace,
    gap: Option<Duration>,
}

impl Clock {
    fn start(pace: Pace, gap: Option<Duration>) -> Self {
        Self {
            start: Instant::now(),
            pace,
            gap,
        }
    }

    /// Absent: at once. `tokens` — those thought of until then.
    fn due(&self, event: usize, tokens: usize) -> Option<Instant> {
        if let Some(gap) = self.gap.filter(|_| event > 0) {
            // Kept each time, while a rate is kept on the average only.
            return (!gap.is_zero()).then(|| Instant::now() + gap);
        }
        let after_first = u32::try_from(tokens.saturating_sub(1)).unwrap_or(u32::MAX);
        let per_token = self.pace.per_token.unwrap_or_default();
        let wait = self.pace.first_token + per_token.saturating_mul(after_first);
        let due = self.start + wait;
        (!wait.is_zero() && due > Instant::now()).then_some(due)
    }
}

fn newline(fault: &Fault) -> &'static [u8] {
    match fault.newline {
        None | Some(Newline::Lf) => b"\n",
        Some(Newline::Cr) => b"\r",
        Some(Newline::Crlf) => b"\r\n",
    }
}

/// Events on their way into the body.
struct Events<'a> {
    group: Vec<u8>,
    in_group: usize,
    scratch: Vec<u8>,
    answer: &'a Answer,
    fault: &'a Fault,
}

impl Events<'_> {
    fn push(&mut self, event: usize) {
        if let Some(size) = self.fault.huge_event
            && event == self.answer.first_token_event()
        {
            self.scratch.clear();
            let content = vec![b'x'; size];
            let name = self.answer.render_content(&content, &mut self.scratch);
            self.push_scratch(name, event);
        }
        self.scratch.clear();
        let name = self.answer.render(event, &mut self.scratch);
        self.push_scratch(name, event);
        self.in_group += 1;
    }

    fn push_error(&mut self) {
        self.scratch.clear();
        if self.answer.shape.is_native() {
            self.scratch.extend_from_slice(
                br#"{"error":"an error was encountered while running the model"}"#,
            );
            return self.push_scratch(None, 0);
        }
        self.scratch.extend_from_slice(
            br#"{"error":{"message":"EngineCore encountered an issue","type":"InternalServerError","param":null,"code":500}}"#,
        );
        // As vLLM does, without a name even among typed events.
        self.push_scratch(None, 0);
    }

    fn push_scratch(&mut self, name: Option<&str>, number: usize) {
        let newline = newline(self.fault);
        let out = &mut self.group;
        if self.answer.shape.is_native() {
            out.extend_from_slice(&self.scratch);
            out.extend_from_slice(newline);
            return;
        }
        if self.fault.comments {
            out.extend_from_slice(b": between events");
            out.extend_from_slice(newline);
            out.extend_from_slice(format!("id: {number}").as_bytes());
            out.extend_from_slice(newline);
            out.extend_from_slice(b"retry: 3000");
            out.extend_from_slice(newline);
        }
        if let Some(name) = name {
            out.extend_from_slice(b"event: ");
            out.extend_from_slice(name.as_bytes());
            out.extend_from_slice(newline);
        }
        out.extend_from_slice(b"data: ");
        match self.scratch.split_first() {
            // The line end between the two stands where JSON allows one.
            Some((b'{', rest)) if self.fault.multi_data => {
                out.push(b'{');
                out.extend_from_slice(newline);
                out.extend_from_slice(b"data: ");
                out.extend_from_slice(rest);
            }
            _ => out.extend_from_slice(&self.scratch),
        }
        out.extend_from_slice(newline);
        out.extend_from_slice(newline);
    }

    fn is_full(&self) -> bool {
        match self.fault.per_write {
            Some(n) => self.in_group >= n,
            None => self.group.len() >= GROUP_BYTES,
        }
    }

    async fn flush(&mut self, sink: &mut Body<'_, '_>) -> io::Result<()> {
        sink.write(&self.group).await?;
        self.group.clear();
        self.in_group = 0;
        Ok(())
    }

    /// Ends the stream, with the shape's last event if `done`.
    async fn end(&mut self, sink: &mut Body<'_, '_>, done: bool) -> io::Result<()> {
        if let Some(text) = self.answer.done().filter(|_| done) {
            self.scratch.clear();
            self.scratch.extend_from_slice(text);
            self.push_scratch(None, self.answer.events());
        }
        self.flush(sink).await?;
        sink.end().await
    }

    /// Dies before `event`, in the manner asked for.
    async fn die(&mut self, sink: &mut Body<'_, '_>, event: usize) -> Result<Stop, Stop> {
        let how = self.fault.how.unwrap_or_default();
        if how.mid_utf8 {
            self.scratch.clear();
            let content = format!("snow {SNOWMAN}");
            let name = self
                .answer
                .render_content(content.as_bytes(), &mut self.scratch);
            self.push_scratch(name, event);
            let end = super::http::find(&self.group, SNOWMAN.as_bytes());
            self.group.truncate(end.unwrap_or_default() + 2);
        } else if how.mid_chunk {
            self.scratch.clear();
            let name = self.answer.render_content(b"torn", &mut self.scratch);
            self.push_scratch(name, event);
            self.group.truncate(self.group.len() / 2);
        }
        if how.mid_chunk {
            sink.write_torn(&self.group).await?;
        } else {
            sink.write(&self.group).await?;
        }
        sink.out.flush().await?;
        Ok(Stop::by(how))
    }
}

/// Renders a whole stream at once.
pub(crate) fn collect(answer: &Answer, fault: &Fault, body: &mut Vec<u8>) {
    let mut writer = Events {
        group: Vec::new(),
        in_group: 0,
        scratch: Vec::new(),
        answer,
        fault,
    };
    (0..answer.events()).for_each(|event| writer.push(event));
    if let Some(text) = answer.done().filter(|_| !fault.no_done) {
        writer.scratch.clear();
        writer.scratch.extend_from_slice(text);
        writer.push_scratch(None, 0);
    }
    body.append(&mut writer.group);
}
