// SPDX-License-Identifier: GPL-2.0

//! The arguments of FREE_PAGES: what is said is understood, and nothing else is.

use dlh_abi::{Contents, Error, FreePages, Gfn, GfnRange, Gpa, FREE_ANY, FREE_ASK, PAGE_SIZE};
use proptest::prelude::*;

fn contents() -> impl Strategy<Value = Contents> {
    prop_oneof![Just(Contents::Zeroes), Just(Contents::Any)]
}

/// Arguments worth trying: mostly near to what is right.
fn argument() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        (0..1u64 << 40, 0..8u64).prop_map(|(page, low)| (page << 12) | low),
        0..8u64
    ]
}

proptest! {
    /// What a guest says is what the host hears.
    #[test]
    fn a_report_round_trips(start in 0..1u64 << 40, pages in 1..1u64 << 20, contents in contents()) {
        let Ok(frames) = GfnRange::new(Gfn(start), pages) else { return Ok(()) };
        let call = FreePages::Pages(frames, contents).call();
        prop_assert_eq!(FreePages::parse(call.arg), Ok(FreePages::Pages(frames, contents)));
        // A host that does not know the flag refuses it: it never takes one range for another.
        let old = GfnRange::from_bytes(Gpa(call.arg[0]), call.arg[1]);
        match contents {
            Contents::Zeroes => prop_assert_eq!(old, Ok(frames)),
            Contents::Any => prop_assert_eq!(old, Err(Error::Argument)),
        }
    }

    /// Whatever the words are: nothing is named but whole pages, and no flag but the one that is known is
    /// left out of account.
    #[test]
    fn any_words(first in argument(), second in argument()) {
        match FreePages::parse([first, second]) {
            Ok(said @ FreePages::Pages(frames, contents)) => {
                prop_assert_eq!(said.call().arg, [first, second]);
                prop_assert_eq!(first, frames.start().gpa().0);
                prop_assert_eq!(second % PAGE_SIZE, if contents == Contents::Any { FREE_ANY } else { 0 });
                prop_assert_eq!(second / PAGE_SIZE, frames.pages());
            }
            Ok(FreePages::Question) => prop_assert_eq!([first, second], [0, FREE_ASK]),
            Err(e) => {
                prop_assert_eq!(e, Error::Argument);
                let whole = second & !FREE_ANY;
                prop_assert!(GfnRange::from_bytes(Gpa(first), whole).is_err());
            }
        }
    }
}

#[test]
fn an_old_host_refuses_a_question() {
    let [first, second] = FreePages::Question.call().arg;
    assert_eq!(GfnRange::from_bytes(Gpa(first), second), Err(Error::Argument));
}
