//! Archives written, and read back by a reader of its own.

use std::io::Write;
use std::process::{Command, Stdio};

use super::*;

/// An entry as it was read.
#[derive(Debug, PartialEq, Eq)]
pub(in super::super) struct Read {
    pub path: String,
    pub mode: u32,
    pub device: (u32, u32),
    pub body: Vec<u8>,
}

/// Reads a newc archive strictly: everything at multiples of four, nothing
/// after the trailer.
pub(in super::super) fn read(archive: &[u8]) -> Vec<Read> {
    let mut at = 0;
    let mut entries = Vec::new();
    let mut inodes = Vec::new();
    loop {
        assert_eq!(at % 4, 0);
        let header = std::str::from_utf8(&archive[at..at + 110]).unwrap();
        assert_eq!(&header[..6], "070701");
        let field = |i: usize| u32::from_str_radix(&header[6 + 8 * i..14 + 8 * i], 16).unwrap();
        let (mode, size, namesize) = (field(1), field(6) as usize, field(11) as usize);
        assert_eq!((field(2), field(3), field(5), field(12)), (0, 0, 0, 0));
        let name = &archive[at + 110..at + 110 + namesize];
        assert_eq!(name.last(), Some(&0));
        let path = String::from_utf8(name[..namesize - 1].to_vec()).unwrap();
        at = (at + 110 + namesize).next_multiple_of(4);
        let body = archive[at..at + size].to_vec();
        assert!(
            archive[at + size..(at + size).next_multiple_of(4)]
                .iter()
                .all(|&b| b == 0)
        );
        at = (at + size).next_multiple_of(4);
        if path == "TRAILER!!!" {
            assert_eq!(at, archive.len());
            return entries;
        }
        assert!(
            !inodes.contains(&field(0)),
            "two entries with one inode would be links"
        );
        inodes.push(field(0));
        entries.push(Read {
            path,
            mode,
            device: (field(9), field(10)),
            body,
        });
    }
}

fn example() -> Archive {
    let mut archive = Archive::new();
    archive.dir("/etc", 0o755).unwrap();
    archive.dir("tmp/", 0o1777).unwrap();
    for len in 0..9usize {
        let path = format!("/etc/{}", "x".repeat(len + 1));
        archive
            .file(&path, 0o100644, Source::from_bytes(vec![b'a'; len]))
            .unwrap();
    }
    archive.symlink("busybox", "./bin//sh").unwrap();
    archive
        .node("dev/console", 0o600, NodeKind::Char, 5, 1)
        .unwrap();
    archive
        .node("dev/vda", 0o660, NodeKind::Block, 254, 0x12345)
        .unwrap();
    archive
}

#[test]
fn what_is_written_is_read_back() {
    let bytes = example().finish().to_vec().unwrap();
    let entries = read(&bytes);
    assert_eq!(entries.len(), 14);
    assert_eq!(
        (entries[0].path.as_str(), entries[0].mode),
        ("etc", 0o040755)
    );
    assert_eq!(
        (entries[1].path.as_str(), entries[1].mode),
        ("tmp", 0o041777)
    );
    for len in 0..9 {
        let entry = &entries[2 + len];
        assert_eq!(entry.path, format!("etc/{}", "x".repeat(len + 1)));
        assert_eq!((entry.mode, &entry.body), (0o100644, &vec![b'a'; len]));
    }
    assert_eq!(
        (entries[11].path.as_str(), entries[11].mode),
        ("bin/sh", 0o120777)
    );
    assert_eq!(entries[11].body, b"busybox");
    assert_eq!((entries[12].mode, entries[12].device), (0o020600, (5, 1)));
    assert_eq!(
        (entries[13].mode, entries[13].device),
        (0o060660, (254, 0x12345))
    );
}

#[test]
fn large_files_stay_files_and_keep_their_place() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("large");
    let content: Vec<u8> = (0..INLINE_MAX as u32 + 3)
        .map(|i| (i % 253) as u8)
        .collect();
    std::fs::write(&path, &content).unwrap();
    let mut archive = Archive::new();
    archive
        .file("a", 0o755, Source::open(&path).unwrap())
        .unwrap();
    archive
        .file("b", 0o755, Source::open(&path).unwrap())
        .unwrap();
    archive.symlink("a", "c").unwrap();
    let initrd = archive.finish();
    let bytes = initrd.to_vec().unwrap();
    assert_eq!(bytes.len() as u64, initrd.len());
    let entries = read(&bytes);
    assert_eq!(entries[0].body, content);
    assert_eq!(entries[1].body, content);
    assert_eq!(entries[2].path, "c");
}

#[test]
fn files_beyond_four_gigabytes_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sparse");
    std::fs::File::create(&path)
        .unwrap()
        .set_len(1 << 32)
        .unwrap();
    let mut archive = Archive::new();
    let error = archive
        .file("f", 0o644, Source::open(&path).unwrap())
        .unwrap_err();
    assert!(
        matches!(
            error,
            Error::TooLarge {
                size: 0x1_0000_0000,
                ..
            }
        ),
        "{error}"
    );
    // One byte less is held, and refusing has written nothing.
    std::fs::File::create(&path)
        .unwrap()
        .set_len((1 << 32) - 1)
        .unwrap();
    archive
        .file("f", 0o644, Source::open(&path).unwrap())
        .unwrap();
    // Header with name, body with padding, trailer.
    assert_eq!(archive.finish().len(), 112 + (1 << 32) + 124);
}

#[test]
fn paths_are_normalised_or_refused() {
    assert_eq!(normalise("//a/./b//c/").as_deref(), Some("a/b/c"));
    assert_eq!(normalise("..a/b..").as_deref(), Some("..a/b.."));
    let long = "x/y".repeat(2048);
    for bad in [
        "",
        "/",
        ".",
        "./.",
        "..",
        "a/../b",
        "a/..",
        "a\0b",
        "TRAILER!!!",
        &long,
    ] {
        assert_eq!(normalise(bad), None, "{bad:?}");
        assert!(Archive::new().dir(bad, 0o755).is_err());
    }
    for target in ["", "a\0b"] {
        assert!(Archive::new().symlink(target, "link").is_err());
    }
}

#[test]
fn mode_bits_never_change_the_kind() {
    let mut archive = Archive::new();
    archive
        .file("f", u32::MAX, Source::from_bytes(vec![]))
        .unwrap();
    archive.dir("d", u32::MAX).unwrap();
    let entries = read(&archive.finish().to_vec().unwrap());
    assert_eq!((entries[0].mode, entries[1].mode), (0o107777, 0o047777));
}

/// What cpio itself lists, where it is installed.
#[test]
fn cpio_lists_the_same() {
    let bytes = example().finish().to_vec().unwrap();
    // QEMU's user mode starts a process even for a program that is not there;
    // only its exit status says so.
    let version = Command::new("cpio").arg("--version").output();
    if !version.is_ok_and(|out| out.status.success()) {
        return;
    }
    let spawned = Command::new("cpio")
        .args(["-t", "--quiet"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    let Ok(mut cpio) = spawned else { return };
    cpio.stdin.take().unwrap().write_all(&bytes).unwrap();
    let out = cpio.wait_with_output().unwrap();
    assert!(out.status.success());
    let listed: Vec<String> = String::from_utf8(out.stdout)
        .unwrap()
        .lines()
        .map(str::to_owned)
        .collect();
    let written: Vec<String> = read(&bytes).into_iter().map(|e| e.path).collect();
    assert_eq!(listed, written);
}
