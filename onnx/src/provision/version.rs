//! Versions of ONNX Runtime, read without loading the library.

use std::io::Read;
use std::path::Path;

use fs_err as fs;

/// `major.minor.patch`; anything after that (`-dev`, `rc1`) is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct Version {
    pub major: u32,
    pub minor: u32,
    pub patch: u32,
}

impl Version {
    /// Reads the version at the start of a text.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut parts = text.splitn(3, '.');
        let number = |part: &str| {
            let end = part.find(|c: char| !c.is_ascii_digit()).unwrap_or(part.len());
            part[..end].parse::<u32>().ok()
        };
        let whole = |part: &str| part.parse::<u32>().ok();
        Some(Self {
            major: whole(parts.next()?)?,
            minor: whole(parts.next()?)?,
            patch: number(parts.next()?)?,
        })
    }

    /// Reads the version of a library from its file name (`libonnxruntime.so.1.31.1`, `libonnxruntime.1.31.1.dylib`),
    /// links resolved, else from its contents.
    pub(super) fn of_library(path: &Path) -> std::io::Result<Option<Self>> {
        let real = fs::canonicalize(path)?;
        let name = real.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let from_name = name
            .strip_prefix("libonnxruntime.so.")
            .or_else(|| name.strip_prefix("libonnxruntime."))
            .and_then(Self::parse);
        if from_name.is_some() {
            return Ok(from_name);
        }
        Self::in_contents(&real)
    }

    /// Searches a library for the version that its linker wrote: the symbol version `VERS_1.31.1` in an ELF file,
    /// the install name `libonnxruntime.1.31.1.dylib` in a Mach-O file.
    fn in_contents(path: &Path) -> std::io::Result<Option<Self>> {
        const CHUNK: usize = 1 << 20;
        const OVERLAP: usize = 64;
        let mut file = fs::File::open(path)?;
        let mut buffer: Vec<u8> = Vec::with_capacity(CHUNK + OVERLAP);
        loop {
            let read = file.by_ref().take(CHUNK as u64).read_to_end(&mut buffer)?;
            for marker in [b"VERS_".as_slice(), b"libonnxruntime."] {
                let hits = buffer.windows(marker.len()).enumerate().filter(|(_, w)| *w == marker);
                for (at, _) in hits {
                    let start = at + marker.len();
                    let text = &buffer[start..(start + 16).min(buffer.len())];
                    let end =
                        text.iter().position(|b| !b.is_ascii_digit() && *b != b'.').unwrap_or(text.len());
                    let text = std::str::from_utf8(&text[..end]).unwrap_or_default();
                    if let Some(version) = Self::parse(text.trim_end_matches('.')) {
                        return Ok(Some(version));
                    }
                }
            }
            if read == 0 {
                return Ok(None);
            }
            let keep = buffer.len().saturating_sub(OVERLAP);
            buffer.drain(..keep);
        }
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_versions() {
        let version = |major, minor, patch| Some(Version { major, minor, patch });
        assert_eq!(Version::parse("1.31.1"), version(1, 31, 1));
        assert_eq!(Version::parse("1.22.0.dev2"), version(1, 22, 0));
        assert_eq!(Version::parse("1.22.0-rc1"), version(1, 22, 0));
        assert_eq!(Version::parse("1.31.1.dylib"), version(1, 31, 1));
        for bad in ["", "1", "1.2", "1.x.3", "a.b.c", "1..2"] {
            assert_eq!(Version::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn reads_the_version_from_name_link_or_contents() {
        let folder = tempfile::tempdir().unwrap();
        let named = folder.path().join("libonnxruntime.so.1.25.3");
        fs::write(&named, b"").unwrap();
        let wanted = Some(Version { major: 1, minor: 25, patch: 3 });
        assert_eq!(Version::of_library(&named).unwrap(), wanted);
        #[cfg(unix)]
        {
            let link = folder.path().join("libonnxruntime.so");
            std::os::unix::fs::symlink(&named, &link).unwrap();
            assert_eq!(Version::of_library(&link).unwrap(), wanted);
        }
        // The marker lies across the border of two chunks.
        let plain = folder.path().join("renamed.so");
        let mut contents = vec![0u8; (1 << 20) - 3];
        contents.extend_from_slice(b"VERS_1.25.3\0 and more");
        fs::write(&plain, contents).unwrap();
        assert_eq!(Version::of_library(&plain).unwrap(), wanted);
        fs::write(&plain, b"VERS_x libonnxruntime.so.1").unwrap();
        assert_eq!(Version::of_library(&plain).unwrap(), None);
    }
}
