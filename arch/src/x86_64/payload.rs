//! A bare-metal payload that shows whether a KVM runs unmodified kernels.
//!
//! It is entered in 64-bit mode, in which an emulating KVM already has to
//! follow every instruction, and does what any kernel of today does within its
//! first second. A step that fails ends in `ud2`, for which there is no
//! handler: the vCPU shuts down.

use crossvisor_vmm::arch::SelfTest;

use super::{gdt, layout, load};

/// RAM of the payload, from address 0.
const RAM: u64 = 2 << 20;
/// Interrupt descriptor table.
const IDT: u64 = 0x2000;
/// 16 zero bytes for `cmpxchg16b`, then a counter of interrupts.
const DATA: u64 = 0x3000;
/// The code below, and its two handlers within it.
const CODE: u64 = 0x1_0000;
const PAGE_FAULT_HANDLER: u64 = CODE + 0x100;
const INTERRUPT_HANDLER: u64 = CODE + 0x140;
/// The stack grows down from here.
const STACK: u64 = 0x8_0000;
/// Where the payload tells how far it came: no RAM there, but mapped.
const REPORT: u64 = 0xd000_0000;

const PAGE_FAULT_VECTOR: u64 = 14;
const INTERRUPT_VECTOR: u64 = 0x40;

/// What the steps do.
const STEPS: &[&str] = &[
    "64-bit mode",
    "SSE",
    "cmpxchg16b",
    "a page fault, handled and returned from",
    "an interrupt through the local APIC",
];

/// `rbp` is [`REPORT`] throughout, `rsi` is [`DATA`] from step 3 on, and `rdi`
/// the local APIC from step 5 on.
#[rustfmt::skip]
const MAIN: &[u8] = &[
    // 1: in 64-bit mode.
    0xbd, 0x00, 0x00, 0x00, 0xd0,             // mov ebp, REPORT
    0xc7, 0x45, 0x00, 1, 0, 0, 0,             // mov dword [rbp], 1
    // 2: SSE. CR0: not EM, but MP; CR4: OSFXSR and OSXMMEXCPT.
    0x0f, 0x20, 0xc0,                         // mov rax, cr0
    0x24, 0xfb,                               // and al, ~4
    0x0c, 0x02,                               // or al, 2
    0x0f, 0x22, 0xc0,                         // mov cr0, rax
    0x0f, 0x20, 0xe0,                         // mov rax, cr4
    0x0d, 0x00, 0x06, 0x00, 0x00,             // or eax, 0x600
    0x0f, 0x22, 0xe0,                         // mov cr4, rax
    0xb8, 21, 0, 0, 0,                        // mov eax, 21
    0x66, 0x0f, 0x6e, 0xc0,                   // movd xmm0, eax
    0x66, 0x0f, 0x70, 0xc0, 0x00,             // pshufd xmm0, xmm0, 0
    0x66, 0x0f, 0xfe, 0xc0,                   // paddd xmm0, xmm0
    0x66, 0x0f, 0x73, 0xd8, 12,               // psrldq xmm0, 12
    0x66, 0x0f, 0x7e, 0xc1,                   // movd ecx, xmm0
    0x83, 0xf9, 42,                           // cmp ecx, 42
    0x75, 0x6f,                               // jne fail
    0xc7, 0x45, 0x00, 2, 0, 0, 0,             // mov dword [rbp], 2
    // 3: cmpxchg16b of zeroes with rcx:rbx.
    0xbe, 0x00, 0x30, 0x00, 0x00,             // mov esi, DATA
    0x31, 0xc0,                               // xor eax, eax
    0x31, 0xd2,                               // xor edx, edx
    0xbb, 0x11, 0x11, 0x11, 0x11,             // mov ebx, 0x11111111
    0xb9, 0x22, 0x22, 0x22, 0x22,             // mov ecx, 0x22222222
    0xf0, 0x48, 0x0f, 0xc7, 0x0e,             // lock cmpxchg16b [rsi]
    0x75, 0x4e,                               // jne fail
    0x48, 0x39, 0x4e, 0x08,                   // cmp [rsi+8], rcx
    0x75, 0x48,                               // jne fail
    0xc7, 0x45, 0x00, 3, 0, 0, 0,             // mov dword [rbp], 3
    // 4: a load from 5 GiB + DATA, which is not mapped; the handler maps it
    // to DATA, and the load is repeated.
    0x48, 0xb8, 0x00, 0x30, 0x00, 0x40, 1, 0, 0, 0, // mov rax, 0x140003000
    0x39, 0x18,                               // cmp [rax], ebx
    0x75, 0x33,                               // jne fail
    0xc7, 0x45, 0x00, 4, 0, 0, 0,             // mov dword [rbp], 4
    // 5: an interrupt to itself. Spurious-interrupt vector register: enabled;
    // interrupt command register: vector 0x40, fixed, edge, to self.
    0xbf, 0x00, 0x00, 0xe0, 0xfe,             // mov edi, 0xfee00000
    0xc7, 0x87, 0xf0, 0, 0, 0, 0xff, 0x01, 0, 0, // mov dword [rdi+0xf0], 0x1ff
    0xc7, 0x87, 0x00, 3, 0, 0, 0x40, 0x00, 4, 0, // mov dword [rdi+0x300], 0x40040
    0xfb,                                     // sti
    0xf4,                                     // hlt
    0x83, 0x7e, 0x10, 1,                      // cmp dword [rsi+0x10], 1
    0x75, 0x0b,                               // jne fail
    0xc7, 0x45, 0x00, 5, 0, 0, 0,             // mov dword [rbp], 5
    // done:
    0xfa,                                     // cli
    0xf4,                                     // hlt
    0xeb, 0xfc,                               // jmp done
    // fail:
    0x0f, 0x0b,                               // ud2
];

