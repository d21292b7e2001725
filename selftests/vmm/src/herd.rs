// SPDX-License-Identifier: GPL-2.0

//! Many VMs at the same time, for measuring what each of them costs.

use std::time::Instant;

use dlh_abi::Function;

use crate::ktap::Result;
use crate::ring::Ring;
use crate::vm::{Vm, VmConfig, BASE};

/// Small VMs, whose vCPU makes a call for each line of the input; with `rings`, sets up a ring at the first.
pub(crate) fn herd(count: usize, rings: bool) -> Result<()> {
    let begin = Instant::now();
    let memory = if rings { 64 << 10 } else { 0 };
    let config = VmConfig { memory, ..VmConfig::default() };
    let mut vms = (0..count).map(|_| Vm::new(config)).collect::<Result<Vec<_>>>()?;
    println!("ready {}", begin.elapsed().as_secs_f64() * 1e6 / count.max(1) as f64);
    let mut made = Vec::new();
    for line in std::io::stdin().lines() {
        line?;
        let begin = Instant::now();
        for vm in &mut vms {
            if rings && made.len() < count {
                made.push(Ring::set_up(vm, 0, BASE, 64, 0)?);
                continue;
            }
            vm.hypercall(0, Function::Features as u64, 0, 0, 0)?;
        }
        println!("ready {}", begin.elapsed().as_secs_f64() * 1e6 / count.max(1) as f64);
    }
    Ok(())
}
