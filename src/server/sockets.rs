//! The listening sockets: made here or taken over, lent to Pingora, and handed on
//! to a successor.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    os::fd::OwnedFd,
    sync::{Mutex, PoisonError},
};

use super::{StartError, predecessor::Predecessor};

/// One listening socket.
#[derive(Debug)]
struct Socket {
    /// As the configuration says it.
    address: String,
    listener: TcpListener,
}

/// Those of the process. As long as one is here its address accepts connections,
/// whether or not somebody takes them.
#[derive(Debug, Default)]
pub(super) struct Sockets(Mutex<Vec<Socket>>);

impl Sockets {
    /// Opens sockets at these addresses, each with the key of the configuration
    /// that it is from. Those of a predecessor are taken over, as the last thing:
    /// by then all others are open. Blocks.
    ///
    /// # Errors
    /// An address is taken, or not ours; or the predecessor gives up.
    pub(super) fn open(
        wanted: &[(&'static str, &str)],
        predecessor: Option<&Predecessor>,
    ) -> Result<Self, StartError> {
        let is_theirs = |address: &str| predecessor.is_some_and(|old| old.listens_at(address));
        let mut sockets = Vec::new();
        for (key, address) in wanted {
            if !is_theirs(address) {
                sockets.push(bind(key, address)?);
            }
        }
        if let Some(old) = predecessor {
            let theirs = wanted.iter().map(|(_, address)| (*address).to_owned());
            let theirs: Vec<_> = theirs.filter(|address| is_theirs(address)).collect();
            let taken = old.ask_for(&theirs).map_err(StartError::NotHandedOver)?;
            sockets.extend(taken.into_iter().map(|(address, socket)| Socket {
                address,
                listener: socket.into(),
            }));
        }
        let sockets = Self(Mutex::new(sockets));
        for (_, address) in wanted {
            if !sockets.addresses().iter().any(|one| one == address) {
                let why = io::Error::other(format!("no socket for {address}"));
                return Err(StartError::NotHandedOver(why));
            }
        }
        Ok(sockets)
    }

    /// Returns where they listen.
    pub(super) fn addresses(&self) -> Vec<String> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter().map(|socket| socket.address.clone()).collect()
    }

    /// Returns another handle of the socket of an address.
    ///
    /// # Errors
    /// There is none, or the system has no file for it.
    pub(super) fn of(&self, address: &str) -> io::Result<OwnedFd> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let socket = all.iter().find(|socket| socket.address == address);
        let socket = socket.ok_or(io::ErrorKind::NotFound)?;
        Ok(socket.listener.try_clone()?.into())
    }

    /// Lets go of the socket of an address: who accepts from it may go on.
    pub(super) fn close(&self, address: &str) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|socket| socket.address != address);
    }

    /// Lets go of all.
    pub(super) fn close_all(&self) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.clear();
    }
}

fn bind(key: &'static str, address: &str) -> Result<Socket, StartError> {
    let error = |source| StartError::Listen {
        key,
        address: address.to_owned(),
        source,
    };
    let parsed: SocketAddr = address
        .parse()
        .map_err(|why| error(io::Error::other(why)))?;
    let listener = TcpListener::bind(parsed).map_err(error)?;
    // Pingora takes it as it is.
    listener.set_nonblocking(true).map_err(error)?;
    Ok(Socket {
        address: address.to_owned(),
        listener,
    })
}
