// SPDX-License-Identifier: GPL-2.0

//! The permission of one VM.
//!
//! C header: `include/linux/moduleparam.h`

use allow_rules::{Permission, Rules, Vmm};
use dlh_bindings as bindings;
use kernel::{
    current,
    ffi::c_char,
    fmt,
    mm::Mm,
    new_spinlock,
    prelude::*,
    str::BStr,
    sync::{
        aref::ARef,
        atomic::{ordering::Relaxed, Atomic},
        rcu, Arc, SpinLock,
    },
};

/// What of a VM's memory may be given up: as root says of this VM, or else as the parameter says of its VMM.
#[pin_data]
pub struct Allow {
    /// A `dlh_choice`.
    choice: Atomic<u32>,
    vmm: Process,
    #[pin]
    decided: SpinLock<Option<Decided>>,
}

/// The VMM, as far as the rules look at it.
struct Process {
    uid: u32,
    /// Has a cgroup, while it exists.
    mm: ARef<Mm>,
}

/// What was decided by the rules, and of what that holds.
struct Decided {
    case: Case,
    permission: Permission,
}

/// What a decision by the rules depends on.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Case {
    /// The number of the rules.
    generation: u32,
    /// The cgroup of the VMM: it may be moved.
    cgroup: u64,
}

/// Bytes of a cgroup's path that are looked at; what is longer matches no rule.
const MOST_PATH: usize = 4096;

impl Process {
    /// That of the current thread.
    ///
    /// # Errors
    ///
    /// `EINVAL`: it has none.
    fn current() -> Result<Self> {
        // SAFETY: May be called on any thread.
        let uid = unsafe { bindings::dlh_current_uid() };
        let mm = current!().mm().map(|mm| ARef::from(&**mm)).ok_or(EINVAL)?;
        Ok(Self { uid, mm })
    }

    /// The bindings' view of it; valid as long as `self` is.
    fn mm(&self) -> *const bindings::mm_struct {
        self.mm.as_raw().cast_const().cast()
    }

    /// The case at this moment. Any context.
    fn case(&self) -> Case {
        // SAFETY: The address space's structure is kept by `self`.
        let cgroup = unsafe { bindings::dlh_cgroup_id(self.mm()) };
        // SAFETY: May be called anywhere.
        let generation = unsafe { bindings::dlh_allow_generation() };
        Case { generation, cgroup }
    }

    /// What the rules say now, and whether there was memory to find that out: without it no rule fits that names a
    /// cgroup. May sleep.
    fn decide(&self) -> (Permission, bool) {
        let mut path = KVec::from_elem(0u8, MOST_PATH, GFP_KERNEL_ACCOUNT).unwrap_or_default();
        // SAFETY: The address space's structure is kept by `self`; there is room for that many bytes.
        let bytes =
            unsafe { bindings::dlh_cgroup_path(self.mm(), path.as_mut_ptr().cast(), path.len()) };
        let cgroup = path.get(..bytes).filter(|path| !path.is_empty());
        let vmm = Vmm { uid: self.uid, cgroup };
        // It was checked when it was set.
        let decide =
            |text: &[u8]| Rules::parse(text).map_or(Permission::Nothing, |r| r.decide(&vmm));
        (with_text(decide), !path.is_empty())
    }
}

/// Calls `look` with the value of `allow`, inside an RCU read section. Any context.
fn with_text<T>(look: impl FnOnce(&[u8]) -> T) -> T {
    let _reading = rcu::read_lock();
    let mut bytes = 0;
    // SAFETY: RCU's read lock is held.
    let text = unsafe { bindings::dlh_allow_text(&mut bytes) };
    // SAFETY: The helper returns a text of that many bytes, which stays as it is until the guard is dropped.
    look(unsafe { core::slice::from_raw_parts(text.cast::<u8>(), bytes) })
}

/// Shows the value of `allow`, or the beginning of a long one.
pub struct ShownRules;

impl fmt::Display for ShownRules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MOST_SHOWN: usize = 128;
        with_text(|text| {
            let front = text.get(..MOST_SHOWN).unwrap_or(text);
            fmt::Display::fmt(BStr::from_bytes(front), f)?;
            f.write_str(if front.len() < text.len() { "..." } else { "" })
        })
    }
}

impl Allow {
    /// That of a VM of the current process, of which root has said nothing. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`; `EINVAL`: the thread is the kernel's.
    pub fn new() -> Result<Arc<Self>> {
        let vmm = Process::current()?;
        Arc::pin_init(
            pin_init!(Self {
                choice: Atomic::new(bindings::dlh_choice_DLH_CHOICE_DEFAULT),
                vmm,
                decided <- new_spinlock!(None),
            }),
            GFP_KERNEL_ACCOUNT,
        )
    }

    /// Where root's choice is.
    pub(crate) fn choice(&self) -> *mut u32 {
        self.choice.as_ptr()
    }

    /// What may be given up now. Any thread; may sleep, but waits for nobody.
    pub fn permission(&self) -> Permission {
        match self.choice.load(Relaxed) {
            bindings::dlh_choice_DLH_CHOICE_YES => Permission::All,
            bindings::dlh_choice_DLH_CHOICE_NO => Permission::Nothing,
            _ => self.by_rules(),
        }
    }

    fn by_rules(&self) -> Permission {
        let case = self.vmm.case();
        match *self.decided.lock() {
            Some(Decided { case: same, permission }) if same == case => return permission,
            _ => (),
        }
        let (permission, complete) = self.vmm.decide();
        // What changes meanwhile is not what this is noted for, so that it is decided once more then.
        if complete {
            *self.decided.lock() = Some(Decided { case, permission });
        }
        permission
    }
}

/// Checks what is to become the value of `allow`; `helpers/params/ksm_bridge.c` calls it.
///
/// # Safety
///
/// `value` points to `bytes` bytes, and `bad` to a place for the result.
#[no_mangle]
unsafe extern "C" fn dlh_allow_check(
    value: *const c_char,
    bytes: usize,
    bad: *mut bindings::dlh_allow_bad,
) -> usize {
    // SAFETY: By the caller's promise.
    let value = unsafe { core::slice::from_raw_parts(value.cast::<u8>(), bytes) };
    match Rules::parse(value) {
        Ok(rules) => rules.text().len(),
        Err(wrong) => {
            let why = wrong.why.as_str();
            // SAFETY: By the caller's promise.
            unsafe {
                *bad = bindings::dlh_allow_bad {
                    word: wrong.word.as_ptr().cast(),
                    word_bytes: wrong.word.len(),
                    why: why.as_ptr().cast(),
                    why_bytes: why.len(),
                };
            }
            value.strip_suffix(b"\n").unwrap_or(value).len()
        }
    }
}
