//! Device trees as source text (Devicetree Specification 0.4, sections 5 and 6),
//! for people, and for dtc, which makes the same tree of it.
//!
//! dtoolkit's own text leaves quotes in strings as they are, and it reads no names
//! of more than 31 bytes, which firmware of PAPR has.

use std::fmt::Write;

// The header's fields (section 5.2), by offset.
const OFF_STRUCT: usize = 8;
const OFF_STRINGS: usize = 12;
const OFF_RESERVED: usize = 16;
const MAGIC: u32 = 0xd00d_feed;

// Tokens of the structure block (section 5.4.1).
const BEGIN_NODE: u32 = 1;
const END_NODE: u32 = 2;
const PROP: u32 = 3;
const NOP: u32 = 4;
const END: u32 = 9;

/// Cells and bytes on a line.
const CELLS: usize = 8;
const BYTES: usize = 24;

/// The source text of a flattened tree; `None` when `tree` is none.
pub fn source(tree: &[u8]) -> Option<String> {
    if word(tree, 0)? != MAGIC {
        return None;
    }
    let mut text = "/dts-v1/;\n".to_string();
    let mut at = word(tree, OFF_RESERVED)? as usize;
    loop {
        let (address, size) = (doubleword(tree, at)?, doubleword(tree, at + 8)?);
        if (address, size) == (0, 0) {
            break;
        }
        writeln!(text, "/memreserve/ {address:#x} {size:#x};").ok()?;
        at += 16;
    }
    let strings = tree.get(word(tree, OFF_STRINGS)? as usize..)?;
    let mut at = word(tree, OFF_STRUCT)? as usize;
    let mut depth = 0_usize;
    loop {
        let token = word(tree, at)?;
        at += 4;
        match token {
            BEGIN_NODE => {
                let name = string(tree.get(at..)?)?;
                at += name.len() + 1;
                let name = if depth == 0 { "/" } else { name };
                let gap = if text.ends_with("{\n") { "" } else { "\n" };
                writeln!(text, "{gap}{}{name} {{", indent(depth)).ok()?;
                depth += 1;
            }
            END_NODE => {
                depth = depth.checked_sub(1)?;
                writeln!(text, "{}}};", indent(depth)).ok()?;
            }
            PROP => {
                let (len, name) = (word(tree, at)? as usize, word(tree, at + 4)? as usize);
                at += 8;
                let value = tree.get(at..at.checked_add(len)?)?;
                at += len;
                let name = string(strings.get(name..)?)?;
                let value = written(value, depth);
                writeln!(text, "{}{name}{value};", indent(depth)).ok()?;
            }
            NOP => {}
            END => return (depth == 0).then_some(text),
            _ => return None,
        }
        at = at.next_multiple_of(4);
    }
}

fn indent(depth: usize) -> String {
    "\t".repeat(depth)
}

/// What comes after a property's name: an equals sign and strings, cells or bytes.
fn written(value: &[u8], depth: usize) -> String {
    if value.is_empty() {
        return String::new();
    }
    if let Some(strings) = strings(value) {
        return format!(" = {}", strings.join(", "));
    }
    let (open, close, parts, on_a_line) = match value.as_chunks::<4>() {
        (cells, []) => {
            let cell = |cell: &[u8; 4]| format!("{:#04x}", u32::from_be_bytes(*cell));
            ('<', '>', cells.iter().map(cell).collect::<Vec<_>>(), CELLS)
        }
        _ => {
            let byte = |byte: &u8| format!("{byte:02x}");
            ('[', ']', value.iter().map(byte).collect(), BYTES)
        }
    };
    let lines: Vec<String> = parts.chunks(on_a_line).map(|line| line.join(" ")).collect();
    let next = format!("\n{}", indent(depth + 1));
    format!(" = {open}{}{close}", lines.join(&next))
}

/// The strings of a value that is nothing else, quoted: all but a single one are of
/// some length.
fn strings(value: &[u8]) -> Option<Vec<String>> {
    let text = value.strip_suffix(&[0])?;
    let is_text = |part: &[u8]| part.iter().all(|byte| (b' '..=b'~').contains(byte));
    let parts: Vec<&[u8]> = text.split(|byte| *byte == 0).collect();
    let sound = parts.iter().all(|part| is_text(part)) && !parts.contains(&&b""[..]);
    let quoted = |part: &&[u8]| {
        let text = String::from_utf8_lossy(part);
        format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
    };
    (sound || text.is_empty()).then(|| parts.iter().map(quoted).collect())
}

