// SPDX-License-Identifier: GPL-2.0

//! Memory of this process that a VM gets as its own, of all the kinds a VMM may use.
//!
//! Guests and the host write to it at any time, so it is only ever accessed as atomic words.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Size of a page.
pub(crate) const PAGE: usize = 4096;
/// Size of a huge page, to which every mapping is aligned.
pub(crate) const HUGE_PAGE: usize = 2 << 20;

/// What kind of memory to map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Backing {
    /// Private anonymous memory in small pages.
    Anonymous,
    /// The same, of which there may be more than the machine has.
    Sparse,
    /// Private anonymous memory that asks for transparent huge pages.
    TransparentHuge,
    /// A memfd, shared.
    SharedMemfd,
    /// A memfd, private: what was not written reads as the file, here 0x11 bytes.
    PrivateMemfd,
    /// A memfd with nothing in it, private.
    EmptyPrivateMemfd,
    /// A memfd that may not be written any more once it is mapped, shared.
    SealedMemfd,
    /// Memory of huge pages from the reserved pool, of 2 to this power bytes.
    Hugetlb { shift: u32, shared: bool },
}

/// The content of the file below [`Backing::PrivateMemfd`].
pub(crate) const FILE_WORD: u64 = 0x1111_1111_1111_1111;

/// A mapping with a size fixed at its start.
#[derive(Debug)]
pub(crate) struct Mapping {
    /// Start of the whole reservation, which is larger for the sake of alignment.
    reserved: NonNull<u8>,
    reserved_len: usize,
    base: NonNull<u8>,
    len: usize,
    unmapped: bool,
    file: Option<OwnedFd>,
}

