// SPDX-License-Identifier: GPL-2.0
/* What may be released of a VMM's memory, and how. */

#include <linux/cred.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/falloc.h>
#include <linux/hugetlb.h>
#include <linux/mm.h>
#include <linux/pagemap.h>
#include <linux/rcupdate.h>
#include <linux/shmem_fs.h>
#include <linux/string.h>
#include <linux/userfaultfd_k.h>
#include <linux/xarray.h>

#include "../helpers.h"

/*
 * The address space of the current thread, whose mmap lock is taken for reading; or NULL if others have it. It is not
 * waited for: it may be held as long as a file system in user space likes.
 */
struct mm_struct *dlh_mmap_trylock(void)
{
	struct mm_struct *mm = current->mm;

	return mm && mmap_read_trylock(mm) ? mm : NULL;
}

void dlh_mmap_unlock(struct mm_struct *mm)
{
	mmap_read_unlock(mm);
}

/* The caller holds the mmap lock. */
struct vm_area_struct *dlh_vma_lookup(struct mm_struct *mm, unsigned long address)
{
	return vma_lookup(mm, address);
}

unsigned long dlh_vma_end(const struct vm_area_struct *vma)
{
	return vma->vm_end;
}

static enum dlh_vma vma_kind(const struct vm_area_struct *vma)
{
	bool shared = vma->vm_flags & (VM_SHARED | VM_MAYSHARE);

	if (is_vm_hugetlb_page(vma))
		return shared ? DLH_VMA_SHARED_FILE : DLH_VMA_PRIVATE_FILE;
	if (vma->vm_file && shmem_mapping(vma->vm_file->f_mapping))
		return shared ? DLH_VMA_SHARED_FILE : DLH_VMA_PRIVATE_FILE;
	if (vma_is_anonymous((struct vm_area_struct *)vma) && !shared)
		return DLH_VMA_ANONYMOUS;
	/* Of a disk, a network, another host. What DAX maps is the device's own memory. */
	if (vma->vm_file && !shared && S_ISREG(file_inode(vma->vm_file)->i_mode) && !vma_is_dax(vma))
		return DLH_VMA_PRIVATE_OTHER;
	return DLH_VMA_KIND;
}

/* The caller holds the mmap lock. */
enum dlh_vma dlh_vma_judge(struct vm_area_struct *vma)
{
#ifdef DLH_FAULT_NO_VMA_CHECK
	return DLH_VMA_ANONYMOUS;
#endif
	if (vma->vm_flags & (VM_PFNMAP | VM_MIXEDMAP | VM_IO))
		return DLH_VMA_PFNMAP;
	/* Whether pages are pinned is seen only where they may be read. */
	if (!(vma->vm_flags & VM_READ) || !(vma->vm_flags & VM_WRITE))
		return DLH_VMA_KIND;
	if (vma->vm_flags & VM_LOCKED)
		return DLH_VMA_LOCKED;
	if (userfaultfd_armed(vma))
		return DLH_VMA_UFFD;
	return vma_kind(vma);
}

/* What is mapped, and freed, at a time: a huge page of hugetlbfs, or else a page. */
unsigned long dlh_vma_page_bytes(const struct vm_area_struct *vma)
{
	if (!is_vm_hugetlb_page(vma))
		return PAGE_SIZE;
	return huge_page_size(hstate_vma((struct vm_area_struct *)vma));
}

/* How far it is from address, where nothing is mapped, to the next VMA. The caller holds the mmap lock. */
unsigned long dlh_unmapped_bytes(struct mm_struct *mm, unsigned long address)
{
	const struct vm_area_struct *vma = find_vma(mm, address);

	return (vma ? vma->vm_start : TASK_SIZE_MAX) - address;
}

/* Takes a part of a VMA out of the page tables. The caller holds the mmap lock. */
void dlh_vma_zap(struct vm_area_struct *vma, unsigned long start, unsigned long bytes)
{
	zap_vma_range(vma, start, bytes);
}

/* Set by the first pin in this mm and never cleared: without it no page of it is pinned. */
bool dlh_mm_has_pinned(struct mm_struct *mm)
{
	return mm_flags_test(MMF_HAS_PINNED, mm);
}

