/* switch.S: void cuda_emulation_switch(void **save, void *to): stores the stack pointer, with callee-saved registers on the
 * stack, and goes on where `to` was stored. */
#if defined(__x86_64__)
    .text
    .globl cuda_emulation_switch
    .hidden cuda_emulation_switch
    .type cuda_emulation_switch, @function
cuda_emulation_switch:
    .cfi_startproc
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .cfi_endproc
    .size cuda_emulation_switch, .-cuda_emulation_switch
#elif defined(__aarch64__)
    .text
    .globl cuda_emulation_switch
    .hidden cuda_emulation_switch
    .type cuda_emulation_switch, %function
cuda_emulation_switch:
    sub sp, sp, #160
    stp x19, x20, [sp]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
    .size cuda_emulation_switch, .-cuda_emulation_switch
#else
#error "switch.S has x86-64 and aarch64"
#endif
    .section .note.GNU-stack, "", %progbits
