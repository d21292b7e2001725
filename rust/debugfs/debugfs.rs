// SPDX-License-Identifier: GPL-2.0

//! Files in debugfs that hold the module while they are open: it cannot be removed then.
//!
//! What a file shows may outlive what it is about: once a file is removed, reading from its beginning fails
//! with `EIO`. Without debugfs, or where a name is taken, nothing is shown, and nothing else changes.
//!
//! A module that fails to load is freed although its files are open: files are made when nothing can fail any
//! more.
//!
//! C header: `include/linux/debugfs.h`; `rust/dlh_bindings/helpers/debugfs.c`

use core::{ffi::c_void, slice};

use dlh_bindings as bindings;
use kernel::{
    ffi::c_int,
    fmt::{self, Write as _},
    prelude::*,
    str::CStr,
    sync::Arc,
};

/// What stands in debugfs until this is dropped.
///
/// # Invariants
///
/// `dentry` is an entry that is ours to remove, or an error pointer.
struct Entry {
    dentry: *mut bindings::dentry,
    /// Removed later than this.
    _parent: Option<Arc<Entry>>,
}

// SAFETY: debugfs has its own locks; an entry belongs to no thread.
unsafe impl Send for Entry {}
// SAFETY: As above.
unsafe impl Sync for Entry {}

impl Drop for Entry {
    fn drop(&mut self) {
        // SAFETY: By the type invariant, and once; what is below it has been removed before, as it counts its
        // parent. May sleep here.
        unsafe { bindings::dlh_debugfs_remove(self.dentry) }
    }
}

/// A directory; removed with the last of this and what was made in it. Dropping it may sleep.
pub struct Dir(Arc<Entry>);

impl Dir {
    /// A directory in the root of debugfs. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`. A directory that debugfs does not make is no error.
    pub fn new(name: &CStr) -> Result<Self> {
        Self::below(None, name)
    }

    /// A directory in this one. May sleep.
    ///
    /// # Errors
    ///
    /// As [`Dir::new`].
    pub fn subdir(&self, name: &CStr) -> Result<Self> {
        Self::below(Some(&self.0), name)
    }

    fn below(parent: Option<&Arc<Entry>>, name: &CStr) -> Result<Self> {
        let above = parent.map_or(core::ptr::null_mut(), |entry| entry.dentry);
        // SAFETY: The name ends with a zero, and is copied; `above` is null for the root, or lives as long as
        // `parent` does.
        let dentry = unsafe { bindings::dlh_debugfs_dir(name.as_char_ptr(), above) };
        // INVARIANT: Just made, or an error pointer.
        Ok(Self(Arc::new(Entry { dentry, _parent: parent.cloned() }, GFP_KERNEL)?))
    }

    /// Whether there is something called `name` in it. May sleep.
    pub fn has(&self, name: &CStr) -> bool {
        // SAFETY: By the invariant of `Entry`; the name ends with a zero.
        unsafe { bindings::dlh_debugfs_has(self.0.dentry, name.as_char_ptr()) }
    }

    /// A file that shows `content` as text, for everybody who may look into debugfs. May sleep.
    ///
    /// Readers make the text anew whenever they read from the beginning: then [`fmt::Display::fmt`] is called,
    /// which may sleep, but must not wait for what a user holds up. Memory is allocated while it writes, so it
    /// must not write with locks held that others wait for, nor with spin locks.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub fn text<T>(&self, name: &CStr, content: T) -> Result<File<T>>
    where
        T: fmt::Display + Send + Sync + 'static,
    {
        let raw = bindings::dlh_file { show: Some(show::<T>), ..Default::default() };
        File::new(self, name, raw, content)
    }

    /// A file of bytes, for everybody who may look into debugfs. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub fn binary<T: Binary>(&self, name: &CStr, content: T) -> Result<File<T>> {
        let raw = bindings::dlh_file { read: Some(read::<T>), ..Default::default() };
        File::new(self, name, raw, content)
    }

    /// A file that is written to, by root. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub fn sink<T: Sink>(&self, name: &CStr, content: T) -> Result<File<T>> {
        let raw = bindings::dlh_file { write: Some(write::<T>), ..Default::default() };
        File::new(self, name, raw, content)
    }
}

