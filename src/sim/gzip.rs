//! The gzip format without compression: enough for a client that must notice
//! the encoding, and no dependency.
//!
//! Each push becomes stored blocks (RFC 1951 §3.2.4), so that a stream can be
//! read as it comes.

/// A gzip stream that is being written.
#[derive(Debug, Default)]
pub(crate) struct Gzip {
    begun: bool,
    crc: u32,
    length: u32,
}

impl Gzip {
    /// Returns `bytes` as part of the stream.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut out = self.begin();
        self.crc = crc32(self.crc, bytes);
        for block in bytes.chunks(usize::from(u16::MAX)) {
            let length = u16::try_from(block.len()).expect("a chunk is no longer than asked for");
            self.length = self.length.wrapping_add(u32::from(length));
            out.push(0);
            out.extend(length.to_le_bytes());
            out.extend((!length).to_le_bytes());
            out.extend_from_slice(block);
        }
        out
    }

    /// Returns the end of the stream.
    pub(crate) fn end(&mut self) -> Vec<u8> {
        let mut out = self.begin();
        out.extend([1, 0, 0, 0xff, 0xff]);
        out.extend(self.crc.to_le_bytes());
        out.extend(self.length.to_le_bytes());
        out
    }

    fn begin(&mut self) -> Vec<u8> {
        if std::mem::replace(&mut self.begun, true) {
            return Vec::new();
        }
        // Deflate, no flags, no time, unknown system.
        vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0xff]
    }
}

fn crc32(crc: u32, bytes: &[u8]) -> u32 {
    let bit = |crc: u32, _| (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg());
    let byte = |crc: u32, &byte: &u8| (0..8).fold(crc ^ u32::from(byte), bit);
    !bytes.iter().fold(!crc, byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_the_one_of_gzip() {
        assert_eq!(crc32(0, b"123456789"), 0xcbf4_3926);
        assert_eq!(crc32(crc32(0, b"1234"), b"56789"), 0xcbf4_3926);
    }

    #[test]
    fn a_stream_has_one_head_its_blocks_and_its_length() {
        let mut gzip = Gzip::default();
        let mut all = gzip.push(b"ab");
        all.extend(gzip.push(b"c"));
        all.extend(gzip.end());
        let expected: &[u8] = &[
            0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0xff, 0, 2, 0, 0xfd, 0xff, b'a', b'b', 0, 1, 0, 0xfe,
            0xff, b'c', 1, 0, 0, 0xff, 0xff, 0xc2, 0x41, 0x24, 0x35, 3, 0, 0, 0,
        ];
        assert_eq!(all, expected);
    }
}
