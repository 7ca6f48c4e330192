//! What tests of several architectures need: readers of device trees, and
//! configurations.

use crossvisor_vmm::config::{Disk, Net};
use crossvisor_vmm::plan::Range;
use dtoolkit::fdt::FdtNode;
use dtoolkit::{Node, Property};

/// So many disks.
pub fn disks(count: usize) -> Vec<Disk> {
    let disk = |number| Disk {
        path: format!("disk{number}").into(),
        read_only: false,
        serial: None,
        queues: None,
    };
    (0..count).map(disk).collect()
}

/// So many network interfaces.
pub fn nets(count: usize) -> Vec<Net> {
    let net = |number| Net {
        tap: format!("tap{number}"),
        mac: None,
        queues: 1,
    };
    (0..count).map(net).collect()
}

/// The bytes of a property.
pub fn bytes(node: &FdtNode<'_>, name: &str) -> Vec<u8> {
    match node.properties().find(|property| property.name() == name) {
        Some(property) => property.value().to_vec(),
        None => panic!("{} has no {name}", node.name()),
    }
}

/// A property as cells.
pub fn cells(node: &FdtNode<'_>, name: &str) -> Vec<u32> {
    let bytes = bytes(node, name);
    assert_eq!(bytes.len() % 4, 0, "{name}");
    bytes
        .chunks(4)
        .map(|cell| u32::from_be_bytes(cell.try_into().unwrap()))
        .collect()
}

/// A property as ranges, of two cells for each number.
pub fn ranges(node: &FdtNode<'_>, name: &str) -> Vec<Range> {
    let pair = |high: u32, low: u32| u64::from(high) << 32 | u64::from(low);
    cells(node, name)
        .chunks(4)
        .map(|four| Range::new(pair(four[0], four[1]), pair(four[2], four[3])))
        .collect()
}

/// A property that is a string.
pub fn text(node: &FdtNode<'_>, name: &str) -> String {
    let text = String::from_utf8(bytes(node, name)).unwrap();
    text.trim_end_matches('\0').into()
}

/// The first child whose name begins with `prefix`.
pub fn child<'a>(node: &FdtNode<'a>, prefix: &str) -> FdtNode<'a> {
    match node
        .children()
        .find(|child| child.name().starts_with(prefix))
    {
        Some(child) => child,
        None => panic!("no {prefix}"),
    }
}

/// Whether the node has a property called `name`.
pub fn has(node: &FdtNode<'_>, name: &str) -> bool {
    node.properties().any(|property| property.name() == name)
}

/// What dtc says against a tree; nothing where there is no dtc.
pub fn dtc_complaints(blob: &[u8]) -> String {
    let made = dtc(&["-I", "dtb", "-O", "dts", "-"], blob);
    made.map_or_else(String::new, |(_, complaints)| complaints)
}

/// What dtc makes of `input`, and what it says against it; `None` where there is no
/// dtc.
pub fn dtc(arguments: &[&str], input: &[u8]) -> Option<(Vec<u8>, String)> {
    use std::io::Write;
    use std::process::{Command, Stdio};

    let dtc = Command::new("dtc")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut dtc = dtc.ok()?;
    dtc.stdin.take().unwrap().write_all(input).unwrap();
    let output = dtc.wait_with_output().unwrap();
    let complaints = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{complaints}");
    Some((output.stdout, complaints.into_owned()))
}
