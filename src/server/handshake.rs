//! What the two processes of an upgrade say to each other, over a pair of sockets
//! of which the new one gets its end as standard input: lines of JSON, and the
//! listening sockets along with one of them.
//!
//! In order: the old one says where it listens ([`ToSuccessor::Listening`]); the
//! new one that it is [`Prepared`](FromSuccessor::Prepared) and what of that it
//! wants; the old one gives it ([`ToSuccessor::Take`]); the new one accepts and
//! says [`Serving`](FromSuccessor::Serving); the old one that the service manager knows
//! of it ([`ToSuccessor::Lead`]), and keeps the channel open until it ends. Instead it may say at any time that
//! it has [`Failed`](FromSuccessor::Failed), or end.
//!
//! The two may be of different versions: fields that are not known are passed
//! over, and what is here stays.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
};

use rustix::{
    cmsg_space,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
    },
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// The environment variable that tells a process of whom it is the successor: the
/// pid of its parent.
pub(super) const MARK: &str = "FOREBAY_SUCCESSOR_OF";
/// The longest line.
pub(super) const LINE_MAX: usize = 64 * 1024;
/// The most of a reason that is passed on, in bytes.
const REASON_MAX: usize = 4 * 1024;
/// The most sockets in one message.
const SOCKETS_MAX: usize = 8;

/// What the old process says.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum ToSuccessor {
    /// Where it listens.
    Listening {
        /// As its configuration says it.
        addresses: Vec<String>,
    },
    /// The sockets that come along are those of these addresses.
    Take {
        /// In the order of the sockets.
        addresses: Vec<String>,
    },
    /// It is the main process from now on.
    Lead {},
}

/// What the new process says.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum FromSuccessor {
    /// All is loaded and built; only sockets are missing.
    Prepared {
        /// Of the program.
        version: String,
        /// The addresses whose sockets it wants.
        wants: Vec<String>,
    },
    /// It accepts.
    Serving {},
    /// It cannot serve.
    Failed {
        /// Why.
        reason: String,
    },
}

impl FromSuccessor {
    pub(super) fn failed(reason: &str) -> Self {
        let end = (0..=REASON_MAX.min(reason.len()))
            .rev()
            .find(|end| reason.is_char_boundary(*end))
            .unwrap_or(0);
        let reason = reason.get(..end).unwrap_or_default().trim_end();
        Self::Failed {
            reason: reason.to_owned(),
        }
    }
}

/// Returns a message as it is sent.
pub(super) fn line<T: Serialize>(message: &T) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(message).map_err(io::Error::other)?;
    line.push(b'\n');
    Ok(line)
}

/// Reads a message.
pub(super) fn message<T: DeserializeOwned>(line: &[u8]) -> io::Result<T> {
    serde_json::from_slice(line).map_err(|why| io::Error::new(io::ErrorKind::InvalidData, why))
}

/// Sends a line together with sockets; returns how much of the line was sent.
pub(super) fn send(
    channel: impl AsFd,
    line: &[u8],
    sockets: &[BorrowedFd<'_>],
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(SOCKETS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !sockets.is_empty() && !control.push(SendAncillaryMessage::ScmRights(sockets)) {
        return Err(io::Error::other("too many sockets"));
    }
    let sent = sendmsg(
        channel,
        &[IoSlice::new(line)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    Ok(sent)
}

/// Reads one line, and the sockets that come along. Blocks.
pub(super) fn receive(channel: &UnixStream) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut line = Vec::new();
    let mut sockets = Vec::new();
    loop {
        let mut piece = [0; 1024];
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(SOCKETS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let read = recvmsg(
            channel,
            &mut [IoSliceMut::new(&mut piece)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(all) = message {
                sockets.extend(all);
            }
        }
        // A line is answered before the next is sent: nothing comes behind it.
        let came = piece.get(..read.bytes).unwrap_or_default();
        line.extend_from_slice(came.strip_suffix(b"\n").unwrap_or(came));
        if came.ends_with(b"\n") {
            return Ok((line, sockets));
        }
        if came.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if line.len() > LINE_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write,
        net::{TcpListener, TcpStream},
    };

    use super::*;

    #[test]
    fn sockets_come_along_and_are_the_same() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let take = ToSuccessor::Take {
            addresses: vec![address.to_string()],
        };
        let bytes = line(&take).unwrap();
        assert_eq!(
            send(&ours, &bytes, &[listener.as_fd()]).unwrap(),
            bytes.len()
        );
        drop(listener);
        let (line, mut sockets) = receive(&theirs).unwrap();
        assert_eq!(message::<ToSuccessor>(&line).unwrap(), take);
        let socket = sockets.pop().unwrap();
        assert!(sockets.is_empty());
        let flags = rustix::io::fcntl_getfd(&socket).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        let listener = TcpListener::from(socket);
        TcpStream::connect(address).unwrap();
        listener.accept().unwrap();
    }

    #[test]
    fn an_end_and_nonsense_are_errors() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.write_all(b"nonsense\n").unwrap();
        let (line, _none) = receive(&theirs).unwrap();
        assert!(message::<ToSuccessor>(&line).is_err());
        ours.write_all(b"half").unwrap();
        drop(ours);
        let why = receive(&theirs).unwrap_err();
        assert_eq!(why.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_reason_is_bounded_and_other_versions_may_say_more() {
        let FromSuccessor::Failed { reason } = FromSuccessor::failed(&"é".repeat(5000)) else {
            unreachable!("it failed");
        };
        assert_eq!(reason.len(), REASON_MAX);
        let later = br#"{"prepared":{"version":"9","wants":[],"more":{}}}"#;
        assert!(message::<FromSuccessor>(later).is_ok());
        assert_eq!(
            message::<FromSuccessor>(br#"{"serving":{"since":1}}"#).unwrap(),
            FromSuccessor::Serving {}
        );
    }
}
