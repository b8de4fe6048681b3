# A guest of one sector that proves that a hypervisor runs guests.
#
# What passes for hardware virtualisation may run the BIOS and hang in the first kernel, or interpret each
# instruction, a thousand times slower than software emulation. So this guest does what a kernel does first
# (protected mode, paging, long mode, a timer's interrupts), then a hundred million memory writes, which take
# hardware a tenth of a second, and only then writes its mark into the second sector of its disk and switches off.
#
# probe.bin is this, assembled:
#   as --64 -o probe.o guest.s && ld -m elf_x86_64 -Ttext 0x7c00 --oformat binary -o probe.bin probe.o
    .code16
    .globl _start
_start:
    cli
    xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movw $0x7c00, %sp
    cld
    # Page tables at 0x1000, 0x2000, 0x3000: the first 2 MiB where they are.
    movw $0x1000, %di
    xorl %eax, %eax
    movw $0x0c00, %cx
    rep stosl
    movw $0x2003, 0x1000
    movw $0x3003, 0x2000
    movw $0x0083, 0x3000
    movl $0x1000, %eax
    movl %eax, %cr3
    movl %cr4, %eax
    orb $0x20, %al
    movl %eax, %cr4
    movl $0xc0000080, %ecx
    rdmsr
    orw $0x100, %ax
    wrmsr
    lgdt gdtr
    movl %cr0, %eax
    orl $0x80000001, %eax
    movl %eax, %cr0
    ljmp $8, $long
    .code64
long:
    movw $16, %ax
    movw %ax, %ss
    # Interrupts: a table at 0x4000 with one entry, the timer's.
    movl $0x4000, %edi
    xorl %eax, %eax
    movl $0x200, %ecx
    rep stosl
    leaq tick(%rip), %rax
    movl $0x4000 + 32*16, %edi
    movw %ax, (%rdi)
    movl $0x8e000008, 2(%rdi)
    lidt idtr(%rip)
    # Interrupt controller: vectors from 32 on, all but the timer off.
    movb $0x11, %al
    outb %al, $0x20
    movb $0x20, %al
    outb %al, $0x21
    movb $0x04, %al
    outb %al, $0x21
    movb $0x01, %al
    outb %al, $0x21
    movb $0xfe, %al
    outb %al, $0x21
    # Timer: about 100 Hz.
    movb $0x34, %al
    outb %al, $0x43
    movb $0x9b, %al
    outb %al, $0x40
    movb $0x2e, %al
    outb %al, $0x40
    xorl %ebx, %ebx
    sti
wait:
    hlt
    cmpl $5, %ebx
    jb wait
    cli
    movl $1, %eax
    cpuid
    # Work.
    movl $100000000, %ecx
    movl $0x8000, %edi
work:
    addl %ecx, (%rdi)
    decl %ecx
    jnz work
    # The mark, by the oldest way to write a sector.
    movl $0x8000, %edi
    movl $0x2152434f, %eax
    movl $128, %ecx
    rep stosl
    movw $0x1f6, %dx
    movb $0xe0, %al
    outb %al, %dx
    movw $0x1f2, %dx
    movb $1, %al
    outb %al, %dx
    incw %dx
    outb %al, %dx
    incw %dx
    xorl %eax, %eax
    outb %al, %dx
    incw %dx
    outb %al, %dx
    movw $0x1f7, %dx
    movb $0x30, %al
    outb %al, %dx
ready:
    inb %dx, %al
    andb $0x88, %al
    cmpb $0x08, %al
    jne ready
    movw $0x1f0, %dx
    movl $0x8000, %esi
    movl $256, %ecx
    rep outsw
    movw $0x1f7, %dx
written:
    inb %dx, %al
    testb $0x80, %al
    jnz written
    movb $0xe7, %al
    outb %al, %dx
flushed:
    inb %dx, %al
    testb $0x80, %al
    jnz flushed
    # Off, as the BIOS has set up the power management.
    movw $0x604, %dx
    movw $0x2000, %ax
    outw %ax, %dx
stop:
    hlt
    jmp stop
tick:
    incl %ebx
    pushq %rax
    movb $0x20, %al
    outb %al, $0x20
    popq %rax
    iretq
    .balign 8
gdt:
    .quad 0
    .quad 0x00209a0000000000
    .quad 0x0000920000000000
gdtr:
    .word 23
    .long gdt
idtr:
    .word 0x7ff
    .quad 0x4000
    .org 510
    .word 0xaa55
