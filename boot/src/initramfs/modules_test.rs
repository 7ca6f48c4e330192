//! Module trees made for the purpose, with and without depmod's files.

use std::fs;
use std::io::Write;

use super::*;

/// An ELF64 relocatable with a `.modinfo` section of these strings.
pub(in super::super) fn ko(modinfo: &[&str], big_endian: bool) -> Vec<u8> {
    let n = |v: u64, len: usize| {
        if big_endian {
            v.to_be_bytes()[8 - len..].to_vec()
        } else {
            v.to_le_bytes()[..len].to_vec()
        }
    };
    let names = b"\0.modinfo\0.shstrtab\0";
    let mut info = Vec::new();
    for item in modinfo {
        info.extend(item.as_bytes());
        info.push(0);
    }
    let mut elf = vec![
        0x7f,
        b'E',
        b'L',
        b'F',
        2,
        if big_endian { 2 } else { 1 },
        1,
        0,
    ];
    elf.resize(16, 0);
    let sections = (64 + names.len() + info.len()) as u64;
    for (value, len) in [
        (1, 2),
        (22, 2),
        (1, 4),
        (0, 8),
        (0, 8),
        (sections, 8),
        (0, 4),
        (64, 2),
        (0, 2),
        (0, 2),
        (64, 2),
        (3, 2),
        (2, 2),
    ] {
        elf.extend(n(value, len));
    }
    elf.extend(names);
    elf.extend(&info);
    let table = [
        (0, 0, 0, 0),
        (1, 1, 64 + names.len() as u64, info.len() as u64),
        (10, 3, 64, names.len() as u64),
    ];
    for (name, kind, offset, size) in table {
        for (value, len) in [
            (name, 4),
            (kind, 4),
            (0, 8),
            (0, 8),
            (offset, 8),
            (size, 8),
            (0, 4),
            (0, 4),
            (1, 8),
            (0, 8),
        ] {
            elf.extend(n(value, len));
        }
    }
    elf
}

/// A folder `<root>/lib/modules/6.1.0-test` with these module files.
fn tree(files: &[(&str, Vec<u8>)]) -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("lib/modules/6.1.0-test");
    for (path, content) in files {
        let path = dir.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
    fs::write(
        dir.join("modules.builtin"),
        "kernel/drivers/virtio/virtio.ko\nkernel/lib/crc-t10.ko\n",
    )
    .unwrap();
    root
}

fn names(modules: &[Module]) -> Vec<&str> {
    modules.iter().map(|m| m.name.as_str()).collect()
}

fn open(root: &tempfile::TempDir) -> ModuleTree {
    ModuleTree::open(root.path(), None).unwrap()
}

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    out.write_all(data).unwrap();
    out.finish().unwrap()
}

fn xz(data: &[u8]) -> Vec<u8> {
    let options = lzma_rust2::XzOptions::default();
    let mut out = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
    out.write_all(data).unwrap();
    out.finish().unwrap()
}

fn zstd(data: &[u8]) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(data, ruzstd::encoding::CompressionLevel::Fastest)
}

#[test]
fn without_depmod_the_modules_are_asked() {
    let net = ko(
        &[
            "license=GPL",
            "depends=net_failover,virtio",
            "name=virtio_net",
        ],
        false,
    );
    let root = tree(&[
        ("kernel/drivers/net/virtio_net.ko.xz", xz(&net)),
        (
            "kernel/drivers/net/net_failover.ko.gz",
            gzip(&ko(&["depends=failover"], false)),
        ),
        (
            "kernel/net/core/failover.ko.zst",
            zstd(&ko(&["depends="], true)),
        ),
        (
            "kernel/drivers/char/hw_random/virtio-rng.ko",
            ko(&["depends="], false),
        ),
    ]);
    let tree = open(&root);
    assert_eq!(tree.release(), "6.1.0-test");
    let modules = tree
        .resolve(&["virtio-net", "virtio_rng", "failover", "crc_t10"])
        .unwrap();
    assert_eq!(
        names(&modules),
        ["failover", "net_failover", "virtio_net", "virtio_rng"]
    );
    assert_eq!(modules[2].content, net);
    let files: Vec<&str> = modules.iter().map(|m| m.file_name.as_str()).collect();
    assert_eq!(
        files,
        [
            "failover.ko",
            "net_failover.ko",
            "virtio_net.ko",
            "virtio-rng.ko"
        ]
    );
    tree.require_release("6.1.0-test").unwrap();
    let error = tree.require_release("6.1.0").unwrap_err().to_string();
    assert!(
        error.contains("of Linux 6.1.0-test, but the kernel is Linux 6.1.0:"),
        "{error}"
    );
    assert!(tree.contains("virtio-rng") && tree.is_builtin("crc-t10"));
    assert!(!tree.is_builtin("virtio_net"));
}