/*
 * Gives back the pages that were looked at, one folio at a time. Returns how many at the front are like the
 * first, pinned or not; pinned says which.
 */
static unsigned long count_alike(struct page **pages, unsigned long found, bool *pinned)
{
	unsigned long i, next, alike = 0;

	for (i = 0; i < found; i = next) {
		struct folio *folio = page_folio(pages[i]);
		bool this = folio_maybe_dma_pinned(folio);

		for (next = i + 1; next < found && page_folio(pages[next]) == folio; next++)
			;
		if (!i)
			*pinned = this;
		if (alike == i && this == *pinned)
			alike = next;
		folio_put_refs(folio, next - i);
	}
	return alike;
}

/*
 * Takes references to pages from address on, at most wanted, for as long as they are present; nothing is
 * faulted in. The caller holds the mmap lock, and the VMA may be read: then -EFAULT says that nothing is there
 * (or that a count has overflowed, which the kernel warns of).
 *
 * The fast variant, which looks at current->mm only, finds no VMA for each page and takes no locks, but fails on
 * pages that are present, for a PROT_NONE of NUMA balancing, a protection key or a concurrent change. So what it
 * does not find is looked for again, by the remote variant, which no protection key stops.
 */
static long get_present(struct mm_struct *mm, unsigned long address, unsigned long wanted,
			struct page **pages)
{
	int found = 0;

	if (mm == current->mm)
		found = get_user_pages_fast_only(address, wanted, 0, pages);
	if (found > 0)
		return found;
	return get_user_pages_remote(mm, address, wanted, FOLL_NOFAULT, pages, NULL);
}

/*
 * How many bytes from start on, at most bytes and at least one page, are not pinned, or are, or may be: pinned
 * says which. Only pages that are present are looked at, each first of page_bytes: a pinned page is never
 * unmapped for migration or swap. The caller holds the mmap lock, and the VMA may be read.
 */
unsigned long dlh_pinned_front(struct mm_struct *mm, unsigned long start, unsigned long bytes,
			       unsigned long page_bytes, bool *pinned)
{
	struct page *pages[64] __uninitialized;
	unsigned long done = 0;

	*pinned = false;
	while (done < bytes) {
		unsigned long wanted = 1, alike;
		bool these;
		long found;

		if (page_bytes == PAGE_SIZE)
			wanted = min(ARRAY_SIZE(pages), (bytes - done) / PAGE_SIZE);
		found = get_present(mm, start + done, wanted, pages);
		if (found == -EFAULT) {
			done += page_bytes;
			continue;
		}
		if (found > 0) {
			alike = count_alike(pages, found, &these);
		} else {
			/* What cannot be decided counts as pinned. */
			alike = 1;
			these = true;
		}
		if (these) {
			if (done)
				break;
			*pinned = true;
			return min(alike * page_bytes, bytes);
		}
		done += alike * page_bytes;
		if (alike < found)
			break;
	}
	return min(done, bytes);
}

/*
 * Maps the zero page wherever nothing is mapped, as if the VMM had read there. The caller holds the mmap
 * lock of current->mm.
 */
void dlh_map_zero_page(unsigned long start, unsigned long bytes)
{
	unsigned long i;

	for (i = 0; i < bytes; i += PAGE_SIZE) {
		struct page *page;

		if (get_user_pages(start + i, 1, 0, &page) != 1)
			break;
		put_page(page);
	}
}

/* The file behind a VMA, and where in it address lies. The caller holds the mmap lock. */
struct file *dlh_vma_file(const struct vm_area_struct *vma, unsigned long address, u64 *offset)
{
	*offset = address - vma->vm_start + ((u64)vma->vm_pgoff << PAGE_SHIFT);
	return vma->vm_file;
}

/* Of those that the above returns: shmem, or else hugetlbfs. */
bool dlh_file_is_shmem(const struct file *file)
{
	return shmem_mapping(file->f_mapping);
}

struct file *dlh_file_get(struct file *file)
{
	return get_file(file);
}

/* Any context. If it is the last, the rest is done by the kernel's own worker for that. */
void dlh_file_put(struct file *file)
{
	fput(file);
}

