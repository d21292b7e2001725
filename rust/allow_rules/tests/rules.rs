// SPDX-License-Identifier: GPL-2.0

//! What `allow` may say, and what it then allows.

use allow_rules::{Permission, Permission::*, Rules, Vmm, Why, MOST_BYTES};
use proptest::prelude::*;

fn decide(text: &str, uid: u32, cgroup: &str) -> Permission {
    let rules = Rules::parse(text.as_bytes()).unwrap();
    rules.decide(&Vmm { uid, cgroup: Some(cgroup.as_bytes()) })
}

#[test]
fn what_is_allowed() {
    for (text, uid, cgroup, expected) in [
        ("all", 0, "/", Ordinary),
        ("all\n", 107, "/x", Ordinary),
        ("all,hugetlb", 107, "/x", All),
        ("hugetlb;all", 107, "/x", All),
        ("none", 0, "/", Nothing),
        ("uid=107", 107, "/", Ordinary),
        ("uid=107", 106, "/", Nothing),
        ("uid=0", 0, "/", Ordinary),
        ("uid=4294967294", 4294967294, "/", Ordinary),
        ("uid=64055,107", 107, "/", Ordinary),
        ("uid=64055;107;uid=5", 5, "/", Ordinary),
        ("uid=64055,107,hugetlb", 107, "/", All),
        ("uid=64055,107,hugetlb", 108, "/", Nothing),
        ("cgroup=/machine.slice", 7, "/machine.slice", Ordinary),
        ("cgroup=/machine.slice", 7, "/machine.slice/a/b", Ordinary),
        ("cgroup=/machine.slice", 7, "/machine.slices", Nothing),
        ("cgroup=/machine.slice", 7, "/machine", Nothing),
        ("cgroup=/machine.slice", 7, "/", Nothing),
        ("cgroup=/machine.slice", 7, "/x/machine.slice", Nothing),
        ("cgroup=/a/b,/c", 7, "/c/d", Ordinary),
        ("cgroup=/a/b,/c", 7, "/a", Nothing),
        ("cgroup=/", 7, "/anything", Ordinary),
        ("cgroup=/", 7, "/", Ordinary),
        ("cgroup=/a b", 7, "/a b/c", Ordinary),
        ("uid=1;cgroup=/a", 1, "/b", Ordinary),
        ("uid=1;cgroup=/a", 2, "/a", Ordinary),
        ("uid=1;cgroup=/a", 2, "/b", Nothing),
        ("cgroup=/a,uid=1,2", 2, "/b", Ordinary),
        ("cgroup=/system/fs", 2, "/system/fs/cgroup", Ordinary),
    ] {
        assert_eq!(decide(text, uid, cgroup), expected, "{text}: uid {uid} in {cgroup}");
    }
}