/// Bytes to be read.
pub trait Binary: Send + Sync + 'static {
    /// Puts what there is from `offset` on into `piece`; returns how many bytes. May sleep, but must not wait
    /// for what a user holds up.
    fn read(&self, offset: u64, piece: &mut [u8]) -> usize;
}

/// What can be written to.
pub trait Sink: Send + Sync + 'static {
    /// Takes what was written at once, at most 16 bytes. May sleep.
    fn write(&self, bytes: &[u8]) -> Result;
}

/// A file. Dropping it removes it, and waits for those who are just making what they read; may sleep.
///
/// # Invariants
///
/// `entry` leads to `content`, whose `raw.data` points to its `shown`.
pub struct File<T> {
    // Dropped first.
    _entry: Entry,
    _content: KBox<Content<T>>,
}

struct Content<T> {
    raw: bindings::dlh_file,
    shown: T,
}

// SAFETY: What is shown may be used and dropped by any thread; the pointer in `raw` leads to nothing else.
unsafe impl<T: Send + Sync> Send for Content<T> {}
// SAFETY: As above.
unsafe impl<T: Send + Sync> Sync for Content<T> {}

impl<T: Send + Sync + 'static> File<T> {
    /// The callback in `raw` is for a `T`.
    fn new(dir: &Dir, name: &CStr, raw: bindings::dlh_file, shown: T) -> Result<Self> {
        let mut content = KBox::new(Content { raw, shown }, GFP_KERNEL)?;
        content.raw.data = core::ptr::from_ref(&content.shown).cast();
        // SAFETY: The name ends with a zero, and is copied; `dir` lives. `raw` stays in its box until the entry
        // has been removed, and so does what its callback is given, which is a `T`.
        let dentry =
            unsafe { bindings::dlh_debugfs_file(name.as_char_ptr(), dir.0.dentry, &content.raw) };
        // INVARIANT: Just made, or an error pointer.
        let entry = Entry { dentry, _parent: Some(dir.0.clone()) };
        Ok(Self { _entry: entry, _content: content })
    }
}

/// The text of an open file, while it is made.
struct Text(*mut bindings::dlh_text);

impl fmt::Write for Text {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        // SAFETY: C passed the text to the callback that this lives in; the string has this length.
        match unsafe { bindings::dlh_text_append(self.0, s.as_ptr().cast(), s.len()) } {
            0 => Ok(()),
            _ => Err(fmt::Error),
        }
    }
}

/// # Safety
///
/// For a file whose content is a `T`, at `data`, which stays while this runs; `text` is to be filled.
unsafe extern "C" fn show<T: fmt::Display>(
    data: *const c_void,
    text: *mut bindings::dlh_text,
) -> c_int {
    // SAFETY: By the caller's promise; only shared references to it exist while there is a file.
    let shown = unsafe { &*data.cast::<T>() };
    match Text(text).write_fmt(fmt!("{shown}")) {
        Ok(()) => 0,
        // Nothing else fails.
        Err(fmt::Error) => ENOMEM.to_errno(),
    }
}

/// # Safety
///
/// As [`show`]; `to` points to `room` initialised bytes that nobody else uses.
unsafe extern "C" fn read<T: Binary>(
    data: *const c_void,
    offset: u64,
    to: *mut c_void,
    room: usize,
) -> isize {
    // SAFETY: By the caller's promise.
    let (shown, piece) =
        unsafe { (&*data.cast::<T>(), slice::from_raw_parts_mut(to.cast::<u8>(), room)) };
    // Never more than there is room for, whatever is said: C copies as much to the reader.
    isize::try_from(shown.read(offset, piece).min(room)).unwrap_or(0)
}

/// # Safety
///
/// As [`show`]; `bytes` points to `length` initialised bytes.
unsafe extern "C" fn write<T: Sink>(
    data: *const c_void,
    bytes: *const c_void,
    length: usize,
) -> c_int {
    // SAFETY: By the caller's promise.
    let (sink, bytes) =
        unsafe { (&*data.cast::<T>(), slice::from_raw_parts(bytes.cast::<u8>(), length)) };
    sink.write(bytes).map_or_else(Error::to_errno, |()| 0)
}