#[test]
fn modules_dep_is_followed_where_it_is() {
    let root = tree(&[
        ("kernel/a.ko", ko(&["depends=not_listed"], false)),
        ("kernel/b.ko", ko(&[], false)),
        ("kernel/c-c.ko", ko(&[], false)),
        ("kernel/unlisted.ko", ko(&[], false)),
    ]);
    let dep =
        "kernel/a.ko: kernel/b.ko kernel/c-c.ko\nkernel/b.ko: kernel/c-c.ko\nkernel/c-c.ko:\n";
    fs::write(root.path().join("lib/modules/6.1.0-test/modules.dep"), dep).unwrap();
    let tree = open(&root);
    assert_eq!(names(&tree.resolve(&["a"]).unwrap()), ["c_c", "b", "a"]);
    assert!(tree.resolve(&["unlisted"]).is_err());
}

#[test]
fn softdeps_are_loaded_where_they_are() {
    let fs = ko(
        &["softdep=pre: crc absent post: late", "softdep=pre: fs-main"],
        false,
    );
    let root = tree(&[
        ("kernel/fs_main.ko", fs),
        (
            "kernel/crc.ko",
            ko(&["depends=", "softdep=post: fs_main"], false),
        ),
        ("kernel/late.ko", ko(&["depends=fs_main"], false)),
    ]);
    assert_eq!(
        names(&open(&root).resolve(&["fs_main"]).unwrap()),
        ["crc", "fs_main", "late"]
    );
}

#[test]
fn what_is_missing_is_named() {
    let root = tree(&[("kernel/a.ko", ko(&["depends=gone"], false))]);
    let tree = open(&root);
    let error = tree.resolve(&["virtio-foo"]).unwrap_err().to_string();
    assert!(
        error.starts_with("kernel module virtio_foo is not in "),
        "{error}"
    );
    assert!(error.contains("6.1.0-test"), "{error}");
    let error = tree.resolve(&["a"]).unwrap_err().to_string();
    assert!(
        error.contains("gone") && error.contains("a needs it"),
        "{error}"
    );

    let available = tree.resolve_available(&["virtio-foo", "virtio"]).unwrap();
    assert!(available.is_empty());
    assert!(
        tree.resolve_available(&["a", "nope"]).is_err(),
        "a is there, gone is not"
    );
}

#[test]
fn cycles_and_damage_are_errors() {
    let root = tree(&[
        ("kernel/a.ko", ko(&["depends=b"], false)),
        ("kernel/b.ko", ko(&["depends=a"], false)),
        ("kernel/text.ko", b"not a module".to_vec()),
        ("kernel/empty.ko", Vec::new()),
        ("kernel/no_info.ko", fs::read("/proc/self/exe").unwrap()),
        ("kernel/cut.ko.xz", xz(&ko(&[], false))[..40].to_vec()),
    ]);
    let tree = open(&root);
    assert!(matches!(tree.resolve(&["a"]), Err(Error::Cycle { .. })));
    assert!(matches!(
        tree.resolve(&["text"]),
        Err(Error::NotAModule { .. })
    ));
    assert!(matches!(
        tree.resolve(&["no_info"]),
        Err(Error::NotAModule { .. })
    ));
    assert!(matches!(tree.resolve(&["empty"]), Err(Error::Open { .. })));
    assert!(matches!(
        tree.resolve(&["cut"]),
        Err(Error::Compression { .. })
    ));
}

