// SPDX-License-Identifier: GPL-2.0

//! Free page reporting: pages that the page allocator lends for as long as a report takes.
//!
//! C header: `include/linux/page_reporting.h`. Pages of a report are isolated from the allocator
//! until its callback returns, and the callback here returns only when the host is done with every
//! page of it that was named to the host: DESIGN.md rule 1 is kept in this file.

use core::{marker::PhantomData, ptr::null_mut};

use dlh_abi::{Call, Contents, Error as CallError, FreePages, GfnRange, Gpa};
use dlh_bindings as bindings;
use kernel::{
    container_of,
    error::to_result,
    pr_warn_once,
    prelude::*,
    sync::Arc,
    types::{NotThreadSafe, Opaque},
};

use crate::{cpu::sleep_us, hypercall, hypercall::HostError, LocalRing, Ring, FAULT_REPORT_EARLY};

/// Microseconds between the questions to a host whose answers leave open what it works on.
const LAST_RESORT_US: u32 = 100_000;

/// Who reports.
pub trait Reporter: Send + Sync + 'static {
    /// Tells the host of the pages in `report`. May sleep.
    ///
    /// # Errors
    ///
    /// The pages stay unreported, and say when they are reported again.
    fn report(&self, report: &mut Report<'_>) -> Result<(), Unreported>;
}

/// How long the pages of a report stay unreported.
#[derive(Clone, Copy, Debug)]
pub enum Unreported {
    /// So many milliseconds. Nothing else is reported meanwhile.
    For(u32),
    /// Until others are freed, which may be never.
    UntilFreed,
}

/// What became of the calls in a batch.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// Calls the host is done with.
    pub calls: u32,
    /// Those of them that were declined; each of their pages is as it was, or zeroes.
    pub declined: u32,
    /// Those of the declined that the host may execute at another time.
    pub put_off: u32,
    /// Those of the declined that the host does not understand.
    pub unknown: u32,
    /// Whether one asked the host if it wants reports once more, and it does.
    pub wanted: bool,
}

/// How far a batch is.
#[must_use = "what has become of a batch is said once"]
#[derive(Clone, Copy, Debug)]
pub enum Progress {
    /// The host may be working on it.
    Working,
    /// The host is done with it.
    Finished(Tally),
    /// The ring is dead: the host will do no more, and does not say what it did.
    Lost,
}

/// What was placed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Placed {
    /// Ranges, one call each; 0 if the ring was full.
    pub ranges: u32,
    /// Pages in them.
    pub pages: u64,
}

/// Calls that were placed and are not known to be finished.
struct Batch {
    ring: Arc<Ring>,
    /// Position of the first call.
    first: u32,
    /// Number of calls; 0 stands for those before `first`, which others placed.
    count: u32,
}

/// The ranges of one report that have not been placed yet, and those that have and are not finished.
///
/// # Invariants
///
/// `next` is an entry of the scatterlist that the page allocator passed to the callback that this was
/// made in, with `left` entries from there on, or `left` is 0.
pub struct Report<'a> {
    next: *mut bindings::scatterlist,
    left: u32,
    batch: Option<Batch>,
    _list: PhantomData<&'a ()>,
    _thread: NotThreadSafe,
}

