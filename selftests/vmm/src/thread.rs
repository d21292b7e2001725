// SPDX-License-Identifier: GPL-2.0

//! A vCPU on a thread of its own, and how to get it back.

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use crate::ktap::{failed, Result};
use crate::vcpu::Vcpu;

/// Runs `work` with the vCPU on a new thread while this one does `meanwhile`; then interrupts KVM_RUN
/// there until `work` returns. What interrupts KVM_RUN shows up as [`crate::vcpu::Stop::Interrupted`].
pub(crate) fn with_vcpu<T: Send, M>(
    vcpu: &mut Vcpu,
    work: impl FnOnce(&mut Vcpu) -> Result<T> + Send,
    meanwhile: impl FnOnce() -> Result<M>,
) -> Result<(T, M)> {
    extern "C" fn nothing(_: libc::c_int) {}

    // SAFETY: The handler does nothing; it only keeps the signal from ending the process.
    unsafe { libc::signal(libc::SIGUSR1, nothing as extern "C" fn(_) as libc::sighandler_t) };
    let (sender, receiver) = mpsc::channel();
    thread::scope(|scope| {
        let worker = scope.spawn(move || {
            // SAFETY: Has no preconditions.
            let _ = sender.send(unsafe { libc::pthread_self() });
            work(vcpu)
        });
        let id = receiver.recv()?;
        let seen = meanwhile();
        while !worker.is_finished() {
            // SAFETY: The thread has not been joined, so its id is valid, and handles the signal.
            unsafe { libc::pthread_kill(id, libc::SIGUSR1) };
            thread::sleep(Duration::from_millis(5));
        }
        let worked = worker.join().map_err(|_| "the vCPU thread panicked")?;
        Ok((worked?, seen?))
    })
}

/// How long to wait for what comes on any machine, or never. It ends a hang: no verdict depends on how fast the
/// machine is.
pub(crate) const PATIENCE: Duration = Duration::from_secs(600);

/// Waits until a condition holds; what it was is for the message. It is looked at once more when the time is up.
pub(crate) fn wait_until(limit: Duration, what: &str, holds: impl Fn() -> bool) -> Result<()> {
    let deadline = Instant::now() + limit;
    while !holds() {
        if Instant::now() > deadline {
            if holds() {
                break;
            }
            return failed(format!("after {limit:?}, still not: {what}"));
        }
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}