#[test]
fn truncated_modules_never_panic() {
    let whole = ko(&["depends=b", "softdep=pre: c"], false);
    for len in 0..whole.len() {
        assert_eq!(ModInfo::parse(&whole[..len]), None, "{len}");
    }
    let info = ModInfo::parse(&whole).unwrap();
    assert_eq!(
        (info.depends, info.soft_before),
        (vec!["b".to_owned()], vec!["c".to_owned()])
    );
}

#[test]
fn aliases_are_resolved() {
    let root = tree(&[
        ("kernel/ext4.ko", ko(&[], false)),
        ("kernel/vb.ko", ko(&[], false)),
    ]);
    let alias = "# comment\nalias fs-ext4 ext4\nalias virtio:d0000000[2-3]v* vb\nalias x gone\n";
    fs::write(
        root.path().join("lib/modules/6.1.0-test/modules.alias"),
        alias,
    )
    .unwrap();
    let tree = open(&root);
    assert_eq!(names(&tree.resolve(&["fs-ext4"]).unwrap()), ["ext4"]);
    assert_eq!(
        names(&tree.resolve(&["virtio:d00000002v00001AF4"]).unwrap()),
        ["vb"]
    );
    assert_eq!(
        names(&tree.resolve_available(&["fs_ext4", "virtio:d4v1"]).unwrap()),
        ["ext4"]
    );
    assert!(tree.resolve(&["x"]).is_err());
}

#[test]
fn trees_are_found_where_they_usually_are() {
    let root = tree(&[("kernel/a.ko", ko(&[], false))]);
    let base = root.path().join("lib/modules");
    for place in [
        root.path().to_owned(),
        base.clone(),
        base.join("6.1.0-test"),
    ] {
        let tree = ModuleTree::open(&place, None).unwrap();
        assert_eq!(tree.release(), "6.1.0-test", "{}", place.display());
    }
    fs::create_dir_all(base.join("6.2.0/kernel")).unwrap();
    let error = ModuleTree::open(&base, None).unwrap_err().to_string();
    assert!(error.contains("6.1.0-test, 6.2.0"), "{error}");
    assert_eq!(
        ModuleTree::open(&base, Some("6.2.0")).unwrap().release(),
        "6.2.0"
    );
    let error = ModuleTree::open(root.path(), Some("6.3"))
        .unwrap_err()
        .to_string();
    assert!(error.contains("Linux 6.3"), "{error}");
    assert!(ModuleTree::open(root.path().join("absent"), None).is_err());
    let empty = tempfile::tempdir().unwrap();
    let error = ModuleTree::open(empty.path(), None)
        .unwrap_err()
        .to_string();
    assert!(error.contains("no kernel modules"), "{error}");
}

#[test]
fn updates_come_first_and_links_are_not_followed() {
    let root = tree(&[
        ("kernel/a.ko", ko(&["depends=old"], false)),
        ("updates/a.ko", ko(&["depends="], false)),
    ]);
    let dir = root.path().join("lib/modules/6.1.0-test");
    std::os::unix::fs::symlink("/", dir.join("build")).unwrap();
    let tree = open(&root);
    assert_eq!(names(&tree.resolve(&["a"]).unwrap()), ["a"]);
    assert_eq!(tree.files.len(), 1);
}

#[test]
fn patterns_match_as_in_shells() {
    for (pattern, text, expected) in [
        ("abc", "abc", true),
        ("abc", "abcd", false),
        ("*", "", true),
        ("a*c", "abcbc", true),
        ("a*c*", "ab", false),
        ("pci:v*d*sv*", "pci:v1d2sv3bc", true),
        ("a?c", "abc", true),
        ("a?c", "ac", false),
        ("[a-cx]1", "x1", true),
        ("[a-cx]1", "b1", true),
        ("[a-cx]1", "d1", false),
        ("[ab", "a", false),
        ("", "", true),
        ("", "a", false),
        ("**b", "aab", true),
    ] {
        assert_eq!(
            matches(pattern.as_bytes(), text.as_bytes()),
            expected,
            "{pattern} {text}"
        );
    }
    // Many stars take no exponential time.
    assert!(!matches(&b"a*".repeat(50), &b"a".repeat(49)));
}
