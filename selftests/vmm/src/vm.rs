// SPDX-License-Identifier: GPL-2.0

//! A VM with exactly the memory and vCPUs a test asks for.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use dlh_abi::Function;
use kvm_bindings::{
    kvm_create_device, kvm_create_guest_memfd, kvm_device_type_KVM_DEV_TYPE_VFIO, kvm_enable_cap,
    kvm_userspace_memory_region, kvm_userspace_memory_region2, kvm_xen_hvm_config,
    KVM_CAP_SPLIT_IRQCHIP, KVM_MAX_CPUID_ENTRIES, KVM_MEM_GUEST_MEMFD, KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY, KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL,
};
use kvm_ioctls::{Cap, DeviceFd, IoEventAddress, Kvm, VmFd};

use crate::boot;
use crate::hyperv;
use crate::ktap::{failed, Result};
use crate::memory::{Backing, Mapping, PAGE};
use crate::stats::{Known, Stats};
use crate::svm;
use crate::vcpu::Vcpu;

/// Where tests put their first memory region, clear of the VM's own low memory.
pub(crate) const BASE: u64 = 0x1000_0000;

/// Which interrupt controllers KVM emulates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Irqchip {
    /// None: a halted vCPU returns to the VMM.
    Vmm,
    /// The local ones; a halted vCPU waits in the kernel.
    Split,
    /// All; a halted vCPU waits in the kernel.
    Kernel,
}

/// What a VM is to be like.
#[derive(Clone, Copy, Debug)]
pub(crate) struct VmConfig {
    pub(crate) vcpus: usize,
    pub(crate) irqchip: Irqchip,
    /// Whether CPUID says that there is Hyper-V, and KVM behind it.
    pub(crate) hyperv: bool,
    /// Bytes of ordinary memory at [`BASE`]; more can be added later.
    pub(crate) memory: usize,
}

impl Default for VmConfig {
    fn default() -> Self {
        Self { vcpus: 1, irqchip: Irqchip::Vmm, hyperv: false, memory: 4 << 20 }
    }
}

/// A memslot.
#[derive(Debug)]
pub(crate) struct Region {
    slot: u32,
    pub(crate) gpa: u64,
    pub(crate) mapping: Arc<Mapping>,
    _guest_memfd: Option<OwnedFd>,
}

/// What the VMM sees of a memslot of guest_memfd.
#[derive(Debug)]
pub(crate) enum GuestMemfd {
    /// The file itself, of this length.
    Mapped(usize),
    /// Memory beside it, which the guest has for as long as it asks for no private memory.
    Beside(Arc<Mapping>),
}

/// Names a region of a VM for as long as it is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot(u32);

/// A virtual machine.
#[derive(Debug)]
pub(crate) struct Vm {
    // Fields are dropped in this order.
    pub(crate) vcpus: Vec<Vcpu>,
    fd: VmFd,
    regions: Vec<Region>,
    low_memory: Arc<Mapping>,
    next_slot: u32,
    svm: bool,
    known: Known,
}

