//! What a wrapper of a Pingora stream needs, and the thinnest of them:
//! [`Prefixed`], of which some bytes have been read already.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use async_trait::async_trait;
use bytes::{Buf, Bytes};
use pingora::{
    protocols::ALPN,
    protocols::{
        GetProxyDigest, GetSocketDigest, GetTimingDigest, Peek, Shutdown, SocketDigest, Ssl,
        Stream, TimingDigest, UniqueID, UniqueIDType, raw_connect::ProxyDigest, tls::SslDigest,
    },
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Everything of Pingora's `IO` but reading, writing and peeking is the wrapped
/// stream's.
macro_rules! forward_to_stream {
    ($type:ty) => {
        impl UniqueID for $type {
            fn id(&self) -> UniqueIDType {
                self.stream.id()
            }
        }

        impl Ssl for $type {
            fn get_ssl_digest(&self) -> Option<Arc<SslDigest>> {
                self.stream.get_ssl_digest()
            }

            fn selected_alpn_proto(&self) -> Option<ALPN> {
                self.stream.selected_alpn_proto()
            }
        }

        impl GetTimingDigest for $type {
            fn get_timing_digest(&self) -> Vec<Option<TimingDigest>> {
                self.stream.get_timing_digest()
            }
        }

        impl GetProxyDigest for $type {
            fn get_proxy_digest(&self) -> Option<Arc<ProxyDigest>> {
                self.stream.get_proxy_digest()
            }
        }

        impl GetSocketDigest for $type {
            fn get_socket_digest(&self) -> Option<Arc<SocketDigest>> {
                self.stream.get_socket_digest()
            }
        }
    };
}
pub(super) use forward_to_stream;

/// A stream that first gives back the bytes that were read from it.
#[derive(Debug)]
pub(super) struct Prefixed {
    first: Bytes,
    stream: Stream,
}

impl Prefixed {
    /// Puts `first` before what `stream` still has.
    pub(super) fn new(first: Bytes, stream: Stream) -> Self {
        Self { first, stream }
    }
}

forward_to_stream!(Prefixed);

impl AsyncWrite for Prefixed {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[async_trait]
impl Shutdown for Prefixed {
    async fn shutdown(&mut self) {
        self.stream.shutdown().await;
    }
}

#[async_trait]
impl Peek for Prefixed {}

impl AsyncRead for Prefixed {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.first.is_empty() {
            return Pin::new(&mut self.stream).poll_read(cx, buffer);
        }
        give_back(&mut self.first, buffer);
        Poll::Ready(Ok(()))
    }
}

/// Hands out as much of what was read before as fits.
pub(super) fn give_back(first: &mut impl Buf, buffer: &mut ReadBuf<'_>) {
    let fitting = first.remaining().min(buffer.remaining());
    let bytes = first.copy_to_bytes(fitting);
    buffer.put_slice(&bytes);
}
