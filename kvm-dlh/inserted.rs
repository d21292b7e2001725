// SPDX-License-Identifier: GPL-2.0

//! The calls that a trap inserted and whose vCPU waits, with their answers.

use dlh_abi::Status;
use kernel::{
    new_spinlock,
    prelude::*,
    rbtree::{RBTree, RBTreeNode},
    sync::SpinLock,
};
use kvm_hooks::{
    inline_atomic::{AtomicU32, Ordering},
    wait_killable, wake, Killed,
};

/// The calls of one VM that wait, by number.
#[pin_data]
pub(crate) struct Inserted {
    #[pin]
    answers: SpinLock<RBTree<u32, Option<Status>>>,
    next: AtomicU32,
}

impl Inserted {
    /// None yet.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self { answers <- new_spinlock!(RBTree::new()), next: AtomicU32::new(0) })
    }

    /// Notes one more, which waits from now on; returns its number. May sleep.
    pub(crate) fn note(&self) -> Result<u32> {
        loop {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            let node = RBTreeNode::new(number, None, GFP_KERNEL_ACCOUNT)?;
            let mut answers = self.answers.lock();
            // Numbers come round; one that still waits keeps its own.
            if answers.get(&number).is_none() {
                answers.insert(node);
                return Ok(number);
            }
        }
    }

    /// A call is finished. Any context in which a spin lock may be taken.
    pub(crate) fn answer(&self, number: u32, status: Status) {
        if let Some(answer) = self.answers.lock().get_mut(&number) {
            *answer = Some(status);
        }
        wake(self);
    }

    /// Waits for the answer to a call. May sleep, and be frozen.
    ///
    /// # Errors
    ///
    /// The task is being killed.
    pub(crate) fn wait(&self, number: u32) -> Result<(), Killed> {
        wait_killable(self, || self.answers.lock().get(&number).is_none_or(Option::is_some))
    }

    /// Forgets a call; its answer, if there is one.
    pub(crate) fn forget(&self, number: u32) -> Option<Status> {
        let node = self.answers.lock().remove_node(&number);
        node.and_then(|node| node.to_key_value().1)
    }
}