impl Vm {
    /// Makes a VM, its vCPUs waiting for commands.
    pub(crate) fn new(config: VmConfig) -> Result<Self> {
        let mut known = Known::now();
        let kvm = Kvm::new()?;
        let fd = kvm.create_vm()?;
        known.vm_is(fd.as_raw_fd());
        fd.set_tss_address(0xfffb_d000)?;
        match config.irqchip {
            Irqchip::Vmm => (),
            Irqchip::Split => {
                // As many routes as the chip of the VMM would have pins.
                let args = [24, 0, 0, 0];
                fd.enable_cap(&kvm_enable_cap {
                    cap: KVM_CAP_SPLIT_IRQCHIP,
                    args,
                    ..Default::default()
                })?;
            }
            Irqchip::Kernel => fd.create_irq_chip()?,
        }
        let low_memory = Arc::new(Mapping::new(Backing::Anonymous, boot::LOW_MEMORY)?);
        boot::write_low_memory(&low_memory);
        let cpuid = if config.hyperv {
            hyperv::cpuid(&kvm)?
        } else {
            kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?
        };
        let mut vm = Self {
            vcpus: Vec::new(),
            fd,
            regions: Vec::new(),
            low_memory,
            next_slot: 1,
            svm: svm::is_in(&cpuid),
            known,
        };
        vm.set_slot(0, 0, 0, &vm.low_memory)?;
        if config.memory != 0 {
            vm.add_memory(BASE, Mapping::new(Backing::Anonymous, config.memory)?)?;
        }
        for index in 0..config.vcpus {
            let vcpu = vm.fd.create_vcpu(index as u64)?;
            vcpu.set_cpuid2(&cpuid)?;
            let vcpu = Vcpu::new(vcpu, index)?;
            vm.vcpus.push(vcpu);
        }
        // The module, if it is there, gets to know a VM when it first hears of it.
        vm.hypercall(0, Function::Features as u64, 0, 0, 0)?;
        Ok(vm)
    }

    /// Gives the VM memory at `gpa`.
    pub(crate) fn add_memory(&mut self, gpa: u64, mapping: Mapping) -> Result<Slot> {
        self.add_region(gpa, mapping, false)
    }

    /// Gives the VM memory that it cannot write.
    pub(crate) fn add_readonly_memory(&mut self, gpa: u64, mapping: Mapping) -> Result<Slot> {
        self.add_region(gpa, mapping, true)
    }

    fn add_region(&mut self, gpa: u64, mapping: Mapping, readonly: bool) -> Result<Slot> {
        let slot = self.next_slot;
        let mapping = Arc::new(mapping);
        self.set_slot(slot, gpa, if readonly { KVM_MEM_READONLY } else { 0 }, &mapping)?;
        self.next_slot += 1;
        self.regions.push(Region { slot, gpa, mapping, _guest_memfd: None });
        Ok(Slot(slot))
    }

    /// Has KVM put aside what the guest stores to the word at `gpa`, where it has no memory.
    pub(crate) fn coalesce(&self, gpa: u64) -> Result<()> {
        Ok(self.fd.register_coalesced_mmio(IoEventAddress::Mmio(gpa), 8)?)
    }

