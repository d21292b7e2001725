// SPDX-License-Identifier: GPL-2.0

//! Requests of one VM, and the calls that wait for them.

use dlh_abi::{Contents, GfnRange, Status};
use kernel::prelude::*;
use kvm_ops::{Token, Tokens};

/// Pages somebody waits for.
pub(crate) struct Request {
    pub(crate) frames: GfnRange,
    pub(crate) contents: Contents,
    /// What is said in the end.
    pub(crate) status: Status,
}

/// Requests in the order in which they came, with room for so many.
///
/// # Invariants
///
/// There is a token for each of `list`, at the same place.
pub(crate) struct Requests {
    list: KVec<Request>,
    tokens: Tokens,
}

impl Requests {
    /// None yet. May sleep.
    pub(crate) fn with_capacity(capacity: usize) -> Result<Self> {
        // INVARIANT: Both are empty.
        Ok(Self {
            list: KVec::with_capacity(capacity, GFP_KERNEL_ACCOUNT)?,
            tokens: Tokens::with_capacity(capacity)?,
        })
    }

    /// None, and no room for any.
    pub(crate) fn none() -> Self {
        // INVARIANT: Both are empty.
        Self { list: KVec::new(), tokens: Tokens::none() }
    }

    /// Adds one; gives its token back if there is no room. Any context.
    #[inline]
    pub(crate) fn push(
        &mut self,
        frames: GfnRange,
        contents: Contents,
        token: Token,
    ) -> Result<(), Token> {
        // INVARIANT: Both get one more, or none does: without a token there is no request, and there is as much room
        // in the list.
        self.tokens.push(token)?;
        let request = Request { frames, contents, status: Status::OK };
        let _ = self.list.push_within_capacity(request);
        Ok(())
    }

    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// All of them.
    pub(crate) fn all(&mut self) -> &mut [Request] {
        &mut self.list
    }

    /// Completes all calls, each with what is said of its request, and forgets them. May take a mutex.
    pub(crate) fn complete(&mut self) {
        while let Some(Request { status, .. }) = self.list.last() {
            let alike =
                self.list.iter().rev().take_while(|request| request.status == *status).count();
            let status = *status;
            // INVARIANT: As many of both go.
            self.list.truncate(self.list.len() - alike);
            self.tokens.complete_last(alike, status);
        }
    }
}
