//! The kernel command line.

/// Why a command line can't be given to the kernel.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Longer than the kernel or the boot protocol takes.
    #[error("kernel command line of {len} bytes is too long: this kernel takes at most {max}")]
    TooLong {
        /// Its length in bytes, without the NUL.
        len: usize,
        /// The limit in bytes, without the NUL.
        max: usize,
    },
    /// A character that would end the line for the kernel.
    #[error("kernel command line has a {0}, which would end it")]
    Control(&'static str),
}

/// Joins parts of a command line, such as the architecture's defaults and what
/// the user gave, in order, with single spaces; empty parts are left out.
/// `max` is the greatest length in bytes without the terminating NUL
/// (`cmdline_size` of a bzImage, `COMMAND_LINE_SIZE` - 1 elsewhere).
pub fn join<I, S>(parts: I, max: usize) -> Result<String, Error>
where
    I: IntoIterator<Item = S>,
    S: AsRef<str>,
{
    let mut line = String::new();
    for part in parts {
        let part = part.as_ref().trim_matches(' ');
        let named = [
            ('\0', "NUL character"),
            ('\n', "line break"),
            ('\r', "carriage return"),
        ];
        if let Some((_, name)) = named.iter().find(|(c, _)| part.contains(*c)) {
            return Err(Error::Control(name));
        }
        if !line.is_empty() && !part.is_empty() {
            line.push(' ');
        }
        line.push_str(part);
    }
    if line.len() > max {
        return Err(Error::TooLong {
            len: line.len(),
            max,
        });
    }
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn joins_in_order_with_single_spaces() {
        let parts = ["console=ttyS0 ", "", "  ", "quiet", " root=/dev/vda1 rw"];
        assert_eq!(
            join(parts, 100).unwrap(),
            "console=ttyS0 quiet root=/dev/vda1 rw"
        );
        assert_eq!(join(["", ""], 0).unwrap(), "");
        assert_eq!(join([r#"a="b  c""#], 100).unwrap(), r#"a="b  c""#);
    }

    #[test]
    fn names_the_limit() {
        assert_eq!(join(["abc", "d"], 5).unwrap(), "abc d");
        let error = join(["abc", "de"], 5).unwrap_err();
        assert_eq!(error, Error::TooLong { len: 6, max: 5 });
        assert!(error.to_string().contains("at most 5"));
    }

    #[test]
    fn refuses_what_would_end_the_line() {
        for bad in ["a\0b", "a\nb", "\r"] {
            assert!(
                matches!(join(["ok", bad], 100), Err(Error::Control(_))),
                "{bad:?}"
            );
        }
    }
}