#[test]
fn what_cannot_be_said() {
    use Why::*;
    for (text, word, why) in [
        ("", "", Empty),
        ("\n", "", Empty),
        (",", "", Empty),
        ("all,", "", Empty),
        ("uid=1,,2", "", Empty),
        ("uid=1;", "", Empty),
        ("All", "All", Unknown),
        (" all", " all", Unknown),
        ("all\n\n", "all\n", Unknown),
        ("yes", "yes", Unknown),
        ("uid", "uid", Unknown),
        ("uid=1,x", "x", Unknown),
        ("gid=1", "gid=1", Unknown),
        ("107", "107", Alone),
        ("/machine.slice", "/machine.slice", Alone),
        ("uid=1,/a", "/a", Alone),
        ("cgroup=/a,1", "1", Alone),
        ("uid=1,hugetlb,2", "2", Alone),
        ("uid=", "uid=", Uid),
        ("uid=-1", "uid=-1", Uid),
        ("uid=+1", "uid=+1", Uid),
        ("uid=0x10", "uid=0x10", Uid),
        ("uid=root", "uid=root", Uid),
        ("uid=1 ", "uid=1 ", Uid),
        ("uid=1,2x", "2x", Uid),
        ("uid=4294967295", "uid=4294967295", Uid),
        ("uid=99999999999999999999", "uid=99999999999999999999", Uid),
        ("cgroup=", "cgroup=", Cgroup),
        ("cgroup=machine.slice", "cgroup=machine.slice", Cgroup),
        ("cgroup=/a/", "cgroup=/a/", Cgroup),
        ("cgroup=//a", "cgroup=//a", Cgroup),
        ("cgroup=/a/../b", "cgroup=/a/../b", Cgroup),
        ("cgroup=/./a", "cgroup=/./a", Cgroup),
        ("cgroup=/a\nb", "cgroup=/a\nb", Cgroup),
        ("cgroup=/a,/b//c", "/b//c", Cgroup),
        ("cgroup=/sys/fs/cgroup", "cgroup=/sys/fs/cgroup", Mount),
        ("cgroup=/sys/fs/cgroup/a", "cgroup=/sys/fs/cgroup/a", Mount),
        ("all,none", "none", NotAlone),
        ("all,all", "all", NotAlone),
        ("all,uid=1", "all", NotAlone),
        ("cgroup=/a,none", "none", NotAlone),
        ("none,hugetlb", "none", NotAlone),
        ("hugetlb", "hugetlb", Nobody),
        ("hugetlb,hugetlb", "hugetlb", Nobody),
    ] {
        let bad = Rules::parse(text.as_bytes()).expect_err(text);
        assert_eq!((bad.word, bad.why), (word.as_bytes(), why), "{text:?}");
        assert!(!why.as_str().is_empty());
    }
}

#[test]
fn length() {
    let mut text = b"cgroup=/".to_vec();
    text.resize(MOST_BYTES, b'a');
    assert!(Rules::parse(&text).is_ok());
    text.push(b'a');
    assert_eq!(Rules::parse(&text).map_err(|bad| bad.why), Err(Why::Long));
}

#[test]
fn an_unknown_cgroup_is_in_none() {
    for text in ["cgroup=/", "cgroup=/a"] {
        let rules = Rules::parse(text.as_bytes()).unwrap();
        assert_eq!(rules.decide(&Vmm { uid: 0, cgroup: None }), Nothing, "{text}");
    }
}

/// Bytes that come near to what may be said.
fn text() -> impl Strategy<Value = Vec<u8>> {
    let pieces = prop::sample::select(vec![
        "all", "none", "hugetlb", "uid=", "cgroup=", "/", "a", "0", "42", ",", ";", "\n", ".", " ",
        "\u{e4}",
    ]);
    prop::collection::vec(pieces, 0..12).prop_map(|pieces| pieces.concat().into_bytes())
}

proptest! {
    #[test]
    fn no_text_is_both_checked_and_meaningless(text in text(), uid in 0u32..50) {
        if let Ok(rules) = Rules::parse(&text) {
            // What was taken is taken again, and means the same.
            prop_assert_eq!(Rules::parse(rules.text()), Ok(rules));
            let vmm = Vmm { uid, cgroup: Some(b"/a/a") };
            let decided = rules.decide(&vmm);
            let said = String::from_utf8_lossy(&text).into_owned();
            if decided == All {
                prop_assert!(said.contains("hugetlb"));
            }
            if said.starts_with("none") {
                prop_assert_eq!(decided, Nothing);
            }
        }
    }

    #[test]
    fn a_cgroup_allows_what_is_below_it_and_nothing_else(
        path in prop::collection::vec("[a-c]{1,2}", 1..4),
        cgroup in prop::collection::vec("[a-c]{1,2}", 0..5),
        uid in 0u32..9,
    ) {
        let text = format!("cgroup=/{}", path.join("/"));
        let allowed = decide(&text, uid, &format!("/{}", cgroup.join("/"))) == Ordinary;
        prop_assert_eq!(allowed, cgroup.starts_with(&path));
    }

    #[test]
    fn a_list_of_uids_allows_its_members(uids in prop::collection::vec(0u32..20, 1..6), uid in 0u32..20) {
        let list: Vec<_> = uids.iter().map(ToString::to_string).collect();
        let allowed = decide(&format!("uid={}", list.join(",")), uid, "/") == Ordinary;
        prop_assert_eq!(allowed, uids.contains(&uid));
    }
}
