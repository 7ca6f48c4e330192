//! Archives built, and read back.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;

use super::super::cpio::tests::{Read, read};
use super::super::modules;
use super::*;

fn built(builder: Builder) -> BTreeMap<String, Read> {
    let bytes = builder.build().unwrap().to_vec().unwrap();
    let entries = read(&bytes);
    // Every parent comes before what is in it, as a directory.
    let mut dirs = vec![String::new()];
    for entry in &entries {
        let parent = entry.path.rsplit_once('/').map_or("", |(p, _)| p);
        assert!(
            dirs.iter().any(|d| d == parent),
            "{} before {parent}",
            entry.path
        );
        if entry.mode & 0o170000 == 0o040000 {
            dirs.push(entry.path.clone());
        }
    }
    entries.into_iter().map(|e| (e.path.clone(), e)).collect()
}

fn config_of(entries: &BTreeMap<String, Read>) -> InitConfig {
    serde_json::from_slice(&entries["etc/crossvisor/init.json"].body).unwrap()
}

#[test]
fn the_base_has_a_console() {
    let entries = built(Builder::new());
    assert_eq!(
        (entries["dev/console"].mode, entries["dev/console"].device),
        (0o020600, (5, 1))
    );
    assert_eq!(entries["tmp"].mode, 0o041777);
    assert_eq!(config_of(&entries), InitConfig::default());
}

#[test]
fn links_among_parents_are_followed() {
    let mut builder = Builder::new();
    builder.symlink("usr/lib", "/lib64").unwrap();
    builder.symlink("/lib64/deep", "/short").unwrap();
    builder.add_bytes("/short/f", 0o644, "1").unwrap();
    builder.add_bytes("/lib64/g", 0o600, "2").unwrap();
    builder.dir("/lib64", 0o755).unwrap();
    builder.symlink("../usr/./lib", "/mnt/up").unwrap();
    builder.add_bytes("/mnt/up/h", 0o600, "3").unwrap();
    let entries = built(builder);
    assert_eq!(entries["usr/lib/deep/f"].body, b"1");
    assert_eq!(entries["usr/lib/g"].body, b"2");
    assert_eq!(entries["usr/lib/h"].body, b"3");
    assert_eq!(entries["lib64"].mode, 0o120777);
}

#[test]
fn impossible_places_are_errors() {
    let mut builder = Builder::new();
    builder.add_bytes("/a/b", 0o644, "").unwrap();
    assert!(matches!(
        builder.add_bytes("/a/b/c", 0o644, ""),
        Err(Error::Parent { .. })
    ));
    assert!(matches!(
        builder.add_bytes("/a", 0o644, ""),
        Err(Error::Parent { .. })
    ));
    builder.symlink("/loop", "/loop").unwrap();
    assert!(matches!(
        builder.add_bytes("/loop/x", 0o644, ""),
        Err(Error::Parent { .. })
    ));
    for path in ["", "/", "..", "/a/../b"] {
        assert!(
            matches!(builder.add_bytes(path, 0o644, ""), Err(Error::Archive(_))),
            "{path:?}"
        );
    }
    // What comes later replaces what was there.
    builder.add_bytes("/a/b", 0o755, "new").unwrap();
    let entries = built(builder);
    assert_eq!(
        (entries["a/b"].mode, &entries["a/b"].body[..]),
        (0o100755, &b"new"[..])
    );
}

