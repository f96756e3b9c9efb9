//! Reading files that the configuration names.

use std::{
    fs::{self, File},
    io::{self, Read as _},
    path::Path,
};

use super::Size;

/// Reads a regular file of at most `bytes_max`.
///
/// # Errors
/// It cannot be read, is larger, or is a pipe or a device: to open a pipe would
/// wait for its writer.
pub(crate) fn read_bounded(path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
    if !fs::metadata(path)?.is_file() {
        let why = "it is no regular file";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    }
    let mut bytes = Vec::new();
    File::open(path)?
        .take(bytes_max.saturating_add(1))
        .read_to_end(&mut bytes)?;
    if u64::try_from(bytes.len()).is_ok_and(|len| len > bytes_max) {
        let why = format!("it is larger than {}", Size(bytes_max));
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, why));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_regular_file_within_the_bound_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a");
        fs::write(&file, "12345").unwrap();
        assert_eq!(read_bounded(&file, 5).unwrap(), b"12345");
        assert!(read_bounded(&file, 4).is_err());
        assert!(read_bounded(folder.path(), 5).is_err());
        assert!(read_bounded(Path::new("/dev/zero"), 5).is_err());
    }
}
