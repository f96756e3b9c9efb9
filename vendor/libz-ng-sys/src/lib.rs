//! The part of `libz-ng-sys` that flate2 uses, forwarded to the pure-Rust
//! zlib of `libz-rs-sys`: no cmake, no C.
//!
//! Read `README.md` beside this crate for why it exists and when it goes.
#![allow(non_camel_case_types, non_snake_case, reason = "these are zlib's own names")]
#![allow(
    clippy::missing_safety_doc,
    reason = "the contract of every function here is zlib's own"
)]

use std::ffi::{c_char, c_int, c_uint, c_void};

pub use libz_rs_sys::{
    Z_BEST_COMPRESSION, Z_BEST_SPEED, Z_BLOCK, Z_BUF_ERROR, Z_DATA_ERROR, Z_DEFAULT_COMPRESSION,
    Z_DEFAULT_STRATEGY, Z_DEFLATED, Z_FINISH, Z_FULL_FLUSH, Z_MEM_ERROR, Z_NEED_DICT, Z_NO_FLUSH,
    Z_OK, Z_PARTIAL_FLUSH, Z_STREAM_END, Z_STREAM_ERROR, Z_SYNC_FLUSH, Z_VERSION_ERROR, uInt, uLong,
};

pub type z_size = uLong;
pub type z_checksum = uLong;
/// What flate2 expects: a plain function, where `libz-rs-sys` has an `Option`
/// of one. The two have the same layout: `None` is the null pointer.
pub type alloc_func = extern "C" fn(*mut c_void, uInt, uInt) -> *mut c_void;
pub type free_func = extern "C" fn(*mut c_void, *mut c_void);
pub enum internal_state {}

/// zlib's stream with the field types that flate2 expects.
#[repr(C)]
pub struct z_stream {
    pub next_in: *mut u8,
    pub avail_in: uInt,
    pub total_in: z_size,
    pub next_out: *mut u8,
    pub avail_out: uInt,
    pub total_out: z_size,
    pub msg: *mut c_char,
    pub state: *mut internal_state,
    pub zalloc: alloc_func,
    pub zfree: free_func,
    pub opaque: *mut c_void,
    pub data_type: c_int,
    pub adler: z_checksum,
    pub reserved: uLong,
}

type rs_stream = libz_rs_sys::z_stream;
const _: () = assert!(size_of::<z_stream>() == size_of::<rs_stream>());
const _: () = assert!(align_of::<z_stream>() == align_of::<rs_stream>());
const _: () = assert!(
    std::mem::offset_of!(z_stream, zalloc) == std::mem::offset_of!(rs_stream, zalloc)
        && std::mem::offset_of!(z_stream, adler) == std::mem::offset_of!(rs_stream, adler)
);

macro_rules! forward {
    ($($name:ident($($arg:ident: $ty:ty),*);)*) => {$(
        pub unsafe extern "C" fn $name(strm: *mut z_stream $(, $arg: $ty)*) -> c_int {
            // SAFETY: the layouts are equal (asserted above); the caller keeps zlib's contract.
            unsafe { libz_rs_sys::$name(strm.cast::<rs_stream>() $(, $arg)*) }
        }
    )*};
}

forward! {
    deflate(flush: c_int);
    deflateEnd();
    deflateReset();
    deflateParams(level: c_int, strategy: c_int);
    deflateSetDictionary(dictionary: *const u8, length: c_uint);
    deflateInit2_(level: c_int, method: c_int, bits: c_int, memory: c_int, strategy: c_int,
        version: *const c_char, size: c_int);
    inflate(flush: c_int);
    inflateEnd();
    inflateReset2(bits: c_int);
    inflateSetDictionary(dictionary: *const u8, length: c_uint);
    inflateInit2_(bits: c_int, version: *const c_char, size: c_int);
}

pub unsafe extern "C" fn zlibVersion() -> *const c_char {
    libz_rs_sys::zlibVersion()
}