#[test]
fn trees_are_added_with_links_and_modes() {
    let host = tempfile::tempdir().unwrap();
    let root = host.path();
    fs::create_dir_all(root.join("sub/empty")).unwrap();
    fs::write(root.join("sub/run"), "#!").unwrap();
    fs::set_permissions(root.join("sub/run"), fs::Permissions::from_mode(0o750)).unwrap();
    fs::write(root.join("zero"), "").unwrap();
    symlink("../nowhere", root.join("sub/link")).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(root.join("sock")).unwrap();
    let mut builder = Builder::new();
    builder.add_tree(root, "/opt/x").unwrap();
    builder.add_tree(root.join("sub"), "/").unwrap();
    builder.add_tree(root.join("zero"), "/z").unwrap();
    builder.add_tree("/dev/null", "/n").unwrap();
    let entries = built(builder);
    assert_eq!(entries["opt/x/sub/run"].mode, 0o100750);
    assert_eq!(entries["opt/x/sub/link"].body, b"../nowhere");
    assert_eq!(entries["opt/x/sub/empty"].mode & 0o170000, 0o040000);
    assert_eq!(
        (entries["run"].mode, entries["z"].body.len()),
        (0o100750, 0)
    );
    assert_eq!(
        (entries["n"].mode & 0o170000, entries["n"].device),
        (0o020000, (1, 3))
    );
    assert!(!entries.contains_key("opt/x/sock"));

    let mut builder = Builder::new();
    assert!(matches!(
        builder.add_tree(root.join("gone"), "/g"),
        Err(Error::Read { .. })
    ));
    assert!(matches!(
        builder.add_tree(root.join("sock"), "/s"),
        Err(Error::Kind { .. })
    ));
    assert!(matches!(
        builder.add_file(root, "/d"),
        Err(Error::Open { .. })
    ));
}

#[test]
fn modules_are_put_in_load_order_and_told_to_init() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("6.1.0-test/kernel");
    fs::create_dir_all(&dir).unwrap();
    let ko = |depends: &str| modules::tests::ko(&[depends], false);
    fs::write(dir.join("virtio-net.ko"), ko("depends=failover")).unwrap();
    fs::write(dir.join("failover.ko"), ko("depends=")).unwrap();
    let tree = ModuleTree::open(root.path(), None).unwrap();

    let mut builder = Builder::new();
    let config = InitConfig {
        command: Some("true".to_owned()),
        modules: vec!["/first.ko".to_owned()],
        ..InitConfig::default()
    };
    builder.init_config(&config);
    assert_eq!(
        builder.modules(&tree, &["virtio-net"]).unwrap(),
        ["failover", "virtio_net"]
    );
    for there in ["failover", "virtio_net"] {
        assert!(builder.modules(&tree, &[there]).unwrap().is_empty());
    }
    assert!(
        builder
            .modules_available(&tree, &["absent"])
            .unwrap()
            .is_empty()
    );
    assert!(matches!(
        builder.modules(&tree, &["absent"]),
        Err(Error::Modules(_))
    ));
    let entries = built(builder);
    let told = config_of(&entries);
    assert_eq!(told.command, config.command);
    assert_eq!(
        told.modules,
        [
            "/first.ko",
            "/lib/modules/6.1.0-test/failover.ko",
            "/lib/modules/6.1.0-test/virtio-net.ko"
        ]
    );
    for path in &told.modules[1..] {
        assert_eq!(entries[&path[1..]].mode, 0o100644);
    }
}

/// This test itself is such an executable on most hosts: what it is mapped
/// from must be in the archive, under the names that a loader looks for.
#[test]
fn a_dynamic_init_brings_its_libraries() {
    let exe = std::env::current_exe().unwrap();
    let mut builder = Builder::new();
    builder.add_init(&exe).unwrap();
    let entries = built(builder);
    let executable = Executable::open(&exe).unwrap();
    let mut wanted = fs::read(&exe).unwrap();
    if let Some(at) = executable.pgste {
        // On s390x this test is linked as crossvisor is, which /init is not.
        wanted[at as usize..][..4].fill(0);
    }
    // Too large to be printed.
    assert!(entries["init"].body == wanted);
    assert_eq!(entries["init"].mode & 0o170111, 0o100111);
    let Some(interpreter) = executable.interpreter else {
        return;
    };
    let mut path = interpreter.trim_start_matches('/').to_owned();
    if entries[&path].mode & 0o170000 == 0o120000 {
        path = String::from_utf8(entries[&path].body.clone()).unwrap();
        path = path.trim_start_matches('/').to_owned();
    }
    assert_eq!(entries[&path].body, fs::read(&interpreter).unwrap());
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    for library in mapped_executables(&maps) {
        if Path::new(library) != exe {
            assert!(
                entries.contains_key(library.trim_start_matches('/')),
                "{library}"
            );
        }
    }
}

