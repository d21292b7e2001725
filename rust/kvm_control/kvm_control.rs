// SPDX-License-Identifier: GPL-2.0

//! Whose memory may be given up, as root says: for all VMs by the parameter `allow` ([`allow`]), for one of them
//! by a file of its directory in sysfs ([`directory`]). Nothing here needs debugfs.
//!
//! C header: `rust/dlh_bindings/helpers.h`

mod allow;
mod directory;

pub use allow::{Allow, ShownRules};
pub use allow_rules::Permission;
pub use directory::{Asked, Directory, VmDirectory};
