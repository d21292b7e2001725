// SPDX-License-Identifier: GPL-2.0

//! A sample: an operation of kvm_dlh.ko that another module provides, in Rust.
//!
//! It adds up the numbers that guests send, for each VM on its own. That is nothing one needs a host for:
//! what there is to see is how a call can end, what is kept for a VM, and how the module goes while calls
//! are under way. `dlh_sample_c.c` is the same in C; here calls that end later are completed by a thread
//! of the VM's own, which has the VMM's address space for that, instead of a workqueue.
//!
//! ```text
//! make samples KDIR=/path/to/kernel/build        (or make samples-env)
//! insmod build/modules/kvm_dlh.ko
//! insmod build/samples/dlh_sample_rust.ko
//! grep . /sys/kernel/debug/dlh_sample_rust/<pid of the VMM>-<serial>/stats
//! ```
//!
//! A module of your own names its crates in `Kbuild`, as `dlh_sample_rust` does there. No `unsafe` is
//! needed: `kvm_ops` keeps the contract of `include/linux/kvm_dlh.h`. As long as the module is loaded
//! kvm_dlh.ko cannot go.
//!
//! The guest's side, in an entry of a ring or in a CALL:
//!
//! - `op`: 33
//! - `arg[0]`: the number
//! - `arg[1]`: bits 0 to 31: how the call ends, 0 to 3 in the order of [`Ending`]; bits 32 to 63:
//!   milliseconds until then, for [`Ending::Late`], otherwise 0
//!
//! This sample shows no feature bit; those outside of KVM_DLH_F_RESERVED are free (`uapi/linux/kvm_dlh.h`). A guest that calls
//! a host without this module gets EOPERATION, and does without.
//!
//! An operation in Rust is built with this repository's crates, as here; one in C needs the header only.

use debugfs::{Dir, File};
use dlh_abi::{Error as CallError, Operation as Number, Status};
use kernel::{
    current, fmt, new_condvar, new_spinlock,
    prelude::*,
    str::CString,
    sync::{
        atomic::{ordering::Relaxed, Atomic},
        Arc, ArcBorrow, CondVar, SpinLock,
    },
    time::{msecs_to_jiffies, Delta, Instant, Monotonic},
};
use kvm_ops::{Operation, Outcome, Registration, Token};
use kvm_vm::Vm;
use kvm_worker::{Job, Turn, Worker};

/// A vCPU does not return to its VMM, and a VM does not end, before its calls have ended: keep this short. (Here it is
/// long, for tests on slow machines.)
const MOST_MS: u64 = 60_000;

/// A guest must not have the host keep as much as it likes.
const MOST_WAITING: usize = 256;

module! {
    type: DlhSampleRust,
    name: "dlh_sample_rust",
    authors: ["The kvm-dlh developers"],
    description: "A sample operation of kvm_dlh.ko, in Rust",
    license: "GPL",
}

/// The module. Dropping the registration detaches every VM; when it is gone nothing of this module runs,
/// or is going to.
struct DlhSampleRust {
    _registration: Registration<Accumulator>,
}

impl kernel::Module for DlhSampleRust {
    fn init(module: &'static ThisModule) -> Result<Self> {
        let operation = Accumulator { dir: Dir::new(c"dlh_sample_rust")?, serial: Atomic::new(0) };
        let registration = Registration::new(module, operation).inspect_err(|e| {
            pr_err!("operation {} cannot be registered: {:?}\n", Accumulator::NUMBER.0, e)
        })?;
        Ok(Self { _registration: registration })
    }
}

/// How a call ends. Each is something a real operation does.
enum Ending {
    /// `execute` gives the token back, with the status.
    AtOnce,
    /// The call is completed, say by another thread, before `execute` has returned.
    Early,
    /// The call is pending until the worker completes it, after so long.
    Late(Delta),
    /// `execute` gives the token back, with an error.
    Refused,
}

/// Guest input becomes checked state in one place: whatever is not checked, the guest decides.
impl TryFrom<u64> for Ending {
    type Error = CallError;

    fn try_from(arg: u64) -> Result<Self, CallError> {
        match (arg & u64::from(u32::MAX), arg >> 32) {
            (0, 0) => Ok(Self::AtOnce),
            (1, 0) => Ok(Self::Early),
            (2, ms @ 0..=MOST_MS) => Ok(Self::Late(Delta::from_millis(ms as i64))),
            (3, 0) => Ok(Self::Refused),
            _ => Err(CallError::Argument),
        }
    }
}

/// The operation.
struct Accumulator {
    dir: Dir,
    serial: Atomic<u32>,
}

impl Operation for Accumulator {
    /// 3 to 63, and agreed on with the guests: nobody hands numbers out.
    const NUMBER: Number = Number(33);
    const FEATURE: u32 = 0;
    type Context = Context;

    /// The first call in a VM. If this fails the call is declined, and the next one tries again.
    fn attach(&self, vm: &Vm) -> Result<Arc<Context>> {
        let account = Account::new()?;
        let serial = self.serial.fetch_add(1, Relaxed);
        let name = CString::try_from_fmt(fmt!("{}-{}", current!().tgid(), serial))?;
        let stats = self.dir.subdir(&name)?.text(c"stats", Stats(account.clone()))?;
        // Now, since here is a thread of the VMM.
        let worker = Worker::start(vm, account)?;
        Ok(Arc::new(Context { worker, _stats: stats }, GFP_KERNEL_ACCOUNT)?)
    }

