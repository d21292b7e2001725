// SPDX-License-Identifier: GPL-2.0

//! Free pages of guests, merged into the shared zero page.
//!
//! One way through, one file a step:
//!
//! FREE_PAGES ([`operation`]) -> worker of the VM ([`merger`]) -> free-page map ([`map`]) -> zero page
//! (`kvm_merge`), and once more where that is of use ([`again`]), with statistics ([`stats`]) beside every step, shown by [`debug`] and [`dump`].
//!
//! # Locking
//!
//! Outermost first; see `docs/locking.md`.
//!
//! 1. `Merger::batch` (the worker's own; tokens are completed under it)
//! 2. `Map::regions` (spin lock; also taken in the probe on page faults)
//! 3. `Merger::requests` (spin lock)
//!
//! kvm_dlh.ko's locks are taken inside `batch` when a token is completed, and are held around `requests`
//! when a call is executed; none of ours is held around both.

use kernel::prelude::*;

mod again;
mod debug;
mod dump;
mod map;
mod merger;
mod operation;
mod refilled;
mod requests;
mod stats;

use kvm_control::ShownRules;
use kvm_merge::Mode;
use kvm_ops::Registration;
use merger::Policy;
use operation::FreePages;
use params::{ksm_bridge, VERSION};

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
        let (mode, merge) = match ksm_bridge::merge_share() {
            true => (Mode::Share, "share"),
            false => (Mode::Release, "release"),
        };
        let policy = Policy { mode, cpu_percent: ksm_bridge::worker_cpu_percent() };
        let operation = FreePages::new(policy)
            .inspect_err(|e| pr_err!("cannot start, no memory: {:?}\n", e))?;
        let registration = Registration::new(module, operation).inspect_err(|&e| match e {
            EBUSY => pr_err!("cannot start, another module takes FREE_PAGES\n"),
            _ => pr_err!("cannot start, kvm_dlh does not take FREE_PAGES: {:?}\n", e),
        })?;
        pr_info!(
            "version {}: taking free pages of guests; allow={}, merge={}, worker_cpu_percent={}\n",
            VERSION,
            ShownRules,
            merge,
            policy.cpu_percent
        );
        Ok(Self { _registration: registration })
    }
}
