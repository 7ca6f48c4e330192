//! Decompression with a bound on the output, for kernels and kernel modules.

use std::cell::Cell;
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
        let ended = Cell::new(false);
        let input = Watched {
            input,
            ended: &ended,
        };
        let decompressed = self.decompress_all(input, limit);
        // Each decoder has its own words for it.
        match decompressed {
            Err(Error::Damaged(..)) if ended.get() => Err(Error::Truncated(self)),
            decompressed => decompressed,
        }
    }

    fn decompress_all(self, input: impl Read, limit: u64) -> Result<Vec<u8>, Error> {
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
    /// The input ends before the stream does.
    #[error("truncated {0} data")]
    Truncated(Compression),
    /// The stream is corrupt.
    #[error("damaged {0} data: {1}")]
    Damaged(Compression, String),
    /// More output than anything sensible gives.
    #[error("{0} data decompresses to more than {limit} MiB", limit = .1 >> 20)]
    TooLarge(Compression, u64),
}

/// Takes note when more is wanted of an input than it has.
struct Watched<'a, R> {
    input: R,
    ended: &'a Cell<bool>,
}

impl<R: Read> Read for Watched<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.input.read(buffer)?;
        if count == 0 && !buffer.is_empty() {
            self.ended.set(true);
        }
        Ok(count)
    }
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

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// The same bytes in every format that is decompressed.
    fn compressed(data: &[u8]) -> Vec<Vec<u8>> {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        gzip.write_all(data).unwrap();
        let options = lzma_rust2::XzOptions::default();
        let mut xz = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
        xz.write_all(data).unwrap();
        let level = ruzstd::encoding::CompressionLevel::Fastest;
        vec![
            gzip.finish().unwrap(),
            xz.finish().unwrap(),
            ruzstd::encoding::compress_to_vec(data, level),
        ]
    }

    #[test]
    fn the_bound_holds_for_every_format() {
        let data = vec![7u8; 1 << 18];
        for bytes in compressed(&data) {
            let kind = Compression::detect(&bytes).unwrap();
            assert!(bytes.len() < data.len() / 10, "{kind} is a small bomb");
            assert_eq!(kind.decompress(&bytes[..], 1 << 18).unwrap(), data);
            for limit in [0, 1, (1 << 18) - 1] {
                let error = kind.decompress(&bytes[..], limit).unwrap_err();
                assert!(matches!(error, Error::TooLarge(k, l) if k == kind && l == limit));
            }
        }
    }

    #[test]
    fn truncated_data_is_an_error_everywhere() {
        let data: Vec<u8> = (0..600u32).flat_map(|i| (i * i).to_le_bytes()).collect();
        for bytes in compressed(&data) {
            let kind = Compression::detect(&bytes).unwrap();
            // A zstd frame may end with a checksum, gzip with a trailer: what
            // is cut must never pass for the whole.
            for len in 0..bytes.len() {
                match kind.decompress(&bytes[..len], 1 << 20) {
                    Ok(out) => assert_eq!(out, data, "{kind} cut at {len}"),
                    Err(e) => assert!(matches!(e, Error::Truncated(..)), "{e}"),
                }
            }
        }
    }

    #[test]
    fn damaged_data_ends_in_an_error_or_other_data() {
        let data: Vec<u8> = (0..300u32).flat_map(|i| (i * i).to_le_bytes()).collect();
        for bytes in compressed(&data) {
            let kind = Compression::detect(&bytes).unwrap();
            for at in 0..bytes.len() {
                let mut damaged = bytes.clone();
                damaged[at] ^= 0x41;
                if let Ok(out) = kind.decompress(&damaged[..], 1 << 16) {
                    assert!(out.len() <= 1 << 16);
                }
            }
        }
    }

    #[test]
    fn formats_without_a_decoder_are_named() {
        for start in [
            &b"BZh9"[..],
            &[0x5d, 0, 0, 0],
            &[2, 0x21, 0x4c, 0x18],
            b"\x89LZO\0",
        ] {
            let kind = Compression::detect(start).unwrap();
            let error = kind.decompress(start, 10).unwrap_err();
            assert!(matches!(error, Error::Unsupported(k) if k == kind));
            assert!(error.to_string().contains(kind.name()));
        }
        assert_eq!(Compression::detect(b""), None);
        assert_eq!(Compression::detect(b"\x1f\x8b"), None);
    }
}
