//! Decompression with a bound on the output, for kernels and kernel modules.

use std::fmt;
use std::io::{self, Read};

/// The largest window or dictionary, in bytes. kbuild compresses kernels with
/// 128 MiB (scripts/Makefile.lib: `zstd -22 --ultra`, `xz --lzma2=dict=128MiB`).
const WINDOW_LIMIT: u64 = 128 << 20;

/// A compression format, told by its magic number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Compression {
    /// RFC 1952.
    Gzip,
    /// RFC 8878.
    Zstd,
    /// The .xz file format.
    Xz,
    /// The legacy LZMA "alone" format; not decompressed.
    Lzma,
    /// bzip2; not decompressed.
    Bzip2,
    /// The LZ4 frame or legacy format; not decompressed.
    Lz4,
    /// lzop; not decompressed.
    Lzo,
}

impl Compression {
    /// What the first bytes of a file say, if it is compressed at all.
    pub fn detect(start: &[u8]) -> Option<Compression> {
        const MAGICS: &[(&[u8], Compression)] = &[
            (&[0x1f, 0x8b, 0x08], Compression::Gzip),
            (&[0x28, 0xb5, 0x2f, 0xfd], Compression::Zstd),
            (&[0xfd, b'7', b'z', b'X', b'Z', 0], Compression::Xz),
            (&[0x5d, 0x00, 0x00], Compression::Lzma),
            (b"BZh", Compression::Bzip2),
            (&[0x02, 0x21, 0x4c, 0x18], Compression::Lz4),
            (&[0x04, 0x22, 0x4d, 0x18], Compression::Lz4),
            (&[0x89, b'L', b'Z', b'O', 0], Compression::Lzo),
        ];
        MAGICS
            .iter()
            .find(|(magic, _)| start.starts_with(magic))
            .map(|&(_, c)| c)
    }

    /// The name that users know it by.
    pub fn name(self) -> &'static str {
        match self {
            Compression::Gzip => "gzip",
            Compression::Zstd => "zstd",
            Compression::Xz => "xz",
            Compression::Lzma => "lzma",
            Compression::Bzip2 => "bzip2",
            Compression::Lz4 => "lz4",
            Compression::Lzo => "lzo",
        }
    }

    /// Decompresses one member, frame or stream; what follows it (kbuild
    /// appends the length, boot loaders a device tree) is ignored. Never holds
    /// more than about `limit` bytes of output.
    pub(crate) fn decompress(self, input: impl Read, limit: u64) -> Result<Vec<u8>, Error> {
        let input = io::BufReader::with_capacity(64 << 10, input);
        match self {
            Compression::Gzip => {
                // GzDecoder wants BufRead to stop at the end of the member.
                read_bounded(flate2::bufread::GzDecoder::new(input), self, limit)
            }
            Compression::Zstd => {
                let decoder = ruzstd::decoding::StreamingDecoder::new_with_max_window_size(
                    input,
                    WINDOW_LIMIT,
                )
                .map_err(|e| Error::Damaged(self, e.to_string()))?;
                read_bounded(decoder, self, limit)
            }
            Compression::Xz => {
                let limit_kib = (WINDOW_LIMIT >> 10) as u32 + 1024;
                let decoder = lzma_rust2::XzReader::new_mem_limit(input, false, limit_kib);
                read_bounded(decoder, self, limit)
            }
            Compression::Lzma | Compression::Bzip2 | Compression::Lz4 | Compression::Lzo => {
                Err(Error::Unsupported(self))
            }
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why something could not be decompressed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No decoder here for this format.
    #[error("{0} compression is not supported: decompress it first (gzip, zstd and xz are)")]
    Unsupported(Compression),
    /// The stream is truncated or corrupt.
    #[error("damaged {0} data: {1}")]
    Damaged(Compression, String),
    /// More output than anything sensible gives.
    #[error("{0} data decompresses to more than {limit} MiB", limit = .1 >> 20)]
    TooLarge(Compression, u64),
}

fn read_bounded(decoder: impl Read, kind: Compression, limit: u64) -> Result<Vec<u8>, Error> {
    let mut out = Vec::new();
    decoder
        .take(limit.saturating_add(1))
        .read_to_end(&mut out)
        .map_err(|e| Error::Damaged(kind, e.to_string()))?;
    if out.len() as u64 > limit {
        return Err(Error::TooLarge(kind, limit));
    }
    Ok(out)
}
