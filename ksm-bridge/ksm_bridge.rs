// SPDX-License-Identifier: GPL-2.0

//! Free pages of guests, merged into the shared zero page.
//!
//! One way through, one file a step:
//!
//! FREE_PAGES ([`operation`]) -> worker of the VM ([`merger`]) -> free-page map ([`map`]) -> zero page
//! (`kvm_merge`), with statistics ([`stats`]) beside every step.
//!
//! # Locking
//!
//! Outermost first; see `docs/locking.md`.
//!
//! 1. `Merger::batch` (the worker's own; tokens are completed under it)
//! 2. `Merger::map`
//! 3. `Merger::requests` (spin lock)
//!
//! kvm_dlh.ko's locks are taken inside `batch` when a token is completed, and are held around `requests`
//! when a call is executed; none of ours is held around both.

use kernel::prelude::*;

mod debug;
mod map;
mod merger;
mod operation;
mod stats;

use kvm_ops::Registration;
use operation::FreePages;

module! {
    type: KsmBridge,
    name: "ksm_bridge",
    authors: ["The kvm-dlh developers"],
    description: "Merges the free pages of KVM guests into the shared zero page",
    license: "GPL",
}

struct KsmBridge {
    _registration: Registration<FreePages>,
}

impl kernel::Module for KsmBridge {
    fn init(module: &'static ThisModule) -> Result<Self> {
        Ok(Self { _registration: Registration::new(module, FreePages::new())? })
    }
}
