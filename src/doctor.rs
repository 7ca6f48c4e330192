//! `crossvisor doctor`.

use std::process::ExitCode;

use crossvisor_arch as arch;
use crossvisor_vmm::arch::{Architecture, Capability, Host};
use crossvisor_vmm::config::VmConfig;
use crossvisor_vmm::kvm::{self, Kvm};
use crossvisor_vmm::selftest::{self, Verdict};
use serde_json::json;

use crate::args::DoctorArgs;
use crate::print;

/// Says what this host's KVM can do. Succeeds when it runs stock kernels.
pub fn doctor(args: &DoctorArgs) -> Result<ExitCode, String> {
    let arch = backend()?;
    let side = arch.kvm().ok_or("internal error: no KVM side")?;
    let kvm = match kvm::open() {
        Ok(kvm) => kvm,
        Err(error) if args.json => {
            let report = json!({
                "arch": arch.name(),
                "runs_stock_kernels": false,
                "reason": error.to_string(),
            });
            print::output(&format!("{report:#}\n"))?;
            return Ok(ExitCode::FAILURE);
        }
        Err(error) => return Err(error.to_string()),
    };
    let host = side.probe(&kvm).map_err(|error| error.to_string())?;
    let problem = stock_kernel_problem(arch, &kvm, &host);
    if args.json {
        let report = json!({
            "arch": arch.name(),
            "host": host,
            "runs_stock_kernels": problem.is_none(),
            "reason": problem,
        });
        print::output(&format!("{report:#}\n"))?;
    } else {
        print::output(&text(arch, &host, problem.as_deref()))?;
    }
    Ok(match problem {
        None => ExitCode::SUCCESS,
        Some(_) => ExitCode::FAILURE,
    })
}

/// The architecture of this host.
pub fn backend() -> Result<&'static dyn Architecture, String> {
    arch::host().ok_or_else(|| {
        format!(
            "crossvisor has no KVM backend for this host's architecture ({}) yet; `crossvisor \
             plan --arch NAME` works here",
            std::env::consts::ARCH
        )
    })
}

/// Why this KVM runs no unmodified kernels, if so.
pub fn stock_kernel_problem(arch: &dyn Architecture, kvm: &Kvm, host: &Host) -> Option<String> {
    // Where there is no payload, every KVM that a machine can be built on runs
    // unmodified kernels (s390x).
    if arch.self_test().is_none() {
        let machine = arch.machine(&VmConfig::default(), host);
        return machine.err().map(|error| error.to_string());
    }
    match selftest::run(arch, kvm, host) {
        Ok(Verdict::Passed) => None,
        Ok(Verdict::Failed { step, reason }) => Some(format!(
            "this /dev/kvm cannot run unmodified kernels: a test payload did not get through \
             `{step}` ({reason})"
        )),
        Err(error) => Some(error.to_string()),
    }
}

fn text(arch: &dyn Architecture, host: &Host, problem: Option<&str>) -> String {
    let mut text = format!(
        "{} host, {}-byte pages, up to {} vCPUs, {}-bit guest-physical addresses\n\n",
        arch.name(),
        host.page_size,
        host.max_vcpus,
        host.physical_bits
    );
    let value = |capability: &Capability| match capability.value {
        0 => "no".to_string(),
        1 => "yes".to_string(),
        value @ 2..0x1_0000 => value.to_string(),
        // Versions and masks.
        value => format!("{value:#x}"),
    };
    let longest = |text: &dyn Fn(&Capability) -> usize| {
        let lengths = host.capabilities.iter().map(text);
        lengths.max().unwrap_or_default()
    };
    let names = longest(&|capability| capability.name.len());
    let values = longest(&|capability| value(capability).len());
    for capability in &host.capabilities {
        text += &format!(
            "  {:<names$}  {:>values$}  {}\n",
            capability.name,
            value(capability),
            capability.effect
        );
    }
    text += "\n";
    text += &match problem {
        None if arch.self_test().is_none() => {
            "this /dev/kvm runs unmodified kernels, as every one of this architecture does\n".into()
        }
        None => "a test payload ran through: this /dev/kvm runs unmodified kernels\n".to_string(),
        Some(problem) => {
            format!("{problem}\nwhat works instead: `cargo lab run`, in an emulated machine\n")
        }
    };
    text
}