/// The string at the start of `bytes`, up to its NUL.
fn string(bytes: &[u8]) -> Option<&str> {
    let end = bytes.iter().position(|byte| *byte == 0)?;
    str::from_utf8(bytes.get(..end)?).ok()
}

fn word(tree: &[u8], at: usize) -> Option<u32> {
    let bytes = tree.get(at..)?.first_chunk::<4>()?;
    Some(u32::from_be_bytes(*bytes))
}

fn doubleword(tree: &[u8], at: usize) -> Option<u64> {
    let bytes = tree.get(at..)?.first_chunk::<8>()?;
    Some(u64::from_be_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use crossvisor_vmm::config::VmConfig;
    use vm_fdt::{FdtReserveEntry, FdtWriter};

    use super::*;
    use crate::shared::testing::dtc;

    /// Compares a tree with what dtc makes of its text, as far as both come out of
    /// dtc; nothing where there is no dtc.
    fn dtc_agrees(blob: &[u8]) {
        let text = source(blob).unwrap();
        // The boot CPU's number is not in the text.
        let out = |from| ["-q", "-q", "-b", "0", "-I", from, "-O", "dtb", "-"];
        let wanted = dtc(&out("dtb"), blob);
        let found = dtc(&out("dts"), text.as_bytes());
        if let (Some((wanted, _)), Some((found, said))) = (wanted, found) {
            assert!(wanted == found, "{said}\n{text}");
        }
    }

    #[test]
    fn values_are_strings_cells_or_bytes() {
        let reserved = FdtReserveEntry::new(0x1000, 0x2000).unwrap();
        let mut fdt = FdtWriter::new_with_mem_reserv(&[reserved]).unwrap();
        let root = fdt.begin_node("").unwrap();
        fdt.property_string("model", r#"a "b" \c"#).unwrap();
        let names = ["one", "two"].map(String::from).to_vec();
        fdt.property_string_list("names", names).unwrap();
        fdt.property_string("none", "").unwrap();
        fdt.property_null("empty").unwrap();
        let node = fdt.begin_node("node@1").unwrap();
        let numbers: Vec<u32> = (0x10..0x1a).collect();
        fdt.property_array_u32("reg", &numbers).unwrap();
        fdt.property("odd", &[1, 0xab, 0]).unwrap();
        fdt.property("gap", b"a\0\0b\0").unwrap();
        fdt.end_node(node).unwrap();
        fdt.end_node(root).unwrap();
        let blob = fdt.finish().unwrap();
        let expected = "/dts-v1/;\n\
            /memreserve/ 0x1000 0x2000;\n\
            \n\
            / {\n\
            \tmodel = \"a \\\"b\\\" \\\\c\";\n\
            \tnames = \"one\", \"two\";\n\
            \tnone = \"\";\n\
            \tempty;\n\
            \n\
            \tnode@1 {\n\
            \t\treg = <0x10 0x11 0x12 0x13 0x14 0x15 0x16 0x17\n\
            \t\t\t0x18 0x19>;\n\
            \t\todd = [01 ab 00];\n\
            \t\tgap = [61 00 00 62 00];\n\
            \t};\n\
            };\n";
        assert_eq!(source(&blob).unwrap(), expected);
        dtc_agrees(&blob);
        for len in 0..blob.len() - 1 {
            // Cut off within the strings it may still be whole.
            let _ = source(&blob[..len]);
        }
        assert_eq!(source(&blob[..60]), None);
        assert_eq!(source(b"RSDT"), None);
    }

    #[test]
    fn dtc_makes_the_same_tree_of_every_machines_text() {
        let mut trees = Vec::new();
        for arch in crate::ALL {
            let config = VmConfig {
                cpus: 3,
                memory: 5 << 30,
                cmdline: r#"dyndbg="file a.c +p""#.into(),
                ..VmConfig::default()
            };
            let machine = arch.machine(&config, &arch.typical_host()).unwrap();
            for file in machine.describe().unwrap() {
                if file.name.ends_with(".dtb") {
                    dtc_agrees(&file.bytes);
                    trees.push(arch.name());
                }
            }
        }
        assert_eq!(trees, ["aarch64", "ppc64le", "riscv64"]);
    }
}