/* Whether a page of a file holds zeroes. What is larger than shmem's pages is not looked into. */
static bool folio_is_zero(struct folio *folio, unsigned long index)
{
	const void *page;
	unsigned long i;
	u64 copy[32];

	if (folio_test_hugetlb(folio) || !folio_test_uptodate(folio) || folio_contain_hwpoisoned_page(folio))
		return false;
	page = folio_address(folio) + ((index - folio->index) << PAGE_SHIFT);
	/* What has a memory error that nobody knows of yet fails, and does not stop the machine. */
	for (i = 0; i < PAGE_SIZE; i += sizeof(copy))
		if (copy_mc_to_kernel(copy, page + i, sizeof(copy)) || memchr_inv(copy, 0, sizeof(copy)))
			return false;
	return true;
}

/*
 * How many bytes of a file from offset on, at most bytes, read as zeroes: there is no page in memory or
 * in swap, or one of zeroes. Nothing stays locked: what others write there meanwhile is theirs to be seen.
 */
unsigned long dlh_file_zero_bytes(struct file *file, u64 offset, unsigned long bytes)
{
	unsigned long first = offset >> PAGE_SHIFT;
	unsigned long count = bytes >> PAGE_SHIFT;
	XA_STATE(xas, &file->f_mapping->i_pages, first);
	unsigned long done = 0;

	rcu_read_lock();
	while (done < count) {
		struct folio *folio;
		bool zero;

		xas_set(&xas, first + done);
		folio = xas_find(&xas, first + count - 1);
		if (xas_retry(&xas, folio))
			continue;
		if (!folio) {
			done = count;
			break;
		}
		/* A large folio is found at its beginning, which may lie before. */
		done = max(done, max(xas.xa_index, first) - first);
		if (xa_is_value(folio) || !folio_try_get(folio))
			break;
		zero = folio == xas_reload(&xas) && folio_is_zero(folio, first + done);
		folio_put(folio);
		if (!zero)
			break;
		done++;
	}
	rcu_read_unlock();
	return done << PAGE_SHIFT;
}

/*
 * How many bytes of a file from offset on, at most bytes, hold no page that is pinned or locked in
 * memory, by whomever. The page after them is, or may be: *locked says which.
 */
unsigned long dlh_file_loose_bytes(struct file *file, u64 offset, unsigned long bytes, bool *locked)
{
	unsigned long index = offset >> PAGE_SHIFT;
	unsigned long end = (offset + bytes - 1) >> PAGE_SHIFT;
	XA_STATE(xas, &file->f_mapping->i_pages, index);
	unsigned long loose = bytes;
	struct folio *folio;

	/* All of it, by shmctl(SHM_LOCK) or as a file system without swap. */
	*locked = mapping_unevictable(file->f_mapping);
	if (*locked)
		return 0;
	rcu_read_lock();
	xas_for_each(&xas, folio, end) {
		bool pinned;

		if (xas_retry(&xas, folio) || xa_is_value(folio))
			continue;
		/* Without a reference it may become part of something else while it is looked at. */
		if (!folio_try_get(folio)) {
			xas_reset(&xas);
			continue;
		}
		if (folio != xas_reload(&xas)) {
			folio_put(folio);
			xas_reset(&xas);
			continue;
		}
		*locked = folio_test_mlocked(folio);
		pinned = folio_maybe_dma_pinned(folio);
		folio_put(folio);
		if (!*locked && !pinned)
			continue;
		loose = xas.xa_index <= index ? 0 : (xas.xa_index - index) << PAGE_SHIFT;
		break;
	}
	rcu_read_unlock();
	return loose;
}

/*
 * Makes a hole in a file of shmem, for all who map it, as vfs_fallocate() does, but for the wait: who has the lock of
 * the inode may be writing to the file what a user's page fault handler does not deliver. The caller may hold the
 * mmap lock, since nothing that is outside of it is waited for. -EAGAIN: others have the lock, or freeze the file
 * system; -EBADF: not open for writing; -EPERM: sealed, or not to be changed.
 *
 * Not done is what keeps faults in the hole off while it is made: that is for those who loop for as long as pages come
 * back, as this did once (shmem_fault() in mm/shmem.c). Security modules are not asked, and those who watch the file not
 * told: the guest could as well write zeroes.
 */
