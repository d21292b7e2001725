// SPDX-License-Identifier: GPL-2.0

//! Works of the module's own: a workqueue that nobody else waits in, and what is kept a while longer than
//! it is used.
//!
//! C header: `include/linux/workqueue.h`

mod linger;
mod queue;

pub use linger::Linger;
pub use queue::OwnQueue;
