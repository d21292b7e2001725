// SPDX-License-Identifier: GPL-2.0

//! What a call costs, in ticks of the time stamp counter: through the door, and through the ring.

use kernel::{fmt, interrupt::local_interrupt_disable, sync::Arc};
use kvm_guest::{hypercall, tsc, tsc_khz, CpuGuard, LocalRing};

use crate::rings::Rings;

/// Hypercalls measured.
const HYPERCALLS: u64 = 1000;
/// Deferred calls placed in a row; the smallest ring has room for twice as many.
const CALLS: u64 = 32;
/// Rows measured.
const ROWS: u64 = 32;

/// Shows ticks that were counted in tenths.
fn show(f: &mut fmt::Formatter<'_>, name: &str, tenths: u64) -> fmt::Result {
    writeln!(f, "{name} {}.{}", tenths / 10, tenths % 10)
}

/// Ticks that `work` takes, with interrupts off.
#[inline(always)]
fn ticks(work: impl FnOnce()) -> u64 {
    let _quiet = local_interrupt_disable();
    let begin = tsc();
    work();
    tsc().wrapping_sub(begin)
}

/// Places a row of calls that do nothing; counts in `full` when one finds no room.
#[inline(always)]
fn place_row(ring: &mut LocalRing<'_>, full: &mut u64) {
    for _ in 0..CALLS {
        if !ring.nop() {
            *full += 1;
            break;
        }
    }
}

/// Measures on the current CPU, and shows what came of it.
pub(crate) fn run(rings: &Arc<Rings>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let here = CpuGuard::new();
    let Some(mut ring) = rings.local(&here) else {
        drop(here);
        return writeln!(f, "no_ring 1");
    };

    let empty = ticks(|| ());
    let all = ticks(|| (0..HYPERCALLS).for_each(|_| hypercall::unknown(&here)));
    let hypercalls = all.saturating_sub(empty);
    let hypercall_each = hypercalls / HYPERCALLS;

    let (mut nothing, mut guest, mut total) = (0, 0, 0);
    let (mut full, mut drained) = (0, 0);
    for _ in 0..ROWS {
        // Makes the host take what is in the ring.
        hypercall::unknown(&here);
        nothing += ticks(|| ());
        guest += ticks(|| place_row(&mut ring, &mut full));
        hypercall::unknown(&here);
        total += ticks(|| {
            place_row(&mut ring, &mut full);
            hypercall::unknown(&here);
        });
        drained += u64::from(ring.is_idle());
    }
    drop(ring);
    drop(here);

    let calls = CALLS * ROWS;
    let guest = guest.saturating_sub(nothing);
    let total = total.saturating_sub(nothing).checked_sub(ROWS * hypercall_each);
    writeln!(f, "tsc_khz {}", tsc_khz())?;
    show(f, "stock_hypercall_tsc", hypercalls * 10 / HYPERCALLS)?;
    show(f, "deferred_guest_tsc", guest * 10 / calls)?;
    // What the hypercalls at the ends of rows take is a mean of others: where these took longer, nothing is left to show.
    match total.filter(|&total| total >= guest) {
        Some(total) => show(f, "deferred_total_tsc", total * 10 / calls)?,
        None => writeln!(f, "deferred_total_tsc unclear")?,
    }
    writeln!(f, "calls {}", calls * 2)?;
    writeln!(f, "rows_full {full}")?;
    writeln!(f, "rows {ROWS}")?;
    writeln!(f, "rows_drained_by_exit {drained}")
}