impl Report<'_> {
    /// One that names no page: for a question.
    pub fn empty() -> Self {
        // INVARIANT: Nothing is left.
        Self { next: null_mut(), left: 0, batch: None, _list: PhantomData, _thread: NotThreadSafe }
    }

    /// Number of ranges that have not been placed.
    pub fn left(&self) -> u32 {
        self.left
    }

    /// Bytes in the ranges that have not been placed.
    pub fn bytes(&self) -> u64 {
        let (mut sum, mut entry) = (0, self.next);
        for left in (0..self.left).rev() {
            // SAFETY: By the type invariant, and there is another while some are left.
            unsafe {
                sum += bindings::dlh_guest_sg_bytes(entry);
                if left > 0 {
                    entry = bindings::dlh_guest_sg_next(entry);
                }
            }
        }
        sum
    }

    /// The next range as a call, and its pages. `contents` is what this kernel relies on.
    fn next(&self, contents: Contents) -> Option<(Call, u64)> {
        if self.left == 0 {
            return None;
        }
        // SAFETY: By the type invariant.
        let (gpa, bytes) = unsafe {
            (bindings::dlh_guest_sg_gpa(self.next), bindings::dlh_guest_sg_bytes(self.next))
        };
        // Never fails: blocks are whole pages of this machine.
        let frames = GfnRange::from_bytes(Gpa(gpa), bytes).ok()?;
        Some((FreePages::Pages(frames, contents).call(), frames.pages()))
    }

    /// Goes on to the range after the next one.
    fn advance(&mut self) {
        self.left -= 1;
        if self.left > 0 {
            // SAFETY: By the type invariant there is another.
            self.next = unsafe { bindings::dlh_guest_sg_next(self.next) };
        }
    }

    /// Places as many ranges in the ring as there are, and as there is room for: a batch, which
    /// [`Report::poll`] looks after. Nothing is placed while there is a batch already. `contents` is what this
    /// kernel relies on finding there afterwards.
    pub fn place(&mut self, ring: &mut LocalRing<'_>, contents: Contents) -> Placed {
        let mut placed = Placed::default();
        if self.batch.is_some() {
            return placed;
        }
        let first = ring.tail();
        while let Some((call, pages)) = self.next(contents) {
            // SAFETY: The page allocator has lent the pages until the callback returns, which
            // `settle()` puts off until this call has been passed or the ring is dead.
            if !unsafe { ring.place(&call) } {
                break;
            }
            placed.ranges += 1;
            placed.pages += pages;
            self.advance();
        }
        self.batch = Some(Batch { ring: ring.ring(), first, count: placed.ranges });
        placed
    }

    /// Places the question whether the host wants all reports once more: a batch like any other. Returns whether
    /// there was room.
    pub fn ask(&mut self, ring: &mut LocalRing<'_>) -> bool {
        let first = ring.tail();
        // SAFETY: Names no memory.
        if self.batch.is_some() || !unsafe { ring.place(&FreePages::Question.call()) } {
            return false;
        }
        self.batch = Some(Batch { ring: ring.ring(), first, count: 1 });
        true
    }

    /// Has the host work on the next range while the vCPU waits; no ring is needed. Returns its pages.
    ///
    /// # Errors
    ///
    /// The host declined: each page is as it was, or zeroes. That includes that there is no next range.
    pub fn call_next(&mut self, contents: Contents) -> Result<u64, Option<HostError>> {
        let (call, pages) = self.next(contents).ok_or(None)?;
        self.advance();
        // SAFETY: The pages are lent until the callback returns, which is after this call.
        unsafe { hypercall::call(&call) }.map(|()| pages).map_err(Some)
    }

    /// How far the batch is. When it is not being worked on any more, there is no batch afterwards.
    pub fn poll(&mut self) -> Progress {
        let Some(Batch { ring, first, count }) = &self.batch else {
            return Progress::Finished(Tally::default());
        };
        // Before `done`: a ring dies after the last change of `done`.
        let dead = ring.is_dead();
        let last = first.wrapping_add(*count).wrapping_sub(1);
        let progress = if ring.has_passed(last) {
            let mut tally = Tally { calls: *count, ..Tally::default() };
            for i in 0..*count {
                let status = ring.status(first.wrapping_add(i));
                tally.declined += u32::from(!status.is_ok());
                tally.put_off += u32::from(status.is_transient());
                tally.unknown += u32::from(status == CallError::Argument.into());
                tally.wanted |= status == CallError::Again.into();
            }
            Progress::Finished(tally)
        } else if dead {
            Progress::Lost
        } else {
            return Progress::Working;
        };
        self.batch = None;
        progress
    }

    /// Whether the host says that it takes no more from the ring of the batch: [`Report::kick`] then.
    pub fn is_detached(&self) -> bool {
        self.batch.as_ref().is_some_and(|batch| batch.ring.is_detached())
    }

    /// Has the host work on the batch while the vCPU waits, and then says how far it is. A host that
    /// is not done with it even then is asked to let go of the ring.
    pub fn kick(&mut self) -> Progress {
        let Some(Batch { ring, .. }) = &self.batch else { return self.poll() };
        let ring = ring.clone();
        ring.kick();
        match self.poll() {
            Progress::Working => {
                ring.close();
                self.poll()
            }
            progress => progress,
        }
    }

    /// Waits until the host works on nothing of this report any more, however long it takes.
    fn settle(&mut self) {
        while matches!(self.poll(), Progress::Working) {
            if !matches!(self.kick(), Progress::Working) {
                break;
            }
            pr_warn_once!("the host does not say that it is done with a report\n");
            sleep_us(LAST_RESORT_US);
        }
    }
}

/// Has the page allocator report free pages to `T` until this is dropped.
///
/// # Invariants
///
/// `info` is registered with the page allocator.
#[pin_data(PinnedDrop)]
pub struct PageReporting<T: Reporter> {
    #[pin]
    info: Opaque<bindings::dlh_guest_reporting>,
    reporter: Arc<T>,
    previous_order: u32,
}

