//! Which Debian archive this machine uses, from its own apt configuration.
//!
//! Both formats of sources.list(5) are read: one line per source
//! (`*.list`), and deb822 stanzas (`*.sources`).

use std::fs;
use std::path::Path;

/// The archives that the machine's own apt gets Debian from.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Archives {
    /// URIs of the main archive, in the order of the configuration.
    pub main: Vec<String>,
    /// URIs of the security archive.
    pub security: Vec<String>,
}

/// One source as either format gives it.
#[derive(Debug, Default)]
struct Source {
    uris: Vec<String>,
    suites: Vec<String>,
    components: Vec<String>,
    signed_by: String,
}

impl Archives {
    /// Reads `sources.list` and `sources.list.d` in `etc_apt` (`/etc/apt`).
    /// Files that are missing or unreadable count as empty.
    pub fn read(etc_apt: &Path) -> Self {
        let mut archives = Self::default();
        if let Ok(text) = fs::read_to_string(etc_apt.join("sources.list")) {
            archives.add_lines(&text);
        }
        let mut files: Vec<_> = fs::read_dir(etc_apt.join("sources.list.d"))
            .map(|entries| entries.flatten().map(|e| e.path()).collect())
            .unwrap_or_default();
        files.sort();
        for file in files {
            let Ok(text) = fs::read_to_string(&file) else {
                continue;
            };
            match file.extension().and_then(|e| e.to_str()) {
                Some("list") => archives.add_lines(&text),
                Some("sources") => archives.add_stanzas(&text),
                _ => {}
            }
        }
        archives
    }

    fn add_lines(&mut self, text: &str) {
        for line in text.lines() {
            let line = line.split('#').next().unwrap_or_default().trim();
            let Some(rest) = line
                .strip_prefix("deb")
                .filter(|r| r.starts_with([' ', '\t', '[']))
            else {
                continue;
            };
            let mut source = Source::default();
            let mut rest = rest.trim_start();
            if let Some(options) = rest.strip_prefix('[') {
                let Some((options, after)) = options.split_once(']') else {
                    continue;
                };
                for option in options.split_whitespace() {
                    if let Some((key, value)) = option.split_once('=')
                        && key.eq_ignore_ascii_case("signed-by")
                    {
                        source.signed_by = value.to_owned();
                    }
                }
                rest = after;
            }
            let mut words = rest.split_whitespace().map(str::to_owned);
            source.uris.extend(words.next());
            source.suites.extend(words.next());
            source.components.extend(words);
            self.add(&source);
        }
    }

    fn add_stanzas(&mut self, text: &str) {
        let mut source = Source::default();
        let mut types = Vec::new();
        let mut enabled = true;
        let mut field = String::new();
        for line in text.lines().chain([""]) {
            if line.starts_with('#') {
                continue;
            }
            if line.trim().is_empty() {
                if enabled && types.iter().any(|t| t == "deb") {
                    self.add(&source);
                }
                source = Source::default();
                types.clear();
                enabled = true;
                continue;
            }
            let value = if line.starts_with([' ', '\t']) {
                line.trim()
            } else if let Some((name, value)) = line.split_once(':') {
                field = name.trim().to_ascii_lowercase();
                value.trim()
            } else {
                continue;
            };
            let words = value.split_whitespace().map(str::to_owned);
            match field.as_str() {
                "types" => types.extend(words),
                "uris" => source.uris.extend(words),
                "suites" => source.suites.extend(words),
                "components" => source.components.extend(words),
                "signed-by" => source.signed_by.push_str(value),
                "enabled" => enabled = !matches!(value, "no" | "false" | "0"),
                _ => {}
            }
        }
    }

    /// Adds the source where it is Debian's own: component main, signed with
    /// Debian's archive key or with what apt trusts anyway, from a path that
    /// names Debian. Whatever is taken wrongly fails the signature check.
    fn add(&mut self, source: &Source) {
        let key = source.signed_by.as_str();
        if !source.components.iter().any(|c| c == "main")
            || !(key.is_empty() || key.contains("debian-archive"))
        {
            return;
        }
        for uri in &source.uris {
            let list = if names(uri, "debian-security") {
                &mut self.security
            } else if names(uri, "debian") {
                &mut self.main
            } else {
                continue;
            };
            let uri = uri.trim_end_matches('/').to_owned();
            if !list.contains(&uri) {
                list.push(uri);
            }
        }
    }
}

/// Whether a segment of the URI's path is `archive`. Debian's cloud images
/// name a file of mirrors, `debian.list`.
fn names(uri: &str, archive: &str) -> bool {
    let path = uri.split_once("://").map_or(uri, |(_, rest)| rest);
    path.split('/')
        .skip(1)
        .any(|segment| segment.strip_suffix(".list").unwrap_or(segment) == archive)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str) -> Archives {
        let mut archives = Archives::default();
        archives.add_lines(text);
        archives
    }

    fn stanzas(text: &str) -> Archives {
        let mut archives = Archives::default();
        archives.add_stanzas(text);
        archives
    }

    #[test]
    fn one_line_sources() {
        let found = lines(
            "# deb http://commented.example/debian bookworm main\n\
             deb-src http://mirror.example/debian bookworm main\n\
             deb http://mirror.example/debian/ bookworm main contrib # with a comment\n\
             deb [arch=amd64 signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] \
                 http://mirror.example/debian bookworm-updates main\n\
             deb http://mirror.example/debian-security bookworm-security main\n",
        );
        assert_eq!(found.main, ["http://mirror.example/debian"]);
        assert_eq!(found.security, ["http://mirror.example/debian-security"]);
    }

    #[test]
    fn deb822_sources() {
        let found = stanzas(
            "Types: deb deb-src\n\
             URIs: https://a.example/debian\n  https://b.example/pub/debian/\n\
             # a comment inside\n\
             Suites: trixie trixie-updates\nComponents: main\n\
             Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n\n\
             Types: deb\nURIs: https://a.example/debian-security\nSuites: trixie-security\n\
             Components: main\n\n\
             Types: deb\nURIs: https://off.example/debian\nSuites: trixie\nComponents: main\n\
             Enabled: no",
        );
        assert_eq!(
            found.main,
            ["https://a.example/debian", "https://b.example/pub/debian"]
        );
        assert_eq!(found.security, ["https://a.example/debian-security"]);
    }

    #[test]
    fn third_parties_are_left_out() {
        let found = lines(
            "deb https://tools.example bookworm main\n\
             deb https://tools.example/repo/linux/debian bookworm stable\n\
             deb [signed-by=/usr/share/keyrings/tools.gpg] https://x.example/debian/12 bookworm main\n\
             deb http://archive.example/ubuntu noble main\n\
             deb [unfinished http://mirror.example/debian bookworm main\n\
             deb\n",
        );
        assert_eq!(found, Archives::default());
    }

    #[test]
    fn files_of_mirrors_as_in_cloud_images() {
        let found = stanzas(
            "Types: deb\nURIs: mirror+file:///etc/apt/mirrors/debian.list\nSuites: trixie\n\
             Components: main\n\n\
             Types: deb\nURIs: mirror+file:///etc/apt/mirrors/debian-security.list\n\
             Suites: trixie-security\nComponents: main\n",
        );
        assert_eq!(found.main, ["mirror+file:///etc/apt/mirrors/debian.list"]);
        assert_eq!(
            found.security,
            ["mirror+file:///etc/apt/mirrors/debian-security.list"]
        );
    }

    #[test]
    fn nothing_configured_is_nothing_found() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Archives::read(dir.path()), Archives::default());
    }
}