    /// Gives the VM memory of a guest_memfd.
    pub(crate) fn add_guest_memfd(&mut self, gpa: u64, seen: GuestMemfd) -> Result<Slot> {
        const GUEST_MEMFD_FLAG_MMAP: u64 = 1;
        const GUEST_MEMFD_FLAG_INIT_SHARED: u64 = 2;

        let (len, flags) = match &seen {
            GuestMemfd::Mapped(len) => (*len, GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED),
            GuestMemfd::Beside(mapping) => (mapping.len(), 0),
        };
        let create = kvm_create_guest_memfd { size: len as u64, flags, ..Default::default() };
        let fd = self.fd.create_guest_memfd(create)?;
        // SAFETY: The descriptor is new, and ours.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let mapping = match seen {
            GuestMemfd::Mapped(len) => Arc::new(Mapping::of_file(fd.try_clone()?, len)?),
            GuestMemfd::Beside(mapping) => mapping,
        };
        let slot = self.next_slot;
        let region = kvm_userspace_memory_region2 {
            slot,
            flags: KVM_MEM_GUEST_MEMFD,
            guest_phys_addr: gpa,
            memory_size: len as u64,
            userspace_addr: mapping.address(),
            guest_memfd: fd.as_raw_fd() as u32,
            ..Default::default()
        };
        // SAFETY: As in `set_slot`.
        unsafe { self.fd.set_user_memory_region2(region) }?;
        self.next_slot += 1;
        self.regions.push(Region { slot, gpa, mapping, _guest_memfd: Some(fd) });
        Ok(Slot(slot))
    }

    /// Deletes a memslot; the memory itself stays for as long as it is used.
    pub(crate) fn remove_memory(&mut self, slot: Slot) -> Result<Arc<Mapping>> {
        let index = self.index(slot);
        let region = self.regions.remove(index);
        self.delete_slot(region.slot, region.gpa)?;
        Ok(region.mapping)
    }

    /// Moves a memslot to another guest-physical address.
    pub(crate) fn move_memory(&mut self, slot: Slot, gpa: u64) -> Result<()> {
        let index = self.index(slot);
        self.set_slot(slot.0, gpa, 0, &self.regions[index].mapping)?;
        self.regions[index].gpa = gpa;
        Ok(())
    }

    /// Has KVM log what is written to a memslot.
    pub(crate) fn log_dirty(&self, slot: Slot) -> Result<()> {
        let region = self.region(slot);
        self.set_slot(slot.0, region.gpa, KVM_MEM_LOG_DIRTY_PAGES, &region.mapping)
    }

    /// The pages of a memslot that were written since the last call, by their numbers in it.
    pub(crate) fn dirty_pages(&self, slot: Slot) -> Result<Vec<usize>> {
        let words = self.fd.get_dirty_log(slot.0, self.region(slot).mapping.len())?;
        let is_set = |page: &usize| words[page / 64] & (1 << (page % 64)) != 0;
        Ok((0..64 * words.len()).filter(is_set).collect())
    }

    /// Unmaps the memory of a memslot that stays. Nothing else may hold on to that memory.
    pub(crate) fn unmap_memory(&mut self, slot: Slot) -> Result<()> {
        let index = self.index(slot);
        match Arc::get_mut(&mut self.regions[index].mapping) {
            Some(mapping) => Ok(mapping.unmap()?),
            None => failed("the memory to unmap is still in use"),
        }
    }

    /// Lets SMM see the low memory, too.
    pub(crate) fn enable_smm(&mut self) -> Result<bool> {
        if !self.fd.check_extension(Cap::X86Smm) {
            return Ok(false);
        }
        // Address space 1, slot 0.
        self.set_slot(1 << 16, 0, 0, &self.low_memory)?;
        Ok(true)
    }

    /// Has KVM take all hypercalls for Xen's, or none any more.
    pub(crate) fn intercept_xen_hypercalls(&self, intercept: bool) -> Result<()> {
        const KVM_XEN_HVM_CONFIG: libc::c_ulong = 0x4038_ae7a;
        /// The register that would write Xen's hypercall page; without one there is no Xen.
        const MSR: u32 = 0x4000_0200;

        let mut config = kvm_xen_hvm_config::default();
        if intercept {
            (config.flags, config.msr) = (KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL, MSR);
        }
        // SAFETY: The ioctl reads one structure of this type.
        let result =
            unsafe { libc::ioctl(self.fd.as_raw_fd(), KVM_XEN_HVM_CONFIG, &raw const config) };
        if result < 0 {
            return Err(io::Error::last_os_error().into());
        }
        Ok(())
    }

    /// Whether the vCPUs have SVM, so that their guests can have guests.
    pub(crate) fn has_svm(&self) -> bool {
        self.svm
    }

    /// The region with this slot.
    pub(crate) fn region(&self, slot: Slot) -> &Region {
        &self.regions[self.index(slot)]
    }

    /// The slot of the region that holds guest-physical `gpa`.
    pub(crate) fn slot_at(&self, gpa: u64) -> Result<Slot> {
        Ok(Slot(self.region_at(gpa)?.slot))
    }

    /// The memory that holds guest-physical `gpa`, and the offset therein.
    pub(crate) fn memory_at(&self, gpa: u64) -> Result<(Arc<Mapping>, usize)> {
        let region = self.region_at(gpa)?;
        Ok((region.mapping.clone(), (gpa - region.gpa) as usize))
    }

    /// The low memory, where entries are staged.
    pub(crate) fn low_memory(&self) -> &Arc<Mapping> {
        &self.low_memory
    }

    /// A DLH hypercall on a vCPU; returns RAX.
    pub(crate) fn hypercall(
        &mut self,
        vcpu: usize,
        function: u64,
        rcx: u64,
        rdx: u64,
        rsi: u64,
    ) -> Result<i64> {
        self.vcpus[vcpu].hypercall(function, rcx, rdx, rsi)
    }

    /// What the module counted for this VM.
    pub(crate) fn stats(&self) -> Result<Stats> {
        self.known.stats("kvm_dlh")
    }

    /// Checks that no call is lost, where the module's statistics are to be had.
    pub(crate) fn check_law(&self) -> Result<()> {
        if crate::stats::are_there() {
            return self.stats()?.check_law();
        }
        Ok(())
    }

    /// What the module counted for each operation.
    pub(crate) fn operations(&self) -> Result<String> {
        self.known.operations()
    }

    /// What the module says of the VM's rings, one line a ring.
    pub(crate) fn rings(&self) -> Result<String> {
        self.known.rings()
    }

    /// Its descriptor, to lend to another process.
    pub(crate) fn descriptor(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// What the module says of the VM, for the reader of a failure.
    pub(crate) fn describe(&self) -> String {
        format!("rings: {:?}\nstatistics: {:?}", self.known.rings(), self.stats())
    }

    /// What the bridge counted for this VM.
    pub(crate) fn bridge_stats(&self) -> Result<Stats> {
        self.known.stats("ksm_bridge")
    }

    /// Has the bridge tell the guest to report all that is free once more, as the operator does.
    pub(crate) fn bridge_again(&self) -> Result<()> {
        self.known.again()
    }

    /// The free-page map that the bridge keeps of it, as its words.
    pub(crate) fn free_page_map(&self) -> Result<Vec<u64>> {
        self.known.free_page_map()
    }

    /// Tells KVM that devices are assigned to it, as a VMM does before it adds the first.
    pub(crate) fn assign_devices(&self) -> Result<DeviceFd> {
        let type_ = kvm_device_type_KVM_DEV_TYPE_VFIO;
        Ok(self.fd.create_device(&mut kvm_create_device { type_, ..Default::default() })?)
    }

    /// How many exits KVM counted.
    pub(crate) fn exits(&self) -> Result<u64> {
        self.known.kvm_count("exits")
    }

    /// Those of them that no interrupt of the host's made: how often it interrupts depends on how long the guest takes.
    pub(crate) fn own_exits(&self) -> Result<u64> {
        let interrupts = self.known.kvm_count("irq_exits")?;
        Ok(self.exits()? - interrupts)
    }

    /// How many vCPUs wait in the kernel for something to do.
    pub(crate) fn blocking(&self) -> Result<u64> {
        self.known.kvm_count("blocking")
    }

    fn region_at(&self, gpa: u64) -> Result<&Region> {
        let holds = |region: &&Region| {
            (region.gpa..region.gpa + region.mapping.len() as u64).contains(&gpa)
        };
        match self.regions.iter().find(holds) {
            Some(region) => Ok(region),
            None => failed(format!("no memory at {gpa:#x}")),
        }
    }

    fn index(&self, slot: Slot) -> usize {
        self.regions.iter().position(|region| region.slot == slot.0).expect("the region is there")
    }

    fn set_slot(&self, slot: u32, gpa: u64, flags: u32, mapping: &Mapping) -> Result<()> {
        assert!(gpa % PAGE as u64 == 0);
        let region = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: gpa,
            memory_size: mapping.len() as u64,
            userspace_addr: mapping.address(),
        };
        // SAFETY: The mapping lives as long as the VM, or until the slot is deleted; what the guest
        // changes there is only read as atomics.
        Ok(unsafe { self.fd.set_user_memory_region(region) }?)
    }

    fn delete_slot(&self, slot: u32, gpa: u64) -> Result<()> {
        let region =
            kvm_userspace_memory_region { slot, guest_phys_addr: gpa, ..Default::default() };
        // SAFETY: Takes memory away from the guest.
        Ok(unsafe { self.fd.set_user_memory_region(region) }?)
    }
}