int dlh_shmem_punch(struct file *file, u64 offset, unsigned long bytes)
{
	struct address_space *mapping = file->f_mapping;
	struct inode *inode = mapping->host;
	struct super_block *sb = inode->i_sb;
	int result = 0;

	if (!(file->f_mode & FMODE_WRITE))
		return -EBADF;
	if (inode != file_inode(file) || !file->f_op->fallocate || IS_APPEND(inode) ||
	    IS_IMMUTABLE(inode) || IS_SWAPFILE(inode))
		return -EPERM;
	if (!sb_start_write_trylock(sb))
		return -EAGAIN;
	if (!inode_trylock(inode)) {
		sb_end_write(sb);
		return -EAGAIN;
	}
	if ((SHMEM_I(inode)->seals & (F_SEAL_WRITE | F_SEAL_FUTURE_WRITE)) ||
	    (SHMEM_I(inode)->flags & SHMEM_F_MAPPING_FROZEN)) {
		result = -EPERM;
	} else {
		unmap_mapping_range(mapping, offset, bytes, 0);
		shmem_truncate_range(inode, offset, offset + bytes - 1);
	}
	inode_unlock(inode);
	sb_end_write(sb);
	return result;
}

/*
 * Whether somebody has the lock of a file's inode, or the file system is being frozen: at this moment, no more is said.
 */
bool dlh_file_is_busy(struct file *file)
{
	struct inode *inode = file_inode(file);

	if (!sb_start_write_trylock(inode->i_sb))
		return true;
	sb_end_write(inode->i_sb);
	if (!inode_trylock(inode))
		return true;
	inode_unlock(inode);
	return false;
}

/*
 * Makes a hole in a file, as whoever opened it. Waits for the lock of the inode; the caller must hold nothing that
 * others need. -EBADF: not open for writing; -EPERM: sealed.
 */
int dlh_file_punch(struct file *file, u64 offset, unsigned long bytes)
{
	const int mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
	int result = -EPERM;

	scoped_with_creds(file->f_cred)
		result = vfs_fallocate(file, mode, offset, bytes);
	return result;
}

/*
 * How many of the pages from address on the file has in memory that a VMA maps, shared; 0 for other memory. Large
 * folios count where all of their pages are among those. The caller holds the mmap lock, and the pages lie in
 * the VMA. Only entries are looked at, no folio.
 */
static u64 in_shared_file(const struct vm_area_struct *vma, unsigned long address, u64 pages)
{
	unsigned long first, last;
	struct folio *folio;
	u64 found = 0;

	if (!pages || vma_kind(vma) != DLH_VMA_SHARED_FILE)
		return 0;
	first = vma->vm_pgoff + ((address - vma->vm_start) >> PAGE_SHIFT);
	last = first + pages - 1;
	XA_STATE(xas, &vma->vm_file->f_mapping->i_pages, first);
	rcu_read_lock();
	xas_for_each(&xas, folio, last) {
		unsigned long begin, count;

		if (xas_retry(&xas, folio) || xa_is_value(folio))
			continue;
		count = 1UL << xas_get_order(&xas);
		begin = xas.xa_index & ~(count - 1);
		if (begin >= first && count - 1 <= last - begin)
			found += count;
	}
	rcu_read_unlock();
	return found;
}

/*
 * The same for as many of the pages as lie in one VMA. The mm has a count (mmgrab), but may have no users any more: no
 * user is added here, for the last one to go takes the address space down, and may wait for a file system in user space
 * then. A VMA that is found while there are users stays until the lock is let go of: exit_mmap() takes it for
 * writing before it frees any (mm/mmap.c). Waits for nobody.
 */
u64 dlh_mm_in_shared_file(struct mm_struct *mm, unsigned long address, u64 pages)
{
	const struct vm_area_struct *vma;
	u64 found = 0;

	if (!mmap_read_trylock(mm))
		return 0;
	vma = atomic_read(&mm->mm_users) ? vma_lookup(mm, address) : NULL;
	if (vma)
		found = in_shared_file(vma, address,
				       min_t(u64, pages, (vma->vm_end - address) >> PAGE_SHIFT));
	mmap_read_unlock(mm);
	return found;
}