#[test]
fn other_dynamic_executables_are_refused() {
    let shell = Path::new("/bin/sh");
    let Ok(Executable {
        interpreter: Some(_),
        ..
    }) = Executable::open(shell)
    else {
        return;
    };
    let error = Builder::new().add_init(shell).unwrap_err().to_string();
    assert!(
        error.starts_with("/bin/sh: is dynamically linked"),
        "{error}"
    );
    let error = Builder::new().busybox(shell).unwrap_err().to_string();
    assert!(error.contains("a static busybox"), "{error}");
    let error = Builder::new()
        .add_init("/etc/passwd")
        .unwrap_err()
        .to_string();
    assert!(error.contains("not an ELF executable"), "{error}");
    assert!(Builder::new().add_init("/absent").is_err());
}

#[test]
fn a_busybox_that_cannot_be_run_is_installed_by_init() {
    // An ELF header and no more: static, as far as it goes, and not runnable.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("busybox");
    let mut elf = vec![0u8; 64];
    elf[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    elf[16] = 2;
    fs::write(&path, elf).unwrap();
    let mut builder = Builder::new();
    builder.busybox(&path).unwrap();
    let entries = built(builder);
    assert!(config_of(&entries).busybox_install);
    assert_eq!(entries["bin/sh"].body, b"busybox");
    assert_eq!(entries["sbin/poweroff"].body, b"../bin/busybox");
}

#[test]
fn maps_are_read_with_blanks_in_names() {
    let maps = "\
55d0-55d1 r--p 00000000 fe:01 123   /usr/bin/a b
55d1-55d2 r-xp 00001000 fe:01 123                        /usr/bin/a b
7f00-7f01 r-xp 00000000 fe:01 9 /usr/lib/libc.so.6
7f01-7f02 r-xp 00000000 fe:01 9 /usr/lib/libc.so.6
7f03-7f04 rwxp 00000000 00:00 0
7ffe-7fff r-xp 00000000 00:00 0                          [vdso]
";
    assert_eq!(
        mapped_executables(maps),
        ["/usr/bin/a b", "/usr/lib/libc.so.6"]
    );
    assert!(mapped_executables("junk\n\n").is_empty());
}

/// A static executable for s390x whose program header number 1 asks for page
/// tables with storage keys.
fn with_storage_keys() -> Vec<u8> {
    let mut elf = b"\x7fELF\x02\x02\x01".to_vec();
    elf.resize(16, 0);
    // Type, machine, version; entry, program headers, section headers.
    elf.extend([0, 2, 0, 22, 0, 0, 0, 1]);
    elf.extend([0, 64, 0].map(u64::to_be_bytes).concat());
    // Flags; sizes of this header and of a program header, how many.
    elf.extend([0; 4]);
    elf.extend([64_u16, 56, 2, 0, 0, 0].map(u16::to_be_bytes).concat());
    for kind in [0x6474_e551_u32, 0x7000_0000] {
        elf.extend(kind.to_be_bytes());
        elf.extend([0; 52]);
    }
    elf
}

#[test]
fn init_does_not_ask_for_storage_keys() {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("program");
    let elf = with_storage_keys();
    fs::write(&program, &elf).unwrap();
    let mut builder = Builder::new();
    builder.add_init(&program).unwrap();
    builder.add_executable(&program, "/bin/program").unwrap();
    let entries = built(builder);
    assert_eq!(entries["bin/program"].body, elf);
    let init = &entries["init"];
    assert_eq!(init.mode, 0o100755);
    let (before, after) = (&init.body[..120], &init.body[124..]);
    assert_eq!((before, after), (&elf[..120], &elf[124..]));
    assert_eq!(init.body[120..124], [0; 4]);
}
