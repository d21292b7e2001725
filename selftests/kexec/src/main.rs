// SPDX-License-Identifier: GPL-2.0

//! Another kernel without another machine: what kexec-tools does, as one static program for guests.
//!
//! `dlh-kexec load` gives the kernel an image to go on with, or, with `--panic`, to go on with when it
//! panics; `dlh-kexec exec` goes on with it at once.

use std::{
    ffi::CString,
    fs::File,
    io::{Error, Result},
    os::fd::AsRawFd,
    path::PathBuf,
};

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(about = "Loads another kernel, and goes on with it")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Load a kernel.
    Load {
        /// The kernel, a bzImage.
        #[arg(long)]
        kernel: PathBuf,
        /// Its initramfs.
        #[arg(long)]
        initrd: PathBuf,
        /// Its command line.
        #[arg(long)]
        append: CString,
        /// Into the memory set aside by `crashkernel=`, for when this kernel panics.
        #[arg(long)]
        panic: bool,
    },
    /// Go on with the kernel that was loaded.
    Exec,
}

fn load(kernel: PathBuf, initrd: PathBuf, append: CString, panic: bool) -> Result<()> {
    let (kernel, initrd) = (File::open(kernel)?, File::open(initrd)?);
    let append = append.as_bytes_with_nul();
    let flags = if panic { libc::KEXEC_FILE_ON_CRASH } else { 0 };
    // SAFETY: `append` is a string of that many bytes, the zero at its end included.
    let result = unsafe {
        libc::syscall(
            libc::SYS_kexec_file_load,
            libc::c_long::from(kernel.as_raw_fd()),
            libc::c_long::from(initrd.as_raw_fd()),
            append.len(),
            append.as_ptr(),
            libc::c_long::from(flags),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(Error::last_os_error())
    }
}

fn main() -> Result<()> {
    match Arguments::parse().command {
        Command::Load { kernel, initrd, append, panic } => load(kernel, initrd, append, panic),
        Command::Exec => {
            // SAFETY: No memory of this process is named.
            unsafe { libc::reboot(libc::LINUX_REBOOT_CMD_KEXEC) };
            Err(Error::last_os_error())
        }
    }
}