    /// One call. Several vCPUs of a VM may be in here at once.
    fn execute(
        context: ArcBorrow<'_, Context>,
        _vm: &Vm,
        [number, ending]: [u64; 2],
        token: Token,
    ) -> Outcome {
        let account = context.worker.job();
        match Ending::try_from(ending) {
            Ok(Ending::AtOnce) => {
                account.books.lock().add(number);
                Outcome::Finished(token, Status::OK)
            }
            Ok(Ending::Early) => {
                account.books.lock().add(number);
                token.complete(Status::OK);
                Outcome::Pending
            }
            Ok(Ending::Late(delay)) => {
                match account.accept(LateCall { number, token, since: Instant::now(), delay }) {
                    Ok(()) => {
                        // From here on the call is the worker's, and may have ended already.
                        context.worker.wake();
                        Outcome::Pending
                    }
                    Err((token, e)) => Outcome::Finished(token, e.into()),
                }
            }
            Ok(Ending::Refused) => Outcome::Finished(token, CallError::Busy.into()),
            Err(e) => Outcome::Finished(token, e.into()),
        }
    }

    /// The VM has ended, or the module goes. Nothing executes any more. What the worker had not come to
    /// is declined: those calls are waited for by vCPUs. The worker ends with the context.
    fn detach(context: Arc<Context>) {
        context.worker.job().close();
    }
}

/// What is kept for one VM.
struct Context {
    worker: Worker<Account>,
    _stats: File<Stats>,
}

/// What the worker works on.
#[pin_data]
struct Account {
    #[pin]
    books: SpinLock<Books>,
    /// Calls were accepted, or none will be.
    #[pin]
    changed: CondVar,
}

/// # Invariants
///
/// `late` never grows beyond the capacity it was made with; none is added once `closed`.
struct Books {
    calls: u64,
    sum: u64,
    /// Tells in which order the numbers came.
    digest: u64,
    late: KVec<LateCall>,
    closed: bool,
}

/// A call that has been accepted and not been completed. A token that is merely dropped declines the call,
/// so none gets lost.
struct LateCall {
    number: u64,
    token: Token,
    since: Instant<Monotonic>,
    delay: Delta,
}

impl LateCall {
    /// Milliseconds until it is due; 0 if it is.
    fn remaining(&self) -> u32 {
        (self.delay - self.since.elapsed()).as_millis_ceil().max(0) as u32
    }
}

impl Books {
    fn add(&mut self, number: u64) {
        self.calls += 1;
        self.sum = self.sum.wrapping_add(number);
        self.digest = self.digest.wrapping_mul(31).wrapping_add(number);
    }
}

impl Account {
    fn new() -> Result<Arc<Self>> {
        // Charged to the VMM, on one of whose threads this is.
        let late = KVec::with_capacity(MOST_WAITING, GFP_KERNEL_ACCOUNT)?;
        Arc::pin_init(
            pin_init!(Self {
                books <- new_spinlock!(Books { calls: 0, sum: 0, digest: 0, late, closed: false }),
                changed <- new_condvar!(),
            }),
            GFP_KERNEL_ACCOUNT,
        )
    }

    /// Accepts a call that ends later, or gives its token back with the reason.
    fn accept(&self, call: LateCall) -> Result<(), (Token, CallError)> {
        let mut books = self.books.lock();
        if books.closed {
            return Err((call.token, CallError::Gone));
        }
        match books.late.push_within_capacity(call) {
            Ok(()) => {
                self.changed.notify_all();
                Ok(())
            }
            Err(full) => {
                let LateCall { token, .. } = full.0;
                Err((token, CallError::Busy))
            }
        }
    }

    /// Accepts nothing more, and declines what waits. May sleep.
    fn close(&self) {
        let late = {
            let mut books = self.books.lock();
            books.closed = true;
            core::mem::take(&mut books.late)
        };
        self.changed.notify_all();
        // Not under the lock: completing takes mutexes.
        for LateCall { token, .. } in late {
            token.complete(CallError::Gone.into());
        }
    }
}

/// The file `stats`: `name value` lines. As long as somebody has it open this module cannot go.
struct Stats(Arc<Account>);

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (calls, sum, digest, waiting) = {
            let books = self.0.books.lock();
            (books.calls, books.sum, books.digest, books.late.len())
        };
        writeln!(f, "calls {calls}\nsum {sum}\ndigest {digest}\nwaiting {waiting}")
    }
}

impl Job for Account {
    fn is_due(&self) -> bool {
        !self.books.lock().late.is_empty()
    }

    /// Completes one call, or waits for the first to be due; called again while there are any.
    fn work(&self, turn: &mut Turn) {
        let mut books = self.books.lock();
        let waits = books.late.iter().enumerate().map(|(index, call)| (call.remaining(), index));
        let Some((remaining, index)) = waits.min() else { return };
        if remaining > 0 {
            // Whatever ends the wait, being stopped too, is for the next look.
            let _ =
                self.changed.wait_interruptible_timeout(&mut books, msecs_to_jiffies(remaining));
            return;
        }
        let Ok(call) = books.late.remove(index) else { return };
        books.add(call.number);
        drop(books);
        // In the VMM's address space, so that the guest sees it at once.
        let inside = turn.enter();
        call.token.complete(Status::OK);
        drop(inside);
    }
}