// SAFETY: The registration belongs to no thread.
unsafe impl<T: Reporter> Send for PageReporting<T> {}
// SAFETY: There are no methods on a shared reference that change anything.
unsafe impl<T: Reporter> Sync for PageReporting<T> {}

impl<T: Reporter> PageReporting<T> {
    /// Registers it. Free blocks of 2^`order` pages and more are reported; `None` leaves the choice to
    /// the kernel, which has a parameter for it. At most `batch` of them are lent at a time, and no more
    /// than the kernel's own limit (32). May sleep.
    ///
    /// # Errors
    ///
    /// `EBUSY`: somebody else reports; `ENOMEM`.
    pub fn new(order: Option<u32>, batch: u32, reporter: Arc<T>) -> Result<Arc<Self>> {
        // SAFETY: May be called anywhere.
        let previous_order = match unsafe { bindings::dlh_guest_reporting_order() } {
            // Not chosen yet. The kernel would choose this; it cannot go back to "not chosen".
            // SAFETY: May be called anywhere.
            u32::MAX => unsafe { bindings::dlh_guest_pageblock_order() },
            order => order,
        };
        let first_order = order.unwrap_or(previous_order);
        let this = Arc::pin_init(
            try_pin_init!(Self {
                previous_order,
                reporter,
                info <- Opaque::try_ffi_init(move |place: *mut bindings::dlh_guest_reporting| {
                    // SAFETY: The place is ours to fill.
                    unsafe { place.write(Default::default()) };
                    // INVARIANT: Registered, or there is no `Self`.
                    // SAFETY: It is zeroed and pinned, within a `Self`, and stays until `drop`
                    // unregisters it; `reporter`, which the callback uses, is there already.
                    to_result(unsafe {
                        bindings::dlh_guest_reporting_register(
                            place,
                            Some(report::<T>),
                            first_order,
                            batch,
                        )
                    })
                }),
            }? Error),
            GFP_KERNEL,
        )?;
        if let Some(order) = order {
            // The kernel heeds the order of a registration only the first time.
            // SAFETY: Who is registered may change the order at any time, as its parameter may.
            unsafe { bindings::dlh_guest_reporting_set_order(order) };
        }
        Ok(this)
    }

    /// Has the page allocator look for blocks to report soon. Any context.
    pub fn again(&self) {
        // SAFETY: By the type invariant the registration is in force, and `drop`, which ends it, waits for
        // what is queued here.
        unsafe { bindings::dlh_guest_reporting_soon(self.info.get()) }
    }

    /// The order that is in force.
    pub fn order(&self) -> u32 {
        // SAFETY: May be called anywhere.
        unsafe { bindings::dlh_guest_reporting_order() }
    }
}

#[pinned_drop]
impl<T: Reporter> PinnedDrop for PageReporting<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: By the type invariant; may sleep here. The callback does not run afterwards. The
        // order is given back while nobody else can have registered with another.
        unsafe {
            bindings::dlh_guest_reporting_set_order(self.previous_order);
            bindings::dlh_guest_reporting_unregister(self.info.get());
        }
    }
}

/// # Safety
///
/// For the page allocator, with the registration of a [`PageReporting<T>`] and a list of `count`
/// entries, whose pages are isolated until this returns.
unsafe extern "C" fn report<T: Reporter>(
    info: *mut bindings::page_reporting_dev_info,
    list: *mut bindings::scatterlist,
    count: u32,
) -> i32 {
    // SAFETY: Only a `PageReporting<T>` is registered with this function.
    let this = unsafe {
        &*container_of!(
            Opaque::cast_from(info.cast::<bindings::dlh_guest_reporting>()),
            PageReporting<T>,
            info
        )
    };
    // INVARIANT: The page allocator passes `count` entries.
    let mut report = Report {
        next: if count == 0 { null_mut() } else { list },
        left: count,
        batch: None,
        _list: PhantomData,
        _thread: NotThreadSafe,
    };
    let result = this.reporter.report(&mut report);
    if !FAULT_REPORT_EARLY {
        report.settle();
    }
    match result {
        Ok(()) => return 0,
        // SAFETY: This is within a report of `info`.
        Err(Unreported::For(ms)) => unsafe { bindings::dlh_guest_reporting_again(info, ms) },
        Err(Unreported::UntilFreed) => {}
    }
    EAGAIN.to_errno()
}
