//! Property names of more than 31 bytes.
//!
//! vm-fdt holds names to the Devicetree Specification's limit, which firmware
//! of PAPR is older than. Such a property is written by an alias and gets its
//! name in the finished tree.

/// An alias, and the name that it stands for.
pub const LONG: [(&str, &str); 2] = [
    ("crossvisor,long-0", "ibm,processor-radix-AP-encodings"),
    ("crossvisor,long-1", "ibm,query-interrupt-source-number"),
];

// The header's fields (Devicetree Specification 0.4, section 5.2), by offset.
const TOTAL_SIZE: usize = 4;
const OFF_STRUCT: usize = 8;
const OFF_STRINGS: usize = 12;
const SIZE_STRINGS: usize = 32;
const SIZE_STRUCT: usize = 36;

// Tokens of the structure block (section 5.4).
const BEGIN_NODE: u32 = 1;
const PROP: u32 = 3;
const END: u32 = 9;

/// The name to write a property by.
pub fn written(name: &'static str) -> &'static str {
    let long = LONG.iter().find(|(_, long)| *long == name);
    long.map_or(name, |(alias, _)| alias)
}

/// Gives the properties of `tree` that were written by an alias their names.
/// `None` when it is not a tree as vm-fdt writes it, with its strings last.
pub fn restore(mut tree: Vec<u8>) -> Option<Vec<u8>> {
    let strings = word(&tree, OFF_STRINGS)? as usize;
    let size = word(&tree, SIZE_STRINGS)? as usize;
    let block = tree.get(strings..strings.checked_add(size)?)?.to_vec();
    if strings + size != tree.len() {
        return None;
    }
    let mut renamed = Vec::new();
    for (alias, name) in LONG {
        if let Some(old) = position(&block, alias) {
            let new = tree.len() - strings;
            tree.extend(name.as_bytes());
            tree.push(0);
            renamed.push((old, new));
        }
    }
    let start = word(&tree, OFF_STRUCT)? as usize;
    let end = start.checked_add(word(&tree, SIZE_STRUCT)? as usize)?;
    let mut at = start;
    while at < end {
        let token = word(&tree, at)?;
        at += 4;
        match token {
            BEGIN_NODE => {
                let name = tree.get(at..)?;
                at += name.iter().position(|byte| *byte == 0)? + 1;
            }
            PROP => {
                let offset = word(&tree, at + 4)? as usize;
                if let Some((_, new)) = renamed.iter().find(|(old, _)| *old == offset) {
                    set_word(&mut tree, at + 4, *new)?;
                }
                at += 8 + word(&tree, at)? as usize;
            }
            END => break,
            _ => {}
        }
        at = at.next_multiple_of(4);
    }
    let size = tree.len() - strings;
    set_word(&mut tree, SIZE_STRINGS, size)?;
    let total = tree.len();
    set_word(&mut tree, TOTAL_SIZE, total)?;
    Some(tree)
}

/// Where the whole string `name` is among NUL-terminated ones.
fn position(strings: &[u8], name: &str) -> Option<usize> {
    let mut at = 0;
    for string in strings.split(|byte| *byte == 0) {
        if string == name.as_bytes() {
            return Some(at);
        }
        at += string.len() + 1;
    }
    None
}

fn word(tree: &[u8], at: usize) -> Option<u32> {
    let bytes = tree.get(at..)?.first_chunk::<4>()?;
    Some(u32::from_be_bytes(*bytes))
}

fn set_word(tree: &mut [u8], at: usize, value: usize) -> Option<()> {
    let value = u32::try_from(value).ok()?;
    let bytes = tree.get_mut(at..)?.first_chunk_mut::<4>()?;
    *bytes = value.to_be_bytes();
    Some(())
}

/// The tree with its long names cut to 31 bytes, for a parser that holds to the
/// limit.
#[cfg(test)]
pub fn cut(mut tree: Vec<u8>) -> Vec<u8> {
    for (_, name) in LONG {
        let mut places = tree.windows(name.len());
        if let Some(at) = places.position(|bytes| bytes == name.as_bytes()) {
            tree[at + 31] = 0;
        }
    }
    tree
}

#[cfg(test)]
mod tests {
    use dtoolkit::fdt::Fdt;
    use dtoolkit::{Node, Property};
    use vm_fdt::FdtWriter;

    use super::*;

    #[test]
    fn properties_get_their_names_and_keep_their_values() {
        let mut fdt = FdtWriter::new().unwrap();
        let root = fdt.begin_node("").unwrap();
        fdt.property_u32(written(LONG[0].1), 1).unwrap();
        fdt.property_string("model", "three").unwrap();
        let child = fdt.begin_node("child").unwrap();
        fdt.property_u32(written(LONG[1].1), 2).unwrap();
        fdt.property_u32(written(LONG[0].1), 3).unwrap();
        fdt.property_null("last").unwrap();
        fdt.end_node(child).unwrap();
        fdt.end_node(root).unwrap();
        let tree = restore(fdt.finish().unwrap()).unwrap();

        let tree = cut(tree);
        let fdt = Fdt::new(&tree).unwrap();
        let [first, second] = LONG.map(|(_, name)| &name[..31]);
        let value = |node: &dtoolkit::fdt::FdtNode<'_>, name: &str| {
            let found = node.properties().find(|property| property.name() == name);
            found.map(|property| property.value().to_vec())
        };
        let root = fdt.root();
        assert_eq!(value(&root, first).unwrap(), [0, 0, 0, 1]);
        assert_eq!(value(&root, second), None);
        assert_eq!(value(&root, "model").unwrap(), b"three\0");
        let child = root.children().next().unwrap();
        assert_eq!(value(&child, second).unwrap(), [0, 0, 0, 2]);
        assert_eq!(value(&child, first).unwrap(), [0, 0, 0, 3]);
        assert_eq!(value(&child, "last"), Some(Vec::new()));
        assert!(
            child
                .properties()
                .all(|p| !p.name().starts_with("crossvisor"))
        );
    }

    #[test]
    fn what_is_no_tree_is_refused() {
        for wrong in [vec![], vec![0; 8], vec![0xff; 64]] {
            assert_eq!(restore(wrong), None);
        }
    }
}
