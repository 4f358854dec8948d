//! PURE. The options of a mount that a user may give, and what they are for: the kernel's own flags, or NFS.

/// Options with these names alone are for NFS.
const WORDS: [&str; 6] = ["hard", "soft", "ac", "noac", "cto", "nocto"];
/// Those have a number.
const NUMBERS: [(&str, u32, u32); 10] = [
    ("rsize", 1024, 1 << 20),
    ("wsize", 1024, 1 << 20),
    ("timeo", 1, 6000),
    ("retrans", 0, 100),
    ("acregmin", 0, 86_400),
    ("acregmax", 0, 86_400),
    ("acdirmin", 0, 86_400),
    ("acdirmax", 0, 86_400),
    ("actimeo", 0, 86_400),
    ("nconnect", 1, 16),
];

/// A flag of the kernel's, for mounts of any kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Flag {
    ReadOnly,
    Synchronous,
    NoAtime,
    NoDirAtime,
    RelAtime,
    NoExec,
}

/// The options of a mount.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MountOptions {
    pub flags: Vec<Flag>,
    /// As NFS takes them.
    pub nfs: Vec<String>,
}

impl MountOptions {
    /// Whether an option of NFS was given, by itself or with a number.
    pub fn has(&self, name: &str) -> bool {
        let named = |option: &String| option.split('=').next() == Some(name);
        self.nfs.iter().any(named)
    }
}

/// Reads options with commas between them.
///
/// # Errors
/// Says what is wrong with the first one that cannot be taken.
pub fn parse(text: &str) -> Result<MountOptions, String> {
    let mut options = MountOptions::default();
    for option in text.split(',').map(str::trim).filter(|o| !o.is_empty()) {
        match option {
            // As it is without them.
            "rw" | "async" | "defaults" => {}
            "ro" => options.flags.push(Flag::ReadOnly),
            "sync" => options.flags.push(Flag::Synchronous),
            "noatime" => options.flags.push(Flag::NoAtime),
            "nodiratime" => options.flags.push(Flag::NoDirAtime),
            "relatime" => options.flags.push(Flag::RelAtime),
            "noexec" => options.flags.push(Flag::NoExec),
            word if WORDS.contains(&word) => options.nfs.push(word.to_owned()),
            other => options.nfs.push(numbered(other)?),
        }
    }
    Ok(options)
}

fn numbered(option: &str) -> Result<String, String> {
    let (name, number) = option.split_once('=').unwrap_or((option, ""));
    let Some((_, least, most)) = NUMBERS.iter().find(|(known, ..)| *known == name) else {
        return Err(format!("{option} is no option that may be given"));
    };
    match number.parse::<u32>() {
        Ok(number) if (*least..=*most).contains(&number) => Ok(format!("{name}={number}")),
        _ => Err(format!("{name} takes a number from {least} to {most}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_be_given_is_taken_and_nothing_else() {
        let options = parse("rw, noatime,timeo=600,hard,nconnect=4").unwrap();
        assert_eq!(options.flags, [Flag::NoAtime]);
        assert_eq!(options.nfs, ["timeo=600", "hard", "nconnect=4"]);
        assert!(options.has("timeo") && options.has("hard") && !options.has("time"));
        // A number is written anew: nothing of the text goes on.
        assert_eq!(parse("timeo=+05").unwrap().nfs, ["timeo=5"]);
        assert_eq!(parse(""), Ok(MountOptions::default()));
        for (bad, why) in [
            ("addr=1.2.3.4", "addr=1.2.3.4 is no option"),
            ("suid", "suid is no option"),
            ("dev", "dev is no option"),
            ("nconnect=99", "nconnect takes a number from 1 to 16"),
            ("timeo", "timeo takes a number"),
        ] {
            let said = parse(bad).unwrap_err();
            assert!(said.starts_with(why), "{said}");
        }
    }
}
