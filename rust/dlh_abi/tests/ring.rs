// SPDX-License-Identifier: GPL-2.0

//! Producer and consumer against each other, and against a guest that lies.

use dlh_abi::{
    has_passed, Broken, Call, Consumer, Cookie, Operation, Producer, RawEntry, RingSize,
};
use proptest::prelude::*;

const COOKIE: Cookie = Cookie(0x1234_5678_9abc_def0);

fn size() -> RingSize {
    RingSize::try_from(64).unwrap()
}

fn call(n: u64) -> Call {
    Call { op: Operation::NOP, arg: [n, !n] }
}

/// Start positions worth trying: both ends of the index space and everything near the wrap.
fn start() -> impl Strategy<Value = u32> {
    prop_oneof![Just(0), 0u32..200, (u32::MAX - 200)..=u32::MAX, any::<u32>()]
}

#[test]
fn every_start_slot_and_the_wrap_of_the_index() {
    for start in (0..130).chain((0..130).map(|d| u32::MAX - d)) {
        let (mut p, mut c) =
            (Producer::new(size(), COOKIE, start), Consumer::new(size(), COOKIE, start));
        let mut memory = [RawEntry::default(); 64];
        for lap in 0..3u64 {
            for i in 0..64 {
                let (slot, raw) = p.place(c.done(), &call(lap * 64 + i)).unwrap();
                memory[slot as usize] = raw;
            }
            assert!(p.place(c.done(), &call(0)).is_none(), "a full ring takes nothing");
            for i in 0..64 {
                let n = c.visible(p.tail()).unwrap();
                assert_eq!(u64::from(n), 64 - i);
                let run = c.next_run(1);
                let raw = &memory[run.slot as usize];
                let position = c.take(raw).unwrap();
                assert_eq!(raw.call(), Ok(call(lap * 64 + i)));
                c.advance_all();
                assert!(!has_passed(c.done(), position), "taken is not executed");
                c.executed_all();
                c.advance_all();
                assert!(has_passed(c.done(), position));
            }
        }
    }
}

proptest! {
    /// NOPs taken together are those that would be taken one by one, up to something else.
    #[test]
    fn nops_in_a_row(start in start(), nops in 0u32..32, other in 0u8..4) {
        let mut copies: Vec<RawEntry> =
            (0..nops).map(|i| RawEntry::new(COOKIE, start.wrapping_add(i), &call(i.into()))).collect();
        let mut last = RawEntry::new(COOKIE, start.wrapping_add(nops), &call(0));
        match other {
            0 => last.op = 1,
            1 => last.flags = 1,
            2 => last.tag ^= 1 << 40,
            _ => last.tag = COOKIE.tag(start.wrapping_add(nops).wrapping_sub(64)),
        }
        copies.push(last);
        let mut c = Consumer::new(size(), COOKIE, start);
        let nops = u64::from(nops).min((1 << 32) - u64::from(start)) as u32;
        prop_assert_eq!(c.take_nops(&copies), nops);
        prop_assert_eq!(c.collected(), start.wrapping_add(nops));
    }

    /// Any interleaving of placing, taking and finishing (out of order) delivers each call once, in
    /// order, and `done` never passes one that is still pending.
    #[test]
    fn fifo_and_done(start in start(), ops in prop::collection::vec((0u8..3, any::<u16>()), 0..600)) {
        let (mut p, mut c) = (Producer::new(size(), COOKIE, start), Consumer::new(size(), COOKIE, start));
        let mut memory = [RawEntry::default(); 64];
        let (mut placed, mut taken) = (0u64, 0u64);
        let mut pending = std::collections::BTreeMap::new();
        for (op, pick) in ops {
            match op {
                0 => match p.place(c.done(), &call(placed)) {
                    Some((slot, raw)) => { memory[slot as usize] = raw; placed += 1; }
                    None => prop_assert_eq!(p.tail().wrapping_sub(c.done()), 64),
                },
                1 => {
                    let n = c.visible(p.tail()).unwrap();
                    prop_assert_eq!(u64::from(n), placed - taken);
                    let run = c.next_run(n);
                    prop_assert!(run.slot + run.len <= 64);
                    for slot in run.slot..run.slot + run.len {
                        let raw = &memory[slot as usize];
                        let position = c.take(raw).unwrap();
                        prop_assert_eq!(raw.call(), Ok(call(taken)));
                        prop_assert_eq!(position, start.wrapping_add(taken as u32));
                        if pick & 1 == 1 { pending.insert(size().slot(position), position); }
                        // Finishing others meanwhile never passes what is only taken.
                        let done = c.advance(|slot| pending.contains_key(&slot));
                        prop_assert!(!has_passed(done, position));
                        taken += 1;
                    }
                    c.executed_all();
                }
                _ => {
                    let key = pending.keys().nth(usize::from(pick) % pending.len().max(1)).copied();
                    key.map(|k| pending.remove(&k));
                }
            }
            let done = c.advance(|slot| pending.contains_key(&slot));
            prop_assert!(c.unfinished() <= 64);
            for position in pending.values() {
                prop_assert!(!has_passed(done, *position));
            }
        }
    }

    /// Whatever the guest stores as tail, the host sees at most a ring's worth of entries, all its own.
    #[test]
    fn a_lying_tail_is_bounded(start in start(), taken in 0u32..=64, finished in 0u32..=64, tail: u32) {
        let mut c = Consumer::new(size(), COOKIE, start);
        for i in 0..taken {
            c.take(&RawEntry::new(COOKIE, start.wrapping_add(i), &call(0))).unwrap();
        }
        c.executed_all();
        let finished = finished.min(taken);
        let stop = start.wrapping_add(finished);
        c.advance(|slot| slot == size().slot(stop) && finished < taken);
        match c.visible(tail) {
            Ok(n) => {
                prop_assert_eq!(c.collected().wrapping_add(n), tail);
                prop_assert!(c.unfinished() + n <= 64);
            }
            Err(e) => {
                prop_assert_eq!(e, Broken::Overrun);
                prop_assert!(tail.wrapping_sub(c.done()) > 64
                    || tail.wrapping_sub(c.done()) < c.unfinished());
            }
        }
    }

    /// Bytes that were not written as the entry of this very position are never taken for it.
    #[test]
    fn foreign_bytes_are_refused(start in start(), words in any::<[u64; 4]>(), lap in 1u32..5) {
        let mut c = Consumer::new(size(), COOKIE, start);
        let stale = RawEntry::new(COOKIE, start.wrapping_sub(64 * lap), &call(1));
        prop_assert_eq!(c.take(&stale), Err(Broken::Tag));
        let foreign = RawEntry { tag: words[0], op: words[1] as u16, flags: 0, status: 0, arg: [words[2], words[3]] };
        prop_assume!(foreign.tag != COOKIE.tag(start));
        prop_assert_eq!(c.take(&foreign), Err(Broken::Tag));
        prop_assert_eq!(c.collected(), start);
    }
}
