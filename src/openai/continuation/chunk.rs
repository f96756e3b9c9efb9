//! What an event of an answer brings, read in one pass without allocation.

use super::{
    super::cursor::{Cursor, is_something},
    Obstacle,
};

/// What is read of a chunk of chat or text completions.
#[derive(Default)]
pub(super) struct Chunk<'a> {
    /// Whether it has a choice.
    pub(super) is_chunk: bool,
    pub(super) id: Option<&'a [u8]>,
    pub(super) created: Option<&'a [u8]>,
    pub(super) model: Option<&'a [u8]>,
    pub(super) fingerprint: Option<&'a [u8]>,
    pub(super) role: bool,
    /// New text, with its quotes.
    pub(super) text: Option<&'a [u8]>,
    pub(super) reasoning: bool,
    pub(super) finished: bool,
    pub(super) obstacle: Option<Obstacle>,
}

impl<'a> Chunk<'a> {
    pub(super) fn read(data: &'a [u8]) -> Self {
        let mut chunk = Self::default();
        let mut cursor = Cursor::new(data);
        if !cursor.enter_object() {
            return chunk;
        }
        while let Some(key) = cursor.key() {
            match key {
                b"id" => chunk.id = cursor.skip(),
                b"created" => chunk.created = cursor.skip(),
                b"model" => chunk.model = cursor.skip(),
                b"system_fingerprint" => chunk.fingerprint = cursor.skip(),
                b"choices" => chunk.read_choices(&mut cursor),
                _ => {
                    cursor.skip();
                }
            }
        }
        chunk
    }

    fn read_choices(&mut self, cursor: &mut Cursor<'a>) {
        let mut count = 0;
        if !cursor.enter_array() {
            return;
        }
        while cursor.item() {
            count += 1;
            self.read_choice(cursor);
        }
        self.is_chunk = count > 0;
        if count > 1 {
            self.obstacle = Some(Obstacle::Choices);
        }
    }

    fn read_choice(&mut self, cursor: &mut Cursor<'a>) {
        if !cursor.enter_object() {
            return;
        }
        while let Some(key) = cursor.key() {
            match key {
                b"index" => {
                    if cursor.integer().is_some_and(|index| index > 0) {
                        self.obstacle = Some(Obstacle::Choices);
                    }
                }
                b"delta" => self.read_delta(cursor),
                b"text" => self.read_text(cursor),
                b"logprobs" => self.blocked_by(cursor, Obstacle::Logprobs),
                b"finish_reason" => {
                    // Some servers write "" for none.
                    self.finished |= matches!(cursor.skip(), Some([b'"', _, _, ..]));
                }
                _ => {
                    cursor.skip();
                }
            }
        }
    }

    fn read_delta(&mut self, cursor: &mut Cursor<'a>) {
        if !cursor.enter_object() {
            return;
        }
        while let Some(key) = cursor.key() {
            match key {
                b"role" => self.role |= cursor.something(),
                b"content" => self.read_text(cursor),
                b"reasoning" | b"reasoning_content" | b"reasoning_details" | b"thinking" => {
                    self.reasoning |= cursor.something();
                }
                b"tool_calls" | b"function_call" => self.blocked_by(cursor, Obstacle::ToolCall),
                b"refusal" => self.blocked_by(cursor, Obstacle::Refusal),
                b"audio" | b"images" => self.blocked_by(cursor, Obstacle::NotText),
                _ => {
                    cursor.skip();
                }
            }
        }
    }

    fn read_text(&mut self, cursor: &mut Cursor<'a>) {
        let Some(value) = cursor.skip().filter(|value| is_something(value)) else {
            return;
        };
        if value.starts_with(b"\"") {
            self.text = Some(value);
        } else {
            self.obstacle = Some(Obstacle::NotText);
        }
    }

    fn blocked_by(&mut self, cursor: &mut Cursor<'a>, obstacle: Obstacle) {
        if cursor.something() {
            self.obstacle = Some(obstacle);
        }
    }
}
