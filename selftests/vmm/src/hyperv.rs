// SPDX-License-Identifier: GPL-2.0

//! What a guest sees, and does, that takes KVM for Hyper-V.

use std::io;
use std::os::fd::AsRawFd;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::Kvm;

use crate::ktap::Result;

/// The register in which a guest says what it is. From then on its hypercalls are Hyper-V's.
pub(crate) const MSR_GUEST_OS_ID: u32 = 0x4000_0000;
/// The register that says where the page with the hypercall instruction is to be.
pub(crate) const MSR_HYPERCALL: u32 = 0x4000_0001;
/// The register that says where the vCPU's assist page is.
pub(crate) const MSR_ASSIST_PAGE: u32 = 0x4000_0073;
/// A value of [`MSR_GUEST_OS_ID`], as an open source system has.
pub(crate) const SOME_OS: u64 = 0x8100_0000_0000_0000;
/// In [`MSR_HYPERCALL`] and [`MSR_ASSIST_PAGE`]: the page is to be there.
pub(crate) const ENABLE: u64 = 1;
/// The word of the assist page whose lowest bit lets nested guests call Hyper-V directly.
pub(crate) const DIRECT_HYPERCALL: usize = 32;

/// The leaves of a hypervisor begin here, and every [`NEXT`] from here.
const LEAVES: u32 = 0x4000_0000;
const NEXT: u32 = 0x100;

/// CPUID with Hyper-V's leaves in front of KVM's own, as VMMs lay them out.
pub(crate) fn cpuid(kvm: &Kvm) -> Result<CpuId> {
    const KVM_GET_SUPPORTED_HV_CPUID: libc::c_ulong = 0xc008_aec1;

    let mut hyperv = CpuId::new(KVM_MAX_CPUID_ENTRIES)?;
    let entries = hyperv.as_mut_fam_struct_ptr();
    // SAFETY: The structure says how many entries it has room for.
    if unsafe { libc::ioctl(kvm.as_raw_fd(), KVM_GET_SUPPORTED_HV_CPUID, entries) } < 0 {
        return Err(io::Error::last_os_error().into());
    }
    let mut all = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?.as_slice().to_vec();
    for entry in &mut all {
        if (LEAVES..LEAVES + NEXT).contains(&entry.function) {
            // The first one says which is the last one.
            entry.eax += if entry.function == LEAVES { NEXT } else { 0 };
            entry.function += NEXT;
        }
    }
    all.extend_from_slice(hyperv.as_slice());
    Ok(CpuId::from_entries(&all)?)
}
