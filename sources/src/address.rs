//! What an address looks like, whatever its scheme: `scheme://` and a path with no tricks in it.

/// The scheme of an address: `hf` of `hf://org/repo`. `None` for a path on this machine, whatever its name.
pub fn scheme_of(text: &str) -> Option<&str> {
    let (scheme, _) = text.split_once("://")?;
    let mut characters = scheme.chars();
    let is_scheme = characters.next().is_some_and(|first| first.is_ascii_alphabetic())
        && characters.all(|character| character.is_ascii_alphanumeric() || "+-.".contains(character));
    is_scheme.then_some(scheme)
}

/// Whether a text is an address rather than a path on this machine.
pub fn is_address(text: &str) -> bool {
    scheme_of(text).is_some()
}

/// Whether a name can be a file's on every system, and in no other folder than the one it is looked for in.
pub(crate) fn is_plain_name(name: &str) -> bool {
    !name.is_empty()
        && name != "."
        && name != ".."
        && !name.chars().any(|character| character.is_control() || "/\\:*?\"<>|".contains(character))
}

/// Whether every part of a `/`-separated path is a plain name.
pub(crate) fn is_plain_path(path: &str) -> bool {
    path.split('/').all(is_plain_name)
}

/// The name of a file beside another one: the same folder in front.
pub(crate) fn beside(file: &str, name: &str) -> String {
    match file.rsplit_once('/') {
        Some((folder, _)) => format!("{folder}/{name}"),
        None => name.to_owned(),
    }
}

/// The last part of a path.
pub(crate) fn name_of(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn tells_addresses_from_paths() {
        assert_eq!(scheme_of("hf://org/repo"), Some("hf"));
        assert_eq!(scheme_of("s3a://bucket/x"), Some("s3a"));
        assert_eq!(scheme_of("HTTPS://host/x"), Some("HTTPS"));
        for path in ["data/x.pt", "C:\\x", "/x://y", "a b://c", "://x", "1x://y", ""] {
            assert_eq!(scheme_of(path), None, "{path}");
        }
    }

    #[test]
    fn refuses_names_that_lead_elsewhere() {
        for name in ["..", ".", "", "a/b", "a\\b", "C:", "a\0b", "a\nb"] {
            assert!(!is_plain_name(name), "{name:?}");
        }
        assert!(is_plain_path("a/b.c/d-1_ü"));
        assert!(!is_plain_path("a//b") && !is_plain_path("/a") && !is_plain_path("a/../b"));
    }

    proptest! {
        #[test]
        fn a_plain_path_stays_below_its_folder(path in "[a./\\\\:]{0,12}") {
            let mut components = std::path::Path::new(&path).components();
            let stays = components.all(|part| matches!(part, std::path::Component::Normal(_)));
            prop_assert!(stays || !is_plain_path(&path));
        }
    }
}
