// SPDX-License-Identifier: GPL-2.0

//! Many VMs at the same time, for measuring what each of them costs.

use std::time::Instant;

use dlh_abi::Function;

use crate::ktap::Result;
use crate::vm::{Vm, VmConfig};

/// Small VMs, whose vCPU makes a call when they are made, and again for each line of the input.
pub(crate) fn herd(count: usize) -> Result<()> {
    let begin = Instant::now();
    let config = VmConfig { memory: 0, ..VmConfig::default() };
    let mut vms = (0..count).map(|_| Vm::new(config)).collect::<Result<Vec<_>>>()?;
    println!("ready {}", begin.elapsed().as_micros() as f64 / count.max(1) as f64);
    for line in std::io::stdin().lines() {
        line?;
        let begin = Instant::now();
        for vm in &mut vms {
            vm.hypercall(0, Function::Features as u64, 0, 0, 0)?;
        }
        println!("ready {}", begin.elapsed().as_micros() as f64 / count.max(1) as f64);
    }
    Ok(())
}
