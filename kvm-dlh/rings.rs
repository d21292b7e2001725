// SPDX-License-Identifier: GPL-2.0

//! The rings of one VM: adding, removing and showing them.

use kernel::{fmt, prelude::*, rbtree::RBTreeNode, sync::Arc};
use kvm_hooks::Killed;
use kvm_vm::Vcpu;

use crate::{
    ring::{Queue, Ring},
    stats::Event,
};

impl Queue {
    /// Adds a ring; there is none of that number.
    pub(crate) fn add_ring(&self, ring: Arc<Ring>) -> Result {
        // Its place is made outside of the lock: a VMM at its memory's limit must not keep readers waiting.
        let node = RBTreeNode::new(ring.id(), ring, GFP_KERNEL_ACCOUNT)?;
        let former = self.rings().lock().insert(node);
        drop(former);
        self.stats().count(Event::RingSetUp);
        Ok(())
    }

    /// Detaches a ring and forgets it. May sleep; on the thread of `vcpu`, or without one.
    ///
    /// # Errors
    ///
    /// The thread of `vcpu` is being killed. The ring is detached, and may be worked on.
    pub(crate) fn remove_ring(&self, id: u32, vcpu: Option<&Vcpu>) -> Result<bool, Killed> {
        let Some(ring) = self.ring(id) else { return Ok(false) };
        ring.close(vcpu.is_some())?;
        if let Some(vcpu) = vcpu {
            ring.retire(vcpu.vm());
        }
        ring.forget();
        let removed = {
            let mut rings = self.rings().lock();
            // Its vCPU may have set up another one meanwhile.
            match rings.get(&id) {
                Some(found) if Arc::ptr_eq(found, &ring) => rings.remove(&id),
                _ => None,
            }
        };
        drop(removed);
        Ok(true)
    }

    /// Detaches all rings. May sleep.
    pub(crate) fn remove_all_rings(&self) {
        loop {
            let first = self.rings().lock().iter().next().map(|(id, _)| *id);
            match first {
                // Nobody kills whom no vCPU is given.
                Some(id) => drop(self.remove_ring(id, None)),
                None => break,
            }
        }
    }

    /// The ring with the lowest number not below `from`.
    fn next_ring(&self, from: u32) -> Option<Arc<Ring>> {
        let rings = self.rings().lock();
        let cursor = rings.cursor_lower_bound(&from)?;
        let (_, ring) = cursor.current();
        Some(ring.clone())
    }

    /// One line a ring. May sleep.
    pub(crate) fn show_rings(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not under the lock: a reader's memory is allocated meanwhile.
        let mut from = 0;
        while let Some(ring) = self.next_ring(from) {
            write!(f, "{} ", ring.id())?;
            ring.show_state(f)?;
            from = ring.id() + 1;
        }
        Ok(())
    }
}
