"""Compiled kernels on a CPU: an emulator of the PTX that Triton makes, which checks what it runs.

    parse.py         the text of a kernel as statements
    registers.py     the registers of all threads of a program
    arithmetic.py    what instructions compute from registers
    matrix.py        the layouts of matrix instructions, and their products
    memory.py        global and shared memory, and the faults of reading and writing it
    counts.py        what a launch costs: instructions, wavefronts, sectors
    machine.py       a program of a grid, statement by statement, all threads in lock step
    inline.py        a block of inline assembly on given words
    launch.py        Triton's launches run here, with tensors of the CPU
    plugin.py        pytest's tests with every launch emulated

    python -m tests.emulator --arch 80 90 --seconds 600

Semantics are those of NVIDIA's PTX ISA. What the emulator does not know it refuses by name.
"""
