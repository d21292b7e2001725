// SPDX-License-Identifier: GPL-2.0

//! Each event has a counter of its own, under its own name.

use counters::{counters, Counters, Event};

counters! {
    /// Three things.
    enum Three {
        /// First.
        One = "one",
        /// Second.
        Two = "two_of_them",
        /// Third.
        Three = "three",
    }
}

#[test]
fn each_has_its_own() {
    let counters = Counters::new();
    counters.count(Three::One);
    counters.add(Three::Three, 40);
    counters.count(Three::Three);
    assert_eq!([Three::One, Three::Two, Three::Three].map(|event| counters.get(event)), [1, 0, 41]);
    assert_eq!(
        counters.iter().collect::<Vec<_>>(),
        [("one", 1), ("two_of_them", 0), ("three", 41)]
    );
    assert_eq!(Three::NAMES.len(), Three::Three.place() + 1);
}

#[test]
fn they_wrap() {
    let counters = Counters::new();
    counters.add(Three::Two, u64::MAX);
    counters.add(Three::Two, 2);
    assert_eq!(counters.get(Three::Two), 1);
}
