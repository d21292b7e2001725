// SPDX-License-Identifier: GPL-2.0

//! What the words mean.

use crate::{
    parse::{words, BadRule, Why, Word},
    MOST_BYTES,
};

/// What of a VM's memory may be given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Permission {
    /// Nothing.
    Nothing,
    /// What the kernel gives out as it is used, and may run short of.
    Ordinary,
    /// That, and memory of hugetlbfs, which somebody has set aside.
    All,
}

/// What is known of a VMM.
#[derive(Clone, Copy, Debug)]
pub struct Vmm<'a> {
    /// Its user id.
    pub uid: u32,
    /// The path of its cgroup from the root of the hierarchy on, `/` for the root; `None` if that is not known.
    pub cgroup: Option<&'a [u8]>,
}

/// A value that has been checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules<'a> {
    text: &'a [u8],
}

impl<'a> Rules<'a> {
    /// Checks a text, of which one newline at its end does not count.
    ///
    /// # Errors
    ///
    /// What is wrong with the first word that is wrong, or else with all of them together.
    pub fn parse(text: &'a [u8]) -> Result<Self, BadRule<'a>> {
        let text = text.strip_suffix(b"\n").unwrap_or(text);
        if text.len() > MOST_BYTES {
            return Err(BadRule { word: b"", why: Why::Long });
        }
        let (mut exclusive, mut whose, mut hugetlb): (&[u8], _, &[u8]) = (b"", 0, b"");
        for (spelled, word) in words(text) {
            match word.map_err(|why| BadRule { word: spelled, why })? {
                Word::All | Word::None => {
                    exclusive = spelled;
                    whose += 1;
                }
                Word::Uid(_) | Word::Cgroup(_) => whose += 1,
                Word::Hugetlb => hugetlb = spelled,
            }
        }
        let none_of_hugetlb = exclusive == b"none" && !hugetlb.is_empty();
        if none_of_hugetlb || !exclusive.is_empty() && whose > 1 {
            return Err(BadRule { word: exclusive, why: Why::NotAlone });
        }
        if whose == 0 {
            return Err(BadRule { word: hugetlb, why: Why::Nobody });
        }
        Ok(Self { text })
    }

    /// The text, without the newline.
    pub fn text(&self) -> &'a [u8] {
        self.text
    }

    /// What of the VMM's memory may be given up.
    pub fn decide(&self, vmm: &Vmm<'_>) -> Permission {
        let (mut allowed, mut hugetlb) = (false, false);
        for (_, word) in words(self.text) {
            match word {
                Ok(Word::All) => allowed = true,
                Ok(Word::Uid(uid)) => allowed |= uid == vmm.uid,
                Ok(Word::Cgroup(path)) => {
                    allowed |= vmm.cgroup.is_some_and(|cgroup| is_in(path, cgroup));
                }
                Ok(Word::Hugetlb) => hugetlb = true,
                // There are none of the latter: it was checked.
                Ok(Word::None) | Err(_) => (),
            }
        }
        match (allowed, hugetlb) {
            (false, _) => Permission::Nothing,
            (true, false) => Permission::Ordinary,
            (true, true) => Permission::All,
        }
    }
}

/// Whether `cgroup` is `path`, or lies below it.
fn is_in(path: &[u8], cgroup: &[u8]) -> bool {
    let path = path.strip_suffix(b"/").unwrap_or(path);
    cgroup.strip_prefix(path).is_some_and(|rest| matches!(rest.first(), None | Some(b'/')))
}