/// Maps the fifth GiB to the first, as the first's own entry in the page
/// directory pointer table does, and drops the error code.
#[rustfmt::skip]
const PAGE_FAULT: &[u8] = &[
    0x48, 0xc7, 0x04, 0x25, 0x28, 0xa0, 0x00, 0x00, 0x03, 0xb0, 0x00, 0x00,
                                              // mov qword [0xa028], 0xb003
    0x48, 0x83, 0xc4, 0x08,                   // add rsp, 8
    0x48, 0xcf,                               // iretq
];

/// Counts the interrupt and ends it.
#[rustfmt::skip]
const INTERRUPT: &[u8] = &[
    0xff, 0x46, 0x10,                         // inc dword [rsi+0x10]
    0xc7, 0x87, 0xb0, 0, 0, 0, 0, 0, 0, 0,    // mov dword [rdi+0xb0], 0
    0x48, 0xcf,                               // iretq
];

/// The payload.
pub fn self_test() -> SelfTest {
    let mut registers = load::long_mode(CODE, layout::PAGE_TABLES, layout::GDT);
    registers.0.extend([
        ("rsp", STACK),
        ("idtr_base", IDT),
        ("idtr_limit", (INTERRUPT_VECTOR + 1) * 16 - 1),
    ]);
    SelfTest {
        ram_size: RAM,
        ram_base: 0,
        image: vec![
            (layout::GDT, gdt::bytes()),
            (layout::PAGE_TABLES, load::identity_map(layout::PAGE_TABLES)),
            (IDT + PAGE_FAULT_VECTOR * 16, gate(PAGE_FAULT_HANDLER)),
            (IDT + INTERRUPT_VECTOR * 16, gate(INTERRUPT_HANDLER)),
            (DATA, vec![0; 20]),
            (CODE, MAIN.to_vec()),
            (PAGE_FAULT_HANDLER, PAGE_FAULT.to_vec()),
            (INTERRUPT_HANDLER, INTERRUPT.to_vec()),
        ],
        registers,
        report: REPORT,
        steps: STEPS,
    }
}

/// A 64-bit interrupt gate (Intel SDM volume 3, section 6.14.1).
fn gate(handler: u64) -> Vec<u8> {
    let low = handler & 0xffff | u64::from(gdt::CODE_64) << 16;
    // Present, privilege level 0, interrupt gate.
    let low = low | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
    let mut gate = low.to_le_bytes().to_vec();
    gate.extend((handler >> 32).to_le_bytes());
    gate
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where the code's own constants are, so that it and the layout agree.
    #[test]
    fn the_code_uses_the_layouts_addresses() {
        let word =
            |bytes: &[u8], at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!(u64::from(word(MAIN, 1)), REPORT);
        let position = |needle: &[u8]| {
            MAIN.windows(needle.len())
                .position(|bytes| bytes == needle)
                .unwrap()
        };
        let esi = position(&[0xbe]);
        assert_eq!(u64::from(word(MAIN, esi + 1)), DATA);
        let edi = position(&[0xbf]);
        assert_eq!(u64::from(word(MAIN, edi + 1)), layout::LOCAL_APIC.base);
        // The entry of the fifth GiB, and a page directory with its flags.
        let pointers = layout::PAGE_TABLES + 0x1000;
        assert_eq!(u64::from(word(PAGE_FAULT, 4)), pointers + 5 * 8);
        let tables = load::identity_map(layout::PAGE_TABLES);
        assert_eq!(word(PAGE_FAULT, 8), word(&tables, 0x1000));
        assert_eq!(&tables[0x1000 + 5 * 8..0x1000 + 6 * 8], [0; 8]);
    }

    /// Every `jne fail` leads to the `ud2` at the end.
    #[test]
    fn failures_lead_to_the_end() {
        let fail = MAIN.len() - 2;
        assert_eq!(MAIN[fail..], [0x0f, 0x0b]);
        let jumps: Vec<usize> = (0..fail)
            .filter(|&at| MAIN[at] == 0x75 && at + 2 + usize::from(MAIN[at + 1]) == fail)
            .collect();
        assert_eq!(jumps.len(), 5);
    }

    #[test]
    fn each_step_reports_once_and_in_order() {
        let reports: Vec<u8> = MAIN
            .windows(7)
            .filter(|bytes| bytes[..3] == [0xc7, 0x45, 0x00] && bytes[4..] == [0; 3])
            .map(|bytes| bytes[3])
            .collect();
        let steps: Vec<u8> = (1..=STEPS.len() as u8).collect();
        assert_eq!(reports, steps);
    }

    #[test]
    fn the_image_fits_and_does_not_overlap() {
        let test = self_test();
        let mut end = 0;
        let mut image = test.image.clone();
        image.sort_by_key(|(address, _)| *address);
        for (address, bytes) in image {
            assert!(address >= end, "{address:#x}");
            end = address + bytes.len() as u64;
        }
        assert!(end < STACK && STACK < test.ram_size);
        assert!(test.report >= test.ram_size);
    }

    #[test]
    fn gates_are_64_bit_interrupt_gates() {
        let gate = gate(0x1234_5678_9abc_def0);
        assert_eq!(
            gate,
            [
                0xf0, 0xde, 0x10, 0x00, 0x00, 0x8e, 0xbc, 0x9a, 0x78, 0x56, 0x34, 0x12, 0, 0, 0, 0
            ]
        );
    }
}
