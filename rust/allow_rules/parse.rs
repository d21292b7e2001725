// SPDX-License-Identifier: GPL-2.0

//! From text to words.

/// One word of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Word<'a> {
    All,
    None,
    Hugetlb,
    Uid(u32),
    /// Begins with a slash; ends with one only if it is the root.
    Cgroup(&'a [u8]),
}

/// Why a value is no good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// There is nothing, or nothing between two separators.
    Empty,
    /// It is longer than [`crate::MOST_BYTES`].
    Long,
    /// No such word.
    Unknown,
    /// A number or a path without `uid=` or `cgroup=` before it.
    Alone,
    /// Not a user id.
    Uid,
    /// Not the path of a cgroup.
    Cgroup,
    /// The path of a directory where the hierarchy is mounted, not of a cgroup in it.
    Mount,
    /// `all` or `none` beside what it contradicts, or makes meaningless.
    NotAlone,
    /// `hugetlb`, and nothing that says whose.
    Nobody,
}

impl Why {
    /// In words, to come after the word that is meant.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Empty => "is empty where a word should be",
            Self::Long => "is too long",
            Self::Unknown => "is neither all, none, hugetlb, uid=NUMBER nor cgroup=/PATH",
            Self::Alone => "has neither uid= nor cgroup= before it",
            Self::Uid => "is no user id (0 to 4294967294)",
            Self::Cgroup => "is no path of a cgroup, such as /machine.slice",
            Self::Mount => {
                "is where cgroups are mounted: a path begins below that, such as /machine.slice"
            }
            Self::NotAlone => "goes with no other word, but for all with hugetlb",
            Self::Nobody => "says of what memory, but not whose: add all, uid= or cgroup=",
        }
    }
}

/// What is wrong with a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadRule<'a> {
    /// The word that is meant; empty if it is the value as a whole.
    pub word: &'a [u8],
    /// Why.
    pub why: Why,
}

/// Of which kind a word without one is.
#[derive(Clone, Copy)]
enum Kind {
    Other,
    Uid,
    Cgroup,
}

/// The words of a text, each with how it is spelled.
pub(crate) fn words(text: &[u8]) -> impl Iterator<Item = (&[u8], Result<Word<'_>, Why>)> {
    let mut kind = Kind::Other;
    text.split(|byte| matches!(byte, b',' | b';')).map(move |spelled| {
        let (next, word) = word(kind, spelled);
        kind = next;
        (spelled, word)
    })
}

fn word(before: Kind, spelled: &[u8]) -> (Kind, Result<Word<'_>, Why>) {
    match spelled {
        b"" => (Kind::Other, Err(Why::Empty)),
        b"all" => (Kind::Other, Ok(Word::All)),
        b"none" => (Kind::Other, Ok(Word::None)),
        b"hugetlb" => (Kind::Other, Ok(Word::Hugetlb)),
        _ => {
            if let Some(number) = spelled.strip_prefix(b"uid=") {
                return (Kind::Uid, uid(number));
            }
            if let Some(path) = spelled.strip_prefix(b"cgroup=") {
                return (Kind::Cgroup, cgroup(path));
            }
            let word = match (before, spelled.first()) {
                (Kind::Uid, Some(b'0'..=b'9')) => uid(spelled),
                (Kind::Cgroup, Some(b'/')) => cgroup(spelled),
                (_, Some(b'/' | b'0'..=b'9')) => Err(Why::Alone),
                _ => Err(Why::Unknown),
            };
            (before, word)
        }
    }
}

fn uid(digits: &[u8]) -> Result<Word<'_>, Why> {
    let mut value: u32 = 0;
    if digits.is_empty() {
        return Err(Why::Uid);
    }
    for digit in digits {
        if !digit.is_ascii_digit() {
            return Err(Why::Uid);
        }
        let next = value.checked_mul(10).and_then(|v| v.checked_add(u32::from(digit - b'0')));
        value = next.ok_or(Why::Uid)?;
    }
    // The last number stands for no user.
    if value == u32::MAX {
        return Err(Why::Uid);
    }
    Ok(Word::Uid(value))
}

fn cgroup(path: &[u8]) -> Result<Word<'_>, Why> {
    /// Where the hierarchy is mounted by custom.
    const MOUNT: &[u8] = b"/sys/fs/cgroup";

    let Some((b'/', below)) = path.split_first() else { return Err(Why::Cgroup) };
    if path.strip_prefix(MOUNT).is_some_and(|rest| matches!(rest.first(), None | Some(b'/'))) {
        return Err(Why::Mount);
    }
    let is_name = |name: &[u8]| {
        !matches!(name, b"" | b"." | b"..") && !name.iter().any(|byte| byte.is_ascii_control())
    };
    if !below.is_empty() && !below.split(|byte| *byte == b'/').all(is_name) {
        return Err(Why::Cgroup);
    }
    Ok(Word::Cgroup(path))
}