// SAFETY: The memory is accessed through atomics only; the rest never changes.
unsafe impl Send for Mapping {}
// SAFETY: As above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes, aligned to [`HUGE_PAGE`], or to the page size of hugetlbfs.
    pub(crate) fn new(backing: Backing, len: usize) -> io::Result<Self> {
        let (flags, file) = match backing {
            Backing::Anonymous | Backing::TransparentHuge => {
                (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None)
            }
            Backing::Sparse => {
                (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, None)
            }
            Backing::Hugetlb { shift, shared } => {
                let size = (shift << libc::MAP_HUGE_SHIFT) as i32 | libc::MAP_HUGETLB;
                let flags = if shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
                (flags | libc::MAP_ANONYMOUS | size, None)
            }
            Backing::SharedMemfd | Backing::SealedMemfd => (libc::MAP_SHARED, Some(memfd(len)?)),
            Backing::EmptyPrivateMemfd => (libc::MAP_PRIVATE, Some(memfd(len)?)),
            Backing::PrivateMemfd => (libc::MAP_PRIVATE, Some(filled(memfd(len)?, len)?)),
        };
        let align = match backing {
            Backing::Hugetlb { shift, .. } => 1 << shift,
            _ => HUGE_PAGE,
        };
        let mapping = Self::map(len, align, flags, file.map(OwnedFd::from))?;
        match backing {
            Backing::Anonymous | Backing::Sparse => mapping.advise(libc::MADV_NOHUGEPAGE)?,
            Backing::TransparentHuge => mapping.advise(libc::MADV_HUGEPAGE)?,
            Backing::SealedMemfd => mapping.seal()?,
            _ => (),
        }
        Ok(mapping)
    }

    /// Maps the first `len` bytes of a file, shared.
    pub(crate) fn of_file(file: OwnedFd, len: usize) -> io::Result<Self> {
        Self::map(len, HUGE_PAGE, libc::MAP_SHARED, Some(file))
    }

    /// Fills a file as [`Backing::PrivateMemfd`] is, and maps it, private.
    pub(crate) fn private_of_file(file: File, len: usize) -> io::Result<Self> {
        Self::map(len, HUGE_PAGE, libc::MAP_PRIVATE, Some(filled(file, len)?.into()))
    }

    /// Maps the file of this mapping once more, shared.
    pub(crate) fn again(&self) -> io::Result<Self> {
        Self::of_file(self.file()?.try_clone()?, self.len)
    }

    /// Bytes that the file takes.
    pub(crate) fn file_bytes(&self) -> io::Result<u64> {
        Ok(File::from(self.file()?.try_clone()?).metadata()?.blocks() * 512)
    }

    /// The file behind it.
    pub(crate) fn file(&self) -> io::Result<&OwnedFd> {
        self.file.as_ref().ok_or_else(|| io::Error::other("there is no file behind the memory"))
    }

    fn seal(&self) -> io::Result<()> {
        // SAFETY: Sealing does not change what the file holds.
        checked(unsafe {
            libc::fcntl(self.file()?.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_FUTURE_WRITE)
        })
    }

    fn map(len: usize, align: usize, flags: i32, file: Option<OwnedFd>) -> io::Result<Self> {
        assert!(len > 0 && len % PAGE == 0);
        let reserved_len = len.next_multiple_of(align) + align;
        // SAFETY: A new mapping at an address the kernel chooses touches nothing that exists.
        let reserved = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                reserved_len,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        let reserved = checked_address(reserved)?;
        let skip = reserved.addr().get().next_multiple_of(align) - reserved.addr().get();
        // SAFETY: `skip` is less than `align`, so it stays inside the reservation.
        let base = unsafe { reserved.add(skip) };
        // From here on an error unmaps the reservation.
        let mapping = Self { reserved, reserved_len, base, len, unmapped: false, file };
        // SAFETY: Replaces a part of the reservation, which nobody uses yet.
        let mapped = unsafe {
            libc::mmap(
                base.as_ptr().cast(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                flags | libc::MAP_FIXED,
                mapping.file.as_ref().map_or(-1, |file| file.as_raw_fd()),
                0,
            )
        };
        checked_address(mapped)?;
        Ok(mapping)
    }

    /// Bytes in the mapping.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Its address in this process, for interfaces that take one.
    pub(crate) fn address(&self) -> u64 {
        self.base.addr().get() as u64
    }

    /// Lets KSM merge pages of the memory with equal ones.
    pub(crate) fn mergeable(&self) -> io::Result<()> {
        self.advise(libc::MADV_MERGEABLE)
    }

    /// Gives a part of the memory back, as a VMM does that discards memory of its guest.
    pub(crate) fn give_back(&self, offset: usize, len: usize) -> io::Result<()> {
        let start = self.pointer(offset, PAGE);
        assert!(offset + len <= self.len);
        // SAFETY: The range is this mapping's; it reads as zeroes then, which atomic words may.
        checked(unsafe { libc::madvise(start.as_ptr().cast(), len, libc::MADV_DONTNEED) })
    }

    /// Has the kernel take a page of the memory for broken, as when the hardware reports an error there. What it
    /// held is lost.
    pub(crate) fn poison(&self, offset: usize) -> io::Result<()> {
        let start = self.pointer(offset, PAGE);
        // SAFETY: The page is this mapping's; nobody holds a reference to what it holds.
        checked(unsafe { libc::madvise(start.as_ptr().cast(), PAGE, libc::MADV_HWPOISON) })
    }

    /// Has all of the memory there from now on, before anybody uses it.
    pub(crate) fn populate(&self) -> io::Result<()> {
        self.advise(libc::MADV_POPULATE_WRITE)
    }

    /// Lets khugepaged put huge pages in place of small ones.
    pub(crate) fn want_huge_pages(&self) -> io::Result<()> {
        self.advise(libc::MADV_HUGEPAGE)
    }

    /// How many pages of a range are there.
    pub(crate) fn resident(&self, offset: usize, len: usize) -> io::Result<usize> {
        let start = self.pointer(offset, PAGE);
        assert!(offset + len <= self.len);
        let mut pages = vec![0u8; len / PAGE];
        // SAFETY: There is a byte for each page of the range.
        checked(unsafe { libc::mincore(start.as_ptr().cast(), len, pages.as_mut_ptr()) })?;
        Ok(pages.iter().filter(|&&page| page & 1 != 0).count())
    }

    /// Has the memory come from one of the host's nodes only.
    pub(crate) fn bind_to_node(&self, node: u32) -> io::Result<()> {
        const MPOL_BIND: libc::c_long = 2;
        let (nodes, most) = (1u64 << node, 64);
        let start = self.base.as_ptr();
        // SAFETY: The range is this mapping's; one word names 64 nodes. What is there stays as it is.
        checked(unsafe {
            libc::syscall(libc::SYS_mbind, start, self.len, MPOL_BIND, &raw const nodes, most, 0)
        } as i32)
    }

    /// The node of the page at `offset`; an error where there is none.
    pub(crate) fn node_of(&self, offset: usize) -> io::Result<i32> {
        let page = self.pointer(offset, PAGE).as_ptr();
        let (targets, mut status) = (std::ptr::null::<i32>(), -1i32);
        // SAFETY: Without targets nothing is moved; one word says where the one page is.
        checked(unsafe {
            let (one, status) = (1usize, &raw mut status);
            libc::syscall(libc::SYS_move_pages, 0, one, &raw const page, targets, status, 0)
        } as i32)?;
        if status < 0 {
            return Err(io::Error::from_raw_os_error(-status));
        }
        Ok(status)
    }

    /// Locks what of the memory is there, and the rest as it comes.
    pub(crate) fn lock_on_fault(&self) -> io::Result<()> {
        const MLOCK_ONFAULT: libc::c_uint = 1;
        // SAFETY: Locking does not change what the memory holds.
        checked(unsafe { libc::mlock2(self.base.as_ptr().cast(), self.len, MLOCK_ONFAULT) })
    }

    /// Has the memory swapped out.
    pub(crate) fn page_out(&self) -> io::Result<()> {
        self.advise(libc::MADV_PAGEOUT)
    }

    fn advise(&self, advice: i32) -> io::Result<()> {
        // SAFETY: Advice of the kinds above does not change what the memory holds.
        checked(unsafe { libc::madvise(self.base.as_ptr().cast(), self.len, advice) })
    }

    fn pointer(&self, offset: usize, bytes: usize) -> NonNull<u8> {
        assert!(!self.unmapped, "access to unmapped memory");
        assert!(offset % bytes == 0 && offset + bytes <= self.len, "{offset:#x} is not in memory");
        // SAFETY: Checked to be inside the mapping.
        unsafe { self.base.add(offset) }
    }

    /// The 32-bit word at `offset`.
    pub(crate) fn word32(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: In bounds, aligned, mapped as long as `self` lives, and only accessed atomically.
        unsafe { AtomicU32::from_ptr(self.pointer(offset, 4).as_ptr().cast()) }
    }

    /// The 64-bit word at `offset`.
    pub(crate) fn word(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: As in `word32`.
        unsafe { AtomicU64::from_ptr(self.pointer(offset, 8).as_ptr().cast()) }
    }

    /// Writes bytes, the last word filled up with zeroes.
    pub(crate) fn write(&self, offset: usize, bytes: &[u8]) {
        for (index, chunk) in bytes.chunks(8).enumerate() {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.word(offset + index * 8).store(u64::from_le_bytes(word), Ordering::Relaxed);
        }
    }

    /// Writes the first page, with one call, to the last page of a file.
    pub(crate) fn write_to(&self, file: &mut File) -> io::Result<usize> {
        let offset = file.metadata()?.size() as i64 - PAGE as i64;
        let source = self.pointer(0, PAGE);
        // SAFETY: A page of this mapping is read, by the kernel.
        let written =
            unsafe { libc::pwrite(file.as_raw_fd(), source.as_ptr().cast(), PAGE, offset) };
        checked(written as i32)?;
        Ok(written as usize)
    }

    /// Fills a range with words made from their place.
    pub(crate) fn fill(&self, offset: usize, len: usize, word_at: impl Fn(usize) -> u64) {
        for at in (offset..offset + len).step_by(8) {
            self.word(at).store(word_at(at), Ordering::Relaxed);
        }
    }

    /// The offset of the first word of a range that is not the expected one.
    pub(crate) fn first_difference(
        &self,
        offset: usize,
        len: usize,
        word_at: impl Fn(usize) -> u64,
    ) -> Option<usize> {
        (offset..offset + len)
            .step_by(8)
            .find(|&at| self.word(at).load(Ordering::Relaxed) != word_at(at))
    }

    /// A copy of a range.
    pub(crate) fn snapshot(&self, offset: usize, len: usize) -> Vec<u64> {
        (offset..offset + len).step_by(8).map(|at| self.word(at).load(Ordering::Relaxed)).collect()
    }

    /// Changes what this process, and with it the host, may do with the range.
    pub(crate) fn protect(&self, writable: bool) -> io::Result<()> {
        let access = libc::PROT_READ | if writable { libc::PROT_WRITE } else { 0 };
        // SAFETY: The caller writes nothing while the memory is read-only; reading stays possible.
        checked(unsafe { libc::mprotect(self.base.as_ptr().cast(), self.len, access) })
    }

    /// Lets nobody read the memory through this process's mapping; or lets them again.
    pub(crate) fn hide(&self, hidden: bool) -> io::Result<()> {
        let access = libc::PROT_WRITE | if hidden { 0 } else { libc::PROT_READ };
        // SAFETY: The caller reads nothing while the memory is hidden.
        checked(unsafe { libc::mprotect(self.base.as_ptr().cast(), self.len, access) })
    }

    /// Takes the memory away below the VM; it must not be accessed any more.
    pub(crate) fn unmap(&mut self) -> io::Result<()> {
        self.unmapped = true;
        // SAFETY: `&mut self`: no reference into the mapping exists, and `pointer` makes no new one.
        checked(unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) })
    }

    /// Locks a part of the memory.
    pub(crate) fn lock(&self, offset: usize, len: usize) -> io::Result<()> {
        let start = self.pointer(offset, PAGE);
        assert!(offset + len <= self.len);
        // SAFETY: Locking does not change what the memory holds.
        checked(unsafe { libc::mlock(start.as_ptr().cast(), len) })
    }

    /// Registers the memory with a new userfaultfd, for missing pages.
    pub(crate) fn arm_userfaultfd(&self) -> io::Result<OwnedFd> {
        const UFFDIO_API: u64 = 0xc018_aa3f;
        const UFFDIO_REGISTER: u64 = 0xc020_aa00;
        const UFFD_API: u64 = 0xaa;
        const MODE_MISSING: u64 = 1;

        // SAFETY: Makes a file descriptor, which is ours.
        let fd = unsafe {
            let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK);
            checked(fd as i32)?;
            OwnedFd::from_raw_fd(fd as i32)
        };
        let mut api = [UFFD_API, 0, 0];
        // SAFETY: `api` is a struct uffdio_api: three words.
        checked(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, api.as_mut_ptr()) })?;
        let mut register = [self.address(), self.len as u64, MODE_MISSING, 0];
        // SAFETY: `register` is a struct uffdio_register: four words; the range is this mapping.
        checked(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_REGISTER, register.as_mut_ptr()) })?;
        Ok(fd)
    }

    /// Pins all of the memory; see [`Mapping::pin_part`].
    pub(crate) fn pin(&self) -> io::Result<OwnedFd> {
        self.pin_part(0, self.len)
    }

    /// Pins `len` bytes from `at` on as a registered buffer of a new io_uring, as if for DMA.
    pub(crate) fn pin_part(&self, at: usize, len: usize) -> io::Result<OwnedFd> {
        assert!(at + len <= self.len, "no part of the mapping");
        const REGISTER_BUFFERS: libc::c_long = 0;
        /// sizeof(struct io_uring_params)
        const PARAMS: usize = 120;

        let mut params = [0u64; PARAMS / 8];
        // SAFETY: `params` is a zeroed struct io_uring_params; the new descriptor is ours.
        let fd = unsafe {
            let fd = libc::syscall(libc::SYS_io_uring_setup, 4, params.as_mut_ptr());
            checked(fd as i32)?;
            OwnedFd::from_raw_fd(fd as i32)
        };
        // SAFETY: Looked at above.
        let part = unsafe { self.base.add(at) };
        let iovec = libc::iovec { iov_base: part.as_ptr().cast(), iov_len: len };
        // SAFETY: One iovec that names a part of this mapping; the ring is never asked to use it.
        checked(unsafe {
            libc::syscall(
                libc::SYS_io_uring_register,
                fd.as_raw_fd(),
                REGISTER_BUFFERS,
                &raw const iovec,
                1,
            ) as i32
        })?;
        Ok(fd)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // What was unmapped may be someone else's by now.
        let before = self.base.addr().get() - self.reserved.addr().get();
        let taken = if self.unmapped { self.len } else { 0 };
        // SAFETY: Both parts, and what lies between them unless it is unmapped, are the reservation,
        // and references into it do not outlive `self`.
        unsafe {
            libc::munmap(self.reserved.as_ptr().cast(), before);
            let rest = self.base.add(taken);
            libc::munmap(rest.as_ptr().cast(), self.reserved_len - before - taken);
        }
    }
}

/// Fills a file with [`FILE_WORD`].
fn filled(file: File, len: usize) -> io::Result<File> {
    let page = [FILE_WORD.to_ne_bytes()[0]; PAGE];
    for at in (0..len).step_by(PAGE) {
        file.write_all_at(&page, at as u64)?;
    }
    Ok(file)
}

fn memfd(len: usize) -> io::Result<File> {
    // SAFETY: Makes a file descriptor, which is ours.
    let file = unsafe {
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        let fd = libc::memfd_create(c"dlh-vmm".as_ptr(), flags);
        checked(fd)?;
        File::from_raw_fd(fd)
    };
    file.set_len(len as u64)?;
    Ok(file)
}

fn checked(result: i32) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn checked_address(address: *mut libc::c_void) -> io::Result<NonNull<u8>> {
    if address == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(address.cast()).ok_or_else(|| io::Error::other("mapped at 0"))
}
