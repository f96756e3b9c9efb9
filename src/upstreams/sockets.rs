//! Whether a connection could not be made because this machine has no socket
//! left: out of files, of ports, of memory for them. That says nothing of the
//! upstream.

use std::{io, os::fd::AsFd};

use nix::errno::Errno;
use pingora::{Error, ErrorType};

/// Returns whether the error of a connection that was not made is our own.
pub fn is_ours(error: &Error) -> bool {
    // Pingora's words for a socket that it could not make, or that got no
    // address of its own.
    if matches!(error.etype(), ErrorType::SocketError | ErrorType::BindError) {
        return true;
    }
    let Some(cause) = &error.cause else {
        return false;
    };
    if let Some(inner) = cause.downcast_ref::<Box<Error>>() {
        return is_ours(inner);
    }
    let io = cause
        .downcast_ref()
        .or_else(|| cause.source()?.downcast_ref());
    io.is_some_and(is_shortage)
}

/// Returns whether no more files can be opened just now: then a name cannot be
/// looked up either, whatever the lookup says.
pub fn are_out() -> bool {
    let another = io::stderr().as_fd().try_clone_to_owned();
    another.is_err_and(|why| is_shortage(&why))
}

fn is_shortage(error: &io::Error) -> bool {
    let Some(code) = error.raw_os_error() else {
        return false;
    };
    matches!(
        Errno::from_raw(code),
        Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS | Errno::ENOMEM | Errno::EADDRNOTAVAIL
    )
}

#[cfg(test)]
mod tests {
    use pingora::ErrorSource;

    use super::*;

    fn os(errno: Errno) -> io::Error {
        io::Error::from_raw_os_error(errno as i32)
    }

    #[test]
    fn what_the_system_refuses_us_is_told_from_what_a_server_does() {
        for (kind, errno, ours) in [
            (ErrorType::SocketError, Errno::EMFILE, true),
            (ErrorType::ConnectError, Errno::ENOBUFS, true),
            (ErrorType::BindError, Errno::EADDRNOTAVAIL, true),
            (ErrorType::ConnectRefused, Errno::ECONNREFUSED, false),
            (ErrorType::ConnectNoRoute, Errno::EHOSTUNREACH, false),
            (ErrorType::ConnectError, Errno::ECONNRESET, false),
        ] {
            let error = Error::because(kind, "test", os(errno));
            assert_eq!(is_ours(&error), ours, "{errno}");
            let wrapped = Error::because(ErrorType::InternalError, "test", error);
            assert_eq!(is_ours(&wrapped), ours, "{errno}");
        }
        let timeout = Error::create(
            ErrorType::ConnectTimedout,
            ErrorSource::Upstream,
            None,
            None,
        );
        assert!(!is_ours(&timeout));
        assert!(!are_out());
    }
}
